"""Learning-rate schedules as functions of time: epoch (a float) -> multiplier of the learning rate.

A function of time has no state, so a resumed run needs nothing restored. Each is a partial of a function of this
module, so that an experiment can be sent to another process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from histill.errors import BadInput

__all__ = ["Schedule", "constant", "cosine", "steps", "warm_cosine", "warm_restarts", "warmup"]

Schedule: TypeAlias = Callable[[float], float]


def constant() -> Schedule:
    """Always 1."""
    return _constant


def _constant(epoch: float) -> float:
    return 1.0


def cosine(epochs: float, *, final: float = 0.0) -> Schedule:
    """From 1 to ``final`` along half a cosine over ``epochs`` (Loshchilov and Hutter 2017, one period)."""
    return partial(_cosine, epochs=epochs, final=final)


def _cosine(epoch: float, *, epochs: float, final: float) -> float:
    return final + (1 - final) * (1 + math.cos(math.pi * min(epoch / epochs, 1.0))) / 2


def warm_restarts(period: float, *, factor: float = 1.0, final: float = 0.0) -> Schedule:
    """Cosine that starts again after each period, each ``factor`` times as long (SGDR, Eq. 5).

    Raises:
        BadInput: a period of no length, or a factor below 1, with which the periods would come to an end.
    """
    if not (period > 0 and factor >= 1):
        raise BadInput(f"period={period}, factor={factor}: a period above 0, a factor of 1 or more")
    return partial(_warm_restarts, length=period, factor=factor, final=final)


def _warm_restarts(epoch: float, *, length: float, factor: float, final: float) -> float:
    while epoch >= length:
        epoch -= length
        length *= factor
    return _cosine(epoch, epochs=length, final=final)


def steps(milestones: Sequence[float], *, factor: float = 0.1) -> Schedule:
    """Times ``factor`` at each milestone (epochs)."""
    return partial(_steps, milestones=tuple(milestones), factor=factor)


def _steps(epoch: float, *, milestones: Sequence[float], factor: float) -> float:
    return float(factor ** sum(epoch >= m for m in milestones))


def warmup(epochs: float, then: Schedule) -> Schedule:
    """Linear from near 0 over the first ``epochs``, times ``then``."""
    return partial(_warmup, epochs=epochs, then=then)


def _warmup(epoch: float, *, epochs: float, then: Schedule) -> float:
    return then(epoch) * (min(1.0, (epoch + 1e-3) / epochs) if epochs > 0 else 1.0)


def warm_cosine(epochs: float) -> Schedule:
    """`cosine` with an epoch of warm-up, or a tenth of a run of fewer than ten epochs."""
    return warmup(min(1.0, epochs / 10), cosine(epochs))
