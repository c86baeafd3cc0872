"""Does memory stay bounded on data larger than RAM?

    python benchmarks/memory.py [IMAGES ...]

Packs and trains on growing numbers of 64-px JPEG images (default: 2,000, 8,000 and 32,000), each step in a process of
its own, and reports its peaks: private memory (RssAnon of /proc/self/status, sampled every 5 ms), which the machine
must hold, and mapped files (RssFile), which the page cache may drop and read again. Beyond a few hundred bytes an image
for the table of paths, labels and hashes, private memory must not grow with the data; the pack does, by 12,288 bytes
an image. Linux only. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import histill as hs
import histill.evaluate.finish
from histill.data import Images, pack, read_images, split
from histill.experiment import Experiment
from histill.files import write_json
from histill.types import Batch, Outputs, Terms

RESULTS = Path(__file__).parent / "results"
SIZE = 64


class Small(nn.Module):
    """One convolution and a linear layer, so that what is measured is the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 5, stride=4), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(logits=self.head(self.conv(images).relu().mean((2, 3))))


def hard(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    return {"hard": (1.0, F.cross_entropy(student["logits"], batch.labels))}


def write(folder: Path, count: int) -> None:
    """``count`` different pictures of two classes."""
    rng = np.random.default_rng(count)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        place = folder / ("even", "odd")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        coarse.resize((SIZE, SIZE)).save(place / f"{number:07d}.jpg")


def memory() -> tuple[int, int]:
    """Private memory and mapped files of this process now, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, files = (1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return anonymous, files


class Peaks(threading.Thread):
    """Samples memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.anonymous, self.files, self.done = memory(), 0, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.005):
            anonymous, files = memory()
            self.anonymous, self.files = max(self.anonymous, anonymous), max(self.files, files)

    def found(self) -> dict[str, int]:
        self.done.set()
        self.join()
        return {"start": self.before[0], "private": self.anonymous, "mapped": self.files}


def packing(folder: Path) -> Images:
    data = split(read_images(folder), val=0.1, test=0.1)
    pack(data, SIZE)
    return data


def training(folder: Path) -> None:
    made = Experiment(
        data=packing(folder), student=partial(Small), objective=hard, image_size=SIZE, epochs=2, batch_size=64
    )
    hs.train(made, folder.parent / "run", device="cpu")


def measured(work: Callable[[Path], object], folder: Path, sender: Any) -> None:
    """In a process of its own: the peaks of ``work``."""
    torch.set_num_threads(1)
    histill.evaluate.finish.finish = lambda out, info: None  # the page, which is drawn once, is not about the data
    start, peaks = time.monotonic(), Peaks()
    peaks.start()
    work(folder)
    sender.send(peaks.found() | {"seconds": round(time.monotonic() - start, 1)})


def main() -> None:
    counts = [int(text) for text in sys.argv[1:]] or [2_000, 8_000, 32_000]
    context = multiprocessing.get_context("spawn")
    rows = []
    print(f"{'images':>8}{'pack MB':>10}   {'step':10}{'private MB':>12}{'mapped MB':>12}{'seconds':>10}")
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "images"
            write(folder, count)
            os.environ |= {"HISTILL_CACHE": f"{name}/cache", "HISTILL_QUIET": "1"}
            for work in (packing, training):
                receiver, sender = context.Pipe(duplex=False)
                child = context.Process(target=measured, args=(work, folder, sender))
                child.start()
                found = receiver.recv()
                child.join()
                size = sum(p.stat().st_size for p in Path(name, "cache").rglob("pixels.npy"))
                rows.append({"images": count, "pack": size, "step": work.__name__, **found})
                sizes = f"{found['private'] / 1e6:>12,.0f}{found['mapped'] / 1e6:>12,.0f}{found['seconds']:>10.1f}"
                print(f"{count:>8,}{size / 1e6:>10,.0f}   {work.__name__:10}{sizes}", flush=True)
    growth = {}
    for work in (packing, training):
        first, last = (r for r in rows if r["step"] == work.__name__ and r["images"] in (counts[0], counts[-1]))
        growth[work.__name__] = each = (last["private"] - first["private"]) / (last["images"] - first["images"])
        print(f"{work.__name__}: {each:,.0f} bytes of private memory an image, beside {SIZE * SIZE * 3:,} of pack")
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    command = " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]])
    summary = {"command": command, "machine": machine, "bytes_per_image": growth, "rows": rows}
    write_json(RESULTS / "memory.json", json.loads(json.dumps(summary)))


if __name__ == "__main__":
    main()
