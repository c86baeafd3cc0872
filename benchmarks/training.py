"""Distillation training: Histill beside torchdistill, timm's task and a plain loop, on the same folder of JPEGs.

    python -m venv /tmp/peers-venv
    /tmp/peers-venv/bin/pip install -r benchmarks/requirements-training.txt -e .
    /tmp/peers-venv/bin/python benchmarks/training.py DATA OUT.json [--teacher vit_large] [--device cuda] [--small]

DATA holds class folders of JPEGs, for instance LC25000's tiles of 224 px. ResNet-50 teaches ResNet-18 at 224 px, both
with random weights, batches of 32, SGD, 0.5 cross-entropy + 0.5 T^2 KL. What is timed: whole epochs, decoding,
augmentation and bookkeeping included, each tool in a process of its own that has warmed up; the processes take turns,
an epoch each, forwards and then backwards. Peers augment with random resized crops of 20 to 100 % of the area and
mirror; Histill with views whose zoom and shift vary as much (`histill.recipes.baselines`), resampled bicubically.
Threads are each tool's default.

The peers: torchdistill as its examples train, with a configuration like its samples' (its teacher stays in training
mode); timm's `LogitDistillationTask` as its ``train.py`` uses it; a plain loop in float32, and one in bf16 with
channels last. All load with as many workers as there are cores. Histill: the teacher asked in every epoch; asked, and
its answers kept; and read from what was kept. Histill decodes once, before its first epoch; that is told apart, and so
is the rate of a first epoch with it. No tool writes checkpoints.

The limits: the student, the student with given logits, the student with its teacher, on a batch that lies in memory, in
bf16 with channels last and with what Histill asks of the allocator; and the student without the latter.

``--teacher vit_large``: torchdistill (torchvision's ViT-L/16, as large) and the plain loops do a batch per turn (a rate
needs no more), Histill whole epochs from the cache. ``--more`` adds the rounds to those that OUT.json has. Writes
OUT.json and OUT.txt.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import leave, processor, spread

OURS = ("histill online", "histill filling", "histill reading")
PEERS = ("torchdistill", "timm's task", "plain fp32", "plain bf16")
IN_FLOAT32 = PEERS[:3]
"""They take half as many images per epoch, so that a run fits into some minutes."""
LIMITS = {
    "histill online": "limit: student and teacher",
    "histill filling": "limit: student and teacher",
    "histill reading": "limit: student and given logits",
}
TOOLS = {
    "resnet50": (*PEERS, *OURS, *dict.fromkeys(LIMITS.values()), "limit: student", "limit: student, torch as it comes"),
    "vit_large": ("torchdistill", "plain fp32", "plain bf16", "histill reading", "limit: student and given logits"),
}
TARGETS = {
    "resnet50": {
        "histill online / torchdistill": 2.4,
        "histill reading / torchdistill": 4.0,
        "histill online / limit: student and teacher": 0.95,
        "histill reading / limit: student and given logits": 0.95,
    },
    "vit_large": {
        "histill reading / torchdistill": 20.0,
        "histill reading / plain fp32": 20.0,
        "histill reading / plain bf16": 20.0,
    },
}
GMACS = {"resnet18": 1.81, "resnet50": 4.09, "vit_large": 61.6}
"""Multiply-accumulates of one forward at 224 px; training takes three times as many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", choices=list(TOOLS), default="resnet50")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=192, help="of an epoch, a multiple of two batches")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, help="of each tool (default: its own)")
    parser.add_argument("--tools", nargs="*", help="these alone")
    parser.add_argument("--more", action="store_true", help="add the rounds to those in OUT.json")
    parser.add_argument("--small", action="store_true", help="a few images, to see that everything runs")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.images, arguments.batch, arguments.rounds = 16, 8, 1
    tools = arguments.tools or list(TOOLS[arguments.teacher])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        job = write_data(arguments, Path(scratch))
        runners = {name: Runner(name, job, Path(scratch), arguments.threads) for name in tools}
        tools = [name for name in tools if runners[name].warm()]
        rounds: list[dict[str, Any]] = []
        for number in range(arguments.rounds):
            order = tools if number % 2 == 0 else tools[::-1]
            rounds.append({name: found for name in order if (found := runners[name].turn())})
        for runner in runners.values():
            runner.stop()
    if arguments.more and arguments.out.exists():
        rounds = json.loads(arguments.out.read_text())["rounds"] + rounds
    found = {
        "command": shlex.join(["python", "benchmarks/training.py", "DATA", "OUT.json", *sys.argv[3:]]),
        "small": arguments.small,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "device": arguments.device,
        "versions": versions("torch", "torchvision", "timm", "torchdistill", "pillow", "numpy"),
        "teacher": arguments.teacher,
        "student": "resnet18",
        "images_of_an_epoch": arguments.images,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "workers_of_peers": job["workers"],
        "failed": {name: runner.error for name, runner in runners.items() if runner.error},
        "rounds": rounds,
        **summary(rounds, arguments.teacher),
        "seconds": time.monotonic() - began,
    }
    leave(arguments.out, found, table(found))


