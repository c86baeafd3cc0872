"""Two AUROCs of the same images: their difference without resampling.

DeLong, DeLong and Clarke-Pearson 1988 (Biometrics 44:837) in the fast form of Sun and Xu 2014 (IEEE Signal Process.
Lett. 21:1389), by midranks, and for images of the same patient Obuchowski 1997 (Biometrics 53:567): a patient's images
are summed before the variance is taken. Where every unit is one image the two are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from histill.errors import BadInput
from histill.evaluate.metrics import Array, Scores

__all__ = ["Delong", "delong"]

_NOTHING = 1e-12  # rounding


@dataclass(frozen=True)
class Delong:
    """The AUROCs ``a`` and ``b``, ``b`` minus ``a``, its standard error, 95 % interval and two-sided p.

    `error` and `p` are nan where the units are too few or do not vary, and `p` is 1 where nothing differs.
    """

    a: float
    b: float
    difference: float
    error: float
    low: float
    high: float
    p: float


def delong(a: Scores, b: Scores, *, target: int | None = None) -> Delong:
    """Compare the AUROC of class ``target`` against the rest.

    It counts on many patients of either kind: with few, or AUROCs near 1, trust the interval of
    `histill.evaluate.intervals.paired_gain` first.

    Args:
        a: what one network said.
        b: what the other said of the same images in the same order.
        target: the class; default the positive one, or class 1 of two.

    Raises:
        BadInput: other images, no target of more than two classes, or none of its images or of the others'.
    """
    if not (np.array_equal(a.labels, b.labels) and np.array_equal(a.units, b.units)):
        raise BadInput("a paired comparison needs the same images in the same order on both sides")
    target = a.positive if target is None else target
    if target is None and a.classes == 2:
        target = 1
    if target is None or not 0 <= target < a.classes:
        raise BadInput(f"target: a class number from 0 to {a.classes - 1}, for more than two classes it must be named")
    positive = a.labels == target
    if positive.all() or not positive.any():
        raise BadInput(f"AUROC of class {target}: all images are of one kind")
    parts = [_components(s.probabilities[:, target], positive) for s in (a, b)]
    areas = [float(won[positive].mean()) for won in parts]
    difference = areas[1] - areas[0]
    error = _error(parts[1] - parts[0], difference, positive, a.unit_rows)
    differ = abs(difference) > _NOTHING
    if differ and not error > _NOTHING:
        error = float("nan")  # nothing varies, as where one says the same of all images: nothing tells of others
    z = float(norm.ppf(0.975))
    p = float(2 * norm.sf(abs(difference) / error)) if differ else 1.0
    return Delong(areas[0], areas[1], difference, error, difference - z * error, difference + z * error, p)


def _components(values: NDArray[Any], positive: NDArray[np.bool_]) -> Array:
    """``(N,)`` the share of the images of the other kind that each image is on the right side of, ties a half."""
    everywhere = rankdata(values)
    own = np.empty(len(values))
    own[positive], own[~positive] = rankdata(values[positive]), rankdata(values[~positive])
    beaten = everywhere - own  # images of the other kind below, ties a half
    return np.asarray(np.where(positive, beaten / (~positive).sum(), 1 - beaten / positive.sum()))


def _error(won: Array, area: float, positive: NDArray[np.bool_], rows: NDArray[np.int64]) -> float:
    """Obuchowski's standard error of an area, or of a difference of two, from its components."""
    sums, counts = [], []
    for kind in (positive, ~positive):
        counts.append(int(kind.sum()))
        here = np.bincount(rows[kind], minlength=rows.max() + 1)
        sums.append((np.bincount(rows[kind], won[kind], rows.max() + 1) - here * area, int((here > 0).sum())))
    (p, p_units), (n, n_units) = sums
    if min(p_units, n_units) < 2:
        return float("nan")
    units = len(p)
    variance = p_units / (p_units - 1) * (p**2).sum() / counts[0] ** 2
    variance += n_units / (n_units - 1) * (n**2).sum() / counts[1] ** 2
    variance += 2 * units / (units - 1) * (p * n).sum() / (counts[0] * counts[1])
    return float(np.sqrt(max(variance, 0.0)))
