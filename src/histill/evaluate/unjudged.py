"""Judged by nothing: of unlabelled images the loss of training is all that there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from histill.data.images import Images
from histill.data.packed import Packed
from histill.evaluate import figures
from histill.evaluate.page import Picture, write_report
from histill.evaluate.report import Table
from histill.files import write_json

__all__ = ["SELECTIONS", "ask", "finish", "predictions", "validate"]

SELECTIONS: tuple[str, ...] = ("last",)


def ask(
    network: nn.Module, packed: Packed, rows: NDArray[np.int64], *, device: torch.device | str = "cpu"
) -> dict[str, NDArray[np.float64]]:
    """Nothing."""
    return {}


def validate(said: dict[str, NDArray[np.float64]], packed: Packed, rows: NDArray[np.int64]) -> dict[str, float]:
    """Nothing."""
    return {}


def predictions(images: Images, rows: NDArray[np.int64], said: dict[str, NDArray[np.float64]]) -> pd.DataFrame:
    """The images that were set aside, if any."""
    return pd.DataFrame({"image": images.frame["path"].iloc[rows], "split": images.frame["split"].iloc[rows]})


def finish(out: Path, info: dict[str, Any]) -> None:
    """An empty ``metrics.json``, and a page with the losses."""
    from histill.evaluate.finish import heading, settings

    write_json(out / "metrics.json", {})
    log = pd.read_csv(out / "log.csv")
    figures.training(log, out / "figures" / "training.png")
    first, last = float(log["loss"].iloc[0]), float(log["loss"].iloc[-1])
    seen = info["data"]["images"]["train"]
    write_report(
        out / "report.html",
        **heading(out, info),
        answer=f"The loss on {seen:,} images without labels went from {first:.4g} to {last:.4g} in "
        f"{info['epochs_run']} epochs. What that is worth shows in what starts from these weights.",
        sections=[
            Picture(out / "figures" / "training.png", "Each weighted loss term and the learning rate."),
            Table(["Name", "Value"], list(settings(info).items()), "Settings"),
        ],
    )
