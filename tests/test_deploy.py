"""What is deployed says the same as the network, about itself and about images, or is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from histill.deploy import (
    Predictor,
    TorchPredictor,
    TorchScriptPredictor,
    check_parity,
    efficiency,
    latency,
    open_model,
    peak_memory,
    predict_folder,
    quantize,
    to_onnx,
    to_qupath,
    to_torchscript,
)
from histill.errors import BadInput, Failed
from histill.types import Outputs

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIZE = 24
CLASSES = ("naïve 中文", 'a "quoted", name', "b\\c\n")


class Tiny(nn.Module):
    """Two convolutions with batch norm; normalises for itself; names more than its logits."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.ReLU(),
            nn.Dropout(0.5),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Outputs:
        features = self.features((images - 0.5) / 0.25)
        pooled = features.mean((2, 3))
        return Outputs(logits=self.head(pooled), features=features)


def images(count: int, seed: int = 0, size: int = SIZE) -> Any:
    return np.random.default_rng(seed).random((count, 3, size, size), dtype=np.float32)


def gratings(count: int, seed: int) -> tuple[Any, Any]:
    """Three classes of stripes: upright, level, none."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    wave = 0.25 * np.sin(np.arange(SIZE) * 1.3 + draw.random((count, 1)) * 6)
    upright = np.broadcast_to(wave[:, None, None, :], (count, 3, SIZE, SIZE))
    stripes = np.where((labels == 0)[:, None, None, None], upright, upright.swapaxes(2, 3))
    stripes = np.where((labels == 2)[:, None, None, None], 0, stripes)
    pixels = 0.5 + stripes + draw.normal(0, 0.1, (count, 3, SIZE, SIZE))
    return pixels.clip(0, 1).astype(np.float32), labels


@pytest.fixture(scope="module")
def network() -> Tiny:
    """Trained until it tells the stripes apart."""
    torch.manual_seed(0)
    network = Tiny(width=16)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(40):
        pixels, labels = gratings(32, seed=100 + step)
        loss = nn.functional.cross_entropy(network(torch.from_numpy(pixels))["logits"], torch.from_numpy(labels))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


@pytest.fixture(scope="module")
def exported(network: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the network as student.onnx and student.pt."""
    folder = tmp_path_factory.mktemp("exported")
    card: dict[str, Any] = {"image_size": SIZE, "classes": CLASSES, "mpp": 0.5, "extra": {"run": "r1"}}
    to_onnx(network, folder / "student.onnx", **card)
    to_torchscript(network, folder / "student.pt", **card)
    return folder


@pytest.fixture(params=["student.onnx", "student.pt"])
def file(request: pytest.FixtureRequest, exported: Path) -> Path:
    return exported / request.param


@pytest.mark.parametrize("count", [1, 3, 8])
def test_an_export_gives_the_networks_logits_for_any_batch_size(network: Tiny, file: Path, count: int) -> None:
    batch = images(count, seed=count)
    with torch.no_grad():
        expected = network(torch.from_numpy(batch))["logits"].numpy()
    found = open_model(file, threads=1)
    np.testing.assert_allclose(found.logits(batch), expected, atol=1e-5)
    odds = np.exp(expected.astype(np.float64))
    np.testing.assert_allclose(found(batch), odds / odds.sum(1, keepdims=True), atol=1e-5)


def test_an_export_knows_its_classes_size_and_resolution(file: Path) -> None:
    found = open_model(file)
    assert (found.classes, found.image_size, found.mpp) == (CLASSES, SIZE, 0.5)


def test_an_onnx_file_has_the_stated_input_output_and_opset(exported: Path) -> None:
    model = onnx.load(exported / "student.onnx")
    onnx.checker.check_model(model, full_check=True)
    (entry,), (result,) = model.graph.input, model.graph.output
    assert (entry.name, result.name) == ("images", "logits")
    assert [d.dim_value for d in entry.type.tensor_type.shape.dim] == [0, 3, SIZE, SIZE]
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in (entry, result)} == {"batch"}
    assert [opset.version for opset in model.opset_import if not opset.domain] == [18]
    assert json.loads({p.key: p.value for p in model.metadata_props}["histill"])["run"] == "r1"


