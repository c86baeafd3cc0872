"""The methods differ in their objective alone, each is its published sum, and none moves the teacher."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Counting, no_page, table
from torch import Tensor, nn
from torch.nn import functional as F

import histill as hs
from histill import loop, losses
from histill.data import Images, pack
from histill.errors import BadInput
from histill.models import Cifar
from histill.recipes import methods
from histill.recipes._methods import METHODS, Pair, Rising, SelfSupervised, Turning, labels_alone, rotations
from histill.teachers import Frozen
from histill.types import Batch, Outputs, total

SMALL: dict[str, Any] = {"image_size": 32, "epochs": 1, "batch_size": 8, "views": 2}
WEIGHTS = {
    "ce": {"hard": 1},
    "kd": {"hard": 0.1, "soft": 0.9},
    "kd-standardized": {"hard": 0.1, "soft": 9},
    "dkd": {"hard": 1, "decoupled": 1},
    "dist": {"hard": 1, "dist": 1},
    "nkd": {"hard": 1, "normalized": 1},
    "fitnet": {"hard": 1, "hint": 100},
    "at": {"hard": 1, "attention": 1000},
    "vid": {"hard": 1, "variational": 1},
    "review": {"hard": 1, "review": 5},
    "rkd": {"hard": 1, "distance": 25, "angle": 50},
    "pkt": {"hard": 1, "pkt": 30000},
    "sp": {"hard": 1, "similarity": 3000},
    "cc": {"hard": 1, "correlation": 0.02},
    "crd": {"hard": 1, "contrast": 0.8},
    "crd-memory": {"hard": 1, "contrast": 0.8},
    "sskd": {"hard": 0.1, "soft": 0.9, "turned": 2.7, "self": 10, "pretext": 1},
}
"""Once what rises has risen."""


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data", count=24, size=32)


@pytest.fixture(scope="module")
def teacher() -> Frozen:
    torch.manual_seed(5)
    return Frozen(Cifar("wrn_16_1", 2))


def said(data: Images, experiment: Any) -> tuple[Outputs, Outputs, Batch, nn.Module]:
    """What student and teacher say of six training images."""
    packed = pack(data, 32)
    batch = packed.batch(torch.tensor(packed.images.rows("train")[:6]).numpy())
    teacher = experiment.teacher(batch) if experiment.teacher else Outputs()
    torch.manual_seed(0)
    network = experiment.student()
    return network(experiment.inputs(batch, teacher) if experiment.inputs else batch.images), teacher, batch, network


@pytest.mark.parametrize("method", WEIGHTS)
def test_a_method_is_its_published_sum_and_teaches_the_student(data: Images, teacher: Frozen, method: str) -> None:
    made = methods.student(data, teacher, method=method, network="resnet8x4", **SMALL)
    student, taught, batch, network = said(data, made)
    objective = made.objective
    if isinstance(objective, Rising):
        assert objective(student, taught, batch)[objective.term][0] == 0
        objective.step = objective.rise
    torch.manual_seed(1)
    terms = objective(student, taught, batch)
    assert {name: weight for name, (weight, _) in terms.items()} == pytest.approx(WEIGHTS[method])
    plain = student["logits"][:6]
    assert float(terms["hard"][1].detach()) == pytest.approx(
        float(F.cross_entropy(plain, batch.labels).detach()), rel=1e-5
    )
    for name, (_, loss) in terms.items():
        network.zero_grad()
        loss.backward(retain_graph=True)
        moved = sum(float(p.grad.abs().sum()) for p in network.parameters() if p.grad is not None)
        assert (moved > 0) == (name != "pretext"), name
    assert set(WEIGHTS) == set(METHODS) - {"ab"}


def random_pair(classes: int = 5) -> tuple[Tensor, Tensor, Batch]:
    """Logits ``(6, classes)`` of both, and a batch of their labels."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = (3 * torch.randn(6, classes, generator=generator) for _ in range(2))
    zero = torch.zeros(6, dtype=torch.long)
    return student, teacher, Batch(torch.zeros(6, 3, 4, 4), torch.arange(6) % classes, zero, zero, lambda size: zero)


