"""Every experiment of the KD_ConvNeXt paper, beside its numbers.

Zheng et al., Frontiers in Genetics 14 (2023) 1254435; see `histill.recipes.kd_convnext`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from histill.data.images import SPLITS, Images
from histill.data.splits import split
from histill.distill import check_start
from histill.errors import BadInput
from histill.evaluate import figures
from histill.evaluate.calibration import logits_of
from histill.evaluate.intervals import figures_over_seeds, paired_gain, per_class_table
from histill.evaluate.metrics import Scores, confusion
from histill.evaluate.report import Picture, Section, Table, Text, difference, share
from histill.recipes import kd_convnext
from histill.studies._common import Study, comparison_note

__all__ = ["PAPER", "study"]

PAPER: dict[str, Any] = {
    # accuracy, macro precision, macro recall, F1 of the two (not the mean of the classes' F1, which is .7509 in the
    # last row); Table 2
    "rows": {
        "convnext": (0.8112, 0.6734, 0.6850, 0.6791),
        "swin": (0.8275, 0.7048, 0.7140, 0.7093),
        "logits": (0.8305, 0.7238, 0.7254, 0.7246),
        "features": (0.8421, 0.7420, 0.7446, 0.7433),
        "kd-convnext": (0.8564, 0.7988, 0.7464, 0.7717),
    },
    "coatnet_0_rw_224": 0.7984,  # accuracy; the one number of Figure 7 that is printed
    # precision and recall; Table 3, headed in per cent but shares
    "classes": {
        "Grade 1": (1.0, 0.6),
        "Grade 2": (0.9104, 1.0),
        "Grade 3": (0.5789, 0.6875),
        "AIS": (0.5882, 0.8333),
        "MIA": (0.9167, 0.6111),
    },
    # rows the true class, in the order above; Figure 8 with its totals: 209 images, predicted 3, 134, 19, 17, 36
    "diagonal": (3, 122, 11, 10, 33),
    "predicted": (3, 134, 19, 17, 36),
    "images": (5, 122, 16, 12, 54),
}
"""What the paper prints, on 209 test images of lung adenocarcinoma."""

ROWS = {
    "convnext": "ConvNeXt",
    "swin": "Swin",
    "logits": "+ logits KD",
    "features": "+ feature KD",
    "kd-convnext": "KD_ConvNeXt",
    "normalized": "KD_ConvNeXt, features normalised (not in the paper)",
}
"""Table 2: a row's runs, and its title."""

FIGURES = ("accuracy", "macro_precision", "balanced_accuracy", "f1_of_means", "macro_f1")
HEADINGS = ("accuracy", "precision", "recall", "F1 of the means", "mean F1")
ALPHA, BETA = 0.5, 1.0


