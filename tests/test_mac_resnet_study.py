"""The MAC-ResNet study trains each design once, whatever tables share it, and shows it beside the paper's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import bytes_of, no_page, table

import histill as hs
from histill.errors import BadInput
from histill.models import mac_resnet as network
from histill.recipes import mac_resnet
from histill.studies.mac_resnet import COMBINATIONS, DESIGNS, PAPER, TABLES, study

SMALL: dict[str, Any] = {"image_size": 64, "epochs": 1, "batch_size": 16, "lr": 1e-3, "weights": "none"}
SMALL |= {"network": "test_resnet", "precision": "32-true"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {"layer1": (8, 1, 1), "layer2": (8, 1, 2), "layer3": (8, 1, 2), "layer4": (8, 1, 2)}
    monkeypatch.setattr(network, "_STAGES", stages)
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


def test_tables_share_their_rows_and_stand_beside_the_papers(tmp_path: Path) -> None:
    data, out = table(tmp_path / "data", 32), tmp_path / "study"
    tables = ("4", "5", "6", "distilled")
    text = study(data, out=out, tables=tables, background="benign", period=2, **SMALL)
    teachers = {"spp", "label-smoothing", "focal", "mac-resnet"}
    students = {"alone", "distilled", "distilled-without-crop"}
    assert {path.name for path in (out / "runs").iterdir()} == {f"{name}-seed0" for name in teachers | students}
    runs = {name: hs.Run.open(out / "runs" / f"{name}-seed0") for name in teachers | students}
    assert runs["distilled"].info["recipe"]["arguments"]["teacher"] == str(runs["mac-resnet"].path)
    summary = json.loads((out / "summary.json").read_text())
    right = {}
    for name, run in runs.items():
        test = run.predictions.query("split == 'test'")
        right[name] = float((test["prediction"] == test["label"]).mean())
        assert summary["test"][name]["accuracy"]["value"] == pytest.approx(right[name])
    gain = summary["gain_over_alone"]["distilled"]["accuracy"]["value"]
    assert gain == pytest.approx(right["distilled"] - right["alone"])
    for shown in ("0.8857 0.8835 0.8704 0.8945 0.8620 0.8710 0.9153", "0.9023", "BCC 96.8 %", "Eq. 4 alone"):
        assert shown in text, shown
    assert {run.info["recipe"]["arguments"]["period"] for run in runs.values()} == {2}
    assert "Nothing restarts within these epochs (--period 2)" in text
    page = (out / "report.html").read_text()
    assert "label smoothing ends at 0.74" in page
    held = runs["alone"].info["data"]["images"]
    assert (
        f"{held['train']} images of training, {held['val']} images of validation, {held['test']} images of test ("
        in page
    )
    assert f"Weights kept: {runs['alone'].info['selection']['rule'].replace('_', ' ')}." in page
    by_class = text.split("Table 6")[1].split("One class against")[0]
    assert "malignant" in by_class
    assert "benign" not in by_class
    for name in ("attention", "losses"):
        picture = np.asarray(Image.open(out / "figures" / f"{name}.png").convert("RGB"))
        assert picture.std() > 10
    before = bytes_of(out / "runs")
    study(data, out=out, tables=tables, background="benign", period=2, **SMALL)
    assert bytes_of(out / "runs") == before


def test_the_tables_are_the_papers_designs(tmp_path: Path) -> None:
    data = table(tmp_path / "data", 32)
    assert set(TABLES["1"][1]) == set(COMBINATIONS)
    made = {name: mac_resnet.teacher(data, **{"weights": "none"} | design) for name, design in DESIGNS.items()}
    dares = {name: made[name].student.keywords["dares"] for name in COMBINATIONS}
    assert sorted(map(tuple, dares.values())) == sorted(
        tuple(f"layer{n}" for n in (2, 3, 4) if mask >> n & 1) for mask in range(4, 32, 4)
    )
    steps = list(TABLES["ladder"][1].values())
    parts = [
        {k: v for k, v in made[name].student.keywords.items() if k in ("attention", "dares", "sample_input", "spp")}
        for name in steps
    ]
    assert [sum(a[k] != b[k] for k in a) for a, b in itertools.pairwise(parts)] == [1] * 4
    losses = {name: made[name].objective.keywords["loss"] for name in ("spp", "label-smoothing", "focal")}  # type: ignore[attr-defined]
    assert len(set(map(str, losses.values()))) == 3
    assert {made[name].student.keywords["spp"] for name in losses} == {True}
    assert all(made["focal"].schedule(e) == 1 for e in (0, 5, 9))
    assert made["mac-resnet"].schedule(5) == pytest.approx(0.5)
    assert all(len(PAPER[name]) == 7 for name in COMBINATIONS)


def test_a_background_that_is_no_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--background skin: the classes are benign, malignant"):
        study(table(tmp_path / "data", 32), out=tmp_path / "study", background="skin", **SMALL)
