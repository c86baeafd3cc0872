"""What makes training fast changes no more than it says: views by rows, teachers in bf16, memory that is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import Normed, everything, table
from torch import Tensor, nn

import histill as hs
from histill.data import Augment
from histill.data.views import _drawn, _move, render
from histill.machine import answers_bf16, at_speed, computes_bf16, kept_memory, launch
from histill.teachers import Frozen, _Answer
from histill.types import Batch, Outputs


def rotated(images: Tensor, ids: Tensor, augment: Augment, seed: int) -> Tensor:
    """The same views by torch's grid, which is taken where an angle may be drawn; the one here is 0."""
    u = _drawn(seed, ids, ids, augment)
    u[:, 2] = 0.5  # the middle of the draw: no angle
    turning = Augment(**{**{k: v for k, v in augment.key(0).items() if k != "seed"}, "rotate": 1e-3})  # type: ignore[arg-type]
    return _move(images, u[:, :6], turning, "bicubic")


@pytest.mark.parametrize("size", [7, 32])
@pytest.mark.parametrize("augment", [Augment(zoom=0.5, shift=0.2), Augment(zoom=3, shift=0.9, hflip=False)])
def test_views_by_rows_are_those_of_a_grid(size: int, augment: Augment) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, size, size, 3), dtype=np.uint8))
    ids = torch.arange(9)
    expected = rotated(pixels.permute(0, 3, 1, 2).float() / 255, ids, augment, 5).clamp(0, 1)
    assert torch.allclose(render(pixels, ids, ids, augment=augment, seed=5), expected, atol=2e-4)


class Named(nn.Module):
    """Gives its images in half precision under three names."""

    def forward(self, images: Tensor) -> Outputs:
        half = images.to(torch.bfloat16)
        return Outputs(logits=half.mean((2, 3)), map=half, labels=torch.ones(len(images), dtype=torch.int64))


def test_an_answer_is_float32_however_it_is_taken() -> None:
    images = torch.rand(2, 3, 4, 4)
    batch = Batch(images, torch.zeros(2), torch.arange(2), torch.zeros(2), lambda size: images)
    whole = {"logits": torch.float32, "map": torch.float32, "labels": torch.int64}

    def said() -> Outputs:
        return Frozen(Named(), key="named")(batch)

    assert {n: v.dtype for n, v in said().items()} == whole
    assert [v.dtype for v in said().values()] == list(whole.values())
    assert {n: v.dtype for n, v in dict(said()).items()} == whole
    assert {n: v.dtype for n, v in {**said()}.items()} == whole
    assert {n: v.dtype for n, v in Outputs(said()).items()} == whole
    assert said().get("map").dtype == torch.float32  # type: ignore[union-attr]
    assert said().get("mop") is None
    assert said()["map"].dtype == torch.float32
    with pytest.raises(hs.errors.BadInput, match="this network gives: labels, logits, map"):
        said()["mop"]


def test_what_is_not_asked_for_stays_small() -> None:
    answer = _Answer(Named()(torch.rand(1, 3, 4, 4)))
    assert answer["logits"].dtype == torch.float32
    assert dict.__getitem__(answer, "map").dtype == torch.bfloat16
    assert torch.equal(answer["map"], dict.__getitem__(answer, "map"))


class Spy(nn.Module):
    """Remembers in which precision it was asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.asked = nn.Linear(3, 2), set[torch.dtype]()

    def forward(self, images: Tensor) -> Outputs:
        logits = self.layer(images.mean((2, 3)))
        self.asked.add(logits.dtype)
        return Outputs(logits=logits)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_a_teacher_answers_in_the_precision_of_the_run(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    spy = Spy()
    data = table(tmp_path / "images")
    hs.train(
        everything(data, False, teacher=Frozen(spy, key="spy")), tmp_path / "run", device="cpu", precision=precision
    )
    assert spy.asked == {dtype}
    assert not answers_bf16("cpu"), "the run is over"
    with at_speed(launch("cpu", "auto", (), tmp_path)):
        assert answers_bf16("cpu") == computes_bf16("cpu")


def test_memory_that_is_kept_changes_no_bit() -> None:
    torch.manual_seed(0)
    images, weight = torch.rand(4, 3, 64, 64), torch.rand(32, 3, 3, 3)
    expected = F.conv2d(images, weight)
    with kept_memory():
        assert torch.equal(F.conv2d(images, weight), expected)
    assert torch.equal(F.conv2d(images, weight), expected)


def test_batch_norm_of_a_teacher_stays(tmp_path: Path) -> None:
    network = Normed()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    hs.train(everything(table(tmp_path / "images"), False, teacher=Frozen(network)), tmp_path / "run", device="cpu")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
