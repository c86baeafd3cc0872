"""ResNet-18 with four exits, the cervical cell student of 12.33 M parameters.

The paper names SCAN's attention, GCNet's context block and self-distillation's bottlenecks; their arrangement here is
the one whose parameters fit its count (12,328,968 with 100 classes).
"""

from __future__ import annotations

import math
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

__all__ = ["MultiExitResNet18"]

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


class MultiExitResNet18(nn.Module):
    """A classifier after each of ResNet-18's four stages; the answer is the mean of their probabilities (Eq. 7).

    Args:
        classes: Number of classes.
        stem: ``"imagenet"`` (7x7 of stride 2 and a pool) or ``"cifar"`` (3x3 of stride 1), for images of 32 to 64.
        attention: SCAN's attention on exits 1 to 3.
        fusion: How global context is fused, ``"add"`` or ``"mul"``; see `GlobalContext`.
        weights: None, ``"imagenet"`` (the backbone's), or anything that `load_weights` takes.

    Outputs: ``layer1`` to ``layer4``, the backbone's; for each exit k ``exit<k>`` (B, classes), its logits, and
    ``exit<k>_features`` (B, 512, h, w), the same shape for all; ``logits`` (B, classes), the log of the mean of the
    exits' probabilities.

    Raises:
        BadInput: An unknown stem, or weights that do not fit.
    """

    def __init__(
        self,
        classes: int,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        attention: bool = True,
        fusion: Literal["add", "mul"] = "add",
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise BadInput(f"stem is imagenet or cifar, not {stem!r}")
        if fusion not in ("add", "mul"):
            raise BadInput(f"fusion is add or mul, not {fusion!r}")
        self.normalize = Normalize()
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False) if large else nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.layer1 = stage(BasicBlock, 64, 64, 2, 1)
        self.layer2 = stage(BasicBlock, 64, 128, 2, 2)
        self.layer3 = stage(BasicBlock, 128, 256, 2, 2)
        self.layer4 = stage(BasicBlock, 256, 512, 2, 2)
        self.exits = nn.ModuleList(Exit(depth, classes, attention, fusion) for depth in range(4))
        self.apply(initialise)
        if weights == "imagenet":
            fresh = ["exits.*"] if large else ["exits.*", "conv1.*"]
        else:
            fresh = ["exits.?.fc.*"]
        load_weights(self, weights, fresh=fresh, pretrained="resnet18.tv_in1k")

    def forward(self, images: Tensor) -> Outputs:
        outputs = Outputs()
        x = self.pool(F.relu(self.bn1(self.conv1(self.normalize(images)))))
        log_probabilities = []
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        for k, (layer, leave) in enumerate(zip(stages, self.exits, strict=True), 1):
            x = outputs[f"layer{k}"] = layer(x)
            outputs[f"exit{k}_features"], outputs[f"exit{k}"] = leave(x)
            log_probabilities.append(outputs[f"exit{k}"].log_softmax(-1))
        outputs["logits"] = torch.stack(log_probabilities).logsumexp(0) - math.log(len(stages))
        return outputs
