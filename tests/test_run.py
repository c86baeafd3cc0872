"""A run is a folder, and its word is not trusted with anything but Histill's own networks."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_classes
from PIL import Image
from safetensors.torch import load_file
from tiny import SIZE, Tiny, bytes_of, experiment, no_page, table
from torch import Tensor

import histill as hs
from histill.data import Images, pack
from histill.data.decode import load
from histill.deploy import TorchPredictor
from histill.errors import BadInput
from histill.evaluate.finish import finish, gallery_of, scores
from histill.experiment import load_file as load_code
from histill.models import DSNet
from histill.recipes import dsnet
from histill.run import Run
from histill.types import Outputs

METRICS = {"accuracy", "balanced_accuracy", "macro_f1", "auroc", "sensitivity", "specificity", "ece"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def run(data: Images, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of a network of Histill's, with its pages."""
    made = dsnet.student(data=data, image_size=SIZE, epochs=2, batch_size=8, positive="malignant", lr=0.002)
    return hs.train(made, tmp_path_factory.mktemp("runs") / "run")


def test_the_folder_holds_what_the_design_says(run: Run) -> None:
    assert set(bytes_of(run.path)) == {
        *("run.json", "data.csv", "log.csv", "model.safetensors", "metrics.json", "report.html"),
        *("predictions.parquet", "last.parquet"),
        *(f"figures/{name}.png" for name in ("training", "reliability", "confusion", "roc")),
    }


def test_run_json_says_how_it_was_made(run: Run, data: Images) -> None:
    info = json.loads((run.path / "run.json").read_text())
    assert info["status"] == "finished"
    assert info["recipe"]["name"] == "dsnet.student"
    assert "def student(" in info["recipe"]["source"]
    arguments = info["recipe"]["arguments"]
    assert arguments["data"] == {"images": str(data.root), "hash": data.hash, "split_hash": data.split_hash}
    assert (arguments["lr"], arguments["temperature"], arguments["teacher"]) == (0.002, 10.0, None)
    assert info["network"] == {
        "function": "histill.models.dsnet:DSNet",
        "arguments": {"classes": 2, "image_size": SIZE},
    }
    assert info["parameters"] == sum(p.numel() for p in DSNet(2, SIZE).parameters())
    assert info["data"]["images"] == {"train": 24, "val": 8, "test": 8}
    assert (info["data"]["hash"], info["data"]["split_hash"]) == (data.hash, data.split_hash)
    assert {"python", "torch", "histill", "numpy"} <= set(info["versions"])
    assert (info["classes"], info["positive"], info["seed"]) == (["benign", "malignant"], "malignant", 0)
    assert (info["device"], info["processes"]) == ("cpu", 1)
    assert "highest validation balanced_accuracy" in info["selection"]["rule"]
    assert {"commit", "precision", "started", "seconds"} <= set(info)


def test_predictions_are_of_validation_and_test(run: Run, data: Images) -> None:
    table = run.predictions
    assert list(table.columns) == [
        *("image", "patient", "split", "label", "prediction", "prob_benign", "prob_malignant")
    ]
    listed = data.frame[data.frame["split"].isin(("val", "test"))]
    assert dict(zip(table["image"], table["split"])) == dict(zip(listed["path"], listed["split"]))
    assert dict(zip(table["image"], table["label"])) == dict(zip(listed["path"], listed["label"]))
    np.testing.assert_allclose(table["prob_benign"] + table["prob_malignant"], 1, atol=1e-12)
    assert (table["prediction"] == np.where(table["prob_benign"] >= 0.5, "benign", "malignant")).all()


def test_figures_lie_in_their_intervals(run: Run) -> None:
    test = run.predictions.query("split == 'test'")
    assert run.metrics["test"]["accuracy"]["value"] == (test["prediction"] == test["label"]).mean()
    for split in ("val", "test"):
        assert set(run.metrics[split]) >= METRICS
        for name in METRICS - {"ece"}:
            figure = run.metrics[split][name]
            assert figure["low"] <= figure["value"] <= figure["high"], name
    assert run.metrics["temperature"] > 0


