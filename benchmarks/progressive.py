"""Progressive image size: how much faster is a student trained that sees small images first, and what does it lose?

    python benchmarks/progressive.py DATA OUT [--parts accuracy speed]

DATA holds ``lc25000`` (1,231 tiles of lung and colon, five classes, split by tile group) and ``imagenet_mobilenet``
(ImageNet weights of MobileNet). MobileNet V1, fine-tuned from ImageNet, teaches ResNet-18 from random weights, with the
cache. The student's view grows in a straight line from half its side to the whole over the first 80 % of the steps
(EfficientNetV2's progressive learning without its regularisation; Tan and Le 2021, section 4); the teacher always sees
the whole view, and so do validation and test.

Accuracy: three ways at 128 px, with three seeds each: the whole size, growing, and the whole size for as many epochs
as growing takes in arithmetic. The learning rate is the one with which the whole size does best on validation, seed 0.
Test images are judged at the end, and choose nothing. Speed: whole epochs at 224 px, in turns; nothing else should run
then. Runs go to OUT and are gone on with; the summary to benchmarks/results/progressive.json, the table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import RESULTS, beside, leave, processor, spread
from studies import Task, imagenet, manifest, trained_teacher
from torch import Tensor, nn
from torch.nn import functional as F

import histill as hs
from histill.data.images import Images
from histill.evaluate.intervals import figures_over_seeds, figures_with_intervals, paired_gain
from histill.evaluate.judge import scores_of
from histill.models import Timm
from histill.recipes import dsnet
from histill.run import Run

TASK = Task(
    "lc25000",
    flags="",
    teacher="--network mobilenet_v1 --val 0.2 --batch-size 32 --lr 3e-4 --epochs 4 --image-size 128 "
    "--precision 32-true",
    network="mobilenetv1_100",
)
SHARED: dict[str, Any] = {"network": "resnet18", "weights": "none", "batch_size": 32, "views": 4, "temperature": 4.0}
SIZE, EPOCHS, SEEDS, RATES = 128, 15, (0, 1, 2), (3e-4, 1e-3)
FROM, UNTIL, STEP = 0.5, 0.8, 16
SPEED_SIZE, SPEED_EPOCHS, SPEED_IMAGES, ROUNDS = 224, 10, 192, 3
SHOWN = ("accuracy", "balanced_accuracy", "auroc")


class Growing(nn.Module):
    """ResNet-18 that is shown small images at first, while it trains.

    Args:
        classes: of the answer.
        size: the side of what it is given, in pixels.
        steps: of the whole training. The count is a buffer, so that a resumed training goes on with it.
    """

    def __init__(self, classes: int, size: int, steps: int) -> None:
        super().__init__()
        self.network, self.size, self.steps = Timm(name="resnet18", classes=classes), size, steps
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, images: Tensor) -> Any:
        if self.training:
            side = side_at(int(self.step) / self.steps, self.size)
            self.step += 1
            if side < self.size:
                small = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
                images = small.to(images.dtype)
        return self.network(images)


def side_at(time: float, size: int) -> int:
    """The side in pixels after this share of the training: a multiple of `STEP`."""
    share = min(1.0, FROM + (1 - FROM) * time / UNTIL)
    return min(size, STEP * round(share * size / STEP))


def arithmetic(size: int) -> float:
    """Of a growing training, as a share of one at the whole size."""
    return sum((side_at(t / 1000, size) / size) ** 2 for t in range(1000)) / 1000


def trained(made: Any, out: Path) -> Run:
    """The run, gone on with or taken as it is where there is one."""
    return hs.train(made, out=out, resume=(out / "run.json").exists())


def grown(made: Any) -> Any:
    """The same experiment with a student that grows."""
    steps = made.epochs * -(-len(made.data.rows("train")) // made.batch_size)
    student: Callable[..., nn.Module] = Growing
    return replace(made, student=partial(student, classes=len(made.data.classes), size=made.image_size, steps=steps))


def accuracy(images: Images, teacher: Run, out: Path) -> dict[str, Any]:
    """Three ways, three seeds, on test."""
    fewer = round(EPOCHS * arithmetic(SIZE))

    def run(way: str, rate: float, seed: int) -> Run:
        epochs = fewer if way == "fewer epochs" else EPOCHS
        made = dsnet.student(images, teacher, image_size=SIZE, epochs=epochs, lr=rate, seed=seed, **SHARED)
        made = grown(made) if way == "growing" else made
        return trained(made, out / f"{way.replace(' ', '-')}-{rate:g}-seed{seed}")

    tried = {
        rate: figures_with_intervals(scores_of(run("whole size", rate, 0), "val"), resamples=10)["auroc"]["value"]
        for rate in RATES
    }
    rate = max(tried, key=tried.__getitem__)
    runs: dict[str, list[Run]] = {"whole size": [], "growing": [], "fewer epochs": []}
    for seed in SEEDS:
        for way, several in runs.items():
            several.append(run(way, rate, seed))
    found = {way: [scores_of(one) for one in several] for way, several in runs.items()}
    first = runs["growing"][0].info
    return {
        "image_size": SIZE,
        "epochs": {"whole size": EPOCHS, "growing": EPOCHS, "fewer epochs": fewer},
        "rate": {"chosen": rate, "validation_auroc": tried},
        "data": {key: first["data"][key] for key in ("images", "hash", "split_hash")},
        "teacher": figures_with_intervals(scores_of(teacher), names=SHOWN),
        "students": {way: figures_over_seeds(several, names=SHOWN) for way, several in found.items()},
        "differences": {
            f"growing minus {way}": paired_gain(found[way], found["growing"], names=SHOWN)
            for way in ("whole size", "fewer epochs")
        },
        "precision": first["precision"],
        "versions": first["versions"],
        "commit": first["commit"],
    }


def speed(images: Images, teacher: Run, out: Path) -> dict[str, Any]:
    """Images/s of whole epochs, the cache full; a first training fills it and warms up."""
    train = images.rows("train")[:SPEED_IMAGES]
    others = images.rows("val")[:32]
    few = images.with_frame(images.frame.iloc[[*train, *others]].reset_index(drop=True))
    shared = {"image_size": SPEED_SIZE, "lr": RATES[-1], "seed": 0, **SHARED}
    trained(dsnet.student(few, teacher, epochs=SHARED["views"], **shared), out / "warm")
    made = dsnet.student(few, teacher, epochs=SPEED_EPOCHS, **shared)
    found: dict[str, list[float]] = {"whole size": [], "growing": []}
    for turn in range(ROUNDS):
        for way, rates in found.items():
            run = trained(grown(made) if way == "growing" else made, out / f"{way.replace(' ', '-')}-{turn}")
            each = pd.read_csv(run.path / "log.csv")["images_per_second"]
            rates.append(len(each) / float((1 / each).sum()))
    ratios = [b / a for a, b in zip(found["whole size"], found["growing"])]
    return {
        "image_size": SPEED_SIZE,
        "epochs": SPEED_EPOCHS,
        "images": len(train),
        "images_per_second": {way: spread(rates) for way, rates in found.items()},
        "times_as_fast": spread(ratios),
        "by_arithmetic": 1 / arithmetic(SPEED_SIZE),
        "load_before": os.getloadavg()[0],
    }


def table_of(found: dict[str, Any]) -> str:
    """The tables of the parts that were run."""
    lines = []
    if part := found.get("accuracy"):
        counts = " / ".join(str(part["data"]["images"][split]) for split in ("train", "val", "test"))
        lines += [
            f"accuracy at {part['image_size']} px: {counts} images of training, validation, test; 95 % intervals over "
            f"images and {len(SEEDS)} seeds; learning rate {part['rate']['chosen']:g}",
            f"{'':42}" + "".join(f"{name.replace('_', ' '):26}" for name in SHOWN),
        ]
        rows = {"teacher (MobileNet V1)": part["teacher"]}
        rows |= {f"{way}, {part['epochs'][way]} epochs": figures for way, figures in part["students"].items()}
        for row, figures in rows.items():
            lines.append(f"{row:42}" + "".join(f"{_shown(figures[name]):26}" for name in SHOWN))
        for row, figures in part["differences"].items():
            lines.append(f"{row:42}" + "".join(f"{_shown(figures[name], sign=True):26}" for name in SHOWN))
    if part := found.get("speed"):
        lines += ["", f"speed at {part['image_size']} px, whole epochs of {part['images']} images, cache full"]
        for way, rate in part["images_per_second"].items():
            lines.append(f"{way:42}{rate['median']:.1f} images/s ({rate['low']:.1f} to {rate['high']:.1f})")
        times = part["times_as_fast"]
        lines.append(
            f"{'growing to whole size':42}{times['median']:.2f} times ({times['low']:.2f} to {times['high']:.2f}); "
            f"by arithmetic {part['by_arithmetic']:.2f}"
        )
    return "\n".join(lines).lstrip("\n") + "\n"


def _shown(figure: dict[str, Any], *, sign: bool = False) -> str:
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})" if sign else f"{value:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=("accuracy", "speed"), default=["accuracy", "speed"])
    chosen = parser.parse_args()
    table = manifest(TASK, chosen.data / TASK.images, chosen.out / "images")
    weights = imagenet(TASK, chosen.data, table, chosen.out)
    teacher = Run.open(trained_teacher("dsnet", TASK, table, weights, chosen.out)[1])
    images = hs.split(hs.read_images(table), val=0.2, seed=0)
    parts = {"accuracy": accuracy, "speed": speed}
    found = beside(
        RESULTS / "progressive.json",
        {
            "command": "python benchmarks/progressive.py DATA OUT",
            "machine": {"processor": processor(), "cores": os.cpu_count()},
            "settings": {**SHARED, "from": FROM, "until": UNTIL, "multiple": STEP, "teacher": TASK.teacher},
            **{name: parts[name](images, teacher, chosen.out / name) for name in chosen.parts},
        },
    )
    leave(RESULTS / "progressive.json", found, table_of(json.loads(json.dumps(found))))


if __name__ == "__main__":
    main()
