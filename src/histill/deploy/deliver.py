"""The student as others get it: exported, checked against its run, quantised, and timed beside its teacher."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from histill.data.decode import load
from histill.data.images import Images
from histill.deploy.early_exit import open_exits, to_exits
from histill.deploy.formats import check_parity, to_onnx, to_qupath, to_torchscript
from histill.deploy.model_card import parts_of, write_card
from histill.deploy.openvino import to_openvino
from histill.deploy.predictor import Leaving, Predictor, TorchPredictor, open_model
from histill.deploy.quantize import quantize
from histill.deploy.timing import efficiency, latency, peak_memory
from histill.errors import BadInput, Failed
from histill.evaluate.early_exit import early_exit as early_exit_of
from histill.machine import find_device
from histill.progress import notice, progress
from histill.run import Run

__all__ = ["Exported", "bench", "deliver", "export", "open_any"]

_CHECKED = 64
_CALIBRATION = 256
_BATCH = 32


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        files: by format (``onnx``, ``int8``, ...), ``{"path", "max_abs_diff"}`` and, where the run has test images,
            ``accuracy`` and ``accuracy_lost`` against the run.
    """

    files: dict[str, dict[str, Any]]

    def lines(self) -> list[str]:
        """For people."""
        said = []
        for found in self.files.values():
            line = f"{found['path']}: logits within {found['max_abs_diff']:.2g} of the run's"
            if "accuracy_lost" in found:
                gained = 0.0 - 100 * found["accuracy_lost"]  # no -0.0
                line += f", test accuracy {100 * found['accuracy']:.1f} % ({gained:+.1f} points)"
            if "macs" in found:
                mean, whole = (found["macs"][key] / 1e6 for key in ("mean", "whole"))
                line += f", {mean:,.1f} of {whole:,.1f} million multiply-accumulates per image"
            said.append(line)
        return said


def export(
    run: Run | str | Path,
    out: str | Path | None = None,
    *,
    format: Literal["onnx", "openvino", "torchscript", "qupath"] = "onnx",
    int8: bool = False,
    early_exit: float | None = None,
    mpp: float | None = None,
    code: Path | None = None,
) -> Exported:
    """Write a run's network for deployment, check it on real validation images, and put a model card beside it.

    Args:
        run: a run or its folder.
        out: the file or folder to write (default: ``model.onnx``, ``model.xml``, ``model.pt``, ``qupath/`` or
            ``exits/`` in the run).
        format: ``onnx``, ``openvino`` (an ``.xml`` with its ``.bin``), ``torchscript``, or ``qupath``: the folder that
            QuPath's WSInfer extension loads.
        int8: also a static int8 file beside the other, calibrated on validation images.
        early_exit: of a network with exits, an ONNX file per exit segment, and the threshold at which an image leaves:
            the lowest that loses at most this share of accuracy on validation (`histill.evaluate.early_exit`).
        mpp: microns per pixel of the images that the network was trained on; ``qupath`` needs it.
        code: the Python file of a network that is not Histill's.

    Raises:
        BadInput: no finished run, ``qupath`` without ``mpp``, ``int8`` as TorchScript, ``early_exit``
            of a network without exits or with another format or int8.
        Failed: the logits differ from the run's by more than 1e-3; the file is
            removed.
    """
    run = run if isinstance(run, Run) else Run.open(run, code=code)
    if format == "qupath" and run.info["data"].get("masks"):
        raise BadInput(
            f"{run.path} outlines, and QuPath's WSInfer extension classifies tiles; take --format torchscript"
        )
    if int8 and format not in ("onnx", "openvino"):
        raise BadInput("--int8 goes with --format onnx or openvino")
    if early_exit is not None:
        if int8 or format != "onnx":
            raise BadInput("--early-exit goes with --format onnx and without --int8")
        folder = Path(out or run.path / "exits")
        exits = {"exits": _export_exits(run, folder, early_exit, mpp)}
        write_card(run, folder, exits, mpp=mpp)
        return Exported(exits)
    names = {"onnx": "model.onnx", "openvino": "model.xml", "torchscript": "model.pt", "qupath": "qupath"}
    if format not in names:
        raise BadInput(f"format {format!r}: one of {', '.join(names)}")
    path = Path(out) if out is not None else run.path / names[format]
    endings = {"onnx": (".onnx",), "openvino": (".xml",), "torchscript": (".pt", ".torchscript")}.get(format)
    if endings and path.suffix not in endings:  # before anything is written over
        raise BadInput(f"--out {path}: of --format {format} it ends in {' or '.join(endings)}")
    if path.resolve() == (run.path / "checkpoint.pt").resolve():
        raise BadInput(f"--out {path} is the run's own checkpoint; give another name")
    network = run.network()
    kind: dict[str, Any] = {"image_size": run.image_size, "classes": run.classes, "mpp": mpp}
    val = _images(run, "val", _CHECKED)
    openvino = format == "openvino"
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch, "plain.onnx") if openvino else path
        if format == "qupath":
            to_qupath(network, path, architecture=run.info["network"]["function"].rsplit(":")[-1], **kind)
            model = path / "torchscript_model.pt"
        elif format == "torchscript":
            model = to_torchscript(network, path, extra=_provenance(run), **kind)
        else:
            model = to_onnx(network, plain, extra=_provenance(run), **kind)
            model = to_openvino(plain, path) if openvino else model
        files: dict[str, dict[str, Any]] = {format: {"path": str(path), **check_parity(network, model, val)}}
        files[format] |= _accuracy(run, open_model(model))
        if int8:
            small = path.with_name(f"{path.stem}.int8{path.suffix}")
            rounded = quantize(
                plain, Path(scratch, "int8.onnx") if openvino else small, _batches(run, "val", _CALIBRATION)
            )
            predictor = open_model(to_openvino(rounded, small) if openvino else rounded)
            ours = TorchPredictor(network, run.classes, run.image_size).logits(val)
            apart = float(np.abs(predictor.logits(val) - ours).max())
            files["int8"] = {"path": str(small), "max_abs_diff": apart, **_accuracy(run, predictor)}
    write_card(run, path, files, mpp=mpp)
    return Exported(files)


