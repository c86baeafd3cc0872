"""A map of tile probabilities shows no seams, does not depend on where the grid begins, and is read back as written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from histill.errors import BadInput
from histill.slides.heatmap import Heatmap, blend, overlay, per_stride, quantised, write_deepzoom, write_ome_tiff

tifffile = pytest.importorskip("tifffile")

SIDE, TILE = 6000, 300
PERIOD = 6 * TILE
SAME = 0.01
"""How far the map may move with the grid, where the field varies over six tiles."""


def field(x: NDArray[Any], y: NDArray[Any], width: float) -> NDArray[Any]:
    """The mean of 0.5 + 0.4 sin(x) cos(y) over squares of ``width`` about (x, y)."""
    k = 2 * np.pi / PERIOD
    return 0.5 + 0.4 * np.sin(k * x) * np.cos(k * y) * np.sinc(width / PERIOD) ** 2


def tiles(start: float, stride: float, tile: float = TILE) -> NDArray[Any]:
    corners = np.arange(start, SIDE - tile + 1, stride)
    x, y = (a.ravel() for a in np.meshgrid(corners, corners))
    return np.stack([x, y, np.full_like(x, tile), np.full_like(x, tile)], 1)


def map_of(places: NDArray[Any], stride: float, **options: Any) -> Heatmap:
    p = field(places[:, 0] + TILE / 2, places[:, 1] + TILE / 2, TILE)
    chosen = {"classes": ("a", "b"), "dimensions": (SIDE, SIDE), "stride": stride, "mpp": 0.5} | options
    return blend(places, np.stack([p, 1 - p], 1), **chosen)


def middle(heatmap: Heatmap) -> NDArray[Any]:
    """Without two tiles at the rim."""
    rim = round(2.5 * TILE / heatmap.l0_pixel)
    return np.asarray(heatmap.probabilities[0])[rim:-rim, rim:-rim]


@pytest.mark.parametrize("stride", [TILE, TILE / 2])
def test_the_map_does_not_move_with_the_grid(stride: float) -> None:
    one, other = (map_of(tiles(start, stride), stride, k=4) for start in (0, TILE / 2 if stride == TILE else TILE / 4))
    apart = np.abs(middle(one) - middle(other)).max()
    assert apart < (SAME if stride == TILE else SAME / 10)
    assert np.abs(middle(one) - 0.5).max() > 0.25, "and it is no constant"


def test_there_are_no_seams() -> None:
    heatmap = map_of(tiles(0, TILE), TILE, k=8)
    steps = np.abs(np.diff(middle(heatmap), axis=1))
    slope = 0.4 * 2 * np.pi / PERIOD * heatmap.l0_pixel
    assert steps.max() < 1.05 * slope, "no step is steeper than the field itself"


@pytest.mark.parametrize("k", [1, 3, 4])
def test_linear_fields_are_exact(k: int) -> None:
    places = tiles(0, TILE)
    p = (places[:, 0] + 2 * places[:, 1]) / (4 * SIDE)
    found = blend(places, p[:, None], classes=("a",), dimensions=(SIDE, SIDE), stride=TILE, mpp=0.5, k=k)
    at = (np.arange(found.covered.shape[0]) + 0.5) * found.l0_pixel - TILE / 2
    expected = (at[None, :] + 2 * at[:, None]) / (4 * SIDE)
    rim = 2 * k
    assert np.allclose(found.probabilities[0][rim:-rim, rim:-rim], expected[rim:-rim, rim:-rim], atol=1e-6)


def naive(places: NDArray[Any], p: NDArray[Any], stride: float, k: int, shape: tuple[int, int]) -> NDArray[Any]:
    """Pixel by pixel, tile by tile."""
    pixel = stride / k
    out = np.zeros(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            x, y = (column + 0.5) * pixel, (row + 0.5) * pixel
            inside, total, weight = False, 0.0, 0.0
            for (left, top, width, height), value in zip(places, p):
                inside |= left <= x < left + width and top <= y < top + height
                w = 1.0
                for d in (x - left - width / 2, y - top - height / 2):
                    t = abs(d) / stride
                    w *= 0.75 - t * t if t < 0.5 else 0.5 * (1.5 - t) ** 2 if t < 1.5 else 0.0
                total, weight = total + w * value, weight + w
            out[row, column] = total / weight if inside and weight else 0
    return out


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([1.0, 0.5, 0.75]))
def test_the_map_is_that_of_a_plain_loop(seed: int, k: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    stride = 40 * share
    corners = np.arange(0, 300, stride)
    places = np.array([(x, y, 40, 40) for x in corners for y in corners])[rng.random(len(corners) ** 2) < 0.5]
    p = rng.random(len(places))
    found = blend(places, p[:, None], classes=("a",), dimensions=(300, 200), stride=stride, mpp=1, k=k)
    assert np.allclose(found.probabilities[0], naive(places, p, stride, k, found.covered.shape), atol=1e-5)


def test_what_no_tile_covers_is_nothing() -> None:
    found = blend(
        np.array([[100, 200, 50, 50]]), np.array([[0.7]]), classes=("a",), dimensions=(400, 400), stride=50, mpp=0.5
    )
    assert found.l0_pixel == 12.5
    assert found.mpp == 6.25
    inside = np.zeros((32, 32), np.bool_)
    inside[16:20, 8:12] = True
    assert np.array_equal(found.covered, inside)
    assert np.allclose(found.probabilities[0], 0.7 * inside)
    empty = blend(np.zeros((0, 4)), np.zeros((0, 2)), classes=("a", "b"), dimensions=(90, 30), stride=50, mpp=0.5)
    assert not empty.covered.any()


def test_bands_and_a_file_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = map_of(tiles(0, TILE), TILE)
    monkeypatch.setattr("histill.slides.heatmap._BAND", 7)
    banded = map_of(tiles(0, TILE), TILE, scratch=tmp_path / "map")
    assert isinstance(banded.probabilities, np.memmap)
    assert np.allclose(banded.probabilities, whole.probabilities, atol=1e-6)
    assert np.array_equal(banded.covered, whole.covered)


def test_a_pixel_is_about_a_quarter_of_a_tile() -> None:
    assert [per_stride(s, 100) for s in (100, 75, 50, 25, 5)] == [4, 3, 2, 1, 1]


def test_ome_tiff_is_read_back(tmp_path: Path) -> None:
    channels = np.random.default_rng(0).integers(0, 256, (3, 700, 1301), dtype=np.uint8)
    names = ("tumour", 'a "<b>" & ü', "c")
    path = write_ome_tiff(tmp_path / "a.ome.tiff", channels, names=names, mpp=28.125, colors={"tumour": (213, 94, 0)})
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        [series] = file.series
        assert series.axes == "CYX"
        assert np.array_equal(series.asarray(), channels)
        assert [level.shape for level in series.levels] == [(3, 700, 1301), (3, 350, 651), (3, 175, 326)]
        half = channels[:, :, :1300].reshape(3, 350, 2, 650, 2).mean((2, 4))
        assert np.abs(series.levels[1].asarray()[:, :, :650] - half).max() <= 0.5
        page = series.levels[0].pages[0]
        assert page.is_tiled
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert len(page.subifds) == 2
        above, below = page.tags["XResolution"].value
        assert 1e4 * below / above == pytest.approx(28.125)
        root = ElementTree.fromstring(file.ome_metadata)
    kind = {"o": "http://www.openmicroscopy.org/Schemas/OME/2016-06"}
    pixels = root.find(".//o:Pixels", kind)
    assert pixels is not None
    assert (pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeXUnit")) == ("28.125", "µm")
    found = pixels.findall("o:Channel", kind)
    assert tuple(channel.get("Name") for channel in found) == names
    color = int(found[0].get("Color", "")) & 0xFFFFFFFF
    assert color.to_bytes(4, "big") == bytes((213, 94, 0, 255))
    again = write_ome_tiff(
        tmp_path / "b" / "a.ome.tiff", channels, names=names, mpp=28.125, colors={"tumour": (213, 94, 0)}
    )
    assert again.read_bytes() == path.read_bytes()


def test_labels_are_not_averaged(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).choice(np.array([0, 7], np.uint8), (1, 1200, 900))
    path = write_ome_tiff(tmp_path / "a.ome.tiff", labels, names=["class"], mpp=1.0, labels=True)
    with tifffile.TiffFile(path) as file:
        assert len(file.series[0].levels) == 3
        for level in file.series[0].levels:
            assert set(np.unique(level.asarray())) == {0, 7}


def test_values_are_rounded_to_bytes() -> None:
    p = np.array([[[0.0, 0.4, 0.5, 1.0]]], np.float32)
    made = Heatmap(p, np.ones((1, 4), np.bool_), ("a",), 1.0, 1.0, (4, 1))
    assert quantised(made).tolist() == [[[0, 102, 128, 255]]]


def test_the_overlay_is_the_likeliest_lesion() -> None:
    p = np.array([[[0.2, 0.0]], [[0.5, 0.9]], [[0.3, 0.1]]], np.float32)
    made = Heatmap(p, np.array([[True, False]]), ("normal", "a", "b"), 1.0, 1.0, (2, 1))
    colors = {"normal": (0, 0, 0), "a": (1, 2, 3), "b": (4, 5, 6)}
    assert overlay(made, colors, ["b", "a"]).tolist() == [[[1, 2, 3, 102], [1, 2, 3, 0]]]
    with pytest.raises(BadInput, match="class to show"):
        overlay(made, colors, [])


def test_deepzoom_tiles_make_the_picture_again(tmp_path: Path) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (300, 600, 4), dtype=np.uint8)
    path = write_deepzoom(tmp_path / "h.dzi", rgba)
    root = ElementTree.fromstring(path.read_text())
    assert (root.get("TileSize"), root.get("Overlap"), root.get("Format")) == ("254", "1", "png")
    assert [(size.get("Width"), size.get("Height")) for size in root] == [("600", "300")]
    levels = sorted(int(p.name) for p in (tmp_path / "h_files").iterdir())
    assert levels == list(range(11))  # 2 ** 10 >= 600
    again = np.zeros_like(rgba)
    for file in (tmp_path / "h_files" / "10").iterdir():
        column, row = map(int, file.stem.split("_"))
        part = np.asarray(Image.open(file))
        top, left = max(0, row * 254 - 1), max(0, column * 254 - 1)
        again[top : top + part.shape[0], left : left + part.shape[1]] = part
        assert part.shape[0] <= 256
        assert part.shape[1] <= 256
    assert np.array_equal(again, rgba)
    assert Image.open(tmp_path / "h_files" / "0" / "0_0.png").size == (1, 1)
    write_deepzoom(path, rgba[:100])  # replaced as a whole
    assert len(list((tmp_path / "h_files").rglob("*.png"))) < 10 + 6 + 3


HUGE = """
import resource, sys
import numpy as np
from pathlib import Path
from histill.slides.heatmap import blend, overlay, quantised, write_deepzoom, write_ome_tiff
out, side, stride, names = Path(sys.argv[1]), 100_000, 112, [f"c{i}" for i in range(9)]
x, y = (a.ravel() for a in np.meshgrid(*[np.arange(0, side - 224, stride)] * 2))
p = np.random.default_rng(0).random((len(x), 9), np.float32)
p /= p.sum(1, keepdims=True)
places = np.stack([x, y, np.full_like(x, 224), np.full_like(x, 224)], 1)
made = blend(places, p, classes=names, dimensions=(side, side), stride=stride, mpp=0.25, scratch=out / "map")
write_ome_tiff(out / "a.ome.tiff", quantised(made), names=names, mpp=made.mpp)
write_deepzoom(out / "a.dzi", overlay(made, {n: (1, 2, 3) for n in names}, names[1:]))
print(len(x), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.slow
def test_a_slide_of_ten_gigapixels_stays_under_two_gigabytes(tmp_path: Path) -> None:
    said = subprocess.run([sys.executable, "-c", HUGE, str(tmp_path)], capture_output=True, text=True, check=True)
    count, gigabytes = map(float, said.stdout.split())
    assert count > 790_000
    assert gigabytes < 2
