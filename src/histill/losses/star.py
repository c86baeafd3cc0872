"""StarDist's targets and loss: how far each pixel's nucleus reaches along every ray, and how central the pixel is."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from histill.accelerator import sent
from histill.errors import BadInput
from histill.losses._shared import constant, precise
from histill.types import Terms

__all__ = ["star_distances", "star_loss"]


@torch.no_grad()
def star_distances(instances: Tensor, *, rays: int = 32, grid: int = 2) -> tuple[Tensor, Tensor]:
    """Star-convex targets of instance masks (Schmidt et al. 2018), as the released StarDist computes them.

    Both are computed at every pixel's full resolution and taken at each ``grid``-th one. A ray goes in steps of one
    pixel until the number changes or the image ends, and the half pixel by which it overshoots is given back:
    ``d_k = n_k - 1 + 0.5 / max(|cos|, |sin|)`` for the n_k-th step, the first that is outside. Ray k points
    at the angle ``2 pi k / rays``, from the positive x axis towards the positive y axis (down).

    Args:
        instances: ``(B, H, W)`` integers: 0 background, the number of the instance, or -1 where nobody knows.
        rays: Directions, equally spaced.
        grid: Pixels between two pixels of the targets.

    Returns:
        ``prob`` ``(B, H/grid, W/grid)``: the Euclidean distance to the nearest pixel that is not the instance's,
        divided by the instance's largest, so in (0, 1]; 0 in the background and -1 where nobody knows. The end of the
        image is no edge, as the nucleus goes on behind it. ``dist`` ``(B, rays, H/grid, W/grid)`` in pixels, 0
        outside the instances. float32.
    """
    if instances.ndim != 3 or instances.is_floating_point() or instances.is_complex():
        raise BadInput(f"instances {tuple(instances.shape)} {instances.dtype}: give integers of (B, H, W)")
    if rays < 3 or grid < 1:
        raise BadInput(f"rays {rays} and grid {grid}: give at least 3 and 1")
    instances = instances.long()
    distance = _edge_distances(instances)
    prob = _centrality(instances, distance)[:, ::grid, ::grid].contiguous()
    return prob, _march(instances, distance, rays, grid)


def _march(instances: Tensor, distance: Tensor, rays: int, grid: int) -> Tensor:
    """All rays go on together, and those that have arrived are left behind.

    A ray leaps where the nearest edge is far: a pixel on it is at most sqrt(0.5) off it, so the pixels of two steps
    that are s apart are less than s + sqrt(2) apart, and nothing can happen before the edge's distance less that.
    """
    _, height, width = instances.shape
    y, x = (torch.arange(n, device=instances.device) for n in (height, width))
    rim = torch.minimum(torch.minimum(y + 1, height - y)[:, None], torch.minimum(x + 1, width - x))
    leap = ((torch.minimum(distance, rim) - 2**0.5 + 1).ceil() - 1).clamp(min=1).long()
    border = (1, 1, 1, 1)  # enough, as the last step of a ray is one of 1
    own, leap = F.pad(instances, border, value=-1).flatten(), F.pad(leap, border).flatten()

    sampled = instances[:, ::grid, ::grid]
    image, row, column = torch.nonzero(sampled > 0, as_tuple=True)
    start = (image * (height + 2) + row * grid + 1) * (width + 2) + column * grid + 1
    angle = torch.arange(rays, dtype=torch.float64) * (2 * math.pi / rays)  # MPS has no float64
    dx, dy = angle.cos(), angle.sin()
    step = torch.arange(height + width + 1)[:, None]
    move = ((step * dy).round().long() * (width + 2) + (step * dx).round().long()).flatten()  # of step * rays + ray
    overshoot = sent((1 - 0.5 / torch.maximum(dx.abs(), dy.abs())).float(), instances.device)
    move = sent(move, instances.device)

    arrived = torch.empty(len(start) * rays, dtype=torch.long, device=instances.device)
    going = torch.arange(len(arrived), device=instances.device)
    start = start.repeat_interleave(rays)
    taken = going % rays + rays * leap[start]
    while len(going):
        place = start + move[taken]
        inside = torch.nonzero(own[place] == own[start])[:, 0]
        arrived[going] = taken  # for those that go on, not the last word
        going, start = going[inside], start[inside]
        taken = taken[inside] + rays * leap[place[inside]]

    dist = torch.zeros(*sampled.shape, rays, device=instances.device)
    dist[image, row, column] = (arrived // rays).view(-1, rays) - overshoot
    return dist.movedim(-1, 1).contiguous()


def _centrality(instances: Tensor, distance: Tensor) -> Tensor:
    """``(B, H, W)``: the distance to the instance's edge over its largest in the instance; 0 and -1 elsewhere."""
    prob = torch.where(instances < 0, -1.0, 0.0)
    inside = instances > 0
    numbers, which = torch.unique(instances[inside], return_inverse=True)
    which = which + torch.nonzero(inside)[:, 0] * len(numbers)
    largest = torch.zeros(len(instances) * len(numbers), device=instances.device)
    largest = largest.scatter_reduce(0, which, distance[inside], "amax")
    prob[inside] = distance[inside] / largest[which]
    return prob


