"""An experiment: one student network, one data set, one objective, any number of frozen teachers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec

import numpy as np
import torch
from torch import Tensor, nn

from histill.data.images import Images
from histill.data.views import Augment
from histill.errors import BadInput
from histill.evaluate.task import task_of
from histill.schedules import Schedule, constant
from histill.types import Batch, Objective, Outputs, Teacher

__all__ = ["Experiment", "load_recipe", "recipe"]

P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What `histill.train` needs to know. Recipes make these; every field is a plain value or function.

    Attributes:
        data: the images with their splits (`histill.split`): with labels, with masks (`histill.data.read_masks`), or
            without either (`histill.data.read_unlabelled`), which a teacher or the images themselves must then teach.
        student: makes the network: a `functools.partial` of a class or function with keyword arguments that JSON can
            hold, so that the run folder can make it again.
        objective: ``(student, teacher, batch) -> {name: (weight, loss)}``. One with a ``step`` is told before each
            step how many were done.
        image_size: height and width in pixels that the student sees.
        teacher: what the objective compares with; none for a network's own training.
        inputs: ``(batch, teacher's outputs) -> (N, 3, H, W)``, what the student is shown, where that is not the batch's
            images alone: crops that the teacher's attention points at, or the images in four rotations. The student's
            outputs are then of all N, in one pass.
        unlabelled: images that join the training with the teacher's word only.
        augment: what a view may change.
        views: how many distinct views each image has (None: a new one in every epoch). Views and epochs are
            independent: with 16 views and 100 epochs every view is seen about six times.
        cache: keep the teacher's outputs per view (True: in the cache folder; a path: there; False: ask every time).
            Runs with the same teacher, views and images share it. Without effect where ``views`` is None.
        cache_outputs: which of the teacher's outputs the objective uses.
        epochs: passes over the training images.
        batch_size: images per step of the optimiser, all processes together.
        accumulate: parts into which a batch is cut to fit the memory; the result is that of the whole batch.
        frozen: glob patterns of the student's parameters that stay as they start.
        optimizer: makes the optimiser from the parameters that train; its rates are multiplied by ``schedule``.
        schedule: see `histill.schedules`.
        clip: largest norm of the gradient, if any.
        ema: decay of an exponential moving average of the weights, which is then what is validated and kept.
        patience: stop after so many epochs without a better validation figure, if any.
        select: which epoch's weights are kept: that with the best ``balanced_accuracy`` (the default), ``accuracy``,
            ``auroc`` or ``loss`` on validation (ties: the lower validation loss, then the earlier epoch), or the
            ``last``. Of masks ``miou`` (the default), ``mdice``, ``loss``, ``last`` or, of nuclei, ``object_f1``; of
            unlabelled images ``last``.
        seed: of initialisation, order, views and dropout.
        positive: the class that sensitivity and specificity are about (default: the mean over all classes).
        strict: an unreadable image is an error.
        recipe: name, source and arguments of the recipe that made this; filled in by `recipe`.
    """

    data: Images
    student: functools.partial[nn.Module]
    objective: Objective
    image_size: int
    teacher: Teacher | None = None
    inputs: Callable[[Batch, Outputs], Tensor] | None = None
    unlabelled: Images | None = None
    augment: Augment = field(default_factory=Augment)
    views: int | None = None
    cache: bool | Path = True
    cache_outputs: tuple[str, ...] = ("logits",)
    epochs: int = 1
    batch_size: int = 64
    accumulate: int = 1
    frozen: tuple[str, ...] = ()
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = functools.partial(torch.optim.Adam, lr=1e-3)
    schedule: Schedule = field(default_factory=constant)
    clip: float | None = None
    ema: float | None = None
    patience: int | None = None
    select: str = ""
    seed: int = 0
    positive: str | None = None
    strict: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, least in (("epochs", 1), ("batch_size", 2), ("accumulate", 1), ("image_size", 8), ("seed", 0)):
            if getattr(self, name) < least:
                raise BadInput(f"{name}={getattr(self, name)}: must be at least {least}")
        for name in ("views", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise BadInput(f"{name}={value}: must be at least 1")
        known = task_of(self.data).SELECTIONS
        if not self.select:
            object.__setattr__(self, "select", known[0])
        if self.select not in known:
            raise BadInput(f"select={self.select!r}: one of {', '.join(known)}")
        if self.select == "object_f1" and self.data.masks != "instances":
            raise BadInput(
                "select='object_f1': it counts nuclei, and these masks hold classes; miou, mdice, loss or last"
            )
        if self.patience is not None and self.select == "last":
            raise BadInput("patience waits for a better epoch, and select='last' knows none; give one of them")
        if self.ema is not None and not 0 < self.ema < 1:
            raise BadInput(f"ema={self.ema}: between 0 and 1")
        if self.clip is not None and not self.clip > 0:
            raise BadInput(f"clip={self.clip}: above 0")
        if self.positive is not None and self.positive not in self.data.classes:
            raise BadInput(f"positive={self.positive!r}: the classes are {', '.join(self.data.classes)}")

    def _check_kinds(self) -> None:
        """A number that is none is said here, not by whoever reckons with it an hour later."""
        for name, kind in (("data", Images), ("unlabelled", Images), ("augment", Augment)):
            if not isinstance(value := getattr(self, name), kind) and (value is not None or name != "unlabelled"):
                raise BadInput(f"{name}={value!r}: of the kind histill.data.{kind.__name__}")
        for name in ("epochs", "batch_size", "accumulate", "image_size", "seed", "views", "patience"):
            whole = isinstance(value := getattr(self, name), int | np.integer) and not isinstance(value, bool)
            if not whole and (value is not None or name not in ("views", "patience")):
                raise BadInput(f"{name}={value!r}: a whole number")
        for name in ("clip", "ema"):
            if (value := getattr(self, name)) is not None and not isinstance(value, int | float | np.floating):
                raise BadInput(f"{name}={value!r}: a number")
        for name, example in (
            ("student", "functools.partial(Network, classes=2)"),
            ("objective", "(student, teacher, batch) -> {name: (weight, loss)}"),
            ("optimizer", "functools.partial(torch.optim.Adam, lr=1e-3)"),
            ("schedule", "histill.schedules.cosine(epochs)"),
        ):
            if not callable(value := getattr(self, name)):
                raise BadInput(f"{name}={value!r}: what can be called, such as {example}")


def recipe(function: Callable[P, Experiment]) -> Callable[P, Experiment]:
    """Mark a function as a recipe: its experiments carry its name, its source and the arguments they were made with.

    Random numbers drawn inside (the weights of an objective) follow its ``seed``.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Experiment:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__module__}.{function.__name__}: {error}") from None
        bound.apply_defaults()
        torch.manual_seed(int(bound.arguments.get("seed", 0)))
        experiment = function(*args, **kwargs)
        record = {
            "name": recipe_name(function),
            "arguments": {name: plain(value) for name, value in bound.arguments.items()},
            "source": _source(function),
        }
        return replace(experiment, recipe=record)

    return wrapper


def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except OSError:  # typed at a prompt
        return ""


def recipe_name(function: Callable[..., Any]) -> str:
    """``dsnet.student`` for one of ours, ``/path/file.py:function`` for a user's."""
    module = function.__module__
    if module.startswith("histill.recipes."):
        return f"{module.removeprefix('histill.recipes.').replace('_', '-')}.{function.__name__}"
    return f"{Path(inspect.getfile(function)).resolve()}:{function.__name__}"


def load_recipe(name: str) -> tuple[ModuleType, str]:
    """The module of a recipe, and the part that the name asks for (empty: none).

    Args:
        name: ``dsnet``, ``dsnet.student`` or ``file.py:function``. A file is run as Python: it is the user's own code.

    Raises:
        BadInput: no such recipe or function; the line lists what there is.
    """
    if ".py:" in name or name.endswith(".py"):
        file, _, part = name.rpartition(".py")
        module, part = load_file(Path(file + ".py").resolve()), part.removeprefix(":")
        if part and not callable(getattr(module, part, None)):
            raise BadInput(f"{file}.py: no function {part!r} in it")
        return module, part
    stem, _, part = name.partition(".")
    there = recipes()
    if stem not in there:
        raise BadInput(f"no recipe {stem!r}; there are {', '.join(there)}, or give file.py:function")
    module = importlib.import_module(f"histill.recipes.{stem.replace('-', '_')}")
    if part and part not in parts(module):
        raise BadInput(f"recipe {stem} has no part {part!r}; it has {', '.join(parts(module))}")
    return module, part


def parts(module: ModuleType) -> list[str]:
    """The recipes in a module."""
    return [n for n in PARTS if callable(getattr(module, n, None))]


PARTS = ("teacher", "student", "pretrain", "supervised", "finetune")
"""The functions of a recipe's file that ``histill train NAME.PART`` runs."""


def recipes() -> list[str]:
    """The names of the recipes that come with Histill."""
    return _modules("recipes")


def studies() -> list[str]:
    """The names of the studies that come with Histill."""
    return _modules("studies")


def _modules(room: str) -> list[str]:
    paths = (Path(__file__).parent / room).glob("*.py")
    return sorted(p.stem.replace("_", "-") for p in paths if not p.stem.startswith("_"))


def load_study(name: str) -> Callable[..., str]:
    """A study of ours by name, or a user's as ``file.py:function``.

    Raises:
        BadInput: no such study; the line lists what there is.
    """
    if ".py" in name:
        module, part = load_recipe(name)
    elif name in studies():
        module, part = importlib.import_module(f"histill.studies.{name.replace('-', '_')}"), "study"
    else:
        raise BadInput(f"no study {name!r}; there are {', '.join(studies())}, or give file.py:function")
    if not callable(getattr(module, part, None)):
        raise BadInput(f"{name}: no function {part!r} in it")
    return getattr(module, part)  # type: ignore[no-any-return]


@functools.cache
def load_file(path: Path) -> ModuleType:
    """Run a user's Python file once and return it as a module.

    Raises:
        BadInput: no such file, or an error in it.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"histill_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"{path} does not run: {type(error).__name__}: {error}") from error
    return module


def plain(value: Any) -> Any:
    """An argument as run.json keeps it."""
    if isinstance(value, Images):
        return {"images": str(value.root), "hash": value.hash, "split_hash": value.split_hash}
    if isinstance(value, os.PathLike):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    known = getattr(value, "path", None) or getattr(value, "key", None)
    if isinstance(known, str | os.PathLike):
        return str(known)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
