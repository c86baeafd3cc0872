"""The viewer's tiles are the pixels and probabilities that there are, where they belong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openslide.deepzoom
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from viewing import HEIGHT, MAP_PX, ODD, WIDTH, pixels, ramp, write_map, write_result, write_results

from histill.data.phantom import write_slide
from histill.errors import BadInput
from histill.slides import open_slide
from histill.slides.view import render
from histill.slides.view.cache import Lru
from histill.slides.view.geometry import OVERLAP_PX, TILE_PX, DeepZoom
from histill.slides.view.heat import Channel, Difference, HeatFile, Label
from histill.slides.view.library import Library


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("view"))


# Geometry and pixels -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_grid_is_that_of_openslide(width: int, height: int) -> None:
    class Flat:
        dimensions = (width, height)
        level_dimensions = ((width, height),)
        level_downsamples = (1.0,)
        level_count = 1
        properties: dict[str, str] = {}  # noqa: RUF012 - read only

        def get_best_level_for_downsample(self, downsample: float) -> int:
            return 0

    theirs = openslide.deepzoom.DeepZoomGenerator(Flat(), tile_size=TILE_PX, overlap=OVERLAP_PX)
    zoom = DeepZoom(width, height)
    assert zoom.last + 1 == theirs.level_count
    for level in range(zoom.last + 1):
        assert zoom.size(level) == theirs.level_dimensions[level]
        columns, rows = zoom.grid(level)
        assert (columns, rows) == theirs.level_tiles[level]
        for tile in {(0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1), (columns // 2, rows // 2)}:
            assert zoom.has(level, *tile)
            assert zoom.box(level, *tile).size == theirs.get_tile_dimensions(level, tile)
        for tile in ((columns, 0), (0, rows), (-1, 0)):
            assert not zoom.has(level, *tile)
    assert not zoom.has(zoom.last + 1, 0, 0)
    assert not zoom.has(-1, 0, 0)


def test_a_tile_is_the_mean_of_what_it_covers(results: Path) -> None:
    whole = np.asarray(Image.open(results / "slide.png"), dtype=np.float64)
    zoom = DeepZoom(WIDTH, HEIGHT)
    with open_slide(results / "slide.png") as slide:
        for level, column, row in ((zoom.last, 2, 2), (zoom.last, 1, 0), (zoom.last - 1, 1, 1), (5, 0, 0), (0, 0, 0)):
            scale, box = zoom.scale(level), zoom.box(level, column, row)
            found = render.slide_pixels(slide, scale, box)
            assert found.shape == (box.y1 - box.y0, box.x1 - box.x0, 3)
            for y, x in {(0, 0), (found.shape[0] // 2, found.shape[1] // 3)}:
                top, left = (box.y0 + y) * scale, (box.x0 + x) * scale
                mean = whole[top : top + scale, left : left + scale].mean((0, 1))
                np.testing.assert_allclose(found[y, x], mean, atol=1.01)


def test_a_slide_without_coarse_levels_is_read_in_pieces(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoom = DeepZoom(WIDTH, HEIGHT)
    with open_slide(results / "slide.png") as slide:
        whole = [render.slide_pixels(slide, zoom.scale(n), zoom.box(n, 0, 0)) for n in range(zoom.last + 1)]
        reads: list[int] = []
        read = slide.read

        def counted(x: int, y: int, width: int, height: int, level: int = 0) -> NDArray[np.uint8]:
            reads.append(width * height)
            return read(x, y, width, height, level)

        monkeypatch.setattr(slide, "read", counted)
        monkeypatch.setattr(render, "MOST_PX", 2000)
        for level, expected in enumerate(whole):
            found = render.slide_pixels(slide, zoom.scale(level), zoom.box(level, 0, 0))
            np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=3)
        assert max(reads) <= 2000 * 1.3  # rounded up to whole pixels on each side


def test_neighbours_share_their_overlap(results: Path) -> None:
    zoom = DeepZoom(WIDTH, HEIGHT)
    with open_slide(results / "slide.png") as slide:
        for level in (zoom.last, zoom.last - 1):
            left, right = (render.slide_pixels(slide, zoom.scale(level), zoom.box(level, n, 0)) for n in (0, 1))
            np.testing.assert_array_equal(left[:, -2 * OVERLAP_PX :], right[:, : 2 * OVERLAP_PX])


def test_a_phantom_is_read_from_its_nearest_level(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "phantom.tiff", width=512, height=384, seed=1, levels=2)
    zoom = DeepZoom(512, 384)
    with open_slide(path) as slide:
        coarse = render.slide_pixels(slide, 4, zoom.box(zoom.last - 2, 0, 0))
        np.testing.assert_array_equal(coarse, slide.read(0, 0, 128, 96, 1))
        half = slide.read(0, 0, 128, 96, 1).reshape(48, 2, 64, 2, 3).mean((1, 3))
        np.testing.assert_allclose(render.slide_pixels(slide, 8, zoom.box(zoom.last - 3, 0, 0)), half, atol=1.01)


# Maps ----------------------------------------------------------------------------------------------------------------


def test_colours_by_hand() -> None:
    values = np.array([[0, 127, 128, 255]], np.uint8)
    found = pixels(render.overlay_png(values, (213, 94, 0), 0.5))
    np.testing.assert_array_equal(found, [[[0] * 4, [0] * 4, [213, 94, 0, 128], [213, 94, 0, 255]]])
    everything = pixels(render.overlay_png(values, (213, 94, 0), 0.0))
    np.testing.assert_array_equal(everything[0, :, 3], [0, 127, 128, 255])
    twice = pixels(render.overlay_png(np.array([[50, 64, 200]], np.uint8), (0, 0, 9), 0.25, opaque=0.5))
    np.testing.assert_array_equal(twice[0, :, 3], [0, 128, 255])
    certain = pixels(render.overlay_png(values, (213, 94, 0), 1.0))
    np.testing.assert_array_equal(certain[0, :, 3], [0, 0, 0, 255])


def test_a_map_lies_where_it_belongs(tmp_path: Path) -> None:
    maps = np.zeros((2, 40, 50), np.uint8)
    maps[1, 12, 31] = 200
    write_map(tmp_path / "heat.tiff", maps)
    channel = Channel(HeatFile(tmp_path / "heat.tiff", MAP_PX), 1)
    xs, ys = np.arange(800) + 0.5, np.arange(640) + 0.5
    found = channel.sample(xs, ys, 1)
    # Linear between the centres of the pixels, so the tent's top is the pixel's centre, and its foot two pixels wide.
    tent_x = np.maximum(0, 1 - np.abs(xs / MAP_PX - 31.5))
    tent_y = np.maximum(0, 1 - np.abs(ys / MAP_PX - 12.5))
    np.testing.assert_allclose(found, 200 * tent_y[:, None] * tent_x, atol=0.51)
    assert not Channel(channel.file, 0).sample(xs, ys, 1).any()
    # In parts it is the same as in one.
    np.testing.assert_array_equal(channel.sample(xs[300:600], ys[100:300], 1), found[100:300, 300:600])
    # Beyond the map its last pixels go on: a map may end within a pixel of the slide's edge.
    np.testing.assert_array_equal(channel.sample(np.array([5000.0]), ys[:1], 1), [[0]])


def test_a_coarser_level_of_the_map_is_read(tmp_path: Path) -> None:
    maps = np.zeros((1, 64, 64), np.uint8)
    maps[0, ::2, ::2] = 90  # the coarser levels are 90 all over, as `write_map` takes every second pixel
    write_map(tmp_path / "heat.tiff", maps, halvings=2)
    file = HeatFile(tmp_path / "heat.tiff", MAP_PX)
    assert file.downsamples == [16, 32, 64]
    places = np.arange(8) * 64 + 32.0
    assert (Channel(file, 0).sample(places, places, 64) == 90).all()
    assert not (Channel(file, 0).sample(places, places, 16) == 90).all()


def test_disagreement_by_hand(tmp_path: Path) -> None:
    one, other = np.zeros((2, 3, 3), np.uint8), np.zeros((3, 3, 3), np.uint8)
    one[:, 0] = [[200, 100, 0], [55, 155, 255]]
    other[:, 0] = [[0, 0, 0], [50, 100, 0], [205, 155, 255]]  # another class first
    one[1, 1], other[2, 2] = 255, 255  # rows that only one of them saw
    for name, maps in (("one", one), ("other", other)):
        write_map(tmp_path / name, maps)
    files = [HeatFile(tmp_path / name, MAP_PX) for name in ("one", "other")]
    places = np.arange(3) * MAP_PX + MAP_PX / 2
    found = Difference(files[0], files[1], [(0, 1), (1, 2)]).sample(places, places, 1)
    np.testing.assert_array_equal(found, [[150, 0, 0], [0, 0, 0], [0, 0, 0]])
    same = Difference(files[0], files[0], [(0, 0), (1, 1)]).sample(places, places, 1)
    assert not same.any()


def test_a_mask_is_shown_class_by_class(tmp_path: Path) -> None:
    labels = np.array([[0, 1], [2, 1]], np.uint8)
    write_map(tmp_path / "mask.tiff", labels[None])
    file, places = HeatFile(tmp_path / "mask.tiff", MAP_PX), np.arange(2 * MAP_PX) + 0.5
    for value in (1, 2):
        expected = 255 * (np.kron(labels, np.ones((MAP_PX, MAP_PX), int)) == value)
        np.testing.assert_array_equal(Label(file, value).sample(places, places, 1), expected)


def test_a_damaged_map_is_named(tmp_path: Path) -> None:
    (tmp_path / "heat.tiff").write_bytes(b"II*\0 not a tiff")
    with pytest.raises(BadInput, match=r"heat\.tiff"):
        HeatFile(tmp_path / "heat.tiff", 1.0)
    tifffile.imwrite(tmp_path / "rgb.tiff", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(BadInput, match=r"rgb\.tiff"):
        HeatFile(tmp_path / "rgb.tiff", 1.0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60)), max_size=60))
def test_the_cache_stays_within_its_bytes(asked: list[tuple[int, int]]) -> None:
    cache: Lru[bytes] = Lru(100, len)
    for key, size in asked:
        made = cache.get((key, size), lambda size=size: bytes(size))  # type: ignore[misc]
        assert len(made) == size
        assert cache.bytes == sum(map(len, cache._held.values())) <= 100
    if asked:  # what was used last is still there
        key, size = asked[-1]
        assert cache.get((key, size), lambda: b"made again") == bytes(size)


# The library ---------------------------------------------------------------------------------------------------------


def test_what_is_found(results: Path) -> None:
    library = Library(results / "student", results / "teacher")
    assert list(library.entries) == sorted(["case", ODD])
    assert list(library.entries["case"].layers) == [
        "benign",
        "malignant",
        "against:benign",
        "against:malignant",
        "disagreement",
    ]
    assert list(library.entries[ODD].layers) == ["benign", "malignant"]  # the other model did not see it
    alone = Library(results / "student" / "case")
    assert list(alone.entries) == ["case"]
    assert "disagreement" not in alone.entries["case"].layers


def test_what_is_shown_at_first(results: Path, tmp_path: Path) -> None:
    place = write_result(tmp_path, results / "slide.png", (WIDTH, HEIGHT), ramp(), [])
    assert Library(tmp_path).entries["case"].first == ("malignant",)  # not the first class, which is healthy
    said = json.loads((place / "slide.json").read_text())
    said["settings"] = {"lesions": ["benign"], "threshold": 0.3}
    (place / "slide.json").write_text(json.dumps(said))
    write_map(place / "mask.ome.tiff", np.ones((1, 34, 44), np.uint8))
    entry = Library(tmp_path).entries["case"]
    assert (entry.first, entry.threshold) == (("benign",), 0.3)
    assert list(entry.layers) == ["benign", "malignant", "mask:benign", "mask:malignant"]
    assert [layer["shown"] for layer in entry.describe()["layers"]] == [True, False, False, False]


def test_what_is_wrong_is_said(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="is not a folder"):
        Library(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no slide"):
        Library(tmp_path)
    write_result(tmp_path, results / "slide.png", (WIDTH + 1, HEIGHT), ramp(), [], "other size")
    write_result(tmp_path, tmp_path / "gone.png", (WIDTH, HEIGHT), ramp(), [], "gone")
    write_result(tmp_path, results / "slide.png", (WIDTH, HEIGHT), ramp(), [], "good")
    (tmp_path / "good" / "heatmap.ome.tiff").unlink()
    library = Library(tmp_path)
    assert list(library.entries) == ["good"]
    assert not library.entries["good"].layers
    said = capsys.readouterr().err
    assert "701 x 530" in said
    assert "gone.png" in said
    with pytest.raises(BadInput, match="none of the slides"):
        Library(results / "student", tmp_path)


def test_links_out_of_the_folder_are_not_followed(results: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    write_result(root, results / "slide.png", (WIDTH, HEIGHT), ramp(), [])
    (root / "stray").symlink_to(results / "teacher" / "case")
    for name in ("heatmap.ome.tiff", "lesions.geojson"):
        (root / "case" / name).unlink()
        (root / "case" / name).symlink_to(results / "teacher" / "case" / name)
    library = Library(root)
    assert list(library.entries) == ["case"]
    assert not library.entries["case"].layers
    assert library.entries["case"].lesions is None
