"""RCKD: a small backbone learns tissue from a nucleus segmenter, without a label; then it is fine-tuned (CSAT).

Kim et al., "RCKD: response-based cross-task knowledge distillation for pathological image analysis", Bioengineering 10
(2023) 1279. A teacher that outlines nuclei says of unlabelled patches where nuclei are; the student, a backbone with a
U-Net decoder, learns to say the same; its backbone then learns the task at hand from few labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from histill.data.images import Images
from histill.data.splits import split
from histill.data.views import NONE, Augment
from histill.data.windows import kept_tissue, sampled, windows
from histill.errors import BadInput
from histill.experiment import Experiment, recipe
from histill.losses import cross_entropy, dice, focal
from histill.losses.star import star_distances, star_loss
from histill.models import StarDist, UNet
from histill.models.adapter import known
from histill.models.stardist import GRID
from histill.pretrain.lars import adamw, lars, rising, sgd
from histill.pretrain.pseudo import Kind, pseudo_label
from histill.recipes._start import backbone, sized, start
from histill.run import Run
from histill.schedules import constant, warm_cosine
from histill.types import Batch, Outputs, Terms

__all__ = ["finetune", "pretrain", "teacher"]

NUCLEI = Augment(hflip=True, vflip=True, rotate=180, zoom=0.2, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
"""Any direction, a fifth larger or smaller, another stain: heavy, as that of the released H&E model."""

PATCH = Augment(hflip=True, vflip=True, rotate=180, zoom=0.5, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.05)
TISSUE = Augment(hflip=True, vflip=True, rotate=180, zoom=0.1, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.05)


Loss = Literal["focal", "dice", "focal+dice"]
_WITH_PEG = ("csat", "csat-plain", "resnet18sat")


def outlines(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """StarDist's own loss: how central each pixel is in its nucleus, and how far the edge is along 32 rays."""
    if batch.masks is None:
        raise BadInput("a nucleus segmenter learns from instance masks; give images with masks")
    prob, dist = star_distances(batch.masks, rays=student["dist"].shape[1], grid=GRID)
    return star_loss(student["logits"], student["dist"], prob, dist)


