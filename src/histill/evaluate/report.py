"""The reports of an experiment: the answer in plain words, no stronger than the intervals allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from histill.errors import BadInput
from histill.evaluate.metrics import EXTRA_METRICS, METRICS
from histill.evaluate.page import Card, Cards, Picture, Section, Table, Text, write_report

__all__ = [
    "Card",
    "Cards",
    "Picture",
    "Section",
    "Table",
    "Text",
    "count",
    "difference",
    "distill_report",
    "run_report",
    "share",
    "shown",
    "shown_gain",
    "write_report",
]

TITLES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "auroc": "AUROC",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ece": "Calibration error",
    "agreement": "Agreement with the teacher",
    "macro_precision": "Macro precision",
    "f1_of_means": "F1 of macro precision and recall",
}
FEW_UNITS = 30
_FIRST = ", first seed"


def distill_report(
    out: Path,
    summary: Mapping[str, Any],
    *,
    title: str = "What distillation gained and lost",
    subtitle: str = "",
    counts: Mapping[str, Mapping[str, int]] | None = None,
    pictures: Sequence[Picture] = (),
    tables: Sequence[Table] = (),
    settings: Mapping[str, object] | None = None,
    teacher_settings: Mapping[str, object] | None = None,
    versions: Mapping[str, object] | None = None,
    notices: Sequence[str] = (),
) -> Path:
    """Write ``out/report.html`` of a teacher, the student alone and the distilled student.

    Args:
        out: the folder.
        summary: what `summary.json` holds: `test`, and where they were measured `efficiency` and `export`.
        title: the heading.
        subtitle: a line above it: the recipe and the data.
        counts: by split (`train`, `val`, `test`), ``{"images": n, "patients": n, class: n, ...}``; without
            `patients` the intervals are over images, and the page says so.
        pictures: figures, in order.
        tables: further tables, such as one row per class.
        settings: arguments of the recipe, of the distilled student.
        teacher_settings: those of its teacher.
        versions: of libraries, the device, hashes of data and split.
        notices: what was found wrong or converted in the data; shown as they are.
    """
    test, counts = summary["test"], counts or {}
    efficiency, export = summary.get("efficiency", {}), summary.get("export", {})
    seeds = len(test["student_distilled"]["accuracy"].get("seeds", [0]))
    over = _over(counts.get("test", {}), seeds)
    sections: list[Section] = [
        Cards(_distill_cards(test, efficiency)),
        _comparison(test, over),
        *_notices([*_doubts(counts, seeds), *_alike(test["gain"]["accuracy"]), *notices]),
        *_headed(pictures, "Figures"),
        *tables,
        *_efficiency(efficiency),
        *_export(export),
        *_data(counts),
        *_named(f"Settings of the distilled student{_FIRST if seeds > 1 else ''}", settings),
        *_named(f"Settings of the teacher{_FIRST if seeds > 1 else ''}", teacher_settings),
        *_named("Versions", versions),
    ]
    answer = " ".join([_verdict(test), *_cost(test, efficiency, export), over])
    return write_report(Path(out) / "report.html", title=title, subtitle=subtitle, answer=answer, sections=sections)


def run_report(
    folder: Path,
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    title: str,
    subtitle: str = "",
    counts: Mapping[str, Mapping[str, int]] | None = None,
    pictures: Sequence[Picture] = (),
    tables: Sequence[Table] = (),
    settings: Mapping[str, object] | None = None,
    versions: Mapping[str, object] | None = None,
    notices: Sequence[str] = (),
) -> Path:
    """Write ``folder/report.html`` of a single run.

    Args:
        folder: the run.
        metrics: what `metrics.json` holds: by split, by metric, figures. The answer is that of `test`, or of
            the last split where there is no test.
        title: the heading.
        subtitle: a line above it.
        counts: as in `distill_report`.
        pictures: figures, in order.
        tables: further tables.
        settings: arguments of the recipe.
        versions: of libraries, the device, hashes of data and split.
        notices: what was found wrong or converted in the data.
    """
    if not metrics:
        raise BadInput("report: no split was evaluated, there is nothing to report")
    counts = counts or {}
    split = "test" if "test" in metrics else list(metrics)[-1]
    figures = metrics[split]
    keys = [name for name in ("accuracy", "balanced_accuracy", "auroc", "ece") if name in figures]
    seeds = len(figures["accuracy"].get("seeds", [0]))
    over = _over(counts.get(split, {}), seeds)
    names = [name for name in (*METRICS, *EXTRA_METRICS) if any(name in m for m in metrics.values())]
    rows = [[TITLES[n], *(shown(n, m[n]) if n in m else "–" for m in metrics.values())] for n in names]
    what = {
        "test": "of the test images, which it never saw",
        "val": "of the validation images, on which it was chosen",
    }
    sections: list[Section] = [
        Cards([_card(TITLES[name], shown(name, figures[name]), "95 % interval ") for name in keys]),
        Table(
            ["", *metrics],
            rows,
            "Figures by split",
            "95 % intervals. The best epoch was chosen on the validation images.",
        ),
        *_notices([*_doubts(counts, seeds, split), *notices]),
        *_headed(pictures, "Figures"),
        *tables,
        *_data(counts),
        *_named("Settings", settings),
        *_named("Versions", versions),
    ]
    images = what.get(split, f"of the {split} images")
    answer = f"The network is right on {share(figures['accuracy'])} {images}. {over}"
    return write_report(Path(folder) / "report.html", title=title, subtitle=subtitle, answer=answer, sections=sections)


def share(figure: Mapping[str, Any]) -> str:
    """``83.1 % (78.0 to 87.5)``."""
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    if value is None:
        return "not defined"
    return f"{100 * value:.1f} %" + ("" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})")


def difference(figure: Mapping[str, Any]) -> str:
    """``+3.2 points (+0.8 to +5.6)``, percentage points."""
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    if value is None:
        return "not defined"
    return f"{_signed(value)} points" + ("" if low is None else f" ({_signed(low)} to {_signed(high)})")


def count(number: float) -> str:
    """``23.5 million``, ``269 thousand``, ``812``."""
    for size, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def shown(name: str, figure: Mapping[str, Any]) -> str:
    """A figure as its metric is usually written: `share`, but ``0.893 (0.850 to 0.921)`` of an AUROC."""
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    if name != "auroc" or value is None:
        return share(figure)
    return f"{value:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def shown_gain(name: str, figure: Mapping[str, Any]) -> str:
    """A difference as its metric is usually written: `difference`, but ``+0.012 (−0.004 to +0.028)`` of an AUROC."""
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    if name != "auroc" or value is None:
        return difference(figure)
    text = f"{value:+.3f}" + ("" if low is None else f" ({low:+.3f} to {high:+.3f})")
    return text.replace("-", "−")


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _points(value: float) -> str:
    points = f"{100 * abs(value):.1f}"
    return f"{points} point" + ("" if points == "1.0" else "s")


def _verdict(test: Mapping[str, Any]) -> str:
    """Whether distillation helped: what the interval of the paired gain in accuracy says, and no more."""
    gain, reached = test["gain"]["accuracy"], share(test["student_distilled"]["accuracy"])
    value, low, high = (gain[key] for key in ("value", "low", "high"))
    right = f"the distilled student is right on {reached} of the test images"
    if low is None:
        return f"Whether distillation helped cannot be said: {right}, but the gain has no interval."
    moved = f"{_points(value)} {'more' if value > 0 else 'less'} than" if value else "exactly as many as"
    moved += " the same network trained alone"
    between = f"({_signed(low)} to {_signed(high)})"
    if low > 0:
        return f"Distillation helped: {right}, {moved} {between}."
    if high < 0:
        return f"Distillation did harm: {right}, {moved} {between}."
    if value <= 0:
        return f"Distillation did not help: {right}, {moved}; the interval {between} includes zero."
    return f"Distillation is not shown to help: {right}, {moved}, but the interval {between} includes zero."


def _cost(test: Mapping[str, Any], efficiency: Mapping[str, Any], export: Mapping[str, Any]) -> list[str]:
    """How far from the teacher, how much smaller and faster, and what int8 costs."""
    gap = _gap(test)["value"]
    where = (
        f"{_points(gap)} {'above' if gap > 0 else 'below'} its teacher" if round(gap, 3) else "level with its teacher"
    )
    sentences = [f"It is {where}"]
    if efficiency:
        small, fast = _ratios(efficiency)
        size = _compared(small, "has {} fewer parameters", "has {} more parameters", "has as many parameters")
        speed = _compared(fast, "is {} faster", "is {} slower", "is as fast")
        sentences[0] = f"It is {where}, {size} and {speed}"
    if "int8" in export:
        lost = _number(export["int8"]["accuracy_lost"])
        if round(lost, 3) == 0:
            sentences[0] += "; stored as int8 it loses nothing"
        else:
            sentences[0] += f"; stored as int8 it {'loses another' if lost > 0 else 'gains'} {_points(lost)}"
    return [f"{sentences[0]}."]


def _gap(test: Mapping[str, Any]) -> Mapping[str, Any]:
    """Accuracy of the distilled student minus its teacher's, with the paired interval where it was computed."""
    if "gap" in test:
        return test["gap"]["accuracy"]  # type: ignore[no-any-return]
    distilled, teacher = (test[role]["accuracy"]["value"] for role in ("student_distilled", "teacher"))
    return {"value": distilled - teacher, "low": None, "high": None}


