"""A model card says what the run's own files say, nothing else, and nothing that a name could smuggle in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import write_classes

import histill as hs
from histill.deploy.model_card import card, origins, write_card
from histill.evaluate.finish import scores
from histill.evaluate.intervals import figures_with_intervals, per_class_table
from histill.files import read_json, write_json
from histill.models import DSNet
from histill.run import Run

ODD = ("<img onerror=x>", "b|c *d* `e`")


def trained(root: Path, *, names: tuple[str, str] = ("benign", "malignant"), **changes: Any) -> Run:
    """A finished run of a few seconds with figures, of 40 images of 20 patients."""
    write_classes(root / "data", {names[0]: 20, names[1]: 20}, per_patient=2)
    images = hs.split(hs.read_images(root / "data", patient=r"(p\d+)_"), val=0.2, test=0.3, seed=0)
    student = tiny.partial(DSNet, classes=2, image_size=tiny.SIZE)
    run = hs.train(tiny.experiment(images, **{"student": student} | changes), root / "run")
    metrics = {}
    for split in ("val", "test"):
        found = scores(run.predictions, run.classes, split)
        metrics[split] = figures_with_intervals(found) | {"per_class": per_class_table(found, run.classes)}
    write_json(run.path / "metrics.json", metrics)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("histill.evaluate.finish.finish", tiny.no_page)
        patched.setenv("HISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return trained(tmp_path_factory.mktemp("card"))


@pytest.fixture
def exported(run: Run) -> tuple[Path, dict[str, Any]]:
    file = run.path.parent / "student.onnx"
    file.write_bytes(bytes(2_500_000))
    return file, {"onnx": {"path": str(file), "max_abs_diff": 2e-6, "accuracy": 0.5, "accuracy_lost": 0.25}}


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    part = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)
    assert table is not None, heading
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[0].splitlines()]


def test_it_holds_the_runs_own_figures(run: Run, exported: tuple[Path, dict[str, Any]]) -> None:
    text = card(run, *exported, mpp=0.25)
    facts = dict(rows(text, "What it is")[2:])
    assert facts["classes"] == "benign, malignant"
    assert facts["parameters"] == f"{tiny.parameters(DSNet(2, tiny.SIZE)):,}"
    assert facts["input"] == "RGB, 18 x 18 pixels"
    assert facts["microns per pixel at that size"] == "0.25"
    frame = run.data.frame
    for split, images, patients, benign, malignant in rows(text, "Images")[2:]:
        part = frame[frame["split"] == split]
        assert [int(images), int(patients)] == [len(part), part["patient"].nunique()]
        assert [int(benign), int(malignant)] == [(part["label"] == name).sum() for name in run.classes]
    table = run.predictions.query("split == 'test'")
    accuracy = 100 * (table["prediction"] == table["label"]).mean()
    figures = dict(rows(text, "How well it does")[2:])
    assert figures["accuracy"].startswith(f"{accuracy:.1f} % (")
    assert rows(text, "The exported files")[2] == [
        "`student.onnx` (onnx)",
        "2.50 MB",
        "2e-06",
        "50.0 %",
        "+25.0 points",
    ]
    assert "Research on images like those" in text
    assert "not for diagnosis" in text
    assert re.search(r"logits divided by [\d.]+, which fits the validation images best", text)
    assert text.count("*To fill in:*") == 3


def test_its_limits_are_those_that_the_figures_show(run: Run, exported: tuple[Path, dict[str, Any]]) -> None:
    limits = card(run, *exported).partition("## Limits")[2].partition("\n## ")[0]
    count = int((run.data.frame.query("split == 'test'")["label"] == "benign").sum())
    assert f"Only {count} images of benign judge it." in limits
    assert "Where the images were scanned is not known" in limits
    assert "Patients were not known" not in limits


def test_names_cannot_smuggle_anything_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", tiny.no_page)
    run = trained(tmp_path, names=ODD)
    (file := tmp_path / "student.onnx").write_bytes(b"x")
    text = card(run, file, {"onnx": {"path": str(file), "max_abs_diff": 0.0}})
    assert "<" not in text
    assert str(tmp_path) not in text
    for heading in ("What it is", "Images", "How well it does", "What it costs", "The exported files"):
        table = rows(text, heading)
        assert {len(row) for row in table} == {len(table[0])}, heading
    assert "b\\|c \\*d\\* \\`e\\`" in text


def test_a_run_without_figures_is_said_not_to_be_judged(run: Run, exported: tuple[Path, dict[str, Any]]) -> None:
    kept = (run.path / "metrics.json").rename(run.path / "kept.json")
    try:
        text = card(run, *exported)
    finally:
        kept.rename(run.path / "metrics.json")
    assert "Not judged" in text
    assert "## Calibration" not in text
    assert "No test images" in text


def test_its_costs_are_those_that_were_timed(run: Run, exported: tuple[Path, dict[str, Any]]) -> None:
    one = {"parameters": 1234, "macs": 5_000_000, "file_bytes": 1_000_000, "peak_memory_bytes": 2_000_000}
    one |= {"latency_ms_batch1": {"median": 1.5, "p95": 2.5}, "images_per_second": 640.0}
    text = card(run, *exported, efficiency={"student": one, "teacher": one | {"parameters": 99_999}})
    costs = rows(text, "What it costs")
    assert costs[0] == ["", "this model", "its teacher"]
    assert costs[2] == ["parameters", "1,234", "99,999"]
    assert ["ms for one image, median (95th percentile)", "1.50 (2.50)", "1.50 (2.50)"] in costs
    assert "Not timed here" in card(run, *exported)


def test_another_models_card_is_left_alone(run: Run, exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(b"x")
    (first := tmp_path / exported[0].name).write_bytes(b"x")
    files = {"onnx": {"path": str(first), "max_abs_diff": 0.0}}
    assert write_card(run, first, files) == tmp_path / "model_card.md"
    before = (tmp_path / "model_card.md").read_bytes()
    assert write_card(run, first, files) == tmp_path / "model_card.md"
    assert write_card(run, other, files) == tmp_path / "other.model_card.md"
    assert (tmp_path / "model_card.md").read_bytes() == before


def test_licences_are_followed_back_to_the_first_run(run: Run, tmp_path: Path) -> None:
    info = read_json(run.path / "run.json")
    timm = {
        "function": "histill.models.adapter:Timm",
        "arguments": {"name": "resnet18", "classes": 2, "weights": "imagenet"},
    }
    (tmp_path / "teacher").mkdir()
    write_json(tmp_path / "teacher/run.json", info | {"network": timm})
    taught = info | {"teacher": {"key": "k"}, "recipe": {"arguments": {"teacher": str(tmp_path / "teacher")}}}
    said = origins(replace(run, info=taught))
    assert said[0] == "This model (DSNet) started from random weights."
    assert re.fullmatch(
        r"Its teacher \(Timm resnet18\) started from published weights \(`resnet18`.*licence: .+\)\.", said[1]
    )
    several = info | {"teacher": {"key": "k"}, "recipe": {"arguments": {"teacher": ["uni2-h", "h0-mini=/a/b.pt"]}}}
    said = origins(replace(run, info=several))
    assert "uni2-h" in said[1]
    assert "CC-BY-NC-ND-4.0" in said[1]
    assert "h0-mini" in said[2]
    assert "/a/b.pt" not in "".join(said)
    unknown = info | {"teacher": {"key": "k"}, "recipe": {"arguments": {"teacher": "/secret/place/embeddings"}}}
    assert origins(replace(run, info=unknown))[1] == "It learnt from `place/embeddings`: licence not known."


def test_export_writes_it(run: Run, tmp_path: Path) -> None:
    hs.export(run, tmp_path / "student.pt", format="torchscript")
    text = (tmp_path / "model_card.md").read_text(encoding="utf-8")
    assert text.startswith("# Model card: student.pt\n")
    assert "+0.0 points" in text
