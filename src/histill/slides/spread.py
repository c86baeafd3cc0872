"""Slides over the workers of a Ray cluster: each writes its slide's folder as one process does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from histill.cluster import spread
from histill.errors import HistillError
from histill.slides.engine import load_model
from histill.slides.options import Options

__all__ = ["spread_slides"]


def spread_slides(
    model: Path,
    slides: Sequence[Path],
    out: Path,
    options: Options,
    *,
    ray: str,
    device: str,
    precision: str,
    runtime: str,
    code: Path | None,
) -> Iterator[tuple[int, dict[str, Any] | HistillError]]:
    """Every slide's number with what its ``slide.json`` holds, or with what was wrong with it.

    Model, slides and ``out`` lie on storage that all machines see under the same paths. The largest files come first,
    so that none is begun when all others are done. A worker has ``options.threads`` cores (default: one).
    """
    order = sorted(range(len(slides)), key=lambda number: -_bytes(slides[number]))
    names = [slides[number].name for number in order]
    make = partial(
        _worker,
        model.absolute(),
        out.absolute(),
        _absolute(options),
        device,
        precision,
        runtime,
        code and code.absolute(),
    )
    for place, said in spread(
        make,
        [slides[number].absolute() for number in order],
        ray=ray,
        what="slides",
        unit="slides",
        names=names,
        cpus=options.threads,
        gpu=device != "cpu" and model.is_dir(),
    ):
        yield order[place], said


def _worker(
    model: Path, out: Path, options: Options, device: str, precision: str, runtime: str, code: Path | None
) -> Any:
    """In a worker: the model, opened once."""
    import torch

    from histill.slides.predict import predict_one

    opened = partial(load_model, device=device, precision=precision, runtime=runtime, code=code)
    loaded = opened(model)
    wide = loaded if options.coarse_model is None else opened(options.coarse_model)
    return partial(predict_one, loaded, wide, replace(options, threads=torch.get_num_threads()), out, device=device)


def _absolute(options: Options) -> Options:
    """The same files, whatever a worker's folder is."""
    changed: dict[str, Any] = {"segment": {label: Path(path).absolute() for label, path in options.segment.items()}}
    for name in ("mask", "truth", "coarse_model"):
        path = getattr(options, name)
        changed[name] = None if path is None else Path(path).absolute()
    return replace(options, **changed)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
