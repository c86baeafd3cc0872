"""What a user drew over a slide, as masks: QuPath's GeoJSON, or an image of any size that covers the slide."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.data.decode import FORMATS
from histill.errors import BadInput, require
from histill.slides.slide import Slide

__all__ = ["GEOJSON", "MAX_MASK_PX", "class_name", "is_geojson", "paint", "read_mask"]

GEOJSON = (".geojson", ".json", ".geojson.gz", ".json.gz")
MAX_MASK_PX = 1 << 30
"""Of a mask image of a byte each; one in colour, or of wider numbers, may have a quarter of them."""

_BAND_PX = 1 << 20  # looked at in one go
_ASPECT = 0.02  # by how much a mask's shape may differ from its slide's


def is_geojson(path: Path) -> bool:
    """Whether ``path`` is named like GeoJSON; everything else is taken for an image."""
    return path.name.lower().endswith(GEOJSON)


def class_name(label: str) -> str:
    """A label that is a folder's name as well; what patches of slides are called."""
    return re.sub(r"[^\w.+-]+", "_", label).strip("._") or "lesion"


def paint(mask: NDArray[np.uint8], shapes: Iterable[Any], downsample: tuple[float, float], value: int = 1) -> None:
    """Set to ``value`` the pixels of ``mask`` whose centres lie in ``shapes``, shapely polygons in level-0 pixels.

    Each is looked at within its own bounding box, so that thousands of small ones cost what they cover.
    """
    shapely = require("shapely", "slides")
    across, down = downsample
    for polygon in shapely.get_parts(list(shapes)):
        left, top, right, bottom = polygon.bounds
        x0, x1 = max(0, int(left / across)), min(mask.shape[1], int(right / across) + 1)
        y0, y1 = max(0, int(top / down)), min(mask.shape[0], int(bottom / down) + 1)
        if x0 >= x1:
            continue
        shapely.prepare(polygon)
        rows = max(1, _BAND_PX // (x1 - x0))
        for first in range(y0, y1, rows):
            x, y = np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(first, min(first + rows, y1)) + 0.5)
            part = mask[first : first + len(y), x0:x1]
            part[shapely.contains_xy(polygon, x * across, y * down)] = value


def read_mask(path: Path, slide: Slide) -> NDArray[np.uint8]:
    """``(H, W)`` of an image whose values are classes (0: none), over the whole of ``slide`` whatever its size.

    A palette's indices are its values. Colours have none, but black is 0 and anything else 1.

    Raises:
        BadInput: no image, values above 255, or another shape than the slide's.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = MAX_MASK_PX // 2  # Pillow refuses what has twice as many
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height * (1 if picture.mode in ("1", "L", "P") else 4) > MAX_MASK_PX:
                raise BadInput(f"{path}: {width:,} x {height:,} pixels ({picture.mode}) are too large for a mask")
            _check_shape(path, width, height, slide)  # before anything is decoded
            picture.load()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such mask") from None
    except BadInput:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: not a readable mask ({error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    values: NDArray[Any] = np.asarray(picture)
    if values.ndim == 3:
        values = np.asarray(values[..., :3].any(-1))
    if values.dtype.kind not in "bui" or (values.dtype.itemsize > 1 and not 0 <= values.min() <= values.max() <= 255):
        raise BadInput(f"{path}: a mask's values are classes from 0 to 255")
    return np.asarray(values, np.uint8)


def _check_shape(path: Path, width: int, height: int, slide: Slide) -> None:
    if abs(width / height * slide.dimensions[1] / slide.dimensions[0] - 1) > max(_ASPECT, 2 / min(width, height)):
        raise BadInput(
            f"{path}: {width} x {height} pixels do not cover a slide of {slide.dimensions[0]} x {slide.dimensions[1]}"
        )
