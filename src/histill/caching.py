"""The command ``histill cache``: a part's teacher is asked before the part trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from histill.commands import show
from histill.errors import BadInput
from histill.flags import LACKING, SPLIT, WORDS, command_of, common, merged, signature_flags

__all__ = ["cache_command"]


def cache_command(name: str) -> Any:
    """The command for one part of a recipe, with the flags of its training that decide what the teacher is shown."""
    from histill.experiment import load_recipe, parts
    from histill.verbs import takes_data

    module, part = load_recipe(name)
    if not part:
        raise BadInput(f"histill cache asks the teacher of one part: {', '.join(f'{name}.{p}' for p in parts(module))}")
    function = getattr(module, part)
    labelled = takes_data(function)
    extra = {
        "code": (Path | None, None, "the Python file of a teacher's network that is not Histill's."),
        "ray": (str | None, None, "a Ray cluster that shares the work: HOST:PORT, or auto."),
        "threads": (int | None, None, "with --ray the cores of each worker (default: 1)."),
    }
    flags = merged(
        common("device", "precision", *(("data", *SPLIT) if labelled else ())),
        signature_flags(function, *(() if labelled else (WORDS,))),
        extra,
    )
    if labelled and "teacher" in flags:
        flags["weighting"] = (Literal["mean", "confidence"], "mean", "of several teachers, as for histill train.")
    doc = f"Ask the teacher of {name} about all views before it trains; give the arguments of histill train."
    return command_of(doc, flags, lambda values: _cache(function, flags, values))


def _cache(function: Callable[..., Any], flags: Any, values: dict[str, Any]) -> None:
    from histill.fill import fill
    from histill.held import filled
    from histill.verbs import experiment_of, takes_data

    values = filled(flags, values)
    needed = "data" if takes_data(function) else "unlabelled"
    if values[needed] is None:
        raise BadInput(LACKING[needed])
    experiment, own = experiment_of(function, values)
    show(fill(experiment, device=own["device"], precision=own["precision"], ray=own["ray"], threads=own["threads"]))
