"""Views: augmentations that can be named again.

``(seed, image, view)`` always gives the same pixels, whatever the batch, the process or the order. So teacher and
student see the same picture, and what a teacher said of a view can be kept (`histill.teachers.Cached`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from histill.accelerator import sent
from histill.errors import BadInput

__all__ = ["VERSION", "Augment", "blurred", "follow", "render", "twin_of", "uniform"]

VERSION = 2
"""Of how views are drawn, part of what a teacher's cache is keyed by: 2 resamples by rows where nothing is rotated."""


@dataclass(frozen=True)
class Augment:
    """What a view may change; each strength is the half-width of a uniform draw, 0 leaves it alone.

    With ``subset`` below 1 a view is a random combination: each operation is applied or left out by a draw of its own.

    Attributes:
        hflip: mirror left and right in half of the views.
        vflip: mirror top and bottom in half of the views.
        rotate: degrees, -rotate to +rotate (180: any direction; the picture is mirrored beyond its border).
        zoom: relative scale, drawn between 1/(1+zoom) and 1+zoom, evenly in its logarithm.
        shift: share of the width and of the height.
        brightness: factor 1 +- brightness on all values.
        contrast: factor 1 +- contrast on the distance from the picture's mean.
        saturation: factor 1 +- saturation on the distance from grey.
        hue: factor 1 +- hue on each of R, G and B, as another stain or lamp would.
        edges: probability that the picture is mixed half and half with its contours, dark on white.
        blur: Gaussian smoothing, its standard deviation drawn between 0 and blur, as a share of the width.
        noise: Gaussian noise, its standard deviation drawn between 0 and noise; at another size it is other noise.
        subset: probability that each of rotate to hue, blur and noise is applied to a view; flips and edges have
            their own.
    """

    hflip: bool = True
    vflip: bool = True
    rotate: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    edges: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    subset: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = {"rotate": 180, "zoom": math.inf, "noise": math.inf}.get(name, 1)
            if not isinstance(value, int | float) or not 0 <= value <= most or math.isinf(value):
                raise BadInput(f"Augment({name}={value!r}): a number from 0{f' to {most}' if most < math.inf else ''}")

    def key(self, seed: int) -> dict[str, float]:
        """What a cache of these views is keyed by."""
        return {"seed": seed, **asdict(self)}


NONE = Augment(hflip=False, vflip=False)
"""The image itself."""

_DRAWS = 24
"""0-1 flips, 2-11 strengths of rotate to hue, 12-18 whether they are applied, 19-20 blur, 21-22 noise, 23 edges."""

_GATES = (12, 13, 14, 14, 15, 16, 17, 18, 18, 18)
"""For each of 2-11 the draw that says whether it is applied: both of shift, all three of hue together."""


