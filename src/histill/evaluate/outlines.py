"""Outlines of instances or classes over images: a person sees at once what was found and missed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histill.errors import BadInput
from histill.evaluate.figures import drawing

__all__ = ["contours", "outlines"]

TRUTH, PREDICTED = "#00e5a0", "#ffd400"  # neither is a colour of haematoxylin, eosin or brown stains
_COLUMNS = 4


def outlines(
    images: Sequence[NDArray[np.uint8]],
    masks: Sequence[NDArray[Any]],
    path: Path,
    *,
    predicted: Sequence[NDArray[Any]] | None = None,
) -> None:
    """Draw images with the outlines of their masks, four in a row; truth and prediction in two colours.

    Args:
        images: ``(H, W, 3)`` each.
        masks: ``(H, W)`` integers each, instances or classes: 0 background, below 0 unknown.
        path: The PNG to write.
        predicted: The same of a network. They are drawn over those of the truth, thinner.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    layers = [("truth", TRUTH, 2.0, masks)]
    if predicted is not None:
        layers.append(("prediction", PREDICTED, 1.0, predicted))
    if not images or any(len(each) != len(images) for *_, each in layers):
        raise BadInput("outlines: give at least one image, and a mask (a prediction) for each")
    for *_, each in layers:
        for image, mask in zip(images, each, strict=True):
            if image.shape[:2] != mask.shape:
                raise BadInput(f"outlines: an image of {image.shape[:2]} and a mask of {mask.shape}")

    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    aspect = max(image.shape[0] / image.shape[1] for image in images)
    width = 3.2 if columns > 1 else 5.0
    with drawing(
        path, columns * width, rows * (width * aspect + 0.3) + (0.3 if predicted is not None else 0)
    ) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for number, ax in enumerate(grid):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if number >= len(images):
                continue
            ax.imshow(images[number], interpolation="bilinear")
            for _, colour, weight, each in layers:
                ax.add_collection(LineCollection(contours(each[number]), colors=colour, linewidths=weight))
        if predicted is not None:
            handles = [Line2D([], [], color=colour, linewidth=2 * weight) for _, colour, weight, _ in layers]
            legend = figure.legend(handles, [name for name, *_ in layers], loc="outside lower center", ncols=2)
            legend.set_in_layout(True)


def contours(mask: NDArray[Any]) -> list[NDArray[np.float64]]:
    """The outlines of every number above 0, each ``(M, 2)`` points (x, y), whole numbers at the centres of pixels."""
    from contourpy import contour_generator
    from scipy.ndimage import find_objects

    names, rows = np.unique(np.maximum(mask, 0), return_inverse=True)
    ranks = rows.reshape(mask.shape) + int(names[0] > 0)  # small and dense, as find_objects wants them
    lines: list[NDArray[np.float64]] = []
    for rank, box in enumerate(find_objects(ranks), 1):
        inside = np.pad((ranks[box] == rank).astype(np.float32), 1)
        corner = np.array([box[1].start, box[0].start]) - 1
        lines += [line + corner for line in contour_generator(z=inside).lines(0.5)]
    return lines
