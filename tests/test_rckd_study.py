"""The RCKD study runs every kind of row once, draws as many labels as asked, and prints the paper beside.

Its supervised rows start from given weights, labels or ImageNet, in this order, or are left out with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from tiny import no_page, table

import histill as hs
from histill import cli
from histill.data import read_masks, split
from histill.data.phantom import write_images
from histill.errors import BadInput
from histill.models import CSAT, Timm
from histill.recipes import baselines, rckd
from histill.studies import _rckd_supervised
from histill.studies import rckd as studied
from histill.studies._common import Study
from histill.studies._rckd_supervised import Supervised, given_weights
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


def supervised(tmp_path: Path, **changes: Any) -> Supervised:
    chosen: dict[str, Any] = {"labelled": None, "given": {}, "usi_teacher": None, "judged": []}
    small = {"image_size": 32, "epochs": 1, "batch_size": 8}
    return Supervised(made=Study(tmp_path / "study", (0, 1), {"device": "cpu"}), pretraining=small, **chosen | changes)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that cannot be reached, and its empty local cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def publish(hub: Path) -> None:
    """Put weights of timm's test_resnet into the local cache."""
    repository, revision = hub / "models--timm--test_resnet.r160_in1k", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    state = Timm("test_resnet", 1000).network.state_dict()
    save_file(state, repository / "snapshots" / revision / "model.safetensors")


def test_a_supervised_row_starts_from_imagenet_or_is_left_out_with_the_reason(tmp_path: Path, hub: Path) -> None:
    rows = supervised(tmp_path)
    assert rows.weights("test_resnet") is None
    assert rows.weights("CSAT") is None
    remedy = "give --labelled FOLDER or --supervised-weights"
    said = rows.skipped["supervised test_resnet"]
    assert said.startswith("cannot fetch the weights of test_resnet: 127.0.0.1 cannot be reached")
    assert said.endswith(f"; {remedy} test_resnet=FILE")
    assert rows.skipped["supervised CSAT"] == f"there are no ImageNet weights for CSAT; {remedy} CSAT=FILE"
    publish(hub)
    assert rows.weights("test_resnet") == "imagenet"
    assert rows.starts == {"test_resnet": "ImageNet"}


def test_given_weights_come_first_and_are_looked_at_at_once(tmp_path: Path) -> None:
    file = tmp_path / "csat.safetensors"
    save_file(CSAT(5).state_dict(), file)
    given = given_weights([f"csat={file}"], ["resnet18", "CSAT"])
    assert given == {"CSAT": str(file)}
    rows = supervised(tmp_path, given=given, labelled=table(tmp_path / "l"))
    rows.check()
    assert rows.weights("CSAT") == str(file)
    assert rows.starts == {"CSAT": "given"}
    with pytest.raises(BadInput, match="does not fit"):
        supervised(tmp_path, given={"resnet18": str(file)}).check()
    for wrong, said in (("CSAT", "write NETWORK=WEIGHTS"), ("CSAT=none", "write NETWORK="), ("vgg16=x", "no superv")):
        with pytest.raises(BadInput, match=said):
            given_weights([wrong], ["CSAT"])