def uniform(seed: int, ids: Tensor, views: Tensor, draws: int = _DRAWS) -> NDArray[np.float64]:
    """``(B, draws)`` numbers in [0, 1), each a function of (seed, image, view, place) alone.

    A counter-based generator: the 64-bit finaliser of SplitMix64 (Steele et al. 2014) over the four numbers, so a
    batch needs no state and its composition does not matter.
    """
    with np.errstate(over="ignore"):
        bits = _mix(_keys(seed, ids, views)[:, None] + np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _keys(seed: int, ids: Tensor, views: Tensor) -> NDArray[np.uint64]:
    """``(B,)`` numbers that name the views."""
    with np.errstate(over="ignore"):
        key = np.full(len(ids), seed, dtype=np.uint64)
        for part in (ids.cpu().numpy(), views.cpu().numpy()):
            key = _mix(key ^ _mix(part.astype(np.uint64) + _GOLDEN))
    return key


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def render(pixels: Tensor, ids: Tensor, views: Tensor, *, augment: Augment, seed: int) -> Tensor:
    """The views of a batch of images.

    Args:
        pixels: ``(B, S, S, 3)`` uint8, the packed images.
        ids: ``(B,)`` image numbers.
        views: ``(B,)`` view numbers.
        augment: what a view may change.
        seed: of all views.

    Returns:
        ``(B, 3, S, S)`` float32 in [0, 1], channels last in memory.
    """
    images, device = pixels.permute(0, 3, 1, 2).float().div_(255), pixels.device
    drawn = _drawn(seed, ids, views, augment)
    u = sent(drawn, device)
    images = _moved(images, u, augment, "bicubic").clamp_(0, 1)
    if augment.brightness or augment.contrast or augment.saturation or augment.hue:
        images = _colour(images, u[:, 6:12], augment)
    # These take time, and are done to those views alone that have them; which they are is known without the device.
    some = (drawn[:, 23] < augment.edges).nonzero()[:, 0]
    if len(some):
        at = sent(some, device)
        images[at] = (images[at] + _contours(images[at])) / 2
    blur = images.shape[-1] * augment.blur * drawn[:, 19] * (drawn[:, 20] < augment.subset)
    some = (blur > 0).nonzero()[:, 0]
    if len(some):
        at, sigma = sent(some, device), sent(blur[some], device)
        images[at] = blurred(images[at], sigma, math.ceil(2.5 * images.shape[-1] * augment.blur))
    noise = augment.noise * drawn[:, 21] * (drawn[:, 22] < augment.subset)
    some = (noise > 0).nonzero()[:, 0]
    if len(some):
        keys = torch.from_numpy(_keys(seed, ids, views).view(np.int64))
        at, strength = sent(some, device), sent(noise[some], device)[:, None, None, None]
        images[at] = (images[at] + strength * _normal(sent(keys[some], device), images.shape[1:])).clamp(0, 1)
    return images.contiguous(memory_format=torch.channels_last)


def follow(masks: Tensor, ids: Tensor, views: Tensor, *, augment: Augment, seed: int) -> Tensor:
    """Masks moved as `render` moves their images: ``(B, S, S)`` integers -> the same, each pixel the nearest one's."""
    u = sent(_drawn(seed, ids, views, augment), masks.device)
    return _moved(masks[:, None].float(), u, augment, "nearest")[:, 0].to(masks.dtype)


def twin_of(views: Tensor, twin: int) -> Tensor:
    """The numbers of other views of the same images, as independent as another seed's."""
    return views + (twin << 40)


def _drawn(seed: int, ids: Tensor, views: Tensor, augment: Augment) -> Tensor:
    u = torch.from_numpy(uniform(seed, ids, views)).float()
    u[:, 2:12] = torch.where(u[:, _GATES] < augment.subset, u[:, 2:12], 0.5)  # the middle of a draw changes nothing
    return u


def _moved(images: Tensor, u: Tensor, augment: Augment, mode: str) -> Tensor:
    if augment.rotate or augment.zoom or augment.shift:
        return _move(images, u[:, :6], augment, mode)
    return _flip(images, u, augment)


def _flip(images: Tensor, u: Tensor, augment: Augment) -> Tensor:
    for draw, dim, wanted in ((0, 3, augment.hflip), (1, 2, augment.vflip)):
        if wanted:
            images = torch.where((u[:, draw] < 0.5)[:, None, None, None], images.flip(dim), images)
    return images


def _move(images: Tensor, u: Tensor, augment: Augment, mode: str) -> Tensor:
    """Flip, rotate, zoom and shift in one resampling: the output's grid mapped into the picture.

    Images bicubic, because bilinear views are less sharp than the images that are judged, and networks notice.
    """
    angle = (2 * u[:, 2] - 1) * math.radians(augment.rotate)
    scale = torch.exp((2 * u[:, 3] - 1) * math.log1p(augment.zoom))
    sx = torch.where(u[:, 0] < 0.5, -1.0, 1.0) if augment.hflip else torch.ones_like(angle)
    sy = torch.where(u[:, 1] < 0.5, -1.0, 1.0) if augment.vflip else torch.ones_like(angle)
    shift = (2 * u[:, 4:6] - 1) * 2 * augment.shift
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = (
        torch.stack([sx * cos, -sx * sin, shift[:, 0]], 1),
        torch.stack([sy * sin, sy * cos, shift[:, 1]], 1),
    )
    if mode == "bicubic" and not augment.rotate and images.device.type == "cpu":
        return _stretched(images, (rows[1][:, 1], shift[:, 1]), (rows[0][:, 0], shift[:, 0]))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)


def _stretched(images: Tensor, down: tuple[Tensor, Tensor], across: tuple[Tensor, Tensor]) -> Tensor:
    """What `grid_sample` gives for a grid that is not rotated, one direction after the other: in a third of the time.

    Each direction is ``(factor, shift)``, ``(B,)`` each: the output's coordinate x in [-1, 1] is the picture's
    ``factor * x + shift``. A row of the output is a sum of four rows of the picture with four weights, which is what a
    bag of embeddings is; each bag is summed by itself, so that its bits do not depend on the batch.
    """
    images = _summed(images.contiguous(), *_taps(*down, images.shape[2]))
    turned = images.transpose(2, 3).contiguous()
    return _summed(turned, *_taps(*across, turned.shape[2])).transpose(2, 3)


