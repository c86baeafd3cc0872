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
            finer = slide_pixels(slide, scale // 2, Box(2 * box.x0, 2 * box.y0, 2 * box.x1, 2 * box.y1))
            return np.asarray(np.rint(finer.mean((0, 1), keepdims=True)), np.uint8)
        x0, y0, x1, y1 = box
        if width >= height:
            middle = (x0 + x1) // 2
            halves = [slide_pixels(slide, scale, part) for part in (Box(x0, y0, middle, y1), Box(middle, y0, x1, y1))]
        else:
            middle = (y0 + y1) // 2
            halves = [slide_pixels(slide, scale, part) for part in (Box(x0, y0, x1, middle), Box(x0, middle, x1, y1))]
        return np.concatenate(halves, axis=1 if width >= height else 0)
    # Edges in the level's own pixels; the last pixel of a level may lie half beyond the slide, and is not whitened.
    wide, tall = slide.level_dimensions[level]
    begin_x, begin_y = min(box.x0 * ratio, wide - 1), min(box.y0 * ratio, tall - 1)
    end_x, end_y = min(box.x1 * ratio, wide), min(box.y1 * ratio, tall)
    left, top = math.floor(begin_x), math.floor(begin_y)
    across, down = math.ceil(end_x - 1e-6) - left, math.ceil(end_y - 1e-6) - top
    own = slide.level_downsamples[level]
    pixels = slide.read(round(left * own), round(top * own), across, down, level)
    if (across, down) == (width, height) and abs(ratio - 1) < 0.001:
        return pixels
    part = (begin_x - left, begin_y - top, min(end_x - left, across), min(end_y - top, down))
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX, box=part)
    return np.asarray(image, dtype=np.uint8)


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


def overlay_png(values: Pixels, color: Color, threshold: float) -> bytes:
    """``color``, as opaque as the value is probable, and transparent below ``threshold`` and where the value is 0."""
    with io.BytesIO() as file:
        Image.fromarray(_table(color, threshold)[values]).save(file, "PNG", compress_level=1)
        return file.getvalue()


@lru_cache(maxsize=256)
def _table(color: Color, threshold: float) -> Pixels:
    """``(256, 4)`` RGBA of every value."""
    values = np.arange(256, dtype=np.uint8)
    table = np.empty((256, 4), np.uint8)
    table[:, :3] = color
    table[:, 3] = np.where(values >= math.ceil(threshold * 255 - 1e-9), values, 0)
    table[table[:, 3] == 0] = 0
    return table
