"""Slides and caches that a cluster's workers made have the bytes of one process, whoever died on the way."""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("ray") is None:  # not imported: it reads its surroundings when it is
    pytest.skip("needs the extra cluster", allow_module_level=True)
pytest.importorskip("shapely")
pytest.importorskip("tifffile")
pytest.importorskip("openslide")

import slides_tiny
from test_slide_predict import files, said_of
from tiny import Counting, bytes_of, everything, no_page, table

import histill as hs
from histill.cli import run
from histill.cluster import joined, spread
from histill.errors import BadInput, Failed
from histill.files import read_json
from histill.fill import fill
from histill.slides.predict import predict_slides
from histill.types import Batch, Outputs

OPTIONS: dict[str, Any] = {"batch_size": 1, "threads": 1, "min_area_um2": 100}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of this machine's cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        with joined("auto") as its:
            for name in (__name__, "tiny"):  # workers do not see the tests' folder
                its.cloudpickle.register_pickle_by_value(sys.modules[name])
            yield its


def ours() -> dict[int, str]:
    """The processes below this one, by number."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # it has just ended
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return {pid: names[pid] for pid in mine}


def told(work: Callable[[], Any]) -> str:
    """What ``work`` says to people."""
    with redirect_stderr(io.StringIO()) as said:
        work()
    return said.getvalue()


# What is asked


def doubled(number: int) -> int:
    if number == 1:
        raise BadInput("one is bad")
    if number == 2:
        raise ZeroDivisionError("two is worse")
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def of_doubling() -> Callable[[int], int]:
    return doubled


@pytest.mark.slow
def test_an_error_is_that_items_answer_and_who_kills_its_workers_is_given_up(ray: Any) -> None:
    found: dict[int, Any] = {}

    def work() -> None:
        options: dict[str, Any] = {"what": "doubling", "unit": "numbers", "names": [f"number {n}" for n in range(6)]}
        found.update(spread(of_doubling, range(6), ray="auto", **options))

    notes = told(work)
    assert {n: found[n] for n in (0, 4, 5)} == {0: 0, 4: 8, 5: 10}
    assert (type(found[1]), str(found[1])) == (BadInput, "one is bad")
    assert (type(found[2]), str(found[2])) == (Failed, "ZeroDivisionError: two is worse")
    assert str(found[3]) == "number 3: 3 workers died over it (WorkerCrashedError)"
    assert notes.count("the worker over number 3 died") == 2
    assert ray.is_initialized(), "a cluster that was there before is left"


@pytest.mark.parametrize("address", ["here", "127.0.0.1", ":1", "127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_said(address: str) -> None:
    pattern = "HOST:PORT" if ":" not in address or address == ":1" else "no cluster answers there"
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        from histill.cluster import _check as check
    else:
        check = lambda where: joined(where).__enter__()  # noqa: E731
    with pytest.raises(BadInput, match=pattern):
        check(address)


# Slides


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two slides and, between them, one that is none."""
    folder = tmp_path_factory.mktemp("slides")
    bad = folder / "bad.tif"
    bad.write_bytes(b"II*\0 no slide")
    large = slides_tiny.slide(folder / "large.tif", width=1792, height=1792)
    return [slides_tiny.slide(folder / "small.tif", width=640, height=640), bad, large]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slides_tiny.model(tmp_path_factory.mktemp("models") / "purple.pt")


@pytest.mark.slow
def test_slides_of_two_workers_one_of_which_was_killed_are_those_of_one_process(
    ray: Any, cohort: list[Path], model: Path, tmp_path: Path
) -> None:
    with pytest.raises(Failed, match=r"1 of 3 slides failed: .*bad\.tif.*; the others are done") as alone:
        predict_slides(model, cohort, tmp_path / "alone", **OPTIONS)

    state, killed = tmp_path / "shared/large/.state", []

    def kill() -> None:
        """Whoever looks at the large slide, when a part of it is kept."""
        while not list(state.glob("fine00000[1-9].npz")):
            time.sleep(0.001)
        lock = (state.parent / ".lock").stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            if line.split()[5].endswith(f":{lock}") and int(line.split()[4]) in ours():
                killed.append(int(line.split()[4]))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()

    def work() -> None:
        with pytest.raises(Failed) as shared:
            predict_slides(model, cohort, tmp_path / "shared", ray="auto", **OPTIONS)
        assert str(shared.value) == str(alone.value)

    notes = told(work)
    killer.join(1)
    assert len(killed) == 1
    assert "note: the worker over large.tif died (WorkerCrashedError); another takes it up" in notes
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    assert said_of(tmp_path / "shared/large")["tiles"]["resumed"] > 0
    assert said_of(tmp_path / "alone/large")["tiles"]["resumed"] == 0
    both = [read_json(tmp_path / name / "summary.json") for name in ("alone", "shared")]
    assert both[0]["failed"] == both[1]["failed"]
    assert [list(s["slides"]) for s in both] == [["small", "large"]] * 2


