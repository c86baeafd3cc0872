"""StarDist's targets are those of a pixel-by-pixel reference, and its loss is the equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from histill.data.phantom import draw
from histill.errors import BadInput
from histill.losses import star_loss
from histill.losses.star import star_distances

RAYS = 8


def naive_ray(mask: NDArray[np.int64], y: int, x: int, angle: float) -> float:
    """Walk until the number changes, then give back what the last step overshot."""
    dy, dx = np.sin(angle), np.cos(angle)
    steps = 0
    while True:
        steps += 1
        i, j = round(y + steps * dy), round(x + steps * dx)
        if not (0 <= i < mask.shape[0] and 0 <= j < mask.shape[1]) or mask[i, j] != mask[y, x]:
            return float(steps - 1 + 0.5 / max(abs(dy), abs(dx)))


def naive(mask: NDArray[np.int64], rays: int, grid: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    prob = np.where(mask < 0, -1.0, 0.0)
    for number in np.unique(mask[mask > 0]):
        own = mask == number
        distance = distance_transform_edt(np.pad(own, 1))[1:-1, 1:-1] if own.all() else distance_transform_edt(own)
        prob[own] = (distance / distance[own].max())[own]
    dist = np.zeros((rays, *mask.shape))
    for y, x in np.argwhere(mask > 0):
        if y % grid == x % grid == 0:
            dist[:, y, x] = [naive_ray(mask, y, x, 2 * np.pi * k / rays) for k in range(rays)]
    return prob[::grid, ::grid], dist[:, ::grid, ::grid]


def agrees(masks: list[NDArray[np.int64]], rays: int = RAYS, grid: int = 2) -> None:
    prob, dist = star_distances(torch.from_numpy(np.stack(masks)), rays=rays, grid=grid)
    for index, mask in enumerate(masks):
        prob_true, dist_true = naive(mask, rays, grid)
        np.testing.assert_allclose(prob[index], prob_true, atol=1e-6)
        np.testing.assert_allclose(dist[index], dist_true, atol=1e-5)


@st.composite
def scenes(draw_: st.DrawFn) -> NDArray[np.int64]:
    """Boxes over boxes, so that instances touch, fall apart, are of one pixel and leave the image."""
    height, width = draw_(st.integers(1, 15)), draw_(st.integers(1, 15))
    mask = np.full((height, width), draw_(st.sampled_from([0, 0, -1, 9])))
    for _ in range(draw_(st.integers(0, 6))):
        top, left = draw_(st.integers(0, height - 1)), draw_(st.integers(0, width - 1))
        high, wide = draw_(st.integers(1, 12)), draw_(st.integers(1, 12))
        mask[top : top + high, left : left + wide] = draw_(st.sampled_from([-1, 0, 1, 2, 10**15]))
    return mask.astype(np.int64)


@settings(deadline=None, max_examples=50)
@given(scenes(), st.integers(1, 3))
def test_targets_are_those_of_the_walk_and_of_the_distance_transform(scene: NDArray[np.int64], grid: int) -> None:
    agrees([scene], grid=grid)


def test_targets_of_tissue_with_all_rays() -> None:
    nuclei = [draw("malignant", size=64, mpp=0.4, seed=seed).nuclei.astype(np.int64) for seed in (0, 1)]
    assert min(len(np.unique(mask)) for mask in nuclei) > 3
    agrees(nuclei, rays=32)


def test_the_middle_of_a_square_by_hand() -> None:
    mask = torch.zeros(1, 9, 9, dtype=torch.long)
    mask[0, 2:7, 2:7] = 4
    prob, dist = star_distances(mask, rays=8, grid=4)
    # Along a diagonal the steps end at 1, 1, 2 and 3 pixels to the side: the fourth is outside.
    straight, diagonal = 2.5, 3 + 0.5 * 2**0.5
    assert dist[0, :, 1, 1].tolist() == pytest.approx([straight, diagonal] * 4)
    assert prob[0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_ray_0_points_right_and_the_next_ones_down() -> None:
    mask = torch.zeros(1, 21, 21, dtype=torch.long)
    mask[0, 9:13, 10:14] = 1  # from (10, 10): 3 to the right, 2 down, none to the left, 1 up
    dist = star_distances(mask, rays=4, grid=2)[1]
    assert dist[0, :, 5, 5].tolist() == pytest.approx([3.5, 2.5, 0.5, 1.5])


def test_an_image_says_nothing_of_another() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(-1, 3, (3, 12, 10), generator=generator).repeat_interleave(3, 1).repeat_interleave(3, 2)
    together = star_distances(masks)
    for index in range(3):
        for whole, alone in zip(together, star_distances(masks[index : index + 1]), strict=True):
            torch.testing.assert_close(whole[index : index + 1], alone, rtol=0, atol=0)


def test_numbers_are_names() -> None:
    mask = torch.from_numpy(draw("benign", size=48, seed=3).nuclei.astype(np.int64))[None]
    renamed = torch.where(mask > 0, (mask * 7919) % 10007 + 1, mask)
    for one, other in zip(star_distances(mask), star_distances(renamed), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [torch.zeros(4, 4, dtype=torch.long), torch.zeros(1, 4, 4), torch.zeros(1, 1, 4, 4)])
def test_refuses_what_is_no_mask(wrong: torch.Tensor) -> None:
    with pytest.raises(BadInput, match="integers"):
        star_distances(wrong)


def test_the_loss_is_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, dist, target = (torch.randn(2, c, 3, 4, generator=generator, dtype=torch.float64) for c in (1, 5, 5))
    p = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    p[0, 0], p[1, 2] = 0, -1  # background, and four pixels of which nobody knows
    terms = star_loss(logits, dist, p, target, dist_weight=0.7, background=0.3)
    known = [(b, y, x) for b, y, x in np.ndindex(2, 3, 4) if p[b, y, x] >= 0]
    entropy, error, weight, far = [], [], [], []
    for b, y, x in known:
        q, w = 1 / (1 + np.exp(-logits[b, 0, y, x].item())), p[b, y, x].item()
        entropy.append(-w * np.log(q) - (1 - w) * np.log(1 - q))
        error.append(w * np.mean([abs((dist - target)[b, k, y, x].item()) for k in range(5)]))
        far.append((1 - w) * np.mean([abs(dist[b, k, y, x].item()) for k in range(5)]))
        weight.append(w)
    assert terms["prob"][0] == 1
    assert terms["prob"][1].item() == pytest.approx(np.mean(entropy))
    assert terms["dist"][0] == 0.7
    assert terms["dist"][1].item() == pytest.approx(sum(error) / sum(weight) + 0.3 * np.mean(far), rel=1e-6)


def test_pixels_of_which_nobody_knows_teach_nothing() -> None:
    logits, dist = torch.randn(1, 1, 4, 4).requires_grad_(), torch.randn(1, 6, 4, 4).requires_grad_()
    mask = torch.zeros(1, 8, 8, dtype=torch.long)
    mask[0, :4], mask[0, 4:] = -1, 1
    prob, target = star_distances(mask, rays=6)
    torch.stack([loss for _, loss in star_loss(logits, dist, prob, target).values()]).sum().backward()
    assert logits.grad is not None
    assert dist.grad is not None
    for gradient in (logits.grad, dist.grad):
        assert not gradient[..., :2, :].any()
        assert gradient[..., 2:, :].all()


def test_an_image_without_nuclei_still_says_so() -> None:
    logits, dist = torch.zeros(1, 1, 2, 2).requires_grad_(), torch.ones(1, 3, 2, 2)
    terms = star_loss(logits, dist, *star_distances(torch.zeros(1, 4, 4, dtype=torch.long), rays=3))
    assert terms["prob"][1].item() == pytest.approx(np.log(2))
    assert terms["dist"][1].item() == pytest.approx(1e-4)
    nothing = star_loss(logits, dist, *star_distances(torch.full((1, 4, 4), -1), rays=3))
    assert [loss.item() for _, loss in nothing.values()] == [0, 0]
