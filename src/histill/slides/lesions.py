"""Lesions: where a class is likely, as outlines with numbers; what the slide is called; how well that fits a mask.

The outline is the contour of the heatmap between its pixels' centres, at a threshold or where a class overtakes the
others, so that a lesion's area does not jump by whole tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import contourpy
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import pdist

from histill.errors import BadInput, require
from histill.evaluate.calibration import tempered
from histill.slides.geojson import Feature
from histill.slides.heatmap import Heatmap
from histill.slides.regions import paint

__all__ = [
    "FROC_AT",
    "Agreement",
    "Lesion",
    "agreement",
    "call_slide",
    "find_lesions",
    "froc",
    "largest_first",
    "lesion_classes",
    "lesion_features",
    "lesion_hits",
]

FROC_AT = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per slide at which FROC is read (CAMELYON16)."""

_HEALTHY = re.compile(r"(^|[^a-z])(normal|healthy|benign|background|negative|glass|none|non-?_?tumou?r)", re.IGNORECASE)
_EVIDENCE = 10


@dataclass(frozen=True, eq=False)
class Lesion:
    """One outline.

    Attributes:
        polygon: with its holes, in level-0 pixels.
        label: the class.
        area_um2: square microns, holes left out.
        perimeter_um: microns, holes included.
        diameter_um: the largest, microns (maximum Feret diameter).
        probability: mean of the class inside.
        peak: the likeliest place, level-0 pixels; of equal ones the one furthest from the outline.
        peak_probability: there.
    """

    polygon: Any
    label: str
    area_um2: float
    perimeter_um: float
    diameter_um: float
    probability: float
    peak: tuple[float, float]
    peak_probability: float

    def numbers(self) -> dict[str, float]:
        """For tables and QuPath."""
        return {
            "area um^2": self.area_um2,
            "area mm^2": self.area_um2 / 1e6,
            "perimeter um": self.perimeter_um,
            "max diameter um": self.diameter_um,
            "mean probability": self.probability,
            "max probability": self.peak_probability,
        }


def lesion_classes(classes: Sequence[str], *, given: Sequence[str] = (), positive: str | None = None) -> list[str]:
    """Which classes are lesions: those given, else the run's positive class, else all whose name is not healthy.

    Healthy are names such as normal, benign, background or non-tumour. Where that leaves none, all are.

    Raises:
        BadInput: a given name is not a class.
    """
    if unknown := [name for name in given if name not in classes]:
        raise BadInput(f"--lesions {unknown[0]}: the model's classes are {', '.join(classes)}")
    if given:
        return [name for name in classes if name in given]
    if positive in classes and len(classes) == 2:
        return [str(positive)]
    return [name for name in classes if not _HEALTHY.search(name)] or list(classes)


def find_lesions(
    heatmap: Heatmap,
    labels: Sequence[str],
    *,
    threshold: float | None = None,
    marked: NDArray[np.float32] | None = None,
    min_area_um2: float = 0.0,
    min_hole_um2: float = 0.0,
) -> list[Lesion]:
    """The outlines of some classes, largest first.

    Args:
        heatmap: probabilities.
        labels: the classes.
        threshold: a class is there where its probability is above it; by default where it is above every other's.
        marked: ``(C, H, W)``, the share of each pixel that a U-Net marked as the class; where given, a class is there
            where it is more than half, and the probabilities are only measured.
        min_area_um2: smaller ones are left out.
        min_hole_um2: smaller holes are filled.
    """
    shapely = require("shapely", "slides")
    um = heatmap.mpp
    slide = shapely.box(0, 0, *(side / heatmap.l0_pixel for side in heatmap.dimensions))
    found = []
    for label in labels:
        own = heatmap.classes.index(label)
        p = np.pad(heatmap.probabilities[own], 1)
        if marked is None:
            field = _margin(heatmap, own, threshold)
        else:
            field = _bordered(marked[own] - np.float32(0.5), heatmap.covered)
        for rings in _contours(field):
            polygon = shapely.Polygon(rings[0], [hole for hole in rings[1:] if _area(hole) * um * um >= min_hole_um2])
            if not polygon.is_valid:  # rings that touch where the field is at the level on a grid point
                polygon = shapely.make_valid(polygon, method="structure", keep_collapsed=False)
            if not slide.covers(polygon):  # the map's last pixel may reach beyond the slide
                polygon = polygon.intersection(slide)
            for part in getattr(polygon, "geoms", [polygon]):
                if part.geom_type == "Polygon" and part.area * um * um >= max(min_area_um2, 1e-9):
                    found.append(_measured(part, label, p, field, heatmap))
    return largest_first(found)


def largest_first(lesions: Iterable[Lesion]) -> list[Lesion]:
    """In the order of tables and numbers."""
    return sorted(lesions, key=lambda lesion: (-lesion.area_um2, lesion.label, lesion.peak))


