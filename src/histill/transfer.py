"""The main job where the teacher does another task: pretrain on what it says of unlabelled images, then fine-tune.

The same network is fine-tuned twice, from random weights and from the pretrained ones, on the same images, views,
schedule and seeds; one page shows what the pretraining bought.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from histill.data.images import Images, few, read_unlabelled
from histill.data.packed import pack
from histill.deploy.deliver import deliver
from histill.distill import check_start, read_parts
from histill.errors import BadInput
from histill.evaluate import figures
from histill.evaluate.finish import class_rows, counts, settings
from histill.evaluate.finish_masks import title
from histill.evaluate.intervals import Judged, figures_over_seeds, figures_with_intervals, paired_gain
from histill.evaluate.judge import scores_of
from histill.evaluate.metrics import METRICS, Scores, confusion
from histill.evaluate.page import Card, Cards, Picture, Section, Table, Text, write_report
from histill.evaluate.probe import probe
from histill.evaluate.report import TITLES, difference, share, shown, shown_gain
from histill.evaluate.robust import robustness, robustness_figure
from histill.experiment import load_recipe
from histill.files import locked, sweep, write_json
from histill.loop import train
from histill.progress import notice, say
from histill.run import Run
from histill.teachers import bound, open_teacher

__all__ = ["check_apart", "pretrain_alone", "transfer", "transfers"]

ROLES = ("student_alone", "student_distilled")
_SMALL = 32  # pixels of a pack that is made to know pictures by


def transfers(module: Any) -> bool:
    """Whether a recipe pretrains and fine-tunes, instead of teaching a student the task itself."""
    return all(callable(getattr(module, part, None)) for part in ("pretrain", "finetune"))


def check_apart(seen: Images, images: Images, flag: str = "--unlabelled") -> None:
    """Refuse to pretrain on what the student is judged on; pictures are compared, not files (`BadInput` names some)."""
    frame = pack(images, _SMALL).images.frame
    held = set(frame["content"][frame["split"].isin(("val", "test"))])
    frame = pack(seen, _SMALL).images.frame
    if len(leaked := frame["path"][frame["content"].isin(held)]):
        raise BadInput(
            f"leak: {len(leaked)} images of {flag} are validation or test images: {few(leaked)}; take them out of it"
        )


def transfer(
    recipe: str,
    data: Path,
    out: Path,
    *,
    teacher: str | Sequence[str],
    unlabelled: Path,
    seeds: int = 1,
    seed: int = 0,
    split_seed: int | None = None,
    reading: dict[str, Any] | None = None,
    device: str = "auto",
    precision: str = "auto",
    resume: bool = False,
    finetune_arguments: dict[str, Any] | None = None,
    pretrain_arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Pretrain once, fine-tune with each seed from random weights and from there, and say what it bought.

    Args:
        recipe: one with the parts ``pretrain`` and ``finetune``.
        data: images with labels or masks.
        out: where ``pretrained/``, ``student_alone/`` and ``student_distilled/`` go (with several seeds the latter two
            in ``seed0/`` and so on).
        teacher: what the recipe's ``pretrain`` learns from.
        unlabelled: a folder of images.
        seeds: how many fine-tunings, with seeds that follow ``seed``; the split stays.
        seed: the first.
        split_seed: of the split (default: ``seed``).
        reading: ``val``, ``test``, ``patient``, ``target`` and ``classes`` of `histill.distill.read_parts`.
        device: see `histill.loop.train`.
        precision: likewise.
        resume: go on with what ``out`` holds.
        finetune_arguments: of the recipe's ``finetune``.
        pretrain_arguments: of its ``pretrain``.

    Returns:
        What ``summary.json`` holds: ``test`` without a teacher, which does another task.

    Raises:
        BadInput: an unlabelled image that is judged on; see also `histill.loop.train`.
    """
    module, _ = load_recipe(recipe)
    if seeds < 1:
        raise BadInput(f"--seeds {seeds}: at least 1")
    with locked(out):
        sweep(out)
        dealt = seed if split_seed is None else split_seed
        images = read_parts(data, seed=dealt, **{"val": 0.15, "test": 0.15, "patient": None, **(reading or {})})
        if not images.rows("test"):
            raise BadInput("no test images: nothing could be proven; give --test a share above 0")
        more = read_unlabelled(unlabelled)
        for line in (*images.notices, *more.notices):
            notice(line)
        check_apart(more, images)
        check_start((pretrain_arguments or {}).get("weights"), images)
        machine: dict[str, Any] = {"device": device, "precision": precision, "resume": resume}
        words = _words(teacher)
        own = {"teacher": words, "seed": seed, **(pretrain_arguments or {})}
        known = set(inspect.signature(module.pretrain).parameters)
        pretrained = train(
            module.pretrain(more, **{n: v for n, v in own.items() if n in known}), out / "pretrained", **machine
        )
        runs: list[dict[str, Run]] = []
        for number in range(seeds):
            home = out / f"seed{number}" if seeds > 1 else out
            starts = {"student_alone": "none", "student_distilled": str(pretrained.path)}
            settings_: dict[str, Any] = {**(finetune_arguments or {}), "seed": seed + number}
            runs.append(
                {
                    role: train(module.finetune(images, **settings_ | {"weights": weights}), home / role, **machine)
                    for role, weights in starts.items()
                }
            )
        probes = _probed(pretrained, images, words, out) if not images.masks else {}
        return _prove(recipe, out, images, pretrained, runs, probes)


