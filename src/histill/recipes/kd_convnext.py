"""KD_ConvNeXt: grades of lung adenocarcinoma on surgical sections; a Swin teacher and a ConvNeXt student.

Zheng et al., "KD_ConvNeXt: knowledge distillation-based image classification of lung tumor surgical specimen
sections", Frontiers in Genetics 14 (2023) 1254435. The student learns the teacher's features at four stages, its
softened answer, and the labels by focal loss, as most images are of one grade.

The paper does not name the networks' size, the temperature, the class weights or gamma; what is taken here is in
``docs/recipes/kd-convnext.md``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histill.accelerator import sent
from histill.data.images import Images
from histill.data.views import NONE, Augment
from histill.errors import BadInput
from histill.experiment import Experiment, recipe
from histill.losses import focal, hint, soft_cross_entropy
from histill.losses._shared import precise, same_size
from histill.models import Regressors, Timm
from histill.models.adapter import create
from histill.recipes._start import blank, shapes, start
from histill.run import Run
from histill.schedules import Schedule, constant, warm_cosine
from histill.teachers import Keyed, as_teacher
from histill.types import Batch, Objective, Outputs, Terms

__all__ = ["student", "teacher"]

STAGES = 4

SECTION = Augment(hflip=True, vflip=True, zoom=0.1, shift=0.1)
"""The paper's: both flips, a crop of up to a tenth, a shift of up to a tenth of the width and of the height."""

Schedules = Literal["cosine", "constant"]
Augments = Literal["section", "none"]


