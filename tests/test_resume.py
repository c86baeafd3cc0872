"""A run that was killed and went on is, bit for bit, the run that was not."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from tiny import Counting, Normed, Tiny, both, bytes_of, everything, experiment, no_page, process, table

import histill as hs
from histill.data import Augment, Images
from histill.errors import BadInput
from histill.files import write_json
from histill.models import DSNet
from histill.types import Batch, Outputs, Terms

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture
def data(tmp_path: Path) -> Images:
    return table(tmp_path / "data")


class Leaning(Counting):
    """Its answers lean on the batch around an image, as the last bit of a large network's can."""

    def __call__(self, batch: Batch) -> Outputs:
        return Outputs(logits=super().__call__(batch)["logits"] + batch.images.mean())


def go(root: Path, name: str, **changes: Any) -> None:
    """Train until done or killed, keeping a checkpoint after every step."""
    kind: dict[str, Any] = {"teacher": Leaning(), "epochs": 6} | changes
    made = everything(table(root / "data"), root / f"cache of {name}", **kind)
    hs.train(made, root / name, resume=True, checkpoint_seconds=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and with a run called whole that nothing disturbed."""
    root = tmp_path_factory.mktemp("resume")
    table(root / "data")
    child = process(go, root, "whole")
    child.join()
    assert child.exitcode == 0
    return root


def check_equal(one: Path, other: Path) -> None:
    found, wanted = bytes_of(one), bytes_of(other)
    assert found.keys() == wanted.keys()
    for file in found.keys() - {"run.json", "log.csv"}:
        assert found[file] == wanted[file], file
    logs = [pd.read_csv(p / "log.csv").drop(columns="images_per_second") for p in (one, other)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)
    assert not list(one.glob(".*.tmp"))


class Alarm:
    """An objective after whose ``call``-th call the process lives for so many seconds more."""

    def __init__(self, call: int, seconds: float) -> None:
        self.call, self.seconds = call, seconds

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        self.call -= 1
        if self.call == 0:
            signal.setitimer(signal.ITIMER_REAL, self.seconds)  # nobody handles it: the kernel ends the process
        return both(student, teacher, batch)


def alarmed(root: Path, name: str, call: int, seconds: float) -> None:
    go(root, name, objective=Alarm(call, seconds))


def test_killed_at_random_moments_it_ends_with_the_same_bytes(root: Path) -> None:
    draw, killed, lives = random.Random(0), 0, 5
    for life in range(lives):
        last = life == lives - 1
        child = process(alarmed, root, "torn", 0 if last else draw.randint(1, 8), draw.uniform(1e-4, 0.03))
        child.join()
        assert child.exitcode == 0 if last else child.exitcode in (0, -signal.SIGALRM)
        killed += child.exitcode != 0
    assert killed >= 3
    check_equal(root / "torn", root / "whole")


class Fuse:
    """An objective that kills its own process at the ``call``-th call."""

    def __init__(self, call: int) -> None:
        self.call = call

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        self.call -= 1
        if self.call == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return both(student, teacher, batch)


def fused(root: Path, name: str, call: int) -> None:
    go(root, name, objective=Fuse(call))


@pytest.mark.parametrize("call", [1, 9, 36])
def test_killed_within_an_epoch_it_goes_on_within_the_epoch(root: Path, call: int) -> None:
    name = f"torn at {call}"
    for fuse, status in ((call, -signal.SIGKILL), (0, 0)):
        child = process(fused, root, name, fuse)
        child.join()
        assert child.exitcode == status
        if fuse > 2:
            state = torch.load(root / name / "checkpoint.pt", weights_only=True)["state"]
            # 24 images in batches of 8, each cut in two: six calls to an epoch.
            assert (state["epoch"], state["step"]) == divmod((call - 1) // 2, 3)
    check_equal(root / name, root / "whole")


def test_killed_while_a_checkpoint_is_written_the_one_before_counts(root: Path) -> None:
    for work, status in ((half_written, -signal.SIGKILL), (go, 0)):
        child = process(work, root, "half")
        child.join()
        assert child.exitcode == status
        assert bool(list((root / "half").glob(".checkpoint.pt.*.tmp"))) == (work is half_written)
    check_equal(root / "half", root / "whole")


def half_written(root: Path, name: str) -> None:
    save, calls = torch.save, []

    def torn(value: Any, path: Path) -> None:
        calls.append(path)
        save(value, path)
        if len(calls) == 5:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = torn
    go(root, name)


class Steep:
    """An objective whose scaled gradients overflow float16; it is interrupted at the ``call``-th call."""

    def __init__(self, call: int = 0) -> None:
        self.call = call

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        self.call -= 1
        if self.call == 0:
            raise KeyboardInterrupt
        return {"hard": (3000.0, torch.nn.functional.cross_entropy(student["logits"], batch.labels))}


def test_how_far_a_float16_loss_is_scaled_is_remembered(
    tmp_path: Path, data: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fabric offers 16-mixed on GPUs alone; its parts work on the CPU as well.
    half = partial(MixedPrecision, "16-mixed", "cpu")
    monkeypatch.setattr("histill.loop.launch", lambda *_: Fabric(accelerator="cpu", devices=1, plugins=[half()]))
    gently = {"optimizer": partial(torch.optim.SGD, lr=1e-5), "epochs": 4}
    made = {"whole": (0,), "torn": (8, 0)}
    for name, calls in made.items():
        for call in calls:
            with pytest.raises(KeyboardInterrupt) if call else nullcontext():
                kind = {"resume": True, "checkpoint_seconds": 0, "keep_checkpoint": True}
                hs.train(experiment(data, objective=Steep(call), **gently), tmp_path / name, **kind)
    whole, torn = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in made)
    assert whole["precision"] == torn["precision"]
    assert whole["precision"]["scale"] < 65536, "some steps should have overflowed"
    assert all(torch.equal(value, torn["learner"][name]) for name, value in whole["learner"].items())


def undone(out: Path) -> None:
    """As if the process had been killed after its last checkpoint, before it left its results."""
    info = json.loads((out / "run.json").read_text())
    write_json(out / "run.json", info | {"status": "running"})
    (out / "model.safetensors").unlink()


def test_killed_after_it_stopped_early_it_does_not_train_on(tmp_path: Path, data: Images) -> None:
    still = partial(torch.optim.SGD, lr=0.0)
    made = experiment(data, student=partial(Normed), optimizer=still, epochs=9, patience=2, select="auroc")
    run = hs.train(made, tmp_path / "run", keep_checkpoint=True)
    before = bytes_of(run.path)
    undone(run.path)
    again = hs.train(made, tmp_path / "run", resume=True, keep_checkpoint=True)
    assert len(again.log) == len(run.log) < 9
    assert bytes_of(run.path)["model.safetensors"] == before["model.safetensors"]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, data: Images) -> None:
    made = experiment(data)
    run = hs.train(made, tmp_path / "run")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.path.rglob("*") if p.is_file()}
    again = hs.train(made, tmp_path / "run", resume=True)
    assert again.finished
    assert torch.equal(again.network().head.weight, run.network().head.weight)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.path.rglob("*") if p.is_file()} == before


def test_a_finished_run_of_another_network_is_refused(tmp_path: Path, data: Images) -> None:
    hs.train(experiment(data), tmp_path / "run")
    with pytest.raises(BadInput, match=r"finished, with network tiny:Tiny, not tiny:Normed; give another --out"):
        hs.train(experiment(data, student=partial(Normed)), tmp_path / "run", resume=True)


def test_a_new_run_into_a_folder_that_holds_one_is_refused(tmp_path: Path, data: Images) -> None:
    hs.train(experiment(data), tmp_path / "run")
    with pytest.raises(BadInput, match="holds a run already; go on with --resume, or give another --out"):
        hs.train(experiment(data), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("network", {"student": partial(Tiny, classes=2, width=5)}),
        ("optimizer", {"optimizer": partial(torch.optim.SGD, lr=0.4)}),
        ("schedule", {"schedule": lambda epoch: 0.5}),
        ("batch_size", {"batch_size": 9}),
        ("accumulate", {"accumulate": 2}),
        ("epochs", {"epochs": 3}),
        ("image_size", {"image_size": 20}),
        ("augment", {"augment": Augment()}),
        ("objective", {"objective": lambda student, teacher, batch: {"one": (1.0, student["logits"].mean())}}),
        ("seed", {"seed": 1}),
        ("select", {"select": "loss"}),
        ("ema", {"ema": 0.5}),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, data: Images, name: str, change: Any) -> None:
    run = hs.train(experiment(data), tmp_path / "run", keep_checkpoint=True)
    undone(run.path)
    with pytest.raises(BadInput, match=f"--resume with {name} .* but the run has"):
        hs.train(experiment(data, **change), run.path, resume=True)


def test_a_finished_run_is_not_taken_for_that_of_another_teacher(tmp_path: Path, data: Images) -> None:
    taught = {seed: experiment(data, objective=both, teacher=Counting(seed)) for seed in (1, 2)}
    run = hs.train(taught[1], tmp_path / "run")
    assert hs.train(taught[1], run.path, resume=True).finished
    with pytest.raises(BadInput, match="is finished, with teacher counting 1, not counting 2"):
        hs.train(taught[2], run.path, resume=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 3}, "epochs 2, not 3"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"views": 2}, "views None, not 2"),
        ({"objective": both}, "objective tiny:hard, not tiny:both"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "optimizer .*0.5.*, not .*0.1"),
        ({"augment": Augment(rotate=3)}, "augment .*, not .*3"),
        ({"student": partial(Tiny, classes=2, width=4)}, "network's arguments .*, not .*4"),
    ],
)
def test_a_finished_run_that_no_recipe_made_is_not_taken_for_another(
    tmp_path: Path, data: Images, change: Any, said: str
) -> None:
    run = hs.train(experiment(data), tmp_path / "run")
    assert hs.train(experiment(data), run.path, resume=True).finished
    with pytest.raises(BadInput, match=f"is finished, with {said}.*; give another --out"):
        hs.train(experiment(data, **change), run.path, resume=True)


def test_other_images_are_refused(tmp_path: Path, data: Images) -> None:
    run = hs.train(experiment(data), tmp_path / "run", keep_checkpoint=True)
    undone(run.path)
    with pytest.raises(BadInput, match="the images have changed since the run started"):
        hs.train(experiment(table(tmp_path / "data", seed=1)), run.path, resume=True)


def test_arguments_that_json_turns_into_lists_are_the_same(tmp_path: Path, data: Images) -> None:
    adam = partial(torch.optim.Adam, lr=1e-3, betas=(0.8, 0.9))
    run = hs.train(experiment(data, optimizer=adam), tmp_path / "run", keep_checkpoint=True)
    undone(run.path)
    assert hs.train(experiment(data, optimizer=adam), run.path, resume=True).finished


def test_a_damaged_checkpoint_is_named(tmp_path: Path, data: Images) -> None:
    run = hs.train(experiment(data), tmp_path / "run", keep_checkpoint=True)
    undone(run.path)
    whole = (run.path / "checkpoint.pt").read_bytes()
    other = io.BytesIO()
    torch.save([1], other)
    for damaged in (b"", whole[: len(whole) // 2], other.getvalue(), b"cos\nsystem\n(S'true'\ntR."):
        (run.path / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(BadInput, match=r"checkpoint.pt is damaged; remove it to start again"):
            hs.train(experiment(data), run.path, resume=True)


def test_a_checkpoint_of_other_parts_is_named(tmp_path: Path, data: Images) -> None:
    run = hs.train(experiment(data), tmp_path / "run", keep_checkpoint=True)
    undone(run.path)
    saved = torch.load(run.path / "checkpoint.pt", weights_only=True)
    saved["learner"]["objective.seen"] = torch.zeros(())
    torch.save(saved, run.path / "checkpoint.pt")
    with pytest.raises(BadInput, match=r"checkpoint.pt is of another version of Histill; remove it to start again"):
        hs.train(experiment(data), run.path, resume=True)


def slow(root: Path) -> None:
    made = everything(table(root / "data"), root / "cache", student=partial(DSNet, image_size=18), epochs=10_000)
    hs.train(made, root / "run")


def test_a_second_process_is_refused(tmp_path: Path, data: Images) -> None:
    child = process(slow, tmp_path)
    try:
        while not (tmp_path / "run/run.json").exists():
            assert child.is_alive()
            time.sleep(0.02)
        with pytest.raises(BadInput, match="another process is writing to"):
            hs.train(everything(data, tmp_path / "other", epochs=10_000), tmp_path / "run", resume=True)
    finally:
        child.kill()
        child.join()


def test_a_finished_run_of_other_arguments_is_refused(data: Images, tmp_path: Path) -> None:
    # A study that is called again with other epochs must not show the old runs as if they were these.
    made = hs.recipes.dsnet.student(data, image_size=18, epochs=1)
    hs.train(made, tmp_path / "run")
    hs.train(hs.recipes.dsnet.student(data, image_size=18, epochs=1), tmp_path / "run", resume=True)
    with pytest.raises(BadInput, match="finished, with epochs 1, not 2"):
        hs.train(hs.recipes.dsnet.student(data, image_size=18, epochs=2), tmp_path / "run", resume=True)
