"""Networks for images of about 32 pixels: those of CIFAR-100's distillation benchmark, and ResNets with a small stem.

ResNets and wide ResNets are those of Tian et al. 2020 (after He et al. 2016, section 4.2, and Zagoruyko and Komodakis
2016), VGGs theirs too; ``resnet18_cifar`` to ``resnet152_cifar`` are ImageNet's ResNets with a 3x3 stem of stride 1 and
no pooling, teacher and students of the cervical cell paper's Table 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.parts import Normalize
from histill.models.resnet import BasicBlock, Bottleneck, initialise, stage
from histill.models.weights import load_weights
from histill.types import Outputs

__all__ = ["CIFAR_NETWORKS", "Cifar"]

_MEAN, _STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
"""Of CIFAR-100's training images."""


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; where the width changes the skip starts after them."""

    def __init__(self, ci: int, co: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(ci), nn.BatchNorm2d(co)
        self.conv1 = nn.Conv2d(ci, co, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(co, co, 3, 1, 1, bias=False)
        self.shortcut = None if ci == co else nn.Conv2d(ci, co, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        before = F.relu(self.bn1(x))
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(before))))
        return y + (x if self.shortcut is None else self.shortcut(before))


class Cifar(nn.Module):
    """A network by name, one of `CIFAR_NETWORKS`.

    Args:
        name: ``"resnet8x4"``, ``"wrn_40_2"``, ``"resnet18_cifar"`` ...
        classes: Number of classes.
        weights: None, or anything that `load_weights` takes; the classifier may differ.

    Outputs: ``stage1``, ``stage2``, ... (B, C, H, W), after their ReLU but for the wide ResNets'; ``pooled`` (B, D);
    ``logits`` (B, classes).

    Raises:
        BadInput: Unknown name, or weights that do not fit.
    """

    def __init__(self, name: str, classes: int = 100, weights: str | None = None) -> None:
        super().__init__()
        if name not in CIFAR_NETWORKS:
            raise BadInput(f"no network named {name!r} for small images: there are {', '.join(CIFAR_NETWORKS)}")
        self.stem, self.stages, self.last, width = CIFAR_NETWORKS[name]()
        self.fc = nn.Linear(width, classes)
        self.normalize = Normalize(_MEAN, _STD)
        self.apply(initialise)
        load_weights(self, weights, fresh=["fc.*"])

    def forward(self, images: Tensor) -> Outputs:
        x = self.stem(self.normalize(images))
        outputs = Outputs()
        for number, its_stage in enumerate(self.stages, 1):
            x = outputs[f"stage{number}"] = its_stage(x)
        outputs["pooled"] = self.last(x).mean((2, 3))
        outputs["logits"] = self.fc(outputs["pooled"])
        return outputs


_Parts = tuple[nn.Module, nn.ModuleList, nn.Module, int]
"""Stem, stages, what comes after them, and their width."""


def _stem(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def _resnet(depth: int, widths: Sequence[int] = (16, 16, 32, 64)) -> _Parts:
    """``depth = 6 n + 2``: three stages of n blocks; the stem has the first width."""
    steps = zip(pairwise(widths), (1, 2, 2), strict=True)
    stages = nn.ModuleList(stage(BasicBlock, ci, co, (depth - 2) // 6, stride) for (ci, co), stride in steps)
    return _stem(widths[0]), stages, nn.Identity(), widths[-1]


def _wide(depth: int, factor: int) -> _Parts:
    """``depth = 6 n + 4``: three stages of n blocks, ``factor`` times as wide as a ResNet's."""
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    stages = nn.ModuleList()
    for (ci, co), stride in zip(pairwise(widths), (1, 2, 2), strict=True):
        more = (WideBlock(co, co) for _ in range((depth - 4) // 6 - 1))
        stages.append(nn.Sequential(WideBlock(ci, co, stride), *more))
    last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
    return nn.Conv2d(3, 16, 3, padding=1, bias=False), stages, last, widths[-1]


def _vgg(convolutions: int) -> _Parts:
    """Five stages of so many 3x3 convolutions with batch norm; the second to fourth start with a pooling of 2."""
    stages = nn.ModuleList()
    for ci, co, pool in zip((3, 64, 128, 256, 512), (64, 128, 256, 512, 512), (1, 2, 2, 2, 1), strict=True):
        widths = [ci, *[co] * convolutions]
        convs = [(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)]
        stages.append(nn.Sequential(nn.MaxPool2d(pool), *(layer for conv in convs for layer in conv)))
    return nn.Identity(), stages, nn.Identity(), 512


def _imagenet(block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int]) -> _Parts:
    """An ImageNet ResNet behind a small stem."""
    stages, ci = nn.ModuleList(), 64
    for width, depth, stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True):
        stages.append(stage(block, ci, width, depth, stride))
        ci = block.expansion * width
    return _stem(64), stages, nn.Identity(), ci


CIFAR_NETWORKS: dict[str, Callable[[], _Parts]] = {
    **{f"resnet{depth}": partial(_resnet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(_resnet, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    **{f"wrn_{depth}_{factor}": partial(_wide, depth, factor) for depth in (16, 40) for factor in (1, 2)},
    "vgg8": partial(_vgg, 1),
    "vgg13_cifar": partial(_vgg, 2),
    "resnet18_cifar": partial(_imagenet, BasicBlock, (2, 2, 2, 2)),
    "resnet50_cifar": partial(_imagenet, Bottleneck, (3, 4, 6, 3)),
    "resnet152_cifar": partial(_imagenet, Bottleneck, (3, 8, 36, 3)),
}
"""Names that timm also has for another network end in ``_cifar``."""
