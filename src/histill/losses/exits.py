"""Losses of a network with several exits, whose deepest exit teaches the others.

Each returns the terms of an objective, ``{name: (weight, raw scalar)}``: their weighted sum is the paper's loss.
Exits are given shallow to deep; as a teacher, the deepest is a constant: it is detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from histill.errors import BadInput
from histill.losses._shared import constant, kl, precise
from histill.losses.feature import hint
from histill.losses.response import kd
from histill.losses.supervised import cross_entropy
from histill.types import Terms

__all__ = ["be_your_own_teacher", "self_distillation"]


def self_distillation(
    exits: Sequence[Tensor],
    features: Sequence[Tensor],
    label: Tensor,
    *,
    teacher: Tensor | None = None,
    temperature: float = 3.0,
    feature_weight: float = 0.03,
    deep_ce: Literal["paper", "once"] = "paper",
    reverse: bool = False,
) -> Terms:
    """Multi-exit self-distillation with a teacher (cervical cells, equations 4 to 6).

    ``L = sum_{m=1..n} KD_m + SD_m``, with ``KL_T`` the softened KL times T^2,
    ``KD_m = KL_T(S_m, t) + CE(S_m, y) + CE(S_n, y)`` and ``SD_m = KL_T(S_m, S_n) + lambda mean (F_m - F_n)^2``.
    Without a teacher ``L = sum_m CE(S_m, y) + SD_m``.

    Args:
        exits: n logits ``(B, C)``, S_1 to S_n.
        features: n features of one shape, F_1 to F_n (each exit's after its bottleneck).
        label: ``(B,)`` class numbers, -1 for unlabelled.
        teacher: ``(B, C)`` logits t.
        temperature: T, 3 as published.
        feature_weight: lambda, 0.03 as published.
        deep_ce: "paper" takes equation 4 as printed, which counts the deepest exit's CE n + 1 times, "once" once;
            without a teacher it is counted once.
        reverse: KL(student || teacher) as equation 2 is printed, instead of KL(teacher || student).

    Returns:
        Terms "ce", "self", "feature", and with a teacher "kd" and ("paper") "deep_ce".
    """
    *shallow, deepest = _paired(exits, features)
    terms = {
        "ce": (1.0, _total([cross_entropy(logits, label) for logits in exits])),
        "self": (1.0, _total([_softened(s, deepest[0], temperature, reverse) for s, _ in shallow])),
        "feature": (feature_weight, _total([hint(f, deepest[1]) for _, f in shallow])),
    }
    if teacher is not None:
        terms["kd"] = (1.0, _total([_softened(logits, teacher, temperature, reverse) for logits in exits]))
        if deep_ce == "paper":
            terms["deep_ce"] = (float(len(exits)), cross_entropy(deepest[0], label))
    return terms


def be_your_own_teacher(
    exits: Sequence[Tensor],
    features: Sequence[Tensor],
    label: Tensor,
    *,
    alpha: float = 0.3,
    temperature: float = 3.0,
    feature_weight: float = 0.03,
) -> Terms:
    """Be Your Own Teacher (Zhang et al. 2019).

    ``L = CE(S_n, y) + sum_{m<n} (1 - alpha) CE(S_m, y) + alpha KL_T(S_m, S_n) + lambda mean (F_m - F_n)^2``, with
    ``KL_T`` the softened KL times T^2; the feature term is a mean here and a sum in the paper.

    Args:
        exits: n logits ``(B, C)``, S_1 to S_n.
        features: n features of one shape, F_1 to F_n.
        label: ``(B,)`` class numbers, -1 for unlabelled.
        alpha: 0.3 in its authors' code.
        temperature: T, 3 in its authors' code.
        feature_weight: lambda, 0.03 in its authors' code.

    Returns:
        Terms "deep_ce", "ce" (of the shallow exits), "self" and "feature".
    """
    *shallow, deepest = _paired(exits, features)
    return {
        "deep_ce": (1.0, cross_entropy(deepest[0], label)),
        "ce": (1.0 - alpha, _total([cross_entropy(s, label) for s, _ in shallow])),
        "self": (alpha, _total([kd(s, deepest[0], temperature=temperature) for s, _ in shallow])),
        "feature": (feature_weight, _total([hint(f, deepest[1]) for _, f in shallow])),
    }


def _paired(exits: Sequence[Tensor], features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if len(exits) != len(features) or len(exits) < 2:
        raise BadInput(f"{len(exits)} exits and {len(features)} features: give one of each per exit, two at least")
    return list(zip(exits, features, strict=True))


def _total(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


@precise
def _softened(student: Tensor, teacher: Tensor, temperature: float, reverse: bool) -> Tensor:
    if not reverse:
        return kd(student, teacher, temperature=temperature)
    log_s = (student / temperature).log_softmax(1)
    log_t = (constant(student, teacher) / temperature).log_softmax(1)
    return temperature**2 * kl(log_s, log_t).mean()
