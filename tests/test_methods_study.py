"""The comparison asks the teacher once, judges all on the same images, and takes nothing twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import bytes_of, no_page, table

import histill as hs
from histill.data import Images
from histill.errors import BadInput
from histill.evaluate.report import share
from histill.recipes import methods
from histill.run import Run
from histill.studies.methods import study
from histill.teachers import Frozen
from histill.types import Batch, Outputs

SMALL: dict[str, Any] = {"image_size": 32, "epochs": 2, "batch_size": 8, "views": 1, "weights": "none"}


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data", count=24, size=32)


def taught(data: Images, out: Path, network: str = "wrn_16_1") -> Path:
    made = methods.teacher(data, network=network, weights="none", image_size=32, epochs=1, batch_size=8)
    return hs.train(made, out).path


def test_students_methods_and_a_second_call_share_one_pass_over_the_teacher(
    data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, asked = taught(data, tmp_path / "teacher"), []
    ask = Frozen.__call__

    def counted(self: Frozen, batch: Batch) -> Outputs:
        asked.append(int((batch.labels >= 0).sum()))  # validation images come without their labels
        return ask(self, batch)

    monkeypatch.setattr(Frozen, "__call__", counted)
    students, names, seeds = ("resnet20", "wrn_16_1"), ("ce", "kd", "pkt"), 2
    arguments = SMALL | {"student": students, "methods": names[1:], "seeds": seeds, "teacher": [teacher]}
    out = tmp_path / "study"
    text = study(data, out=out, **arguments)
    assert sum(asked) == seeds * len(data.rows("train"))
    made = {f"{s}-{m}-seed{n}" for s in students for m in names for n in range(seeds)}
    assert {path.name for path in (out / "runs").iterdir()} == made
    before = bytes_of(out / "runs")
    assert study(data, out=out, **arguments) == text
    assert bytes_of(out / "runs") == before

    summary = json.loads((out / "summary.json").read_text())
    for kind, file in (("last", "last.parquet"), ("chosen", "predictions.parquet")):
        right = {}
        for name in ("kd", "pkt"):
            runs = [Run.open(out / "runs" / f"resnet20-{name}-seed{n}") for n in range(seeds)]
            tables = [(r.last if kind == "last" else r.predictions).query("split == 'test'") for r in runs]
            right[name] = [float((t["prediction"] == t["label"]).mean()) for t in tables]
        found = summary["test"]["resnet20"][kind]["pkt"]["accuracy"]
        assert found["seeds"] == pytest.approx(right["pkt"])
        gain = summary["gain_over_kd"]["resnet20"][kind]["pkt"]["accuracy"]["value"]
        assert gain == pytest.approx(np.mean(right["pkt"]) - np.mean(right["kd"])), file
        assert share(found) in text
    assert summary["extra_parameters"]["resnet20-pkt"] == 0
    assert summary["training_time_over_ce"]["resnet20"]["ce"] == 1
    assert re.search(r"2 comparisons.*not corrected for their number", text)


def test_boundaries_come_first_and_their_time_counts(data: Images, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher")
    study(data, out=tmp_path / "out", student=("resnet8x4",), methods=("ab",), teacher=[teacher], **SMALL)
    first, then, alone = (
        Run.open(tmp_path / "out/runs" / f"resnet8x4-{name}-seed0") for name in ("ab-boundaries", "ab", "ce")
    )
    assert then.info["network"]["arguments"]["weights"] == str(first.path)
    assert (first.info["epochs"], then.info["epochs"], alone.info["epochs"]) == (1, 2, 2)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    spent = {}
    for name, run in (("first", first), ("then", then), ("alone", alone)):
        each = (len(data.rows("train")) / run.log["images_per_second"]).to_numpy()
        spent[name] = float(np.median(each[1:] if len(each) > 1 else each)) * len(each)
    over = summary["training_time_over_ce"]["resnet8x4"]["ab"]
    assert over == pytest.approx((spent["first"] + spent["then"]) / spent["alone"])
    # A 1x1 convolution and a batch norm at each of three stages: 64 to 16, 128 to 32, 256 to 64.
    assert summary["extra_parameters"]["resnet8x4-ab"] == sum(
        a * b + 2 * b for a, b in ((64, 16), (128, 32), (256, 64))
    )


def test_of_several_teachers_the_methods_that_need_logits_are_compared(
    data: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers = [taught(data, tmp_path / name, name) for name in ("wrn_16_1", "resnet8x4")]
    arguments = SMALL | {"student": ("wrn_16_1",), "teacher": teachers, "weighting": "confidence"}
    with pytest.raises(BadInput, match="--methods rkd with wrn_16_1: it compares pooled features, and the teacher"):
        study(data, out=tmp_path / "out", methods=("rkd",), **arguments)
    study(data, out=tmp_path / "out", **arguments | {"epochs": 1})
    rows = {path.name for path in (tmp_path / "out/runs").iterdir()}
    assert rows == {f"wrn_16_1-{m}-seed0" for m in ("ce", "kd", "kd-standardized", "dkd", "dist", "nkd")}
    assert "review with wrn_16_1 is left out" in capsys.readouterr().err
    told = Run.open(tmp_path / "out/runs/wrn_16_1-kd-seed0").info["recipe"]["arguments"]["teacher"]
    assert told == f"{teachers[0]} + {teachers[1]}"


def test_the_protocol_fills_in_what_is_not_given_and_shows_the_published_figures(data: Images, tmp_path: Path) -> None:
    unvalidated = data.with_frame(data.frame[data.frame["split"] != "val"])
    text = study(
        unvalidated,
        out=tmp_path / "out",
        student=("resnet20",),
        methods=("kd",),
        protocol="cifar100",
        epochs=1,
        teacher_network="resnet56",
    )
    run = Run.open(tmp_path / "out/runs/resnet20-kd-seed0")
    info, arguments = run.info, run.info["recipe"]["arguments"]
    assert (info["image_size"], info["epochs"], info["batch_size"], info["views"]) == (32, 1, 64, None)
    assert (arguments["schedule"], arguments["augment"], info["select"]) == ("steps", "cifar", "last")
    assert not (run.path / "last.parquet").exists()
    assert "70.66 %" in text
    assert "the last epoch is all there is" in text


def test_a_teacher_that_saw_the_test_images_is_refused(data: Images, tmp_path: Path) -> None:
    teacher = taught(data, tmp_path / "teacher")
    with pytest.raises(BadInput, match="leak"):
        study(table(data.root, count=24, size=32, seed=3), out=tmp_path / "out", teacher=[teacher], **SMALL)
