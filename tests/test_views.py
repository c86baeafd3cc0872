"""A view is a function of (seed, image, view) alone, and changes what it says it changes, by as much as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from histill.data.views import NONE, Augment, _keys, _mix, _mixed, _normal, render, uniform

EVERYTHING = Augment(
    hflip=True, vflip=True, rotate=180, zoom=0.2, shift=0.1, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1
)
COMBINED = Augment(rotate=180, saturation=0.3, hue=0.1, edges=0.4, blur=0.03, noise=0.05, subset=0.5)
STILL = {"hflip": False, "vflip": False}


def noise(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def smooth(size: int) -> Tensor:
    """``(1, size, size, 3)``: the same waves at any size, in the middle of the range."""
    at = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(at, at)
    waves = [np.sin(7 * (fx * x + fy * y) + fx) for fx, fy in ((1, 0.5), (-0.5, 1), (1.5, 1))]
    return torch.from_numpy((128 + 60 * np.stack(waves, -1)).round().astype(np.uint8))[None]


def views_of(pixels: Tensor, views: Tensor, augment: Augment, seed: int = 0) -> Tensor:
    """Many views of one image."""
    count = len(views)
    ids = torch.zeros(count, dtype=torch.int64)
    return render(pixels.expand(count, -1, -1, -1), ids, views, augment=augment, seed=seed)


# uniform -------------------------------------------------------------------------------------------------------------


def test_uniform_is_uniform() -> None:
    ids = torch.arange(200).repeat_interleave(100)
    views = torch.arange(100).repeat(200)
    u = uniform(0, ids, views)
    assert u.shape == (20_000, 24)
    assert u.min() >= 0
    assert u.max() < 1
    error = 1 / math.sqrt(u.size)
    assert abs(u.mean() - 1 / 2) < 4 * error * math.sqrt(1 / 12)
    assert abs((u**2).mean() - 1 / 3) < 4 * error * math.sqrt(4 / 45)
    for draw in range(24):
        assert kstest(u[:, draw], "uniform").pvalue > 1e-4
    # Along each axis alone: one image's views, one view of all images, and one place over all seeds.
    assert kstest(uniform(0, torch.zeros(5000), torch.arange(5000))[:, 0], "uniform").pvalue > 1e-4
    assert kstest(uniform(0, torch.arange(5000), torch.zeros(5000))[:, 0], "uniform").pvalue > 1e-4
    one = torch.zeros(1)
    assert kstest([uniform(seed, one, one)[0, 0] for seed in range(2000)], "uniform").pvalue > 1e-4


def test_draws_of_neighbours_are_not_correlated() -> None:
    u = uniform(0, torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200))
    within = np.corrcoef(u.T) - np.eye(24)
    assert abs(within).max() < 5 / math.sqrt(len(u))
    grid = u.reshape(200, 100, 24) - 0.5
    for neighbour in (grid[1:, :] * grid[:-1, :], grid[:, 1:] * grid[:, :-1], grid[1:, 1:] * grid[:-1, :-1]):
        assert abs(neighbour.mean((0, 1)) * 12).max() < 5 / math.sqrt(neighbour[..., 0].size)
    other = uniform(1, torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200)) - 0.5
    assert abs((grid.reshape(-1, 24) * other).mean(0) * 12).max() < 5 / math.sqrt(len(u))
    swapped = uniform(0, torch.arange(100).repeat(200), torch.arange(200).repeat_interleave(100))
    assert not (swapped == u)[torch.arange(100).repeat(200) != torch.arange(200).repeat_interleave(100)].any()


def test_uniform_repeats_on_every_machine() -> None:
    # SplitMix64's finaliser by hand in Python's integers, for (seed, image, view) = (5, 3, 7) and place 2.
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    key = 5
    for part in (3, 7):
        key = mix(key ^ mix(part + golden & mask))
    expected = (mix(key + 2 * golden & mask) >> 11) / 2**53
    assert uniform(5, torch.tensor([3]), torch.tensor([7]))[0, 1] == expected


# Views can be named again --------------------------------------------------------------------------------------------

POOL = noise(24, 20)
IDS = torch.arange(24) * 7
ALL = {view: render(POOL, IDS, torch.full((24,), view), augment=EVERYTHING, seed=11) for view in range(3)}


COMBINATIONS = {view: render(POOL, IDS, torch.full((24,), view), augment=COMBINED, seed=11) for view in range(3)}


@given(chosen=st.lists(st.tuples(st.integers(0, 23), st.integers(0, 2)), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_a_view_has_the_same_bits_in_any_batch_and_order(chosen: list[tuple[int, int]]) -> None:
    rows, views = (torch.tensor(part) for part in zip(*chosen))
    for augment, expected in ((EVERYTHING, ALL), (COMBINED, COMBINATIONS)):
        batch = render(POOL[rows], IDS[rows], views, augment=augment, seed=11)
        for place, (row, view) in enumerate(chosen):
            assert torch.equal(batch[place], expected[view][row])


@pytest.mark.parametrize("augment", [EVERYTHING, COMBINED], ids=["everything", "combined"])
def test_a_large_view_has_the_same_bits_alone_and_with_any_number_of_threads(augment: Augment) -> None:
    pixels, ids = noise(3, 224), torch.arange(3)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            whole = render(pixels, ids, ids, augment=augment, seed=0)
            alone = [render(pixels[i : i + 1], ids[i : i + 1], ids[i : i + 1], augment=augment, seed=0) for i in ids]
            assert torch.equal(torch.cat(alone), whole)
            found.append(whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_another_seed_image_number_or_view_is_another_picture() -> None:
    pixels = noise(1, 20)
    seen = [
        render(pixels, torch.tensor([image]), torch.tensor([view]), augment=EVERYTHING, seed=seed)
        for seed, image, view in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (2**63, 0, 0))
    ]
    for place, picture in enumerate(seen):
        assert all((picture - other).abs().mean() > 0.01 for other in seen[:place])


def test_key_names_seed_and_every_strength() -> None:
    assert NONE.key(3) == {"seed": 3, **STILL} | dict.fromkeys(
        ("rotate", "zoom", "shift", "brightness", "contrast", "saturation", "hue", "edges", "blur", "noise"), 0.0
    ) | {"subset": 1.0}
    keys = [Augment().key(0), Augment().key(1), Augment(hue=0.1).key(0), Augment(vflip=False).key(0)]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])


# What a view changes -------------------------------------------------------------------------------------------------


def test_without_changes_a_view_is_the_image() -> None:
    pixels = noise(4, 9)
    views = render(pixels, torch.arange(4), torch.arange(4), augment=NONE, seed=0)
    assert views.shape == (4, 3, 9, 9)
    assert views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views, pixels.permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize(("hflip", "vflip"), [(True, False), (False, True), (True, True)])
def test_flips_are_exact_and_happen_in_half_of_the_views(hflip: bool, vflip: bool) -> None:
    pixels = noise(1, 6)
    image = (pixels.permute(0, 3, 1, 2).float() / 255)[0]
    dims = [[], *([[2]] * hflip), *([[1]] * vflip), *([[1, 2]] * (hflip and vflip))]
    drawn = views_of(pixels, torch.arange(400), Augment(hflip=hflip, vflip=vflip))
    counts = [sum(torch.equal(view, image.flip(dim)) for view in drawn) for dim in dims]
    assert sum(counts) == 400
    assert all(abs(count - 400 / len(dims)) < 4 * math.sqrt(400 / len(dims)) for count in counts)


def test_the_flips_of_a_view_do_not_depend_on_what_else_may_change() -> None:
    views = torch.arange(32)
    flipped = views_of(smooth(32), views, Augment())
    also_turned = views_of(smooth(32), views, Augment(rotate=1e-4))
    assert (flipped - also_turned).abs().max() < 2e-3


@given(seed=st.integers(0, 2**32), white=st.booleans())
@settings(max_examples=20, deadline=None)
def test_values_stay_in_0_to_1(seed: int, white: bool) -> None:
    pixels = torch.full((8, 10, 10, 3), 255, dtype=torch.uint8) if white else noise(8, 10, seed) // 128 * 255
    ids = torch.arange(8)
    for augment in (EVERYTHING, Augment(rotate=180, zoom=0.5, shift=0.5), Augment(brightness=1, contrast=1, hue=1)):
        views = render(pixels, ids, ids, augment=augment, seed=seed)
        assert views.min() >= 0
        assert views.max() <= 1


def drawn_angles(views: Tensor) -> Tensor:
    return torch.from_numpy(2 * uniform(0, torch.zeros_like(views), views)[:, 2] - 1)


def test_half_a_turn_is_both_flips_and_a_quarter_turn_goes_left() -> None:
    pixels, views = smooth(48), torch.arange(4000)
    image = (pixels.permute(0, 3, 1, 2).float() / 255)[0]
    angle = drawn_angles(views)
    turned = Augment(**STILL, rotate=180)
    for share, expected in ((1.0, image.flip((1, 2))), (0.5, torch.rot90(image, 1, (1, 2)))):
        nearest = views[(angle - share).abs().argmin()][None]
        view = views_of(pixels, nearest, turned)[0]
        assert (view - expected).abs().max() < 0.01
        assert (view - image).abs().mean() > 0.05


def test_a_turned_picture_is_mirrored_beyond_its_border_and_not_black() -> None:
    white = torch.full((1, 16, 16, 3), 255, dtype=torch.uint8)
    assert views_of(white, torch.arange(64), Augment(rotate=180, zoom=0.5, shift=0.3)).min() > 0.9999


def test_moved_without_rotation_it_is_what_torch_resamples_and_mirrors() -> None:
    pixels, views = noise(1, 20), torch.arange(40)
    kind = {"zoom": 0.4, "shift": 0.3}
    apart = views_of(pixels, views, Augment(**kind)) - views_of(pixels, views, Augment(**kind, rotate=1e-4))
    assert apart.abs().max() < 1e-3


def test_the_same_view_at_another_size_shows_the_same() -> None:
    views = torch.arange(24)
    for augment in (Augment(rotate=180, zoom=0.2), EVERYTHING):
        large, small = views_of(smooth(96), views, augment), views_of(smooth(48), views, augment)
        apart = (F.avg_pool2d(large, 2) - small).abs()
        assert apart.mean() < 0.005
        assert apart.max() < 0.05
    for augment in (Augment(rotate=90), Augment(**STILL, zoom=0.3), Augment(**STILL, shift=0.2), Augment(hue=0.2)):
        assert (views_of(smooth(48), views, augment) - views_of(smooth(48), views + 1, augment)).abs().mean() > 0.01


def test_zoom_and_shift_move_by_as_much_as_they_say() -> None:
    # A ramp from left to right: its slope in the middle is the scale, its middle the shift.
    size = 64
    ramp = torch.arange(size, dtype=torch.uint8)[None, None, :, None].expand(1, size, size, 3) * 2
    views = torch.arange(300)
    rows = views_of(ramp, views, Augment(**STILL, zoom=0.25))[:, 0, 32] * 255 / 2
    scale = 16 / (rows[:, 40] - rows[:, 24])
    assert 1 / 1.251 <= scale.min() < 1 / 1.23
    assert 1.23 < scale.max() <= 1.251
    moved = (views_of(ramp, views, Augment(**STILL, shift=0.1))[:, 0, 32, 32] * 255 / 2 - 32) / size
    assert -0.101 <= moved.min() < -0.097
    assert 0.097 < moved.max() <= 0.101


@pytest.mark.parametrize("name", ["brightness", "hue"])
def test_mean_colour_changes_by_no_more_than_the_half_width_and_by_as_much(name: str) -> None:
    image = smooth(24)
    before = image.float().mean((0, 1, 2)) / 255
    factors = views_of(image, torch.arange(500), Augment(**STILL, **{name: 0.15})).mean((2, 3)) / before
    assert factors.min() >= 0.85 - 1e-5
    assert factors.max() <= 1.15 + 1e-5
    assert factors.min() < 0.86
    assert factors.max() > 1.14
    together = (factors[:, 0] - factors[:, 1]).abs().max()
    assert together < 1e-5 if name == "brightness" else together > 0.1


def test_contrast_keeps_the_mean_and_scales_the_spread() -> None:
    image = smooth(24)
    views = views_of(image, torch.arange(500), Augment(**STILL, contrast=0.3))
    plain = image.float() / 255
    assert (views.mean((1, 2, 3)) - plain.mean()).abs().max() < 1e-5
    ratio = views.std((1, 2, 3)) / plain.std()
    assert 0.7 - 1e-4 <= ratio.min() < 0.71
    assert 1.29 < ratio.max() <= 1.3 + 1e-4


def test_saturation_keeps_grey_and_scales_the_distance_from_it() -> None:
    image = smooth(24)
    views = views_of(image, torch.arange(500), Augment(**STILL, saturation=0.3))
    plain = (image.permute(0, 3, 1, 2).float() / 255)[0]
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    grey = (plain * weights).sum(0)
    assert ((views * weights).sum(1) - grey).abs().max() < 1e-5
    ratio = (views - grey).flatten(1).norm(dim=1) / (plain - grey).norm()
    assert 0.7 - 1e-4 <= ratio.min() < 0.71
    assert 1.29 < ratio.max() <= 1.3 + 1e-4
    flat = torch.full((1, 8, 8, 3), 90, dtype=torch.uint8)
    assert (views_of(flat, torch.arange(9), Augment(saturation=0.5)) - 90 / 255).abs().max() < 1e-6


# Random combinations, contours, smoothing, noise ---------------------------------------------------------------------


def test_a_combination_applies_each_operation_by_a_draw_of_its_own() -> None:
    views = torch.arange(2000)
    u = uniform(0, torch.zeros(2000), views)
    image = smooth(8)
    for name, gate in (
        ("brightness", 15),
        ("contrast", 16),
        ("saturation", 17),
        ("hue", 18),
        ("blur", 20),
        ("noise", 22),
    ):
        always = Augment(**STILL, **{name: 0.2})
        some = Augment(**STILL, **{name: 0.2}, subset=0.3)
        applied = torch.from_numpy(u[:, gate] < 0.3)
        assert abs(float(applied.float().mean()) - 0.3) < 0.04
        found, everywhere = views_of(image, views, some), views_of(image, views, always)
        assert torch.equal(found[applied], everywhere[applied]), name
        assert (found[~applied] - views_of(image, views[:1], NONE)).abs().max() < 1e-6, name
    gates = np.corrcoef((u[:, 12:24] < 0.5).T) - np.eye(12)
    assert abs(gates).max() < 5 / math.sqrt(2000)


def test_the_strength_of_what_is_applied_does_not_depend_on_how_often_it_is() -> None:
    turned, sometimes = (views_of(smooth(16), torch.arange(200), Augment(rotate=90, subset=s)) for s in (1, 0.5))
    same = (turned == sometimes).flatten(1).all(1)
    assert 70 < int(same.sum()) < 130


def test_contours_are_dark_where_a_picture_changes_and_white_where_it_does_not() -> None:
    step = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    step[:, :, 4:] = 255
    view = views_of(step, torch.tensor([0]), Augment(**STILL, edges=1.0))[0, 0]
    # Half the picture, half its contours: black lines at the two columns beside the step, else white.
    torch.testing.assert_close(view[3], torch.tensor([0.5, 0.5, 0.5, 0.0, 0.5, 1.0, 1.0, 1.0]))
    drawn = views_of(step, torch.arange(1000), Augment(**STILL, edges=0.1))
    share = float((drawn[:, 0, 0, 0] > 0.25).float().mean())
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / 1000)


def test_smoothing_is_a_gaussian_of_the_drawn_width() -> None:
    size, blur = 32, 0.06
    point = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    point[:, 16, 16] = 255
    views = torch.arange(50)
    found = views_of(point, views, Augment(**STILL, blur=blur))[:, 0]
    sigma = torch.from_numpy(uniform(0, torch.zeros(50), views)[:, 19] * blur * size)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(50))
    apart = torch.arange(size) - 16
    spread = (found.sum(1) * apart**2).sum(1).sqrt()
    wide = sigma > 0.7
    assert int(wide.sum()) > 10
    assert (spread[wide] / sigma[wide] - 1).abs().max() < 0.05
    flat = torch.full((1, 9, 9, 3), 77, dtype=torch.uint8)
    torch.testing.assert_close(views_of(flat, views, Augment(**STILL, blur=0.2)), torch.full((50, 3, 9, 9), 77 / 255))


def test_noise_is_near_normal_and_of_the_drawn_strength() -> None:
    field = _normal(torch.arange(64), (3, 40, 40)).double()
    assert abs(float(field.mean())) < 4 / math.sqrt(field.numel())
    assert float(field.var()) == pytest.approx(1, abs=0.02)
    assert kstest(field.flatten()[:20_000], "norm").statistic < 0.02
    assert abs(float((field[:, :, :, 1:] * field[:, :, :, :-1]).mean())) < 0.01
    assert abs(float((field[:, 0] * field[:, 1]).mean())) < 0.02
    assert abs(float((field[1:] * field[:-1]).mean())) < 0.01
    grey = torch.full((1, 40, 40, 3), 128, dtype=torch.uint8)
    views = torch.arange(20)
    spread = views_of(grey, views, Augment(**STILL, noise=0.1)).flatten(1).std(1)
    drawn = torch.from_numpy(uniform(0, torch.zeros(20), views)[:, 21]).float() * 0.1
    torch.testing.assert_close(spread, drawn, rtol=0.06, atol=1e-6)


def test_the_hash_of_noise_is_that_of_draws() -> None:
    keys = _keys(3, torch.arange(50), torch.arange(50))
    assert np.array_equal(_mixed(torch.from_numpy(keys.view(np.int64))).numpy().view(np.uint64), _mix(keys))