def test_an_onnx_file_names_no_path_of_the_machine_that_made_it(exported: Path) -> None:
    content = (exported / "student.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(Path(__file__).parent).encode() not in content


@pytest.mark.parametrize(("write", "name"), [(to_onnx, "student.onnx"), (to_torchscript, "student.pt")])
def test_an_export_leaves_the_network_and_the_folder_as_they_were(
    network: Tiny, exported: Path, tmp_path: Path, write: Callable[..., Path], name: str
) -> None:
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    try:
        again = write(network, tmp_path / name, image_size=SIZE, classes=CLASSES, mpp=0.5, extra={"run": "r1"})
        assert network.training
    finally:
        network.eval()
    assert all(weight.requires_grad for weight in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    # TorchScript counts the traces of a process in the names of its types.
    assert name.endswith(".pt") or again.read_bytes() == (exported / name).read_bytes()


def test_a_wrong_number_of_names_is_refused(network: Tiny, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has 3 classes, but 2 names"):
        to_onnx(network, tmp_path / "m.onnx", image_size=SIZE, classes=("a", "b"))
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_is_one_line_and_no_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Fickle(Tiny):
        def forward(self, images: Tensor) -> Outputs:
            outputs = super().forward(images)
            return outputs if outputs["logits"].sum() > 1e9 else Outputs(logits=2 * outputs["logits"])

    with pytest.raises(Failed, match=r"cannot express Fickle in ONNX \(.*data-dependent") as caught:
        to_onnx(Fickle(), tmp_path / "m.onnx", image_size=SIZE, classes=("a", "b", "c"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [7, 8])
def test_adaptive_max_pooling_is_exported_for_windows_that_overlap_or_not(tmp_path: Path, size: int) -> None:
    class Pyramid(nn.Module):
        def forward(self, images: Tensor) -> Outputs:
            pools = [nn.functional.adaptive_max_pool2d(images, cells).flatten(1) for cells in (1, 2, 4)]
            return Outputs(logits=torch.cat(pools, dim=1))

    path = to_onnx(Pyramid(), tmp_path / "m.onnx", image_size=size, classes=[str(index) for index in range(63)])
    assert check_parity(Pyramid(), path, images(3, size=size)) == {"max_abs_diff": 0.0}


def test_parity_is_the_largest_difference_of_the_logits(network: Tiny, file: Path) -> None:
    batch = images(40)
    found = check_parity(network, file, batch)["max_abs_diff"]
    difference = open_model(file).logits(batch) - TorchPredictor(network, CLASSES, SIZE).logits(batch)
    assert 0 <= found < 1e-4
    assert found == pytest.approx(np.abs(difference).max(), abs=1e-5)


def test_a_shifted_export_is_refused_by_its_largest_difference_and_deleted(
    network: Tiny, file: Path, tmp_path: Path
) -> None:
    bad = tmp_path / file.name
    bad.write_bytes(file.read_bytes())
    other = Tiny(width=16)
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        other.head.bias[1] += 0.25
    with pytest.raises(Failed, match=r"up to 0\.25 in its logits") as caught:
        check_parity(other, bad, images(4))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_tolerance_is_absolute_however_large_the_logits(network: Tiny) -> None:
    scaled, shifted = Tiny(width=16), Tiny(width=16)
    for other, shift in ((scaled, 0.0), (shifted, 0.5)):
        other.load_state_dict(network.state_dict())
        with torch.no_grad():
            other.head.weight *= 1000
            other.head.bias += shift
    export = TorchPredictor(shifted, CLASSES, SIZE)
    assert np.abs(export.logits(images(4))).max() > 500
    with pytest.raises(Failed, match=r"up to 0\.5 "):
        check_parity(scaled, export, images(4))
    assert check_parity(scaled, export, images(4), tolerance=0.6)["max_abs_diff"] == pytest.approx(0.5, abs=1e-3)


def test_an_export_that_is_not_a_number_is_refused(network: Tiny) -> None:
    broken = Tiny(width=16)
    broken.load_state_dict(network.state_dict())
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    with pytest.raises(Failed, match="nan"):
        check_parity(network, TorchPredictor(broken, CLASSES, SIZE), images(2))


def test_a_graph_that_kept_the_batch_size_of_its_tracing_is_found(tmp_path: Path) -> None:
    class Frozen(Tiny):
        def forward(self, images: Tensor) -> Outputs:
            return Outputs(logits=super().forward(images)["logits"].reshape(len(images) * 1, 3))

    class Stuck(Frozen):
        def forward(self, images: Tensor) -> Outputs:
            count = int(images.sum(dtype=torch.float64) * 0) + len(images.tolist())
            return Outputs(logits=super().forward(images)["logits"].reshape(count, 3))

    to_torchscript(Frozen(), tmp_path / "good.pt", image_size=SIZE, classes="abc")
    to_torchscript(Stuck(), tmp_path / "stuck.pt", image_size=SIZE, classes="abc")
    with pytest.raises(BadInput, match="does not take images"):
        check_parity(Stuck(), tmp_path / "stuck.pt", images(5))
    module = torch.jit.load(tmp_path / "stuck.pt")
    with pytest.raises(Failed, match="batch of 1"):
        check_parity(Stuck(), TorchScriptPredictor(module, tuple("abc"), SIZE), images(5))


def test_int8_keeps_the_answers_and_what_the_file_says(network: Tiny, exported: Path, tmp_path: Path) -> None:
    calibration, _ = gratings(48, seed=1)
    test, labels = gratings(300, seed=2)
    small = quantize(exported / "student.onnx", tmp_path / "student.int8.onnx", np.split(calibration, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["student.int8.onnx"]
    found = open_model(small, threads=1)
    assert (found.classes, found.image_size, found.mpp) == (CLASSES, SIZE, 0.5)
    exact = TorchPredictor(network, CLASSES, SIZE).logits(test)
    accuracy = (exact.argmax(1) == labels).mean()
    assert accuracy > 0.95
    assert (found.logits(test).argmax(1) == labels).mean() >= accuracy - 0.01
    rounding = np.sqrt(((found.logits(test) - exact) ** 2).mean())
    assert 1e-4 * exact.std() < rounding < 0.05 * exact.std()
    kinds = {node.op_type for node in onnx.load(small).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert check_parity(network, small, test, tolerance=float(exact.std()))["max_abs_diff"] > 1e-4
    with pytest.raises(Failed):
        check_parity(network, small, test)


def test_int8_needs_images_and_a_model(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no calibration image"):
        quantize(exported / "student.onnx", tmp_path / "q.onnx", [])
    with pytest.raises(BadInput, match="not a usable ONNX model"):
        quantize(exported / "student.pt", tmp_path / "q.onnx", [images(2)])
    with pytest.raises(BadInput, match="no such file"):
        quantize(tmp_path / "none.onnx", tmp_path / "q.onnx", [images(2)])
    assert not list(tmp_path.iterdir())


def test_the_qupath_folder_runs_as_wsinfer_runs_it(network: Tiny, tmp_path: Path) -> None:
    folder = to_qupath(network, tmp_path / "m", image_size=SIZE, classes=CLASSES, mpp=0.5, architecture="tiny")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "torchscript_model.pt"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config == {
        "spec_version": "1.0",
        "architecture": "tiny",
        "num_classes": 3,
        "class_names": list(CLASSES),
        "patch_size_pixels": SIZE,
        "spacing_um_px": 0.5,
        "transform": [{"name": "Resize", "arguments": {"size": SIZE}}, {"name": "ToTensor"}],
    }
    # WSInfer cuts a patch, resizes the PIL image bilinearly, scales bytes to [0, 1], runs, applies the softmax.
    pixels = (images(1, seed=4, size=50)[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    patch = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    tensor = torch.from_numpy(np.asarray(patch).transpose(2, 0, 1).copy()).float().div(255)[None]
    module = torch.jit.load(folder / "torchscript_model.pt").eval()
    with torch.no_grad():
        theirs = torch.softmax(module(tensor), dim=1).numpy()
    ours = TorchPredictor(network, CLASSES, SIZE)(tensor.numpy())
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert open_model(folder / "torchscript_model.pt").mpp == 0.5


@pytest.mark.parametrize(("wrong", "word"), [({"mpp": None}, "--mpp"), ({"classes": ("a", "a", "b")}, "differ")])
def test_qupath_needs_a_resolution_and_names_that_differ(tmp_path: Path, wrong: dict[str, Any], word: str) -> None:
    given = {"image_size": SIZE, "classes": CLASSES, "mpp": 0.5, "architecture": "tiny"} | wrong
    with pytest.raises(BadInput, match=word):
        to_qupath(Tiny(), tmp_path / "m", **given)
    assert not list(tmp_path.iterdir())


def without_card(source: Path, target: Path, size: int | str = SIZE, count: int | str = "n") -> Path:
    """A file of another origin: no card, other names, sizes fixed or free."""
    model = onnx.load(source)
    del model.metadata_props[:]
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "images" else name for name in node.input]
    model.graph.input[0].name = "pixels"
    del model.graph.value_info[:]
    for axis, side in ((0, count), (2, size), (3, size)):
        dim = model.graph.input[0].type.tensor_type.shape.dim[axis]
        setattr(dim, "dim_param" if isinstance(side, str) else "dim_value", side)
    onnx.save(model, target)
    return target


def test_a_foreign_onnx_file_gets_numbered_classes_and_its_static_size(exported: Path, tmp_path: Path) -> None:
    found = open_model(without_card(exported / "student.onnx", tmp_path / "foreign.onnx"))
    assert (found.classes, found.image_size, found.mpp) == (("class0", "class1", "class2"), SIZE, None)
    ours = open_model(exported / "student.onnx")
    assert np.array_equal(found(images(3)), ours(images(3)))


def test_a_foreign_file_without_a_size_must_be_told(network: Tiny, exported: Path, tmp_path: Path) -> None:
    free = without_card(exported / "student.onnx", tmp_path / "free.onnx", size="side")
    script = tmp_path / "foreign.torchscript"
    torch.jit.save(torch.jit.load(exported / "student.pt"), script)
    for path in (free, script):
        with pytest.raises(BadInput, match="does not say its image size"):
            open_model(path)
        assert open_model(path, image_size=40).image_size == 40
    with pytest.raises(BadInput, match="takes images of 24 pixels, not 40"):
        open_model(exported / "student.onnx", image_size=40)


def test_a_file_that_takes_one_image_at_a_time_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exactly 1 images at a time"):
        open_model(without_card(exported / "student.onnx", tmp_path / "one.onnx", count=1))


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_in_a_models_clothes_is_refused_and_not_run(tmp_path: Path) -> None:
    sign = tmp_path / "exploded"
    plain, zipped = tmp_path / "plain.pt", tmp_path / "zipped.pt"
    plain.write_bytes(pickle.dumps(Bomb(sign)))
    torch.save({"model": Bomb(sign)}, zipped)
    for path in (plain, zipped):
        with pytest.raises(BadInput, match="not a usable TorchScript model") as caught:
            open_model(path)
        assert "\n" not in str(caught.value)
    assert not sign.exists()


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_damaged_file_is_bad_input_in_one_line(file: Path, tmp_path: Path, keep: float) -> None:
    content = file.read_bytes()
    bad = tmp_path / file.name
    bad.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(BadInput, match=file.name) as caught:
        open_model(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("card", ["{", "[]", '{"classes": [], "image_size": 24, "mpp": null}', '{"classes": ["a"]}'])
def test_a_damaged_card_is_bad_input(exported: Path, tmp_path: Path, card: str) -> None:
    model = onnx.load(exported / "student.onnx")
    model.metadata_props[0].value = card
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BadInput, match="is damaged"):
        open_model(tmp_path / "m.onnx")


def test_a_card_that_disagrees_with_the_graph_is_bad_input(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported / "student.onnx")
    model.metadata_props[0].value = json.dumps({"classes": ["a", "b"], "image_size": SIZE, "mpp": None})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BadInput, match="not one logit for each"):
        open_model(tmp_path / "m.onnx")


def test_a_missing_or_unknown_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "m.h5").touch()
    for name, why in (("none.onnx", "no such file"), ("none.pt", "no such file"), ("m.h5", "not a model file")):
        with pytest.raises(BadInput, match=why):
            open_model(tmp_path / name)


def test_latency_is_ordered_and_adds_up(tmp_path: Path) -> None:
    small, large = (TorchPredictor(Tiny(width=width), CLASSES, 48) for width in (4, 64))
    rounds: list[int] = []
    pair: dict[str, Predictor] = {"large": large, "small": small}
    found = latency(pair, batch=2, repeats=20, progress=rounds.append)
    assert rounds == [1] * 20
    for each in found.values():
        assert 0 < each["latency_ms"]["median"] <= each["latency_ms"]["p95"]
        assert each["images_per_second"] == pytest.approx(2000 / each["latency_ms"]["median"])
        assert each["rounds"] == 20
        assert each["speedup"]["low"] <= each["speedup"]["value"] <= each["speedup"]["high"]
    assert found["large"]["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["small"]["speedup"]["value"] > 2
    assert found["small"]["latency_ms"]["median"] < found["large"]["latency_ms"]["median"]


def test_latency_stops_in_time_but_not_before_five_rounds() -> None:
    only: dict[str, Predictor] = {"one": TorchPredictor(Tiny(), CLASSES, SIZE)}
    assert latency(only, repeats=10_000, seconds=0)["one"]["rounds"] == 5


def test_efficiency_tells_what_a_model_costs(network: Tiny, exported: Path, tmp_path: Path) -> None:
    wide = Tiny(width=128)
    models: dict[str, tuple[nn.Module, Path]] = {
        "teacher": (wide, to_onnx(wide, tmp_path / "teacher.onnx", image_size=64, classes=CLASSES)),
        "student": (network, exported / "student.onnx"),
    }
    found = efficiency(models, batch=2, threads=1, repeats=6)
    student, teacher = found["student"], found["teacher"]
    # 3 x 16 x 9 weights, 16 x 2 of the norm, 16 x 16 x 9 + 16, 16 x 3 + 3.
    assert student["parameters"] == 432 + 32 + 2320 + 51
    convolutions = SIZE**2 * 432 + (SIZE // 2) ** 2 * 2304
    assert convolutions < student["macs"] < 1.2 * convolutions
    assert student["file_bytes"] == models["student"][1].stat().st_size
    assert student.keys() == teacher.keys()
    assert set(student["latency_ms_batch1"]) == {"median", "p95"}
    for figure in ("parameters", "macs", "file_bytes", "peak_memory_bytes"):
        assert 0 < student[figure] < teacher[figure]
    assert student["images_per_second"] > teacher["images_per_second"]
    # The teacher's weights and one of its feature maps (128 x 64 x 64 float32) must be resident at once.
    assert teacher["peak_memory_bytes"] > teacher["file_bytes"] + 4 * 128 * 64 * 64


def test_peak_memory_of_what_does_not_run_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(Failed, match="does not run in a process of its own"):
        peak_memory(tmp_path / "m.onnx")


def test_a_folder_is_predicted_in_order_and_past_unreadable_images(network: Tiny) -> None:
    pixels = images(7)
    paths = [Path(f"{index}.png") for index in range(7)]

    def load(path: Path) -> Any:
        if path.stem == "2":
            raise BadInput("2.png: damaged")
        if path.stem in "56":
            raise OSError("no space\nsecond line")
        return pixels[int(path.stem)]

    done: list[int] = []
    predictor = TorchPredictor(network, CLASSES, SIZE)
    found = list(predict_folder(predictor, paths, load, batch=3, progress=done.append))
    assert [each.path for each in found] == paths
    assert [each.error for each in found] == ["", "", "2.png: damaged", "", "", "no space", "no space"]
    for index in (0, 1, 3, 4):
        np.testing.assert_allclose(found[index].probabilities, predictor(pixels[index : index + 1])[0], atol=1e-6)
    assert [each.probabilities for each in found if each.error] == [None] * 3
    assert done == [3, 3, 1]


def test_an_answer_that_is_not_a_number_is_none(network: Tiny) -> None:
    pixels = images(3)

    def odd(batch: Any) -> Any:
        said = TorchPredictor(network, CLASSES, SIZE)(batch)
        said[np.arange(len(batch)) == 1] = np.nan
        return said

    found = list(predict_folder(odd, [Path(f"{n}.png") for n in range(3)], lambda path: pixels[int(path.stem)]))  # type: ignore[arg-type]
    assert [each.error for each in found] == ["", "1.png: the model's answer is not a number", ""]
    assert [each.probabilities is None for each in found] == [False, True, False]


def test_predicting_reads_no_further_ahead_than_a_batch(network: Tiny) -> None:
    seen: list[Path] = []

    def load(path: Path) -> Any:
        seen.append(path)
        return images(1)[0]

    first = next(predict_folder(TorchPredictor(network, CLASSES, SIZE), map(Path, "abcdef"), load, batch=2))
    assert first.path == Path("a")
    assert len(seen) == 2


def test_a_predictor_switches_dropout_off() -> None:
    network = Tiny().train()
    predictor = TorchPredictor(network, CLASSES, SIZE)
    assert np.array_equal(predictor(images(2)), predictor(images(2)))
