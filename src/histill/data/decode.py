"""One image file -> RGB pixels, whatever its mode; the same function for training, evaluation and deployment."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from histill.errors import BadInput

__all__ = ["EXTENSIONS", "FORMATS", "MAX_PIXELS", "decode", "load"]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
"""What a file may be, whatever it is called. Pillow knows forty more, PostScript among them, which it would run."""
MAX_PIXELS = 2 * 89_478_485
"""Larger pictures are refused, as Pillow does: a slide belongs to the slide reader, a decompression bomb nowhere."""

_PART_PX = 1 << 22

# Errors that are the file's own fault: Pillow's have no number, and a damaged file may make it seek to where no
# file goes. Any other is the machine's trouble: too many open files, a disk or a share that does not answer.
_DAMAGE = (None, errno.EINVAL, errno.EOVERFLOW, errno.EISDIR)

# Pillow warns of large pictures and odd tags. Set once: `warnings.catch_warnings` is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(path: Path) -> tuple[Image.Image, str]:
    """Open ``path`` completely as 8-bit RGB, upright (EXIF), transparency over white.

    Returns:
        The picture and a word for what it was converted from (empty for plain RGB).

    Raises:
        BadInput: the file is missing, damaged, no image or larger than `MAX_PIXELS`; one line with the path.
        OSError: the file cannot be read just now, whatever is in it.
    """
    if path.is_fifo():
        raise BadInput(f"{path}: a pipe, not a file")  # reading would wait for ever
    try:
        with (
            path.open("rb") as file,
            Image.open(file, formats=FORMATS) as picture,
        ):  # a path Pillow would leave open if reading it fails
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise BadInput(f"{path}: not an image of a known kind") from None
    except Image.DecompressionBombError:
        raise BadInput(f"{path}: more than {MAX_PIXELS:,} pixels; cut it into tiles") from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever the damage leads to
        if isinstance(error, OSError) and error.errno not in _DAMAGE:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise BadInput(f"{path}: not a readable image ({error})") from None


def _rgb(picture: Image.Image) -> tuple[Image.Image, str]:
    mode = picture.mode
    if mode == "RGB" and "transparency" not in picture.info:
        return picture, ""
    if mode.startswith("I") or mode == "F":
        values = np.asarray(picture)
        parts = range(0, len(values), max(1, _PART_PX // max(1, picture.width)))  # 64-bit copies of all would be large
        rows = next(iter(parts[1:]), len(values))
        top = 65535.0
        if not mode.startswith("I;16"):
            top = _range(
                max(float(np.nan_to_num(values[at : at + rows].astype(np.float64)).max()) for at in parts), mode
            )
        grey = np.empty(values.shape, np.uint8)
        for at in parts:
            part = np.nan_to_num(values[at : at + rows].astype(np.float64))
            grey[at : at + rows] = np.clip(part * (255.0 / top), 0, 255).round()
        return Image.fromarray(grey).convert("RGB"), mode
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        over = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        over.alpha_composite(layer)
        return over.convert("RGB"), mode
    return picture.convert("RGB"), mode


def _range(highest: float, mode: str) -> float:
    """The value of white in 32-bit greyscale, which states none: the least usual one that holds the highest value."""
    usual = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    return next((top for top in usual if highest <= top), highest)


def square(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize to ``(size, size, 3)``, antialiased bilinear; the aspect ratio is not kept, as in the five papers."""
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(picture, dtype=np.uint8)


def load(path: Path, size: int) -> NDArray[np.float32]:
    """An image as every network takes it: ``(3, size, size)`` float32 RGB in [0, 1]."""
    pixels = square(decode(path)[0], size)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)