def test_the_numbers_within_a_loss_are_those_of_its_paper() -> None:
    s, t, batch = random_pair()
    y = batch.labels
    expected = {
        "kd-standardized": losses.kd(s, t, temperature=2, standardize=True),
        "dkd": losses.dkd(s, t, y, alpha=1, beta=8, temperature=4),
        "dist": losses.dist(s, t, beta=2, gamma=2, temperature=4),
        "nkd": losses.nkd(s, t, y, gamma=1.5, temperature=1),
    }
    nothing = Pair(Outputs(), Outputs(), lambda: (y, y), 1)
    for method, value in expected.items():
        terms = METHODS[method].make(nothing)(Outputs(logits=s), Outputs(logits=t), batch)
        (found,) = (loss for name, (_, loss) in terms.items() if name != "hard")
        assert float(found) == pytest.approx(float(value), rel=1e-6), method


def test_sskd_compares_each_turned_image_with_what_the_teacher_says_of_the_same() -> None:
    s, t, batch = random_pair()
    told = torch.stack([t.roll(turns, 1) for turns in (1, 2, 3)], 1)  # (6, 3, 5)
    teacher = Outputs(logits=t, pooled=t, turned_logits=told, turned_pooled=told)
    loss = SelfSupervised(Pair(Outputs(pooled=s), Outputs(pooled=t), lambda: (s, s), 1))
    same = torch.cat([s, *told.unbind(1)])
    assert float(loss(Outputs(logits=same, pooled=same), teacher, batch)["turned"][1]) < 1e-9
    other = torch.cat([s, s, s, s])
    found = loss(Outputs(logits=other, pooled=other), teacher, batch)["turned"][1]
    by_hand = np.mean([float(losses.kd(s, told[:, turn], temperature=4)) for turn in range(3)])
    assert float(found) == pytest.approx(by_hand, rel=1e-5)


def test_stages_are_the_last_four_sizes_and_each_method_takes_its_own() -> None:
    def maps(channels: int, sizes: tuple[int, ...]) -> Outputs:
        generator = torch.Generator().manual_seed(channels)
        made = {
            f"stage{n}": torch.rand(2, channels + n, side, side, generator=generator) for n, side in enumerate(sizes)
        }
        return Outputs(**made)

    student, teacher = maps(3, (32, 16, 8, 4, 2)), maps(7, (16, 8, 4, 2))
    pair = Pair(student, teacher, lambda: (torch.arange(2), torch.arange(2)), 1)
    assert pair.stages == [("stage1", "stage0"), ("stage2", "stage1"), ("stage3", "stage2"), ("stage4", "stage3")]
    assert pair.channels == [(4, 7), (5, 8), (6, 9), (7, 10)]
    hinted: Any = METHODS["fitnet"].make(pair)
    assert hinted.stage == ("stage3", "stage2")
    student["logits"], zero = torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)
    batch = Batch(torch.zeros(2, 3, 4, 4), zero, zero, zero, lambda size: zero)
    each = [losses.attention_transfer(student[s], teacher[t]) for s, t in pair.stages]
    summed = METHODS["at"].make(pair)(student, teacher, batch)["attention"][1]
    assert float(summed) == pytest.approx(float(torch.stack(each).sum()), rel=1e-6)
    last = METHODS["sp"].make(pair)(student, teacher, batch)["similarity"][1]
    assert float(last) == pytest.approx(float(losses.similarity(student["stage4"], teacher["stage3"])), rel=1e-6)


def test_kd_is_what_it_was_before_methods(data: Images, teacher: Frozen) -> None:
    made = methods.student(data, teacher, method="kd", network="resnet8x4", **SMALL)
    student, taught, batch, _ = said(data, made)
    p, q = (taught["logits"] / 4).softmax(1), (student["logits"] / 4).log_softmax(1)
    soft = 16 * (p * (p.log() - q)).sum(1).mean()
    expected = 0.1 * F.cross_entropy(student["logits"], batch.labels) + 0.9 * soft
    assert float(total(made.objective(student, taught, batch)).detach()) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )


