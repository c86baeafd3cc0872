"""Whole slides: Histill beside tiatoolbox and wsinfer, with the same weights, tiles and machine, in one run.

    python -m venv /tmp/peers-venv
    /tmp/peers-venv/bin/pip install -r benchmarks/requirements-slides.txt -e '.[slides,deploy,openvino]'
    python -m venv /tmp/peers-venv-wsinfer
    /tmp/peers-venv-wsinfer/bin/pip install -r benchmarks/requirements-slides-wsinfer.txt
    /tmp/peers-venv/bin/python benchmarks/slides.py DATA OUT.json --wsinfer /tmp/peers-venv-wsinfer/bin/python [--small]

DATA holds ``CMU-1-Small-Region.svs`` (Aperio, CC0, of OpenSlide's test data). The two peers need different releases of
zarr, hence two environments; all of them have the same torch, and each tool runs with what its environment has.

The slide: that region's tissue in four orientations, repeated over a round section amid glass, 16,128 pixels wide and
high at 0.499 um/px, in the form of an Aperio file (JPEG tiles of 256 px, three levels). The network: a ResNet-18 with
random weights whose batch norm has seen the tissue and whose logits are the four directions in which its features
differ most, with standard deviation 2; every tool gets those weights.
The tiles: the same 224-px squares for all, of which half is tissue, as a mask or as a list. So tissue detection, in
which tools differ, is not compared. A batch is 32 tiles.

What is timed: from the file of the weights to the results on disk, in a process that has imported the tool and done 64
tiles of another slide. Results are what each tool writes at least: wsinfer's CSV, tiatoolbox's zarr; Histill writes
its table, GeoJSON, heatmap, lesions and page. Its run is computed by OpenVINO, as it is where that is installed (that
it is converted once belongs to the warm-up), and once more by PyTorch. Each peer runs with the setting of `SETTINGS`
that was fastest on 256 tiles before (tiatoolbox's is its default; wsinfer runs a second time with its command line's
own, `DEFAULT`); Histill runs as it comes. Threads are each tool's default. Rounds go through the
tools forwards, then backwards. The limit is the model alone on a batch that lies in memory, the fastest of the ways
that were tried.

Memory is the largest sum over the tool's processes of what is theirs (PSS: a shared page counts in parts), sampled
twice a second. Writes OUT.json and OUT.txt beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from common import leave, processor, spread
from numpy.typing import NDArray
from slides_tools import CLASSES, MPP, TILE, Case

JPEG = 256  # side of the slide's own tiles
UNIT = 1792  # pixels that are whole tiles of both kinds
REGION = 1024  # side of what is taken of the real slide
DENSEST = (718, 1942)  # its upper left: nowhere is there more tissue
GLASS = 243  # grey
MASK = 16  # level-0 pixels of a mask's pixel
SECTION = 0.545  # diameter of the tissue in the slide's width
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "tiatoolbox": [{"workers": 0}, {"workers": 2}],
    "wsinfer": [{"workers": workers, "speedup": speedup} for workers in (0, 2) for speedup in (False, True)],
}
DEFAULT = {"wsinfer default": {"workers": min(os.cpu_count() or 1, 8), "speedup": False}}  # as its command line has it
OURS = ("histill fp32", "histill bf16", "histill torch bf16", "histill int8")
PEERS = (*SETTINGS, *DEFAULT)
TOOLS = (*PEERS, *OURS, "limit")
ALLOWED = {"fp32": 1e-4, "bf16": 0.1}  # of a probability, to Histill's fp32; int8 is reported, not judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiatoolbox", default=sys.executable, help="the Python that has it (default: this one)")
    parser.add_argument("--wsinfer", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a slide of 60 tiles, to see that everything runs")
    parser.add_argument("--keep", type=Path, help="where slides, models and what the tools wrote are left")
    arguments = parser.parse_args()
    if arguments.keep and arguments.keep.exists():
        parser.error(f"--keep {arguments.keep}: give a folder that is not there yet")
    pythons = {name: getattr(arguments, name.split()[0], sys.executable) for name in TOOLS}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        region = read_region(arguments.data / "CMU-1-Small-Region.svs")
        cases = {
            "warm": write_case(folder / "warm", region, UNIT, 2.0),
            "trial": write_case(folder / "trial", region, 2 * UNIT, 2.0),
            "main": write_case(
                folder / "main", region, (1 if arguments.small else 9) * UNIT, SECTION + arguments.small
            ),
        }
        models = write_models(folder / "models", cases["main"])
        bench = Bench(folder, models, cases["warm"], pythons)
        settings = {name: bench.choose(name, cases["warm" if arguments.small else "trial"]) for name in SETTINGS}
        settings |= {name: {"setting": setting} for name, setting in DEFAULT.items()}
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in TOOLS}
        for number in range(arguments.repeats):
            for name in TOOLS if number % 2 == 0 else TOOLS[::-1]:
                chosen = settings.get(name, {"setting": {}})
                if "setting" in chosen:
                    rounds[name].append(bench.run(name, [{"case": cases["main"], "setting": chosen["setting"]}]))
        found = {
            "command": "python benchmarks/slides.py DATA OUT.json --wsinfer PYTHON",
            "small": arguments.small,
            "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
            "slide": about(cases["main"]),
            "settings": settings,
            "rounds": rounds,
            **summary(rounds, folder),
            "seconds": time.monotonic() - began,
        }
    leave(arguments.out, found, table(found))


# The slide


def read_region(path: Path) -> NDArray[np.uint8]:
    """``(REGION, REGION, 3)``: the densest part of the real slide."""
    from histill.slides import open_slide

    with open_slide(path) as slide:
        return slide.read(*DENSEST, REGION, REGION)


def write_case(folder: Path, region: NDArray[np.uint8], side: int, section: float) -> Case:
    """A slide of ``side`` pixels with a round section of tissue ``section`` times as wide, its mask and its tiles."""
    import tifffile
    from PIL import Image

    (folder / "slides").mkdir(parents=True, exist_ok=True)
    slide = folder / "slides" / f"{folder.name}.svs"
    tissue, per = inside(side, JPEG, section), REGION // JPEG
    turned = [np.rot90(region, turn) for turn in range(4)]

    @cache
    def jpeg(turn: int, row: int, column: int) -> bytes:
        return compressed(turned[turn][row * JPEG : (row + 1) * JPEG, column * JPEG : (column + 1) * JPEG])

    def finest() -> Iterator[bytes]:
        empty = compressed(np.full((JPEG, JPEG, 3), GLASS, np.uint8))
        for row, column in np.ndindex(tissue.shape):
            turn = (row // per + 2 * (column // per)) % 4
            yield jpeg(turn, row % per, column % per) if tissue[row, column] else empty

    def coarser(scale: int) -> Iterator[bytes]:
        small = [np.asarray(Image.fromarray(each).reduce(scale)) for each in turned]
        step, count = REGION // scale, -(-side // REGION)
        level = np.concatenate(
            [np.concatenate([small[(row + 2 * column) % 4] for column in range(count)], 1) for row in range(count)]
        )
        shown = np.kron(tissue, np.ones((JPEG // scale, JPEG // scale), np.bool_))
        side_tiles = -(-len(shown) // JPEG)
        level = np.where(shown[..., None], level[: len(shown), : len(shown)], np.uint8(GLASS))
        level = np.pad(level, [(0, side_tiles * JPEG - len(shown))] * 2 + [(0, 0)], constant_values=GLASS)
        assert step * count >= len(shown)
        for row, column in np.ndindex(side_tiles, side_tiles):
            yield compressed(level[row * JPEG : (row + 1) * JPEG, column * JPEG : (column + 1) * JPEG])

    with tifffile.TiffWriter(slide) as file:
        for scale in (1, 4, 16):
            file.write(
                finest() if scale == 1 else coarser(scale),
                shape=(side // scale, side // scale, 3),
                dtype=np.uint8,
                tile=(JPEG, JPEG),
                photometric="ycbcr",
                compression="jpeg",
                subsampling=(2, 2),
                metadata=None,
                description=f"Aperio Image Library v11.2.1\n{side}x{side} (256x256) JPEG|AppMag = 20|MPP = {MPP}",
            )
    wanted = cover(tissue) >= 0.5
    mask = np.kron(wanted, np.ones((TILE // MASK, TILE // MASK), np.uint8)) * np.uint8(255)
    Image.fromarray(mask).save(folder / "mask.png")
    np.save(folder / "tiles.npy", np.argwhere(wanted)[:, ::-1] * TILE)
    return {"slide": str(slide), "mask": str(folder / "mask.png"), "tiles": str(folder / "tiles.npy")}


def compressed(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        return file.getvalue()


def inside(side: int, tile: int, section: float) -> NDArray[np.bool_]:
    """Which tiles have their middle in a circle of ``section`` times ``side``, around the slide's middle."""
    middle = (np.arange(side // tile) + 0.5) * tile / side - 0.5
    return np.asarray(np.hypot(middle[:, None], middle) < section / 2)


def cover(tissue: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of tissue of each of the model's tiles."""
    grain = 32  # divides both kinds
    fine = np.kron(tissue, np.ones((JPEG // grain, JPEG // grain)))
    step, across = TILE // grain, len(fine) * grain // TILE
    return np.asarray(fine.reshape(across, step, across, step).mean((1, 3)))


def about(case: Case) -> dict[str, Any]:
    from histill.slides import open_slide

    with open_slide(case["slide"]) as slide:
        return {
            "dimensions": list(slide.dimensions),
            "levels": [list(size) for size in slide.level_dimensions],
            "bytes": slide.path.stat().st_size,
            "mpp": slide.mpp,
            "reader": slide.reader,
            "tiles": len(np.load(case["tiles"])),
        }


# The network


def write_models(folder: Path, case: Case) -> Path:
    """The same weights as state dict, TorchScript, run folder and int8 ONNX."""
    import torch
    from safetensors.torch import save_file

    from histill.deploy import to_onnx
    from histill.deploy.quantize import quantize
    from histill.models import Timm
    from histill.slides import open_slide

    folder.mkdir(parents=True, exist_ok=True)
    places = np.random.default_rng(0).permutation(np.load(case["tiles"]))[:128]
    with open_slide(case["slide"]) as slide:
        pixels = np.stack([slide.read(int(x), int(y), TILE, TILE) for x, y in places])
    images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    torch.manual_seed(0)
    network = Timm("resnet18", len(CLASSES))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the mean over all batches
        for start in range(0, len(images), 32):
            network.train()(torch.from_numpy(images[start : start + 32]))
        pooled = network.eval()(torch.from_numpy(images))["pooled"]
        middle = pooled.mean(0)
        _, values, axes = torch.linalg.svd(pooled - middle, full_matrices=False)
        head, classes = network.network.fc, len(CLASSES)
        weight = axes[:classes] * (2 * len(images) ** 0.5 / values[:classes, None])
        head.weight.copy_(weight)
        head.bias.copy_(-weight @ middle)
        torch.save(network.network.state_dict(), folder / "weights.pt")
        torch.jit.trace(network.network, torch.rand(2, 3, TILE, TILE)).save(folder / "plain.pt")
    (folder / "run").mkdir(exist_ok=True)
    save_file(network.state_dict(), folder / "run" / "model.safetensors")
    card = {
        "recipe": {"name": "random weights", "arguments": {}},
        "network": {
            "function": "histill.models.adapter:Timm",
            "arguments": {"name": "resnet18", "classes": len(CLASSES)},
        },
        "classes": list(CLASSES),
        "image_size": TILE,
        "status": "finished",
        "select": "last",
        "positive": None,
        "data": {"hash": ""},
    }
    (folder / "run" / "run.json").write_text(json.dumps(card))
    to_onnx(network, folder / "model.onnx", image_size=TILE, classes=CLASSES, mpp=MPP)
    quantize(
        folder / "model.onnx", folder / "model.int8.onnx", (images[at : at + 32] for at in range(0, len(images), 32))
    )
    return folder


# Running tools


class Bench:
    """Runs tools one at a time, each in processes of its own."""

    def __init__(self, folder: Path, models: Path, warm: Case, pythons: Case) -> None:
        self.folder, self.models, self.warm, self.pythons = folder, models, warm, pythons
        self.numbers = count()

    def choose(self, name: str, case: Case) -> dict[str, Any]:
        """The fastest of a peer's settings, and the seconds that each took."""
        found = self.run(name, [{"case": case, "setting": setting} for setting in SETTINGS[name]])
        if "error" in found:
            return {"error": found["error"]}
        best = min(found["trials"], key=lambda trial: trial.get("seconds", float("inf")))
        return {"setting": best["setting"], "tried": found["trials"]}

    def run(self, name: str, trials: list[dict[str, Any]]) -> dict[str, Any]:
        """What the tool's process found, with its memory; ``error`` where it failed."""
        out = self.folder / f"{next(self.numbers):02d}-{name.replace(' ', '-')}"
        out.mkdir(parents=True)
        job = {
            "tool": name.removesuffix(" default"),
            "models": str(self.models),
            "warm": self.warm,
            "trials": trials,
            "out": str(out),
        }
        (out / "job.json").write_text(json.dumps(job))
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment |= {"HF_HUB_OFFLINE": "1", "HISTILL_QUIET": "1"}
        script = Path(__file__).with_name("slides_tools.py")
        start = time.monotonic()
        with (out / "said.txt").open("w") as said:
            process = subprocess.Popen(
                [self.pythons[name], str(script), str(out / "job.json")],
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            memory = Memory(process.pid)
            status = process.wait()
        seconds, peak = time.monotonic() - start, memory.found()
        lines = (out / "said.txt").read_text(errors="replace").strip().splitlines()
        if status or not (out / "found.json").is_file():
            error = lines[-1] if lines else f"status {status}"
            print(f"{name}: failed: {error}", flush=True)
            return {"error": error, "status": status, "last_lines": lines[-8:]}
        found: dict[str, Any] = json.loads((out / "found.json").read_text())
        found |= {"process_s": seconds, "peak_bytes": peak, "folder": out.name}
        trials = found.get("trials", [{}])
        if failed := [trial["error"] for trial in trials if "error" in trial]:
            print(f"{name}: {'; '.join(failed)}", flush=True)
        if len(failed) == len(trials):
            return {"error": failed[0], "last_lines": lines[-8:]}
        took = ", ".join(f"{t['tiles'] / t['seconds']:.1f} tiles/s" for t in trials if "seconds" in t)
        print(f"{name}: {took or 'done'} ({seconds:.0f} s in all, {peak / 1e9:.2f} GB)", flush=True)
        return found


class Memory(threading.Thread):
    """Samples the proportional memory of a process and all that descend from it."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.done = root, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.5):
            self.peak = max(self.peak, sum(map(held, descendants(self.root))))

    def found(self) -> int:
        self.done.set()
        self.join()
        return self.peak


def descendants(root: int) -> list[int]:
    """``root`` and the processes below it."""
    below: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue  # it has ended
            below.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for process in found:
        found += below.get(process, [])
    return found


def held(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


# Figures


def summary(rounds: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, Any]:
    """Medians and ranges over rounds, ratios within rounds, agreement with Histill's fp32."""
    good = {name: [one for one in its if "error" not in one] for name, its in rounds.items()}
    tools = [name for name in TOOLS[:-1] if good[name]]
    first = {name: [one["trials"][0] for one in good[name]] for name in tools}
    rates = {name: [one["tiles"] / one["seconds"] for one in first[name]] for name in tools}
    ours = [name for name in OURS if name in tools]
    own = [name for name in ours if "torch" not in name]  # what has a limit of its own
    looking = {
        name: [one["tiles"] / (one["timing"]["read"] + one["timing"]["infer"]) for one in first[name]] for name in ours
    }
    best: dict[str, list[float]] = {}
    for one in good["limit"]:
        for precision, ways in one["limit"].items():
            best.setdefault(precision, []).append(max(ways.values()))
    said = {name: load(folder / good[name][-1]["folder"]) for name in tools}
    reference = said.get(OURS[0])

    def shares(these: dict[str, list[float]]) -> dict[str, dict[str, float]]:
        limits = {name: best.get(name.split()[-1], []) for name in own}
        return {name: ratio(these[name], limits[name]) for name in own if limits[name]}

    return {
        "tiles_per_second": {name: spread(its) for name, its in rates.items()},
        "process_s": {name: spread([one["process_s"] for one in good[name]]) for name in tools},
        "peak_bytes": {name: max(one["peak_bytes"] for one in good[name]) for name in tools},
        "limit": {precision: spread(its) for precision, its in best.items()},
        "share_of_limit": shares(rates),
        "share_of_limit_looking": shares(looking),
        "ratio": {
            f"{name} / {peer}": ratio(rates[name], rates[peer]) for name in ours for peer in PEERS if peer in tools
        },
        "agreement": {name: agreement(said[name], reference, name) for name in tools if reference and name != OURS[0]},
    }


def ratio(these: list[float], those: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(these, those)])


def load(folder: Path) -> dict[tuple[int, int], NDArray[np.float64]]:
    said = np.load(folder / "said.npz")
    return {(int(x), int(y)): row for (x, y), row in zip(said["places"], said["probabilities"].astype(np.float64))}


def agreement(these: dict[Any, Any], those: dict[Any, Any], name: str) -> dict[str, Any]:
    """Of the tiles that both have: the largest and mean difference of a probability, the share of equal classes."""
    common = sorted(these.keys() & those.keys())
    a, b = (np.stack([said[place] for place in common]) for said in (these, those))
    allowed = ALLOWED.get(name.split()[-1] if name in OURS else "fp32")
    largest = float(np.abs(a - b).max())
    return {
        "tiles": len(these),
        "common": len(common),
        "max_abs_diff": largest,
        "mean_abs_diff": float(np.abs(a - b).mean()),
        "same_class": float((a.argmax(1) == b.argmax(1)).mean()),
        "allowed": allowed,
        "agrees": len(common) == len(these) == len(those) and (allowed is None or largest <= allowed),
    }


def table(found: dict[str, Any]) -> str:
    """The figures, for people."""
    slide, machine = found["slide"], found["machine"]
    width, height = slide["dimensions"]
    lines = [
        f"{slide['tiles']:,} tiles of {TILE} px on {width:,} x {height:,} px at {slide['mpp']} um/px",
        f"{machine['processor']}, {machine['cores']} cores; {len(found['rounds']['limit'])} rounds",
        *(["SMALL: to see that everything runs; its times mean nothing"] if found["small"] else []),
        f"{'':<20}{'tiles/s':>9}{'low':>8}{'high':>8}{'memory GB':>11}   probabilities beside Histill fp32",
    ]
    for name in TOOLS[:-1]:
        if name not in found["tiles_per_second"]:
            failed = [one for one in (found["settings"].get(name, {}), *found["rounds"][name]) if "error" in one]
            lines.append(f"{name:<20} failed: {failed[0]['error'] if failed else 'not run'}")
            continue
        rate, memory = found["tiles_per_second"][name], found["peak_bytes"][name] / 1e9
        line = f"{name:<20}{rate['median']:>9.1f}{rate['low']:>8.1f}{rate['high']:>8.1f}{memory:>11.2f}"
        if its := found["agreement"].get(name):
            line += f"   differ by {its['max_abs_diff']:.2g} at most, {its['mean_abs_diff']:.2g} on average; "
            line += f"{its['same_class']:.2%} same class; {its['common']:,} of {its['tiles']:,} tiles"
            line += "" if its["agrees"] else "; DISAGREES"
        lines.append(line)
    titles = {
        "limit": ("the model alone, tiles/s", ".1f"),
        "share_of_limit": ("share of that, all of the job", ".1%"),
        "share_of_limit_looking": ("share of that, while looking", ".1%"),
        "ratio": ("times as fast", ".2f"),
    }
    for what, (title, form) in titles.items():
        for name, its in found[what].items():
            lines.append(f"{title:<30} {name:<37}{its['median']:{form}} ({its['low']:{form}} to {its['high']:{form}})")
    for name, its in found["settings"].items():
        if "setting" in its:
            lines.append(f"{name} ran with {its['setting']}")
    every = {name: one["versions"] for name, its in found["rounds"].items() for one in its if "versions" in one}
    for name, its in every.items():
        if name in SETTINGS or name == OURS[0]:
            lines.append(f"{name}: " + ", ".join(f"{package} {number}" for package, number in its.items()))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
