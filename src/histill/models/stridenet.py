"""StrideNet: a student that is small in time, not only in parameters; ours, of no paper (``docs/performance.md``)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from histill.models.resnet import initialise
from histill.models.weights import load_weights
from histill.types import Outputs

__all__ = ["StrideNet"]

_WIDTHS = (16, 32, 64, 96)
_DEPTHS = (1, 2, 3, 1)


class Conv(nn.Sequential):
    """3x3 convolution, batch norm, ReLU: one operator in every runtime, also in int8."""

    def __init__(self, ci: int, co: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(ci, co, 3, stride, 1, bias=False), nn.BatchNorm2d(co), nn.ReLU(inplace=True))


class StrideNet(nn.Module):
    """Eight 3x3 convolutions, of which five have stride 2, one after another; 164,978 parameters, 46 MMAC at 224 px.

    High resolution is left at once, with few channels; the channels, and so the parameters, come where maps are small.
    There is nothing that a runtime is slow at: no depthwise convolution, no gate, no sum (int8 would leave and enter
    again for it), no pooling but the last. The first batch norm normalises the images.

    Args:
        classes: Number of classes.
        weights: None, or anything but ``"imagenet"`` that `load_weights` takes.

    Outputs, for images of 224: ``stage1`` (B, 16, 56, 56), ``stage2`` (B, 32, 28, 28), ``stage3`` (B, 64, 14, 14),
    ``stage4`` (B, 96, 7, 7); ``pooled`` (B, 96); ``logits`` (B, classes). Images of any size do.
    """

    widths: ClassVar = {f"stage{number}": width for number, width in enumerate(_WIDTHS, 1)}

    def __init__(self, classes: int, weights: str | None = None) -> None:
        super().__init__()
        ci = _WIDTHS[0]
        self.stem = Conv(3, ci, 2)
        self.stages = nn.ModuleList()
        for co, depth in zip(_WIDTHS, _DEPTHS, strict=True):
            self.stages.append(nn.Sequential(Conv(ci, co, 2), *(Conv(co, co) for _ in range(depth - 1))))
            ci = co
        self.fc = nn.Linear(ci, classes)
        self.apply(initialise)
        load_weights(self, weights, fresh=["fc.*"])

    def forward(self, images: Tensor) -> Outputs:
        outputs = Outputs()
        x = self.stem(images)  # (B, 16, 112, 112)
        for number, stage in enumerate(self.stages, 1):
            x = outputs[f"stage{number}"] = stage(x)
        outputs["pooled"] = x.mean((2, 3))  # (B, 96)
        outputs["logits"] = self.fc(outputs["pooled"])
        return outputs
