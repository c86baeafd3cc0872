"""From coarse to fine: which wide tile a tile lies in, and what it costs in agreement."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histill.errors import BadInput

__all__ = ["compare_tiles", "parents"]


def parents(fine: pd.DataFrame, wide: pd.DataFrame, *, step: float, start: tuple[int, int]) -> NDArray[np.int64]:
    """The row of the wide tile that holds each tile's middle; -1 where none does.

    Args:
        fine: tiles, ``x y width height``.
        wide: wide tiles without overlap.
        step: level-0 pixels from one wide tile to the next.
        start: where their grid begins.
    """

    def cells(table: pd.DataFrame) -> list[tuple[int, int]]:
        sides = ((table["x"], table["width"], start[0]), (table["y"], table["height"], start[1]))
        each = (np.floor((at + size / 2 - begin) / step).to_numpy(dtype=np.int64) for at, size, begin in sides)
        return list(zip(*(numbers.tolist() for numbers in each)))

    rows = {cell: row for row, cell in enumerate(cells(wide))}
    return np.array([rows.get(cell, -1) for cell in cells(fine)], dtype=np.int64)


def compare_tiles(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, float]:
    """How far two predictions of the same tiles agree: ``agreement`` (share with the same class), ``mean_difference``
    and ``largest_difference`` of probabilities.

    Raises:
        BadInput: other tiles or classes.
    """
    columns = [name for name in one.columns if name.startswith("prob_")]
    places = ["x", "y", "width", "height"]
    if columns != [name for name in other.columns if name.startswith("prob_")] or not one[places].equals(other[places]):
        raise BadInput("these are predictions of other tiles or classes")
    p, q = (table[columns].to_numpy(dtype=np.float64) for table in (one, other))
    if not len(p):
        return {"agreement": 1.0, "mean_difference": 0.0, "largest_difference": 0.0}
    apart = np.abs(p - q).max(1)
    same = float((p.argmax(1) == q.argmax(1)).mean())
    return {"agreement": same, "mean_difference": float(apart.mean()), "largest_difference": float(apart.max())}
