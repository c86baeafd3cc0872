"""How a recipe's network starts (ImageNet, a file, from scratch), and which outputs it and its teacher have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from histill.errors import BadInput, Failed
from histill.models import CSAT, ResNet18SAT, StrideNet, Timm
from histill.models.adapter import create
from histill.progress import notice
from histill.run import without_weights
from histill.types import Batch, Outputs

__all__ = ["backbone", "blank", "shapes", "sized", "start"]


def start(make: partial[nn.Module], weights: str) -> partial[nn.Module]:
    """``make`` with its ``weights``: imagenet, a file, none, or auto.

    auto is ImageNet where it can be had, else none, said aloud.

    Raises:
        BadInput: weights that do not fit.
        Failed: weights that were asked for by name cannot be fetched.
    """
    if weights == "none":
        return partial(make, weights=None)
    if weights != "auto":
        return partial(make, weights=weights)
    try:
        make(weights="imagenet")
    except (BadInput, Failed) as error:  # none are published, or they cannot be fetched
        make(weights=None)  # a network that nobody knows is an error, whatever its weights
        notice(f"{str(error).rstrip('.')}. Training from random weights instead: expect less of this network")
        return partial(make, weights=None)
    return partial(make, weights="imagenet")


def backbone(network: str, image_size: int, classes: int) -> partial[nn.Module]:
    """The network by its name: CSAT, CSAT-plain (without SAT), ResNet18SAT, StrideNet (in any case), or a timm name.

    Without classes it ends in its pooled features.
    """
    ours: dict[str, Callable[..., nn.Module]] = {
        "csat": CSAT,
        "csat-plain": CSAT,
        "resnet18sat": ResNet18SAT,
        "stridenet": StrideNet,
    }
    if (known := network.lower()) in ours:
        plain = {"sat": False} if known == "csat-plain" else {}
        return partial(ours[known], classes=classes or 1, **plain)  # a head of one class is never asked
    make: Callable[..., nn.Module] = Timm
    return partial(make, name=network, classes=classes, **sized(network, image_size))


def sized(network: str, image_size: int) -> dict[str, int]:
    """What tells a network of fixed size the size of its images."""
    embed = getattr(create(network, 0, pretrained=False), "patch_embed", None)
    fixed = getattr(embed, "img_size", None)
    return {} if fixed is None or fixed[0] == image_size else {"img_size": image_size}


def shapes(make: partial[nn.Module], image_size: int) -> Outputs:
    """What a network would say of one image, in shapes alone: nothing is computed and no weights are read."""
    with torch.device("meta"):
        network = without_weights(make)().eval()
        return Outputs(network(torch.empty(1, 3, image_size, image_size)))


def blank(image_size: int) -> Batch:
    """A batch of one black image without a label, to ask a teacher for its names and shapes."""

    def black(size: int) -> Tensor:
        return torch.zeros(1, 3, size, size)

    zero = torch.zeros(1, dtype=torch.long)
    return Batch(black(image_size), zero - 1, zero, zero, black)
