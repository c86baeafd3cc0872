"""What the folder of ``--out`` holds, and what must be sound before it is taken."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from histill.errors import BadInput, HistillError
from histill.files import read_json

__all__ = ["agreed", "check_free", "check_trains", "filled", "given_back", "read_record"]


def read_record(out: Path, file: str) -> dict[str, Any]:
    """What ``out`` says of the run or the distillation that it holds; `BadInput` where it holds none."""
    if not (out / file).is_file():
        raise BadInput(f"--resume: {out} holds nothing to go on with (no {file} in it)")
    record = read_json(out / file)
    try:
        if file == "distill.json":
            record["recipe"], record["arguments"].items()
        else:
            record["recipe"]["name"], record["status"], (record.get("command") or {}).items()
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{out / file} is damaged; start anew in another --out") from None
    return dict(record)


def check_free(out: Path) -> None:
    """Refuse an ``out`` that holds a run or cannot become a folder."""
    if any((out / file).exists() for file in ("distill.json", "run.json")):
        raise BadInput(f"{out} holds a run already; go on with --resume, or give another --out")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise BadInput(f"--out {out}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise BadInput(f"--out {out}: {there} cannot be written to; give another folder")


def agreed(given: dict[str, Any], values: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded arguments; one given beside them must agree."""
    from histill.experiment import plain

    for name, value in given.items():
        said = plain(value)
        if name in recorded and said != recorded[name]:
            raise BadInput(
                f"--{name.replace('_', '-')} {said} differs from the run's {recorded[name]}; --resume needs --out alone"
            )
    return values | {n: v for n, v in recorded.items() if n in values} | {"resume": True}


@contextmanager
def given_back(out: Path, resume: bool) -> Iterator[None]:
    """Where nothing was begun when something went wrong, the folder is free again."""
    try:
        yield
    except HistillError:
        if not resume and not any(out.rglob("run.json")):
            for left in ("distill.json", ".lock"):
                (out / left).unlink(missing_ok=True)
            with suppress(OSError):
                out.rmdir()
        raise


def filled(flags: dict[str, tuple[Any, Any, str]], given: dict[str, Any]) -> dict[str, Any]:
    """What was given, and the defaults of the rest; `BadInput` for infinities and what is no number."""
    values = {name: default for name, (_, default, _) in flags.items()} | given
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"--{name.replace('_', '-')} {value}: give a finite number")
    return values


def check_trains(experiment: Any) -> None:
    """Raise what training would raise of the network and its optimiser, before a folder is taken."""
    network = experiment.student()
    try:
        experiment.optimizer(network.parameters())
    except ValueError as error:
        raise BadInput(f"the optimiser: {error}") from None