def test_the_temperature_is_that_of_validation_and_calibrates_the_test_images(run: Run, tmp_path: Path) -> None:
    """Sure to 9/10 and right in 3/4 of validation: ``ln 9 / ln 3 = 2``, and 9/10 becomes 3/4."""
    shutil.copytree(run.path, tmp_path / "run")
    said = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    for (split, label), rows in said.groupby(["split", "label"]).groups.items():
        right = np.arange(len(rows)) > 0 if split == "val" else np.ones(len(rows), bool)  # one of four is wrong
        said.loc[rows, f"prob_{label}"] = np.where(right, 0.9, 0.1)
        other = "benign" if label == "malignant" else "malignant"
        said.loc[rows, f"prob_{other}"] = np.where(right, 0.1, 0.9)
    said.to_parquet(tmp_path / "run" / "predictions.parquet", index=False)
    finish(tmp_path / "run", run.info)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val"]["accuracy"]["value"] == 0.75
    assert metrics["temperature"] == pytest.approx(2, rel=1e-3)
    assert metrics["test"]["ece"]["value"] == pytest.approx(0.1)  # all are right
    assert metrics["test"]["ece_calibrated"]["value"] == pytest.approx(0.25, abs=1e-3)


def test_an_image_without_a_patient_is_one_of_its_own() -> None:
    table = pd.DataFrame({"image": ["a", "b", "c"], "patient": ["p", "", "p"], "label": ["x", "y", "y"]})
    found = scores(table.assign(prob_x=[0.9, 0.2, 0.4], prob_y=[0.1, 0.8, 0.6]), ("x", "y"))
    assert found.units.tolist() == ["p", "b", "p"]


def test_a_gallery_has_the_surest_mistakes_first_and_then_what_was_right(data: Images) -> None:
    frame = data.frame[data.frame["split"] == "test"].reset_index(drop=True)
    sure, wrong = np.array([0.55, 0.95, 0.6, 0.9, 0.7, 0.8, 0.85, 0.65]), [0, 1, 4]
    benign = (frame["label"] == "benign").to_numpy(copy=True)
    benign[wrong] = ~benign[wrong]
    said = pd.DataFrame({"image": frame["path"], "split": "test", "label": frame["label"]})
    said = said.assign(prob_benign=np.where(benign, sure, 1 - sure), prob_malignant=np.where(benign, 1 - sure, sure))
    more = said.iloc[:1].assign(split="val", prob_benign=0.0, prob_malignant=1.0)
    pictures, labels, p = gallery_of(data, pd.concat([more, said]), most=4)
    shown = [1, 4, 2, 7]  # two mistakes at most, and of the five others the first and the last
    np.testing.assert_allclose(p.max(1), sure[shown])
    assert [data.classes[number] for number in labels] == frame["label"][shown].tolist()
    for picture, row in zip(pictures, shown, strict=True):
        assert np.array_equal(picture, load(data.root / frame["path"][row], 160).transpose(1, 2, 0))