def _distill_cards(test: Mapping[str, Any], efficiency: Mapping[str, Any]) -> list[Card]:
    teacher, distilled, gain = (test[k]["accuracy"] for k in ("teacher", "student_distilled", "gain"))
    gap = _gap(test)
    cards = [
        _card("Distilled student, accuracy", share(distilled), "95 % interval "),
        _card("Gain over training alone", difference(gain), "95 % interval "),
        _card("Against its teacher", difference(gap), "95 % interval ")
        if gap["low"] is not None
        else Card("Against its teacher", difference(gap), f"teacher {share(teacher)}"),
    ]
    if efficiency:
        t, s = efficiency["teacher"], efficiency["student"]
        small, fast = _ratios(efficiency)
        before, after = (x["latency_ms_batch1"]["median"] for x in (t, s))
        size = f"{count(t['parameters'])} to {count(s['parameters'])} parameters"
        detail = f"{size}; {before:.3g} to {after:.3g} ms an image"
        cards.append(Card("Smaller, faster", f"{_fold(small)}, {_fold(fast)}", detail))
    return cards


def _comparison(test: Mapping[str, Any], over: str) -> Table:
    gain = test["gain"]
    rows = []
    for name in METRICS:
        cells = [
            shown(name, test[k][name]) if name in test[k] else "–"
            for k in ("teacher", "student_alone", "student_distilled")
        ]
        rows.append(
            [TITLES[name], *cells, shown_gain(name, gain[name]).replace(" points", "") if name in gain else "–"]
        )
    note = over + " The gain is paired: both students on the same images, under the same draws."
    if "mcnemar_p" in gain:
        note += f" McNemar's exact test, which takes images as independent: {_p(gain['mcnemar_p'])}"
        note += " (median over seeds)." if "mcnemar_p_seeds" in gain else "."
    return Table(
        ["", "Teacher", "Student alone", "Distilled student", "Gain, points"], rows, "On the test images", note
    )


