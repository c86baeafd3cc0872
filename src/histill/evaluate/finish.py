"""What a run folder holds once training is over: predictions -> figures with intervals, pictures, page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from histill.data.decode import load
from histill.data.images import Images, few
from histill.errors import BadInput
from histill.evaluate import calibration, figures
from histill.evaluate.attention import looked_at
from histill.evaluate.intervals import figures_with_intervals, per_class_table
from histill.evaluate.metrics import EXTRA_METRICS, OWN_METRICS, Scores, confusion, reliability, roc_curve
from histill.evaluate.report import Picture, Table, run_report, share, shown
from histill.files import write_json
from histill.run import Run

__all__ = [
    "FIGURES",
    "calibrating",
    "check_columns",
    "class_rows",
    "counts",
    "exit_count",
    "finish",
    "gallery_of",
    "heading",
    "predictions",
    "scores",
    "settings",
    "table_of",
    "tempered",
]

FIGURES = (*OWN_METRICS, *EXTRA_METRICS)
"""What the page of a run shows."""
_NO_CONFIDENCE = 20.0
"""A temperature at which probabilities of 1 in a thousand and of 999 in a thousand become 41 and 59 %."""


def predictions(
    images: Images,
    rows: NDArray[np.int64],
    said: dict[str, NDArray[np.float64]],
    *,
    classes: tuple[str, ...] | None = None,
) -> pd.DataFrame:
    """``predictions.parquet``: image, patient, split, label, prediction, a probability per class (and per exit).

    ``classes`` are those of the network, where they are not those of the images.
    """
    classes = images.classes if classes is None else classes
    frame = images.frame.iloc[rows]
    table: dict[str, Any] = {"image": frame["path"].tolist(), "patient": frame["patient"].tolist()}
    table |= {"split": frame["split"].tolist(), "label": frame["label"].tolist()}
    probabilities = {n: softmax(z, axis=1) for n, z in (said or {"logits": np.empty((0, len(classes)))}).items()}
    if (told := probabilities["logits"].shape[1]) != len(classes):
        raise BadInput(f"the network tells {told} classes apart, {len(classes)} are named: {few(classes)}")
    table["prediction"] = [classes[i] for i in probabilities["logits"].argmax(1)]
    for name, p in probabilities.items():
        prefix = "prob_" if name == "logits" else f"{name}_prob_"
        table |= {f"{prefix}{c}": p[:, i] for i, c in enumerate(classes)}
    return pd.DataFrame(table)


def scores(
    table: pd.DataFrame,
    classes: tuple[str, ...],
    split: str | None = None,
    *,
    positive: str | None = None,
    teacher: pd.DataFrame | None = None,
    exit: int | None = None,
) -> Scores:
    """The `Scores` of a predictions table: of a split, of an exit, beside the teacher's table where there is one.

    Raises:
        BadInput: no image of the split, or the two tables are not about the same images.
    """
    part = table if split is None else table[table["split"] == split]
    if not len(part):
        raise BadInput(f"no predictions of the {split} split")
    number = {name: i for i, name in enumerate(classes)}
    columns = [f"{'' if exit is None else f'exit{exit}_'}prob_{c}" for c in classes]
    check_columns(part, ["image", "patient", "label", *columns])
    if odd := sorted({str(label) for label in part["label"]} - set(number)):
        raise BadInput(f"predictions of images of {few(odd)}, which the network does not know")
    named = part["patient"].where(part["patient"] != "", part["image"])
    said = None
    if teacher is not None:
        by_image = teacher.set_index("image")["prediction"]
        if missing := set(part["image"]) - set(by_image.index):
            raise BadInput(f"the teacher was not asked about {len(missing)} of these images")
        said = by_image[part["image"]].map(number).to_numpy(dtype=np.int64)
    return Scores(
        part["label"].map(number).to_numpy(dtype=np.int64),
        part[columns].to_numpy(dtype=np.float64),
        named.to_numpy(dtype=str),
        said,
        None if positive is None else number[positive],
    )


def check_columns(table: pd.DataFrame, needed: Sequence[str]) -> None:
    """`BadInput` where a table of predictions lacks a column: it was not written with this ``run.json``."""
    if missing := [name for name in needed if name not in table]:
        raise BadInput(f"the predictions have no column {few(missing)}: they are of another network, or were edited")


def exit_count(table: pd.DataFrame, classes: Sequence[str]) -> int:
    """How many exits a predictions table has; 0 of a network without."""
    return sum(f"exit{k}_prob_{classes[0]}" in table for k in range(1, len(table.columns)))


def exit_rows(table: pd.DataFrame, classes: tuple[str, ...], splits: Sequence[str]) -> list[Table]:
    """Accuracy of each exit and of their mean, as a table of the page; none of a network without exits."""
    exits = range(1, exit_count(table, classes) + 1)
    if not exits:
        return []
    rows = [
        [
            "mean of all" if k is None else f"exit {k}",
            *(
                share(figures_with_intervals(scores(table, classes, s, exit=k), names=["accuracy"])["accuracy"])
                for s in splits
            ),
        ]
        for k in (*exits, None)
    ]
    return [Table(["", *splits], rows, "Accuracy by exit")]


def calibrating(val: Scores) -> float:
    """The temperature that calibrates the network, fitted on validation images."""
    return calibration.fit_temperature(calibration.logits_of(val.probabilities), val.labels)


def tempered(before: Scores, temperature: float) -> Scores:
    """The same scores with probabilities softened by a temperature."""
    probabilities = calibration.tempered(before.probabilities, temperature)
    return Scores(before.labels, probabilities, before.units, before.teacher, before.positive)


def counts(info: dict[str, Any], table: pd.DataFrame | None = None) -> dict[str, dict[str, int]]:
    """Images (and patients) by split, as the pages show them."""
    found = {split: {"images": n} for split, n in info["data"]["images"].items() if n}
    if table is not None and info["data"]["patients"] is not None:
        for split, part in table.groupby("split"):
            found[str(split)]["patients"] = part["patient"].replace("", None).nunique()
        if (
            "train" in found and "patients" not in found["train"]
        ):  # nothing is predicted of it; no patient is in two splits
            judged = sum(split.get("patients", 0) for split in found.values())
            found["train"]["patients"] = info["data"]["patients"] - judged
    return found


def class_rows(table: Scores, classes: tuple[str, ...]) -> Table:
    """A row per class: support, sensitivity, specificity, precision, F1, AUROC, with intervals."""
    rows = per_class_table(table, classes)
    names = ("sensitivity", "specificity", "precision", "f1", "auroc")
    cells = [[r["class"], r["support"], *(shown(n, r[n]) for n in names)] for r in rows]
    return Table(
        ["class", "images", *(n.replace("f1", "F1").replace("auroc", "AUROC") for n in names)], cells, "By class"
    )


def finish(out: Path, info: dict[str, Any]) -> None:
    """Write ``metrics.json``, ``figures/`` and ``report.html`` from what the run folder holds.

    The temperature that calibrates the network is fitted on validation and applied to the test split.
    """
    table = pd.read_parquet(out / "predictions.parquet")
    classes, positive = tuple(info["classes"]), info["positive"]
    by_split = {s: scores(table, classes, s, positive=positive) for s in ("val", "test") if (table["split"] == s).any()}
    metrics: dict[str, Any] = {}
    pictures = [Picture(_training(out), "Each weighted loss term, the validation figures and the learning rate.")]
    for split, found in by_split.items():
        metrics[split] = figures_with_intervals(found, names=FIGURES)
        metrics[split]["per_class"] = per_class_table(found, classes)
        metrics[split]["confusion"] = confusion(found).tolist()
    tables, notices = [], list(info["notices"])
    if by_split:
        last, judged = list(by_split.items())[-1]
        if "val" in by_split:
            val = by_split["val"]
            temperature = calibrating(val)
            metrics["temperature"] = temperature
            if temperature > _NO_CONFIDENCE:
                notices.append(
                    f"The temperature that fits validation is {temperature:.3g}: calibrated, every probability is "
                    "nearly the same. The network's confidence says nothing there."
                )
            calm = tempered(judged, temperature)
            metrics[last]["ece_calibrated"] = figures_with_intervals(calm, names=["ece"])["ece"]
            diagrams = {"as trained": reliability(judged), f"temperature {temperature:.2f}": reliability(calm)}
            figures.reliability(diagrams, out / "figures" / "reliability.png")
            pictures.append(
                Picture(out / "figures" / "reliability.png", "Calibration; temperature fitted on validation.")
            )
        figures.confusion(confusion(judged), classes, out / "figures" / "confusion.png")
        pictures.append(Picture(out / "figures" / "confusion.png", f"Confusion matrix, {last} images."))
        pictures.append(Picture(_roc(judged, classes, metrics[last], out), f"ROC, {last} images."))
        seen = out / "figures" / "attention.png"
        if looked_at(Run.open(out), table[table["split"] == last], seen):
            caption = f"What it looks at: the mean of its maps, the mask, the crop; {last} images."
            pictures.append(Picture(seen, caption))
        tables += [class_rows(judged, classes), *exit_rows(table, classes, list(by_split))]
    write_json(out / "metrics.json", metrics)
    shown = {s: {k: v for k, v in metrics[s].items() if k in FIGURES} for s in by_split}
    if shown:
        run_report(
            out,
            shown,
            **heading(out, info),
            counts=counts(info, table),
            pictures=pictures,
            tables=tables,
            settings=settings(info),
            versions=info["versions"] | {"device": info["device"], "data": info["data"]["hash"][:12]},
            notices=notices,
        )


def table_of(figures: dict[str, Any]) -> str:
    """Figures by split as text."""
    known = [n for n in FIGURES if any(n in found for found in figures.values())]
    names = known or list(dict.fromkeys(n for found in figures.values() for n, f in found.items() if "value" in f))
    lines = [f"{'':20}" + "".join(f"{split:30}" for split in figures)]
    lines += [f"{n.replace('_', ' '):20}" + "".join(f"{shown(n, f[n]):30}" for f in figures.values()) for n in names]
    return "\n".join(lines)


def heading(out: Path, info: dict[str, Any]) -> dict[str, str]:
    """Title and subtitle of a run's page."""
    root, count = info["data"]["root"].rsplit("/", 1)[-1], f"{info['parameters']:,}"
    title = info["recipe"].get("name", out.name).rsplit("/", 1)[-1]
    return {"title": title, "subtitle": f"One run · {root} · {count} parameters"}


