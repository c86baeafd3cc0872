"""Commands that run recipes and studies: train, distill, study."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from histill.errors import BadInput, HistillError
from histill.files import read_json, write_json
from histill.flags import COMMON, LACKING, SLIDES, SPLIT, WORDS, command_of, common, merged, read_data, signature_flags
from histill.progress import say

__all__ = ["check_finite", "experiment_of", "recipe_command", "summary_lines", "takes_data"]


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
    if verb != "train" and _processes() > 1:
        raise BadInput(f"histill {verb} is one process; of what torchrun and srun start in many there is histill train")
    from histill.caching import cache_command

    builders = {
        "train": _train_command,
        "distill": _distill_command,
        "study": _study_command,
        "cache": cache_command,
    }
    return verb, builders[verb](name)


def _processes() -> int:
    """How many ``torchrun`` or ``srun`` started together."""
    return max(int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


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
        return str(_record(out, "distill.json")["recipe"])
    return str(_record(out, "run.json")["recipe"]["name"])


def _record(out: Path, file: str) -> dict[str, Any]:
    """What ``out`` says of the run or the distillation that it holds; `BadInput` where it holds none."""
    if not (out / file).is_file():
        raise BadInput(f"--resume: {out} holds nothing to go on with (no {file} in it)")
    record = read_json(out / file)
    try:
        if file == "distill.json":
            record["recipe"], record["arguments"].items()
        else:
            record["recipe"]["name"], record["status"], (record.get("command") or {}).items()
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{out / file} is damaged; start anew in another --out") from None
    return dict(record)


def _check_free(out: Path) -> None:
    """Refuse an ``out`` that holds a run or cannot become a folder."""
    if any((out / file).exists() for file in ("distill.json", "run.json")):
        raise BadInput(f"{out} holds a run already; go on with --resume, or give another --out")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise BadInput(f"--out {out}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise BadInput(f"--out {out}: {there} cannot be written to; give another folder")


def check_finite(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"--{name.replace('_', '-')} {value}: give a finite number")


def _check_trains(experiment: Any) -> None:
    """Raise what training would raise of the network and its optimiser, before a folder is taken."""
    network = experiment.student()
    try:
        experiment.optimizer(network.parameters())
    except ValueError as error:
        raise BadInput(f"the optimiser: {error}") from None


def _cut(out: Path, values: dict[str, Any]) -> None:
    """Patches of ``--slides``, cut into ``out``, in place of ``--data`` or ``--unlabelled``."""
    if not values["slides"]:
        if values["masks"]:
            raise BadInput(f"--masks {values['masks']}: of which --slides?")
        return
    if _processes() > 1:
        raise BadInput(
            "--slides: they would be cut by every process; cut them with histill tiles before, and give --data"
        )
    replaced = "data" if values["masks"] else "unlabelled"
    made = out / "patches" / ("manifest.csv" if values["masks"] else "")
    if values.get(replaced) is not None:
        if Path(values[replaced]) == made:
            return  # it is resumed
        raise BadInput(f"--slides are cut in place of --{replaced}; give one of them")
    if replaced not in values:
        what = "labelled patches (--masks)" if replaced == "data" else "patches without labels (no --masks)"
        raise BadInput(f"this recipe takes no {what}")
    from histill.slides.training import cut_for

    given = {name: values.get(name) for name in ("masks", "slide_mpp", "patient")}
    values[replaced] = cut_for(out, values["slides"], classes=values.get("classes") or (), **given)
    if values["masks"]:  # the names were those of the slides' masks, and patches have labels
        values["classes"] = values["patient"] = None


def _cut_unlabelled(out: Path, values: dict[str, Any]) -> Path:
    """Patches to pretrain on, of the slides that are trained on: nothing is learnt from those that judge."""
    from histill.slides.cut import find_slides
    from histill.slides.training import cut_for

    frame = read_data(values).frame
    trained_on = set(frame["slide"][frame["split"] == "train"])
    slides = [path for path in find_slides(values["slides"]) if path.name in trained_on]
    return cut_for(out / "unlabelled", slides, slide_mpp=values["slide_mpp"])


def _judge_slides(out: Path, values: dict[str, Any], roles: tuple[str, ...]) -> None:
    """Whole slides of the test split, by every run of ``roles`` in ``out``."""
    if not (values["slides"] and values["masks"]):
        return
    from histill.run import Run
    from histill.slides.training import judge_slides

    home = out / "seed0" if (out / "seed0").is_dir() else out
    runs = {role: Run.open(home / role) for role in roles if (home / role / "run.json").is_file()}
    judge_slides(runs, values["slides"], out / "slides", masks=values["masks"], slide_mpp=values["slide_mpp"])
    say(f"slides: {out / 'slides'} (histill view {out / 'slides' / roles[-1]})")


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
        return command_of(f"Run one experiment: {name}.", flags, lambda values: _train(name, function, flags, values))
    flags = merged(common(), signature_flags(function), extra)
    if "teacher" in flags:
        flags["weighting"] = (
            Literal["mean", "confidence"],
            "mean",
            "of several teachers: the mean of their probabilities, or by each one's confidence in the image's label.",
        )
    return command_of(f"Run one experiment: {name}.", flags, lambda values: _train(name, function, flags, values))


def takes_data(function: Callable[..., Any]) -> bool:
    """Whether a recipe learns from images with labels or masks; one that does not takes ``--unlabelled`` alone."""
    return "data" in inspect.signature(function).parameters


def _train(name: str, function: Callable[..., Any], flags: Any, values: dict[str, Any]) -> None:
    from histill.experiment import plain
    from histill.loop import train

    given = values
    values = {n: d for n, (_, d, _) in flags.items()} | given
    out: Path = values.pop("out")
    check_finite(values)
    if values["resume"]:
        recorded = _record(out, "run.json")
        if recorded["status"] == "finished":
            say(f"{out} is finished; nothing to do")
            return
        if not recorded.get("command"):
            raise BadInput(f"{out} was not started by histill train; resume what started it, in the folder above")
        values = _agreed(given, values, recorded["command"])
    else:
        _check_free(out)
    _cut(out, values)
    needed = "data" if takes_data(function) else "unlabelled"
    if values[needed] is None:
        raise BadInput(LACKING[needed])
    record = {n: plain(v) for n, v in values.items() if n != "resume"}
    experiment, own = experiment_of(function, values)
    _check_trains(experiment)
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
    from histill.distill import open_teachers

    others = (*SPLIT, *SLIDES, "data", "device", "precision", "resume", "logger", "compile", "code", "ray", "threads")
    own = {n: values.pop(n) for n in others if n in values}
    if values.get("unlabelled"):
        values["unlabelled"] = read_unlabelled(values["unlabelled"])
    if "data" in own:
        images = read_data(own | {"seed": values.get("seed", 0)})
        weighting = values.pop("weighting", "mean")
        if values.get("teacher"):
            values["teacher"] = open_teachers(values["teacher"], images, weighting=weighting, code=own["code"])
        values["data"] = images
    elif values.get("teacher"):
        values["teacher"] = values["teacher"][0] if len(values["teacher"]) == 1 else values["teacher"]
    return function(**values), own


def _agreed(given: dict[str, Any], values: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded arguments; one given beside them must agree."""
    from histill.experiment import plain

    for name, value in given.items():
        said = plain(value)
        if name in recorded and said != recorded[name]:
            raise BadInput(
                f"--{name.replace('_', '-')} {said} differs from the run's {recorded[name]}; --resume needs --out alone"
            )
    return values | {n: v for n, v in recorded.items() if n in values} | {"resume": True}