def test_a_teacher_or_weights_of_what_is_judged_are_refused(tmp_path: Path) -> None:
    others, judged = table(tmp_path / "others", 40, size=32), table(tmp_path / "judged", 20, size=28)
    chosen: dict[str, Any] = {"network": "test_resnet", "image_size": 32, "epochs": 1, "batch_size": 8}
    run = hs.train(baselines.supervised(others, **chosen), tmp_path / "run")
    path = str(run.path)
    supervised(tmp_path, labelled=others, usi_teacher=path, judged=[judged], given={"test_resnet": path}).check()
    everything = others.with_frame(others.frame.assign(split="test"))
    with pytest.raises(BadInput, match=r"leak: .*run was trained on 24 of"):
        supervised(tmp_path, given={"test_resnet": path}, judged=[judged, everything]).check()
    with pytest.raises(BadInput, match="leak"):
        supervised(
            tmp_path, labelled=split(others.with_frame(others.frame.assign(split="")), seed=5), usi_teacher=path
        ).check()
    with pytest.raises(BadInput, match="give --labelled FOLDER too"):
        supervised(tmp_path, usi_teacher=path).check()


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Phantom patches, and a segmenter of their nuclei."""
    home = tmp_path_factory.mktemp("segmented")
    write_images(home / "tissue", patients=8, images_per_patient=2, size=64, masks=True)
    nuclei = split(read_masks(home / "tissue/manifest.csv", kind="instances"), val=0.25, test=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histill.evaluate.finish.finish", no_page)
        hs.train(rckd.teacher(nuclei, epochs=1, image_size=64, select="last"), home / "teacher")
    return {"unlabelled": home / "tissue/images", "teacher": str(home / "teacher")}


@pytest.mark.slow
def test_table_6_has_seeds_intervals_and_paired_differences_and_learns_from_usis_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segmented: dict[str, Any]
) -> None:
    pair = ("test_resnet", "test_efficientnet")
    monkeypatch.setattr(_rckd_supervised, "SAT", (pair,))
    monkeypatch.setitem(PAPER, "imagenet", {"test_resnet": 75.7, "test_efficientnet": 76.2})
    data, out = table(tmp_path / "labels", 20, size=40), tmp_path / "study"
    table(tmp_path / "others", 60, size=44)
    given: dict[str, Any] = {"labelled": tmp_path / "others", "usi_teacher": "test_resnet=none"}
    text = study(data, out=out, tables=("6",), **segmented, **given, **TINY)
    runs = {(n, s): hs.Run.open(out / f"runs/pretrain-supervised-{n}-seed{s}") for n in pair for s in (0, 1)}
    assert {p.name for p in (out / "runs").iterdir()} == {r.path.name for r in runs.values()} | {
        "usi-teacher-test_resnet-seed0"
    }
    assert len({run.info["data"]["split_hash"] for run in runs.values()}) == 1
    right: dict[str, list[float]] = {}
    for (network, _), run in runs.items():
        assert run.log["weight/kd"].tolist() == [5.0]
        tested = run.predictions.query("split == 'test'")
        assert len(tested) == 6
        right.setdefault(network, []).append(float((tested["prediction"] == tested["label"]).mean()))
    summary = json.loads((out / "summary.json").read_text())
    for network, values in right.items():
        assert summary["sat"][network]["accuracy"]["seeds"] == pytest.approx(values)
        assert summary["sat"][network]["accuracy"]["value"] == pytest.approx(np.mean(values))
    gain = summary["sat_gain"]["test_efficientnet"]["accuracy"]
    assert gain["seeds"] == pytest.approx(np.subtract(right["test_efficientnet"], right["test_resnet"]))
    assert gain["low"] <= gain["value"] <= gain["high"]
    for shown in (
        "Table 6: SAT",
        "6 test images of others",
        "Mean of 2 trainings",
        "+0.5 points",
        ") to test_resnet.",
    ):
        assert shown in text, shown
    assert "5 KL, from test_resnet=none" in (out / "report.html").read_text()


@pytest.mark.slow
def test_every_kind_of_row_runs_once_and_stands_beside_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segmented: dict[str, Any], hub: Path
) -> None:
    publish(hub)
    methods = ("random", "barlow-twins", "supervised", "rckd")
    rows = tuple((method, "test_resnet") for method in methods)
    paper = {**PAPER["rows"], **dict.fromkeys(rows, tuple(range(8)))}
    monkeypatch.setitem(PAPER, "rows", paper)
    monkeypatch.setattr(
        studied, "ROWS", {"3": ("Table 3", (*rows, ("supervised", "CSAT"))), "4": ROWS["4"], "5": ROWS["5"]}
    )
    data, out = table(tmp_path / "labels", 60, size=40), tmp_path / "study"
    text = study(data, out=out, tables=("3",), **segmented, **TINY)
    made = {p.name for p in (out / "runs").iterdir()}
    assert made == {"pretrain-barlow-twins-test_resnet-seed0", "pretrain-rckd-test_resnet-seed0"} | {
        f"{m}-test_resnet-labels-seed{s}" for m in methods for s in (0, 1)
    }
    summary = json.loads((out / "summary.json").read_text())
    gain = summary["gain"]["rckd-test_resnet-labels"]["accuracy"]
    own, base = (summary["rows"][f"{m}-test_resnet-labels"]["accuracy"]["value"] for m in ("rckd", "random"))
    assert gain["value"] == pytest.approx(own - base)
    assert "0 1 2 3 4 5 6 7" in text
    assert "supervised (ImageNet)" in text
    started = hs.Run.open(out / "runs/supervised-test_resnet-labels-seed0").info["network"]["arguments"]
    assert started["weights"] == "imagenet"
    page = (out / "report.html").read_text()
    assert "supervised CSAT (there are no ImageNet weights for CSAT; give --labelled FOLDER or" in page
    assert (out / "figures/pseudo-labels.png").stat().st_size > 10_000
    first, second = (hs.Run.open(out / f"runs/rckd-test_resnet-labels-seed{s}") for s in (0, 1))
    assert first.info["data"]["images"]["train"] == 12
    assert first.info["data"]["split_hash"] != second.info["data"]["split_hash"]


@pytest.mark.slow
def test_every_table_and_figure_of_the_paper_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segmented: dict[str, Any]
) -> None:
    rows = {
        "3": tuple((m, "test_resnet") for m in ("random", "barlow-twins", "moco", "supervised", "rckd")),
        "4": (("supervised", "test_efficientnet"), ("rckd", "test_efficientnet")),
        "5": (("supervised", "test_resnet"), ("simclr", "test_resnet"), ("mae", "test_vit")),
    }
    monkeypatch.setattr(studied, "ROWS", {table: (ROWS[table][0], pairs) for table, pairs in rows.items()})
    paper = {**PAPER["rows"], **dict.fromkeys({p for pairs in rows.values() for p in pairs}, tuple(range(8)))}
    monkeypatch.setitem(PAPER, "rows", paper)
    monkeypatch.setattr(_rckd_supervised, "SAT", (("test_resnet", "test_efficientnet"),))
    monkeypatch.setitem(PAPER, "imagenet", {"test_resnet": 75.7, "test_efficientnet": 76.2})
    data, out = table(tmp_path / "labels", 60, size=40), tmp_path / "study"
    table(tmp_path / "others", 40, size=44)
    sizes = {"image_size": 64, "pretrain_image_size": 32, "sizes": (32, 64), "seeds": 1, "head_width": 16}
    text = study(data, out=out, labelled=tmp_path / "others", **segmented, **TINY | sizes)
    for shown in ("Table 3", "Table 4", "Table 5", "Table 6: SAT", "Figure 5", "MAE", "75.7 %", "over MoCo v2"):
        assert shown in text, shown
    page = (out / "report.html").read_text()
    for shown in ("Figure 3", "Figure 5", "Figures 6 to 8", "Figure 10", "RCKD 92.8 %", "self-supervised 78.9 %"):
        assert shown in page, shown
    for name in ("pseudo-labels", "search", "pretraining", "balls"):
        assert (out / f"figures/{name}.png").stat().st_size > 5_000
    gains = json.loads((out / "summary.json").read_text())["gain_over_self_supervised"]
    assert set(gains) == {f"rckd-test_resnet-labels over {other}" for other in ("barlow-twins", "moco", "simclr")}


@pytest.mark.slow
def test_maes_transformer_is_fine_tuned_on_masks_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segmented: dict[str, Any]
) -> None:
    monkeypatch.setattr(
        studied, "ROWS", {"3": ("Table 3", ()), "4": ("", ()), "5": ("Table 5", (("mae", "test_vit"),))}
    )
    monkeypatch.setitem(PAPER, "rows", {**PAPER["rows"], ("mae", "test_vit"): tuple(range(8))})
    write_images(tmp_path / "glands", patients=6, images_per_patient=1, size=48, seed=9, masks=True)
    data = split(read_masks(tmp_path / "glands/manifest.csv", kind="instances"), val=0.25, test=0.25)
    text = study(data, out=tmp_path / "o", tables=("5",), **segmented, **TINY | {"head_width": 16, "image_size": 64})
    row = json.loads((tmp_path / "o/summary.json").read_text())["rows"]["mae-test_vit-glands"]
    assert len(row["miou"]["seeds"]) == 2
    assert "glands, miou" in text


def test_without_patches_or_a_segmenter_the_line_says_what_to_give(tmp_path: Path, capsys: Any) -> None:
    table(tmp_path / "d", 40)
    assert cli.run(["study", "rckd", "--data", str(tmp_path / "d"), "--out", str(tmp_path / "o")]) == 2
    assert "--unlabelled FOLDER --teacher RUN" in capsys.readouterr().err
