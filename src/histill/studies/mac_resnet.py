"""Every experiment of the MAC-ResNet paper, beside its numbers, and the distillation that it only describes.

Huang et al., Journal of Personalized Medicine 13 (2023) 89; see `histill.recipes.mac_resnet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from histill.data.images import Images
from histill.errors import BadInput
from histill.evaluate import figures
from histill.evaluate.attention import looked_at
from histill.evaluate.intervals import per_class_table
from histill.evaluate.metrics import Scores, confusion, per_class
from histill.evaluate.report import Picture, Section, Table, difference, share
from histill.recipes import mac_resnet
from histill.studies._common import Study, comparison_note

__all__ = ["PAPER", "study"]

PAPER: dict[str, Any] = {
    # ACC, Spec, Recall, then 0-ACC to 3-ACC, on validation; Tables 1, 2 and 4. "with SPP" of Table 3 is Table 4's row
    # of cross-entropy; of Table 5 the accuracy alone is legible.
    "l2": (0.8020, 0.8244, 0.7630, 0.8672, 0.7082, 0.7306, 0.8807),
    "l3": (0.8110, 0.8207, 0.7800, 0.8774, 0.7150, 0.7370, 0.8954),
    "l4": (0.8172, 0.8369, 0.7714, 0.8858, 0.7271, 0.7493, 0.8860),
    "l2+3": (0.8065, 0.8243, 0.7697, 0.8695, 0.7231, 0.7462, 0.8876),
    "l2+4": (0.8307, 0.8470, 0.8030, 0.8873, 0.7456, 0.7785, 0.8930),
    "l3+4": (0.8261, 0.8260, 0.7963, 0.8689, 0.7590, 0.7800, 0.8965),
    "l2+3+4": (0.8187, 0.8207, 0.7815, 0.8595, 0.7476, 0.7764, 0.8911),
    "sample-input": (0.8321, 0.8739, 0.8140, 0.8901, 0.7489, 0.7857, 0.9035),
    "spp": (0.8646, 0.8768, 0.8522, 0.9209, 0.7858, 0.8260, 0.9257),
    "label-smoothing": (0.8704, 0.8752, 0.8803, 0.9200, 0.7892, 0.8370, 0.9354),
    "focal": (0.8857, 0.8835, 0.8704, 0.8945, 0.8620, 0.8710, 0.9153),
    "mac-resnet": (0.9023,),
    "test": {"BCC": 0.968, "MGC": 0.946, "CM": 0.908},  # accuracy per tumour, test; Table 6
    "losses": {"focal": (1.8, 0.66), "spp": (1.4, 0.85), "label-smoothing": (None, 0.74)},  # first, last; Figure 5
}
"""What the paper prints, on 132 patients with eyelid tumours. Its Recall is not the mean of its 0-ACC to 3-ACC."""

COMBINATIONS = ("l2", "l3", "l4", "l2+3", "l2+4", "l3+4", "l2+3+4")
BACM: dict[str, Any] = {
    "dares": (),
    "sample_input": False,
    "spp": False,
    "loss": "cross-entropy",
    "schedule": "constant",
}

DESIGNS: dict[str, dict[str, Any]] = {
    "resnet50": BACM | {"attention": False},
    "bacm": BACM,
    **{name: BACM | {"dares": tuple(f"layer{n}" for n in name[1:].split("+"))} for name in COMBINATIONS},
    "sample-input": BACM | {"dares": ("layer2", "layer4"), "sample_input": True},
    "spp": {"loss": "cross-entropy", "schedule": "constant"},
    "label-smoothing": {"loss": "label-smoothing", "schedule": "constant"},
    "focal": {"loss": "focal", "schedule": "constant"},
    "mac-resnet": {},
}
"""What each row's teacher has; what is not said is `mac_resnet.teacher`'s default, which is the whole MAC-ResNet."""

TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "1": ("Table 1: where the DARes-block is", {name: name for name in COMBINATIONS}),
    "2": ("Table 2: SampleInput", {"without": "l2+4", "with": "sample-input"}),
    "3": ("Table 3: SPP", {"without": "sample-input", "with": "spp"}),
    "4": ("Table 4: loss", {"cross-entropy": "spp", "label smoothing": "label-smoothing", "focal": "focal"}),
    "5": ("Table 5: learning rate", {"focal, constant": "focal", "focal, cosine with restarts": "mac-resnet"}),
    "ladder": (
        "The ladder (not in the paper)",
        {"ResNet50": "resnet50", "+ BACM": "bacm", "+ DARes": "l2+4", "+ SampleInput": "sample-input", "+ SPP": "spp"},
    ),
}
"""A table's heading, and the design of each row."""

