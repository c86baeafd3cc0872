"""Where a model looks: squares of a slide at a given resolution, in microns first and level-0 pixels second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from histill.errors import BadInput
from histill.progress import notice
from histill.slides.slide import MAX_MPP, Slide
from histill.slides.tiles import Pixels

if TYPE_CHECKING:
    from histill.slides.tissue import Tissue

__all__ = ["TOLERANCE", "Grid", "Plan"]

TOLERANCE = 0.02
"""A level this near the wanted resolution is taken as it is: scanners differ by more, and resizing would only blur."""

MAX_ENLARGED = 2.05  # 20x slides serve a model of 40x; what is beyond was never seen by the microscope
MAX_TILES = 50_000_000


@dataclass(frozen=True)
class Plan:
    """How a `Grid` reads one slide.

    Attributes:
        level: the level that is read.
        l0_span: what a tile spans, in level-0 pixels (float).
        l0_step: from one tile to the next.
        level_side: what a tile spans in pixels of ``level``; equal to ``tile`` where nothing is resized.
        mpp: microns per pixel that the model sees.
    """

    level: int
    l0_span: float
    l0_step: float
    level_side: float
    mpp: float


@dataclass(frozen=True)
class Grid:
    """Square tiles at ``mpp``, side by side or overlapping, from the top left of what the scanner filled.

    Attributes:
        mpp: microns per pixel at which a tile is seen.
        tile: its side in pixels at that resolution.
        overlap: pixels at that resolution that a tile shares with the next.
        min_tissue: the share of a tile that must be tissue.
    """

    mpp: float
    tile: int = 224
    overlap: int = 0
    min_tissue: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.mpp <= MAX_MPP:
            raise BadInput(f"mpp={self.mpp}: microns per pixel lie between 0 and {MAX_MPP:g}; give another --mpp")
        if not 0 < self.tile <= 16384 or not 0 <= self.overlap < self.tile or not 0 <= self.min_tissue <= 1:
            raise BadInput(
                f"tile={self.tile} must be 1 to 16384, overlap={self.overlap} from 0 to below it, "
                f"min_tissue={self.min_tissue} from 0 to 1"
            )

    def plan(self, slide: Slide) -> Plan:
        """Which level is read, and how: the coarsest that is no coarser than wanted, within `TOLERANCE`.

        Raises:
            BadInput: the slide's resolution is not known, or far too coarse.
        """
        own = slide.require_mpp()
        wanted = self.mpp / own
        level = slide.best_level(wanted, TOLERANCE)
        scale = slide.level_downsamples[level]
        if scale > MAX_ENLARGED * wanted:
            raise BadInput(
                f"{slide.path}: its finest level has {own:g} microns per pixel and cannot be seen at {self.mpp:g}; "
                f"give --mpp {own / 2:.2g} or more, or the slide's own with --slide-mpp"
            )
        if abs(scale / wanted - 1) <= TOLERANCE:
            wanted, side = scale, float(self.tile)
        else:
            side = self.tile * wanted / scale
        return Plan(level, self.tile * wanted, (self.tile - self.overlap) * wanted, side, own * wanted)

    def tiles(self, slide: Slide, tissue: Tissue | None = None) -> pd.DataFrame:
        """The tiles, row by row: ``x y width height`` in level-0 pixels.

        Without ``tissue`` they cover all of `Slide.bounds`; with it those remain of which at least ``min_tissue``
        (and more than nothing) is tissue. The last row and column may reach beyond the slide, which is white there.
        Places are rounded to whole pixels, so sizes differ by one where a tile's span is no whole number.
        """
        plan = self.plan(slide)
        if slide.require_mpp() > plan.mpp * (1 + TOLERANCE):
            notice(f"{slide.path.name}: {slide.mpp:g} microns per pixel, enlarged to {plan.mpp:g} for the model")
        left, top, width, height = slide.bounds
        xs, widths = _axis(left, width, plan)
        ys, heights = _axis(top, height, plan)
        if len(xs) * len(ys) > MAX_TILES:
            raise BadInput(f"{slide.path}: {len(xs) * len(ys):,} tiles of {self.mpp:g} um/px; give a larger --mpp")
        table = pd.DataFrame(
            {
                "x": np.tile(xs, len(ys)),
                "y": np.repeat(ys, len(xs)),
                "width": np.tile(widths, len(ys)),
                "height": np.repeat(heights, len(xs)),
            }
        )
        if tissue is None:
            return table
        share = tissue.fraction(*(table[name].to_numpy() for name in ("x", "y", "width", "height")))
        return table[(share >= self.min_tissue) & (share > 0)].reset_index(drop=True)

    def read(self, slide: Slide, x: int, y: int) -> Pixels:
        """The tile whose top left is level-0 pixel (x, y): ``(tile, tile, 3)`` uint8, antialiased where resized."""
        plan = self.plan(slide)
        if plan.level_side == self.tile:
            return slide.read(int(x), int(y), self.tile, self.tile, plan.level)
        scale = slide.level_downsamples[plan.level]
        left, top = x / scale, y / scale
        x0, y0 = int(np.floor(left)), int(np.floor(top))
        x1, y1 = int(np.ceil(left + plan.level_side)), int(np.ceil(top + plan.level_side))
        pixels = Image.fromarray(slide.read_level(plan.level, x0, y0, x1 - x0, y1 - y0))
        box = (left - x0, top - y0, left - x0 + plan.level_side, top - y0 + plan.level_side)
        return np.array(pixels.resize((self.tile, self.tile), Image.Resampling.BILINEAR, box=box))


def _axis(start: int, length: int, plan: Plan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where tiles begin along one axis, and how long they are, so that nothing of ``length`` is left out."""
    count = max(1, int(np.ceil((length - plan.l0_span) / plan.l0_step - 1e-9)) + 1)
    begin = start + np.arange(count) * plan.l0_step
    first = np.floor(begin + 0.5).astype(np.int64)
    return first, np.floor(begin + plan.l0_span + 0.5).astype(np.int64) - first
