"""DSNet: melanoma on a student of 0.27 M parameters.

Khan et al., "Knowledge distillation approach towards melanoma detection", Computers in Biology and Medicine 146
(2022) 105581. A ResNet-50 teacher, the three-convolution student DSNet, and distillation at a high temperature.

The paper's figure is 91.7 % accuracy on 3,000 ISIC images. Its published notebooks reach it with soft targets that
are nearly zero and a warm start (see ``docs/recipes/dsnet.md``), and have no validation split; here the logits are
logits, the softmax is by row, and every choice is made on validation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from histill.data.images import Images
from histill.data.views import NONE, Augment
from histill.errors import BadInput
from histill.experiment import Experiment, recipe
from histill.losses import cross_entropy, soft_cross_entropy
from histill.models import DSNet, KerasHead, StrideNet, Timm
from histill.recipes._start import start
from histill.run import Run
from histill.schedules import Schedule, constant, warm_cosine
from histill.teachers import Keyed, as_teacher
from histill.types import Batch, Objective, Outputs, Terms

__all__ = ["student", "teacher"]

KERAS = ("resnet50", "resnet101", "vgg16", "inception_v3", "efficientnet_b0", "mobilenet_v1")
"""The ImageNet networks of the paper, with its head; any other name is a timm network."""

DERMOSCOPY = Augment(
    hflip=True, vflip=True, rotate=180, zoom=0.15, shift=0.05, brightness=0.15, contrast=0.15, saturation=0.15, hue=0.04
)
"""A lesion has no up; lamps and cameras differ. The paper augments nothing, ``augment="none"``."""

Schedules = Literal["cosine", "constant"]
Augments = Literal["dermoscopy", "none"]


def hard(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """Cross-entropy with the labels, for the teacher and for the student alone."""
    return {"hard": (1.0, cross_entropy(student["logits"], batch.labels))}


def distilled(
    student: Outputs, teacher: Outputs, batch: Batch, *, alpha: float, temperature: float, t_squared: bool = False
) -> Terms:
    """Eq. 5: ``L = alpha CE(y, p_s) + (1 - alpha) CE(p_t^T, p_s^T)``, without T squared, as printed."""
    soft = soft_cross_entropy(student["logits"], teacher["logits"], temperature=temperature)
    return {
        "hard": (alpha, cross_entropy(student["logits"], batch.labels)),
        "soft": ((1 - alpha) * (temperature**2 if t_squared else 1), soft),
    }


def notebook(
    student: Outputs, teacher: Outputs, batch: Batch, *, alpha: float, temperature: float, images: int
) -> Terms:
    """What the published notebooks compute in place of Eq. 5; for comparison only.

    Both "logits" are softmax outputs, in both terms: the student's answer lies between .269 and .731 however sure it
    is. The teacher's softmax is divided by the sum over the whole training array of ``images`` rows (estimated here
    from the batch), so that its targets are about 1 / (2 images) and teach nothing.
    """
    taken = student["logits"].softmax(1)
    raised = (teacher["logits"].softmax(1) / temperature).exp()
    target = raised / (raised.sum(1).mean() * images)
    log_p = (taken / temperature).log_softmax(1)
    return {
        "hard": (alpha, cross_entropy(taken, batch.labels)),
        "soft": (1 - alpha, -(target * log_p).sum(1).mean()),
    }


@recipe
def teacher(
    data: Images,
    *,
    network: str = "resnet50",
    weights: str = "auto",
    image_size: int = 224,
    epochs: int = 30,
    batch_size: int = 64,
    lr: float = 1e-4,
    schedule: Schedules = "cosine",
    augment: Augments = "dermoscopy",
    patience: int | None = None,
    ema: float | None = None,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """The teacher: a large network fine-tuned with cross-entropy (paper: Keras ResNet-50, Adam 1e-4, 10 epochs).

    Args:
        data: the images and their splits.
        network: resnet50 (as in the paper), resnet101, vgg16, inception_v3, efficientnet_b0, mobilenet_v1, or
            any timm name.
        weights: imagenet, a .safetensors or .pt file, none, or auto: ImageNet where it can be had, else none, said
            aloud.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of Adam.
        schedule: cosine with one epoch of warm-up, or constant as in the paper.
        augment: dermoscopy (flips, rotation, zoom, shift, light and colour) or none as in the paper.
        patience: stop after so many epochs without a better validation figure.
        ema: decay of a moving average of the weights, which is then what is kept.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    return Experiment(
        data=data,
        student=_network(network, data, image_size, weights),
        objective=hard,
        image_size=image_size,
        augment=_augment(augment),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(torch.optim.Adam, lr=lr),
        schedule=_schedule(schedule, epochs),
        patience=patience,
        ema=ema,
        positive=positive,
        strict=strict,
        seed=seed,
    )


