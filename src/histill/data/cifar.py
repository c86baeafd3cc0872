"""CIFAR-100's binary archive -> class folders under ``train/`` and ``test/``; its pickled one is not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.data.archives import read_member
from histill.errors import BadInput
from histill.files import atomic
from histill.progress import progress

__all__ = ["unpack_cifar"]

_RECORD = 2 + 3 * 32 * 32
"""A coarse label, a fine label, 32 x 32 red, green and blue values."""
_MOST = {"test": 10_000, "train": 50_000}


def unpack_cifar(archive: Path, out: Path) -> str:
    """Write the images of ``cifar-100-binary.tar.gz`` as PNG, under their fine label; returns what was done.

    A picture that is there twice is kept once, of train and test that in test, as a copy in both is a leak and one
    with two labels an error (`read_images`).

    Raises:
        BadInput: not that archive, or ``out`` is taken.
    """
    archive, out = Path(archive), Path(out)
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty; give another folder")
    names = _member(archive, "fine_label_names.txt").decode("ascii", "replace").split()
    if len(names) != 100 or not all(name.replace("_", "").isalnum() for name in names):
        raise BadInput(f"{archive}: fine_label_names.txt does not hold 100 class names")
    parts = {split: _records(archive, split) for split in _MOST}
    seen: set[bytes] = set()
    copies = 0
    with progress("unpacking", sum(map(len, parts.values()))) as bar:
        for split, records in parts.items():
            for number, record in enumerate(records):
                bar.advance()
                if (content := record[2:].tobytes()) in seen:
                    copies += 1
                    continue
                seen.add(content)
                pixels = record[2:].reshape(3, 32, 32).transpose(1, 2, 0)
                with atomic(out / split / names[record[1]] / f"{number:05d}.png") as temporary:
                    Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="png")
    return f"{len(seen)} images in {out}" + (f"; {copies} copies of others were left out" if copies else "")


def _records(archive: Path, split: str) -> NDArray[np.uint8]:
    """``(N, 3074)``."""
    most = _MOST[split] * _RECORD
    content = np.frombuffer(_member(archive, f"{split}.bin", most), dtype=np.uint8)
    if not 0 < content.size <= most or content.size % _RECORD:
        raise BadInput(f"{archive}: {split}.bin does not hold up to {_MOST[split]} images of {_RECORD} bytes")
    records = content.reshape(-1, _RECORD)
    if records[:, 1].max() > 99:
        raise BadInput(f"{archive}: {split}.bin has a label above 99")
    return records


def _member(archive: Path, name: str, most: int = 10_000) -> bytes:
    return read_member(archive, f"cifar-100-binary/{name}", "cifar-100-binary.tar.gz", most)
