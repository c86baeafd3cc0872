"""What is known of a published data set, and the few steps that reading any of them takes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from histill.data.decode import EXTENSIONS
from histill.errors import BadInput

__all__ = ["DataSet", "File", "Row", "find", "pictures", "read_csv"]

CONVERTED = "converted"
"""The folder, below that of a data set, for what was not published as image files."""


@dataclass(frozen=True)
class File:
    """A file as it is published.

    Attributes:
        name: what it is called in the folder.
        url: where it is; empty where it has to be asked for (`DataSet.access` says how).
        size: bytes, where known.
        checksum: ``md5:...``, ``sha1:...`` or ``sha256:...`` as published; None where none is, and then the SHA-256 of
            the first download is kept and compared with later ones.
        into: a folder for the content of an archive that has none of its own.
    """

    name: str
    url: str = ""
    size: int | None = None
    checksum: str | None = None
    into: str = ""


class Row(NamedTuple):
    """An image: its file, and what is published of it."""

    path: Path
    label: str = ""
    patient: str = ""
    split: str = ""
    mask: Path | None = None
    site: str = ""


@dataclass(frozen=True)
class DataSet:
    """A published data set.

    Attributes:
        name: what it is called on the command line.
        what: one line.
        use: what it is for here.
        homepage: where it is described.
        files: what is downloaded.
        checksums: where the checksums come from.
        licence: of the data.
        citation: the paper to cite.
        task: ``labels``, ``masks`` (class numbers) or ``instances`` (numbers of nuclei).
        classes: labels as published; of masks the names of the numbers 0, 1, ...
        images: how many there are in each published split; the key "" where none is published.
        split: the protocol in words.
        patient: how the patient, or what stands for it, is known.
        pitfalls: what flatters or misleads, with the source.
        flags: of `histill`, for the shares of the protocol.
        command: what to run next.
        access: what to do where the files have to be asked for.
        manifest: what the manifest is called; another name where two data sets share their files.
        eva: the same in the splits of the eva benchmark (kaiko-ai/eva 0.4.5), None where it has none. What eva calls
            validation and reports on is ``test`` here, so that nothing is chosen on it.
        rows: reads a folder in the published layout.
    """

    name: str
    what: str
    use: str
    homepage: str
    files: tuple[File, ...]
    licence: str
    citation: str
    classes: tuple[str, ...]
    images: Mapping[str, int]
    split: str
    patient: str
    pitfalls: str
    rows: Callable[[Path], Iterable[Row]] = field(repr=False)
    task: Literal["labels", "masks", "instances"] = "labels"
    checksums: str = "none published"
    flags: str = ""
    command: str = "distill dsnet"
    access: str = ""
    manifest: str = "manifest"
    eva: DataSet | None = None

    @property
    def total(self) -> int:
        """How many images there are."""
        return sum(self.images.values())


def find(folder: Path, *parts: str) -> Path:
    """``folder/a/b``, or ``folder/b`` where the user gave the folder ``a`` itself.

    Raises:
        BadInput: neither is there.
    """
    for start in range(len(parts)):
        if (place := folder.joinpath(*parts[start:])).exists():
            return place
    raise BadInput(f"{folder}: no {'/'.join(parts)} in it; unpack the data set as it was published")


def pictures(folder: Path, suffix: str = "") -> Iterator[Path]:
    """The images right in ``folder``, in order, hidden files left out; only those of ``suffix`` where one is given."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.suffix.lower() in ({suffix} if suffix else EXTENSIONS):
            yield path


def read_csv(path: Path, *needed: str) -> list[dict[str, str]]:
    """Rows of a published CSV file, names and values stripped.

    Raises:
        BadInput: not there, not text, or without the columns ``needed``.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in needed if name not in header]:
                raise BadInput(f"{path}: no column {', '.join(missing)}; it has {', '.join(header)}")
            return [dict(zip(header, (value.strip() for value in row))) for row in reader if row]
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: not a CSV file ({error})") from None
