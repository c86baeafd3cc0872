"""Recipes that are given slides: their patches take the place of ``--data`` or ``--unlabelled``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from histill.errors import BadInput
from histill.flags import read_data
from histill.progress import say

__all__ = ["cut_in_place", "cut_unlabelled", "judge_on_slides", "processes"]


def processes() -> int:
    """How many ``torchrun`` or ``srun`` started together."""
    return max(int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def cut_in_place(out: Path, values: dict[str, Any]) -> None:
    """Patches of ``--slides``, cut into ``out``, in place of ``--data`` or ``--unlabelled``."""
    if not values["slides"]:
        if values["masks"]:
            raise BadInput(f"--masks {values['masks']}: of which --slides?")
        return
    if processes() > 1:
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


def cut_unlabelled(out: Path, values: dict[str, Any]) -> Path:
    """Patches to pretrain on, of the slides that are trained on: nothing is learnt from those that judge."""
    from histill.slides.cut import find_slides
    from histill.slides.training import cut_for

    frame = read_data(values).frame
    trained_on = set(frame["slide"][frame["split"] == "train"])
    slides = [path for path in find_slides(values["slides"]) if path.name in trained_on]
    return cut_for(out / "unlabelled", slides, slide_mpp=values["slide_mpp"])


def judge_on_slides(out: Path, values: dict[str, Any], roles: tuple[str, ...]) -> None:
    """Whole slides of the test split, by every run of ``roles`` in ``out``."""
    if not (values["slides"] and values["masks"]):
        return
    from histill.run import Run
    from histill.slides.training import judge_slides

    home = out / "seed0" if (out / "seed0").is_dir() else out
    runs = {role: Run.open(home / role) for role in roles if (home / role / "run.json").is_file()}
    judge_slides(runs, values["slides"], out / "slides", masks=values["masks"], slide_mpp=values["slide_mpp"])
    say(f"slides: {out / 'slides'} (histill view {out / 'slides' / roles[-1]})")
