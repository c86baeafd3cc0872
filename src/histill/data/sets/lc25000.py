"""LC25000: lung and colon tiles, twenty pictures of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from histill.data.sets._record import DataSet, File, Row, find, pictures, read_csv
from histill.progress import notice

__all__ = ["SETS"]

_GROUPS = File(
    "lc25000_image_groups.csv",
    "https://raw.githubusercontent.com/GeorgeBatch/LC25000-clean/912f342fe2a781e847f395d79982dad4d3d425ae/"
    "kaggle/lc25000_image_groups.csv",
)


def rows(folder: Path) -> Iterator[Row]:
    """``lung_colon_image_set/lung_image_sets/lung_aca/lungaca1.jpeg``; tiles in ``lc25000_image_groups.csv``."""
    groups: dict[str, str] = {}
    if (file := folder / _GROUPS.name).is_file():
        groups = {row["stem"]: f"tile-{row['group_id']}" for row in read_csv(file, "stem", "group_id")}
    else:
        notice(f"{file} is missing: which pictures are of one tile is not known, and a split will leak")
    for label in LC25000.classes:
        for path in pictures(find(folder, "lung_colon_image_set", f"{label.split('_')[0]}_image_sets", label)):
            yield Row(path, label, patient=groups.get(path.stem, ""))


LC25000 = DataSet(
    name="lc25000",
    what="lung and colon, H&E tiles of 768 pixels, five classes",
    use="a leak to be found, not a benchmark",
    homepage="https://github.com/tampapath/lung_colon_image_set",
    files=(_GROUPS, File("archive.zip")),
    licence="free for AI research; its Kaggle copy says CC BY-SA 4.0",
    citation="Borkowski et al. 2019, LC25000, arXiv:1912.12142; tiles: github.com/GeorgeBatch/LC25000-clean",
    classes=("colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc"),
    images={"": 25_000},
    split="none published",
    patient="not published; instead the tile that a picture was made from (1,246 tiles, found by LC25000-clean)",
    pitfalls="1,250 tiles, each rotated and flipped to 20 pictures: in a random split nearly every test picture has a "
    "twin in training, so that 99 % means nothing. Patients stay unknown even so.",
    rows=rows,
    access="download archive.zip from kaggle.com/datasets/andrewmvd/lung-and-colon-cancer-histopathological-images "
    "(with an account)",
)
SETS = (LC25000,)
