"""histill distill foundation: embeddings are learnt without labels, judged as they are and after fine-tuning."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from conftest import write_classes
from tiny import experiment, table

import histill as hs
from histill import cli
from histill.models import Timm

WORDS = ["--image-size", "32", "--epochs", "1", "--batch-size", "8", "--lr", "0.01", "--network", "test_resnet"]
PRETRAIN = ["--pretrain-epochs", "1", "--pretrain-image-size", "32", "--pretrain-batch-size", "8"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("teacher")
    data = table(home / "data", size=40)
    student = partial(Timm, name="test_efficientnet", classes=2)
    hs.train(experiment(data, student=student, image_size=32, epochs=1), home / "run")
    return home / "run"


def test_a_foundation_teacher_gives_probes_robustness_and_a_gain(teacher: Path, tmp_path: Path) -> None:
    table(tmp_path / "data", count=48, size=40)
    write_classes(tmp_path / "more", {"x": 12}, size=44)
    out = tmp_path / "out"
    given = ["--data", str(tmp_path / "data"), "--unlabelled", str(tmp_path / "more"), "--teacher", str(teacher)]
    assert (
        cli.run(
            ["distill", "foundation", *given, "--out", str(out), "--val", "0.2", "--test", "0.25", *WORDS, *PRETRAIN]
        )
        == 0
    )
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["probe"]) == {"pretrained", "random weights", "teacher"}
    for found in summary["probe"].values():
        assert 0 <= found["linear"]["balanced_accuracy"]["low"] <= found["knn"]["balanced_accuracy"]["high"] <= 1
    assert set(summary["test"]) == {"student_alone", "student_distilled", "gain"}
    page = (out / "report.html").read_text()
    assert "What the embedding knows" in page
    assert "How stain and scanner move the embedding" in page


def test_without_labels_there_is_a_backbone_and_nothing_to_judge_it_by(teacher: Path, tmp_path: Path) -> None:
    write_classes(tmp_path, {"only": 12}, size=44)
    out = tmp_path / "out"
    given = ["--data", str(tmp_path / "only"), "--teacher", str(teacher), "--out", str(out), "--student", "test_resnet"]
    assert cli.run(["distill", "foundation", *given, *PRETRAIN]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pretraining"]["images"] == 12
    run = hs.Run.open(out / "pretrained")
    assert run.finished
    assert summary["pretraining"]["loss"]["last"] == run.log["loss"].iloc[-1]
    assert cli.run(["distill", "--out", str(out), "--resume"]) == 0
