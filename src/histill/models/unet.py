"""A U-Net decoder, and the segmentation network that it makes of any backbone (Ronneberger et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from histill.errors import BadInput
from histill.models.adapter import Timm
from histill.models.csat import CSAT, ResNet18SAT
from histill.models.stridenet import StrideNet
from histill.types import Outputs

__all__ = ["UNet", "UNetDecoder"]

_OURS: dict[str, type[CSAT | ResNet18SAT | StrideNet]] = {
    "csat": CSAT,
    "resnet18sat": ResNet18SAT,
    "stridenet": StrideNet,
}
_SCALES = (4, 8, 16, 32)


class UNetDecoder(nn.Module):
    """From a pyramid of features at 1/4, 1/8, ... of an image's size to logits at its full size.

    Each step is: bilinear enlargement by 2, concatenation, twice (3x3 convolution, batch norm, ReLU). Two more steps
    without a skip lead from 1/4 to the full size.

    Args:
        classes: Number of classes.
        channels: Channels of the features, finest first.
    """

    def __init__(self, classes: int, channels: Sequence[int] = (32, 48, 96, 176)) -> None:
        super().__init__()
        skips = list(channels[-2::-1])
        inputs = [channels[-1], *skips]
        self.steps = nn.ModuleList(_convs(ci + skip, skip) for ci, skip in zip(inputs, skips))
        finest = channels[0]
        self.last = nn.ModuleList([_convs(finest, finest), _convs(finest, finest // 2)])
        self.classifier = nn.Conv2d(finest // 2, classes, 1)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int] | torch.Size) -> Tensor:
        """``features``, finest first, -> logits ``(B, classes, *size)``."""
        x = features[-1]
        for step, skip in zip(self.steps, reversed(features[:-1]), strict=True):
            x = step(torch.cat([_enlarged(x, skip.shape[-2:]), skip], 1))
        for step, target in zip(self.last, ((size[0] // 2, size[1] // 2), size), strict=True):
            x = step(_enlarged(x, target))
        logits: Tensor = self.classifier(x)
        return logits


class UNet(nn.Module):
    """A backbone and a `UNetDecoder`.

    A network whose features all have one scale, such as a vision transformer, gives the decoder four of its blocks,
    spread evenly over its depth: 3, 6, 9 and 12 of 12, as in UNETR (Hatamizadeh et al. 2022) and DPT (Ranftl et al.
    2021). The patch tokens are maps again, the class and register tokens are left out, and the maps become a pyramid at
    1/4, 1/8, 1/16 and 1/32 (`_Reassembled`).

    Args:
        classes: Number of classes.
        backbone: ``"CSAT"``, ``"ResNet18SAT"``, ``"StrideNet"``, or the timm name of a network with a pyramid of
            features, or with features of one scale.
        weights: The backbone's; see there.
        arguments: Passed to the backbone. A vision transformer is told another size than its own by ``img_size=384``,
            or takes any by ``dynamic_img_size=True``; in either case multiples of its patches.

    What the decoder does not use of the backbone, its head, is frozen, and kept so that a classifier can start from it.

    Outputs: the backbone's features (its ``logits`` and ``pooled`` left out) and ``logits`` (B, classes, H, W).

    Raises:
        BadInput: A backbone of other features, weights that do not fit, or images of a size that it does not take.
    """

    def __init__(self, classes: int = 2, backbone: str = "CSAT", weights: str | None = None, **arguments: Any) -> None:
        super().__init__()
        self.backbone: CSAT | ResNet18SAT | StrideNet | Timm
        self.reassembled: _Reassembled | None = None
        if ours := _OURS.get(backbone.lower()):
            self.backbone = ours(1, weights=weights, **arguments)
            self.skips, widths = tuple(self.backbone.widths), tuple(self.backbone.widths.values())
        else:
            self.backbone = Timm(backbone, 0, weights, **arguments)
            if (found := _pyramid(self.backbone)) is not None:
                self.skips, widths = tuple(found), tuple(found.values())
            else:
                self.reassembled = _Reassembled(backbone, self.backbone)
                self.skips, widths = self.reassembled.blocks, self.reassembled.widths
        for name in _unreached(self.backbone, self.skips):
            self.backbone.get_parameter(name).requires_grad_(False)
        self.decoder = UNetDecoder(classes, widths)

    def forward(self, images: Tensor) -> Outputs:
        size = images.shape[-2:]
        if self.reassembled is not None:
            self.reassembled.check(size)
        outputs: Outputs = self.backbone(images)
        del outputs["logits"], outputs["pooled"]
        features = [outputs[name] for name in self.skips]
        if self.reassembled is not None:
            features = self.reassembled(features, size)
        outputs["logits"] = self.decoder(features, size)
        return outputs


class _Reassembled(nn.Module):
    """Four maps of one scale -> a pyramid of features at 1/4, 1/8, 1/16 and 1/32 of the image (DPT, section 3.1).

    A token knows more of its patch than one pixel can say: a transposed convolution unfolds it into as many as the
    level has of the patch. Where that is no whole number (patches of 14), or less than one, bilinear resampling does
    the rest. The widths double from level to level, to that of the tokens.

    Raises:
        BadInput: The features do not have one scale.
    """

    def __init__(self, name: str, backbone: Timm) -> None:
        super().__init__()
        info = _stages(backbone)
        if len({(stage["reduction"], stage["num_chs"]) for stage in info}) != 1:
            raise BadInput(
                f"{name} has neither a pyramid of features at 1/4, 1/8, ... nor features of one scale: choose a "
                "convolutional backbone or a vision transformer"
            )
        self.name, self.patch, width = name, int(info[0]["reduction"]), int(info[0]["num_chs"])
        self.blocks = tuple(f"stage{math.ceil(len(info) * level / 4)}" for level in (1, 2, 3, 4))
        self.widths = tuple(max(1, width // 2**level) for level in (3, 2, 1, 0))
        embed = getattr(backbone.network, "patch_embed", None)
        self.fixed = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", False) else None
        if self.fixed is not None:
            self.check(torch.Size(self.fixed))
        times = [math.ceil(self.patch / scale) for scale in _SCALES]
        self.levels = nn.ModuleList(
            nn.ConvTranspose2d(width, wide, by, by, bias=False) for wide, by in zip(self.widths, times, strict=True)
        )

    def check(self, size: torch.Size) -> None:
        """Refuse images that the backbone would refuse, or see without their margin."""
        said = f"{self.name} takes images of %s pixels, not {size[1]}x{size[0]}: %s"
        if self.fixed is not None and tuple(size) != tuple(self.fixed):
            raise BadInput(said % (f"{self.fixed[1]}x{self.fixed[0]}", "build it with that img_size"))
        if size[0] % self.patch or size[1] % self.patch:
            raise BadInput(said % (f"a multiple of {self.patch}", "resize them"))

    def forward(self, maps: Sequence[Tensor], size: torch.Size) -> list[Tensor]:
        """Four maps ``(B, D, H/p, W/p)`` of images of ``size`` ``(H, W)``, shallowest first."""
        return [
            _enlarged(level(one), [math.ceil(side / scale) for side in size])
            for level, one, scale in zip(self.levels, maps, _SCALES, strict=True)
        ]


def _stages(backbone: Timm) -> list[dict[str, Any]]:
    """What timm says of each stage; nothing where it cannot give them."""
    return list(backbone.network.feature_info) if hasattr(backbone.network, "forward_intermediates") else []


def _pyramid(backbone: Timm) -> dict[str, int] | None:
    """The stages at 1/4, 1/8, ... and their widths, where there are such."""
    widths, strides = {}, []
    for number, stage in enumerate(_stages(backbone), 1):
        if stage["reduction"] >= 4:
            widths[f"stage{number}"] = int(stage["num_chs"])
            strides.append(stage["reduction"])
    return widths if len(strides) > 1 and strides == [4 * 2**step for step in range(len(strides))] else None


def _unreached(network: nn.Module, outputs: Sequence[str]) -> list[str]:
    """The parameters that these outputs do not depend on: distributed training waits for their gradients in vain."""
    size = getattr(network, "input_size", 64)
    with torch.inference_mode(False), torch.enable_grad():
        weights = {name: weight.detach().to("meta").requires_grad_() for name, weight in network.named_parameters()}
        buffers = {name: buffer.to("meta") for name, buffer in network.named_buffers()}
        found = functional_call(network, {**weights, **buffers}, (torch.empty(2, 3, size, size, device="meta"),))
        reached = torch.stack([found[name].sum() for name in outputs]).sum()
        gradients = torch.autograd.grad(reached, list(weights.values()), allow_unused=True)
    return [name for name, gradient in zip(weights, gradients, strict=True) if gradient is None]


def _convs(ci: int, co: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ci, co, 3, padding=1, bias=False),
        nn.BatchNorm2d(co),
        nn.ReLU(inplace=True),
        nn.Conv2d(co, co, 3, padding=1, bias=False),
        nn.BatchNorm2d(co),
        nn.ReLU(inplace=True),
    )


def _enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
