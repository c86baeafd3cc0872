"""A folder of class folders or a manifest -> one table of images."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import pandas as pd

from histill.data.decode import EXTENSIONS
from histill.errors import BadInput
from histill.files import atomic, digest, file_digest, parse_json
from histill.progress import progress

__all__ = ["SPLITS", "UNLABELLED", "Images", "few", "images_below", "of_each", "read_images", "read_unlabelled"]

S = TypeVar("S")
T = TypeVar("T")

SPLITS = ("train", "val", "test")
UNLABELLED = ""
"""The label of an image that has none."""

_CHUNK = 64
_MOST_BYTES = 1 << 30
"""Of a manifest; ten million images need about as much."""
_MOST_COLUMNS = 1000
_MOST_HEADER = 1 << 16
_MOST_LABEL = 200
"""Characters of a class name."""
_MOST_SAID = 400
"""Characters of a name in an error."""
_CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"

COLUMNS = ("path", "label", "patient", "split", "mask", "site", "slide", "mpp", "content", "mask_content")
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """A table of images.

    Attributes:
        frame: a row per image: ``path`` (relative to ``root``), ``label``, ``patient``, ``split``, ``mask``, ``site``,
            the ``slide`` that it was cut from and its microns per pixel, ``mpp`` (empty where unknown), and
            ``content``, the SHA-256 of the file; ``mask_content`` that of its mask.
        root: the folder that the paths are relative to.
        classes: the class names; a class number is a place in it. None of unlabelled images.
        notices: what was noticed while reading, one line each.
        masks: what is learnt: "" of images with labels or without, ``classes`` where a mask gives each pixel's class
            number, ``instances`` where it gives the number of the nucleus that the pixel is in.
    """

    frame: pd.DataFrame
    root: Path
    classes: tuple[str, ...]
    notices: tuple[str, ...] = ()
    masks: Literal["", "classes", "instances"] = ""

    def __post_init__(self) -> None:
        if not isinstance(self.frame, pd.DataFrame) or (lacking := {*COLUMNS[:4], "content"} - set(self.frame)):
            what = f"no column {few(sorted(lacking))}" if isinstance(self.frame, pd.DataFrame) else "not a table"
            raise BadInput(f"Images: {what}; histill.read_images makes one from a folder or a CSV file")
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "classes", tuple(self.classes))

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        counts = {split or "no split": int((self.frame["split"] == split).sum()) for split in (*SPLITS, "")}
        parts = ", ".join(f"{number} {split}" for split, number in counts.items() if number)
        patients = f", {self.frame['patient'].replace('', None).nunique()} patients" if self.has_patients else ""
        masks = f", masks of {self.masks}" if self.masks else ""
        return f"Images({len(self)} of {few(self.classes) or 'no classes'}: {parts}{patients}{masks}; {self.root})"

    @property
    def has_patients(self) -> bool:
        """Whether the patients are known."""
        return bool((self.frame["patient"] != "").any())

    @property
    def units(self) -> pd.Series[str]:
        """What must not be divided: the patient, or the image's content where no patient is known."""
        return self.frame["patient"].where(self.frame["patient"] != "", self.frame["content"])

    @property
    def hash(self) -> str:
        """SHA-256 of contents, labels, masks and patients: the data set, wherever it lies."""
        columns = ["content", "label", "patient", *(["mask_content"] if self.masks else [])]
        return digest([self.classes, *sorted(self.frame[columns].values.tolist())])

    @property
    def split_hash(self) -> str:
        """SHA-256 of which content is in which split."""
        return digest(sorted(self.frame[["content", "split"]].values.tolist()))

    def paths(self) -> list[Path]:
        """The absolute paths, in order."""
        return [self.root / path for path in self.frame["path"]]

    def rows(self, split: str) -> list[int]:
        """The row numbers of a split; `BadInput` where it is none of `SPLITS`."""
        if split not in SPLITS:
            raise BadInput(f"split {split!r}: one of {', '.join(SPLITS)}")
        return [int(i) for i in (self.frame["split"] == split).to_numpy().nonzero()[0]]

    def with_frame(self, frame: pd.DataFrame, *notices: str) -> Images:
        """The same images with another frame, and more notices."""
        return replace(self, frame=frame.reset_index(drop=True), notices=(*self.notices, *notices))

    def save(self, path: Path) -> None:
        """Write the table as a manifest beside its root (`Images.load` reads it)."""
        with atomic(path, durable=True) as temporary:
            header = {"root": str(self.root.resolve()), "classes": self.classes, "masks": self.masks}
            text = (
                f"# {json.dumps(header, ensure_ascii=False)}\n{self.frame.to_csv(index=False, quoting=csv.QUOTE_ALL)}"
            )
            temporary.write_text(text, encoding="utf-8", newline="")

    @classmethod
    def load(cls, path: Path) -> Images:
        """Read what `save` wrote."""
        try:
            with Path(path).open(encoding="utf-8", newline="") as file:
                header = parse_json(file.readline().removeprefix("# ").encode())
                frame = pd.read_csv(file, dtype=str, keep_default_na=False)
            if missing := set(COLUMNS) - {"slide", "mpp", "mask_content"} - set(frame):
                raise ValueError(f"no column {few(sorted(missing))}")
            masks, names = header.get("masks", ""), header["classes"]
            if masks not in ("", "classes", "instances") or not all(isinstance(name, str) for name in names):
                raise ValueError("its first line is not one that Histill writes")
            if frame.isna().any(axis=None):
                raise ValueError("a row is cut short")
            return cls(complete(frame), Path(header["root"]), tuple(header["classes"]), masks=masks)
        except FileNotFoundError:
            raise BadInput(f"{path} does not exist") from None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise BadInput(f"{path}: not a table of images ({' '.join(str(error).split())})") from None