def pretrain_alone(
    recipe: str, unlabelled: Path, out: Path, *, teacher: str | Sequence[str], arguments: dict[str, Any], **machine: Any
) -> dict[str, Any]:
    """Pretrain where there are no labels to judge by: ``out/pretrained``, and ``summary.json`` with the losses."""
    module, _ = load_recipe(recipe)
    with locked(out):
        sweep(out)
        images = read_unlabelled(unlabelled)
        run = train(module.pretrain(images, _words(teacher), **arguments), out / "pretrained", **machine)
        log = run.log
        losses = {"first": float(log["loss"].iloc[0]), "last": float(log["loss"].iloc[-1])}
        summary = {"recipe": recipe, "pretraining": {"loss": losses, "images": run.info["data"]["images"]["train"]}}
        write_json(out / "summary.json", summary)
        return summary


def _words(teacher: str | Sequence[str]) -> str | Sequence[str]:
    """A single teacher by itself, as most recipes take no other."""
    return teacher[0] if not isinstance(teacher, str) and len(teacher) == 1 else teacher


def _probed(pretrained: Run, images: Images, teacher: Any, out: Path) -> dict[str, Any]:
    """What the pretrained embedding knows without fine-tuning, beside random weights and its teacher, if that has one.

    A linear probe and nearest neighbours, and a figure of how stain and scanner move the embedding. Empty where the
    pretrained network gives no embedding, as one with a decoder does not.
    """
    network, size = pretrained.network(), pretrained.image_size
    with torch.no_grad():
        if "pooled" not in network(torch.zeros(1, 3, size, size)):
            return {}
    packed = pack(images, size)
    torch.manual_seed(0)
    asked: dict[str, Any] = {"pretrained": network, "random weights": pretrained.build().eval()}
    sources = teacher if isinstance(teacher, list | tuple) else [teacher]
    if len(sources) == 1:
        asked["teacher"] = bound(open_teacher(sources[0]), packed.images)
    say("probing the embeddings")
    found: dict[str, Any] = {name: probe(one, packed) for name, one in asked.items()}
    robustness_figure({name: robustness(one, packed) for name, one in asked.items()}, out / "figures" / "robust.png")
    return found


def _prove(
    recipe: str, out: Path, images: Images, pretrained: Run, runs: list[dict[str, Run]], probes: dict[str, Any]
) -> dict[str, Any]:
    """Compare, export, time, and write ``summary.json`` and ``report.html``."""
    found = {role: [scores_of(trio[role]) for trio in runs] for role in ROLES}
    over = figures_over_seeds if len(runs) > 1 else (lambda s: figures_with_intervals(s[0]))
    test: dict[str, Any] = {role: over(scores) for role, scores in found.items()}
    alone, distilled = (found[role] if len(runs) > 1 else found[role][0] for role in ROLES)
    test["gain"] = paired_gain(alone, distilled)
    summary: dict[str, Any] = {"recipe": recipe, "test": test, **({"probe": probes} if probes else {})}
    _page(out, images, summary, pretrained, runs, found)  # should the export fail, what was measured is there
    say("exporting and timing")
    summary |= deliver(out, runs[0]["student_distilled"], None)
    write_json(out / "summary.json", summary)
    return summary


