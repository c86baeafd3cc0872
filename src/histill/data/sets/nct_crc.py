"""NCT-CRC-HE-100K, with CRC-VAL-HE-7K as its test set: colorectal tissue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from histill.data.sets._record import DataSet, File, Row, find, pictures
from histill.errors import BadInput

__all__ = ["SETS"]

_FOLDERS = (("NCT-CRC-HE-100K", "train"), ("CRC-VAL-HE-7K", "test"))
_ZENODO = "https://zenodo.org/records/1214456/files/"


def rows(folder: Path) -> Iterator[Row]:
    """``NCT-CRC-HE-100K/ADI/ADI-AAAFLCLY.tif`` and ``CRC-VAL-HE-7K/ADI/ADI-TCGA-AAICEQFN.tif``."""
    there = [(folder / name, split) for name, split in _FOLDERS if (folder / name).is_dir()]
    if not there:
        raise BadInput(f"{folder}: no {' and no '.join(name for name, _ in _FOLDERS)} in it; unpack the two archives")
    for home, split in there:
        for label in NCT_CRC.classes:
            for path in pictures(find(home, label), ".tif"):
                yield Row(path, label, split=split)


NCT_CRC = DataSet(
    name="nct-crc",
    what="colon and rectum, H&E tiles of 224 pixels at 0.5 um per pixel, nine tissues",
    use="RCKD's fine-tuning; the usual test of pathology models",
    homepage="https://zenodo.org/records/1214456",
    files=(
        File("NCT-CRC-HE-100K.zip", f"{_ZENODO}NCT-CRC-HE-100K.zip", checksum="md5:035777cf327776a71a05c95da6d6325f"),
        File("CRC-VAL-HE-7K.zip", f"{_ZENODO}CRC-VAL-HE-7K.zip", checksum="md5:2fd1651b4f94ebd818ebf90ad2b6ce06"),
    ),
    checksums="Zenodo record 1214456",
    licence="CC BY 4.0",
    citation="Kather et al. 2019, Predicting survival from colorectal cancer histology slides, PLoS Med. 16:e1002730",
    classes=("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"),
    images={"train": 100_000, "test": 7_180},
    split="published: 100,000 to train, 7,180 of 50 other patients to test; RCKD cuts 20 % of the first for validation",
    patient="not published (the test patients are others than those of training)",
    pitfalls="A validation part of the 100,000 shares patients with training, so it flatters. Colour alone classifies: "
    "three mean values 50 %, a histogram 82 %, and JPEG traces differ by class (Ignatov and Malivenko 2024, "
    "arXiv:2409.11546).",
    rows=rows,
    flags="--val 0.2",
)
EVA = replace(NCT_CRC, split="as published", manifest="manifest_eva")
SETS = (replace(NCT_CRC, eva=EVA),)
