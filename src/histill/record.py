"""What ``run.json`` says of a run, and whether an experiment is still the one that it was made by."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from histill.data.decode import FORMATS
from histill.data.images import Images
from histill.data.packed import Packed
from histill.errors import BadInput
from histill.experiment import Experiment, plain
from histill.files import digest

__all__ = ["check_finished", "check_same", "describe", "record", "versions"]

_SAME = (
    "network",
    "frozen",
    "objective",
    "inputs",
    "teacher",
    "classes",
    "image_size",
    "epochs",
    "batch_size",
    "accumulate",
    "optimizer",
    "schedule",
    "clip",
    "ema",
    "patience",
    "select",
    "views",
    "augment",
    "seed",
    "precision",
)
_PLAIN = ("image_size", "epochs", "batch_size", "accumulate", "clip", "ema", "patience", "select", "views", "seed")
"""Fields of an experiment that its record holds as they are."""


def record(experiment: Experiment, packed: Packed, student: nn.Module) -> dict[str, Any]:
    """What is known of a run before it starts, but for the machine."""
    images, data, unlabelled = packed.images, experiment.data, experiment.unlabelled
    return {
        "status": "running",
        "recipe": experiment.recipe,
        "network": describe(experiment.student),
        "parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "frozen": list(experiment.frozen),
        "objective": _made_by(experiment.objective),
        "inputs": None if experiment.inputs is None else _made_by(experiment.inputs),
        "teacher": None if experiment.teacher is None else {"key": getattr(experiment.teacher, "key", "")},
        "classes": list(data.classes),
        "positive": experiment.positive,
        "image_size": experiment.image_size,
        "mpp": trained_mpp(images, experiment.image_size),
        "epochs": experiment.epochs,
        "batch_size": experiment.batch_size,
        "accumulate": experiment.accumulate,
        "optimizer": _made_by(experiment.optimizer),
        "schedule": digest([float(experiment.schedule(epoch)) for epoch in range(experiment.epochs)])[:12],
        "clip": experiment.clip,
        "ema": experiment.ema,
        "patience": experiment.patience,
        "select": experiment.select,
        "views": experiment.views,
        "augment": asdict(experiment.augment),
        "seed": experiment.seed,
        "data": {
            "root": str(images.root),
            "hash": data.hash,
            "split_hash": data.split_hash,
            "images": {split: len(images.rows(split)) for split in ("train", "val", "test")},
            "masks": images.masks,
            "unlabelled": 0 if images.masks else int((images.frame["label"] == "").sum()),
            "unlabelled_hash": None if unlabelled is None else unlabelled.hash,
            "patients": data.frame["patient"].replace("", None).nunique() if data.has_patients else None,
        },
        "notices": list(images.notices),
        "versions": versions(),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def trained_mpp(images: Images, size: int) -> float | None:
    """Microns per pixel at which images are seen at ``size``: those of their files, times the files' width over it.

    None where they are not known, or not the same for all.
    """
    known = set(images.frame["mpp"])
    if len(known) != 1 or not (said := known.pop()):
        return None
    with Image.open(images.paths()[0], formats=FORMATS) as picture:
        return float(said) * picture.width / size


def check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Refuse to go on with other data, another network or other settings (`BadInput` names which)."""
    now = json.loads(json.dumps(now))
    for name in _SAME:
        there, here = before.get(name), now[name]
        if name == "teacher" and there and here:
            there, here = there.get("key"), here["key"]
        if there != here:
            raise BadInput(f"{out}: --resume with {name} {here}, but the run has {there}")
    # An objective that is a module keeps its settings to itself; the recipe's arguments have them.
    there, here = _comparable(before["recipe"]), _comparable(now["recipe"])
    for name in here.keys() & there.keys():
        if here[name] != there[name]:
            raise BadInput(f"{out}: --resume with {name} {here[name]}, but the run has {there[name]}")
    for name in ("hash", "split_hash", "unlabelled_hash"):
        if before.get("data", {}).get(name) != now["data"][name]:
            raise BadInput(f"{out}: the images have changed since the run started; start a new one in another --out")


def describe(student: functools.partial[nn.Module]) -> dict[str, Any]:
    """How a network is made, as ``run.json`` keeps it.

    Raises:
        BadInput: it is not a `functools.partial` of a module-level function or class with keyword arguments that
            JSON can hold.
    """
    if not isinstance(student, functools.partial) or student.args:
        raise BadInput(
            "student: give functools.partial(Network, keyword=value, ...), so that the run can make it again"
        )
    function = f"{student.func.__module__}:{student.func.__qualname__}"
    if not student.func.__qualname__.isidentifier():
        raise BadInput(f"student: {function} cannot be found again by its name; define it at the top of its file")
    try:
        json.dumps(student.keywords, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInput(f"student: the arguments of {function} must fit into JSON ({error})") from None
    return {"function": function, "arguments": student.keywords}


def versions() -> dict[str, str]:
    """What was installed."""
    found = {"python": platform.python_version()}
    for name in ("histill", "torch", "timm", "lightning-fabric", "numpy", "pillow", "onnxruntime", "openvino"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _made_by(value: Any) -> Any:
    """A function, a partial or a module as ``run.json`` keeps it."""
    if isinstance(value, functools.partial):
        return {"function": _made_by(value.func), "arguments": {n: plain(v) for n, v in value.keywords.items()}}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def _commit() -> str | None:
    """The commit of the working folder's repository, if it is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def check_finished(before: dict[str, Any], experiment: Experiment, out: Path) -> None:
    """Refuse to take a finished run for another experiment (`BadInput` names what differs).

    Compared is what needs no image to be read: the network, the data, the teacher and the recipe's plain arguments, or
    those of an experiment that no recipe made.
    """
    there, here = (_comparable(r) for r in (before["recipe"], json.loads(json.dumps(experiment.recipe))))
    there["network"], here["network"] = before["network"]["function"], describe(experiment.student)["function"]
    there["data"], here["data"] = before["data"]["split_hash"], experiment.data.split_hash
    there["images"], here["images"] = before["data"]["hash"], experiment.data.hash
    there["teacher"] = (before["teacher"] or {}).get("key")
    here["teacher"] = None if experiment.teacher is None else getattr(experiment.teacher, "key", "")
    if not experiment.recipe:
        here |= {name: getattr(experiment, name) for name in _PLAIN}
        here |= {"objective": _made_by(experiment.objective), "optimizer": _made_by(experiment.optimizer)}
        here |= {
            "network's arguments": describe(experiment.student)["arguments"],
            "augment": asdict(experiment.augment),
        }
        there |= before | {"network's arguments": before["network"]["arguments"], **there}
        here = json.loads(json.dumps(here))
    for name in sorted(here.keys() & there.keys()):
        if here[name] != there[name]:
            raise BadInput(f"{out} is finished, with {name} {there[name]}, not {here[name]}; give another --out")


def _comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's arguments that are numbers, words or lists; runs and images are named by paths, which may move."""
    paths = ("data", "teacher", "unlabelled")
    return {n: v for n, v in recipe.get("arguments", {}).items() if n not in paths and not isinstance(v, dict)}
