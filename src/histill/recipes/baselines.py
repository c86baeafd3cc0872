"""Pretraining that distillation is compared with: Barlow Twins, MoCo v2, SimCLR, MAE, and learning from other labels.

These are the rows beside RCKD in Kim et al. 2023 (Bioengineering 10:1279, Tables 3 to 5), each with the settings that
its own paper published; ``docs/recipes/baselines.md`` has them with their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from histill.data.images import Images
from histill.data.views import Augment
from histill.errors import BadInput
from histill.experiment import Experiment, recipe
from histill.models.masked import MaskedTimm
from histill.pretrain import mixing
from histill.pretrain.lars import adamw, lars, rising, sgd
from histill.pretrain.mixing import Mix, Mixed
from histill.pretrain.objectives import MAE, BarlowTwins, MoCo, SimCLR, two_views
from histill.recipes._start import backbone, sized, start
from histill.run import Run, without_weights
from histill.teachers import Keyed, as_teacher
from histill.types import Objective

__all__ = ["pretrain", "supervised"]

Methods = Literal["barlow-twins", "moco", "simclr", "mae"]
Optimizers = Literal["lars", "adamw", "sgd"]

# Zoom and shift are those that vary between two views as much as published crops do: of 8 to 100 % of the picture's
# area (zoom 0.73, shift 0.18), or of 20 to 100 % (0.46, 0.14). Crops enlarge on the whole, and these views do not.
WIDE = Augment(vflip=False, zoom=0.73, shift=0.18)
NARROW = Augment(vflip=False, zoom=0.46, shift=0.14)
BLUR = 2 / 224
"""Largest standard deviation of the blur, as a share of the width: 2 of 224 pixels."""


@dataclass(frozen=True)
class _Published:
    """What a method's paper trains with; ``rate`` is for 256 images, warm-up is ``warm`` epochs or a share of fewer."""

    optimizer: Optimizers
    rate: float
    augment: Augment
    warm: tuple[float, float]
    final: float = 0.0
    vectors: float = 1.0  # the rate of biases and norms under LARS, relative to that of weights


_PUBLISHED: dict[str, _Published] = {
    "barlow-twins": _Published(
        "lars",
        0.2,
        replace(WIDE, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=BLUR, subset=0.8),
        (10, 0.1),
        final=0.001,
        vectors=0.0048 / 0.2,
    ),
    "simclr": _Published(
        "lars",
        0.3,
        replace(WIDE, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=BLUR, subset=0.8),
        (10, 0.1),
    ),
    "moco": _Published(
        "sgd",
        0.03,
        replace(NARROW, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=BLUR, subset=0.8),
        (0, 0),
    ),
    "mae": _Published("adamw", 1.5e-4, NARROW, (40, 0.05)),
}
_USI = replace(WIDE, brightness=0.4, contrast=0.4, saturation=0.4)


