"""Embeddings as teachers: those that a folder holds, several teachers at once, and each of them standardised.

A teacher with embeddings gives ``pooled`` (B, D) and perhaps ``tokens`` (B, D, h, w). `open_teacher` makes one of what
a user names: a foundation model, a run, a folder of embeddings.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histill.accelerator import sent
from histill.data.hdf5 import MOST_TIMES, SMALL_BYTES, array
from histill.data.images import Images, few
from histill.data.packed import Packed
from histill.errors import BadInput
from histill.files import atomic, cache_dir, digest
from histill.progress import progress
from histill.types import Batch, Outputs

if TYPE_CHECKING:
    from histill.run import Run
    from histill.teachers import Keyed

__all__ = ["Embeddings", "Several", "Standardised", "bound", "open_teacher", "standardise"]

T = TypeVar("T")

_MOST_IMAGES = 50_000_000
Floats = NDArray[np.float32]


class Embeddings:
    """Saved embeddings as a teacher: ``pooled`` of the image itself, whatever the view, looked up by its name.

    Before it is asked it must know the table that image numbers refer to: `of`.

    Args:
        source: A file, or a folder with any number of them:

            - ``.h5`` as CLAM and TRIDENT write it, one per slide: ``features`` (N, D) and ``coords`` (N, 2). A tile of
              the slide ``S`` at (x, y) is the image called ``S_x_y`` or ``S/x_y``.
            - ``.parquet`` with a column ``image`` and either one column of lists or a column for each of D numbers.
            - ``.npy`` (N, D), with a ``.txt`` of the same name beside it, an image a line.

            An image is found by its whole path, its path in the table, its name or its name without the ending.

    Raises:
        BadInput: nothing there, a file that is damaged, widths that differ, an image that is there twice.
    """

    def __init__(self, source: str | Path) -> None:
        self.path = Path(source)
        self._parts = [_read(file) for file in _files(self.path)]
        if len({part.width for part in self._parts}) > 1:
            widths = ", ".join(f"{part.file.name} {part.width}" for part in self._parts[:3])
            raise BadInput(f"{self.path}: embeddings of several widths ({widths}); keep those of one model")
        self.width = self._parts[0].width
        self._where = {name: (p, row) for p, part in enumerate(self._parts) for row, name in enumerate(part.names)}
        if len(self._where) < (total := sum(len(part.names) for part in self._parts)):
            raise BadInput(
                f"{self.path}: {total - len(self._where)} images are there twice; keep one embedding of each"
            )
        self._values: Floats | None = None
        self.key = digest(["embeddings", [(p.file.name, p.file.stat().st_size, p.width) for p in self._parts]])

    def of(self, images: Images) -> Embeddings:
        """The embeddings of a table's images, in memory.

        Raises:
            BadInput: an image without one, or two images with the same.
        """
        places = [self._place(images.root, path) for path in images.frame["path"]]
        if missing := [path for path, place in zip(images.frame["path"], places) if place is None]:
            raise BadInput(
                f"{self.path}: no embedding of {len(missing)} of {len(images)} images: {few(missing)}; "
                f"those there are of {few(self._where, 3)}"
            )
        found = np.array(places, dtype=np.int64)  # (N, 2): part, row
        owners: dict[tuple[int, int], str] = {}
        for place, path in zip(map(tuple, found.tolist()), images.frame["path"]):
            if (other := owners.setdefault(place, path)) != path:
                raise BadInput(f"{self.path}: {other} and {path} would share an embedding; name them by their paths")
        values = np.empty((len(found), self.width), np.float32)
        for number, part in enumerate(self._parts):
            here = np.flatnonzero(found[:, 0] == number)
            values[here] = part.read(found[here, 1])
        if not np.isfinite(values).all():
            raise BadInput(f"{self.path}: some embeddings are not finite numbers")
        ready = copy.copy(self)
        ready._values = values
        ready.key = hashlib.sha256(values.tobytes()).hexdigest()
        return ready

    def _place(self, root: Path, path: str) -> tuple[int, int] | None:
        whole = Path(path)
        for name in (
            str((root / path).absolute()),
            path,
            str(whole.with_suffix("")),
            f"{whole.parent.name}_{whole.stem}",
            whole.name,
            whole.stem,
        ):
            if name in self._where:
                return self._where[name]
        return None

    def __call__(self, batch: Batch) -> Outputs:
        if self._values is None:
            raise BadInput(f"{self.path}: which images? Bind the embeddings to their table first (Embeddings.of)")
        pooled = sent(torch.from_numpy(self._values[batch.ids.cpu().numpy()]), batch.images.device)
        return Outputs(pooled=pooled, logits=pooled)


@dataclass(frozen=True)
class _Part:
    """The embeddings of one file; ``read(rows) -> (len(rows), width)``."""

    file: Path
    names: list[str]
    width: int
    read: Callable[[NDArray[np.int64]], NDArray[Any]]


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise BadInput(f"{source}: no such file or folder of embeddings")
    files = sorted(p for p in source.iterdir() if p.suffix in _READERS and not p.name.startswith("."))
    if not files:
        raise BadInput(f"{source}: no embeddings in it ({', '.join(_READERS)})")
    return files


def _read(file: Path) -> _Part:
    if file.suffix not in _READERS:
        raise BadInput(f"{file}: not embeddings; give {', '.join(_READERS)}, or a folder of them")
    try:
        return _READERS[file.suffix](file)
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - h5py, pyarrow and NumPy raise what the damage leads to
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{file}: not readable embeddings ({why})") from None


def _read_h5(file: Path) -> _Part:
    import h5py

    with h5py.File(file, "r") as inside:
        if missing := [name for name in ("features", "coords") if name not in inside]:
            raise BadInput(f"{file}: no {' and no '.join(missing)} in it; it has {few(inside.keys()) or 'nothing'}")
        shape = array(inside, "features", file).shape
        if len(said := array(inside, "coords", file).shape) != 2 or said[0] > _MOST_IMAGES:
            raise BadInput(f"{file}: coords {said}; (N, 2) are read, N at most {_MOST_IMAGES:,}")
        coords = np.asarray(inside["coords"])
    if coords.ndim != 2 or coords.shape[1] < 2 or len(shape) != 2 or shape[0] != len(coords):
        raise BadInput(f"{file}: features {shape} and coords {coords.shape} do not fit; (N, D) and (N, 2) are read")

    def read(rows: NDArray[np.int64]) -> NDArray[Any]:
        with h5py.File(file, "r") as inside:
            return np.asarray(array(inside, "features", file)[:])[rows] if len(rows) else np.empty((0, shape[1]))

    return _Part(file, [f"{file.stem}_{int(x)}_{int(y)}" for x, y in coords[:, :2]], int(shape[1]), read)


def _read_parquet(file: Path) -> _Part:
    import pandas as pd
    import pyarrow.parquet as pq

    said = pq.read_metadata(file)
    groups = [said.row_group(n) for n in range(said.num_row_groups)]
    values = sum(g.column(c).num_values for g in groups for c in range(g.num_columns))
    size = file.stat().st_size
    if said.num_rows > _MOST_IMAGES or 8 * values > max(SMALL_BYTES, MOST_TIMES * size):
        raise BadInput(f"{file}: claims {said.num_rows:,} images and {values:,} values in a file of {size:,} bytes")
    frame = pd.read_parquet(file)
    if "image" not in frame:
        raise BadInput(f"{file}: no column image; it has {few(frame.columns)}")
    rest = frame.drop(columns="image")
    lists = [c for c in rest if len(rest) and isinstance(rest[c].iloc[0], np.ndarray | list)]
    values = np.stack(rest[lists[0]].to_list()) if lists else rest.select_dtypes("number").to_numpy()
    return _in_memory(file, [str(name) for name in frame["image"]], values)


def _read_npy(file: Path) -> _Part:
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        raise BadInput(f"{file}: no {beside.name} beside it, which says an image a line whose embeddings these are")
    names = beside.read_text(encoding="utf-8").splitlines()
    return _in_memory(file, names, np.load(file, mmap_mode="r", allow_pickle=False))


def _in_memory(file: Path, names: list[str], values: NDArray[Any]) -> _Part:
    if values.ndim != 2 or len(values) != len(names) or values.shape[1] == 0 or values.dtype.kind not in "fiub":
        raise BadInput(f"{file}: embeddings {values.shape} of {len(names)} images; numbers (images, width) are read")
    return _Part(file, names, int(values.shape[1]), lambda rows: np.asarray(values[rows]))


_READERS: dict[str, Callable[[Path], _Part]] = {".h5": _read_h5, ".parquet": _read_parquet, ".npy": _read_npy}


class Several:
    """Several teachers side by side: the outputs of the first are ``pooled0``, ``tokens0``, of the next ``pooled1``.

    Args:
        teachers: one or more, in an order that stays; ``logits`` are left out.
    """

    def __init__(self, teachers: Sequence[Keyed]) -> None:
        if not teachers:
            raise BadInput("give at least one teacher")
        self.teachers = tuple(teachers)
        self.key = digest(["several", *(t.key for t in teachers)])
        self.path = " + ".join(str(getattr(t, "path", None) or t.key) for t in teachers)

    def of(self, images: Images) -> Several:
        """The same for a table's images; see `Embeddings`."""
        return Several([bound(teacher, images) for teacher in self.teachers])

    def __call__(self, batch: Batch) -> Outputs:
        said = [teacher(batch) for teacher in self.teachers]
        return Outputs({f"{n}{i}": v for i, outputs in enumerate(said) for n, v in outputs.items() if n != "logits"})


