"""What a slide costs, and what a second worker brings: the figures under the plan in docs/scale.md.

    python benchmarks/scale.py [--small]

Slides of phantom tissue repeated over a round section (19,712 px, JPEG tiles, three levels), a ResNet-18 with random
weights exported to ONNX, tiles of 224 px. Every number is of one core: one thread, one reader.

- Cost: processor seconds of reading, the model and everything after it, by tile and by slide; bytes that come in, bytes
  that stay; private memory of the process.
- Workers: the same six smaller slides by one process and on Ray by one worker and two, in turns, each worker with one
  thread. Where there are fewer free cores than workers the second brings little, so load is written down too.
- Cache: the same of a teacher's cache, three networks' worth of answers to 480 images.
- A death: a worker is killed in the middle; the seconds that it cost.

Writes benchmarks/results/scale.json and .txt.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, beside, leave
from growth import measure, predicting, write_images

from histill.cluster import joined
from histill.data import Augment, read_images
from histill.data.phantom import draw
from histill.deploy import to_onnx
from histill.experiment import Experiment
from histill.fill import fill
from histill.models import Cifar, Timm
from histill.slides import predict_slides
from histill.teachers import Frozen

TILE, CLASSES = 224, ("benign", "malignant")


def write_slides(folder: Path, count: int, times: int) -> list[Path]:
    """``count`` slides of ``times`` x 1,792 px, all alike."""
    from slides import MPP, UNIT, write_case

    region = draw("malignant", size=1024, mpp=MPP, seed=0).image
    first = Path(write_case(folder / f"side{times}", region, times * UNIT, 0.545)["slide"])
    slides = [folder / f"side{times}-{number}.svs" for number in range(count)]
    for slide in slides:
        shutil.copyfile(first, slide)
    return slides


def write_model(path: Path) -> Path:
    from slides import MPP

    torch.manual_seed(0)
    return to_onnx(Timm("resnet18", len(CLASSES)).eval(), path, image_size=TILE, classes=CLASSES, mpp=MPP)


def cost(model: Path, slide: Path, out: Path) -> dict[str, Any]:
    """Of one slide in a process of its own."""
    found = measure(predicting, model, [slide], out)
    said = json.loads((out / slide.stem / "slide.json").read_text())
    written = [p for p in (out / slide.stem).rglob("*") if p.is_file() and not p.name.startswith(".")]
    stages = {name: spent["busy_s"] for name, spent in said["timing"].items()}
    tiles = said["tiles"]["looked_at"]
    layers = {
        name: sum(p.stat().st_size for p in written if p.name == name or stem_of(name, p))
        for name in said["layers"].values()
    }
    return {
        "dimensions": said["dimensions"],
        "tiles": tiles,
        "bytes_in": slide.stat().st_size,
        "bytes_out": sum(p.stat().st_size for p in written),
        "bytes_out_by_file": layers,
        "files_out": len(written),
        "seconds": found["seconds"],
        "stages": stages,
        "seconds_per_tile": found["seconds"] / tiles,
        "megabytes": found["megabytes"],
    }


def stem_of(layer: str, path: Path) -> bool:
    """Whether a file lies in the folder of tiles that belongs to a DeepZoom image."""
    return layer.endswith(".dzi") and f"{layer.removesuffix('.dzi')}_files" in path.parts


@contextmanager
def workers(count: int) -> Iterator[None]:
    """A cluster of so many cores."""
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=count, **options)
    try:
        with joined("auto"):
            yield
    finally:
        ray.shutdown()


def in_turns(work: Callable[[Path, str | None], object], scratch: Path, rounds: int) -> dict[str, list[float]]:
    """Wall seconds of one process, one worker and two, a first call apart: it starts workers and loads models."""
    found: dict[str, list[float]] = {"one process": [], "1 worker": [], "2 workers": []}
    for number in range(rounds):
        for name in list(found) if number % 2 == 0 else list(found)[::-1]:
            out = scratch / f"{name} {number}"
            if name == "one process":
                start = time.monotonic()
                work(out, None)
                found[name].append(time.monotonic() - start)
                continue
            with workers(int(name[0])):
                work(out / "warm", "auto")
                start = time.monotonic()
                work(out, "auto")
                found[name].append(time.monotonic() - start)
    return found


def a_death(work: Callable[[Path, str | None], object], out: Path) -> dict[str, float]:
    """Wall seconds of two workers, undisturbed and with one killed as soon as it has kept a part of a slide."""
    found = {}
    with workers(2):
        work(out / "warm", "auto")
        for name in ("undisturbed", "one killed"):
            place = out / name
            if name == "one killed":
                threading.Thread(target=_kill_one, args=(place,), daemon=True).start()
            start = time.monotonic()
            work(place, "auto")
            found[name] = time.monotonic() - start
    return found


def _kill_one(place: Path) -> None:
    while not (kept := list(place.glob("*/.state/fine*.npz"))):
        time.sleep(0.01)
    lock = (kept[0].parents[1] / ".lock").stat().st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        if line.split()[5].endswith(f":{lock}"):
            os.kill(int(line.split()[4]), signal.SIGKILL)


def rate(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians of each round's ratio of throughputs."""
    alone, one, two = times.values()
    return {
        "1 worker to one process": statistics.median(a / b for a, b in zip(alone, one)),
        "2 workers to 1": statistics.median(a / b for a, b in zip(one, two)),
    }


