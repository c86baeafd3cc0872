"""ResNet-18 with four exits, the cervical cell student of 12.33 M parameters, and the plain one beside it.

The paper names SCAN's attention, GCNet's context block and self-distillation's bottlenecks; their arrangement here is
the one whose parameters fit its count (12,328,968 with 100 classes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.parts import Normalize, SeparableConv
from histill.models.resnet import BasicBlock, initialise, stage
from histill.models.weights import load_weights
from histill.types import Outputs

__all__ = ["MultiExitResNet18", "ResNet18", "ResNet18Exits", "ScanAttention", "mixture"]

_WIDTHS = (64, 128, 256, 512)


class ScanAttention(nn.Module):
    """``x * sigmoid(upsample(ReLU(BN(SeparableConv(x)))))`` (Zhang et al. 2019, SCAN)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = SeparableConv(channels, channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        coarse = F.relu(self.norm(self.down(x)))
        return x * F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False).sigmoid()


class GlobalContext(nn.Module):
    """One context vector, pooled by attention over the map and given back to every place (Cao et al. 2019, GCNet).

    Args:
        channels: Channels in and out.
        fusion: ``"add"`` as GCNet does, or ``"mul"``, the product that the paper speaks of.
    """

    def __init__(self, channels: int, fusion: Literal["add", "mul"] = "add", reduction: int = 16) -> None:
        super().__init__()
        narrow = channels // reduction
        self.fusion = fusion
        self.mask = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, narrow, 1),
            nn.LayerNorm([narrow, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mask(x).flatten(2).softmax(-1)  # (B, 1, HW)
        pooled = (x.flatten(2) * weight).sum(-1)[:, :, None, None]  # (B, C, 1, 1)
        context: Tensor = self.transform(pooled)
        return x + context if self.fusion == "add" else x * context.sigmoid()


class Exit(nn.Module):
    """[attention] -> global context -> bottleneck down to the deepest map's shape -> average pool -> linear."""

    def __init__(self, depth: int, classes: int, attention: bool, fusion: Literal["add", "mul"]) -> None:
        super().__init__()
        widths = _WIDTHS[depth:]
        self.attention = ScanAttention(widths[0]) if attention and len(widths) > 1 else nn.Identity()
        self.context = GlobalContext(widths[0], fusion)
        self.bottleneck = nn.Sequential(*(SeparableConv(ci, co) for ci, co in pairwise(widths)))
        self.fc = nn.Linear(_WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.bottleneck(self.context(self.attention(x)))
        return features, self.fc(features.mean((2, 3)))


class Segment(nn.Module):
    """What runs between two decisions to leave: some stages, then their exit; ``x -> (logits, x after the stages)``."""

    def __init__(self, stages: nn.Module, leave: nn.Module) -> None:
        super().__init__()
        self.stages, self.leave = stages, leave

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stages(x)
        return self.leave(x)[1], x


class Trunk(nn.Module):
    """ResNet-18's stem and four stages, by torchvision's names, so that its ImageNet weights fit.

    Raises:
        BadInput: An unknown stem.
    """

    def __init__(self, stem: Literal["imagenet", "cifar"]) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise BadInput(f"stem is imagenet or cifar, not {stem!r}")
        self.normalize = Normalize()
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False) if large else nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.layer1 = stage(BasicBlock, 64, 64, 2, 1)
        self.layer2 = stage(BasicBlock, 64, 128, 2, 2)
        self.layer3 = stage(BasicBlock, 128, 256, 2, 2)
        self.layer4 = stage(BasicBlock, 256, 512, 2, 2)

    def stem(self, images: Tensor) -> Tensor:
        x: Tensor = self.pool(F.relu(self.bn1(self.conv1(self.normalize(images)))))
        return x

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def fill(self, weights: str | None, head: str, new: str) -> None:
        """Initialise, then `load_weights`: the ``head`` may be of other classes; ImageNet knows nothing of ``new``."""
        self.apply(initialise)
        fresh = [head]
        if weights == "imagenet":
            fresh = [new] if self.conv1.kernel_size == (7, 7) else [new, "conv1.*"]
        load_weights(self, weights, fresh=fresh, pretrained="resnet18.tv_in1k")


class ResNet18(Trunk):
    """ResNet-18 with its one classifier and either stem: what the networks with exits are compared with.

    Args:
        classes: Number of classes.
        stem: ``"imagenet"`` (7x7 of stride 2 and a pool) or ``"cifar"`` (3x3 of stride 1), for images of 32 to 64.
        weights: None, ``"imagenet"``, or anything that `load_weights` takes.

    Outputs: ``layer1`` to ``layer4``; ``pooled`` (B, 512); ``logits`` (B, classes).
    """

    def __init__(
        self, classes: int, stem: Literal["imagenet", "cifar"] = "imagenet", weights: str | None = None
    ) -> None:
        super().__init__(stem)
        self.fc = nn.Linear(_WIDTHS[-1], classes)
        self.fill(weights, "fc.*", "fc.*")

    def forward(self, images: Tensor) -> Outputs:
        outputs = Outputs()
        x = self.stem(images)
        for k, layer in enumerate(self.stages, 1):
            x = outputs[f"layer{k}"] = layer(x)
        outputs["pooled"] = x.mean((2, 3))
        outputs["logits"] = self.fc(outputs["pooled"])
        return outputs


class ResNet18Exits(Trunk):
    """ResNet-18 with an exit after each stage, a module ``x -> (features, logits)`` with its classifier in ``fc``."""

    def __init__(self, stem: Literal["imagenet", "cifar"], exits: Iterable[nn.Module], weights: str | None) -> None:
        super().__init__(stem)
        self.exits = nn.ModuleList(exits)
        self.fill(weights, "exits.?.fc.*", "exits.*")

    def forward(self, images: Tensor) -> Outputs:
        outputs = Outputs()
        x = self.stem(images)
        for k, (layer, leave) in enumerate(zip(self.stages, self.exits, strict=True), 1):
            x = outputs[f"layer{k}"] = layer(x)
            outputs[f"exit{k}_features"], outputs[f"exit{k}"] = leave(x)
        outputs["logits"] = mixture([outputs[f"exit{k}"] for k in range(1, len(self.exits) + 1)])
        return outputs

    def segments(self) -> list[nn.Module]:
        """The network in pieces that end at an exit, for `histill.evaluate.early_exit`; they share its weights.

        Each maps what the one before carries (the first: images) to ``(logits, carried)``.
        """
        first, *rest = self.stages
        stem = nn.Sequential(self.normalize, self.conv1, self.bn1, nn.ReLU(), self.pool, first)
        return [Segment(stages, leave) for stages, leave in zip([stem, *rest], self.exits, strict=True)]


class MultiExitResNet18(ResNet18Exits):
    """A classifier after each of ResNet-18's four stages; the answer is the mean of their probabilities (Eq. 7).

    Args:
        classes: Number of classes.
        stem: ``"imagenet"`` (7x7 of stride 2 and a pool) or ``"cifar"`` (3x3 of stride 1), for images of 32 to 64.
        attention: SCAN's attention on exits 1 to 3.
        fusion: How global context is fused, ``"add"`` or ``"mul"``; see `GlobalContext`.
        weights: None, ``"imagenet"`` (the backbone's), or anything that `load_weights` takes; the exits' last layers
            may be of other classes there.

    Outputs: ``layer1`` to ``layer4``, the backbone's; for each exit k ``exit<k>`` (B, classes), its logits, and
    ``exit<k>_features`` (B, 512, h, w), the same shape for all; ``logits`` (B, classes), the log of the mean of the
    exits' probabilities.

    Raises:
        BadInput: An unknown stem or fusion, or weights that do not fit.
    """

    def __init__(
        self,
        classes: int,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        attention: bool = True,
        fusion: Literal["add", "mul"] = "add",
        weights: str | None = None,
    ) -> None:
        if fusion not in ("add", "mul"):
            raise BadInput(f"fusion is add or mul, not {fusion!r}")
        super().__init__(stem, (Exit(depth, classes, attention, fusion) for depth in range(4)), weights)


def mixture(exits: Sequence[Tensor]) -> Tensor:
    """Eq. 7: logits ``(B, C)`` of several exits -> the log of the mean of their probabilities ``(B, C)``."""
    return torch.stack([logits.log_softmax(-1) for logits in exits]).logsumexp(0) - math.log(len(exits))
