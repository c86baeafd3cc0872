"""Learning-rate schedules as functions of time: epoch (a float) -> multiplier of the learning rate.

A function of time has no state, so a resumed run needs nothing restored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

__all__ = ["Schedule", "constant", "cosine", "steps", "warm_cosine", "warm_restarts", "warmup"]

Schedule: TypeAlias = Callable[[float], float]


def constant() -> Schedule:
    """Always 1."""
    return lambda epoch: 1.0


def cosine(epochs: float, *, final: float = 0.0) -> Schedule:
    """From 1 to ``final`` along half a cosine over ``epochs`` (Loshchilov and Hutter 2017, one period)."""
    return lambda epoch: final + (1 - final) * (1 + math.cos(math.pi * min(epoch / epochs, 1.0))) / 2


def warm_restarts(period: float, *, factor: float = 1.0, final: float = 0.0) -> Schedule:
    """Cosine that starts again after each period, each ``factor`` times as long (SGDR, Eq. 5)."""

    def multiplier(epoch: float) -> float:
        length = period
        while epoch >= length:
            epoch -= length
            length *= factor
        return cosine(length, final=final)(epoch)

    return multiplier


def steps(milestones: Sequence[float], *, factor: float = 0.1) -> Schedule:
    """Times ``factor`` at each milestone (epochs)."""
    return lambda epoch: factor ** sum(epoch >= m for m in milestones)


def warmup(epochs: float, then: Schedule) -> Schedule:
    """Linear from near 0 over the first ``epochs``, times ``then``."""
    return lambda epoch: then(epoch) * (min(1.0, (epoch + 1e-3) / epochs) if epochs > 0 else 1.0)


def warm_cosine(epochs: float) -> Schedule:
    """`cosine` with an epoch of warm-up, or a tenth of a run of fewer than ten epochs."""
    return warmup(min(1.0, epochs / 10), cosine(epochs))
