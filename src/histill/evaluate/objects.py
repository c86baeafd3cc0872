"""Metrics of instance masks, in two steps: counts per image first, the metric second.

A predicted nucleus is right when it covers one of the truth. What is right, invented and missed is counted per image
and summed per **unit** (a patient, or an image where there are no patients), and every metric is a function of
weighted sums of those counts, as in `histill.evaluate.metrics`: a bootstrap over patients is one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from histill.errors import BadInput
from histill.evaluate.metrics import Array, _ratio

__all__ = ["OBJECT_METRICS", "ObjectCounts", "Objects", "match", "object_f1", "object_metrics", "panoptic_quality"]

OBJECT_METRICS = (
    "object_f1",
    "object_precision",
    "object_recall",
    "panoptic_quality",
    "segmentation_quality",
    "recognition_quality",
)
"""What `object_metrics` knows; ``recognition_quality`` is ``object_f1`` by its other name."""


@dataclass(frozen=True)
class ObjectCounts:
    """What came of one image: ``tp`` matched pairs, ``fp`` invented, ``fn`` missed, ``iou`` the sum over the pairs."""

    tp: int
    fp: int
    fn: int
    iou: float


def match(truth: NDArray[Any], predicted: NDArray[Any], *, threshold: float = 0.5) -> ObjectCounts:
    """Match the instances of one image, each with one at most, where their intersection over union is large enough.

    From 0.5 on there is never a choice (Kirillov et al. 2019, lemma 1). Below, as many pairs as possible are matched,
    and of those ways the one with the largest sum of IoU is taken.

    Args:
        truth: ``(H, W)`` integers: 0 background, the number of the instance, or -1 where nobody knows.
        predicted: ``(H, W)`` integers, 0 background.
        threshold: Above which (not from which on) IoU a pair counts.

    Pixels where nobody knows are left out; so is a predicted instance with more than half of itself there.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape or truth.ndim != 2 or {truth.dtype.kind, predicted.dtype.kind} - set("iu"):
        raise BadInput(
            f"masks {truth.shape} {truth.dtype} and {predicted.shape} {predicted.dtype}: give integers of one (H, W)"
        )
    if not 0 <= threshold < 1:
        raise BadInput(f"threshold {threshold}: give an IoU from 0 to below 1")
    known = truth >= 0
    predicted = _without_unknown(predicted, known)
    a, b = truth[known], predicted[known]
    a_names, a_rows, a_area = np.unique(a, return_inverse=True, return_counts=True)
    b_names, b_rows, b_area = np.unique(b, return_inverse=True, return_counts=True)
    pair, shared = np.unique(a_rows * len(b_names) + b_rows, return_counts=True)
    i, j = np.divmod(pair, max(len(b_names), 1))
    both = (a_names[i] > 0) & (b_names[j] > 0)
    i, j, shared = i[both], j[both], shared[both]
    iou = shared / (a_area[i] + b_area[j] - shared)
    i, j, iou = i[iou > threshold], j[iou > threshold], iou[iou > threshold]
    if threshold < 0.5 and len(iou):
        gain = np.zeros((i.max() + 1, j.max() + 1))
        gain[i, j] = 1 + iou / (2 * min(gain.shape))  # another pair is worth more than any IoU
        rows, columns = linear_sum_assignment(gain, maximize=True)
        taken = np.isin(i * gain.shape[1] + j, rows * gain.shape[1] + columns)
        iou = iou[taken]
    tp = len(iou)
    fp, fn = (int((names > 0).sum()) - tp for names in (b_names, a_names))
    return ObjectCounts(tp, fp, fn, float(iou.sum()))


def _without_unknown(predicted: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[Any]:
    if known.all():
        return predicted
    rows = np.unique(predicted, return_inverse=True)[1]
    share = np.bincount(rows.ravel(), known.ravel()) / np.bincount(rows.ravel())
    return np.where(share[rows].reshape(predicted.shape) < 0.5, 0, predicted)


@dataclass(frozen=True, eq=False)
class Objects:
    """The counts of ``N`` images, and whose images they are.

    Attributes:
        counts: What `match` found in each.
        units: ``(N,)`` what is resampled, numbers or names: the patient, or the image itself.
    """

    counts: Sequence[ObjectCounts]
    units: Sequence[Any] | NDArray[Any]

    def __post_init__(self) -> None:
        if not len(self.counts) or len(self.counts) != len(self.units):
            raise BadInput(f"objects: {len(self.counts)} images and {len(self.units)} units, give one unit per image")

    @cached_property
    def unit_names(self) -> NDArray[Any]:
        """``(U,)`` each unit once, sorted: the rows of a weight matrix."""
        return np.unique(np.asarray(self.units))

    @cached_property
    def sums(self) -> Array:
        """``(U, 4)``: tp, fp, fn and sum of IoU of each unit."""
        rows = np.searchsorted(self.unit_names, np.asarray(self.units))
        sums = np.zeros((len(self.unit_names), 4))
        np.add.at(sums, rows, np.array([(c.tp, c.fp, c.fn, c.iou) for c in self.counts], dtype=np.float64))
        return sums


def object_formulas(tp: Array, fp: Array, fn: Array, iou: Array) -> dict[str, Array]:
    """Every metric of `OBJECT_METRICS` of summed counts, nan where undefined."""
    return {
        "object_f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "object_precision": _ratio(tp, tp + fp),
        "object_recall": _ratio(tp, tp + fn),
        "panoptic_quality": _ratio(2 * iou, 2 * tp + fp + fn),
        "segmentation_quality": _ratio(iou, tp),
        "recognition_quality": _ratio(2 * tp, 2 * tp + fp + fn),
    }


def object_metrics(
    objects: Objects, weights: Array | None = None, *, names: Sequence[str] = OBJECT_METRICS
) -> dict[str, Array]:
    """The metrics of each weighting of the units.

    Instances are pooled over images, so that an image weighs as much as it has nuclei: object_f1 is
    ``2 tp / (2 tp + fp + fn)``, segmentation_quality the mean IoU of the matched pairs, panoptic_quality their product
    (Kirillov et al. 2019; with a threshold of 0.5).

    Args:
        objects: the images.
        weights: ``(U, R)`` how often each of `Objects.unit_names` counts; ones where None, with R = 1.
        names: which metrics.

    Returns:
        ``(R,)`` for each name, nan where undefined.
    """
    weights = np.ones((len(objects.unit_names), 1)) if weights is None else weights
    formulas = object_formulas(*(objects.sums.T @ weights))
    if unknown := set(names) - set(formulas):
        raise BadInput(f"no metric of objects is called {', '.join(sorted(unknown))}: there are {', '.join(formulas)}")
    return {name: formulas[name] for name in names}


def object_f1(objects: Objects, weights: Array | None = None) -> Array:
    """``(R,)``: twice the matched pairs over all objects, those that are there and those that were predicted."""
    return object_metrics(objects, weights, names=["object_f1"])["object_f1"]


def panoptic_quality(objects: Objects, weights: Array | None = None) -> tuple[Array, Array, Array]:
    """PQ, SQ and RQ, ``(R,)`` each; PQ = SQ * RQ."""
    found = object_metrics(objects, weights)
    return found["panoptic_quality"], found["segmentation_quality"], found["recognition_quality"]
