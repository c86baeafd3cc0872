"""Judged by masks: pixels counted per image first, IoU and Dice of the sums second.

IoU of a class is ``tp / (tp + fp + fn)`` over all pixels of all images, as Eq. 12 of the RCKD paper has it, and mIoU is
its mean over the classes that the truth holds; Dice is ``2 tp / (2 tp + fp + fn)``. Both are functions of sums of
counts, so that a bootstrap over patients is one matrix product, as in `histill.evaluate.metrics`. Where masks number
nuclei, the nuclei that the network finds are matched one to one as well (`histill.evaluate.objects`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from histill.data.images import Images
from histill.data.packed import Packed
from histill.errors import BadInput
from histill.evaluate.finish import check_columns
from histill.evaluate.metrics import Array
from histill.evaluate.objects import match, object_formulas
from histill.memory import fits_of

__all__ = ["SELECTIONS", "MaskScores", "ask", "finish", "label_map", "predictions", "scores", "validate"]

SELECTIONS: tuple[str, ...] = ("miou", "mdice", "object_f1", "loss", "last")
"""``object_f1`` where masks number nuclei and the network outlines them."""

OBJECTS = ("tp", "fp", "fn", "iou")
OBJECT_FIGURES = ("object_f1", "panoptic_quality")
_BATCH = 16


@dataclass(frozen=True, eq=False)
class MaskScores:
    """What a network drew on ``N`` images.

    Attributes:
        counts: ``(N, C, 3)`` pixels of each class: true positive, false positive, false negative.
        units: ``(N,)`` what is resampled: the patient, or the image itself.
        classes: the names of the C classes.
        objects: ``(N, 4)`` nuclei matched, made up and missed, and the sum of the matched ones' IoU; None where the
            masks are not of nuclei.
    """

    counts: NDArray[Any]
    units: NDArray[Any]
    classes: tuple[str, ...]
    objects: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if self.counts.ndim != 3 or self.counts.shape[1:] != (len(self.classes), 3) or not len(self.counts):
            raise BadInput(f"counts: shape {self.counts.shape}, give (images, {len(self.classes)}, 3)")

    def __len__(self) -> int:
        return len(self.counts)

    @cached_property
    def _units(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        names, rows = np.unique(self.units, return_inverse=True)
        return names, rows.astype(np.int64)

    @property
    def unit_names(self) -> NDArray[Any]:
        """``(U,)`` each unit once, sorted."""
        return self._units[0]

    @cached_property
    def _sums(self) -> Array:
        """``(U, 3C + 4)``: the counts of each unit."""
        objects = np.zeros((len(self), 4)) if self.objects is None else self.objects
        rows = np.concatenate([self.counts.reshape(len(self), -1), objects], axis=1).astype(np.float64)
        sums = np.zeros((len(self.unit_names), rows.shape[1]))
        np.add.at(sums, self._units[1], rows)
        return sums

    @cached_property
    def _present(self) -> NDArray[np.bool_]:
        """``(C,)`` the classes that the truth holds: means over classes run over these, in every resample."""
        present: NDArray[np.bool_] = self.counts[:, :, [0, 2]].sum((0, 2)) > 0
        return present

    @property
    def names(self) -> list[str]:
        """The figures that there are."""
        each = [f"{what}_{name}" for what in ("iou", "dice") for name in self.classes]
        return ["miou", "mdice", "pixel_accuracy", *each, *([] if self.objects is None else OBJECT_FIGURES)]

    def figures(self, weights: Array | None = None, *, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Each figure of each weighting of the units, ``(R,)``; see `histill.evaluate.metrics.metrics`."""
        weights = np.ones((len(self.unit_names), 1)) if weights is None else weights
        sums = self._sums.T @ weights
        tp, fp, fn = sums[: 3 * len(self.classes)].reshape(len(self.classes), 3, -1).swapaxes(0, 1)
        objects = sums[3 * len(self.classes) :]
        with np.errstate(invalid="ignore", divide="ignore"):
            ious, dices = tp / (tp + fp + fn), 2 * tp / (2 * tp + fp + fn)  # (C, R), nan of a class that is nowhere
            # A resample that lacks one of the truth's classes does not estimate their mean.
            held = np.where(tp + fn > 0, 1.0, np.nan)[self._present]
            everything = {
                "miou": (ious[self._present] * held).mean(axis=0),
                "mdice": (dices[self._present] * held).mean(axis=0),
                "pixel_accuracy": tp.sum(axis=0) / (tp + fn).sum(axis=0),
                **{f"iou_{name}": value for name, value in zip(self.classes, ious)},
                **{f"dice_{name}": value for name, value in zip(self.classes, dices)},
                **(object_formulas(*objects) if self.objects is not None else {}),
            }
        return {name: everything[name] for name in (self.names if names is None else names)}

    def units_behind(self, name: str) -> int:
        """How many units a share is over: those that hold the class; for a mean the rarest class's, times the classes.

        Of a class that the truth lacks those where it was drawn.
        """
        everyone = len(self.unit_names)
        tp, fp, fn = self._sums[:, : 3 * len(self.classes)].reshape(everyone, -1, 3).transpose(2, 0, 1)
        held = (tp + fn > 0).sum(axis=0)  # (C,)
        if name in ("miou", "mdice"):
            return min(everyone, int(self._present.sum() * held[self._present].min(initial=everyone)))
        for number, label in enumerate(self.classes):
            if name in (f"iou_{label}", f"dice_{label}"):
                return int(held[number] or (fp[:, number] > 0).sum())
        return everyone


