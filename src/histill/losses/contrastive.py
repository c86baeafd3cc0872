"""Contrastive losses: an image's student features should find the same image's teacher features among others'.

The teacher's features are a constant: they are detached. The projections of `CRDMemory` and `SSKD` train with the
student and are dropped afterwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histill.errors import BadInput
from histill.losses._shared import constant, kl, precise, unit

__all__ = ["SSKD", "CRDMemory", "crd"]


@precise
def crd(student: Tensor, teacher: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Contrastive representation distillation within the batch: its InfoNCE form, without a memory bank.

    ``L = (CE(cos(s_i, t_j) / T, i) + CE(cos(t_i, s_j) / T, i)) / 2``, mean over i. It bounds the same mutual
    information as `CRDMemory` from the B - 1 other images, and needs neither their numbers nor their labels.

    Args:
        student: ``(B, D)`` embeddings, already at the teacher's width.
        teacher: ``(B, D)`` embeddings.
        temperature: T, 0.07 as published.
    """
    teacher = constant(student, teacher)
    scores = unit(student) @ unit(teacher).T / temperature
    image = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, image) + F.cross_entropy(scores.T, image)) / 2


class CRDMemory(nn.Module):
    """Contrastive representation distillation with memory banks (CRD; Tian et al. 2020).

    ``L = mean_b (-log h(b, b) - sum_{k=1..K} log(1 - h(b, k)))``, ``h = e / (e + K / M)``,
    ``e = exp(cos / T) / Z``, summed over the student's embedding against the teacher's bank and the other way
    round. Z is set by the first batch. Negatives are drawn from the images of other classes where labels are given
    (as published), else from all other images. The banks hold a moving mean of each image's two embeddings and move
    in training mode only; each process has its own.

    Args:
        student_width: width of the student's pooled features.
        teacher_width: width of the teacher's.
        images: M, the number of training images.
        labels: ``(M,)`` class numbers, -1 for unlabelled.
        width: of the embeddings; 128 as published.
        negatives: K, drawn with replacement; 16384 as published, far fewer for a small data set.
        temperature: T, 0.07 as published.
        momentum: 0.5 as published.

    Raises:
        BadInput: labels that do not fit the images, or leave an image without negatives.
    """

    memory_student: Tensor
    memory_teacher: Tensor
    normalizer: Tensor
    order: Tensor
    start: Tensor
    size: Tensor

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        images: int,
        *,
        labels: Tensor | None = None,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        self.embed_student = nn.Linear(student_width, width)
        self.embed_teacher = nn.Linear(teacher_width, width)
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        bound = 1 / math.sqrt(width / 3)
        for bank in ("memory_student", "memory_teacher"):
            self.register_buffer(bank, torch.empty(images, width).uniform_(-bound, bound))
        self.register_buffer("normalizer", torch.zeros(2))

        # Images in the order of their classes: a class is a run of `size` from `start`, its negatives are the rest.
        group = torch.arange(images)
        if labels is not None:
            if labels.shape != (images,):
                raise BadInput(f"CRDMemory: labels {tuple(labels.shape)} for {images} images: give one for each")
            group = torch.where(labels < 0, labels.max() + 1 + group, labels.long())
        order = group.argsort(stable=True)
        _, number, sizes = torch.unique(group, return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise BadInput("CRDMemory: all images are of one class, so that there are no negatives: leave labels out")
        starts = sizes.cumsum(0) - sizes
        for name, value in (("order", order), ("start", starts[number]), ("size", sizes[number])):
            self.register_buffer(name, value, persistent=False)

    @precise
    def forward(self, student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
        """``(B, D_s)`` and ``(B, D_t)`` features of the images of row numbers ``(B,)`` -> scalar."""
        v_s = unit(self.embed_student(student))
        v_t = unit(self.embed_teacher(teacher.detach()))
        chosen = torch.cat([index[:, None], self.draw(index)], dim=1)
        loss = self._nce(v_s, self.memory_teacher, chosen, 0) + self._nce(v_t, self.memory_student, chosen, 1)
        if self.training:
            self._remember(self.memory_student, v_s, index)
            self._remember(self.memory_teacher, v_t, index)
        return loss

    def draw(self, index: Tensor) -> Tensor:
        """``(B, K)`` row numbers of negatives for the images ``(B,)``, uniform over those of other groups."""
        start, size = self.start[index, None], self.size[index, None]
        others = len(self.order) - size
        uniform = torch.rand(len(index), self.negatives, device=index.device)
        place = torch.minimum((uniform * others).long(), others - 1)  # a product may be rounded up
        return self.order[torch.where(place >= start, place + size, place)]

    def _nce(self, v: Tensor, memory: Tensor, chosen: Tensor, side: int) -> Tensor:
        # One product with the whole bank and a gather: K + 1 rows per image would take `width` times the memory.
        scores = (v @ memory.clone().T).gather(1, chosen) / self.temperature
        images = len(memory)
        with torch.no_grad():
            first = scores.exp().mean() * images
            self.normalizer[side] = torch.where(self.normalizer[side] > 0, self.normalizer[side], first)
        log_odds = scores - torch.log(self.normalizer[side] * self.negatives / images)
        return -(F.logsigmoid(log_odds[:, 0]) + F.logsigmoid(-log_odds[:, 1:]).sum(1)).mean()

    @torch.no_grad()
    def _remember(self, memory: Tensor, v: Tensor, index: Tensor) -> None:
        memory[index] = unit(self.momentum * memory[index] + (1 - self.momentum) * v)


class SSKD(nn.Module):
    """Self-supervision as knowledge (SSKD; Xu et al. 2020): the term L_ss.

    ``A_ij = cos(head(f of transformed image i), head(f of plain image j))``;
    ``L = T^2 mean_i KL(softmax(A_t[i] / T) || softmax(A_s[i] / T))``. Transformed images whose own plain image the
    teacher does not rank first are wrong answers: of these the share ``keep`` with the best rank is used (the
    teacher's similarity breaks ties). The paper's term L_T is `kd` on the transformed images.

    The teacher's head is trained first, on the frozen teacher, with `pretext`; it is not trained by `forward`.

    Args:
        student_width: width of the student's pooled features.
        teacher_width: width of the teacher's.
        temperature: T, 0.5 as published.
        keep: 0.75 as published.
    """

    def __init__(self, student_width: int, teacher_width: int, *, temperature: float = 0.5, keep: float = 0.75) -> None:
        super().__init__()
        self.head_student = _head(student_width)
        self.head_teacher = _head(teacher_width)
        self.temperature, self.keep = temperature, keep

    @precise
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(V, B, D_s)`` and ``(V, B, D_t)`` features of V views, the plain one first -> scalar."""
        a_s = _similarities(self.head_student(student))
        with torch.no_grad():
            a_t = _similarities(self.head_teacher(teacher))
        a_t = constant(a_s, a_t)
        loss = kl((a_t / self.temperature).log_softmax(1), (a_s / self.temperature).log_softmax(1))
        kept = self._kept(a_t, _plain(student))
        return self.temperature**2 * (loss * kept).sum() / kept.sum().clamp(min=1)

    @precise
    def pretext(self, teacher: Tensor) -> Tensor:
        """The contrastive task that trains the teacher's head: ``mean_i CE(A_t[i] / T, own plain image)``."""
        a_t = _similarities(self.head_teacher(teacher.detach()))
        return F.cross_entropy(a_t / self.temperature, _plain(teacher))

    def _kept(self, a_t: Tensor, plain: Tensor) -> Tensor:
        own = a_t.gather(1, plain[:, None])
        rank = (a_t > own).sum(1)
        # Cosines are within [-1, 1], so that a quarter of one orders images of the same rank and no others.
        place = (rank - own.squeeze(1) / 4).argsort().argsort()
        wrong = (rank > 0).sum()
        return place < len(a_t) - wrong + (wrong * self.keep).floor()


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def _similarities(projected: Tensor) -> Tensor:
    """``((V - 1) B, B)`` cosines of transformed images with plain ones, of ``(V, B, D)`` projections."""
    plain, transformed = projected[0], projected[1:].flatten(0, 1)
    return unit(transformed) @ unit(plain).T


def _plain(views: Tensor) -> Tensor:
    """For each transformed image the number of its plain one, ``((V - 1) B,)``."""
    return torch.arange(views.shape[1], device=views.device).repeat(len(views) - 1)
