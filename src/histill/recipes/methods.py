"""Methods of distillation side by side: each with its published weights, on one schedule and the same views.

The settings are those of the benchmark of Tian et al. 2020 ("Contrastive representation distillation", ICLR) where a
method is in it, else its own paper's for CIFAR-100; ``docs/recipes/methods.md`` has them with their sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from histill.data.images import Images
from histill.data.packed import pack
from histill.data.views import NONE, Augment
from histill.errors import BadInput
from histill.experiment import Experiment, recipe
from histill.models import Cifar, Timm
from histill.models.cifar import CIFAR_NETWORKS
from histill.progress import notice
from histill.recipes._methods import METHODS, Pair, Turning, labels_alone, lacks, shown_turned
from histill.recipes._start import blank, start
from histill.recipes.dsnet import DERMOSCOPY
from histill.run import Run, without_weights
from histill.schedules import Schedule, constant, steps, warm_cosine
from histill.teachers import Keyed, as_teacher
from histill.types import Outputs

__all__ = ["METHODS", "pretrain", "student", "teacher", "unfit"]

CIFAR = Augment(hflip=True, vflip=False, shift=4 / 32)
"""A crop after padding by 4 of 32 pixels, and a flip; here by parts of a pixel too, and mirrored at the border."""

ONE_AND_MINUS_ONE = (
    "of two classes z-scored logits are 1 and -1 whatever the teacher knows; the student learns from the labels "
    "alone, at a tenth of their weight"
)

Augments = Literal["tissue", "cifar", "none"]
Schedules = Literal["cosine", "steps"]
RISE = 1 / 12
"""Share of the run over which a weight rises where it does: 20 of 240 epochs."""


@recipe
def teacher(
    data: Images,
    *,
    network: str = "resnet50",
    weights: str = "auto",
    image_size: int = 224,
    epochs: int = 60,
    batch_size: int = 64,
    lr: float = 0.05,
    schedule: Schedules = "cosine",
    augment: Augments = "tissue",
    select: str = "balanced_accuracy",
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """The teacher: a large network with cross-entropy, a new view in every epoch.

    Args:
        data: the images and their splits.
        network: a network of CIFAR-100's benchmark (resnet32x4, wrn_40_2, resnet152_cifar, ...), or any timm name.
        weights: imagenet, a .safetensors or .pt file, a run, none, or auto: ImageNet where it can be had, else none,
            said aloud.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of SGD with momentum 0.9 and weight decay 5e-4; less for ImageNet weights.
        schedule: cosine with one epoch of warm-up, or steps: a tenth at 5/8, 3/4 and 7/8 of the epochs.
        augment: tissue (flips, rotation, zoom, shift, light and colour), cifar (shift and a flip) or none.
        select: the validation figure whose best epoch is kept, or last.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    return Experiment(
        data=data,
        student=_network(network, data, weights),
        objective=labels_alone,
        image_size=image_size,
        epochs=epochs,
        batch_size=batch_size,
        select=select,
        positive=positive,
        strict=strict,
        seed=seed,
        **_training(epochs, lr, schedule, augment),
    )