def _page(
    out: Path,
    images: Images,
    summary: dict[str, Any],
    pretrained: Run,
    runs: list[dict[str, Run]],
    found: dict[str, list[Judged]],
) -> None:
    test, chosen = summary["test"], runs[0]["student_distilled"]
    main = "miou" if images.masks else "accuracy"
    named = {name: title(name, images.classes) if images.masks else TITLES.get(name, name) for name in test[ROLES[0]]}
    alone, distilled, gain = test["student_alone"], test["student_distilled"], test["gain"]
    rows = [
        [named[n], shown(n, alone[n]), shown(n, distilled[n]), shown_gain(n, gain[n]).replace(" points", "")]
        for n in named
        if n in gain
    ]
    home = out / "figures"
    metric = f"val/{main}"
    curves = {
        "from random weights" if role == "student_alone" else "pretrained": runs[0][role].log[metric].to_numpy()
        for role in ROLES
    }
    figures.curves(curves, home / "learning.png", ylabel=f"validation, {named[main]}")
    pictures = [Picture(home / "learning.png", "Validation by epoch, first seed.", "Figures")]
    tables: list[Section] = []
    if not images.masks:
        pairs = {"from random weights": found["student_alone"][0], "pretrained": found["student_distilled"][0]}
        told = {name: scores for name, scores in pairs.items() if isinstance(scores, Scores)}
        figures.gain({n: gain[n] for n in METRICS if n in gain}, home / "gain.png", title="Pretrained minus random")
        figures.confusions({n: confusion(s) for n, s in told.items()}, images.classes, home / "confusion.png")
        pictures += [
            Picture(home / "gain.png", "Pretrained minus from random weights, on the same test images."),
            Picture(home / "confusion.png", "Confusion matrices, test images, first seed."),
        ]
        tables = [class_rows(told["pretrained"], images.classes)]
    if probes := summary.get("probe"):
        cells = [
            [name, *(share(found[kind]["balanced_accuracy"]) for kind in ("linear", "knn"))]
            for name, found in probes.items()
        ]
        note = (
            "Balanced accuracy on the test images, nothing fine-tuned; what the probes choose is chosen on validation."
        )
        tables.append(Table(["", "linear probe", "nearest neighbours"], cells, "What the embedding knows", note))
        pictures.append(Picture(home / "robust.png", "How stain and scanner move the embedding, and what that costs."))
    held = counts(chosen.info, chosen.predictions)
    low, high = gain[main]["low"], gain[main]["high"]
    verdict = "helped" if low is not None and low > 0 else "did harm" if high is not None and high < 0 else None
    said = f"Pretraining {verdict}" if verdict else "Pretraining is not shown to help"
    labelled = held["train"]["images"]
    seen = pretrained.info["data"]["images"]["train"]
    write_report(
        out / "report.html",
        title="What the pretraining bought",
        subtitle=f"{summary['recipe'].rsplit('/', 1)[-1]} · {images.root.resolve().name} · "
        f"{len(runs)} seed{'s' * (len(runs) > 1)}",
        answer=f"{said}: {named[main].lower()} {share(distilled[main])} on the test images, against "
        f"{share(alone[main])} from random weights ({difference(gain[main])}), with {labelled:,} labelled and "
        f"{seen:,} unlabelled images.",
        sections=[
            Cards(
                [
                    Card("Pretrained", *_halves(shown(main, distilled[main]))),
                    Card("From random weights", *_halves(shown(main, alone[main]))),
                    Card("Gain", *_halves(difference(gain[main]))),
                ]
            ),
            Table(
                ["", "from random weights", "pretrained", "gain, points"],
                rows,
                "On the test images",
                "95 % intervals over patients, or images where none are known, and seeds; the gain is paired. The "
                "epoch was chosen on validation images. The backbone was pretrained once, without labels.",
            ),
            *([Text(chosen.info["notices"], "Before trusting these figures", True)] if chosen.info["notices"] else []),
            *pictures,
            *tables,
            Table(["Split", "images"], [[s, row["images"]] for s, row in held.items()], "Data"),
            Table(["Name", "Value"], list(settings(pretrained.info).items()), "Pretraining"),
            Table(["Name", "Value"], list(settings(chosen.info).items()), "Fine-tuning"),
        ],
    )


def _halves(text: str) -> tuple[str, str]:
    value, _, interval = text.partition(" (")
    return value, f"95 % interval {interval.rstrip(')')}" if interval else ""