def label_map(outputs: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """``(B, H, W)`` class numbers at full size: the likeliest logit's; of a single logit, where it is positive."""
    logits = outputs["logits"].float()
    if logits.ndim != 4:
        raise BadInput(
            f"the images have masks, and the network gives one answer for each image, logits {tuple(logits.shape)}; "
            "take a network with a decoder, as rckd.finetune does, or give --target labels"
        )
    if logits.shape[-2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def ask(
    network: nn.Module, packed: Packed, rows: NDArray[np.int64], *, device: torch.device | str = "cpu"
) -> dict[str, NDArray[np.float64]]:
    """``counts`` ``(N, C, 3)``, ``loss`` ``(N,)`` (cross-entropy, mean over pixels) and, of nuclei, ``objects``."""
    classes, instances = len(packed.images.classes), packed.images.masks == "instances"
    found: dict[str, list[NDArray[np.float64]]] = {"counts": [], "loss": []}
    mode = network.training
    network.eval()

    def look(part: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        batch = packed.batch(part, device=device)
        assert batch.masks is not None
        outputs = network(batch.images)
        truth = batch.masks.clamp(max=1) if instances else batch.masks
        size = (truth.shape[-2], truth.shape[-1])
        said, objects = label_map(outputs, size), {}
        if instances and (draw := getattr(network, "instances", None)):
            nuclei = draw(outputs, size)
            said = torch.from_numpy(nuclei > 0).long().to(truth.device)
            pairs = zip(nuclei, batch.masks.cpu().numpy())
            objects["objects"] = np.array([astuple(match(t, n)) for n, t in pairs])
        loss = _cross_entropy(outputs["logits"], truth).cpu().double().numpy()
        return {"counts": _count(said, truth, classes), "loss": loss, **objects}

    with torch.no_grad():
        for start in range(0, len(rows), _BATCH):
            for piece in fits_of(network, "judging")(look, rows[start : start + _BATCH]):
                for name, values in piece.items():
                    found.setdefault(name, []).append(values)
    network.train(mode)
    empty = {"counts": np.zeros((0, classes, 3)), "loss": np.zeros(0)}
    return {name: np.concatenate(values) if values else empty[name] for name, values in found.items()}


def _count(said: Tensor, truth: Tensor, classes: int) -> NDArray[np.float64]:
    """``(B, C, 3)`` true positives, false positives, false negatives, of the pixels that are known."""
    images = len(truth)
    place = torch.arange(images, device=truth.device)[:, None, None].expand_as(truth)
    index = (place * classes + truth) * classes + said
    known = truth >= 0
    confusion = torch.bincount(index[known], minlength=images * classes * classes).view(images, classes, classes)
    right = confusion.diagonal(dim1=1, dim2=2)
    counts = torch.stack([right, confusion.sum(1) - right, confusion.sum(2) - right], 2)
    return counts.cpu().double().numpy()


def _cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """``(B,)``."""
    logits = logits.float()
    if logits.shape[-2:] != truth.shape[-2:]:
        logits = F.interpolate(logits, truth.shape[-2:], mode="bilinear", align_corners=False)
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    known = (truth >= 0).flatten(1).sum(1).clamp(min=1)
    return F.cross_entropy(logits, truth, ignore_index=-1, reduction="none").flatten(1).sum(1) / known


def validate(said: dict[str, NDArray[np.float64]], packed: Packed, rows: NDArray[np.int64]) -> dict[str, float]:
    """mIoU, mean Dice, IoU of each class and cross-entropy; of nuclei also object F1."""
    found = MaskScores(said["counts"], np.arange(len(rows)), packed.images.classes, said.get("objects"))
    names = ["miou", "mdice", *([] if found.objects is None else ["object_f1"])]
    figures = found.figures(names=names)
    return {"loss": float(said["loss"].mean()), **{n: float(figures[n][0]) for n in names}}


def predictions(images: Images, rows: NDArray[np.int64], said: dict[str, NDArray[np.float64]]) -> pd.DataFrame:
    """The counts of each image, and its IoU and Dice of each class."""
    frame = images.frame.iloc[rows]
    table: dict[str, Any] = {name: frame[key].tolist() for name, key in (("image", "path"), ("patient", "patient"))}
    table |= {"split": frame["split"].tolist()}
    for number, name in enumerate(images.classes):
        tp, fp, fn = said["counts"][:, number].T
        table |= {f"tp_{name}": tp, f"fp_{name}": fp, f"fn_{name}": fn}
        with np.errstate(invalid="ignore", divide="ignore"):
            table |= {f"iou_{name}": tp / (tp + fp + fn), f"dice_{name}": 2 * tp / (2 * tp + fp + fn)}
    if "objects" in said:
        table |= {f"objects_{name}": said["objects"][:, i] for i, name in enumerate(OBJECTS)}
    return pd.DataFrame(table)


def scores(table: pd.DataFrame, classes: tuple[str, ...], split: str | None = None) -> MaskScores:
    """The `MaskScores` of a predictions table; `BadInput` where it has no image of the split."""
    part = table if split is None else table[table["split"] == split]
    if not len(part):
        raise BadInput(f"no predictions of the {split} split")
    check_columns(part, ["image", "patient", *(f"{what}_{c}" for what in ("tp", "fp", "fn") for c in classes)])
    counts = np.stack([part[[f"{what}_{c}" for what in ("tp", "fp", "fn")]].to_numpy() for c in classes], axis=1)
    named = part["patient"].where(part["patient"] != "", part["image"])
    objects = part[[f"objects_{n}" for n in OBJECTS]].to_numpy() if "objects_tp" in part else None
    return MaskScores(counts.astype(np.float64), named.to_numpy(dtype=str), classes, objects)


def finish(out: Path, info: dict[str, Any]) -> None:
    """``metrics.json``, figures and page of a run on masks."""
    from histill.evaluate.finish_masks import finish as whole

    whole(out, info)
