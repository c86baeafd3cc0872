"""Every experiment of the multi-exit paper on cervical cells, beside its numbers, and early exit.

Of Table 6 only the column of ResNet-18 is reproduced, as there is no multi-exit ResNet-50. See
`histill.recipes.multi_exit` and ``docs/recipes/multi-exit.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from histill.data.images import SPLITS, Images, read_images
from histill.data.splits import split
from histill.distill import check_unseen
from histill.errors import BadInput
from histill.evaluate import figures
from histill.evaluate.cost import macs
from histill.evaluate.early_exit import early_exit, exit_table
from histill.evaluate.finish import exit_count, scores
from histill.evaluate.intervals import figures_over_seeds
from histill.evaluate.metrics import confusion
from histill.evaluate.report import Picture, Section, Table, difference, share
from histill.experiment import Experiment
from histill.recipes import multi_exit
from histill.recipes.methods import METHODS, pretrain, student, unfit
from histill.run import Run
from histill.studies._common import Study, comparison_note, given_teacher
from histill.teachers import as_teacher

__all__ = ["PAPER", "study"]

PAPER: dict[str, Any] = {
    # accuracy, sensitivity, specificity, F; Table 2's own row. The specificity is macro precision: F is its harmonic
    # mean with the sensitivity.
    "2": {"ours": (0.9852, 0.9853, 0.9868, 0.9859)},
    "3": {
        "teacher": 0.9815,
        "resnet18": 0.9531,
        "resnet18-tl": 0.9654,
        "resnet18-tl-kd": 0.9766,
        "ours-tl": 0.9852,
    },
    # exits 1 to 4 and their mean, without transfer
    "4": {
        "baseline": (0.9261, 0.9544, 0.9482, 0.9531, 0.9593),
        "scan": (0.9513, 0.9543, 0.9707, 0.9632, 0.9721),
        "msdnet": (0.9676, 0.9628, 0.9566, 0.9623, 0.9647),
        "ours": (0.9565, 0.9691, 0.9716, 0.9768, 0.9815),
    },
    # the teacher is a ResNeXt-101 of .9704; ResNet18 is .9531 in Tables 3 and 4
    "5": {
        "resnet18": 0.9556,
        "kd": 0.9654,
        "fitnet": 0.9778,
        "at": 0.9716,
        "self": 0.9679,
        "vid": 0.9642,
        "ours": 0.9815,
    },
    # CIFAR-100, teacher ResNet-152 of .8091: students ResNet-50 and ResNet-18
    "6": {
        "resnet18": (0.7798, 0.7709),
        "kd": (0.7969, 0.7986),
        "fitnet": (0.8051, 0.7924),
        "at": (0.8041, 0.8019),
        "vid": (0.7924, 0.7967),
        "rkd": (0.8022, 0.7960),
        "pkt": (0.8057, 0.7944),
        "ab": (0.8121, 0.7950),
        "crd-memory": (0.8053, 0.7981),
        "sskd": (0.8029, 0.8036),
        "ours": (0.8227, 0.8056),
    },
}
"""What the paper prints, on SIPaKMeD (4,049 cells of 966 pictures, split at random, not by picture) and CIFAR-100."""

TITLES = {
    "teacher": "teacher",
    "resnet18": "ResNet-18",
    "resnet18-tl": "ResNet-18 + TL",
    "resnet18-kd": "ResNet-18 + KD",
    "resnet18-tl-kd": "ResNet-18 + TL + KD",
    "ours-tl": "multi-exit + TL + KD + SD",
    "baseline": "multi-exit, labels alone",
    "scan": "SCAN",
    "msdnet": "MSDNet",
    "self": "multi-exit + SD, no teacher",
    "ours": "multi-exit + KD + SD",
}
TABLES = ("3", "4", "5", "6")
OTHERS = {"5": ("fitnet", "at", "vid"), "6": ("fitnet", "at", "vid", "rkd", "pkt", "ab", "crd-memory", "sskd")}
"""The other methods that a table compares with."""


def study(
    data: Images,
    *,
    out: Path,
    teacher: Path | None = None,
    pretrain_data: Path | None = None,
    weights: str = "none",
    image_size: int = 224,
    stem: multi_exit.Stems = "imagenet",
    epochs: int = multi_exit.EPOCHS,
    pretrain_epochs: int = multi_exit.EPOCHS,
    teacher_epochs: int = multi_exit.EPOCHS,
    teacher_network: str = "resnest50d",
    teacher_weights: str = "auto",
    batch_size: int = 128,
    lr: float = 0.1,
    teacher_lr: float = 0.01,
    schedule: multi_exit.Schedules = "steps",
    tables: Sequence[str] = ("3", "4", "5"),
    methods: Sequence[str] = (),
    loss: float = 0.01,
    seeds: int = 1,
    positive: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> str:
    """Every experiment of the multi-exit paper, and what it lacks: self-distillation alone, early exit, intervals.

    Args:
        data: the images and their splits.
        out: the study's folder; what is done already is not done again.
        teacher: a trained teacher's run, with the same split; without it one is trained.
        pretrain_data: another data set, on which teacher and students are trained first: the paper's transfer (TL).
        weights: what the transferred students start from where there is no such data set: imagenet, a file or a run's
            folder; with none there are no rows with TL.
        image_size: height and width in pixels.
        stem: imagenet, or cifar for images of 32 to 64 pixels.
        epochs: passes over the training images for each student.
        pretrain_epochs: the same on the other data set.
        teacher_epochs: the same for the teacher.
        teacher_network: see multi-exit.teacher.
        teacher_weights: see multi-exit.teacher; with pretrain_data, what its pretraining starts from.
        batch_size: images per step.
        lr: learning rate of all students.
        teacher_lr: learning rate of the teacher.
        schedule: steps or cosine, for all.
        tables: which of 3 (ablation), 4 (exits), 5 (methods) and 6 (the same on CIFAR-100: give that as data, and a run
            as the teacher; only its column of ResNet-18 is reproduced, as there is no multi-exit ResNet-50).
        methods: the other methods of Tables 5 and 6, by their names in the recipe methods (default: those that the
            paper compares); KD is there in any case.
        loss: accuracy that early exit may lose on validation, a share.
        seeds: how many seeds each row has.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        seed: the first seed.
        device: auto, cpu, cuda or mps.
        precision: Lightning Fabric's names, or auto.

    Raises:
        BadInput: see `histill.loop.train`; also a given teacher of another split, test images in the other data set,
            an unknown table, a method that is unknown or that the networks do not allow, or a split without images.
    """
    if unknown := sorted(set(tables) - set(TABLES)):
        raise BadInput(f"--tables {unknown[0]}: the study has Tables {', '.join(TABLES)}")
    if strange := [name for name in methods if name not in METHODS or name in ("ce", "kd")]:
        raise BadInput(f"--methods {strange[0]}: one of {', '.join(m for m in METHODS if m not in ('ce', 'kd'))}")
    if missing := [name for name in SPLITS if not data.rows(name)]:
        raise BadInput(f"{data.root}: no {' or '.join(missing)} images; the study needs all three splits")
    asked = {"5", "6"} & set(tables)
    others = tuple(dict.fromkeys(methods or (method for table in sorted(asked) for method in OTHERS[table])))
    made = Study(Path(out), range(seed, seed + seeds), {"device": device, "precision": precision})
    shared: dict[str, Any] = {"image_size": image_size, "positive": positive, "schedule": schedule}
    shared["batch_size"] = batch_size
    other = None if pretrain_data is None else split(read_images(pretrain_data), val=0.15, test=0.0, seed=seed)

    def start(network: str, otherwise: str) -> str:
        """Transfer: the run on the other data set, else ``otherwise``; once, with the first seed."""
        if other is None:
            return otherwise
        mine: dict[str, Any] = shared | {"positive": None, "epochs": pretrain_epochs, "weights": otherwise}
        mine |= {"lr": lr, "stem": stem} if network in multi_exit.NETWORKS else {"lr": teacher_lr}
        run = made.run(
            f"pretrain-{network}", lambda s: multi_exit.pretrain(other, network=network, seed=s, **mine), [seed]
        )[0]
        check_unseen(run, data)
        return str(run.path)

    if teacher is not None:
        taught = given_teacher(teacher, data)
    else:
        own = shared | {"network": teacher_network, "epochs": teacher_epochs, "lr": teacher_lr}
        own["weights"] = start(teacher_network, teacher_weights)
        taught = made.run("teacher", lambda s: multi_exit.teacher(data, seed=s, **own), [seed])[0]
    made.runs["teacher"] = [taught]
    plain_network = "resnet18_cifar" if stem == "cifar" else "resnet18"
    if asked:
        keyed = as_teacher(taught, data.classes)
        lacking = unfit(data, keyed, network=plain_network, image_size=image_size)
        if out_of := [name for name in others if name in lacking]:
            raise BadInput(f"--methods {out_of[0]} with {plain_network}: {lacking[out_of[0]]}")

    def learn(name: str, network: str, **arguments: Any) -> None:
        mine = {"epochs": epochs, "lr": lr, "stem": stem, "weights": "none", "network": network} | shared | arguments
        made.run(name, lambda s: multi_exit.student(data, seed=s, **mine))

    learn("resnet18", "resnet18")
    learn("ours", "multi-exit", teacher=taught)
    learn("self", "multi-exit")
    if "3" in tables and (other is not None or weights != "none"):
        plain, exits = start("resnet18", weights), start("multi-exit", weights)
        learn("resnet18-tl", "resnet18", weights=plain)
        learn("resnet18-tl-kd", "resnet18", weights=plain, teacher=taught)
        learn("ours-tl", "multi-exit", weights=exits, teacher=taught)
    if "4" in tables:
        learn("baseline", "multi-exit", method="none")
        learn("scan", "scan", method="scan")
        learn("msdnet", "msdnet", method="none")
    if set(tables) - {"4"}:
        learn("resnet18-kd", "resnet18", teacher=taught)
    if asked:
        _others(made, data, taught, others, shared | {"network": plain_network, "epochs": epochs, "lr": lr})
    return _report(made, data, tables, methods or OTHERS["5"], loss)


def _others(made: Study, data: Images, taught: Run, others: Sequence[str], settings: dict[str, Any]) -> None:
    """The other methods on a ResNet-18 with the same stem, under this paper's optimiser, schedule and views."""
    rest = {name: value for name, value in settings.items() if name not in ("schedule", "network")}
    ours = multi_exit.student(data, network="resnet18", weights="none", **rest, schedule=settings["schedule"])
    same: dict[str, Any] = {"optimizer": ours.optimizer, "augment": ours.augment, "views": ours.views}

    def learn(seed: int, method: str, weights: str = "none") -> Experiment:
        mine = {"network": settings["network"], "weights": weights, "seed": seed} | rest
        return _started(replace(student(data, taught, method=method, **mine), schedule=ours.schedule, **same))

    def boundaries(seed: int) -> Experiment:
        mine = {name: value for name, value in rest.items() if name != "positive"} | {"network": settings["network"]}
        mine["epochs"] = max(1, round(settings["epochs"] / 8))
        return _started(replace(pretrain(data, taught, weights="none", seed=seed, **mine), **same))

    for method in others:
        if method == "ab":
            made.run_in_two(method, boundaries, lambda s, run: learn(s, "ce", run))
        else:
            made.run(method, lambda s, m=method: learn(s, m))  # type: ignore[misc]


