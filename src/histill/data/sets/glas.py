"""GlaS: glands of the colon, outlined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histill.data.sets._pixels import grey, save
from histill.data.sets._record import CONVERTED, DataSet, File, Row, find, pictures, read_csv
from histill.errors import BadInput

__all__ = ["SETS"]

_FOLDER = "Warwick QU Dataset (Released 2016_07_08)"
_GRADE = "grade (GlaS)"


def rows(folder: Path, *, graded: bool = False) -> Iterator[Row]:
    """``train_1.bmp`` with ``train_1_anno.bmp``, ``testA_1.bmp``, ``testB_1.bmp``, and ``Grade.csv``."""
    home = find(folder, _FOLDER, "Grade.csv").parent
    grades = {row["name"]: row for row in read_csv(home / "Grade.csv", "name", "patient ID", _GRADE)}
    found = [path for path in pictures(home, ".bmp") if not path.stem.endswith("_anno")]
    jobs, listed = [], []
    for path in found:
        if path.stem not in grades:
            raise BadInput(f"{home / 'Grade.csv'}: no row of {path.stem}")
        grade = grades[path.stem][_GRADE]
        if grade not in ("benign", "malignant"):
            raise BadInput(f"{home / 'Grade.csv'}: {grade!r} of {path.stem}; benign or malignant is expected")
        inside = 2 if graded and grade == "malignant" else 1
        mask = folder / CONVERTED / ("glas-graded" if graded else "glas") / f"{path.stem}.png"
        jobs.append((mask, partial(_numbers, path.with_name(f"{path.stem}_anno.bmp"), inside)))
        split = "train" if path.stem.startswith("train") else "test"
        listed.append(Row(path, patient=grades[path.stem]["patient ID"], split=split, mask=mask))
    save(jobs, len(jobs), "masks of glands")
    yield from listed


def _numbers(path: Path, inside: int) -> NDArray[np.uint8]:
    """The published mask numbers its glands; here every gland has its class."""
    return np.where(grey(path) > 0, np.uint8(inside), np.uint8(0))


GLAS = DataSet(
    name="glas",
    what="colon, H&E fields of mostly 775 x 522 pixels with outlined glands, of 16 patients",
    use="RCKD's segmentation",
    homepage="https://warwick.ac.uk/fac/cross_fac/tia/data/glascontest/",
    files=(File("warwick_qu_dataset_released_2016_07_08.zip", checksum="md5:495b2a9f3d694545fbec06673fb3f40f"),),
    checksums="not by the publisher; as several public loaders recorded it",
    licence="research only, not commercial",
    citation="Sirinukunwattana et al. 2017, Gland segmentation in colon histology images, Med. Image Anal. 35:489",
    classes=("background", "gland"),
    images={"train": 85, "test": 80},
    split="published: 85 to train, 60 + 20 to test (--by image); RCKD cuts 17 of the 85 for validation",
    patient="the column patient ID of Grade.csv",
    pitfalls="The published split divides patients (1, 10 and 11, among others, are in both parts). RCKD does not say "
    "whether background is a class: glas has two, glas-graded three (background, benign and malignant gland).",
    rows=rows,
    task="masks",
    flags="--val 0.2 --test 0.2",
    command="train rckd.finetune",
    access="Warwick asks for a sign-in: download warwick_qu_dataset_released_2016_07_08.zip from its page",
)
GRADED = replace(
    GLAS,
    name="glas-graded",
    what="the same, with benign and malignant glands told apart",
    classes=("background", "benign gland", "malignant gland"),
    rows=partial(rows, graded=True),
    manifest="manifest_graded",
)
SETS = (GLAS, GRADED)
