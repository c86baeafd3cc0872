"""Methods of distillation compared fairly: one teacher, the same students, views, schedule, budget and seeds.

See `histill.recipes.methods` and ``docs/recipes/methods.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from histill.data.images import Images
from histill.distill import open_teachers
from histill.errors import BadInput
from histill.evaluate import figures
from histill.evaluate.finish import scores
from histill.evaluate.intervals import figures_over_seeds, paired_gain
from histill.evaluate.metrics import Scores
from histill.evaluate.report import Picture, Section, Table, difference, share
from histill.progress import notice
from histill.recipes import methods as recipes
from histill.run import Run
from histill.studies._common import Study, comparison_note
from histill.teachers import Ensemble, Keyed, as_teacher

__all__ = ["PAPER", "PROTOCOLS", "study"]

PROTOCOLS: dict[str, dict[str, Any]] = {
    "tissue": {
        **{"image_size": 224, "epochs": 60, "batch_size": 64, "lr": 0.05},
        **{"schedule": "cosine", "augment": "tissue", "views": 16},
    },
    "cifar100": {
        **{"image_size": 32, "epochs": 240, "batch_size": 64, "lr": 0.05},
        **{"schedule": "steps", "augment": "cifar", "views": None},
    },
}
"""What an argument that is not given stands for; ``cifar100`` is the protocol of Tian et al. 2020."""

_TABLES = (
    # Tian et al. 2020, Table 1: teacher, student, test accuracy of the last epoch
    """
    - - teacher ce kd fitnet at sp cc vid rkd pkt ab crd-memory
    wrn_40_2 wrn_16_2 75.61 73.26 74.92 73.58 74.08 73.83 73.56 74.11 73.35 74.54 72.50 75.48
    wrn_40_2 wrn_40_1 75.61 71.98 73.54 72.24 72.77 72.43 72.21 73.30 72.22 73.45 72.38 74.14
    resnet56 resnet20 72.34 69.06 70.66 69.21 70.55 69.67 69.63 70.38 69.61 70.34 69.47 71.16
    resnet110 resnet20 74.31 69.06 70.67 68.99 70.22 70.04 69.48 70.16 69.25 70.25 69.53 71.46
    resnet110 resnet32 74.31 71.14 73.08 71.06 72.31 72.69 71.48 72.61 71.82 72.61 70.98 73.48
    resnet32x4 resnet8x4 79.42 72.50 73.33 73.50 73.44 72.94 72.97 73.09 71.90 73.64 73.17 75.51
    vgg13_cifar vgg8 74.64 70.36 72.98 71.02 71.43 72.68 70.71 71.23 71.48 72.88 70.94 73.94
    """,
    # The cervical cell paper, Table 6
    """
    - - teacher ce kd fitnet at vid rkd pkt ab crd-memory sskd
    resnet152_cifar resnet50_cifar 80.91 77.98 79.69 80.51 80.41 79.24 80.22 80.57 81.21 80.53 80.29
    resnet152_cifar resnet18_cifar 80.91 77.09 79.86 79.24 80.19 79.67 79.60 79.44 79.50 79.81 80.36
    """,
)


def _read(table: str) -> dict[tuple[str, str], dict[str, float]]:
    (_, _, *names), *rows = (line.split() for line in table.strip().splitlines())
    return {(t, s): dict(zip(names, map(float, values), strict=True)) for t, s, *values in rows}


PAPER = {pair: row for table in _TABLES for pair, row in _read(table).items()}
"""Published accuracies on CIFAR-100 in percent, by teacher and student."""


def study(
    data: Images,
    *,
    out: Path,
    teacher: Sequence[Path] | None = None,
    weighting: Literal["mean", "confidence"] = "mean",
    student: Sequence[str] = ("resnet18",),
    methods: Sequence[str] = (),
    protocol: Literal["tissue", "cifar100"] = "tissue",
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    views: int | None = None,
    weights: str = "auto",
    teacher_network: str = "resnet50",
    teacher_weights: str = "auto",
    teacher_epochs: int | None = None,
    seeds: int = 1,
    positive: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> str:
    """Every method of distillation on the same teacher, students, views, schedule and seeds, against plain KD.

    Args:
        data: the images and their splits.
        out: the study's folder; what is done already is not done again.
        teacher: a trained teacher's run, or several as one teacher; without it one is trained.
        weighting: of several teachers: the mean of their probabilities, or by each one's confidence in the label.
        student: the students' networks; all learn from one pass over the teacher.
        methods: names (see methods.student, and ab) beside ce and kd (default: all that the networks allow).
        protocol: what the settings below are where they are not given: tissue, or cifar100 as in Tian et al. 2020.
        image_size: height and width in pixels.
        epochs: passes over the training images for each student; AB has an eighth more.
        batch_size: images per step.
        lr: learning rate of SGD.
        views: distinct views per image; as many as epochs: a new one in every epoch.
        weights: of the students.
        teacher_network: see methods.teacher.
        teacher_weights: see methods.teacher.
        teacher_epochs: passes for the teacher (default: the students').
        seeds: how many seeds each row has.
        positive: the class of sensitivity and specificity (default: the mean over classes).
        seed: the first seed.
        device: auto, cpu, cuda or mps.
        precision: Lightning Fabric's names, or auto.

    Raises:
        BadInput: see `histill.loop.train`; also no test images, or a teacher that was trained on them.
    """
    if not data.rows("test"):
        raise BadInput("no test images: nothing could be compared; give --test a share above 0")
    if unknown := [name for name in methods if name not in recipes.METHODS]:
        raise BadInput(f"--methods {unknown[0]}: one of {', '.join(recipes.METHODS)}")
    given = {"image_size": image_size, "epochs": epochs, "batch_size": batch_size, "lr": lr, "views": views}
    settings = PROTOCOLS[protocol] | {name: value for name, value in given.items() if value is not None}
    made = Study(Path(out), range(seed, seed + seeds), {"device": device, "precision": precision})
    select = "balanced_accuracy" if data.rows("val") else "last"
    taught: Run | Ensemble
    if teacher:
        taught = open_teachers([Path(path) for path in teacher], data, weighting=weighting)
    else:
        own = {n: v for n, v in settings.items() if n != "views"} | {"epochs": teacher_epochs or settings["epochs"]}
        own |= {"network": teacher_network, "weights": teacher_weights, "positive": positive, "select": select}
        taught = made.run("teacher", lambda s: recipes.teacher(data, seed=s, **own), [seed])[0]
    keyed = as_teacher(taught, data.classes)
    rows = {network: _wanted(data, keyed, network, methods, settings["image_size"]) for network in student}
    extra: dict[str, int] = {}

    def learn(network: str, method: str) -> None:
        name = f"{network}-{method}"
        common = settings | {"network": network, "weights": weights}
        learner = common | {"positive": positive, "select": select}
        if method == "ab":
            phase = {n: v for n, v in common.items() if n != "schedule"}
            phase["epochs"] = max(1, round(settings["epochs"] / 8))
            made.run_in_two(
                name,
                lambda s: recipes.pretrain(data, keyed, seed=s, **phase),
                lambda s, run: recipes.student(data, seed=s, **learner | {"method": "ce", "weights": run}),
            )
            objective = recipes.pretrain(data, keyed, **phase).objective
        else:
            made.run(name, lambda s: recipes.student(data, keyed, method=method, seed=s, **learner))
            objective = recipes.student(data, keyed, method=method, **learner).objective
        extra[name] = sum(p.numel() for p in objective.parameters()) if isinstance(objective, nn.Module) else 0

    for network, wanted in rows.items():
        for method in wanted:
            learn(network, method)
    return _report(made, taught, rows, extra, protocol)


def _wanted(data: Images, teacher: Keyed, network: str, methods: Sequence[str], image_size: int) -> list[str]:
    """The rows of a student's table; a method that was asked for by name and cannot be is an error."""
    unfit = recipes.unfit(data, teacher, network=network, image_size=image_size)
    for method, why in unfit.items():
        if method in methods:
            raise BadInput(f"--methods {method} with {network}: {why}")
        if not methods:
            notice(f"{method} with {network} is left out: {why}")
    return [m for m in recipes.METHODS if m in ("ce", "kd", *methods) or (not methods and m not in unfit)]


def _report(
    made: Study, taught: Run | Ensemble, rows: dict[str, list[str]], extra: dict[str, int], protocol: str
) -> str:
    """A table for each student, its figure, and what can be said."""
    first = next(iter(made.runs[f"{network}-ce"][0] for network in rows))
    kinds = ("last",) if first.info["select"] == "last" else ("last", "chosen")
    name_of_teacher = taught.info["network"]["arguments"].get("name", "") if isinstance(taught, Run) else ""
    sections: list[Section] = []
    summary: dict[str, Any] = {"test": {}, "gain_over_kd": {}, "training_time_over_ce": {}, "extra_parameters": extra}
    answers = []
    for network, methods in rows.items():
        judged = {kind: {m: _scores(made.runs[f"{network}-{m}"], kind) for m in methods} for kind in kinds}
        test = {k: {m: figures_over_seeds(s) for m, s in each.items()} for k, each in judged.items()}
        gains = {
            kind: {
                m: paired_gain(each["kd"], s, names=["accuracy", "balanced_accuracy"])
                for m, s in each.items()
                if m != "kd"
            }
            for kind, each in judged.items()
        }
        alone = _seconds(made.runs[f"{network}-ce"])
        times = {m: _time(made, f"{network}-{m}") / alone for m in methods}
        published = PAPER.get((name_of_teacher, network), {}) if protocol == "cifar100" else {}
        columns = ["method", *(c for kind in kinds for c in _columns(kind)), "time / ce", "extra parameters"]
        cells: list[list[object]] = []
        for m in methods:
            by_kind = (c for kind in kinds for c in _cells(test[kind][m], gains[kind].get(m)))
            cells.append([m, *by_kind, f"{times[m]:.2f}", f"{extra[f'{network}-{m}']:,}"])
        if published:
            columns.append("published")
            for method, row in zip(methods, cells, strict=True):
                row.append(f"{published[method]:.2f} %" if method in published else "-")
        note = _note(made, kinds, gains["last"])
        if "kd-standardized" in methods and len(first.classes) == 2:
            note += f" kd-standardized: {recipes.ONE_AND_MINUS_ONE}."
        sections.append(Table(columns, cells, f"{network}, test images", note))
        path = made.out / "figures" / f"{network.replace('/', '_')}.png"
        shown = {m: g["accuracy"] for m, g in gains["last"].items()}
        figures.gain(shown, path, title=f"{network}: accuracy minus plain KD, last epoch")
        sections.append(Picture(path, "Paired differences on the same test images, with 95 % intervals."))
        summary["test"][network], summary["gain_over_kd"][network] = test, gains
        summary["training_time_over_ce"][network] = times
        answers.append(_answer(network, shown))
    if isinstance(taught, Run) and taught.info["data"]["split_hash"] == first.info["data"]["split_hash"]:
        summary["test"]["teacher"] = figures_over_seeds(_scores([taught], "chosen"))
        answers.append(f"The teacher is right on {share(summary['test']['teacher']['accuracy'])} of the test images.")
    return made.finish("Methods of distillation, compared fairly", " ".join(answers), sections, summary)


def _scores(runs: Sequence[Run], kind: str) -> list[Scores]:
    tables = [run.last if kind == "last" else run.predictions for run in runs]
    return [scores(t, r.classes, "test", positive=r.info["positive"]) for t, r in zip(tables, runs, strict=True)]


def _columns(kind: str) -> list[str]:
    when = {"last": "last epoch", "chosen": "chosen on validation"}[kind]
    return [f"{when}: accuracy", "SD", "minus kd", "balanced accuracy"]


def _cells(found: dict[str, Any], gain: dict[str, Any] | None) -> list[object]:
    spread = [100 * value for value in found["accuracy"]["seeds"]]
    return [
        share(found["accuracy"]),
        f"{np.std(spread, ddof=1):.1f}" if len(spread) > 1 else "-",
        difference(gain["accuracy"]).replace(" points", "") if gain else "-",
        share(found["balanced_accuracy"]),
    ]


def _note(made: Study, kinds: Sequence[str], gains: dict[str, Any]) -> str:
    chosen = "" if "chosen" in kinds else " There are no validation images: the last epoch is all there is."
    return (
        f"Mean over {len(made.seeds)} seed{'s' * (len(made.seeds) > 1)}, 95 % intervals over patients (or images) and "
        "seeds, SD between seeds in points. Differences are paired: same images, same seed. "
        f"With kd, last epoch: {comparison_note(gains)} "
        "Time: the median epoch after the teacher's answers are kept, times the epochs; "
        f"asking once is shared by the methods that need logits and pooled features.{chosen}"
    )


def _time(made: Study, name: str) -> float:
    before = made.runs.get(f"{name}-boundaries")
    return _seconds(made.runs[name]) + (_seconds(before) if before else 0.0)


def _seconds(runs: Sequence[Run]) -> float:
    """Mean seconds of a training: its median epoch, once the views come again, times its epochs."""
    spent = []
    for run in runs:
        each = run.info["data"]["images"]["train"] / run.log["images_per_second"].to_numpy()
        views = run.info["views"] or len(each)
        spent.append(float(np.median(each[views:] if views < len(each) else each)) * len(each))
    return sum(spent) / len(spent)


def _answer(network: str, gains: dict[str, Any]) -> str:
    """Which methods' intervals lie on one side of plain KD, and no more."""
    better = [m for m, g in gains.items() if g["low"] is not None and g["low"] > 0]
    worse = [m for m, g in gains.items() if g["high"] is not None and g["high"] < 0]
    told = [f"{len(some)} {what} ({', '.join(some)})" for some, what in ((better, "better"), (worse, "worse")) if some]
    rest = len(gains) - len(better) - len(worse)
    return (
        f"Of {len(gains)} rows compared with plain KD on {network} at the last epoch, "
        f"{' and '.join([*told, f'{rest} not told apart from it'])}."
    )