def _started(made: Experiment) -> Experiment:
    """With the start of `ResNet18`: timm's has zeros in the last norm of each block, which the study's own has not."""
    timm = made.student.keywords["name"] == "resnet18"
    return replace(made, student=partial(made.student, zero_init_last=False)) if timm else made


def _report(made: Study, data: Images, tables: Sequence[str], methods: Sequence[str], loss: float) -> str:
    """The tables beside the paper's, the figures, the page."""
    rows = [name for name in made.runs if not name.startswith("pretrain-") and not name.endswith("-boundaries")]
    names = ["accuracy", "sensitivity", "specificity", "macro_precision", "macro_f1", "f1_of_means"]
    test = {name: figures_over_seeds(made.scores(name), names=names) for name in rows}
    val = {name: figures_over_seeds(made.scores(name, "val"), names=["accuracy"]) for name in rows}
    gains = {f"ours over {name}": made.gain("ours", name) for name in ("resnet18", "self", "baseline") if name in rows}
    best = "ours-tl" if "ours-tl" in rows else "ours"
    found = early_exit(made.runs[best][0], loss=loss)
    home = made.out / "figures"
    figures.early_exit(found, home / "early_exit.png")
    matrices = {f"exit {k}": confusion(s[0]) for k, s in _by_exit(made, best).items() if k is not None}
    figures.confusions(matrices, data.classes, home / "exits.png")
    sections: list[Section] = [
        _two(test, val),
        *([_three(test, gains)] if "3" in tables else []),
        *([_four(made)] if "4" in tables else []),
        *([_five(test, methods)] if "5" in tables else []),
        *([_six(test, methods)] if "6" in tables else []),
        *([exit_table(found)] if "exits" in found else []),
        Picture(home / "early_exit.png", f"{TITLES[best]}: accuracy against arithmetic, first seed."),
        Picture(home / "exits.png", f"Figure 4: confusion matrices of the exits, {TITLES[best]}, first seed."),
    ]
    accuracy = {name: share(test[name]["accuracy"]) for name in ("ours", "self", "resnet18", "teacher")}
    answer = (
        f"The multi-exit student is right on {accuracy['ours']} of the test images with the teacher, on "
        f"{accuracy['self']} with self-distillation alone ({difference(gains['ours over self']['accuracy'])}); a plain "
        f"ResNet-18 on {accuracy['resnet18']}, the teacher on {accuracy['teacher']}. The paper prints 98.5 %."
    )
    summary = {"test": test, "val": val, "gain": gains, "early_exit": found}
    if "4" in tables:
        summary["exits"] = {name: _exit_accuracy(made, name) for name in PAPER["4"] if name in rows}
    return made.finish("Multi-exit student: every experiment of the paper", answer, sections, summary)


