"""PatchCamelyon: lymph nodes with and without metastasis, in HDF5 files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from histill.data.sets._pixels import save
from histill.data.sets._record import CONVERTED, DataSet, File, Row, read_csv
from histill.errors import BadInput

__all__ = ["SETS"]

_SPLITS = (("train", "train"), ("valid", "val"), ("test", "test"))
_NAME = "camelyonpatch_level_2_split_{}_{}"
_BLOCK = 256
_MD5 = {
    "train_x.h5.gz": "1571f514728f59376b705fc836ff4b63",
    "train_y.h5.gz": "35c2d7259d906cfc8143347bb8e05be7",
    "train_meta.csv": "5a3dd671e465cfd74b5b822125e65b0a",
    "valid_x.h5.gz": "d5b63470df7cfa627aeec8b9dc0c066e",
    "valid_y.h5.gz": "2b85f58b927af9964a4c15b8f7e8f179",
    "valid_meta.csv": "67589e00a4a37ec317f2d1932c7502ca",
    "test_x.h5.gz": "d8c2d60d490dbd479f8199bdfa0cf6ec",
    "test_y.h5.gz": "60a7035772fbdb7f34eb86d4420cf66a",
    "test_meta.csv": "3455fd69135b66734e1008f3af684566",
}


def rows(folder: Path) -> Iterator[Row]:
    """``camelyonpatch_level_2_split_train_x.h5``: images; ``..._y.h5``: labels; ``..._meta.csv``: slides, optional."""
    for published, split in _SPLITS:
        images = folder / f"{_NAME.format(published, 'x')}.h5"
        if images.is_file():
            yield from _split(folder, images, published, split)


def _split(folder: Path, images: Path, published: str, split: str) -> Iterator[Row]:
    labels = folder / f"{_NAME.format(published, 'y')}.h5"
    meta = folder / f"{_NAME.format(published, 'meta')}.csv"
    try:
        with h5py.File(labels, "r") as file:
            numbers = np.asarray(file["y"]).reshape(-1)
        with h5py.File(images, "r") as file:
            x: Any = file["x"]
            if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or len(x) != len(numbers):
                raise BadInput(
                    f"{images}: {x.shape} {x.dtype}, where {len(numbers)} images of (96, 96, 3) are expected"
                )
            home = folder / CONVERTED / "pcam" / split
            paths = [home / f"{n // 1000:03d}" / f"{n:06d}.png" for n in range(len(numbers))]
            save(_pictures(x, paths), len(paths), f"writing {split} images")
    except (OSError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None and labels.exists():
            raise
        raise BadInput(f"{images}: not a file of PatchCamelyon, or {labels.name} is missing ({error})") from None
    slides = [row["wsi"] for row in read_csv(meta, "wsi")] if meta.is_file() else [""] * len(paths)
    if len(slides) != len(paths):
        raise BadInput(f"{meta}: {len(slides)} rows for {len(paths)} images")
    for path, number, slide in zip(paths, numbers, slides):
        yield Row(path, PCAM.classes[int(number > 0)], patient=slide, split=split)


def _pictures(x: Any, paths: list[Path]) -> Iterator[tuple[Path, Any]]:
    """Images in blocks, as the file holds them compressed; a block that is written already is not read."""
    for start in range(0, len(paths), _BLOCK):
        part = paths[start : start + _BLOCK]
        block: NDArray[np.uint8] | None = None if all(p.exists() for p in part) else x[start : start + _BLOCK]
        for place, path in enumerate(part):
            yield path, (partial(np.zeros, 0, np.uint8) if block is None else block[place])


PCAM = DataSet(
    name="pcam",
    what="lymph nodes, H&E tiles of 96 pixels at 10x, a metastasis in the middle 32 or not",
    use="a large two-class task with known slides",
    homepage="https://github.com/basveeling/pcam",
    files=tuple(
        File(name, f"https://zenodo.org/records/2546921/files/{name}", checksum=f"md5:{md5}")
        for name, md5 in ((_NAME.format(*part.split("_", 1)), md5) for part, md5 in _MD5.items())
    ),
    checksums="the data set's page, of which validation and test are exchanged (its issues 1 and 4; torchvision 6644)",
    licence="CC0",
    citation="Veeling et al. 2018, Rotation equivariant CNNs for digital pathology, arXiv:1806.03962; Camelyon16",
    classes=("no_tumor", "tumor"),
    images={"train": 262_144, "val": 32_768, "test": 32_768},
    split="published: by slide of Camelyon16",
    patient="the slide (column wsi of the meta files)",
    pitfalls="The label is that of the middle 32 x 32 pixels: a crop or a shift can lose it. Some tiles are there "
    "twice (Kaggle's copy is without them). As PNG about 7 GB in 327,680 files.",
    rows=rows,
)
EVA = replace(PCAM, split="as published, and its val is val", manifest="manifest_eva")
SETS = (replace(PCAM, eva=EVA),)
