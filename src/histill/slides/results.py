"""What is left of a slide when all of it has been looked at: tables, maps, outlines, a page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from histill.deploy.predictor import Predictor
from histill.errors import BadInput
from histill.files import atomic, to_disk, write_json
from histill.progress import notice
from histill.record import versions
from histill.slides.case import Case, exits_of, write_case
from histill.slides.engine import Model
from histill.slides.geojson import Color, Feature, read_geojson, write_geojson
from histill.slides.grid import Grid
from histill.slides.heatmap import Heatmap, blend, overlay, quantised, write_deepzoom, write_ome_tiff
from histill.slides.lesions import (
    Lesion,
    agreement,
    call_slide,
    find_lesions,
    largest_first,
    lesion_features,
    lesion_hits,
)
from histill.slides.options import Options
from histill.slides.regions import class_name, is_geojson, paint, read_mask
from histill.slides.segment import Segmentation, segment
from histill.slides.slide import Slide
from histill.slides.tissue import Tissue, tissue_picture

__all__ = ["Found", "class_colors", "write_results"]

_HEALTHY: Sequence[Color] = ((0, 158, 115), (86, 180, 233), (0, 114, 178), (240, 228, 66))
_LESIONS: Sequence[Color] = ((213, 94, 0), (170, 68, 153), (230, 159, 0), (0, 0, 0))
_THUMBNAIL_PX = 1024
_SCRATCH_BYTES = 256 << 20  # a larger map is kept in a file


@dataclass(frozen=True, eq=False)
class Found:
    """What was predicted on a slide, before any of it is written.

    Attributes:
        slide: open.
        folder: where its files go.
        tissue: where tiles were looked for.
        grid: of the tiles.
        tiles: ``slide x y width height prob_<class>``.
        features: chunks ``(n, D)`` of the tiles in ``wanted``, or None.
        wanted: rows of ``tiles`` that were looked at at ``grid``'s resolution.
        stride: level-0 pixels from one tile to the next.
        model: which looked.
        labels: the classes that are lesions.
        segmenters: U-Nets by class.
        options: as asked.
        truth: the slide's reference mask, or None.
        key: what the files depend on.
        resumed: how many tiles an earlier process had looked at.
        looked: how many were looked at, by pass.
    """

    slide: Slide
    folder: Path
    tissue: Tissue
    grid: Grid
    tiles: pd.DataFrame
    features: Iterator[NDArray[np.float32]] | None
    wanted: NDArray[np.int64]
    stride: float
    model: Model
    labels: Sequence[str]
    segmenters: Mapping[str, Predictor]
    options: Options
    truth: Path | None
    key: Mapping[str, Any]
    resumed: int
    looked: Mapping[str, int]


def class_colors(classes: Sequence[str], lesions: Sequence[str]) -> dict[str, Color]:
    """A colour for each class; warm ones for lesions."""
    left = {True: iter(range(len(classes))), False: iter(range(len(classes)))}
    palettes = {True: _LESIONS, False: _HEALTHY}
    return {
        name: palettes[name in lesions][next(left[name in lesions]) % len(palettes[name in lesions])]
        for name in classes
    }


def write_results(found: Found, timing: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Write a slide's files, ``slide.json`` last; returns what that holds.

    ``timing`` gets the seconds of post-processing, segmenting and writing.
    """
    slide, folder, options, model = found.slide, found.folder, found.options, found.model
    colors = class_colors(model.classes, found.labels)
    mpp, name = slide.require_mpp(), folder.name
    if found.tiles.empty:
        notice(f"{slide.path.name}: no tissue was found; give where it is with --mask")
    with _spent(timing, "post"):
        heatmap = _heatmap(found, mpp)
        least = options.min_area_um2
        if least is None:
            least = (found.grid.tile * found.grid.mpp) ** 2 / 4
    segmented = None
    if found.segmenters:
        with _spent(timing, "segment"):
            segmented = _segmented(found)
    with _spent(timing, "post"):
        lesions, fine = _outlined(found, heatmap, segmented, least)
        call = call_slide(found.tiles, model.classes, lesions, found.labels, temperature=model.temperature)
        judged = None if found.truth is None else _judge(found, fine, lesions)
    with _spent(timing, "write"):
        layers: dict[str, str] = {}

        def layer(what: str, path: Path) -> Path:
            layers[what] = path.name
            return path

        with atomic(layer("table", folder / "tiles.parquet")) as temporary:
            found.tiles.to_parquet(temporary, index=False)
        kinds: dict[str, Any] = {"slide": slide.digest, "colors": colors}
        tiles = _tile_features(found.tiles, model.classes)
        layer("tiles", write_geojson(folder / "tiles.geojson", tiles, kind="tile", **kinds))
        layer("lesions", write_geojson(folder / "lesions.geojson", lesion_features(lesions), **kinds))
        channels = quantised(heatmap)
        layer(
            "heatmap",
            write_ome_tiff(folder / "heatmap.ome.tiff", channels, names=model.classes, mpp=heatmap.mpp, colors=colors),
        )
        shown = overlay(heatmap, colors, found.labels)
        layer("overlay", write_deepzoom(folder / "heatmap.dzi", shown))
        thumbnail = Image.fromarray(slide.thumbnail(_THUMBNAIL_PX))
        for what, picture in (("thumbnail", thumbnail), ("tissue", tissue_picture(slide, found.tissue, _THUMBNAIL_PX))):
            with atomic(layer(what, folder / f"{what}.png")) as temporary:
                picture.save(temporary, "PNG")
        if segmented is not None:
            layer("mask", segmented.write(folder / "mask.ome.tiff"))
        if found.features is not None:
            layer("features", _write_features(folder / "features.h5", found))
        case = Case(
            name=name,
            slide=slide,
            thumbnail=thumbnail,
            overlay=shown,
            l0_pixel=heatmap.l0_pixel,
            lesions=lesions,
            labels=found.labels,
            colors=colors,
            classes=model.classes,
            call=call,
            tiles=found.tiles,
            grid=found.grid,
            model=model,
            settings=_settings(found, least),
            versions=versions(),
            judged=judged,
            segmented=None if segmented is None else segmented.summary(),
        )
        layer("page", write_case(folder / "case.html", case))
    numbers = [lesion.numbers() | {"label": lesion.label} for lesion in lesions[:100]]
    said: dict[str, Any] = {
        "name": name,
        "path": str(slide.path.resolve()),
        "mpp": mpp,
        "dimensions": list(slide.dimensions),
        "classes": list(model.classes),
        "colors": {label: list(color) for label, color in colors.items()},
        "model": {
            "name": model.name,
            "digest": model.digest,
            "bf16": model.bf16,
            "runtime": model.runtime,
            **model.about,
        },
        "settings": _settings(found, least),
        "call": call,
        "lesions": {
            "count": len(lesions),
            "area_um2": call["lesion_area_um2"],
            "largest": numbers,
        },
        "tiles": {
            "count": len(found.tiles),
            "looked_at": sum(found.looked.values()),
            "by_pass": dict(found.looked),
            "resumed": found.resumed,
        },
        "heatmap": {"mpp": heatmap.mpp, "l0_pixel": heatmap.l0_pixel},
        "layers": layers,
        "versions": versions(),
        "timing": timing,
        "key": found.key,
    }
    if "exit" in found.tiles:
        said["exits"] = {str(k): int(n) for k, n in exits_of(found.tiles).items()}
    if judged is not None:
        said["agreement"] = judged
    if segmented is not None:
        said["segmentation"] = segmented.summary()
    for name in layers.values():  # before it is said that they are there
        to_disk(folder / name)
    write_json(folder / "slide.json", said)
    return said


