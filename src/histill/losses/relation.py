"""Losses between the relations of a batch's images: their distances, angles and similarities.

Features are ``(B, ...)`` and are flattened to one vector per image; the widths of student and teacher may differ.
The teacher is a constant: it is detached. A batch of one has no relations and no loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from histill.errors import BadInput
from histill.losses._shared import precise, unit

__all__ = ["correlation", "pkt", "rkd_angle", "rkd_distance", "similarity"]


@precise
def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of distances (RKD-D; Park et al. 2019).

    ``L = mean_{ij} smoothL1(d_ij / mean(d) of the student, of the teacher)``, d Euclidean, its mean over the pairs
    that are apart; the outer mean is over all B^2 pairs, an image with itself included.

    Args:
        student: ``(B, ...)`` features.
        teacher: ``(B, ...)`` features.
    """
    student, teacher = _vectors(student, teacher)
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def _distances(x: Tensor) -> Tensor:
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = d.sum() / (d > 0).sum().clamp(min=1)
    return d / torch.where(mean > 0, mean, 1.0)


@precise
def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of angles (RKD-A; Park et al. 2019).

    ``L = mean_{ijk} smoothL1(cos of the angle at j between i and k of the student, of the teacher)``, over all B^3
    triplets; memory grows with ``B^3`` and with ``B^2`` times the width.

    Args:
        student: ``(B, ...)`` features.
        teacher: ``(B, ...)`` features.
    """
    student, teacher = _vectors(student, teacher)
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _cosines(x: Tensor) -> Tensor:
    towards = unit(x[None] - x[:, None], dim=2)
    return towards @ towards.mT


@precise
def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic knowledge transfer (PKT; Passalis and Tefas 2018).

    ``L = mean_{ij} p_ij log((p_ij + e) / (q_ij + e))``, ``e = 1e-7``: the KL of the affinities ``(cos + 1) / 2``,
    each row scaled to sum 1, p the teacher's and q the student's, as its authors' code takes it.

    Args:
        student: ``(B, ...)`` features.
        teacher: ``(B, ...)`` features.
    """
    student, teacher = _vectors(student, teacher)
    q, p = _affinities(student), _affinities(teacher)
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


def _affinities(x: Tensor) -> Tensor:
    affinities = (unit(x) @ unit(x).T + 1) / 2
    return affinities / affinities.sum(1, keepdim=True)


@precise
def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation (SP; Tung and Mori 2019).

    ``L = |G_s - G_t|_F^2 / B^2``, G the Gram matrix of the batch with each row scaled to norm 1.

    Args:
        student: ``(B, ...)`` features.
        teacher: ``(B, ...)`` features.
    """
    student, teacher = _vectors(student, teacher)
    return F.mse_loss(unit(student @ student.T), unit(teacher @ teacher.T))


@precise
def correlation(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Correlation congruence (CC; Peng et al. 2019).

    ``L = |K_s - K_t|_F^2 / B^2``, K the Gaussian kernel ``exp(-gamma |x_i - x_j|^2)`` of vectors scaled to norm 1,
    as its Taylor series ``sum_p exp(-2 gamma) (2 gamma)^p / p! cos_ij^p``.

    Args:
        student: ``(B, ...)`` features.
        teacher: ``(B, ...)`` features.
        gamma: 0.4 as published.
        order: the last p, 2 as published.
    """
    student, teacher = _vectors(student, teacher)
    return F.mse_loss(_kernel(student, gamma, order), _kernel(teacher, gamma, order))


def _kernel(x: Tensor, gamma: float, order: int) -> Tensor:
    cosine = unit(x) @ unit(x).T
    series = [(2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(series).sum(0)


def _vectors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if len(student) != len(teacher):
        raise BadInput(f"student has {len(student)} images and teacher {len(teacher)}: give both the same batch")
    return student.flatten(1), teacher.detach().flatten(1)
