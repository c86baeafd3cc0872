"""Tiles of a TIFF in the compressions of slides, decoded by tifffile: OME-TIFF, and what OpenSlide does not take."""

from __future__ import annotations

import os
import re
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from histill.errors import BadInput, require
from histill.slides.jpeg_tiles import MAX_TILE_BYTES
from histill.slides.tiff import JPEG, Directory
from histill.slides.tiles import Pixels, cache_for, mosaic

__all__ = ["TiffTiles"]

_JPEG_2000 = frozenset({33003, 33004, 33005, 34712})
# None, LZW, JPEG, deflate, PackBits, LZMA, Zstandard, WebP. tifffile knows more, which nobody uses for slides: each is
# one more decoder to be attacked, and some set aside whatever a tile claims.
_COMPRESSIONS = _JPEG_2000 | {1, 5, JPEG, 8, 32773, 32946, 34925, 50000, 50001}
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a JPEG's size


class TiffTiles:
    """Levels that are tiled TIFF directories of 8-bit grey, RGB or RGBA (alpha is left out).

    Raises:
        BadInput: other pixels than these, such as fluorescence channels of 16 bits.
    """

    def __init__(self, path: Path, levels: Sequence[Directory]) -> None:
        for level in levels:
            if level.samples not in (1, 3, 4) or set(level.bits) != {8} or level.photometric == 3:
                raise BadInput(
                    f"{path}: {level.samples} channels of {level.bits[0]} bits; "
                    "slides of 8-bit grey or RGB are read, so convert it to RGB first"
                )
            if level.compression not in _COMPRESSIONS:
                raise BadInput(f"{path}: TIFF compression {level.compression} is not read; convert it")
        tifffile = require("tifffile", "slides")
        self.path, self.levels = path, levels
        self.sizes = [(level.width, level.height) for level in levels]
        self.cache = cache_for(levels)
        self._lock = threading.Lock()
        self.fd = os.open(path, os.O_RDONLY)
        try:
            with tifffile.TiffFile(path) as file:
                self._decoders = [_decoder(tifffile, file, level) for level in levels]
        except BaseException as error:
            os.close(self.fd)
            if not isinstance(error, Exception):
                raise
            raise BadInput(f"{path}: damaged, or in a compression that is not known ({error})") from None

    def close(self) -> None:
        """Close the file and forget the tiles."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1
        self.cache.clear()

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Pixels of ``level``, put together from its tiles; missing tiles are white."""
        tiles = self.levels[level]
        return mosaic(tiles, x, y, width, height, lambda r, c: self._tile(level, r * tiles.across + c))

    def _tile(self, level: int, number: int) -> Pixels:
        if (tile := self.cache.get(level, number)) is not None:
            return tile
        tiles = self.levels[level]
        planes = range(tiles.samples if tiles.planar == 2 else 1)
        parts = [self._decode(level, number + plane * tiles.across * tiles.down) for plane in planes]
        if any(part is None for part in parts):
            tile = np.full((tiles.tile_height, tiles.tile_width, 3), 255, np.uint8)
        else:
            tile = np.concatenate([np.asarray(part) for part in parts], axis=-1)[..., :3]
            if tile.shape[-1] == 1:
                tile = np.repeat(255 - tile if tiles.photometric == 0 else tile, 3, axis=-1)
        self.cache.put(level, number, tile)
        return tile

    def _decode(self, level: int, index: int) -> Pixels | None:
        tiles = self.levels[level]
        offset, length = int(tiles.offsets[index]), int(tiles.lengths[index])
        if not length:
            return None
        try:
            if length > MAX_TILE_BYTES:
                raise ValueError(f"{length:,} bytes")
            packed = os.pread(self.fd, length, offset)
            if not _fits(packed, tiles):
                raise ValueError("it claims another size")
            data, _, _ = self._decoders[level](packed, index)
            channels = 1 if tiles.planar == 2 else tiles.samples
            found = np.asarray(data).reshape(-1, data.shape[-2], channels)
            out = np.full((tiles.tile_height, tiles.tile_width, channels), 255, np.uint8)
            out[: found.shape[0], : found.shape[1]] = found  # tifffile cuts tiles off at the image's edge
        except Exception as error:  # noqa: BLE001 - a codec's errors have no common name
            raise BadInput(f"{self.path}: tile {index} of level {level} cannot be decoded ({error})") from None
        return out


def _fits(packed: bytes, tiles: Directory) -> bool:
    """Whether an encoded tile claims no more pixels than a tile has; its decoder would set them aside first."""
    if tiles.compression == JPEG:
        claims = [_jpeg_size(packed)]
    elif tiles.compression in _JPEG_2000:
        heads = [m.end() for m in re.finditer(b"\xff\x4f\xff\x51", packed)]  # SIZ: two lengths, then the canvas
        claims = [struct.unpack(">II", packed[at + 4 : at + 12]) if len(packed) >= at + 12 else None for at in heads]
    else:
        return True
    most = max(tiles.tile_width, tiles.tile_height)
    return bool(claims) and all(claim is not None and 0 < min(claim) <= max(claim) <= most for claim in claims)


def _jpeg_size(packed: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG stream, None where it does not come to them."""
    at = 2
    while at + 9 <= len(packed) and packed[at] == 0xFF:
        marker, length = packed[at + 1], int.from_bytes(packed[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            return int.from_bytes(packed[at + 5 : at + 7], "big"), int.from_bytes(packed[at + 7 : at + 9], "big")
        at += 1 if marker == 0xFF else 2 if marker == 0xD8 else 2 + length
    return None


def _decoder(tifffile: Any, file: Any, level: Directory) -> Any:
    """A function of (bytes, tile number) -> (pixels, place, shape), of the page that is ``level``."""
    pages = [file.pages.first, *(file.pages.first.pages or ()), *file.pages[1:]]
    page = next(p for p in pages if p.is_tiled and (p.imagewidth, p.imagelength) == (level.width, level.height))
    if isinstance(page, tifffile.TiffFrame):
        page = page.aspage()
    tables = page.jpegtables
    return lambda data, index: page.decode(data, index, jpegtables=tables)
