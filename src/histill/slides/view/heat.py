"""Maps of probabilities: a channel of a pyramidal TIFF, or how far two of them lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from histill.errors import BadInput, require
from histill.slides.view.cache import Lru
from histill.slides.ways import check_directories

__all__ = ["Channel", "Difference", "Heat", "HeatFile", "Label"]

Pixels = NDArray[np.uint8]
Places = NDArray[np.float64]
_MOST_PIECE_PX = 1 << 24
_PIECES: Lru[Pixels] = Lru(1 << 26, lambda pixels: pixels.nbytes)  # of all maps together


class Heat(Protocol):
    """A map over a slide, uint8 = round(255 p)."""

    @property
    def pixel(self) -> float:
        """Level-0 pixels that the map's finest pixel is wide."""

    def sample(self, xs: Places, ys: Places, scale: float) -> Pixels:
        """``(len(ys), len(xs))`` at level-0 places, for a picture whose pixels are ``scale`` level-0 pixels wide."""


class HeatFile:
    """``heatmap.ome.tiff`` of a slide, or its ``mask.ome.tiff``: planes (class, y, x) of uint8, levels in SubIFDs.

    What is decoded is kept in bounded memory; threads may read at the same time.

    Args:
        path: the file.
        downsample: level-0 pixels of the slide that a pixel of the map's finest level is wide.

    Raises:
        BadInput: not such a file.
    """

    def __init__(self, path: Path, downsample: float) -> None:
        tifffile = require("tifffile", "slides")
        self.path = path
        check_directories(path)  # tifffile believes more of what a file says
        try:
            with tifffile.TiffFile(path) as file:  # not kept open: there may be more slides than open files
                self._pages = [[page.aspage() for page in level.pages] for level in file.series[0].levels]
        except Exception as error:  # noqa: BLE001 - tifffile raises what it meets
            raise BadInput(f"{path}: not a TIFF that can be read ({error})") from None
        shapes = {(page.dtype, page.samplesperpixel) for pages in self._pages for page in pages}
        counts = {len(pages) for pages in self._pages}
        if shapes != {(np.dtype(np.uint8), 1)} or len(counts) != 1:
            raise BadInput(f"{path}: not planes of 8 bits, one per class; write it with histill slide")
        self.channels = counts.pop()
        self.sizes = [(int(pages[0].imagewidth), int(pages[0].imagelength)) for pages in self._pages]
        # A level is a power of two smaller than the first; its size is rounded, so the power is found by rounding.
        halvings = [round(np.log2(max(self.sizes[0]) / max(size))) for size in self.sizes]
        self.downsamples: list[float] = [float(downsample * 2.0**power) for power in halvings]

    def read(self, level: int, channel: int, x0: int, y0: int, x1: int, y1: int) -> Pixels:
        """``(y1 - y0, x1 - x0)`` of one class; 0 outside the map."""
        out = np.zeros((y1 - y0, x1 - x0), np.uint8)
        width, height = self.sizes[level]
        tall, wide = self._shape(self._pages[level][channel])
        across = -(-width // wide)
        for row in range(max(y0, 0) // tall, -(-min(y1, height) // tall)):
            for column in range(max(x0, 0) // wide, -(-min(x1, width) // wide)):
                piece = self._piece(level, channel, row * across + column)
                left, top = column * wide, row * tall
                right = min(left + piece.shape[1], width, x1)
                bottom = min(top + piece.shape[0], height, y1)
                from_x, from_y = max(left, x0), max(top, y0)
                if from_x < right and from_y < bottom:
                    part = piece[from_y - top : bottom - top, from_x - left : right - left]
                    out[from_y - y0 : bottom - y0, from_x - x0 : right - x0] = part
        return out

    def sample(self, channel: int, xs: Places, ys: Places, scale: float, *, smooth: bool = True) -> Pixels:
        """``(len(ys), len(xs))`` of one class at rising level-0 places, linear between pixels or the nearest.

        Read is the coarsest level whose pixels are no wider than ``scale``.
        """
        level = max((n for n, own in enumerate(self.downsamples) if own <= scale), default=0)
        (x, x_next, right), (y, y_next, down) = (
            _between(places / self.downsamples[level] - 0.5, side, smooth)
            for places, side in zip((xs, ys), self.sizes[level])
        )
        x0, y0 = int(x[0]), int(y[0])
        part = self.read(level, channel, x0, y0, int(x_next[-1]) + 1, int(y_next[-1]) + 1)
        if not smooth:
            return part[np.ix_(y - y0, x - x0)]
        rows = part[y - y0] * (1 - down[:, None]) + part[y_next - y0] * down[:, None]
        return np.asarray(np.rint(rows[:, x - x0] * (1 - right) + rows[:, x_next - x0] * right), np.uint8)

    def _shape(self, page: Any) -> tuple[int, int]:
        """Height and width of the pieces that a plane is stored in, tiles or strips."""
        shape = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        if not 0 < shape[0] * shape[1] <= _MOST_PIECE_PX:
            raise BadInput(f"{self.path}: stored in pieces of {shape[1]} x {shape[0]} pixels, which is too large")
        return int(shape[0]), int(shape[1])

    def _piece(self, level: int, channel: int, index: int) -> Pixels:
        return _PIECES.get((self.path, level, channel, index), lambda: self._decode(self._pages[level][channel], index))

    def _decode(self, page: Any, index: int) -> Pixels:
        try:
            with self.path.open("rb") as file:
                file.seek(page.dataoffsets[index])
                data = file.read(page.databytecounts[index])
            pixels = page.decode(data or None, index)[0]
        except Exception as error:  # noqa: BLE001 - whatever the codec says
            raise BadInput(f"{self.path}: damaged at tile {index} ({error})") from None
        # A piece that was never written is empty.
        return np.zeros(self._shape(page), np.uint8) if pixels is None else np.asarray(pixels[0, :, :, 0], np.uint8)


def _between(
    places: Places, side: int, smooth: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The pixels on either side of each place, and how far it is to the second; within the map."""
    first = np.floor(places if smooth else places + 0.5)
    share = (places - first).astype(np.float32)
    before, after = (np.clip(first + step, 0, side - 1).astype(np.int64) for step in (0, int(smooth)))
    return before, after, share


class Channel:
    """One class of a `HeatFile`."""

    def __init__(self, file: HeatFile, channel: int) -> None:
        self.file, self.channel = file, channel
        self.pixel = file.downsamples[0]

    def sample(self, xs: Places, ys: Places, scale: float) -> Pixels:
        """As in `Heat`."""
        return self.file.sample(self.channel, xs, ys, scale)


class Label:
    """Where a `HeatFile` of class numbers, as a segmentation leaves it, has one of them: 255 there, 0 elsewhere."""

    def __init__(self, file: HeatFile, value: int) -> None:
        self.file, self.value = file, value
        self.pixel = file.downsamples[0]

    def sample(self, xs: Places, ys: Places, scale: float) -> Pixels:
        """As in `Heat`."""
        return np.where(self.file.sample(0, xs, ys, scale, smooth=False) == self.value, np.uint8(255), np.uint8(0))


class Difference:
    """How far two models lie apart: at each place the largest absolute difference of a class's probability.

    It is 0 where either saw no tile, which of a map with several classes can be told: they are all 0 there.

    Args:
        one: the map of a model.
        other: that of another.
        channels: of each class that both know, its channel in the one and in the other.
    """

    def __init__(self, one: HeatFile, other: HeatFile, channels: Sequence[tuple[int, int]]) -> None:
        self.one, self.other, self.channels = one, other, channels
        self.pixel = max(one.downsamples[0], other.downsamples[0])

    def sample(self, xs: Places, ys: Places, scale: float) -> Pixels:
        """As in `Heat`; the nearest pixels of both are taken, so that neither's edge counts as doubt."""
        far = np.zeros((len(ys), len(xs)), np.uint8)
        for here, there in self.channels:
            a = self.one.sample(here, xs, ys, scale, smooth=False)
            b = self.other.sample(there, xs, ys, scale, smooth=False)
            far = np.maximum(far, np.maximum(a, b) - np.minimum(a, b))
        for file in (self.one, self.other):
            if file.channels > 1:
                seen = [file.sample(n, xs, ys, scale, smooth=False) for n in range(file.channels)]
                far = np.where(np.max(seen, axis=0) > 0, far, np.uint8(0))
        return far