def nuclei(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """Eq. 3: ``L = mean over H x W of CE(N, student)``, N the segmenter's pseudo label, which the masks hold."""
    assert batch.masks is not None
    return {"pixels": (1.0, cross_entropy(student["logits"], batch.masks))}


def labelled(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    instances: bool = False,
    loss: Loss = "focal",
) -> Terms:
    """Eq. 5, and Eq. 7 where there are masks: the focal loss of images, or of pixels; any nucleus is class 1.

    Of masks also the soft Dice loss, alone or with weight 1 beside it.
    """
    truth = batch.labels if batch.masks is None else batch.masks.clamp(max=1) if instances else batch.masks
    terms: dict[str, tuple[float, torch.Tensor]] = {}
    if "focal" in loss:
        terms["focal"] = (1.0, focal(student["logits"], truth, alpha=alpha, gamma=gamma))
    if "dice" in loss:
        terms["dice"] = (1.0, dice(student["logits"], truth))
    return terms


@recipe
def teacher(
    data: Images,
    *,
    image_size: int = 256,
    epochs: int = 400,
    batch_size: int = 4,
    lr: float = 3e-4,
    weights: str = "none",
    select: Literal["object_f1", "miou", "last"] = "object_f1",
    patience: int | None = None,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """StarDist on images with instance masks, cut into windows at their own resolution.

    Args:
        data: images with instance masks (--target instances) and their splits.
        image_size: side in pixels of a window, a multiple of 16; the images are cut, not resized.
        epochs: passes over the training windows.
        batch_size: windows per step.
        lr: learning rate of Adam at its peak; half a cosine down.
        weights: none, a run, or a .safetensors file.
        select: the validation figure whose best epoch is kept, or last.
        patience: stop after so many epochs without a better one.
        positive: not used here.
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    if data.masks != "instances":
        raise BadInput(
            f"{data.root}: rckd.teacher learns nuclei from instance masks; give a manifest or folder with them "
            "(--target instances)"
        )
    if image_size % 16:
        raise BadInput(f"--image-size {image_size}: a multiple of 16")
    return Experiment(
        data=windows(data, image_size),
        student=start(_made(StarDist), weights),
        objective=outlines,
        image_size=image_size,
        augment=NUCLEI,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(torch.optim.Adam, lr=lr),
        schedule=warm_cosine(epochs),
        clip=10.0,
        select=select,
        patience=patience,
        strict=strict,
        seed=seed,
    )


@recipe
def pretrain(
    unlabelled: Images,
    teacher: Run | Path | str | None = None,
    *,
    network: str = "CSAT",
    weights: str = "none",
    image_size: int = 512,
    epochs: int = 100,
    batch_size: int = 64,
    optimizer: Literal["lars", "adamw"] = "lars",
    lr: float | None = None,
    warm: float = 10.0,
    pseudo: Kind = "prob",
    threshold: float = 0.5,
    teacher_scale: float = 2.0,
    sample: int | None = 400_000,
    dark: float = 50.0,
    light: float = 245.0,
    min_tissue: float = 0.0,
    val: float = 0.02,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """A backbone learns from a nucleus segmenter where nuclei are, on tissue that nobody labelled (Eqs. 1 to 3).

    Args:
        unlabelled: patches.
        teacher: a run of rckd.teacher, or the official StarDist weights (a file, or an address with its checksum).
        network: CSAT, CSAT-plain, ResNet18SAT, StrideNet, or a network of timm: convolutional with a pyramid of
            features, or a vision transformer, of which the decoder reads four blocks.
        weights: of the backbone: none, imagenet, a file, a run, or auto: ImageNet where it can be had, else none, said
            aloud.
        image_size: height and width in pixels that the student sees (paper: 512, of patches of 1024).
        epochs: passes over the patches.
        batch_size: patches per step.
        optimizer: lars as in the paper, or adamw.
        lr: learning rate of the weights at its peak (default: 0.2 batch_size / 256 of lars, 1e-3 of adamw).
        warm: epochs of linear warm-up, at most a tenth of all.
        pseudo: prob, the segmenter's probability cut at a threshold as in Eqs. 1 and 2, or instances, the nuclei that
            it outlines.
        threshold: of prob, and of what may be outlined; the released weights have 0.692 for outlines.
        teacher_scale: by how much patches are enlarged for the segmenter: 2 where they are at 20x and it learnt at 40x.
        sample: how many patches, drawn at random (none: all).
        dark: patches of a lower mean intensity (0 to 255) are left out.
        light: patches of a higher mean intensity are left out, as background.
        min_tissue: least share of stained pixels in a patch.
        val: share of the patches on which agreement with the segmenter is measured.
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    if teacher is None:
        raise BadInput("rckd.pretrain learns from a nucleus segmenter: give --teacher RUN (rckd.teacher), or weights")
    shown = sampled(kept_tissue(unlabelled, dark=dark, light=light, min_tissue=min_tissue), sample, seed=seed)
    how: dict[str, Any] = {"kind": pseudo, "threshold": threshold, "scale": teacher_scale, "strict": strict}
    said = pseudo_label(shown, segmenter(teacher), **how)
    parts = said.with_frame(said.frame.assign(split=""))
    return Experiment(
        data=split(parts, val=val, test=0.0, seed=seed),
        student=start(_unet(network, image_size, 2), weights),
        objective=nuclei,
        image_size=image_size,
        augment=PATCH,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=_pretraining(optimizer, lr, batch_size),
        schedule=rising(epochs, min(warm, epochs / 10), final=0.001),
        select="last",
        strict=strict,
        seed=seed,
    )


def segmenter(teacher: Run | Path | str) -> nn.Module:
    """The nucleus segmenter of a run, or with the official weights.

    Raises:
        BadInput: the run is of another network, or the weights do not fit.
    """
    if not isinstance(teacher, Run) and (Path(teacher) / "run.json").is_file():
        teacher = Run.open(teacher)
    if isinstance(teacher, Run):
        network = teacher.network()
        if not isinstance(network, StarDist):
            raise BadInput(f"{teacher.path} is a {type(network).__name__}, not a nucleus segmenter (rckd.teacher)")
        return network
    from histill.models.stardist_weights import load_keras

    network = StarDist()
    load_keras(network, teacher)
    return network


def _pretraining(
    name: str, lr: float | None, batch_size: int
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    if name == "lars":  # Barlow Twins' rates: 0.2 of weights and 0.0048 of biases and norms, for 256 images
        rate = 0.2 * batch_size / 256 if lr is None else lr
        return partial(lars, lr=rate, lr_vectors=rate * 0.0048 / 0.2)
    if name == "adamw":
        return partial(adamw, lr=1e-3 if lr is None else lr, weight_decay=0.05)
    raise BadInput(f"--optimizer {name}: lars or adamw")


def _made(network: Callable[..., nn.Module], **arguments: Any) -> partial[nn.Module]:
    return partial(network, **arguments)


def _unet(network: str, image_size: int, classes: int) -> partial[nn.Module]:
    """The network by its name with a U-Net decoder."""
    if network.lower() == "csat-plain":
        return _made(UNet, classes=classes, backbone="CSAT", sat=False)
    size = sized(network, image_size) if known(network) else {}
    return _made(UNet, classes=classes, backbone=network, **size)


@recipe
def finetune(
    data: Images,
    *,
    weights: str = "none",
    network: str = "CSAT",
    image_size: int = 384,
    epochs: int = 200,
    batch_size: int = 64,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    lr: float = 1e-4,
    schedule: Literal["constant", "cosine"] = "constant",
    freeze: Literal["peg", "none"] = "peg",
    augment: Literal["tissue", "none"] = "tissue",
    loss: Loss = "focal",
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    select: str = "loss",
    patience: int | None = 20,
    positive: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """A pretrained backbone learns the task: a linear head where images have labels, a U-Net decoder where masks.

    Args:
        data: the images and their splits.
        weights: of the backbone: a pretraining run, a file, imagenet, none, or auto.
        network: CSAT, CSAT-plain, ResNet18SAT, StrideNet, or any timm name; with masks as in pretraining.
        image_size: height and width in pixels.
        epochs: passes over the training images, at most.
        batch_size: images per step.
        optimizer: sgd (momentum 0.9) as in the paper, or adamw.
        lr: learning rate.
        schedule: constant, or cosine with an epoch of warm-up.
        freeze: peg leaves the position encodings of pretraining as they are, as in the paper; from random weights
            nothing is frozen.
        augment: tissue (flips, any direction, stain) or none.
        loss: focal as in the paper, or with masks dice, the soft Dice loss, which does not mind how rare a class is, or
            focal+dice, the sum of both.
        alpha: of the focal loss.
        gamma: of the focal loss.
        select: the validation figure whose best epoch is kept, or last.
        patience: stop after so many epochs without a better one.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        strict: an unreadable image is an error.
        seed: of everything random.
    """
    if not data.classes:
        raise BadInput(f"{data.root}: fine-tuning needs labels or masks")
    classes = len(data.classes)
    if loss not in get_args(Loss):
        raise BadInput(f"--loss {loss}: focal, dice or focal+dice")
    if loss != "focal" and not data.masks:
        raise BadInput(
            f"--loss {loss}: Dice is of masks, and the images of {data.root} have labels; take focal, or --target masks"
        )
    make = (_unet if data.masks else backbone)(network, image_size, classes)
    made = start(make, weights)
    learnt = made.keywords["weights"] not in (None, "imagenet")  # ImageNet has no position encodings
    steps = partial(sgd, weight_decay=0.0) if optimizer == "sgd" else partial(adamw, weight_decay=0.05)
    return Experiment(
        data=data,
        student=made,
        frozen=("*.peg.*",) if freeze == "peg" and learnt and network.lower() in _WITH_PEG else (),
        objective=partial(labelled, alpha=alpha, gamma=gamma, instances=data.masks == "instances", loss=loss),
        image_size=image_size,
        augment=TISSUE if augment == "tissue" else NONE,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(steps, lr=lr),
        schedule=warm_cosine(epochs) if schedule == "cosine" else constant(),
        select=select,
        patience=None if select == "last" else patience,
        positive=positive,
        strict=strict,
        seed=seed,
    )
