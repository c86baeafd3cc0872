"""Every experiment of the DSNet paper, beside its numbers, and what it lacks.

Khan et al., Computers in Biology and Medicine 146 (2022) 105581; see `histill.recipes.dsnet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from histill.data.images import Images
from histill.evaluate import figures
from histill.evaluate.calibration import logits_of
from histill.evaluate.finish import gallery_of
from histill.evaluate.intervals import per_class_table
from histill.evaluate.metrics import per_class, roc_curve
from histill.evaluate.report import Picture, Section, Table, difference, share
from histill.recipes import dsnet
from histill.studies._common import Study, comparison_note, given_teacher, seconds

__all__ = ["PAPER", "study"]

PAPER: dict[str, Any] = {
    "temperature": {3: 0.828, 5: 0.850, 7: 0.896, 10: 0.917, 20: 0.842, 50: 0.813, 70: 0.898, 90: 0.866, 100: 0.772},
    # parameters (millions), training seconds, prediction seconds, accuracy; Table 2
    "students": {
        "resnet101": (42.5, 1972, 14.55, 0.996),
        "resnet50": (23.5, 1165, 8.28, 0.994),
        "inception_v3": (21.7, 896, 10.26, 0.985),  # printed .995; the text and the notebook say .985
        "vgg16": (14.7, 664, 20.49, 0.998),
        "efficientnet_b0": (4.0, 1070, 4.98, 0.820),
        "mobilenet_v1": (3.2, 660, 5.14, 0.985),
        "dsnet": (0.26, 340, 2.57, 0.917),
    },
    "teacher": (23.5, 596, 10.25, 0.996),
    # precision, recall, F1 of malignant, then of benign; Tables 3 to 5 (Table 5's first row is printed in the
    # column order of Table 4; here it is in its own)
    "classes": {
        "teacher": (1.00, 0.99, 1.00, 0.99, 1.00, 1.00),
        "dsnet": (0.96, 0.87, 0.91, 0.88, 0.97, 0.92),
        "mobilenet_v1": (0.99, 0.98, 0.99, 0.98, 0.99, 0.99),
        "inception_v3": (0.98, 0.99, 0.99, 0.99, 0.98, 0.98),
        "efficientnet_b0": (0.85, 0.78, 0.81, 0.80, 0.86, 0.83),
        "vgg16": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
        "resnet50": (1.0, 0.99, 0.99, 0.99, 1.0, 0.99),
        "resnet101": (0.99, 1.0, 1.0, 1.0, 0.99, 1.0),
    },
    "batch_size": {18: 0.881, 32: 0.897, 64: 0.917, 96: 0.831},
}
"""What the paper prints, on 3,000 ISIC images that overlap its training images (see ``docs/recipes/dsnet.md``)."""


def study(
    data: Images,
    *,
    out: Path,
    teacher: Path | None = None,
    image_size: int = 224,
    epochs: int = 60,
    teacher_epochs: int = 30,
    teacher_network: str = "resnet50",
    teacher_weights: str = "auto",
    weights: str = "auto",
    temperatures: Sequence[float] = (1, 3, 5, 7, 10, 20, 50, 70, 90, 100),
    networks: Sequence[str] = (*dsnet.KERAS, "dsnet"),
    batch_sizes: Sequence[int] = (18, 32, 64, 96),
    seeds: int = 1,
    positive: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> str:
    """Every experiment of the DSNet paper, and what it lacks: DSNet alone, seeds, intervals, a validation split.

    Args:
        data: the images and their splits.
        out: the study's folder; what is done already is not done again.
        teacher: a trained teacher's run, with the same split; without it one is trained.
        image_size: height and width in pixels.
        epochs: passes over the training images for each student.
        teacher_epochs: the same for the teacher.
        teacher_network: see dsnet.teacher.
        teacher_weights: see dsnet.teacher.
        weights: of the larger students.
        temperatures: of Table 1, and T = 1, which the paper announces and leaves out.
        networks: the students of Table 2.
        batch_sizes: of Table 6.
        seeds: how many seeds each row has.
        positive: the class of sensitivity and specificity, first in Tables 3 to 5 (default: the mean over classes).
        seed: the first seed.
        device: auto, cpu, cuda or mps.
        precision: Lightning Fabric's names, or auto.

    Raises:
        BadInput: see `histill.loop.train`; also a given teacher of another split, whose test images are not these.
    """
    made = Study(Path(out), range(seed, seed + seeds), {"device": device, "precision": precision})
    common: dict[str, Any] = {"image_size": image_size, "positive": positive}
    if teacher is not None:
        taught_by = given_teacher(teacher, data)
    else:
        settings: dict[str, Any] = common | {"network": teacher_network, "weights": teacher_weights}
        settings["epochs"] = teacher_epochs
        taught_by = made.run("teacher", lambda s: dsnet.teacher(data, seed=s, **settings), [seed])[0]
    made.runs["teacher"] = [taught_by]

    def learn(name: str, **arguments: Any) -> None:
        settings: dict[str, Any] = {"epochs": epochs, "weights": weights} | common | arguments
        made.run(name, lambda s: dsnet.student(data, seed=s, **settings))

    learn("alone")
    for t in temperatures:
        learn(f"T{t:g}", teacher=taught_by, temperature=float(t))
    learn("T10", teacher=taught_by)
    learn("notebook", teacher=taught_by, compat="notebook")
    for name in networks:
        if name != "dsnet":
            learn(f"{name}-alone", network=name, lr=1e-4)
            learn(name, network=name, lr=1e-4, teacher=taught_by)
    made.runs["dsnet"], made.runs["dsnet-alone"] = made.runs["T10"], made.runs["alone"]
    for size in batch_sizes:
        if size != 64:
            learn(f"B{size}", teacher=taught_by, batch_size=size)
    made.runs["B64"] = made.runs["T10"]
    return _report(made, data, temperatures, networks, batch_sizes)


def _report(
    made: Study, data: Images, temperatures: Sequence[float], networks: Sequence[str], batch_sizes: Sequence[int]
) -> str:
    """The tables beside the paper's, the figures, the page."""
    test = {name: made.figures(name) for name in made.runs}
    val = {name: made.figures(name, "val") for name in made.runs}
    gains = {name: made.gain(name, "alone") for name in ("T10", *(f"T{t:g}" for t in temperatures), "notebook")}
    best = max((f"T{t:g}" for t in temperatures), key=lambda n: val[n]["balanced_accuracy"]["value"])
    home = made.out / "figures"

    def accuracy(name: str) -> str:
        return share(test[name]["accuracy"])

    paper = PAPER["temperature"]
    one = Table(
        ["T", "paper", "accuracy", "validation", "minus alone"],
        [
            ["alone", "-", accuracy("alone"), share(val["alone"]["accuracy"]), "-"],
            *(
                [
                    f"{t:g}",
                    f"{100 * paper[t]:.1f} %" if t in paper else "-",
                    accuracy(f"T{t:g}"),
                    share(val[f"T{t:g}"]["accuracy"]),
                    difference(gains[f"T{t:g}"]["accuracy"]),
                ]
                for t in temperatures
            ),
            [
                "notebook",
                "-",
                accuracy("notebook"),
                share(val["notebook"]["accuracy"]),
                difference(gains["notebook"]["accuracy"]),
            ],
        ],
        "Table 1: temperature",
        f"Best on validation: {best}. {comparison_note(gains)} 'notebook' is what the published notebooks compute.",
    )
    students = [n for n in PAPER["students"] if n in networks] + [n for n in networks if n not in PAPER["students"]]
    costs = _costs(made, ["teacher", *students])
    two = Table(
        [
            "network",
            "parameters",
            "training s",
            "prediction s",
            "accuracy",
            "without teacher",
            "paper: M, s, s, accuracy",
        ],
        [
            [
                name,
                f"{made.runs[name][0].info['parameters']:,}",
                f"{seconds(made.runs[name]):.0f}",
                f"{costs[name]:.2f}",
                accuracy(name),
                accuracy(f"{name}-alone") if name != "teacher" else "-",
                " ".join(
                    f"{v:g}" for v in (PAPER["teacher"] if name == "teacher" else PAPER["students"].get(name, ()))
                ),
            ]
            for name in ["teacher", *students]
        ],
        "Table 2: students",
        "Prediction: seconds for 3,000 images in PyTorch, side by side, batch 16.",
    )
    order = sorted(range(len(data.classes)), key=lambda c: data.classes[c] != made.runs["dsnet"][0].info["positive"])
    three = Table(
        [
            "network",
            *(f"{data.classes[c]} {what}" for c in order for what in ("P", "R", "F1")),
            "paper (malignant, benign)",
        ],
        [
            [n, *_by_class(made, n, order), " ".join(f"{v:.2f}" for v in PAPER["classes"].get(n, ()))]
            for n in ["teacher", *students]
        ],
        "Tables 3 to 5: precision, recall and F1 by class",
        "Mean over seeds.",
    )
    six = Table(
        ["batch size", "paper", "accuracy"],
        [
            [b, f"{100 * PAPER['batch_size'][b]:.1f} %" if b in PAPER["batch_size"] else "-", accuracy(f"B{b}")]
            for b in batch_sizes
        ],
        "Table 6: batch size",
    )
    pictures = _figures(made, data, temperatures, test, home)
    summary = {
        "test": test,
        "val": val,
        "gain_over_alone": gains,
        "best_on_validation": best,
        "prediction_seconds_3000": costs,
    }
    gain = gains["T10"]["accuracy"]
    answer = (
        f"DSNet is right on {accuracy('T10')} of the test images when distilled at T = 10 and on {accuracy('alone')} "
        f"alone: {difference(gain)}. Its teacher reaches {accuracy('teacher')}. "
        "The paper prints 91.7 % and has no row for DSNet alone."
    )
    sections: list[Section] = [one, two, three, six, *pictures]
    return made.finish("DSNet: every experiment of the paper", answer, sections, summary)


