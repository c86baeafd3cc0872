"""TNBC: nuclei of triple-negative breast cancer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histill.data.sets._pixels import grey, save
from histill.data.sets._record import CONVERTED, DataSet, File, Row, find, pictures

__all__ = ["SETS"]


def rows(folder: Path) -> Iterator[Row]:
    """``TNBC_NucleiSegmentation/Slide_01/01_1.png`` and ``GT_01/01_1.png``."""
    jobs, listed = [], []
    home = find(folder, "TNBC_NucleiSegmentation", "Slide_01").parent
    for place in sorted(home.glob("Slide_*")):
        for path in pictures(place, ".png"):
            published = home / place.name.replace("Slide_", "GT_") / path.name
            mask = folder / CONVERTED / "tnbc" / path.name
            jobs.append((mask, partial(_numbered, published)))
            listed.append(Row(path, patient=place.name.removeprefix("Slide_"), mask=mask))
    save(jobs, len(jobs), "numbering nuclei")
    yield from listed


def _numbered(path: Path) -> NDArray[np.uint16]:
    """The published masks are black and white: connected pixels are one nucleus. Numbers are kept, if there are any."""
    from scipy import ndimage

    mask = grey(path)
    if len(np.unique(mask)) > 2:
        return mask.astype(np.uint16)
    numbered: NDArray[np.uint16] = ndimage.label(mask > 0)[0].astype(np.uint16)
    return numbered


TNBC = DataSet(
    name="tnbc",
    what="breast, H&E fields of 512 pixels at 40x with outlined nuclei, of 11 patients",
    use="the teacher of RCKD (StarDist was trained on it)",
    homepage="https://zenodo.org/records/2579118",
    files=(
        File(
            "TNBC_NucleiSegmentation.zip",
            "https://zenodo.org/records/2579118/files/TNBC_NucleiSegmentation.zip",
            25_232_361,
            "md5:1605712a752b201b57eacc8f866adb4f",
        ),
    ),
    checksums="Zenodo record 2579118 (version 1.1)",
    licence="CC BY 4.0",
    citation="Naylor et al. 2019, Segmentation of nuclei by deep regression of the distance map, IEEE TMI 38:448",
    classes=("background", "nucleus"),
    images={"": 50},
    split="none published; by patient",
    patient="the slide's number in the folder name, one slide to a patient",
    pitfalls="Masks are black and white: nuclei that touch become one here, so counts are too low.",
    rows=rows,
    task="instances",
    command="train rckd.teacher",
)
SETS = (TNBC,)