def _export_exits(run: Run, folder: Path, loss: float, mpp: float | None) -> dict[str, Any]:
    """What `Exported` says of a folder of exit segments."""
    found = early_exit_of(run, loss=loss)
    network = run.network()
    kind: dict[str, Any] = {"image_size": run.image_size, "classes": run.classes, "mpp": mpp}
    extra = _provenance(run) | {key: found[key] for key in ("loss", "validation", "macs")}
    del extra["temperature"]  # of the last exit's answers
    to_exits(network, folder, threshold=found["threshold"], extra=extra, **kind)
    predictor = open_exits(folder)
    try:  # an image that stays to the end is answered as by the network
        parity = check_parity(network, replace(predictor, threshold=np.inf), _images(run, "val", _CHECKED))
    except Failed:
        (folder / "exits.json").unlink()
        raise
    said = {"path": str(folder), "threshold": found["threshold"], "macs": found["macs"]}
    return said | parity | _accuracy(run, predictor)


def deliver(out: Path, student: Run, teacher: Run | None) -> dict[str, Any]:
    """``student.onnx`` and ``student.int8.onnx`` in ``out``, and what student and teacher, if any, cost in one runtime.

    Returns:
        ``export`` and ``efficiency`` of ``summary.json``; empty, with a notice, where ONNX is not installed.
    """
    if not all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        notice("export and timing are left out: pip install 'histill[deploy]'")
        return {"export": {}, "efficiency": {}}
    files = export(student, out / "student.onnx", int8=True).files
    for found in files.values():
        found["path"] = Path(found["path"]).name
    with tempfile.TemporaryDirectory(dir=out, prefix=".teacher-", suffix=".tmp") as folder:
        small = student.network()
        models = {"student": (small, out / "student.onnx"), "student_int8": (small, out / "student.int8.onnx")}
        if teacher is not None:
            large = teacher.network()
            kind: dict[str, Any] = {"image_size": teacher.image_size, "classes": teacher.classes}
            models = {"teacher": (large, to_onnx(large, Path(folder) / "teacher.onnx", **kind)), **models}
        with progress("timing", 80, "rounds") as bar:
            costs = efficiency(models, repeats=40, seconds=10.0, progress=bar.advance)
    write_card(student, out / "student.onnx", files, efficiency=costs)
    return {"export": files, "efficiency": costs}


def bench(
    models: str | Path | Sequence[str | Path],
    *,
    batch_size: int = 16,
    seconds: float = 3.0,
    device: str = "cpu",
    code: Path | None = None,
) -> tuple[dict[str, Any], str]:
    """Models side by side: parameters, size, memory (of an ``.onnx``, in a process of its own), latency, images/s.

    Runs are timed on ``device``, exported files on the CPU, whatever it is.

    Returns:
        What ``summary.json`` holds, by model, and the same as a table.
    """
    from histill.evaluate.cost import macs

    models = [models] if isinstance(models, str | Path) else models
    if not models:
        raise BadInput("bench needs a run, an .onnx, an .xml of OpenVINO or a TorchScript file")
    opened = {str(model): open_any(model, device=device, code=code) for model in models}
    if leaving := [name for name, predictor in opened.items() if isinstance(predictor, Leaving)]:
        raise BadInput(f"{leaving[0]}: how long early exit takes depends on the images, and bench shows noise")
    with progress("timing", 80, "rounds") as bar:
        limits: dict[str, Any] = {"repeats": 40, "seconds": seconds * len(opened), "progress": bar.advance}
        single = latency(opened, batch=1, **limits)
        many = latency(opened, batch=batch_size, **limits)
    summary: dict[str, Any] = {}
    for name, predictor in opened.items():
        network = getattr(predictor, "network", None)
        file = Path(name) / "model.safetensors" if Path(name).is_dir() else Path(name)
        summary[name] = {
            "device": "cpu" if network is None else next(network.parameters()).device.type,
            "parameters": None if network is None else sum(p.numel() for p in network.parameters()),
            "macs": None if network is None else macs(network, predictor.image_size),
            "file_bytes": sum(part.stat().st_size for part in parts_of(file)),
            "image_size": predictor.image_size,
            "peak_memory_bytes": peak_memory(file) if file.suffix == ".onnx" else None,
            "latency_ms_batch1": single[name]["latency_ms"],
            f"latency_ms_batch{batch_size}": many[name]["latency_ms"],
            "images_per_second": many[name]["images_per_second"],
            "speedup_batch1": single[name]["speedup"],
        }
    return summary, _table(summary)


