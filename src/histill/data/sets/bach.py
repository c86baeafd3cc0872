"""BACH, part A: photographs of breast tissue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from histill.data.sets._record import DataSet, File, Row, find, pictures
from histill.errors import BadInput

__all__ = ["ARCHIVE", "CITATION", "SETS"]

ARCHIVE = File(
    "ICIAR2018_BACH_Challenge.zip",
    "https://zenodo.org/records/3632035/files/ICIAR2018_BACH_Challenge.zip",
    checksum="md5:8ae1801334aa943c44627c1eef3631b2",
)
CITATION = "Aresta et al. 2019, BACH: grand challenge on breast cancer histology images, Med. Image Anal. 56:122"
_EACH = 100
_EVA_TEST = ((41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368))
"""From and up to, in the photographs by class and name (eva's ``bach.py``)."""


def rows(folder: Path) -> Iterator[Row]:
    """``ICIAR2018_BACH_Challenge/Photos/Normal/n001.tif``."""
    photos = find(folder, "ICIAR2018_BACH_Challenge", "Photos")
    for label in BACH.classes:
        for path in pictures(photos / label, ".tif"):
            yield Row(path, label)


def _eva(folder: Path) -> Iterator[Row]:
    """All photographs in the order of `rows`, through which eva counts: none may be missing."""
    found = list(rows(folder))
    counts = Counter(row.label for row in found)
    if counts != dict.fromkeys(BACH.classes, _EACH):
        there = ", ".join(f"{label} {counts[label]}" for label in BACH.classes)
        raise BadInput(f"{folder}: --by eva counts through {_EACH} photographs of each class; there are {there}")
    for place, row in enumerate(found):
        test = any(start <= place < stop for start, stop in _EVA_TEST)
        yield row._replace(split="test" if test else "train")


BACH = DataSet(
    name="bach",
    what="breast, H&E photographs of 2048 x 1536 pixels at 0.42 um per pixel",
    use="RCKD's fine-tuning; four classes from few images",
    homepage="https://iciar2018-challenge.grand-challenge.org/Dataset/",
    files=(ARCHIVE,),
    checksums="Zenodo record 3632035, as the eva benchmark recorded it",
    licence="CC BY-NC-ND 4.0",
    citation=CITATION,
    classes=("Benign", "InSitu", "Invasive", "Normal"),
    images={"": 400},
    split="none published (the challenge's test labels are not public); RCKD: 6:2:2 at random, 240, 80, 80",
    patient="not in the archive; the challenge's page has a partial list (patient_microscopy)",
    pitfalls="Some patients have several images (the challenge's page), so a random split divides them. 80 test "
    "images: an interval of about 8 points either way.",
    rows=rows,
    flags="--val 0.2 --test 0.2",
)
EVA = replace(
    BACH,
    images={"train": 268, "test": 132},
    split="ranges of the 400 in order of class and name, which eva drew by patient, it says",
    rows=_eva,
    flags="--val 0.2",
    manifest="manifest_eva",
)
SETS = (replace(BACH, eva=EVA),)
