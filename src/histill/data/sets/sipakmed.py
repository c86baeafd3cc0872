"""SIPaKMeD: cells of Pap smears."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from histill.data.sets._record import DataSet, File, Row, find, pictures

__all__ = ["SETS"]

_SIZES = {
    "Dyskeratotic": 1_182_980_549,
    "Koilocytotic": 1_290_478_065,
    "Metaplastic": 1_396_480_123,
    "Parabasal": 548_667_699,
    "Superficial-Intermediate": 762_939_737,
}


def rows(folder: Path) -> Iterator[Row]:
    """``im_Dyskeratotic/CROPPED/001_01.bmp``: cell 1 of cluster image 1; the Kaggle copy has the folder twice."""
    for label in SIPAKMED.classes:
        home = find(folder, f"im_{label}")
        for path in pictures(find(home, f"im_{label}", "CROPPED"), ".bmp"):
            yield Row(path, label, patient=f"{label}-{path.stem.split('_')[0]}")


SIPAKMED = DataSet(
    name="sipakmed",
    what="cervix, cells cut out of Pap smears, five kinds",
    use="the multi-exit paper's task",
    homepage="https://www.cs.uoi.gr/~marina/sipakmed.html",
    files=tuple(
        File(f"im_{label}.7z", f"https://www.cs.uoi.gr/~marina/SIPAKMED/im_{label}.7z", size)
        for label, size in _SIZES.items()
    ),
    licence="for experiments, with citation",
    citation="Plissiti et al. 2018, SIPAKMED: a new dataset for feature and image based classification, ICIP",
    classes=tuple(_SIZES),
    images={"": 4_049},
    split="none published; the multi-exit paper: 3:1:1 at random (--by image), 2,429, 810 and 810",
    patient="not published; instead the cluster image that a cell was cut from (966)",
    pitfalls="Cells of one cluster image share stain, focus and neighbours: at random they are in training and test. "
    "Patients stay unknown even so.",
    rows=rows,
    flags="--val 0.2 --test 0.2",
    command="distill multi-exit",
)
SETS = (SIPAKMED,)
