"""The command line: exit statuses, and one line for whatever goes wrong. The commands are in `histill.commands`."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

import cyclopts

from histill.commands import app
from histill.commands import data as _data
from histill.commands import doctor as _doctor
from histill.commands import models as _models
from histill.commands import slides as _slides
from histill.errors import HistillError, out_of_memory, printable

__all__ = ["main"]

_REGISTERED = (_data, _doctor, _models, _slides)
Interrupted = 130
_BAD_PATH = (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


VERBS = {
    "distill": "Teacher, student alone, distilled student; comparison, export, report.",
    "train": "Run one experiment, such as dsnet.teacher.",
    "study": "A paper's whole set of experiments, beside its own numbers.",
    "cache": "Ask a teacher about all views before training, on one machine or many.",
}
"""Commands whose flags are those of the recipe or the study that is named."""

for _verb, _what in VERBS.items():
    app.command(cyclopts.App(name=_verb, help=_what))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 it failed, 2 bad input or arguments, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal's alphabet lacks is escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(tokens: list[str]) -> int:
    """Run a command and return its exit status; what goes wrong is one line on stderr."""
    try:
        if tokens and tokens[0] in VERBS:
            from histill.verbs import recipe_command

            verb, command = recipe_command(tokens, VERBS[tokens[0]])
            del app[verb]
            app.command(command, name=verb)
        app(tokens, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        return _fail(2, " ".join(str(error).split()), "see histill --help")
    except HistillError as error:
        return _fail(error.status, str(error))
    except KeyboardInterrupt:
        return _fail(Interrupted, "interrupted; what was done is kept, go on with --resume where a run was under way")
    except OSError as error:
        where = f"{error.strerror}: {error.filename or ''}" if error.strerror else f"{type(error).__name__}: {error}"
        return _fail(2 if isinstance(error, _BAD_PATH) else 1, where.rstrip(": "))
    except Exception as error:  # noqa: BLE001 - whatever it is, the user sees one line
        kind = type(error).__name__
        if out_of_memory(error):
            return _fail(1, "out of memory; use a smaller --batch-size or --image-size")
        return _fail(
            1, f"{kind}: {(str(error).strip().splitlines() or [''])[0]}", "unforeseen; HISTILL_DEBUG=1 shows where"
        )
    return 0


def _fail(status: int, line: str, hint: str = "") -> int:
    if os.environ.get("HISTILL_DEBUG"):
        traceback.print_exc()
    with suppress(OSError):  # nobody reads it
        print(f"histill: {' '.join(printable(line).split())}{f' ({hint})' if hint else ''}", file=sys.stderr)  # noqa: T201
    return status