@recipe
def pretrain(
    unlabelled: Images,
    *,
    method: Methods = "barlow-twins",
    network: str = "CSAT",
    weights: str = "none",
    image_size: int = 224,
    epochs: int = 100,
    batch_size: int = 64,
    lr: float | None = None,
    optimizer: Optimizers | None = None,
    head_width: int | None = None,
    temperature: float | None = None,
    queue: int | None = None,
    momentum: float | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """A backbone that learns from images alone; start another recipe from its run with --weights RUN.

    Args:
        unlabelled: the images.
        method: barlow-twins, moco (v2), simclr, or mae, which takes a plain vision transformer of timm.
        network: CSAT, ResNet18SAT, or any timm name (resnet18, efficientnet_b0, vit_base_patch16_224, ...).
        weights: none, imagenet, a .safetensors or .pt file, a run, or auto: ImageNet where it can be had, else none,
            said aloud.
        image_size: height and width in pixels.
        epochs: passes over the images.
        batch_size: images per step; each is seen in two views, but for mae.
        lr: learning rate of the weights at its peak (default: the method's own, times batch_size / 256).
        optimizer: lars, adamw or sgd (default: the method's own; another one needs --lr).
        head_width: of the projections, or of mae's decoder (default: 8192 of barlow-twins, 128 of moco and simclr, 512
            of mae, as published).
        temperature: of moco (default 0.2) and simclr (default 0.1, and 0.5 for images below 96 pixels).
        queue: how many keys moco remembers (default: half the images, rounded down to whole batches, 65536 at most).
        momentum: of the encoder of moco's keys (default: 0.999 as published; take less in a run of some hundred steps).
        strict: an unreadable image is an error.
        seed: of everything random.

    Raises:
        BadInput: an unknown method, or an argument that does not go with it.
    """
    if method not in _PUBLISHED:
        raise BadInput(f"--method {method}: one of {', '.join(_PUBLISHED)}")
    published = _PUBLISHED[method]
    for name, value in (("temperature", temperature), ("queue", queue), ("momentum", momentum)):
        takers = ("moco", "simclr") if name == "temperature" else ("moco",)
        if value is not None and (method not in takers or not value > 0 or (name == "momentum" and value >= 1)):
            kind = "between 0 and 1" if name == "momentum" else "above 0"
            raise BadInput(f"--{name} {value}: a number {kind}, of {' and '.join(takers)} alone; --method is {method}")
    made = start(_masked(network, image_size) if method == "mae" else backbone(network, image_size, 0), weights)
    head: dict[str, Any] = {} if head_width is None else {"head_width": head_width}
    if method in ("moco", "simclr"):
        cold = 0.2 if method == "moco" else 0.1 if image_size >= 96 else 0.5
        head["temperature"] = cold if temperature is None else temperature
    if method == "moco":
        half = len(unlabelled) // 2 // batch_size * batch_size
        head["queue"] = min(65536, max(batch_size, half)) if queue is None else queue
        head["momentum"] = 0.999 if momentum is None else momentum
    return Experiment(
        data=unlabelled,
        student=made,
        objective=_objective(method, made, image_size, head),
        inputs=two_views if method in ("barlow-twins", "simclr") else None,
        image_size=image_size,
        augment=published.augment,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=_optimizer(published, optimizer, lr, batch_size, method),
        schedule=rising(epochs, min(published.warm[0], published.warm[1] * epochs), final=published.final),
        select="last",
        strict=strict,
        seed=seed,
    )


@recipe
def supervised(
    data: Images,
    teacher: Run | Keyed | None = None,
    *,
    network: str = "CSAT",
    weights: str = "none",
    image_size: int = 224,
    epochs: int = 300,
    batch_size: int = 64,
    lr: float | None = None,
    mix: bool = True,
    select: str = "balanced_accuracy",
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """A backbone that learns other labels first, alone or from a teacher of the same classes (USI).

    Args:
        data: the images and their splits.
        teacher: a run of the same classes; the loss is then cross-entropy plus 5 times the divergence from it.
        network: CSAT, ResNet18SAT, or any timm name.
        weights: as for pretrain.
        image_size: height and width in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate of AdamW at its peak (default: 2e-3 times batch_size / 1024).
        mix: mixup (0.8) or CutMix (1.0), one of them in each batch; the teacher sees the same mixture.
        select: the validation figure whose best epoch is kept, or last.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    mixture = Mix(seed=seed) if mix else None
    taught = None if teacher is None else as_teacher(teacher, data.classes)
    if taught is not None and mixture is not None:
        taught = Mixed(taught, mixture)
    return Experiment(
        data=data,
        student=start(backbone(network, image_size, len(data.classes)), weights),
        objective=partial(mixing.supervised, mix=mixture),
        teacher=taught,
        cache=False,
        inputs=None if mixture is None else mixture.inputs,
        image_size=image_size,
        augment=_USI,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(adamw, lr=2e-3 * batch_size / 1024 if lr is None else lr, weight_decay=2e-2),
        schedule=rising(epochs, min(5, epochs / 60), start=0.05, final=5e-4),
        select=select,
        positive=positive,
        strict=strict,
        seed=seed,
    )


def _masked(network: str, image_size: int) -> partial[nn.Module]:
    if network.lower() in ("csat", "resnet18sat"):
        raise BadInput(
            f"--method mae hides patches of a vision transformer, such as vit_base_patch16_224, not {network}"
        )
    make: Callable[..., nn.Module] = MaskedTimm
    return partial(make, name=network, **sized(network, image_size))


def _objective(method: str, made: partial[nn.Module], image_size: int, head: dict[str, Any]) -> Objective:
    network = without_weights(made)().eval()
    if isinstance(network, MaskedTimm):
        vit, side = network.network, network.patch_size
        if image_size % side:
            raise BadInput(f"--image-size {image_size}: a multiple of {side}, the patches of {made.keywords['name']}")
        return MAE(vit.embed_dim, (image_size // side) ** 2, side, prefix=vit.num_prefix_tokens, **head)
    with torch.no_grad():
        width = network(torch.zeros(1, 3, image_size, image_size))["pooled"].shape[1]
    heads: dict[str, Callable[..., Objective]] = {"barlow-twins": BarlowTwins, "simclr": SimCLR, "moco": MoCo}
    return heads[method](width, **head)


def _optimizer(
    published: _Published, name: Optimizers | None, lr: float | None, batch_size: int, method: str
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    name = name or published.optimizer
    if name not in ("lars", "adamw", "sgd"):
        raise BadInput(f"--optimizer {name}: lars, adamw or sgd")
    if lr is None:
        if name != published.optimizer:
            raise BadInput(f"--optimizer {name}: {method} has no published rate for it; give --lr too")
        lr = published.rate * batch_size / 256
    if name == "lars":
        return partial(lars, lr=lr, lr_vectors=lr * published.vectors)
    if name == "sgd":
        return partial(sgd, lr=lr, weight_decay=1e-4)
    return partial(adamw, lr=lr, weight_decay=0.05, betas=(0.9, 0.95))
