"""Temperature scaling (Guo et al. 2017, section 4.2): one number, fitted on validation images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from histill.errors import BadInput

__all__ = ["fit_temperature", "logits_of", "tempered"]


def logits_of(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Logits that these probabilities follow from; one of 0 counts as 1e-12."""
    return np.asarray(np.log(np.clip(np.asarray(probabilities, dtype=np.float64), 1e-12, None)))


def tempered(probabilities: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Probabilities ``(N, C)`` softened by a temperature; 1 changes nothing."""
    return np.asarray(softmax(logits_of(probabilities) / temperature, axis=1))


def fit_temperature(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """The temperature, in [0.01, 100], at which ``softmax(logits / T)`` has the least mean NLL.

    Args:
        logits: ``(N, C)`` logits; log-probabilities do as well, a constant per row being nothing to softmax.
        labels: ``(N,)`` class numbers.

    Raises:
        BadInput: shapes that do not fit, or values that are not finite (the log of a probability of 0).
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise BadInput(f"temperature: logits {logits.shape} and labels {labels.shape} do not fit")
    if not np.isfinite(logits).all():
        raise BadInput("temperature: logits must be finite; clip probabilities before taking their log")

    def nll(log_t: float) -> float:
        log_p = log_softmax(logits / np.exp(log_t), axis=1)
        return float(-log_p[np.arange(len(labels)), labels].mean())

    return float(np.exp(minimize_scalar(nll, bounds=(np.log(0.01), np.log(100)), method="bounded").x))
