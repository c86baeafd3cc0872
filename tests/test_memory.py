"""Memory stays bounded on data larger than it: the pack grows, what the process holds for itself does not."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import write_classes
from tiny import Tiny, experiment, hard, process

import histill as hs
from histill.data import pack, read_images, split
from histill.data.images import of_each

STATUS = Path("/proc/self/status")
SIZE = 128

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")


def private() -> int:
    """Bytes that are this process's own; mapped files, which can be dropped and read again, are not among them."""
    return 1024 * int(STATUS.read_text().split("RssAnon:")[1].split()[0])


def pack_and_train(root: Path, count: int) -> None:
    """Leaves the peak of private memory in ``root/peak``."""
    write_classes(root / "data", {"a": count // 2, "b": count // 2}, size=12)
    peak, done = [private()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    data = split(read_images(root / "data"), val=0.2, test=0.2)
    packed = pack(data, SIZE)
    assert packed.pixels.nbytes == count * SIZE * SIZE * 3
    kind: dict[str, Any] = {"student": partial(Tiny), "objective": hard, "epochs": 1, "batch_size": 16}
    hs.train(experiment(data, image_size=SIZE, **kind), root / "run", device="cpu", precision="32-true")
    done.set()
    watcher.join()
    (root / "peak").write_text(str(peak[0]))


def test_the_pack_grows_and_private_memory_does_not(tmp_path: Path) -> None:
    counts, peaks = (300, 1500), []
    for count in counts:
        (root := tmp_path / str(count)).mkdir()
        child = process(pack_and_train, root, count)
        child.join()
        assert child.exitcode == 0
        peaks.append(int((root / "peak").read_text()))
    # 59 MB more of pack. What a process holds differs by some MB from one to the next; tables take 2 KB an image.
    assert peaks[1] - peaks[0] < 20e6


def test_threads_work_no_further_ahead_than_a_few_hundred(tmp_path: Path) -> None:
    begun: list[Path] = []
    paths = [tmp_path / str(number) for number in range(2000)]
    given = of_each(paths, lambda path: begun.append(path) or path, "counting")
    assert [next(given) for _ in range(300)] == paths[:300]
    assert len(begun) <= 512
    assert list(given) == paths[300:]
    assert sorted(begun) == sorted(paths)
