"""MHIST: colorectal polyps, labelled by seven pathologists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from histill.data.sets._record import DataSet, File, Row, find, read_csv

__all__ = ["SETS"]

_LABEL, _SPLIT = "Majority Vote Label", "Partition"


def rows(folder: Path) -> Iterator[Row]:
    """``images/MHIST_aaa.png`` and ``annotations.csv``."""
    images = find(folder, "images")
    for row in read_csv(folder / "annotations.csv", "Image Name", _LABEL, _SPLIT):
        path = images / row["Image Name"]
        if path.is_file():
            yield Row(path, row[_LABEL], split=row[_SPLIT])


MHIST = DataSet(
    name="mhist",
    what="colorectal polyps, H&E fields of 224 pixels at 5x: hyperplastic, or sessile serrated adenoma",
    use="a hard two-class task that trains in minutes",
    homepage="https://bmirds.github.io/MHIST/",
    files=(File("annotations.csv"), File("images.zip", into="images")),
    checksums="in MD5SUMs.txt, which comes with the files",
    licence="research use agreement",
    citation="Wei et al. 2021, A petri dish for histopathology image analysis, AIME (arXiv:2101.12355)",
    classes=("HP", "SSA"),
    images={"train": 2_175, "test": 977},
    split="published: 2,175 to train, 977 to test; no validation part",
    patient="not published",
    pitfalls="Labels are votes of seven, four to three in 16.7 % of images: no model reaches 100 %. "
    "Choosing the epoch on the test part, as is often done, flatters.",
    rows=rows,
    access="fill in the form on its page; the links to annotations.csv and images.zip come by mail",
)
EVA = replace(MHIST, split="as published", manifest="manifest_eva")
SETS = (replace(MHIST, eva=EVA),)
