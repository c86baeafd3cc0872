"""Multi-exit student: cervical cells by transfer, distillation at every exit and self-distillation from the deepest.

A ResNet-18 with four exits (12.33 M parameters) learns from a ResNeSt-50 that was fine-tuned on the cells, and its
deepest exit teaches the others in logits and features. The answer is the mean of the exits' probabilities; an image may
also leave at the first exit that is sure enough (`histill.evaluate.early_exit`).

The paper's figure is 98.52 % accuracy on SIPaKMeD (4,049 cells, 5 classes). What it leaves open, and how it is settled
here, is in ``docs/recipes/multi-exit.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from histill.data.images import Images
from histill.data.views import NONE, Augment
from histill.errors import BadInput
from histill.experiment import Experiment, recipe
from histill.losses import be_your_own_teacher, cross_entropy, kd, self_distillation
from histill.models import SCAN, MSDNet, MultiExitResNet18, ResNet18, Timm
from histill.recipes._start import start
from histill.run import Run
from histill.schedules import Schedule, cosine, steps, warmup
from histill.teachers import Keyed, as_teacher
from histill.types import Batch, Objective, Outputs, Terms

__all__ = ["pretrain", "student", "teacher"]

CELLS = Augment(hflip=True, vflip=True, rotate=180, zoom=0.25, shift=0.1)
"""The paper's random resized crop, mirrorings and rotation; it gives no strengths."""

EPOCHS, MILESTONES = 180, (100, 150)
"""The paper's schedule: a tenth of the learning rate at each milestone, which move with ``epochs``."""

WARM_UP = 36
"""The first epoch of so many rises to the learning rate, 5 of 180; the paper has none."""

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "multi-exit": MultiExitResNet18,
    "scan": SCAN,
    "msdnet": MSDNet,
    "resnet18": ResNet18,
}
"""The networks of the paper's tables; any other name is a timm network. All but the last have exits."""

Stems = Literal["imagenet", "cifar"]
Schedules = Literal["steps", "cosine"]
Augments = Literal["cells", "none"]
Methods = Literal["self-distillation", "scan", "none"]


