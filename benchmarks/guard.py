"""Ratios that must not get worse, measured again in two minutes: ``make bench``.

    python benchmarks/guard.py [--update]

Each ratio is of two ways that take turns on this machine within this run: no absolute time is compared with another
machine's. They are held against benchmarks/results/guard.json; one that is below `ALLOWED` of what stands there is an
error (exit status 1) that names it. ``--update`` writes the file anew, after a change that was meant.

    reading            aligned JPEG tiles of a generated slide: Histill / OpenSlide, processor seconds
    cached teacher     images/s of an epoch of ResNet-50 -> ResNet-18 at 96 px: teacher's answers kept / asked each time
    loop               the student's bare steps on tensors in memory / the same in `histill.train`, seconds
    student            StrideNet / DSNet at 224 px, ONNX Runtime, one image
    int8               ResNet-18 at 224 px, ONNX Runtime, one image: int8 / float32
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, processor
from read import write
from torch import nn

import histill as hs
from histill.data import Augment, Images, read_images
from histill.data.phantom import write_images
from histill.deploy import latency, open_model, to_onnx
from histill.deploy.quantize import quantize
from histill.experiment import Experiment
from histill.files import write_json
from histill.losses import kd
from histill.models import DSNet, StrideNet, Timm
from histill.slides.bench import bench_read
from histill.teachers import Frozen
from histill.types import Batch, Outputs, Terms

RESULT = RESULTS / "guard.json"
ALLOWED = 0.7
SIZE, BATCH, ROUNDS = 96, 32, 3


def soft(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    return {"soft": (1.0, kd(student["logits"], teacher["logits"], temperature=4.0))}


def reading(folder: Path) -> float:
    """Processor seconds, which others on the machine do not lengthen."""
    found = bench_read(write(folder / "generated.tiff", 4096), seconds=4.0)
    return float(found["aligned"]["tiles_per_processor_second"]["ratio"]["median"])


def training(folder: Path) -> dict[str, float]:
    """Medians over rounds in which asked, kept and bare take turns."""
    table = write_images(folder / "images", patients=16, images_per_patient=8, size=SIZE, seed=0)
    data = hs.split(read_images(table), val=0.25, test=0.0, seed=0)
    torch.manual_seed(0)
    teacher = Frozen(Timm("resnet50", 2), image_size=SIZE)
    count = len(data.rows("train"))

    def epochs(name: str, *, cache: bool, number: int) -> float:
        """Images per second of the second epoch and those after it."""
        run = hs.train(experiment(data, teacher, cache), folder / f"{name}{number}")
        return float(run.log["images_per_second"].iloc[1:].median())

    rows: dict[str, list[float]] = {"cached teacher": [], "loop": []}
    for number in range(ROUNDS):
        asked = epochs("asked", cache=False, number=number)
        kept = epochs("kept", cache=True, number=number)
        rows["cached teacher"].append(kept / asked)
        rows["loop"].append(kept / bare(count))
    return {name: statistics.median(its) for name, its in rows.items()}


def experiment(data: Images, teacher: Frozen, cache: bool) -> Experiment:
    return Experiment(
        data=data,
        student=partial(Timm, name="resnet18", classes=2),
        objective=soft,
        teacher=teacher,
        cache=cache,
        image_size=SIZE,
        augment=Augment(hflip=True, vflip=True),
        views=1,
        epochs=4,
        batch_size=BATCH,
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        select="last",
    )


def bare(count: int) -> float:
    """Images per second of the student's steps alone, as the loop computes them, on one batch that lies in memory."""
    from histill.machine import computes_bf16

    student: nn.Module = Timm("resnet18", 2).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    images = torch.rand(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    said = torch.randn(BATCH, 2)
    steps = max(4, 3 * count // BATCH)
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bf16("cpu")):
            logits = student(images)["logits"]
        kd(logits.float(), said, temperature=4.0).backward()
        optimizer.step()
    return steps * BATCH / (time.perf_counter() - start)


def predicting(folder: Path) -> dict[str, float]:
    """Median of the rounds of `histill.deploy.latency`, in which all take turns."""
    torch.manual_seed(0)
    images = [np.random.default_rng(k).random((8, 3, 224, 224), dtype=np.float32) for k in range(2)]
    models = {}
    for name, network in {"dsnet": DSNet(2), "stridenet": StrideNet(2), "resnet18": Timm("resnet18", 2)}.items():
        models[name] = to_onnx(network.eval(), folder / f"{name}.onnx", image_size=224, classes=("a", "b"))
    models["int8"] = quantize(models["resnet18"], folder / "int8.onnx", iter(images))
    opened = {name: open_model(path) for name, path in models.items()}
    found = latency(opened, repeats=60, seconds=15.0)
    rate = {name: its["images_per_second"] for name, its in found.items()}
    return {"student": rate["stridenet"] / rate["dsnet"], "int8": rate["int8"] / rate["resnet18"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the file that the ratios are held against")
    arguments = parser.parse_args()
    os.environ["HISTILL_QUIET"] = "1"  # what the trainings say is not asked for
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = {"reading": reading(folder), **training(folder), **predicting(folder)}
    seconds = time.monotonic() - start
    if arguments.update:
        machine = {"processor": processor(), "threads": torch.get_num_threads()}
        write_json(RESULT, {"command": "make bench", "machine": machine, "seconds": seconds, "ratios": found})
    before: dict[str, Any] = json.loads(RESULT.read_text())["ratios"]
    worse = []
    print(f"{'ratio':<18}{'now':>8}{'before':>8}")
    for name, now in found.items():
        bad = now < ALLOWED * before[name]
        worse += [name] if bad else []
        print(f"{name:<18}{now:>8.2f}{before[name]:>8.2f}{'  WORSE' if bad else ''}")
    print(f"{seconds:.0f} s; a ratio below {ALLOWED:g} of what it was is an error")
    if worse:
        print(f"slower than before: {', '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
