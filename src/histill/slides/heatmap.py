"""From the probabilities of tiles to a map of the slide: blended without seams, for QuPath and for a browser.

Each tile speaks for its centre. Between centres the map is a quadratic B-spline with knots one stride apart: smooth
(once differentiable), exact for fields that are linear, and over the whole lattice its weights add up to one, so that
where tiles begin leaves no trace. Its support is three strides; at the tissue's edge the weights there are divide.
"""

from __future__ import annotations

import math
import mmap
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.errors import BadInput, require
from histill.files import atomic, claim, full_disk, write_text
from histill.slides.geojson import Color

__all__ = ["Heatmap", "blend", "overlay", "per_stride", "released", "write_deepzoom", "write_ome_tiff"]

Pixels = NDArray[np.uint8]
Map = NDArray[np.float32]

_BAND = 512
_TILE = 256
_DEEPZOOM, _OVERLAP = 254, 1
_SPACE = uuid.UUID("8a3d1c0e-9c0b-5d83-b1f5-6a2f5b6f0c12")


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Class probabilities over a slide.

    Attributes:
        probabilities: ``(C, H, W)``, 0 where no tile lies; may be mapped from a file.
        covered: ``(H, W)``, whether a tile lies there.
        classes: names, in the order of the channels.
        l0_pixel: level-0 pixels that a pixel of the map is wide and high; its corner is that of the slide.
        mpp: microns that it is wide and high.
        dimensions: width and height of the slide in level-0 pixels; the last pixel of the map may reach beyond.
    """

    probabilities: Map
    covered: NDArray[np.bool_]
    classes: tuple[str, ...]
    l0_pixel: float
    mpp: float
    dimensions: tuple[int, int]


def per_stride(stride: float, tile: float) -> int:
    """Map pixels per stride that make one about a quarter of a tile, whatever the overlap."""
    return max(1, round(4 * stride / tile))


def blend(
    places: NDArray[Any],
    probabilities: NDArray[Any],
    *,
    classes: Sequence[str],
    dimensions: tuple[int, int],
    stride: float,
    mpp: float,
    k: int | None = None,
    scratch: Path | None = None,
) -> Heatmap:
    """Blend the probabilities of tiles into a map, a band of rows at a time.

    Args:
        places: ``(N, 4)`` x, y, width, height of the tiles in level-0 pixels.
        probabilities: ``(N, C)``.
        classes: C names.
        dimensions: width and height of level 0.
        stride: level-0 pixels from one tile to the next; may be a fraction.
        mpp: microns per level-0 pixel.
        k: map pixels per stride (default: `per_stride`).
        scratch: a file for the map, for one that memory does not hold.
    """
    places = np.asarray(places, dtype=np.float64).reshape(-1, 4)
    probabilities = np.asarray(probabilities, dtype=np.float32).reshape(len(places), len(classes))
    if k is None:
        k = per_stride(stride, float(places[:, 2].max()) if len(places) else stride)
    pixel = stride / k
    width, height = (max(1, math.ceil(side / pixel)) for side in dimensions)
    shape = (len(classes), height, width)
    if scratch is None:
        found = np.zeros(shape, np.float32)
    else:
        found = np.memmap(scratch, np.float32, "w+", shape=shape)
        claim(scratch)
    covered = np.zeros((height, width), np.bool_)
    order = np.argsort(places[:, 1] + places[:, 3] / 2, kind="stable")
    places, probabilities = places[order], probabilities[order]
    middle = (places[:, 1] + places[:, 3] / 2) / pixel
    reach = max(1.5 * k, float(places[:, 3].max()) / (2 * pixel) if len(places) else 0.0) + 1
    for top in range(0, height, _BAND):
        bottom = min(top + _BAND, height)
        first, last = np.searchsorted(middle, (top - reach, bottom + reach))
        _blend_band(places[first:last] / pixel, probabilities[first:last], k, found, covered, top, bottom)
    return Heatmap(found, covered, tuple(classes), pixel, mpp * pixel, dimensions)


def _blend_band(
    places: NDArray[Any], probabilities: Map, k: int, found: Map, covered: NDArray[np.bool_], top: int, bottom: int
) -> None:
    """Fill rows ``top`` to ``bottom``; ``places`` are in map pixels."""
    if not len(places):
        return
    classes, _, width = found.shape
    total = np.zeros((classes + 1, bottom - top, width), np.float32)  # the last is the sum of the weights
    flat = total.reshape(classes + 1, -1)
    x, y = (places[:, i] + places[:, i + 2] / 2 for i in (0, 1))
    columns, rows = (np.floor(centre - 1.5 * k).astype(np.int64) for centre in (x, y))
    for down in range(3 * k + 2):
        row = rows + down
        weight_y = _spline((row + 0.5 - y) / k)
        for right in range(3 * k + 2):
            column = columns + right
            weight = weight_y * _spline((column + 0.5 - x) / k)
            inside = (weight > 0) & (row >= top) & (row < bottom) & (column >= 0) & (column < width)
            place = (row[inside] - top) * width + column[inside]
            weight = weight[inside].astype(np.float32)
            for c in range(classes):
                np.add.at(flat[c], place, weight * probabilities[inside, c])
            np.add.at(flat[classes], place, weight)
    inside_ = _covered(places, top, bottom, width)
    inside_ &= total[-1] > 0
    covered[top:bottom] = inside_
    found[:, top:bottom] = np.where(inside_, total[:-1] / np.maximum(total[-1], 1e-12), 0)


def _spline(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quadratic B-spline with knots at -1.5, -0.5, 0.5 and 1.5."""
    t = np.abs(t)
    return np.where(t < 0.5, 0.75 - t * t, 0.5 * np.square(np.maximum(1.5 - t, 0)))


