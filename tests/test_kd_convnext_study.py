"""The KD_ConvNeXt study draws a new split for each repeat and compares within it; the paper's numbers agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_classes
from tiny import bytes_of, no_page, table

import histill as hs
from histill.data import Images, read_images, split
from histill.errors import BadInput
from histill.evaluate.intervals import figures_over_seeds, paired_gain
from histill.evaluate.metrics import Scores, per_class
from histill.recipes import kd_convnext
from histill.studies.kd_convnext import FIGURES, PAPER, redrawn, study, together

SMALL: dict[str, Any] = {"image_size": 32, "epochs": 1, "teacher_epochs": 1, "network": "test_convnext"}
SMALL |= {"teacher_network": "test_resnet", "weights": "none", "teacher_weights": "none", "precision": "32-true"}


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


def patients(folder: Path) -> Images:
    """36 images of 18 patients in two classes."""
    write_classes(folder, {"AIS": 18, "MIA": 18}, per_patient=2)
    return split(read_images(folder, patient=r"/(p\d+)_"), val=0.2, test=0.2)


def test_a_start_that_saw_the_test_images_of_a_later_repeat_is_a_leak(tmp_path: Path) -> None:
    data = patients(tmp_path / "data")
    small = {"network": "test_resnet", "weights": "none", "image_size": 32, "epochs": 1}
    run = hs.train(kd_convnext.teacher(data, **small), tmp_path / "run")  # type: ignore[arg-type]
    for name in ("weights", "teacher_weights"):
        with pytest.raises(BadInput, match=r"leak: .*run was trained on \d+ of the validation and test images"):
            study(data, out=tmp_path / "study", seeds=2, **SMALL | {name: str(run.path)})
    assert not (tmp_path / "study").exists()


def test_each_repeat_has_its_own_split_and_rows_are_compared_within_it(tmp_path: Path) -> None:
    data, out = patients(tmp_path / "data"), tmp_path / "study"
    text = study(data, out=out, tables=("7",), networks=("test_efficientnet",), seeds=2, **SMALL)
    rows = ("convnext", "swin", "kd-convnext", "test_efficientnet")
    assert {path.name for path in (out / "runs").iterdir()} == {f"{row}-seed{s}" for row in rows for s in (0, 1)}
    runs = {row: [hs.Run.open(out / "runs" / f"{row}-seed{s}") for s in (0, 1)] for row in rows}
    splits = [[run.info["data"]["split_hash"] for run in runs[row]] for row in rows]
    assert splits == [[data.split_hash, redrawn(data, 1).split_hash]] * len(rows)
    assert splits[0][0] != splits[0][1]
    summary = json.loads((out / "summary.json").read_text())
    right = {
        row: [
            float((t["prediction"] == t["label"]).mean()) for t in (r.predictions.query("split == 'test'") for r in rs)
        ]
        for row, rs in runs.items()
    }
    for row in rows:
        assert summary["test"][row]["accuracy"]["value"] == pytest.approx(np.mean(right[row])), row
    gain = summary["gain_over_alone"]["kd-convnext"]["accuracy"]
    assert gain["seeds"] == pytest.approx([d - a for d, a in zip(right["kd-convnext"], right["convnext"])])
    assert np.sum(summary["confusion"]) == sum(len(r.predictions.query("split == 'test'")) for r in runs["kd-convnext"])
    for shown in ("0.8564 0.7988 0.7464 0.7717", "not printed", "0.9167 0.6111", "0.5882 0.8333"):
        assert shown in text, shown
    assert "divide all images anew" in (out / "report.html").read_text()
    weights = [[run.log[f"weight/{n}"][0] for n in ("features", "soft", "focal")] for run in runs["kd-convnext"]]
    assert weights == [[0.5, 0.5, 1.0]] * 2


def test_the_sweep_is_judged_on_validation_and_done_once(tmp_path: Path) -> None:
    data, out = table(tmp_path / "data"), tmp_path / "study"
    arguments: dict[str, Any] = SMALL | {"tables": ("2", "sweep"), "alphas": (0, 0.5), "betas": (1, 2), "seeds": 1}
    text = study(data, out=out, **arguments)
    rows = ("convnext", "swin", "logits", "features", "kd-convnext", "normalized", "alpha0-beta1", "alpha0.5-beta2")
    made = {f"{name}-seed0" for name in rows}
    assert {path.name for path in (out / "runs").iterdir()} == made
    summary = json.loads((out / "summary.json").read_text())
    validation = {
        name: hs.Run.open(out / "runs" / f"{run}-seed0").predictions.query("split == 'val'")
        for name, run in (("alpha0-beta1", "alpha0-beta1"), ("alpha0.5-beta1", "kd-convnext"), ("alpha0.5-beta2",) * 2)
    }
    share = {name: float((t["prediction"] == t["label"]).mean()) for name, t in validation.items()}
    assert {n: f["value"] for n, f in summary["sweep_validation"].items()} == pytest.approx(share)
    best = summary["best_on_validation"]
    assert share[f"alpha{best['alpha']:g}-beta{best['beta']:g}"] == max(share.values())
    assert "the test images were not asked" in text
    for row, absent in (("logits", "features"), ("features", "soft")):
        assert f"raw/{absent}" not in hs.Run.open(out / "runs" / f"{row}-seed0").log.columns
    assert {p.name for p in (out / "figures").iterdir()} == {
        *("softened.png", "confusion.png", "alpha.png", "alpha-loss.png", "beta.png", "beta-loss.png")
    }
    before = bytes_of(out / "runs")
    study(data, out=out, **arguments)
    assert bytes_of(out / "runs") == before


def test_a_new_split_keeps_patients_whole_and_the_shares(tmp_path: Path) -> None:
    data = patients(tmp_path / "data")
    again = redrawn(data, 5)
    assert again.split_hash != data.split_hash
    assert again.frame.groupby("patient")["split"].nunique().max() == 1
    for name in ("train", "val", "test"):
        assert len(again.rows(name)) == pytest.approx(len(data.rows(name)), abs=2)
    assert set(again.frame["path"]) == set(data.frame["path"])


def test_what_cannot_be_studied_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    data, out = table(tmp_path / "data"), tmp_path / "study"
    with pytest.raises(BadInput, match="--seeds 0"):
        study(data, out=out, seeds=0, **SMALL)
    with pytest.raises(BadInput, match="no train or val or test images"):
        study(read_images(tmp_path / "data"), out=out, **SMALL)
    with pytest.raises(BadInput, match="--image-size 50: coatnet_0_rw_224"):
        study(data, out=out, **SMALL | {"image_size": 50, "networks": ("coatnet_0_rw_224",)})
    assert not out.exists()


def test_repeats_of_different_patients_are_compared_within_each() -> None:
    """Every patient is one image; the second is right wherever the first is, and in one more of each repeat."""
    labels = np.array([0, 0, 1, 1, 0, 1])

    def repeat(first: int, wrong: tuple[int, ...]) -> Scores:
        said = np.where(np.isin(np.arange(6), wrong), 1 - labels, labels)
        return Scores(labels, np.eye(2)[said], np.array([f"p{first + i}" for i in range(6)]))

    alone, distilled = [repeat(0, (0, 2)), repeat(3, (1, 5))], [repeat(0, (0,)), repeat(3, (1,))]
    gain = paired_gain(alone, distilled, names=FIGURES)["accuracy"]
    assert gain["seeds"] == pytest.approx([1 / 6, 1 / 6])
    assert gain["low"] < gain["value"] < gain["high"]
    nothing = paired_gain(alone, alone, names=FIGURES)["accuracy"]
    assert (nothing["value"], nothing["p"], nothing["seeds"]) == (0, 1, [0, 0])
    assert nothing["low"] <= 0 <= nothing["high"]
    assert figures_over_seeds(alone, names=FIGURES)["accuracy"]["value"] == pytest.approx(4 / 6)
    pooled = together(alone)
    assert len(pooled.labels) == 12
    assert len(pooled.unit_names) == 9  # three patients were tested twice
    assert per_class(pooled)["sensitivity"][:, 0] == pytest.approx([4 / 6, 4 / 6])


def test_the_papers_tables_agree_with_one_another() -> None:
    for name, (_, precision, recall, f1) in PAPER["rows"].items():
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=2e-4), name
    diagonal, predicted, images = (np.array(PAPER[n]) for n in ("diagonal", "predicted", "images"))
    assert predicted.sum() == images.sum() == 209
    accuracy, precision, recall, _ = PAPER["rows"]["kd-convnext"]
    assert diagonal.sum() / 209 == pytest.approx(accuracy, abs=1e-4)
    by_class = np.array(list(PAPER["classes"].values()))
    np.testing.assert_allclose(by_class[:, 0], diagonal / predicted, atol=1e-4)
    np.testing.assert_allclose(by_class[:, 1], diagonal / images, atol=1e-4)
    assert by_class.mean(0) == pytest.approx([precision, recall], abs=1e-4)
