"""The RCKD study runs every kind of row once, draws as many labels as asked, and prints the paper beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import no_page, table

import histill as hs
from histill import cli
from histill.data import read_masks, split
from histill.data.phantom import write_images
from histill.recipes import rckd
from histill.studies import rckd as studied
from histill.studies.rckd import PAPER, ROWS, fewer, study

TINY: dict[str, Any] = {
    **{"image_size": 32, "epochs": 1, "batch_size": 8, "lr": 0.01, "pretrain_image_size": 32, "pretrain_epochs": 1},
    **{"pretrain_batch_size": 8, "teacher_scale": 1.0, "seeds": 2, "labels": 12, "sizes": (32,), "rates": (0.01,)},
}


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


def test_the_papers_rows_are_all_there_and_their_means_are_truncated_means() -> None:
    assert {pair for _, pairs in ROWS.values() for pair in pairs} == set(PAPER["rows"])
    for row in PAPER["rows"].values():
        assert len(row) == 8
        assert row[4] == pytest.approx(np.mean(row[:4]), abs=0.11)
        assert row[7] == pytest.approx(np.mean(row[5:7]), abs=0.0061)


def test_labels_are_drawn_evenly_and_only_from_training(tmp_path: Path) -> None:
    data = table(tmp_path / "d", 40)
    few = fewer(data, 10, seed=3)
    kept = few.frame[few.frame["split"] == "train"]
    assert kept["label"].value_counts().tolist() == [5, 5]
    assert len(few.rows("val")) == len(data.rows("val"))
    assert len(few.rows("test")) == len(data.rows("test"))
    assert few.frame.equals(fewer(data, 10, seed=3).frame)
    assert not few.frame.equals(fewer(data, 10, seed=4).frame)
    assert fewer(data, None, seed=0) is data


@pytest.mark.slow
def test_every_kind_of_row_runs_once_and_stands_beside_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "tissue", patients=8, images_per_patient=2, size=64, masks=True)
    nuclei = split(read_masks(tmp_path / "tissue/manifest.csv", kind="instances"), val=0.25, test=0.25)
    hs.train(rckd.teacher(nuclei, epochs=1, image_size=64, select="last"), tmp_path / "teacher")
    rows = (("random", "test_resnet"), ("barlow-twins", "test_resnet"), ("rckd", "test_resnet"))
    paper = {**PAPER["rows"], **dict.fromkeys(rows, tuple(range(8)))}
    monkeypatch.setitem(PAPER, "rows", paper)
    monkeypatch.setattr(
        studied, "ROWS", {"3": ("Table 3", (*rows, ("supervised", "CSAT"))), "4": ROWS["4"], "5": ROWS["5"]}
    )
    data, out = table(tmp_path / "labels", 60, size=40), tmp_path / "study"
    given: dict[str, Any] = {"unlabelled": tmp_path / "tissue/images", "teacher": str(tmp_path / "teacher")}
    text = study(data, out=out, tables=("3",), **given, **TINY)
    made = {p.name for p in (out / "runs").iterdir()}
    assert made == {"pretrain-barlow-twins-test_resnet-seed0", "pretrain-rckd-test_resnet-seed0"} | {
        f"{m}-test_resnet-labels-seed{s}" for m in ("random", "barlow-twins", "rckd") for s in (0, 1)
    }
    summary = json.loads((out / "summary.json").read_text())
    gain = summary["gain"]["rckd-test_resnet-labels"]["accuracy"]
    own, base = (summary["rows"][f"{m}-test_resnet-labels"]["accuracy"]["value"] for m in ("rckd", "random"))
    assert gain["value"] == pytest.approx(own - base)
    assert "0 1 2 3 4 5 6 7" in text
    assert "supervised CSAT" in (out / "report.html").read_text()
    assert (out / "figures/pseudo-labels.png").stat().st_size > 10_000
    first, second = (hs.Run.open(out / f"runs/rckd-test_resnet-labels-seed{s}") for s in (0, 1))
    assert first.info["data"]["images"]["train"] == 12
    assert first.info["data"]["split_hash"] != second.info["data"]["split_hash"]


@pytest.mark.slow
def test_every_table_and_figure_of_the_paper_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "tissue", patients=8, images_per_patient=2, size=64, masks=True)
    nuclei = split(read_masks(tmp_path / "tissue/manifest.csv", kind="instances"), val=0.25, test=0.25)
    hs.train(rckd.teacher(nuclei, epochs=1, image_size=64, select="last"), tmp_path / "teacher")
    rows = {
        "3": tuple((m, "test_resnet") for m in ("random", "barlow-twins", "moco", "supervised", "rckd")),
        "4": (("supervised", "test_efficientnet"), ("rckd", "test_efficientnet")),
        "5": (("supervised", "test_resnet"), ("simclr", "test_resnet"), ("mae", "test_vit")),
    }
    monkeypatch.setattr(studied, "ROWS", {table: (ROWS[table][0], pairs) for table, pairs in rows.items()})
    paper = {**PAPER["rows"], **dict.fromkeys({p for pairs in rows.values() for p in pairs}, tuple(range(8)))}
    monkeypatch.setitem(PAPER, "rows", paper)
    monkeypatch.setitem(PAPER, "imagenet", {"test_resnet": 75.7, "test_efficientnet": 76.2})
    data, out = table(tmp_path / "labels", 60, size=40), tmp_path / "study"
    table(tmp_path / "others", 40, size=44)
    sizes = {"image_size": 64, "pretrain_image_size": 32, "sizes": (32, 64), "seeds": 1, "head_width": 16}
    given: dict[str, Any] = {"unlabelled": tmp_path / "tissue/images", "teacher": str(tmp_path / "teacher")}
    text = study(data, out=out, labelled=tmp_path / "others", **given, **TINY | sizes)
    for shown in ("Table 3", "Table 4", "Table 5", "Table 6: SAT", "Figure 5", "MAE", "75.7 %", "over MoCo v2"):
        assert shown in text, shown
    page = (out / "report.html").read_text()
    for shown in ("Figure 3", "Figure 5", "Figures 6 to 8", "Figure 10", "RCKD 92.8 %", "self-supervised 78.9 %"):
        assert shown in page, shown
    for name in ("pseudo-labels", "search", "pretraining", "balls"):
        assert (out / f"figures/{name}.png").stat().st_size > 5_000
    gains = json.loads((out / "summary.json").read_text())["gain_over_self_supervised"]
    assert set(gains) == {f"rckd-test_resnet-labels over {other}" for other in ("barlow-twins", "moco", "simclr")}


def test_without_patches_or_a_segmenter_the_line_says_what_to_give(tmp_path: Path, capsys: Any) -> None:
    table(tmp_path / "d", 40)
    assert cli.run(["study", "rckd", "--data", str(tmp_path / "d"), "--out", str(tmp_path / "o")]) == 2
    assert "--unlabelled FOLDER --teacher RUN" in capsys.readouterr().err
