"""Phantom tissue: H&E-like images whose truth is known, drawn without any patient's data.

Kinds of tissue differ by nuclear size, shape, chromatin and arrangement, glands, vacuoles and pigment; patients
differ in the same cues and in their staining, scanners in how they see it. Mean colour says next to nothing.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.data.phantom_draw import stain_tissue
from histill.data.phantom_field import Window, new_key
from histill.data.phantom_kinds import KINDS, Kind, Patient, Scanner, kind_of
from histill.data.phantom_slide import write_slide
from histill.errors import BadInput

__all__ = ["KINDS", "Kind", "Phantom", "draw", "write_images", "write_slide"]

PATIENTS_PER_SEED = 100_000  # so that the patients of different seeds are different people


@dataclass(frozen=True)
class Phantom:
    """A picture and its truth.

    Attributes:
        image: ``(H, W, 3)`` uint8 RGB.
        nuclei: ``(H, W)`` uint16, 0 outside nuclei, else the nucleus's number.
        lesion: ``(H, W)`` bool, the area of the kind's own cells (nests, glands), without the stroma between.
    """

    image: NDArray[np.uint8]
    nuclei: NDArray[np.uint16]
    lesion: NDArray[np.bool_]


def draw(
    kind: str,
    *,
    size: int = 96,
    mpp: float = 0.5,
    seed: int = 0,
    patient: int = 0,
    scanner: int = 0,
    difficulty: float = 0.5,
) -> Phantom:
    """Draw a square field of one kind of tissue.

    The same arguments give the same picture on every machine (its JPEG step: with the same libjpeg). ``seed`` and
    ``patient`` choose the place, so another ``kind`` or ``mpp`` shows the same place with other cells or closer.

    Args:
        kind: a name in `KINDS`.
        size: pixels per side.
        mpp: microns per pixel.
        seed: which field of the patient.
        patient: who; sets stain vectors and strengths and the patient's own tendency in each cue.
        scanner: which; sets white point, gamma, blur, noise and JPEG quality.
        difficulty: how far patients differ in the cues that tell the kinds apart, from 0 (not at all) to 1; at the
            default they differ more in the size and density of nuclei than benign and malignant do on average.

    Raises:
        BadInput: an unknown kind or a number out of range.
    """
    if size < 1 or not 0 < mpp <= 16 or min(seed, patient, scanner) < 0:
        raise BadInput(
            f"phantom: size={size} must be at least 1, mpp={mpp} in (0, 16], "
            f"seed={seed}, patient={patient} and scanner={scanner} not negative"
        )
    window = Window(0, 0, size, size, mpp)
    person, camera = Patient.number(patient), Scanner.number(scanner)
    key = new_key(0, seed, patient)
    stains = stain_tissue(key, window, [(person.kind(kind_of(kind), difficulty), np.ones(window.shape))])
    raw = Image.fromarray(camera.image(stains.amounts, person, window, key))
    with io.BytesIO() as file:
        raw.save(file, "JPEG", quality=camera.quality)
        image = np.array(Image.open(file))
    return Phantom(image, stains.nuclei.astype(np.uint16), stains.own)


def write_images(
    out: str | Path,
    *,
    kinds: Sequence[str] = ("benign", "malignant"),
    patients: int = 60,
    images_per_patient: int = 8,
    size: int = 96,
    mpp: float = 1.0,
    seed: int = 0,
    scanners: int = 3,
    difficulty: float = 0.5,
    masks: bool = False,
    unlabelled: int = 0,
) -> Path:
    """Write a data set of phantom images.

    Each patient has one kind; the numbers of patients per kind, and per scanner within a kind, differ by one at most.

    Args:
        out: the folder to make: ``images/``, ``manifest.csv`` with ``path,label,patient,site``, and by request
            ``masks/`` (nuclei as 16-bit PNG, the column ``mask``) and ``unlabelled/`` (other patients).
        kinds: the classes, names in `KINDS`.
        patients: how many, at least one for each kind.
        images_per_patient: fields of each.
        size: pixels per side.
        mpp: microns per pixel.
        seed: which data set; other seeds have other patients.
        scanners: how many, independent of the kind.
        difficulty: see `draw`.
        masks: whether to write nuclei.
        unlabelled: how many images to write without label.

    Returns:
        The manifest's path.

    Raises:
        BadInput: ``out`` exists and is not empty, an unknown kind or a number out of range.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is already there; give another --out or remove it")
    if len(set(kinds)) < len(kinds) or not kinds:
        raise BadInput(f"phantom: kinds must be different names: {', '.join(kinds)}")
    if not len(kinds) <= patients <= PATIENTS_PER_SEED // 2 or min(images_per_patient, scanners) < 1 or unlabelled < 0:
        raise BadInput(
            f"phantom: patients={patients} must be {len(kinds)} to {PATIENTS_PER_SEED // 2}, images_per_patient="
            f"{images_per_patient} and scanners={scanners} at least 1, unlabelled={unlabelled} not negative"
        )
    rng = np.random.Generator(np.random.Philox(new_key(3, seed)))
    place = rng.permutation(patients)  # a patient's place in the balanced design, which says kind and scanner

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        temporary.chmod(0o755)
        for folder in ["images"] + ["masks"] * masks + ["unlabelled"] * (unlabelled > 0):
            (temporary / folder).mkdir()
        rows = []
        for i in range(patients):
            kind = kinds[place[i] % len(kinds)]
            scanner = int(place[i]) // len(kinds) % scanners
            number = seed * PATIENTS_PER_SEED + i
            for j in range(images_per_patient):
                phantom = draw(kind, size=size, mpp=mpp, seed=j, patient=number, scanner=scanner, difficulty=difficulty)
                name = f"p{number:05d}_{j:02d}.png"
                Image.fromarray(phantom.image).save(temporary / "images" / name, compress_level=1)
                row = [f"images/{name}", kind, f"p{number:05d}", f"scanner{scanner}"]
                if masks:
                    Image.fromarray(phantom.nuclei).save(temporary / "masks" / name)
                    row.append(f"masks/{name}")
                rows.append(row)
        for i in range(unlabelled):
            phantom = draw(
                kinds[int(rng.integers(len(kinds)))],
                size=size,
                mpp=mpp,
                seed=i % images_per_patient,
                patient=seed * PATIENTS_PER_SEED + PATIENTS_PER_SEED // 2 + i // images_per_patient,
                scanner=i // images_per_patient % scanners,
                difficulty=difficulty,
            )
            Image.fromarray(phantom.image).save(temporary / "unlabelled" / f"u{i:05d}.png", compress_level=1)
        with (temporary / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["path", "label", "patient", "site"] + ["mask"] * masks)
            table.writerows(rows)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out / "manifest.csv"
