"""What a run folder holds once training on masks is over: counts -> figures with intervals, outlines, page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from histill.data.packed import pack
from histill.errors import BadInput
from histill.evaluate import figures
from histill.evaluate.finish import counts, heading, settings
from histill.evaluate.intervals import figures_with_intervals
from histill.evaluate.masks import MaskScores, label_map, scores
from histill.evaluate.outlines import outlines
from histill.evaluate.page import Picture, Section, Table, write_report
from histill.evaluate.report import share
from histill.files import write_json
from histill.run import Run

__all__ = ["finish", "title"]

_SHOWN = 8

TITLES = {
    "miou": "mean IoU",
    "mdice": "mean Dice",
    "pixel_accuracy": "pixel accuracy",
    "object_f1": "nuclei, F1 at IoU 0.5",
    "panoptic_quality": "nuclei, panoptic quality",
}


def finish(out: Path, info: dict[str, Any]) -> None:
    """Write ``metrics.json``, ``figures/`` and ``report.html`` from what the run folder holds."""
    table = pd.read_parquet(out / "predictions.parquet")
    classes = tuple(info["classes"])
    by_split = {s: scores(table, classes, s) for s in ("val", "test") if (table["split"] == s).any()}
    metrics: dict[str, Any] = {split: figures_with_intervals(found) for split, found in by_split.items()}
    write_json(out / "metrics.json", metrics)
    path = out / "figures" / "training.png"
    figures.training(pd.read_csv(out / "log.csv"), path)
    if by_split:
        _page(out, info, table, metrics, next(iter(by_split.values())), path)


def _page(
    out: Path, info: dict[str, Any], table: pd.DataFrame, metrics: dict[str, Any], found: MaskScores, curves: Path
) -> None:
    split = list(metrics)[-1]
    rows = [[title(name, found.classes), *(share(m[name]) for m in metrics.values())] for name in found.names]
    held = counts(info, table)
    unit = "patients" if info["data"]["patients"] is not None else "images"
    sections: list[Section] = [
        *_outlined(out, split),
        Table(
            ["", *metrics],
            rows,
            "Figures by split",
            f"IoU and Dice of the pixels of all images together; 95 % intervals over {unit}. The best epoch was chosen "
            "on the validation images.",
        ),
        Picture(curves, "Each weighted loss term, the validation figures and the learning rate."),
        Table(["Split", "images"], [[s, row["images"]] for s, row in held.items()], "Data"),
        Table(["Name", "Value"], list(settings(info).items()), "Settings"),
    ]
    write_report(
        out / "report.html",
        **heading(out, info),
        answer=f"On the {split} images the mean IoU is {share(metrics[split]['miou'])}.",
        sections=sections,
    )


def _outlined(out: Path, split: str) -> list[Picture]:
    """Images of the split with the outlines of truth and prediction; none where the network is a user's own."""
    run = Run.open(out)
    try:
        network = run.network()
    except BadInput:  # its file would have to be named
        return []
    data = run.data
    rows = np.array(data.rows(split))
    rows = rows[np.linspace(0, len(rows) - 1, min(_SHOWN, len(rows))).astype(int)]
    batch = pack(data.with_frame(data.frame.iloc[rows]), run.image_size).batch(np.arange(len(rows)))
    assert batch.masks is not None
    with torch.no_grad():
        outputs = network(batch.images)
    size = (batch.masks.shape[-2], batch.masks.shape[-1])
    draw = getattr(network, "instances", None) if data.masks == "instances" else None
    drawn = draw(outputs, size) if draw else label_map(outputs, size).numpy()
    pixels = (batch.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    path = out / "figures" / "outlines.png"
    outlines(list(pixels), list(batch.masks.numpy()), path, predicted=list(drawn))
    return [Picture(path, f"Images of the {split} split: truth and prediction.", "Outlines")]


def title(name: str, classes: tuple[str, ...]) -> str:
    """A figure's name for people."""
    if name in TITLES:
        return TITLES[name]
    what, _, of = name.partition("_")
    return f"{'IoU' if what == 'iou' else 'Dice'}, {of}"
