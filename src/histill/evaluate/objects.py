"""Metrics of instance masks, in two steps: counts per image first, the metric second.

A predicted nucleus is right when it covers one of the truth. What is right, invented and missed is counted per image,
and every metric is a function of sums of those counts: `histill.evaluate.masks.MaskScores` sums them per patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from histill.errors import BadInput
from histill.evaluate.metrics import Array, ratio

__all__ = ["ObjectCounts", "match", "object_formulas"]


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


def object_formulas(tp: Array, fp: Array, fn: Array, iou: Array) -> dict[str, Array]:
    """Metrics of counts summed over images, so that an image weighs as much as it has nuclei; nan where undefined.

    object_f1 is ``2 tp / (2 tp + fp + fn)``; panoptic_quality is that times the mean IoU of the matched pairs (Kirillov
    et al. 2019; with a threshold of 0.5).
    """
    return {"object_f1": ratio(2 * tp, 2 * tp + fp + fn), "panoptic_quality": ratio(2 * iou, 2 * tp + fp + fn)}
