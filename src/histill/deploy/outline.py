"""Masks of images that nobody has outlined: each pixel's class, or each nucleus, and pictures of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw

from histill.data.decode import decode, square
from histill.data.masks import UNKNOWN
from histill.deploy.predictor import Pixels, Predictor, one_line, predict_folder
from histill.errors import BadInput
from histill.evaluate.figures import BLUE, GREEN, PURPLE, SKY, VERMILION
from histill.evaluate.outlines import PREDICTED, contours
from histill.files import atomic
from histill.models.stardist import StarDist
from histill.models.stardist_instances import predict_instances

__all__ = ["COLOURS", "Outlined", "label_map", "outline_folder", "write_pictures"]

COLOURS = tuple(ImageColor.getrgb(name) for name in (PREDICTED, BLUE, VERMILION, GREEN, PURPLE, SKY, "#ffffff"))
"""Of the classes from 1 on, again from the first where they are more; class 0 is black, and has no outline."""

_SURE = 0.5  # from what probability on a nucleus may be one, as in the run's own figures
_BAND = 256  # rows of a large image that are enlarged at once


@dataclass(frozen=True, eq=False)
class Outlined:
    """One image's mask, or the line that says why there is none.

    Attributes:
        path: the image.
        labels: ``(H, W)`` at the image's own size: class numbers, or the numbers of nuclei, from 1.
        confidence: the mean over pixels of the probability of the class that was said; of nuclei, their mean
            probability, not a number where there are none.
        nuclei: how many there are; None where classes were said.
        error: why there is no mask.
    """

    path: Path
    labels: NDArray[Any] | None
    confidence: float = np.nan
    nuclei: int | None = None
    error: str = ""


def outline_folder(predictor: Predictor, paths: Sequence[Path], *, batch: int = 32) -> Iterator[Outlined]:
    """Outline images in the order of ``paths``; an unreadable one is reported and the rest goes on.

    A network that says each pixel's class sees an image as in training and evaluation: the whole of it, squeezed to its
    image size; its logits are brought to the image's own size. StarDist sees it at its own resolution, in tiles.

    Args:
        predictor: logits ``(B, C, h, w)``, or a run's `StarDist`.
        paths: image files.
        batch: images at a time; StarDist takes one.
    """
    network = getattr(predictor, "network", None)
    if isinstance(network, StarDist):
        return _nuclei(network, paths)
    return _classes(predictor, paths, batch)


def _classes(predictor: Predictor, paths: Sequence[Path], batch: int) -> Iterator[Outlined]:
    sizes: dict[Path, tuple[int, int]] = {}

    def load(path: Path) -> Pixels:
        picture, _ = decode(path)
        sizes[path] = (picture.height, picture.width)
        pixels = square(picture, predictor.image_size)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)

    maps = cast(Predictor, predictor.logits)  # it is called, and asked for nothing else
    for found in predict_folder(maps, paths, load, batch=batch):
        if found.probabilities is None:
            yield Outlined(found.path, None, error=found.error)
        else:
            labels, confidence = label_map(found.probabilities, sizes[found.path])
            yield Outlined(found.path, labels, confidence)


def _nuclei(network: StarDist, paths: Sequence[Path]) -> Iterator[Outlined]:
    for path in paths:
        try:
            found = predict_instances(network, np.asarray(decode(path)[0]), prob_threshold=_SURE)
        except (OSError, BadInput) as error:
            yield Outlined(path, None, error=one_line(error))
            continue
        nuclei = len(np.unique(found.labels[found.labels > 0]))  # one may lie under others
        if found.labels.max(initial=0) >= UNKNOWN:
            yield Outlined(
                path, None, error=f"{path}: {nuclei:,} nuclei, more than a mask can number; cut it into tiles"
            )
        else:
            sure = float(found.scores.mean()) if nuclei else np.nan
            yield Outlined(path, found.labels.astype(np.uint16), sure, nuclei)


def label_map(logits: Pixels, size: tuple[int, int]) -> tuple[NDArray[Any], float]:
    """The likeliest class of each pixel, and the mean of its probability.

    The same as `histill.evaluate.masks.label_map`, bilinear between the logits' pixels, in bands of rows: all logits of
    a large image at once would take gigabytes.

    Args:
        logits: ``(C, h, w)``; a single one is that of the second of two classes.
        size: ``(H, W)`` of the image.
    """
    if len(logits) == 1:
        logits = np.concatenate([np.zeros_like(logits), logits])
    low, high, share = _between(logits.shape[2], size[1])
    wide = logits[..., low] * (1 - share) + logits[..., high] * share
    low, high, share = _between(logits.shape[1], size[0])
    labels = np.empty(size, np.uint8 if len(logits) <= 256 else np.uint16)
    total = 0.0
    for top in range(0, size[0], _BAND):
        rows = slice(top, top + _BAND)
        by = share[rows, None]
        band = wide[:, low[rows]] * (1 - by) + wide[:, high[rows]] * by
        labels[rows] = band.argmax(0)
        total += float((1 / np.exp(band - band.max(0)).sum(0)).sum(dtype=np.float64))
    return labels, total / labels.size


def _between(count: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Pixels]:
    """Of each of ``side`` pixels, which two of ``count`` samples it lies between, and how far from the first."""
    at = np.clip((np.arange(side) + 0.5) * (count / side) - 0.5, 0, count - 1)
    low = at.astype(np.int64)
    return low, np.minimum(low + 1, count - 1), (at - low).astype(np.float32)


def write_pictures(found: Outlined, picture: Image.Image, mask: Path, outlines: Path) -> None:
    """Write a mask as PNG, with a palette (classes) or 16 bits (nuclei), and its outlines over ``picture``."""
    assert found.labels is not None
    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    width = max(1, round(max(picture.size) / 300))
    for number, line in _lines(found):
        pen.line([tuple(point) for point in line.tolist()], fill=_colour(number), width=width)
    drawn = Image.fromarray(found.labels)
    if found.labels.dtype == np.uint8:
        drawn.putpalette([part for number in range(256) for part in _colour(number)])
    for path, image in ((outlines, picture), (mask, drawn)):
        with atomic(path, tidy=True) as temporary:
            image.save(temporary, "PNG")


def _lines(found: Outlined) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """The outlines of each class from 1 on, or of each nucleus, which is of class 1: ``(M, 2)`` points (x, y)."""
    from contourpy import contour_generator

    assert found.labels is not None
    if found.nuclei is not None:
        yield from ((1, line) for line in contours(found.labels))
        return
    for number in range(1, int(found.labels.max()) + 1):
        if (layer := found.labels == number).any():
            inside = np.pad(layer.astype(np.float32), 1)  # so that an outline is closed at the image's edge
            for line in contour_generator(z=inside).lines(0.5):
                yield number, np.asarray(line) - 1


def _colour(number: int) -> tuple[int, ...]:
    return COLOURS[(number - 1) % len(COLOURS)] if number else (0, 0, 0)
