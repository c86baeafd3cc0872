"""SCAN, ResNet-18 with attention and shallow classifiers (Zhang et al., NeurIPS 2019)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.multi_exit import ResNet18Exits, ScanAttention

__all__ = ["SCAN"]

_WIDTHS = (64, 128, 256, 512)
_NARROW = 128


class ShallowExit(nn.Module):
    """Attention -> 1x1 to 128, k x k of stride k, 1x1 to 512, each with batch norm and ReLU -> pool -> linear.

    k is 8, 4 and 2 after stages 1 to 3, so that every map shrinks to that of stage 4, whose exit is pool and linear.
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        width, self.size = _WIDTHS[depth], 2 ** (3 - depth)
        shallow = depth < 3
        self.attention = ScanAttention(width) if shallow else nn.Identity()
        self.reduce = (
            nn.Sequential(
                *_unit(width, _NARROW, 1), *_unit(_NARROW, _NARROW, self.size), *_unit(_NARROW, _WIDTHS[-1], 1)
            )
            if shallow
            else nn.Identity()
        )
        self.fc = nn.Linear(_WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if min(x.shape[2:]) < self.size:
            raise BadInput("SCAN's exits need images of 29 pixels with the ImageNet stem, of 8 with CIFAR's")
        pooled = self.reduce(self.attention(x)).mean((2, 3))
        return pooled, self.fc(pooled)


def _unit(ci: int, co: int, size: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(ci, co, size, size, bias=False), nn.BatchNorm2d(co), nn.ReLU(inplace=True)


class SCAN(ResNet18Exits):
    """ResNet-18 with an attended shallow classifier after each of its first three stages.

    Its authors' code gives convolutions a bias before batch norm, which has no effect and is left out, and answers
    with the mean of the logits; here the answer is the mean of the probabilities, as for the other networks.

    Args:
        classes: Number of classes.
        stem: ``"imagenet"`` (7x7 of stride 2 and a pool) or ``"cifar"`` (3x3 of stride 1), for images of 32 to 64.
        weights: None, ``"imagenet"`` (the backbone's), or anything that `load_weights` takes.

    Outputs: ``layer1`` to ``layer4``; for each exit k ``exit<k>`` (B, classes), its logits, and ``exit<k>_features``
    (B, 512), what its linear layer sees; ``logits`` (B, classes), the log of the mean of the exits' probabilities.

    Raises:
        BadInput: An unknown stem, weights that do not fit, or images too small for the exits.
    """

    def __init__(
        self, classes: int, stem: Literal["imagenet", "cifar"] = "imagenet", weights: str | None = None
    ) -> None:
        super().__init__(stem, (ShallowExit(depth, classes) for depth in range(4)), weights)