def _edge_distances(instances: Tensor) -> Tensor:
    """``(B, H, W)``: how far each instance's pixels are from the nearest pixel of another number, exactly.

    By columns first; then every pixel looks along its row, where a pixel of the same number t columns away offers
    ``sqrt(t^2 + its column's distance^2)`` and the first of another number offers t. Where the image has one number
    only, its end is the edge.
    """
    _, height, width = instances.shape
    single = (instances == instances[:, :1, :1]).flatten(1).all(1)
    column = torch.minimum(_up(instances, single), _up(instances.flip(1), single).flip(1)).square().flatten()
    flat = instances.flatten()
    start = torch.nonzero(flat > 0)[:, 0]
    best = column[start]
    x = start % width
    alone = single[start // (height * width)]
    for side, room in ((-1, x), (1, width - 1 - x)):
        best = torch.where(alone, torch.minimum(best, (room + 1.0) ** 2), best)
        going, t = torch.nonzero((room > 0) & (best > 1))[:, 0], 0
        while len(going):
            t += 1
            place = start[going] + side * t
            same = flat[place] == flat[start[going]]
            found = torch.minimum(best[going], torch.where(same, column[place], 0.0) + t * t)
            best[going] = found
            going = going[same & (room[going] > t) & (found > (t + 1) ** 2)]
    distance = torch.zeros(flat.shape, device=flat.device)
    distance[start] = best.sqrt()
    return distance.view_as(instances)


def _up(instances: Tensor, single: Tensor) -> Tensor:
    """``(B, H, W)``: steps to the next pixel of another number above; infinite where there is none."""
    row = torch.arange(instances.shape[1], device=instances.device)[:, None]
    begins = F.pad(instances[:, 1:] != instances[:, :-1], (0, 0, 1, 0))
    first = torch.where(begins, row, 0).cummax(1).values  # the row in which this pixel's run begins
    edge = torch.where((first > 0) | single[:, None, None], 0.0, torch.inf)
    return (row - first + 1).float() + edge


@precise
def star_loss(
    logits: Tensor,
    dist: Tensor,
    prob_target: Tensor,
    dist_target: Tensor,
    *,
    dist_weight: float = 0.2,
    background: float = 1e-4,
) -> Terms:
    """StarDist's loss: how central a pixel is, and how far the edge is where it is central.

    ``L = BCE(logits, p) + 0.2 (sum p mean_k |d_k - t_k| / sum p + 1e-4 mean (1 - p) mean_k |d_k|)``, p the target's
    centrality, sums and means over the pixels of the batch. The second part of the distance term draws the distances
    of the background to 0. (Normalised by the sum of p, as the releases since 0.4 do; before, it was the mean.)

    Args:
        logits: ``(B, 1, H, W)``, the network's nucleus logit.
        dist: ``(B, rays, H, W)``, its distances in pixels.
        prob_target: ``(B, H, W)`` of `star_distances`; pixels below 0 are left out of everything.
        dist_target: ``(B, rays, H, W)`` of `star_distances`.
        dist_weight: Weight of the distance term; that of the other is 1.
        background: Weight of the background's distances.

    Returns:
        The terms ``prob`` and ``dist``, each with its weight.
    """
    target = constant(logits, prob_target.unsqueeze(1)).to(logits)
    known = target >= 0
    p = target.clamp(min=0)
    count = known.sum().clamp(min=1)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, p, reduction="none")
    error = (dist - constant(dist, dist_target)).abs().mean(1, keepdim=True)
    far = torch.where(known, (1 - p) * dist.abs().mean(1, keepdim=True), 0.0)
    return {
        "prob": (1.0, torch.where(known, cross_entropy, 0.0).sum() / count),
        "dist": (dist_weight, (p * error).sum() / (p.sum() + 1e-7 * count) + background * far.sum() / count),
    }
