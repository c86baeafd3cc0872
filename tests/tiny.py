"""The smallest things that train: a table, networks, objectives, teachers, and processes that may be killed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import write_classes
from torch import Tensor, nn
from torch.nn import functional as F

from histill.data import Augment, Images, read_images, split
from histill.experiment import Experiment
from histill.models import DSNet
from histill.types import Batch, Outputs, Terms

SIZE = 18
STILL = Augment(hflip=False, vflip=False)


def table(folder: Path, count: int = 40, *, size: int = 24, seed: int = 0) -> Images:
    """``count`` images of two classes, 60 % train, 20 % val, 20 % test."""
    if not folder.exists():
        write_classes(folder, {"benign": count // 2, "malignant": count - count // 2}, size=size)
    return split(read_images(folder), val=0.2, test=0.2, seed=seed)


class Tiny(nn.Module):
    """One convolution and a linear layer: no batch norm, no dropout, so that its arithmetic is easy to repeat."""

    def __init__(self, classes: int = 2, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Outputs:
        pooled = self.conv(images).relu().mean((2, 3))
        return Outputs(logits=self.head(pooled), pooled=pooled)


class Normed(nn.Module):
    """One with batch norm."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm1d(4), nn.Linear(4, classes)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(logits=self.head(self.norm(self.conv(images).relu().mean((2, 3)))))


def hard(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    return {"hard": (1.0, F.cross_entropy(student["logits"], batch.labels, ignore_index=-1))}


def both(student: Outputs, teacher: Outputs, batch: Batch, *, alpha: float = 0.3) -> Terms:
    labelled = batch.labels >= 0
    soft = -(teacher["logits"].softmax(1) * student["logits"].log_softmax(1)).sum(1).mean()
    return {"hard": (alpha, F.cross_entropy(student["logits"][labelled], batch.labels[labelled])), "soft": (2.0, soft)}


class Counting:
    """A teacher of random but fixed weights that remembers how many images it was asked about."""

    def __init__(self, seed: int = 7, classes: int = 2) -> None:
        torch.manual_seed(seed)
        self.network = nn.Conv2d(3, classes, 5, stride=3).requires_grad_(False)
        self.key = f"counting {seed}"
        self.images = 0

    def __call__(self, batch: Batch) -> Outputs:
        self.images += len(batch.images)
        return Outputs(logits=10 * self.network(batch.images).mean((2, 3)))


def experiment(data: Images, **changes: Any) -> Experiment:
    """A `Tiny` network trained by plain gradient descent on views that change nothing."""
    chosen: dict[str, Any] = {
        "data": data,
        "student": partial(Tiny, classes=2),
        "objective": hard,
        "image_size": SIZE,
        "augment": STILL,
        "epochs": 2,
        "batch_size": 8,
        "optimizer": partial(torch.optim.SGD, lr=0.5),
        "select": "last",
    }
    return Experiment(**chosen | changes)


def everything(data: Images, cache: Path | bool, **changes: Any) -> Experiment:
    """Dropout, a moving average, accumulation, augmentation, momentum and a teacher behind a cache."""
    chosen: dict[str, Any] = {
        "student": partial(DSNet, classes=2, image_size=SIZE),
        "objective": both,
        "teacher": Counting(),
        "cache": cache,
        "augment": Augment(rotate=90, brightness=0.2),
        "views": 2,
        "epochs": 4,
        "ema": 0.9,
        "accumulate": 2,
        "clip": 1.0,
        "optimizer": partial(torch.optim.Adam, lr=1e-3),
        "select": "loss",
    }
    return experiment(data, **chosen | changes)


def parameters(network: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def no_page(out: Path, info: dict[str, Any]) -> None:
    """In place of `histill.evaluate.finish.finish`: drawing takes ten times as long as these trainings."""


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file that anyone would read."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."
    }


def process(work: Callable[..., None], *arguments: Any) -> Any:
    """``work`` in another process that may be killed; it starts with Histill already imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["histill.loop", "histill.models", "histill.evaluate.finish"])
    child = context.Process(target=_work, args=(work, arguments, dict(os.environ)), daemon=True)
    child.start()
    return child


def _work(work: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    import histill.evaluate.finish

    histill.evaluate.finish.finish = no_page
    work(*arguments)
