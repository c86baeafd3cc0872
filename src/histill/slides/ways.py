"""Which way leads to a slide's pixels: JPEG tiles by offset, OpenSlide, tifffile, or a plain picture decoded whole."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from histill.data.decode import EXTENSIONS
from histill.errors import BadInput
from histill.slides import tiff
from histill.slides.jpeg_tiles import JpegTiles
from histill.slides.sources import OpenSlideSource, Picture
from histill.slides.tiled import TiffTiles
from histill.slides.tiles import Source

__all__ = ["Way", "check_directories", "way_to"]

# What these take grows with the text and not with its square, whatever the text.
_PIXELS = re.compile(r"<(?:\w{1,40}:)?Pixels\b[^<>]{0,4000}>")
_ATTRIBUTE = re.compile(r'\b(\w{1,40})="([^"]*)"')
_MICRONS = {"": 1.0, "µm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}


@dataclass(frozen=True)
class Way:
    """A source of pixels, its name, why it is not the fast one (empty: it is), and what the file says of itself."""

    source: Source
    reader: str
    why: str
    properties: dict[str, str]


def way_to(path: Path) -> Way:
    """The fastest way that shows what OpenSlide would; `BadInput` where there is none."""
    found = _directories(path)
    if found and found[0].tile_width and "<OME" in found[0].description[:2000]:
        return _ome(path, found)
    try:
        plain = OpenSlideSource(path)
    except BadInput as error:
        return _without_openslide(path, found, error)
    levels, why = _jpeg_levels(plain, found)
    if levels:
        return Way(JpegTiles(path, levels, plain), "jpeg tiles", "", plain.properties)
    return Way(plain, "openslide", why, plain.properties)


def check_directories(path: Path) -> None:
    """Refuse a TIFF that says of itself what cannot be, before a reader that would believe it gets to see it.

    Raises:
        BadInput: a damaged TIFF.
    """
    _directories(path)


def _directories(path: Path) -> list[tiff.Directory]:
    """The directories of a TIFF, none of another file.

    Raises:
        BadInput: a damaged TIFF. OpenSlide does not get to see it: it ends the process where a tag claims more bytes
            than there is memory.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        return tiff.directories(fd)
    except tiff.NotTiff:
        return []
    except tiff.BadTiff as error:
        raise BadInput(f"{path}: damaged ({error})") from None
    finally:
        os.close(fd)


def _jpeg_levels(plain: OpenSlideSource, found: list[tiff.Directory]) -> tuple[list[tiff.Directory], str]:
    """The directory of each of OpenSlide's levels, or none and why the fast way does not go."""
    vendor = plain.properties.get("openslide.vendor", "")
    if vendor not in ("generic-tiff", "aperio"):
        return [], f"{vendor} is not a TIFF of plain tiles"
    levels = []
    for width, height in plain.sizes:
        same = [d for d in found if d.tile_width and (d.width, d.height) == (width, height)]
        if len(same) != 1:
            return [], f"{len(same)} directories of {width} x {height} pixels"
        levels += same
    if not all(level.is_jpeg for level in levels):
        return [], "its tiles are not 8-bit RGB in JPEG"
    if vendor == "aperio" and not all(level.lengths.all() for level in levels):
        return [], "it lacks tiles, which OpenSlide draws from other levels"
    return levels, ""


def _without_openslide(path: Path, found: list[tiff.Directory], error: BadInput) -> Way:
    suffix = path.suffix.lower()
    if found and found[0].tile_width:
        levels = [d for n, d in enumerate(found) if d.tile_width and (n == 0 or (d.subfile or 0) & 1)]
        return _tiled(path, sorted(levels, key=lambda d: -d.width), _resolution(found[0]))
    if suffix in EXTENSIONS:
        properties = _resolution(found[0]) if found else {}
        return Way(Picture(path), "image", "a plain image, decoded whole", properties)
    raise error


def _ome(path: Path, found: list[tiff.Directory]) -> Way:
    """OME-TIFF: the first image, its smaller levels in SubIFDs (OME-TIFF 6) or as reduced images after it."""
    first = found[0]
    fd = os.open(path, os.O_RDONLY)
    try:
        below = tiff.at(fd, first.subdirectories)
    except tiff.BadTiff as error:
        raise BadInput(f"{path}: damaged ({error})") from None
    finally:
        os.close(fd)
    below += [d for d in found[1:] if (d.subfile or 0) & 1]
    levels = [first, *(d for d in sorted(below, key=lambda d: -d.width) if d.tile_width and d.width < first.width)]
    properties = _resolution(first)
    if pixels := _PIXELS.search(first.description[: tiff.MAX_TEXT]):
        stated = dict(_ATTRIBUTE.findall(pixels.group()))
        channels = stated.get("SizeC", "1")
        if re.fullmatch("[0-9]{1,9}", channels) and int(channels) > first.samples:
            raise BadInput(f"{path}: its {channels} channels are separate images (fluorescence?); convert it to RGB")
        for axis in "XY":
            unit = _MICRONS.get(stated.get(f"PhysicalSize{axis}Unit", ""))
            if unit and (size := stated.get(f"PhysicalSize{axis}")):
                try:
                    properties[f"openslide.mpp-{axis.lower()}"] = repr(float(size) * unit)
                except ValueError:
                    properties.pop(f"openslide.mpp-{axis.lower()}", None)
    return _tiled(path, levels, properties)


def _tiled(path: Path, levels: list[tiff.Directory], properties: dict[str, str]) -> Way:
    other = TiffTiles(path, levels)
    if all(level.is_jpeg for level in levels):
        return Way(JpegTiles(path, levels, other), "jpeg tiles", "", properties)
    return Way(other, "tiff tiles", "its tiles are not 8-bit RGB in JPEG", properties)


def _resolution(first: tiff.Directory) -> dict[str, str]:
    return {f"openslide.mpp-{axis}": repr(value) for axis, value in zip("xy", first.mpp)} if first.mpp else {}
