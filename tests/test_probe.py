"""Probes find what is in an embedding and nothing else, choose on validation, and agree with naive references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SIZE, Tiny, table
from torch import Tensor

from histill.data import Packed, pack
from histill.errors import BadInput
from histill.evaluate.metrics import metrics
from histill.evaluate.predict import predict_rows
from histill.evaluate.probe import (
    Embedded,
    embed,
    embedded,
    fit_knn,
    fit_linear,
    knn,
    labelled,
    linear_probe,
    probe,
)
from histill.teachers import Frozen
from histill.types import Outputs


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    data = table(tmp_path_factory.mktemp("images") / "data", 40)
    return pack(data, SIZE, folder=tmp_path_factory.mktemp("packed"))


def blobs(count: int, seed: int, apart: float = 6.0, classes: int = 3, width: int = 8) -> Embedded:
    """Classes as Gaussians of variance 1, ``apart`` from the origin along an axis each."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    values = rng.normal(size=(count, width)) + apart * np.eye(classes, width)[labels]
    return Embedded(values.astype(np.float32), labels, np.arange(count))


def accuracy(scores) -> float:  # type: ignore[no-untyped-def]
    return float(metrics(scores, names=["balanced_accuracy"])["balanced_accuracy"][0])


@pytest.mark.parametrize("method", [linear_probe, knn])
def test_classes_that_lie_apart_are_told_apart_and_equal_ones_are_not(method) -> None:  # type: ignore[no-untyped-def]
    apart = [blobs(n, seed) for n, seed in ((90, 0), (45, 1), (120, 2))]
    assert accuracy(method(*apart, 3)) > 0.98
    same = [blobs(n, seed, apart=0) for n, seed in ((90, 0), (45, 1), (300, 2))]
    assert abs(accuracy(method(*same, 3)) - 1 / 3) < 0.09


@pytest.mark.parametrize("fit", [fit_linear, fit_knn])
def test_probabilities_add_up_also_of_classes_that_training_lacks(fit) -> None:  # type: ignore[no-untyped-def]
    train, val = blobs(60, 0), blobs(30, 1)
    said = fit(train, val, 5)(blobs(10, 2).values)
    assert said.shape == (10, 5)
    assert np.allclose(said.sum(1), 1)
    assert (said[:, 3:] == 0).all()


def test_knn_is_the_vote_of_a_naive_search() -> None:
    train, val, test = blobs(50, 0, apart=1.5), blobs(30, 1, apart=1.5), blobs(20, 2, apart=1.5)
    said = fit_knn(train, val, 3, choices=[7])(test.values)
    for row, x in enumerate(test.values.astype(np.float64)):
        similar = [(x @ t / np.linalg.norm(x) / np.linalg.norm(t), y) for t, y in zip(train.values, train.labels)]
        votes = np.zeros(3)
        for s, y in sorted(similar, reverse=True)[:7]:
            votes[y] += np.exp(s / 0.07)
        assert np.allclose(said[row], votes / votes.sum(), atol=1e-5)


def test_cosine_does_not_see_lengths_and_the_linear_probe_no_units() -> None:
    train, val, test = (blobs(n, seed, apart=2) for n, seed in ((60, 0), (30, 1), (40, 2)))

    def scaled(e: Embedded, factor: np.ndarray) -> Embedded:
        return Embedded((e.values * factor).astype(np.float32), e.labels, e.units)

    lengths = np.exp(np.random.default_rng(3).normal(size=(60, 1)))
    known, same = fit_knn(train, val, 3, choices=[5]), fit_knn(scaled(train, lengths), val, 3, choices=[5])
    assert np.allclose(known(test.values), same(test.values), atol=1e-4)
    units = np.array([1e3, 1, 1e-3, 1, 5, 1, 1, 0.2])
    one, other = fit_linear(train, val, 3), fit_linear(scaled(train, units), scaled(val, units), 3)
    assert np.allclose(one(test.values), other(scaled(test, units).values), atol=1e-2)


def test_validation_chooses() -> None:
    """One neighbour is best for a validation set that repeats noisy training labels, many for one that does not."""
    rng = np.random.default_rng(0)
    train = blobs(200, 0, apart=3)
    noisy = np.where(rng.random(200) < 0.3, rng.integers(0, 3, 200), train.labels)
    train = Embedded(train.values, noisy, train.units)
    clean, test = blobs(200, 1, apart=3), blobs(300, 2, apart=3)
    many = fit_knn(train, clean, 3)(test.values)
    one = fit_knn(train, train, 3)(test.values)  # each image is its own nearest neighbour
    assert np.array_equal(one, fit_knn(train, clean, 3, choices=[1])(test.values))
    assert (many.argmax(1) == test.labels).mean() > (one.argmax(1) == test.labels).mean() + 0.1


def test_embeddings_are_the_network_s_on_the_images_themselves(packed: Packed) -> None:
    torch.manual_seed(0)
    network = Tiny().train()
    rows = np.array([5, 0, 33])
    values = embed(network, packed, rows, batch_size=2)
    with torch.no_grad():
        expected = network(packed.batch(rows).images)["pooled"]
    assert np.allclose(values, expected.numpy(), atol=1e-6)
    assert network.training
    assert np.allclose(embed(Frozen(network), packed, rows), values, atol=1e-6)
    maps = embed(lambda batch: {"m": batch.images}, packed, rows, output="m")  # type: ignore[arg-type, return-value]
    assert np.allclose(maps, packed.batch(rows).images.mean((2, 3)).numpy(), atol=1e-6)


class Watched(Tiny):
    """Remembers the mode in which it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Outputs:
        self.modes.append(self.training)
        return super().forward(images)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("ask", [embed, predict_rows])
def test_a_network_that_is_asked_is_in_eval_mode_and_left_as_it_was(packed: Packed, ask, mode: bool) -> None:  # type: ignore[no-untyped-def]
    network = Watched().train(mode)
    ask(network, packed, np.arange(4), batch_size=2)
    assert (network.modes, network.training) == ([False, False], mode)


def test_a_network_is_probed_with_intervals(packed: Packed) -> None:
    torch.manual_seed(0)
    found = probe(Tiny(width=6), packed)
    for method in ("linear", "knn"):
        figure = found[method]["balanced_accuracy"]
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        assert figure["value"] > 0.7  # the classes of these images differ in tint
        assert "agreement" not in found[method]


def test_units_are_patients_and_unlabelled_images_are_left_out(packed: Packed, tmp_path: Path) -> None:
    frame = packed.images.frame.assign(patient=[f"p{i % 7}" for i in range(40)])
    frame.loc[frame.index[:3], "label"] = ""
    other = pack(packed.images.with_frame(frame.assign(split="test")), SIZE, folder=tmp_path)
    part = embedded(Tiny(), other, "test")
    assert len(part.values) == 37
    assert set(part.units) == {f"p{i}" for i in range(7)}
    with pytest.raises(BadInput, match="no labelled val images"):
        labelled(other, "val")
    with pytest.raises(BadInput, match="two classes"):
        fit_linear(Embedded(part.values, part.labels * 0, part.units), part, 2)
