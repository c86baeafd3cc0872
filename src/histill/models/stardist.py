"""StarDist, the nucleus teacher (Schmidt et al. 2018; the layers of the released 2D_versatile_he)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.parts import glorot
from histill.models.weights import load_weights
from histill.types import Outputs

__all__ = ["GRID", "NMS_THRESHOLD", "PROB_THRESHOLD", "RECEPTIVE_FIELD", "StarDist", "percentile_limits"]

GRID = 2
"""Pixels of the image between two pixels of the outputs."""

RECEPTIVE_FIELD = 107
"""How many pixels to any side an output looks, at most."""

PROB_THRESHOLD, NMS_THRESHOLD = 0.6924782541384082, 0.3
"""From what probability on a pixel is a candidate, and how much candidates may overlap: those of the released weights.

They were fitted to those weights; a network that was trained here has others.
"""

_PERCENTILES = (0.01, 0.998)


class StarDist(nn.Module):
    """A U-Net of depth 3 on a grid of 2 pixels: is this a nucleus, and how far is its edge along each ray.

    Every image is scaled by its own percentiles 1 and 99.8 over all channels, as the released weights expect; a part
    of a larger image by the larger one's, when ``forward`` is told them: ``network(part, percentile_limits(whole))``.

    Args:
        rays: Directions in which the edge is measured.
        upsample: ``"nearest"`` as released, or ``"bilinear"`` as the RCKD paper draws it.
        weights: None, anything but ``"imagenet"`` that `load_weights` takes, or the official ``.h5`` or ``.zip``.

    Outputs: ``logits`` (B, 1, H/2, W/2), the nucleus logit; ``prob``, its sigmoid; ``dist`` (B, rays, H/2, W/2) in
    pixels; ``features`` (B, 128, H/2, W/2).

    Raises:
        BadInput: Images whose sides are not multiples of 16.
    """

    def __init__(
        self,
        rays: int = 32,
        upsample: Literal["nearest", "bilinear"] = "nearest",
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if upsample not in ("nearest", "bilinear"):
            raise BadInput(f"upsample is nearest or bilinear, not {upsample!r}")
        self.upsample = upsample
        self.grid = _convs(3, 32, 32)
        self.down = nn.ModuleList([_convs(32, 32, 32), _convs(32, 64, 64), _convs(64, 128, 128)])
        self.middle = _convs(128, 256, 128)
        self.up = nn.ModuleList([_convs(128 + 128, 128, 64), _convs(64 + 64, 64, 32), _convs(32 + 32, 32, 32)])
        self.features = nn.Conv2d(32, 128, 3, padding=1)
        self.prob = nn.Conv2d(128, 1, 1)
        self.dist = nn.Conv2d(128, rays, 1)
        self.apply(glorot)  # as Keras starts it; from torch's own start the first hundreds of steps teach much less
        if str(weights).partition("#")[0].endswith((".h5", ".zip")):
            from histill.models.stardist_weights import load_keras

            load_keras(self, str(weights))
        else:
            load_weights(self, weights)

    def forward(self, images: Tensor, limits: Tensor | None = None) -> Outputs:
        height, width = images.shape[-2:]
        if height % 16 or width % 16:
            raise BadInput(f"StarDist takes images whose sides are multiples of 16, not {width}x{height}: pad them")
        x = F.max_pool2d(self.grid(_scaled(images, limits)), GRID)  # (B, 32, H/2, W/2)
        skips = []
        for convs in self.down:
            skips.append(convs(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)  # (B, 128, H/16, W/16)
        for convs, skip in zip(self.up, reversed(skips), strict=True):
            x = convs(torch.cat([F.interpolate(x, scale_factor=2, mode=self.upsample), skip], 1))
        features = F.relu(self.features(x))  # (B, 128, H/2, W/2)
        logits = self.prob(features)
        return Outputs(logits=logits, prob=logits.sigmoid(), dist=self.dist(features), features=features)

    def instances(self, outputs: Outputs, size: tuple[int, int]) -> NDArray[np.int32]:
        """``(B, H, W)``: the nuclei that a batch's outputs outline, numbered from 1 at ``size``, 0 between."""
        from histill.models.stardist_instances import from_maps

        maps = zip(outputs["prob"].float().cpu(), outputs["dist"].float().cpu())
        return np.stack([from_maps(prob[0], dist, size) for prob, dist in maps])


def percentile_limits(images: Tensor) -> Tensor:
    """``(B, 3, H, W)`` -> ``(B, 2)``: each image's percentiles 1 and 99.8 over all channels, linearly interpolated."""
    values = images.flatten(1)
    limits = []
    for level in _PERCENTILES:  # torch.quantile sorts everything, and takes no more than 16 million values
        place = level * (values.shape[1] - 1)
        below = values.kthvalue(int(place) + 1, dim=1).values
        above = values.kthvalue(min(int(place) + 2, values.shape[1]), dim=1).values
        limits.append(torch.lerp(below, above, place - int(place)))
    return torch.stack(limits, 1)


def _scaled(images: Tensor, limits: Tensor | None) -> Tensor:
    low, high = (percentile_limits(images) if limits is None else limits).to(images)[:, :, None, None, None].unbind(1)
    return (images - low) / (high - low).clamp_min(1e-6)


def _convs(ci: int, middle: int, co: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ci, middle, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, co, 3, padding=1),
        nn.ReLU(inplace=True),
    )
