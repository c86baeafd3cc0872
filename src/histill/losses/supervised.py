"""Losses against the label. A label of -1 is an unlabelled image (or pixel) and is left out of the mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from histill.losses._shared import mean_labelled, precise, rows

__all__ = ["cross_entropy", "focal"]


@precise
def cross_entropy(logits: Tensor, label: Tensor, *, smoothing: float = 0.0, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy, with label smoothing (Szegedy et al. 2016, section 7).

    ``L = mean_i -sum_c q_c log p_c``, ``q = (1 - smoothing) onehot(y) + smoothing / C``. With class weights the
    mean is torch's weighted one, ``sum_i w_{y_i} l_i / sum_i w_{y_i}``.

    Args:
        logits: ``(B, C)``, or ``(B, C, H, W)``.
        label: ``(B,)`` or ``(B, H, W)`` class numbers, -1 for unlabelled; 0 is returned where all are.
        smoothing: in [0, 1].
        weight: ``(C,)``, one per class.
    """
    logits, label = rows(logits, label)
    loss = F.cross_entropy(logits, label, weight, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
    labelled = label >= 0
    count = labelled.sum() if weight is None else (weight[label.clamp(min=0)] * labelled).sum()
    return loss / torch.where(count > 0, count, 1)


@precise
def focal(logits: Tensor, label: Tensor, *, alpha: float | Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017, equation 5): images that are right already count for less.

    ``L = mean_i -alpha_y (1 - p_y)^gamma log p_y``; with ``gamma = 0`` and no ``alpha`` it is cross-entropy. The
    mean is over images (or pixels), not over their weights.

    Args:
        logits: ``(B, C)``, or ``(B, C, H, W)``.
        label: ``(B,)`` or ``(B, H, W)`` class numbers, -1 for unlabelled; 0 is returned where all are.
        alpha: one factor for all, or ``(C,)``, one per class.
        gamma: at least 0.
    """
    logits, label = rows(logits, label)
    target = label.clamp(min=0)
    log_p = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    # The floor keeps the gradient of a power below 1 finite where p is 1.
    loss = -((-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny) ** gamma) * log_p
    if isinstance(alpha, Tensor):
        loss = alpha[target] * loss
    elif alpha is not None:
        loss = alpha * loss
    return mean_labelled(loss, label)
