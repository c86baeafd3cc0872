"""Teachers: frozen sources of outputs that stay outside the student's module, optimiser and checkpoint."""

from __future__ import annotations

import hashlib
import time
from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.accelerator import sent
from histill.data.mapped import mapped
from histill.embeddings import Embeddings, Several, Standardised, bound, open_teacher, standardise
from histill.errors import BadInput
from histill.files import atomic, check_room, claim, digest, locked, read_json, write_json
from histill.progress import say
from histill.run import Run
from histill.types import Batch, Outputs, named

__all__ = [
    "Cached",
    "Embeddings",
    "Ensemble",
    "Frozen",
    "Keyed",
    "Several",
    "Standardised",
    "as_teacher",
    "bound",
    "open_teacher",
    "standardise",
]


@runtime_checkable
class Keyed(Protocol):
    """A teacher that can be cached: a `Teacher` with a ``key`` that changes whenever its outputs could."""

    key: str

    def __call__(self, batch: Batch) -> Outputs: ...


class Frozen:
    """A network as a teacher: in eval mode, without gradients, on its own input size.

    While a run trains it computes in the run's precision, on CUDA always in bf16; its answers are float32.

    Args:
        network: the network; it normalises for itself, as every network does.
        image_size: the size in pixels at which it looks (None: the student's). The view is drawn anew at that size,
            not resized from the student's.
        key: names the weights; computed from them where it is not given.
        path: where they lie, for the record.
    """

    def __init__(
        self, network: nn.Module, *, image_size: int | None = None, key: str | None = None, path: Path | None = None
    ) -> None:
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.image_size, self.path = image_size, path
        self.key = f"{key or weights_digest(network)}@{image_size or 'same'}"

    def __repr__(self) -> str:
        return f"Frozen({type(self.network).__name__}, image_size={self.image_size})"

    def __call__(self, batch: Batch) -> Outputs:
        from histill.machine import answers_bf16

        device = batch.images.device
        if next((p.device for p in self.network.parameters()), device) != device:
            self.network.to(device)
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=answers_bf16(device.type), dtype=torch.bfloat16),
        ):
            return _Answer(named(self.network(batch.at(self.image_size)), "the teacher"))


class _Answer(Outputs):
    """Outputs that become float32 when they are asked for: a network names all its maps, an objective wants few."""

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        if value.dtype in (torch.bfloat16, torch.float16):
            self[name] = value = value.float()
        return value

    def __iter__(self) -> Iterator[str]:  # so that a copy is not made behind `__getitem__`
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 - this is `get`

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        return ItemsView(self)

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        return ValuesView(self)