def _summed(images: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """``(B, C, H, W)``, each row the sum of four rows: their places and weights ``(B, H, 4)``, the same for all C."""
    batch, channels, height, width = images.shape
    first = torch.arange(batch * channels).view(batch, channels, 1, 1) * height
    bags = (places[:, None] + first).view(-1, 4)
    shares = weights[:, None].expand(batch, channels, height, 4).reshape(-1, 4)
    return F.embedding_bag(bags, images.view(-1, width), per_sample_weights=shares, mode="sum").view(images.shape)


def _taps(factor: Tensor, shift: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The four pixels around each place and their weights ``(B, size, 4)``; beyond the border the picture is mirrored.

    Cubic convolution (Keys 1981) with a = -0.75, as torch has it.
    """
    x = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    at = ((factor.double()[:, None] * x + shift.double()[:, None] + 1) * size - 1) / 2
    before = at.floor()
    t = (at - before)[..., None] + torch.tensor([1.0, 0.0, -1.0, -2.0], dtype=torch.float64)  # signed distances
    t, a = t.abs(), -0.75
    weights = torch.where(t <= 1, ((a + 2) * t - (a + 3)) * t * t + 1, ((t - 5) * t + 8) * t * a - 4 * a)
    places = (before.long()[..., None] + torch.arange(-1, 3)).remainder(2 * size)
    return torch.where(places >= size, 2 * size - 1 - places, places), weights.float()


def _colour(images: Tensor, u: Tensor, augment: Augment) -> Tensor:
    strengths = (augment.brightness, augment.contrast, augment.saturation, *[augment.hue] * 3)
    factors = (1 + (2 * draw - 1) * strength for draw, strength in zip(u.T, strengths))
    brightness, contrast, saturation, *rgb = (factor[:, None, None, None] for factor in factors)
    images = images * brightness * torch.cat(rgb, 1)
    # In two steps: a reduction to one number is divided among threads, and its bits would depend on the batch's size.
    mean = images.mean((2, 3), keepdim=True).mean(1, keepdim=True)
    images = mean + (images - mean) * contrast
    grey = _grey(images)
    coloured: Tensor = grey + (images - grey) * saturation
    return coloured.clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Luma of ITU-R BT.601, ``(B, 3, H, W) -> (B, 1, H, W)``."""
    return images[:, :1] * 0.299 + images[:, 1:2] * 0.587 + images[:, 2:] * 0.114


def _contours(images: Tensor) -> Tensor:
    """Where the grey picture changes, dark on white: ``1 - |gradient|`` with Sobel's operator, a step of 1 being black.

    ``(B, 3, H, W) -> (B, 1, H, W)``.
    """
    rows = F.pad(_grey(images), (1, 1, 1, 1), mode="replicate")
    sides = rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]  # (B, 1, H, W + 2)
    levels = rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]  # (B, 1, H + 2, W)
    x, y = sides[..., 2:] - sides[..., :-2], levels[:, :, 2:] - levels[:, :, :-2]
    return (1 - (x * x + y * y).sqrt() / 4).clamp(0, 1)


def blurred(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Smooth each picture with a Gaussian of its own ``sigma`` in pixels, cut off at ``radius``.

    Sums of shifted pictures, an element at a time: the bits of a convolution can depend on the batch.
    """
    offsets = range(-radius, radius + 1)
    weights = [torch.exp(-((k / sigma.clamp_min(1e-3)) ** 2) / 2)[:, None, None, None] for k in offsets]
    whole = sum(weights)
    for dim, margin in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded, size = F.pad(images, margin, mode="replicate"), images.shape[dim]
        images = sum(w * padded.narrow(dim, k, size) for k, w in enumerate(weights)) / whole  # type: ignore[assignment]
    return images


def _normal(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """``(B, *shape)`` near-normal numbers of mean 0 and variance 1, each a function of its key and place.

    The sum of the four 16-bit quarters of a hash, which is normal but for its tails (none beyond 3.5): integers, so
    that the bits are the same on every machine.
    """
    places = torch.arange(1, math.prod(shape) + 1, device=keys.device) + 2**32  # apart from those of `uniform`
    bits = _mixed(keys[:, None] + places * _signed(_GOLDEN))
    mask = 0xFFFF
    quarters = (bits & mask) + (bits >> 16 & mask) + (bits >> 32 & mask) + (bits >> 48 & mask)
    return ((quarters - 2 * 65535) / math.sqrt((65536**2 - 1) / 3)).view(-1, *shape)


def _mixed(x: Tensor) -> Tensor:
    """`_mix` of int64, on any device."""
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (1 << 33) - 1)


def _signed(word: int | np.uint64) -> int:
    """The int64 of the same bits."""
    return int(np.uint64(word).view(np.int64))