def _distill_command(name: str) -> Any:
    from histill.distill import ALWAYS_SHARED, SHARED
    from histill.experiment import load_recipe, parts
    from histill.transfer import transfers

    module, part = load_recipe(name)
    if part not in ("", "student"):
        raise BadInput(f"histill distill takes a whole recipe, not {name}; histill train runs one part")
    if transfers(module):
        return _transfer_command(name, module)
    if not callable(getattr(module, "student", None)):
        raise BadInput(f"{name} has no function 'student'")
    student = signature_flags(module.student)
    if missing := [n for n in ("teacher", "seed") if n not in student]:
        raise BadInput(f"{name}: its function 'student' needs the argument {' and '.join(missing)}")
    teacher = signature_flags(module.teacher) if "teacher" in parts(module) else {}
    own = {
        f"teacher_{n}": (
            t | None,
            None,
            f"the teacher's; {h}" if n not in SHARED else f"the teacher's (default: --{n.replace('_', '-')} if given).",
        )
        for n, (t, _, h) in teacher.items()
        if n not in ("seed", *ALWAYS_SHARED)
    }
    extra = {
        "seeds": (int, 1, "how many times, with seeds that follow --seed; the split stays."),
        "code": (Path | None, None, "the Python file of a teacher's network that is not Histill's."),
    }
    flags = merged(
        common(),
        extra,
        student,
        {"teacher": (Path | None, None, "a trained teacher's run; without it one is trained.")},
        own,
    )
    doc = f"Teacher, student alone, distilled student; comparison, export, report. Recipe: {name}."
    return command_of(doc, flags, lambda values: _distill(name, list(student), list(teacher), flags, values))


