"""The multi-exit study runs every row once and sets them beside the paper's numbers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import write_classes
from tiny import bytes_of, no_page, table
from torch import nn

import histill as hs
from histill.errors import BadInput
from histill.models import MSDNet, ResNet18
from histill.recipes import methods, multi_exit
from histill.studies.multi_exit import PAPER, _started, study

SMALL: dict[str, Any] = {"image_size": 32, "epochs": 1, "teacher_epochs": 1, "pretrain_epochs": 1, "batch_size": 8}
SMALL |= {"teacher_network": "test_resnet", "teacher_weights": "none", "lr": 0.001, "precision": "32-true"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network with exits is a small multi-scale one, the plain one small as well: the study's rows, not sizes."""
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    sizes: dict[str, Any] = {"scales": 2, "blocks": 2, "base": 1, "step": 1, "channels": 4, "growth": 2}

    def small(name: str, classes: int, stem: str, attention: bool, fusion: str, weights: str) -> Any:
        make: Any = partial(MSDNet, classes=classes, stem=stem, **sizes)
        if name in ("resnet18", "test_resnet"):
            make = partial(hs.models.Timm, name="test_resnet", classes=classes)
        return partial(make, weights=None if weights == "none" else weights)

    monkeypatch.setattr(multi_exit, "_network", small)


def test_every_row_is_trained_once_and_shown_beside_the_papers(tmp_path: Path) -> None:
    data, out = table(tmp_path / "data"), tmp_path / "study"
    other = write_classes(tmp_path / "other", {"a": 8, "b": 8, "c": 8}, size=20)
    arguments = SMALL | {"pretrain_data": other, "tables": ("3", "4")}
    text = study(data, out=out, **arguments)
    rows = ("teacher", "resnet18", "resnet18-tl", "resnet18-kd", "resnet18-tl-kd", "ours", "ours-tl", "self")
    made = {f"{name}-seed0" for name in (*rows, "baseline", "scan", "msdnet")}
    made |= {f"pretrain-{name}-seed0" for name in ("test_resnet", "resnet18", "multi-exit")}
    assert {path.name for path in (out / "runs").iterdir()} == made
    summary = json.loads((out / "summary.json").read_text())
    said = hs.Run.open(out / "runs" / "ours-seed0").predictions.query("split == 'test'")
    right = float((said["prediction"] == said["label"]).mean())
    assert summary["test"]["ours"]["accuracy"]["value"] == pytest.approx(right)
    assert summary["exits"]["ours"]["mean of all"]["value"] == pytest.approx(right)
    first = said[["exit1_prob_benign", "exit1_prob_malignant"]].to_numpy().argmax(1) == (said["label"] == "malignant")
    assert summary["exits"]["ours"]["exit 1"]["value"] == pytest.approx(float(first.mean()))
    assert 0 <= summary["early_exit"]["threshold"] <= 2
    for shown in ("96.5 %", "97.7 %", "98.15", "95.13 95.43 97.07 96.32 97.21", "98.7 %"):
        assert shown in text, shown
    assert (out / "figures" / "early_exit.png").is_file()
    before = bytes_of(out / "runs")
    study(data, out=out, **arguments)
    assert bytes_of(out / "runs") == before


@pytest.mark.slow
def test_the_tables_of_methods_have_every_row_of_the_papers(tmp_path: Path) -> None:
    data, out = table(tmp_path / "data"), tmp_path / "study"
    text = study(data, out=out, **SMALL | {"tables": ("5", "6")})
    said = json.loads((out / "summary.json").read_text())["test"]
    five, six = (text.split(f"Table {number}")[1].split("\n\n")[0] for number in (5, 6))
    for shown, names in ((five, PAPER["5"]), (six, PAPER["6"])):
        for name in names:
            assert said["resnet18-kd" if name == "kd" else name]["accuracy"]["value"] >= 0
        rows = [line for line in shown.splitlines() if " to " in line]
        assert len(rows) == len(names)
    assert "ab-boundaries" not in said
    started = hs.Run.open(out / "runs" / "ab-seed0").info["recipe"]["arguments"]
    assert (started["method"], started["weights"]) == ("ce", str(out / "runs" / "ab-boundaries-seed0"))
    used = [hs.Run.open(out / "runs" / f"{name}-seed0").info["optimizer"] for name in ("resnet18", "rkd", "ab", "sskd")]
    assert used == used[:1] * 4
    more = study(data, out=out, **SMALL | {"tables": ("6",), "methods": ("crd",)})  # not the published form
    (row,) = (line for line in more.split("Table 6")[1].splitlines() if line.startswith("crd "))
    assert row.split()[1:3] == ["-", "-"]


@pytest.mark.parametrize(("stem", "name"), [("imagenet", "resnet18"), ("cifar", "resnet18_cifar")])
def test_the_other_methods_start_as_the_plain_network_does(stem: Any, name: str, tmp_path: Path) -> None:
    made = methods.student(table(tmp_path / "data"), network=name, weights="none", image_size=32)
    found = []
    for network in (_started(made).student(), ResNet18(2, stem=stem)):
        convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d))
        norms = (m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
        found.append(
            (
                sorted(float(m.weight.detach().std()) for m in convolutions),
                [float(m.weight.detach().mean()) for m in norms],
            )
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=0.05)
    assert found[0][1] == found[1][1] == 20 * [1.0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"tables": ("7",)}, "--tables 7"),
        ({"methods": ("abc",)}, "--methods abc: one of kd-standardized"),
        ({"methods": ("kd",)}, "--methods kd: one of"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_trained(
    arguments: dict[str, Any], line: str, tmp_path: Path
) -> None:
    data = table(tmp_path / "data")
    with pytest.raises(BadInput, match=line):
        study(data, out=tmp_path / "study", **SMALL | arguments)
    assert not (tmp_path / "study").exists()


def test_without_validation_images_nothing_is_trained(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    data = data.with_frame(data.frame.assign(split=data.frame["split"].replace("val", "train")))
    with pytest.raises(BadInput, match="no val images"):
        study(data, out=tmp_path / "study", **SMALL)
    assert not (tmp_path / "study").exists()


def test_other_images_that_hold_the_test_images_are_refused(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    with pytest.raises(BadInput, match="leak"):
        study(data, out=tmp_path / "study", **SMALL | {"pretrain_data": tmp_path / "data"})


def test_the_papers_specificity_is_precision() -> None:
    _, sensitivity, called_specificity, f = PAPER["2"]["ours"]
    harmonic = 2 * sensitivity * called_specificity / (sensitivity + called_specificity)
    assert f == pytest.approx(harmonic, abs=2e-4)
