"""A model, weights or embeddings of a stranger's run nothing, write nothing, and take no more memory than they are."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzz_targets import run_folder
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import Tensor, nn

from histill.deploy.predictor import open_model
from histill.embeddings import Embeddings
from histill.errors import BadInput
from histill.models.weights import load_weights, read_weights
from histill.run import Run


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What must not be there afterwards."""
    return tmp_path / "it-ran"


def refused(work: Any, *words: str) -> None:
    with pytest.raises(BadInput) as caught:
        work()
    said = str(caught.value)
    assert "\n" not in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("inside", ["alone", "beside tensors", "as a name"])
def test_a_checkpoint_that_would_run_does_not(tmp_path: Path, mark: Path, new: bool, inside: str) -> None:
    evil = Evil(mark)
    value = {
        "alone": evil,
        "beside tensors": {"a": torch.zeros(2), "b": evil},
        "as a name": {"state_dict": {"a": [evil]}},
    }
    torch.save(value[inside], tmp_path / "w.pt", _use_new_zipfile_serialization=new)
    refused(lambda: read_weights(tmp_path / "w.pt"), "w.pt", "not a safe weight file")
    (tmp_path / "w.pth").write_bytes(pickle.dumps(evil))
    refused(lambda: read_weights(tmp_path / "w.pth"))
    assert not mark.exists()
    torch.load(tmp_path / "w.pt", weights_only=False)  # the trap is a real one
    assert mark.exists()


def test_weights_that_hold_themselves_or_no_tensors(tmp_path: Path) -> None:
    round_: dict[Any, Any] = {}
    round_["model"] = round_
    torch.save(round_, tmp_path / "round.pt")
    refused(lambda: read_weights(tmp_path / "round.pt"), "no named tensors")
    odd = {1: torch.zeros(2), "sparse": torch.eye(3).to_sparse(), "meta": torch.zeros(3, device="meta"), "list": [1]}
    torch.save({**odd, "weight": torch.zeros(2, 3)}, tmp_path / "odd.pt")
    assert set(read_weights(tmp_path / "odd.pt")) == {"weight"}
    huge = torch.zeros(1).as_strided((10**6, 10**6), (0, 0))  # a number that says it is four terabytes
    torch.save({"weight": huge, "bias": torch.zeros(2)}, tmp_path / "huge.pt")
    refused(lambda: load_weights(nn.Linear(3, 2), tmp_path / "huge.pt"), "does not fit", "1000000x1000000")


def test_a_packed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(1 << 22)}, file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    refused(lambda: read_weights(tmp_path / "w.pt"), "packed into")


def test_safetensors_of_any_header(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for header in (
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 40]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}},
    ):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        refused(lambda: read_weights(path), "w.safetensors")
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refused(lambda: read_weights(path), "w.safetensors")


# TorchScript is a program.


class Maps(nn.Module):
    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    def forward(self, images: Tensor) -> Tensor:
        mapped = torch.from_file(self.mark, shared=True, size=4, dtype=torch.uint8)
        return images.mean((2, 3)) + mapped.fill_(65).sum()


class Saves(Maps):
    def forward(self, images: Tensor) -> Tensor:
        torch.save(images, self.mark)
        return images.mean((2, 3))


class Honest(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def script(path: Path, module: nn.Module) -> Path:
    torch.jit.save(
        torch.jit.script(module),
        path,
        _extra_files={"histill.json": '{"classes": ["a", "b", "c"], "image_size": 8, "mpp": null}'},
    )
    return path


@pytest.mark.parametrize("kind", [Maps, Saves])
def test_torchscript_that_reaches_for_files_is_not_loaded(tmp_path: Path, mark: Path, kind: Any) -> None:
    path = script(tmp_path / "m.pt", kind(str(mark)))
    refused(lambda: open_model(path), "m.pt: its code names torch.", "not loaded")
    assert not mark.exists()
    torch.jit.load(path)(torch.zeros(1, 3, 8, 8))  # the trap is a real one
    assert mark.exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("torch.mean(", "ops.c10d.barrier(", "ops.c10d"),
        ("torch.mean(", "torch . from_file(", "torch.from_file"),
        ("torch.mean(", "ops.aten.save(", "torch.save"),
        ("torch.mean(", "(ops).profiler(", "ops"),
        ("Tensor:", "__torch__.torch.classes.dist_rpc.X:", "torch.classes.dist_rpc"),
    ],
)
def test_however_it_is_spelt(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = script(tmp_path / "m.pt", Honest())
    assert open_model(path).classes == ("a", "b", "c")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "n.pt", "w") as changed:
        for entry in whole.infolist():
            data = whole.read(entry)
            if entry.filename.endswith(".py"):
                assert old.encode() in data
                data = data.replace(old.encode(), new.encode())
            changed.writestr(entry.filename, data)
    refused(lambda: open_model(tmp_path / "n.pt"), f"names {said}")


