"""The supervised rows of RCKD's study: what their backbones start from, and Table 6, which learns from labels too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from histill.data.images import Images
from histill.distill import check_unseen
from histill.errors import BadInput, Failed
from histill.evaluate.multiplicity import comparisons
from histill.evaluate.report import Table, difference, share
from histill.recipes import baselines
from histill.recipes._start import backbone
from histill.run import Run
from histill.studies._common import Study
from histill.teachers import as_teacher

__all__ = ["SAT", "Supervised", "given_weights"]

SAT = (("resnet18", "ResNet18SAT"), ("CSAT-plain", "CSAT"))
"""Table 6: a network without SAT, and the same with it."""


@dataclass
class Supervised:
    """Where the backbones of the supervised rows come from.

    Of a network's own weights, labels (with USI's loss where there is a teacher), and the ImageNet weights that timm
    publishes, the first that there is.

    Attributes:
        made: the study.
        labelled: the images of ``--labelled`` with their split; None where none were given.
        given: weights by network.
        usi_teacher: a run of the labelled images' classes, or ``NETWORK`` or ``NETWORK=WEIGHTS``, which learns them
            first.
        pretraining: image size, epochs and batch size of every pretraining.
        judged: the images that the rows are judged on, as test images.
        starts: what each row started from, in words; it grows.
        skipped: rows that are left out -> why; it grows.
    """

    made: Study
    labelled: Images | None
    given: dict[str, str]
    usi_teacher: str | None
    pretraining: dict[str, Any]
    judged: Sequence[Images]
    starts: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse at once what could not be used after days (`BadInput`)."""
        for network, weights in self.given.items():
            self._make(network, weights)
            if (Path(weights) / "run.json").is_file():
                self._unseen(Run.open(weights), self.judged)
        if self.usi_teacher is None:
            return
        if self.labelled is None:
            raise BadInput(f"--usi-teacher {self.usi_teacher}: it teaches what is labelled; give --labelled FOLDER too")
        if Path(self.usi_teacher).exists():
            run = Run.open(self.usi_teacher)
            self._unseen(run, (self.labelled, *self.judged))
            as_teacher(run, self.labelled.classes)
        else:
            network, _, weights = self.usi_teacher.partition("=")
            self._make(network, weights or "none")

    def weights(self, network: str) -> str | None:
        """What the network's row is fine-tuned from; None where there is nothing, and then `skipped` says why."""
        if network in self.given:
            self.starts[network] = "given"
            return self.given[network]
        if self.labelled is not None:
            self.starts[network] = "labelled" if self.usi_teacher is None else "labelled, USI"
            return str(self.runs(network, self.made.seeds[:1])[0].path)
        try:
            self._make(network, "imagenet")
        except (BadInput, Failed) as error:
            why = re.split(r"[:;] give ", str(error))[0]
            remedy = f"give --labelled FOLDER or --supervised-weights {network}=FILE"
            self.skipped[f"supervised {network}"] = f"{why}; {remedy}"
            return None
        self.starts[network] = "ImageNet"
        return "imagenet"

    def runs(self, network: str, seeds: Sequence[int] | None = None) -> list[Run]:
        """The network, trained on the labelled images with each seed (default: the study's)."""
        assert self.labelled is not None
        make = partial(baselines.supervised, self.labelled, self._teacher(), network=network, **self.pretraining)
        return self.made.run(f"pretrain-supervised-{network}", lambda s: make(seed=s), seeds)

    def sat(self) -> bool:
        """Train Table 6; whether it could be."""
        if self.labelled is None:
            self.skipped["Table 6"] = "it is trained on labels; give --labelled FOLDER"
            return False
        for network in (name for pair in SAT for name in pair):
            self.runs(network)
        return True

    def table(self, paper: dict[str, float], summary: dict[str, Any]) -> Table:
        """Table 6: what SAT gives, on test images that chose nothing; figures are put into ``summary``."""
        assert self.labelled is not None
        rows, sat, gains = _row, summary["sat"], summary["sat_gain"]
        cells: list[list[object]] = []
        for plain, network in SAT:
            sat |= {name: self.made.figures(rows(name)) for name in (plain, network)}
            gains[network] = self.made.gain(rows(network), rows(plain))
            gain, theirs = difference(gains[network]["accuracy"]), paper[network] - paper[plain]
            cells.append([plain, share(sat[plain]["accuracy"]), "-", f"{paper[plain]:.1f} %", "-"])
            cells.append(
                [network, share(sat[network]["accuracy"]), gain, f"{paper[network]:.1f} %", f"{theirs:+.1f} points"]
            )
        images, seeds = self.labelled, len(self.made.seeds)
        unit = "patients" if images.has_patients else "images"
        note = (
            f"Accuracy on the {len(images.rows('test'))} test images of {images.root.name}, which chose nothing: the "
            f"epoch is that of the best balanced accuracy on validation. Mean of {seeds} training"
            f"{'s' if seeds > 1 else ''} on the same split with 95 % intervals over {unit}"
            f"{' and trainings' if seeds > 1 else ' (one training says nothing of others)'}, differences paired. The "
            "paper's is ImageNet's top-1. "
            f"{comparisons({name: gain['accuracy']['p'] for name, gain in gains.items()}, 'accuracy')}"
        )
        columns = ["network", "accuracy", "minus the same without SAT", "paper", "paper, minus the same without SAT"]
        return Table(columns, cells, "Table 6: SAT", note)

    def answer(self, summary: dict[str, Any]) -> list[str]:
        """Table 6 in a sentence."""
        if not summary["sat_gain"] or self.labelled is None:
            return []
        gains = [f"{difference(summary['sat_gain'][sat]['accuracy'])} to {plain}" for plain, sat in SAT]
        return [f"On {self.labelled.root.name} SAT adds {' and '.join(gains)}."]

    def words(self) -> list[str]:
        """What the page says of how these rows came about."""
        said = []
        if self.starts:
            begun = [f"{network} from {self._from(network)}" for network in self.starts]
            said.append(f"Supervised rows start elsewhere, with another budget: {', '.join(begun)}.")
        if self.usi_teacher is not None:
            said.append(f"Labels are learnt with USI's loss, cross-entropy plus 5 KL, from {self.usi_teacher}.")
        if self.skipped:
            said.append(f"Left out: {' '.join(f'{what} ({why}).' for what, why in self.skipped.items())}")
        return said

    def _teacher(self) -> Run | None:
        """USI's teacher; where it is a network's name it learns the labelled images first, without a teacher."""
        if self.usi_teacher is None or self.labelled is None:
            return None
        if Path(self.usi_teacher).exists():
            return Run.open(self.usi_teacher)
        network, _, weights = self.usi_teacher.partition("=")
        own = {"network": network, "weights": weights or "auto", **self.pretraining}
        make = partial(baselines.supervised, self.labelled, **own)
        return self.made.run(f"usi-teacher-{network}", lambda s: make(seed=s), self.made.seeds[:1])[0]

    def _from(self, network: str) -> str:
        how = self.starts[network]
        if how == "given":
            return self.given[network]
        return "ImageNet weights" if self.labelled is None else f"the labels of {self.labelled.root.name}"

    def _make(self, network: str, weights: str) -> None:
        backbone(network, self.pretraining["image_size"], 0)(weights=weights)

    def _unseen(self, run: Run, images: Iterable[Images]) -> None:
        for one in images:
            check_unseen(run, one)


def given_weights(given: Sequence[str], networks: Iterable[str]) -> dict[str, str]:
    """``NETWORK=WEIGHTS`` -> weights by network, of those that have a supervised row.

    Raises:
        BadInput: another form, no weights, or a network without such a row.
    """
    known, found = {network.lower(): network for network in networks}, {}
    for text in given:
        network, _, weights = text.partition("=")
        if not network or weights in ("", "none", "auto"):
            raise BadInput(
                f"--supervised-weights {text}: write NETWORK=WEIGHTS, the weights a file, a run or imagenet, such as "
                "resnet18=weights.safetensors"
            )
        if network.lower() not in known:
            raise BadInput(
                f"--supervised-weights {text}: no supervised row of {network} was asked for; there are "
                f"{', '.join(known.values()) or 'none'}"
            )
        found[known[network.lower()]] = weights
    return found


def _row(network: str) -> str:
    return f"pretrain-supervised-{network}"
