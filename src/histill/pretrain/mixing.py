"""Supervised pretraining with mixed images and, where there is one, a teacher of the same classes (USI)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from histill.files import digest
from histill.losses import cross_entropy, kd
from histill.teachers import Keyed
from histill.types import Batch, Outputs, Terms

__all__ = ["Mix", "Mixed", "supervised"]


@dataclass(frozen=True)
class Mix:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch with itself in reverse order.

    One of the two is drawn for each batch. What is drawn is a function of seed, images and views, so that student,
    teacher (at its own size) and loss agree without telling each other, and a resumed run draws it again. A batch
    without any label is left as it is: there is nothing to mix for, and teachers are judged on such batches.

    Attributes:
        mixup: alpha of the Beta distribution that mixup's share comes from; 0.8 as USI has it.
        cutmix: alpha of CutMix's; 1.
        switch: probability of CutMix; 0.5.
        seed: of the draws.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    seed: int = 0

    def draw(self, batch: Batch) -> tuple[float, tuple[float, float, float, float] | None]:
        """The share of the batch's own images, and where they are cut: top, bottom, left, right as shares of the side.

        Mixup has no cut. CutMix's box has the area ``1 - share`` before it is cut off at the border; the share is
        that of the box as it is.
        """
        if not bool((batch.labels >= 0).any()):
            return 1.0, None
        drawn = np.random.default_rng([self.seed, *batch.ids.tolist(), *batch.views.tolist()])
        if drawn.random() >= self.switch:
            return float(drawn.beta(self.mixup, self.mixup)), None
        half = np.sqrt(1 - drawn.beta(self.cutmix, self.cutmix)) / 2
        y, x = drawn.random(2)
        top, bottom, left, right = (float(np.clip(v, 0, 1)) for v in (y - half, y + half, x - half, x + half))
        return 1 - (bottom - top) * (right - left), (top, bottom, left, right)

    def batch(self, batch: Batch) -> Batch:
        """The mixed batch, at any size."""
        share, box = self.draw(batch)

        def mixed(images: Tensor) -> Tensor:
            other = images.flip(0)
            if box is None:
                return share * images + (1 - share) * other
            top, bottom, left, right = (round(edge * images.shape[-1]) for edge in box)
            images = images.clone()
            images[..., top:bottom, left:right] = other[..., top:bottom, left:right]
            return images

        def render(size: int, **which: Any) -> Tensor:
            return mixed(batch.render(size, **which))

        return batch._replace(images=mixed(batch.images), render=render)

    def inputs(self, batch: Batch, teacher: Outputs) -> Tensor:
        """What the student is shown: the mixed images."""
        return self.batch(batch).images


class Mixed:
    """A teacher that is shown mixed images. Its answers depend on the whole batch and cannot be kept."""

    def __init__(self, teacher: Keyed, mix: Mix) -> None:
        self.teacher, self.mix = teacher, mix
        self.key = digest(["mixed", teacher.key, repr(mix)])
        self.path = getattr(teacher, "path", None)

    def __call__(self, batch: Batch) -> Outputs:
        return self.teacher(self.mix.batch(batch))


def supervised(
    student: Outputs, teacher: Outputs, batch: Batch, *, mix: Mix | None = None, weight: float = 5.0
) -> Terms:
    """Cross-entropy, and with a teacher USI's loss (Ridnik et al. 2022): ``CE + 5 KL(p_t || p_s)``, T = 1.

    Of mixed images the cross-entropy is ``s CE(own label) + (1 - s) CE(the other's)``, s the share of the own.

    Args:
        student: its logits of the (mixed) images.
        teacher: the same of the teacher; empty where there is none.
        batch: the images as they were before.
        mix: how they were mixed, if they were.
        weight: of the divergence.
    """
    logits, labels = student["logits"], batch.labels
    share = 1.0 if mix is None else mix.draw(batch)[0]
    hard = cross_entropy(logits, labels)
    if share < 1:
        hard = share * hard + (1 - share) * cross_entropy(logits, labels.flip(0))
    terms: dict[str, tuple[float, Tensor]] = {"hard": (1.0, hard)}
    if "logits" in teacher:
        terms["kd"] = (weight, kd(logits, teacher["logits"], temperature=1.0))
    return terms