def _covered(places: NDArray[Any], top: int, bottom: int, width: int) -> NDArray[np.bool_]:
    """Which pixels' centres lie in a tile: +1 and -1 at the corners, summed both ways."""
    left, right = (
        np.clip(np.ceil(edge - 0.5), 0, width).astype(int) for edge in (places[:, 0], places[:, 0] + places[:, 2])
    )
    upper, lower = (
        np.clip(np.ceil(edge - 0.5) - top, 0, bottom - top).astype(int)
        for edge in (places[:, 1], places[:, 1] + places[:, 3])
    )
    steps = np.zeros((bottom - top + 1, width + 1), np.int32)
    for rows, columns, step in ((upper, left, 1), (upper, right, -1), (lower, left, -1), (lower, right, 1)):
        np.add.at(steps, (rows, columns), step)
    return np.asarray(steps.cumsum(0).cumsum(1)[:-1, :-1] > 0)


def write_ome_tiff(
    path: str | Path,
    channels: Pixels,
    *,
    names: Sequence[str],
    mpp: float,
    colors: Mapping[str, Color] | None = None,
    labels: bool = False,
) -> Path:
    """Write 8-bit channels as a tiled, deflated OME-TIFF with its pyramid in SubIFDs, atomically.

    The same channels give the same bytes.

    Args:
        path: the ``.ome.tiff`` file.
        channels: ``(C, H, W)``.
        names: of the channels.
        mpp: microns per pixel.
        colors: RGB by name, in which QuPath shows the channels.
        labels: the values are numbers of classes: coarser levels take every second pixel, not means.
    """
    tifffile = require("tifffile", "slides")
    path, (count, height, width) = Path(path), channels.shape
    halvings = max(0, math.ceil(math.log2(max(height, width) / 512))) if max(height, width) > 512 else 0
    options: dict[str, Any] = {
        "tile": (_TILE, _TILE),
        "compression": "zlib",
        "photometric": "minisblack",
        "resolutionunit": "CENTIMETER",
        "software": False,
        "metadata": None,
    }
    xml = _ome(path.name, names, (count, height, width), mpp, colors or {})
    big = channels.nbytes > 2 << 30
    with atomic(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=big, byteorder="<") as file:
        level = channels
        for halving in range(halvings + 1):
            per_cm = 1e4 / mpp / 2**halving
            if labels:
                level = channels[:, :: 2**halving, :: 2**halving]
            elif halving:
                level = _halved(level)
            place = {"subfiletype": 1} if halving else {"subifds": halvings, "description": xml}
            shape = {"shape": level.shape, "dtype": np.uint8, "resolution": (per_cm, per_cm)}
            file.write(_tiles(level), **place, **shape, **options)
    return path


def _tiles(channels: Pixels) -> Iterator[Pixels]:
    """The tiles of ``(C, H, W)``, row by row: what is mapped from a file need not be in memory at once."""
    for channel in channels:
        for top in range(0, channel.shape[0], _TILE):
            band = np.array(channel[top : top + _TILE])
            released(channels)
            for left in range(0, channel.shape[1], _TILE):
                yield np.ascontiguousarray(band[:, left : left + _TILE])


