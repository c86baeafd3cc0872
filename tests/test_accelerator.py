"""On an accelerator every recipe and loss computes what it does on the CPU, and no step waits for the device.

The accelerator is pretended (`pretended`), so that this is known on machines without one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import test_baselines
import test_foundation_recipe
import test_losses_contract
import test_recipes
import torch
from pretended import THERE, There, pretended
from safetensors.torch import load_file
from tiny import Tiny, hard, no_page, table
from torch import nn

import histill as hs
from histill import cli
from histill.accelerator import Tally, sent
from histill.data import Augment, Images, pack, read_masks, read_unlabelled, split
from histill.data.phantom import write_images, write_slide
from histill.data.views import render
from histill.errors import Failed
from histill.evaluate.judge import judge
from histill.experiment import Experiment
from histill.learner import Learner
from histill.models import Timm
from histill.recipes import baselines, methods, rckd
from histill.teachers import Cached, Frozen
from histill.types import Batch, Outputs, Terms, total

EVERYTHING = Augment(
    vflip=True,
    rotate=20,
    zoom=0.2,
    shift=0.1,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.1,
    edges=0.5,
    blur=0.05,
    noise=0.1,
    subset=0.6,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data", count=24, size=32)


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tissue") / "set"
    write_images(root, patients=8, images_per_patient=2, size=64, masks=True)
    return root


def taught() -> Frozen:
    torch.manual_seed(3)
    return Frozen(Timm("test_efficientnet", 2), image_size=32)


class Steps:
    """Two steps of an experiment, without an optimiser."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.packed = experiment, pack(experiment.data, experiment.image_size)
        torch.manual_seed(experiment.seed)
        self.learner = Learner(experiment.student(), experiment)

    def __call__(self, where: torch.device, waits: list[str]) -> list[dict[str, float]]:
        """The raw terms of either and the size of the gradient; ``waits`` keeps those of the second step."""
        teacher, learner = self.experiment.teacher, self.learner.to(where)
        found, rows = [], np.array(self.packed.images.rows("train"))
        for number in range(2):
            waits.clear()  # a teacher is sent once, in the first step
            batch = self.packed.batch(rows[6 * number :][:6], augment=self.experiment.augment, seed=3, device=where)
            torch.manual_seed(number)
            learner.begin(number)
            terms = learner(batch, teacher(batch) if teacher else Outputs())
            total(terms).backward()
            still = list(waits)
            found.append({name: float(loss.detach()) for name, (_, loss) in terms.items()})
        size = (
            sum(float(p.grad.cpu().double().square().sum()) for p in learner.parameters() if p.grad is not None) ** 0.5
        )
        waits[:] = still
        return [*found, {"gradient": size}]


def same_there(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Experiment], waits: set[str]) -> None:
    """The experiment's steps are those of the CPU, and wait for nothing but ``waits``."""
    here, far = Steps(make())(torch.device("cpu"), []), Steps(make())
    with pretended(monkeypatch) as device:
        there = far(THERE, device.waits)
        waited = {re.sub(r":\d+$", "", wait) for wait in device.waits}
    for a, b in zip(here, there, strict=True):
        assert b == pytest.approx(a, rel=2e-4)
    assert waited == waits