def few(names: Iterable[object], most: int = 5) -> str:
    """``a, b, c and 4 more``; of a name that nobody would read to its end the two ends."""
    listed = [n if len(n) <= _MOST_SAID else f"{n[:150]}…{n[-150:]}" for n in map(str, names)]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def given_path(source: object, function: str) -> Path:
    """What ``function`` was given, where it is a path; else a line that says what is."""
    if isinstance(source, str | os.PathLike):
        return Path(source)
    remedy = "; write it with to_csv(..., index=False) beside its images" if isinstance(source, pd.DataFrame) else ""
    raise BadInput(
        f"{function}: give the path of a folder or a CSV file; this is of type {type(source).__name__}{remedy}"
    )


def of_each(paths: Sequence[S], function: Callable[[S], T], what: str) -> Iterator[T]:
    """``function`` of each path, in order, by threads and under a bar; 64 at a time, however many there are."""
    with progress(what, len(paths)) as bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), _CHUNK):
            for result in pool.map(function, paths[start : start + _CHUNK]):
                yield result
                bar.advance()


def read_images(source: str | Path, *, patient: str | None = None) -> Images:
    """Read a folder of class folders (optionally under ``train/ val/ test/``) or a CSV manifest.

    Args:
        source: the folder, or a CSV file with ``path,label`` and optional ``patient,split,mask,site``; its paths are
            relative to it and stay inside its folder. ``slide`` and ``mpp`` are kept where a manifest has them; a
            ``slide`` stands for the patient where none is named.
        patient: a regular expression that reads the patient off an image's relative path: its first group,
            or all of it.

    Raises:
        BadInput: nothing there, an empty class, one class only, a manifest that is malformed, a path that is missing
            or leaves the folder, one image with two labels.
    """
    source = given_path(source, "read_images")
    if source.is_dir():
        frame = _from_folder(source)
        root = source
    elif source.is_file():
        frame = read_manifest(source)
        root = source.parent
    else:
        raise BadInput(f"--data {source}: no such folder or manifest")
    if patient is not None:
        frame["patient"] = patients_of(frame["path"], patient)
    _check_names(frame, source)
    notices = passed_over(source)
    if repeated := sorted(frame["path"][frame["path"].duplicated()].unique()):
        frame = frame.drop_duplicates(["path", "label", "split", "patient"]).reset_index(drop=True)
        if again := sorted(frame["path"][frame["path"].duplicated()].unique()):
            raise BadInput(
                f"{source}: {len(again)} images are listed with two labels, splits or patients: {few(again)}"
            )
        notices.append(f"{len(repeated)} images are listed more than once, kept once: {few(repeated)}")
    if 0 < (nobody := frame["patient"] == "").sum() < len(frame):
        notices.append(f"{nobody.sum()} images have no patient, each is taken alone: {few(frame['path'][nobody])}")
    frame["content"] = contents_of([root / path for path in frame["path"]])
    if away := _lead_out(root, frame["path"]):
        notices.append(f"{len(away)} images are links to outside {root}: {few(away)}")
    _check_labels(frame, source)
    copies = frame[frame.duplicated(["content", "split"], keep=False)]
    if len(copies):
        notices.append(f"{len(copies)} files are copies of one another within a split: {few(copies['path'])}")
    classes = tuple(sorted(frame["label"].unique()))
    if len(classes) < 2:
        tables = sorted(source.glob("*.csv")) if source.is_dir() else []
        remedy = f"; there is a table beside it: give {tables[0]}" if tables else ""
        raise BadInput(f"{source}: one class only ({few(classes)}); a classifier needs two or more{remedy}")
    images = Images(frame[list(COLUMNS)].reset_index(drop=True), root, classes, tuple(notices))
    check_leaks(images)
    return images


