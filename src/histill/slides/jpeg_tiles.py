"""The fast way to a slide's pixels: JPEG tiles are located once, read by offset and decoded by libjpeg-turbo.

The same bytes as OpenSlide's, which decodes with the same library, without its detour over libtiff, cairo and
premultiplied colour. A tile that is missing or damaged is left to OpenSlide.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from histill.errors import require
from histill.slides.tiff import Directory

__all__ = ["CACHE_BYTES", "JpegTiles", "Pixels", "Source", "TileCache"]

CACHE_BYTES = 64 << 20
"""What a slide keeps of decoded tiles: a region that is not aligned to them needs each a few times."""

MAX_TILE_BYTES = 64 << 20  # of one encoded tile
_TRAILING = 64  # bytes in which a tile's end marker must be; writers pad to whole words or blocks

Pixels = NDArray[np.uint8]


class Source(Protocol):
    """Where a slide's pixels come from.

    ``region`` is asked only for what lies within ``sizes[level]``, in that level's pixels, by any thread.
    """

    sizes: Sequence[tuple[int, int]]

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


class JpegTiles:
    """Levels that are TIFF directories of JPEG tiles. Thread-safe: reads name their place, decoding shares nothing.

    Args:
        path: the file.
        levels: one directory per level, each `Directory.is_jpeg`.
        other: who is asked for a tile that cannot be decoded.
    """

    def __init__(self, path: Path, levels: Sequence[Directory], other: Source) -> None:
        self.decode = require("imagecodecs", "slides").jpeg8_decode
        self.levels, self.other = levels, other
        self.sizes = [(level.width, level.height) for level in levels]
        self.cache = TileCache()
        self.fd = os.open(path, os.O_RDONLY)
        self._closing = threading.Lock()

    def close(self) -> None:
        """Close the file and forget the tiles."""
        with self._closing:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1
        self.cache.clear()
        self.other.close()

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Pixels of ``level``, put together from its tiles."""
        tiles = self.levels[level]
        tall, wide = tiles.tile_height, tiles.tile_width
        rows, columns = range(y // tall, (y + height - 1) // tall + 1), range(x // wide, (x + width - 1) // wide + 1)
        if len(rows) == len(columns) == 1 and x % wide == y % tall == 0 and (width, height) == (wide, tall):
            return self._tile(level, rows[0], columns[0], keep=False)
        out = np.empty((height, width, 3), np.uint8)
        for row in rows:
            top, bottom = max(y, row * tall), min(y + height, (row + 1) * tall)
            for column in columns:
                left, right = max(x, column * wide), min(x + width, (column + 1) * wide)
                tile = self._tile(level, row, column, keep=True)
                out[top - y : bottom - y, left - x : right - x] = tile[
                    top - row * tall : bottom - row * tall, left - column * wide : right - column * wide
                ]
        return out

    def _tile(self, level: int, row: int, column: int, *, keep: bool) -> Pixels:
        number = row * self.levels[level].across + column
        tile = self.cache.get(level, number)
        if tile is not None:
            return tile if keep else tile.copy()
        tile = self._decode(level, number)
        if tile is None:
            tile = self._from_other(level, row, column)
        if keep:
            self.cache.put(level, number, tile)
        return tile

    def _decode(self, level: int, number: int) -> Pixels | None:
        tiles = self.levels[level]
        offset, length = int(tiles.offsets[number]), int(tiles.lengths[number])
        if not 0 < length <= MAX_TILE_BYTES:
            return None
        data = os.pread(self.fd, length, offset)
        if b"\xff\xd9" not in data[-_TRAILING:]:
            return None  # cut short: libjpeg would quietly paint the rest grey
        out = np.empty((tiles.tile_height, tiles.tile_width, 3), np.uint8)
        try:
            # Into an array of the right size, so that a tile which claims another one allocates nothing.
            self.decode(
                data,
                tables=tiles.tables or None,
                colorspace="YCBCR" if tiles.photometric == 6 else "RGB",
                outcolorspace="RGB",
                out=out,
            )
        except Exception:  # noqa: BLE001 - a codec's errors have no common name; OpenSlide decides what this is
            return None
        return out

    def _from_other(self, level: int, row: int, column: int) -> Pixels:
        tiles = self.levels[level]
        left, top = column * tiles.tile_width, row * tiles.tile_height
        width, height = min(tiles.tile_width, tiles.width - left), min(tiles.tile_height, tiles.height - top)
        out = np.full((tiles.tile_height, tiles.tile_width, 3), 255, np.uint8)
        out[:height, :width] = self.other.region(level, left, top, width, height)
        return out