def _efficiency(efficiency: Mapping[str, Any]) -> list[Section]:
    if not efficiency:
        return []
    teacher = efficiency["teacher"]
    named = {"Student": "student", "Student, int8": "student_int8"}
    students = {title: efficiency[name] for title, name in named.items() if name in efficiency}
    rows: list[list[str]] = []

    def row(title: str, of: Callable[[Any], float | None], text: Callable[[float], str], *, more: bool = False) -> None:
        """A row where every model has the figure; less of it is a gain, or ``more``."""
        before, after = of(teacher), [of(student) for student in students.values()]
        if before and all(after):
            gains = [value / before if more else before / value for value in after if value]
            rows.append([title, text(before), *(c for v, g in zip(after, gains) for c in (text(v or 0), _fold(g)))])

    row("Parameters", lambda m: m.get("parameters"), lambda v: f"{v:,.0f}")
    row("Multiply-accumulates per image", lambda m: m.get("macs"), lambda v: f"{_millions(v)} M")
    row("File", lambda m: m.get("file_bytes"), lambda v: f"{_millions(v)} MB")
    row("Peak memory", lambda m: m.get("peak_memory_bytes"), lambda v: f"{_millions(v)} MB")
    for name in (n for n in teacher if n.startswith("latency_ms_batch")):
        batch = name.removeprefix("latency_ms_batch")
        what = "one image" if batch == "1" else f"{batch} images at once"
        for key, title in (("median", "median"), ("p95", "95th percentile")):
            row(f"Latency of {what}, {title}", lambda m: m[name][key], lambda v: f"{v:.3g} ms")  # noqa: B023
    row("Images per second", lambda m: m.get("images_per_second"), lambda v: f"{v:,.1f}", more=True)
    columns = ["", "Teacher", *(column for title in students for column in (title, "Gain"))]
    note = (
        "The exported files in ONNX Runtime on this machine's CPU, in turns, with random pixels; images per second of "
        "the largest batch. Where the machine does other work, trust the ratios of the medians."
    )
    return [Table(columns, rows, "Size and speed", note)]


def _millions(number: float) -> str:
    return f"{number / 1e6:,.0f}" if number >= 1e8 else f"{number / 1e6:.3g}"


