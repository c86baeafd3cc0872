"""What the studies share: runs by name, each done once, and tables beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histill.data.images import SPLITS, Images
from histill.errors import BadInput
from histill.evaluate.intervals import Judged, figures_over_seeds, paired_gain
from histill.evaluate.judge import scores_of
from histill.evaluate.metrics import OWN_METRICS, Scores
from histill.evaluate.multiplicity import comparisons
from histill.evaluate.report import Section, Table, Text, share, write_report
from histill.experiment import Experiment
from histill.files import write_json
from histill.loop import train
from histill.run import Run

__all__ = ["Study", "comparison_note", "given_teacher", "seconds", "text"]


@dataclass
class Study:
    """The runs of a study, by name and seed; a run that is there already is not done again.

    Attributes:
        out: the study's folder; runs lie in ``out/runs``.
        seeds: the seeds of every row.
        machine: device and precision for `histill.loop.train`.
    """

    out: Path
    seeds: Sequence[int]
    machine: dict[str, Any]
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise BadInput(f"--seeds {len(self.seeds)}: at least 1")

    def run(self, name: str, make: Callable[[int], Experiment], seeds: Sequence[int] | None = None) -> list[Run]:
        """Run ``make(seed)`` for each seed (default: the study's)."""
        if name not in self.runs:
            homes = {seed: self.out / "runs" / f"{name}-seed{seed}" for seed in (seeds or self.seeds)}
            self.runs[name] = [train(make(s), home, resume=True, **self.machine) for s, home in homes.items()]
        return self.runs[name]

    def run_in_two(
        self, name: str, first: Callable[[int], Experiment], then: Callable[[int, str], Experiment]
    ) -> list[Run]:
        """Run ``first(seed)`` as ``name-boundaries``, AB's first phase, and ``then(seed, its folder)`` as ``name``."""
        began = self.run(f"{name}-boundaries", first)
        started = {seed: str(run.path) for seed, run in zip(self.seeds, began, strict=True)}
        return self.run(name, lambda seed: then(seed, started[seed]))

    def judged(self, name: str, split: str = "test") -> list[Judged]:
        """What the runs of a row said, of labels or of masks."""
        return [scores_of(run, split) for run in self.runs[name]]

    def scores(self, name: str, split: str = "test") -> list[Scores]:
        """What the runs of a row said of labels."""
        return [s for s in self.judged(name, split) if isinstance(s, Scores)]

    def figures(self, name: str, split: str = "test") -> dict[str, Any]:
        """Means over the seeds with intervals over patients and seeds."""
        return figures_over_seeds(self.judged(name, split))

    def gain(self, name: str, over: str) -> dict[str, Any]:
        """Paired difference of two rows with the same seeds, ``name`` minus ``over``."""
        before, after = self.judged(over), self.judged(name)
        names = OWN_METRICS if isinstance(before[0], Scores) else None
        return paired_gain(before, after, names=names)

    def finish(self, title: str, answer: str, sections: Sequence[Section], summary: dict[str, Any]) -> str:
        """Write ``summary.json`` and ``report.html``; returns the tables as text."""
        write_json(self.out / "summary.json", summary)
        whole = [*sections, *self._of_what()]
        write_report(self.out / "report.html", title=title, answer=answer, sections=whole)
        tables = [text(section) for section in sections if isinstance(section, Table)]
        return "\n\n".join([*tables, answer, f"report: {self.out / 'report.html'}"])

    def _of_what(self) -> list[Section]:
        """What every table of the page is of: images, patients, seeds, and how each run's epoch was chosen."""
        lines: dict[str, str] = {}
        infos = [run.info for runs in self.runs.values() for run in runs]
        for data in (info["data"] for info in infos if info["data"]["images"].get("test")):
            held = data["images"]
            words = dict(zip(SPLITS, ("training", "validation", "test")))
            count = ", ".join(f"{held[split]:,} images of {words[split]}" for split in SPLITS if held.get(split))
            people = f"{data['patients']:,} patients" if data.get("patients") else "no patients known"
            name = Path(data["root"]).name
            lines.setdefault(name, f"{count} (of {name}, first split); {people}.")
        rules = sorted({info["selection"]["rule"] for info in infos if info.get("selection", {}).get("rule")})
        if not lines:
            return []
        made = (
            f"Intervals (95 %) are over patients, or images where none are known, and over the seeds where a row has "
            f"several; here {len(self.seeds)}."
        )
        return [
            Text(
                [*lines.values(), made, *(f"Weights kept: {rule.replace('_', ' ')}." for rule in rules)],
                "Images, seeds, selection",
            )
        ]


def given_teacher(path: Path, data: Images) -> Run:
    """A trained teacher's run; `BadInput` where it was trained on other images or another split of them."""
    run = Run.open(path)
    if run.info["data"]["split_hash"] != data.split_hash:
        raise BadInput(f"--teacher {path} was trained on other images or another split; give one of this split")
    return run


def comparison_note(gains: Mapping[str, Mapping[str, Any]]) -> str:
    """The line under a table of differences in accuracy: how many, and which remain with Holm's correction."""
    return comparisons({name: gain["accuracy"]["p"] for name, gain in gains.items()}, "accuracy")


def seconds(runs: Sequence[Run]) -> float:
    """Mean seconds that the epochs took, validation apart: images over images per second, from ``log.csv``."""
    spent = []
    for run in runs:
        log = run.log
        spent.append(float((run.info["data"]["images"]["train"] / log["images_per_second"]).sum()))
    return sum(spent) / len(spent)


def text(table: Table) -> str:
    """A table for the terminal."""
    rows = [list(map(str, table.columns)), *([_cell(c) for c in row] for row in table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [table.heading, *("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)]
    return "\n".join([*lines, *([table.note] if table.note else [])])


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return share(value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
