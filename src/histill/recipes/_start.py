"""How a recipe's network starts: ImageNet, a file, or from scratch."""

from __future__ import annotations

from functools import partial

from torch import nn

from histill.errors import Failed
from histill.progress import notice

__all__ = ["start"]


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
    except Failed as error:
        notice(f"{str(error).rstrip('.')}. Training from random weights instead: expect less of this network")
        return partial(make, weights=None)
    return partial(make, weights="imagenet")
