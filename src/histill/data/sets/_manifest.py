"""The rows of a data set -> a manifest beside its images, which every command reads."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from histill.data.images import of_each
from histill.data.sets._record import DataSet, Row
from histill.errors import BadInput
from histill.files import atomic, file_digest
from histill.progress import notice

if TYPE_CHECKING:
    from histill.data.images import Images

__all__ = ["By", "chosen", "manifest", "read"]

By = Literal["patient", "image", "eva"]
_GUARDED = ("test", "val", "train", "")


def chosen(data: DataSet, by: By) -> DataSet:
    """The data set as it is read ``by``: another record where that is by eva.

    Raises:
        BadInput: no such protocol, or eva has no split of this data set.
    """
    if by not in get_args(By):
        raise BadInput(f"--by {by}: patient, image or eva")
    if by != "eva":
        return data
    if data.eva is None:
        raise BadInput(f"--by eva: the eva benchmark has no split of {data.name}; give --by patient or --by image")
    return data.eva


def manifest(data: DataSet, folder: str | Path, *, by: By = "patient") -> Path:
    """Write the manifest of a folder in the published layout and return it.

    What was not published as image files is converted first, into ``folder/converted``. A folder that holds only a
    part of the data set is a notice. A picture that is there twice, in two splits, of two patients or with two labels,
    is listed once: that of test rather than of val, and of val rather than of train.

    Args:
        data: which data set it is.
        folder: where it lies.
        by: ``patient``: nobody is in two splits; where the published split divides patients it is left out, and what
            comes next splits by patient. ``image``: the protocol of the literature, patients not looked at. ``eva``:
            the splits of the eva benchmark, where it has them.

    Raises:
        BadInput: no such folder, another layout, or no split of eva.
    """
    data = chosen(data, by)
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    rows = list(data.rows(folder))
    if not rows:
        raise BadInput(f"{folder}: no images of {data.name} in it; unpack the data set as it was published")
    if data.task == "labels" and (odd := sorted({row.label for row in rows} - set(data.classes))):
        raise BadInput(f"{folder}: {', '.join(map(repr, odd))} is no class of {data.name}: {', '.join(data.classes)}")
    _compare(data, rows, folder)
    path = folder / f"{data.manifest}{'_image' if by == 'image' else ''}.csv"
    if by == "patient":
        rows = _apart(data, rows)
    elif by == "image":
        rows = [row._replace(patient="") for row in rows]
    _write(path, folder, _once(data, rows, by))
    return path


def read(data: DataSet, folder: str | Path, *, by: By = "patient") -> Images:
    """The table of a folder in the published layout: `manifest`, read again.

    Raises:
        BadInput: as `manifest`, `histill.data.read_images` and `histill.data.read_masks`.
    """
    from histill.data import read_images, read_masks

    path = manifest(data, folder, by=by)
    data = chosen(data, by)
    if data.task == "labels":
        return read_images(path)
    kind: Literal["classes", "instances"] = "classes" if data.task == "masks" else "instances"
    return read_masks(path, kind=kind, classes=data.classes)


def _compare(data: DataSet, rows: list[Row], folder: Path) -> None:
    found = Counter(row.split for row in rows)
    if dict(found) == dict(data.images):
        return
    parts = [
        f"{split + ': ' if split else ''}{found[split]:,} of {data.images.get(split, 0):,} images"
        for split in sorted({*found, *data.images}, key=("train", "val", "test", "").index)
    ]
    notice(f"{folder} is not the whole of {data.name} as published ({'; '.join(parts)})")


def _apart(data: DataSet, rows: list[Row]) -> list[Row]:
    """The rows, without the published split where it divides patients."""
    where: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.patient and row.split:
            where[row.patient].add(row.split)
    if not (divided := sorted(patient for patient, splits in where.items() if len(splits) > 1)):
        return rows
    notice(
        f"{data.name}: the published split has {len(divided)} patients in two parts, so it is left out, and what comes "
        "next splits by patient; --by image keeps it"
    )
    return [row._replace(split="") for row in rows]


def _once(data: DataSet, rows: list[Row], by: By) -> list[Row]:
    """The rows, without copies of a picture that contradict one another.

    eva's test keeps what is there for two patients, such as a blank tile: it is what its figures are of.
    """
    said = [(row.label, "" if (by, row.split) == ("eva", "test") else row.patient, row.split) for row in rows]
    alike: dict[str, list[int]] = defaultdict(list)
    for place, content in enumerate(of_each([row.path for row in rows], file_digest, "looking for copies")):
        alike[content].append(place)
    left: set[int] = set()
    for places in alike.values():
        if len({said[i] for i in places}) > 1:
            left |= set(sorted(places, key=lambda i: (_GUARDED.index(rows[i].split), i))[1:])
    if left:
        notice(f"{data.name}: {len(left)} copies of other images, with another label, patient or split, are left out")
    return [row for place, row in enumerate(rows) if place not in left]


def _write(path: Path, folder: Path, rows: list[Row]) -> None:
    columns = [name for name in Row._fields if any(getattr(row, name) for row in rows)]
    if any(row.mask for row in rows):
        columns = [name for name in columns if name != "label"]  # pixels are what is learnt
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(sorted([_text(getattr(row, name), folder) for name in columns] for row in rows))


def _text(value: object, folder: Path) -> str:
    return value.relative_to(folder).as_posix() if isinstance(value, Path) else str(value or "")
