"""Does anything grow faster than the data? Time and memory against number and size of images and of slides.

    python benchmarks/growth.py [--small]

Images: 1,000 to 100,000 different JPEG files of 64 px; 500 files of 32 to 512 px. Each is read (hashed, split), packed
(decoded), trained on for one epoch by a network of one convolution, and judged with its intervals of 2,000 resamples.
Slides: 1 to 8 of 7,168 px; one of 3,584 to 28,672 px, of phantom tissue repeated over a round section, predicted by a
model of one mean in tiles of 224 px at the slide's resolution, maps, outlines and page included.

Every step is a process of its own with one thread. Its time is processor time, which other work on the machine hardly
moves; its memory is private memory (RssAnon, sampled every 5 ms) at its peak, less that of the process before the step.
The exponent is the slope of the straight line through the logarithms of the last three points, as a step's
fixed costs bend the beginning: 1 is proportional, 2 quadratic. Linux only. Writes growth.json, .txt and .png into
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import Peaks, Small, hard
from PIL import Image
from torch import Tensor, nn

import histill as hs
import histill.evaluate.finish
from histill.data import pack, read_images, split
from histill.evaluate.judge import judge
from histill.experiment import Experiment
from histill.files import atomic, write_json, write_text
from histill.types import Outputs

RESULTS = Path(__file__).parent / "results"
COUNTS = (1_000, 3_162, 10_000, 31_623, 100_000)
SIDES = (32, 64, 128, 256, 512)
SLIDES = (1, 2, 4, 8)
SLIDE_SIDES = (2, 4, 8, 16)  # times 1,792 px
TILE = 224

Step = Callable[..., float]


# What is measured: each returns the processor seconds of its own part


def reading(manifest: Path, size: int, run: Path) -> float:
    start = time.process_time()
    split(read_images(manifest), val=0.1, test=0.1)
    return time.process_time() - start


def packing(manifest: Path, size: int, run: Path) -> float:
    data = split(read_images(manifest), val=0.1, test=0.1)
    start = time.process_time()
    pack(data, size)
    return time.process_time() - start


def training(manifest: Path, size: int, run: Path) -> float:
    data = split(read_images(manifest), val=0.1, test=0.1)
    made = Experiment(data=data, student=partial(Small), objective=hard, image_size=size, batch_size=100)
    start = time.process_time()
    hs.train(made, run, device="cpu", precision="32-true")
    return time.process_time() - start


def judging(manifest: Path, size: int, run: Path) -> float:
    start = time.process_time()
    judge(hs.Run.open(run, code=Path(__file__).with_name("memory.py")), manifest, device="cpu")
    return time.process_time() - start


def predicting(model: Path, slides: list[Path], out: Path) -> float:
    from histill.slides import predict_slides

    start = time.process_time()
    predict_slides(model, slides, out, threads=1)
    return time.process_time() - start


def _measured(step: Step, arguments: tuple[Any, ...], sender: Any) -> None:
    torch.set_num_threads(1)
    histill.evaluate.finish.finish = lambda out, info: None  # the page is drawn once, whatever the data
    peaks = Peaks()
    peaks.start()
    seconds = step(*arguments)
    found = peaks.found()
    sender.send({"seconds": seconds, "megabytes": (found["private"] - found["start"]) / 1e6})


def measure(step: Step, *arguments: Any) -> dict[str, float]:
    """In a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measured, args=(step, arguments, sender))
    child.start()
    sender.close()
    found: dict[str, float] = receiver.recv()
    child.join()
    return found


# What it is measured on


def write_images(folder: Path, count: int, size: int) -> list[str]:
    """``count`` different pictures; rows of a manifest."""
    rng, rows = np.random.default_rng(size), []
    for number in range(count):
        name = f"{number // 1000:03d}/{number:06d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size)).save(folder / name)
        rows.append(f"{name},{('even', 'odd')[number % 2]}")
    return rows


def write_manifest(folder: Path, name: str, rows: list[str]) -> Path:
    path = folder / name
    path.write_text("\n".join(["path,label", *rows]) + "\n", encoding="utf-8")
    return path


class Mean(nn.Module):
    """Two classes by a tile's mean green: the model costs nothing, so that what is measured is the slide."""

    def forward(self, images: Tensor) -> Outputs:
        green = 40 * (0.5 - images[:, 1].mean((1, 2)))
        return Outputs(logits=torch.stack([-green, green], 1))


def write_slides(folder: Path) -> tuple[Path, dict[int, Path]]:
    """The model, and slides by side."""
    from slides import MPP, UNIT, write_case

    from histill.data.phantom import draw
    from histill.deploy.formats import to_torchscript

    region = draw("malignant", size=1024, mpp=MPP, seed=0).image
    model = to_torchscript(Mean(), folder / "mean.pt", image_size=TILE, classes=("pale", "dark"), mpp=MPP)
    return model, {
        times: Path(write_case(folder / f"side{times}", region, times * UNIT, 0.545)["slide"]) for times in SLIDE_SIDES
    }


# The series


