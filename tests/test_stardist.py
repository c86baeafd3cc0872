"""StarDist's instances are those of its targets, whatever the tiles and the scale."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.data.phantom import draw
from histill.errors import BadInput, Failed
from histill.evaluate.objects import match
from histill.losses.star import star_distances
from histill.models import StarDist, predict_instances
from histill.models.stardist import RECEPTIVE_FIELD, percentile_limits
from histill.models.stardist_instances import non_maximum_suppression, polygons, predict_prob, render
from histill.types import Outputs

Array = NDArray[np.float64]


# From targets to instances


class Knowing(nn.Module):
    """A network that has been told the truth of one image, and finds out where a tile is from its first two channels.

    ``forward`` of the images that `located` makes returns the targets of that place.
    """

    def __init__(self, mask: NDArray[Any], rays: int = 32) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(()))
        self.targets = star_distances(torch.from_numpy(mask.astype(np.int64))[None], rays=rays)
        self.tiles: list[tuple[int, int]] = []

    def forward(self, images: Tensor, limits: Tensor | None = None) -> Outputs:
        self.tiles.append((images.shape[-2], images.shape[-1]))
        x, y = (images[0, :2, ::2, ::2] * 512).round().long().clamp(min=0) // 2
        prob, dist = self.targets
        y, x = y.clamp(max=prob.shape[1] - 1), x.clamp(max=prob.shape[2] - 1)
        prob, dist = prob[0, y, x][None, None], dist[:, :, y, x]
        return Outputs(logits=prob.logit(), prob=prob, dist=dist)


def located(height: int, width: int) -> Tensor:
    """``(3, H, W)``: each pixel holds its own x and y in 512ths."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]) / 512


@functools.cache
def tissue(size: int = 128) -> NDArray[np.uint16]:
    return draw("malignant", size=size, mpp=0.3, seed=1).nuclei


def test_perfect_outputs_give_the_nuclei_back() -> None:
    truth = tissue()
    found = predict_instances(Knowing(truth), located(*truth.shape), prob_threshold=0.5, border=0)
    counts = match(truth, found.labels, threshold=0.7)
    assert counts.tp >= 0.9 * (counts.tp + counts.fn)
    assert counts.fp <= 0.05 * counts.tp
    assert counts.iou / counts.tp > 0.88
    assert found.labels.dtype == np.int32
    assert set(np.unique(found.labels)) <= set(range(len(found.scores) + 1))
    assert (np.diff(found.scores) <= 0).all()
    assert found.polygons.shape == (len(found.scores), 32, 2)
    x, y = found.points.astype(int).T
    assert truth[y, x].all()


def test_the_surest_first_and_all_of_it_on_top() -> None:
    truth = tissue()
    found = predict_instances(Knowing(truth), located(*truth.shape), prob_threshold=0.5)
    for index in range(5):
        alone = render(found.polygons[[index]], truth.shape) > 0
        assert (found.labels[alone] <= index + 1).all()
    assert (found.labels[render(found.polygons[[0]], truth.shape) > 0] == 1).all()


