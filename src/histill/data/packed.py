"""Decode once: the images of a table as one memory-mapped array, so that the second epoch never opens a JPEG."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histill.accelerator import sent
from histill.data.decode import decode, square
from histill.data.images import Images, check_leaks, few, of_each
from histill.data.mapped import mapped
from histill.data.masks import UNKNOWN, pack_masks
from histill.data.views import NONE, Augment, follow, render, twin_of
from histill.errors import BadInput, Failed
from histill.files import cache_dir, check_room, digest, full_disk, locked, read_json, write_json
from histill.types import Batch

__all__ = ["Packed", "pack"]

_VERSION = 1
_SMALL = 16


@dataclass(frozen=True)
class Packed:
    """The readable images of a table and their pixels.

    Attributes:
        images: the table without what could not be read; a row number is an image's id.
        pixels: ``(M, S, S, 3)`` uint8, memory-mapped: the page cache holds what fits, the disk the rest.
        stored: ``(N,)`` where in ``pixels`` each image lies.
        labels: ``(N,)`` class numbers, -1 for unlabelled.
        sized: the same images at another size.
        masks: ``(N, S, S)`` uint16, memory-mapped, where the images have masks.
    """

    images: Images
    pixels: NDArray[np.uint8]
    stored: NDArray[np.int64]
    labels: Tensor
    sized: Callable[[int], Packed]
    masks: NDArray[np.uint16] | None = None

    def batch(
        self,
        rows: NDArray[np.int64],
        views: Tensor | None = None,
        *,
        augment: Augment = NONE,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """One view each of the given rows (without ``views``: the images themselves).

        At another size the views are drawn from the images packed at that size, not from the smaller ones.
        """
        ids = torch.from_numpy(rows)
        views = torch.zeros_like(ids) if views is None else views

        def at(size: int, twin: int = 0) -> Tensor:
            packed = self if size == self.size else self.sized(size)
            pixels = sent(torch.from_numpy(packed.pixels[packed.stored[rows]]), device)
            return render(pixels, ids, twin_of(views, twin), augment=augment, seed=seed)

        masks = None
        if self.masks is not None:
            drawn = sent(torch.from_numpy(self.masks[rows].astype(np.int64)), device)
            drawn = torch.where(drawn == UNKNOWN, -1, drawn)
            masks = follow(drawn, ids, views, augment=augment, seed=seed)
        return Batch(at(self.size), sent(self.labels[ids], device), ids, views, at, masks)

    @property
    def size(self) -> int:
        """Height and width of the pictures in pixels."""
        return int(self.pixels.shape[1])


def pack(images: Images, size: int, *, strict: bool = False, folder: Path | None = None) -> Packed:
    """Decode every image once to ``size`` x ``size`` pixels, or find that it was done before.

    Args:
        images: the table.
        size: pixels of the stored pictures.
        strict: an unreadable image is an error; otherwise it is left out with a notice.
        folder: where packs are kept (default: the cache folder); keyed by content and size, so it may be shared.

    Raises:
        BadInput: no readable image left, one class or split lost, ``strict`` and an unreadable image, or one picture
            in two splits (equal pixels in files that differ).
        Failed: the disk is full, or an image cannot be read for a reason that is not in the image.
    """
    key = digest([_VERSION, size, images.frame["content"].tolist()])[:24]
    home = (folder or cache_dir("packed")) / key
    if not (home / "index.json").exists():
        with locked(home, wait=True):  # of several processes one decodes
            if not (home / "index.json").exists():
                _fill(images, size, home)
    index = read_json(home / "index.json")
    pixels = mapped(home / "pixels.npy")
    if not (isinstance(index, dict) and len(index.get("pixels", ())) == len(pixels) == len(images)):
        raise BadInput(f"{home / 'index.json'} is not of {len(images)} images; remove {home}, it is made again")
    frame = images.frame.copy()
    frame["content"] = index["pixels"]
    bad = frame["content"] == ""
    notices = _notices(images, index)
    if bad.any() and strict:
        raise BadInput(f"{int(bad.sum())} unreadable images: {few(_errors(images, index))} (--strict)")
    readable = images.with_frame(frame[~bad], *notices)
    _check_whole(images, readable)
    check_leaks(readable)
    numbers = {name: i for i, name in enumerate(images.classes)}
    labels = torch.tensor([numbers.get(label, -1) for label in readable.frame["label"]])
    sized = cache(partial(pack, images, folder=folder))
    masks = pack_masks(readable, size, folder) if images.masks else None
    return Packed(readable, pixels, (~bad).to_numpy().nonzero()[0], labels, sized, masks)


def _fill(images: Images, size: int, home: Path) -> None:
    """Write ``pixels.npy``, then ``index.json``, which says that the pixels are whole."""
    paths, pixels = images.paths(), home / "pixels.npy"
    check_room(home, len(paths) * size * size * 3, f"packing {len(paths)} images")
    index: dict[str, list[str]] = {"pixels": [], "error": [], "mode": [], "small": []}
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), size, size, 3)}
    try:
        with full_disk(pixels), pixels.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for picture, entry in of_each(paths, partial(_decode, size=size), "decoding"):
                file.write(picture.tobytes())
                for name, value in entry.items():
                    index[name].append(value)
            file.flush()
            os.fsync(file.fileno())  # the pixels are on the disk before the index says so
    except BaseException:
        pixels.unlink(missing_ok=True)
        raise
    write_json(home / "index.json", index)


def _decode(path: Path, size: int) -> tuple[NDArray[np.uint8], dict[str, str]]:
    try:
        picture, mode = decode(path)
    except BadInput as error:
        if not path.exists():  # gone since it was hashed: that is not of its content, which the pack is known by
            raise
        return np.zeros((size, size, 3), np.uint8), {"pixels": "", "error": str(error), "mode": "", "small": ""}
    except OSError as error:
        raise Failed(f"{path} cannot be read just now ({error.strerror}); nothing was kept, so try again") from None
    small = f"{picture.width}x{picture.height}" if min(picture.size) < _SMALL else ""
    content = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
    return square(picture, size), {"pixels": content, "error": "", "mode": mode, "small": small}


def _errors(images: Images, index: dict[str, list[str]]) -> list[str]:
    names = images.frame["path"]
    return [f"{name} ({error.rsplit(': ', 1)[-1]})" for name, error in zip(names, index["error"]) if error]


def _notices(images: Images, index: dict[str, list[str]]) -> list[str]:
    lines = []
    if errors := _errors(images, index):
        lines.append(f"{len(errors)} unreadable images were left out: {few(errors)}")
    for column, what in (
        ("mode", "images of another mode were converted to RGB"),
        ("small", "images are tiny"),
    ):
        if named := [f"{name} ({value})" for name, value in zip(images.frame["path"], index[column]) if value]:
            lines.append(f"{len(named)} {what}: {few(named)}")
    return lines


def _check_whole(before: Images, after: Images) -> None:
    if not len(after):
        raise BadInput(f"{before.root}: none of {len(before)} images is readable")
    for column, what in (("label", "class"), ("split", "split")):
        if lost := sorted(set(before.frame[column]) - set(after.frame[column])):
            raise BadInput(f"{before.root}: no readable image is left of {what} {few(lost)}")
