"""Losses of segmentation masks.

Per pixel, `cross_entropy`, `focal` and the losses between logits take ``(B, C, H, W)`` as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from histill.losses._shared import mean_labelled, precise, rows

__all__ = ["dice"]


@precise
def dice(logits: Tensor, label: Tensor) -> Tensor:
    """Soft Dice loss (Milletari et al. 2016; linear denominator), mean over images and classes.

    ``L = mean_{b, c} (1 - (2 sum p y + 1) / (sum p + sum y + 1))``, sums over the image's labelled pixels, p the
    softmax. The 1 gives a class that is nowhere in an image a loss for what is predicted of it.

    Args:
        logits: ``(B, C, H, W)``.
        label: ``(B, H, W)`` class numbers; pixels of label -1, and images of no other, are left out.
    """
    rows(logits, label)
    labelled = (label >= 0)[:, None]
    p = logits.softmax(1) * labelled
    y = F.one_hot(label.clamp(min=0), logits.shape[1]).movedim(-1, 1) * labelled
    overlap, p_area, y_area = ((part).flatten(2).sum(2) for part in (p * y, p, y))
    per_image = (1 - (2 * overlap + 1) / (p_area + y_area + 1)).mean(1)
    return mean_labelled(per_image, torch.where(labelled.flatten(1).any(1), 0, -1))
