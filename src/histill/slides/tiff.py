"""The directories of a TIFF file, read once and believed only as far as the file's own size allows (TIFF 6.0, BigTIFF).

A slide's file may come from anywhere. Whatever a number in it says, nothing larger than the file is read, no
directory is read twice, no more than `MAX_DIRECTORIES`, and no more of them together than `MAX_VALUES` bytes:
directories may share what they point to, so that a small file could fill any memory.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["JPEG", "MAX_DIRECTORIES", "MAX_SIDE_PX", "BadTiff", "Directory", "NotTiff", "at", "directories"]

MAX_DIRECTORIES = 4096
MAX_SIDE_PX = 4_000_000  # of a level; the largest slides are a tenth of it
MAX_TILE_PX = 1 << 26  # in a tile
MAX_LEVEL_PX = 1 << 38  # in a level, a square of half a million; the largest slides are a tenth of it
MAX_TAGS = 1024  # in a directory
MAX_ALL_TAGS = 1 << 18  # in all of a file's
MAX_TEXT = 64 << 20  # bytes of a description; the OME-XML of a long series is a few megabytes
MAX_VALUES = 256 << 20  # bytes of all values of a file; a slide of 10^11 pixels has 30 MB of places and lengths
JPEG = 7  # Compression
NDPI = 65420  # a tag of Hamamatsu's files, whose places exceed what 32 bits hold, so that they cannot be followed here

# Bytes and NumPy code of each type of value.
_TYPES = {1: "u1", 2: "S1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "i4", 11: "f4"}
_TYPES |= {12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
_INTEGERS = frozenset({1, 3, 4, 13, 16, 18})
_PLACES = frozenset({3, 4, 13, 16, 18})
_KINDS: dict[str, Set[int]] = {"description": {1, 2, 7}, "tables": {1, 7}, "x_resolution": {5}, "y_resolution": {5}}
_KINDS |= {"offsets": _PLACES, "lengths": _PLACES}
_WANTED = {
    254: "subfile",
    256: "width",
    257: "height",
    258: "bits",
    259: "compression",
    262: "photometric",
    270: "description",
    277: "samples",
    282: "x_resolution",
    283: "y_resolution",
    284: "planar",
    296: "resolution_unit",
    322: "tile_width",
    323: "tile_height",
    324: "offsets",
    325: "lengths",
    330: "subdirectories",
    347: "tables",
}


class BadTiff(ValueError):
    """The file says of itself what cannot be; the message goes into an error's line."""


class NotTiff(BadTiff):
    """The file is no TIFF, or none that can be followed here."""