def test_methods_differ_in_what_they_learn_by_and_in_nothing_else(data: Images, teacher: Frozen) -> None:
    made = {m: methods.student(data, teacher, method=m, network="resnet8x4", **SMALL) for m in WEIGHTS}
    own = {"objective", "teacher", "inputs", "cache", "cache_outputs", "recipe", "student", "optimizer", "schedule"}
    for method, experiment in made.items():
        for field in dataclasses.fields(experiment):
            if field.name not in own:
                assert getattr(experiment, field.name) == getattr(made["ce"], field.name), (method, field.name)
        for name in ("student", "optimizer"):
            one, other = getattr(experiment, name), getattr(made["ce"], name)
            assert (one.func, one.keywords) == (other.func, other.keywords)
        assert [experiment.schedule(e / 4) for e in range(4)] == [made["ce"].schedule(e / 4) for e in range(4)]
    assert made["ce"].teacher is None
    kept = {m: e.cache_outputs for m, e in made.items() if e.cache and e.teacher is not None and m != "sskd"}
    assert set(kept.values()) == {("logits", "pooled")}, "one cache for all of them"
    assert {m for m, e in made.items() if not e.cache} == {m for m in WEIGHTS if "maps" in METHODS[m].needs}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_weight_rises_evenly_by_step_and_stays(
    data: Images, teacher: Frozen, tmp_path: Path, accumulate: int
) -> None:
    made = methods.student(data, teacher, method="dkd", network="resnet8x4", **SMALL | {"epochs": 24})
    rise, steps = made.objective.rise, math.ceil(len(data.rows("train")) / 8)  # type: ignore[attr-defined]
    assert rise == steps * 24 // 12
    log = hs.train(dataclasses.replace(made, epochs=4, accumulate=accumulate), tmp_path / "run").log
    last = steps * np.arange(1, 5) - 1
    assert log["weight/decoupled"].tolist() == pytest.approx(np.minimum(1, last / rise).tolist())


def test_the_memory_of_crd_knows_the_training_images_alone(data: Images, teacher: Frozen) -> None:
    made: Any = methods.student(data, teacher, method="crd-memory", network="resnet8x4", **SMALL).objective
    rows = pack(data, 32).images.rows("train")
    assert made.loss.memory_teacher.shape == (len(rows), 128)
    assert made.place[torch.tensor(rows)].tolist() == list(range(len(rows)))
    labels = pack(data, 32).labels[torch.tensor(rows)]
    assert (labels[made.loss.draw(torch.arange(len(rows)))] != labels[:, None]).all(), "negatives are of other classes"


def test_a_turning_teacher_says_of_each_rotation_what_it_says_of_the_turned_image(
    data: Images, teacher: Frozen
) -> None:
    packed = pack(data, 32)
    batch = packed.batch(torch.arange(3).numpy())
    outputs = Turning(teacher)(batch)
    for turns in (1, 2, 3):
        turned = batch._replace(images=batch.images.rot90(turns, (2, 3)))
        for name in ("logits", "pooled"):
            torch.testing.assert_close(outputs[f"turned_{name}"][:, turns - 1], teacher(turned)[name])
    torch.testing.assert_close(outputs["logits"], teacher(batch)["logits"])
    one = torch.arange(12.0).view(1, 3, 2, 2)
    assert torch.equal(rotations(one)[2], one[0].flip((1, 2)))
    assert Turning(teacher).key != teacher.key


def test_the_boundaries_are_the_papers_sum_over_elements(data: Images, teacher: Frozen) -> None:
    made = methods.pretrain(data, teacher, network="resnet8x4", **SMALL)
    assert made.select == "last"
    student, taught, batch, _ = said(data, made)
    terms = made.objective(student, taught, batch)
    # wrn_16_1: 16 x 32 x 32, 32 x 16 x 16 and 64 x 8 x 8 elements; a half for each stage above the last.
    expected = {"stage1": 16384 / 4, "stage2": 8192 / 2, "stage3": 4096}
    assert {n: w for n, (w, _) in terms.items()} == pytest.approx({n: 0.003 * v for n, v in expected.items()})
    own: Any = made.objective
    f_s = own.losses[2].connect(student["stage3"])
    fires = taught["stage3"] > 0
    by_hand = torch.where(fires, (1 - f_s).clamp(min=0), (1 + f_s).clamp(min=0)).square().mean()
    assert float(terms["stage3"][1].detach()) == pytest.approx(float(by_hand.detach()), rel=1e-4)


