"""Residual networks whose blocks take an attention before the addition; names are those of torchvision and timm."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "Bottleneck", "initialise", "stage"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip; ``attention`` sees the branch before the addition."""

    expansion = 1

    def __init__(self, ci: int, width: int, stride: int = 1, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ci, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.attention = attention or nn.Identity()
        self.downsample = _shortcut(ci, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.attention(self.bn2(self.conv2(y)))
        return F.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a skip; ``attention`` sees the branch before the addition."""

    expansion = 4

    def __init__(self, ci: int, width: int, stride: int = 1, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ci, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.attention = attention or nn.Identity()
        self.downsample = _shortcut(ci, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.attention(self.bn3(self.conv3(y)))
        return F.relu(y + self.downsample(x))


def stage(
    block: type[BasicBlock] | type[Bottleneck],
    ci: int,
    width: int,
    depth: int,
    stride: int,
    attention: Callable[[], nn.Module | None] = lambda: None,
) -> nn.Sequential:
    """``depth`` blocks, the first with ``stride``; ``attention`` makes each block's own."""
    co = block.expansion * width
    first = block(ci, width, stride, attention())
    return nn.Sequential(first, *(block(co, width, 1, attention()) for _ in range(depth - 1)))


def initialise(module: nn.Module) -> None:
    """He et al.'s normal initialisation of a convolution (fan out)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _shortcut(ci: int, co: int, stride: int) -> nn.Module:
    if ci == co and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))