@dataclass(frozen=True)
class Directory:
    """One image of the file; ``tile_width`` is 0 where it is not tiled.

    Attributes:
        offsets: where each tile lies in the file, row by row, uint64; empty where it is not tiled.
        lengths: its bytes; 0 for a tile that is missing.
        tables: JPEG tables that every tile shares (`JPEGTables`), as they stand.
        subfile: `NewSubfileType`; None where the tag is missing.
        mpp: microns per pixel in x and y as the resolution tags say, None without a unit.
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    compression: int
    photometric: int
    samples: int
    bits: tuple[int, ...]
    planar: int
    subfile: int | None
    description: str
    tables: bytes
    mpp: tuple[float, float] | None
    offsets: NDArray[np.uint64]
    lengths: NDArray[np.uint64]
    subdirectories: tuple[int, ...]

    @property
    def across(self) -> int:
        """Tiles in a row."""
        return -(-self.width // self.tile_width)

    @property
    def down(self) -> int:
        """Rows of tiles."""
        return -(-self.height // self.tile_height)

    @property
    def is_jpeg(self) -> bool:
        """Whether a tile is one 8-bit JPEG of three channels."""
        return (
            self.tile_width > 0
            and self.compression == JPEG
            and self.samples == 3
            and self.planar == 1
            and set(self.bits) == {8}
            and self.photometric in (2, 6)
        )


def directories(fd: int) -> list[Directory]:
    """Every directory of the open file ``fd``, in the file's order; those under another are not followed (`at`).

    Raises:
        NotTiff: no TIFF, or one of Hamamatsu's.
        BadTiff: a damaged one.
    """
    reader = _Reader(fd)
    try:
        return list(reader.chain())
    except BadTiff as error:
        raise (NotTiff("an NDPI file") if reader.ndpi else error) from None


def at(fd: int, places: tuple[int, ...]) -> list[Directory]:
    """The directories that begin at ``places``, such as `Directory.subdirectories`."""
    reader = _Reader(fd)
    return [reader.read(place)[0] for place in places[:MAX_DIRECTORIES]]


class _Reader:
    def __init__(self, fd: int) -> None:
        self.fd, self.size = fd, os.fstat(fd).st_size
        head = self.get(0, min(16, self.size))
        order: Literal["<", ">"] | None = "<" if head[:2] == b"II" else ">" if head[:2] == b"MM" else None
        if order is None or len(head) < 8:
            raise NotTiff("not a TIFF file")
        self.order, self.ndpi = order, False
        self.tags = self.bytes = 0  # of all directories so far
        version = struct.unpack(f"{order}H", head[2:4])[0]
        if version == 42:
            self.big, self.first = False, struct.unpack(f"{order}I", head[4:8])[0]
        elif version == 43 and len(head) == 16:
            self.big, self.first = True, struct.unpack(f"{order}Q", head[8:16])[0]
        else:
            raise NotTiff("not a TIFF file")

    def get(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise BadTiff(f"it points to byte {offset + length:,} of a file of {self.size:,}: is it cut short?")
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise BadTiff("it ends too early")
        return data

    def number(self, code: str, offset: int) -> int:
        return int(struct.unpack(self.order + code, self.get(offset, struct.calcsize(code)))[0])

    def chain(self) -> Iterator[Directory]:
        seen: set[int] = set()
        place = self.first
        while place:
            if place in seen:
                raise BadTiff("its directories go round in a circle")
            if len(seen) == MAX_DIRECTORIES:
                raise BadTiff(f"it has more than {MAX_DIRECTORIES} directories")
            seen.add(place)
            directory, place = self.read(place)
            yield directory

    def read(self, place: int) -> tuple[Directory, int]:
        """The directory at ``place`` and where the next one begins (0: nowhere)."""
        head, size, code = (8, 20, "Q") if self.big else (2, 12, "H")
        count = self.number(code, place)
        self.tags += count
        if count > MAX_TAGS or self.tags > MAX_ALL_TAGS:
            raise BadTiff(f"{'a directory' if count > MAX_TAGS else 'directories'} with {max(count, self.tags):,} tags")
        body = self.get(place + head, count * size)
        tags: dict[str, Any] = {}
        self.ndpi |= NDPI in (struct.unpack(f"{self.order}H", body[n : n + 2])[0] for n in range(0, len(body), size))
        for start in range(0, len(body), size):
            entry = body[start : start + size]
            tag, kind = struct.unpack(f"{self.order}HH", entry[:4])
            if kind not in _TYPES:
                continue
            if name := _WANTED.get(tag):
                if kind not in _KINDS.get(name, _INTEGERS):
                    raise BadTiff(f"tag {tag} of type {kind}")
                tags[name] = self.value(kind, entry[4:])
            elif (length := self.length(kind, entry[4:])) > self.size:
                raise BadTiff(f"a tag of {length:,} bytes in a file of {self.size:,}")
        directory = _directory(tags)
        if (ends := directory.offsets[filled := directory.lengths > 0] + directory.lengths[filled]).size and (
            int(ends.max()) > self.size or bool((ends < directory.offsets[filled]).any())  # past 2^64 it wraps
        ):
            raise BadTiff(f"it has tiles up to byte {int(ends.max()):,} of a file of {self.size:,}: is it cut short?")
        return directory, self.number("Q" if self.big else "I", place + head + count * size)

    def length(self, kind: int, entry: bytes) -> int:
        """Bytes of a tag's value."""
        count = struct.unpack(self.order + ("Q" if self.big else "I"), entry[: 8 if self.big else 4])[0]
        return int(count) * np.dtype(_TYPES[kind]).itemsize * (2 if kind in (5, 10) else 1)  # a rational is a pair

    def value(self, kind: int, entry: bytes) -> NDArray[Any]:
        code, inline = ("Q", 8) if self.big else ("I", 4)
        dtype = np.dtype(_TYPES[kind]).newbyteorder(self.order)
        length = self.length(kind, entry)
        self.bytes += length * 8 // dtype.itemsize if kind in _PLACES else length  # places are kept as 64 bits each
        if self.bytes > MAX_VALUES:
            raise BadTiff(f"tags of more than {MAX_VALUES:,} bytes")
        if length <= inline:
            data = entry[inline : inline + length]
        else:
            data = self.get(struct.unpack(self.order + code, entry[inline:])[0], length)
        return np.frombuffer(data, dtype)


