"""Runs are compared on the same images, image by image."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import experiment, no_page, table

import histill as hs
from histill import cli
from histill.data import Images
from histill.errors import BadInput
from histill.run import Run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def data(root: Path) -> Images:
    return table(root / "data", count=60)


def trained(data: Images, out: Path, **changes: Any) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histill.evaluate.finish.finish", no_page)
        return hs.train(experiment(data, **changes), out)


@pytest.fixture(scope="module")
def runs(data: Images, root: Path) -> list[Run]:
    still = partial(torch.optim.SGD, lr=0.0)
    return [trained(data, root / "slow", optimizer=still), trained(data, root / "fast", epochs=10)]


def right(run: Run, split: str = "test") -> np.ndarray[Any, Any]:
    part = run.predictions.query("split == @split").sort_values("image")
    return (part["prediction"] == part["label"]).to_numpy(dtype=float)


def test_a_gain_is_the_paired_difference_from_the_first(runs: list[Run]) -> None:
    found = hs.compare(*runs).summary
    assert list(found["runs"]) == ["slow", "fast"]
    assert list(found["gain"]) == ["fast"]
    gain = found["gain"]["fast"]["accuracy"]
    assert gain["value"] == pytest.approx(right(runs[1]).mean() - right(runs[0]).mean())
    assert gain["value"] > 0.2, "these two should differ"
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert 0 <= found["gain"]["fast"]["mcnemar_p"] <= 1
    for name, run in zip(("slow", "fast"), runs):
        assert found["runs"][name]["accuracy"]["value"] == pytest.approx(right(run).mean())


def test_a_run_and_itself_differ_by_nothing(runs: list[Run], tmp_path: Path) -> None:
    shutil.copytree(runs[0].path, tmp_path / "again")
    gain = hs.compare(runs[0], tmp_path / "again").summary["gain"]["again"]
    assert gain["mcnemar_p"] == 1
    for name in ("accuracy", "balanced_accuracy", "auroc", "ece"):
        assert (gain[name]["value"], gain[name]["p"]) == (0, 1)
        assert gain[name]["low"] <= 0 <= gain[name]["high"]


def test_another_split_can_be_compared(runs: list[Run]) -> None:
    found = hs.compare(*runs, split="val").summary["runs"]
    assert found["fast"]["accuracy"]["value"] == pytest.approx(right(runs[1], "val").mean())


def test_it_prints_as_a_table(runs: list[Run], root: Path, capsys: Any) -> None:
    assert cli.run(["compare", str(runs[0].path), str(runs[1].path), "--out", str(root / "out")]) == 0
    said = capsys.readouterr().out
    assert "fast minus slow, paired: McNemar p = " in said
    found = hs.compare(*runs)
    assert said.strip() == str(found).strip()
    auroc, gain = (found.summary[part]["fast"]["auroc"] for part in ("runs", "gain"))
    assert f"{auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f})" in said, "as on the page, not in percent"
    assert f"auroc               {gain['value']:+.3f} (" in said.replace("−", "-")
    assert (root / "out/summary.json").is_file()


def test_what_cannot_be_compared_is_refused(runs: list[Run], data: Images, root: Path) -> None:
    with pytest.raises(BadInput, match="two runs or more"):
        hs.compare(runs[0])
    resplit = trained(table(root / "data", seed=1), root / "resplit")
    with pytest.raises(BadInput, match="were not judged on the same test images"):
        hs.compare(runs[0], resplit)
    unfinished = Run(runs[1].path, runs[1].info | {"status": "running"}, runs[1].build)
    with pytest.raises(BadInput, match="is not finished; go on with --resume"):
        hs.compare(runs[0], unfinished)
    others = Run(runs[1].path, runs[1].info | {"classes": ["cat", "dog"]}, runs[1].build)
    with pytest.raises(BadInput, match="has other classes than"):
        hs.compare(runs[0], others)


def test_images_of_the_same_names_are_not_the_same_images(runs: list[Run], data: Images, root: Path) -> None:
    # The same file names and splits in another folder, with other pictures.
    other = table(root / "other", count=60, size=26)
    frame = other.frame.assign(split=data.frame["split"].to_numpy())
    assert frame["path"].tolist() == data.frame["path"].tolist()
    run = trained(other.with_frame(frame), root / "namesake")
    with pytest.raises(BadInput, match="were not judged on the same test images"):
        hs.compare(runs[0], run)


def test_it_prints_where_a_test_has_no_answer(runs: list[Run]) -> None:
    found = hs.compare(runs[0], runs[0].path)
    name = next(iter(found.summary["gain"]))
    found.summary["delong"][name] |= {"error": None, "low": None, "high": None, "p": 1.0}  # of one patient of a kind
    assert "DeLong" not in str(found)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.assign(label="other"), "other, which the network does not know"),
        (lambda t: t.drop(columns="prob_benign"), "no column prob_benign"),
        (lambda t: t.drop(columns="split"), "no column split"),
        (lambda t: pd.concat([t, t]), "each once"),
        (lambda t: t.iloc[:0], "each once"),
    ],
    ids=["label", "probability", "split", "twice", "none"],
)
def test_predictions_that_were_edited_are_refused(runs: list[Run], tmp_path: Path, edit: Any, said: str) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(runs[1].path, edited)
    edit(runs[1].predictions).to_parquet(edited / "predictions.parquet", index=False)
    for pair in ((runs[0], edited), (edited, edited)):
        with pytest.raises(BadInput, match=said):
            hs.compare(*pair)
