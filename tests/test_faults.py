"""Whatever goes wrong under a process (a kill, a disk, a file, a worker, another process) is one line, and nothing that
was done is lost.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import MakeFolder, write_classes
from disks import NO_MOUNTS, disk, own_mounts, protect, resize
from PIL import Image
from tiny import SIZE, bytes_of, experiment, no_page, process, table

pytest.importorskip("openslide")
pytest.importorskip("shapely")

import slides_tiny
import soak

import histill as hs
from histill.data import Images, pack, read_images
from histill.data.masks import pack_masks, read_masks
from histill.deploy.predictor import predict_folder
from histill.errors import BadInput, Failed, HistillError
from histill.files import claim, locked, writing
from histill.slides.engine import load_model
from histill.slides.predict import predict_slide, predict_slides

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from histill.cli import main
main(sys.argv[2:])
"""
KINDS = [*soak.KINDS]
QUICK = [pytest.param(n, marks=pytest.mark.slow) if n == "export" else n for n in KINDS]  # as long as all others


def listen() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(data: Path, out: Path, *more: str) -> list[str]:
    flags = ["--image-size", "32", "--batch-size", "8", "--val", "0.25", "--test", "0.25"]
    return ["train", "dsnet.student", "--data", str(data), "--out", str(out), *flags, *more]


# Kills


def survive(root: Path, name: str, kills: int, seed: int) -> None:
    found = soak.soak(name, root / name, kills=kills, seed=seed)
    (root / "found").write_text(json.dumps(asdict(found)))


@pytest.mark.parametrize("name", QUICK)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    child = process(survive, tmp_path, name, 4, random.SystemRandom().randrange(1 << 32))
    child.join()
    assert child.exitcode == 0
    found = json.loads((tmp_path / "found").read_text())
    assert found["kills"] == 4
    for wrong in ("half_written", "failed_starts", "mismatches", "left_over"):  # each with its seed
        assert found[wrong] == []