def _directory(tags: dict[str, Any]) -> Directory:
    def first(name: str, default: int) -> int:
        return int(tags[name][0]) if len(tags.get(name, ())) else default

    width, height = first("width", 0), first("height", 0)
    tile_width, tile_height = first("tile_width", 0), first("tile_height", 0)
    if not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX and width * height <= MAX_LEVEL_PX):
        raise BadTiff(f"an image of {width:,} x {height:,} pixels")
    offsets = lengths = np.zeros(0, np.uint64)
    planar, samples = first("planar", 1), first("samples", 1)
    if "tile_width" in tags and "offsets" in tags:
        if tile_width < 1 or tile_height < 1 or tile_width * tile_height > MAX_TILE_PX:
            raise BadTiff(f"tiles of {tile_width:,} x {tile_height:,} pixels")
        offsets, lengths = (np.asarray(tags.get(n, ()), np.uint64) for n in ("offsets", "lengths"))
        tiles = -(-width // tile_width) * -(-height // tile_height) * (samples if planar == 2 else 1)
        if len(offsets) < tiles or len(lengths) < tiles:
            raise BadTiff(f"{len(offsets):,} places and {len(lengths):,} lengths for {tiles:,} tiles")
        offsets, lengths = offsets[:tiles], lengths[:tiles]
    else:
        tile_width = tile_height = 0
    text = tags.get("description", np.zeros(0, "S1"))
    if text.nbytes > MAX_TEXT:
        raise BadTiff(f"a description of {text.nbytes:,} bytes")
    return Directory(
        width=width,
        height=height,
        tile_width=tile_width,
        tile_height=tile_height,
        compression=first("compression", 1),
        photometric=first("photometric", -1),
        samples=samples,
        bits=tuple(int(b) for b in tags.get("bits", ())[:16]) or (1,),
        planar=planar,
        subfile=first("subfile", 0) if "subfile" in tags else None,
        description=text.tobytes().split(b"\0")[0].decode("utf-8", "replace"),
        tables=tags["tables"].tobytes() if "tables" in tags else b"",
        mpp=_mpp(tags, first("resolution_unit", 2)),
        offsets=offsets,
        lengths=lengths,
        subdirectories=tuple(int(p) for p in tags.get("subdirectories", ())[:MAX_DIRECTORIES]),
    )


def _mpp(tags: dict[str, Any], unit: int) -> tuple[float, float] | None:
    microns = {2: 25_400.0, 3: 10_000.0}.get(unit)
    found = []
    for name in ("x_resolution", "y_resolution"):
        pair = tags.get(name, ())
        if microns is None or len(pair) < 2 or not pair[0] or not pair[1]:
            return None
        found.append(microns * float(pair[1]) / float(pair[0]))
    return found[0], found[1]
