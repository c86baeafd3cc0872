"""The DSNet study runs every row once, judges all on the same images, and sets them beside the paper's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import bytes_of, no_page, table

import histill as hs
from histill.errors import BadInput
from histill.studies.dsnet import PAPER, study

SMALL: dict[str, Any] = {"image_size": 18, "epochs": 1, "teacher_epochs": 1, "teacher_network": "dsnet"}
SMALL |= {"teacher_weights": "none", "temperatures": (1, 10), "networks": ("dsnet",), "batch_sizes": (32, 64)}


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


def test_every_row_is_trained_once_and_shown_beside_the_papers(tmp_path: Path) -> None:
    data, out = table(tmp_path / "data"), tmp_path / "study"
    text = study(data, out=out, **SMALL)
    made = {f"{name}-seed0" for name in ("teacher", "alone", "T1", "T10", "notebook", "B32")}
    assert {path.name for path in (out / "runs").iterdir()} == made
    summary = json.loads((out / "summary.json").read_text())
    alone, distilled = (
        hs.Run.open(out / "runs" / f"{name}-seed0").predictions.query("split == 'test'") for name in ("alone", "T10")
    )
    right = [float((t["prediction"] == t["label"]).mean()) for t in (alone, distilled)]
    assert summary["test"]["T10"]["accuracy"]["value"] == pytest.approx(right[1])
    assert summary["gain_over_alone"]["T10"]["accuracy"]["value"] == pytest.approx(right[1] - right[0])
    assert summary["best_on_validation"] in ("T1", "T10")
    for shown in ("91.7 %", "89.7 %", "0.26 340 2.57 0.917", "0.96 0.87 0.91 0.88 0.97 0.92"):
        assert shown in text, shown
    before = bytes_of(out / "runs")
    study(data, out=out, **SMALL)
    assert bytes_of(out / "runs") == before


def test_a_teacher_of_another_split_is_refused(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    taught = hs.recipes.dsnet.teacher(data, network="dsnet", weights="none", image_size=18, epochs=1)
    run = hs.train(taught, tmp_path / "teacher")
    with pytest.raises(BadInput, match="another split"):
        study(table(tmp_path / "data", seed=1), out=tmp_path / "study", teacher=run.path, **SMALL)


def test_the_papers_f1_follows_from_its_precision_and_recall() -> None:
    for name, (p0, r0, f0, p1, r1, f1) in PAPER["classes"].items():
        for precision, recall, f in ((p0, r0, f0), (p1, r1, f1)):
            assert f == pytest.approx(2 * precision * recall / (precision + recall), abs=0.011), name


def test_a_study_without_a_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--seeds 0: at least 1"):
        study(table(tmp_path / "data"), out=tmp_path / "study", seeds=0, **SMALL)
