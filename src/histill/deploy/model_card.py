"""The model card that goes with an export: what the run knows, in words, and what only a person can add.

After Mitchell et al. 2019, "Model cards for model reporting". Everything is read from the run's folder; names of
classes and files come from users and are escaped.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from histill.errors import HistillError
from histill.evaluate.cost import macs
from histill.evaluate.report import count, share, shown
from histill.files import read_json, write_text
from histill.run import Run

__all__ = ["card", "origins", "parts_of", "write_card"]

_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ece": "expected calibration error",
    "miou": "mean IoU",
    "mdice": "mean Dice",
    "pixel_accuracy": "pixel accuracy",
    "object_f1": "nuclei, F1 at IoU 0.5",
    "panoptic_quality": "nuclei, panoptic quality",
}
_FEW = 30
_WIDE = 0.1
_DEEP = 3


def write_card(
    run: Run,
    exported: Path,
    files: Mapping[str, Mapping[str, Any]],
    *,
    mpp: float | None = None,
    efficiency: Mapping[str, Any] | None = None,
) -> Path:
    """Write the card of an export beside it: ``model_card.md``, or ``NAME.model_card.md`` beside another model's.

    Args:
        run: the run that was exported.
        exported: the file or folder that was written.
        files: what `histill.deploy.Exported` says of it.
        mpp: microns per pixel at the network's image size, where the run does not know them.
        efficiency: ``efficiency`` of ``summary.json``, where it was timed.

    Returns:
        The card's path.
    """
    folder = exported if exported.is_dir() else exported.parent
    path = folder / "model_card.md"
    text = card(run, exported, files, mpp=mpp, efficiency=efficiency)
    if path.is_file() and path.read_text(encoding="utf-8").partition("\n")[0] != text.partition("\n")[0]:
        path = folder / f"{exported.stem}.model_card.md"
    write_text(path, text)
    return path


def card(
    run: Run,
    exported: Path,
    files: Mapping[str, Mapping[str, Any]],
    *,
    mpp: float | None = None,
    efficiency: Mapping[str, Any] | None = None,
) -> str:
    """The card's Markdown; see `write_card`."""
    info, network = run.info, run.network()
    taught = _teacher(run)
    metrics = run.metrics if (run.path / "metrics.json").is_file() else {}
    split = next((name for name in ("test", "val") if metrics.get(name)), "")
    found = metrics.get(split, {})
    title = (
        exported.name if exported.name not in ("qupath", "exits", "") else f"{run.path.resolve().name}, {exported.name}"
    )
    said = {
        "title": _md(title),
        "what": _what(run, taught),
        "histill": info["versions"].get("histill", ""),
        "run": _code(_short(run.path)),
        "facts": _facts(run, mpp),
        "intended": _intended(run),
        "table": _table,
        **_splits(run),
        "data": _data(run),
        "split": {"test": "test", "val": "validation"}.get(split, ""),
        "chosen": ", which chose nothing" if split == "test" else ", which also chose the epoch: they flatter",
        "over": f"over {'patients' if info['data']['patients'] is not None else 'images, patients not being known'}",
        **_figures(found, taught, split),
        "calibration": _calibration(run, split),
        **_costs(network, run, taught, efficiency),
        "exported": [_exported(exported, name, one) for name, one in files.items()],
        "size": run.image_size,
        "limits": _limits(run, found, split),
        "origins": origins(run),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("histill.deploy"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return re.sub(r"\n{3,}", "\n\n", environment.get_template("model_card.md").render(said))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def _md(text: object) -> str:
    """Text that came from a user: one line, no HTML, no Markdown."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", html.escape(line, quote=False))


def _code(text: object) -> str:
    """The same between backticks."""
    return " ".join(re.sub(r"[`<>&|\x00-\x1f]", " ", str(text)).split())


def _short(path: object) -> str:
    """The last two parts of a path: where it lay on one machine is nobody's business."""
    return "/".join(Path(str(path)).resolve().parts[-2:]).lstrip("/")


def _teacher(run: Run) -> Run | None:
    """The run that it learnt from, where that is there and was judged on the same split."""
    named = run.info["recipe"].get("arguments", {}).get("teacher")
    if not isinstance(named, str) or not (Path(named) / "metrics.json").is_file():
        return None
    try:
        found = Run.open(named)
    except HistillError:
        return None
    return found if found.info["data"]["split_hash"] == run.info["data"]["split_hash"] else None


def _network(info: Mapping[str, Any]) -> str:
    """``Timm resnet18``: the network's function and, where it has one, its name."""
    name = info["network"]["arguments"].get("name")
    return " ".join(_md(part) for part in (info["network"]["function"].rpartition(":")[2], name) if part)


def _task(run: Run) -> str:
    masks = run.info["data"]["masks"]
    if masks == "instances":
        return "outlines nuclei"
    names = ", ".join(_md(name) for name in run.classes)
    return f"outlines {names}" if masks else f"tells {names} apart" if run.classes else "describes images"


def _what(run: Run, teacher: Run | None) -> str:
    learnt = "distilled from a teacher" if run.info["teacher"] else "trained without a teacher"
    if teacher is not None:
        learnt = f"distilled from a teacher of {teacher.info['parameters']:,} parameters ({_network(teacher.info)})"
    return f"A network of {run.info['parameters']:,} parameters ({_network(run.info)}) that {_task(run)}, {learnt}."


def _facts(run: Run, mpp: float | None) -> list[tuple[str, str]]:
    info = run.info
    task = {"": "classification of images", "classes": "segmentation into classes", "instances": "nuclei, one by one"}
    mpp = mpp or info.get("mpp")
    rows = [
        ("task", task.get(info["data"]["masks"], "segmentation")),
        ("classes", ", ".join(_md(name) for name in run.classes) or "none"),
        ("input", f"RGB, {run.image_size} x {run.image_size} pixels"),
        ("microns per pixel at that size", f"{mpp:.4g}" if mpp else "not known; *to fill in*"),
        ("network", _network(info)),
        ("parameters", f"{info['parameters']:,}"),
        ("recipe", f"`{_code(Path(str(info['recipe'].get('name', 'own'))).name)}`"),
        ("trained", f"{info.get('epochs_run', info['epochs'])} epochs, seed {info['seed']}, {_started(info)}"),
        ("weights kept", _md(info.get("selection", {}).get("rule", info["select"]))),
    ]
    if info["positive"]:
        rows.append(("sensitivity and specificity are of", _md(info["positive"])))
    return rows


def _started(info: Mapping[str, Any]) -> str:
    return f"{str(info.get('started', ''))[:10]}, torch {info['versions'].get('torch', '')}".lstrip(", ")


def _intended(run: Run) -> str:
    return (
        f"Research on images like those it was trained on: it {_task(run)}. Its answer is a statement about an "
        "image, to be looked at by someone who could have given it themselves."
    )


def _splits(run: Run) -> dict[str, Any]:
    frame, patients = run.data.frame, run.info["data"]["patients"] is not None
    classes = () if run.info["data"]["masks"] else run.classes
    rows = []
    for split in ("train", "val", "test"):
        part = frame[frame["split"] == split]
        if len(part):
            row = [split, f"{len(part):,}"]
            row += [f"{part['patient'].replace('', None).nunique():,}"] * patients
            rows.append(row + [f"{int((part['label'] == name).sum()):,}" for name in classes])
    columns = ["split", "images", *(["patients"] * patients), *(_md(name) for name in classes)]
    return {"split_columns": columns, "splits": rows}


def _data(run: Run) -> str:
    info = run.info["data"]
    patients = info["patients"]
    parts = [
        f"Data `{_code(Path(info['root']).name)}` (hash `{info['hash'][:12]}`, split `{info['split_hash'][:12]}`)."
    ]
    parts.append(
        "Patients are not known, so images of one patient may be in two splits."
        if patients is None
        else f"{patients:,} patients, none of them in two splits."
    )
    if info["unlabelled"]:
        parts.append(f"{info['unlabelled']:,} of the training images have no label; the teacher spoke for them.")
    sites = sorted(set(run.data.frame.get("site", ())) - {""})
    if sites:
        parts.append(f"Sites: {', '.join(_md(site) for site in sites[:10])}{' and others' * (len(sites) > 10)}.")
    return " ".join(parts)


def _figures(found: Mapping[str, Any], teacher: Run | None, split: str) -> dict[str, Any]:
    names = [name for name in _TITLES if isinstance(found.get(name), dict) and found[name].get("value") is not None]
    theirs = {} if teacher is None else teacher.metrics.get(split, {})
    columns = ["", "this model", *(["its teacher"] if theirs else [])]
    rows = []
    for name in names:
        row = [_TITLES[name], shown(name, found[name])]
        if theirs:
            row.append(shown(name, theirs[name]) if isinstance(theirs.get(name), dict) else "-")
        rows.append(row)
    by_class = [
        [_md(one["class"]), f"{one['support']:,}", *(shown(n, one[n]) for n in ("sensitivity", "specificity", "auroc"))]
        for one in found.get("per_class", ())
        if "auroc" in one
    ]
    return {"columns": columns, "figures": rows, "by_class": by_class}


def _calibration(run: Run, split: str) -> str:
    """How far probabilities are off, and the temperature that validation images ask for."""
    if not split or run.info["data"]["masks"] or not run.classes:
        return ""
    from histill.evaluate.finish import calibrating, scores, tempered
    from histill.evaluate.intervals import figures_with_intervals

    table = run.predictions
    judged = scores(table, run.classes, split)
    before = figures_with_intervals(judged)["ece"]
    text = (
        f"Expected calibration error on the {'test' if split == 'test' else 'validation'} images: {share(before)}: "
        "so far probabilities and shares of right answers lie apart, on average."
    )
    if split == "test" and (table["split"] == "val").any():
        val = scores(table, run.classes, "val")
        temperature = calibrating(val)
        after = figures_with_intervals(tempered(judged, temperature))["ece"]["value"]
        text += (
            f" With logits divided by {temperature:.3g}, which fits the validation images best, it is "
            f"{100 * after:.1f} %; the exported files do not divide."
        )
    return text


def _costs(network: Any, run: Run, teacher: Run | None, efficiency: Mapping[str, Any] | None) -> dict[str, Any]:
    if efficiency and "student" in efficiency:
        named = {"student": "this model", "student_int8": "int8", "teacher": "its teacher"}
        columns = [name for name in named if name in efficiency]
        kinds: dict[str, Callable[[Any], str]] = {
            "parameters": lambda e: f"{e['parameters']:,}",
            "multiply-accumulates, one image": lambda e: f"{count(e['macs'])}",
            "file": lambda e: _bytes(e["file_bytes"]),
            "peak memory": lambda e: _bytes(e["peak_memory_bytes"]),
            "ms for one image, median (95th percentile)": lambda e: (
                f"{e['latency_ms_batch1']['median']:.2f} ({e['latency_ms_batch1']['p95']:.2f})"
            ),
            "images per second": lambda e: f"{e['images_per_second']:,.0f}",
        }
        rows = [[kind, *(text(efficiency[name]) for name in columns)] for kind, text in kinds.items()]
        note = (
            "ONNX Runtime on the CPU of the machine that exported it, models timed in turn: read the ratios; on "
            "another machine `histill bench FILE` says."
        )
        return {"cost_columns": ["", *(named[name] for name in columns)], "costs": rows, "cost_note": note}
    columns, runs = ["this model"], [(network, run)]
    if teacher is not None:
        try:
            runs.append((teacher.network(), teacher))
            columns.append("its teacher")
        except HistillError:
            pass
    rows = [
        ["parameters", *(f"{one.info['parameters']:,}" for _, one in runs)],
        ["multiply-accumulates, one image", *(count(macs(made, one.image_size)) for made, one in runs)],
    ]
    note = "Not timed here: `histill bench FILE` gives memory, latency and images per second on your machine."
    return {"cost_columns": ["", *columns], "costs": rows, "cost_note": note}


def _bytes(number: float) -> str:
    return f"{number / 1e6:,.2f} MB"


def parts_of(path: Path) -> list[Path]:
    """The files of a model exported to `path`, a file or a folder; OpenVINO's weights lie beside the .xml."""
    parts = path.rglob("*") if path.is_dir() else (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
    return [part for part in parts if part.is_file()]


def _exported(exported: Path, name: str, found: Mapping[str, Any]) -> list[str]:
    path = Path(found["path"])
    path = path if path.exists() else exported.parent / path.name
    size = sum(part.stat().st_size for part in parts_of(path) if part.name != "model_card.md")
    accuracy = f"{100 * found['accuracy']:.1f} %" if "accuracy" in found else "-"
    lost = f"{100 * found['accuracy_lost']:+.1f} points" if "accuracy_lost" in found else "-"
    return [f"`{_code(path.name)}` ({name})", _bytes(size), f"{found['max_abs_diff']:.2g}", accuracy, lost]


def _limits(run: Run, found: Mapping[str, Any], split: str) -> list[str]:
    info, lines = run.info, []
    patients = info["data"]["patients"]
    if split != "test":
        lines.append("No test images: nothing here shows what it does on images that it was not chosen by.")
    if patients is None:
        lines.append(
            "Patients were not known: intervals treat images as independent and are too narrow if they are not."
        )
    for one in found.get("per_class", ()):
        if one.get("support", _FEW) < _FEW:
            lines.append(f"Only {one['support']} images of {_md(one['class'])} judge it.")
    main = next((found[n] for n in ("balanced_accuracy", "miou") if n in found), None)
    if main and main.get("low") is not None and main["high"] - main["low"] > _WIDE:
        name = "balanced accuracy" if "balanced_accuracy" in found else "mean IoU"
        lines.append(
            f"Few images judge it: its {name} lies anywhere from {100 * main['low']:.0f} to {100 * main['high']:.0f} %."
        )
    sites = set(run.data.frame.get("site", ())) - {""}
    lines.append(
        "Where the images were scanned is not known: it may fail on other stains and scanners."
        if not sites
        else f"Images of {len(sites)} site{'s' * (len(sites) != 1)}: other stains and scanners were not tried."
    )
    lines.append(
        "It always answers, and a softmax may be sure of nonsense: images of another kind are not refused."
        if run.classes and not info["data"]["masks"]
        else "It always answers: images of another kind are not refused."
    )
    lines += [_md(line) for line in info["notices"]]
    return lines


def origins(run: Run) -> list[str]:
    """Where the weights come from: what the network started from, what it learnt from, and licences where known."""
    return _origins("This model", run.info, _DEEP)


def _origins(who: str, info: Mapping[str, Any], depth: int) -> list[str]:
    arguments = info["recipe"].get("arguments", {})
    lines = [f"{who} ({_network(info)}) started from {_start(info)}."]
    weights = info["network"]["arguments"].get("weights")
    if depth and weights and (Path(str(weights)) / "run.json").is_file():
        lines += _origins("What it started from", read_json(Path(weights) / "run.json"), depth - 1)
    named = arguments.get("teacher")
    if not info["teacher"]:
        return lines
    for name in named if isinstance(named, list) else str(named or "").split(" + "):
        lines += _taught(name, depth)
    return lines


def _start(info: Mapping[str, Any]) -> str:
    made = info["network"]["arguments"]
    weights = made.get("weights")
    if weights is None:
        return "random weights"
    if weights != "imagenet":
        return f"the weights `{_code(_short(weights))}`"
    return (
        f"published weights (`{_code(made.get('name', 'imagenet'))}`, by way of timm; licence: {_timm_licence(made)})"
    )


def _timm_licence(made: Mapping[str, Any]) -> str:
    try:
        import histill.models._torchvision  # noqa: F401 (before timm)

        import timm  # isort: skip

        found = timm.get_pretrained_cfg(str(made.get("name", "")))
    except (ImportError, RuntimeError, ValueError):
        found = None
    return _md(getattr(found, "license", None) or "not known here, see the model's page")


def _taught(name: str, depth: int) -> list[str]:
    """What is known of one teacher."""
    from histill.models.foundation import CARDS

    if known := CARDS.get(name.partition("=")[0]):
        return [
            f"It learnt from {known.name}, a foundation model of {known.parameters:,} parameters: licence "
            f"{known.licence}, {known.access} ({known.page}). A student that learnt from a model can fall under its "
            "licence."
        ]
    if name and (Path(name) / "run.json").is_file():
        info = read_json(Path(name) / "run.json")
        return _origins("Its teacher", info, depth - 1) if depth else []
    where = f"`{_code(_short(name))}`" if name else "a teacher that the run does not name"
    return [f"It learnt from {where}: licence not known."]