class Standardised:
    """A teacher whose outputs have mean 0 and variance 1 in each dimension, over the images they were measured on.

    Teachers differ in scale by orders of magnitude, and their embeddings lie far off the origin in one common
    direction, which a cosine sees before anything else. See `standardise`, which measures.

    Args:
        teacher: whose outputs.
        standards: by output the mean and standard deviation, ``(D,)`` each; the other outputs are left out.
        key: what names them together.
    """

    def __init__(self, teacher: Keyed, standards: dict[str, tuple[Floats, Floats]], *, key: str) -> None:
        self.teacher, self.standards, self.key = teacher, standards, key
        self.path = getattr(teacher, "path", None)

    def of(self, images: Images) -> Standardised:
        """The same for a table's images; see `Embeddings`."""
        return Standardised(bound(self.teacher, images), self.standards, key=self.key)

    def __call__(self, batch: Batch) -> Outputs:
        said = self.teacher(batch)
        return Outputs({name: self._scaled(said[name], *standard) for name, standard in self.standards.items()})

    def _scaled(self, x: Tensor, mean: Floats, std: Floats) -> Tensor:
        shape = (-1, *(1 for _ in x.shape[2:]))
        mean_, std_ = (sent(torch.from_numpy(values).to(x.dtype), x.device).view(shape) for values in (mean, std))
        return (x - mean_) / std_


