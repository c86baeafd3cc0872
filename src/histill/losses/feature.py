"""Losses between feature maps of student and teacher. The teacher is a constant: it is detached.

The functions have no weights. `VID`, `AB` and `ReviewKD` bring the layers that carry the student's features to the
teacher's width; these train with the student and are dropped afterwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histill.errors import BadInput
from histill.losses._shared import constant, precise, same_size, unit

__all__ = ["AB", "VID", "ReviewKD", "attention_transfer", "hint"]


@precise
def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of features (FitNets, Romero et al. 2015, equation 3).

    ``L = mean (f_s - f_t)^2`` over images and elements.

    Args:
        student: features of any shape, already at the teacher's width (a 1x1 convolution, `Regressors`).
        teacher: features of the same shape.

    Raises:
        BadInput: shapes that differ.
    """
    return F.mse_loss(student, constant(student, teacher))


@precise
def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer (Zagoruyko and Komodakis 2017, section 3.1): where they look, whatever their widths.

    ``L = mean (Q_s / |Q_s| - Q_t / |Q_t|)^2``, Q the image's map of ``mean_c f_c^2`` as a vector. Of maps that
    differ in size the larger is average-pooled to the smaller.

    Args:
        student: ``(B, C_s, H_s, W_s)`` features.
        teacher: ``(B, C_t, H_t, W_t)`` features.
    """
    q_s, q_t = same_size(student.square().mean(1, keepdim=True), teacher.square().mean(1, keepdim=True))
    return hint(unit(q_s.flatten(1)), unit(q_t.flatten(1)))


class VID(nn.Module):
    """Variational information distillation (VID; Ahn et al. 2019).

    ``L = mean ((f_t - mu(f_s))^2 / (2 v_c) + log(v_c) / 2)``: the teacher's features as Gaussians around what three
    1x1 convolutions mu make of the student's, with one learned variance ``v_c = softplus(a_c) + 1e-5`` per channel.
    Of maps that differ in size the larger is average-pooled to the smaller. It may be negative.

    Args:
        student_channels: C_s.
        teacher_channels: C_t, the width of mu's layers too.
        variance: v at the start; 5 as published.
    """

    floor = 1e-5

    def __init__(self, student_channels: int, teacher_channels: int, *, variance: float = 5.0) -> None:
        super().__init__()
        widths = (student_channels, teacher_channels, teacher_channels, teacher_channels)
        first, second, third = (nn.Conv2d(a, b, 1, bias=False) for a, b in itertools.pairwise(widths))
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.scale = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(variance - self.floor))))

    @precise
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(B, C_s, H_s, W_s)`` and ``(B, C_t, H_t, W_t)`` features -> scalar."""
        student, teacher = same_size(student, teacher)
        mean: Tensor = self.mean(student)
        variance = (F.softplus(self.scale) + self.floor)[:, None, None]
        return ((constant(mean, teacher) - mean).square() / variance + variance.log()).mean() / 2


class AB(nn.Module):
    """Activation boundaries (AB; Heo et al. 2019): which neurons fire, not how much.

    ``L = mean relu(margin - sign(f_t) r(f_s))^2`` over images and elements (published: the sum over elements), r a
    1x1 convolution with batch normalisation, features before their ReLU, the sign of 0 being -1. Meant as
    initialisation: train the student's trunk with it first, then with the labels.

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        margin: 1 as published.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, margin: float = 1.0) -> None:
        super().__init__()
        self.connect = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False), nn.BatchNorm2d(teacher_channels)
        )
        self.margin = margin

    @precise
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(B, C_s, H, W)`` and ``(B, C_t, H, W)`` features before the ReLU -> scalar."""
        student = self.connect(student)
        fires = torch.where(constant(student, teacher) > 0, 1.0, -1.0)
        return F.relu(self.margin - fires * student).square().mean()


class ReviewKD(nn.Module):
    """Knowledge review (Chen et al. 2021): each stage learns with what the deeper ones know.

    From the deepest stage upwards, attention-based fusion (ABF) mixes a stage with the fused stage below it and
    carries the mix to the teacher's width and size; ``L = sum_stages HCL``, the hierarchical context loss. As
    published the pooled features, as a 1x1 map, are the last stage.

    Args:
        student_channels: widths of the student's stages, shallow to deep.
        teacher_channels: widths of the teacher's, as many.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        if len(student_channels) != len(teacher_channels):
            raise BadInput(
                f"ReviewKD: {len(student_channels)} student stages and {len(teacher_channels)} teacher stages: "
                "pair them one to one"
            )
        width = min(512, student_channels[-1])
        deepest = len(student_channels) - 1
        self.fusions = nn.ModuleList(
            _ABF(s, width, t, fuse=stage < deepest)
            for stage, (s, t) in enumerate(zip(student_channels, teacher_channels, strict=True))
        )

    @precise
    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Stages of ``(B, C_s, H_s, W_s)`` and ``(B, C_t, H_t, W_t)`` features, shallow to deep -> scalar."""
        losses, deeper = [], None
        for fusion, f_s, f_t in reversed(list(zip(self.fusions, student, teacher, strict=True))):
            fused, deeper = fusion(f_s, deeper, f_t.shape[2:])
            losses.append(_hierarchical_context(fused, f_t))
        return torch.stack(losses).sum()


class _ABF(nn.Module):
    """``(f_s, deeper, size) -> (features of the teacher's width, fused features for the next stage up)``."""

    def __init__(self, channels: int, width: int, out: int, *, fuse: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(channels, width, 1, bias=False)
        spread = nn.Conv2d(width, out, 3, padding=1, bias=False)
        for convolution in (narrow, spread):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(narrow, nn.BatchNorm2d(width))
        self.expand = nn.Sequential(spread, nn.BatchNorm2d(out))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuse else None

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        x = self.reduce(x)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            own, inherited = self.attention(torch.cat([x, deeper], dim=1)).split(1, dim=1)
            x = own * x + inherited * deeper
        x = F.interpolate(x, size, mode="nearest")
        return self.expand(x), x


def _hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL: the squared error of the maps and of their 4x4, 2x2 and 1x1 averages, weighted 1, 1/2, 1/4, 1/8."""
    teacher = constant(student, teacher)
    losses = [F.mse_loss(student, teacher)]
    for size in (4, 2, 1):
        if size < min(student.shape[2:]):
            error = F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size))
            losses.append(error / 2 ** len(losses))
    return torch.stack(losses).sum() / sum(0.5**level for level in range(len(losses)))
