"""StarDist, the nucleus teacher (Schmidt et al. 2018; the layers of the released 2D_versatile_he)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histill.errors import BadInput
from histill.types import Outputs

__all__ = ["StarDist"]

_PERCENTILES = (0.01, 0.998)


class StarDist(nn.Module):
    """A U-Net of depth 3 on a grid of 2 pixels: is this a nucleus, and how far is its edge along each ray.

    Every image is scaled by its own percentiles 1 and 99.8 over all channels, as the released weights expect.

    Args:
        rays: Directions in which the edge is measured.
        upsample: ``"nearest"`` as released, or ``"bilinear"`` as the RCKD paper draws it.

    Outputs: ``logits`` (B, 1, H/2, W/2), the nucleus logit; ``prob``, its sigmoid; ``dist`` (B, rays, H/2, W/2) in
    pixels; ``features`` (B, 128, H/2, W/2).

    Raises:
        BadInput: Images whose sides are not multiples of 16.
    """

    def __init__(self, rays: int = 32, upsample: Literal["nearest", "bilinear"] = "nearest") -> None:
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

    def forward(self, images: Tensor) -> Outputs:
        height, width = images.shape[-2:]
        if height % 16 or width % 16:
            raise BadInput(f"StarDist takes images whose sides are multiples of 16, not {width}x{height}: pad them")
        x = F.max_pool2d(self.grid(_percentile_scaled(images)), 2)  # (B, 32, H/2, W/2)
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


def _percentile_scaled(images: Tensor) -> Tensor:
    levels = torch.tensor(_PERCENTILES, dtype=images.dtype, device=images.device)
    low, high = torch.quantile(images.flatten(1), levels, dim=1)[:, :, None, None, None]
    scaled: Tensor = (images - low) / (high - low).clamp_min(1e-6)
    return scaled


def _convs(ci: int, middle: int, co: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ci, middle, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, co, 3, padding=1),
        nn.ReLU(inplace=True),
    )
