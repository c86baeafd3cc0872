"""Judged by the labels of images."""

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
from histill.evaluate.metrics import Scores, metrics
from histill.evaluate.predict import predict_rows

__all__ = ["SELECTIONS", "ask", "finish", "predictions", "validate"]

SELECTIONS: tuple[str, ...] = ("balanced_accuracy", "accuracy", "auroc", "loss", "last")
_FIGURES = ("accuracy", "balanced_accuracy", "auroc")


def ask(
    network: nn.Module, packed: Packed, rows: NDArray[np.int64], *, device: torch.device | str = "cpu"
) -> dict[str, NDArray[np.float64]]:
    """Logits ``(N, C)``, and those of each exit."""
    return predict_rows(network, packed, rows, device=device)


def validate(said: dict[str, NDArray[np.float64]], packed: Packed, rows: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, balanced accuracy, AUROC and cross-entropy."""
    logits, labels = said["logits"], packed.labels[torch.from_numpy(rows)].numpy()
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    figures = metrics(Scores(labels, np.exp(log_p), np.arange(len(rows))), names=_FIGURES)
    return {
        "loss": float(-log_p[np.arange(len(rows)), labels].mean()),
        **{n: float(figures[n][0]) for n in _FIGURES},
    }


def predictions(images: Images, rows: NDArray[np.int64], said: dict[str, NDArray[np.float64]]) -> pd.DataFrame:
    """Label, predicted class and probabilities of each image."""
    from histill.evaluate import finish as whole

    return whole.predictions(images, rows, said)


def finish(out: Path, info: dict[str, Any]) -> None:
    """See `histill.evaluate.finish`."""
    from histill.evaluate import finish as whole

    whole.finish(out, info)