def passed_over(source: Path) -> list[str]:
    """A notice where a folder is given that holds the manifest of its images: its labels and patients are not read."""
    table = source / "manifest.csv"
    said = f"{table} is not read; give it in place of the folder for its labels, patients and splits"
    return [said] if source.is_dir() and table.is_file() else []


def read_unlabelled(folder: str | Path) -> Images:
    """Every image below ``folder``, without labels.

    Raises:
        BadInput: no folder, or no image in it.
    """
    root = given_path(folder, "read_unlabelled")
    if not root.is_dir():
        raise BadInput(f"--unlabelled {root}: no such folder")
    paths = images_below(root)
    if not paths:
        raise BadInput(f"--unlabelled {root}: no images in it")
    frame = frame_of(path=[p.relative_to(root).as_posix() for p in paths], label=UNLABELLED, split="train")
    _check_names(frame, root)
    frame["content"] = contents_of(paths)
    return Images(frame[list(COLUMNS)], root, ())


def read_paths(manifest: Path) -> list[Path]:
    """The images that a CSV file with a column ``path`` lists, without labels.

    Raises:
        BadInput: as for a manifest of `read_images`, but for the labels.
    """
    return [manifest.parent / path for path in read_manifest(manifest, needed=("path",))["path"]]


def check_leaks(images: Images) -> None:
    """Raise `BadInput` where a patient or an image is in two splits."""
    placed = images.frame[images.frame["split"] != ""]
    for column, what in (("patient", "patients"), ("content", "images")):
        known = placed[placed[column] != ""]
        splits = known.groupby(column)["split"].nunique()
        if leaked := list(splits.index[splits > 1]):
            names = leaked if column == "patient" else known["path"][known["content"].isin(leaked)]
            raise BadInput(
                f"leak: {len(leaked)} {what} are in two splits: {few(names)}; keep each in one, or leave it out"
            )


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with all of `COLUMNS`, in their order; what is not there is unknown."""
    return frame.reindex(columns=list(COLUMNS), fill_value="")


def frame_of(**columns: Sequence[str] | str) -> pd.DataFrame:
    """A table of these columns; see `complete`."""
    return complete(pd.DataFrame(dict(columns)))


def images_below(folder: Path) -> list[Path]:
    """Every file below ``folder`` that is called like an image, links followed, hidden ones left out."""
    found = (Path(base) / name for base, _, names in os.walk(folder, followlinks=True) for name in names)
    paths = sorted(p for p in found if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    if odd := [ascii(str(p)) for p in paths if any("\ud800" <= c <= "\udfff" for c in str(p))]:
        raise BadInput(f"{len(odd)} file names are not UTF-8: {few(odd)}; rename them")
    return paths


def _class_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _from_folder(folder: Path) -> pd.DataFrame:
    top = _class_folders(folder)
    if not top:
        raise BadInput(f"--data {folder}: no class folders in it (one folder of images per class)")
    split_folders = [p for p in top if p.name.lower() in _SPLIT_NAMES]
    if split_folders and len(split_folders) < len(top):
        other = few(p.name for p in top if p not in split_folders)
        raise BadInput(
            f"--data {folder}: {other} beside {few(p.name for p in split_folders)}; splits or classes, not both"
        )
    groups = (
        [(_SPLIT_NAMES[p.name.lower()], c) for p in top for c in _class_folders(p)]
        if split_folders
        else [("", p) for p in top]
    )
    rows: list[tuple[str, str, str]] = []
    for split, class_folder in groups:
        found = images_below(class_folder)
        if not found:
            raise BadInput(
                f"{class_folder}: empty class folder (no {', '.join(sorted(EXTENSIONS))} in it); fill it or remove it"
            )
        rows += [(p.relative_to(folder).as_posix(), class_folder.name, split) for p in found]
    if not rows:
        raise BadInput(f"--data {folder}: no class folders under {few(p.name for p in top)}")
    return frame_of(path=[r[0] for r in rows], label=[r[1] for r in rows], split=[r[2] for r in rows])


def read_manifest(file: Path, needed: Sequence[str] = ("path", "label")) -> pd.DataFrame:
    """The table of a CSV file that has the columns ``needed``; `read_images` says which others, and what is refused."""
    _check_size(file)
    try:
        # Without a header, so that a row of more fields than the first is an error and not an index.
        frame = pd.read_csv(
            file,
            header=None,
            dtype=str,
            keep_default_na=False,
            skipinitialspace=True,
            encoding="utf-8-sig",
            compression=None,
        ).fillna("")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise BadInput(f"{file}: not a CSV manifest ({' '.join(str(error).split())})") from None
    frame = frame.apply(lambda column: column.str.strip())
    frame.columns = pd.Index(frame.iloc[0].str.lower())
    frame = frame.iloc[1:].reset_index(drop=True)
    if repeated := sorted({c for c in frame.columns if list(frame.columns).count(c) > 1 and c in COLUMNS}):
        raise BadInput(f"{file}: column {few(repeated)} is there twice")
    if missing := [c for c in needed if c not in frame]:
        raise BadInput(f"{file}: no column {few(missing)}; it has {few(frame.columns, 12)}; rename what is meant")
    if not len(frame):
        raise BadInput(f"{file}: no rows")
    if len(empty := frame.index[(frame[list(needed)] == "").any(axis=1)]):
        raise BadInput(f"{file}: empty path or label in row {few(empty + 2)}")
    frame["path"] = [_inside(file, row + 2, path) for row, path in enumerate(frame["path"])]
    if "mask" in frame:
        frame["mask"] = [mask and _inside(file, row + 2, mask) for row, mask in enumerate(frame["mask"])]
    if "split" in frame:
        names = frame["split"].str.lower()
        unknown = sorted({n for n in names if n not in _SPLIT_NAMES})
        if unknown:
            raise BadInput(
                f"{file}: unknown split {few(map(repr, unknown))}; use train, val or test, or drop the column"
            )
        frame["split"] = names.map(_SPLIT_NAMES)
    if "mpp" in frame and (odd := [v for v in frame["mpp"] if v and not _is_mpp(v)]):
        raise BadInput(f"{file}: mpp {few(odd)}: microns per pixel, a number above 0")
    table = frame_of(**{c: list(frame[c]) for c in COLUMNS if c in frame and c not in ("content", "mask_content")})
    # Patches of one slide belong together: where nobody says whose it is, the slide stands for its patient.
    table["patient"] = table["patient"].where(table["patient"] != "", table["slide"])
    return table


def _check_size(file: Path) -> None:
    """Refuse what would take more memory to read than any manifest does."""
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise BadInput(f"{file}: {size:,} bytes; a manifest has {_MOST_BYTES:,} at most")
    with file.open("rb") as raw:
        lines = raw.read(_MOST_HEADER).decode("utf-8-sig", "replace").splitlines(keepends=True)
    try:
        rows = csv.reader(lines)
        columns = len(next(rows, []))
    except csv.Error as error:
        raise BadInput(f"{file}: not a CSV manifest ({error})") from None
    if columns > _MOST_COLUMNS or (size > _MOST_HEADER and rows.line_num == len(lines)):
        raise BadInput(f"{file}: not a CSV manifest (its first row has more than {_MOST_COLUMNS:,} columns or no end)")


def _check_names(frame: pd.DataFrame, source: Path) -> None:
    """Refuse what a terminal, a page or a table would take for something other than a name."""
    for column in ("path", "label", "patient", "site", "slide"):
        if (odd := frame[column].str.contains(_CONTROL)).any():
            raise BadInput(f"{source}: {column} {few(frame[column][odd].map(ascii), 3)}: control characters in it")
    if (long := frame["label"].str.len() > _MOST_LABEL).any():
        raise BadInput(
            f"{source}: a label of {frame['label'][long].str.len().max():,} characters; {_MOST_LABEL} at most"
        )


def _lead_out(root: Path, paths: Iterable[str]) -> list[str]:
    """The paths that are links, or lie in folders that are, to outside ``root``."""
    home = root.resolve()
    folders: dict[Path, bool] = {}
    found = []
    for path in paths:
        whole = root / path
        if whole.is_symlink():
            away = not whole.resolve().is_relative_to(home)
        else:
            if whole.parent not in folders:
                folders[whole.parent] = not whole.parent.resolve().is_relative_to(home)
            away = folders[whole.parent]
        if away:
            found.append(path)
    return found


def _is_mpp(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _inside(file: Path, row: int, path: str) -> str:
    """The path relative to the manifest's folder, refused where it leaves it."""
    if any(ord(c) < 32 for c in path) or "://" in path:
        raise BadInput(f"{file}: row {row}: {path!r} is not a file's path")
    root = os.path.abspath(file.parent)
    whole = os.path.abspath(os.path.join(root, path))
    if os.path.commonpath([root, whole]) != root or whole == root:
        raise BadInput(f"{file}: row {row}: {path!r} lies outside {root}; put the manifest above its images")
    return os.path.relpath(whole, root).replace(os.sep, "/")