@contextmanager
def _spent(timing: dict[str, dict[str, float]], what: str) -> Iterator[None]:
    start, cpu = time.monotonic(), time.process_time()
    yield
    spent = timing.setdefault(what, {"wall_s": 0.0, "busy_s": 0.0})
    spent["wall_s"] += time.monotonic() - start
    spent["busy_s"] += time.process_time() - cpu


def _outlined(
    found: Found, heatmap: Heatmap, segmented: Segmentation | None, least: float
) -> tuple[list[Lesion], Heatmap]:
    """Lesions, of the U-Nets' mask where a class has one; and the finest map that they are drawn from."""
    limits: dict[str, Any] = {"threshold": found.options.threshold, "min_area_um2": least, "min_hole_um2": least}
    masked = () if segmented is None else segmented.segmented
    lesions = find_lesions(heatmap, [label for label in found.labels if label not in masked], **limits)
    if segmented is None:
        return lesions, heatmap
    fine, marked = segmented.over(heatmap)
    lesions += find_lesions(fine, [label for label in found.labels if label in masked], marked=marked, **limits)
    return largest_first(lesions), fine


def _heatmap(found: Found, mpp: float) -> Heatmap:
    places = found.tiles[["x", "y", "width", "height"]].to_numpy(dtype=np.float64)
    probabilities = found.tiles[[f"prob_{name}" for name in found.model.classes]].to_numpy(dtype=np.float32)
    width, height = found.slide.dimensions
    pixels = width * height * (4 / (found.grid.tile * found.grid.mpp / mpp)) ** 2
    scratch = (
        found.folder / ".state" / "heatmap.map" if pixels * 4 * len(found.model.classes) > _SCRATCH_BYTES else None
    )
    heatmap = blend(
        places,
        probabilities,
        classes=found.model.classes,
        dimensions=found.slide.dimensions,
        stride=found.stride,
        mpp=mpp,
        scratch=scratch,
    )
    _clip(heatmap, found.tissue)
    return heatmap