def test_boundaries_then_labels(data: Images, teacher: Frozen, tmp_path: Path) -> None:
    first = hs.train(methods.pretrain(data, teacher, network="resnet8x4", **SMALL), tmp_path / "first")
    then = methods.student(data, method="ce", network="resnet8x4", weights=str(first.path), **SMALL)
    began, ended = then.student().state_dict(), first.network().state_dict()
    assert all(torch.equal(value, ended[name]) for name, value in began.items())
    with pytest.raises(BadInput, match=r"phase of its own: run methods\.pretrain"):
        methods.student(data, teacher, method="ab", network="resnet8x4", **SMALL)


@pytest.mark.parametrize("method", ["dkd", "crd-memory"])
def test_interrupted_it_ends_with_the_same_bits(
    data: Images, teacher: Frozen, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> Any:
        return methods.student(data, teacher, method=method, network="wrn_16_1", **SMALL | {"epochs": 3})

    whole = hs.train(made(), tmp_path / "whole")
    step, calls = loop._step, []

    def interrupted(*some: Any) -> None:
        calls.append(0)
        if len(calls) == 4:  # in the middle of the second epoch, when banks and weights have moved
            raise KeyboardInterrupt
        step(*some)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hs.train(made(), tmp_path / "cut", checkpoint_seconds=0)
    assert (tmp_path / "cut/checkpoint.pt").exists()
    cut = hs.train(made(), tmp_path / "cut", resume=True)
    for file in ("model.safetensors", "predictions.parquet", "last.parquet"):
        assert (cut.path / file).read_bytes() == (whole.path / file).read_bytes(), file


def test_what_the_networks_do_not_give_is_said(data: Images) -> None:
    for method, what in (("rkd", "pooled features"), ("at", "feature maps")):
        with pytest.raises(BadInput, match=f"--method {method}: it compares {what}, and the teacher gives only logits"):
            methods.student(data, Counting(), method=method, network="resnet8x4", **SMALL)
    unfit = methods.unfit(data, Counting(), network="resnet8x4", image_size=32)
    assert set(METHODS) - set(unfit) == {"ce", "kd", "kd-standardized", "dkd", "dist", "nkd"}
    with pytest.raises(BadInput, match="--method kdd: one of ce, kd"):
        methods.student(data, Counting(), method="kdd", network="resnet8x4", **SMALL)


def test_of_two_classes_standardised_logits_teach_nothing_and_that_is_said(
    data: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 2).requires_grad_(), 3 * torch.randn(8, 2)
    (gradient,) = torch.autograd.grad(losses.kd(student, teacher, temperature=2, standardize=True), student)
    assert gradient.abs().max() < 1e-4  # of plain KD it is thousands of times as large
    methods.student(data, Counting(), method="kd-standardized", network="resnet8x4", **SMALL)
    assert "of two classes z-scored logits are 1 and -1" in capsys.readouterr().err
    methods.student(data, Counting(), method="dist", network="resnet8x4", **SMALL)
    assert not capsys.readouterr().err


def test_without_a_teacher_the_student_learns_from_the_labels(data: Images) -> None:
    alone = methods.student(data, method="kd", network="resnet8x4", **SMALL)
    assert (alone.objective, alone.teacher) == (labels_alone, None)


def test_steps_are_those_of_the_benchmark(data: Images) -> None:
    made = methods.student(data, network="resnet8x4", epochs=240, schedule="steps", augment="cifar")
    rates = [made.schedule(epoch) for epoch in (149, 150, 180, 210, 239)]
    assert rates == pytest.approx([1, 0.1, 0.01, 0.001, 0.001])
    assert made.optimizer.keywords == {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}  # type: ignore[attr-defined]


def test_every_loss_with_a_teacher_has_its_row() -> None:
    # DSNet's equation, multi-exit networks and masks have recipes of their own, and so have foundation models.
    elsewhere = {"soft_cross_entropy", "self_distillation", "be_your_own_teacher", "dice", "focal", "cross_entropy"}
    elsewhere |= {"Projection", "cosine", "smooth_l1", "star_loss"}
    used = {name for name in losses.__all__ if name in vars(__import__("histill.recipes._methods", fromlist=["x"]))}
    assert used - {"cross_entropy"} == {n for n in losses.__all__ if n != "GUIDE"} - elsewhere
