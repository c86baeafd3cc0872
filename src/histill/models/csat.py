"""CSAT and the spatial attention transformer (Kim et al., Bioengineering 2023, 10:1279)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.parts import LayerNorm2d, Normalize
from histill.models.resnet import BasicBlock, initialise, stage
from histill.models.weights import load_weights
from histill.types import Outputs

__all__ = ["CSAT", "SAT", "ResNet18SAT"]

_WIDTHS = (32, 48, 96, 176)
_SAT_BLOCKS = (2, 2, 6, 4)
_TRANSFORMERS = (0, 0, 2, 2)
_MAP = 7


class Transformer(nn.Module):
    """Conditional position encoding, attention, multilayer perceptron, each added to its input.

    ``(B, C, H, W)`` -> the same. The position encoding (PEG, Chu et al. 2021) is a depthwise 3x3 convolution.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 8,
        head_width: int = 32,
        *,
        norm: bool = True,
        qkv_bias: bool = False,
        project: bool = True,
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads, self.scale = heads, head_width**-0.5
        self.peg = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1 = nn.LayerNorm(channels) if norm else nn.Identity()
        self.qkv = nn.Linear(channels, 3 * inner, bias=qkv_bias)
        self.softmax = nn.Softmax(-1)
        self.project = nn.Linear(inner, channels) if project else nn.Identity()
        self.norm2 = nn.LayerNorm(channels) if norm else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = x + self.peg(x)
        tokens = x.flatten(2).transpose(1, 2)  # (B, HW, C)
        tokens = tokens + self._attend(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        out: Tensor = tokens.transpose(1, 2).unflatten(2, (height, width))
        return out

    def _attend(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, HW, d)
        weights = self.softmax(q @ k.transpose(-2, -1) * self.scale)
        attended: Tensor = self.project((weights @ v).transpose(1, 2).flatten(2))
        return attended


class SAT(nn.Module):
    """Spatial attention transformer: one map for the whole image, which multiplies its features (Eq. 9-11).

    ``x * upsample(Transformer(conv7x7(pool7x7([mean_c x, max_c x]))))``; 129 parameters. ``(B, C, H, W)`` -> the same.

    Args:
        variant: ``"B"`` is Eq. 10 to the letter, without layer norm. ``"A"`` has the layer norms of CSAT's
            transformer; over a single channel they are constant, so that there attention adds only a constant.
        gate: None as in Eq. 11, or ``"sigmoid"`` on the map.
    """

    def __init__(self, variant: Literal["A", "B"] = "B", gate: Literal["sigmoid"] | None = None) -> None:
        super().__init__()
        if variant not in ("A", "B"):
            raise BadInput(f"the variants of SAT are A and B, not {variant!r}")
        if gate not in (None, "sigmoid"):
            raise BadInput(f"the gate of SAT is none or sigmoid, not {gate!r}")
        normed = variant == "A"
        self.gate = gate
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=normed)
        self.transformer = Transformer(1, 1, 1, norm=normed, qkv_bias=not normed, project=not normed)

    def forward(self, x: Tensor) -> Tensor:
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        attention = self.transformer(self.conv(F.adaptive_avg_pool2d(summary, _MAP)))  # (B, 1, 7, 7)
        attention = F.interpolate(attention, x.shape[-2:], mode="bilinear", align_corners=False)
        return x * attention.sigmoid() if self.gate else x * attention