class Ensemble:
    """Several teachers as one: ``logits`` is the log of the weighted mean of their probabilities.

    The mean of probabilities is the mixture that the ensemble stands for; its logarithm is a valid logit.

    Args:
        teachers: two or more, in any order that stays.
        weighting: ``"mean"``, or ``"confidence"``: for each image teacher k of K has the weight
            ``(1 - exp(CE_k) / sum_j exp(CE_j)) / (K - 1)``, CE_k its cross-entropy with the label (CA-MKD, Zhang et
            al. 2022, with its soft targets mixed before the temperature). An image without a label has the mean.
    """

    def __init__(self, teachers: Sequence[Keyed], weighting: Literal["mean", "confidence"] = "mean") -> None:
        if not teachers:
            raise BadInput("an ensemble needs at least one teacher")
        if weighting not in ("mean", "confidence"):
            raise BadInput(f"weighting {weighting!r}: mean or confidence")
        if keyless := [type(teacher).__name__ for teacher in teachers if not isinstance(teacher, Keyed)]:
            raise BadInput(f"{keyless[0]} in an ensemble has no key; wrap a network in histill.teachers.Frozen")
        self.teachers, self.weighting = tuple(teachers), weighting
        self.key = digest(["ensemble", weighting, *(t.key for t in teachers)])
        self.path = " + ".join(str(getattr(t, "path", None) or t.key) for t in teachers)

    def __repr__(self) -> str:
        return f"Ensemble({', '.join(map(repr, self.teachers))}, weighting={self.weighting!r})"

    def __call__(self, batch: Batch) -> Outputs:
        log_p = torch.stack([teacher(batch)["logits"].log_softmax(1) for teacher in self.teachers])  # (K, B, C)
        return Outputs(logits=torch.logsumexp(self._weights(log_p, batch.labels).log()[:, :, None] + log_p, 0))

    def _weights(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """``(K, B)``, the sum over the teachers being 1."""
        even = torch.full(log_p.shape[:2], 1 / len(log_p), device=log_p.device)
        if self.weighting == "mean" or len(log_p) == 1:
            return even
        of_label = labels.clamp(min=0)[None, :, None].expand(len(log_p), -1, 1)
        error = -log_p.gather(2, of_label).squeeze(2)
        return torch.where(labels >= 0, (1 - error.softmax(0)) / (len(log_p) - 1), even)


class Cached:
    """A teacher that is asked once per view; later it is read from a memory-mapped file.

    The first pass over the views asks the teacher and writes; every later pass, of this run or another, reads. A row
    is marked as known only after its values are on disk, so a kill loses at most the rows of the last seconds. Two
    processes may fill one cache: both write the same values to the same place.

    Args:
        teacher: what is asked.
        folder: where the cache lies; made where it is missing.
        images: how many images there are, the rows of each view.
        views: how many views each image has.
        identity: what else the outputs depend on (the views' seed and strengths, the data); JSON-able.
        outputs: the names that are kept.
        dtype: of the file. float16 halves it; float32 keeps a cached run equal to an online one.

    Raises:
        BadInput: the folder holds the outputs of another teacher, other views or other data; the line names which.
        Failed: the disk has too little room.
    """

    def __init__(
        self,
        teacher: Keyed,
        folder: Path,
        *,
        images: int,
        views: int,
        identity: dict[str, Any],
        outputs: Sequence[str] = ("logits",),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.teacher, self.folder, self.shape, self.outputs = (
            teacher,
            Path(folder),
            (views, images),
            tuple(outputs),
        )
        self.dtype = np.dtype(str(dtype).removeprefix("torch."))
        self.key = teacher.key
        self.asked = self.read = 0
        self._meta = {"teacher": teacher.key, "shape": list(self.shape), "dtype": str(self.dtype), **identity}
        self._stores: dict[str, NDArray[Any]] = {}
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._saved = time.monotonic()
        self._check()
        self._known = np.array(_shared(self.folder / "known.npy", self.shape, np.dtype(bool)))

    def _check(self) -> None:
        path = self.folder / "cache.json"
        meta = {**self._meta, "outputs": list(self.outputs)}
        if path.exists():
            there = read_json(path)
            if not isinstance(there, dict):
                raise BadInput(f"{path}: not of a teacher's cache; remove {self.folder}, it is made again")
            if differing := sorted(k for k in {*there, *meta} if there.get(k) != meta.get(k)):
                raise BadInput(
                    f"{self.folder} caches something else ({', '.join(differing)} differ); give another folder"
                )
        else:
            write_json(path, meta)

    def __call__(self, batch: Batch) -> Outputs:
        views, ids = batch.views.numpy(), batch.ids.numpy()
        missing = self.missing(views, ids)
        if missing.any():
            self._ask(batch, missing)
        self.asked += int(missing.sum())
        self.read += int((~missing).sum())
        return Outputs({n: self._tensor(self._open(n)[views, ids], batch.images.device) for n in self.outputs})

    def _tensor(self, values: NDArray[Any], device: torch.device) -> Tensor:
        return sent(torch.from_numpy(np.ascontiguousarray(values)).float(), device)

    def _ask(self, batch: Batch, missing: NDArray[np.bool_]) -> None:
        """Ask about the whole batch, keep what is missing: an answer's last bit can depend on the batch around it."""
        said = self.teacher(batch)
        self.keep(batch.views.numpy(), batch.ids.numpy(), {n: said[n].cpu().numpy() for n in self.outputs}, missing)

    def missing(self, views: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``(B,)``: which of these views the teacher has not been asked about."""
        return np.asarray(~self._known[views, ids])

    def keep(
        self,
        views: NDArray[np.int64],
        ids: NDArray[np.int64],
        said: Mapping[str, NDArray[Any]],
        missing: NDArray[np.bool_],
    ) -> None:
        """Keep what the teacher said by output, ``(B, ...)``, of those views that are missing; whoever asked it."""
        if not self._stores:
            self._make(said)
        views, ids = views[missing], ids[missing]
        for name in self.outputs:
            self._open(name)[views, ids] = said[name][missing].astype(self.dtype)
        self._known[views, ids] = True
        self._pending.append((views, ids))
        if time.monotonic() - self._saved > 10:
            self.flush()

    def _make(self, said: Mapping[str, NDArray[Any]]) -> None:
        shapes = {name: (*self.shape, *said[name].shape[1:]) for name in self.outputs}
        bytes_ = sum(int(np.prod(shape)) * self.dtype.itemsize for shape in shapes.values())
        absent = [name for name in self.outputs if not (self.folder / f"{name}.npy").exists()]
        if absent:
            check_room(self.folder, bytes_, "the teacher's cache")
            say(
                f"teacher's cache: {self.shape[1]} images x {self.shape[0]} views, {bytes_ / 1e6:.1f} MB, "
                f"in {self.folder}"
            )
        for name, shape in shapes.items():
            self._stores[name] = _shared(self.folder / f"{name}.npy", shape, self.dtype)

    def _open(self, name: str) -> NDArray[Any]:
        if name not in self._stores:
            self._stores[name] = self._fitting(self.folder / f"{name}.npy")
        return self._stores[name]

    def _fitting(self, path: Path) -> NDArray[Any]:
        """What another run kept there of so many views of so many images."""
        found = mapped(path, "r+")
        if found.shape[:2] != self.shape or found.dtype != self.dtype:
            raise BadInput(
                f"{path} holds {found.shape} {found.dtype}, not {self.shape} {self.dtype}; remove {self.folder}, it is "
                "made again"
            )
        return found

    def flush(self) -> None:
        """Put what was asked on disk: the values first, then the marks that they are there."""
        for store in self._stores.values():
            store.flush()  # type: ignore[attr-defined]
        known = _shared(self.folder / "known.npy", self.shape, np.dtype(bool))
        for views, ids in self._pending:
            known[views, ids] = True
        known.flush()  # type: ignore[attr-defined]
        self._known |= known
        self._pending.clear()
        self._saved = time.monotonic()


def _shared(path: Path, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A memory-mapped array of zeros that any number of processes may open; the first makes it."""
    if not path.exists():
        with locked(path.parent, wait=True):  # not to replace what another process just made
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # as large as the cache, by a process that was killed
                left.unlink()
            if not path.exists():
                with atomic(path) as temporary:
                    np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=tuple(shape)).flush()
                    claim(temporary)
    array = mapped(path, "r+")
    if array.shape != tuple(shape) or array.dtype != dtype:
        raise BadInput(f"{path} holds {array.shape} {array.dtype}, not {tuple(shape)} {dtype}; remove it")
    return array


def as_teacher(teacher: Run | Keyed | str | Path | nn.Module, classes: Sequence[str]) -> Keyed:
    """A run, or its folder, as a teacher at the size it was trained at; a network `Frozen`; any other teacher as it is.

    Raises:
        BadInput: the run has other classes than the data, or it is no teacher.
    """
    if isinstance(teacher, str | Path):
        teacher = Run.open(teacher)
    if isinstance(teacher, Run):
        if teacher.classes != tuple(classes):
            raise BadInput(
                f"{teacher.path} was trained on the classes {', '.join(teacher.classes)}, the data has "
                f"{', '.join(classes)}"
            )
        return Frozen(teacher.network(), image_size=teacher.image_size, path=teacher.path)
    if isinstance(teacher, nn.Module):
        return Frozen(teacher)
    if not callable(teacher):
        raise BadInput(
            f"a {type(teacher).__name__} is no teacher: give a run, a network, or what answers a batch (several: "
            "histill.teachers.Ensemble)"
        )
    return teacher


def weights_digest(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers with their names, and of each layer's kind and settings.

    The same weights answer otherwise behind another threshold, stride or way to enlarge. Settings are a layer's public
    attributes that are numbers, words or lists of them; code is not looked at.
    """
    sha = hashlib.sha256(type(network).__name__.encode())
    for name, module in network.named_modules():
        sha.update(f"{name} {type(module).__name__} {_settings(module)}".encode())
    for name, value in sorted({**network.state_dict(), **dict(network.named_buffers())}.items()):
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    def plain(value: object) -> bool:
        return (
            all(map(plain, value)) if isinstance(value, tuple | list) else isinstance(value, bool | int | float | str)
        )

    public = ((name, value) for name, value in sorted(vars(module).items()) if name[0] != "_" and name != "training")
    return [(name, repr(value)) for name, value in public if value is None or plain(value)]
