"""Memory stays bounded on data larger than it: the pack grows, what the process holds for itself does not."""

from __future__ import annotations

import ctypes
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_classes
from tiny import Tiny, experiment, process

import histill as hs
from histill.data import pack, read_images, split
from histill.data.images import of_each

STATUS = Path("/proc/self/status")
SIZE = 128
COUNTS = (500, 2500)
M_MMAP_THRESHOLD = -3

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="needs Linux")


def private() -> int:
    """Bytes that are this process's own; mapped files, which can be dropped and read again, are not among them."""
    return 1024 * int(STATUS.read_text().split("RssAnon:")[1].split()[0])


class Peak(threading.Thread):
    """The most private memory while the block runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, private())

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()


def use(root: Path, train: bool) -> None:
    """Pack, then train or just read every image; leaves in ``root/peaks`` the most memory on each number of images."""
    # By itself glibc keeps what large blocks leave, tens of MB, until it has seen all sizes; now it gives it back.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65_536)
    peaks = []
    for count in COUNTS:
        folder = root / str(count)
        write_classes(folder / "data", {"a": count // 2, "b": count // 2}, size=12)
        with Peak() as peak:
            data = split(read_images(folder / "data"), val=0.15, test=0.05)  # the same batches of 64 are judged in both
            packed = pack(data, SIZE)
            assert packed.pixels.nbytes == count * SIZE * SIZE * 3
            if train:
                kind: dict[str, Any] = {"student": partial(Tiny, width=1), "epochs": 1, "batch_size": 64}
                hs.train(experiment(data, image_size=SIZE, **kind), folder / "run", device="cpu", precision="32-true")
            else:
                for rows in np.array_split(np.random.default_rng(0).permutation(count), count // 50):
                    packed.batch(rows)
        peaks.append(peak.bytes)
    (root / "peaks").write_text(json.dumps(peaks))


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_pack_grows_and_private_memory_does_not(tmp_path: Path, train: bool) -> None:
    child = process(use, tmp_path, train)
    child.join()
    assert child.exitcode == 0
    before, after = json.loads((tmp_path / "peaks").read_text())
    assert after - before < 40e6, "the pack grew by 98 MB; some KB an image are the table's"


def test_threads_work_no_further_ahead_than_a_few_hundred(tmp_path: Path) -> None:
    begun: list[Path] = []
    paths = [tmp_path / str(number) for number in range(2000)]
    given = of_each(paths, lambda path: begun.append(path) or path, "counting")
    assert [next(given) for _ in range(300)] == paths[:300]
    assert len(begun) <= 320, "five times 64"
    assert list(given) == paths[300:]
    assert sorted(begun) == sorted(paths)
