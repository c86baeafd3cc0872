"""The main job: teacher, student alone, distilled student; then comparison, export, timing and one page."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from histill.data.images import Images, few, read_images, read_unlabelled
from histill.data.masks import has_masks, read_masks
from histill.data.packed import pack
from histill.data.splits import split
from histill.deploy.deliver import deliver
from histill.errors import BadInput
from histill.evaluate import figures
from histill.evaluate.attention import looked_at
from histill.evaluate.finish import calibrating, class_rows, counts, gallery_of, predictions, scores, settings, tempered
from histill.evaluate.intervals import figures_over_seeds, figures_with_intervals, paired_gain
from histill.evaluate.metrics import METRICS, OWN_METRICS, Scores, confusion, reliability, roc_curve
from histill.evaluate.predict import predict_rows
from histill.evaluate.report import Picture, distill_report
from histill.experiment import Experiment, load_recipe, parts
from histill.files import locked, sweep, write_json
from histill.loop import train
from histill.progress import notice, say
from histill.run import Run
from histill.teachers import Ensemble, as_teacher

__all__ = ["check_start", "check_unseen", "distill", "open_teachers", "read_parts", "teacher_arguments"]

ROLES = ("teacher", "student_alone", "student_distilled")
_TITLES = {"teacher": "teacher", "student_alone": "student alone", "student_distilled": "distilled"}
SHARED = ("image_size", "epochs", "batch_size", "schedule", "augment")
"""Arguments that, given for the student, hold for its teacher unless ``teacher_...`` says otherwise."""

ALWAYS_SHARED = ("positive", "strict")
_SMALL = 32  # pixels of a pack that is made to know pictures by


Target = Literal["auto", "labels", "masks", "instances"]


def read_parts(
    data: Path,
    *,
    val: float,
    test: float,
    seed: int,
    patient: str | None,
    target: Target = "auto",
    classes: Sequence[str] | None = None,
) -> Images:
    """Read images with labels or with masks, and complete their split.

    ``target`` says which; ``auto`` is masks in a folder of ``images/`` and ``masks/`` or a manifest without labels.
    ``classes`` names what the masks hold.
    """
    if target == "labels" or (target == "auto" and not has_masks(data)):
        if classes:
            raise BadInput(f"--classes {' '.join(classes)}: they name what masks hold, and {data} has labels")
        images = read_images(data, patient=patient)
    else:
        kinds: dict[str, Any] = {"auto": "auto", "masks": "classes", "instances": "instances"}
        images = read_masks(data, kind=kinds[target], classes=tuple(classes or ()), patient=patient)
    return split(images, val=val, test=test, seed=seed)


def distill(
    recipe: str,
    data: Path,
    out: Path,
    *,
    teacher: Path | None = None,
    unlabelled: Path | None = None,
    seeds: int = 1,
    seed: int = 0,
    split_seed: int | None = None,
    val: float = 0.15,
    test: float = 0.15,
    patient: str | None = None,
    target: Target = "auto",
    classes: Sequence[str] | None = None,
    device: str = "auto",
    precision: str = "auto",
    resume: bool = False,
    code: Path | None = None,
    student_arguments: dict[str, Any] | None = None,
    teacher_arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a teacher (or take one), a student alone and the same student distilled, and say what it bought.

    The split is drawn once, with ``split_seed`` (default: ``seed``); the seeds that follow change initialisation, order
    and views, of teacher and students alike. Student alone and distilled student have the same views, schedule, epochs
    and seed.

    Returns:
        What ``summary.json`` holds.

    Raises:
        BadInput: see `histill.loop.train`; also a folder that holds another distillation.
    """
    module, part = load_recipe(recipe)
    if part not in ("", "student"):
        raise BadInput(f"histill distill takes a whole recipe, not {recipe}; histill train runs one part")
    if not callable(getattr(module, "student", None)):
        raise BadInput(f"{recipe} has no function 'student'")
    if teacher is None and "teacher" not in parts(module):
        raise BadInput(f"{recipe} has no function 'teacher'; give one with --teacher RUN")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("histill distill is one process; start histill train with torchrun, a part at a time")
    if seeds < 1:
        raise BadInput(f"--seeds {seeds}: at least 1")
    with locked(out):
        sweep(out)
        dealt = seed if split_seed is None else split_seed
        images = read_parts(data, val=val, test=test, seed=dealt, patient=patient, target=target, classes=classes)
        if images.masks:
            raise BadInput(
                f"{data} has masks, and {recipe} learns labels; give --target labels, or take the recipe rckd"
            )
        for line in images.notices:
            notice(line)
        if not images.rows("test"):
            raise BadInput("no test images: nothing could be proven; give --test a share above 0")
        more = None if unlabelled is None else read_unlabelled(unlabelled)
        given = None if teacher is None else Run.open(teacher, code=code)
        if given is not None:
            check_unseen(given, images)
        for arguments in (student_arguments, teacher_arguments):
            check_start((arguments or {}).get("weights"), images)
        machine: dict[str, Any] = {"device": device, "precision": precision, "resume": resume}
        runs: list[dict[str, Run]] = []
        for number in range(seeds):
            home = out / f"seed{number}" if seeds > 1 else out
            own = {"data": images, "seed": seed + number}
            learner = own | (student_arguments or {})
            lonely = _experiment(module, "student", learner, {"teacher": None})  # a wrong argument is found at once
            if given is None:
                made = _experiment(module, "teacher", own, teacher_arguments or {})
                taught = train(made, home / "teacher", **machine)
            else:
                taught = given
            alone = train(lonely, home / "student_alone", **machine)
            if taught.info["data"]["split_hash"] == images.split_hash:
                for line in _worse(_validation(taught), _validation(alone)):
                    notice(line)
            extra = {"teacher": taught, **({} if more is None else {"unlabelled": more})}
            distilled = train(_experiment(module, "student", learner, extra), home / "student_distilled", **machine)
            runs.append(dict(zip(ROLES, (taught, alone, distilled))))
        return _prove(recipe, out, images, runs)


