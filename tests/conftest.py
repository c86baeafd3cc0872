"""Small class folders of distinct images, and a cache that no test shares with another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HISTILL_QUIET", "1")


def picture(seed: int, tint: int = 0, size: int = 24) -> NDArray[np.uint8]:
    """``(size, size, 3)``: smooth noise unlike that of any other seed, lighter in channel ``tint`` of three."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 200, (6, 6, 3), dtype=np.uint8)).resize((size, size))
    pixels = np.asarray(coarse).copy()
    pixels[..., tint % 3] += 50
    return pixels


def write_classes(
    root: Path, counts: Mapping[str, int], *, size: int = 24, per_patient: int = 1, suffix: str = ".png"
) -> Path:
    """Write ``counts[folder]`` images into each ``root/folder``; a folder may be ``train/benign``.

    Files are called ``p<patient>_<number><suffix>``. Images are distinct; a patient has one class, a class one tint.
    """
    seed = patient = 0
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        tint = sorted({name.rsplit("/", 1)[-1] for name in counts}).index(folder.rsplit("/", 1)[-1])
        for number in range(count):
            name = f"p{patient + number // per_patient:03d}_{number}{suffix}"
            Image.fromarray(picture(seed, tint, size)).save(root / folder / name)
            seed += 1
        patient += -(-count // per_patient)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> MakeFolder:
    """``folder({"benign": 8, "malignant": 8}, size=24, per_patient=1)`` -> the folder ``tmp_path/data``."""

    def make(counts: Mapping[str, int], *, name: str = "data", **options: object) -> Path:
        return write_classes(tmp_path / name, counts, **options)  # type: ignore[arg-type]

    return make