@pytest.mark.parametrize("size", [(128, 128), (121, 90), (17, 50)])
def test_tiles_leave_no_trace(size: tuple[int, int]) -> None:
    truth = tissue()[: size[0], : size[1]]
    network = Knowing(truth)
    whole = predict_instances(network, located(*size), prob_threshold=0.5)
    assert len(network.tiles) == 1
    tiled = predict_instances(network, located(*size), prob_threshold=0.5, tile=32, overlap=16)
    assert len(network.tiles) == 1 + -(-size[0] // 32) * -(-size[1] // 32)
    assert max(max(shape) for shape in network.tiles[1:]) <= 16 + 32 + 16
    np.testing.assert_array_equal(tiled.labels, whole.labels)
    np.testing.assert_array_equal(tiled.polygons, whole.polygons)
    np.testing.assert_array_equal(tiled.scores, whole.scores)


@functools.cache
def sharp() -> StarDist:
    """A network whose outputs vary: random weights, larger than at the start of a training."""
    torch.manual_seed(0)
    network = StarDist(rays=8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.6)
        network.dist.bias.fill_(5)
    return network.eval()


def test_tiles_leave_no_trace_of_a_real_network() -> None:
    noise = torch.rand(1, 3, 8, 40, generator=torch.Generator().manual_seed(0))
    image = nn.functional.interpolate(noise, scale_factor=6, mode="bicubic")[0].clamp(0, 1)[:, :41, :234]
    whole, tiled = (predict_instances(sharp(), image, prob_threshold=0.4, tile=tile, border=0) for tile in (240, 48))
    assert len(whole.scores) > 20
    # The same convolutions of larger and smaller arrays are not summed in the same order.
    np.testing.assert_allclose(tiled.scores, whole.scores, atol=1e-5)
    np.testing.assert_allclose(tiled.polygons, whole.polygons, atol=1e-3)
    assert (tiled.labels != whole.labels).mean() < 1e-3


def test_an_output_sees_no_further_than_the_overlap() -> None:
    network = StarDist(rays=3).double()
    for parameter in network.parameters():
        parameter.data.abs_()  # so that nothing is cut off by a ReLU
    middle, farthest = 128, 0
    for offset, slope in ((2, 1.0), (12, -1.0)):  # pooling passes on the larger: the lower, and the upper pixel
        ramp = torch.linspace(0, slope, 256, dtype=torch.float64) + 1
        images = ramp.view(1, 1, -1, 1).repeat(1, 3, 1, 16).requires_grad_()
        logit = network(images, torch.tensor([[0.0, 1.0]]))["logits"][0, 0, (middle + offset) // 2, 4]
        (gradient,) = torch.autograd.grad(logit, images)
        rows = torch.nonzero(gradient.abs().sum((0, 1, 3)))[:, 0] - (middle + offset)
        farthest = max(farthest, int(rows.abs().max()))
    assert farthest == RECEPTIVE_FIELD


def test_a_part_is_scaled_by_the_limits_of_the_whole() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    image[..., :16] *= 0.2
    limits = percentile_limits(image)
    expected = torch.quantile(image.flatten(), torch.tensor([0.01, 0.998]))
    torch.testing.assert_close(limits[0], expected)
    network = sharp()
    with torch.no_grad():
        torch.testing.assert_close(network(image)["logits"], network(image, limits)["logits"])
        part, low = image[..., :16], network(image[..., :16])["logits"]
        assert not torch.allclose(network(part, limits)["logits"], low, atol=1e-2)


def test_uint8_and_tensor_are_the_same_image() -> None:
    image = draw("malignant", size=64, seed=2).image
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1) / 255
    one, other = (predict_instances(sharp(), each, prob_threshold=0.5) for each in (image, tensor))
    np.testing.assert_array_equal(one.labels, other.labels)


def test_scale_shows_the_network_a_larger_image_and_answers_in_pixels_of_the_smaller() -> None:
    truth = tissue()
    small = truth[::2, ::2]
    seen: list[Tensor] = []

    class Larger(Knowing):
        def forward(self, images: Tensor, limits: Tensor | None = None) -> Outputs:
            seen.append(images)
            return super().forward(located(*truth.shape)[None])

    found = predict_instances(Larger(truth), torch.rand(3, *small.shape), prob_threshold=0.5, scale=2, border=0)
    assert seen[0].shape[-2:] == truth.shape
    assert found.labels.shape == small.shape
    # Pixel (x, y) of the smaller image covers pixels 2x and 2x + 1 of the larger: no shift by half a pixel.
    whole = predict_instances(Knowing(truth), located(*truth.shape), prob_threshold=0.5, border=0)
    np.testing.assert_allclose(found.polygons, (whole.polygons - 0.5) / 2)
    middle = truth.reshape(64, 2, 64, 2).max(axis=(1, 3))
    assert match(middle, found.labels).tp >= 0.85 * match(truth, whole.labels).tp


@pytest.mark.parametrize("size", [(128, 128), (37, 90)])
def test_the_probability_of_a_pixel_of_the_map_is_its_own(size: tuple[int, int]) -> None:
    network = Knowing(tissue()[: size[0], : size[1]])
    whole, tiled = (predict_prob(network, located(*size), tile=tile, overlap=16) for tile in (128, 32))
    np.testing.assert_array_equal(whole, tiled)
    truth = network.targets[0][0].numpy()
    np.testing.assert_allclose(whole[::2, ::2], truth, atol=1e-5)
    between = (truth[:, 1:] + truth[:, :-1]) / 2
    np.testing.assert_allclose(whole[::2, 1::2][:, : between.shape[1]], between, atol=1e-5)


def test_the_edge_of_the_image_can_be_left_out() -> None:
    truth = tissue()
    found = predict_instances(Knowing(truth), located(*truth.shape), prob_threshold=0.5, border=4)
    assert found.points.min() >= 8
    assert found.points.max() < 120


def test_an_image_without_candidates_has_no_instances() -> None:
    found = predict_instances(sharp(), np.zeros((20, 30, 3), np.uint8), prob_threshold=1.0)
    assert found.labels.shape == (20, 30)
    assert not found.labels.any()
    assert found.polygons.shape == (0, 8, 2)
    assert len(found.scores) == len(found.points) == 0


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), torch.zeros(8, 8, 3), torch.zeros(1, 3, 8, 8)]
)
def test_refuses_what_is_no_image(image: Any) -> None:
    with pytest.raises(BadInput, match=r"give uint8 \(H, W, 3\)"):
        predict_instances(sharp(), image)


def test_refuses_tiles_that_do_not_fit_and_a_network_that_diverged() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    for wrong in ({"tile": 100}, {"overlap": 10}, {"tile": 0}):
        with pytest.raises(BadInput, match="multiples of 16"):
            predict_instances(sharp(), image, **wrong)
    with pytest.raises(BadInput, match="scale"):
        predict_instances(sharp(), image, scale=0)
    broken = StarDist(rays=3)
    nn.init.constant_(broken.dist.bias, torch.nan)
    with pytest.raises(Failed, match="not a number"):
        predict_instances(broken, image)


