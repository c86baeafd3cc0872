"""Recipes on slides: patches cut before the training, whole slides judged after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from histill.data.images import few
from histill.deploy.predictor import one_line
from histill.errors import BadInput, Failed, HistillError
from histill.files import read_json, write_json
from histill.progress import notice, say
from histill.run import Run
from histill.slides.cut import cut_slides, find_slides, mask_names
from histill.slides.predict import predict_slides

__all__ = ["cut_for", "judge_slides"]

PATCHES = "patches"


def cut_for(
    out: Path,
    slides: Sequence[Path],
    *,
    masks: Path | None = None,
    classes: Sequence[str] = (),
    slide_mpp: float | None = None,
    patient: str | None = None,
) -> Path:
    """Patches of slides in ``out/patches``, as the papers cut them: labelled by masks, else unlabelled.

    With masks as MAC-ResNet does (512 px at 20x, half overlapping, more than 3/4 of one class; and background), without
    as RCKD does (1024 px at 20x, by mean intensity). What is there already is not cut again.

    Returns:
        What `histill.data.read_images` takes, or without masks the folder that `read_unlabelled` takes.

    Raises:
        BadInput: see `histill.slides.cut.cut_slides`.
        Failed: some slides could not be cut.
    """
    home = out / PATCHES
    say(str(cut_slides(slides, home, masks=masks, classes=classes, slide_mpp=slide_mpp, patient=patient)))
    return home / "manifest.csv" if masks is not None else home


def judge_slides(
    runs: dict[str, Run], slides: Sequence[Path], out: Path, *, masks: Path, slide_mpp: float | None = None
) -> dict[str, Any]:
    """Predict the slides of the test split with each run, and compare what each is called with its patches' labels.

    A slide's label is that of most of its lesion patches. Overlap with the masks (IoU, Dice) is counted where they are.

    Args:
        runs: by name, trained on patches of these slides.
        slides: the slides, or folders of them.
        out: each run's results go to ``out/NAME``; ``out/summary.json`` holds what is returned.
        masks: their reference masks.
        slide_mpp: the slides' microns per pixel, where the files do not say.

    Returns:
        ``slides``, by run ``{"accuracy": {"value", "low", "high"}, "slides": {name: {"label", "called", ...}}}``; the
        interval is Clopper and Pearson's over slides.

    Raises:
        BadInput: no slide of the test split.
        Failed: some slides could not be read; the others are judged.
    """
    first = next(iter(runs.values()))
    frame = first.data.frame
    test = frame[frame["split"] == "test"]
    labels = test.groupby("slide")["label"].agg(_slide_label)
    paths = [path for path in find_slides(slides) if path.name in labels.index]
    if not paths:
        raise BadInput(f"none of the slides is in the test split of {first.path}; bring more slides or a larger --test")
    how: dict[str, Any] = {"slide_mpp": slide_mpp, "truth": masks, "truth_classes": tuple(mask_names(first.data.root))}
    found: dict[str, Any] = {}
    failed: list[str] = []
    for name, run in runs.items():
        try:
            said = predict_slides(run.path, paths, out / name, **how)["slides"]
        except HistillError as error:  # of some slides; the others are judged
            failed.append(f"{name}: {one_line(error)}")
            summary = out / name / "summary.json"
            said = read_json(summary)["slides"] if len(paths) > 1 and summary.is_file() else {}
        rows = {
            path.name: {"label": labels[path.name], "called": said[path.stem]["call"]["label"]}
            | {key: said[path.stem].get(key) for key in ("agreement",)}
            for path in paths
            if path.stem in said
        }
        right, count = sum(row["label"] == row["called"] for row in rows.values()), len(rows)
        interval = binomtest(right, count).proportion_ci() if count else None
        found[name] = {
            "accuracy": {
                "value": right / count if count else None,
                "low": None if interval is None else float(interval.low),
                "high": None if interval is None else float(interval.high),
            },
            "slides": rows,
        }
        notice(f"{name}: {right} of {count} test slides are called what their patches are labelled")
    judged = {"slides": found}
    write_json(out / "summary.json", judged)
    if failed:
        raise Failed(f"{few(failed)}; the others are judged in {out / 'summary.json'}")
    return judged


def _slide_label(labels: pd.Series[str]) -> str:
    """That of most patches, the background apart where there is a lesion."""
    lesions = labels[labels != "background"]
    names, counts = np.unique(lesions if len(lesions) else labels, return_counts=True)
    return str(names[counts.argmax()])
