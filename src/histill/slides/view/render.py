"""Tiles as bytes: JPEG of a slide, coloured and transparent PNG of a map of probabilities."""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.slides import Slide
from histill.slides.view.geometry import Box, DeepZoom
from histill.slides.view.heat import Heat

__all__ = ["MOST_PX", "Color", "heat_values", "overlay_png", "slide_pixels", "thumbnail_jpeg", "tile_jpeg"]

Pixels = NDArray[np.uint8]
Color = tuple[int, int, int]

MOST_PX = 1 << 22
"""Pixels of a slide that are read at once (12 MB); more, where a slide lacks coarse levels, comes piece by piece."""
THUMBNAIL_PX = 480
_QUALITY = 85


def slide_pixels(slide: Slide, scale: int, box: Box) -> Pixels:
    """``(height, width, 3)``: ``box``, in pixels that are ``scale`` level-0 pixels wide, averaged from finer ones."""
    width, height = box.size
    level = slide.best_level(scale, tolerance=0.001)
    ratio = scale / slide.level_downsamples[level]
    if width * height * ratio * ratio > MOST_PX:
        if width * height == 1:
            return _quarters(slide, scale, box)
        x0, y0, x1, y1 = box
        if width >= height:
            middle = (x0 + x1) // 2
            halves = [slide_pixels(slide, scale, part) for part in (Box(x0, y0, middle, y1), Box(middle, y0, x1, y1))]
        else:
            middle = (y0 + y1) // 2
            halves = [slide_pixels(slide, scale, part) for part in (Box(x0, y0, x1, middle), Box(x0, middle, x1, y1))]
        return np.concatenate(halves, axis=1 if width >= height else 0)
    wide, tall = slide.level_dimensions[level]
    left, top = min(math.floor(box.x0 * ratio), wide - 1), min(math.floor(box.y0 * ratio), tall - 1)
    right, bottom = (math.ceil(min(edge * ratio, side) - 1e-6) for edge, side in ((box.x1, wide), (box.y1, tall)))
    own = slide.level_downsamples[level]
    pixels = slide.read(round(left * own), round(top * own), right - left, bottom - top, level)
    if pixels.shape[:2] == (height, width) and abs(ratio - 1) < 0.001:
        return pixels
    return _shrink(pixels, ratio, box, left, top)


def _quarters(slide: Slide, scale: int, box: Box) -> Pixels:
    """One pixel, from the four of half its width, each for as much of the slide as it covers."""
    half = scale // 2
    firsts = 2 * box.x0, 2 * box.y0
    lasts = [min(first + 2, -(-side // half)) for first, side in zip(firsts, slide.dimensions)]
    finer = slide_pixels(slide, half, Box(*firsts, *lasts))
    across, down = (
        [min(half, side - n * half) for n in range(first, last)]
        for first, last, side in zip(firsts, lasts, slide.dimensions)
    )
    weights = np.outer(down, across)
    mean = np.tensordot(weights, finer, axes=2) / weights.sum()
    return np.asarray(np.rint(mean), np.uint8).reshape(1, 1, 3)


def _shrink(pixels: Pixels, ratio: float, box: Box, left: int, top: int) -> Pixels:
    """The mean of ``ratio`` by ``ratio`` pixels for each of ``box``; at the slide's end of those that there are."""
    source, (tall, wide, _), (width, height) = Image.fromarray(pixels), pixels.shape, box.size
    out = np.empty((height, width, 3), np.uint8)
    for x0, x1 in _whole_and_rest(width, (box.x1 * ratio - left) > wide + 1e-6):
        for y0, y1 in _whole_and_rest(height, (box.y1 * ratio - top) > tall + 1e-6):
            begin = max((box.x0 + x0) * ratio - left, 0), max((box.y0 + y0) * ratio - top, 0)
            end = min((box.x0 + x1) * ratio - left, wide), min((box.y0 + y1) * ratio - top, tall)
            part = source.resize((x1 - x0, y1 - y0), Image.Resampling.BOX, box=(*begin, *end))
            out[y0:y1, x0:x1] = np.asarray(part, dtype=np.uint8)
    return out


def _whole_and_rest(count: int, ends: bool) -> list[tuple[int, int]]:
    """All pixels of a row, or where the slide ends within the last, that one apart."""
    return [(0, count - 1), (count - 1, count)][count == 1 :] if ends else [(0, count)]


def tile_jpeg(slide: Slide, zoom: DeepZoom, level: int, column: int, row: int) -> bytes:
    """A tile of the slide."""
    return _jpeg(slide_pixels(slide, zoom.scale(level), zoom.box(level, column, row)))


def thumbnail_jpeg(slide: Slide) -> bytes:
    """The whole slide, small."""
    return _jpeg(slide.thumbnail(THUMBNAIL_PX))


def _jpeg(pixels: Pixels) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
        return file.getvalue()


def heat_values(heat: Heat, zoom: DeepZoom, level: int, box: Box) -> Pixels:
    """``(height, width)``: the map's value at the centre of each pixel of ``box``."""
    scale = zoom.scale(level)
    xs, ys = (
        (np.arange(first, last, dtype=np.float64) + 0.5) * scale for first, last in ((box.x0, box.x1), (box.y0, box.y1))
    )
    return heat.sample(xs, ys, scale)


def overlay_png(values: Pixels, color: Color, threshold: float, opaque: float = 1.0) -> bytes:
    """``color``, the higher the value the more opaque, wholly from ``opaque`` on, not at all below ``threshold``."""
    with io.BytesIO() as file:
        Image.fromarray(_table(color, threshold, opaque)[values]).save(file, "PNG", compress_level=1)
        return file.getvalue()


@lru_cache(maxsize=256)
def _table(color: Color, threshold: float, opaque: float) -> Pixels:
    """``(256, 4)`` RGBA of every value."""
    values = np.arange(256)
    table = np.zeros((256, 4), np.uint8)
    table[:, :3] = color
    table[:, 3] = np.rint(np.minimum(values / opaque, 255))
    table[values < max(1, math.ceil(threshold * 255 - 1e-9))] = 0
    return table
