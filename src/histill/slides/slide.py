"""A whole slide: where its pixels are, how large each is, and regions of any of its levels.

Microns per pixel are the truth, coordinates are level-0 pixels, (x, y), top left, downsamples are floats. Outside
the slide, and where it holds nothing, it is white, as glass is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from histill.errors import BadInput
from histill.slides.jpeg_tiles import JpegTiles
from histill.slides.sources import OpenSlideSource
from histill.slides.tiled import TiffTiles
from histill.slides.tiles import Pixels
from histill.slides.ways import Way, way_to

__all__ = ["MAX_MPP", "MAX_REGION_PX", "Slide", "check_name", "open_slide"]

MAX_MPP = 50.0
"""No microscope's pixel is larger; a file that says so has the resolution of a printer."""

MAX_REGION_PX = 1 << 28
"""Pixels of one `Slide.read`, 800 MB of RGB."""

_STRIP_PX = 1 << 24  # read at once for a thumbnail
_SAME_MPP = 0.01  # as a share: resolutions that differ by less are one


def open_slide(path: str | Path, mpp: float | None = None) -> Slide:
    """Open a slide: whatever OpenSlide reads, OME-TIFF, or a plain image as a slide of one level.

    Args:
        path: the file; of DICOM any file of the series, or its folder.
        mpp: microns per pixel of level 0, in place of what the file says.

    Raises:
        BadInput: no such file, no slide, a damaged one, or an impossible ``mpp``.
    """
    path = Path(path)
    if mpp is not None and not 0 < mpp <= MAX_MPP:
        raise BadInput(f"{path}: {mpp} microns per pixel cannot be; give --slide-mpp between 0 and {MAX_MPP:g}")
    if path.is_dir():
        path = next(iter(sorted(path.glob("*.dcm"))), path)
    if not path.is_file():
        raise BadInput(f"{path}: {'a folder, not a slide' if path.is_dir() else 'no such slide'}")
    return Slide(path, way_to(path), mpp)


def check_name(path: Path) -> None:
    """Refuse a slide whose results would lie in no folder of their own: of ``...svs`` in the one above (`BadInput`)."""
    if not path.stem.strip("."):
        raise BadInput(
            f"{path}: what is written of a slide is called {path.stem!r} after it, which cannot be; rename it"
        )


