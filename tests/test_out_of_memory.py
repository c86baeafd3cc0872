"""A batch that memory does not hold is cut in halves, said once, and nothing else changes."""

from __future__ import annotations

import json
import resource
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import SIZE, Counting, Normed, both, bytes_of, everything, experiment, no_page, process, table
from torch import Tensor, nn

import histill as hs
from histill.data import Images, pack
from histill.deploy.predictor import TorchPredictor, predict_folder
from histill.errors import Failed, out_of_memory
from histill.evaluate.predict import predict_rows
from histill.memory import Fits
from histill.types import Batch, Outputs

SAID = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture
def data(tmp_path: Path) -> Images:
    return table(tmp_path / "data")


class Late(torch.autograd.Function):
    """The identity, whose gradient of more than ``most`` images finds no memory."""

    @staticmethod
    def forward(context: Any, x: Tensor, most: int) -> Tensor:
        context.most = most
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if len(gradient) > context.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return gradient, None


class Hungry(Normed):
    """Batch norm, dropout, and memory for so many images in forward and backward, and when it is judged."""

    def __init__(self, classes: int = 2, forward: int = 1000, backward: int = 1000, judged: int = 1000) -> None:
        super().__init__(classes)
        self.most, self.later, self.judged = forward, backward, judged
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Outputs:
        features = self.norm(Late.apply(self.conv(images).relu(), self.later).mean((2, 3)))
        self.seen.append(len(images))
        most = self.most if self.training else self.judged
        if len(images) > most:  # after batch norm has taken these images into its means
            raise RuntimeError(f"{SAID} 1 bytes")
        return Outputs(logits=self.head(nn.functional.dropout(features, 0.5, self.training)))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_goes_on_as_if_the_batch_had_been_accumulated(
    data: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    kind: dict[str, Any] = {"objective": both, "teacher": Counting(), "epochs": 3}
    made = experiment(data, student=partial(Hungry, classes=2, **{where: 4}), **kind)
    small = hs.train(made, tmp_path / "small")
    assert capsys.readouterr().err.count("out of memory with 8 images at once; batches are cut") == 1
    whole = hs.train(experiment(data, student=partial(Hungry, classes=2), accumulate=2, **kind), tmp_path / "whole")
    for file in ("model.safetensors", "predictions.parquet"):
        assert (small.path / file).read_bytes() == (whole.path / file).read_bytes()
    assert small.log.drop(columns="images_per_second").equals(whole.log.drop(columns="images_per_second"))


def test_a_resumed_run_knows_that_memory_was_short(data: Images, tmp_path: Path, capsys: Any) -> None:
    class Interrupted(Counting):
        def __call__(self, batch: Batch) -> Outputs:
            if self.images > 150:
                raise KeyboardInterrupt
            return super().__call__(batch)

    kind: dict[str, Any] = {"student": partial(Hungry, classes=2, forward=3), "objective": both, "epochs": 6}
    whole = hs.train(experiment(data, teacher=Counting(), **kind), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        hs.train(experiment(data, teacher=Interrupted(), **kind), tmp_path / "torn", checkpoint_seconds=0)
    capsys.readouterr()
    torn = hs.train(experiment(data, teacher=Counting(), **kind), tmp_path / "torn", resume=True)
    assert "at once; batches" not in capsys.readouterr().err
    found, wanted = bytes_of(torn.path), bytes_of(whole.path)
    assert found["model.safetensors"] == wanted["model.safetensors"]


def test_where_not_even_one_image_fits_it_is_one_line(data: Images, tmp_path: Path) -> None:
    def hungry(student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        raise MemoryError

    made = experiment(data, objective=hungry)
    with pytest.raises(Failed, match=r"out of memory with a single image; take a smaller --image-size or network$"):
        hs.train(made, tmp_path / "run")


def test_another_error_is_not_taken_for_memory(data: Images, tmp_path: Path) -> None:
    def broken(student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        hs.train(experiment(data, objective=broken), tmp_path / "run")


def test_judging_looks_at_fewer_and_says_it_once(data: Images, capsys: pytest.CaptureFixture[str]) -> None:
    packed, rows = pack(data, SIZE), np.arange(40)
    network, roomy = Hungry(judged=7), Hungry()
    roomy.load_state_dict(network.state_dict())
    network.train()
    for _ in range(2):
        found = predict_rows(network, packed, rows)["logits"]
    assert np.allclose(found, predict_rows(roomy, packed, rows)["logits"], atol=1e-6)
    assert network.training
    assert capsys.readouterr().err.splitlines() == [
        "note: judging: out of memory with 40 images at once; going on with fewer"
    ]
    assert network.seen == [40, 20, 10, *[5] * 8, *[5] * 8]


def test_folders_are_predicted_in_halves(data: Images, capsys: pytest.CaptureFixture[str]) -> None:
    network, roomy = Hungry(judged=3), Hungry()
    roomy.load_state_dict(network.state_dict())
    said = []
    for one in (network, roomy):
        predictor = TorchPredictor(one, data.classes, SIZE)
        said.append(list(predict_folder(predictor, data.paths(), lambda path: _load(path), batch=16)))
    assert [p.path for p in said[0]] == data.paths()
    for here, there in zip(*said):
        assert np.allclose(here.probabilities, there.probabilities, atol=1e-6)
    assert capsys.readouterr().err.count("out of memory with 16 images at once") == 1


def _load(path: Path) -> Any:
    from histill.data.decode import load

    return load(path, SIZE)


def test_slides_are_looked_at_in_halves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openslide")
    import slides_tiny

    from histill.slides.engine import Model
    from histill.slides.predict import predict_slide

    class Short(slides_tiny.Purple):
        def forward(self, images: Tensor) -> Outputs:
            if len(images) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().forward(images)

    place = slides_tiny.slide(tmp_path / "one.tif", width=640, height=640)
    tables = []
    for network in (Short(), slides_tiny.Purple()):
        made = Model(TorchPredictor(network, slides_tiny.CLASSES, slides_tiny.TILE), "net", "0" * 64, mpp=1.0)
        out = tmp_path / type(network).__name__
        predict_slide(made, place, out)
        tables.append(pd.read_parquet(out / "one" / "tiles.parquet"))
    pd.testing.assert_frame_equal(*tables, atol=1e-6)
    assert capsys.readouterr().err.count("out of memory with 32 images at once; going on with fewer") == 1


def test_pieces_come_in_order_and_a_limit_stays() -> None:
    tried = []

    def look(part: Any) -> list[int]:
        tried.append(len(part))
        if len(part) > 3:
            raise MemoryError
        return list(part)

    fits = Fits("counting")
    assert list(chain(*fits(look, np.arange(13)))) == list(range(13))
    assert list(chain(*fits(look, np.arange(4)))) == list(range(4))
    assert fits(look, np.arange(0)) == [[]]
    assert tried == [13, 6, 3, 3, 3, 3, 1, 3, 1, 0]
    with pytest.raises(Failed, match=r"counting: out of memory with a single image"):
        Fits("counting")(lambda part: look(range(9)), np.arange(5))


# Memory that is really short: address space is limited, and what does not fit is refused by the allocator.


class Large(nn.Module):
    """Takes 256 MB of address space for each image."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, images: Tensor) -> Outputs:
        torch.empty(len(images), 2**26)
        return Outputs(logits=self.head(images.mean((2, 3))))


def short(root: Path) -> None:
    data = table(root / "data")
    hs.train(everything(data, root / "cache", student=partial(Large, classes=2)), root / "whole")
    _limit(900)
    hs.train(everything(data, root / "cache", student=partial(Large, classes=2)), root / "short")


def _limit(megabytes: int) -> None:
    """No more address space than is taken now and so much."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + megabytes * 2**20,) * 2)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_machine_that_is_really_short_of_memory_ends_at_the_same_metrics(tmp_path: Path) -> None:
    child = process(short, tmp_path)
    child.join()
    assert child.exitcode == 0
    one, other = (pd.read_csv(tmp_path / name / "log.csv")["raw/hard"] for name in ("short", "whole"))
    assert np.allclose(one, other, rtol=1e-4)


def refused(root: Path) -> None:
    import onnxruntime
    from onnx import TensorProto, helper

    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [d, None]) for n, d in (("x", "n"), ("y", "n"))]
    wide = helper.make_tensor("wide", TensorProto.INT64, [2], [1, 2**26])
    nodes = [helper.make_node("Expand", ["x", "wide"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]
    graph = helper.make_graph(nodes, "wide", shapes[:1], shapes[1:], [wide])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    _limit(400)
    tries = {
        "torch": lambda: torch.empty(8, 2**26),
        "numpy": lambda: np.ones((8, 2**27)),
        "onnxruntime": lambda: session.run(None, {"x": np.ones((8, 1), np.float32)}),
        "another": lambda: torch.ones(2) @ torch.ones(3),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except Exception as error:  # noqa: BLE001 - which kind is what this is about
            found[name] = out_of_memory(error)
    (root / "found").write_text(json.dumps(found))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_every_runtime_says_it_in_its_own_words(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    child = process(refused, tmp_path)
    child.join()
    assert child.exitcode == 0
    said = json.loads((tmp_path / "found").read_text())
    assert said == {"torch": True, "numpy": True, "onnxruntime": True, "another": False}
