"""Dermoscopy of the ISIC challenges 2018 (task 3), 2019 and 2020 (melanoma)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from histill.data.sets._record import DataSet, File, Row, find, read_csv
from histill.errors import BadInput

__all__ = ["SETS"]

_S3 = "https://isic-challenge-data.s3.amazonaws.com"
_PARTS = (("Training", "train"), ("Validation", "val"), ("Test", "test"))
_SEVEN = ("AKIEC", "BCC", "BKL", "DF", "MEL", "NV", "VASC")
_EIGHT = ("AK", "BCC", "BKL", "DF", "MEL", "NV", "SCC", "VASC")


def rows_2018(folder: Path) -> Iterator[Row]:
    """``ISIC2018_Task3_Training_Input/ISIC_0024306.jpg``, ``..._GroundTruth/..._GroundTruth.csv``, lesion groupings."""
    lesions: dict[str, str] = {}
    if (file := folder / "ISIC2018_Task3_Training_LesionGroupings.csv").is_file():
        lesions = {row["image"]: row["lesion_id"] for row in read_csv(file, "image", "lesion_id")}
    for part, split in _PARTS:
        images, truth = folder / f"ISIC2018_Task3_{part}_Input", f"ISIC2018_Task3_{part}_GroundTruth"
        if images.is_dir():
            for path, label in _labelled(images, find(folder, truth, f"{truth}.csv")):
                yield Row(path, label, patient=lesions.get(path.stem, ""), split=split)


def rows_2019(folder: Path) -> Iterator[Row]:
    """``ISIC_2019_Training_Input/ISIC_0000000.jpg``, ``ISIC_2019_Training_GroundTruth.csv``, ``..._Metadata.csv``."""
    lesions: dict[str, str] = {}
    if (file := folder / "ISIC_2019_Training_Metadata.csv").is_file():
        lesions = {row["image"]: row["lesion_id"] for row in read_csv(file, "image", "lesion_id")}
    images = find(folder, "ISIC_2019_Training_Input")
    for path, label in _labelled(images, folder / "ISIC_2019_Training_GroundTruth.csv"):
        yield Row(path, label, patient=lesions.get(path.stem, ""))


def rows_2020(folder: Path) -> Iterator[Row]:
    """``train/ISIC_2637011.jpg``, ``ISIC_2020_Training_GroundTruth_v2.csv`` and ``..._Duplicates.csv``."""
    copies: set[str] = set()
    if (file := folder / "ISIC_2020_Training_Duplicates.csv").is_file():
        copies = {row["image_name_2"] for row in read_csv(file, "image_name_2")}
    images = find(folder, "ISIC_2020_Training_JPEG", "train")
    for row in read_csv(
        folder / "ISIC_2020_Training_GroundTruth_v2.csv", "image_name", "patient_id", "benign_malignant"
    ):
        path = images / f"{row['image_name']}.jpg"
        if row["image_name"] not in copies and path.is_file():
            yield Row(path, row["benign_malignant"], patient=row["patient_id"])


def _labelled(images: Path, truth: Path) -> Iterator[tuple[Path, str]]:
    """The images that are there, with the class whose column says 1."""
    for row in read_csv(truth, "image"):
        said = [name for name, value in row.items() if name != "image" and value in ("1", "1.0")]
        if len(said) != 1:
            raise BadInput(f"{truth}: {row['image']} has {len(said)} classes, not one")
        path = images / f"{row['image']}.jpg"
        if path.is_file():
            yield path, said[0]


def _files(year: int, *names: str) -> tuple[File, ...]:
    return tuple(File(name, f"{_S3}/{year}/{name}") for name in names)


_2018 = DataSet(
    name="isic-2018",
    what="skin, dermoscopy, seven kinds of lesion (HAM10000 and a test set of its own)",
    use="dermoscopy with an untouched test set",
    homepage="https://challenge.isic-archive.com/data/#2018",
    files=_files(
        2018,
        *(f"ISIC2018_Task3_{part}_{what}.zip" for part, _ in _PARTS for what in ("Input", "GroundTruth")),
        "ISIC2018_Task3_Training_LesionGroupings.csv",
    ),
    licence="CC BY-NC 4.0",
    citation="Codella et al. 2019, Skin lesion analysis toward melanoma detection 2018, arXiv:1902.03368",
    classes=_SEVEN,
    images={"train": 10_015, "val": 193, "test": 1_512},
    split="published: 10,015, 193 and 1,512",
    patient="the lesion (LesionGroupings.csv); of validation and test images not published",
    pitfalls="Whether a validation lesion is in training too is not known. Classes from 115 to 6,705 images: look at "
    "balanced accuracy.",
    rows=rows_2018,
)
_2019 = DataSet(
    name="isic-2019",
    what="skin, dermoscopy of several clinics, eight kinds of lesion",
    use="dermoscopy, the largest labelled set of many classes",
    homepage="https://challenge.isic-archive.com/data/#2019",
    files=_files(
        2019,
        "ISIC_2019_Training_Input.zip",
        "ISIC_2019_Training_GroundTruth.csv",
        "ISIC_2019_Training_Metadata.csv",
    ),
    licence="CC BY-NC 4.0",
    citation="Tschandl et al. 2018 (HAM10000); Combalia et al. 2019, BCN20000, arXiv:1908.02288; Codella et al. 2018",
    classes=_EIGHT,
    images={"": 25_331},
    split="none published for the labelled images",
    patient="the lesion (Metadata.csv), of some images not given",
    pitfalls="Holds HAM10000 and the older challenges: no test on those after training on it.",
    rows=rows_2019,
)
_2020 = DataSet(
    name="isic-2020",
    what="skin, dermoscopy, melanoma or not, of 2,056 patients",
    use="DSNet's task: benign or malignant, with known patients",
    homepage="https://challenge.isic-archive.com/data/#2020",
    files=_files(
        2020,
        "ISIC_2020_Training_JPEG.zip",
        "ISIC_2020_Training_GroundTruth_v2.csv",
        "ISIC_2020_Training_Duplicates.csv",
    ),
    licence="CC BY-NC 4.0",
    citation="Rotemberg et al. 2021, A patient-centric dataset of images and metadata, Sci. Data 8:34",
    classes=("benign", "malignant"),
    images={"": 32_701},
    split="none published for the labelled images",
    patient="the column patient_id",
    pitfalls="584 of 33,126 are malignant: accuracy says nothing. 425 listed duplicates are left out. DSNet's own "
    "9,996 ISIC images are not published, and its test figures lie above its validation, as if the two overlapped.",
    rows=rows_2020,
)
SETS = (_2018, _2019, _2020)