def text_of(found: dict[str, Any]) -> str:
    lines = []
    for name, one in found.get("cost", {}).items():
        width, height = one["dimensions"]
        lines.append(
            f"{name}: {width:,} x {height:,} px, {one['tiles']:,} tiles, {one['seconds']:.1f} core seconds "
            f"({1e3 * one['seconds_per_tile']:.1f} ms a tile), {one['megabytes']:.0f} MB of memory, "
            f"{one['bytes_in'] / 1e6:.1f} MB in, {one['bytes_out'] / 1e6:.2f} MB out in {one['files_out']} files"
        )
        lines.append("  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in one["stages"].items()))
    for name in [name for name in ("slides", "cache") if name in found]:
        times = ", ".join(f"{who} {statistics.median(s):.1f} s" for who, s in found[name]["seconds"].items())
        ratios = ", ".join(f"{what} {value:.2f}" for what, value in found[name]["ratios"].items())
        lines.append(f"{name}: {times}; throughput: {ratios}; load before {found[name]['load']:.1f}")
    if death := found.get("death"):
        lines.append(f"a worker killed: {death['one killed']:.1f} s in place of {death['undisturbed']:.1f} s")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="see that everything runs; writes nothing")
    parser.add_argument("--part", choices=("all", "slides", "rest"), default="all", help="slides: by workers, alone")
    arguments = parser.parse_args()
    small, part, rounds = arguments.small, arguments.part, 1 if arguments.small else 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ |= {"HISTILL_CACHE": f"{scratch}/cache", "HISTILL_QUIET": "1", "OMP_NUM_THREADS": "1"}
        model = write_model(scratch / "model.onnx")
        found: dict[str, Any] = {} if part == "slides" else {"cost": {}}
        for times in () if part == "slides" else (2, 4) if small else (4, 11):
            (slide,) = write_slides(scratch, 1, times)
            found["cost"][f"side {times}"] = cost(model, slide, scratch / f"cost {times}")

        slides = write_slides(scratch / "many", 3 if small else 6, 2)

        def over_slides(out: Path, ray: str | None) -> None:
            some = slides[:2] if out.name == "warm" else slides
            predict_slides(model, some, out, ray=ray, threads=1)

        def of(work: Callable[[Path, str | None], object], where: str) -> dict[str, Any]:
            load = os.getloadavg()[0]
            seconds = in_turns(work, scratch / where, rounds)
            return {"seconds": seconds, "ratios": rate(seconds), "load": load}

        if part != "rest":
            found["slides"] = of(over_slides, "slides")
        if part == "slides":
            return end(found, small)
        rows = write_images(scratch / "images", 80 if small else 480, 32)
        (scratch / "images/all.csv").write_text("\n".join(["path,label,split", *(f"{r},train" for r in rows)]) + "\n")
        data = read_images(scratch / "images/all.csv")
        torch.manual_seed(0)
        teacher = Frozen(Cifar("resnet32x4", classes=2))

        def over_images(out: Path, ray: str | None) -> None:
            out.mkdir(parents=True, exist_ok=True)
            kind: dict[str, Any] = {"teacher": teacher, "views": 2, "epochs": 2, "cache": out, "batch_size": 16}
            made = Experiment(data=data, student=None, objective=None, image_size=32, augment=Augment(), **kind)  # type: ignore[arg-type]
            fill(made, device="cpu", ray=ray)

        found["cache"] = of(over_images, "cache")
        found["death"] = a_death(over_slides, scratch / "death")
        same = [np.load(scratch / "cache" / f"{who} 0" / "logits.npy") for who in found["cache"]["seconds"]]
        assert all(np.array_equal(same[0], other) for other in same[1:])
    return end(found, small)


def end(found: dict[str, Any], small: bool) -> None:
    """Print what was found; keep it beside the other part's."""
    if small:
        print(text_of(found), end="")
        return
    out = RESULTS / "scale.json"
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    more = {"command": "python benchmarks/scale.py", "machine": machine, "torch": torch.__version__}
    found = beside(out, found)
    leave(out, found | more, text_of(found))


if __name__ == "__main__":
    main()
