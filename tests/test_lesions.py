"""Lesions have the area, size and place of what is on the map, and the figures are those of plain definitions."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any

import contourpy
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from histill.errors import BadInput
from histill.evaluate.calibration import tempered
from histill.slides.heatmap import Heatmap
from histill.slides.lesions import (
    Lesion,
    _contours,
    agreement,
    call_slide,
    find_lesions,
    froc,
    lesion_classes,
    lesion_features,
    lesion_hits,
)

shapely = pytest.importorskip("shapely")

PIXEL, UM = 8.0, 4.0


def heat(*channels: NDArray[Any], covered: NDArray[np.bool_] | None = None) -> Heatmap:
    p = np.stack(channels).astype(np.float32)
    _, height, width = p.shape
    names = ("normal", "tumour", "other")[: len(p)]
    inside = np.ones((height, width), np.bool_) if covered is None else covered
    return Heatmap(p, inside, names, PIXEL, UM, (round(width * PIXEL), round(height * PIXEL)))


def two(p: NDArray[Any], **options: Any) -> Heatmap:
    return heat(1 - p, p, **options)


def disc(size: int, x: float, y: float, radius: float, soft: float = 2.0) -> NDArray[Any]:
    row, column = np.mgrid[:size, :size] + 0.5
    return np.clip(0.5 + (radius - np.hypot(column - x, row - y)) / (2 * soft), 0, 1)


def test_a_disc_has_its_numbers() -> None:
    [found] = find_lesions(two(disc(100, 40, 50, 20)), ["tumour"])
    assert found.label == "tumour"
    assert found.area_um2 == pytest.approx(math.pi * (20 * UM) ** 2, rel=0.005)
    assert found.perimeter_um == pytest.approx(2 * math.pi * 20 * UM, rel=0.01)
    assert found.diameter_um == pytest.approx(40 * UM, rel=0.01)
    assert np.array(found.polygon.centroid.coords[0]) == pytest.approx((40 * PIXEL, 50 * PIXEL), abs=1)
    assert found.peak == pytest.approx((40 * PIXEL, 50 * PIXEL), abs=PIXEL)
    assert found.peak_probability == 1
    p = disc(100, 40, 50, 20)
    assert found.probability == pytest.approx(p[p > 0.5].mean(), abs=0.01)


def test_the_peak_is_the_likeliest_place_and_of_equal_ones_the_deepest() -> None:
    p = np.zeros((40, 40))
    p[10:30, 10:30] = 0.7
    [flat] = find_lesions(two(p), ["tumour"])
    assert flat.peak == pytest.approx((20 * PIXEL, 20 * PIXEL), abs=PIXEL)
    p[12, 26] = 0.75
    [found] = find_lesions(two(p), ["tumour"])
    assert found.peak == (26.5 * PIXEL, 12.5 * PIXEL)
    assert found.peak_probability == pytest.approx(0.75)


def test_a_threshold_and_the_largest_class_agree_at_a_half() -> None:
    made = two(disc(100, 40, 50, 20, soft=9))
    [one], [other] = (find_lesions(made, ["tumour"], threshold=t) for t in (None, 0.5))
    assert one.area_um2 == pytest.approx(other.area_um2, rel=1e-3)
    [smaller] = find_lesions(made, ["tumour"], threshold=0.8)
    assert smaller.area_um2 == pytest.approx(math.pi * ((20 - 0.3 * 18) * UM) ** 2, rel=0.01)


def test_holes_and_specks() -> None:
    ring = np.minimum(disc(120, 50, 50, 30), 1 - disc(120, 50, 50, 10))
    p = np.maximum(ring, disc(120, 105, 105, 4))
    large, small = find_lesions(two(p), ["tumour"])
    assert len(large.polygon.interiors) == 1
    assert large.area_um2 == pytest.approx(math.pi * (900 - 100) * UM**2, rel=0.01)
    assert large.perimeter_um == pytest.approx(2 * math.pi * 40 * UM, rel=0.01)
    assert small.area_um2 == pytest.approx(math.pi * 16 * UM**2, rel=0.05)
    assert len(find_lesions(two(p), ["tumour"], min_area_um2=20 * math.pi * UM**2)) == 1
    [filled, _] = find_lesions(two(p), ["tumour"], min_hole_um2=120 * math.pi * UM**2)
    assert len(filled.polygon.interiors) == 0
    assert filled.area_um2 == pytest.approx(math.pi * 900 * UM**2, rel=0.01)


def test_a_lesion_is_measured_without_the_one_that_it_embraces() -> None:
    p = np.zeros((40, 40))
    p[5:35, 5:10] = p[30:35, 5:35] = 0.7
    p[10:16, 22:28] = 0.95  # within the corner's box, not of the corner
    corner, spot = find_lesions(two(p), ["tumour"])
    assert (corner.probability, corner.peak_probability) == pytest.approx((0.7, 0.7))
    assert (spot.probability, spot.peak_probability) == pytest.approx((0.95, 0.95))


@pytest.mark.parametrize("sure", [0.55, 1.0])
def test_at_the_edge_of_the_tissue_a_lesion_ends_with_the_last_pixel(sure: float) -> None:
    covered = np.zeros((40, 40), np.bool_)
    covered[10:30, 5:25] = True
    [found] = find_lesions(two(np.full((40, 40), sure) * covered, covered=covered), ["tumour"])
    assert found.polygon.bounds == pytest.approx((5 * PIXEL, 10 * PIXEL, 25 * PIXEL, 30 * PIXEL))
    assert found.area_um2 == pytest.approx(400 * UM**2, rel=0.01)  # but for the corners
    [whole] = find_lesions(two(np.full((40, 40), sure)), ["tumour"])
    assert whole.polygon.bounds == pytest.approx((0, 0, 40 * PIXEL, 40 * PIXEL), abs=1e-3)


def test_no_outline_leaves_the_slide() -> None:
    made = two(np.ones((10, 10)))
    made = Heatmap(made.probabilities, made.covered, made.classes, PIXEL, UM, (75, 78))
    [found] = find_lesions(made, ["tumour"])
    assert found.polygon.bounds == pytest.approx((0, 0, 75, 78), abs=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.booleans())
def test_any_map_gives_valid_outlines_that_do_not_overlap(seed: int, smooth: int, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    p = ndimage.gaussian_filter(rng.random((3, 24, 30)), (0, smooth, smooth))
    if coarse:  # many ties
        p = np.rint(p * 4) + 1
    made = heat(*(p / p.sum(0)), covered=ndimage.gaussian_filter(rng.random((24, 30)), 2) > 0.5)
    found = find_lesions(made, made.classes)
    assert all(lesion.polygon.is_valid for lesion in found)
    assert all(lesion.polygon.geom_type == "Polygon" for lesion in found)
    area = {name: sum(x.polygon.area for x in found if x.label == name) for name in made.classes}
    union = shapely.unary_union([lesion.polygon for lesion in found])
    assert union.area == pytest.approx(sum(area.values()), rel=1e-6)
    assert union.area <= made.covered.sum() * PIXEL**2 * 1.05 + 1e-9
    for lesion in found:
        assert 0 <= lesion.probability <= lesion.peak_probability + 1e-5  # float32
        hull = np.asarray(lesion.polygon.exterior.coords)
        longest = max(math.dist(a, b) for a, b in combinations(hull.tolist(), 2))
        assert lesion.diameter_um == pytest.approx(longest * UM / PIXEL)


def test_which_classes_are_lesions() -> None:
    assert lesion_classes(("normal", "tumour")) == ["tumour"]
    assert lesion_classes(("Benign tissue", "carcinoma", "non-tumour")) == ["carcinoma"]
    assert lesion_classes(("BCC", "MGC", "CM")) == ["BCC", "MGC", "CM"]
    assert lesion_classes(("nevus", "melanoma"), positive="melanoma") == ["melanoma"]
    assert lesion_classes(("abnormal", "healthy")) == ["abnormal"]
    assert lesion_classes(("normal", "benign")) == ["normal", "benign"]
    assert lesion_classes(("a", "b", "c"), given=("c", "a")) == ["a", "c"]
    with pytest.raises(BadInput, match="--lesions x"):
        lesion_classes(("a", "b"), given=("x",))


def tiles(*tumour: float) -> pd.DataFrame:
    p = np.array(tumour)
    size = {"width": 10, "height": 10}
    return pd.DataFrame({"x": np.arange(len(p)) * 10, "y": 0, **size, "prob_normal": 1 - p, "prob_tumour": p})


def lesion(x: float, y: float, score: float, area: float = 100.0, label: str = "tumour") -> Lesion:
    return Lesion(shapely.box(x - 5, y - 5, x + 5, y + 5), label, area, 40.0, 14.1, score, (x, y), score)


def test_a_slide_is_called_by_its_lesions() -> None:
    many = tiles(*[0.9] * 3, *[0.1] * 17)
    call = call_slide(many, ("normal", "tumour"), [lesion(5, 5, 0.9)], ["tumour"])
    assert call["label"] == "tumour"
    assert call["tile_share"] == {"normal": 0.85, "tumour": 0.15}
    assert call["lesion_area_um2"] == {"tumour": 100.0}
    assert call["probability"] == pytest.approx((3 * 0.9 + 7 * 0.1) / 10)
    assert [tile["x"] for tile in call["evidence"]] == list(range(0, 100, 10))
    healthy = call_slide(many, ("normal", "tumour"), [], ["tumour"])
    assert (healthy["label"], healthy["probability"]) == ("normal", pytest.approx(0.9))
    assert call_slide(tiles(), ("normal", "tumour"), [], ["tumour"])["label"] is None


def test_the_evidence_does_not_overlap() -> None:
    table = tiles(0.9, 0.8, 0.7, 0.6)
    table["width"] = 11
    call = call_slide(table, ("normal", "tumour"), [lesion(5, 5, 0.9)], ["tumour"])
    assert [tile["x"] for tile in call["evidence"]] == [0, 20]
    assert call["probability"] == pytest.approx(0.8)


def test_the_temperature_softens() -> None:
    p = np.array([[0.8, 0.2], [0.5, 0.5]])
    assert tempered(p, 1.0) == pytest.approx(p)
    assert tempered(np.array([[1 - 1e-6, 1e-6]]), 1.0)[0, 1] == pytest.approx(1e-6)
    odds = tempered(p, 2.0)
    assert odds[0, 0] / odds[0, 1] == pytest.approx(2.0)  # the root of 4
    soft = call_slide(tiles(0.8), ("normal", "tumour"), [lesion(5, 5, 0.8)], ["tumour"], temperature=2.0)
    assert soft["calibrated"]
    assert soft["probability"] == pytest.approx(2 / 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_iou_and_dice_are_those_of_sets(seed: int) -> None:
    a, b = np.random.default_rng(seed).random((2, 6, 7)) < 0.4
    found = agreement(a, b)
    one, other = ({tuple(place) for place in np.argwhere(mask).tolist()} for mask in (a, b))
    assert found.iou == pytest.approx(len(one & other) / len(one | other))
    assert found.dice == pytest.approx(2 * len(one & other) / (len(one) + len(other)))
    none = agreement(a & False, b & False)
    assert (none.iou, none.dice) == (None, None)


def test_hits_are_peaks_in_lesions() -> None:
    reference = np.zeros((20, 20), np.bool_)
    reference[2:6, 2:6] = reference[6, 6] = True  # one, by its corner
    reference[12:18, 12:18] = True
    found = [lesion(4 * PIXEL, 4 * PIXEL, 0.7), lesion(5 * PIXEL, 3 * PIXEL, 0.9), lesion(160.5, 30, 0.4)]
    assert lesion_hits(found, reference, l0_pixel=PIXEL) == ([0.9, -math.inf], [0.4])
    assert lesion_hits(found[::-1], reference, l0_pixel=PIXEL) == ([0.9, -math.inf], [0.4])


def test_froc_by_hand() -> None:
    # Two slides, three lesions found at 0.9, 0.6 and not at all; false positives at 0.8, 0.7, 0.5.
    found = froc([((0.9, -math.inf), (0.8, 0.5)), ((0.6,), (0.7,))])
    assert (found["lesions"], found["found"]) == (3, 2)
    assert found["false_positives_per_slide"] == [0, 0, 0.5, 1, 1, 1.5]
    assert found["sensitivity"] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert found["at"] == pytest.approx({"0.25": 1 / 3, "0.5": 1 / 3, "1": 2 / 3, "2": 2 / 3, "4": 2 / 3, "8": 2 / 3})
    assert found["score"] == pytest.approx((1 / 3 + 1 / 3 + 4 * 2 / 3) / 6)
    assert froc([((), (0.5,))])["score"] is None


def test_features_carry_the_numbers() -> None:
    feature, second = lesion_features([lesion(50, 50, 0.9, area=2e6), lesion(90, 90, 0.8)])
    assert (feature.label, feature.name, second.name) == ("tumour", "tumour 1", "tumour 2")
    assert feature.measurements["area mm^2"] == 2
    assert feature.measurements["mean probability"] == 0.9


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    smooth=st.floats(0.3, 2.0),
    shift=st.floats(-0.3, 0.3),
    steps=st.sampled_from([0, 3]),
)
def test_pieces_drawn_one_by_one_are_those_of_the_whole_field(
    seed: int, smooth: float, shift: float, steps: int
) -> None:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(30, 40)), smooth)
    field = field / field.std() - shift
    field = np.pad(np.round(field * steps) / steps if steps else field, 1, constant_values=-1).astype(np.float32)
    generator = contourpy.contour_generator(z=field, name="serial", fill_type="OuterOffset")
    shapes, offsets = generator.filled(1e-6, np.inf)
    whole = [[points[a:b] - 0.5 for a, b in pairwise(starts)] for points, starts in zip(shapes, offsets)]

    def plain(pieces: Any) -> list[Any]:
        return sorted(sorted((round(area(ring), 4), *ring.min(0).round(4)) for ring in rings) for rings in pieces)

    def area(ring: NDArray[np.float64]) -> float:
        return float(abs(ring[:-1, 0] @ ring[1:, 1] - ring[1:, 0] @ ring[:-1, 1])) / 2

    assert plain(_contours(field)) == plain(whole)
