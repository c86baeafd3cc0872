"""A grid covers every pixel at the resolution that was asked for, whatever the pyramid's ratios, and reads there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_files import Places, Ramp, slide_of

from histill.errors import BadInput
from histill.slides import Grid, Tissue
from histill.slides.grid import TOLERANCE

RATIOS = (3.99987, 4.016, 8.086, 2.0, 4.0, 2.0005)


@st.composite
def pyramids(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Sizes of up to three levels, of the odd ratios that scanners write."""
    sizes = [(draw(st.integers(300, 6000)), draw(st.integers(300, 6000)))]
    for ratio in draw(st.lists(st.sampled_from(RATIOS), max_size=2)):
        width, height = sizes[-1]
        if min(width, height) / ratio < 8:
            break
        sizes.append((round(width / ratio), round(height / ratio)))
    return sizes


grids = st.builds(
    lambda mpp, tile, overlap, min_tissue: Grid(mpp, tile, int(overlap * tile), min_tissue),
    mpp=st.floats(0.24, 4.0),
    tile=st.integers(16, 300),
    overlap=st.floats(0, 0.75),
    min_tissue=st.just(0.0),
)


@settings(max_examples=60, deadline=None)
@given(sizes=pyramids(), grid=grids, corner=st.tuples(st.integers(0, 200), st.integers(0, 200)))
def test_tiles_cover_the_bounds_without_gaps(sizes: list[tuple[int, int]], grid: Grid, corner: tuple[int, int]) -> None:
    width, height = sizes[0][0] - corner[0], sizes[0][1] - corner[1]
    named = dict(zip(("x", "y", "width", "height"), map(str, (*corner, width, height))))
    slide = slide_of(Places(sizes), **{f"openslide.bounds-{name}": value for name, value in named.items()})
    plan, table = grid.plan(slide), grid.tiles(slide)
    assert plan.mpp == pytest.approx(grid.mpp, rel=TOLERANCE)
    for start, side, first, length in (("x", "width", corner[0], width), ("y", "height", corner[1], height)):
        lines = table[[start, side]].drop_duplicates().sort_values(start).to_numpy()
        begin, end = lines[:, 0], lines.sum(1)
        assert begin[0] == first
        assert (begin[1:] <= end[:-1]).all()  # no gap
        if grid.overlap == 0:
            assert (begin[1:] == end[:-1]).all()  # and nothing twice
        assert end[-1] >= first + length
        assert len(begin) == 1 or end[-2] <= first + length  # nor a tile too many
        assert np.abs(lines[:, 1] - plan.l0_span).max() < 1
        assert np.abs(begin - (first + np.arange(len(begin)) * plan.l0_step)).max() <= 0.5
    assert len(table) == table["x"].nunique() * table["y"].nunique()