def _export(export: Mapping[str, Any]) -> list[Section]:
    if not export:
        return []
    titles = {"onnx": "ONNX", "int8": "ONNX, int8", "torchscript": "TorchScript"}
    rows = []
    for kind, e in export.items():
        accuracy, lost = _number(e["accuracy"]), _number(e["accuracy_lost"])
        lost_text = "0.0 points" if round(lost, 4) == 0 else f"{100 * lost:.1f} points".replace("-", "−")
        rows.append(
            [
                titles.get(kind, kind),
                Path(str(e["path"])).name,
                f"{_number(e['max_abs_diff']):.2g}",
                f"{100 * accuracy:.1f} %",
                lost_text,
            ]
        )
    columns = ["", "File", "Largest difference of an output", "Accuracy", "Accuracy lost"]
    return [
        Table(
            columns,
            rows,
            "Exported",
            "Outputs (logits) are compared with the network's on validation images, accuracy on the test images.",
        )
    ]


def _doubts(counts: Mapping[str, Mapping[str, int]], seeds: int, split: str = "test") -> list[str]:
    """What weakens the intervals, said without being asked."""
    held = counts.get(split, {})
    doubts = []
    if held and "patients" not in held:
        doubts.append(
            "The data name no patients: images were drawn as if independent. "
            "If patients have several images, the intervals are too narrow, "
            "and a patient may be in two splits."
        )
    units = held.get("patients", held.get("images"))
    if units is not None and units < FEW_UNITS:
        kind = "patients" if "patients" in held else "images"
        doubts.append(f"Only {units} {kind} in the {split} split: the intervals are themselves rough.")
    if 1 < seeds < 5:
        doubts.append(f"{seeds} seeds: the spread between trainings is only roughly known.")
    elif seeds == 1:
        doubts.append("One seed: the intervals do not hold the spread between trainings.")
    return doubts


def _alike(gain: Mapping[str, Any]) -> list[str]:
    """What an interval without width says, and does not."""
    if gain["low"] is None or gain["low"] != gain["high"]:
        return []
    return [
        "The two students are right on as many images of every patient, so that the interval of their difference has "
        "no width: nothing was seen to differ, which is not that nothing does."
    ]


def _over(held: Mapping[str, int], seeds: int) -> str:
    """What the intervals are over."""
    images, patients = held.get("images"), held.get("patients")
    if patients is not None:
        text = f"Intervals (95 %) are over {patients:,} patients" + (f" with {images:,} images" if images else "")
    elif images is not None:
        text = f"Intervals (95 %) are over {images:,} images"
    else:
        text = "Intervals are 95 %"
    return text + (f" and {seeds} seeds." if seeds > 1 else ".")


def _data(counts: Mapping[str, Mapping[str, int]]) -> list[Section]:
    if not counts:
        return []
    columns = list(dict.fromkeys(name for row in counts.values() for name in row))
    rows = [[split, *(row.get(name, "–") for name in columns)] for split, row in counts.items()]
    return [Table(["Split", *columns], rows, "Data")]


def _notices(lines: Sequence[str]) -> list[Section]:
    return [Text(list(lines), "Before trusting these figures", notice=True)] if lines else []


def _named(heading: str, values: Mapping[str, object] | None) -> list[Section]:
    return [Table(["Name", "Value"], list(values.items()), heading)] if values else []


def _headed(pictures: Sequence[Picture], heading: str) -> list[Section]:
    first = [replace(p, heading=p.heading or heading) for p in pictures[:1]]
    return [*first, *pictures[1:]]


def _card(label: str, text: str, prefix: str = "") -> Card:
    value, bracket, interval = text.partition(" (")
    return Card(label, value, f"{prefix}{interval.rstrip(')')}" if bracket else "")


def _ratios(efficiency: Mapping[str, Any]) -> tuple[float, float]:
    """How many times smaller and how many times faster the student is."""
    t, s = efficiency["teacher"], efficiency["student"]
    return t["parameters"] / s["parameters"], t["latency_ms_batch1"]["median"] / s["latency_ms_batch1"]["median"]


def _fold(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 20 else f"{ratio:.1f}×" if ratio >= 1 else f"{ratio:.2f}×"


def _compared(ratio: float, more: str, less: str, same: str) -> str:
    if abs(ratio - 1) < 0.05:
        return same
    return more.format(_times(ratio)) if ratio > 1 else less.format(_times(1 / ratio))


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 20 else f"{ratio:.1f} times"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _number(value: Any) -> float:
    return float(value["value"] if isinstance(value, Mapping) else value)