Tables = Literal["1", "2", "3", "4", "5", "6", "ladder", "distilled"]


def study(
    data: Images,
    *,
    out: Path,
    tables: Sequence[Tables] = ("1", "2", "3", "4", "5", "6", "ladder", "distilled"),
    background: str | None = None,
    image_size: int = 512,
    epochs: int = 50,
    batch_size: int = 8,
    lr: float = 1e-5,
    period: int = 10,
    weights: str = "auto",
    network: str = "resnet50",
    augment: mac_resnet.Augments = "random-combination",
    temperature: float = 4.0,
    alpha: float = 0.5,
    seeds: int = 1,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> str:
    """Every experiment of the MAC-ResNet paper, and the distillation that it describes without a table.

    Args:
        data: the images and their splits.
        out: the study's folder; what is done already is not done again.
        tables: 1 to 6, ladder (a part at a time) and distilled (student alone, distilled, teacher); rows that tables
            share are trained once.
        background: the class that is no tumour, left out of Table 6.
        image_size: height and width in pixels.
        epochs: passes over the training images, for each row.
        batch_size: images per step.
        lr: learning rate of Adam.
        period: epochs between the restarts of the learning rate.
        weights: of teachers and students; see mac_resnet.teacher.
        network: the student's.
        augment: see mac_resnet.teacher.
        temperature: of the distillation.
        alpha: of the distillation, the weight of the teacher.
        seeds: how many seeds each row has.
        seed: the first seed.
        device: auto, cpu, cuda or mps.
        precision: Lightning Fabric's names, or auto.

    Raises:
        BadInput: see `histill.loop.train`; also a background that is no class.
    """
    if background is not None and background not in data.classes:
        raise BadInput(f"--background {background}: the classes are {', '.join(data.classes)}")
    made = Study(Path(out), range(seed, seed + seeds), {"device": device, "precision": precision})
    common: dict[str, Any] = {"image_size": image_size, "epochs": epochs, "batch_size": batch_size, "lr": lr}
    common |= {"weights": weights, "augment": augment, "period": period}
    designs = [design for table in tables for design in TABLES.get(table, ("", {"": "mac-resnet"}))[1].values()]
    for design in DESIGNS:
        if design in designs:
            made.run(design, lambda s: mac_resnet.teacher(data, seed=s, **common | DESIGNS[design]))  # noqa: B023
    if "distilled" in tables:
        taught_by = dict(zip(made.seeds, made.runs["mac-resnet"]))

        def learn(name: str, taught: bool = True, **arguments: Any) -> None:
            settings = common | {"network": network, "temperature": temperature, "alpha": alpha} | arguments
            made.run(name, lambda s: mac_resnet.student(data, taught_by[s] if taught else None, seed=s, **settings))

        learn("alone", taught=False)
        learn("distilled-without-crop", crop_term="none")
        learn("distilled")
    return _report(made, data, tables, background, period)


def _report(made: Study, data: Images, tables: Sequence[str], background: str | None, period: int) -> str:
    """The tables beside the paper's, the figures, the page."""
    test = {name: made.figures(name) for name in made.runs}
    val = {name: made.figures(name, "val") for name in made.runs}
    summary: dict[str, Any] = {"test": test, "val": val}
    sections: list[Section] = [_ablation(made, data, *TABLES[table], val, test) for table in TABLES if table in tables]
    answer = [
        "The paper chose its design on validation; these tables are on validation too, with the test beside them. "
        "What is best here is not chosen: later rows keep the paper's design."
    ]
    if "5" in tables and len(made.runs["mac-resnet"][0].log) <= period:
        answer.append(f"Nothing restarts within these epochs (--period {period}): the cosine is half a wave.")
    if "6" in tables:
        sections.append(_by_tumour(made, data, background))
        answer.append(f"MAC-ResNet is right on {share(test['mac-resnet']['accuracy'])} of the test images.")
    if "distilled" in tables:
        gains = {name: made.gain(name, "alone") for name in ("distilled", "distilled-without-crop", "mac-resnet")}
        summary["gain_over_alone"] = gains
        sections.append(_distilled(made, test, gains))
        answer.append(
            f"The student is right on {share(test['distilled']['accuracy'])} of the test images when distilled and on "
            f"{share(test['alone']['accuracy'])} alone: {difference(gains['distilled']['accuracy'])}. "
            f"Its teacher reaches {share(test['mac-resnet']['accuracy'])}. The paper speaks of a significant "
            "improvement and prints no number."
        )
    sections += _pictures(made, tables)
    return made.finish("MAC-ResNet: every experiment of the paper", " ".join(answer), sections, summary)


def _ablation(
    made: Study, data: Images, heading: str, rows: Mapping[str, str], val: Mapping[str, Any], test: Mapping[str, Any]
) -> Table:
    """A row per design: the paper's figures, ours on validation, the accuracy on the test images."""
    return Table(
        ["", "paper: ACC, Spec, Recall, 0 to 3", "ACC", "Spec", "Recall", *data.classes, "test ACC"],
        [
            [
                row,
                " ".join(f"{v:.4f}" for v in PAPER.get(design, ())) or "-",
                *(share(val[design][name]) for name in ("accuracy", "specificity", "sensitivity")),
                *_recalls(made.scores(design, "val")),
                share(test[design]["accuracy"]),
            ]
            for row, design in rows.items()
        ],
        heading,
        "On validation but for the last column. A class's figure is the share of its images that are right, the mean "
        "over seeds.",
    )


def _recalls(scores: Sequence[Scores]) -> list[str]:
    recall = np.mean([per_class(s)["sensitivity"][:, 0] for s in scores], axis=0)
    return ["-" if np.isnan(v) else f"{100 * v:.1f} %" for v in recall]


def _by_tumour(made: Study, data: Images, background: str | None) -> Table:
    """Table 6: each class against all others."""
    scores = made.scores("mac-resnet")[0]
    counts = confusion(scores)
    paper = ", ".join(f"{name} {100 * value:.1f} %" for name, value in PAPER["test"].items())
    rows: list[list[object]] = []
    for number, row in enumerate(per_class_table(scores, data.classes)):
        if row["class"] != background:
            wrong = counts[number].sum() + counts[:, number].sum() - 2 * counts[number, number]
            accuracy = f"{100 * (1 - wrong / counts.sum()):.1f} %"
            rows.append([row["class"], row["support"], accuracy, share(row["sensitivity"]), share(row["specificity"])])
    return Table(
        ["class", "images", "ACC", "sensitivity", "specificity"],
        rows,
        "Table 6: MAC-ResNet on the test images, by class",
        f"One class against all others, first seed. The paper's ACC: {paper}.",
    )


def _distilled(made: Study, test: Mapping[str, Any], gains: Mapping[str, Any]) -> Table:
    """What the paper describes without a table."""
    titles = {
        "alone": "student alone",
        "distilled-without-crop": "distilled, Eq. 4 alone",
        "distilled": "distilled, Eq. 5",
        "mac-resnet": "teacher, MAC-ResNet",
    }
    return Table(
        ["", "parameters", "ACC", "Spec", "Recall", "ACC minus alone"],
        [
            [
                title,
                f"{made.runs[name][0].info['parameters']:,}",
                *(share(test[name][figure]) for figure in ("accuracy", "specificity", "sensitivity")),
                difference(gains[name]["accuracy"]) if name in gains else "-",
            ]
            for name, title in titles.items()
        ],
        "Distillation (not in the paper)",
        f"Test images, {len(made.seeds)} seed{'s' * (len(made.seeds) > 1)}, a teacher for each. With Eq. 5 the student "
        "also sees the crops; Eq. 4 alone shows what the teacher's word is worth without them. "
        + comparison_note(gains),
    )


def _pictures(made: Study, tables: Sequence[str]) -> list[Picture]:
    home, shown = made.out / "figures", []
    if "4" in tables:
        lines = {row: made.runs[design][0].log["loss"].to_numpy() for row, design in TABLES["4"][1].items()}
        figures.curves(lines, home / "losses.png", ylabel="training loss")
        first_last = (PAPER["losses"][row] for row in ("focal", "spp", "label-smoothing"))
        caption = (
            "Figure 5: training loss, a point per epoch, first seed (the paper: every second step; focal {0[0]} to "
            "{0[1]}, cross-entropy {1[0]} to {1[1]}, label smoothing ends at {2[1]}). The losses have no common "
            "scale.".format(*first_last)
        )
        shown.append(Picture(home / "losses.png", caption))
    looking = [design for design in DESIGNS if design in made.runs and design != "resnet50"]
    if looking:
        run = made.runs[looking[-1]][0]
        looked_at(run, run.predictions.query("split == 'test'"), home / "attention.png")
        caption = f"Figure 6: what {looking[-1]} looks at; the mean of its maps, the mask, the crop. Test images."
        shown.append(Picture(home / "attention.png", caption))
    return shown
