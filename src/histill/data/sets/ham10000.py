"""HAM10000: dermoscopy with known lesions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from histill.data.sets._record import DataSet, File, Row, read_csv

__all__ = ["SETS"]

_DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile/"
_PARTS = ("HAM10000_images_part_1", "HAM10000_images_part_2")


def rows(folder: Path) -> Iterator[Row]:
    """``HAM10000_images_part_1/ISIC_0027419.jpg``, ``HAM10000_images_part_2/...`` and ``HAM10000_metadata.csv``."""
    for row in read_csv(folder / "HAM10000_metadata.csv", "lesion_id", "image_id", "dx"):
        for part in _PARTS:
            if (path := folder / part / f"{row['image_id']}.jpg").is_file():
                yield Row(path, row["dx"], patient=row["lesion_id"], site=row.get("dataset", ""))
                break


HAM10000 = DataSet(
    name="ham10000",
    what="skin, dermoscopy of 600 x 450 pixels, seven kinds of lesion, 7,470 lesions",
    use="dermoscopy with a split by lesion; DSNet's task as melanoma against the rest",
    homepage="https://doi.org/10.7910/DVN/DBW86T",
    files=(
        File(
            "HAM10000_metadata.csv",
            f"{_DATAVERSE}4338392?format=original",
            690_218,
            "md5:8f85fb1aa29d80a2797247e434deb79d",
        ),
        File(
            f"{_PARTS[0]}.zip",
            f"{_DATAVERSE}3172585",
            1_366_522_108,
            "md5:4639bfa73ab251610530a97c898e6e46",
            into=_PARTS[0],
        ),
        File(
            f"{_PARTS[1]}.zip",
            f"{_DATAVERSE}3172584",
            1_403_566_547,
            "md5:da43d6cc50f6613013be07e8986b384b",
            into=_PARTS[1],
        ),
    ),
    checksums="Harvard Dataverse, version 4.0",
    licence="CC BY-NC 4.0",
    citation="Tschandl et al. 2018, The HAM10000 dataset, Sci. Data 5:180161",
    classes=("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"),
    images={"": 10_015},
    split="none published",
    patient="the lesion (lesion_id); the site is the source collection",
    pitfalls="Several images of a lesion: a random split leaks. A few lesions have two numbers (Abhishek et al. 2025, "
    "Sci. Data 12:196). Patients are not known.",
    rows=rows,
)
SETS = (HAM10000,)
