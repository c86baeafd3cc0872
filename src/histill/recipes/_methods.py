"""The methods of distillation that `histill.recipes.methods` compares: each an objective with its published weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from histill.accelerator import sent
from histill.files import digest
from histill.losses import (
    AB,
    SSKD,
    VID,
    CRDMemory,
    ReviewKD,
    attention_transfer,
    correlation,
    crd,
    cross_entropy,
    dist,
    dkd,
    hint,
    kd,
    nkd,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity,
)
from histill.losses._shared import same_size
from histill.teachers import Keyed
from histill.types import Batch, Objective, Outputs, Terms

__all__ = ["METHODS", "Pair", "Turning", "labels_alone", "lacks", "shown_turned"]


@dataclass(frozen=True)
class Pair:
    """What a method may know before training.

    Attributes:
        student: what the student's network says of a blank image, for its names and shapes.
        teacher: what the teacher says of it.
        images: makes the row numbers ``(M,)`` of the training images, and their labels ``(M,)``.
        rise: steps over which a weight rises.
    """

    student: Outputs
    teacher: Outputs
    images: Callable[[], tuple[Tensor, Tensor]]
    rise: int

    @property
    def stages(self) -> list[tuple[str, str]]:
        """The feature maps of both that are compared, shallow to deep: of the last four sizes that both have."""
        ours, theirs = _maps(self.student), _maps(self.teacher)
        count = min(4, len(ours), len(theirs))
        return list(zip(ours[len(ours) - count :], theirs[len(theirs) - count :], strict=True))

    @property
    def channels(self) -> list[tuple[int, int]]:
        """Of each of the stages."""
        return [(self.student[s].shape[1], self.teacher[t].shape[1]) for s, t in self.stages]

    @property
    def widths(self) -> tuple[int, int]:
        """Of the pooled features."""
        return self.student["pooled"].shape[1], self.teacher["pooled"].shape[1]


def _maps(outputs: Outputs) -> list[str]:
    """A network's feature maps by name, the last of each size."""
    found = {tuple(outputs[n].shape[2:]): n for n in outputs if re.fullmatch(r"(stage|layer|conv)\d+", n)}
    return list(found.values())


# Labels and logits