def _by_exit(made: Study, name: str) -> dict[int | None, list[Any]]:
    """The scores of a row's exits, one of each seed; None: the mean of all."""
    runs = made.runs[name]
    exits: list[int | None] = [*range(1, exit_count(runs[0].predictions, runs[0].classes) + 1), None]
    return {
        k: [scores(r.predictions, r.classes, "test", positive=r.info["positive"], exit=k) for r in runs] for k in exits
    }


def _exit_accuracy(made: Study, name: str) -> dict[str, Any]:
    return {
        "mean of all" if k is None else f"exit {k}": figures_over_seeds(s, names=["accuracy"])["accuracy"]
        for k, s in _by_exit(made, name).items()
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _two(test: dict[str, Any], val: dict[str, Any]) -> Table:
    columns = ("accuracy", "sensitivity", "specificity", "macro_precision", "macro_f1")
    paper = PAPER["2"]["ours"]
    own = [["paper", *map(_percent, (*paper[:2], None, *paper[2:])), "-"]]
    return Table(
        ["", *(c.replace("_", " ") for c in columns), "validation accuracy"],
        [[_title(n), *(share(f[c]) for c in columns), share(val[n]["accuracy"])] for n, f in test.items()] + own,
        "Table 2: figures",
        "What the paper calls specificity is macro precision, and stands there.",
    )


def _three(test: dict[str, Any], gains: dict[str, Any]) -> Table:
    paper = PAPER["3"]
    rows = [
        n
        for n in ("teacher", "resnet18", "resnet18-tl", "resnet18-kd", "resnet18-tl-kd", "ours", "ours-tl")
        if n in test
    ]
    missing = "" if "ours-tl" in test else " No transfer (TL) here: give --pretrain-data or --weights."
    return Table(
        ["", "paper", "accuracy"],
        [[_title(n), _percent(paper.get(n)), share(test[n]["accuracy"])] for n in rows],
        "Table 3: transfer, distillation, self-distillation",
        f"Multi-exit with KD and SD against the plain network: "
        f"{difference(gains['ours over resnet18']['accuracy'])}.{missing} {comparison_note(gains)}",
    )


def _four(made: Study) -> Table:
    rows = []
    for name in ("baseline", "scan", "msdnet", "self", "ours"):
        run = made.runs[name][0]
        cost = f"{macs(run.network(), run.image_size) / 1e6:,.0f}"
        paper = " ".join(f"{100 * v:.2f}" for v in PAPER["4"].get(name, ()))
        found = [share(f) for f in _exit_accuracy(made, name).values()]
        rows.append([_title(name), f"{run.info['parameters']:,}", cost, *found, paper or "-"])
    exits = [f"exit {k}" for k in range(1, len(rows[0]) - 4)]
    return Table(
        ["", "parameters", "MMAC", *exits, "mean of all", "paper, %"],
        rows,
        "Table 4: exits",
        "None with transfer. SCAN has its authors' loss, MSDNet and the baseline the sum of the exits' cross-entropy.",
    )


def _five(test: dict[str, Any], methods: Sequence[str]) -> Table:
    paper = PAPER["5"]
    named = {"resnet18": "resnet18", "resnet18-kd": "kd", **{m: m for m in methods}, "self": "self", "ours": "ours"}
    return Table(
        ["", "paper", "accuracy"],
        [[_title(n), _percent(paper.get(key)), share(test[n]["accuracy"])] for n, key in named.items()],
        "Table 5: methods with one teacher",
        "None with transfer; the same optimiser, schedule and views for all.",
    )


def _six(test: dict[str, Any], methods: Sequence[str]) -> Table:
    rows = []
    for name in dict.fromkeys((*PAPER["6"], *methods)):
        run = "resnet18-kd" if name == "kd" else name
        large, small = PAPER["6"].get(name, (None, None))
        here = share(test[run]["accuracy"]) if run in test else "-"
        rows.append([_title(run), _percent(large), _percent(small), here])
    return Table(
        ["", "paper, ResNet-50", "paper, ResNet-18", "accuracy"],
        rows,
        "Table 6: CIFAR-100",
        "Here the students are a ResNet-18 and the multi-exit ResNet-18, on the images that were given.",
    )
