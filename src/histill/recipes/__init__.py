"""One file per paper: its recipes (keyword arguments in, `Experiment` out) and its study."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "baselines",
    "dsnet",
    "foundation",
    "kd_convnext",
    "mac_resnet",
    "methods",
    "multi_exit",
    "rckd",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"histill.recipes.{name}")
    raise AttributeError(f"module 'histill.recipes' has no attribute {name!r}")
