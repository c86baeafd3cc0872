"""Pseudo labels: what a nucleus segmenter says of tissue that nobody labelled (Kim et al. 2023, Eqs. 1 and 2)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from histill.data.decode import decode
from histill.data.images import Images, few
from histill.errors import BadInput
from histill.files import atomic, cache_dir, digest, file_digest
from histill.machine import find_device
from histill.models.stardist_instances import predict_instances, predict_prob
from histill.progress import progress
from histill.teachers import weights_digest

__all__ = ["Kind", "nuclei", "pseudo_label"]

Kind = Literal["prob", "instances"]

_VERSION = 1
CLASSES = ("background", "nucleus")


def nuclei(
    segmenter: nn.Module,
    image: NDArray[np.uint8],
    *,
    kind: Kind = "prob",
    threshold: float = 0.5,
    scale: float = 2.0,
) -> NDArray[np.bool_]:
    """Where the segmenter sees a nucleus.

    ``prob``: ``N = (prob >= threshold)`` at each pixel, Eqs. 1 and 2 to the letter. StarDist's prob falls towards a
    nucleus's edge, so that a threshold of 0.5 keeps its core. ``instances``: the union of the nuclei themselves.

    Args:
        segmenter: a `StarDist`.
        image: ``(H, W, 3)``.
        kind: ``prob`` or ``instances``.
        threshold: of prob: where a nucleus is, or may be outlined from. The released weights have 0.692 for outlines.
        scale: by how much the image is enlarged before the segmenter looks: 2 where the patches are at 20x and it
            learnt at 40x.

    Returns:
        ``(H, W)``.
    """
    if kind == "instances":
        found = predict_instances(segmenter, image, scale=scale, prob_threshold=threshold)
        return np.asarray(found.labels > 0)
    return np.asarray(predict_prob(segmenter, image, scale=scale) >= threshold)


def pseudo_label(
    images: Images,
    segmenter: nn.Module,
    *,
    kind: Kind = "prob",
    threshold: float = 0.5,
    scale: float = 2.0,
    strict: bool = False,
    device: str = "auto",
) -> Images:
    """The same images with a mask each: 0 background, 1 nucleus. The segmenter is asked once for each, ever.

    The masks are PNG files in the cache folder, keyed by the segmenter's weights and these arguments; a run that was
    stopped goes on after the last one.

    Args:
        images: unlabelled images; their files are read at their own resolution.
        segmenter: a `StarDist`.
        kind: see `nuclei`.
        threshold: see `nuclei`.
        scale: see `nuclei`.
        strict: an unreadable image is an error; otherwise it is left out with a notice.
        device: where the segmenter computes.

    Raises:
        BadInput: a kind that there is not, or an unreadable image.
    """
    if kind not in ("prob", "instances"):
        raise BadInput(f"pseudo labels are of kind prob or instances, not {kind!r}")
    where = find_device(device)
    segmenter = segmenter.eval().requires_grad_(False)
    home = cache_dir("pseudo", digest([_VERSION, weights_digest(segmenter), kind, threshold, scale])[:24])
    segmenter = segmenter.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    draw = partial(nuclei, segmenter, kind=kind, threshold=threshold, scale=scale)
    masks = [home / f"{content[:32]}.png" for content in images.frame["content"]]
    damaged: dict[Path, str] = {}
    todo = [(path, mask) for path, mask in zip(images.paths(), masks) if not mask.exists()]
    with progress("pseudo labels", len(images), done=len(images) - len(todo)) as bar:
        for path, mask in todo:
            try:
                _write(mask, draw(np.asarray(decode(path)[0])))
            except BadInput as error:
                if strict:
                    raise
                damaged[mask] = str(error).rsplit(": ", 1)[-1]
            bar.advance()
    there = [mask not in damaged for mask in masks]
    masks = [mask for mask in masks if mask not in damaged]
    if not masks:
        raise BadInput(f"{images.root}: none of {len(images)} images is readable")
    lines = [f"{len(damaged)} unreadable images were left out: {few(damaged.values())}"] if damaged else []
    frame = images.frame[there].assign(mask=[str(m) for m in masks], mask_content=[file_digest(m) for m in masks])
    return Images(frame.reset_index(drop=True), images.root, CLASSES, (*images.notices, *lines), "classes")


def _write(path: Path, mask: NDArray[np.bool_]) -> None:
    with atomic(path) as temporary:
        Image.fromarray(mask.astype(np.uint8)).save(temporary, "PNG", optimize=True)
