"""Outlines by a U-Net per class: each tile goes to the U-Net of the class that it was taken for (MAC-ResNet, 1.5).

Where tiles overlap, what they say is averaged: a pixel's score for a class is the mean over the tiles that cover it,
with 0 from those of another class. So classification and segmentation have to agree before a pixel is marked.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, softmax

from histill.deploy.deliver import open_any
from histill.deploy.predictor import Pixels, Predictor, one_line
from histill.errors import BadInput, out_of_memory
from histill.files import claim
from histill.memory import Fits
from histill.progress import progress
from histill.slides.engine import device_of
from histill.slides.grid import Grid
from histill.slides.heatmap import Heatmap, released, write_ome_tiff
from histill.slides.slide import Slide

__all__ = ["Segmentation", "open_segmenters", "segment"]

_THRESHOLD = 0.5
_CPU_PX = 1 << 18  # that a U-Net looks at at once on a CPU, where more is no faster and takes memory
_OUTLINED_PX = 3072  # outlines finer than that of a whole slide are in the mask


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A mask over a slide.

    Attributes:
        labels: ``(H, W)`` uint8, 0 for nothing, k for the k-th class; mapped from a file.
        classes: of the classifier.
        segmented: those that have a U-Net.
        l0_pixel: level-0 pixels that a pixel is wide.
        mpp: microns that it is wide.
    """

    labels: NDArray[np.uint8]
    classes: tuple[str, ...]
    segmented: tuple[str, ...]
    l0_pixel: float
    mpp: float

    def summary(self) -> dict[str, Any]:
        """Area of each class, and the resolution."""
        counts = np.zeros(256, np.int64)
        rows = max(1, (1 << 22) // self.labels.shape[1])
        for top in range(0, len(self.labels), rows):
            counts += np.bincount(self.labels[top : top + rows].ravel(), minlength=256)
            released(self.labels)
        area = {name: float(counts[self.classes.index(name) + 1]) * self.mpp**2 for name in self.segmented}
        return {"area_um2": area, "mpp": self.mpp, "l0_pixel": self.l0_pixel}

    def over(self, heatmap: Heatmap) -> tuple[Heatmap, NDArray[np.float32]]:
        """What outlines are drawn from: pixels of whole mask pixels, at most `_OUTLINED_PX` along the longer side.

        Returns:
            ``heatmap``'s probabilities of the segmented classes, each pixel that of the nearest; and ``(C, H, W)``, the
            share of each pixel that is marked as the class.
        """
        height, width = self.labels.shape
        side = math.ceil(max(height, width) / _OUTLINED_PX)
        rows, columns = math.ceil(height / side), math.ceil(width / side)
        share = np.zeros((len(self.segmented), rows, columns), np.float32)
        values = [self.classes.index(name) + 1 for name in self.segmented]
        starts = np.arange(0, width, side)
        wide = np.diff(np.append(starts, width))
        for row in range(rows):
            band = np.asarray(self.labels[row * side : (row + 1) * side])
            for number, value in enumerate(values):
                share[number, row] = np.add.reduceat((band == value).sum(0), starts) / (len(band) * wide)
            released(self.labels)
        pixel = self.l0_pixel * side
        ys, xs = (
            np.minimum((np.arange(count) + 0.5) * pixel / heatmap.l0_pixel, own - 1).astype(np.int64)
            for count, own in zip((rows, columns), heatmap.covered.shape)
        )
        own = [heatmap.classes.index(name) for name in self.segmented]
        probabilities = np.stack([heatmap.probabilities[number][np.ix_(ys, xs)] for number in own])
        everywhere = np.ones((rows, columns), np.bool_)
        return Heatmap(probabilities, everywhere, self.segmented, pixel, self.mpp * side, heatmap.dimensions), share

    def write(self, path: Path) -> Path:
        """As OME-TIFF; coarser levels take every second pixel, as labels have no mean."""
        return write_ome_tiff(path, self.labels[None], names=["class"], mpp=self.mpp, labels=True)


def open_segmenters(
    paths: Mapping[str, Path], classes: Sequence[str], *, tile: int, device: str = "auto"
) -> dict[str, Predictor]:
    """The U-Net of each class; each looks at one white tile, so that what does not fit is known before the slides.

    Args:
        paths: by class, a run, an ``.onnx`` or a TorchScript file with logits ``(B, K, H, W)``.
        classes: of the classifier.
        tile: side in pixels of what they will be shown.
        device: where runs compute.

    Raises:
        BadInput: a name that is no class, no model there, or one that does not outline tiles of this size.
    """
    if unknown := [name for name in paths if name not in classes]:
        raise BadInput(f"--segment {unknown[0]}: the classifier's classes are {', '.join(classes)}")
    found = {name: open_any(path, device=device) for name, path in paths.items()}
    for name, predictor in found.items():
        _foreground(predictor, np.ones((1, 3, tile, tile), np.float32), name)
    return found


def segment(
    slide: Slide,
    tiles: pd.DataFrame,
    grid: Grid,
    segmenters: Mapping[str, Predictor],
    *,
    classes: Sequence[str],
    scratch: Path | None = None,
    batch_size: int = 32,
    threads: int | None = None,
) -> Segmentation:
    """Send tiles to the U-Net of their class and stitch what they say, a row of tiles at a time.

    Memory holds one row of tiles across the slide and the batches under way; the mask lies in a file.

    Args:
        slide: open.
        tiles: ``x y prob_<class>``.
        grid: that made them.
        segmenters: by class.
        classes: of the classifier.
        scratch: a folder for the mask's file (default: memory).
        batch_size: tiles at once.
        threads: readers.

    Raises:
        BadInput: a model that does not outline.
    """
    plan = grid.plan(slide)
    pixel, tile = plan.l0_span / grid.tile, grid.tile
    width, height = (max(1, math.ceil(side / pixel)) for side in slide.dimensions)
    names = [name for name in classes if name in segmenters]
    values = np.array([classes.index(name) + 1 for name in names], np.uint8)
    if scratch is None:
        labels = np.zeros((height, width), np.uint8)
    else:
        labels = np.memmap(scratch / "mask.map", np.uint8, "w+", shape=(height, width))
        claim(scratch / "mask.map")
    said = tiles[[f"prob_{name}" for name in classes]].to_numpy().argmax(1)
    # Pixels of the mask; a tile may begin a fraction of one off, and lies where its corner is nearest.
    lefts, tops = (np.rint(tiles[axis].to_numpy() / pixel).astype(np.int64) for axis in ("x", "y"))
    band = _Band(labels, values, tile)
    fits = {name: Fits(f"the model of --segment {name}") for name in names}
    if all(device_of(unet) == "cpu" for unet in segmenters.values()):
        batch_size = min(batch_size, max(1, _CPU_PX // tile**2))
    routed = int(np.isin(said, [classes.index(name) for name in names]).sum())
    with (
        ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool,
        progress("outlining", routed, "tiles") as bar,
    ):
        for rows, images, name in _routed(pool, slide, grid, tiles, tops, said, classes, segmenters, batch_size):
            band.settle(int(tops[rows[0]]))
            found = None
            if images is not None:
                found = np.concatenate(fits[name](partial(_foreground, segmenters[name], name=name), images))
                bar.advance(len(rows))
            for number, row in enumerate(rows):
                band.add(int(lefts[row]), None if found is None else (names.index(name), found[number]))
    band.settle(height)
    return Segmentation(labels, tuple(classes), tuple(names), pixel, slide.require_mpp() * pixel)


class _Band:
    """The rows of the mask that tiles of one line touch, summed until no later tile does."""

    def __init__(self, labels: NDArray[np.uint8], values: NDArray[np.uint8], tile: int) -> None:
        self.labels, self.values, self.tile, self.top = labels, values, tile, 0
        self.total = np.zeros((len(values), tile, labels.shape[1]), np.float32)
        self.weight = np.zeros((tile, labels.shape[1]), np.uint16)

    def add(self, left: int, said: tuple[int, NDArray[np.float32]] | None) -> None:
        """A tile whose first row is the band's: what it says of a class, or that it was sent nowhere."""
        start, stop = max(0, left), min(self.labels.shape[1], left + self.tile)
        self.weight[:, start:stop] += 1
        if said is not None:
            self.total[said[0], :, start:stop] += said[1][:, start - left : stop - left]

    def settle(self, until: int) -> None:
        """Decide the rows before ``until`` and move on to it."""
        count = min(until - self.top, self.tile)
        if count <= 0:
            return
        rows = max(0, min(count, len(self.labels) - self.top))
        if rows and len(self.values):
            for start in range(0, self.labels.shape[1], 4096):
                part = slice(start, start + 4096)
                if not self.total[:, :rows, part].any():
                    continue  # the file is 0, and takes no room, where no U-Net was asked
                score = self.total[:, :rows, part] / np.maximum(self.weight[:rows, part], 1)
                sure = score.max(0) >= _THRESHOLD
                self.labels[self.top : self.top + rows, part] = np.where(sure, self.values[score.argmax(0)], 0)
            released(self.labels)
        for sums in (*self.total, self.weight):
            sums[: self.tile - count] = sums[count:]
            sums[self.tile - count :] = 0
        self.top = until


def _routed(
    pool: ThreadPoolExecutor,
    slide: Slide,
    grid: Grid,
    tiles: pd.DataFrame,
    tops: NDArray[np.int64],
    said: NDArray[np.int64],
    classes: Sequence[str],
    segmenters: Mapping[str, Predictor],
    batch_size: int,
) -> Iterator[tuple[NDArray[np.int64], Pixels | None, str]]:
    """Rows of tiles of one class in one line of the grid, and their pixels where that class has a U-Net."""
    xs, ys = tiles["x"].to_numpy(), tiles["y"].to_numpy()

    def read(rows: NDArray[np.int64]) -> Pixels:
        pixels = np.stack([grid.read(slide, int(xs[row]), int(ys[row])) for row in rows])
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)

    waiting: deque[tuple[NDArray[np.int64], Future[Pixels] | None, str]] = deque()
    for line in np.unique(tops):
        for number, name in enumerate(classes):
            rows = np.flatnonzero((tops == line) & (said == number))
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                waiting.append((part, pool.submit(read, part) if name in segmenters else None, name))
                while len(waiting) > 4:
                    part, reading, its = waiting.popleft()
                    yield part, None if reading is None else reading.result(), its
    for part, reading, its in waiting:
        yield part, None if reading is None else reading.result(), its


def _foreground(predictor: Predictor, images: Pixels, name: str) -> Pixels:
    """``(B, 3, H, W)`` -> the probability ``(B, H, W)`` of what the U-Net outlines.

    Of one channel its sigmoid; of several the channel of that name, else the last.
    """
    try:
        logits = predictor.logits(images)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise BadInput(
            f"the model of --segment {name} does not take tiles of {images.shape[-1]} ({one_line(error)})"
        ) from None
    if logits.ndim != 4 or logits.shape[2:] != images.shape[2:]:
        raise BadInput(
            f"the model of --segment {name} gives {logits.shape}, not an outline of {images.shape[-1]} pixels"
        )
    if logits.shape[1] == 1:
        return np.asarray(expit(logits[:, 0]), np.float32)
    channel = predictor.classes.index(name) if name in predictor.classes else logits.shape[1] - 1
    return np.asarray(softmax(logits, axis=1)[:, channel], np.float32)
