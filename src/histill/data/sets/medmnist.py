"""MedMNIST: the twelve sets of pictures, of one npz file each, at 28, 64, 128 and 224 pixels.

What was published in grey stays grey.
"""

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
_SIDES = (28, 64, 128, 224)
_ORGANS = (
    "bladder; femur-left; femur-right; heart; kidney-left; kidney-right; liver; lung-left; lung-right; pancreas; spleen"
)


class _Kind(NamedTuple):
    what: str
    classes: str
    images: tuple[int, int, int]
    md5: str
    pitfalls: str
    licence: str = "CC BY 4.0"
    patient: str = "not published"
    findings: int = 0  # labels of an image of which any, or none, may hold; then the classes are none and any


_KINDS = {
    "pathmnist": _Kind(
        "colorectal tissue: nct-crc, made small",
        "adipose; background; debris; lymphocytes; mucus; smooth muscle; normal colon mucosa; "
        "cancer-associated stroma; colorectal adenocarcinoma epithelium",
        (89_996, 10_004, 7_180),
        "a8b06965200029087d5bd730944a56c1 55aa9c1e0525abe5a6b9d8343a507616 "
        "ac42d08fb904d92c244187169d1fd1d9 2c51a510bcdc9cf8ddb2af93af1eadec",
        "As nct-crc; the validation part is of the training patients.",
    ),
    "bloodmnist": _Kind(
        "blood cells, single, eight kinds",
        "basophil; eosinophil; erythroblast; immature granulocytes(myelocytes, metamyelocytes and promyelocytes); "
        "lymphocyte; monocyte; neutrophil; platelet",
        (11_959, 1_712, 3_421),
        "7053d0359d879ad8a5505303e11de1dc 2b94928a2ae4916078ca51e05b6b800b "
        "adace1e0ed228fccda1f39692059dd4c b718ff6835fcbdb22ba9eacccd7b2601",
        "Cells were split at random; whose they are is not published.",
    ),
    "dermamnist": _Kind(
        "skin lesions: ham10000, made small",
        "actinic keratoses and intraepithelial carcinoma; basal cell carcinoma; benign keratosis-like lesions; "
        "dermatofibroma; melanoma; melanocytic nevi; vascular lesions",
        (7_007, 1_003, 2_005),
        "0744692d530f8e62ec473284d019b0c7 b70a2f5635c6199aeaa28c31d7202e1f "
        "2defd784463fa5243564e855ed717de1 8974907d8e169bef5f5b96bc506ae45d",
        "Images of one lesion are in several splits (Abhishek et al. 2025, Sci. Data 12:196); use ham10000, which "
        "knows its lesions.",
        "CC BY-NC 4.0",
    ),
    "retinamnist": _Kind(
        "fundus photographs, five grades of diabetic retinopathy",
        "0; 1; 2; 3; 4",
        (1_080, 120, 400),
        "bd4c0672f1bba3e3a89f0e4e876791e4 afda852cc34dcda56f86ad2b2457dbcc "
        "e48e916a24454daf90583d4e6efb1a18 eae7e3b6f3fcbda4ae613ebdcbe35348",
        "Grades are an order, which a classifier does not know; 120 images for validation are few.",
    ),
    "octmnist": _Kind(
        "retinas by optical coherence tomography, four diagnoses",
        "choroidal neovascularization; diabetic macular edema; drusen; normal",
        (97_477, 10_832, 1_000),
        "c68d92d5b585d8d81f7112f81e2d0842 e229e9440236b774d9f0dfef9d07bdaf "
        "0a97e76651ace45c5d943ee3f65b63ae abc493b6d529d5de7569faaef2773ba3",
        "Each part's images are single slices of scans, and validation was cut from the source's training images: it "
        "may show the same eyes. Results on this source are inflated where scans are divided (Tampu et al. 2022, "
        "Sci. Data 9:580).",
    ),
    "pneumoniamnist": _Kind(
        "chest radiographs of children, pneumonia or not",
        "normal; pneumonia",
        (4_708, 524, 624),
        "28209eda62fecd6e6a2d98b1501bb15f 8f4eceb4ccffa70c672198ea285246c6 "
        "05b46931834c231683c68f40c47b2971 d6a3c71de1b945ea11211b03746c1fe1",
        "Validation was cut from the source's training images; the test is the source's validation part. Children "
        "have several radiographs in the source.",
    ),
    "breastmnist": _Kind(
        "breast, ultrasound, malignant or not",
        "malignant; normal, benign",
        (546, 78, 156),
        "750601b1f35ba3300ea97c75c52ff8f6 742edef2a1fd1524b2efff4bd7ba9364 "
        "363e4b3f8d712e9b5de15470a2aaadf1 b56378a6eefa9fed602bb16d192d4c8b",
        "Normal and benign are one class. 156 images for the test: intervals are wide.",
    ),
    "tissuemnist": _Kind(
        "kidney cortex, single cells by fluorescence, eight kinds (BBBC051)",
        "Collecting Duct, Connecting Tubule; Distal Convoluted Tubule; Glomerular endothelial cells; Interstitial "
        "endothelial cells; Leukocytes; Podocytes; Proximal Tubule Segments; Thick Ascending Limb",
        (165_466, 23_640, 47_280),
        "ebe78ee8b05294063de985d821c1c34b 123ece2eba09d0aa5d698fda57103344 "
        "61b955355d7425a89687b06cca3ce0c2 b077128c4a949f0a4eb01517f9037b9c",
        "Cells of the same three specimens are in all parts. The source has 32 x 32 pixels in 7 slices, of which the "
        "maximum is shown: larger sizes hold no more.",
    ),
    "organamnist": _Kind(
        "abdomen and chest, CT, eleven organs in axial slices (LiTS)",
        _ORGANS,
        (34_561, 6_491, 17_778),
        "68e3f8846a6bd62f0c9bf841c0d9eacc 2dcccc29b88e6da5a01161ef20cda288 "
        "eeae80d0a227a8d099027e1b3cfd3b60 50747347e05c87dd3aaf92c49f9f3170",
        "Left and right are classes, and a mirrored slice is of the other side: most recipes here mirror their views "
        "(rckd.finetune --augment none does not).",
        patient="not published; the parts are of different scans (115, 16 and 70)",
    ),
    "organcmnist": _Kind(
        "the same scans in coronal slices",
        _ORGANS,
        (12_975, 2_392, 8_216),
        "b9ceb9546e10131b32923c5bbeaea2b1 3ce34a8724ea6f548e6db4744d03b6a9 "
        "773c1f009daa3fe5d9a2a201b2a7ed94 050f5e875dc056f6768abf94ec9995d1",
        "As organamnist; its scans are those of organamnist and organsmnist.",
        patient="not published; the parts are of different scans (115, 16 and 70)",
    ),
    "organsmnist": _Kind(
        "the same scans in sagittal slices",
        _ORGANS,
        (13_932, 2_452, 8_827),
        "9ab87b696fb54e2a387ebe992d6ed5f1 53a6d115339d874c25e309a994ff46d3 "
        "ded0c5fa01a95dc4978b956f613e9b8e b354719e553fbbb2513d5533f52a4cb1",
        "As organamnist; its scans are those of organamnist and organcmnist.",
        patient="not published; the parts are of different scans (115, 16 and 70)",
    ),
    "chestmnist": _Kind(
        "chest radiographs, any of 14 findings or none (ChestX-ray14)",
        "no finding; finding",
        (78_468, 11_219, 22_433),
        "02c8a6516a18b556561a56cbdd36c4a8 9de6cd0b934ebb5b7426cfba5efbae16 "
        "db107e5590b27930b62dbaf558aebee3 45bd33e6f06c3e8cdb481c74a89152aa",
        "Published with 14 labels per image, which is more than a class; here it is one question, so that figures of "
        "papers (the mean AUROC of 14) do not compare. Labels were mined from the text of reports.",
        findings=14,
    ),
}


