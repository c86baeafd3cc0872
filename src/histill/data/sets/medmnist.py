"""MedMNIST: coloured sets of one npz file each, at 28, 64 and 224 pixels."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from histill.data.sets._pixels import save
from histill.data.sets._record import CONVERTED, DataSet, File, Row
from histill.errors import BadInput

__all__ = ["SETS"]

_SPLITS = ("train", "val", "test")
_SIDES = (28, 64, 224)


class _Kind(NamedTuple):
    what: str
    classes: str
    images: tuple[int, int, int]
    md5: str
    pitfalls: str
    licence: str = "CC BY 4.0"


_KINDS = {
    "pathmnist": _Kind(
        "colorectal tissue: nct-crc, made small",
        "adipose; background; debris; lymphocytes; mucus; smooth muscle; normal colon mucosa; "
        "cancer-associated stroma; colorectal adenocarcinoma epithelium",
        (89_996, 10_004, 7_180),
        "a8b06965200029087d5bd730944a56c1 55aa9c1e0525abe5a6b9d8343a507616 2c51a510bcdc9cf8ddb2af93af1eadec",
        "As nct-crc; the validation part is of the training patients.",
    ),
    "bloodmnist": _Kind(
        "blood cells, single, eight kinds",
        "basophil; eosinophil; erythroblast; immature granulocytes(myelocytes, metamyelocytes and promyelocytes); "
        "lymphocyte; monocyte; neutrophil; platelet",
        (11_959, 1_712, 3_421),
        "7053d0359d879ad8a5505303e11de1dc 2b94928a2ae4916078ca51e05b6b800b b718ff6835fcbdb22ba9eacccd7b2601",
        "Cells were split at random; whose they are is not published.",
    ),
    "dermamnist": _Kind(
        "skin lesions: ham10000, made small",
        "actinic keratoses and intraepithelial carcinoma; basal cell carcinoma; benign keratosis-like lesions; "
        "dermatofibroma; melanoma; melanocytic nevi; vascular lesions",
        (7_007, 1_003, 2_005),
        "0744692d530f8e62ec473284d019b0c7 b70a2f5635c6199aeaa28c31d7202e1f 8974907d8e169bef5f5b96bc506ae45d",
        "Images of one lesion are in several splits (Abhishek et al. 2025, Sci. Data 12:196); use ham10000, which "
        "knows its lesions.",
        "CC BY-NC 4.0",
    ),
    "retinamnist": _Kind(
        "fundus photographs, five grades of diabetic retinopathy",
        "0; 1; 2; 3; 4",
        (1_080, 120, 400),
        "bd4c0672f1bba3e3a89f0e4e876791e4 afda852cc34dcda56f86ad2b2457dbcc eae7e3b6f3fcbda4ae613ebdcbe35348",
        "Grades are an order, which a classifier does not know; 120 images for validation are few.",
    ),
}


def rows(folder: Path, *, stem: str, classes: tuple[str, ...]) -> Iterator[Row]:
    """``pathmnist.npz`` with ``train_images`` ``(N, S, S, 3)`` and ``train_labels`` ``(N, 1)``, and so on."""
    file = folder / f"{stem}.npz"
    try:
        with zipfile.ZipFile(file) as archive:
            for split in _SPLITS:
                labels = list(_arrays(file, archive, f"{split}_labels"))
                paths = [folder / CONVERTED / stem / split / f"{n:06d}.png" for n in range(len(labels))]
                pictures = zip(paths, _arrays(file, archive, f"{split}_images"), strict=True)
                save(((path, pixels.astype(np.uint8)) for path, pixels in pictures), len(paths), f"writing {split}")
                for path, label in zip(paths, labels):
                    if not 0 <= (number := int(label.item())) < len(classes):
                        raise BadInput(f"{file}: label {number}, where there are {len(classes)} classes")
                    yield Row(path, classes[number], split=split)
    except FileNotFoundError:
        raise BadInput(f"{file} does not exist") from None
    except BadInput:
        raise
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise BadInput(f"{file}: not a file of MedMNIST ({error})") from None


def _arrays(file: Path, archive: zipfile.ZipFile, name: str) -> Iterator[NDArray[np.uint8]]:
    """The entries of an array one by one: at 224 pixels they are 13 GB together. Nothing is unpickled."""
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
        if fortran or dtype.kind not in "ui" or not 2 <= len(shape) <= 4:
            raise BadInput(f"{file}: {name} is {shape} of {dtype}; whole numbers in C order are expected")
        size = math.prod(shape[1:]) * dtype.itemsize
        for _ in range(shape[0]):
            yield np.frombuffer(stream.read(size), dtype).reshape(shape[1:])


def _record(name: str, kind: _Kind, side: int) -> DataSet:
    classes = tuple(kind.classes.split("; "))
    stem = name if side == 28 else f"{name}_{side}"
    url = f"https://zenodo.org/records/10519652/files/{stem}.npz"
    return DataSet(
        name=stem.replace("_", "-"),
        what=f"{kind.what}; {side} pixels",
        use="quick runs, and a test that many papers share",
        homepage="https://medmnist.com/",
        files=(File(f"{stem}.npz", url, checksum=f"md5:{kind.md5.split()[_SIDES.index(side)]}"),),
        checksums="medmnist/info.py 3.0.2",
        licence=kind.licence,
        citation="Yang et al. 2023, MedMNIST v2, Sci. Data 10:41",
        classes=classes,
        images=dict(zip(_SPLITS, kind.images)),
        split="published: train, val and test",
        patient="not published",
        pitfalls=kind.pitfalls,
        rows=partial(rows, stem=stem, classes=classes),
    )


SETS = tuple(_record(name, kind, side) for name, kind in _KINDS.items() for side in _SIDES)
