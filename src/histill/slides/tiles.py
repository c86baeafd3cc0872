"""What gives a slide its pixels, and how a region is put together from tiles."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from histill.slides.tiff import Directory

__all__ = ["CACHE_BYTES", "MAX_CACHE_BYTES", "Pixels", "Source", "TileCache", "cache_for", "mosaic"]

CACHE_BYTES = 64 << 20
"""What a slide keeps of decoded tiles: a region that is not aligned to them needs each a few times."""

MAX_CACHE_BYTES = 256 << 20
"""What a very wide one keeps."""

Pixels = NDArray[np.uint8]


class Source(Protocol):
    """Where a slide's pixels come from.

    ``region`` is asked only for what lies within ``sizes[level]``, in that level's pixels, by any thread.
    """

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Width and height of each level."""
        ...

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """``(height, width, 3)`` uint8, white where there is nothing."""
        ...

    def close(self) -> None:
        """Give back what is open; may be called twice."""
        ...


class TileCache:
    """The tiles used last, up to ``limit`` bytes."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit, self.bytes = limit, 0
        self._tiles: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, level: int, number: int) -> Pixels | None:
        """The tile, if it is still here."""
        with self._lock:
            if (tile := self._tiles.get((level, number))) is not None:
                self._tiles.move_to_end((level, number))
            return tile

    def put(self, level: int, number: int, tile: Pixels) -> None:
        """Keep ``tile``, which nobody may change from now on."""
        with self._lock:
            if (level, number) in self._tiles or tile.nbytes > self.limit:
                return
            self._tiles[level, number] = tile
            self.bytes += tile.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._tiles.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._tiles.clear()
            self.bytes = 0


def cache_for(levels: Sequence[Directory]) -> TileCache:
    """Room for two rows of tiles, so that a pass over a wide slide, row by row, decodes each tile once."""
    row = max((level.across * level.tile_width * level.tile_height * 3 for level in levels), default=0)
    return TileCache(min(max(CACHE_BYTES, 2 * row + row // 8), MAX_CACHE_BYTES))


def mosaic(tiles: Directory, x: int, y: int, width: int, height: int, tile: Callable[[int, int], Pixels]) -> Pixels:
    """The region of a level at its pixel (x, y), from ``tile(row, column)``, each of the directory's tile size."""
    tall, wide = tiles.tile_height, tiles.tile_width
    out = np.empty((height, width, 3), np.uint8)
    for row in range(y // tall, (y + height - 1) // tall + 1):
        top, bottom = max(y, row * tall), min(y + height, (row + 1) * tall)
        for column in range(x // wide, (x + width - 1) // wide + 1):
            left, right = max(x, column * wide), min(x + width, (column + 1) * wide)
            out[top - y : bottom - y, left - x : right - x] = tile(row, column)[
                top - row * tall : bottom - row * tall, left - column * wide : right - column * wide
            ]
    return out
