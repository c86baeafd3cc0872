"""OpenVINO's form of an export says what the network says, in float32 and int8, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SIZE, no_page, table
from torch import Tensor, nn

import histill as hs
from histill.deploy import check_parity, open_model, quantize, to_onnx, to_openvino
from histill.deploy.deliver import bench
from histill.errors import BadInput, Failed
from histill.recipes import dsnet
from histill.types import Outputs

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

CLASSES = ("naïve 中文", 'a "quoted", <name> & co', "b\\c\n\x01")


class Tiny(nn.Module):
    """Two convolutions, batch norm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(logits=self.head(self.features(images).mean((2, 3))))


def images(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).random((count, 3, SIZE, SIZE), dtype=np.float32)


@pytest.fixture(scope="module")
def network() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def folder(network: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as a.onnx and a.xml, and in int8 as b.onnx and b.xml."""
    folder = tmp_path_factory.mktemp("exported")
    to_onnx(network, folder / "a.onnx", image_size=SIZE, classes=CLASSES, mpp=0.5)
    quantize(folder / "a.onnx", folder / "b.onnx", [images(8)])
    for name in "ab":
        to_openvino(folder / f"{name}.onnx", folder / f"{name}.xml")
    return folder


@pytest.mark.parametrize("count", [1, 3, 8])
def test_it_gives_the_networks_logits_for_any_batch_size(network: Tiny, folder: Path, count: int) -> None:
    batch = images(count, seed=count)
    with torch.no_grad():
        expected = network(torch.from_numpy(batch))["logits"].numpy()
    found = open_model(folder / "a.xml", threads=1)
    np.testing.assert_allclose(found.logits(batch), expected, atol=1e-5)
    np.testing.assert_allclose(found(batch).sum(1), 1, atol=1e-6)
    before = found.logits(batch)
    kept = before.copy()
    found.logits(1 - batch)
    np.testing.assert_array_equal(before, kept)  # an answer is not written over by the next one


def test_it_knows_its_classes_size_and_resolution(folder: Path) -> None:
    for name in "ab":
        found = open_model(folder / f"{name}.xml")
        assert (found.classes, found.image_size, found.mpp) == (CLASSES, SIZE, 0.5)


def test_int8_rounds_as_onnx_runtime_does(folder: Path) -> None:
    batch = images(8, seed=1)
    plain, small, theirs = (open_model(folder / name).logits(batch) for name in ("a.xml", "b.xml", "b.onnx"))
    rounding = np.abs(theirs - plain).max()
    assert rounding > 0
    assert np.abs(small - theirs).max() < rounding


def test_a_damaged_file_is_bad_input(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "a.xml").read_bytes()
    (tmp_path / "alone.xml").write_bytes(whole)
    with pytest.raises(BadInput, match=r"without its weights, alone\.bin"):
        open_model(tmp_path / "alone.xml")
    (tmp_path / "half.xml").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "half.bin").write_bytes((folder / "a.bin").read_bytes())
    with pytest.raises(BadInput, match="not a usable OpenVINO model"):
        open_model(tmp_path / "half.xml")
    (tmp_path / "short.xml").write_bytes(whole)
    (tmp_path / "short.bin").write_bytes(b"")
    with pytest.raises(BadInput, match="not a usable OpenVINO model"):
        open_model(tmp_path / "short.xml")


def test_what_is_no_onnx_file_is_bad_input_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(BadInput, match="not a usable ONNX model"):
        to_openvino(tmp_path / "a.onnx", tmp_path / "a.xml")
    with pytest.raises(BadInput, match=r"end in \.xml"):
        to_openvino(folder / "a.onnx", tmp_path / "a.ir")
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_an_export_that_differs_is_deleted_with_its_weights(folder: Path, tmp_path: Path) -> None:
    to_openvino(folder / "a.onnx", tmp_path / "a.xml")
    assert {file.name for file in tmp_path.iterdir()} == {"a.xml", "a.bin"}
    torch.manual_seed(1)
    with pytest.raises(Failed, match="differs from the network"):
        check_parity(Tiny().eval(), tmp_path / "a.xml", images(4))
    assert not list(tmp_path.iterdir())


def test_a_run_is_exported_and_predicts_the_same(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histill.evaluate.finish.finish", no_page)
        made = dsnet.student(data=data, image_size=SIZE, epochs=1, batch_size=8)
        run = hs.train(made, tmp_path / "run", precision="32-true")
    exported = hs.export(run, format="openvino", int8=True)
    found = exported.files
    assert found["openvino"]["path"] == str(run.path / "model.xml")
    assert found["openvino"]["max_abs_diff"] < 1e-4
    assert found["openvino"]["accuracy_lost"] == 0
    assert found["int8"]["path"] == str(run.path / "model.int8.xml")
    assert 1e-6 < found["int8"]["max_abs_diff"] < 0.5
    ours, theirs = (hs.predict(path, data.root) for path in (run.path, run.path / "model.xml"))
    np.testing.assert_allclose(ours.filter(like="prob_"), theirs.filter(like="prob_"), atol=1e-5)
    assert "(+0.0 points)" in str(exported.lines())
    timed, _ = bench([run.path / "model.xml"], seconds=0.05)
    sizes = (run.path / "model.xml").stat().st_size + (run.path / "model.bin").stat().st_size
    assert [row["file_bytes"] for row in timed.values()] == [sizes]