class GlobalResponseNorm(nn.Module):
    """``gamma * x * n(x) + beta + x`` with each channel's norm over the mean norm (Woo et al. 2023, ConvNeXtV2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        response = response / (response.mean(-1, keepdim=True) + 1e-6)
        out: Tensor = self.gamma * (x * response) + self.beta + x
        return out


class SATBlock(nn.Module):
    """A ConvNeXtV2 block whose branch ends in a SAT (Eq. 8)."""

    def __init__(self, channels: int, sat: nn.Module) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.response = GlobalResponseNorm(4 * channels)
        self.contract = nn.Linear(4 * channels, channels)
        self.sat = sat

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))  # (B, H, W, C)
        y = self.contract(self.response(F.gelu(self.expand(y))))
        out: Tensor = x + self.sat(y.permute(0, 3, 1, 2))
        return out


class CSAT(nn.Module):
    """Convolution, spatial attention, transformer: 2.8 M parameters without the head, 1.08 GMAC at 384 pixels.

    Args:
        classes: Number of classes.
        sat: Whether the ConvNeXtV2 blocks end in a SAT.
        sat_variant: See `SAT`.
        gate: See `SAT`.
        weights: None, or anything but ``"imagenet"`` that `load_weights` takes.

    Outputs, for images of 384: ``stage1`` (B, 32, 96, 96), ``stage2`` (B, 48, 48, 48), ``stage3`` (B, 96, 24, 24),
    ``stage4`` (B, 176, 12, 12); ``pooled`` (B, 176); ``logits`` (B, classes).

    Raises:
        BadInput: Unknown variant or gate, or weights that do not fit.
    """

    widths: ClassVar = {f"stage{number}": width for number, width in enumerate(_WIDTHS, 1)}

    def __init__(
        self,
        classes: int,
        sat: bool = True,
        sat_variant: Literal["A", "B"] = "B",
        gate: Literal["sigmoid"] | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.downs, self.stages = nn.ModuleList(), nn.ModuleList()
        ci = 3
        for co, sat_blocks, transformers in zip(_WIDTHS, _SAT_BLOCKS, _TRANSFORMERS, strict=True):
            stem = ci == 3
            self.downs.append(
                nn.Sequential(nn.Conv2d(ci, co, 4, 4), LayerNorm2d(co))
                if stem
                else nn.Sequential(LayerNorm2d(ci), nn.Conv2d(ci, co, 2, 2))
            )
            blocks: list[nn.Module] = [SATBlock(co, nn.Identity()) for _ in range(sat_blocks)]
            blocks += [Transformer(co) for _ in range(transformers)]
            self.stages.append(nn.Sequential(*blocks))
            ci = co
        self.norm = nn.LayerNorm(ci, eps=1e-6)
        self.fc = nn.Linear(ci, classes)
        self.apply(_truncated_normal)
        if sat:  # after the initialisation above, which would leave maps of one channel next to nothing
            for module in self.modules():
                if isinstance(module, SATBlock):
                    module.sat = SAT(sat_variant, gate)
        load_weights(self, weights, fresh=["fc.*"])

    def forward(self, images: Tensor) -> Outputs:
        outputs = Outputs()
        x = self.normalize(images)
        for number, (down, blocks) in enumerate(zip(self.downs, self.stages, strict=True), 1):
            x = outputs[f"stage{number}"] = blocks(down(x))
        outputs["pooled"] = self.norm(x.mean((2, 3)))
        outputs["logits"] = self.fc(outputs["pooled"])
        return outputs


class ResNet18SAT(nn.Module):
    """ResNet-18 with a SAT at the end of each block's branch, before the addition.

    Args:
        classes: Number of classes.
        sat: Whether there is one; without it this is plain ResNet-18.
        sat_variant: See `SAT`.
        gate: See `SAT`.
        weights: None, ``"imagenet"`` (all but SAT and head), or anything that `load_weights` takes.

    Outputs, for images of 224: ``layer1`` (B, 64, 56, 56), ``layer2`` (B, 128, 28, 28), ``layer3`` (B, 256, 14, 14),
    ``layer4`` (B, 512, 7, 7); ``pooled`` (B, 512); ``logits`` (B, classes).
    """

    widths: ClassVar = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}

    def __init__(
        self,
        classes: int,
        sat: bool = True,
        sat_variant: Literal["A", "B"] = "B",
        gate: Literal["sigmoid"] | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(BasicBlock, 64, 64, 2, 1)
        self.layer2 = stage(BasicBlock, 64, 128, 2, 2)
        self.layer3 = stage(BasicBlock, 128, 256, 2, 2)
        self.layer4 = stage(BasicBlock, 256, 512, 2, 2)
        self.fc = nn.Linear(512, classes)
        self.apply(initialise)
        if sat:
            for module in self.modules():
                if isinstance(module, BasicBlock):
                    module.attention = SAT(sat_variant, gate)
        fresh = ["fc.*", "*.attention.*"] if weights == "imagenet" else ["fc.*"]
        load_weights(self, weights, fresh=fresh, pretrained="resnet18.tv_in1k")

    def forward(self, images: Tensor) -> Outputs:
        outputs = Outputs()
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(self.normalize(images)))), 3, 2, 1)
        for name in self.widths:
            x = outputs[name] = self.get_submodule(name)(x)
        outputs["pooled"] = x.mean((2, 3))
        outputs["logits"] = self.fc(outputs["pooled"])
        return outputs


def _truncated_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
