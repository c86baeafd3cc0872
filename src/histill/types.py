"""The three contracts that everything in Histill is built on.

A **network** maps images to named tensors, a **teacher** maps a batch to named tensors, an **objective** maps
both to weighted losses. Each is a plain function or module; nothing is registered and nothing is inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from histill.errors import BadInput

__all__ = ["Batch", "Network", "NoOutput", "Objective", "Outputs", "Teacher", "Terms", "named", "total"]


class NoOutput(BadInput, KeyError):
    """An objective asked for an output that is not there."""

    __str__ = Exception.__str__


class Outputs(dict[str, Tensor]):
    """What a network or a teacher says of a batch: named tensors, always with ``"logits"``.

    ``logits`` is ``(B, C)`` for classification and ``(B, C, H, W)`` for segmentation. A name that is not there
    raises `NoOutput`, a `KeyError`, with the names that are, so that a typo in an objective is found on the first
    batch.
    """

    def __missing__(self, name: str) -> Tensor:
        there = ", ".join(sorted(self)) or "nothing, there is no teacher"
        raise NoOutput(f"no output named {name!r}; this network gives: {there}")


def named(said: Any, whose: str) -> Outputs:
    """What a network or a teacher said, which is to be tensors by name.

    Raises:
        BadInput: it is not; timm's own networks give a tensor.
    """
    if not isinstance(said, Mapping):
        raise BadInput(
            f"{whose} gives a {type(said).__name__}, not named tensors: let it return {{'logits': ...}}, or take "
            "histill.models.Timm for a network of timm's"
        )
    return said if isinstance(said, Outputs) else Outputs(said)


class Batch(NamedTuple):
    """One view each of ``B`` images.

    Attributes:
        images: ``(B, 3, H, W)`` RGB in [0, 1]; every network normalises for itself.
        labels: ``(B,)`` class numbers, -1 for an unlabelled image.
        ids: ``(B,)`` row numbers of the images in their table.
        views: ``(B,)`` view numbers; view 0 of evaluation is the image itself.
        render: the same views at another size, ``size -> (B, 3, size, size)``, for a teacher that looks closer; with
            ``twin=1`` another, independent view of each image, for what learns from two views.
        masks: ``(B, H, W)`` moved with the view: class numbers or, of nuclei, instance numbers (0: none); -1 where
            nobody knows. None where the images have no masks.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    views: Tensor
    render: Callable[..., Tensor]
    masks: Tensor | None = None

    def at(self, size: int | None) -> Tensor:
        """The images at ``size`` pixels (the batch's own where it is None)."""
        return self.images if size is None or size == self.images.shape[-1] else self.render(size)


class Network(Protocol):
    """``(B, 3, H, W)`` in [0, 1] -> `Outputs`; a `torch.nn.Module` in practice."""

    def __call__(self, images: Tensor) -> Outputs: ...


Teacher: TypeAlias = Callable[[Batch], Outputs]
"""A frozen source of outputs: a network, an ensemble, a cache in front of either."""

Terms: TypeAlias = Mapping[str, tuple[float, Tensor]]
"""The terms of a loss by name, each ``(weight, raw scalar)``; the loss is the weighted sum."""

Objective: TypeAlias = Callable[[Outputs, Outputs, Batch], Terms]
"""``(student, teacher, batch) -> terms``; the teacher's outputs are empty where there is no teacher."""


def total(terms: Terms) -> Tensor:
    """The weighted sum of the terms.

    Raises:
        BadInput: the objective gave something else than terms.
    """
    if not isinstance(terms, Mapping) or not terms:
        raise BadInput(f"an objective gives {{name: (weight, loss)}}, and this one gave {_short(terms)}")
    for name, term in terms.items():
        if not (isinstance(term, tuple | list) and len(term) == 2 and isinstance(term[1], Tensor)):
            raise BadInput(f"the loss term {name!r} is (weight, a tensor of one number), and not {_short(term)}")
        if term[1].dim():
            raise BadInput(f"the loss term {name!r} has the shape {tuple(term[1].shape)}; give its mean, one number")
    return torch.stack([weight * loss for weight, loss in terms.values()]).sum()


def _short(value: object) -> str:
    return f"a {type(value).__name__}" if value or isinstance(value, Tensor) else repr(value)
