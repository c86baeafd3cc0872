"""A stitched mask is what a plain loop over pixels and tiles gives; attention is shown where the network looks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from histill.deploy.predictor import TorchPredictor
from histill.slides.engine import Model, answers
from histill.slides.heatmap import Heatmap
from histill.slides.segment import Segmentation, segment
from histill.types import Outputs

CLASSES = ("none", "a", "b")


class Says:
    """Logits read off the picture's first channel."""

    def __init__(self, *classes: str) -> None:
        self.classes = classes

    def logits(self, images: Any) -> Any:
        z = 8 * images[:, :1] - 4
        return z if len(self.classes) == 1 else np.concatenate([np.zeros_like(z), z], 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 9), st.integers(0, 4))
def test_the_mask_is_that_of_a_plain_loop(seed: int, tile: int, overlap: int) -> None:
    rng = np.random.default_rng(seed)
    width, height, step = 31, 23, max(1, tile - overlap)
    xs, ys = (a.ravel() for a in np.meshgrid(np.arange(0, width, step), np.arange(0, height, step)))
    keep = rng.random(len(xs)) < 0.7
    table = pd.DataFrame({"x": xs[keep], "y": ys[keep]})
    said = rng.random((len(table), 3)).astype(np.float32)
    for number, name in enumerate(CLASSES):
        table[f"prob_{name}"] = said[:, number]
    pixels = {p: rng.integers(0, 256, (tile, tile, 3), dtype=np.uint8) for p in zip(table["x"], table["y"])}
    grid: Any = SimpleNamespace(
        tile=tile, plan=lambda slide: SimpleNamespace(l0_span=float(tile)), read=lambda slide, x, y: pixels[x, y]
    )
    slide: Any = SimpleNamespace(dimensions=(width, height), require_mpp=lambda: 0.5)
    unets: Any = {"a": Says("a"), "b": Says("other", "b")}
    found = segment(slide, table, grid, unets, classes=CLASSES, batch_size=2, threads=1)

    total, weight = np.zeros((3, height + 20, width + 20)), np.zeros((height + 20, width + 20))
    for (x, y), p in zip(pixels, said):
        weight[y : y + tile, x : x + tile] += 1
        if p.argmax() > 0:
            total[p.argmax(), y : y + tile, x : x + tile] += 1 / (1 + np.exp(4 - 8 * (pixels[x, y][..., 0] / 255.0)))
    score = (total / np.maximum(weight, 1))[:, :height, :width]
    expected = np.where(score.max(0) >= 0.5, score.argmax(0) + 1, 0)
    near = np.abs(score.max(0) - 0.5) < 1e-5
    assert np.array_equal(found.labels[~near], expected[~near])
    assert found.summary()["area_um2"]["a"] == (found.labels == 2).sum() * 0.25


def test_the_mask_may_lie_in_a_file(tmp_path: Path) -> None:
    table = pd.DataFrame({"x": [0, 8], "y": [0, 40], "prob_none": 0.0, "prob_a": 1.0, "prob_b": 0.0})
    grid: Any = SimpleNamespace(
        tile=8,
        plan=lambda slide: SimpleNamespace(l0_span=16.0),
        read=lambda slide, x, y: np.full((8, 8, 3), 255, np.uint8),
    )
    slide: Any = SimpleNamespace(dimensions=(40, 64), require_mpp=lambda: 0.5)
    unets: Any = {"a": Says("a")}
    found = segment(slide, table, grid, unets, classes=CLASSES, scratch=tmp_path)
    assert isinstance(found.labels, np.memmap)
    assert found.labels.shape == (32, 20)
    assert found.mpp == 1.0
    expected = np.zeros((32, 20), np.uint8)
    expected[:8, :8] = expected[20:28, 4:12] = 2
    assert np.array_equal(found.labels, expected)


def test_a_tile_lies_where_its_corner_is_nearest() -> None:
    table = pd.DataFrame({"x": [13], "y": [14], "prob_none": 0.0, "prob_a": 1.0, "prob_b": 0.0})
    grid: Any = SimpleNamespace(
        tile=8,
        plan=lambda slide: SimpleNamespace(l0_span=12.0),  # a pixel of the mask is 1.5 of the slide's
        read=lambda slide, x, y: np.full((8, 8, 3), 255, np.uint8),
    )
    slide: Any = SimpleNamespace(dimensions=(50, 61), require_mpp=lambda: 0.5)
    found = segment(slide, table, grid, {"a": Says("a")}, classes=CLASSES)
    expected = np.zeros((41, 34), np.uint8)  # as many as reach the slide's end
    expected[9:17, 9:17] = 2  # 13 and 14 are 8.67 and 9.33
    assert np.array_equal(found.labels, expected)


class Looks(nn.Module):
    def forward(self, images: Tensor) -> Outputs:
        attention = torch.zeros(len(images), 2, 4, 4)
        attention[:, :, 1, 2] = 1
        return Outputs(logits=images.mean((2, 3))[:, :2], attention=attention, layer4=-attention)


def test_attention_is_where_the_network_looks() -> None:
    model = Model(TorchPredictor(Looks(), ("a", "b"), 32), "looks", "")
    images = np.zeros((3, 3, 32, 32), np.float32)
    found = answers(model, images)
    assert set(found) == {"attention", "layer4"}
    maps = found["attention"]
    assert maps.shape == (3, 32, 32)
    assert maps.min() == 0
    assert 0.8 < maps.max() <= 1
    row, column = np.unravel_index(maps[0].argmax(), (32, 32))
    assert (row // 8, column // 8) == (1, 2)
    assert np.array_equal(found["layer4"], maps)  # of features the magnitude counts


def test_a_mask_becomes_shares_of_coarser_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.slides.segment._OUTLINED_PX", 3)
    labels = np.zeros((5, 7), np.uint8)
    labels[:2, :3], labels[4, 6] = 2, 1  # 7 pixels in 3: blocks of 3, the last ones cut off
    made = Segmentation(labels, ("a", "b"), ("b",), 2.0, 1.0)
    heat = np.arange(2 * 2 * 3, dtype=np.float32).reshape(2, 2, 3) / 12
    heatmap = Heatmap(heat, np.ones((2, 3), np.bool_), ("a", "b"), 6.0, 3.0, (14, 10))
    fine, share = made.over(heatmap)
    assert share.tolist() == [[[pytest.approx(6 / 9), 0, 0], [0, 0, 0]]]
    assert (fine.classes, fine.l0_pixel, fine.mpp) == (("b",), 6.0, 3.0)
    assert np.array_equal(fine.probabilities, heat[1:])


@pytest.mark.parametrize("precise", [True, False])
def test_bf16_changes_little(precise: bool) -> None:
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, images: Tensor) -> Outputs:
            return Outputs(logits=self.head(self.conv(images).relu().mean((2, 3))))

    predictor = TorchPredictor(Small(), ("a", "b"), 16)
    images = np.random.default_rng(0).random((4, 3, 16, 16), np.float32)
    said = Model(predictor, "small", "", bf16=not precise).look(images)["probabilities"]
    assert np.abs(said - predictor(images)).max() < (1e-6 if precise else 0.01)
