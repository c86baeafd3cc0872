"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["BadInput", "Failed", "HistillError", "out_of_memory", "printable", "require"]

_CONTROL = {
    c: ascii(chr(c))[1:-1]
    for c in (
        *range(32),
        *range(127, 160),
        *range(0x2028, 0x202F),  # ends of lines, and what turns the direction of the text behind it
        *range(0x2066, 0x206A),
        *range(0xD800, 0xE000),
    )
    if c not in (9, 10)
}


class HistillError(Exception):
    """Base of the errors that the command line prints as one line; `status` is its exit status."""

    status = 1

    def __str__(self) -> str:
        return printable(super().__str__()).replace("\n", " ").replace("\t", " ")


class BadInput(HistillError, ValueError):
    """The input or the arguments are wrong (exit status 2)."""

    status = 2


class Failed(HistillError, RuntimeError):
    """The work failed although its input was in order (exit status 1)."""


_ALLOCATORS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a device's, as torch says it, or the machine's, as Python, torch or a runtime does."""
    if isinstance(error, MemoryError):
        return True
    kind, text = type(error), str(error)
    if kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("torch"):  # torch is not imported for this
        return True
    if kind.__module__.startswith("onnxruntime"):  # whose errors share no base class
        return "Failed to allocate memory" in text or "bad_alloc" in text
    return isinstance(error, RuntimeError) and any(sign in text for sign in _ALLOCATORS)


def printable(text: str) -> str:
    """``text`` without what a terminal would obey or a stream refuse: names in it may be a stranger's."""
    return text.translate(_CONTROL)


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of Histill brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == module.split(".")[0]:
            raise BadInput(f"this needs {module.split('.')[0]}: pip install 'histill[{extra}]'") from None
        raise
