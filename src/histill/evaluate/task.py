"""What a network is judged by: the labels of images, masks, or nothing.

The loop trains all alike; what it asks of the network after an epoch and at the end is one of three small rooms, chosen
by what the images carry: `labels`, `masks`, `unjudged`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from histill.data.images import Images
from histill.data.packed import Packed

__all__ = ["Said", "Task", "task_of"]

Said = dict[str, NDArray[np.float64]]
"""What a network said of N images: named arrays of N rows."""


class Task(Protocol):
    """The functions that a room of judging has."""

    @property
    def SELECTIONS(self) -> tuple[str, ...]:  # noqa: N802 - a constant of the module
        """The validation figures by which an epoch may be selected; the first is the default."""

    def ask(
        self, network: nn.Module, packed: Packed, rows: NDArray[np.int64], *, device: torch.device | str = "cpu"
    ) -> Said:
        """What the network says of the images themselves."""

    def validate(self, said: Said, packed: Packed, rows: NDArray[np.int64]) -> dict[str, float]:
        """The figures of an epoch; with ``loss``, the cross-entropy."""

    def predictions(self, images: Images, rows: NDArray[np.int64], said: Said) -> pd.DataFrame:
        """``predictions.parquet``: a row per image."""

    def finish(self, out: Path, info: dict[str, Any]) -> None:
        """``metrics.json``, figures and page, of what the run folder holds."""


def task_of(images: Images) -> Task:
    """The room that judges a network trained on these images."""
    if images.masks:
        from histill.evaluate import masks

        return masks
    if not images.classes:
        from histill.evaluate import unjudged

        return unjudged
    from histill.evaluate import labels

    return labels
