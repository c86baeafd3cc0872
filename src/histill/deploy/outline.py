"""Masks of images that nobody has outlined: each pixel's class, or each nucleus, and pictures of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw

from histill.data.decode import FORMATS, MAX_PIXELS, decode, square
from histill.data.masks import UNKNOWN
from histill.data.windows import starts
from histill.deploy.predictor import Pixels, Predictor, one_line, predict_folder
from histill.errors import BadInput
from histill.evaluate.figures import BLUE, GREEN, PURPLE, SKY, VERMILION
from histill.evaluate.outlines import PREDICTED, contours
from histill.files import atomic
from histill.memory import Fits
from histill.models.stardist import StarDist
from histill.models.stardist_instances import predict_instances

__all__ = ["COLOURS", "Outlined", "label_map", "outline_folder", "write_pictures"]

COLOURS = tuple(ImageColor.getrgb(name) for name in (PREDICTED, BLUE, VERMILION, GREEN, PURPLE, SKY, "#ffffff"))
"""Of the classes from 1 on, again from the first where they are more; class 0 is black, and has no outline."""

_SURE = 0.5  # from what probability on a nucleus may be one, as in the run's own figures
_WIDER = 1.5  # how much wider a field is than that of training before it is cut into tiles
_UNKNOWN: Mapping[Path, float] = MappingProxyType({})
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


def outline_folder(
    predictor: Predictor, paths: Sequence[Path], *, batch: int = 32, scales: Mapping[Path, float] = _UNKNOWN
) -> Iterator[Outlined]:
    """Outline images in the order of ``paths``; an unreadable one is reported and the rest goes on.

    A network that says each pixel's class sees an image as in training and evaluation: the whole of it, squeezed to its
    image size. Where its scale is known and it shows a wider field than that, it is seen at that scale in tiles, and
    where they overlap, the logits are averaged, those of a tile's middle counting most. Logits are brought to the
    image's own size. StarDist sees an image at its own resolution, in tiles.

    Args:
        predictor: logits ``(B, C, h, w)``, or a run's `StarDist`.
        paths: image files.
        batch: images, or tiles, at a time; StarDist takes one.
        scales: how many pixels of the network a pixel of an image is wide, where known: microns over microns.
    """
    network = getattr(predictor, "network", None)
    if isinstance(network, StarDist):
        yield from _nuclei(network, paths)
        return
    for wide, group in groupby(paths, lambda path: _is_wide(path, scales.get(path), predictor.image_size)):
        if wide:
            fits = Fits("outlining")
            yield from (_tiled(predictor, path, scales[path], batch, fits) for path in group)
        else:
            yield from _whole(predictor, list(group), batch)


def _whole(predictor: Predictor, paths: Sequence[Path], batch: int) -> Iterator[Outlined]:
    sizes: dict[Path, tuple[int, int]] = {}

    def load(path: Path) -> Pixels:
        picture, _ = decode(path)
        sizes[path] = (picture.height, picture.width)
        return _channels_first(square(picture, predictor.image_size))

    maps = cast(Predictor, predictor.logits)  # it is called, and asked for nothing else
    for found in predict_folder(maps, paths, load, batch=batch):
        if found.probabilities is None:
            yield Outlined(found.path, None, error=found.error)
        else:
            labels, confidence = label_map(found.probabilities, sizes[found.path])
            yield Outlined(found.path, labels, confidence)


def _is_wide(path: Path, scale: float | None, size: int) -> bool:
    if scale is None:
        return False
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return bool(max(picture.size) * scale > _WIDER * size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False  # whoever reads it says so


def _tiled(predictor: Predictor, path: Path, scale: float, batch: int, fits: Fits) -> Outlined:
    try:
        picture, _ = decode(path)
    except (OSError, BadInput) as error:
        return Outlined(path, None, error=one_line(error))
    size = predictor.image_size
    width, height = (max(1, round(side * scale)) for side in picture.size)
    if width * height > MAX_PIXELS:
        return Outlined(path, None, error=f"{path}: {width}x{height} pixels as the network sees it; cut it into tiles")
    seen = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0))
    # A strip is mirrored up to a tile's height; what is said of the mirror is cut off again.
    seen = np.pad(seen, ((0, max(0, size - height)), (0, max(0, size - width)), (0, 0)), mode="symmetric")
    places = list(product(starts(len(seen), size, 3 * size // 4), starts(seen.shape[1], size, 3 * size // 4)))
    hat = 1 - np.abs(np.linspace(-1, 1, size + 2, dtype=np.float32)[1:-1])
    weight = hat[:, None] * hat
    total: Pixels = np.zeros((), np.float32)
    weights = np.zeros(seen.shape[:2], np.float32)
    for start in range(0, len(places), batch):
        part = places[start : start + batch]
        tiles = np.stack([_channels_first(seen[y : y + size, x : x + size]) for y, x in part])
        said = np.concatenate(fits(predictor.logits, tiles))
        if said.shape[2:] != (size, size):
            said = np.stack([np.concatenate([b for _, b in _bands(one, (size, size))], 1) for one in said])
        if not total.ndim:
            total = np.zeros((said.shape[1], *weights.shape), np.float32)
        for (y, x), one in zip(part, said):
            total[:, y : y + size, x : x + size] += one * weight
            weights[y : y + size, x : x + size] += weight
    inside = (total / weights)[:, :height, :width]
    labels, confidence = label_map(inside, (picture.height, picture.width))
    return Outlined(path, labels, confidence)


def _channels_first(pixels: NDArray[np.uint8]) -> Pixels:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


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
    labels = np.empty(size, np.uint8 if len(logits) <= 256 else np.uint16)
    total = 0.0
    for rows, band in _bands(logits, size):
        labels[rows] = band.argmax(0)
        total += float((1 / np.exp(band - band.max(0)).sum(0)).sum(dtype=np.float64))
    return labels, total / labels.size


def _bands(logits: Pixels, size: tuple[int, int]) -> Iterator[tuple[slice, Pixels]]:
    """``(C, h, w)`` at another size, bilinear, some rows ``(C, rows, W)`` at a time."""
    low, high, share = _between(logits.shape[2], size[1])
    wide: Pixels = logits[..., low] * (1 - share) + logits[..., high] * share
    low, high, share = _between(logits.shape[1], size[0])
    for top in range(0, size[0], _BAND):
        rows = slice(top, top + _BAND)
        by = share[rows, None]
        band: Pixels = wide[:, low[rows]] * (1 - by) + wide[:, high[rows]] * by
        yield rows, band


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
