"""Prediction: every network in every runtime, one image and sixteen at a time, and the accuracy beside the speed.

    python benchmarks/prediction.py OUT [--prepare]

The table that the paper of DSNet makes, for a CPU: PyTorch in float32 and bfloat16 (channels last), TorchScript, ONNX
Runtime and OpenVINO in float32 and int8, at 224 px with two threads. Weights are random, as time does not depend on
them; every export is checked against its network. In each round every network runs in every runtime once, the first
taking turns, for at least 40 ms after a call that is not counted (one long call where it takes over 0.25 s, after a
round that is not counted); a ratio is one of the same round. ``--prepare`` only writes the exports to OUT and may run
on a busy machine; the timing wants a quiet one, and takes about five minutes. ``--redraw`` takes the timing as it is.
``--networks`` times some, and adds those that the results lack.

Accuracy is that of `student.json` (distilled, 64 px, three seeds; its teacher at 128 px) and `study-dsnet.json`
(distilled, 80 px, one seed), both on the same 155 dermoscopy images. Results go to
benchmarks/results/prediction.{json,txt,png}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from torch import nn

from histill.deploy import check_parity, open_model, quantize, to_onnx, to_openvino, to_torchscript
from histill.evaluate import macs
from histill.files import write_json
from histill.models import CSAT, DSNet, KerasHead, MultiExitResNet18, StrideNet, Timm

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
SIZE, THREADS, CLASSES = 224, 2, ("benign", "malignant")
BATCHES = {1: 8, 16: 5}
"""Rounds by images at a time."""

LEAST, LONG = 0.04, 0.25
"""Seconds: how long a network is timed at least, and from when on one call is enough."""

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-101 (teacher)": lambda: KerasHead("resnet101", 2),
    "MobileNetV1 (teacher)": lambda: KerasHead("mobilenet_v1", 2),
    "DSNet": lambda: DSNet(2),
    "StrideNet": lambda: StrideNet(2),
    "ResNet-18": lambda: Timm("resnet18", 2),
    "EfficientNet-B0": lambda: KerasHead("efficientnet_b0", 2),
    "MobileNetV3-Large": lambda: Timm("mobilenetv3_large_100", 2),
    "CSAT": lambda: CSAT(2),
    "Multi-exit ResNet-18": lambda: MultiExitResNet18(2),
    "ConvNeXt-Atto": lambda: Timm("convnext_atto", 2),
}
FILES = {
    "TorchScript": "pt",
    "ONNX Runtime": "onnx",
    "ONNX int8": "int8.onnx",
    "OpenVINO": "xml",
    "OpenVINO int8": "int8.xml",
}
RUNTIMES = ("PyTorch", "PyTorch bf16", *FILES)
STUDY = {
    "resnet101": "ResNet-101 (teacher)",
    "mobilenet_v1": "MobileNetV1 (teacher)",
    "efficientnet_b0": "EfficientNet-B0",
    "dsnet": "DSNet",
}


def images(count: int) -> Any:
    return np.random.default_rng(0).random((count, 3, SIZE, SIZE), dtype=np.float32)


def made(name: str) -> nn.Module:
    """The network with random weights, and with batch norms that have seen a batch: else deep ones end in millions."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over what was seen
    with torch.no_grad():
        network.train()(torch.from_numpy(images(4)))
    return network.eval().requires_grad_(False)


def prepare(out: Path, names: list[str]) -> None:
    """Write and check what is missing of the exports, and note what each network is."""
    for name in names:
        stem = name.split(" (")[0].replace(" ", "-")
        card = out / f"{stem}.json"
        if card.exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        network, kind = made(name), {"image_size": SIZE, "classes": CLASSES}
        file = {runtime: out / f"{stem}.{suffix}" for runtime, suffix in FILES.items()}
        to_torchscript(network, file["TorchScript"], **kind)
        to_onnx(network, file["ONNX Runtime"], **kind)
        quantize(file["ONNX Runtime"], file["ONNX int8"], [images(8)])
        to_openvino(file["ONNX Runtime"], file["OpenVINO"])
        to_openvino(file["ONNX int8"], file["OpenVINO int8"])
        parity = {
            runtime: check_parity(network, file[runtime], images(4))["max_abs_diff"]
            for runtime in ("TorchScript", "ONNX Runtime", "OpenVINO")
        }
        ours, theirs = (open_model(file[f"{runtime} int8"]).logits(images(4)) for runtime in ("ONNX", "OpenVINO"))
        write_json(
            card,
            {
                "parameters": sum(p.numel() for p in network.parameters()),
                "macs": macs(network, SIZE),
                "max_abs_diff": parity,
                "int8_apart": float(np.abs(ours - theirs).max()),
                "largest_logit": float(np.abs(ours).max()),
                "files": {runtime: path.name for runtime, path in file.items()},
                "bytes": {r: p.stat().st_size + _weights(p) for r, p in file.items()},
            },
        )
        print(f"{name}: " + ", ".join(f"{r} {d:.1e}" for r, d in parity.items()), flush=True)


