"""Early exit: what leaves where, the threshold that is fitted, and an export that leaves at the same places."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import no_page, table

import histill as hs
from histill import cli
from histill.deploy.early_exit import open_exits
from histill.deploy.timing import latency
from histill.errors import BadInput
from histill.evaluate import figures
from histill.evaluate.cost import macs
from histill.evaluate.early_exit import (
    answers_of,
    cost,
    curve,
    early_exit,
    exit_table,
    leave,
    passing,
    threshold_for,
)
from histill.evaluate.finish import exit_rows
from histill.models import DSNet, MSDNet, MultiExitResNet18
from histill.recipes import multi_exit
from histill.run import Run

# Three images, two exits, two classes; after both exits the mean.
P = np.array([[[0.9, 0.1], [0.5, 0.5]], [[0.6, 0.4], [0.2, 0.8]], [[0.3, 0.7], [0.1, 0.9]]])


def drawn(images: int = 40, exits: int = 4, classes: int = 3, seed: int = 0) -> tuple[Any, Any]:
    """Answers and labels in which confidences are tied here and there."""
    rng = np.random.default_rng(seed)
    p = rng.integers(1, 6, (images, exits, classes)).astype(float)
    return passing(p / p.sum(-1, keepdims=True)), rng.integers(0, classes, images)


def test_the_answer_after_an_exit_is_the_mean_of_those_passed() -> None:
    answers = passing(P)
    np.testing.assert_allclose(answers[:, 0], P[:, 0])
    np.testing.assert_allclose(answers[:, 1], [[0.7, 0.3], [0.4, 0.6], [0.2, 0.8]])


def test_an_image_leaves_at_the_first_exit_that_is_sure() -> None:
    assert leave(passing(P), 0.65).tolist() == [0, 1, 0]
    assert leave(passing(P), 0.9).tolist() == [0, 1, 1]  # it reaches the threshold
    assert leave(passing(P), 0.95).tolist() == [1, 1, 1]
    assert leave(passing(P), 0.0).tolist() == [0, 0, 0]


def test_the_curve_by_hand() -> None:
    # Right at exit 1: images 0 and 2 (labels 0, 1, 1), at the end all three. Confidences at exit 1: .9, .6, .7.
    found = curve(passing(P), np.array([0, 1, 1]), [1, 3])
    np.testing.assert_allclose(found.threshold, [1.45, 0.8, 0.65, 0.3])
    np.testing.assert_allclose(found.accuracy, [1, 1, 1, 2 / 3])
    np.testing.assert_allclose(found.cost, [3, 7 / 3, 5 / 3, 1])
    assert threshold_for(found, 0.0) == pytest.approx(0.65)
    assert threshold_for(found, 0.34) == pytest.approx(0.3)


def test_the_curve_is_what_leaving_gives_at_every_threshold() -> None:
    answers, labels = drawn()
    costs = np.array([1.0, 2.0, 4.0, 7.0])
    found = curve(answers, labels, costs.tolist())
    assert np.all(np.diff(found.threshold) < 0)
    assert np.all(np.diff(found.cost) <= 1e-12)
    for threshold, accuracy, mean in zip(found.threshold, found.accuracy, found.cost):
        left = leave(answers, threshold)
        said = answers[np.arange(len(left)), left].argmax(-1)
        assert accuracy == pytest.approx((said == labels).mean())
        assert mean == pytest.approx(costs[left].mean())
    assert found.accuracy[0] == pytest.approx((answers[:, -1].argmax(-1) == labels).mean())
    assert found.cost[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("loss", [0.0, 0.05, 0.2])
def test_the_threshold_is_the_lowest_that_loses_no_more(loss: float) -> None:
    answers, labels = drawn(seed=3)
    found = curve(answers, labels, [1, 2, 3, 4])

    def accuracy(threshold: float) -> float:
        left = leave(answers, threshold)
        return float((answers[np.arange(len(left)), left].argmax(-1) == labels).mean())

    chosen = threshold_for(found, loss)
    whole = accuracy(2.0)
    assert accuracy(chosen) >= whole - loss - 1e-9
    lower = [t for t in np.linspace(0, 1, 2001) if t < chosen and accuracy(t) >= whole - loss - 1e-9]
    np.testing.assert_array_equal([leave(answers, t) for t in lower], [leave(answers, chosen)] * len(lower))


@pytest.mark.parametrize("make", [MultiExitResNet18, MSDNet])
@torch.no_grad()
def test_the_segments_are_the_network(make: Any) -> None:
    torch.manual_seed(0)
    network = make(classes=3, stem="cifar").eval()
    images = torch.rand(2, 3, 16, 16)
    outputs, carried = network(images), (images,)
    for k, segment in enumerate(network.segments(), 1):
        logits, *carried = segment(*carried)
        torch.testing.assert_close(logits, outputs[f"exit{k}"])
    spent = cost(network, 16)
    assert spent == sorted(spent)
    assert spent[-1] == macs(network, 16)


def test_a_network_without_exits_is_named() -> None:
    with pytest.raises(BadInput, match="DSNet has no exits"):
        cost(DSNet(image_size=18), 18)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small multi-scale network, trained for two epochs."""
    home = tmp_path_factory.mktemp("exits")
    patch = pytest.MonkeyPatch()
    patch.setenv("HISTILL_CACHE", str(home / "cache"))
    patch.setattr("histill.evaluate.finish.finish", no_page)
    small = {"scales": 2, "blocks": 2, "base": 1, "step": 1, "channels": 4, "growth": 2}
    made = multi_exit.student(table(home / "data"), network="msdnet", image_size=16, epochs=4, batch_size=8, lr=0.02)
    make: Any = partial(MSDNet, classes=2, stem="cifar", **small)
    found = hs.train(replace(made, student=make), home / "run", precision="32-true", device="cpu")
    patch.undo()
    return found


