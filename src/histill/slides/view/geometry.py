"""The DeepZoom grid: levels that double, tiles of 254 pixels that share a pixel with each neighbour.

Level ``last`` is the slide's own level 0; each level below has half its size, rounded up, and level 0 is one pixel
(https://learn.microsoft.com/en-us/previous-versions/windows/silverlight/dotnet-windows-silverlight/cc645077(v=vs.95)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["OVERLAP_PX", "TILE_PX", "Box", "DeepZoom"]

TILE_PX = 254
OVERLAP_PX = 1


class Box(NamedTuple):
    """Pixels of one level, ``x0 <= x < x1`` and ``y0 <= y < y1``."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.x1 - self.x0, self.y1 - self.y0


@dataclass(frozen=True)
class DeepZoom:
    """The grid of a slide of ``width`` by ``height`` level-0 pixels."""

    width: int
    height: int

    @property
    def last(self) -> int:
        """The finest level, that of the slide's own pixels."""
        return (max(self.width, self.height) - 1).bit_length()

    def scale(self, level: int) -> int:
        """Level-0 pixels that a pixel of ``level`` is wide."""
        return 1 << (self.last - level)

    def size(self, level: int) -> tuple[int, int]:
        """Width and height of ``level`` in its pixels."""
        scale = self.scale(level)
        return -(-self.width // scale), -(-self.height // scale)

    def grid(self, level: int) -> tuple[int, int]:
        """Columns and rows of ``level``."""
        width, height = self.size(level)
        return -(-width // TILE_PX), -(-height // TILE_PX)

    def has(self, level: int, column: int, row: int) -> bool:
        """Whether there is such a tile."""
        if not 0 <= level <= self.last:
            return False
        columns, rows = self.grid(level)
        return 0 <= column < columns and 0 <= row < rows

    def box(self, level: int, column: int, row: int) -> Box:
        """What the tile shows, overlap included."""
        width, height = self.size(level)
        x, y = column * TILE_PX, row * TILE_PX
        return Box(
            max(x - OVERLAP_PX, 0),
            max(y - OVERLAP_PX, 0),
            min(x + TILE_PX + OVERLAP_PX, width),
            min(y + TILE_PX + OVERLAP_PX, height),
        )