def _table(summary: dict[str, Any]) -> str:
    width = max(len(name) for name in summary) + 2
    sizes = f"{'on':>5}{'px':>5}{'parameters':>13}{'MMAC':>8}{'MB':>8}{'RAM MB':>8}"
    lines = [" " * width + sizes + f"{'ms (p95)':>16}{'images/s':>10}{'times':>8}"]
    for name, row in summary.items():
        single, parameters, macs, memory = (
            row[key] for key in ("latency_ms_batch1", "parameters", "macs", "peak_memory_bytes")
        )
        lines.append(
            f"{name:{width}}{row['device']:>5}{row['image_size']:>5}{f'{parameters:,}' if parameters else '-':>13}"
            f"{f'{macs / 1e6:,.0f}' if macs else '-':>8}{row['file_bytes'] / 1e6:>8.1f}"
            f"{f'{memory / 1e6:,.0f}' if memory else '-':>8}"
            f"{single['median']:>8.1f} ({single['p95']:.1f})".ljust(width + 64)
            + f"{row['images_per_second']:>9.1f}{row['speedup_batch1']['value']:>8.2f}"
        )
    return "\n".join(lines)


def open_any(model: Run | str | Path, *, device: str = "cpu", code: Path | None = None) -> Predictor:
    """A run or its folder on a device, or on the CPU a folder of exit segments, an ``.onnx`` or a TorchScript file."""
    path, found = model.path if isinstance(model, Run) else Path(model), find_device(device)
    exits = not isinstance(model, Run) and (path / "exits.json").is_file()
    if path.is_dir() and not exits:
        run = model if isinstance(model, Run) else Run.open(path, code=code)
        return TorchPredictor(run.network().to(found), run.classes, run.image_size, temperature=run.temperature)
    if found.type != "cpu" and device != "auto":
        notice(f"{path} was exported, and runs on the CPU; --device {device} is for runs")
    return open_exits(path) if exits else open_model(path)


def _rows(run: Run, split: str) -> tuple[Images, list[int]]:
    """The readable images of a split: those that the run was judged on."""
    data, judged = run.data, set(run.predictions["image"])
    return data, [r for r in data.rows(split) if data.frame["path"][r] in judged]


def _images(run: Run, split: str, most: int) -> NDArray[np.float32]:
    """Images of a split, spread evenly over it, ``(N, 3, size, size)``."""
    data, rows = _rows(run, split)
    if not rows:
        raise BadInput(f"{run.path} has no {split} images to check an export on")
    chosen = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(most, len(rows)))]
    return np.stack([load(data.root / data.frame["path"][r], run.image_size) for r in chosen])


def _batches(run: Run, split: str, most: int) -> Iterator[NDArray[np.float32]]:
    images = _images(run, split, most)
    return (images[i : i + _BATCH] for i in range(0, len(images), _BATCH))


def _accuracy(run: Run, predictor: Predictor) -> dict[str, float]:
    """Accuracy on the labelled test images, and what was lost against the run."""
    data, rows = _rows(run, "test")
    if not rows or data.masks:
        return {}
    right = 0
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        images = np.stack([load(data.root / data.frame["path"][r], run.image_size) for r in part])
        said = predictor(images).argmax(1)
        right += sum(run.classes[i] == data.frame["label"][r] for i, r in zip(said, part))
    accuracy = right / len(rows)
    table = run.predictions
    test = table[table["split"] == "test"]
    return {"accuracy": accuracy, "accuracy_lost": float((test["prediction"] == test["label"]).mean()) - accuracy}


def _provenance(run: Run) -> dict[str, Any]:
    return {
        "recipe": run.info["recipe"].get("name"),
        "data": run.info["data"]["hash"],
        "histill": run.info["versions"].get("histill"),
        "temperature": run.temperature,
    }
