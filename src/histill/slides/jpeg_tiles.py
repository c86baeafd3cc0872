"""The fast way to a slide's pixels: JPEG tiles are located once, read by offset and decoded by libjpeg-turbo.

The same bytes as OpenSlide's, which decodes with the same library, without its detour over libtiff, cairo and
premultiplied colour. A tile that is missing or damaged is left to OpenSlide.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from histill.errors import require
from histill.slides.tiff import Directory
from histill.slides.tiles import Pixels, Source, cache_for, mosaic

__all__ = ["MAX_TILE_BYTES", "JpegTiles"]

MAX_TILE_BYTES = 64 << 20  # of one encoded tile
_TRAILING = 64  # bytes in which a tile's end marker must be; writers pad to whole words or blocks


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
        self.cache = cache_for(levels)
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
        if x % wide == y % tall == 0 and (width, height) == (wide, tall):
            return self._tile(level, y // tall, x // wide, keep=False)
        return mosaic(tiles, x, y, width, height, partial(self._tile, level, keep=True))

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
