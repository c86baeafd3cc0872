"""A run, its ONNX file and its TorchScript file say the same of the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import SIZE, bytes_of, no_page, table

import histill as hs
from histill import cli
from histill.data import Images, pack
from histill.deploy.deliver import open_any
from histill.errors import BadInput
from histill.machine import find_device
from histill.recipes import dsnet
from histill.run import Run

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def run(data: Images, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histill.evaluate.finish.finish", no_page)
        made = dsnet.student(data=data, image_size=SIZE, epochs=3, batch_size=8, lr=0.003)
        return hs.train(made, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("exported")
    return {
        **hs.export(run, folder / "student.onnx", int8=True).files,
        **hs.export(run, folder / "student.pt", format="torchscript").files,
        **hs.export(run, folder / "qupath", format="qupath", mpp=0.5).files,
    }


def test_the_list_of_images_is_not_written_over(tmp_path: Path) -> None:
    listed = tmp_path / "images.csv"
    listed.write_text("path\na.png\n")
    (tmp_path / "other.csv").symlink_to(listed)
    for out in (listed, tmp_path / "other.csv"):
        with pytest.raises(BadInput, match="give another file"):
            hs.predict(tmp_path / "model.onnx", listed, out)
    assert listed.read_text() == "path\na.png\n"


def test_an_export_is_checked_against_its_run(run: Run, exported: dict[str, Any]) -> None:
    test = run.predictions.query("split == 'test'")
    accuracy = (test["prediction"] == test["label"]).mean()
    assert list(exported) == ["onnx", "int8", "torchscript", "qupath"]
    for name, found in exported.items():
        assert set(found) == {"path", "max_abs_diff", "accuracy", "accuracy_lost"}
        assert Path(found["path"]).exists()
        assert found["accuracy"] + found["accuracy_lost"] == pytest.approx(accuracy)
        if name != "int8":
            assert found["max_abs_diff"] < 1e-4
            assert found["accuracy_lost"] == 0
    assert 1e-6 < exported["int8"]["max_abs_diff"] < 0.5
    assert Path(exported["int8"]["path"]).name == "student.int8.onnx"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_run_and_its_exports_predict_the_same(
    run: Run, exported: dict[str, Any], data: Images, tmp_path: Path, suffix: str
) -> None:
    packed = pack(data, SIZE)
    with torch.no_grad():
        p = run.network()(packed.batch(np.arange(40)).images)["logits"].softmax(1).numpy()
    expected = dict(zip(data.frame["path"], p))
    for model in (run.path, exported["onnx"]["path"], exported["torchscript"]["path"]):
        out = tmp_path / f"out{suffix}"
        assert cli.run(["predict", str(model), str(data.root), "--out", str(out)]) == 0
        table = pd.read_csv(out) if suffix == ".csv" else pd.read_parquet(out)
        assert list(table.columns) == ["image", "prediction", "prob_benign", "prob_malignant"]
        assert set(table["image"]) == set(expected)
        found = table[["prob_benign", "prob_malignant"]].to_numpy()
        np.testing.assert_allclose(found, np.stack([expected[name] for name in table["image"]]), atol=1e-4)
        assert (table["prediction"] == np.where(found[:, 0] >= found[:, 1], "benign", "malignant")).all()


def test_runs_compute_on_the_device_that_is_named(
    run: Run, exported: dict[str, Any], data: Images, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = data.root / data.frame["path"][0]
    tokens = {"predict": ["predict", str(run.path), str(image), "--out", str(tmp_path / "o.csv")]}
    tokens |= {"evaluate": ["evaluate", str(run.path), "--data", str(data.root)], "bench": ["bench", str(run.path)]}
    for words in tokens.values():
        assert cli.run([*words, "--device", "tpu"]) == 2
        assert "--device tpu: one of auto, cpu, cuda, cuda:1, mps" in capsys.readouterr().err
    predicted = [hs.predict(run.path, image, device=device)["prob_benign"][0] for device in ("cpu", "auto")]
    assert predicted[0] == pytest.approx(predicted[1], abs=1e-3)
    assert open_any(run.path, device="auto").network.fc.weight.device.type == find_device("auto").type  # type: ignore[attr-defined]
    for module in ("histill.deploy.deliver", "histill.machine"):  # as on a machine with another device
        monkeypatch.setattr(f"{module}.find_device", lambda name: torch.device("cuda"))
    said = {}
    for device in ("auto", "cuda"):
        said[device] = (hs.predict(exported["onnx"]["path"], image, device=device), capsys.readouterr().err)
    assert said["auto"][0].equals(said["cuda"][0])
    assert "runs on the CPU" in said["cuda"][1]
    assert "runs on the CPU" not in said["auto"][1]


def test_a_manifest_or_an_image_is_predicted(run: Run, data: Images) -> None:
    listed = data.frame["path"].tolist()[3:6]
    manifest = data.root / "some.csv"
    manifest.write_text("path\n" + "\n".join(listed))
    try:
        assert hs.predict(run.path, manifest)["image"].tolist() == listed
    finally:
        manifest.unlink()
    assert hs.predict(run.path, data.root / listed[0])["image"].tolist() == [Path(listed[0]).name]


def test_an_unreadable_image_is_left_out_and_named(run: Run, data: Images, tmp_path: Path, capsys: Any) -> None:
    for name in data.frame["path"][:3]:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes((data.root / name).read_bytes())
    (tmp_path / "images/broken.png").write_bytes(b"\x89PNG nothing")
    table = hs.predict(run.path, tmp_path / "images")
    assert len(table) == 3
    assert "1 unreadable images were left out: " in (said := capsys.readouterr().err)
    assert "broken.png" in said
    with pytest.raises(BadInput, match=r"1 unreadable images: .*broken.png"):
        hs.predict(run.path, tmp_path / "images", strict=True)


def test_wrong_predictions_are_refused(run: Run, data: Images, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="end it in"):
        hs.predict(run.path, data.root, tmp_path / "out.xlsx")
    with pytest.raises(BadInput, match="no such image, folder or manifest"):
        hs.predict(run.path, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no images in it"):
        hs.predict(run.path, tmp_path / "empty")
    with pytest.raises(BadInput, match="not a run folder"):
        hs.predict(tmp_path, data.root)


def test_wrong_exports_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--int8 goes with --format onnx"):
        hs.export(run, tmp_path / "a.pt", format="torchscript", int8=True)
    with pytest.raises(BadInput, match="give --mpp"):
        hs.export(run, tmp_path / "q", format="qupath")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("model.safetensors", "onnx"),
        ("run.json", "onnx"),
        ("data.csv", "torchscript"),
        ("checkpoint.pt", "torchscript"),
    ],
)
def test_an_export_writes_over_no_file_of_the_run(run: Run, name: str, format: Any) -> None:
    before = bytes_of(run.path)
    with pytest.raises(BadInput, match=f"--out .*{name}"):
        hs.export(run, run.path / name, format=format)
    assert bytes_of(run.path) == before


def test_qupath_gets_its_folder(run: Run, exported: dict[str, Any]) -> None:
    folder = Path(exported["qupath"]["path"])
    assert set(bytes_of(folder)) == {"torchscript_model.pt", "config.json", "model_card.md"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["class_names"]) == ("DSNet", ["benign", "malignant"])
    assert (config["patch_size_pixels"], config["spacing_um_px"]) == (SIZE, 0.5)


def test_bench_sets_models_side_by_side(run: Run, exported: dict[str, Any]) -> None:
    summary, text = hs.deploy.bench([run.path, Path(exported["onnx"]["path"])], batch_size=4, seconds=0.2)
    first, second = summary.values()
    assert first["parameters"] == sum(p.numel() for p in run.network().parameters())
    assert first["macs"] == hs.evaluate.macs(run.network(), SIZE)
    assert second["file_bytes"] == Path(exported["onnx"]["path"]).stat().st_size
    for found in (first, second):
        assert found["latency_ms_batch1"]["median"] <= found["latency_ms_batch1"]["p95"]
        assert found["latency_ms_batch4"]["median"] == pytest.approx(4e3 / found["images_per_second"])
        assert found["device"] == "cpu"
    assert first["peak_memory_bytes"] is None
    assert second["peak_memory_bytes"] > second["file_bytes"]
    assert len({len(line) for line in text.splitlines()}) == 1, "the columns are aligned"