def test_what_only_looks_like_torchscript(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(Evil(mark), path)
    refused(lambda: open_model(path), "not a usable TorchScript model")
    whole = script(tmp_path / "h.pt", Honest()).read_bytes()
    path.write_bytes(whole[:4] + b"PTMF" + whole[8:])
    refused(lambda: open_model(path), "not a usable TorchScript model")
    path.write_bytes(b"#!/bin/sh\n" + whole)
    refused(lambda: open_model(path), "not a usable TorchScript model")
    assert not mark.exists()


@pytest.mark.parametrize("place", ["../secret.bin", "{folder}/secret.bin"])
def test_an_onnx_file_reads_no_file_outside_its_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "secret.bin").write_bytes(np.arange(3, dtype=np.float32).tobytes())
    (tmp_path / "in").mkdir()
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place.format(folder=tmp_path)), ("offset", "0"), ("length", "12")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Add", ["f", "w"], ["logits"]),
    ]
    taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 8, 8])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph(nodes, "g", [taken], [given], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "in" / "m.onnx").write_bytes(model.SerializeToString())
    refused(lambda: open_model(tmp_path / "in" / "m.onnx"), "m.onnx")
    assert onnx.load(tmp_path / "in" / "m.onnx", load_external_data=False).graph.initializer  # it was a whole model


@pytest.mark.parametrize(("size", "outputs"), [(8193, 3), (40_000, 3), (8, 3_000_000)])
def test_an_onnx_file_of_any_size_without_a_card(tmp_path: Path, size: int, outputs: int) -> None:
    repeats = helper.make_tensor("r", TensorProto.INT64, [2], [1, outputs // 3])
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Tile", ["f", "r"], ["logits"]),
    ]
    taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, size, size])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [taken], [given], [repeats])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    refused(lambda: open_model(tmp_path / "m.onnx"), "m.onnx")


@pytest.mark.parametrize("classes", [["a", "a"], [str(n) for n in range(70_000)]], ids=["twice", "many"])
def test_a_card_of_classes_that_cannot_be(classes: list[str]) -> None:
    from histill.deploy.predictor import _read_card

    with pytest.raises(BadInput, match="damaged"):
        _read_card(json.dumps({"classes": classes, "image_size": 8, "mpp": None}), Path("m.onnx"))


@pytest.mark.parametrize("size", [10**9, -1, True, "8", 1e3, None])
def test_a_card_that_asks_for_any_size(size: Any) -> None:
    from histill.deploy.predictor import _read_card

    with pytest.raises(BadInput, match="damaged"):
        _read_card(json.dumps({"classes": ["a"], "image_size": size, "mpp": None}), Path("m.onnx"))


# Runs.


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"classes": 10**9, "image_size": 18}, "does not fit"), ({"classes": 2, "image_size": 10**7}, "does not fit")],
)
def test_a_run_that_asks_for_a_network_of_terabytes(tmp_path: Path, arguments: dict[str, Any], word: str) -> None:
    run_folder(tmp_path)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert Run.open(tmp_path / "run").network() is not None
    info["network"]["arguments"] = arguments
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    refused(lambda: Run.open(tmp_path / "run").network(), word)


# Embeddings.


def h5(path: Path, features: Any = None, coords: Any = None) -> Path:
    """``features`` and ``coords`` are functions that put something of their name into the file."""
    with h5py.File(path, "w") as file:
        for name, own, make in (("features", (4, 3), features), ("coords", (4, 2), coords)):
            if make is None:
                file[name] = np.zeros(own, np.float32)
            else:
                make(file, name)
    return path


def _object(file: h5py.File, name: str) -> None:
    file.create_dataset(name, (4, 3), dtype=h5py.special_dtype(vlen=np.uint8))


def _opaque(file: h5py.File, name: str) -> None:
    file[name] = np.array([[pickle.dumps(1)] * 2] * 4)


def _virtual(file: h5py.File, name: str) -> None:
    layout = h5py.VirtualLayout((4, 3), np.float32)
    layout[:] = h5py.VirtualSource("/etc/passwd", "features", shape=(4, 3))
    file.create_virtual_dataset(name, layout)


