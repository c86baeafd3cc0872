"""Commands by subject; each is thin, and heavy imports happen inside."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import cyclopts

from histill.errors import printable

__all__ = ["Count", "Seconds", "app", "data_app", "show"]

app = cyclopts.App(
    name="histill",
    help="Distil large medical-image models into small ones, and prove what was gained and lost.\n\n"
    "For research use only. Not for diagnosis.",
    version_flags=["--version"],
    default_parameter=cyclopts.Parameter(negative_iterable=(), consume_multiple=True),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
data_app = cyclopts.App(
    name="data", help="Look at images, fetch published data sets, make phantom tissue.", result_action="return_value"
)
app.command(data_app)

Count = Annotated[int, cyclopts.Parameter(validator=cyclopts.validators.Number(gte=1))]
Seconds = Annotated[float, cyclopts.Parameter(validator=cyclopts.validators.Number(gt=0))]


def show(value: object) -> None:
    """What a command was asked for, on stdout."""
    try:
        print(printable(str(value)), flush=True)  # noqa: T201
    except BrokenPipeError:  # who read it has enough, as `head` has; the interpreter must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