@recipe
def student(
    data: Images,
    teacher: Run | Keyed | None = None,
    *,
    network: str = "dsnet",
    weights: str = "auto",
    unlabelled: Images | None = None,
    image_size: int = 224,
    epochs: int = 60,
    batch_size: int = 64,
    lr: float = 1e-3,
    schedule: Schedules = "cosine",
    augment: Augments = "dermoscopy",
    views: int | None = 16,
    temperature: float = 10.0,
    alpha: float = 0.1,
    t_squared: bool = False,
    compat: Literal["none", "notebook"] = "none",
    patience: int | None = None,
    ema: float | None = None,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """The student: DSNet, distilled where there is a teacher, else alone (paper: Adam 1e-3, batch 64, T 10, alpha 0.1).

    Args:
        data: the images and their splits.
        teacher: the teacher's run; without it the student learns alone.
        network: dsnet, stridenet (ours: fewer parameters, many times faster), one of the paper's other students (see
            the teacher's network), or any timm name.
        weights: as for the teacher; dsnet and stridenet have no ImageNet weights.
        unlabelled: a folder of further images, which join with the teacher's word only.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of Adam.
        schedule: cosine with one epoch of warm-up, or constant as in the paper.
        augment: dermoscopy (flips, rotation, zoom, shift, light and colour) or none as in the paper.
        views: distinct views per image; the teacher is asked once for each (none: a new view in every epoch).
        temperature: T of Eq. 5.
        alpha: weight of the labels; the teacher has 1 - alpha.
        t_squared: multiply the soft term by T squared, as Hinton et al. do and the paper does not.
        compat: notebook repeats what the published notebooks compute; for comparison only.
        patience: stop after so many epochs without a better validation figure.
        ema: decay of a moving average of the weights, which is then what is kept.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    if not 0 <= alpha <= 1:
        raise BadInput(f"--alpha {alpha}: between 0 and 1")
    if temperature <= 0:
        raise BadInput(f"--temperature {temperature}: above 0")
    if teacher is None:
        objective: Objective = hard
    elif compat == "notebook":
        objective = partial(notebook, alpha=alpha, temperature=temperature, images=len(data.rows("train")))
    else:
        objective = partial(distilled, alpha=alpha, temperature=temperature, t_squared=t_squared)
    optimizer: Any = partial(torch.optim.Adam, lr=lr)
    if compat == "notebook":
        optimizer = partial(torch.optim.Adadelta, lr=1.0, rho=0.95, eps=1e-7)
    return Experiment(
        data=data,
        student=_network(network, data, image_size, weights),
        objective=objective,
        teacher=None if teacher is None else as_teacher(teacher, data.classes),
        unlabelled=None if teacher is None else unlabelled,  # without a teacher such an image teaches nothing
        image_size=image_size,
        augment=_augment(augment),
        views=views,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=_schedule(schedule, epochs),
        patience=patience,
        ema=ema,
        positive=positive,
        strict=strict,
        seed=seed,
    )


def _network(name: str, data: Images, image_size: int, weights: str) -> partial[nn.Module]:
    classes = len(data.classes)
    if name == "dsnet":
        if weights not in ("auto", "none"):
            raise BadInput(f"--weights {weights}: there are no weights for dsnet to start from; leave it out")
        dsnet: Callable[..., nn.Module] = DSNet
        return partial(dsnet, classes=classes, image_size=image_size)
    if name.lower() == "stridenet":
        ours: Callable[..., nn.Module] = StrideNet
        return start(partial(ours, classes=classes), "none" if weights == "auto" else weights)
    make: Callable[..., nn.Module] = KerasHead if name in KERAS else Timm
    return start(partial(make, name=name, classes=classes), weights)


def _augment(name: Augments) -> Augment:
    return DERMOSCOPY if name == "dermoscopy" else NONE


def _schedule(name: Schedules, epochs: int) -> Schedule:
    return constant() if name == "constant" else warm_cosine(epochs)