def rows(folder: Path, *, stem: str, classes: tuple[str, ...], findings: int = 0) -> Iterator[Row]:
    """``pathmnist.npz`` with ``train_images`` and ``train_labels``, and so on.

    Images are ``(N, S, S, 3)``, grey ones ``(N, S, S)``; labels ``(N, 1)``, or ``(N, findings)`` of 0 and 1.
    """
    file = folder / f"{stem}.npz"
    try:
        with zipfile.ZipFile(file) as archive:
            for split in _SPLITS:
                labels = list(_arrays(file, archive, f"{split}_labels"))
                paths = [folder / CONVERTED / stem / split / f"{n:06d}.png" for n in range(len(labels))]
                pictures = zip(paths, _arrays(file, archive, f"{split}_images"), strict=True)
                save(((path, pixels.astype(np.uint8)) for path, pixels in pictures), len(paths), f"writing {split}")
                for path, label in zip(paths, labels):
                    number = _any(label, findings) if findings else int(label.item())
                    if not 0 <= number < len(classes):
                        raise BadInput(f"{file}: label {number}, where there are {len(classes)} classes")
                    yield Row(path, classes[number], split=split)
    except FileNotFoundError:
        raise BadInput(f"{file} does not exist") from None
    except BadInput:
        raise
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise BadInput(f"{file}: not a file of MedMNIST ({error})") from None


def _any(label: NDArray[np.uint8], findings: int) -> int:
    if label.shape != (findings,) or not np.isin(label, (0, 1)).all():
        raise ValueError(
            f"a label of {label.size} values from {label.min()} to {label.max()}, not {findings} of 0 and 1"
        )
    return int(label.any())


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
        patient=kind.patient,
        pitfalls=kind.pitfalls,
        rows=partial(rows, stem=stem, classes=classes, findings=kind.findings),
    )


SETS = tuple(_record(name, kind, side) for name, kind in _KINDS.items() for side in _SIDES)
