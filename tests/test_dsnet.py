"""The melanoma recipe is the paper's equation, and its two students differ in the teacher alone."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Counting, no_page, table

import histill as hs
from histill import cli
from histill.data import Images
from histill.data.views import NONE
from histill.errors import BadInput
from histill.models import DSNet, Timm
from histill.recipes import dsnet
from histill.recipes._start import start
from histill.types import Batch, Outputs, total


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data")


def batch(labels: list[int]) -> Batch:
    images = torch.zeros(len(labels), 3, 4, 4)
    ids = torch.arange(len(labels))
    return Batch(images, torch.tensor(labels), ids, torch.zeros_like(ids), lambda size: images)


STUDENT = Outputs(logits=torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
TEACHER = Outputs(logits=torch.tensor([[4.0 * math.log(3), 0.0], [0.0, 0.0]]))
"""At temperature 4 the teacher says (3/4, 1/4) and (1/2, 1/2)."""


def soft_by_hand() -> float:
    # Student at temperature 4: logits (0.5, 0) and (0, 1).
    log_z = (math.log(math.exp(0.5) + 1), math.log(1 + math.exp(1)))
    first = -(0.75 * (0.5 - log_z[0]) + 0.25 * (0 - log_z[0]))
    second = -(0.5 * (0 - log_z[1]) + 0.5 * (1 - log_z[1]))
    return (first + second) / 2


def test_the_distilled_loss_is_equation_5() -> None:
    terms = dsnet.distilled(STUDENT, TEACHER, batch([0, 1]), alpha=0.1, temperature=4)
    hard = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-4))) / 2
    assert {name: weight for name, (weight, _) in terms.items()} == {"hard": 0.1, "soft": 0.9}
    assert float(terms["hard"][1]) == pytest.approx(hard, rel=1e-6)
    assert float(terms["soft"][1]) == pytest.approx(soft_by_hand(), rel=1e-6)
    assert float(total(terms)) == pytest.approx(0.1 * hard + 0.9 * soft_by_hand(), rel=1e-6)


def test_t_squared_is_in_the_weight_where_asked_for() -> None:
    terms = dsnet.distilled(STUDENT, TEACHER, batch([0, 1]), alpha=0.1, temperature=4, t_squared=True)
    assert terms["soft"][0] == pytest.approx(0.9 * 16)
    assert float(terms["soft"][1]) == pytest.approx(soft_by_hand(), rel=1e-6)


def test_images_without_a_label_have_no_hard_term() -> None:
    terms = dsnet.distilled(STUDENT, TEACHER, batch([0, -1]), alpha=0.1, temperature=4)
    assert float(terms["hard"][1]) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    assert float(terms["soft"][1]) == pytest.approx(soft_by_hand(), rel=1e-6)


def test_the_notebooks_targets_teach_nothing() -> None:
    terms = dsnet.notebook(STUDENT, TEACHER, batch([0, 1]), alpha=0.1, temperature=10, images=2000)
    # exp(p / 10) of probabilities lies in [1, 1.11]: targets near 1 / (2 x 2000), a loss near log 2 / 2000.
    assert float(terms["soft"][1]) == pytest.approx(math.log(2) / 2000, rel=0.1)


def test_the_notebooks_labels_too_are_compared_with_the_softmax_of_a_softmax() -> None:
    # A student that is sure answers softmax((1, 0)) = (.731, .269), as the notebooks print; right, then wrong.
    sure = Outputs(logits=torch.tensor([[60.0, 0.0], [60.0, 0.0]]))
    terms = dsnet.notebook(sure, TEACHER, batch([0, 1]), alpha=0.1, temperature=10, images=2000)
    assert float(terms["hard"][1]) == pytest.approx((-math.log(0.7310586) - math.log(0.2689414)) / 2, rel=1e-6)


def test_the_defaults_are_the_papers(data: Images) -> None:
    teacher = dsnet.teacher(data, weights="none")
    student = dsnet.student(data, Counting())
    assert teacher.student.keywords["name"] == "resnet50"
    assert teacher.optimizer.func is torch.optim.Adam  # type: ignore[attr-defined]
    assert teacher.optimizer.keywords["lr"] == 1e-4  # type: ignore[attr-defined]
    assert student.student.func is DSNet
    assert student.optimizer.keywords["lr"] == 1e-3  # type: ignore[attr-defined]
    assert student.objective.keywords == {"alpha": 0.1, "temperature": 10.0, "t_squared": False}  # type: ignore[attr-defined]
    assert (student.batch_size, student.image_size) == (64, 224)


def test_alone_and_distilled_differ_in_the_teacher_alone(data: Images) -> None:
    alone, distilled = dsnet.student(data, seed=3), dsnet.student(data, Counting(), seed=3)
    differing = {
        f.name
        for f in dataclasses.fields(alone)
        if f.name not in ("schedule", "student", "optimizer") and getattr(alone, f.name) != getattr(distilled, f.name)
    }
    assert differing == {"teacher", "objective", "recipe"}
    assert [alone.schedule(e / 2) for e in range(120)] == [distilled.schedule(e / 2) for e in range(120)]
    for name in ("student", "optimizer"):
        one, other = getattr(alone, name), getattr(distilled, name)
        assert (one.func, one.keywords) == (other.func, other.keywords)


def test_alone_it_needs_no_unlabelled_images(data: Images) -> None:
    assert dsnet.student(data, unlabelled=data).unlabelled is None


def test_the_papers_own_training_is_a_matter_of_arguments(data: Images) -> None:
    made = dsnet.student(data, Counting(), augment="none", schedule="constant", compat="notebook")
    assert made.augment == NONE
    assert {made.schedule(e) for e in range(60)} == {1.0}
    assert made.optimizer.func is torch.optim.Adadelta  # type: ignore[attr-defined]
    assert made.objective.keywords["images"] == len(data.rows("train"))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"alpha": 1.5}, "--alpha 1.5: between 0 and 1"),
        ({"temperature": 0}, "--temperature 0: above 0"),
        ({"image_size": 12}, "at least 18 pixels"),
        ({"network": "resnet5000"}, "resnet5000"),
    ],
)
def test_wrong_arguments_are_refused(data: Images, tmp_path: Path, arguments: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        hs.train(dsnet.student(data, Counting(), **arguments), tmp_path / "run")


def test_every_argument_is_described() -> None:
    for part in (dsnet.teacher, dsnet.student):
        described = inspect.getdoc(part) or ""
        for name in inspect.signature(part).parameters:
            assert f"\n    {name}: " in described, name


def test_weights_that_cannot_be_had_are_said_aloud(capsys: Any, monkeypatch: Any) -> None:
    from histill.errors import Failed

    class Unreachable(DSNet):
        def __init__(self, weights: str | None = None) -> None:
            if weights == "imagenet":
                raise Failed("cannot fetch the weights of it: no network")
            super().__init__(2, 18)

    assert start(partial(Unreachable), "auto").keywords == {"weights": None}
    assert "no network. Training from random weights instead" in capsys.readouterr().err
    assert start(partial(Unreachable), "none").keywords == {"weights": None}
    assert start(partial(Unreachable), "imagenet").keywords == {"weights": "imagenet"}
    assert start(partial(Unreachable), "a.safetensors").keywords == {"weights": "a.safetensors"}


def test_a_network_that_nobody_knows_is_not_begun_from_random_weights(capsys: Any) -> None:
    with pytest.raises(BadInput, match="no network named 'dsnett'"):
        start(partial(Timm, name="dsnett", classes=2), "auto")
    assert capsys.readouterr().err == ""


def test_teacher_and_student_train_from_the_command_line(data: Images, tmp_path: Path, capsys: Any) -> None:
    common = ["--data", str(data.root), "--epochs", "2", "--batch-size", "8", "--val", "0.2", "--test", "0.2"]
    taught, out = tmp_path / "teacher", tmp_path / "student"
    teacher = [
        "--network",
        "test_resnet",
        "--weights",
        "none",
        "--image-size",
        "32",
        "--seed",
        "5",
        "--out",
        str(taught),
    ]
    assert cli.run(["train", "dsnet.teacher", *common, *teacher]) == 0, capsys.readouterr().err
    student = ["--teacher", str(taught), "--image-size", "18", "--out", str(out), "--views", "1", "--seed", "5"]
    assert cli.run(["train", "dsnet.student", *common, *student]) == 0, capsys.readouterr().err
    info = json.loads((out / "run.json").read_text())
    assert info["recipe"]["arguments"]["teacher"] == str(taught)
    assert info["teacher"]["key"].endswith("@32")
    run = hs.Run.open(out)
    assert {"raw/hard", "raw/soft"} <= set(run.log.columns)
    np.testing.assert_allclose(run.log["loss"], 0.1 * run.log["raw/hard"] + 0.9 * run.log["raw/soft"])
    leaking = ["--teacher", str(taught), "--image-size", "18", "--seed", "6", "--out", str(tmp_path / "other")]
    assert cli.run(["train", "dsnet.student", *common, *leaking]) == 2
    assert "leak" in capsys.readouterr().err
