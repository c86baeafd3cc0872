"""Proof: metrics with intervals, paired differences, efficiency, figures and reports."""

from histill.evaluate.intervals import (
    Figure,
    figures_over_seeds,
    figures_with_intervals,
    paired_gain,
    per_class_table,
)
from histill.evaluate.macs import macs
from histill.evaluate.metrics import Scores, confusion, per_class, roc_curve
from histill.evaluate.report import distill_report, run_report, write_report

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