def _clip(heatmap: Heatmap, tissue: Tissue) -> None:
    """Empty the map where there is only glass: a tile at the tissue's edge speaks for its tissue."""
    side = heatmap.l0_pixel
    xs: Any = np.arange(heatmap.covered.shape[1]) * side
    for top in range(0, heatmap.covered.shape[0], 256):
        rows = slice(top, top + 256)
        ys: Any = (np.arange(top, min(top + 256, heatmap.covered.shape[0])) * side)[:, None]
        heatmap.covered[rows] &= tissue.fraction(xs[None, :], ys, side, side) > 0
        heatmap.probabilities[:, rows] *= heatmap.covered[rows]


def _tile_features(tiles: pd.DataFrame, classes: Sequence[str]) -> Iterator[Feature]:
    places = tiles[["x", "y", "width", "height"]].to_numpy()
    probabilities = tiles[[f"prob_{name}" for name in classes]].to_numpy(dtype=np.float64)
    names = [f"prob_{name}" for name in classes]
    for (x, y, width, height), p in zip(places.tolist(), probabilities):
        # Six decimals, of which the model means three.
        numbers = dict(zip(names, (round(value, 6) for value in p.tolist())))
        yield Feature((x, y, width, height), classes[int(p.argmax())], numbers)


def _write_features(path: Path, found: Found) -> Path:
    """``coords`` (N, 2) level-0 pixels and ``features`` (N, D), as CLAM and TRIDENT read them."""
    assert found.features is not None
    coords = found.tiles[["x", "y"]].to_numpy(dtype=np.int64)[found.wanted]
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        place = file.create_dataset("coords", data=coords)
        place.attrs["patch_size"] = found.grid.tile
        place.attrs["patch_size_level0"] = round(found.grid.tile * found.grid.mpp / found.slide.require_mpp())
        place.attrs["name"] = found.folder.name
        kept, at = None, 0
        for chunk in found.features:
            if kept is None:
                shape = (len(coords), chunk.shape[1])
                kept = file.create_dataset("features", shape, np.float32)
            kept[at : at + len(chunk)] = chunk
            at += len(chunk)
        if kept is None:
            file.create_dataset("features", (0, 0), np.float32)
    return path


