"""Images cut into windows at their own resolution, where resizing them would change what a pixel means."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from histill.data.decode import decode
from histill.data.images import Images, complete, few, of_each
from histill.data.masks import UNKNOWN, decode_mask
from histill.errors import BadInput
from histill.files import atomic, cache_dir, digest, file_digest

__all__ = ["kept_tissue", "sampled", "starts", "windows"]

_VERSION = 1
_TOO_DARK, _TOO_LIGHT = 50.0, 245.0


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover ``length``: every ``stride``, the last one flush with the end."""
    last = max(length - window, 0)
    return sorted({*range(0, last + 1, stride), last})


def windows(images: Images, size: int, *, stride: int | None = None) -> Images:
    """Cut images, and their masks, into windows of ``size`` pixels that cover them.

    A smaller image is mirrored beyond its edge, where of instances nobody knows. A window of one colour without a mark
    is left out, as it looks like any other's.

    The windows of an image stay with its patient (its own content where none is known) and in its split. They lie in
    the cache folder as PNG files, each made once.

    Args:
        images: the table.
        size: pixels of a window.
        stride: pixels from one to the next (default: ``size``).

    Raises:
        BadInput: an unreadable image or mask.
    """
    stride = stride or size
    names = images.frame[["content", "mask_content"]].agg("".join, axis=1)
    home = cache_dir("windows", digest([_VERSION, size, stride, images.masks, len(images.classes)])[:24])
    cut = partial(_cut, images, size, stride, home)
    made = list(of_each([(row, digest(name)[:24]) for row, name in enumerate(names)], cut, "cutting windows"))
    rows = []
    for row, files in enumerate(made):
        whole = images.frame.iloc[row]
        for picture, mask in files:
            one = whole.to_dict() | {"path": str(picture), "patient": whole["patient"] or whole["content"][:16]}
            one |= {"content": file_digest(picture)}
            if mask is not None:
                one |= {"mask": str(mask), "mask_content": file_digest(mask)}
            rows.append(one)
    return images.with_frame(complete(pd.DataFrame(rows)))


def _cut(images: Images, size: int, stride: int, home: Path, named: tuple[int, str]) -> list[tuple[Path, Path | None]]:
    row, name = named
    picture = np.asarray(decode(images.root / images.frame["path"].iloc[row])[0])
    mask = decode_mask(images.root / images.frame["mask"].iloc[row], images) if images.masks else None
    if mask is not None and mask.shape != picture.shape[:2]:
        raise BadInput(f"{images.frame['mask'].iloc[row]}: not as large as its image")
    found: list[tuple[Path, Path | None]] = []
    ys, xs = starts(picture.shape[0], size, stride), starts(picture.shape[1], size, stride)
    for y in ys:
        for x in xs:
            marked = mask is not None and mask[y : y + size, x : x + size].any()
            shown = picture[y : y + size, x : x + size]
            if not marked and (shown == shown[:1, :1]).all() and (found or (y, x) != (ys[-1], xs[-1])):
                continue
            image = home / f"{name}_{y}_{x}.png"
            drawn = None if mask is None else image.with_name(f"{name}_{y}_{x}_mask.png")
            _keep(image, _whole(picture[y : y + size, x : x + size], size))
            if mask is not None and drawn is not None:
                # A mirrored nucleus would be two pieces of one number.
                beyond = UNKNOWN if images.masks == "instances" else None
                part = _whole(mask[y : y + size, x : x + size], size, beyond)
                if images.masks == "classes":  # 255 says that nobody knows, as in the masks that people bring
                    part = np.where(part == UNKNOWN, 255, part).astype(np.uint8)
                _keep(drawn, part)
            found.append((image, drawn))
    return found


def _whole(part: NDArray[Any], size: int, beyond: int | None = None) -> NDArray[Any]:
    """The part filled up to ``size`` by its mirror image, or by the number ``beyond``."""
    margin = [(0, size - part.shape[axis]) if axis < 2 else (0, 0) for axis in range(part.ndim)]
    if not any(after for _, after in margin):
        return part
    if beyond is None:
        return np.pad(part, margin, mode="symmetric")
    return np.pad(part, margin, constant_values=beyond)


def _keep(path: Path, pixels: NDArray[np.generic]) -> None:
    if not path.exists():
        with atomic(path) as temporary:
            Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, "PNG", compress_level=1)


def kept_tissue(
    images: Images, *, dark: float = _TOO_DARK, light: float = _TOO_LIGHT, min_tissue: float = 0.0
) -> Images:
    """The images that show tissue: mean intensity between ``dark`` and ``light``, as the RCKD paper keeps patches.

    Args:
        images: the table.
        dark: lowest mean of all pixels and channels, 0 to 255.
        light: highest mean.
        min_tissue: least share of pixels that are stained (saturation above 0.07), 0 to 1.

    Raises:
        BadInput: no image is left.
    """
    shown = list(of_each(images.paths(), _tissue, "looking for tissue"))
    keep = np.array([one is None or (dark <= one[0] <= light and one[1] >= min_tissue) for one in shown])
    if not keep.any():
        raise BadInput(
            f"{images.root}: none of {len(images)} images shows tissue (mean intensity {dark:g} to {light:g})"
        )
    dropped = images.frame["path"][~keep]
    lines = [f"{len(dropped)} images show no tissue and were left out: {few(dropped)}"] if len(dropped) else []
    return images.with_frame(images.frame[keep], *lines)


def _tissue(path: Path) -> tuple[float, float] | None:
    try:
        pixels = np.asarray(decode(path)[0].reduce(4), dtype=np.float32)
    except BadInput:
        return None  # whoever reads it next says so
    highest = pixels.max(2)
    saturation = (highest - pixels.min(2)) / np.maximum(highest, 1)
    return float(pixels.mean()), float((saturation > 0.07).mean())


def sampled(images: Images, count: int | None, *, seed: int = 0) -> Images:
    """``count`` images drawn at random, or all where there are fewer or ``count`` is None."""
    if count is None or count >= len(images):
        return images
    rows = np.sort(np.random.default_rng(seed).permutation(len(images))[:count])
    return images.with_frame(images.frame.iloc[rows])