def test_a_run_is_judged_with_the_threshold_of_its_validation_images(run: Run, tmp_path: Path) -> None:
    found = early_exit(run, loss=0.1)
    predictions = run.predictions
    for split in ("val", "test"):
        part = predictions[predictions["split"] == split]
        answers = answers_of(part, run.classes)
        np.testing.assert_allclose(answers[:, -1], part[[f"prob_{c}" for c in run.classes]], atol=1e-6)
        left = leave(answers, found["threshold"])
        said = np.array(run.classes)[answers[np.arange(len(left)), left].argmax(-1)]
        right = float((said == part["label"]).mean())
        assert right == pytest.approx(found["validation"]["accuracy"] if split == "val" else found["accuracy"]["value"])
    assert found["leaving"] == pytest.approx([float((left == k).mean()) for k in range(2)])
    assert found["macs"]["mean"] == pytest.approx(np.mean(np.array(found["macs"]["exits"])[left]))
    assert found["validation"]["accuracy"] >= found["validation"]["whole"] - 0.1 - 1e-9
    json.dumps(found, allow_nan=False)
    assert [row[0] for row in exit_table(found).rows] == [
        *(f"always exit {k}" for k in (1, 2)),
        "whole network",
        "early exit",
    ]
    figures.early_exit(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    with pytest.raises(BadInput, match="a share from 0 to 1"):
        early_exit(run, loss=5)


def test_the_threshold_is_fitted_on_validation_and_judged_on_test_by_hand(run: Run, tmp_path: Path) -> None:
    # Validation: of the confidences .9, .7, .6 and .55 at exit 1 the last alone is wrong. Test: the surest is wrong.
    first = [0.9, 0.6, 0.3, 0.55, 0.05, 0.65, 0.42, 0.56, 0.5]
    last = [0.9, 0.8, 0.1, 0.05, 0.99, 0.9, 0.1, 0.1, 0.2]
    zero, one = run.classes
    said: dict[str, Any] = {
        "image": [f"{i}.png" for i in range(9)],
        "patient": "",
        "split": ["val"] * 4 + ["test"] * 5,
        "label": [zero, zero, one, one, zero, zero, one, one, one],
    }
    for name, p in (("", (np.array(first) + last) / 2), ("exit1_", np.array(first)), ("exit2_", np.array(last))):
        said |= {f"{name}prob_{zero}": p, f"{name}prob_{one}": 1 - p}
    shutil.copytree(run.path, tmp_path / "run")
    pd.DataFrame(said).to_parquet(tmp_path / "run/predictions.parquet")
    found = early_exit(replace(run, path=tmp_path / "run"), loss=0.0)
    assert found["threshold"] == pytest.approx(0.575)
    assert found["validation"] == {"accuracy": 1.0, "whole": 1.0}
    assert (found["accuracy"]["value"], found["whole"]["value"]) == (0.8, 1.0)
    assert found["gain"]["value"] == pytest.approx(-0.2)
    assert found["leaving"] == pytest.approx([0.6, 0.4])
    assert [exit["value"] for exit in found["exits"]] == [0.4, 1.0]
    cheap, dear = found["macs"]["exits"]
    assert found["macs"]["mean"] == pytest.approx(0.6 * cheap + 0.4 * dear)
    assert found["curve"]["accuracy"] == pytest.approx([1.0, 0.8, 0.8, 0.8, 0.6, 0.4])


def test_a_runs_page_has_the_accuracy_of_each_exit(run: Run) -> None:
    (shown,) = exit_rows(run.predictions, run.classes, ["val", "test"])
    assert [row[0] for row in shown.rows] == ["exit 1", "exit 2", "mean of all"]
    plain = run.predictions[[c for c in run.predictions if not c.startswith("exit")]]
    assert exit_rows(plain, run.classes, ["val", "test"]) == []


@pytest.fixture(scope="module")
def folder(run: Run) -> Path:
    """The run's export with early exit."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    out = run.path.parent / "exported"
    assert cli.run(["export", str(run.path), "--early-exit", "0.1", "--out", str(out)]) == 0
    return out


def test_the_export_leaves_where_the_run_does(run: Run, folder: Path, tmp_path: Path) -> None:
    card = json.loads((folder / "exits.json").read_text())
    assert [entry["file"] for entry in card["exits"]] == ["exit1.onnx", "exit2.onnx"]
    assert card["threshold"] == early_exit(run, loss=0.1)["threshold"]
    other, images = copied(folder, tmp_path / "copy"), run.data.root
    kept = run.predictions.set_index("image")
    answers = answers_of(kept, run.classes)
    half = float(np.median(answers[:, 0].max(-1)))  # half of the images leave at the first exit
    (other / "exits.json").write_text(json.dumps(card | {"threshold": half - 1e-6}))
    assert cli.run(["predict", str(other), str(images), "--out", str(tmp_path / "said.csv"), "--batch-size", "7"]) == 0
    said = pd.read_csv(tmp_path / "said.csv").set_index("image")
    left = leave(answers, half - 1e-6)
    assert set(left) == {0, 1}
    np.testing.assert_array_equal(said.loc[kept.index, "exit"], left + 1)
    columns = [f"prob_{c}" for c in run.classes]
    np.testing.assert_allclose(said.loc[kept.index, columns], answers[np.arange(len(left)), left], atol=1e-5)


def test_who_stays_to_the_end_gets_the_networks_answer(run: Run, folder: Path) -> None:
    predictor = open_exits(folder, threads=1)
    whole = replace(predictor, threshold=np.inf)
    images = np.random.default_rng(0).random((5, 3, 16, 16), dtype=np.float32)
    with torch.no_grad():
        expected = run.network()(torch.from_numpy(images))["logits"].numpy()
    np.testing.assert_allclose(whole.logits(images), expected, atol=1e-4)
    assert whole.leave(images)[1].tolist() == [2] * 5
    alone = np.concatenate([predictor(images[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(predictor(images), alone, atol=1e-5)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_an_export_that_was_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "copy")
    (other / "exit2.onnx").write_bytes((folder / "exit1.onnx").read_bytes())
    with pytest.raises(BadInput, match="is missing or not the one"):
        open_exits(other)
    (other / "exits.json").write_text("{}")
    with pytest.raises(BadInput, match="damaged"):
        open_exits(other)


def test_early_exit_has_its_limits(run: Run, folder: Path, capsys: Any) -> None:
    for arguments, said in (
        (["export", str(run.path), "--early-exit", "0.1", "--int8"], "--early-exit goes with"),
        (["export", str(run.path), "--early-exit", "2"], "a share from 0 to 1"),
        (["bench", str(folder)], "depends on the images"),
    ):
        assert cli.run(arguments) == 2
        assert said in capsys.readouterr().err


def test_latency_goes_through_the_images_it_is_given() -> None:
    class Recording:
        classes, image_size, mpp = ("a", "b"), 2, None
        seen: list[float]

        def __init__(self) -> None:
            self.seen = []

        def logits(self, images: Any) -> Any:
            return images

        def __call__(self, images: Any) -> Any:
            self.seen.append(float(images[0, 0, 0, 0]))
            return images

    model = Recording()
    images = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 2, 2), np.float32)
    latency({"m": model}, batch=1, repeats=6, images={"m": images})
    assert model.seen[3:] == [0, 1, 2, 3, 0, 1]
