"""Where a slide has tissue: colour above that of glass, without ink, edges and dust; or as the user's mask says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from histill.slides.regions import is_geojson, paint, read_mask
from histill.slides.slide import Slide
from histill.slides.tiles import Pixels

__all__ = ["Tissue", "find_tissue", "tissue_mask", "tissue_picture"]

MASK_UM = 10.0  # of a mask's pixel
MAX_MASK_PX = 8192  # of its longer side
USUAL_MPP = 0.5
SPECK_UM2 = 15_000.0  # smaller pieces are dust
HOLE_UM2 = 10_000.0  # smaller holes are lumina and cracks that belong to the tissue
INK_UM2 = 20_000.0  # smaller spots of the colour of ink are pigment
STROKE_UM = 300.0  # no shorter line is taken for ink where there is tissue
RED_STROKE_UM = 1200.0  # of red ink, which has the colour of blood: vessels are cut shorter
LEAST_COLOUR, MOST_COLOUR = 0.03, 0.08  # optical density; the palest stroma has 0.04
GREY = 0.25  # of the mean density
_CROSS, _SQUARE = ndimage.generate_binary_structure(2, 1), ndimage.generate_binary_structure(2, 2)
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
    def _sums(self) -> NDArray[np.int32]:
        sums = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1), np.int32)
        np.cumsum(self.mask, 0, out=sums[1:, 1:])
        np.cumsum(sums, 1, out=sums)
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

    @cached_property
    def contours(self) -> list[list[NDArray[np.float64]]]:
        """Each piece of tissue as rings ``(N, 2)`` of level-0 (x, y), closed: its outline, then its holes."""
        from contourpy import contour_generator

        padded = np.pad(self.mask, 1).astype(np.float32)
        lines: Any = contour_generator(z=padded, fill_type="OuterOffset").filled(0.5, 2.0)
        points, offsets = lines
        scale = np.asarray(self.downsample)
        return [
            [(np.asarray(piece[a:b], np.float64) - 0.5) * scale for a, b in pairwise(ends)]
            for piece, ends in zip(points, offsets)
        ]


def find_tissue(slide: Slide, mask: Path | None = None) -> Tissue:
    """The tissue of ``slide``: found on a thumbnail of about `MASK_UM` um/px, or as the user's ``mask`` has it.

    Args:
        slide: an open slide; without a resolution of its own it is taken for one of 0.5 microns per pixel.
        mask: an image over the whole slide whose tissue is not 0, or GeoJSON whose areas are tissue.

    Raises:
        BadInput: a mask that cannot be read or does not fit the slide.
    """
    um = slide.mpp or USUAL_MPP
    longest = max(slide.dimensions)
    size = int(min(MAX_MASK_PX, max(1.0, longest * um / MASK_UM)))
    if mask is not None and not is_geojson(mask):
        drawn = np.where(read_mask(mask, slide) > 0, np.uint8(255), np.uint8(0))
        if max(drawn.shape) > size:
            drawn = np.array(Image.fromarray(drawn).resize(_size(slide, size), Image.Resampling.BOX))
        return _over(slide, np.asarray(drawn > 127))
    if mask is not None:
        from histill.slides.geojson import read_geojson

        width, height = _size(slide, size)
        painted: NDArray[np.uint8] = np.zeros((height, width), np.uint8)
        shapes = [feature.shape for feature in read_geojson(mask)]
        paint(painted, shapes, (slide.dimensions[0] / width, slide.dimensions[1] / height))
        return _over(slide, np.asarray(painted > 0))
    picture = slide.thumbnail(size)
    return _over(slide, tissue_mask(picture, um * longest / max(picture.shape[:2])))


def _size(slide: Slide, longest: int) -> tuple[int, int]:
    scale = max(slide.dimensions) / longest
    return max(1, round(slide.dimensions[0] / scale)), max(1, round(slide.dimensions[1] / scale))


def _over(slide: Slide, mask: Mask) -> Tissue:
    return Tissue(mask, (slide.dimensions[0] / mask.shape[1], slide.dimensions[1] / mask.shape[0]))


def tissue_mask(picture: Pixels, um: float) -> Mask:
    """``(H, W)`` bool of a picture ``(H, W, 3)`` of a slide whose pixels are ``um`` microns wide.

    Tissue is what absorbs more of one colour than of another, beyond Otsu's threshold of that difference. Grey things
    (shadows, edges of the glass, dust, black ink) do not, and coloured ink does it another way than haematoxylin and
    eosin, which take green first.
    """
    density = np.empty((3, *picture.shape[:2]), np.float32)  # reducing over planes is ten times as quick
    for plane, channel, glass in zip(density, picture.transpose(2, 0, 1), _glass(picture)):
        plane[:] = channel
        ndimage.gaussian_filter(plane, 0.7, output=plane)
        plane += 1
        np.log10(plane, out=plane)
        np.subtract(np.log10(glass + 1), plane, out=plane)
        np.maximum(plane, 0, out=plane)
    ink = _ink(density, um)
    colour = density.max(0) - density.min(0)
    threshold = float(np.clip(_otsu(colour), LEAST_COLOUR, MOST_COLOUR))
    grey = colour < GREY * density.mean(0)
    found = (colour > threshold) & ~grey & ~ink
    # Ink is parted with only after cracks are closed, or thin strokes would close as well.
    found = _opened(_closed(found, 40 / um), 25 / um)
    found = ~_without_small(~_without_small(found, SPECK_UM2 / um**2), HOLE_UM2 / um**2)
    return _without_small(np.asarray(found & ~ink), SPECK_UM2 / um**2)


def _glass(picture: Pixels) -> NDArray[np.float32]:
    """The colour of empty glass: the commonest bright grey that is not the pure white of what was never scanned."""
    every = max(1, int((picture.shape[0] * picture.shape[1] / 250_000) ** 0.5))
    pixels = picture[::every, ::every].reshape(-1, 3)
    low, high = pixels.min(-1), pixels.max(-1)
    bright = pixels[(low > 200) & (high - low < 25) & (low < 254)]
    if len(bright) < 0.002 * len(pixels):
        return np.full(3, 245, np.float32)
    grey = bright.astype(np.int32).sum(-1) // 3
    mode = int(np.bincount(grey, minlength=256).argmax())
    return np.asarray(np.median(bright[np.abs(grey - mode) <= 3], axis=0), np.float32)


def _otsu(values: NDArray[np.float32]) -> float:
    """The threshold that parts ``values`` (0 to 1) into two groups, each as much alike as can be (Otsu 1979)."""
    counts, edges = np.histogram(values, 256, (0, 1))
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    mass = np.cumsum(counts * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * below / below[-1] - mass) ** 2 / (below * (below[-1] - below))
    return float(middle[int(np.nanargmax(np.where(np.isfinite(between), between, -1)))])


def _ink(density: NDArray[np.float32], um: float) -> Mask:
    """Felt pen: dense, and of a colour that no stain has (blue and green take red before green, black takes all).

    Red ink takes blue as it takes green, which eosin does not but blood does: only long strokes are red ink. Over
    tissue blue ink looks like the densest haematoxylin. There it is ink only where it is a stroke, longer than wide,
    and far denser than the rest: a lymph follicle or a nest of dark nuclei is neither.
    """
    red, green, blue = density
    mean = density.mean(0)
    even = _even(mean)
    blues = (red > 0.12) & (red > blue) & ((red > 1.3 * green) | ((red > 1.1 * green) & even))
    greens = (red > 0.12) & (green < 0.9 * blue) & (green < 0.9 * red)
    least = density.min(0)
    blacks = (least > 0.6) | ((density.max(0) < 1.25 * least) & ((mean > 0.6) | ((mean > 0.45) & even)))
    sure = _without_small(_opened(blues | greens | blacks, 15 / um), INK_UM2 / um**2)
    stained = red[mean > 0.05]
    usual = float(np.median(stained)) if stained.size else 0.0
    over = (red > max(0.45, 2.2 * usual)) & (red > 0.88 * green) & (blue < 0.55 * red)
    sure |= _strokes(_closed(over, 25 / um), STROKE_UM / um)
    # A stroke's soft edge, and where it takes the colour of the tissue below.
    maybe = _dilated(sure, 80 / um) & (red > 0.1) & ((red > 0.7 * green) | (red > 0.3)) & (mean > 1.3 * usual)
    reds = _strokes(_closed((blue > 0.4) & (blue > 0.55 * green) & (red < 0.4 * green), 25 / um), RED_STROKE_UM / um)
    edge = _dilated(reds, 80 / um) & (blue > 0.15) & (blue > 0.5 * green) & (red < 0.5 * green)
    found = ndimage.binary_propagation(sure | reds, mask=maybe | sure | edge | reds)
    return _dilated(np.asarray(found), 12 / um)


def _even(mean: NDArray[np.float32]) -> Mask:
    """Where the density hardly varies, by less than a fifth."""
    local = ndimage.uniform_filter(mean, 5)
    return np.asarray(ndimage.uniform_filter(mean**2, 5) - local**2 < (0.2 * local) ** 2)


def _strokes(mask: Mask, length: float) -> Mask:
    """The connected pieces of ``mask`` that are longer than ``length`` pixels, and thin."""
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    keep = [False]
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        longest = max(part.stop - part.start for part in box)
        area = np.count_nonzero(labels[box] == number)
        keep.append(longest > length and area < 0.3 * longest**2)
    return np.asarray(np.array(keep)[labels])


def _dilated(mask: Mask, radius: float) -> Mask:
    """``mask`` grown by ``radius`` pixels, rounded, into an octagon."""
    steps = round(radius)
    for shape, times in ((_CROSS, steps - steps // 3), (_SQUARE, steps // 3)):
        if times:
            mask = ndimage.binary_dilation(mask, shape, iterations=times)
    return mask


def _closed(mask: Mask, radius: float) -> Mask:
    if not (reach := round(radius)):
        return mask
    padded = np.pad(mask, reach + 1, mode="edge")
    return _eroded(_dilated(padded, reach), reach)[reach + 1 : -reach - 1, reach + 1 : -reach - 1]


def _opened(mask: Mask, radius: float) -> Mask:
    if not (reach := round(radius)):
        return mask
    padded = np.pad(mask, reach + 1, mode="edge")
    return _dilated(_eroded(padded, reach), reach)[reach + 1 : -reach - 1, reach + 1 : -reach - 1]


def _eroded(mask: Mask, radius: float) -> Mask:
    return ~_dilated(~mask, radius)


def _without_small(mask: Mask, least: float) -> Mask:
    """``mask`` without connected pieces of fewer than ``least`` pixels."""
    labels, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.zeros(count + 1, np.int64)
    for top in range(0, len(labels), 256):  # bincount makes its own copy in 64 bits
        sizes += np.bincount(labels[top : top + 256].ravel(), minlength=count + 1)
    sizes[0] = 0
    return np.asarray((sizes >= least)[labels] & mask)


def tissue_picture(slide: Slide, tissue: Tissue, longest: int = 1024) -> Image.Image:
    """The slide with the outline of its tissue, and what is none a little darker."""
    picture = Image.fromarray(slide.thumbnail(longest))
    mask = Image.fromarray(np.asarray(tissue.mask, np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR)
    picture = Image.composite(picture, Image.eval(picture, lambda value: int(value * 0.8)), mask)
    draw = ImageDraw.Draw(picture)
    scale = np.array(picture.size) / slide.dimensions
    for piece in _over(slide, np.asarray(mask) > 127).contours:
        for number, ring in enumerate(piece):
            line = [(float(x), float(y)) for x, y in ring * scale]
            draw.line(line, fill=(0, 110, 60) if number == 0 else (190, 90, 0), width=max(1, longest // 400))
    return picture
