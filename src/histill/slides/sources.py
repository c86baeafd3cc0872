"""The other ways to a slide's pixels: OpenSlide for whatever it knows, and plain pictures as slides of one level."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from histill.data.decode import decode
from histill.errors import BadInput, require
from histill.slides.tiles import Pixels

__all__ = ["OpenSlideSource", "Picture", "over_white"]


class OpenSlideSource:
    """Any file that OpenSlide reads; its handle may be used by several threads.

    An OpenSlide handle that met an error answers nothing any more, so that it is opened anew after one: a damaged
    tile costs itself alone.

    Raises:
        BadInput: OpenSlide does not know the file, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.openslide: Any = require("openslide", "slides")
        self.path = path
        self._lock = threading.Lock()
        self._handle: Any = self._open()
        try:
            self.sizes = [(int(w), int(h)) for w, h in self._handle.level_dimensions]
            self.downsamples = [float(d) for d in self._handle.level_downsamples]
            self.properties: dict[str, str] = dict(self._handle.properties)
        except Exception as error:  # noqa: BLE001 - a handle that met an error gives its bindings half an answer
            raise BadInput(f"{path}: OpenSlide cannot read it ({_line(error)})") from None
        if not self.sizes or min(min(size) for size in self.sizes) < 1:
            raise BadInput(f"{path}: OpenSlide finds no pixels in it")

    def _open(self) -> Any:
        try:
            return self.openslide.OpenSlide(str(self.path))
        except self.openslide.OpenSlideUnsupportedFormatError:
            raise BadInput(f"{self.path}: not a slide that OpenSlide knows") from None
        except (self.openslide.OpenSlideError, OSError) as error:
            raise BadInput(f"{self.path}: OpenSlide cannot read it ({_line(error)})") from None

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Pixels of ``level``; as near to its own as whole level-0 pixels come."""
        scale = self.downsamples[level]
        return self.read(round(x * scale), round(y * scale), level, width, height)

    def read(self, l0_x: int, l0_y: int, level: int, width: int, height: int) -> Pixels:
        """What OpenSlide answers, over white; where a level's pixels lie between level-0 pixels it blends them."""
        with self._lock:
            handle = self._handle = self._handle or self._open()
        try:
            return over_white(handle.read_region((l0_x, l0_y), level, (width, height)))
        except self.openslide.OpenSlideError as error:
            with self._lock:
                if self._handle is handle:
                    self._handle = None
            raise BadInput(
                f"{self.path}: cannot be read at x {l0_x}, y {l0_y}, level {level} ({_line(error)})"
            ) from None

    def close(self) -> None:
        """Close the handle, when nobody reads by it any more: its bindings do so where the last reference goes."""
        with self._lock:
            self._handle = None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or "damaged"


def over_white(picture: Image.Image) -> Pixels:
    """An RGBA picture -> ``(H, W, 3)`` over white."""
    alpha = picture.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return np.array(picture)[..., :3].copy()
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, mask=alpha)
    return np.array(white)


class Picture:
    """A plain image, decoded whole; `BadInput` where it cannot be."""

    def __init__(self, path: Path) -> None:
        self.pixels = np.asarray(decode(path)[0], dtype=np.uint8)
        self.sizes = [(self.pixels.shape[1], self.pixels.shape[0])]

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """A copy of a part of it."""
        return self.pixels[y : y + height, x : x + width].copy()

    def close(self) -> None:
        """Nothing is open."""
