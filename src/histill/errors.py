"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["BadInput", "Failed", "HistillError", "require"]


class HistillError(Exception):
    """Base of the errors that the command line prints as one line; `status` is its exit status."""

    status = 1


class BadInput(HistillError, ValueError):
    """The input or the arguments are wrong (exit status 2)."""

    status = 2


class Failed(HistillError, RuntimeError):
    """The work failed although its input was in order (exit status 1)."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of Histill brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == module.split(".")[0]:
            raise BadInput(f"this needs {module.split('.')[0]}: pip install 'histill[{extra}]'") from None
        raise