def settings(info: dict[str, Any]) -> dict[str, Any]:
    """What a page says of how a run was made."""
    arguments = {k: v for k, v in info["recipe"].get("arguments", {}).items() if k != "data"}
    if arguments.get("weights") == "auto":
        arguments["weights"] = f"auto: {info['network']['arguments'].get('weights') or 'none, random weights'}"
    selected = info["selection"]
    counted = f"epoch {selected.get('epoch')}, counted from 0, of {info['epochs_run']}"
    kept = f"{selected['rule']} ({counted})" if "epoch" in selected else ""
    made, name = info["network"]["function"].rsplit(":")[-1], info["network"]["arguments"].get("name")
    return {
        **arguments,
        "network": f"{name} ({made})" if isinstance(name, str) else made,
        "weights kept": kept,
        "views": info["views"],
    }


def _training(out: Path) -> Path:
    path = out / "figures" / "training.png"
    figures.training(pd.read_csv(out / "log.csv"), path)
    return path


def _roc(judged: Scores, classes: tuple[str, ...], found: dict[str, Any], out: Path) -> Path:
    """One curve of two classes, else one against the rest for each."""
    path = out / "figures" / "roc.png"
    targets = [1 if judged.positive is None else judged.positive] if len(classes) == 2 else range(len(classes))
    auroc = {row["class"]: row["auroc"] for row in found["per_class"]}
    present = [t for t in targets if 0 < (judged.labels == t).sum() < len(judged.labels)]
    figures.roc({classes[t]: (*roc_curve(judged, t), auroc[classes[t]]) for t in present}, path)
    return path


def gallery_of(images: Images, table: pd.DataFrame, most: int = 12) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Test images: up to half of them the surest mistakes, the rest evenly from what was right."""
    test = table[table["split"] == "test"].reset_index(drop=True)
    p = test[[f"prob_{c}" for c in images.classes]].to_numpy()
    labels = test["label"].map({c: i for i, c in enumerate(images.classes)}).to_numpy()
    wrong = np.flatnonzero(p.argmax(1) != labels)
    wrong = wrong[np.argsort(-p[wrong].max(1), kind="stable")][: most // 2]
    right = np.flatnonzero(p.argmax(1) == labels)
    right = (
        right[np.linspace(0, len(right) - 1, min(most - len(wrong), len(right))).astype(int)] if len(right) else right
    )
    rows = np.concatenate([wrong, right]).astype(int)
    pictures = np.stack([load(images.root / test["image"][r], 160).transpose(1, 2, 0) for r in rows])
    return pictures, labels[rows], p[rows]