# Non-maximum suppression and rendering


def circle(radius: float, rays: int = 32) -> Array:
    return np.full(rays, radius)


def lens(r: float, d: float) -> float:
    """The area that two circles of radius r share whose centres are d apart."""
    return float(2 * r**2 * np.arccos(d / (2 * r)) - d / 2 * np.sqrt(4 * r**2 - d**2))


def test_circles_that_overlap_more_than_the_threshold_are_one() -> None:
    radius, rays = 10.0, 128
    for apart in (6.0, 9.0, 12.0, 15.0, 21.0):
        share = lens(radius, apart) / (np.pi * radius**2) if apart < 20 else 0.0
        points = np.array([[0.0, 0.0], [apart, 0.0]])
        dist = np.stack([circle(radius, rays)] * 2)
        for threshold, kept in ((share + 0.01, [1, 0]), (share - 0.01, [1])):
            if threshold > 0:
                found = non_maximum_suppression(points, dist, np.array([0.6, 0.9]), threshold=threshold)
                assert found.tolist() == kept, (apart, threshold)


def test_the_smaller_of_two_counts() -> None:
    points, scores = np.array([[0.0, 0.0], [3.0, 0.0]]), np.array([0.9, 0.8])
    dist = np.stack([circle(20), circle(0.5)])
    assert non_maximum_suppression(points, dist, scores, threshold=0.9).tolist() == [0]
    assert non_maximum_suppression(points, dist, scores[::-1], threshold=0.9).tolist() == [1]


def test_what_is_suppressed_suppresses_nothing() -> None:
    points = np.array([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]])
    dist, scores = np.stack([circle(8)] * 3), np.array([0.9, 0.8, 0.7])
    assert non_maximum_suppression(points, dist, scores, threshold=0.2).tolist() == [0, 2]


def test_equal_scores_go_by_place_not_by_order() -> None:
    points = np.array([[4.0, 2.0], [2.0, 2.0], [6.0, 0.0]])
    dist = np.stack([circle(9)] * 3)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        kept = non_maximum_suppression(points[order], dist[order], np.ones(3))
        assert points[order][kept].tolist() == [[6, 0]]


def naive_kept(points: Array, dist: Array, scores: Array, threshold: float) -> list[int]:
    """Every pair, counted on a fine lattice by the angle and the distance of each point."""
    lattice = np.stack(np.meshgrid(np.arange(-5, 45, 0.2), np.arange(-5, 45, 0.2)), axis=-1)
    rays = dist.shape[1]
    inside = []
    for point, far in zip(points, dist, strict=True):
        offset = lattice - point
        k = np.floor(np.arctan2(offset[..., 1], offset[..., 0]) % (2 * np.pi) / (2 * np.pi / rays)).astype(int) % rays
        corners = far[:, None] * np.stack([np.cos(a := np.arange(rays) * 2 * np.pi / rays), np.sin(a)], axis=1)
        a, b = corners[k], corners[(k + 1) % rays]
        edge, reach = b - a, offset - a
        inside.append(edge[..., 0] * reach[..., 1] - edge[..., 1] * reach[..., 0] >= 0)
    kept: list[int] = []
    for j in np.argsort(-scores):
        overlaps = [(inside[i] & inside[j]).sum() / min(inside[i].sum(), inside[j].sum()) for i in kept]
        if all(overlap <= threshold for overlap in overlaps):
            kept.append(int(j))
    return kept


def test_suppression_agrees_with_every_pair_on_a_lattice() -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        points, scores = rng.uniform(5, 35, (14, 2)), rng.permutation(14) / 14.0
        dist = rng.uniform(2, 8, (14, 1)) * rng.uniform(0.6, 1.4, (14, 12))
        assert non_maximum_suppression(points, dist, scores, threshold=0.3).tolist() == naive_kept(
            points, dist, scores, 0.3
        )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_rendering_is_the_winding_of_every_pixel_around_its_polygon(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outlines = polygons(rng.uniform(-3, 15, (3, 2)), rng.uniform(0.1, 7, (3, 7)))
    labels = render(outlines, (11, 13))
    for y, x in np.ndindex(11, 13):
        expected = 0
        for number in (3, 2, 1):
            ring = outlines[number - 1] - (x, y)
            following = np.roll(ring, -1, axis=0)
            turns = np.arctan2(
                ring[:, 0] * following[:, 1] - ring[:, 1] * following[:, 0], (ring * following).sum(axis=1)
            )
            if abs(turns.sum()) > np.pi:
                expected = number
        assert labels[y, x] == expected


def test_a_polygon_outside_the_image_and_one_around_it() -> None:
    outlines = polygons(np.array([[-50.0, 4.0], [4.0, 4.0]]), np.stack([circle(9), circle(1e6)]))
    assert (render(outlines, (8, 8)) == 2).all()
    assert render(outlines[:1], (8, 8)).sum() == 0
    assert render(np.zeros((0, 32, 2)), (2, 3)).shape == (2, 3)
