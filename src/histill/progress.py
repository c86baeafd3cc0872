"""One way to say how far a thing is: a bar with rate and time left, or a line now and then without a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from histill.errors import printable

__all__ = ["Bar", "notice", "progress", "say"]

_REST = 48  # characters that bar, count, rate with its unit and time left take
_LEAST = 38  # the same without the unit
_EVERY_S = 20.0


def say(line: str) -> None:
    """A line for people, on stderr; of several processes that ``torchrun`` or ``srun`` started the first speaks."""
    if _first_process():
        with suppress(OSError):  # a terminal that is gone, a pipe that nobody reads, a log's full disk: work goes on
            print(printable(line), file=sys.stderr, flush=True)  # noqa: T201


def notice(line: str) -> None:
    """Something the user should know and need not act on."""
    say(f"note: {line}")


def _first_process() -> bool:
    own = "SLURM_PROCID" if "SLURM_STEP_NUM_TASKS" in os.environ else ""
    return os.environ.get("RANK", os.environ.get(own, "0")) == "0"


class _Name(TextColumn):
    """What is being done, cut where the rest would not fit on the line."""

    def __init__(self, width: int) -> None:
        super().__init__("{task.description}", markup=False)  # a name may look like rich's markup
        self._width = width

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.truncate(max(10, self._width - _LEAST), overflow="ellipsis")
        return text


class _Rate(ProgressColumn):
    """On one line: beside a long name on a narrow terminal the unit is left out."""

    def __init__(self, width: int) -> None:
        super().__init__(Column(no_wrap=True))
        self._width = width

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = f" {task.fields['unit']}" if len(task.description) + _REST <= self._width else ""
        return Text(f"{speed:,.1f}{unit}/s" if speed else "", style="cyan")


class Bar:
    """Counts what was done; `advance` is cheap enough to call for every batch."""

    def __init__(self, what: str, total: int, unit: str, done: int, bar: Progress | None) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._bar = bar
        self._task = bar.add_task(printable(what), total=total, completed=done, unit=unit) if bar else None
        self._before = self._done = done
        self._start = self._said = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Say that ``count`` more are done; ``note`` stands beside the name."""
        self._done += count
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=count, description=printable(f"{self.what} {note}".rstrip()))
        elif (now := time.monotonic()) - self._said > _EVERY_S:
            self._said = now
            rate = (self._done - self._before) / (now - self._start)
            left = (self.total - self._done) / rate
            say(f"{self.what} {note} {self._done}/{self.total} {rate:,.1f} {self.unit}/s, {left:,.0f} s left")


@contextmanager
def progress(what: str, total: int, unit: str = "images", *, done: int = 0) -> Iterator[Bar]:
    """A bar on a terminal, otherwise a line every 20 s; silent with ``HISTILL_QUIET=1``.

    ``done`` were done before, and count for neither rate nor time left.
    """
    console = Console(stderr=True)
    if os.environ.get("HISTILL_QUIET") or not _first_process():
        yield Bar(what, total, unit, done, Progress(disable=True))
    elif console.is_terminal:
        columns = (
            _Name(console.width),
            BarColumn(),  # the one that shrinks
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            _Rate(console.width),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield Bar(what, total, unit, done, bar)
    else:
        yield Bar(what, total, unit, done, None)
