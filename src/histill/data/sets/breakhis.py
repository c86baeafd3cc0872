"""BreaKHis: breast tumours at four magnifications."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from histill.data.sets._record import DataSet, File, Row, find, pictures
from histill.errors import BadInput

__all__ = ["SETS"]

_NAME = re.compile(r"SOB_[BM]_(?P<kind>[A-Z]+)-(?P<slide>(?P<case>\d+-\d+)[A-Z]*)-(?P<power>\d+)-\d+")
_EVA_KINDS = ("DC", "F", "MC", "TA")
_EVA_TEST = (
    *("14-2773", "14-3909", "14-5287", "14-5695", "14-15792", "14-16716", "14-16875"),  # DC
    *("14-21998CD", "14-21998EF", "14-23060CD"),  # F
    *("14-18842D", "14-19979"),  # MC
    *("14-15275", "14-16184CD"),  # TA
)
"""The slides that eva validates on (its ``breakhis.py``)."""


def rows(folder: Path) -> Iterator[Row]:
    """``.../breast/benign/SOB/adenosis/SOB_B_A_14-22549AB/40X/SOB_B_A-14-22549AB-40-001.png``; the site is ``40X``."""
    for path, label, name in _named(folder):
        yield Row(path, label, patient=name["case"], site=f"{name['power']}X")


def _eva(folder: Path) -> Iterator[Row]:
    """Four kinds of tumour at 40x; slides of one case that differ by a letter are patients of their own to eva."""
    for path, _, name in _named(folder):
        if name["power"] == "40" and name["kind"] in _EVA_KINDS:
            slide = name["slide"]
            yield Row(path, name["kind"], patient=slide, split="test" if slide in _EVA_TEST else "train", site="40X")


def _named(folder: Path) -> Iterator[tuple[Path, str, re.Match[str]]]:
    """Every image, its class and what its name says."""
    home = find(folder, "BreaKHis_v1", "histology_slides", "breast")
    for label in BREAKHIS.classes:
        for place in sorted(home.glob(f"{label}/SOB/*/*/*X")):
            for path in pictures(place, ".png"):
                if (match := _NAME.match(path.stem)) is None:
                    raise BadInput(f"{path}: no name of this data set, such as SOB_B_A-14-22549AB-40-001.png")
                yield path, label, match


BREAKHIS = DataSet(
    name="breakhis",
    what="breast, H&E photographs of 700 x 460 pixels at 40x, 100x, 200x and 400x, of 82 patients",
    use="RCKD's fine-tuning; what a leak of patients does to a figure",
    homepage="https://web.inf.ufpr.br/vri/databases/breast-cancer-histopathological-database-breakhis/",
    files=(File("BreaKHis_v1.tar.gz", "http://www.inf.ufpr.br/vri/databases/BreaKHis_v1.tar.gz"),),
    checksums="none published, and the server speaks plain http",
    licence="CC BY 4.0",
    citation="Spanhol et al. 2016, A dataset for breast cancer histopathological image classification, TBME 63:1455",
    classes=("benign", "malignant"),
    images={"": 7_909},
    split="RCKD: images 6:2:2 at random, 4,745, 1,582 and 1,582 (--by image); here by patient unless told so",
    patient="year and number in the file name (14-22549); the letters after it, parts of a case, are not told apart",
    pitfalls="With --by image the same patient, and the same field at four magnifications, is in training and test: "
    "such figures say little. Case 13412 is there twice, as ductal and as lobular carcinoma.",
    rows=rows,
    flags="--val 0.2 --test 0.2",
)
EVA = replace(
    BREAKHIS,
    classes=_EVA_KINDS,
    images={"train": 1_132, "test": 339},
    split="DC, F, MC and TA at 40x; letters count as patients, so cases 16184, 18842, 19979 and 23060 are in both",
    patient="year, number and letters in the file name (14-18842D)",
    rows=_eva,
    flags="--val 0.2",
    manifest="manifest_eva",
)
SETS = (replace(BREAKHIS, eva=EVA),)
