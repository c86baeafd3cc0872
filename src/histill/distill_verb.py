"""``histill distill``: a teacher and its student, or a pretraining and what is fine-tuned from it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from histill.commands import show
from histill.errors import BadInput
from histill.files import write_json
from histill.flags import LACKING, SPLIT, WORDS, command_of, common, merged, read_data, signature_flags
from histill.given_slides import cut_in_place, cut_unlabelled, judge_on_slides
from histill.held import agreed, check_free, check_trains, filled, given_back, read_record
from histill.progress import say

__all__ = ["distill_command", "summary_lines"]


def _of_teacher(shared: str, help_: str, default: Any) -> str:
    """The help of a flag of the teacher, with its default; ``shared``: the student's flag that is taken before it."""
    else_ = "" if default is None else f"{default}"
    if shared:
        student = f"--{shared.replace('_', '-')} if given"
        return f"the teacher's (default: {student}{f', else {else_}' if else_ else ''})."
    return f"the teacher's; {_with_default(help_, default)}"


def _with_default(help_: str, default: Any) -> str:
    """A help that says the default, where there is one and it does not say so already."""
    said = "" if default in (None, ()) or "(default:" in help_ else f" (default: {default})"
    return f"{help_.removesuffix('.')}{said}."


def distill_command(name: str) -> Any:
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
            _of_teacher(n if n in SHARED else "", h, default),
        )
        for n, (t, default, h) in teacher.items()
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


def _begun(recipe: str, out: Path, given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which ``out`` is begun or gone on with, its patches cut; empty where it is finished."""
    if values["resume"]:
        recorded = read_record(out, "distill.json")
        if recorded["recipe"] != recipe:
            raise BadInput(f"{out} is of {recorded['recipe']}, not of {recipe}; histill distill --resume --out {out}")
        if (out / "summary.json").is_file():
            say(f"{out} is finished; nothing to do")
            return {}
        values = agreed(given, values, recorded["arguments"])
    else:
        check_free(out)
    cut_in_place(out, values)
    return values


def _note(out: Path, recipe: str, values: dict[str, Any]) -> None:
    """Write ``distill.json``, by which ``out`` is known and gone on with."""
    from histill.experiment import plain

    arguments = {n: plain(v) for n, v in values.items() if n != "resume"}
    write_json(out / "distill.json", {"recipe": recipe, "arguments": arguments})


def _distill(name: str, student: list[str], teacher: list[str], flags: Any, values: dict[str, Any]) -> None:
    from histill.data.packed import pack
    from histill.distill import SHARED, distill, teacher_arguments
    from histill.experiment import load_recipe

    if values.get("teacher") and (idle := [n for n in values if n.startswith("teacher_") and n not in student]):
        named = ", ".join(f"--{n.replace('_', '-')}" for n in idle)
        raise BadInput(f"{named}: of a teacher that is trained here; {values['teacher']} is trained already")
    given, values = values, filled(flags, values)
    out: Path = values.pop("out")
    for name_ in SHARED:  # what was given for the student holds for its teacher, unless --teacher-... says otherwise
        if name_ in given and values.get(f"teacher_{name_}", ...) is None:
            values[f"teacher_{name_}"] = given[name_]
    if not (values := _begun(name, out, given, values)):
        return
    if values["data"] is None:
        raise BadInput(LACKING["data"])
    # What is wrong with the images or the student is found before the folder is taken and the teacher trained.
    images = read_data(values)
    student_arguments = {n: values[n] for n in student if n not in ("teacher", "unlabelled", "seed")}
    trial = load_recipe(name)[0].student(data=images, seed=values["seed"], **student_arguments)
    check_trains(trial)
    pack(images, trial.image_size, strict=trial.strict)
    _note(out, name, values)
    paths: dict[str, Any] = {n: values.get(n) and Path(values[n]) for n in ("teacher", "unlabelled", "code")}
    with given_back(out, values["resume"]):
        summary = distill(
            name,
            Path(values["data"]),
            out,
            **paths,
            **{n: values[n] for n in (*SPLIT, "seeds", "seed", "device", "precision", "resume")},
            student_arguments=student_arguments,
            teacher_arguments=teacher_arguments(teacher, values),
        )
    judge_on_slides(out, values, ("teacher", "student_alone", "student_distilled"))
    show(summary_lines(summary))
    show(f"report: {out / 'report.html'}")


def _transfer_command(name: str, module: Any) -> Any:
    finetune = signature_flags(module.finetune)
    del finetune["weights"]  # none, and the pretrained ones
    pretrain = signature_flags(module.pretrain, WORDS)
    own = {
        f"pretrain_{n}": (t | None, None, f"of the pretraining: {_with_default(h, default)}")
        for n, (t, default, h) in pretrain.items()
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
    from histill.transfer import transfer

    given, values = values, filled(flags, values)
    out: Path = values.pop("out")
    if not (values := _begun(name, out, given, values)):
        return
    if values["slides"] and values["masks"] and values["unlabelled"] is None:
        values["unlabelled"] = cut_unlabelled(out, values)
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
        _note(out, name, values)
        own = pretrain | {"seed": values["seed"]}
        pretrain_alone(name, Path(values["data"]), out, teacher=values["teacher"], arguments=own, **machine)
        say(f"{out / 'pretrained' / 'report.html'}")
        return
    check_trains(module.finetune(data=read_data(values), **{n: values[n] for n in finetune}))
    _note(out, name, values)
    with given_back(out, values["resume"]):
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
    judge_on_slides(out, values, ("student_alone", "student_distilled"))
    show(summary_lines(summary))
    show(f"report: {out / 'report.html'}")


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
