"""MoNuSeg 2018: nuclei of several organs, outlined in XML files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.data.decode import FORMATS
from histill.data.sets._pixels import draw, regions, save
from histill.data.sets._record import CONVERTED, DataSet, File, Row, pictures
from histill.errors import BadInput

__all__ = ["SETS"]

_TRAIN, _TEST = "MoNuSeg 2018 Training Data", "MoNuSegTestData"


def rows(folder: Path) -> Iterator[Row]:
    """``MoNuSeg 2018 Training Data/Tissue Images/TCGA-....tif``, ``Annotations/TCGA-....xml``; ``MoNuSegTestData``."""
    found = [(p, folder / _TRAIN / "Annotations", "train") for p in pictures(folder / _TRAIN / "Tissue Images", ".tif")]
    found += [(p, folder / _TEST, "test") for p in pictures(folder / _TEST, ".tif")]
    if not found:
        raise BadInput(f"{folder}: no {_TRAIN}/Tissue Images and no {_TEST} in it; unpack the two archives")
    jobs, listed = [], []
    for path, outlines, split in found:
        mask = folder / CONVERTED / "monuseg" / f"{path.stem}.png"
        jobs.append((mask, partial(_numbered, path, outlines / f"{path.stem}.xml")))
        listed.append(Row(path, patient=path.stem[:12], split=split, mask=mask, site=path.stem[5:7]))
    save(jobs, len(jobs), "drawing nuclei")
    yield from listed


def _numbered(image: Path, outlines: Path) -> NDArray[np.uint16]:
    with Image.open(image, formats=FORMATS) as picture:
        size = (picture.height, picture.width)
    return draw([points for _, points in regions(outlines)], size)


MONUSEG = DataSet(
    name="monuseg",
    what="several organs, H&E fields of 1000 pixels at 40x of TCGA, with outlined nuclei",
    use="the teacher of RCKD (StarDist was trained on it)",
    homepage="https://monuseg.grand-challenge.org/Data/",
    files=(File("MoNuSeg 2018 Training Data.zip"), File("MoNuSegTestData.zip")),
    licence="CC BY-NC-SA 4.0",
    citation="Kumar et al. 2020, A multi-organ nucleus segmentation challenge, IEEE TMI 39:1380; Kumar et al. 2017",
    classes=("background", "nucleus"),
    images={"train": 37, "test": 14},
    split="published: 37 to train, 14 to test",
    patient="the first 12 characters of the TCGA barcode; the site is its tissue source",
    pitfalls="Lung and brain are in the test part alone. Outlines overlap in places: the first has the pixel.",
    rows=rows,
    task="instances",
    flags="--val 0.2",
    command="train rckd.teacher",
    access="download the training and the test archive from its page (Google Drive)",
)
SETS = (MONUSEG,)
