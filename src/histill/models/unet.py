"""A U-Net decoder, and the segmentation network that it makes of any backbone (Ronneberger et al. 2015)."""

from __future__ import annotations

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

    Args:
        classes: Number of classes.
        backbone: ``"CSAT"``, ``"ResNet18SAT"``, ``"StrideNet"``, or the timm name of a network with a pyramid of
            features.
        weights: The backbone's; see there.
        arguments: Passed to the backbone.

    What the decoder does not use of the backbone, its head, is frozen, and kept so that a classifier can start from it.

    Outputs: the backbone's features (its ``logits`` and ``pooled`` left out) and ``logits`` (B, classes, H, W).

    Raises:
        BadInput: A backbone without a pyramid of features from 1/4 down, or weights that do not fit.
    """

    def __init__(self, classes: int = 2, backbone: str = "CSAT", weights: str | None = None, **arguments: Any) -> None:
        super().__init__()
        self.backbone: CSAT | ResNet18SAT | StrideNet | Timm
        if ours := _OURS.get(backbone.lower()):
            self.backbone = ours(1, weights=weights, **arguments)
            widths = self.backbone.widths
        else:
            self.backbone = Timm(backbone, 0, weights, **arguments)
            widths = _pyramid(backbone, self.backbone)
        self.skips = tuple(widths)
        for name in _unreached(self.backbone, self.skips):
            self.backbone.get_parameter(name).requires_grad_(False)
        self.decoder = UNetDecoder(classes, tuple(widths.values()))

    def forward(self, images: Tensor) -> Outputs:
        outputs: Outputs = self.backbone(images)
        del outputs["logits"], outputs["pooled"]
        outputs["logits"] = self.decoder([outputs[name] for name in self.skips], images.shape[-2:])
        return outputs


def _pyramid(name: str, backbone: Timm) -> dict[str, int]:
    info = backbone.network.feature_info if hasattr(backbone.network, "forward_intermediates") else []
    widths, strides = {}, []
    for number, stage in enumerate(info, 1):
        if stage["reduction"] >= 4:
            widths[f"stage{number}"] = int(stage["num_chs"])
            strides.append(stage["reduction"])
    if len(strides) < 2 or strides != [4 * 2**step for step in range(len(strides))]:
        raise BadInput(f"{name} has no pyramid of features at 1/4, 1/8, ...: choose a convolutional backbone")
    return widths


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
