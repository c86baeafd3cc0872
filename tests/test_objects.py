"""Objects are matched as every pair's IoU says, and their metrics are ratios of sums over patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from histill.data.phantom import draw
from histill.errors import BadInput
from histill.evaluate.masks import OBJECT_FIGURES, MaskScores
from histill.evaluate.objects import ObjectCounts, match

Mask = NDArray[np.int64]


def scores(counts: Sequence[ObjectCounts], units: Sequence[Any]) -> MaskScores:
    """Of images of which only the nuclei are looked at."""
    objects = np.array([astuple(c) for c in counts], dtype=np.float64)
    return MaskScores(np.ones((len(counts), 1, 3)), np.array(units), ("nucleus",), objects)


def stripes(*runs: tuple[int, int]) -> Mask:
    """One row: ``(number, length)`` after one another."""
    return np.concatenate([np.full(length, number) for number, length in runs])[None]


def naive(truth: Mask, predicted: Mask, threshold: float) -> tuple[int, int, int, float]:
    """The best of all ways to pair, tried one by one: the most pairs, then the largest sum."""
    a = [truth == n for n in np.unique(truth) if n > 0]
    b = [predicted == n for n in np.unique(predicted) if n > 0]
    swapped = len(a) > len(b)
    few, many = (b, a) if swapped else (a, b)
    best = (0, 0.0)
    for chosen in permutations(range(len(many)), len(few)):
        ious = [(x & many[j]).sum() / (x | many[j]).sum() for x, j in zip(few, chosen, strict=True)]
        good = [iou for iou in ious if iou > threshold]
        best = max(best, (len(good), float(sum(good))))
    return best[0], len(b) - best[0], len(a) - best[0], best[1]


@st.composite
def pairs(draw_: st.DrawFn) -> tuple[Mask, Mask]:
    masks = []
    for _ in range(2):
        mask = np.zeros((8, 9), dtype=np.int64)
        for number in range(1, draw_(st.integers(0, 5)) + 1):
            top, left = draw_(st.integers(0, 6)), draw_(st.integers(0, 7))
            mask[top : top + draw_(st.integers(1, 5)), left : left + draw_(st.integers(1, 5))] = number
        masks.append(mask)
    return masks[0], masks[1]


@settings(deadline=None, max_examples=80)
@given(pairs(), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7]))
def test_matching_is_the_best_of_all_pairings(masks: tuple[Mask, Mask], threshold: float) -> None:
    found = match(*masks, threshold=threshold)
    tp, fp, fn, iou = naive(*masks, threshold)
    assert (found.tp, found.fp, found.fn) == (tp, fp, fn)
    assert found.iou == pytest.approx(iou)


def test_by_hand() -> None:
    truth = stripes((1, 4), (0, 2), (2, 6), (0, 2), (3, 3), (0, 3))
    predicted = stripes((7, 3), (0, 3), (9, 4), (0, 1), (4, 1), (0, 8))
    # 1 and 7: 3 of 4. 2 and 9: 4 of 6. 4 lies in 2 with IoU 1/6; 3 is missed.
    counts = match(truth, predicted)
    assert (counts.tp, counts.fp, counts.fn) == (2, 1, 1)
    assert counts.iou == pytest.approx(3 / 4 + 4 / 6)
    figures = scores([counts], ["a"]).figures(names=OBJECT_FIGURES)
    assert figures["object_f1"][0] == pytest.approx(2 / 3)
    assert figures["panoptic_quality"][0] == pytest.approx((3 / 4 + 4 / 6) / 2 * 2 / 3)  # mean IoU times F1


def test_an_iou_of_the_threshold_is_not_above_it() -> None:
    truth, half = stripes((1, 4), (0, 4)), stripes((1, 2), (2, 2), (0, 4))
    assert match(truth, half, threshold=0.5) == ObjectCounts(0, 2, 1, 0.0)
    assert match(truth, half, threshold=0.49) == ObjectCounts(1, 1, 0, 0.5)


def test_everything_found_and_nothing_there() -> None:
    nuclei = draw("benign", size=64, seed=4).nuclei
    count = len(np.unique(nuclei)) - 1
    assert count > 3
    assert match(nuclei, nuclei) == ObjectCounts(count, 0, 0, float(count))
    nothing = np.zeros((4, 4), np.uint8)
    assert match(nothing, nothing) == ObjectCounts(0, 0, 0, 0.0)
    assert match(nuclei, np.zeros_like(nuclei)) == ObjectCounts(0, 0, count, 0.0)
    assert match(np.zeros_like(nuclei), nuclei) == ObjectCounts(0, count, 0, 0.0)
    assert match(np.ones((3, 3), int), np.full((3, 3), 5)) == ObjectCounts(1, 0, 0, 1.0)
    figures = scores([match(nothing, nothing)], [0]).figures(names=OBJECT_FIGURES)
    assert all(np.isnan(value[0]) for value in figures.values())


@settings(deadline=None, max_examples=30)
@given(pairs(), st.permutations(range(1, 6)), st.permutations(range(1, 6)))
def test_numbers_are_names(masks: tuple[Mask, Mask], p: list[int], q: list[int]) -> None:
    truth, predicted = (np.array([0, *order])[mask] * 1000 for order, mask in zip((p, q), masks, strict=True))
    renamed, plain = match(truth, predicted, threshold=0.2), match(*masks, threshold=0.2)
    assert (renamed.tp, renamed.fp, renamed.fn) == (plain.tp, plain.fp, plain.fn)
    assert renamed.iou == pytest.approx(plain.iou)


def test_where_nobody_knows_nothing_is_counted() -> None:
    truth = stripes((1, 4), (-1, 4), (0, 4))
    assert match(truth, stripes((1, 4), (2, 4), (0, 4))) == ObjectCounts(1, 0, 0, 1.0)
    assert match(truth, stripes((1, 8), (0, 4))) == ObjectCounts(1, 0, 0, 1.0)  # half of it is known: that half counts
    assert match(truth, stripes((1, 4), (0, 1), (2, 4), (0, 3))) == ObjectCounts(1, 0, 0, 1.0)  # 3 of 4 unknown
    assert match(truth, stripes((1, 4), (0, 3), (2, 4), (0, 1))) == ObjectCounts(1, 1, 0, 1.0)  # 1 of 4 unknown


def test_a_weight_is_a_repetition_of_the_unit() -> None:
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(12):
        tp = int(rng.integers(1, 9))
        counts.append(ObjectCounts(tp, int(rng.integers(4)), int(rng.integers(4)), float(rng.uniform(0.5, 1) * tp)))
    units = [f"p{i % 5}" for i in range(12)]
    whole = scores(counts, units)
    weights = np.random.default_rng(1).integers(0, 4, (5, 6)).astype(float)
    found = whole.figures(weights, names=OBJECT_FIGURES)
    for r in range(6):
        times = dict(zip(whole.unit_names, weights[:, r], strict=True))
        rows = [i for i, unit in enumerate(units) for _ in range(int(times[unit]))]
        again = scores([counts[i] for i in rows], [units[i] for i in rows]).figures(names=OBJECT_FIGURES)
        for name, value in again.items():
            assert found[name][r] == pytest.approx(value[0]), name


def test_metrics_from_sums_by_hand() -> None:
    found = scores([ObjectCounts(3, 1, 0, 2.4), ObjectCounts(1, 0, 3, 0.6)], [0, 1]).figures(names=OBJECT_FIGURES)
    assert found["object_f1"][0] == pytest.approx(8 / 12)
    assert found["panoptic_quality"][0] == pytest.approx(3 / (4 + 0.5 + 1.5))


@pytest.mark.parametrize(
    ("truth", "predicted"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int)),
        (np.zeros((2, 2)), np.zeros((2, 2), int)),
        (np.zeros(4, int),) * 2,
    ],
)
def test_refuses_what_are_no_masks(truth: Any, predicted: Any) -> None:
    with pytest.raises(BadInput, match="masks"):
        match(truth, predicted)


def test_refuses_another_threshold() -> None:
    mask = np.zeros((2, 2), int)
    with pytest.raises(BadInput, match="threshold"):
        match(mask, mask, threshold=1)
