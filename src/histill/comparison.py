"""Runs side by side: figures with intervals, and paired differences from the first."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from histill.errors import BadInput
from histill.evaluate.delong import delong
from histill.evaluate.finish import check_columns
from histill.evaluate.intervals import Judged, figures_with_intervals, paired_gain
from histill.evaluate.judge import scores_of
from histill.evaluate.metrics import Scores
from histill.evaluate.multiplicity import comparisons
from histill.evaluate.report import shown, shown_gain
from histill.run import Run

__all__ = ["Comparison", "compare"]

_SHOWN = ("accuracy", "balanced_accuracy", "auroc", "ece", "miou", "mdice", "object_f1")


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` found; prints as a table.

    Attributes:
        summary: ``{"split", "runs": {name: {metric: figure}}, "gain": {name: {metric: figure, "mcnemar_p"}}}``; a gain
            is a run minus the first one, on the same images. Of two classes also ``"delong"``, by name: the difference
            of AUROC by `histill.evaluate.delong.delong`.
    """

    summary: dict[str, Any]

    def __str__(self) -> str:
        runs, gains = self.summary["runs"], self.summary["gain"]
        width = max(len(name) for name in runs) + 2
        shown_here = [metric for metric in _SHOWN if all(metric in run for run in runs.values())]
        lines = [f"{'':{width}}" + "".join(f"{name.replace('_', ' '):32}" for name in shown_here)]
        lines += [f"{name:{width}}" + "".join(f"{shown(m, r[m]):32}" for m in shown_here) for name, r in runs.items()]
        first = next(iter(runs))
        for name, gain in gains.items():
            p = f": McNemar p = {gain['mcnemar_p']:.3g}" if "mcnemar_p" in gain else ""
            lines.append(f"\n{name} minus {first}, paired{p}")
            lines += [f"  {metric.replace('_', ' '):20}{shown_gain(metric, gain[metric])}" for metric in shown_here]
            if (test := self.summary["delong"].get(name)) and None not in test.values():
                value, low, high = (f"{test[key]:+.3f}".replace("-", "−") for key in ("difference", "low", "high"))
                lines.append(f"  {'AUROC, DeLong':20}{value} ({low} to {high}), p = {test['p']:.3g}")
        each = {
            f"{name}: {metric.replace('_', ' ')}": g[metric]["p"] for name, g in gains.items() for metric in shown_here
        }
        lines.append(f"\n{comparisons(each)}")
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__  # at a prompt and in a notebook


def compare(*runs: Run | str | Path, split: str = "test") -> Comparison:
    """Compare runs on the same images; the first is what the others are compared with.

    Args:
        runs: runs or their folders, two or more; called by their folders' names.
        split: the split that is compared.

    Raises:
        BadInput: fewer than two runs, other classes, or other images.
    """
    if wrong := [run for run in runs if not isinstance(run, Run | str | Path)]:
        raise BadInput(f"compare: give runs or their folders one by one; this is of type {type(wrong[0]).__name__}")
    opened = [run if isinstance(run, Run) else Run.open(run) for run in runs]
    if len(opened) < 2:
        raise BadInput("compare needs two runs or more")
    first = opened[0]
    for run in opened:
        if run.classes != first.classes:
            raise BadInput(f"{run.path} has other classes than {first.path}")
        if not run.finished:
            raise BadInput(f"{run.path} is not finished; go on with --resume")
        if _images(run, split) != _images(first, split):
            raise BadInput(
                f"{run.path} and {first.path} were not judged on the same {split} images; same data, same split"
            )
    tables = [_table(run, split) for run in opened]
    found = [scores_of(run, split, table) for run, table in zip(opened, tables)]
    called = _distinct([run.path for run in opened])
    return Comparison(
        {
            "split": split,
            "runs": {name: figures_with_intervals(s) for name, s in zip(called, found)},
            "gain": {name: paired_gain(found[0], s) for name, s in zip(called[1:], found[1:])},
            "delong": {name: t for name, s in zip(called[1:], found[1:]) if (t := _delong(found[0], s))},
        }
    )


def _delong(a: Judged, b: Judged) -> dict[str, float | None] | None:
    """Of two classes, both of which have images; what is not defined is None."""
    if not (isinstance(a, Scores) and isinstance(b, Scores)) or a.classes != 2 or len(a.present) < 2:
        return None
    return {name: value if math.isfinite(value) else None for name, value in asdict(delong(a, b)).items()}


def _images(run: Run, split: str) -> list[tuple[str, ...]]:
    """What the run was judged on: names, pixels, labels and masks."""
    frame = run.data.frame
    return sorted(
        frame.loc[frame["split"] == split, ["path", "content", "label", "mask_content"]].itertuples(
            index=False, name=None
        )
    )


def _table(run: Run, split: str) -> pd.DataFrame:
    """What the run said of the split's images, in the order of their names."""
    table, asked = run.predictions, run.data.frame
    check_columns(table, ["image", "split"])
    table = table[table["split"] == split].sort_values("image", kind="stable", ignore_index=True)
    if list(table["image"]) != sorted(asked["path"][asked["split"] == split]):
        raise BadInput(f"{run.path}: its predictions are not of its own {split} images, each once; they were edited")
    return table


def _distinct(paths: list[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