def _by_class(made: Study, name: str, order: Sequence[int]) -> list[str]:
    tables = [per_class(s) for s in made.scores(name)]
    return [
        f"{np.mean([t[what][c, 0] for t in tables]):.2f}" for c in order for what in ("precision", "sensitivity", "f1")
    ]


def _costs(made: Study, names: Sequence[str]) -> dict[str, float]:
    """Seconds for 3,000 images, all networks side by side."""
    from histill.deploy.deliver import open_any
    from histill.deploy.timing import latency

    opened = {name: open_any(made.runs[name][0].path) for name in names}
    return {
        n: 3000 / found["images_per_second"] for n, found in latency(opened, batch=16, repeats=10, seconds=60).items()
    }


def _figures(
    made: Study, data: Images, temperatures: Sequence[float], test: dict[str, Any], home: Path
) -> list[Picture]:
    rows = [test[f"T{t:g}"]["accuracy"] for t in temperatures]
    value, low, high = ([float(r[key]) for r in rows] for key in ("value", "low", "high"))
    paper = [PAPER["temperature"].get(t, float("nan")) for t in temperatures]
    figures.sweep(temperatures, value, low, high, home / "temperature.png", paper=paper, xlabel="temperature")
    shown = [
        Picture(home / "temperature.png", "Accuracy against temperature, with 95 % intervals; the paper's beside.")
    ]
    table = made.runs["teacher"][0].predictions
    p = table[[f"prob_{c}" for c in data.classes]].to_numpy(dtype=float)
    surest = int(np.abs(p[:, 0] - 0.9).argmin())
    figures.softened(logits_of(p[surest]), list(temperatures), data.classes, home / "softened.png")
    shown.append(Picture(home / "softened.png", "Figure 6: one image's soft targets at each temperature."))
    for target, label in enumerate(data.classes):
        path = home / f"roc-{target}.png"
        curves = {}
        for name, title in (("teacher", "teacher"), ("T10", "distilled"), ("alone", "alone")):
            found = made.scores(name)[0]
            auroc = next(r for r in per_class_table(found, data.classes) if r["class"] == label)["auroc"]
            curves[title] = (*roc_curve(found, target), auroc)
        figures.roc(curves, path)
        shown.append(Picture(path, f"Figure 7: ROC for {label}, first seed (paper: teacher .98 to .99, student .95)."))
    figures.gallery(*gallery_of(data, made.runs["T10"][0].predictions), data.classes, home / "gallery.png")
    shown.append(Picture(home / "gallery.png", "Figure 8: surest mistakes first, then images it had right."))
    return shown
