"""One image file -> RGB pixels, whatever its mode; the same function for training, evaluation and deployment."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from histill.errors import BadInput

__all__ = ["EXTENSIONS", "MAX_PIXELS", "decode", "load"]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 200_000_000
"""Larger pictures are refused: a slide belongs to the slide reader, a decompression bomb nowhere."""

_PLAIN = frozenset({"RGB"})


def decode(path: Path) -> tuple[Image.Image, str]:
    """Open ``path`` completely as 8-bit RGB, upright (EXIF), transparency over white.

    Returns:
        The picture and a word for what it was converted from (empty for plain RGB).

    Raises:
        BadInput: the file is missing, damaged, no image or larger than `MAX_PIXELS`; one line with the path.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(path)
            if picture.width * picture.height > MAX_PIXELS:
                raise BadInput(f"{path}: {picture.width} x {picture.height} pixels is more than {MAX_PIXELS:,}")
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture))
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever the damage leads to
        raise BadInput(f"{path}: not a readable image ({error})") from None


def _rgb(picture: Image.Image) -> tuple[Image.Image, str]:
    mode = picture.mode
    if mode in _PLAIN:
        return picture, ""
    if mode.startswith("I") or mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        # Deep greyscale has no stated range: 16-bit files use theirs, anything that fits 8 bits is taken as 8-bit.
        top = 255.0 if values.max(initial=0) <= 255 else max(65535.0, float(values.max()))
        grey = np.clip(values * (255.0 / top), 0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), f"{mode} (16-bit)" if top > 255 else mode
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB"), mode
    return picture.convert("RGB"), mode


def square(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize to ``(size, size, 3)``, antialiased bilinear; the aspect ratio is not kept, as in the five papers."""
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(picture, dtype=np.uint8)


def load(path: Path, size: int) -> NDArray[np.float32]:
    """An image as every network takes it: ``(3, size, size)`` float32 RGB in [0, 1]."""
    pixels = square(decode(path)[0], size)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)
