"""A teacher's cache filled before training, by this process or by a Ray cluster's workers.

The teacher is asked about the training images in the order of their table, a batch at a time, so that who asks does not
matter to a single bit. Workers answer, and this process writes; a killed one goes on with what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from histill.data.images import Images
from histill.data.packed import pack
from histill.data.splits import with_unlabelled
from histill.data.views import Augment
from histill.errors import BadInput, HistillError
from histill.experiment import Experiment
from histill.loop import kept_teacher
from histill.machine import at_speed, launch
from histill.progress import progress
from histill.teachers import Cached, Keyed, bound

__all__ = ["fill"]

Answer = dict[str, NDArray[Any]]
_Piece = tuple[int, NDArray[np.int64]]


@dataclass(frozen=True)
class _Question:
    """What a worker must know."""

    images: Images
    image_size: int
    strict: bool
    teacher: Keyed
    augment: Augment
    seed: int
    device: str
    precision: str
    outputs: tuple[str, ...]


def fill(
    experiment: Experiment,
    *,
    device: str = "auto",
    precision: str = "auto",
    ray: str | None = None,
    threads: int | None = None,
) -> Path:
    """Ask an experiment's teacher about every view that its training will show, and keep the answers.

    Training with the same teacher, images and views reads them; it may run elsewhere, where it sees the same cache
    folder (``HISTILL_CACHE``).

    Args:
        experiment: as for `histill.train`.
        device: where the teacher computes.
        precision: as training will have it, since a teacher answers accordingly.
        ray: a cluster that shares the batches among its workers (``auto`` or ``HOST:PORT``; `histill.cluster`).
        threads: with ``ray`` the cores of each worker (default: one).

    Returns:
        The folder of the cache.

    Raises:
        BadInput: the experiment has no teacher, or asks it anew in every epoch.
        Failed: the disk has too little room, or workers died again and again over the same images.
    """
    if experiment.teacher is None:
        raise BadInput("nothing to keep: the student learns alone; give --teacher")
    data = with_unlabelled(experiment.data, experiment.unlabelled)
    packed = pack(data, experiment.image_size, strict=experiment.strict)
    fabric = launch(device, precision, (), Path())
    with at_speed(fabric):
        cached = kept_teacher(experiment, packed, fabric.device)
    if not isinstance(cached, Cached):
        raise BadInput(
            "nothing to keep: every epoch shows new views, or the teacher's answers lie on disk; give --views"
        )
    rows = np.array(packed.images.rows("train"), dtype=np.int64)
    cuts = [rows[at : at + experiment.batch_size] for at in range(0, len(rows), experiment.batch_size)]
    pieces = list(product(range(min(experiment.views or 1, experiment.epochs)), cuts))
    left = [piece for piece in pieces if cached.missing(*_named(piece)).any()]
    question = _Question(
        data,
        experiment.image_size,
        experiment.strict,
        cached.teacher,
        experiment.augment,
        experiment.seed,
        device,
        precision,
        cached.outputs,
    )
    try:
        for piece, said in _spread(question, left, ray, threads) if ray and left else _alone(question, left):
            views, ids = _named(piece)
            cached.keep(views, ids, said, cached.missing(views, ids))
    finally:
        cached.flush()
    return cached.folder


def _alone(question: _Question, pieces: list[_Piece]) -> Iterator[tuple[_Piece, Answer]]:
    ask, fabric = _asker(question)
    with at_speed(fabric), progress("asking the teacher", sum(len(rows) for _, rows in pieces)) as bar:
        for piece in pieces:
            yield piece, ask(piece)
            bar.advance(len(piece[1]))


def _spread(
    question: _Question, pieces: list[_Piece], ray: str, threads: int | None
) -> Iterator[tuple[_Piece, Answer]]:
    from histill.cluster import spread

    names = [f"view {view} of images {rows[0]} to {rows[-1]}" for view, rows in pieces]
    make = partial(_worker, question)
    options: dict[str, Any] = {"cpus": threads, "gpu": question.device != "cpu"}
    for number, said in spread(
        make, pieces, ray=ray, what="asking the teacher", unit="batches", names=names, **options
    ):
        if isinstance(said, HistillError):
            raise said
        yield pieces[number], said


def _worker(question: _Question) -> Callable[[_Piece], Answer]:
    """What a worker of a cluster does."""
    ask, fabric = _asker(question)

    def asked(piece: _Piece) -> Answer:
        with at_speed(fabric):
            return ask(piece)

    return asked


def _asker(question: _Question) -> tuple[Callable[[_Piece], Answer], Fabric]:
    """The teacher over its images, as each process makes it once, and the machine that it runs on."""
    packed = pack(question.images, question.image_size, strict=question.strict)
    teacher, fabric = bound(question.teacher, packed.images), launch(question.device, question.precision, (), Path())
    kind: dict[str, Any] = {"augment": question.augment, "seed": question.seed, "device": fabric.device}

    def ask(piece: _Piece) -> Answer:
        views, ids = _named(piece)
        said = teacher(packed.batch(ids, torch.from_numpy(views), **kind))
        return {name: said[name].cpu().numpy() for name in question.outputs}

    return ask, fabric


def _named(piece: _Piece) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers of the views and of the images."""
    view, rows = piece
    return np.full(len(rows), view, dtype=np.int64), rows
