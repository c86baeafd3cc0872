"""A run compiled for the CPU says of tiles what it says in PyTorch, and PyTorch answers where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")
pytest.importorskip("shapely")

from histill.deploy.openvino import OpenVinoPredictor
from histill.errors import BadInput
from histill.files import cache_dir
from histill.models import Timm
from histill.slides.engine import load_model

SIZE = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small network whose answers differ from tile to tile."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    torch.manual_seed(0)
    network = Timm("resnet10t", 3)
    with torch.no_grad():
        network.network.fc.weight.mul_(20)
    save_file(network.state_dict(), folder / "model.safetensors")
    card = {
        "recipe": {"name": "none", "arguments": {}},
        "network": {"function": "histill.models.adapter:Timm", "arguments": {"name": "resnet10t", "classes": 3}},
        "classes": ["a", "b", "c"],
        "image_size": SIZE,
        "status": "finished",
        "select": "last",
        "positive": None,
        "data": {"hash": ""},
    }
    (folder / "run.json").write_text(json.dumps(card))
    return folder


@pytest.fixture(autouse=True)
def _one_cache(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting takes seconds; the tests share what is kept."""
    monkeypatch.setenv("HISTILL_CACHE", str(run.parent / "cache"))


def tiles(size: int = SIZE) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).random((5, 3, size, size), np.float32)


def test_it_says_the_same_and_converts_once(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = load_model(run, precision="32-true", runtime="torch")
    assert plain.fast is None
    expected = plain.look(tiles())["probabilities"]
    assert np.ptp(expected, axis=0).max() > 0.02
    assert "compiling" not in capfd.readouterr().err
    for times in (1, 0):
        model = load_model(run, precision="32-true")
        assert capfd.readouterr().err.count("compiling small for this CPU, once") == times
        assert isinstance(model.fast, OpenVinoPredictor)
        assert (model.runtime, model.digest) == ("OpenVino", plain.digest)
        assert np.abs(model.look(tiles())["probabilities"] - expected).max() < 1e-4
    rough = load_model(run, precision="bf16").look(tiles())["probabilities"]
    assert 0 <= np.abs(rough - expected).max() < 0.05


def test_pytorch_answers_for_features_and_for_tiles_of_another_size(run: Path) -> None:
    plain, model = (load_model(run, precision="32-true", runtime=runtime) for runtime in ("torch", "auto"))
    both = model.look(tiles(), features=True)
    assert both["features"].shape == (5, 512)
    wide = [each.look(tiles(48))["probabilities"] for each in (plain, model)]
    assert np.array_equal(*wide)


def test_what_openvino_does_not_take_runs_in_pytorch_and_says_so(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(run)  # is kept now
    (kept,) = cache_dir("openvino").glob("*.xml")
    kept.write_text("<net")
    model = load_model(run)
    assert model.fast is None
    assert "small runs in PyTorch, as OpenVINO does not take it" in capfd.readouterr().err
    kept.unlink()
    with pytest.raises(BadInput, match="--runtime tpu: auto or torch"):
        load_model(run, runtime="tpu")