@pytest.mark.parametrize("part", ["teacher", "student"])
@pytest.mark.parametrize("name", test_recipes.TINY)
def test_a_recipe(name: str, part: str, data: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Experiment:
        kind: dict[str, Any] = test_recipes.arguments(name, part)
        module = test_recipes.module(name)
        if part == "student" and name == "mac-resnet":  # whose teacher says where to look
            network = module.teacher(data, **test_recipes.arguments(name, "teacher")).student()
            kind |= {"teacher": Frozen(network, image_size=32), "crop_term": "student"}
        elif part == "student":
            kind["teacher"] = taught()
        made: Experiment = getattr(module, part)(data, **kind)
        return made

    same_there(monkeypatch, make, set())


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method(method: str, data: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: dict[str, Any] = {"network": "resnet8x4", "image_size": 32, "epochs": 1, "batch_size": 6}

    def make() -> Experiment:
        if method == "ab":
            return methods.pretrain(data, taught(), **kind)
        return methods.student(data, taught(), method=method, **kind)  # type: ignore[arg-type]

    same_there(monkeypatch, make, set())


WAITS_OF_LIGHTLY = {
    "simclr": {"indexed by a mask objectives.py", "indexed by a mask backward"},
    "moco": {"aten._local_scalar_dense.default objectives.py"},
}


@pytest.mark.parametrize("method", test_baselines.TINY)
def test_a_pretraining(method: str, tissue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = read_unlabelled(tissue / "images")
    waits = WAITS_OF_LIGHTLY.get(method, set())
    same_there(monkeypatch, lambda: test_baselines.pretraining(patches, method), waits)


def test_foundation_models(data: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    images = read_unlabelled(data.root)

    def make() -> Experiment:
        several = [test_foundation_recipe.teacher(0), test_foundation_recipe.teacher(1, 8)]
        return test_foundation_recipe.quick(images, several, targets="both", nested=(4,), weights="none")

    same_there(monkeypatch, make, set())


def test_mixed_images(data: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: dict[str, Any] = {"network": "test_resnet", "image_size": 32, "batch_size": 6, "epochs": 1}
    asked = {"aten._local_scalar_dense.default mixing.py"}  # whether any image of the batch has a label
    same_there(monkeypatch, lambda: baselines.supervised(data, taught(), **kind), asked)


def test_masks(tissue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nuclei = split(read_masks(tissue / "manifest.csv", kind="instances"), val=0.25, test=0.25)
    kind: dict[str, Any] = {"image_size": 64, "batch_size": 4, "epochs": 1}
    rays = {"aten.nonzero.default star.py", "aten._unique2.default star.py", "indexed by a mask star.py"}
    same_there(monkeypatch, lambda: rckd.teacher(nuclei, **kind), rays)
    network: dict[str, Any] = {"network": "test_resnet", "weights": "none", "loss": "focal+dice"}
    same_there(monkeypatch, lambda: rckd.finetune(nuclei, **network, **kind), set())


@pytest.mark.parametrize("name", test_losses_contract.CASES)
def test_a_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = test_losses_contract.CASES[name]
    student, teacher, label = test_losses_contract.inputs(case, 6, torch.float32)
    loss = case.make(torch.float32)(student, teacher, label)
    (gradient,) = torch.autograd.grad(loss, student)
    with pretended(monkeypatch) as device:
        far = student.detach().to(THERE).requires_grad_()
        with THERE:  # a loss with weights has them there
            call = case.make(torch.float32)
        others = teacher.to(THERE), label.to(THERE)
        device.waits.clear()
        there = call(far, *others)
        there.backward()
        waited = list(device.waits)
        assert float(there.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert far.grad is not None
        assert torch.allclose(far.grad.cpu(), gradient, rtol=1e-4, atol=1e-6)
    assert [wait for wait in waited if "backward" not in wait] == []


def test_views_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(256, (8, 24, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    named = torch.arange(8), torch.arange(8) % 3
    here = render(pixels, *named, augment=EVERYTHING, seed=1)
    with pretended(monkeypatch) as device:
        there = render(sent(pixels, THERE), *named, augment=EVERYTHING, seed=1)
        assert isinstance(there, There)
        assert device.waits == []
        assert torch.equal(there.near, here)
    assert not torch.equal(here, render(pixels, *named, augment=Augment(), seed=1))


def test_a_whole_run_is_that_of_the_cpu(data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an average of the weights, clipping, accumulation, a cached teacher, a checkpoint and a second start."""
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)

    def both(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        soft = -(teacher["logits"].softmax(1) * student["logits"].log_softmax(1)).sum(1).mean()
        return {**hard(student, teacher, batch), "soft": (2.0, soft)}

    def made(cache: str) -> Experiment:
        kind: dict[str, Any] = {"image_size": 18, "epochs": 4, "batch_size": 8, "views": 2, "augment": EVERYTHING}
        kind |= {"ema": 0.9, "clip": 1.0, "accumulate": 2, "cache": tmp_path / cache}
        return Experiment(data=data, student=partial(Tiny), objective=both, teacher=taught(), **kind)

    here = hs.train(made("a"), tmp_path / "here", device="cpu", precision="32-true")
    read, left = Cached.__call__, [9]

    def torn(self: Cached, batch: Batch) -> Outputs:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return read(self, batch)

    monkeypatch.setattr(Cached, "__call__", torn)
    with pretended(monkeypatch) as device:
        with pytest.raises(KeyboardInterrupt):
            hs.train(made("b"), tmp_path / "there", device="meta:0", checkpoint_seconds=0)
        there = hs.train(made("b"), tmp_path / "there", device="meta:0", resume=True)
        judged = judge(there, data.root, device="meta:0")
    same = here.log.drop(columns="images_per_second"), there.log.drop(columns="images_per_second")
    assert np.allclose(*same, rtol=1e-5)
    for name, value in load_file(here.path / "model.safetensors").items():
        assert torch.allclose(load_file(there.path / "model.safetensors")[name], value, rtol=1e-5), name
    assert judged == judge(here, data.root, device="cpu")
    assert {re.sub(r":\d+$", "", wait) for wait in device.in_steps} == {"brought back teachers.py"}, "to be kept"


def test_what_is_not_finite_is_found_before_anything_is_kept(
    data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is read some steps later."""

    class Breaks(nn.Module):
        step = 0

        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
            loss = hard(student, teacher, batch)["hard"][1]
            return {"hard": (1.0, loss), "ratio": (1.0, loss / (self.step != 7))}

    kind: dict[str, Any] = {"image_size": 18, "epochs": 3, "batch_size": 2}  # six steps an epoch
    experiment = Experiment(data=data, student=partial(Tiny), objective=Breaks(), **kind)
    with pretended(monkeypatch), pytest.raises(Failed, match="the loss term 'ratio' is inf in epoch 1 step 1;"):
        hs.train(experiment, tmp_path / "run", device="meta:0")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    with pretended(monkeypatch), pytest.raises(Failed, match="the loss term 'ratio' is inf in epoch 1 step 1;"):
        hs.train(experiment, tmp_path / "often", device="meta:0", checkpoint_seconds=0)
    kept = torch.load(tmp_path / "often" / "checkpoint.pt", weights_only=True)
    assert (kept["state"]["epoch"], kept["state"]["step"]) == (1, 1)
    assert all(value.isfinite().all() for value in kept["learner"].values())


def test_a_tally_is_the_sum_over_images() -> None:
    tally, sums = Tally(), {"raw/a": 1.0}
    tally.add("step 0", 3, ["a", "b"], torch.tensor([2.0, 0.5]))
    tally.add("step 1", 1, ["b"], torch.tensor([4.0]))
    tally.read(sums)
    tally.read(sums)
    assert sums == {"raw/a": 7.0, "raw/b": 5.5}
    tally.add("step 2", 1, ["b"], torch.tensor([float("nan")]))
    with pytest.raises(Failed, match="the loss term 'b' is nan in step 2"):
        tally.read(sums)


def test_predicting_and_slides(data: Images, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("shapely")
    for module in ("finish", "finish_masks"):
        monkeypatch.setattr(f"histill.evaluate.{module}.finish", no_page)
    kind: dict[str, Any] = {"network": "test_resnet", "weights": "none", "batch_size": 4, "epochs": 1}
    nuclei = split(read_masks(tissue / "manifest.csv"), val=0.25, test=0.25)
    for name, experiment in (
        ("classes", methods.student(data, method="ce", image_size=32, **kind)),
        ("masks", rckd.finetune(nuclei, image_size=64, **kind)),
    ):
        hs.train(experiment, tmp_path / name)
    slide = write_slide(tmp_path / "slide.tiff", width=512, height=384, seed=1)
    for where in ("cpu", "meta:0"):
        with pretended(monkeypatch) if where != "cpu" else nullcontext():
            out = tmp_path / where
            for name, images in (("classes", data.root), ("masks", tissue / "images")):
                words = ["predict", str(tmp_path / name), str(images), "--out", str(out / f"{name}.csv")]
                assert cli.run([*words, "--device", where]) == 0
            words = ["slide", str(tmp_path / "classes"), str(slide), "--out", str(out / "slides"), "--mpp", "0.5"]
            assert cli.run([*words, "--device", where, "--runtime", "torch", "--precision", "32-true"]) == 0
    here, there = tmp_path / "cpu", tmp_path / "meta:0"
    for name in ("classes.csv", "masks.csv", "slides/slide/tiles.parquet"):
        read = pd.read_csv if name.endswith("csv") else pd.read_parquet
        pd.testing.assert_frame_equal(read(here / name), read(there / name), rtol=1e-5)
    masks = sorted(path.relative_to(here) for path in here.rglob("*.png") if "slides" not in path.parts)
    assert masks
    for name in masks:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
