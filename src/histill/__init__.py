"""Distil large medical-image models into small ones that run where patients are, and prove what was gained and lost.

The names below are the public Python interface; each is imported when it is first used, so that ``import histill``
and ``histill --help`` are quick. For research use only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histill import data, deploy, evaluate, losses, models, recipes, schedules, slides, teachers, types
    from histill.comparison import compare
    from histill.data import Augment, Images, read_images, read_masks, read_unlabelled, split
    from histill.deploy import export, predict
    from histill.experiment import Experiment, recipe
    from histill.loop import train
    from histill.run import Run

__version__ = "0.1.0"

_HOMES = {
    "Augment": "data",
    "Images": "data",
    "read_images": "data",
    "read_masks": "data",
    "read_unlabelled": "data",
    "split": "data",
    "Experiment": "experiment",
    "recipe": "experiment",
    "train": "loop",
    "Run": "run",
    "compare": "comparison",
    "export": "deploy",
    "predict": "deploy",
}
_ROOMS = ("data", "deploy", "evaluate", "losses", "models", "recipes", "schedules", "slides", "teachers", "types")

__all__ = [
    "Augment",
    "Experiment",
    "Images",
    "Run",
    "__version__",
    "compare",
    "data",
    "deploy",
    "evaluate",
    "export",
    "losses",
    "models",
    "predict",
    "read_images",
    "read_masks",
    "read_unlabelled",
    "recipe",
    "recipes",
    "schedules",
    "slides",
    "split",
    "teachers",
    "train",
    "types",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"histill.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"histill.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'histill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
