"""Proof: metrics with intervals, paired differences, efficiency, figures and reports.

The module is also a function: ``histill.evaluate(run, data=None)`` gives the figures of a run (see `judge`).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histill.evaluate.cost import macs
    from histill.evaluate.intervals import (
        Figure,
        figures_over_seeds,
        figures_with_intervals,
        paired_gain,
        per_class_table,
    )
    from histill.evaluate.metrics import Scores, confusion, per_class, roc_curve
    from histill.evaluate.report import distill_report, run_report, write_report
    from histill.run import Run

__all__ = [
    "Figure",
    "Scores",
    "confusion",
    "distill_report",
    "figures_over_seeds",
    "figures_with_intervals",
    "macs",
    "paired_gain",
    "per_class",
    "per_class_table",
    "roc_curve",
    "run_report",
    "write_report",
]

# Metrics need no torch, and figures take seconds to import.
_HOMES = {
    "Figure": "intervals",
    "Scores": "metrics",
    "confusion": "metrics",
    "distill_report": "report",
    "figures_over_seeds": "intervals",
    "figures_with_intervals": "intervals",
    "macs": "cost",
    "paired_gain": "intervals",
    "per_class": "metrics",
    "per_class_table": "intervals",
    "roc_curve": "metrics",
    "run_report": "report",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"histill.evaluate.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Evaluate(ModuleType):
    """A module that can be called."""

    def __call__(self, run: Run | str | Path, data: str | Path | None = None, **options: Any) -> dict[str, Any]:
        """`histill.evaluate.judge.judge`."""
        from histill.evaluate.judge import judge

        return judge(run, data, **options)


sys.modules[__name__].__class__ = _Evaluate
