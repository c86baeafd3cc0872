"""One run over one slide says the same in PyTorch and in every file that is exported from it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip("shapely")
pytest.importorskip("tifffile")
pytest.importorskip("openslide")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import slides_tiny
from slides_tiny import CLASSES, PINK, PURPLE, TILE

import histill as hs
from histill.data import read_images, split
from histill.deploy.deliver import export
from histill.models import MSDNet
from histill.recipes import multi_exit
from histill.run import Run
from histill.slides.predict import predict_slide

PROBABILITIES = [f"prob_{name}" for name in CLASSES]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A network with two exits that has learnt pink from purple."""
    home = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for name, colour in zip(CLASSES, (PINK, PURPLE)):
        (home / "data" / name).mkdir(parents=True)
        for i in range(24):
            pixels = np.array(colour) + rng.integers(-25, 26, (TILE, TILE, 3)) + rng.integers(-15, 16)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(home / "data" / name / f"{i}.png")
    data = split(read_images(home / "data"), val=0.25, test=0.25)
    small = {"scales": 2, "blocks": 2, "base": 1, "step": 1, "channels": 4, "growth": 2, "stem": "cifar"}
    made = multi_exit.student(data, network="msdnet", image_size=TILE, epochs=6, batch_size=8, lr=0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTILL_CACHE", str(home / "cache"))
        student: Any = partial(MSDNet, classes=2, **small)
        return hs.train(replace(made, student=student), home / "run", precision="32-true", device="cpu")


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model.onnx``, ``model.int8.onnx``, ``model.pt``, ``model.xml``, ``qupath/`` and ``exits/``."""
    home = tmp_path_factory.mktemp("exported")
    export(run, home / "model.onnx", int8=True, mpp=1.0)
    export(run, home / "model.pt", format="torchscript", mpp=1.0)
    export(run, home / "qupath", format="qupath", mpp=1.0)
    export(run, home / "exits", early_exit=0.5, mpp=1.0)
    try:
        import openvino  # noqa: F401
    except ImportError:
        return home
    export(run, home / "model.xml", format="openvino", mpp=1.0)
    return home


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slides_tiny.slide(tmp_path_factory.mktemp("slides") / "one.tif", width=512, height=512)


@pytest.fixture(scope="module")
def whole(run: Run, slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run itself in PyTorch and float32."""
    out = tmp_path_factory.mktemp("whole")
    predict_slide(run.path, slide, out, runtime="torch", precision="32-true", mpp=1.0)
    return out / "one"


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("model.onnx", 1e-4),
        ("model.pt", 1e-4),
        ("qupath/torchscript_model.pt", 1e-4),
        ("model.xml", 1e-3),
        ("model.int8.onnx", 0.1),
    ],
)
def test_an_exported_file_says_what_the_run_says(
    name: str, apart: float, exported: Path, slide: Path, whole: Path, run: Run, tmp_path: Path
) -> None:
    if not (exported / name).exists():
        pytest.skip("OpenVINO is not installed")
    said = predict_slide(exported / name, slide, tmp_path)
    ours, theirs = (pd.read_parquet(home / "tiles.parquet") for home in (tmp_path / "one", whole))
    pd.testing.assert_frame_equal(ours.drop(columns=PROBABILITIES), theirs.drop(columns=PROBABILITIES))
    assert np.abs(ours[PROBABILITIES].to_numpy() - theirs[PROBABILITIES].to_numpy()).max() < apart
    assert theirs["prob_tumour"].min() < 0.2 < 0.8 < theirs["prob_tumour"].max()
    before = json.loads((whole / "slide.json").read_text())
    assert said["call"]["label"] == before["call"]["label"]
    if not name.startswith("qupath"):  # WSInfer's config has no place for a temperature
        assert run.temperature is not None
        assert said["settings"]["temperature"] == pytest.approx(run.temperature)
        assert said["call"]["calibrated"] is True
        assert said["call"]["probability"] == pytest.approx(before["call"]["probability"], abs=2 * apart)


def test_exit_segments_leave_and_agree(exported: Path, slide: Path, whole: Path, run: Run, tmp_path: Path) -> None:
    card = json.loads((exported / "exits" / "exits.json").read_text())
    for name, threshold in (("all", 2.0), ("some", card["threshold"])):
        (exported / "exits" / "exits.json").write_text(json.dumps(card | {"threshold": threshold}))
        predict_slide(exported / "exits", slide, tmp_path / name)
    stayed, left = (pd.read_parquet(tmp_path / name / "one" / "tiles.parquet") for name in ("all", "some"))
    theirs = pd.read_parquet(whole / "tiles.parquet")
    assert (stayed["exit"] == 2).all()
    assert np.abs(stayed[PROBABILITIES].to_numpy() - theirs[PROBABILITIES].to_numpy()).max() < 1e-4
    assert (left["exit"] == 1).any()
    summary = json.loads((tmp_path / "some" / "summary.json").read_text())
    assert summary["exits"]["1"] == pytest.approx((left["exit"] == 1).mean())


def test_exits_are_counted_behind_a_wide_look(exported: Path, slide: Path, tmp_path: Path) -> None:
    said = predict_slide(exported / "exits", slide, tmp_path, coarse_to_fine=0.995)
    table = pd.read_parquet(tmp_path / "one" / "tiles.parquet")
    assert ((table["exit"] == 0) == table["coarse"]).all()
    assert sum(said["exits"].values()) == said["tiles"]["by_pass"]["fine"]