def _margin(heatmap: Heatmap, own: int, threshold: float | None) -> NDArray[np.float32]:
    """``(H + 2, W + 2)``, above 0 where the class is there; below it where no tile lies."""
    p = heatmap.probabilities
    if threshold is not None:
        margin = np.asarray(p[own] - np.float32(threshold))
    else:
        margin = np.array(p[own])
        others = np.zeros_like(margin)
        for c in range(len(p)):
            if c != own:
                np.maximum(others, p[c], out=others)
        margin -= others
    return _bordered(np.where(heatmap.covered, margin, np.float32(0.0)), heatmap.covered)


def _bordered(margin: NDArray[np.float32], covered: NDArray[np.bool_]) -> NDArray[np.float32]:
    """``margin`` padded by one; what no tile covers is as far below 0 as its neighbour is above.

    So the contour runs along the edge of the last pixel that a tile covers, however sure it is.
    """
    margin, covered = np.pad(margin, 1), np.pad(covered, 1)
    nearby = ndimage.maximum_filter(margin, 3, mode="constant")
    return np.where(covered, margin, np.where(nearby > 0, -nearby, np.float32(-1.0)))


def _contours(field: NDArray[np.float32]) -> Iterator[list[NDArray[np.float64]]]:
    """Rings, the outer one first, of each area where ``field``, padded by one, is above 0; in map pixels.

    Pieces are drawn one by one, in windows: contourpy takes 30 times a map's memory. Nothing is lost, as no cell
    between four pixels touches two pieces that do not touch one another.
    """
    pieces, _ = ndimage.label(field > 0, structure=np.ones((3, 3)))
    for number, box in enumerate(ndimage.find_objects(pieces), 1):
        window = tuple(slice(side.start - 1, side.stop + 1) for side in box)
        own = np.where((pieces[window] == number) | (field[window] <= 0), field[window], np.float32(-1.0))
        generator: Any = contourpy.contour_generator(
            z=own, name="serial", fill_type=contourpy.FillType.OuterOffset, chunk_count=1
        )
        corner = (box[1].start - 1, box[0].start - 1)
        shapes, offsets = generator.filled(1e-6, np.inf)
        for points, starts in zip(shapes, offsets):
            # Pixel i of the padded field has its centre at i, which is i - 1 + 0.5 of the map.
            yield [np.asarray(points[a:b]) + corner - 0.5 for a, b in pairwise(starts)]


def _area(ring: NDArray[np.float64]) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return abs(float(x[:-1] @ y[1:] - x[1:] @ y[:-1])) / 2


def _measured(polygon: Any, label: str, p: NDArray[Any], field: NDArray[Any], heatmap: Heatmap) -> Lesion:
    """``polygon`` is in map pixels; ``p`` and ``field`` are padded by one."""
    shapely = require("shapely", "slides")
    left, top, right, bottom = (math.floor(bound + 0.5) for bound in polygon.bounds)
    window = (slice(top, bottom + 2), slice(left, right + 2))
    drawn = np.zeros((bottom + 2 - top, right + 2 - left), np.uint8)
    paint(drawn, [shapely.transform(polygon, lambda xy: xy - (left - 1, top - 1))], (1.0, 1.0))
    inside = (drawn > 0) & (field[window] > 0)
    if not inside.any():  # thinner than a pixel
        inside = field[window] > 0
    values = p[window]
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    likely = np.where(inside, np.rint(values * 1e4), -1)
    row, column = np.unravel_index(np.argmax(np.where(likely == likely.max(), depth, -1)), inside.shape)
    pixel, um = heatmap.l0_pixel, heatmap.mpp
    hull = np.asarray(polygon.convex_hull.exterior.coords)
    scaled = shapely.transform(polygon, lambda xy: xy * pixel)
    return Lesion(
        polygon=scaled,
        label=label,
        area_um2=polygon.area * um * um,
        perimeter_um=polygon.length * um,
        diameter_um=float(pdist(hull).max()) * um,
        probability=float(values[inside].mean()),
        peak=((int(column) + left - 0.5) * pixel, (int(row) + top - 0.5) * pixel),
        peak_probability=float(values[row, column]),
    )


def lesion_features(lesions: Sequence[Lesion]) -> list[Feature]:
    """For `write_geojson`."""
    return [
        Feature(lesion.polygon, lesion.label, lesion.numbers(), f"{lesion.label} {number}")
        for number, lesion in enumerate(lesions, 1)
    ]