LINKS = {
    "an external link": lambda file, name: file.__setitem__(name, h5py.ExternalLink("other.h5", "features")),
    "a soft link": lambda file, name: file.__setitem__(name, h5py.SoftLink("/elsewhere")),
    "a folder": lambda file, name: file.create_group(name),
    "another file's bytes": lambda file, name: file.create_dataset(
        name, (4, 3), "f4", external=[("/etc/passwd", 0, 48)]
    ),
    "a virtual set": _virtual,
    "lists": _object,
    "pickles": _opaque,
    "a terabyte that was never written": lambda file, name: file.create_dataset(
        name, (1 << 28, 1 << 10), "f4", chunks=(64, 64)
    ),
}


@pytest.mark.parametrize("what", LINKS)
@pytest.mark.parametrize("name", ["features", "coords"])
def test_hdf5_that_is_not_arrays_of_numbers_of_its_own(tmp_path: Path, what: str, name: str) -> None:
    h5(tmp_path / "other.h5")
    refused(lambda: Embeddings(h5(tmp_path / "s.h5", **{name: LINKS[what]})), "s.h5")


def test_coordinates_that_are_no_numbers(tmp_path: Path) -> None:
    path = h5(tmp_path / "s.h5", coords=lambda file, name: file.__setitem__(name, np.full((4, 2), np.inf)))
    refused(lambda: Embeddings(path), "s.h5")


@pytest.mark.parametrize(
    "array", [np.array([[{}, []]], object), np.zeros((2, 2), [("a", "f4")]), np.array([["a", "b"]])]
)
def test_npy_that_is_not_numbers(tmp_path: Path, mark: Path, array: Any) -> None:
    np.save(tmp_path / "e.npy", array, allow_pickle=True)
    (tmp_path / "e.txt").write_text("a\n" * len(array))
    refused(lambda: Embeddings(tmp_path / "e.npy"), "e.npy")
    np.save(tmp_path / "e.npy", np.array([[Evil(mark)]], object), allow_pickle=True)
    (tmp_path / "e.txt").write_text("a\n")
    refused(lambda: Embeddings(tmp_path / "e.npy"), "e.npy")
    np.savez(tmp_path / "e.npz", a=np.zeros(2))
    refused(lambda: Embeddings(tmp_path / "e.npz"), "not embeddings")
    assert not mark.exists()


def test_parquet_that_swells_or_unpickles(tmp_path: Path, mark: Path) -> None:
    many = pa.table({"image": pa.nulls(30_000_000, pa.string()), "x": pa.nulls(30_000_000, pa.int8())})
    pq.write_table(many, tmp_path / "e.parquet", compression="zstd")
    assert (tmp_path / "e.parquet").stat().st_size < 1 << 20
    refused(lambda: Embeddings(tmp_path / "e.parquet"), "claims 30,000,000 images")
    schema = pa.schema(
        [
            pa.field("image", pa.string()),
            pa.field(
                "x",
                pa.binary(),
                metadata={
                    "ARROW:extension:name": "arrow.py_extension_type",
                    "ARROW:extension:metadata": pickle.dumps(Evil(mark)),
                },
            ),
        ]
    )
    pq.write_table(pa.table([["a"], [b"1"]], schema=schema), tmp_path / "e.parquet")
    refused(lambda: Embeddings(tmp_path / "e.parquet"), "e.parquet")
    assert not mark.exists()


def test_a_table_of_predictions_that_swells(tmp_path: Path) -> None:
    run_folder(tmp_path)
    pq.write_table(pa.table({"image": pa.nulls(30_000_000)}), tmp_path / "run" / "predictions.parquet")
    refused(lambda: Run.open(tmp_path / "run").predictions, "predictions.parquet", "30,000,000 rows")
    pd.DataFrame({"image": ["a"]}).to_parquet(tmp_path / "run" / "predictions.parquet")
    assert len(Run.open(tmp_path / "run").predictions) == 1


def test_weights_of_a_run_are_not_a_pickle(tmp_path: Path, mark: Path) -> None:
    run_folder(tmp_path)
    torch.save(Evil(mark), tmp_path / "run" / "model.safetensors")
    refused(lambda: Run.open(tmp_path / "run").network(), "model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "run" / "model.safetensors")
    refused(lambda: Run.open(tmp_path / "run").network(), "does not fit")
    assert not mark.exists()