def study(
    data: Images,
    *,
    out: Path,
    image_size: int = 224,
    epochs: int = 100,
    teacher_epochs: int = 100,
    batch_size: int = 32,
    network: str = "convnext_tiny",
    teacher_network: str = "swin_tiny_patch4_window7_224",
    weights: str = "auto",
    teacher_weights: str = "auto",
    networks: Sequence[str] = ("efficientnetv2_s", "davit_tiny", "coatnet_0_rw_224"),
    tables: Sequence[Literal["2", "7", "sweep"]] = ("2", "7", "sweep"),
    alphas: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
    betas: Sequence[float] = (0.25, 0.5, 1, 2),
    temperatures: Sequence[float] = (1, 2, 4, 8, 16),
    temperature: float = 4.0,
    seeds: int = 5,
    splits: Literal["new", "same"] = "new",
    positive: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> str:
    """Every experiment of the KD_ConvNeXt paper: repeats with a new split by patient each, and paired differences.

    ConvNeXt, Swin and KD_ConvNeXt are always trained, once in each repeat; Table 3 and Figures 6 and 8 come of them.

    Args:
        data: the images and their splits; the first repeat has these, and the others draw them anew in the same shares.
        out: the study's folder; what is done already is not done again.
        image_size: height and width in pixels.
        epochs: passes over the training images for each student and each compared network.
        teacher_epochs: the same for the teacher.
        batch_size: images per step.
        network: the student's; see kd_convnext.student.
        teacher_network: see kd_convnext.teacher.
        weights: of the student and of the compared networks.
        teacher_weights: see kd_convnext.teacher.
        networks: those of Figure 7.
        tables: 2 (the halves of the distillation by themselves), 7 (Figure 7), sweep (alpha and beta).
        alphas: of the sweep, at beta = 1.
        betas: of the sweep, at alpha = 0.5.
        temperatures: of Figure 6.
        temperature: T of the distillation.
        seeds: how many trainings from the start each row has (paper: 5).
        splits: new for each repeat, or the same one for all.
        positive: the class that sensitivity and specificity are about (default: the mean over classes).
        seed: of the first repeat; the others follow.
        device: auto, cpu, cuda or mps.
        precision: Lightning Fabric's names, or auto.

    Raises:
        BadInput: see `histill.loop.train`; also fewer than one seed, or a split without images.
    """
    made = Study(Path(out), range(seed, seed + seeds), {"device": device, "precision": precision})
    if missing := [name for name in SPLITS if not data.rows(name)]:
        raise BadInput(f"{data.root}: no {' or '.join(missing)} images; the study needs all three splits")
    compared = list(networks) if "7" in tables else []
    for name in (network, teacher_network, *compared):  # a network that does not take the images is found at once
        kd_convnext.network_for(name, data, image_size, "none")
    parts = {s: data if s == seed or splits == "same" else redrawn(data, s) for s in made.seeds}
    for part in parts.values():  # a run of the first split has seen test images of the others
        check_start(weights, part)
        check_start(teacher_weights, part)
    common: dict[str, Any] = {"image_size": image_size, "batch_size": batch_size, "positive": positive}
    ours: dict[str, Any] = common | {"network": network, "weights": weights, "epochs": epochs}
    taught: dict[str, Any] = common | {"network": teacher_network, "weights": teacher_weights, "epochs": teacher_epochs}

    def learn(row: str, seeds: Sequence[int] | None = None, **arguments: Any) -> None:
        made.run(row, lambda s: kd_convnext.student(parts[s], seed=s, **ours | arguments), seeds)

    def distil(row: str, seeds: Sequence[int] | None = None, **arguments: Any) -> None:
        teachers = dict(zip(made.seeds, made.runs["swin"], strict=True))
        settings: dict[str, Any] = ours | {"temperature": temperature} | arguments
        made.run(row, lambda s: kd_convnext.student(parts[s], teachers[s], seed=s, **settings), seeds)

    learn("convnext")
    made.run("swin", lambda s: kd_convnext.teacher(parts[s], seed=s, **taught))
    distil("kd-convnext")
    if "2" in tables:
        distil("logits", features=False)
        distil("features", logits=False)
        distil("normalized", normalized=True)
    for name in compared:
        learn(name, network=name)
    sweep: dict[tuple[float, float], str] = {}
    if "sweep" in tables:
        for alpha, beta in dict.fromkeys([*((a, BETA) for a in alphas), *((ALPHA, b) for b in betas)]):
            sweep[alpha, beta] = f"alpha{alpha:g}-beta{beta:g}"
            if (alpha, beta) == (ALPHA, BETA):
                made.runs[sweep[alpha, beta]] = made.runs["kd-convnext"][:1]
            distil(sweep[alpha, beta], [seed], alpha=float(alpha), beta=float(beta))
    return _report(made, data, compared, sweep, temperatures, temperature, splits)


def redrawn(data: Images, seed: int) -> Images:
    """All images divided anew by patient, in the shares that the splits of ``data`` have (paper: 8 : 1 : 1)."""
    val, test = (len(data.rows(name)) / len(data) for name in ("val", "test"))
    return split(data.with_frame(data.frame.assign(split="")), val=val, test=test, seed=seed)


def together(scores: Sequence[Scores]) -> Scores:
    """The test images of all repeats as one; a patient who was tested twice is still one patient."""
    return Scores(
        np.concatenate([s.labels for s in scores]),
        np.concatenate([s.probabilities for s in scores]),
        np.concatenate([s.units for s in scores]),
        positive=scores[0].positive,
    )


def _report(
    made: Study,
    data: Images,
    compared: Sequence[str],
    sweep: dict[tuple[float, float], str],
    temperatures: Sequence[float],
    temperature: float,
    splits: str,
) -> str:
    rows = [row for row in ROWS if row in made.runs]
    test = {row: figures_over_seeds(made.scores(row), names=FIGURES) for row in (*rows, *compared)}
    alone = made.scores("convnext")
    gains = {row: paired_gain(alone, made.scores(row), names=FIGURES) for row in test if row != "convnext"}
    pooled = together(made.scores("kd-convnext"))
    classes = per_class_table(pooled, data.classes)
    sections: list[Section] = [_table_2(rows, test, gains)]
    if compared:
        sections.append(_figure_7([*compared, "convnext", "swin", "kd-convnext"], test))
    sections.append(_table_3(classes, len(made.seeds)))
    swept = {name: made.figures(name, "val")["accuracy"] for name in sweep.values()}
    best = max(sweep, key=lambda setting: swept[sweep[setting]]["value"]) if sweep else None
    if best:
        sections.append(_sweep(made, sweep, swept, best))
    sections += [*_figures(made, data, pooled, sweep, swept, temperatures), _words(made, data, splits)]
    gain, n = gains["kd-convnext"]["accuracy"], len(made.seeds)
    answer = (
        f"Over {n} repeat{'s' * (n > 1)} KD_ConvNeXt (T = {temperature:g}) is right on "
        f"{share(test['kd-convnext']['accuracy'])} of the test images and ConvNeXt alone on "
        f"{share(test['convnext']['accuracy'])}: {difference(gain)}. "
        "The paper prints 85.6 % and 81.1 %, on other images."
    )
    summary = {
        "test": test,
        "gain_over_alone": gains,
        "per_class": classes,
        "confusion": confusion(pooled).tolist(),
        "sweep_validation": swept,
        "best_on_validation": best and {"alpha": best[0], "beta": best[1]},
    }
    return made.finish("KD_ConvNeXt: every experiment of the paper", answer, sections, summary)


def _spread(figure: dict[str, Any]) -> str:
    """The mean with its interval, and the standard deviation over the repeats."""
    seeds = figure["seeds"]
    if len(seeds) < 2 or None in seeds:
        return share(figure)
    return f"{share(figure)} ± {100 * np.std(seeds, ddof=1):.1f}"


def _table_2(rows: Sequence[str], test: dict[str, Any], gains: dict[str, Any]) -> Table:
    cells: list[list[object]] = []
    for row in rows:
        own = [_spread(test[row][name]) for name in FIGURES]
        gain = "-" if row == "convnext" else difference(gains[row]["accuracy"])
        cells.append([ROWS[row], *own, gain, " ".join(f"{v:.4f}" for v in PAPER["rows"].get(row, ())) or "-"])
    return Table(
        ["", *HEADINGS, "accuracy minus ConvNeXt", "paper: accuracy, P, R, F1"],
        cells,
        "Table 2: what each half of the distillation brings",
        "Mean over the repeats (95 % interval over patients and repeats) ± standard deviation over the repeats. The "
        "paper's F1 is that of the means. Differences are paired within each repeat. Repeats share images, so that "
        "their spread is less than that of independent studies (Nadeau and Bengio 2003). " + comparison_note(gains),
    )


def _figure_7(rows: Sequence[str], test: dict[str, Any]) -> Table:
    paper = {row: values[0] for row, values in PAPER["rows"].items()}
    paper["coatnet_0_rw_224"] = PAPER["coatnet_0_rw_224"]
    cells: list[list[object]] = [
        [
            ROWS.get(row, row),
            *(_spread(test[row][name]) for name in FIGURES),
            f"{100 * paper[row]:.2f} %" if row in paper else "not printed",
        ]
        for row in rows
    ]
    return Table(["network", *HEADINGS, "paper: accuracy"], cells, "Figure 7: other networks, without a teacher")


def _table_3(classes: Sequence[dict[str, Any]], repeats: int) -> Table:
    paper = {_bare(name): values for name, values in PAPER["classes"].items()}
    cells: list[list[object]] = [
        [
            row["class"],
            row["support"],
            share(row["precision"]),
            share(row["sensitivity"]),
            " ".join(f"{v:.4f}" for v in paper.get(_bare(row["class"]), ())) or "-",
        ]
        for row in classes
    ]
    note = f"The test images of {repeats} repeats together, as in Figure 8."
    return Table(["class", "images", "precision", "recall", "paper: P, R"], cells, "Table 3: by class", note)


def _bare(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _sweep(
    made: Study, sweep: dict[tuple[float, float], str], swept: dict[str, Any], best: tuple[float, float]
) -> Table:
    cells: list[list[object]] = [
        [f"{alpha:g}", f"{beta:g}", f"{made.runs[name][0].log['loss'].iloc[-1]:.4f}", share(swept[name])]
        for (alpha, beta), name in sweep.items()
    ]
    return Table(
        ["alpha", "beta", "last training loss", "validation accuracy"],
        cells,
        "Alpha and beta",
        f"First repeat. Best on validation: alpha {best[0]:g}, beta {best[1]:g}; the test images were not asked. "
        "Losses of different weights are not on one scale. The paper speaks of this sweep without numbers.",
    )


def _figures(
    made: Study,
    data: Images,
    pooled: Scores,
    sweep: dict[tuple[float, float], str],
    swept: dict[str, Any],
    temperatures: Sequence[float],
) -> list[Section]:
    home = made.out / "figures"
    taught = made.scores("swin")[0].probabilities
    doubtful = int(np.abs(taught.max(1) - 0.9).argmin())
    figures.softened(logits_of(taught[doubtful]), temperatures, data.classes, home / "softened.png")
    figures.confusion(confusion(pooled), data.classes, home / "confusion.png", title="KD_ConvNeXt")
    shown: list[Section] = [
        Picture(home / "softened.png", "Figure 6: the teacher's answer to one test image at each temperature."),
        Picture(home / "confusion.png", "Figure 8: confusion matrix, test images of all repeats."),
    ]
    for place, symbol, other in ((0, "alpha", BETA), (1, "beta", ALPHA)):
        settings = sorted(s for s in sweep if s[1 - place] == other)
        if not settings:
            continue
        x = [setting[place] for setting in settings]
        rows = [swept[sweep[setting]] for setting in settings]
        value, low, high = ([float(r[key]) for r in rows] for key in ("value", "low", "high"))
        path = home / f"{symbol}.png"
        figures.sweep(x, value, low, high, path, xlabel=symbol, ylabel="validation accuracy")
        shown.append(Picture(path, f"Validation accuracy against {symbol}, with 95 % intervals."))
        losses = {f"{symbol} {s[place]:g}": made.runs[sweep[s]][0].log["loss"].to_numpy() for s in settings}
        figures.curves(losses, home / f"{symbol}-loss.png", ylabel="total training loss")
        shown.append(Picture(home / f"{symbol}-loss.png", f"Total loss by epoch for each {symbol}."))
    return shown


def _words(made: Study, data: Images, splits: str) -> Text:
    n = len(made.seeds)
    names = [made.runs[row][0].info["network"]["arguments"]["name"] for row in ("convnext", "swin")]
    unit = "patients" if data.has_patients else "images, as no patients are known"
    drawn = (
        f"The first repeat has the split that the data came with; the other {n - 1} divide all images anew, in the "
        f"same shares, by {unit}."
        if splits == "new" and n > 1
        else f"Every repeat has the split that the data came with, by {unit}."
    )
    same = (
        "Within a repeat all rows have the same images, views, schedule and seed. The epoch that is kept is the best "
        f"on validation. ConvNeXt is {names[0]}, Swin {names[1]}."
    )
    return Text([drawn, same], "Repeats")