@pytest.mark.slow
def test_the_flag_of_the_command(ray: Any, cohort: list[Path], model: Path, tmp_path: Path) -> None:
    assert run(["slide", str(model), str(cohort[0]), "--out", str(tmp_path), "--ray", "auto"]) == 0
    assert said_of(tmp_path / "small")["tiles"]["count"] > 0
    assert run(["slide", str(model), str(cohort[0]), "--out", str(tmp_path), "--ray", "auto", "--threads", "999"]) == 2


# The teacher's cache


class Dying(Counting):
    """Its answers lean on the batch around an image; asked about image 5 it dies, the first time."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def __call__(self, batch: Batch) -> Outputs:
        if 5 in batch.ids and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Outputs(logits=super().__call__(batch)["logits"] + batch.images.mean())


@pytest.mark.slow
def test_a_cache_that_workers_filled_is_that_of_one_process(ray: Any, tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    (tmp_path / "mark").touch()
    alone = fill(everything(data, tmp_path / "alone", teacher=Dying(tmp_path / "mark")))
    (tmp_path / "mark").unlink()
    made = everything(data, tmp_path / "shared", teacher=Dying(tmp_path / "mark"))
    notes = told(lambda: fill(made, ray="auto"))
    assert "died (WorkerCrashedError); another takes it up" in notes
    assert bytes_of(tmp_path / "shared") == bytes_of(alone)
    assert set(bytes_of(alone)) == {"cache.json", "known.npy", "logits.npy"}


def test_training_asks_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    data, teacher = table(tmp_path / "data"), Counting()
    folder = fill(everything(data, True, teacher=teacher))
    assert teacher.images == 24 * 2, "24 images for training, in two views"
    before = bytes_of(folder)
    assert fill(everything(data, True, teacher=teacher)) == folder
    assert teacher.images == 24 * 2, "what is known is not asked again"
    hs.train(everything(data, True, teacher=teacher), tmp_path / "run")
    assert teacher.images == 24 * 2 + 8, "and the validation images, without a cache"
    assert bytes_of(folder) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [({"teacher": None}, "learns alone"), ({"views": None}, "new views"), ({"cache": False}, "new views")],
)
def test_where_there_is_nothing_to_keep_it_is_said(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(BadInput, match=f"nothing to keep: .*{said}"):
        fill(everything(table(tmp_path / "data"), **{"cache": True} | change))


RECIPE = """
from functools import partial
from pathlib import Path
from tiny import Counting, everything
from histill.experiment import recipe

@recipe
def student(data, teacher=None, *, seed: int = 0, folder: str = ""):
    return everything(data, Path(folder) if folder else True, teacher=Counting(), seed=seed)
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table(tmp_path / "data")
    (tmp_path / "mine.py").write_text(RECIPE)
    name, data = f"{tmp_path / 'mine.py'}:student", ["--data", str(tmp_path / "data")]
    assert run(["cache", name, *data, "--folder", str(tmp_path / "kept")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'kept'}\n"
    assert (tmp_path / "kept/logits.npy").is_file()
    assert run(["cache", name]) == 2
    assert run(["cache", "dsnet", *data]) == 2
    assert "dsnet.student" in capsys.readouterr().err


# Who else may come in


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_only_this_machine_is_listened_to(ray: Any) -> None:
    sockets = set()
    for pid in ours():
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(str(file.readlink()))
            except OSError:
                continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    assert len(listening) > 3
    assert {address[-8:] for address in listening} == {"0100007F"}, "127.0.0.1, also as an address of IPv6"


@pytest.mark.slow
def test_nobody_comes_in_without_the_token(ray: Any) -> None:
    address = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", f"import ray; ray.init(address={address!r}); print('in')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "in" not in done.stdout.split()
    assert "Unauthenticated" in done.stderr
