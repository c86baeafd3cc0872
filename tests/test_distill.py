"""The main job: teacher, student alone, distilled student, and what the difference is worth."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import write_classes
from tiny import bytes_of

import histill as hs
from histill import cli
from histill.data import read_images, split
from histill.distill import check_unseen, distill
from histill.errors import BadInput
from histill.recipes import dsnet
from histill.run import Run

METRICS = ["accuracy", "balanced_accuracy", "macro_f1", "auroc", "sensitivity", "specificity", "ece"]
ROLES = ("teacher", "student_alone", "student_distilled")
RUN_FILES = (
    "run.json",
    "data.csv",
    "log.csv",
    "model.safetensors",
    "predictions.parquet",
    "last.parquet",
    "metrics.json",
    "report.html",
)
ARGUMENTS: dict[str, Any] = {
    "val": 0.2,
    "test": 0.2,
    "student_arguments": {"image_size": 18, "epochs": 2, "batch_size": 8, "views": 1},
    "teacher_arguments": {"network": "test_resnet", "weights": "none", "image_size": 32, "epochs": 1, "batch_size": 8},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("images") / "data", {"benign": 20, "malignant": 20})


@pytest.fixture
def pictured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pages of single runs, and as where the extra ``deploy`` is not installed."""
    monkeypatch.setattr("histill.evaluate.finish.finish", judged_without_page)
    monkeypatch.setattr("histill.deploy.deliver.find_spec", lambda name: None)