def _truth(found: Found, heatmap: Heatmap) -> tuple[NDArray[np.uint8], bool]:
    """``(H, W)`` of the map's pixels: 0 for nothing, k for the k-th class; and whether there are classes at all.

    Without classes 1 is a lesion of any kind.
    """
    assert found.truth is not None
    classes, shape = found.model.classes, heatmap.covered.shape
    if is_geojson(found.truth):
        features = read_geojson(found.truth)
        numbers = {name: number for number, label in enumerate(classes, 1) for name in (class_name(label), label)}
        known = [feature for feature in features if feature.label in numbers or class_name(feature.label) in numbers]
        drawn = np.zeros(shape, np.uint8)
        for feature in known or features:
            value = (numbers.get(feature.label) or numbers[class_name(feature.label)]) if known else 1
            paint(drawn, [feature.shape], (heatmap.l0_pixel, heatmap.l0_pixel), value)
        return drawn, bool(known)
    values = read_mask(found.truth, found.slide)
    names = found.options.truth_classes
    if names:
        if set(np.unique(values).tolist()) <= {0, 255}:  # how black and white is saved
            values = np.minimum(values, 1)
        if values.max() > len(names):
            raise BadInput(f"{found.truth}: value {values.max()} has no name; {len(names)} are named")
        known_as = [classes.index(name) + 1 if name in classes else 0 for name in map(class_name, names)]
        values, classed = np.array([0, *known_as], np.uint8)[values], True
    elif set(np.unique(values).tolist()) <= {0, 1, 255}:
        values, classed = np.minimum(values, 1), False
    elif values.max() > len(classes):
        raise BadInput(f"{found.truth}: a value of {values.max()}, but the model has {len(classes)} classes")
    else:
        classed = True
    ys, xs = (
        np.minimum((np.arange(count) + 0.5) * heatmap.l0_pixel / side * own, own - 1).astype(np.int64)
        for count, side, own in zip(shape, found.slide.dimensions[::-1], values.shape)
    )
    return values[np.ix_(ys, xs)], classed


def _judge(found: Found, heatmap: Heatmap, lesions: Sequence[Lesion]) -> dict[str, Any]:
    """IoU, Dice and hits of the outlines against the reference, in pixels of the map."""
    truth, classed = _truth(found, heatmap)
    numbers = [found.model.classes.index(label) + 1 for label in found.labels]
    scale = (heatmap.l0_pixel, heatmap.l0_pixel)

    def drawn(chosen: Sequence[Lesion]) -> NDArray[np.bool_]:
        mask = np.zeros(truth.shape, np.uint8)
        paint(mask, [lesion.polygon for lesion in chosen], scale)
        return mask > 0

    reference = np.isin(truth, numbers) if classed else truth > 0
    overall = agreement(drawn(lesions), reference)
    said: dict[str, Any] = {"iou": overall.iou, "dice": overall.dice, "classes": {}}
    if classed:
        for label, number in zip(found.labels, numbers):
            one = agreement(drawn([lesion for lesion in lesions if lesion.label == label]), truth == number)
            said["classes"][label] = {"iou": one.iou, "dice": one.dice}
    true, false = lesion_hits(lesions, reference, l0_pixel=heatmap.l0_pixel)
    said["hits"] = {"lesions": [score if np.isfinite(score) else None for score in true], "false_positives": false}
    return said


def _segmented(found: Found) -> Segmentation:
    return segment(
        found.slide,
        found.tiles,
        found.grid,
        found.segmenters,
        classes=found.model.classes,
        scratch=found.folder / ".state",
        batch_size=found.options.batch_size,
        threads=found.options.threads,
    )


def _settings(found: Found, least: float) -> dict[str, Any]:
    """As asked and as found, for people."""
    options = found.options
    said: dict[str, Any] = {
        "reader": f"{found.slide.reader} ({found.slide.why})" if found.slide.why else found.slide.reader,
        "mpp": found.grid.mpp,
        "tile": found.grid.tile,
        "overlap": found.grid.overlap,
        "min_tissue": found.grid.min_tissue,
        "batch_size": options.batch_size,
        "lesions": list(found.labels),
        "threshold": options.threshold,
        "min_area_um2": least,
        "precision": "bf16" if found.model.bf16 else "the model's own",
        "runtime": found.model.runtime,
        "mask": None if options.mask is None else Path(options.mask).name,
        "temperature": found.model.temperature,
    }
    if options.coarse_to_fine is not None:
        wide = "the same" if options.coarse_model is None else Path(options.coarse_model).name
        said |= {"coarse_to_fine": options.coarse_to_fine, "coarse_factor": options.coarse_factor, "coarse_model": wide}
    return said