def _distill(name: str, student: list[str], teacher: list[str], flags: Any, values: dict[str, Any]) -> None:
    from histill.data.packed import pack
    from histill.distill import SHARED, distill, teacher_arguments
    from histill.experiment import load_recipe, plain

    given = values
    values = {n: d for n, (_, d, _) in flags.items()} | given
    out: Path = values.pop("out")
    check_finite(values)
    for name_ in SHARED:  # what was given for the student holds for its teacher, unless --teacher-... says otherwise
        if name_ in given and values.get(f"teacher_{name_}", ...) is None:
            values[f"teacher_{name_}"] = given[name_]
    if values["resume"]:
        recorded = _record(out, "distill.json")
        if (out / "summary.json").is_file():
            say(f"{out} is finished; nothing to do")
            return
        values = _agreed(given, values, recorded["arguments"])
    else:
        _check_free(out)
    _cut(out, values)
    if values["data"] is None:
        raise BadInput(LACKING["data"])
    record = {n: plain(v) for n, v in values.items() if n != "resume"}
    # What is wrong with the images or the student is found before the folder is taken and the teacher trained.
    images = read_data(values)
    student_arguments = {n: values[n] for n in student if n not in ("teacher", "unlabelled", "seed")}
    trial = load_recipe(name)[0].student(data=images, seed=values["seed"], **student_arguments)
    _check_trains(trial)
    pack(images, trial.image_size, strict=trial.strict)
    write_json(out / "distill.json", {"recipe": name, "arguments": record})
    paths: dict[str, Any] = {n: values.get(n) and Path(values[n]) for n in ("teacher", "unlabelled", "code")}
    with _given_back(out, values["resume"]):
        summary = distill(
            name,
            Path(values["data"]),
            out,
            **paths,
            **{n: values[n] for n in (*SPLIT, "seeds", "seed", "device", "precision", "resume")},
            student_arguments=student_arguments,
            teacher_arguments=teacher_arguments(teacher, values),
        )
    _judge_slides(out, values, ("teacher", "student_alone", "student_distilled"))
    print(summary_lines(summary))  # noqa: T201
    print(f"report: {out / 'report.html'}")  # noqa: T201


@contextmanager
def _given_back(out: Path, resume: bool) -> Iterator[None]:
    """Where nothing was begun when something went wrong, the folder is free again."""
    try:
        yield
    except HistillError:
        if not resume and not any(out.rglob("run.json")):
            for left in ("distill.json", ".lock"):
                (out / left).unlink(missing_ok=True)
            with suppress(OSError):
                out.rmdir()
        raise


def _transfer_command(name: str, module: Any) -> Any:
    finetune = signature_flags(module.finetune)
    del finetune["weights"]  # none, and the pretrained ones
    pretrain = signature_flags(module.pretrain, WORDS)
    own = {
        f"pretrain_{n}": (t | None, None, f"of the pretraining: {h}")
        for n, (t, _, h) in pretrain.items()
        if n not in ("unlabelled", "teacher", "seed", *_PRETRAINED)
    }
    extra = {
        "seeds": (int, 1, "how many fine-tunings, with seeds that follow --seed; the split stays."),
        "teacher": (list[str] | None, None, pretrain["teacher"][2]),
        "unlabelled": (Path | None, None, pretrain["unlabelled"][2]),
    }
    flags = merged(common(), extra, finetune, own)
    doc = f"Pretrain on unlabelled images, fine-tune from there and from random weights, compare. Recipe: {name}."
    return command_of(doc, flags, lambda values: _transfer(name, list(finetune), module, flags, values))


_PRETRAINED = ("network", "strict")
"""Arguments that pretraining and fine-tuning share."""


