"""What was published as arrays, polygons or a mask per nucleus -> PNG files; goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from histill.data.decode import FORMATS
from histill.errors import BadInput
from histill.files import atomic
from histill.progress import progress

__all__ = ["Region", "draw", "grey", "number", "regions", "save"]

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Region = tuple[str, list[tuple[float, float]]]
"""What is written beside an outline, and the outline: (x, y) in pixels."""

_CHUNK = 64
_MOST_NUCLEI = 65_000


def save(pictures: Iterable[tuple[Path, Pixels | Callable[[], Pixels]]], total: int, what: str) -> None:
    """Write each picture that is not there yet as PNG, whole or not at all: grey 8 or 16 bits, or RGB."""
    todo = iter(pictures)
    with progress(what, total) as bar, ThreadPoolExecutor() as pool:
        while chunk := list(islice(todo, _CHUNK)):
            for _ in pool.map(_save, chunk):
                bar.advance()


def _save(job: tuple[Path, Pixels | Callable[[], Pixels]]) -> None:
    path, pixels = job
    if path.exists():
        return
    values = pixels() if callable(pixels) else pixels
    with atomic(path) as temporary:
        Image.fromarray(np.ascontiguousarray(values)).save(temporary, format="png", compress_level=3)


def grey(path: Path) -> NDArray[np.uint8]:
    """``(H, W)``: a published mask, the first channel of a coloured one.

    Raises:
        BadInput: missing or unreadable.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            values = np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: not a readable mask ({error})") from None
    values = values[..., 0] if values.ndim == 3 else values
    return values.astype(np.uint8)


def number(masks: Iterable[NDArray[np.uint8]], size: tuple[int, int]) -> NDArray[np.uint16]:
    """``(H, W)``: 1, 2, ... where each mask is set; where two overlap the first has the pixel, empty ones are skipped.

    ``size`` is (height, width).
    """
    numbered, last = np.zeros(size, np.uint16), 0
    for mask in masks:
        if mask.shape != size:
            raise BadInput(f"a mask of {mask.shape[1]} x {mask.shape[0]} pixels for an image of {size[1]} x {size[0]}")
        free = (mask > 0) & (numbered == 0)
        if free.any():
            last += 1
            numbered[free] = last
    return numbered


def draw(outlines: Sequence[Sequence[tuple[float, float]]], size: tuple[int, int]) -> NDArray[np.uint16]:
    """``(H, W)``: 1, 2, ... inside each outline; where two overlap the first has the pixel."""
    if len(outlines) > _MOST_NUCLEI:
        raise BadInput(f"{len(outlines)} outlines in one image, more than a 16-bit mask can number")
    picture = Image.new("I", (size[1], size[0]))
    pen = ImageDraw.Draw(picture)
    for place in reversed(range(len(outlines))):
        if len(outlines[place]) > 2:
            pen.polygon(list(outlines[place]), fill=place + 1)
    return np.asarray(picture).astype(np.uint16)


def regions(path: Path) -> Iterator[Region]:
    """The outlines of an Aperio ImageScope file, with the text or the first attribute of each.

    Raises:
        BadInput: not such a file.
    """
    try:
        top = ElementTree.parse(path).getroot()
        for region in top.iter("Region"):
            attribute = region.find("Attributes/Attribute")
            said = "" if attribute is None else attribute.get("Value", "")
            points = [(float(v.get("X", "")), float(v.get("Y", ""))) for v in region.iter("Vertex")]
            yield said or region.get("Text", ""), points
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise BadInput(f"{path}: not an ImageScope annotation ({error})") from None