def standardise(
    teacher: Keyed,
    packed: Packed,
    *,
    outputs: Sequence[str] = ("pooled",),
    most: int = 2048,
    device: str = "auto",
    batch_size: int = 32,
    folder: Path | None = None,
) -> Standardised:
    """Measure mean and deviation of a teacher's outputs on training images, once: they are kept.

    Args:
        teacher: who is asked, about the images themselves.
        packed: the images; those of the training split are used.
        outputs: which outputs, ``(B, D)`` or ``(B, D, h, w)``, where places count like images.
        most: at most so many images, spread evenly over the table.
        device: where the teacher computes.
        batch_size: images at once.
        folder: where the figures are kept (default: the cache folder).

    Raises:
        BadInput: no training images, or an output that the teacher does not give.
    """
    from histill.machine import find_device

    rows = np.array(packed.images.rows("train"), dtype=np.int64)
    if not len(rows):
        raise BadInput(f"{packed.images.root}: no training images to standardise a teacher on")
    rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64)]
    contents = packed.images.frame["content"].iloc[rows].tolist()
    key = digest(["standardised", teacher.key, packed.size, list(outputs), contents])
    file = (folder or cache_dir("standards")) / f"{key[:24]}.npz"
    if not file.exists():
        found = _measure(teacher, _batches(packed, rows, find_device(device), batch_size), outputs, len(rows))
        with atomic(file, durable=True) as temporary, temporary.open("wb") as stream:
            arrays: dict[str, Any] = {f"{name}.{i}": pair[i] for name, pair in found.items() for i in (0, 1)}
            np.savez(stream, **arrays)
    try:
        with np.load(file, allow_pickle=False) as kept:
            standards = {name: (kept[f"{name}.0"], kept[f"{name}.1"]) for name in outputs}
    except Exception:  # noqa: BLE001 - zipfile, zlib and NumPy each have errors of their own
        raise BadInput(f"{file} is damaged; remove it, it is made again") from None
    return Standardised(teacher, standards, key=key)


