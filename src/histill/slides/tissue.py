"""Where a slide has tissue: colour above that of glass, without ink, edges and dust; or as the user's mask says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histill.slides.slide import Slide

__all__ = ["Tissue", "find_tissue"]

MASK_UM = 10.0  # of a mask's pixel
MAX_MASK_PX = 8192  # of its longer side
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Tissue:
    """A mask over a slide.

    Attributes:
        mask: ``(H, W)`` bool, True where there is tissue.
        downsample: level-0 pixels per pixel of the mask, (x, y).
    """

    mask: Mask
    downsample: tuple[float, float]

    @cached_property
    def _sums(self) -> NDArray[np.float64]:
        sums = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1))
        sums[1:, 1:] = self.mask.cumsum(0, dtype=np.float64).cumsum(1)
        return sums

    def fraction(
        self,
        x: float | NDArray[np.int64],
        y: float | NDArray[np.int64],
        width: float | NDArray[np.int64],
        height: float | NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """The share of a rectangle (level-0 pixels) that is tissue, exact to parts of the mask's pixels.

        Numbers or arrays; what lies outside the slide is no tissue.
        """
        left, top, wide, tall = (np.asarray(value, np.float64) for value in (x, y, width, height))
        across, down = self.downsample

        def until(right: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
            c = np.clip(right / across, 0, self.mask.shape[1])
            r = np.clip(bottom / down, 0, self.mask.shape[0])
            c0, r0 = np.floor(c).astype(int), np.floor(r).astype(int)
            c1, r1 = np.minimum(c0 + 1, self.mask.shape[1]), np.minimum(r0 + 1, self.mask.shape[0])
            u, v, s = c - c0, r - r0, self._sums
            upper, lower = s[r0, c0] * (1 - u) + s[r0, c1] * u, s[r1, c0] * (1 - u) + s[r1, c1] * u
            return np.asarray(upper * (1 - v) + lower * v)

        right, bottom = left + wide, top + tall
        area = until(right, bottom) - until(left, bottom) - until(right, top) + until(left, top)
        return np.clip(area * across * down / (wide * tall), 0, 1)


def find_tissue(slide: Slide) -> Tissue:
    """The tissue of ``slide``, from a thumbnail of about `MASK_UM` microns per pixel."""
    longest = max(slide.dimensions)
    scale = MASK_UM / slide.mpp if slide.mpp else 32.0
    picture = slide.thumbnail(int(min(MAX_MASK_PX, max(256, longest / scale))))
    across, down = slide.dimensions[0] / picture.shape[1], slide.dimensions[1] / picture.shape[0]
    density = -np.log10((picture.astype(np.float32) + 1) / 256)
    chroma = density.max(-1) - density.min(-1)
    mask = chroma > 0.05
    mask = ndimage.binary_opening(ndimage.binary_closing(np.pad(mask, 3, mode="edge"), iterations=2))[3:-3, 3:-3]
    return Tissue(mask, (across, down))