def test_a_confidence_that_says_nothing_is_said(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    said = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    names = said["label"].unique()
    for name, other in zip(names, names[::-1]):
        rows = said["label"] == name
        sure = np.arange(rows.sum()) % 2 == 0  # right in every other image, and always sure
        said.loc[rows, f"prob_{name}"], said.loc[rows, f"prob_{other}"] = (
            np.where(sure, 0.99, 0.01),
            np.where(sure, 0.01, 0.99),
        )
    said.to_parquet(tmp_path / "run" / "predictions.parquet", index=False)
    finish(tmp_path / "run", run.info)
    line = "The network&#39;s confidence says nothing there"
    assert line in (tmp_path / "run" / "report.html").read_text()
    assert line not in (run.path / "report.html").read_text()


def test_opened_again_it_is_the_network_that_was_judged(run: Run, data: Images) -> None:
    opened = Run.open(run.path)
    assert (opened.classes, opened.image_size, opened.finished) == (("benign", "malignant"), SIZE, True)
    network = opened.network()
    assert not network.training
    packed = pack(data, SIZE)
    with torch.no_grad():
        p = network(packed.batch(np.array(packed.images.rows("test"))).images)["logits"].double().softmax(1)
    np.testing.assert_allclose(run.predictions.query("split == 'test'")["prob_malignant"], p[:, 1], atol=1e-6)
    assert opened.data.frame["path"].tolist() == data.frame["path"].tolist()
    assert len(opened.log) == 2


def test_a_run_needs_no_weights_that_it_started_from(data: Images, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    torch.manual_seed(9)
    first = DSNet(2, SIZE)
    from safetensors.torch import save_file

    save_file(first.state_dict(), tmp_path / "start.safetensors")
    student = partial(Started, weights=str(tmp_path / "start.safetensors"))
    run = hs.train(experiment(data, student=student, epochs=1), tmp_path / "run")
    assert run.info["network"]["arguments"]["weights"].endswith("start.safetensors")
    (tmp_path / "start.safetensors").unlink()
    assert run.network() is not None
    assert Run.open(run.path, code=Path(__file__)).network() is not None


class Started(DSNet):
    def __init__(self, weights: str | None = None) -> None:
        super().__init__(2, SIZE)
        if weights is not None:
            self.load_state_dict(load_file(weights))


class Exits(Tiny):
    def forward(self, images: Tensor) -> Outputs:
        outputs = super().forward(images)
        return Outputs(outputs, exit1=-outputs["logits"], exit1_features=outputs["pooled"])


def test_every_exit_has_its_probabilities(data: Images, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    table = hs.train(experiment(data, student=partial(Exits)), tmp_path / "run").predictions
    assert list(table.columns)[5:] == ["prob_benign", "prob_malignant", "exit1_prob_benign", "exit1_prob_malignant"]
    np.testing.assert_allclose(table["exit1_prob_benign"], table["prob_malignant"], atol=1e-12)


# Folders that are no runs


def altered(run: Run, folder: Path, change: Any) -> Path:
    folder.mkdir()
    info = json.loads((run.path / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(change(info)))
    (folder / "model.safetensors").write_bytes((run.path / "model.safetensors").read_bytes())
    return folder


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match=r"not a run folder \(no run\.json in it\)$"):
            Run.open(path)


def test_where_the_runs_lie_deeper_they_are_named(tmp_path: Path) -> None:
    for name in ("student_distilled", "seed0/teacher"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    with pytest.raises(BadInput, match=r"; there are \S+/seed0/teacher, \S+/student_distilled$"):
        Run.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000, "nan", "null", "[]", '"x"', "{}", '{"network": 3}'])
def test_a_run_json_that_is_garbage_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BadInput, match=r"run\.json"):
        Run.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"network": None},
        {"network": {"function": 3, "arguments": {}}},
        {"network": {"function": "histill.models.dsnet:DSNet", "arguments": [1]}},
        {"network": {"function": "histill.models.dsnet:DSNet"}},
        {"classes": 3},
        {"classes": ["benign", "benign"]},
        {"image_size": "large"},
        {"image_size": float("inf")},
        {"data": None},
    ],
)
def test_a_run_json_with_a_wrong_part_is_named(run: Run, tmp_path: Path, change: Any) -> None:
    folder = altered(run, tmp_path / "run", lambda info: info | change)
    with pytest.raises(BadInput, match=r"run"):
        Run.open(folder)