def test_an_interrupted_run_says_so_and_can_go_on(folder: MakeFolder, tmp_path: Path) -> None:
    data, out = folder({"benign": 12, "malignant": 12}), tmp_path / "run"
    command = [sys.executable, "-m", "histill", *train(data, out, "--epochs", "4000")]
    # A shell that runs this suite in the background has Ctrl-C ignored, and children inherit that.
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 60
    while not (out / "log.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said
    assert "--resume" in said.strip().splitlines()[-1]
    assert len(pd.read_csv(out / "log.csv")) >= 1
    assert not list(out.glob(".*.tmp"))


def test_a_checkpoint_that_a_kill_left_in_a_finished_run_is_removed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    made = experiment(table(tmp_path / "data"))
    for kept in (False, True):
        run = hs.train(made, tmp_path / f"run {kept}", keep_checkpoint=kept)
        if not kept:
            (run.path / "checkpoint.pt").write_bytes(b"as if the process had been killed before it removed this")
        before = bytes_of(run.path)
        hs.train(made, run.path, resume=True)
        assert before.keys() - bytes_of(run.path).keys() == (set() if kept else {"checkpoint.pt"})


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[tuple[str, int]] = []
    sync, replace = os.fsync, os.replace

    def noted(held: int) -> None:
        did.append(("sync", os.fstat(held).st_ino))
        sync(held)

    def renamed(source: Any, target: Any) -> None:
        did.append(("rename", Path(source).stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    with writing(tmp_path / "checkpoint.pt") as temporary:
        temporary.write_bytes(b"weights")
    file, home = (tmp_path / "checkpoint.pt").stat().st_ino, tmp_path.stat().st_ino
    assert did == [("sync", file), ("rename", file), ("sync", home)]


# Disks


def fill(root: Path, name: str) -> None:
    """Work on a disk that is full again and again, and has a little more room each time."""
    own_mounts()
    kind, place, out = soak.KINDS[name], root / "disk", root / "disk" / "out"
    kind.prepare(root)
    kind.work(root, root / "whole")
    need = sum(p.stat().st_size for p in (root / "whole").rglob("*") if p.is_file()) // 1024
    disk(place, 16)
    said: list[tuple[str, str]] = []
    for size in range(16, 20 * need, need // 6 + 8):
        resize(place, size)
        try:
            kind.work(root, out)
            break
        except HistillError as error:
            said.append((type(error).__name__, str(error)))
    found = [said, soak.differences(out, root / "whole"), soak.left(out)]
    (root / "found").write_text(json.dumps(found))


def in_own_mounts(work: Any, root: Path, name: str) -> Any:
    child = process(work, root, name)
    child.join()
    if child.exitcode == NO_MOUNTS:
        pytest.skip("this process may not mount a small disk")
    assert child.exitcode == 0
    return json.loads((root / "found").read_text())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("training", "slide", "export") else n for n in KINDS]
)
def test_a_disk_that_fills_is_one_line_and_with_room_it_goes_on_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    said, unlike, left = in_own_mounts(fill, tmp_path, name)
    assert len(said) >= 3
    for kind, line in said:
        assert kind == "Failed"
        assert "\n" not in line
        assert ("cannot write " in line and "disk full" in line) or ("takes " in line and "GB free" in line), line
        assert str(tmp_path / "disk") in line
        assert "make room" in line
    assert unlike == []
    assert left == []


def test_a_disk_that_fills_under_the_command_line(folder: MakeFolder, tmp_path: Path) -> None:
    data, out = folder({"benign": 12, "malignant": 12}), tmp_path / "run"
    command = [sys.executable, "-c", LIMITED, "100000", *train(data, out, "--epochs", "1")]
    full = subprocess.run(command, capture_output=True, text=True, check=False)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    last = full.stderr.strip().splitlines()[-1]
    assert f"cannot write {out / 'checkpoint.pt'}: disk full (" in last
    assert not (out / "checkpoint.pt").exists()
    assert not list(out.glob(".*.tmp"))
    again = [sys.executable, "-m", "histill", "train", "--out", str(out), "--resume"]
    assert subprocess.run(again, capture_output=True, check=False).returncode == 0
    assert (out / "model.safetensors").exists()


def overfill(root: Path, name: str) -> None:
    own_mounts()
    disk(root / "disk", 64)
    array = np.lib.format.open_memmap(root / "disk" / "big.npy", mode="w+", dtype=np.uint8, shape=(1 << 20,))
    try:
        claim(root / "disk" / "big.npy")
        array[:] = 1  # without the claim this line ends the process
        said = "it fits"
    except Failed as error:
        said = str(error)
    (root / "found").write_text(json.dumps([said, (root / "disk" / "big.npy").exists()]))


def test_a_mapped_array_on_a_full_disk_is_an_error_and_not_a_dead_process(tmp_path: Path) -> None:
    said, there = in_own_mounts(overfill, tmp_path, "")
    assert "cannot write" in said
    assert "disk full" in said
    assert not there


def test_masks_that_the_disk_does_not_hold_are_refused_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(pixels[..., 0] % 2).save(tmp_path / "masks" / f"{number}.png")
    images = read_masks(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: _Usage(10_000_000, 0, 6000))
    with pytest.raises(Failed, match=r"packing 6 masks takes 0\.0 GB, .* has 0\.0 GB free; make room"):
        pack_masks(images, 24, tmp_path / "cache")
    monkeypatch.undo()
    assert pack_masks(images, 24, tmp_path / "cache").shape == (6, 24, 24)


class _Usage:
    def __init__(self, total: int, used: int, free: int) -> None:
        self.total, self.used, self.free = total, used, free


def seal(root: Path, name: str) -> None:
    own_mounts()
    kind, place = soak.KINDS[name], root / "disk"
    kind.prepare(root)
    disk(place, 4096)
    (place / "out").mkdir()
    protect(place)
    try:
        kind.work(root, place / "out")
        said = ["nothing", ""]
    except HistillError as error:
        said = [type(error).__name__, str(error)]
    (root / "found").write_text(json.dumps(said))


@pytest.mark.parametrize("name", QUICK)
def test_an_output_that_may_not_be_written_to_is_one_line(name: str, tmp_path: Path) -> None:
    kind, line = in_own_mounts(seal, tmp_path, name)
    assert kind == "BadInput"
    assert f"cannot write {tmp_path / 'disk'}" in line
    assert "Read-only file system" in line
    assert line.endswith("set HISTILL_CACHE to another folder" if name == "cache" else "give another --out")


# Files that go, and workers that die


def test_an_image_that_goes_between_the_table_and_the_decoding(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    gone = data.paths()[7]
    kept = gone.read_bytes()
    gone.unlink()
    with pytest.raises(BadInput, match=rf"^{gone}: no such file$"):
        pack(data, SIZE)
    gone.write_bytes(kept)
    assert len(pack(data, SIZE).images) == len(data)


def test_an_image_that_goes_before_it_is_predicted_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    data = read_images(write_classes(tmp_path / "data", {"a": 6, "b": 6}))
    gone = data.paths()[5]

    class Mean:
        classes, image_size, mpp = ("a", "b"), SIZE, None

        def logits(self, images: Any) -> Any:
            gone.unlink(missing_ok=True)  # after the first batch
            return images.mean((2, 3))[:, :2]

        __call__ = logits

    said = list(predict_folder(Mean(), data.paths(), load_small, batch=4))
    assert [p.error for p in said if p.probabilities is None] == [f"{gone}: no such file"]
    assert len(said) == 12


def load_small(path: Path) -> Any:
    from histill.data.decode import load

    return load(path, SIZE)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two slides."""
    root = tmp_path_factory.mktemp("slides")
    slides_tiny.model(root / "purple.pt")
    for name in ("one", "two"):
        slides_tiny.slide(root / f"{name}.tif", width=640, height=640)
    return root


def broken_at(root: Path, call: int, what: Any) -> Any:
    """The model; before its ``call``-th look something happens."""
    model = load_model(root / "purple.pt")
    look, calls = model.look, []

    def looks(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            what()
        return look(*arguments, **options)

    object.__setattr__(model, "look", looks)
    return model


@pytest.mark.parametrize("how", ["cut short", "gone"])
def test_a_slide_that_goes_while_it_is_read_stops_no_other(slides: Path, tmp_path: Path, how: str) -> None:
    bad = tmp_path / "bad.tif"
    bad.write_bytes((slides / "one.tif").read_bytes())
    model = broken_at(slides, 2, bad.unlink if how == "gone" else lambda: os.truncate(bad, 1000))
    kind: dict[str, Any] = {"batch_size": 4, "threads": 1, "min_area_um2": 100}
    try:
        predict_slides(model, [bad, slides / "two.tif"], tmp_path / "out", **kind)
        assert how == "gone", "an open file can be read to its end although its name is gone"
    except Failed as error:
        assert str(error).startswith(f"1 of 2 slides failed: {bad}")  # noqa: PT017 - either is right
        assert "; the others are done" in str(error)  # noqa: PT017
    predict_slide(slides / "purple.pt", slides / "two.tif", tmp_path / "whole", **kind)
    assert soak.differences(tmp_path / "out" / "two", tmp_path / "whole" / "two") == []


def test_a_reader_that_dies_is_one_line_and_the_slide_goes_on_when_it_is_asked_again(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from histill.slides.grid import Grid

    read, calls = Grid.read, []

    def dies(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 24:
            raise SystemError("the codec gave up")
        return read(*arguments)

    kind: dict[str, Any] = {"batch_size": 1, "min_area_um2": 100}
    monkeypatch.setattr(Grid, "read", dies)
    with pytest.raises(Failed, match=rf"^{slides / 'one.tif'}: SystemError: the codec gave up$"):
        predict_slide(slides / "purple.pt", slides / "one.tif", tmp_path / "out", **kind)
    monkeypatch.undo()
    said = predict_slide(slides / "purple.pt", slides / "one.tif", tmp_path / "out", **kind)
    assert said["tiles"]["resumed"] == 16
    predict_slide(slides / "purple.pt", slides / "one.tif", tmp_path / "whole", **kind)
    assert soak.differences(tmp_path / "out" / "one", tmp_path / "whole" / "one") == []


def test_a_decoder_that_dies_leaves_nothing_half_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = table(tmp_path / "data")
    from histill.data import packed

    decode = packed.decode

    def dies(path: Path) -> Any:
        if path == data.paths()[9]:
            raise OSError(errno.EIO, "Input/output error")
        return decode(path)

    monkeypatch.setattr(packed, "decode", dies)
    with pytest.raises(Failed, match=rf"^{data.paths()[9]} cannot be read just now \(Input/output error\)"):
        pack(data, SIZE, folder=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    monkeypatch.undo()
    assert len(pack(data, SIZE, folder=tmp_path / "cache").images) == len(data)


# Two at once


def hold(folder: Path, held: Path) -> None:
    with locked(folder):
        held.touch()
        time.sleep(60)


@pytest.mark.parametrize("name", ["training", "slide"])
def test_the_second_process_in_a_folder_is_refused_until_the_first_is_dead(
    name: str, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    folder = tmp_path / "out" / ("run" if name == "training" else "one")
    child = process(hold, folder, tmp_path / "held")
    try:
        while not (tmp_path / "held").exists():
            assert child.is_alive()
            time.sleep(0.02)
        with pytest.raises(
            BadInput, match=f"another process is writing to {folder}; wait for it or give another --out"
        ):
            start(name, slides, tmp_path)
    finally:
        child.kill()
        child.join()
    start(name, slides, tmp_path)


def start(name: str, slides: Path, root: Path) -> None:
    if name == "training":
        hs.train(experiment(data_of(root)), root / "out" / "run")
    else:
        predict_slide(slides / "purple.pt", slides / "one.tif", root / "out", min_area_um2=100)


def data_of(root: Path) -> Images:
    return table(root / "data")


def test_where_files_cannot_be_locked_a_notice_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with locked(tmp_path / "out"):
        (tmp_path / "out" / "x").touch()
    assert "out lies where files cannot be locked: see that no other process writes to it" in capsys.readouterr().err
