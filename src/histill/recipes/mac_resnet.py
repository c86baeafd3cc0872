"""MAC-ResNet: eyelid tumours; a ResNet-50 learns from one with attention, and from where that one looks.

Huang et al., Journal of Personalized Medicine 13 (2023) 89. The teacher is ResNet-50 with four added blocks; it looks
at the patch and at the part of it that its attention points at (the AttentionPicture). The student is plain ResNet-50.

What the paper leaves open, and what was taken, is in ``docs/recipes/mac-resnet.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from histill.data.images import Images
from histill.data.views import NONE, Augment
from histill.errors import BadInput
from histill.experiment import Experiment, recipe
from histill.losses import cross_entropy, focal, kd
from histill.models import MACResNet, Timm, attention_crop
from histill.recipes._start import start
from histill.run import Run
from histill.schedules import Schedule, constant, cosine, warm_restarts
from histill.teachers import Frozen, Keyed, as_teacher
from histill.types import Batch, Objective, Outputs, Terms

__all__ = ["student", "teacher"]

RANDOM_COMBINATION = Augment(
    hflip=True, vflip=True, rotate=180, saturation=0.3, edges=0.1, blur=0.004, noise=0.05, subset=0.5
)
"""The paper's operations, each with probability 1/2 (contours 1/10); their strengths are ours."""

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Losses = Literal["focal", "cross-entropy", "label-smoothing"]
Schedules = Literal["cosine-restarts", "cosine", "constant"]
Augments = Literal["random-combination", "none"]
Stage = Literal["layer2", "layer3", "layer4", "none"]


def twice(student: Outputs, teacher: Outputs, batch: Batch, *, loss: Loss) -> Terms:
    """The teacher's loss, ``L_T = 1/2 L(y(x)) + 1/2 L(y(crop))``; of a network that looks once, ``L(y(x))``."""
    if "crop_logits" not in student:
        return {"image": (1.0, loss(student["logits"], batch.labels))}
    return {
        "image": (0.5, loss(student["raw_logits"], batch.labels)),
        "crop": (0.5, loss(student["crop_logits"], batch.labels)),
    }


def hard(student: Outputs, teacher: Outputs, batch: Batch, *, loss: Loss) -> Terms:
    """Eq. 2, the focal loss with the labels: the student alone."""
    return {"hard": (1.0, loss(student["logits"], batch.labels))}


def distilled(
    student: Outputs, teacher: Outputs, batch: Batch, *, loss: Loss, alpha: float, temperature: float
) -> Terms:
    """Eq. 4: ``L_KD = (1 - a) Lf(S_HP, y) + a T^2 KL(T_SL || S_SP)``."""
    return {
        "hard": (1 - alpha, loss(student["logits"], batch.labels)),
        "soft": (alpha, kd(student["logits"], teacher["logits"], temperature=temperature)),
    }


def distilled_with_crop(
    student: Outputs, teacher: Outputs, batch: Batch, *, loss: Loss, alpha: float, temperature: float
) -> Terms:
    """Eq. 5: ``L = 1/2 L_KD + 1/2 Lf(S_AHP, y)``, S_AHP what the student says of the AttentionPicture.

    The student was shown `image_and_crop`. The paper prints T_AHP, the teacher's word: see `distilled_as_printed`.
    """
    on_image, on_crop = student["logits"].chunk(2)
    terms = distilled(Outputs(logits=on_image), teacher, batch, loss=loss, alpha=alpha, temperature=temperature)
    halves = {name: (weight / 2, term) for name, (weight, term) in terms.items()}
    return {**halves, "crop": (0.5, loss(on_crop, batch.labels))}


def distilled_as_printed(
    student: Outputs, teacher: Outputs, batch: Batch, *, loss: Loss, alpha: float, temperature: float
) -> Terms:
    """Eq. 5 to the letter: ``L = 1/2 L_KD + 1/2 Lf(T_AHP, y)``. The last term has no gradient."""
    terms = distilled(student, teacher, batch, loss=loss, alpha=alpha, temperature=temperature)
    halves = {name: (weight / 2, term) for name, (weight, term) in terms.items()}
    return {**halves, "crop": (0.5, loss(teacher["crop_logits"], batch.labels))}


def image_and_crop(batch: Batch, teacher: Outputs, *, threshold: float) -> Tensor:
    """``(2 B, 3, H, W)``: the images, then their AttentionPictures, cut where the teacher's attention is high."""
    return torch.cat([batch.images, attention_crop(batch.images, teacher["attention"], threshold)])