def _experiment(module: Any, part: str, *arguments: dict[str, Any]) -> Experiment:
    function: Callable[..., Experiment] = getattr(module, part)
    merged: dict[str, Any] = {}
    for some in arguments:
        merged |= some
    known = inspect.signature(function).parameters
    if foreign := [name for name in merged if name not in known]:
        raise BadInput(f"{part} of this recipe does not take {', '.join(foreign)}")
    return function(**merged)


def teacher_arguments(teacher: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    """The teacher's arguments among those of a distillation: ``teacher_lr`` and the like, and what is always shared."""
    own = {n.removeprefix("teacher_"): v for n, v in values.items() if n.startswith("teacher_") and v is not None}
    return own | {n: values[n] for n in ALWAYS_SHARED if n in teacher and n in values}


def _worse(teacher: float | None, alone: float | None) -> list[str]:
    """What to say where the teacher knows no more than the student does by itself (balanced accuracies)."""
    if teacher is None or alone is None or teacher >= alone:
        return []
    return [
        f"The teacher is worse than the student alone on validation (balanced accuracy {teacher:.3f} and {alone:.3f}); "
        "train it longer, start it from pretrained weights or take another."
    ]


def _validation(run: Run) -> float | None:
    return run.metrics.get("val", {}).get("balanced_accuracy", {}).get("value")  # type: ignore[no-any-return]


def _prove(recipe: str, out: Path, images: Images, runs: list[dict[str, Run]]) -> dict[str, Any]:
    """Compare, export, time, and write ``summary.json`` and ``report.html``."""
    first = runs[0]
    positive = first["student_alone"].info["positive"]
    tables = [{role: _table(run, images) for role, run in trio.items()} for trio in runs]
    judged = {
        role: [
            scores(
                t[role], images.classes, "test", positive=positive, teacher=None if role == "teacher" else t["teacher"]
            )
            for t in tables
        ]
        for role in ROLES
    }
    over = figures_over_seeds if len(runs) > 1 else (lambda s: figures_with_intervals(s[0]))
    test: dict[str, Any] = {role: over(found) for role, found in judged.items()}
    alone, distilled = judged["student_alone"], judged["student_distilled"]
    pair = (alone, distilled) if len(runs) > 1 else (alone[0], distilled[0])
    test["gain"] = paired_gain(*pair, names=METRICS)
    taught = judged["teacher"] if len(runs) > 1 else judged["teacher"][0]
    test["gap"] = paired_gain(taught, pair[1], names=OWN_METRICS)
    summary: dict[str, Any] = {"recipe": recipe, "test": test}
    pictures = _pictures(out, images, {r: s[0] for r, s in judged.items()}, test, tables[0]["student_distilled"])
    chosen = first["student_distilled"]
    said, seen = tables[0]["teacher"], out / "figures" / "attention.png"
    if looked_at(first["teacher"], said[said["split"] == "test"], seen, root=images.root):
        pictures.append(
            Picture(seen, "What the teacher looks at: the mean of its maps, the mask, the crop; test images.")
        )
    by_class = "By class, distilled student" + (", first seed" if len(runs) > 1 else "")
    page = partial(
        distill_report,
        out,
        subtitle=" · ".join(
            [recipe.rsplit("/", 1)[-1], images.root.resolve().name, f"{len(runs)} seed{'s' * (len(runs) > 1)}"]
        ),
        counts=counts(chosen.info, tables[0]["student_distilled"]),
        pictures=pictures,
        tables=[replace(class_rows(judged["student_distilled"][0], images.classes), heading=by_class)],
        settings=settings(chosen.info),
        teacher_settings=settings(first["teacher"].info),
        versions=chosen.info["versions"] | {"device": chosen.info["device"], "data": chosen.info["data"]["hash"][:12]},
        notices=[*chosen.info["notices"], *_doubts(first)],
    )
    page(summary)  # should the export fail, what was measured is there to be read
    say("exporting and timing")
    summary |= deliver(out, chosen, first["teacher"])
    page(summary)
    write_json(out / "summary.json", summary)
    return summary


def _table(run: Run, images: Images) -> Any:
    """What a run said of these validation and test images; a teacher of another split is asked anew."""
    if run.info["data"]["split_hash"] == images.split_hash:
        return run.predictions
    packed = pack(images, run.image_size)
    rows = np.array(packed.images.rows("val") + packed.images.rows("test"), dtype=np.int64)
    return predictions(packed.images, rows, predict_rows(run.network(), packed, rows), classes=run.classes)


def check_unseen(teacher: Run, images: Images, *, size: int | None = None) -> None:
    """Refuse a teacher that was trained on the images that are judged on, or whose epoch was chosen on test images.

    ``size`` is that of the pack by which pictures are known (default: the teacher's, which it looks at later).
    """
    table = teacher.data.frame
    frame = pack(images, size or teacher.image_size).images.frame

    def refuse(did: str, seen: str, judged: Sequence[str], what: str) -> None:
        known = set(table["content"][table["split"] == seen])
        if len(leaked := frame["path"][frame["split"].isin(judged) & frame["content"].isin(known)]):
            raise BadInput(
                f"leak: {teacher.path} {did} {len(leaked)} of the {what} images: {few(leaked)}; "
                "give it the same split (--val, --test, --split-seed)"
            )

    refuse("was trained on", "train", ("val", "test"), "validation and test")
    if teacher.info.get("selection", {}).get("rule") != "the last epoch":
        refuse("chose its epoch on", "val", ("test",), "test")


def check_start(weights: Any, images: Images) -> None:
    """Refuse weights to start from that are a run's and learnt from the images that are judged on (`BadInput`)."""
    if isinstance(weights, str | Path) and (Path(weights) / "run.json").is_file():
        check_unseen(Run.open(weights), images, size=_SMALL)


def open_teachers(
    paths: Sequence[Path],
    images: Images,
    *,
    weighting: Literal["mean", "confidence"] = "mean",
    code: Path | None = None,
) -> Run | Ensemble:
    """One run, or several as one teacher; none was trained on what its student is judged on (`BadInput`)."""
    runs = [Run.open(path, code=code) for path in paths]
    for run in runs:
        check_unseen(run, images)
    return runs[0] if len(runs) == 1 else Ensemble([as_teacher(run, images.classes) for run in runs], weighting)


def _doubts(trio: dict[str, Run]) -> list[str]:
    judged = trio["student_distilled"].info["teacher"].get("validation", {})
    lines = []
    if trio["teacher"].info["network"]["arguments"].get("weights", "") is None:
        lines.append("The teacher started from random weights, not from ImageNet.")
    if more := trio["student_distilled"].info["data"]["unlabelled"]:
        lines.append(
            f"The distilled student also saw {more} unlabelled images, and so took more steps in each epoch than the "
            "student alone: the gain is that of both."
        )
    return lines + _worse(judged.get("balanced_accuracy"), _validation(trio["student_alone"]))


def _pictures(out: Path, images: Images, judged: dict[str, Scores], test: dict[str, Any], table: Any) -> list[Picture]:
    """The figures of the page, of the first seed where there are several."""
    home = out / "figures"
    classes = images.classes
    seed = ", first seed" if "seeds" in test["gain"]["accuracy"] else ""
    figures.gain(test["gain"], home / "gain.png")
    shown = [Picture(home / "gain.png", "Distilled minus alone, on the same test images.")]
    figures.confusions({_TITLES[r]: confusion(s) for r, s in judged.items()}, classes, home / "confusion.png")
    shown.append(Picture(home / "confusion.png", f"Confusion matrices, test images{seed}."))
    if len(classes) == 2:
        target = 1 if judged["teacher"].positive is None else judged["teacher"].positive
        curves = {_TITLES[r]: (*roc_curve(s, target), _first(test[r]["auroc"])) for r, s in judged.items()}
        figures.roc(curves, home / "roc.png")
        of_all = "; AUROC over all seeds" if seed else ""
        shown.append(Picture(home / "roc.png", f"ROC for {classes[target]}, test images{seed}{of_all}."))
    val = scores(table, classes, "val")
    temperature = calibrating(val)
    calm = tempered(judged["student_distilled"], temperature)
    figures.reliability(
        {"distilled": reliability(judged["student_distilled"]), f"temperature {temperature:.2f}": reliability(calm)},
        home / "reliability.png",
    )
    shown.append(
        Picture(
            home / "reliability.png",
            f"Calibration of the distilled student, test images{seed}; temperature fitted on validation.",
        )
    )
    figures.gallery(*gallery_of(images, table), classes, home / "gallery.png")
    what = f"Distilled student{seed}: surest mistakes first, then images it had right."
    shown.append(Picture(home / "gallery.png", what))
    return shown


def _first(figure: dict[str, Any]) -> dict[str, Any]:
    return {key: figure[key] for key in ("value", "low", "high")}