class Slide:
    """An open slide; made by `open_slide`, closed by ``with`` or `close`. Threads may read at the same time.

    Attributes:
        path: the file.
        dimensions: width and height of level 0 in pixels.
        level_dimensions: the same of each level.
        level_downsamples: how many level-0 pixels a level's pixel is wide, floats.
        mpp: microns per pixel of level 0, None where nobody says or what the file says cannot be (`require_mpp`).
        bounds: x, y, width, height of what the scanner filled, in level-0 pixels.
        reader: "jpeg tiles" (the fast way), "openslide", "tiff tiles" (OME-TIFF and others in any other compression) or
            "image".
        why: why not the fast way; empty on it.
        properties: what OpenSlide says of the file.
    """

    def __init__(self, path: Path, way: Way, mpp: float | None = None) -> None:
        self.path, self.reader, self.why, self.properties = path, way.reader, way.why, way.properties
        self._source = source = way.source
        self._given_mpp = mpp
        properties = way.properties
        self.level_dimensions: Sequence[tuple[int, int]] = tuple(source.sizes)
        self.dimensions = self.level_dimensions[0]
        width, height = self.dimensions
        self.level_downsamples = tuple((width / w + height / h) / 2 for w, h in self.level_dimensions)
        self.mpp, self._no_mpp = (mpp, "") if mpp is not None else _stated_mpp(properties)
        self.bounds = _bounds(properties, self.dimensions)
        self._digest: str | None = None

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return open_slide, (self.path, self._given_mpp)  # another process opens the file for itself

    def __repr__(self) -> str:
        mpp = f"{self.mpp:g} um/px" if self.mpp else "no um/px"
        return f"Slide({self.path.name}, {self.dimensions[0]} x {self.dimensions[1]}, {mpp}, {self.reader})"

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._source.close()

    @property
    def cache_bytes(self) -> int:
        """How many bytes of decoded tiles are kept at most; 0 where another library keeps its own."""
        return self._source.cache.limit if isinstance(self._source, JpegTiles | TiffTiles) else 0

    def forget(self) -> None:
        """Drop decoded tiles that are kept in case they are asked for again."""
        if isinstance(self._source, JpegTiles | TiffTiles):
            self._source.cache.clear()

    @property
    def mpp_given(self) -> str:
        """What to say of a resolution that is not the file's, as all areas rest on it; empty where it is."""
        if self._given_mpp is None:
            return ""
        stated = _stated_mpp(self.properties)[0]
        if stated is None:
            return "as given; the file does not say"
        return "" if abs(stated / self._given_mpp - 1) < _SAME_MPP else f"as given; the file says {stated:.4g}"

    @property
    def remarks(self) -> list[str]:
        """What a user should hear before this slide is used."""
        said = [f"read by {self.reader}, as {self.why}"] if self.why else []
        if "says" in self.mpp_given:
            said.append(f"{self.mpp:g} microns per pixel {self.mpp_given}")
        return said

    def require_mpp(self) -> float:
        """Microns per pixel of level 0; `BadInput` names ``--slide-mpp`` where there is none."""
        if self.mpp is None:
            raise BadInput(f"{self.path}: {self._no_mpp}; give it with --slide-mpp")
        return self.mpp

    def read(self, l0_x: int, l0_y: int, width: int, height: int, level: int = 0) -> Pixels:
        """``(height, width, 3)`` uint8 RGB of ``level`` whose top left is at a level-0 pixel; white outside the slide.

        On the fast way pixels come as they are stored: where the place lies between two of a coarser level, the
        nearest is taken. OpenSlide blends them there.

        Args:
            l0_x: level-0 pixels from the left, may be negative.
            l0_y: level-0 pixels from the top.
            width: pixels of ``level``.
            height: pixels of ``level``.
            level: 0 is the finest.

        Raises:
            BadInput: no such level, an empty or too large region (`MAX_REGION_PX`), or a damaged tile.
        """
        if not 0 <= level < len(self.level_dimensions):
            raise BadInput(f"{self.path}: no level {level}; it has 0 to {len(self.level_dimensions) - 1}")
        if width < 1 or height < 1 or width * height > MAX_REGION_PX:
            raise BadInput(f"{self.path}: a region of {width} x {height} pixels; 1 to {MAX_REGION_PX:,} can be read")
        if isinstance(self._source, OpenSlideSource):
            return self._source.read(l0_x, l0_y, level, width, height)
        scale = self.level_downsamples[level]
        left, top = int(np.floor(l0_x / scale + 0.5)), int(np.floor(l0_y / scale + 0.5))
        return self.read_level(level, left, top, width, height)

    def read_level(self, level: int, left: int, top: int, width: int, height: int) -> Pixels:
        """`read` with the place in the level's own pixels."""
        wide, tall = self.level_dimensions[level]
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, wide), min(top + height, tall)
        if x0 >= x1 or y0 >= y1:
            return np.full((height, width, 3), 255, np.uint8)
        inside = self._source.region(level, x0, y0, x1 - x0, y1 - y0)
        if inside.shape == (height, width, 3):
            return inside
        out = np.full((height, width, 3), 255, np.uint8)
        out[y0 - top : y1 - top, x0 - left : x1 - left] = inside
        return out

    def best_level(self, downsample: float, tolerance: float = 0.02) -> int:
        """The coarsest level that is no coarser than ``downsample``, give or take ``tolerance``."""
        fits = [n for n, own in enumerate(self.level_downsamples) if own <= downsample * (1 + tolerance)]
        return max(fits, key=lambda n: self.level_downsamples[n], default=0)

    def thumbnail(self, longest: int = 1024) -> Pixels:
        """The whole slide with its longer side ``longest`` pixels (never enlarged), averaged from the nearest level.

        Read strip by strip: a large level costs time, not memory.
        """
        if longest < 1:
            raise BadInput(f"{self.path}: a thumbnail of {longest} pixels")
        scale = max(1.0, max(self.dimensions) / longest)
        width, height = (max(1, round(side / scale)) for side in self.dimensions)
        level = self.best_level(scale)
        wide, tall = self.level_dimensions[level]
        if (wide, tall) == (width, height):
            return self.read_level(level, 0, 0, wide, tall)
        out = np.empty((height, width, 3), np.uint8)
        rows = max(1, int(_STRIP_PX / wide * height / tall))
        for first in range(0, height, rows):
            last = min(first + rows, height)
            begin, end = first * tall / height, last * tall / height
            top, bottom = int(begin), min(tall, int(np.ceil(end)))
            strip = Image.fromarray(self.read_level(level, 0, top, wide, bottom - top))
            box = (0, begin - top, wide, end - top)
            out[first:last] = np.asarray(
                strip.resize((width, last - first), Image.Resampling.BOX, box=box), dtype=np.uint8
            )
        return out

    @property
    def digest(self) -> str:
        """A name for the file's content, cheap and stable: a hash of its size, its two ends and its levels."""
        if self._digest is None:
            size = self.path.stat().st_size
            sha = hashlib.sha256(repr((size, self.level_dimensions)).encode())
            with self.path.open("rb") as file:
                sha.update(file.read(1 << 16))
                file.seek(max(0, size - (1 << 16)))
                sha.update(file.read(1 << 16))
            self._digest = sha.hexdigest()
        return self._digest


def _stated_mpp(properties: dict[str, str]) -> tuple[float | None, str]:
    """Microns per pixel as the file has it, or why it has none."""
    x, y = (_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if x is None or y is None:
        power = _number(properties.get("openslide.objective-power"))
        guess = f" (its objective was {power:g}x, usually about {10 / power:g})" if power else ""
        return None, f"the file does not say its microns per pixel{guess}"
    if not (0 < x <= MAX_MPP and 0 < y <= MAX_MPP):
        return None, f"{x:g} x {y:g} microns per pixel, as the file says, cannot be"
    if max(x, y) > 1.05 * min(x, y):
        return None, f"its pixels are not square ({x:g} x {y:g} microns)"
    return (x * y) ** 0.5 if x != y else x, ""


def _bounds(properties: dict[str, Any], size: tuple[int, int]) -> tuple[int, int, int, int]:
    found = [_number(properties.get(f"openslide.bounds-{name}")) for name in ("x", "y", "width", "height")]
    if any(value is None for value in found):
        return 0, 0, *size
    x, y, width, height = (int(value or 0) for value in found)
    x, y = min(max(x, 0), size[0] - 1), min(max(y, 0), size[1] - 1)
    return x, y, max(1, min(width, size[0] - x)), max(1, min(height, size[1] - y))


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if np.isfinite(value) else None
