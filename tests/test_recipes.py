"""One contract over every recipe that distils: what its arguments say, what it trains, and what the main job leaves."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import no_page, table

import histill as hs
from histill import cli
from histill.experiment import Experiment, parts, recipes
from histill.flags import described

TINY: dict[str, dict[str, Any]] = {
    "dsnet": {"image_size": 24, "teacher_network": "dsnet", "teacher_weights": "none"},
    "kd-convnext": {"image_size": 32, "network": "test_convnext", "teacher_network": "test_efficientnet"},
    "mac-resnet": {"image_size": 32, "network": "test_resnet", "lr": 1e-3},
    "methods": {"image_size": 32, "network": "test_resnet", "teacher_network": "test_efficientnet"},
    "multi-exit": {"image_size": 32, "network": "resnet18", "teacher_network": "test_resnet", "lr": 0.01},
}
for _name, _chosen in TINY.items():
    _chosen |= {"epochs": 1, "teacher_epochs": 1, "batch_size": 8}
    if _name != "dsnet":
        _chosen |= {"weights": "none", "teacher_weights": "none"}


def arguments(name: str, part: str) -> dict[str, Any]:
    """Of one part, as Python takes them."""
    chosen = TINY[name]
    if part == "student":
        return {n: v for n, v in chosen.items() if not n.startswith("teacher_")}
    own = {n.removeprefix("teacher_"): v for n, v in chosen.items() if n.startswith("teacher_")}
    shared = {n: v for n, v in chosen.items() if n in ("image_size", "batch_size")}
    known = inspect.signature(getattr(module(name), part)).parameters
    return {n: v for n, v in (shared | own).items() if n in known}


def module(name: str) -> Any:
    return importlib.import_module(f"histill.recipes.{name.replace('-', '_')}")


PRETRAINING = {
    "baselines": ("pretrain", "supervised"),
    "foundation": ("pretrain", "finetune"),
    "rckd": ("teacher", "pretrain", "finetune"),
}
"""Recipes whose teacher does another task, and their parts."""


def test_every_recipe_is_here() -> None:
    assert sorted([*TINY, *PRETRAINING]) == recipes()
    assert {name: tuple(parts(module(name))) for name in PRETRAINING} == PRETRAINING


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_argument_of_pretraining_is_described_and_has_the_shared_names(name: str) -> None:
    for part in PRETRAINING[name]:
        function = getattr(module(name), part)
        taken = set(inspect.signature(function).parameters)
        assert taken - {"data", "unlabelled"} <= set(described(function)), (name, part)
        assert {"weights", "image_size", "epochs", "batch_size", "lr", "seed", "strict"} <= taken, (name, part)
        assert ("data" in taken) != ("unlabelled" in taken), (name, part)


@pytest.mark.parametrize("name", TINY)
def test_every_argument_is_described_and_the_shared_ones_have_the_same_names(name: str) -> None:
    for part in ("teacher", "student"):
        function = getattr(module(name), part)
        taken = set(inspect.signature(function).parameters)
        assert taken - {"data"} <= set(described(function)), (name, part)
        wanted = {
            "data",
            "network",
            "weights",
            "image_size",
            "epochs",
            "batch_size",
            "lr",
            "seed",
            "positive",
            "strict",
        }
        if part == "student":
            wanted |= {"teacher", "views"}
        elif name == "mac-resnet":
            wanted -= {"network"}  # it is the paper's, in parts
        assert wanted <= taken, (name, part)


@pytest.mark.parametrize("name", TINY)
def test_alone_and_distilled_differ_in_the_teacher_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    data, made = table(tmp_path / "data", size=40), module(name)
    taught = hs.train(made.teacher(data, **arguments(name, "teacher")), tmp_path / "teacher")
    extra = {"crop_term": "student"} if name == "mac-resnet" else {}
    alone: Experiment = made.student(data, **arguments(name, "student"))
    heard: Experiment = made.student(data, teacher=taught, **arguments(name, "student"), **extra)
    assert alone.teacher is None
    assert heard.teacher is not None
    for field in ("student", "augment", "views", "epochs", "batch_size", "select", "seed", "image_size", "clip", "ema"):
        here, there = getattr(alone, field), getattr(heard, field)
        if field == "student":
            here, there = (here.func, here.keywords), (there.func, there.keywords)
        assert here == there, field
    assert [alone.schedule(e / 8) for e in range(8)] == [heard.schedule(e / 8) for e in range(8)]
    run = hs.train(heard, tmp_path / "student")
    before = run.predictions
    assert {"raw/" + n for n in ("hard", "focal", "ce")} & set(run.log.columns)
    again = hs.Run.open(run.path).network()
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == run.info["parameters"]
    assert np.allclose(before.filter(regex="^prob_").sum(axis=1), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_main_job_runs_with_every_recipe(name: str, tmp_path: Path) -> None:
    table(tmp_path / "data", count=60, size=40)
    out = tmp_path / "out"
    flags = [word for n, v in TINY[name].items() for word in (f"--{n.replace('_', '-')}", str(v))]
    given = ["--val", "0.2", "--test", "0.2"]
    assert cli.run(["distill", name, "--data", str(tmp_path / "data"), "--out", str(out), *given, *flags]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["test"]) >= {"teacher", "student_alone", "student_distilled", "gain"}
    assert summary["export"]["onnx"]["max_abs_diff"] < 1e-3
    assert (out / "report.html").stat().st_size > 20_000
    said = tmp_path / "said.csv"
    assert cli.run(["predict", str(out / "student.onnx"), str(tmp_path / "data"), "--out", str(said)]) == 0
    assert len(pd.read_csv(said)) == 60
    assert cli.run(["distill", "--out", str(out), "--resume"]) == 0