def series(scratch: Path, small: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    steps: tuple[Step, ...] = (reading, packing, training, judging)
    counts, sides = (COUNTS[:3], SIDES[:3]) if small else (COUNTS, SIDES)
    counts = tuple(count // 10 for count in counts) if small else counts

    def go(name: str, x: str, step: Step, at: float, *arguments: Any) -> None:
        row = {"at": at, **measure(step, *arguments)}
        found.setdefault(name, {"x": x, "steps": {}})["steps"].setdefault(step.__name__, []).append(row)
        print(f"{name:18}{step.__name__:11}{at:>14,}{row['seconds']:>10.2f} s{row['megabytes']:>9.0f} MB", flush=True)

    rows = write_images(scratch / "images", counts[-1], 64)
    for count in counts:
        manifest = write_manifest(scratch / "images", f"{count}.csv", rows[:count])
        for step in steps:
            go("number of images", "images", step, count, manifest, 64, scratch / f"run{count}")
    for side in sides:
        folder = scratch / f"side{side}"
        manifest = write_manifest(folder, "all.csv", write_images(folder, 50 if small else 500, side))
        for step in steps:
            go("image size", "pixels", step, side * side, manifest, side, scratch / f"run of {side}")
    model, slides = write_slides(scratch)
    for count in SLIDES[:2] if small else SLIDES:
        copies = []
        for number in range(count):
            copies.append(scratch / f"copy{number}.svs")
            if not copies[-1].exists():
                copies[-1].write_bytes(slides[4].read_bytes())
        go("number of slides", "slides", predicting, count, model, copies, scratch / f"out of {count}")
    for times in SLIDE_SIDES[:2] if small else SLIDE_SIDES:
        pixels = (times * 1792) ** 2
        go("slide size", "pixels", predicting, pixels, model, [slides[times]], scratch / f"out of side {times}")
    return found


def exponent(rows: list[dict[str, float]], what: str) -> float | None:
    """The slope in the logarithms over the last three points; None where a figure is not above 0."""
    x, y = (np.array([row[name] for row in rows[-3:]]) for name in ("at", what))
    if len(x) < 2 or (y <= 0).any():
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def judge_series(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per series and step: exponent of the time, memory at the ends and what each further unit adds."""
    table = []
    for name, one in found.items():
        for step, rows in one["steps"].items():
            first, last = rows[0], rows[-1]
            added = (last["megabytes"] - first["megabytes"]) * 1e6 / (last["at"] - first["at"])
            table.append(
                {
                    "series": name,
                    "step": step,
                    "from": first["at"],
                    "to": last["at"],
                    "exponent": exponent(rows, "seconds"),
                    "seconds": [first["seconds"], last["seconds"]],
                    "megabytes": [first["megabytes"], last["megabytes"]],
                    "bytes_each": added,
                }
            )
    return table


def text_of(table: list[dict[str, Any]]) -> str:
    head = f"{'series':18}{'step':11}{'from':>10}{'to':>13}{'s from':>9}{'s to':>9}{'exponent':>10}"
    lines = [head + f"{'MB from':>9}{'MB to':>8}{'bytes each':>12}"]
    for row in table:
        slope = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
        seconds, sizes = row["seconds"], row["megabytes"]
        lines.append(
            f"{row['series']:18}{row['step']:11}{row['from']:>10,}{row['to']:>13,}{seconds[0]:>9.2f}{seconds[1]:>9.2f}"
            f"{slope:>10}{sizes[0]:>9.0f}{sizes[1]:>8.0f}{row['bytes_each']:>12,.1f}"
        )
    return "\n".join(lines) + "\n"


def draw_series(found: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 7), layout="constrained")
    for column, (name, one) in enumerate(found.items()):
        for row, (what, label) in enumerate((("seconds", "processor time, s"), ("megabytes", "private memory, MB"))):
            ax = axes[row, column]
            for step, rows in one["steps"].items():
                x, y = [r["at"] for r in rows], [max(r[what], 1e-3) for r in rows]
                slope = exponent(rows, what)
                said = f"{step}, slope {slope:.2f}" if slope is not None and what == "seconds" else step
                ax.loglog(x, y, "o-", label=said)
            low, high = ax.get_ylim()
            start, end = (float(v) for v in (rows[0]["at"], rows[-1]["at"]))
            if what == "seconds":
                middle = max(r[what] for r in rows) / end
                ax.loglog([start, end], [start * middle, end * middle], ":", color="grey", label="slope 1")
                ax.set_title(name)
            else:
                ax.set_ylim(min(low, 10), max(high, 2000))
            ax.set_xlabel(one["x"])
            ax.set_ylabel(label)
            ax.legend(fontsize=8)
            ax.grid(visible=True, which="major", alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="see in a minute that everything runs; writes nothing")
    small = parser.parse_args().small
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"HISTILL_CACHE": f"{scratch}/cache", "HISTILL_QUIET": "1", "OMP_NUM_THREADS": "1"}
        found = series(Path(scratch), small)
    table = judge_series(found)
    text = text_of(table)
    print(text, end="")
    if small:
        draw_series(found, Path(tempfile.gettempdir()) / "growth.png")
        return
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    summary = {"command": "python benchmarks/growth.py", "machine": machine, "table": table, "series": found}
    write_json(RESULTS / "growth.json", json.loads(json.dumps(summary | {"seconds": time.monotonic() - start})))
    write_text(RESULTS / "growth.txt", text)
    draw_series(found, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
