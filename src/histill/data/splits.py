"""Patient-level, stratified, repeatable splits."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import pandas as pd

from histill.data.images import SPLITS, Images, check_leaks, few
from histill.errors import BadInput

__all__ = ["split", "with_unlabelled"]


def split(
    data: Images,
    *,
    val: float = 0.15,
    test: float = 0.15,
    by: Literal["patient", "site"] = "patient",
    seed: int = 0,
) -> Images:
    """Put every image into train, val or test, no patient into two, the classes in proportion.

    Where patients are known they are divided, otherwise images (copies of one image stay together). A split that the
    data brings is kept; what is missing of it is cut from the training part, so that the test part stays untouched.
    Groups are dealt in random order, the largest first, each to the part that lacks most of its classes. Where a split
    that the data brings lacks a class for validation or test, the notices say it.

    Args:
        data: the images.
        val: share of the images for validation (model selection, temperature, calibration of int8).
        test: share for the test, used once.
        by: what is divided: patients, or whole sites (the manifest's column), for a test on sites never seen.
        seed: another seed is another repeat.

    Raises:
        BadInput: shares outside [0, 1), a class with too few patients to be in every part, images without a site, or a
            patient of two sites that were divided.
    """
    if not isinstance(data, Images):
        raise BadInput(f"split: give what histill.read_images returns; this is of type {type(data).__name__}")
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise BadInput(f"val={val} and test={test}: shares must be at least 0 and together below 1")
    if not 0 <= seed < 2**63:
        raise BadInput(f"seed={seed}: must be at least 0 and below 2^63")
    if by not in ("patient", "site"):
        raise BadInput(f"by={by!r}: patient or site")
    if by == "site" and len(nowhere := data.frame["path"][data.frame["site"] == ""]):
        raise BadInput(f"by='site': {len(nowhere)} images have no site: {few(nowhere)}")
    if len(unknown := data.frame["path"][data.frame["patient"].isna()]):
        raise BadInput(f"{len(unknown)} images have NaN for a patient: {few(unknown)}; one that is unknown is ''")
    units = data.units if by == "patient" else data.frame["site"]
    frame = data.frame.copy()
    given = set(frame["split"]) - {""}
    if given and "train" not in given:
        raise BadInput(f"the data brings {few(sorted(given))} but no train split")
    shares = {"val": 0.0 if "val" in given else val, "test": 0.0 if "test" in given else test}
    free = (frame["split"] == "train") if given else pd.Series(True, index=frame.index)
    frame.loc[free, "split"] = _deal(frame[free], units[free], shares, seed)
    parts = data.with_frame(frame)
    check_leaks(parts)
    lacking = []
    wanted = {"train"} | {name for name in ("val", "test") if shares[name] > 0 or name in given}
    for name in SPLITS:
        if data.masks or not data.classes:
            if name in wanted and not (frame["split"] == name).any():
                raise BadInput(f"no image in the {name} split: too few images or patients; bring more or give a split")
            continue
        if name in wanted and (absent := sorted(set(data.classes) - set(frame["label"][frame["split"] == name]))):
            unit = "sites" if by == "site" else "patients" if data.has_patients else "images"
            if name == "train" or name not in given:
                raise BadInput(
                    f"no image of {few(absent)} in the {name} split: too few {unit}; bring more or give a split"
                )
            lacking.append(f"no image of {few(absent)} in the {name} split: means over classes there leave it out")
    return parts.with_frame(parts.frame, *(line for line in lacking if line not in data.notices))


def _deal(frame: pd.DataFrame, units: pd.Series[str], shares: dict[str, float], seed: int) -> list[str]:
    """The split of each row."""
    counts = pd.crosstab(units, frame["label"])
    fractions = np.array([1 - sum(shares.values()), shares["val"], shares["test"]])
    lacking = np.outer(fractions, counts.sum().to_numpy())
    sizes = np.maximum(lacking, 1e-9)
    values = counts.to_numpy()
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-values[order].sum(1), kind="stable")]
    chosen = {}
    for group in order:
        # The part that this group's classes lack most, relative to what it should hold of them.
        need = ((lacking / sizes) * values[group]).sum(1)
        need[fractions == 0] = -np.inf
        part = int(np.argmax(need))
        lacking[part] -= values[group]
        chosen[counts.index[group]] = SPLITS[part]
    return [chosen[unit] for unit in units]


def with_unlabelled(data: Images, unlabelled: Images | None) -> Images:
    """Labelled and unlabelled images as one table, the unlabelled ones in the training split.

    A copy of a training image is left out; one of a validation or test image is found as a leak when they are packed.
    """
    if unlabelled is None:
        return data
    extra = unlabelled.frame.assign(path=[os.path.relpath(p, data.root) for p in unlabelled.paths()], split="train")
    known = set(data.frame["content"][data.frame["split"] == "train"])
    fresh = extra[~extra["content"].isin(known)]
    copies = len(extra) - len(fresh)
    lines = [f"{copies} unlabelled images are among the labelled training images, left out"] if copies else []
    return data.with_frame(pd.concat([data.frame, fresh]), *unlabelled.notices, *lines)
