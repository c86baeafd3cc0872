"""What every loss does with its tensors before the equation starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from histill.errors import BadInput

__all__ = ["constant", "kl", "mean_labelled", "precise", "rows", "same_size", "unit"]

P = ParamSpec("P")
R = TypeVar("R")


def precise(loss: Callable[P, R]) -> Callable[P, R]:
    """Compute a loss in float32 at least, whatever the networks run in: half tensors are upcast, autocast is off.

    Squares of features and Gram matrices overflow float16, and bfloat16 has no digits left for differences of
    probabilities; next to a network's forward the cost is nothing.
    """

    @functools.wraps(loss)
    def computed(*args: P.args, **kwargs: P.kwargs) -> R:
        device = _device([*args, *kwargs.values()])
        with torch.autocast(device, enabled=False):
            full: Any = loss
            result: R = full(*map(_upcast, args), **{name: _upcast(value) for name, value in kwargs.items()})
            return result

    return computed


def _upcast(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    if isinstance(value, list | tuple):
        return [_upcast(item) for item in value]
    return value


def _device(values: list[object]) -> str:
    for value in values:
        if isinstance(value, Tensor):
            return value.device.type
        if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            return value[0].device.type
    return "cpu"


def constant(student: Tensor, teacher: Tensor) -> Tensor:
    """The teacher without its gradient, once it has the student's shape (broadcasting would hide a mistake)."""
    if student.shape != teacher.shape:
        raise BadInput(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape: "
            "project or resize the student's first"
        )
    return teacher.detach()


def rows(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, C, ...)`` logits and ``(B, ...)`` labels as ``(N, C)`` and ``(N,)``, a row per image or pixel."""
    if label.shape != logits.shape[:1] + logits.shape[2:]:
        raise BadInput(
            f"logits {tuple(logits.shape)} and labels {tuple(label.shape)} do not fit: "
            "give (B, C, ...) logits and (B, ...) class numbers"
        )
    return logits.movedim(1, -1).flatten(0, -2), label.flatten()


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, C, H, W)`` maps, both at the smaller of their sizes: the larger is average-pooled."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    # Pooling to the same size changes nothing, but on CUDA its backward has no deterministic form.
    student, teacher = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
    return student, teacher


def mean_labelled(values: Tensor, label: Tensor) -> Tensor:
    """The mean of ``values`` where ``label >= 0``; a zero that is connected to the graph where there are none."""
    labelled = label >= 0
    return torch.where(labelled, values, 0.0).sum() / labelled.sum().clamp(min=1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` over dimension 1 of two log-probabilities; where p underflows to 0 it adds 0."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def unit(x: Tensor, dim: int = 1) -> Tensor:
    """``x`` scaled to L2 norm 1 along ``dim``; a zero vector stays zero, with a gradient of ordinary size."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)
