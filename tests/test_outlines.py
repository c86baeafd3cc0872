"""Outlines run around the pixels of each instance, and are drawn in the two colours that the legend names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from histill.data.phantom import draw
from histill.errors import BadInput
from histill.evaluate.outlines import PREDICTED, TRUTH, contours, outlines


def area(line: NDArray[np.float64]) -> float:
    x, y = line.T
    return 0.5 * abs(float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()))


def test_a_contour_is_half_a_pixel_outside() -> None:
    mask = np.zeros((9, 12), int)
    mask[2:6, 3:10] = 5
    (line,) = contours(mask)
    np.testing.assert_array_equal(line[0], line[-1])
    assert line.min(axis=0).tolist() == [2.5, 1.5]
    assert line.max(axis=0).tolist() == [9.5, 5.5]
    assert area(line) == pytest.approx(4 * 7 - 4 * 0.125)  # corners are cut


def test_every_instance_at_every_edge_has_one_and_the_unknown_none() -> None:
    mask = np.array([[1, 1, 0, 9], [-1, 0, 0, 9], [2, 2, 3, 3]])
    lines = contours(mask)
    assert len(lines) == 4
    assert sorted(area(line) for line in lines) == pytest.approx([1.5] * 4)
    assert contours(np.zeros((3, 3), int)) == contours(np.full((2, 2), -1)) == []
    assert len(contours(np.ones((3, 3), int))) == 1
    nuclei = draw("benign", size=64, seed=4).nuclei
    assert len(contours(nuclei)) >= len(np.unique(nuclei)) - 1


def shows(picture: NDArray[np.uint8], colour: str) -> int:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(picture.astype(int) - rgb).max(axis=2) < 12).sum())


def test_pictures_show_truth_and_prediction(tmp_path: Path) -> None:
    image, mask = np.full((40, 60, 3), 128, np.uint8), np.zeros((40, 60), int)
    mask[5:20, 5:25] = 1
    shifted = np.roll(mask, 15, axis=1)
    outlines([image], [mask], tmp_path / "truth.png")
    outlines([image] * 2, [mask] * 2, tmp_path / "both.png", predicted=[shifted] * 2)
    truth, both = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("truth.png", "both.png"))
    assert shows(truth, TRUTH) > 100
    assert shows(truth, PREDICTED) == 0
    assert shows(both, TRUTH) > 100
    assert shows(both, PREDICTED) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "truth.png"]


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    image, mask = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), int)
    with pytest.raises(BadInput, match="at least one image"):
        outlines([], [], tmp_path / "x.png")
    with pytest.raises(BadInput, match="for each"):
        outlines([image], [mask], tmp_path / "x.png", predicted=[])
    with pytest.raises(BadInput, match="a mask of"):
        outlines([image], [mask.T], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