@settings(max_examples=40, deadline=None)
@given(sizes=pyramids(), grid=grids, seed=st.integers(0, 99))
def test_every_pixel_of_tissue_is_in_a_tile(sizes: list[tuple[int, int]], grid: Grid, seed: int) -> None:
    width, height = sizes[0]
    rng = np.random.default_rng(seed)
    mask = rng.random((1 + height // 70, 1 + width // 90)) < 0.05
    tissue = Tissue(mask, (width / mask.shape[1], height / mask.shape[0]))
    table = grid.tiles(slide_of(Places(sizes)), tissue)
    covered = np.zeros((height, width), bool)
    for x, y, w, h in table.itertuples(index=False):
        covered[y : y + h, x : x + w] = True
    for row, column in zip(*mask.nonzero()):
        top, bottom = (round(n * tissue.downsample[1]) for n in (row, row + 1))
        left, right = (round(n * tissue.downsample[0]) for n in (column, column + 1))
        inner = covered[top + 1 : bottom - 1, left + 1 : right - 1]  # a mask's pixel ends between two of level 0
        assert inner.all()
    share = tissue.fraction(*(table[name].to_numpy() for name in ("x", "y", "width", "height")))
    assert (share > 0).all()


@settings(max_examples=60, deadline=None)
@given(sizes=pyramids(), grid=grids, data=st.data())
def test_a_tile_is_read_where_it_says_to_a_pixel(sizes: list[tuple[int, int]], grid: Grid, data: st.DataObject) -> None:
    source = Ramp(sizes)
    slide = slide_of(source)
    table = grid.tiles(slide)
    x, y, *_ = (int(v) for v in table.iloc[data.draw(st.integers(0, len(table) - 1))])
    plan = grid.plan(slide)
    tile = grid.read(slide, x, y)
    assert tile.shape == (grid.tile, grid.tile, 3)
    assert tile.dtype == np.uint8
    assert {asked[0] for asked in source.asked} == {plan.level}
    for channel, (start, span, side) in enumerate(((x, plan.l0_span, sizes[0][0]), (y, plan.l0_span, sizes[0][1]))):
        line = tile[..., channel].mean(axis=channel) if grid.tile > 1 else tile[0, :, channel]
        centres = start + (np.arange(grid.tile) + 0.5) * span / grid.tile  # level-0 pixels
        within = (centres > 2 * span / grid.tile) & (centres < side - 2 * span / grid.tile)
        other = (y, x)[channel]
        if other + 2 * span / grid.tile > sizes[0][1 - channel]:  # hardly a pixel of the tile is of the slide
            continue
        if other + span > sizes[0][1 - channel]:  # white lies beyond the other edge
            line = tile[..., channel][0, :] if channel == 0 else tile[..., channel][:, 0]
        # Half a grey value of rounding, and a pixel of the level that is read, of the whole slide's 255.
        level_px = slide.level_downsamples[plan.level]
        allowed = 1.5 + 255 * (level_px + abs(sizes[0][channel] - sizes[plan.level][channel] * level_px)) / side
        assert np.abs(line[within] - 255 * centres[within] / side).max(initial=0) <= allowed


@settings(max_examples=60, deadline=None)
@given(sizes=pyramids(), grid=grids)
def test_the_level_is_the_coarsest_that_is_fine_enough(sizes: list[tuple[int, int]], grid: Grid) -> None:
    slide = slide_of(Places(sizes))
    plan = grid.plan(slide)
    wanted = grid.mpp / 0.25
    downs = slide.level_downsamples
    assert downs[plan.level] <= wanted * (1 + TOLERANCE) or plan.level == 0
    assert not any(downs[plan.level] < other <= wanted for other in downs)
    assert plan.l0_span == pytest.approx(plan.level_side * downs[plan.level])
    if abs(downs[plan.level] / wanted - 1) <= TOLERANCE:
        assert plan.level_side == grid.tile  # nothing is resized


@pytest.mark.parametrize(
    ("mpp", "level", "side"),
    [
        (0.25, 0, 200.0),
        (0.5, 0, 400.0),
        (1.0, 1, 200.0),  # 4 is wanted, 4.016 is there
        (1.5, 1, 200 * 6 / 4.016),
        (2.0, 2, 200.0),  # 8 is wanted, 8.086 is there
        (1.95, 1, 200 * 7.8 / 4.016),  # 8.086 is 3.7 % too coarse
        (0.13, 0, 104.0),  # enlarged
    ],
)
def test_levels_by_hand(mpp: float, level: int, side: float) -> None:
    slide = slide_of(Places([(40160, 40430), (10000, 10067), (4966, 5000)]))
    assert [round(down, 3) for down in slide.level_downsamples] == [1.0, 4.016, 8.086]
    plan = Grid(mpp, 200).plan(slide)
    assert plan.level == level
    assert plan.level_side == pytest.approx(side, rel=1e-4)


@pytest.mark.parametrize("ratio", [3.99987, 4.0, 4.016, 8.086])
def test_coordinates_go_to_a_level_and_back_exactly(ratio: float) -> None:
    """The n-th tile of a level that is not resized begins at its pixel 50 n: rounding to level 0 loses nothing."""
    small = (6000, 4500)
    slide = slide_of(Places([tuple(round(side * ratio) for side in small), small]), mpp=0.25)
    grid = Grid(0.25 * slide.level_downsamples[1], 50)
    plan, table = grid.plan(slide), grid.tiles(slide)
    assert (plan.level, plan.level_side) == (1, 50)
    xs, ys = (np.sort(table[axis].unique()) for axis in "xy")
    for starts in (xs, ys):
        assert np.array_equal(np.floor(starts / slide.level_downsamples[1] + 0.5), 50 * np.arange(len(starts)))
    for x, y, _, _ in table.sample(40, random_state=0).itertuples(index=False):
        tile = grid.read(slide, x, y)
        column, row = 50 * int(np.searchsorted(xs, x)), 50 * int(np.searchsorted(ys, y))
        assert tile[0, 0].tolist() == [column % 256, row % 256, 1]  # the stored pixels


@pytest.mark.parametrize(("width", "columns"), [(448, 2), (449, 3), (672, 3)])
def test_where_tiles_fill_the_slide_there_is_none_beside_it(width: int, columns: int) -> None:
    table = Grid(0.25, 224).tiles(slide_of(Places([(width, 224)])))
    assert table.to_numpy().tolist() == [[224 * n, 0, 224, 224] for n in range(columns)]


def test_a_resized_tile_begins_and_ends_within_a_pixel() -> None:
    # 7 pixels of 2.3 each, from 20 to 36.1 and from 30 to 46.1, on a ramp of 2.55 grey values per pixel.
    tile = Grid(0.575, 7).read(slide_of(Ramp([(100, 100)])), 20, 30).astype(float)
    centres = (np.arange(7) + 0.5) * 2.3
    assert np.abs(tile[3, :, 0] - 2.55 * (20 + centres)).max() <= 1.1  # rounded twice
    assert np.abs(tile[:, 3, 1] - 2.55 * (30 + centres)).max() <= 1.1


def test_tiles_of_half_the_size_are_means() -> None:
    class Noise(Places):
        pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)

        def region(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
            return self.pixels[y : y + height, x : x + width]

    tile = Grid(0.5, 100).read(slide_of(Noise([(400, 400)])), 100, 100).astype(float)
    boxes = Noise.pixels[100:300, 100:300].reshape(100, 2, 100, 2, 3).mean((1, 3))
    nearest = Noise.pixels[100:300:2, 100:300:2]
    assert np.corrcoef(tile.ravel(), boxes.ravel())[0, 1] > 0.85  # antialiased
    assert np.corrcoef(tile.ravel(), nearest.ravel())[0, 1] < 0.7


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(BadInput, match="--slide-mpp"):
        Grid(0.5).tiles(slide_of(Places([(100, 100)]), mpp=None))
    with pytest.raises(BadInput, match="finest level"):
        Grid(0.25).plan(slide_of(Places([(100, 100)]), mpp=1.0))
    for wrong in ({"mpp": 0.0}, {"mpp": 0.5, "tile": 0}, {"mpp": 0.5, "overlap": 224}, {"mpp": 0.5, "min_tissue": 1.5}):
        with pytest.raises(BadInput):
            Grid(**wrong)