@recipe
def teacher(
    data: Images,
    *,
    attention: bool = True,
    dares: Sequence[Stage] = ("layer2", "layer4"),
    sample_input: bool = True,
    spp: bool = True,
    crop: bool = True,
    threshold: float = 0.5,
    loss: Losses = "focal",
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
    weights: str = "auto",
    image_size: int = 512,
    epochs: int = 50,
    batch_size: int = 8,
    lr: float = 1e-5,
    schedule: Schedules = "cosine-restarts",
    period: int = 10,
    augment: Augments = "random-combination",
    patience: int | None = None,
    ema: float | None = None,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """The teacher: MAC-ResNet, or as much of it as is wanted; without any part it is ResNet-50.

    Args:
        data: the images and their splits.
        attention: BACM: attention maps, pooled bilinearly.
        dares: the stages that are DARes-blocks, of layer2, layer3 and layer4 (none: no stage).
        sample_input: three 3x3 convolutions in place of the first 7x7.
        spp: a spatial pyramid beside the head.
        crop: with attention, look also at the part of the image that it points at.
        threshold: of the mask that is cropped to, as a share of a map's range.
        loss: focal, cross-entropy or label-smoothing (by 0.1).
        focal_alpha: the focal loss's factor.
        focal_gamma: the focal loss's exponent.
        weights: imagenet (of a ResNet-50, in the parts that it has), a .safetensors or .pt file, none, or auto:
            ImageNet where it can be had, else none, said aloud.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of Adam.
        schedule: cosine-restarts, cosine or constant.
        period: epochs from one restart to the next (the paper does not say).
        augment: random-combination (flips, rotation, saturation, contours, smoothing, noise) or none.
        patience: stop after so many epochs without a better validation figure.
        ema: decay of a moving average of the weights, which is then what is kept.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    criteria: dict[Losses, Loss] = {
        "focal": partial(focal, alpha=focal_alpha, gamma=focal_gamma),
        "cross-entropy": cross_entropy,
        "label-smoothing": partial(cross_entropy, smoothing=0.1),
    }
    make: Callable[..., nn.Module] = MACResNet
    network = partial(
        make,
        classes=len(data.classes),
        attention=attention,
        dares=[stage for stage in dares if stage != "none"],
        sample_input=sample_input,
        spp=spp,
        crop=crop,
        threshold=threshold,
    )
    return Experiment(
        data=data,
        student=start(network, weights),
        objective=partial(twice, loss=criteria[loss]),
        image_size=image_size,
        augment=_augment(augment),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(torch.optim.Adam, lr=lr),
        schedule=_schedule(schedule, epochs, period),
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
    network: str = "resnet50",
    weights: str = "auto",
    unlabelled: Images | None = None,
    image_size: int = 512,
    epochs: int = 50,
    batch_size: int = 8,
    lr: float = 1e-5,
    schedule: Schedules = "cosine-restarts",
    period: int = 10,
    augment: Augments = "random-combination",
    views: int | None = 16,
    temperature: float = 4.0,
    alpha: float = 0.5,
    crop_term: Literal["student", "teacher", "none"] = "student",
    threshold: float = 0.5,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
    patience: int | None = None,
    ema: float | None = None,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """The student: plain ResNet-50, distilled where there is a teacher, else alone with the focal loss.

    Args:
        data: the images and their splits.
        teacher: the teacher's run; without it the student learns alone.
        network: resnet50 (the teacher's without its parts) or any timm name.
        weights: as for the teacher.
        unlabelled: a folder of further images, which join with the teacher's word only.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of Adam.
        schedule: cosine-restarts, cosine or constant.
        period: epochs from one restart to the next (the paper does not say).
        augment: random-combination (flips, rotation, saturation, contours, smoothing, noise) or none.
        views: distinct views per image; the teacher is asked once for each (none: a new view in every epoch).
        temperature: T of Eq. 3 and 4.
        alpha: a of Eq. 4, the weight of the teacher; the labels have 1 - alpha.
        crop_term: the last term of Eq. 5: what the student says of the crop that the teacher's attention chooses,
            the teacher's word as printed (a constant), or none: Eq. 4 alone, with any teacher.
        threshold: of the mask that is cropped to, as a share of a map's range.
        focal_alpha: the focal loss's factor.
        focal_gamma: the focal loss's exponent.
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
    if not 0 <= threshold < 1:
        raise BadInput(f"--threshold {threshold}: at least 0 and below 1")
    loss: Loss = partial(focal, alpha=focal_alpha, gamma=focal_gamma)
    taught = None if teacher is None else as_teacher(teacher, data.classes)
    objective: Objective = partial(hard, loss=loss)
    inputs, said = None, ["logits"]
    if taught is not None:
        follow, also = {
            "student": (distilled_with_crop, "attention"),
            "teacher": (distilled_as_printed, "crop_logits"),
            "none": (distilled, "logits"),
        }[crop_term]
        _check_says(taught, also, image_size)
        objective = partial(follow, loss=loss, alpha=alpha, temperature=temperature)
        inputs = partial(image_and_crop, threshold=threshold) if crop_term == "student" else None
        said = sorted({"logits", also})
    return Experiment(
        data=data,
        student=_network(network, data, weights),
        objective=objective,
        teacher=taught,
        inputs=inputs,
        unlabelled=None if taught is None else unlabelled,  # alone, there is nothing to learn from them
        image_size=image_size,
        augment=_augment(augment),
        views=views,
        cache_outputs=tuple(said),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(torch.optim.Adam, lr=lr),
        schedule=_schedule(schedule, epochs, period),
        patience=patience,
        ema=ema,
        positive=positive,
        strict=strict,
        seed=seed,
    )


def _check_says(teacher: Keyed, name: str, image_size: int) -> None:
    """Refuse a network without the output that the crop's term needs, before anything is trained."""
    if isinstance(teacher, Frozen) and name != "logits":
        size = teacher.image_size or image_size
        with torch.no_grad():
            there = teacher.network(torch.zeros(1, 3, size, size))
        if name not in there:
            raise BadInput(f"this teacher gives no {name!r}, which the crop's term needs; give --crop-term none")


def _network(name: str, data: Images, weights: str) -> partial[nn.Module]:
    classes = len(data.classes)
    if name == "resnet50":
        plain: Callable[..., nn.Module] = MACResNet
        return start(partial(plain, classes=classes, attention=False, dares=[], sample_input=False, spp=False), weights)
    make: Callable[..., nn.Module] = Timm
    return start(partial(make, name=name, classes=classes), weights)


def _augment(name: Augments) -> Augment:
    return RANDOM_COMBINATION if name == "random-combination" else NONE


def _schedule(name: Schedules, epochs: int, period: int) -> Schedule:
    if period < 1:
        raise BadInput(f"--period {period}: at least 1")
    if name == "cosine-restarts":
        return warm_restarts(period)
    return cosine(epochs) if name == "cosine" else constant()