@pytest.mark.parametrize(
    "function",
    [
        "os:system",
        "builtins:eval",
        "subprocess:run",
        "canary:Net",
        "torch.hub:load",
        "histill.files:write_text",
        "histill.models.weights:read_weights",
        "histill.models.weights:_download",
        "histill.models.weights:imagenet",
        "histill.models.adapter:create",
        "histill.models.adapter:timm",
        "histill.models.adapter:Normalize",
        "histill.models.mac_resnet:attention_crop",
        "histill.models.dsnet:torch.hub.load",
        "histill.models.nowhere:Net",
        "histill.models.:DSNet",
        "histill.models..weights:read_weights",
        "histill.models",
        "",
    ],
)
def test_a_hostile_run_imports_and_calls_nothing(run: Run, tmp_path: Path, monkeypatch: Any, function: str) -> None:
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'sung')!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    hostile = {"network": {"function": function, "arguments": {"name": "touch " + str(tmp_path / "sung")}}}
    folder = altered(run, tmp_path / "run", lambda info: info | hostile)
    with pytest.raises(BadInput, match=r"is no network of Histill|not one of Histill's; give its file with --code"):
        Run.open(folder).network()
    assert not (tmp_path / "sung").exists()
    assert "canary" not in sys.modules


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_pickles_are_not_opened(run: Run, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    folder = altered(run, tmp_path / "run", lambda info: info)
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(BadInput, match="does not fit the network"):
        Run.open(folder).network()
    (tmp_path / "bomb.pt").write_bytes(bomb)
    timm = {"name": "test_resnet", "classes": 2, "checkpoint_path": str(tmp_path / "bomb.pt")}
    hostile = {"network": {"function": "histill.models.adapter:Timm", "arguments": timm}}
    folder = altered(run, tmp_path / "other", lambda info: info | hostile)
    with pytest.raises(BadInput, match="checkpoint_path"):
        Run.open(folder).network()
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("arguments", [{"classes": 3}, {"nonsense": 1}, {"classes": "two"}, {"image_size": 40}])
def test_weights_that_do_not_fit_are_named(run: Run, tmp_path: Path, arguments: Any) -> None:
    network = {"function": "histill.models.dsnet:DSNet", "arguments": {"image_size": SIZE} | arguments}
    folder = altered(run, tmp_path / "run", lambda info: info | {"network": network})
    with pytest.raises(BadInput, match=r"model.safetensors: does not fit"):
        Run.open(folder).network()


def test_an_unfinished_run_has_no_network_yet(run: Run, tmp_path: Path) -> None:
    folder = altered(run, tmp_path / "run", lambda info: info | {"status": "running"})
    (folder / "model.safetensors").unlink()
    opened = Run.open(folder)
    assert not opened.finished
    with pytest.raises(BadInput, match=r"status: running.*--resume"):
        opened.network()


# Networks of the user's own

CODE = """
import torch
from torch import nn
from histill.types import Outputs

class Own(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, images):
        return Outputs(logits=self.head(images.mean((2, 3))))
"""


def test_a_users_network_needs_its_code(data: Images, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    (tmp_path / "own.py").write_text(CODE)
    network = load_code(tmp_path / "own.py").Own
    run = hs.train(experiment(data, student=partial(network, classes=2)), tmp_path / "run")
    weight = run.network().head.weight
    read = Run.open(run.path)
    assert len(read.predictions) == 16, "what the folder holds is read without the network"
    with pytest.raises(BadInput, match="give its file with --code"):
        read.network()
    assert torch.equal(Run.open(run.path, code=tmp_path / "own.py").network().head.weight, weight)
    (tmp_path / "other.py").write_text("x = 1")
    with pytest.raises(BadInput, match=r"other.py has no Own"):
        Run.open(run.path, code=tmp_path / "other.py")


# Judged again


def test_the_figures_of_a_run_are_those_that_it_holds(run: Run) -> None:
    figures = hs.evaluate(run.path)
    assert set(figures) == {"val", "test"}
    assert figures["test"]["accuracy"] == run.metrics["test"]["accuracy"]


def test_images_that_it_was_trained_on_are_counted(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    hs.evaluate(run, run.data.root)
    assert f"{len(run.data.rows('train'))} of these images are among those" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [["benign", "malignant", "third"], ["benign"]])
def test_a_run_that_names_other_classes_than_its_network_tells_apart(
    run: Run, tmp_path: Path, classes: list[str]
) -> None:
    odd = Run.open(altered(run, tmp_path / "run", lambda info: info | {"classes": classes}))
    predictor = TorchPredictor(odd.network(), odd.classes, odd.image_size)
    with pytest.raises(BadInput, match=rf"2 classes apart, its run names {len(classes)}"):
        predictor(np.zeros((1, 3, odd.image_size, odd.image_size), np.float32))
    if len(classes) > 2:
        run.data.save(odd.path / "data.csv")
        with pytest.raises(BadInput, match=r"2 classes apart, 3 are named"):
            hs.evaluate(odd, write_classes(tmp_path / "elsewhere", {"benign": 2, "malignant": 2}, size=20))


def test_a_run_is_judged_on_other_images(run: Run, tmp_path: Path) -> None:
    other = table(tmp_path / "other", count=12)
    figures = hs.evaluate(run, other.root)["data"]
    packed = pack(other, SIZE)
    with torch.no_grad():
        said = run.network()(packed.batch(np.arange(12)).images)["logits"].argmax(1)
    assert figures["accuracy"]["value"] == pytest.approx(float((said == packed.labels).float().mean()))
    assert figures["accuracy"]["low"] <= figures["accuracy"]["value"] <= figures["accuracy"]["high"]
    assert [row["class"] for row in figures["per_class"]] == ["benign", "malignant"]


def test_labels_that_it_does_not_know_are_refused(run: Run, tmp_path: Path) -> None:
    for label in ("benign", "cat"):
        (tmp_path / "data" / label).mkdir(parents=True)
        pixels = np.random.default_rng(len(label)).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / label / "1.png")
    with pytest.raises(BadInput, match=r"labels that .* was not trained on: cat"):
        hs.evaluate(run, tmp_path / "data")


def test_an_unfinished_run_is_not_judged(run: Run, tmp_path: Path) -> None:
    folder = altered(run, tmp_path / "run", lambda info: info | {"status": "running"})
    with pytest.raises(BadInput, match="is not finished"):
        hs.evaluate(folder)


def test_the_log_is_a_table(run: Run) -> None:
    pd.testing.assert_frame_equal(run.log, pd.read_csv(run.path / "log.csv"))
