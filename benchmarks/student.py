"""A student of our own beside DSNet: as accurate after distillation, at a fraction of the time?

    python benchmarks/student.py DATA OUT [--tasks dermoscopy cells]

DATA holds ``isic_derm`` (518 ISIC images, melanoma and nevus, with a split by lesion), ``herlev`` (917 cervical cells
of seven classes, with a split by micrograph) and ``imagenet_mobilenet`` (ImageNet weights of MobileNet). For each task
one teacher, MobileNet V1 fine-tuned from ImageNet, teaches DSNet and StrideNet with the same recipe, views, schedule,
seeds and list of learning rates. A network's rate is the one with which it alone does best on validation, with seed 0;
with that rate it learns alone and distilled, with every seed. Test images are judged at the end, and choose nothing.

Runs go to OUT and are gone on with when the command is given again; the summary to benchmarks/results/student.json, the
table to student.txt. How fast the networks are is in prediction.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from studies import Task, imagenet, manifest, trained_teacher

import histill as hs
from histill.data.images import Images
from histill.evaluate.intervals import figures_over_seeds, figures_with_intervals, paired_gain
from histill.evaluate.judge import scores_of
from histill.files import write_json
from histill.recipes import dsnet
from histill.run import Run

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("dsnet", "stridenet")
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
SHARED: dict[str, Any] = {"image_size": 64, "batch_size": 32, "views": 8, "temperature": 4.0, "t_squared": True}
EPOCHS = {"dermoscopy": 30, "cells": 20}
TEACHER = "--network mobilenet_v1 --val 0.2 --batch-size 32 --lr 3e-4 --epochs 12 --precision 32-true"
TASKS = {
    "dermoscopy": Task(
        "isic_derm",
        labels=("melanoma", "nevus"),
        flags="",
        teacher=f"{TEACHER} --image-size 128 --positive melanoma",
        network="mobilenetv1_100",
    ),
    "cells": Task("herlev", flags="", teacher=f"{TEACHER} --image-size 96", network="mobilenetv1_100"),
}
PAIRS = (
    ("dsnet distilled", "stridenet distilled"),
    ("dsnet alone", "stridenet alone"),
    ("dsnet alone", "dsnet distilled"),
    ("stridenet alone", "stridenet distilled"),
)
SHOWN = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")


def trained(made: Any, out: Path) -> Run:
    """The run, gone on with or taken as it is where there is one."""
    return hs.train(made, out=out, resume=(out / "run.json").exists())


def validation(run: Run) -> tuple[float, float]:
    """What learning rates are chosen by: balanced accuracy of the kept weights, then the area under the curve."""
    found = figures_with_intervals(scores_of(run, "val"), resamples=10)
    return found["balanced_accuracy"]["value"], found["auroc"]["value"]


def students(name: str, network: str, images: Images, teach: Callable[[], Run], out: Path) -> dict[str, Any]:
    """The learning rate of a network, and its runs alone and distilled; the teacher is opened when it is needed."""
    positive = "melanoma" if name == "dermoscopy" else None
    made = partial(dsnet.student, images, network=network, weights="none", epochs=EPOCHS[name], positive=positive)

    def run(kind: str, rate: float, seed: int) -> Run:
        teacher = teach() if kind == "distilled" else None
        return trained(
            made(teacher=teacher, lr=rate, seed=seed, **SHARED), out / f"{network}-{kind}-{rate:g}-seed{seed}"
        )

    tried = {rate: validation(run("alone", rate, 0)) for rate in RATES}
    rate = max(tried, key=tried.__getitem__)
    runs = {f"{network} {kind}": [run(kind, rate, seed) for seed in SEEDS] for kind in ("alone", "distilled")}
    found = {f"{r:g}": dict(zip(("balanced_accuracy", "auroc"), figures)) for r, figures in tried.items()}
    return {"runs": runs, "rate": {"chosen": rate, "validation": found}}


def one_task(name: str, data: Path, out: Path) -> dict[str, Any]:
    """Teacher, learning rates, students of one data set."""
    task = TASKS[name]
    table = manifest(task, data / task.images, out / "images")
    teacher = Run.open(trained_teacher("dsnet", task, table, imagenet(task, data, table, out), out)[1])
    images: Images = hs.split(hs.read_images(table), val=0.2, seed=0)
    found = {network: students(name, network, images, lambda: teacher, out) for network in NETWORKS}
    rates = {network: one["rate"] for network, one in found.items()}
    return {"rates": rates} | judged(teacher, {n: r for one in found.values() for n, r in one["runs"].items()})


def judged(teacher: Run, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Figures on test images, and paired differences: what distillation bought, and ours minus DSNet."""
    found = {name: [scores_of(run) for run in several] for name, several in runs.items()}
    minus = {f"{b} minus {a}": paired_gain(found[a], found[b], names=SHOWN) for a, b in PAIRS}
    first = {name: several[0].info for name, several in runs.items()}
    return {
        "data": {key: teacher.info["data"][key] for key in ("images", "patients", "hash", "split_hash")},
        "parameters_at_this_size": {name.split()[0]: info["parameters"] for name, info in first.items()},
        "precision": teacher.info["precision"],
        "students_precision": next(iter(first.values()))["precision"],
        "teacher": figures_with_intervals(scores_of(teacher), names=SHOWN),
        "students": {name: figures_over_seeds(several, names=SHOWN) for name, several in found.items()},
        "differences": minus,
        "versions": teacher.info["versions"],
        "commit": first["stridenet distilled"]["commit"],
    }


def table_of(found: dict[str, Any]) -> str:
    """The tables of all tasks."""
    lines = []
    for name, task in found["tasks"].items():
        counts = " / ".join(str(task["data"]["images"][split]) for split in ("train", "val", "test"))
        lines += [
            "",
            f"{name}: {counts} images of training, validation, test; 95 % intervals over patients and seeds",
            "",
        ]
        lines.append(f"{'':44}" + "".join(f"{metric.replace('_', ' '):26}" for metric in SHOWN))
        for row, figures in {"teacher (MobileNet V1)": task["teacher"], **task["students"]}.items():
            lines.append(f"{row:44}" + "".join(f"{_shown(figures[metric]):26}" for metric in SHOWN))
        for row, figures in task["differences"].items():
            lines.append(f"{row:44}" + "".join(f"{_shown(figures[metric], sign=True):26}" for metric in SHOWN))
        for network, rate in task["rates"].items():
            tried = ", ".join(f"{100 * v['balanced_accuracy']:.1f} at {r}" for r, v in rate["validation"].items())
            lines.append(
                f"learning rate of {network}: {rate['chosen']:g} (alone on validation, balanced accuracy {tried})"
            )
    return "\n".join(lines[1:])


def _shown(figure: dict[str, Any], *, sign: bool = False) -> str:
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})" if sign else f"{value:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    file = RESULTS / "student.json"
    before = json.loads(file.read_text())["tasks"] if file.exists() else {}
    for name in arguments.tasks:
        before[name] = one_task(name, arguments.data, arguments.out / name)
    found = {
        "command": "python benchmarks/student.py DATA OUT",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": "cpu"},
        "settings": {**SHARED, "epochs": EPOCHS, "alpha": 0.1, "teacher": {n: t.teacher for n, t in TASKS.items()}},
        "tasks": {name: before[name] for name in TASKS if name in before},
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(file, found)
    (RESULTS / "student.txt").write_text(table_of(found) + "\n")
    print(table_of(found))


if __name__ == "__main__":
    main()
