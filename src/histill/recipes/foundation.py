"""Foundation models as teachers: a small backbone learns their embeddings of images that nobody labelled.

As in H0-mini (Filiot et al. 2025) and AM-RADIO (Ranzinger et al. 2024): the student's embedding, through a linear map
that is dropped afterwards, points where the teacher's does; with several teachers there is a map for each; and its
tokens match the teacher's where a map is wanted. The run is then fine-tuned, as RCKD's is, or its embedding is used as
it is. Not a copy of either paper: both train on their terms for months, this for hours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from histill.data.images import Images
from histill.data.packed import pack
from histill.data.views import Augment
from histill.embeddings import Embeddings, Several, Standardised, bound, open_teacher, standardise
from histill.errors import BadInput
from histill.experiment import Experiment, recipe
from histill.losses import Projection, cosine, hint, rkd_distance, smooth_l1
from histill.losses._shared import same_size
from histill.losses.embedding import check_nested
from histill.pretrain.lars import adamw
from histill.recipes._start import backbone, shapes, start
from histill.recipes.rckd import finetune
from histill.run import Run
from histill.schedules import warm_cosine
from histill.teachers import Keyed
from histill.types import Batch, Outputs, Terms

__all__ = ["finetune", "pretrain"]

Match = Literal["cosine", "mse", "relation"]
Targets = Literal["pooled", "tokens", "both"]
Source = Run | Keyed | Path | str

TILE = Augment(hflip=True, vflip=True, rotate=180, zoom=0.2, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.05)
"""Any direction, a fifth larger or smaller, a little of another stain."""


class Matched(nn.Module):
    """``L = mean_t L_t``, and the same of the tokens: z the student's embedding, e_t the teacher's, standardised.

    ``L_t = sum_m loss(W_t^(m) z_{1:m}, e_t)``, the sum over the nested widths and the whole (`Projection`);
    for relations ``L_t = sum_m RKD-D(z_{1:m}, e_t)``, the distances between the images of the batch, which needs no W
    and does not see where the origin lies, as cosines of features behind a ReLU would. Of the tokens,
    ``smoothL1(conv1x1_t(f), tokens_t)``, f the student's last feature map, the larger of the two maps pooled to the
    smaller. The linear maps and the convolutions train with the student.

    Args:
        width: of z.
        channels: of f; None without tokens.
        teachers: widths of the e_t (none: the tokens alone).
        tokens: widths of the tokens_t.
        match: the loss.
        nested: widths m below that of z.
    """

    def __init__(
        self,
        width: int,
        channels: int | None,
        teachers: Sequence[int],
        tokens: Sequence[int] = (),
        *,
        match: Match = "cosine",
        nested: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.share, self.pooled = 1 / max(len(teachers), len(tokens)), len(teachers)
        self.widths = check_nested(width, nested)
        self.projection = None
        if match != "relation" and teachers:
            loss = cosine if match == "cosine" else hint
            self.projection = Projection(width, teachers, nested=nested, loss=loss)
        self.maps = nn.ModuleList(nn.Conv2d(channels or 0, out, 1) for out in tokens)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        z, said = student["pooled"], [teacher[f"pooled{t}"] for t in range(self.pooled)]
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.projection is not None:
            for t, loss in enumerate(self.projection.each(z, said)):
                terms[f"embedding{t}"] = (self.share, loss)
        else:
            for t, e in enumerate(said):
                loss = torch.stack([rkd_distance(z[:, :m], e) for m in self.widths]).sum()
                terms[f"relation{t}"] = (self.share, loss)
        for t, projected in enumerate(self.maps):
            pair = same_size(projected(last_map(student)), teacher[f"tokens{t}"])
            terms[f"tokens{t}"] = (self.share, smooth_l1(*pair))
        return terms


def last_map(outputs: Outputs) -> Tensor:
    """The deepest feature map that a network names (``stage4`` of CSAT, ``layer4`` of a ResNet).

    Raises:
        BadInput: it names none.
    """
    for name in reversed(list(outputs)):
        if name.startswith(("stage", "layer")) and outputs[name].ndim == 4:
            return outputs[name]
    raise BadInput("this network names no feature maps, so no tokens can be matched; give --targets pooled")


@recipe
def pretrain(
    unlabelled: Images,
    teacher: Source | list[Source] | tuple[Source, ...] | None = None,
    *,
    network: str = "CSAT",
    weights: str = "none",
    match: Match = "cosine",
    targets: Targets = "pooled",
    nested: tuple[int, ...] = (),
    image_size: int = 224,
    epochs: int = 100,
    batch_size: int = 64,
    lr: float = 1e-3,
    views: int | None = 4,
    measured: int = 2048,
    strict: bool = False,
    seed: int = 0,
) -> Experiment:
    """A backbone learns a foundation model's embeddings of images without labels.

    Args:
        unlabelled: the images.
        teacher: a foundation model by name (histill teachers lists them) or any network of timm, or name=FILE with its
            weights; a run; a folder of saved embeddings; or several of these.
        network: CSAT, ResNet18SAT, or any timm name.
        weights: none, imagenet, a .safetensors or .pt file, a run, or auto: ImageNet where it can be had, else none,
            said aloud.
        match: cosine or mse, through a linear map to the teacher's width, or relation: how far images lie
            apart, without a map.
        targets: what of the teacher is matched: pooled, its embedding; tokens, those of its patches, with the student's
            last feature map; or both.
        nested: widths at which the first numbers of the student's embedding are one by themselves (Matryoshka).
        image_size: height and width in pixels that the student sees; the teacher sees the same views at its own.
        epochs: passes over the images.
        batch_size: images per step.
        lr: learning rate of AdamW at its peak; an epoch of warm-up, half a cosine down.
        views: distinct views per image; the teacher is asked once for each, and its answers are kept on disk: 6 kB
            per view of 1536 numbers, 1.6 MB of its tokens (none: a new view in every epoch, and nothing is kept).
        measured: on how many images, at most, each teacher's mean and deviation are measured.
        strict: an unreadable image is an error.
        seed: of everything random.

    Raises:
        BadInput: no teacher, labelled images, a nested width that is none, or targets that are not there.
    """
    sources = list(teacher) if isinstance(teacher, list | tuple) else [] if teacher is None else [teacher]
    if not sources:
        raise BadInput("foundation.pretrain learns from embeddings: give --teacher uni2-h, a run, or a folder of them")
    if match not in get_args(Match):
        raise BadInput(f"--match {match}: cosine, mse or relation")
    if targets not in get_args(Targets):
        raise BadInput(f"--targets {targets}: pooled, tokens or both")
    if targets == "tokens" and nested:
        raise BadInput("--nested is of embeddings: give --targets pooled or both")
    if unlabelled.classes:
        raise BadInput("foundation.pretrain takes images without labels (read_unlabelled); labels are for fine-tuning")
    make = backbone(network, image_size, 0)
    own = shapes(make, image_size)
    channels = last_map(own).shape[1] if targets != "pooled" else None
    check_nested(own["pooled"].shape[1], nested)

    packed = pack(unlabelled, image_size, strict=strict)
    heard = ("pooled", "tokens") if targets == "both" else (targets,)
    opened = [bound(open_teacher(source), packed.images) for source in sources]
    known = [standardise(one, packed, outputs=heard, most=measured) for one in opened]
    return Experiment(
        data=unlabelled,
        student=start(make, weights),
        objective=Matched(
            own["pooled"].shape[1],
            channels,
            _widths(known, "pooled") if "pooled" in heard else (),
            _widths(known, "tokens") if "tokens" in heard else (),
            match=match,
            nested=nested,
        ),
        teacher=Several(known),
        cache=not all(isinstance(one, Embeddings) for one in opened),  # those are saved already
        cache_outputs=tuple(f"{name}{t}" for t, name in itertools.product(range(len(known)), heard)),
        image_size=image_size,
        augment=TILE,
        views=views,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(adamw, lr=lr, weight_decay=0.05),
        schedule=warm_cosine(epochs),
        select="last",
        strict=strict,
        seed=seed,
    )


def _widths(teachers: Sequence[Standardised], output: str) -> list[int]:
    return [len(teacher.standards[output][0]) for teacher in teachers]
