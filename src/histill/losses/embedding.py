"""Losses between an embedding of the student and one of a teacher that has no classes in common with it.

The teacher is a constant: it is detached. For the mean squared error take `hint` on a teacher that is standardised
(`histill.teachers.Standardised`), for the relations of a batch `pkt` or `similarity`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histill.errors import BadInput
from histill.losses._shared import constant, precise, unit

__all__ = ["Projection", "cosine", "smooth_l1"]


@precise
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """How far two embeddings point apart.

    ``L = mean (1 - s . t / (|s| |t|))`` over images, and over places where the embeddings are maps.

    Args:
        student: ``(B, D, ...)``, already at the teacher's width (`Projection`).
        teacher: the same shape.

    Raises:
        BadInput: shapes that differ.
    """
    return (1 - (unit(student) * unit(constant(student, teacher))).sum(1)).mean()


@precise
def smooth_l1(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Smooth L1 of features (Girshick 2015): an outlying token, as vision transformers have some, pulls no harder.

    ``L = mean d^2 / (2 beta)`` where ``d = |s - t| < beta``, else ``d - beta / 2``.

    Args:
        student: features of any shape, already at the teacher's width.
        teacher: features of the same shape.
        beta: where the square ends.

    Raises:
        BadInput: shapes that differ.
    """
    return F.smooth_l1_loss(student, constant(student, teacher), beta=beta)


class Projection(nn.Module):
    """Matches the student's embedding z to each teacher's e_t through linear maps, at several widths at once.

    ``L = mean_t sum_m c_m loss(W_t^(m) z_{1:m} + b_t^(m), e_t)``, ``c_m = 1``: equation 1 of Matryoshka representation
    learning (Kusupati et al. 2022) with a teacher's embedding in place of a label. So the first m numbers of z are an
    embedding by themselves, for every m in ``nested`` and for all of z. The maps are dropped afterwards.

    Args:
        student_width: of z.
        teacher_widths: of the e_t.
        nested: the smaller widths m; none for plain matching.
        loss: ``(student, teacher) -> scalar`` at the teacher's width: `cosine`, `hint` or `smooth_l1`.
    """

    def __init__(
        self,
        student_width: int,
        teacher_widths: Sequence[int],
        *,
        nested: Sequence[int] = (),
        loss: Callable[[Tensor, Tensor], Tensor] = cosine,
    ) -> None:
        super().__init__()
        self.widths = check_nested(student_width, nested)
        self.loss = loss
        self.maps = nn.ModuleList(nn.ModuleList(nn.Linear(m, out) for m in self.widths) for out in teacher_widths)

    def forward(self, student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
        """``(B, student_width)`` and a ``(B, D_t)`` of each teacher -> scalar."""
        return torch.stack(self.each(student, teachers)).mean()

    @precise
    def each(self, student: Tensor, teachers: Sequence[Tensor]) -> list[Tensor]:
        """The losses of the teachers, one by one."""
        return [self._nested(maps, student, teacher) for maps, teacher in zip(self.maps, teachers, strict=True)]

    def _nested(self, maps: Any, student: Tensor, teacher: Tensor) -> Tensor:
        """The inner sum, over the widths."""
        terms = [self.loss(w(student[:, :m]), teacher) for m, w in zip(self.widths, maps, strict=True)]
        return torch.stack(terms).sum()


def check_nested(student_width: int, nested: Sequence[int]) -> list[int]:
    """All widths from narrow to full; `BadInput` where one is not below the student's."""
    if wrong := [m for m in nested if not 0 < m < student_width]:
        raise BadInput(f"nested widths {', '.join(map(str, wrong))}: above 0 and below the student's {student_width}")
    return [*sorted(set(nested)), student_width]