def _batches(packed: Packed, rows: NDArray[np.int64], device: torch.device, size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        yield packed.batch(rows[start : start + size], device=device)


def _measure(
    teacher: Keyed, batches: Iterator[Batch], outputs: Sequence[str], images: int
) -> dict[str, tuple[Floats, Floats]]:
    """By output the mean and standard deviation of each dimension; the deviation of a constant is called 1."""
    sums: dict[str, Any] = dict.fromkeys(outputs, (0, 0.0, 0.0))
    with progress("measuring the teacher", images) as bar:
        for batch in batches:
            said = teacher(batch)
            for name in outputs:
                values = said[name].cpu().double().movedim(1, -1).flatten(0, -2).numpy()  # (N, D)
                count, total, squares = sums[name]
                sums[name] = (count + len(values), total + values.sum(0), squares + np.square(values).sum(0))
            bar.advance(len(batch.ids))
    found = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
        found[name] = (mean.astype(np.float32), np.where(constant, 1, std).astype(np.float32))
    return found


def bound(teacher: T, images: Images) -> T:
    """The teacher, its saved embeddings looked up for the images of a table; a network stays as it is."""
    of: Callable[[Images], T] | None = getattr(teacher, "of", None)
    return teacher if of is None else of(images)


def open_teacher(what: str | Path | Run | Keyed) -> Keyed:
    """The teacher of embeddings that something stands for.

    Args:
        what: The name of a foundation model (``uni2-h``; `histill.models.foundation.CARDS`), or ``uni2-h=FILE`` with
            its weights; the name of any timm network, with the weights that timm publishes for it, or ``NAME=FILE``;
            a run or its folder; embeddings (`Embeddings`); a teacher, which is returned.

    Raises:
        BadInput: none of these.
        Failed: weights that cannot be fetched.
    """
    from histill.models.adapter import Timm, known
    from histill.models.foundation import CARDS, Foundation
    from histill.run import Run
    from histill.teachers import Frozen

    if not isinstance(what, str | Path | Run):
        return what
    if isinstance(what, str | Path):
        text, path = str(what), Path(what)
        name, equals, file = text.partition("=")
        if name in CARDS and (equals or not path.exists()):
            network = Foundation(name, weights=file if equals else "hub")
            return Frozen(network, image_size=network.input_size)
        if known(name) and (equals or not path.exists()):
            timm = Timm(name, 0, weights=file if equals else "imagenet")
            return Frozen(timm, image_size=timm.input_size)
        if not path.exists():
            raise BadInput(
                f"--teacher {text}: neither a run, nor embeddings, nor a network of timm, nor a foundation model "
                f"({', '.join(CARDS)})"
            )
        if not (path / "run.json").is_file():
            return Embeddings(path)
        what = Run.open(path)
    return Frozen(what.network(), image_size=what.image_size, path=what.path)