def _transfer(name: str, finetune: list[str], module: Any, flags: Any, values: dict[str, Any]) -> None:
    from histill.experiment import plain
    from histill.transfer import transfer

    given = values
    values = {n: d for n, (_, d, _) in flags.items()} | given
    out: Path = values.pop("out")
    check_finite(values)
    if values["resume"]:
        recorded = _record(out, "distill.json")
        if (out / "summary.json").is_file():
            say(f"{out} is finished; nothing to do")
            return
        values = _agreed(given, values, recorded["arguments"])
    else:
        _check_free(out)
    _cut(out, values)
    if values["slides"] and values["masks"] and values["unlabelled"] is None:
        values["unlabelled"] = _cut_unlabelled(out, values)
    alone = values["unlabelled"] is None and values["data"] is not None and _only_images(Path(values["data"]))
    for needed in ("data", "unlabelled"):
        if values[needed] is None and not alone:
            raise BadInput(LACKING[needed])
    if not values["teacher"]:
        raise BadInput(f"--teacher: {name} learns from one; see histill distill {name} --help")
    known = set(inspect.signature(module.pretrain).parameters)
    pretrain = {
        n.removeprefix("pretrain_"): v for n, v in values.items() if n.startswith("pretrain_") and v is not None
    }
    pretrain |= {n: values[n] for n in _PRETRAINED if n in known}
    if alone:
        from histill.transfer import pretrain_alone

        machine = {n: values[n] for n in ("device", "precision", "resume")}
        say(f"{values['data']} has no labels: the backbone is pretrained, and there is nothing to judge it by")
        record = {n: plain(v) for n, v in values.items() if n != "resume"}
        write_json(out / "distill.json", {"recipe": name, "arguments": record})
        own = pretrain | {"seed": values["seed"]}
        pretrain_alone(name, Path(values["data"]), out, teacher=values["teacher"], arguments=own, **machine)
        say(f"{out / 'pretrained' / 'report.html'}")
        return
    _check_trains(module.finetune(data=read_data(values), **{n: values[n] for n in finetune}))
    write_json(
        out / "distill.json", {"recipe": name, "arguments": {n: plain(v) for n, v in values.items() if n != "resume"}}
    )
    with _given_back(out, values["resume"]):
        summary = transfer(
            name,
            Path(values["data"]),
            out,
            teacher=values["teacher"],
            unlabelled=Path(values["unlabelled"]),
            reading={n: values[n] for n in SPLIT if n != "split_seed"},
            **{n: values[n] for n in ("split_seed", "seeds", "seed", "device", "precision", "resume")},
            finetune_arguments={n: values[n] for n in finetune if n != "seed"},
            pretrain_arguments=pretrain,
        )
    _judge_slides(out, values, ("student_alone", "student_distilled"))
    print(summary_lines(summary))  # noqa: T201
    print(f"report: {out / 'report.html'}")  # noqa: T201


def _only_images(folder: Path) -> bool:
    """Whether ``folder`` holds images and no folders: nothing says what they are."""
    from histill.data.decode import EXTENSIONS

    if not folder.is_dir():
        return False
    below = [p for p in folder.iterdir() if not p.name.startswith(".")]
    return any(p.suffix.lower() in EXTENSIONS for p in below) and not any(p.is_dir() for p in below)


def summary_lines(summary: dict[str, Any]) -> str:
    """The test figures for the terminal."""
    from histill.evaluate.report import shown, shown_gain

    test = summary["test"]
    wanted = ("accuracy", "balanced_accuracy", "auroc", "miou", "mdice", "pixel_accuracy")
    names = [n for n in wanted if n in test["student_distilled"]]
    lines = [f"{'test':20}" + "".join(f"{n.replace('_', ' '):32}" for n in names)]
    for role in ("teacher", "student_alone", "student_distilled"):
        if found := test.get(role):
            lines.append(f"{role.replace('_', ' '):20}" + "".join(f"{shown(n, found[n]):32}" for n in names))
    lines.append(f"{'gain':20}" + "".join(f"{shown_gain(n, test['gain'][n]):32}" for n in names))
    return "\n".join(line.rstrip() for line in lines)


def _study_command(name: str) -> Any:
    from histill.experiment import load_study

    function = load_study(name)
    taken = [n for n in ("device", "precision") if n in inspect.signature(function).parameters]
    flags = merged(common("data", "out", *SPLIT, *taken), signature_flags(function, {}))
    first = inspect.getdoc(function) or name

    def work(values: dict[str, Any]) -> None:
        values = {n: d for n, (_, d, _) in flags.items()} | values
        if values["data"] is None:
            raise BadInput(LACKING["data"])
        images = read_data(values)
        values = {n: v for n, v in values.items() if n not in (*SPLIT, "data")}
        print(function(images, **values))  # noqa: T201

    return command_of(first.splitlines()[0], flags, work, "study")