class Distilled(nn.Module):
    """Eq. 5: ``L = alpha L1 + (1 - alpha) L2 + beta L3``. Its 1x1 convolutions train with the student.

    Args:
        regressors: phi_s of Eq. 1, a 1x1 convolution per stage to the teacher's width; None leaves L1 out.
        logits: False leaves L2 out.
        class_weights: ``(C,)``, alpha_t of Eq. 4.
        distance: between features: ``mse``, the square of Eq. 1, or ``l1``, the absolute value of Figure 5.
        normalized: phi_t of Eq. 1 brings the teacher's channels at each place to mean 0 and variance 1, as a layer norm
            does; else phi_t is the identity.
        t_squared: multiply L2 by T squared, as Hinton et al. do and the paper does not.
    """

    def __init__(
        self,
        regressors: Regressors | None,
        *,
        logits: bool,
        class_weights: Sequence[float],
        alpha: float,
        beta: float,
        gamma: float,
        temperature: float,
        distance: Literal["mse", "l1"] = "mse",
        normalized: bool = False,
        t_squared: bool = False,
    ) -> None:
        super().__init__()
        self.phi_t = channel_norm if normalized else nn.Identity()
        self.phi, self.logits, self.class_weights = regressors, logits, class_weights
        self.alpha, self.beta, self.gamma, self.temperature = alpha, beta, gamma, temperature
        self.distance = hint if distance == "mse" else absolute
        self.soft_weight = (1 - alpha) * (temperature**2 if t_squared else 1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        z_s, terms = student["logits"], {}
        if self.phi is not None:  # Eq. 1: sum over the stages of mean (phi_t(f_t) - phi_s(f_s))^2
            f_s, f_t = self.phi(pyramid(student)), [self.phi_t(f) for f in pyramid(teacher)]
            pairs = [same_size(s, t) for s, t in zip(f_s, f_t, strict=True)]
            terms["features"] = (self.alpha, torch.stack([self.distance(s, t) for s, t in pairs]).sum())
        if self.logits:  # Eqs. 2 and 3
            soft = soft_cross_entropy(z_s, teacher["logits"], temperature=self.temperature)
            terms["soft"] = (self.soft_weight, soft)
        terms["focal"] = (self.beta, graded(z_s, batch.labels, self.class_weights, self.gamma))
        return terms


def alone(student: Outputs, teacher: Outputs, batch: Batch, *, class_weights: Sequence[float], gamma: float) -> Terms:
    """Eq. 4 by itself, for the teacher, the student alone and the networks that they are compared with."""
    return {"focal": (1.0, graded(student["logits"], batch.labels, class_weights, gamma))}


def graded(logits: Tensor, label: Tensor, class_weights: Sequence[float], gamma: float) -> Tensor:
    """Eq. 4: ``L3 = mean_i -alpha_y (1 - p_y)^gamma log p_y``, alpha_y the weight of the image's class."""
    return focal(logits, label, alpha=sent(torch.tensor(class_weights), logits.device), gamma=gamma)


@precise
def absolute(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of features, which Figure 5 speaks of where Eq. 1 has the square."""
    return F.l1_loss(student, teacher.detach())


def channel_norm(features: Tensor) -> Tensor:
    """``(B, C, H, W)`` with mean 0 and variance 1 over the channels of each place: a layer norm without weights."""
    return F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)


def pyramid(outputs: Outputs) -> list[Tensor]:
    """The features of the last four stages, fine to coarse: strides 4, 8, 16 and 32 of these networks."""
    return [outputs[name] for name in stages(outputs)]


def stages(outputs: Outputs) -> list[str]:
    """Their names; some networks of timm count the stem (stride 2) as their first stage, so the last four."""
    numbers = sorted(int(name[5:]) for name in outputs if name.startswith("stage") and name[5:].isdigit())
    if len(numbers) < STAGES:
        raise BadInput(
            f"the features of four stages are compared, and a network has {len(numbers)}: give one of timm's, "
            "or --no-features"
        )
    return [f"stage{number}" for number in numbers[-STAGES:]]


@recipe
def teacher(
    data: Images,
    *,
    network: str = "swin_tiny_patch4_window7_224",
    weights: str = "auto",
    image_size: int = 224,
    epochs: int = 100,
    batch_size: int = 32,
    lr: float = 1e-3,
    schedule: Schedules = "cosine",
    augment: Augments = "section",
    gamma: float = 2.0,
    patience: int | None = None,
    ema: float | None = None,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """The teacher: Swin-T with focal loss (paper: AdamW 1e-3, weight decay 5e-4, batch 32, 100 epochs).

    Args:
        data: the images and their splits.
        network: any timm name.
        weights: imagenet, a .safetensors or .pt file, none, or auto: ImageNet where it can be had, else none, said
            aloud.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of AdamW.
        schedule: cosine with one epoch of warm-up, or constant.
        augment: section (flips, zoom and shift, as in the paper) or none.
        gamma: of the focal loss.
        patience: stop after so many epochs without a better validation figure.
        ema: decay of a moving average of the weights, which is then what is kept.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    _not_negative(gamma=gamma)
    return Experiment(
        data=data,
        student=network_for(network, data, image_size, weights),
        objective=partial(alone, class_weights=class_weights(data), gamma=gamma),
        image_size=image_size,
        augment=_augment(augment),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=5e-4),
        schedule=_schedule(schedule, epochs),
        select="accuracy",
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
    network: str = "convnext_tiny",
    weights: str = "auto",
    unlabelled: Images | None = None,
    image_size: int = 224,
    epochs: int = 100,
    batch_size: int = 32,
    lr: float = 1e-3,
    schedule: Schedules = "cosine",
    augment: Augments = "section",
    views: int | None = None,
    temperature: float = 4.0,
    alpha: float = 0.5,
    beta: float = 1.0,
    gamma: float = 2.0,
    features: bool = True,
    logits: bool = True,
    distance: Literal["mse", "l1"] = "mse",
    normalized: bool = False,
    t_squared: bool = False,
    patience: int | None = None,
    ema: float | None = None,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """The student: ConvNeXt-T, distilled where there is a teacher, else alone (paper: alpha 0.5, beta 1).

    Args:
        data: the images and their splits.
        teacher: the teacher's run; without it the student learns alone, by focal loss.
        network: any timm name.
        weights: as for the teacher.
        unlabelled: a folder of further images, which join with the teacher's word only.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of AdamW.
        schedule: cosine with one epoch of warm-up, or constant.
        augment: section (flips, zoom and shift, as in the paper) or none.
        views: distinct views per image; the teacher is asked once for each, and its features are kept on disk: 2.3 MB
            per view of Swin-T at 224 pixels (none: a new view in every epoch, and nothing is kept).
        temperature: T of Eqs. 2 and 3; the paper does not give it.
        alpha: weight of the teacher's features; its softened answer has 1 - alpha.
        beta: weight of the labels.
        gamma: of the focal loss.
        features: compare the features of the four stages.
        logits: compare the softened answers.
        distance: of features, mse as in Eq. 1 or l1 as Figure 5 says.
        normalized: bring the teacher's features to variance 1 first; a teacher without layer norms, such as
            MobileNetV2, has features of other sizes than Swin, for which alpha and beta are.
        t_squared: multiply the soft term by T squared, as Hinton et al. do and the paper does not.
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
    _not_negative(beta=beta, gamma=gamma)
    make, weigh = network_for(network, data, image_size, weights), class_weights(data)
    objective: Objective = partial(alone, class_weights=weigh, gamma=gamma)
    known, heard = None, ["logits"]
    if teacher is not None:
        known = as_teacher(teacher, data.classes)
        regressors = None
        if features:
            own, its = shapes(make, image_size), known(blank(image_size))
            regressors = Regressors(*([f.shape[1] for f in pyramid(outputs)] for outputs in (own, its)))
            heard += stages(its)
        objective = Distilled(
            regressors,
            logits=logits,
            class_weights=weigh,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            temperature=temperature,
            distance=distance,
            normalized=normalized,
            t_squared=t_squared,
        )
    return Experiment(
        data=data,
        student=make,
        objective=objective,
        teacher=known,
        unlabelled=unlabelled if known else None,  # without a teacher they have nothing to teach
        image_size=image_size,
        augment=_augment(augment),
        views=views,
        cache_outputs=tuple(heard),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=5e-4),
        schedule=_schedule(schedule, epochs),
        select="accuracy",
        patience=patience,
        ema=ema,
        positive=positive,
        strict=strict,
        seed=seed,
    )


def class_weights(data: Images) -> list[float]:
    """alpha_t of Eq. 4, which the paper leaves open: the inverse of a class's share of training, with mean 1."""
    labels = data.frame["label"][data.frame["split"] == "train"]
    rarity = 1 / np.array([max(1, (labels == c).sum()) for c in data.classes])
    return [float(weight) for weight in rarity / rarity.mean()]


def network_for(name: str, data: Images, image_size: int, weights: str) -> partial[nn.Module]:
    """A timm network for images of this size; one with windows or a table of positions is told the size."""
    with torch.device("meta"):
        bare = create(name, 0, pretrained=False)
    fitted = {"img_size": image_size} if "img_size" in inspect.signature(type(bare).__init__).parameters else {}
    timm: Callable[..., nn.Module] = Timm
    make = partial(timm, name=name, classes=len(data.classes), **fitted)
    try:
        shapes(make, image_size)
    except (AssertionError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise BadInput(f"--image-size {image_size}: {name} does not take it ({why}); 224 or a multiple of 32") from None
    return start(make, weights)


def _not_negative(**weights: float) -> None:
    for name, value in weights.items():
        if value < 0:
            raise BadInput(f"--{name} {value}: at least 0")


def _augment(name: Augments) -> Augment:
    return SECTION if name == "section" else NONE


def _schedule(name: Schedules, epochs: int) -> Schedule:
    return constant() if name == "constant" else warm_cosine(epochs)