def labels(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """``sum_m CE(S_m, y)``: the baseline with exits, pretraining, and the teacher, whose one exit is its logits."""
    return {"ce": (1.0, torch.stack([cross_entropy(s, batch.labels) for s in exits_of(student)]).sum())}


def one_exit(student: Outputs, teacher: Outputs, batch: Batch, *, temperature: float) -> Terms:
    """``CE(S, y) + T^2 KL(t || S)``: a network without exits, distilled (Eqs. 1 to 3)."""
    return {
        "ce": (1.0, cross_entropy(student["logits"], batch.labels)),
        "kd": (1.0, kd(student["logits"], teacher["logits"], temperature=temperature)),
    }


def multi_exit(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    method: Methods,
    temperature: float,
    feature_weight: float,
    deep_ce: Literal["paper", "once"],
    reverse: bool,
) -> Terms:
    """Eq. 6, ``L = sum_{m=1..n} KD_m + SD_m`` over the exits, n the deepest, t the teacher.

    Eq. 4: ``KD_m = T^2 KL(t || S_m) + CE(S_m, y) + CE(S_n, y)``; without a teacher ``KD_m = CE(S_m, y)``.
    Eq. 5: ``SD_m = T^2 KL(S_n || S_m) + lambda |F_m - F_n|^2``, with S_n and F_n constant; left out by method "none".
    Method "scan" is Zhang et al.'s own loss in place of Eqs. 4 and 5, and a teacher's KL beside it.
    """
    exits = exits_of(student)
    features = [student[f"exit{m}_features"] for m in range(1, len(exits) + 1)]
    t = teacher["logits"] if teacher else None
    if method == "scan":
        said = be_your_own_teacher(
            exits, features, batch.labels, alpha=0.5, temperature=temperature, feature_weight=feature_weight
        )
        heard = (
            {} if t is None else {"kd": (1.0, torch.stack([kd(s, t, temperature=temperature) for s in exits]).sum())}
        )
        return {**said, **heard}
    terms = self_distillation(
        exits,
        features,
        batch.labels,
        teacher=t,
        temperature=temperature,
        feature_weight=feature_weight,
        deep_ce=deep_ce,
        reverse=reverse,
    )
    dropped = ("self", "feature") if method == "none" else ()
    return {name: term for name, term in terms.items() if name not in dropped}


def exits_of(outputs: Outputs) -> list[Tensor]:
    """The logits of the exits, shallow to deep; of a network without exits its own."""
    names = sorted((n for n in outputs if n.startswith("exit") and n[4:].isdigit()), key=lambda n: int(n[4:]))
    return [outputs[n] for n in names] or [outputs["logits"]]


@recipe
def teacher(
    data: Images,
    *,
    network: str = "resnest50d",
    weights: str = "auto",
    image_size: int = 224,
    epochs: int = EPOCHS,
    batch_size: int = 128,
    lr: float = 1e-2,
    schedule: Schedules = "steps",
    augment: Augments = "cells",
    patience: int | None = None,
    ema: float | None = None,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """The teacher: a large network fine-tuned with cross-entropy (paper: ResNeSt-50; ResNeXt-101 in its Table 5).

    Args:
        data: the images and their splits.
        network: any timm name.
        weights: imagenet, a .safetensors or .pt file, a run's folder (of other classes, too), none, or auto: ImageNet
            where it can be had, else none, said aloud.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of SGD.
        schedule: steps as in the paper (a tenth at 5/9 and 5/6 of the epochs) or cosine, after a short warm-up.
        augment: cells (mirrorings, rotation, zoom and shift) or none.
        patience: stop after so many epochs without a better validation figure.
        ema: decay of a moving average of the weights, which is then what is kept.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    large: Callable[..., nn.Module] = Timm
    return Experiment(
        data=data,
        student=start(partial(large, name=network, classes=len(data.classes)), weights),
        objective=labels,
        image_size=image_size,
        patience=patience,
        ema=ema,
        positive=positive,
        strict=strict,
        seed=seed,
        **_training(epochs, batch_size, lr, schedule, augment),
    )


@recipe
def pretrain(
    data: Images,
    *,
    network: str = "multi-exit",
    stem: Stems = "imagenet",
    attention: bool = True,
    fusion: Literal["add", "mul"] = "add",
    weights: str = "auto",
    image_size: int = 224,
    epochs: int = EPOCHS,
    batch_size: int = 128,
    lr: float = 0.1,
    schedule: Schedules = "steps",
    augment: Augments = "cells",
    patience: int | None = None,
    ema: float | None = None,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """Transfer learning: the same network on another data set first, the sum of its exits' cross-entropy.

    Its run is then the student's ``weights``, whatever the classes were.

    Args:
        data: the other data set and its splits.
        network: see the student's; for a teacher to start from, its timm name.
        stem: see the student's.
        attention: see the student's.
        fusion: see the student's.
        weights: what this network itself starts from; see the student's.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of SGD.
        schedule: steps as in the paper (a tenth at 5/9 and 5/6 of the epochs) or cosine, after a short warm-up.
        augment: cells (mirrorings, rotation, zoom and shift) or none.
        patience: stop after so many epochs without a better validation figure.
        ema: decay of a moving average of the weights, which is then what is kept.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    return Experiment(
        data=data,
        student=_network(network, len(data.classes), stem, attention, fusion, weights),
        objective=labels,
        image_size=image_size,
        patience=patience,
        ema=ema,
        positive=positive,
        strict=strict,
        seed=seed,
        **_training(epochs, batch_size, lr, schedule, augment),
    )


@recipe
def student(
    data: Images,
    teacher: Run | Keyed | None = None,
    *,
    network: str = "multi-exit",
    stem: Stems = "imagenet",
    attention: bool = True,
    fusion: Literal["add", "mul"] = "add",
    method: Methods = "self-distillation",
    weights: str = "auto",
    unlabelled: Images | None = None,
    image_size: int = 224,
    epochs: int = EPOCHS,
    batch_size: int = 128,
    lr: float = 0.1,
    schedule: Schedules = "steps",
    augment: Augments = "cells",
    views: int | None = 16,
    temperature: float = 3.0,
    feature_weight: float = 0.03,
    deep_ce: Literal["paper", "once"] = "paper",
    reverse: bool = False,
    patience: int | None = None,
    ema: float | None = None,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """The student: distilled at every exit where there is a teacher, and by its own deepest exit in any case.

    Alone it is the same network under the same objective without the teacher's terms, self-distillation kept: what
    the comparison shows is what the teacher adds. The paper's multi-exit baseline is ``method="none"`` without a
    teacher.

    Args:
        data: the images and their splits.
        teacher: the teacher's run; without it the student learns alone.
        network: multi-exit, scan or msdnet; resnet18 or any timm name, which have no exits and learn from labels and
            teacher alone.
        stem: imagenet (7x7 of stride 2 and a pool), or cifar (3x3) for images of 32 to 64 pixels.
        attention: SCAN's attention before the first three exits of multi-exit.
        fusion: how multi-exit's global context is fused: add as in GCNet, or mul as the paper's words have it.
        method: what the exits learn from the deepest: self-distillation (Eq. 5), scan (the loss of SCAN's authors), or
            none, the plain multi-exit baseline.
        weights: imagenet (the backbone's), a .safetensors or .pt file, a run's folder (such as that of
            multi-exit.pretrain, of other classes, too), none, or auto: ImageNet where it can be had, else none, said
            aloud. msdnet has no ImageNet weights.
        unlabelled: a folder of further images, which join with the teacher's word only.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of SGD.
        schedule: steps as in the paper (a tenth at 5/9 and 5/6 of the epochs) or cosine, after a short warm-up.
        augment: cells (mirrorings, rotation, zoom and shift) or none.
        views: distinct views per image; the teacher is asked once for each (none: a new view in every epoch).
        temperature: T of Eqs. 2 to 5.
        feature_weight: lambda of Eq. 5.
        deep_ce: paper counts the deepest exit's cross-entropy n + 1 times, as Eq. 4 is printed; once counts it once.
        reverse: KL(student || teacher), as Eq. 2 is printed.
        patience: stop after so many epochs without a better validation figure.
        ema: decay of a moving average of the weights, which is then what is kept.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    if temperature <= 0:
        raise BadInput(f"--temperature {temperature}: above 0")
    if feature_weight < 0:
        raise BadInput(f"--feature-weight {feature_weight}: 0 or more")
    exits = network in NETWORKS and network != "resnet18"
    if reverse and (not exits or method == "scan"):
        raise BadInput("--reverse goes with --network multi-exit, scan or msdnet, and not with --method scan")
    if exits:
        settings: dict[str, Any] = {"temperature": temperature, "feature_weight": feature_weight}
        objective: Objective = partial(multi_exit, method=method, deep_ce=deep_ce, reverse=reverse, **settings)
    else:
        objective = labels if teacher is None else partial(one_exit, temperature=temperature)
    return Experiment(
        data=data,
        student=_network(network, len(data.classes), stem, attention, fusion, weights),
        objective=objective,
        teacher=None if teacher is None else as_teacher(teacher, data.classes),
        unlabelled=None if teacher is None else unlabelled,  # without a teacher such an image teaches nothing
        image_size=image_size,
        views=views,
        patience=patience,
        ema=ema,
        positive=positive,
        strict=strict,
        seed=seed,
        **_training(epochs, batch_size, lr, schedule, augment),
    )


def _network(
    name: str, classes: int, stem: Stems, attention: bool, fusion: Literal["add", "mul"], weights: str
) -> partial[nn.Module]:
    if name != "multi-exit" and (not attention or fusion != "add"):
        raise BadInput(f"--attention and --fusion are parts of multi-exit, {name} does not have them; leave them out")
    if name == "multi-exit":
        return start(partial(NETWORKS[name], classes=classes, stem=stem, attention=attention, fusion=fusion), weights)
    if name == "msdnet" and weights == "auto":
        weights = "none"
    if name in NETWORKS:
        return start(partial(NETWORKS[name], classes=classes, stem=stem), weights)
    if stem == "cifar":
        raise BadInput(f"--stem cifar: {name} is timm's and has its own stem; leave it out, or take resnet18")
    timm: Callable[..., nn.Module] = Timm
    return start(partial(timm, name=name, classes=classes), weights)


def _training(epochs: int, batch_size: int, lr: float, schedule: Schedules, augment: Augments) -> dict[str, Any]:
    """What the paper gives for every training, SGD with momentum 0.9, weight decay 1e-4 and steps; and a warm-up.

    The sum over exits, with T squared, is some twenty times one cross-entropy: it diverges without a warm-up.
    """
    then: Schedule = steps([m * epochs / EPOCHS for m in MILESTONES]) if schedule == "steps" else cosine(epochs)
    return {
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=1e-4),
        "schedule": warmup(epochs / WARM_UP, then),
        "augment": CELLS if augment == "cells" else NONE,
    }
