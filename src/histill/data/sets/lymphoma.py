"""The malignant lymphoma set of IICBU 2008."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from histill.data.sets._record import DataSet, File, Row, find, pictures

__all__ = ["SETS"]

_CASE = re.compile(r"sj-\d+-\d+")


def rows(folder: Path) -> Iterator[Row]:
    """``CLL/sj-05-1374-R2_005.tif``, ``FL/...`` and ``MCL/...``, right in the folder or in ``lymphoma``."""
    for label in LYMPHOMA.classes:
        for path in pictures(find(folder, "lymphoma", label), ".tif"):
            match = _CASE.match(path.name)
            yield Row(path, label, patient=match[0] if match else "")


LYMPHOMA = DataSet(
    name="lymphoma",
    what="lymph nodes, H&E photographs of 1388 x 1040 pixels, three lymphomas of several sites and stainers",
    use="RCKD's fine-tuning; shift of staining",
    homepage="https://ome.grc.nia.nih.gov/iicbu2008/lymphoma/index.html",
    files=(
        File(
            "lymphoma.tar.gz",
            "https://ome.grc.nia.nih.gov/iicbu2008/lymphoma.tar.gz",
            checksum="sha1:5af6bf000a9f7d0bb9b54ae0558fbeccc1758fe6",
        ),
    ),
    checksums="not by the publisher; as scikit-data's loader recorded it",
    licence="none stated; a research benchmark",
    citation="Orlov et al. 2010, Automatic classification of lymphoma images, IEEE TITB 14:1003",
    classes=("CLL", "FL", "MCL"),
    images={"": 374},
    split="none published; RCKD: 6:2:2 at random, 224, 75 and 75",
    patient="the case number at the start of a file name (sj-05-1374), where there is one",
    pitfalls="Several photographs of a case, prepared at several sites with much variation of stain: after a random "
    "split a network may know the case by its stain.",
    rows=rows,
    flags="--val 0.2 --test 0.2",
)
SETS = (LYMPHOMA,)