def patients_of(paths: pd.Series[str], pattern: str) -> list[str]:
    """The patient of each path, by a regular expression; `BadInput` where it finds none in one."""
    try:
        find = re.compile(pattern)
    except re.error as error:
        raise BadInput(f"--patient {pattern!r}: not a regular expression ({error})") from None
    matches = [find.search(path) for path in paths]
    names = [match[min(find.groups, 1)] if match else None for match in matches]
    if unmatched := [path for path, name in zip(paths, names) if not name]:
        raise BadInput(f"--patient {pattern!r} finds no patient in {len(unmatched)} images: {few(unmatched)}")
    return [name for name in names if name]


def contents_of(paths: list[Path]) -> list[str]:
    """SHA-256 of each file; `BadInput` where one is missing."""
    if missing := [p for p in paths if not os.path.isfile(p)]:  # noqa: PTH113 - raises for no name at all
        raise BadInput(f"{len(missing)} images do not exist: {few(missing)}")
    return list(of_each(paths, file_digest, "hashing"))


def _check_labels(frame: pd.DataFrame, source: Path) -> None:
    labels = frame.groupby("content")["label"].nunique()
    if len(torn := labels.index[labels > 1]):
        names = frame["path"][frame["content"].isin(torn)]
        raise BadInput(f"{source}: {len(torn)} images have two labels: {few(names)}")
    if (frame["split"] != "").any():
        seen = set(frame["label"][frame["split"] == "train"])
        if unseen := sorted(set(frame["label"]) - seen):
            raise BadInput(f"{source}: labels that no training image has: {few(unseen)}")