def write_data(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Copies of the first images of each class folder in turn, once for warming up and once for the epochs."""
    classes = sorted(
        p for p in arguments.data.iterdir() if p.is_dir() and len(list(p.glob("*.jp*g"))) >= arguments.images // 4
    )[:5]
    if len(classes) < 2:
        raise SystemExit(f"{arguments.data}: no class folders with enough JPEGs")
    files = [sorted(c.glob("*.jp*g")) for c in classes]
    for name, count in (("train", arguments.images), ("half", arguments.images // 2), ("warm", arguments.batch)):
        for number in range(count):
            source = files[number % len(files)][number // len(files)]
            target = folder / name / source.parent.name / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return {
        "train": str(folder / "train"),
        "half": str(folder / "half"),
        "warm": str(folder / "warm"),
        "classes": len(classes),
        "images": arguments.images,
        "batch": arguments.batch,
        "teacher": arguments.teacher,
        "device": arguments.device,
        "workers": os.cpu_count() or 1,
    }


class Runner:
    """A tool's process: it warms up, and trains an epoch (of one batch, where that is enough) at each turn."""

    def __init__(self, name: str, job: dict[str, Any], scratch: Path, threads: int | None) -> None:
        self.name, self.error, self.threads = name, "", threads
        self.out = scratch / name.replace(" ", "-").replace(":", "").replace("'", "")
        self.out.mkdir()
        job = {**job, "out": str(self.out)}
        if job["teacher"] == "vit_large" and name in PEERS:
            job |= {"train": job["warm"], "images": job["batch"]}
        elif name in IN_FLOAT32:
            job |= {"train": job["half"], "images": job["images"] // 2}
        (self.out / "job.json").write_text(json.dumps(job))
        self.images = job["images"]
        self.process: subprocess.Popen[str] | None = None

    def warm(self) -> bool:
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment |= {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        environment |= {"HF_HUB_OFFLINE": "1", "HISTILL_QUIET": "1", "HISTILL_CACHE": str(self.out / "home")}
        start = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("training_tools.py")), self.name, str(self.out / "job.json")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.out / "said.txt").open("w"),
            text=True,
        )
        if not self._answer():
            return False
        print(f"{self.name}: warm after {time.monotonic() - start:.0f} s", flush=True)
        return True

    def _answer(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            lines = (self.out / "said.txt").read_text(errors="replace").strip().splitlines()
            self.error = lines[-1] if lines else f"status {self.process.wait()}"
            print(f"{self.name}: failed: {self.error}", *lines[-8:], sep="\n", flush=True)
        return line

    def turn(self) -> dict[str, Any] | None:
        """One epoch: seconds, images, and what the tool tells beside."""
        assert self.process is not None
        assert self.process.stdin is not None
        if self.error:
            return None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        if not (line := self._answer()):
            return None
        found: dict[str, Any] = {"images": self.images, **json.loads(line)}
        print(f"{self.name}: {found['images'] / found['seconds']:.2f} images/s", flush=True)
        return found

    def stop(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(60)


def summary(rounds: list[dict[str, Any]], teacher: str) -> dict[str, Any]:
    """Medians and ranges over the rounds, ratios within rounds."""
    names = [name for name in TOOLS[teacher] if any(name in one for one in rounds)]
    rates = {n: [one[n]["images"] / one[n]["seconds"] for one in rounds if n in one] for n in names}

    def ratio(these: str, those: str) -> dict[str, float] | None:
        both = [one for one in rounds if these in one and those in one]
        rate = [[one[n]["images"] / one[n]["seconds"] for n in (these, those)] for one in both]
        return spread([a / b for a, b in rate]) if both else None

    others = [n for n in names if n not in OURS]
    pairs = {f"{ours} / {other}": ratio(ours, other) for ours in OURS if ours in names for other in others}
    ratios = {name: found for name, found in pairs.items() if found}
    decode = [one[n]["decode_s"] for one in rounds for n in OURS if n in one and "decode_s" in one[n]]
    first = {}
    if decode:
        per = float(np.median(decode)) / max(one[n]["images"] for one in rounds for n in OURS if n in one)
        first = {n: 1 / (1 / float(np.median(rates[n])) + per) for n in OURS if n in rates}
    return {
        "images_per_second": {name: spread(its) for name, its in rates.items()},
        "gmac_per_second": {name: float(np.median(its)) * work(name, teacher) for name, its in rates.items()},
        "decode_ms_per_image": 1000 * per if decode else None,
        "first_epoch_with_decoding": first,
        "ratio": ratios,
        "targets": {
            name: {"target": target, "median": ratios[name]["median"], "reached": ratios[name]["median"] >= target}
            for name, target in TARGETS[teacher].items()
            if name in ratios
        },
    }


def work(name: str, teacher: str) -> float:
    """GMAC that an image takes."""
    taught = name in (*PEERS, "histill online", "histill filling", "limit: student and teacher")
    return 3 * GMACS["resnet18"] + (GMACS[teacher] if taught else 0)


def table(found: dict[str, Any]) -> str:
    machine = found["machine"]
    rows = [
        f"{found['teacher']} -> resnet18, 224 px, batch {found['batch']}, {found['device']}, {machine['processor']}, "
        f"{machine['cores']} cores, {len(found['rounds'])} rounds of {found['images_of_an_epoch']} images",
        "",
    ]
    rows.append(f"{'images/s over whole epochs':40s} {'median':>8s} {'low':>8s} {'high':>8s} {'GMAC/s':>8s}")
    for name, its in found["images_per_second"].items():
        shown = f"{its['median']:8.2f} {its['low']:8.2f} {its['high']:8.2f} {found['gmac_per_second'][name]:8.0f}"
        rows.append(f"{name:40s} {shown}")
    if found["decode_ms_per_image"] is not None:
        rows += ["", f"decoding, once: {found['decode_ms_per_image']:.2f} ms per image"]
        rows += [f"first epoch with it, {n}: {r:.2f} images/s" for n, r in found["first_epoch_with_decoding"].items()]
    rows += ["", f"{'ratio within rounds':60s} {'median':>7s} {'low':>7s} {'high':>7s}"]
    for name, its in found["ratio"].items():
        target = found["targets"].get(name)
        said = f"  target {target['target']}: {'reached' if target['reached'] else 'MISSED'}" if target else ""
        rows.append(f"{name:60s} {its['median']:7.2f} {its['low']:7.2f} {its['high']:7.2f}{said}")
    rows += [f"failed: {name}: {error}" for name, error in found["failed"].items()]
    rows += ["", "versions: " + ", ".join(f"{k} {v}" for k, v in found["versions"].items())]
    return "\n".join(rows) + "\n"


def versions(*names: str) -> dict[str, str]:
    there = {}
    for name in names:
        try:
            there[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there[name] = "not installed"
    return there


if __name__ == "__main__":
    main()