@pytest.fixture
def bare(pictured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pictures of the report, which take most of the time."""
    monkeypatch.setattr("histill.distill._pictures", lambda *some: [])


def judged_without_page(out: Path, info: dict[str, Any]) -> None:
    (out / "metrics.json").write_text("{}")


def check_figures(figures: dict[str, Any], names: list[str]) -> None:
    assert list(figures) == names
    for name in names:
        figure = figures[name]
        assert {"value", "low", "high"} <= set(figure)
        if name != "ece":  # biased upwards in resamples, see histill.evaluate.intervals
            assert figure["low"] <= figure["value"] <= figure["high"], name


def check_test(test: dict[str, Any]) -> None:
    assert list(test) == [*ROLES, "gain", "gap"]
    check_figures(test["teacher"], METRICS)
    for role in ROLES[1:]:
        check_figures(test[role], [*METRICS, "agreement"])
    for gain in (test["gain"], test["gap"]):
        assert 0 <= gain.pop("mcnemar_p") <= 1
        assert all(0 <= p <= 1 for p in gain.pop("mcnemar_p_seeds", []))
    check_figures(test["gain"], [*METRICS, "agreement"])
    check_figures(test["gap"], METRICS)
    for name in METRICS:
        teacher, alone, distilled = (test[role][name]["value"] for role in ROLES)
        assert test["gain"][name]["value"] == pytest.approx(distilled - alone)
        assert test["gap"][name]["value"] == pytest.approx(distilled - teacher)


# Figures and files


def test_what_it_bought_is_told_from_the_predictions(data: Path, tmp_path: Path, pictured: None, capsys: Any) -> None:
    summary = distill("dsnet", data, tmp_path / "out", **ARGUMENTS)
    assert "export and timing are left out: pip install 'histill[deploy]'" in capsys.readouterr().err
    assert summary["export"] == summary["efficiency"] == {}
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary
    said = {role: pd.read_parquet(tmp_path / "out" / role / "predictions.parquet") for role in ROLES}
    test = {role: table[table["split"] == "test"].set_index("image") for role, table in said.items()}
    for role, table in test.items():
        figures = summary["test"][role]
        assert figures["accuracy"]["value"] == (table["prediction"] == table["label"]).mean()
        if role != "teacher":
            agrees = (table["prediction"] == test["teacher"].loc[table.index, "prediction"]).mean()
            assert figures["agreement"]["value"] == agrees
    check_test(summary["test"])


def test_alone_and_distilled_saw_the_same(data: Path, tmp_path: Path, bare: None) -> None:
    distill("dsnet", data, tmp_path / "out", seed=4, **ARGUMENTS)
    infos = {role: json.loads((tmp_path / "out" / role / "run.json").read_text()) for role in ROLES}
    alone, distilled = infos["student_alone"], infos["student_distilled"]
    differing = {name for name in alone if alone[name] != distilled[name]}
    assert differing <= {"recipe", "objective", "teacher", "selection", "started", "seconds"}
    assert alone["recipe"]["arguments"] | {"teacher": None} == distilled["recipe"]["arguments"] | {"teacher": None}
    assert (alone["seed"], alone["views"], alone["epochs"]) == (4, 1, 2)
    assert distilled["recipe"]["arguments"]["teacher"] == str(tmp_path / "out/teacher")
    assert {info["data"]["split_hash"] for info in infos.values()} == {alone["data"]["split_hash"]}


def test_several_seeds_have_a_folder_each_and_one_summary(data: Path, tmp_path: Path, bare: None) -> None:
    summary = distill("dsnet", data, tmp_path / "out", seeds=2, seed=3, **ARGUMENTS)
    for number in (0, 1):
        infos = [json.loads((tmp_path / f"out/seed{number}/{role}/run.json").read_text()) for role in ROLES]
        assert [info["seed"] for info in infos] == [3 + number] * 3
    assert len({info["data"]["split_hash"] for info in infos}) == 1
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {"seed0", "seed1"}
    for role in ROLES:
        figure = summary["test"][role]["accuracy"]
        each = [
            (t["prediction"] == t["label"]).mean()
            for n in (0, 1)
            for t in [pd.read_parquet(tmp_path / f"out/seed{n}/{role}/predictions.parquet").query("split == 'test'")]
        ]
        assert figure["seeds"] == pytest.approx(each)
        assert figure["value"] == pytest.approx(sum(each) / 2)
    assert len(summary["test"]["gain"]["accuracy"]["seeds"]) == 2
    check_test(summary["test"])
    page = (tmp_path / "out/report.html").read_text()
    for whose in ("By class, distilled student", "Settings of the distilled student", "Settings of the teacher"):
        assert f"{whose}, first seed</h2>" in page
    alone = (tmp_path / "out/seed0/student_alone/run.json").read_text()
    assert json.loads(alone)["recipe"]["arguments"]["weights"] == "auto"
    assert "auto: none, random weights" in page
    name = json.loads((tmp_path / "out/seed0/teacher/run.json").read_text())["network"]["arguments"]["name"]
    assert f"{name} (" in page.partition("Settings of the teacher")[2]


# Stopped on the way


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distillation that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTILL_CACHE", str(out / "cache"))
        patch.setattr("histill.evaluate.finish.finish", judged_without_page)
        patch.setattr("histill.deploy.deliver.find_spec", lambda name: None)
        patch.setattr("histill.distill._pictures", lambda *some: [])
        distill("dsnet", data, out / "out", **ARGUMENTS)
    return out / "out"


class Stop(BaseException):
    """As a kill: nothing tidies up after it."""


@pytest.mark.parametrize("stage", ["student_alone", "student_distilled", "summary"])
def test_stopped_between_the_stages_it_ends_with_the_same_figures(
    data: Path, whole: Path, tmp_path: Path, bare: None, monkeypatch: Any, stage: str
) -> None:
    train = hs.train
    with monkeypatch.context() as patch:

        def stopping(experiment: Any, out: Path, **options: Any) -> Run:
            if out.name == stage:
                raise Stop
            return train(experiment, out, **options)

        patch.setattr("histill.distill.train", stopping)
        if stage == "summary":
            patch.setattr("histill.distill._prove", lambda *some: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            distill("dsnet", data, tmp_path / "torn", **ARGUMENTS)
    assert not (tmp_path / "torn/summary.json").exists()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "torn").glob("*/model.safetensors")}
    torn = distill("dsnet", data, tmp_path / "torn", resume=True, **ARGUMENTS)
    assert torn["test"] == json.loads((whole / "summary.json").read_text())["test"]
    assert done
    assert {p: p.stat().st_mtime_ns for p in done} == done, "what was done is not done again"
    for role in ROLES:
        for file in ("model.safetensors", "predictions.parquet"):
            assert (tmp_path / "torn" / role / file).read_bytes() == (whole / role / file).read_bytes()


# A teacher that is there already


def taught(data: Path, out: Path, seed: int = 0) -> Run:
    images = split(read_images(data), val=0.2, test=0.2, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histill.evaluate.finish.finish", judged_without_page)
        return hs.train(dsnet.teacher(images, **ARGUMENTS["teacher_arguments"]), out)


def test_a_given_teacher_is_not_trained_again(data: Path, tmp_path: Path, bare: None) -> None:
    teacher = taught(data, tmp_path / "teacher")
    before = bytes_of(teacher.path)
    summary = distill("dsnet", data, tmp_path / "out", teacher=teacher.path, **ARGUMENTS)
    assert not (tmp_path / "out/teacher").exists()
    assert bytes_of(teacher.path) == before
    test = teacher.predictions.query("split == 'test'")
    assert summary["test"]["teacher"]["accuracy"]["value"] == (test["prediction"] == test["label"]).mean()


def test_a_teacher_of_other_images_is_asked_about_these(data: Path, tmp_path: Path, bare: None) -> None:
    other = write_classes(tmp_path / "other", {"benign": 20, "malignant": 20}, size=30)
    teacher = taught(other, tmp_path / "teacher")
    summary = distill("dsnet", data, tmp_path / "out", teacher=teacher.path, **ARGUMENTS)
    asked = hs.predict(teacher.path, data).set_index("image")["prediction"]
    alone = Run.open(tmp_path / "out/student_alone").predictions.query("split == 'test'").set_index("image")
    expected = (asked[alone.index] == alone["label"]).mean()
    assert summary["test"]["teacher"]["accuracy"]["value"] == pytest.approx(expected)


def test_a_teacher_that_was_trained_on_the_test_images_is_a_leak(data: Path, tmp_path: Path, bare: None) -> None:
    teacher = taught(data, tmp_path / "teacher", seed=1)
    with pytest.raises(BadInput, match=r"leak: .*teacher was trained on \d+ of the validation and test images"):
        distill("dsnet", data, tmp_path / "out", teacher=teacher.path, **ARGUMENTS)


def test_a_teacher_whose_epoch_was_chosen_on_the_test_images_is_a_leak(
    data: Path, tmp_path: Path, pictured: None
) -> None:
    images = split(read_images(data), val=0.2, test=0.2, seed=0)
    swapped = images.with_frame(
        images.frame.assign(split=images.frame["split"].map({"train": "train", "val": "test", "test": "val"}))
    )
    made = dsnet.teacher(swapped, **ARGUMENTS["teacher_arguments"])
    with pytest.raises(BadInput, match=r"leak: .*best chose its epoch on \d+ of the test images"):
        check_unseen(hs.train(made, tmp_path / "best"), images)
    last = hs.train(dataclasses.replace(made, select="last"), tmp_path / "last")
    check_unseen(last, images)  # the last epoch is nobody's choice


def test_what_started_from_a_run_that_saw_the_test_images_is_a_leak(
    data: Path, tmp_path: Path, pictured: None, capsys: Any
) -> None:
    seen, same = (str(taught(data, tmp_path / f"seed{seed}", seed=seed).path) for seed in (1, 0))
    for who in ("student", "teacher"):
        given = {f"{who}_arguments": ARGUMENTS[f"{who}_arguments"] | {"weights": seen}}
        with pytest.raises(BadInput, match=r"leak: .*seed1 was trained on \d+ of the validation and test images"):
            distill("dsnet", data, tmp_path / "out", **ARGUMENTS | given)
    words = ["train", "dsnet.student", "--data", str(data), "--network", "test_resnet", "--image-size", "32"]
    words += ["--epochs", "1", "--val", "0.2", "--test", "0.2"]
    assert cli.run([*words, "--out", str(tmp_path / "a"), "--weights", seen]) == 2
    assert "leak: " in capsys.readouterr().err
    assert cli.run([*words, "--out", str(tmp_path / "b"), "--weights", same]) == 0
    words = ["study", "dsnet", "--data", str(data), "--val", "0.2", "--test", "0.2", "--out", str(tmp_path / "c")]
    for flag in ("--weights", "--teacher-weights"):
        assert cli.run([*words, flag, seen]) == 2
        assert "leak: " in capsys.readouterr().err


# What it refuses


def test_what_cannot_be_distilled_is_refused(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for options, said in (
        ({"recipe": "dsnet.teacher"}, "takes a whole recipe"),
        ({"seeds": 0}, "--seeds 0: at least 1"),
        ({"test": 0.0}, "no test images: nothing could be proven"),
        ({"student_arguments": {"depth": 3}}, "student of this recipe does not take depth"),
    ):
        chosen = {"recipe": "dsnet", **ARGUMENTS, **options}
        if "student_arguments" in options:
            monkeypatch.setattr("histill.distill.train", lambda *some, **more: None)
        with pytest.raises(BadInput, match=said):
            distill(chosen.pop("recipe"), data, tmp_path / "out", **chosen)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="is one process"):
        distill("dsnet", data, tmp_path / "out", **ARGUMENTS)


OWN = '''
"""A teacher and a student of one's own, whose network is in this file."""
from functools import partial
import torch
from torch import nn
import histill as hs
from histill.losses import cross_entropy, kd
from histill.teachers import as_teacher
from histill.types import Outputs

class Own(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, images):
        return Outputs(logits=self.head(images.mean((2, 3))))

def objective(student, teacher, batch):
    terms = {"hard": (1.0, cross_entropy(student["logits"], batch.labels))}
    return terms | ({"soft": (1.0, kd(student["logits"], teacher["logits"], temperature=2))} if teacher else {})

def made(data, width, seed, teacher=None):
    return hs.Experiment(
        data=data, student=partial(Own, classes=2, width=width), objective=objective, image_size=16, epochs=2,
        seed=seed,
        teacher=None if teacher is None else as_teacher(teacher, data.classes),
        optimizer=partial(torch.optim.Adam, lr=0.05),
    )

@hs.recipe
def teacher(data, *, seed: int = 0) -> hs.Experiment:
    return made(data, 16, seed)

@hs.recipe
def student(data, teacher=None, *, width: int = 2, seed: int = 0) -> hs.Experiment:
    """A student.

    Args:
        width: of the hidden layer.
        seed: of everything.
    """
    return made(data, width, seed, teacher)
'''


def test_a_users_recipe_is_distilled(data: Path, tmp_path: Path, bare: None, capsys: Any) -> None:
    (tmp_path / "own.py").write_text(OWN)
    out = tmp_path / "out"
    command = ["distill", str(tmp_path / "own.py"), "--data", str(data), "--out", str(out), "--width", "3"]
    assert cli.run([*command, "--val", "0.2", "--test", "0.2"]) == 0, capsys.readouterr().err
    check_test(json.loads((out / "summary.json").read_text())["test"])
    info = json.loads((out / "student_distilled/run.json").read_text())
    assert info["recipe"]["name"] == f"{tmp_path / 'own.py'}:student"
    assert info["network"]["arguments"] == {"classes": 2, "width": 3}
    assert cli.run(["distill", "--out", str(out), "--resume"]) == 0
    assert "is finished; nothing to do" in capsys.readouterr().err


# The whole of it


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the extra deploy")
def test_the_folder_is_what_the_interface_says(data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    command = f"distill dsnet --data {data} --out {out} --val 0.2 --test 0.2 --image-size 32 --epochs 2 --batch-size 8"
    assert cli.run([*command.split(), "--teacher-network", "test_resnet", "--teacher-weights", "none"]) == 0
    assert "student distilled" in capsys.readouterr().out
    figures = [f"figures/{name}.png" for name in ("gain", "confusion", "roc", "reliability", "gallery")]
    pages = [f"figures/{name}.png" for name in ("training", "confusion", "roc", "reliability")]
    assert set(bytes_of(out)) == {
        *(
            "student.onnx",
            "student.int8.onnx",
            "model_card.md",
            "report.html",
            "summary.json",
            "distill.json",
            *figures,
        ),
        *(f"{role}/{file}" for role in ROLES for file in (*RUN_FILES, *pages)),
    }
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["recipe", "test", "export", "efficiency"]
    check_test(summary["test"])
    assert list(summary["export"]) == ["onnx", "int8"]
    for name, found in summary["export"].items():
        assert list(found) == ["path", "max_abs_diff", "accuracy", "accuracy_lost"]
        assert found["path"] == {"onnx": "student.onnx", "int8": "student.int8.onnx"}[name]
        distilled = summary["test"]["student_distilled"]["accuracy"]["value"]
        assert found["accuracy"] + found["accuracy_lost"] == pytest.approx(distilled)
    assert {"teacher", "student"} <= set(summary["efficiency"])
    for role, run in (("teacher", "teacher"), ("student", "student_distilled")):
        cost, network = summary["efficiency"][role], Run.open(out / run).network()
        assert set(cost) == {
            *("parameters", "macs", "file_bytes", "peak_memory_bytes", "latency_ms_batch1"),
            *("latency_ms_batch16", "images_per_second"),
        }
        assert cost["parameters"] == sum(p.numel() for p in network.parameters())
        assert cost["macs"] == hs.evaluate.macs(network, 32)
        assert 0 < cost["latency_ms_batch1"]["median"] <= cost["latency_ms_batch1"]["p95"]
    assert summary["efficiency"]["student"]["file_bytes"] == (out / "student.onnx").stat().st_size
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    before = bytes_of(out)
    assert cli.run(["distill", "--out", str(out), "--resume"]) == 0
    assert bytes_of(out) == before