def call_slide(
    tiles: pd.DataFrame,
    classes: Sequence[str],
    lesions: Sequence[Lesion],
    labels: Sequence[str],
    *,
    temperature: float | None = None,
) -> dict[str, Any]:
    """What the slide is called, and on what evidence.

    The lesion class with the largest area of lesions; where there are none, the class of most tiles. The probability
    is the mean of that class over its ten likeliest tiles that do not overlap, with the temperature that was fitted on
    the run's validation images where there is one: calibrated for tiles, as no slide was ever calibrated on.

    Args:
        tiles: ``x y width height prob_<class>``, and ``prediction`` where it is there.
        classes: of the model.
        lesions: found on the slide.
        labels: the classes that are lesions.
        temperature: of the run, or None.

    Returns:
        ``label``, ``probability``, ``calibrated``, ``lesion_area_um2`` by class, ``tile_share`` by class (of all
        tiles), and ``evidence``: the tiles, likeliest first. Without a tile the label is None.
    """
    if tiles.empty:
        return {
            "label": None,
            "probability": None,
            "calibrated": False,
            "lesion_area_um2": {},
            "tile_share": {},
            "evidence": [],
        }
    p = tiles[[f"prob_{name}" for name in classes]].to_numpy(dtype=np.float64)
    share = {name: float((p.argmax(1) == c).mean()) for c, name in enumerate(classes)}
    area = {name: sum(lesion.area_um2 for lesion in lesions if lesion.label == name) for name in labels}
    label = max(area, key=lambda name: area[name]) if lesions else max(share, key=lambda name: share[name])
    calm = p if temperature is None else tempered(p, temperature)
    own = calm[:, list(classes).index(label)]
    places = tiles[["x", "y", "width", "height"]].to_numpy()
    order = _apart(places, np.argsort(-own, kind="stable"), _EVIDENCE)
    evidence = [
        dict(zip(("x", "y", "width", "height"), map(int, places[row]))) | {"probability": float(own[row])}
        for row in order
    ]
    return {
        "label": label,
        "probability": float(own[order].mean()),
        "calibrated": temperature is not None,
        "lesion_area_um2": area,
        "tile_share": share,
        "evidence": evidence,
    }


def _apart(places: NDArray[Any], order: NDArray[np.int64], most: int) -> list[int]:
    """The first rows of ``order`` whose tiles do not overlap one another."""
    chosen: list[int] = []
    for row in order.tolist():
        x, y, width, height = places[row]
        others = places[chosen]
        across = (others[:, 0] < x + width) & (x < others[:, 0] + others[:, 2])
        if not (across & (others[:, 1] < y + height) & (y < others[:, 1] + others[:, 3])).any():
            chosen.append(row)
            if len(chosen) == most:
                break
    return chosen


@dataclass(frozen=True)
class Agreement:
    """Pixels of a map against a reference."""

    iou: float | None
    dice: float | None
    intersection: int
    predicted: int
    reference: int


def agreement(predicted: NDArray[np.bool_], reference: NDArray[np.bool_]) -> Agreement:
    """IoU and Dice, ``2 |A and B| / (|A| + |B|)``; None where neither has a pixel."""
    both, one, other = int((predicted & reference).sum()), int(predicted.sum()), int(reference.sum())
    union = one + other - both
    return Agreement(both / union if union else None, 2 * both / (one + other) if union else None, both, one, other)


def lesion_hits(
    lesions: Sequence[Lesion], reference: NDArray[np.bool_], *, l0_pixel: float
) -> tuple[list[float], list[float]]:
    """Which lesions of a mask are found, and which finds are none (as in CAMELYON16).

    A lesion of the mask, an 8-connected component, is found by the peaks that lie in it, with the highest of their
    peak probabilities; a peak outside all of them is a false positive.

    Returns:
        The score of each lesion of the mask (``-inf`` where it is missed), and of each false positive.
    """
    components, count = ndimage.label(reference, structure=np.ones((3, 3)))
    scores = dict.fromkeys(range(1, count + 1), -math.inf)
    false = []
    for lesion in lesions:
        column, row = (int(place / l0_pixel) for place in lesion.peak)
        inside = 0 <= row < reference.shape[0] and 0 <= column < reference.shape[1]
        number = int(components[row, column]) if inside else 0
        if number in scores:
            scores[number] = max(scores[number], lesion.peak_probability)
        elif number == 0:
            false.append(lesion.peak_probability)
    return list(scores.values()), false


def froc(slides: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, Any]:
    """Sensitivity for lesions against false positives per slide, over what `lesion_hits` gives of each.

    Returns:
        ``lesions``, ``found``; ``false_positives_per_slide`` and ``sensitivity``, the curve as the threshold falls;
        ``at``, the sensitivity at 1/4 to 8 false positives per slide; and ``score``, their mean (None without lesions).
    """
    true = np.array([score for scores, _ in slides for score in scores], dtype=np.float64)
    false = np.array([score for _, scores in slides for score in scores], dtype=np.float64)
    if not len(true) or not slides:
        return {"lesions": 0, "found": 0, "false_positives_per_slide": [], "sensitivity": [], "at": {}, "score": None}
    steps = np.unique(np.concatenate([true[np.isfinite(true)], false]))[::-1]
    rate = np.array([0.0, *((false >= step).sum() / len(slides) for step in steps)])
    share = np.array([0.0, *((true >= step).mean() for step in steps)])
    at = {f"{limit:g}": float(share[rate <= limit].max()) for limit in FROC_AT}
    return {
        "lesions": len(true),
        "found": int(np.isfinite(true).sum()),
        "false_positives_per_slide": rate.tolist(),
        "sensitivity": share.tolist(),
        "at": at,
        "score": float(np.mean(list(at.values()))),
    }