def _weights(path: Path) -> int:
    return path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0


def calls(out: Path, names: list[str]) -> Iterator[tuple[str, str, Callable[[Any], object]]]:
    """Each network in each runtime as a function of images."""
    for name in names:
        stem = name.split(" (")[0].replace(" ", "-")
        for runtime, dtype in (("PyTorch", torch.float32), ("PyTorch bf16", torch.bfloat16)):
            yield name, runtime, _eager(made(name), dtype)
        for runtime, suffix in FILES.items():
            yield name, runtime, open_model(out / f"{stem}.{suffix}", threads=THREADS).logits


def _eager(network: nn.Module, dtype: torch.dtype) -> Callable[[Any], object]:
    network = network.to(dtype=dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def call(pixels: Any) -> object:
        x = torch.from_numpy(pixels).to(dtype=dtype, memory_format=torch.channels_last)
        return network(x)["logits"].float().numpy()

    return call


@dataclass
class Cell:
    """A network in a runtime, and its seconds per call, a figure per round."""

    network: str
    runtime: str
    call: Callable[[Any], object]
    seconds: dict[int, list[float]]


def timed(cells: list[Cell]) -> None:
    """Fill in the seconds."""
    for batch, rounds in BATCHES.items():
        shown = images(batch)
        for number in range(-1, rounds):
            first = number % len(cells)
            for cell in cells[first:] + cells[:first]:
                time.sleep(0.003)  # the threads of the one before go to sleep
                start = time.perf_counter()
                cell.call(shown)
                each = time.perf_counter() - start
                if each < LONG:  # of a longer call the start is a small part, and it is taken as it is
                    count = max(1, int(LEAST / each))
                    start = time.perf_counter()
                    for _ in range(count):
                        cell.call(shown)
                    each = (time.perf_counter() - start) / count
                if number >= 0:
                    cell.seconds.setdefault(batch, []).append(each)


def found(cells: list[Cell]) -> dict[str, Any]:
    """Images per second and the ratio to DSNet in the same runtime, by batch, network and runtime."""
    base = {cell.runtime: cell for cell in cells if cell.network == "DSNet"}
    speeds: dict[str, Any] = {}
    for batch in BATCHES:
        for cell in cells:
            own = np.array(cell.seconds[batch])
            row = {"images_per_second": _spread(batch / own), "latency_ms": _spread(1e3 * own), "rounds": len(own)}
            if cell.runtime in base:
                row["times_dsnet"] = _spread(np.array(base[cell.runtime].seconds[batch]) / own)
            speeds.setdefault(str(batch), {}).setdefault(cell.network, {})[cell.runtime] = row
    return speeds


def _spread(values: Any) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": float(np.min(values)), "high": float(np.max(values))}


def accuracies() -> dict[str, dict[str, Any]]:
    """Accuracy on dermoscopy by network, with where it is from."""
    known: dict[str, dict[str, Any]] = {}
    study = json.loads((RESULTS / "study-dsnet.json").read_text())
    for name, figures in study["test"].items():
        if name in STUDY:
            known[STUDY[name]] = {**figures["accuracy"], "from": "study-dsnet.json: 80 px, 20 epochs, distilled"}
    if (file := RESULTS / "student.json").exists():
        task = json.loads(file.read_text())["tasks"]["dermoscopy"]
        teacher = task["teacher"]["accuracy"]
        known["MobileNetV1 (teacher)"] = {**teacher, "from": "student.json: 128 px, the teacher, from ImageNet"}
        for name, network in (("DSNet", "dsnet"), ("StrideNet", "stridenet")):
            figure = task["students"][f"{network} distilled"]["accuracy"]
            known[name] = {**figure, "from": "student.json: 64 px, three seeds, distilled"}
    return known


def table_of(summary: dict[str, Any]) -> str:
    """Speeds as people read them."""
    lines = []
    names = list(summary["networks"])
    for batch in BATCHES:
        speeds = summary["speeds"][str(batch)]
        lines += [
            "",
            f"images/s, {batch} at a time, {SIZE} px, {THREADS} threads: median (lowest to highest round)",
            "",
        ]
        lines.append(f"{'':22}{'parameters':>12}{'MMAC':>8}  " + "".join(f"{r:>21}" for r in RUNTIMES))
        for name in names:
            card = summary["networks"][name]
            cells = (speeds[name][r]["images_per_second"] for r in RUNTIMES)
            shown = "".join(f"{_words(c, ',.0f'):>21}" for c in cells)
            lines.append(f"{name:22}{card['parameters']:>12,}{card['macs'] / 1e6:>8,.0f}  {shown}")
        lines += [
            "",
            f"times DSNet in the same runtime, {batch} at a time, of the same round: median (lowest to highest)",
            "",
        ]
        for name in names:
            cells = (speeds[name][r]["times_dsnet"] for r in RUNTIMES)
            shown = "".join(f"{_words(c, '.1f'):>21}" for c in cells)
            lines.append(f"{name:44}{shown}")
    lines += ["", "accuracy on 155 dermoscopy images, % (95 % interval)", ""]
    for name, figure in summary["accuracy"].items():
        value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
        lines.append(f"{name:22}{value:5.1f} ({low:.1f} to {high:.1f})   {figure['from']}")
    return "\n".join(lines[1:])


def _words(figure: dict[str, float], form: str) -> str:
    median, low, high = (format(figure[key], form) for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def draw(summary: dict[str, Any], path: Path) -> None:
    """Accuracy against latency, area by parameters; the frontier as a line."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    points = []
    for name, accuracy in summary["accuracy"].items():
        ms = summary["speeds"]["1"][name]["ONNX Runtime"]["latency_ms"]["median"]
        value, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
        ours = accuracy["from"].startswith("student")
        colour = "#0072b2" if ours else "#999999"
        size = summary["networks"][name]["parameters"]
        axes.errorbar(ms, value, [[value - low], [high - value]], color=colour, lw=1, capsize=2, zorder=1)
        axes.scatter(ms, value, 20 + size / 4e4, color=colour, alpha=0.75, lw=0, zorder=2)
        axes.annotate(
            f"{name.split(' (')[0]}\n{size / 1e6:.2f} M", (ms, value), (8, 8), textcoords="offset points", fontsize=8
        )
        points.append((ms, value))
    best, edge = -np.inf, []
    for ms, value in sorted(points):
        if value > best:
            best = value
            edge.append((ms, value))
    axes.plot(*zip(*edge), color="#d55e00", lw=1, ls="--", zorder=0, label="frontier")
    axes.scatter([], [], 40, color="#0072b2", lw=0, label="64 px, three seeds; teacher: 128 px, from ImageNet")
    axes.scatter([], [], 40, color="#999999", lw=0, label="80 px, one seed, from random weights")
    axes.set_xscale("log")
    axes.set_xlabel(f"latency of one image of {SIZE} px, ONNX Runtime, float32, {THREADS} threads (ms)")
    axes.set_ylabel("accuracy on dermoscopy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--prepare", action="store_true", help="only write the exports")
    parser.add_argument("--redraw", action="store_true", help="accuracy, table and figure anew, without timing")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    arguments = parser.parse_args()
    file = RESULTS / "prediction.json"
    torch.set_num_threads(THREADS)
    if not arguments.redraw:
        names = arguments.networks
        prepare(arguments.out, names)
        if arguments.prepare:
            return
        cells = [Cell(*cell, {}) for cell in calls(arguments.out, names)]
        timed(cells)
        stems = {name: name.split(" (")[0].replace(" ", "-") for name in names}
        cards = {name: json.loads((arguments.out / f"{stem}.json").read_text()) for name, stem in stems.items()}
        summary = {
            "command": "python benchmarks/prediction.py OUT",
            "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": THREADS},
            "versions": {n: version(n) for n in ("torch", "timm", "onnxruntime", "openvino")},
            "image_size": SIZE,
            "weights": "random",
            "networks": cards,
            "speeds": found(cells),
        }
        if set(names) != set(NETWORKS) and file.exists():  # some more, timed beside DSNet in a run of their own
            before = json.loads(file.read_text())
            summary["networks"] = cards | before["networks"]
            for batch, rows in before["speeds"].items():
                summary["speeds"][batch] |= rows
            order = [name for name in NETWORKS if name in summary["networks"]]
            summary["networks"] = {name: summary["networks"][name] for name in order}
    else:
        summary = json.loads(file.read_text())
    summary["accuracy"] = {n: a for n, a in accuracies().items() if n in summary["networks"]}
    RESULTS.mkdir(exist_ok=True)
    write_json(file, summary)
    (RESULTS / "prediction.txt").write_text(table_of(summary) + "\n")
    draw(summary, RESULTS / "prediction.png")
    print(table_of(summary))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
