"""Small pieces that several networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "LayerNorm2d", "Normalize", "SeparableConv", "glorot"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel.

    Args:
        mean, std: One figure per channel of images in [0, 1]. They follow from the network's name and are not
            part of its state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of ``(B, C, H, W)``, as ConvNeXt has it."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class SeparableConv(nn.Sequential):
    """Depthwise 3x3 of stride 2, then depthwise 3x3, each with a 1x1, batch norm and ReLU; halves the map.

    ``(B, ci, H, W) -> (B, co, ceil(H/2), ceil(W/2))``; the bottleneck of self-distillation's exits.
    """

    def __init__(self, ci: int, co: int) -> None:
        super().__init__(
            nn.Conv2d(ci, ci, 3, 2, 1, groups=ci, bias=False),
            nn.Conv2d(ci, ci, 1, bias=False),
            nn.BatchNorm2d(ci),
            nn.ReLU(inplace=True),
            nn.Conv2d(ci, ci, 3, 1, 1, groups=ci, bias=False),
            nn.Conv2d(ci, co, 1, bias=False),
            nn.BatchNorm2d(co),
            nn.ReLU(inplace=True),
        )


def glorot(module: nn.Module) -> None:
    """Initialise a convolution or linear layer as Keras does: Glorot uniform, biases zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