def released(array: NDArray[Any]) -> None:
    """Give back the memory of an array that is mapped from a file, which keeps what it holds."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _halved(channels: Pixels) -> Pixels:
    """The means of two by two pixels; an odd last row or column is repeated."""
    _, height, width = channels.shape
    even = (
        np.pad(channels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
        if height % 2 or width % 2
        else channels
    )
    corners = [even[:, i::2, j::2].astype(np.uint16) for i in (0, 1) for j in (0, 1)]
    return ((corners[0] + corners[1] + corners[2] + corners[3] + 2) // 4).astype(np.uint8)


def _ome(
    name: str, names: Sequence[str], shape: tuple[int, int, int], mpp: float, colors: Mapping[str, Color]
) -> bytes:
    """OME-XML (schema 2016-06) by hand: tifffile's own draws a UUID."""
    count, height, width = shape
    channels = []
    for number, channel in enumerate(names):
        red, green, blue = colors.get(channel, (255, 255, 255))
        rgba = (red << 24) | (green << 16) | (blue << 8) | 255
        signed = rgba - (1 << 32) if rgba >= 1 << 31 else rgba
        channels.append(
            f'<Channel ID="Channel:0:{number}" Name={quoteattr(channel)} SamplesPerPixel="1" Color="{signed}"/>'
        )
    size = f'SizeX="{width}" SizeY="{height}" SizeC="{count}" SizeZ="1" SizeT="1"'
    physical = " ".join(f'PhysicalSize{axis}="{mpp!r}" PhysicalSize{axis}Unit="µm"' for axis in "XY")
    body = (
        f'<Image ID="Image:0" Name={quoteattr(name)}><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
        f'{size} {physical}>{"".join(channels)}<TiffData IFD="0" PlaneCount="{count}"/></Pixels></Image>'
    )
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{schema}" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        f'xsi:schemaLocation="{schema} {schema}/ome.xsd" UUID="urn:uuid:{uuid.uuid5(_SPACE, body)}" '
        f'Creator="Histill">{body}</OME>'
    ).encode()


def quantised(heatmap: Heatmap) -> Pixels:
    """``(C, H, W)``, 255 p rounded."""
    found = np.zeros_like(heatmap.probabilities, np.uint8, subok=False)
    for top in range(0, heatmap.covered.shape[0], _BAND):
        rows = slice(top, top + _BAND)
        found[:, rows] = np.rint(255 * np.clip(heatmap.probabilities[:, rows], 0, 1))
    return found


def overlay(heatmap: Heatmap, colors: Mapping[str, Color], shown: Sequence[str]) -> Pixels:
    """``(H, W, 4)`` RGBA to lay over the slide: the colour of the likeliest of the classes ``shown``.

    Its opacity grows with that probability to 80 %, and is 0 where no tile lies.
    """
    rows = [heatmap.classes.index(name) for name in shown]
    if not rows:
        raise BadInput("an overlay needs a class to show")
    palette = np.array([colors[name] for name in shown], np.uint8)
    found = np.zeros((*heatmap.covered.shape, 4), np.uint8)
    for top in range(0, len(found), _BAND):
        band = slice(top, top + _BAND)
        chosen = np.asarray(heatmap.probabilities[rows, band])
        found[band, :, :3] = palette[chosen.argmax(0)]
        found[band, :, 3] = np.rint(204 * np.clip(chosen.max(0), 0, 1)) * heatmap.covered[band]
    return found


def write_deepzoom(path: str | Path, rgba: Pixels) -> Path:
    """Write a DeepZoom pyramid: ``NAME.dzi`` and ``NAME_files/LEVEL/COLUMN_ROW.png``, tiles of 254 with overlap 1.

    The folder comes first and the ``.dzi`` last, so that what a ``.dzi`` names is whole.

    Args:
        path: the ``.dzi`` file; what it named before is replaced.
        rgba: ``(H, W, 4)``.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}_files")
    fresh = path.with_name(f".{path.stem}_files.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    height, width = rgba.shape[:2]
    level = Image.fromarray(rgba, "RGBA")
    with full_disk(path):
        _draw_levels(level, fresh)
    path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    size = f'<Size Width="{width}" Height="{height}"/>'
    write_text(
        path,
        '<?xml version="1.0" encoding="UTF-8"?>\n<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" '
        f'Format="png" Overlap="{_OVERLAP}" TileSize="{_DEEPZOOM}">{size}</Image>\n',
    )
    return path


def _draw_levels(level: Image.Image, fresh: Path) -> None:
    """A folder of tiles for each level, the finest first."""
    for number in range(math.ceil(math.log2(max(level.size))), -1, -1):
        where = fresh / str(number)
        where.mkdir(parents=True)
        for column, row, box in _deepzoom_tiles(level.size):
            level.crop(box).save(where / f"{column}_{row}.png", "PNG")
        level = level.resize(((level.width + 1) // 2, (level.height + 1) // 2), Image.Resampling.BOX)


def _deepzoom_tiles(size: tuple[int, int]) -> Iterator[tuple[int, int, tuple[int, int, int, int]]]:
    """Column, row and box of each tile; it shares one pixel with its neighbours."""
    width, height = size
    for row in range(math.ceil(height / _DEEPZOOM)):
        for column in range(math.ceil(width / _DEEPZOOM)):
            left, top = column * _DEEPZOOM, row * _DEEPZOOM
            box = (
                max(0, left - _OVERLAP),
                max(0, top - _OVERLAP),
                min(width, left + _DEEPZOOM + _OVERLAP),
                min(height, top + _DEEPZOOM + _OVERLAP),
            )
            yield column, row, box