def labels_alone(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """``CE``."""
    return {"hard": (1.0, cross_entropy(student["logits"], batch.labels))}


def plain_kd(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """``0.1 CE + 0.9 KD``, T = 4."""
    return {
        "hard": (0.1, cross_entropy(student["logits"], batch.labels)),
        "soft": (0.9, kd(student["logits"], teacher["logits"], temperature=4)),
    }


def standardized_kd(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """``0.1 CE + 9 KD`` of z-scored logits, T = 2 (Sun et al. 2024)."""
    return {
        "hard": (0.1, cross_entropy(student["logits"], batch.labels)),
        "soft": (9.0, kd(student["logits"], teacher["logits"], temperature=2, standardize=True)),
    }


def decoupled(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """``CE + DKD``, alpha = 1, beta = 8, T = 4 (Zhao et al. 2022)."""
    soft = dkd(student["logits"], teacher["logits"], batch.labels, alpha=1, beta=8, temperature=4)
    return {**labels_alone(student, teacher, batch), "decoupled": (1.0, soft)}


def relations_of_logits(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """``CE + DIST``, beta = gamma = 2, T = 4 (Huang et al. 2022)."""
    soft = dist(student["logits"], teacher["logits"], beta=2, gamma=2, temperature=4)
    return {**labels_alone(student, teacher, batch), "dist": (1.0, soft)}


def normalized(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """``CE + NKD``, gamma = 1.5, T = 1 (Yang et al. 2023)."""
    soft = nkd(student["logits"], teacher["logits"], batch.labels, gamma=1.5, temperature=1)
    return {**labels_alone(student, teacher, batch), "normalized": (1.0, soft)}


# Feature maps


class FitNet(nn.Module):
    """``CE + 100 |r(f_s) - f_t|^2`` at the middle stage, r a 1x1 convolution with batch norm."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        middle = len(pair.stages) // 2
        self.stage = pair.stages[middle]
        ours, theirs = pair.channels[middle]
        self.regress = nn.Sequential(nn.Conv2d(ours, theirs, 1), nn.BatchNorm2d(theirs))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        f_s, f_t = same_size(student[self.stage[0]], teacher[self.stage[1]])
        return {**labels_alone(student, teacher, batch), "hint": (100.0, hint(self.regress(f_s), f_t))}


def attention(student: Outputs, teacher: Outputs, batch: Batch, *, stages: list[tuple[str, str]]) -> Terms:
    """``CE + 1000 AT``, the sum over the stages."""
    loss = sum(attention_transfer(student[s], teacher[t]) for s, t in stages)
    return {**labels_alone(student, teacher, batch), "attention": (1000.0, torch.as_tensor(loss))}


class Variational(nn.Module):
    """``CE + VID``, the sum over the stages."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.stages = pair.stages
        self.losses = nn.ModuleList(VID(ours, theirs) for ours, theirs in pair.channels)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        each = [loss(student[s], teacher[t]) for loss, (s, t) in zip(self.losses, self.stages, strict=True)]
        return {**labels_alone(student, teacher, batch), "variational": (1.0, torch.stack(each).sum())}


class Review(nn.Module):
    """``CE + 5 ReviewKD``, the pooled features being the last stage (Chen et al. 2021)."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.stages = pair.stages
        ours, theirs = zip(*pair.channels, pair.widths, strict=True)
        self.loss = ReviewKD(ours, theirs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        f_s = [*(student[s] for s, _ in self.stages), student["pooled"][:, :, None, None]]
        f_t = [*(teacher[t] for _, t in self.stages), teacher["pooled"][:, :, None, None]]
        return {**labels_alone(student, teacher, batch), "review": (5.0, self.loss(f_s, f_t))}


class Boundaries(nn.Module):
    """``sum_stages 2^-k AB``, k stages above the last, AB summed over an image's elements times 3/1000; no labels.

    The teacher's sign is the same before its ReLU and after it (0 counts as not firing); the student's connection
    looks at its features after the ReLU, which is where networks give them out. The paper has it before.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.stages = pair.stages
        self.losses = nn.ModuleList(AB(ours, theirs) for ours, theirs in pair.channels)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        terms = {}
        for above, (loss, (s, t)) in enumerate(zip(reversed(self.losses), reversed(self.stages), strict=True)):
            f_s, f_t = same_size(student[s], teacher[t])
            terms[s] = (0.003 * 0.5**above * f_t[0].numel(), loss(f_s, f_t))
        return terms


# Relations between the images of a batch


def distances_and_angles(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """``CE + 25 RKD-D + 50 RKD-A`` of the pooled features."""
    f_s, f_t = student["pooled"], teacher["pooled"]
    relations = {"distance": (25.0, rkd_distance(f_s, f_t)), "angle": (50.0, rkd_angle(f_s, f_t))}
    return {**labels_alone(student, teacher, batch), **relations}


def affinities(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """``CE + 30000 PKT`` of the pooled features."""
    return {**labels_alone(student, teacher, batch), "pkt": (30000.0, pkt(student["pooled"], teacher["pooled"]))}


def similarities(student: Outputs, teacher: Outputs, batch: Batch, *, stages: list[tuple[str, str]]) -> Terms:
    """``CE + 3000 SP`` of the last feature maps."""
    s, t = stages[-1]
    return {**labels_alone(student, teacher, batch), "similarity": (3000.0, similarity(student[s], teacher[t]))}


def congruence(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """``CE + 0.02 CC`` of the pooled features."""
    loss = correlation(student["pooled"], teacher["pooled"])
    return {**labels_alone(student, teacher, batch), "correlation": (0.02, loss)}


# Contrasts


class Contrast(nn.Module):
    """``CE + 0.8 CRD`` within the batch, the student's pooled features carried to the teacher's width."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.embed = nn.Linear(*pair.widths)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        return {
            **labels_alone(student, teacher, batch),
            "contrast": (0.8, crd(self.embed(student["pooled"]), teacher["pooled"])),
        }


class ContrastMemory(nn.Module):
    """``CE + 0.8 CRD`` with memory banks of the training images; 16384 negatives, or as many as there are images."""

    place: Tensor

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        rows, labels = pair.images()
        place = torch.zeros(int(rows.max()) + 1, dtype=torch.long)  # row of the table -> row of the banks
        place[rows] = torch.arange(len(rows))
        self.register_buffer("place", place, persistent=False)
        self.loss = CRDMemory(*pair.widths, len(rows), labels=labels, negatives=min(16384, len(rows)))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        index = self.place[sent(batch.ids, self.place.device)]
        loss = self.loss(student["pooled"], teacher["pooled"], index)
        return {**labels_alone(student, teacher, batch), "contrast": (0.8, loss)}


class SelfSupervised(nn.Module):
    """``0.1 CE + 0.9 KD + 2.7 KD of turned images + 10 SSKD`` on four rotations (Xu et al. 2020), and the pretext task.

    The paper trains the teacher's head on the pretext task before; here it learns beside, on the frozen features,
    while the weight of 10 rises.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.loss = SSKD(*pair.widths)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        plain, *turned = student["logits"].chunk(4)
        f_s = torch.stack(student["pooled"].chunk(4))  # (4, B, D)
        f_t = torch.cat([teacher["pooled"][None], teacher["turned_pooled"].transpose(0, 1)])
        told = teacher["turned_logits"].transpose(0, 1).flatten(0, 1)  # (3 B, C)
        return {
            "hard": (0.1, cross_entropy(plain, batch.labels)),
            "soft": (0.9, kd(plain, teacher["logits"], temperature=4)),
            "turned": (2.7, kd(torch.cat(turned), told, temperature=4)),
            "self": (10.0, self.loss(f_s, f_t)),
            "pretext": (1.0, self.loss.pretext(f_t)),
        }


def rotations(images: Tensor) -> Tensor:
    """``(B, 3, S, S) -> (4 B, 3, S, S)``: all images as they are, then turned by 90, 180 and 270 degrees."""
    return torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])


def shown_turned(batch: Batch, teacher: Outputs) -> Tensor:
    """What an SSKD student is shown."""
    return rotations(batch.images)


class Turning:
    """A teacher that is also asked about the turned images: ``turned_logits`` and ``turned_pooled`` (B, 3, ...)."""

    def __init__(self, teacher: Keyed) -> None:
        self.teacher, self.key = teacher, digest(["turning", teacher.key])
        self.path = getattr(teacher, "path", None)

    def __call__(self, batch: Batch) -> Outputs:
        labels, ids, views = (numbers.repeat(4) for numbers in (batch.labels, batch.ids, batch.views))
        said = self.teacher(Batch(rotations(batch.images), labels, ids, views, lambda size: rotations(batch.at(size))))
        outputs = Outputs()
        for name in ("logits", "pooled"):
            outputs[name], *turned = said[name].chunk(4)
            outputs[f"turned_{name}"] = torch.stack(turned, 1)
        return outputs


# The table of methods


class Rising(nn.Module):
    """An objective whose term ``term`` grows from no weight to its own over the first ``rise`` steps.

    Attributes:
        step: how many were done; the loop says so.
    """

    def __init__(self, objective: Objective, term: str, rise: int) -> None:
        super().__init__()
        self.objective, self.term, self.rise, self.step = objective, term, rise, 0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        terms = dict(self.objective(student, teacher, batch))
        weight, loss = terms[self.term]
        terms[self.term] = (weight * self.risen(), loss)
        return terms

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def risen(self) -> float:
        """The share of the weight. Not compiled: that would be done anew for every step."""
        return min(1.0, self.step / self.rise)


@dataclass(frozen=True)
class Method:
    """How an objective is made for a pair of networks, and what it needs of both beside logits."""

    make: Callable[[Pair], Objective]
    needs: tuple[Literal["pooled", "maps"], ...] = ()


METHODS: dict[str, Method] = {
    "ce": Method(lambda pair: labels_alone),
    "kd": Method(lambda pair: plain_kd),
    "kd-standardized": Method(lambda pair: standardized_kd),
    "dkd": Method(lambda pair: Rising(decoupled, "decoupled", pair.rise)),
    "dist": Method(lambda pair: relations_of_logits),
    "nkd": Method(lambda pair: normalized),
    "fitnet": Method(FitNet, ("maps",)),
    "at": Method(lambda pair: partial(attention, stages=pair.stages), ("maps",)),
    "vid": Method(Variational, ("maps",)),
    "ab": Method(Boundaries, ("maps",)),
    "review": Method(lambda pair: Rising(Review(pair), "review", pair.rise), ("maps", "pooled")),
    "rkd": Method(lambda pair: distances_and_angles, ("pooled",)),
    "pkt": Method(lambda pair: affinities, ("pooled",)),
    "sp": Method(lambda pair: partial(similarities, stages=pair.stages), ("maps",)),
    "cc": Method(lambda pair: congruence, ("pooled",)),
    "crd": Method(Contrast, ("pooled",)),
    "crd-memory": Method(ContrastMemory, ("pooled",)),
    "sskd": Method(lambda pair: Rising(SelfSupervised(pair), "self", pair.rise), ("pooled",)),
}
"""By family: labels, logits, feature maps, relations, contrasts. ``ab`` is a phase of its own, before ``ce``."""


def lacks(method: str, pair: Pair) -> str:
    """What a method needs that the two networks do not give, in words; empty where they do."""
    for needed, found in (("pooled", lambda outputs: "pooled" in outputs), ("maps", _maps)):
        for whose, outputs in (("student", pair.student), ("teacher", pair.teacher)):
            if needed in METHODS[method].needs and not found(outputs):
                what = {"pooled": "pooled features", "maps": "feature maps"}[needed]
                return f"it compares {what}, and the {whose} gives only {', '.join(outputs)}"
    return ""
