"""DSNet, the melanoma student of 268,898 parameters (Khan et al., Comput. Biol. Med. 2022, 146:105581)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.parts import glorot
from histill.types import Outputs

__all__ = ["DSNet"]


class DSNet(nn.Module):
    """Three unpadded convolutions, two max pools, one linear layer; no normalisation but [0, 1].

    The paper speaks of three pools; its parameter count and its code have two.

    Args:
        classes: Number of classes.
        image_size: Side of the images in pixels, at least 18; the linear layer depends on it.
        dropout: Share of the last convolution's activations that are dropped in training.

    Outputs: ``conv1`` (B, 128, 222, 222), ``conv2`` (B, 64, 109, 109), ``conv3`` (B, 32, 52, 52) after their
    ReLU, for images of 224; ``logits`` (B, classes).

    Raises:
        BadInput: Images too small to build for, or of another size than the network was built for.
    """

    def __init__(self, classes: int = 2, image_size: int = 224, dropout: float = 0.25) -> None:
        super().__init__()
        side = ((image_size - 2) // 2 - 2) // 2 - 2
        if side < 1:
            raise BadInput(f"DSNet needs images of at least 18 pixels, not {image_size}: raise --image-size")
        self.input_size = image_size
        self.conv1 = nn.Conv2d(3, 128, 3)
        self.conv2 = nn.Conv2d(128, 64, 3)
        self.conv3 = nn.Conv2d(64, 32, 3)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(32 * side * side, classes)
        self.apply(glorot)

    def forward(self, images: Tensor) -> Outputs:
        size = self.input_size
        if tuple(images.shape[2:]) != (size, size):
            raise BadInput(
                f"this DSNet was built for images of {size}x{size} pixels, "
                f"not {images.shape[3]}x{images.shape[2]}: resize them, or build it with their image_size"
            )
        conv1 = self.conv1(images).relu_()  # (B, 128, 222, 222)
        conv2 = self.conv2(F.max_pool2d(conv1, 2)).relu_()  # (B, 64, 109, 109)
        conv3 = self.conv3(F.max_pool2d(conv2, 2)).relu_()  # (B, 32, 52, 52)
        logits = self.fc(self.dropout(conv3).flatten(1))
        return Outputs(conv1=conv1, conv2=conv2, conv3=conv3, logits=logits)
