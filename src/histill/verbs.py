"""Commands that run recipes and studies: which of them, and ``histill train`` and ``histill study`` themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from histill.commands import show
from histill.distill_verb import distill_command
from histill.errors import BadInput
from histill.flags import COMMON, LACKING, SLIDES, SPLIT, WORDS, command_of, common, merged, read_data, signature_flags
from histill.given_slides import cut_in_place, processes
from histill.held import agreed, check_free, check_trains, filled, read_record
from histill.progress import say

__all__ = ["experiment_of", "recipe_command", "takes_data"]


def recipe_command(tokens: list[str], what: str) -> tuple[str, Any]:
    """The verb and the function of the recipe that ``tokens`` name, with the recipe's own flags.

    Until one is named the help is ``what``. With ``--resume`` the recipe's name is read from ``--out`` and put into
    ``tokens``.
    """
    verb, name = tokens[0], tokens[1] if len(tokens) > 1 and not tokens[1].startswith("-") else ""
    if not name and "--resume" in tokens and (out := _option(tokens, "--out")):
        name = _recorded(verb, Path(out))
        tokens.insert(1, name)
    if not name:
        if {"--help", "-h"} & set(tokens):
            return verb, _unnamed(verb, what)
        from histill.experiment import recipes, studies

        there = studies() if verb == "study" else recipes()
        raise BadInput(f"histill {verb} needs a {_kind(verb)}: {', '.join(there)}, or file.py:function")
    if verb != "train" and processes() > 1:
        raise BadInput(f"histill {verb} is one process; of what torchrun and srun start in many there is histill train")
    from histill.caching import cache_command

    builders = {
        "train": _train_command,
        "distill": distill_command,
        "study": _study_command,
        "cache": cache_command,
    }
    return verb, builders[verb](name)


def _kind(verb: str) -> str:
    """What the verb is about."""
    return "study" if verb == "study" else "recipe"


def _unnamed(verb: str, what: str) -> Any:
    """What ``histill VERB --help`` shows before a recipe is named."""
    name = "dsnet.student" if verb in ("train", "cache") else "dsnet"
    hint = f"Name the {_kind(verb)} to see its flags: histill {verb} {name} --help"
    return command_of(f"{what}\n\n{hint}", {}, lambda values: None, _kind(verb))


def _option(tokens: list[str], name: str) -> str:
    """What follows ``name``, empty where nothing does."""
    for token, following in zip(tokens, [*tokens[1:], ""]):
        if token == name or token.startswith(f"{name}="):
            return following if token == name else token.partition("=")[2]
    return ""


def _recorded(verb: str, out: Path) -> str:
    """The recipe of what ``out`` holds."""
    if verb == "distill":
        return str(read_record(out, "distill.json")["recipe"])
    return str(read_record(out, "run.json")["recipe"]["name"])


def _train_command(name: str) -> Any:
    from histill.experiment import load_recipe, parts

    module, part = load_recipe(name)
    if not part:
        if not parts(module):
            raise BadInput(f"{name} has no recipe: no function teacher, student, pretrain or finetune")
        raise BadInput(f"histill train runs one part of {name}: {', '.join(f'{name}.{p}' for p in parts(module))}")
    function = getattr(module, part)
    extra = {
        "logger": (list[str] | None, None, "tensorboard, mlflow or wandb, beside log.csv."),
        "compile": (bool, False, "compile the network with torch.compile."),
        "code": (Path | None, None, "the Python file of a teacher's network that is not Histill's."),
    }
    if not takes_data(function):
        machine = common(*(n for n, *_ in COMMON if n not in ("data", *SPLIT)))
        flags = merged(machine, signature_flags(function, WORDS), extra)
        return command_of(f"Run one experiment: {name}.", flags, lambda values: _train(function, flags, values))
    flags = merged(common(), signature_flags(function), extra)
    if "teacher" in flags:
        flags["weighting"] = (
            Literal["mean", "confidence"],
            "mean",
            "of several teachers: the mean of their probabilities, or by each one's confidence in the image's label.",
        )
    return command_of(f"Run one experiment: {name}.", flags, lambda values: _train(function, flags, values))


def takes_data(function: Callable[..., Any]) -> bool:
    """Whether a recipe learns from images with labels or masks; one that does not takes ``--unlabelled`` alone."""
    return "data" in inspect.signature(function).parameters


def _train(function: Callable[..., Any], flags: Any, values: dict[str, Any]) -> None:
    from histill.experiment import plain
    from histill.loop import train

    given, values = values, filled(flags, values)
    out: Path = values.pop("out")
    if values["resume"]:
        recorded = read_record(out, "run.json")
        if recorded["status"] == "finished":
            say(f"{out} is finished; nothing to do")
            return
        if not recorded.get("command"):
            raise BadInput(f"{out} was not started by histill train; resume what started it, in the folder above")
        values = agreed(given, values, recorded["command"])
    else:
        check_free(out)
    cut_in_place(out, values)
    needed = "data" if takes_data(function) else "unlabelled"
    if values[needed] is None:
        raise BadInput(LACKING[needed])
    record = {n: plain(v) for n, v in values.items() if n != "resume"}
    experiment, own = experiment_of(function, values)
    check_trains(experiment)
    done = train(
        experiment,
        out,
        resume=own["resume"],
        device=own["device"],
        precision=own["precision"],
        loggers=own["logger"] or (),
        compile=own["compile"],
        command=record,
    )
    say(f"{done.path / 'report.html'}")


def experiment_of(function: Callable[..., Any], values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The recipe's experiment, and those of ``values`` that are not the recipe's own."""
    from histill.data import read_unlabelled
    from histill.distill import check_start, open_teachers

    others = (*SPLIT, *SLIDES, "data", "device", "precision", "resume", "logger", "compile", "code", "ray", "threads")
    own = {n: values.pop(n) for n in others if n in values}
    if values.get("unlabelled"):
        values["unlabelled"] = read_unlabelled(values["unlabelled"])
    if "data" in own:
        images = read_data(own | {"seed": values.get("seed", 0)})
        check_start(values.get("weights"), images)
        weighting = values.pop("weighting", "mean")
        if values.get("teacher"):
            values["teacher"] = open_teachers(values["teacher"], images, weighting=weighting, code=own["code"])
        values["data"] = images
    elif values.get("teacher"):
        values["teacher"] = values["teacher"][0] if len(values["teacher"]) == 1 else values["teacher"]
    return function(**values), own


def _study_command(name: str) -> Any:
    from histill.experiment import load_study

    function = load_study(name)
    taken = [n for n in ("device", "precision") if n in inspect.signature(function).parameters]
    flags = merged(common("data", "out", *SPLIT, *taken), signature_flags(function, {}))
    first = inspect.getdoc(function) or name

    def work(values: dict[str, Any]) -> None:
        from histill.distill import check_start

        values = {n: d for n, (_, d, _) in flags.items()} | values
        if values["data"] is None:
            raise BadInput(LACKING["data"])
        images = read_data(values)
        for start in ("weights", "teacher_weights"):
            check_start(values.get(start), images)
        values = {n: v for n, v in values.items() if n not in (*SPLIT, "data")}
        show(function(images, **values))

    return command_of(first.splitlines()[0], flags, work, "study")