@recipe
def student(
    data: Images,
    teacher: Run | Keyed | None = None,
    *,
    method: str = "kd",
    network: str = "resnet18",
    weights: str = "auto",
    image_size: int = 224,
    epochs: int = 60,
    batch_size: int = 64,
    lr: float = 0.05,
    schedule: Schedules = "cosine",
    augment: Augments = "tissue",
    views: int | None = 16,
    select: str = "balanced_accuracy",
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """A student by one method; the methods differ in their objective and in nothing else.

    The teacher's logits and pooled features are kept per view, so that every method and student that needs no more
    reads what the first one asked; feature maps are too large to keep and asked for in every step.

    Args:
        data: the images and their splits.
        teacher: the teacher's run; without it, and with the method ce, the student learns from the labels.
        method: ce, kd, kd-standardized, dkd, dist, nkd, fitnet, at, vid, review, rkd, pkt, sp, cc, crd, crd-memory,
            sskd; for AB run methods.pretrain and start ce from it (--weights RUN).
        network: a network of CIFAR-100's benchmark (resnet8x4, wrn_16_2, resnet18_cifar, ...), or any timm name.
        weights: as for the teacher.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of SGD with momentum 0.9 and weight decay 5e-4; less for ImageNet weights.
        schedule: cosine with one epoch of warm-up, or steps: a tenth at 5/8, 3/4 and 7/8 of the epochs.
        augment: tissue (flips, rotation, zoom, shift, light and colour), cifar (shift and a flip) or none.
        views: distinct views per image (none: a new view in every epoch).
        select: the validation figure whose best epoch is kept, or last.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.

    Raises:
        BadInput: an unknown method, or one that needs what the networks do not give.
    """
    if method not in METHODS:
        raise BadInput(f"--method {method}: one of {', '.join(METHODS)}")
    if method == "ab":
        raise BadInput("--method ab is a phase of its own: run methods.pretrain, then --method ce --weights ITS_RUN")
    made = _network(network, data, weights)
    chosen: dict[str, Any] = {"objective": labels_alone}
    if teacher is not None and method != "ce":
        taught = as_teacher(teacher, data.classes)
        pair = _pair(data, made, taught, image_size, epochs, batch_size, strict)
        if lacking := lacks(method, pair):
            raise BadInput(f"--method {method}: {lacking}")
        if method == "kd-standardized" and len(data.classes) == 2:
            notice(f"--method {method}: {ONE_AND_MINUS_ONE}")
        kept: tuple[str, ...] = ("logits", "pooled") if "pooled" in pair.teacher else ("logits",)
        chosen = {"teacher": taught, "objective": METHODS[method].make(pair), "cache_outputs": kept}
        chosen["cache"] = "maps" not in METHODS[method].needs
        if method == "sskd":
            chosen |= {"teacher": Turning(taught), "inputs": shown_turned}
            chosen["cache_outputs"] = (*kept, "turned_logits", "turned_pooled")
    return Experiment(
        data=data,
        student=made,
        image_size=image_size,
        views=views,
        epochs=epochs,
        batch_size=batch_size,
        select=select,
        positive=positive,
        strict=strict,
        seed=seed,
        **chosen,
        **_training(epochs, lr, schedule, augment),
    )


@recipe
def pretrain(
    data: Images,
    teacher: Run | Keyed,
    *,
    network: str = "resnet18",
    weights: str = "auto",
    image_size: int = 224,
    epochs: int = 8,
    batch_size: int = 64,
    lr: float = 0.05,
    augment: Augments = "tissue",
    views: int | None = 16,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """AB's first phase: the student's trunk learns which of the teacher's neurons fire; labels come after.

    The classifier is not trained: the figures of this run mean nothing. Go on with methods.student --method ce
    --weights RUN.

    Args:
        data: the images and their splits.
        teacher: the teacher's run.
        network: as for the student.
        weights: as for the teacher.
        image_size: height and width in pixels.
        epochs: passes over the training images; in the benchmark an eighth of the second phase's.
        batch_size: images per step.
        lr: learning rate of SGD, constant.
        augment: as for the student.
        views: as for the student.
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    made = _network(network, data, weights)
    taught = as_teacher(teacher, data.classes)
    pair = _pair(data, made, taught, image_size, epochs, batch_size, strict)
    if lacking := lacks("ab", pair):
        raise BadInput(f"methods.pretrain: {lacking}")
    return Experiment(
        data=data,
        student=made,
        objective=METHODS["ab"].make(pair),
        teacher=taught,
        cache=False,
        image_size=image_size,
        views=views,
        epochs=epochs,
        batch_size=batch_size,
        select="last",
        strict=strict,
        seed=seed,
        **_training(epochs, lr, "cosine", augment) | {"schedule": constant()},
    )


def unfit(data: Images, teacher: Keyed, *, network: str, image_size: int) -> dict[str, str]:
    """The methods that this student and this teacher do not allow, and why."""
    pair = _pair(data, _network(network, data, "none"), teacher, image_size, 1, 1, False)
    return {method: why for method in METHODS if (why := lacks(method, pair))}


def _pair(
    data: Images, student: partial[nn.Module], teacher: Keyed, size: int, epochs: int, batch_size: int, strict: bool
) -> Pair:
    def training_images() -> tuple[Tensor, Tensor]:
        packed = pack(data, size, strict=strict)
        rows = torch.tensor(packed.images.rows("train"))
        return rows, packed.labels[rows]

    one = blank(size)
    network = without_weights(student)().eval()
    with torch.no_grad():
        ours, theirs = Outputs(network(one.images)), teacher(one)
    epoch = math.ceil(len(data.rows("train")) / batch_size)
    return Pair(ours, theirs, training_images, max(1, round(RISE * epochs * epoch)))


def _network(name: str, data: Images, weights: str) -> partial[nn.Module]:
    classes = len(data.classes)
    if name not in CIFAR_NETWORKS:
        make: Callable[..., nn.Module] = Timm
        return start(partial(make, name=name, classes=classes), weights)
    if weights == "imagenet":
        raise BadInput(f"--weights imagenet: there are none for {name}; give a file, a run or none")
    small: Callable[..., nn.Module] = Cifar
    return partial(small, name=name, classes=classes, weights=None if weights in ("auto", "none") else weights)


def _training(epochs: int, lr: float, schedule: Schedules, augment: Augments) -> dict[str, Any]:
    falling = steps([epochs * part for part in (5 / 8, 3 / 4, 7 / 8)])
    chosen: Schedule = falling if schedule == "steps" else warm_cosine(epochs)
    return {
        "optimizer": partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4),
        "schedule": chosen,
        "augment": {"tissue": DERMOSCOPY, "cifar": CIFAR, "none": NONE}[augment],
    }
