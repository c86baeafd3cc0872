"""Figures of a run: those of its own test images, or on other labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histill.data.images import Images, read_images
from histill.data.masks import read_masks
from histill.data.packed import Packed, pack
from histill.data.windows import windows
from histill.errors import BadInput
from histill.evaluate import masks
from histill.evaluate.finish import FIGURES, predictions, scores
from histill.evaluate.intervals import Judged, figures_with_intervals, per_class_table
from histill.evaluate.predict import predict_rows
from histill.machine import find_device
from histill.progress import notice
from histill.run import Run

__all__ = ["judge", "scores_of"]


def scores_of(run: Run, split: str = "test", table: pd.DataFrame | None = None) -> Judged:
    """What a run said of a split's images, by labels or by masks; ``table`` in place of its own predictions."""
    table = run.predictions if table is None else table
    if run.info["data"].get("masks"):
        return masks.scores(table, run.classes, split)
    return scores(table, run.classes, split, positive=run.info["positive"])


def judge(
    run: Run | str | Path,
    data: str | Path | None = None,
    *,
    patient: str | None = None,
    device: str = "auto",
    code: Path | None = None,
) -> dict[str, Any]:
    """Figures with 95 % intervals.

    Args:
        run: a run or its folder.
        data: labelled images from elsewhere, all of which are judged; without it the run's own splits.
        patient: regular expression that reads the patient off an image's path.
        device: where the images of ``data`` are judged: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        code: the Python file of a network that is not Histill's.

    Returns:
        By split (``data`` for images from elsewhere), by metric, ``{"value", "low", "high"}``; also ``per_class``.

    Raises:
        BadInput: no finished run, or labels that it was not trained on.
    """
    run = run if isinstance(run, Run) else Run.open(run, code=code)
    if not run.finished:
        raise BadInput(f"{run.path} is not finished (status: {run.info['status']}); go on with --resume")
    if not run.classes:
        raise BadInput(f"{run.path} was trained without labels: there is nothing to judge it by; start another from it")
    if data is None:
        return {s: f for s, f in run.metrics.items() if isinstance(f, dict)}
    if run.info["data"].get("masks"):
        return _judge_masks(run, data, patient, device)
    images = read_images(data, patient=patient)
    if unknown := sorted(set(images.classes) - set(run.classes)):
        raise BadInput(f"{data}: labels that {run.path} was not trained on: {', '.join(unknown)}")
    packed = _packed(run, images)
    rows = np.arange(len(packed.images))
    where = find_device(device)
    said = predict_rows(run.network().to(where), packed, rows, device=where)
    table = predictions(packed.images, rows, said, classes=run.classes)
    found = scores(table, run.classes, positive=run.info["positive"])
    figures: dict[str, Any] = figures_with_intervals(found, names=FIGURES)
    return {"data": figures | {"per_class": per_class_table(found, run.classes)}}


def _judge_masks(run: Run, data: str | Path, patient: str | None, device: str) -> dict[str, Any]:
    kind: Any = run.info["data"]["masks"]
    where, network = find_device(device), run.network()
    images = read_masks(data, kind=kind, classes=run.classes, patient=patient)
    if kind == "instances" and hasattr(network, "instances"):  # it learnt from windows, not from resized images
        images = windows(images, run.image_size)
    packed = _packed(run, images)
    rows = np.arange(len(packed.images))
    said = masks.ask(network.to(where), packed, rows, device=where)
    return {"data": figures_with_intervals(masks.scores(masks.predictions(packed.images, rows, said), run.classes))}


def _packed(run: Run, images: Images) -> Packed:
    """The images at the run's size; says aloud what was noticed, and what the run was trained on."""
    packed = pack(images, run.image_size)
    for line in packed.images.notices:
        notice(line)
    trained = run.data.frame.query("split == 'train'")["content"]
    if seen := int(packed.images.frame["content"].isin(set(trained)).sum()):
        notice(f"{seen} of these images are among those that {run.path} was trained on: the figures flatter it")
    return packed
