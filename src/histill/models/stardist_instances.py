"""From what StarDist says of each pixel to nuclei: candidates, non-maximum suppression, polygons, a label image.

Points and polygons are (x, y) in pixels of the image, whole numbers at the centres of pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.errors import BadInput, Failed
from histill.models.stardist import GRID, NMS_THRESHOLD, PROB_THRESHOLD, percentile_limits

__all__ = ["Instances", "non_maximum_suppression", "polygons", "predict_instances", "predict_prob", "render"]

_MULTIPLE = 16  # the network halves its map four times
_MOST = 4096  # candidates of an image that is judged while its network trains
_SAMPLES = 32  # points per side at which an overlap is measured
_SHORTEST = 1e-3  # of a ray, as in the reference: no polygon is turned inside out


@dataclass(frozen=True, eq=False)
class Instances:
    """The ``N`` nuclei of one image, the surest first.

    Attributes:
        labels: ``(H, W)`` int32, 0 background, else n + 1 of the surest nucleus at that pixel.
        points: ``(N, 2)`` the pixel of each that predicted it.
        polygons: ``(N, rays, 2)`` its outline.
        scores: ``(N,)`` its probability.
    """

    labels: NDArray[np.int32]
    points: NDArray[np.float64]
    polygons: NDArray[np.float64]
    scores: NDArray[np.float64]


@torch.inference_mode()
def predict_instances(
    network: nn.Module,
    image: NDArray[np.uint8] | Tensor,
    *,
    prob_threshold: float = PROB_THRESHOLD,
    nms_threshold: float = NMS_THRESHOLD,
    tile: int = 512,
    overlap: int = 112,
    scale: float = 1.0,
    border: int = 2,
) -> Instances:
    """Find the nuclei of one image of any size.

    The image is scaled by the percentiles of the whole of it and seen in tiles, each with its surroundings. The result
    does not depend on the tiles as long as ``overlap`` is at least the network's receptive field of 107 pixels.

    Args:
        network: A `StarDist`, on the device that is to do the work.
        image: ``(H, W, 3)`` uint8, or a tensor ``(3, H, W)`` in [0, 1].
        prob_threshold: From what probability on a pixel is a candidate. The default belongs to the released weights.
        nms_threshold: How much of the smaller of two nuclei may lie in the other.
        tile: Pixels per side that a tile contributes, a multiple of 16.
        overlap: Pixels that it sees around them, a multiple of 16.
        scale: How much larger the network sees the image: 2 for 20x images, as it was trained at 40x. The result is in
            the image's own pixels.
        border: Pixels of the network's map (each 2 of the image) at the image's edge that are no candidates.

    Raises:
        BadInput: Another kind of image, or tiles that do not fit the network.
        Failed: The network says what is not a number.
    """
    image = _as_tensor(image).to(next(network.parameters()).device)
    height, width = image.shape[-2:]
    whole = _enlarged(image, scale)
    points, dist, scores = _candidates(network, whole, prob_threshold, tile, overlap, border)
    kept = non_maximum_suppression(points, dist, scores, threshold=nms_threshold)
    factor = np.array([whole.shape[-1] / width, whole.shape[-2] / height])
    outlines = (polygons(points[kept], dist[kept]) + 0.5) / factor - 0.5
    labels = render(outlines, (height, width))
    return Instances(labels, (points[kept] + 0.5) / factor - 0.5, outlines, scores[kept])


def from_maps(
    prob: Tensor,
    dist: Tensor,
    size: tuple[int, int],
    *,
    prob_threshold: float = 0.5,
    nms_threshold: float = NMS_THRESHOLD,
) -> NDArray[np.int32]:
    """``(H, W)`` the numbered nuclei of one image that was seen whole.

    Args:
        prob: ``(H/2, W/2)``.
        dist: ``(rays, H/2, W/2)``.
        size: ``(H, W)``.
        prob_threshold: From what probability on a pixel is a candidate: one half, as a network in training has no
            threshold fitted to it yet.
        nms_threshold: See `predict_instances`.
    """
    row, column = torch.nonzero(prob > prob_threshold, as_tuple=True)
    if len(row) > _MOST:  # of a network that has hardly learnt; suppression would take minutes
        surest = prob[row, column].topk(_MOST).indices
        row, column = row[surest], column[surest]
    points = (torch.stack([column, row], 1) * GRID).double().numpy()
    rays, scores = dist[:, row, column].T.double().numpy(), prob[row, column].double().numpy()
    kept = non_maximum_suppression(points, rays, scores, threshold=nms_threshold)
    return render(polygons(points[kept], rays[kept]), size)


@torch.inference_mode()
def predict_prob(
    network: nn.Module, image: NDArray[np.uint8] | Tensor, *, tile: int = 512, overlap: int = 112, scale: float = 1.0
) -> NDArray[np.float32]:
    """``(H, W)``: how central each pixel is in a nucleus, of an image of any size; see `predict_instances`."""
    image = _as_tensor(image)
    height, width = image.shape[-2:]
    whole = _enlarged(image.to(next(network.parameters()).device), scale)
    prob = torch.zeros(-(-whole.shape[-2] // GRID), -(-whole.shape[-1] // GRID), device=whole.device)
    for top, left, part, _ in _tiles(network, whole, tile, overlap):
        place = prob[top // GRID :, left // GRID :][: part.shape[0], : part.shape[1]]
        place.copy_(part[: place.shape[0], : place.shape[1]])
    places: list[
        Tensor
    ] = []  # of every pixel on the map, from -1 at the first to 1 at the last of it; map pixel k is pixel k * GRID
    for side, large, count in zip((width, height), whole.shape[:-3:-1], prob.shape[::-1], strict=True):
        pixel = (torch.arange(side, device=prob.device) + 0.5) * (large / side) - 0.5
        places.append(2 * pixel / GRID / max(count - 1, 1) - 1)
    grid = torch.stack(torch.meshgrid(*places, indexing="xy"), dim=-1)[None]
    full = F.grid_sample(prob[None, None], grid, mode="bilinear", padding_mode="border", align_corners=True)
    return np.asarray(full[0, 0].float().cpu().numpy())


def _enlarged(image: Tensor, scale: float) -> Tensor:
    if scale <= 0:
        raise BadInput(f"scale {scale}: give a number above 0")
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    return F.interpolate(image, size=size, mode="bilinear", antialias=scale < 1)


def polygons(points: NDArray[Any], dist: NDArray[Any]) -> NDArray[np.float64]:
    """``(N, 2)`` points and ``(N, rays)`` distances -> ``(N, rays, 2)`` corners."""
    angle = np.arange(dist.shape[1]) * (2 * np.pi / dist.shape[1])
    rays = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray(points[:, None, :] + np.maximum(dist, _SHORTEST)[:, :, None] * rays, dtype=np.float64)


def non_maximum_suppression(
    points: NDArray[Any], dist: NDArray[Any], scores: NDArray[Any], *, threshold: float = NMS_THRESHOLD
) -> NDArray[np.int64]:
    """Which candidates to keep, the surest first.

    In the order of their scores (of equal ones the upper, then the left first), a candidate is kept and takes out
    every later one with ``area(both) / min(area, area) > threshold``, as in the reference. The area of both is counted
    at 32 x 32 points in the box that the two have in common, so within about one percent; the others are exact.

    Args:
        points: ``(N, 2)``.
        dist: ``(N, rays)`` distances of the outline.
        scores: ``(N,)``.
        threshold: The overlap from which on it is the same nucleus.
    """
    outlines = polygons(points, dist)
    low, high = outlines.min(axis=1, initial=np.inf), outlines.max(axis=1, initial=-np.inf)
    x, y = outlines[..., 0], outlines[..., 1]
    area = 0.5 * np.abs((x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1))
    left = np.lexsort((points[:, 0], points[:, 1], -scores))
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        near = np.flatnonzero(((low[left] < high[best]) & (high[left] > low[best])).all(axis=1))
        if len(near):
            others = left[near]
            both = _shared_area(outlines, low, high, best, others)
            gone = near[both > threshold * np.minimum(area[best], area[others])]
            left = np.delete(left, gone)
    return np.array(kept, dtype=np.int64)


def render(outlines: NDArray[Any], shape: tuple[int, int]) -> NDArray[np.int32]:
    """``(N, rays, 2)`` polygons -> ``(H, W)``: 0, or n + 1 of the first polygon that has the pixel's centre in it."""
    labels = np.zeros(shape, dtype=np.int32)
    end = np.array(shape[::-1]) - 1
    for number in range(len(outlines), 0, -1):
        outline = outlines[number - 1]
        first = np.clip(np.ceil(outline.min(axis=0)), 0, end + 1).astype(int)
        last = np.clip(np.floor(outline.max(axis=0)), -1, end).astype(int)
        if (first > last).any():
            continue
        xs, ys = (np.arange(first[d], last[d] + 1, dtype=float) for d in (0, 1))
        window = labels[first[1] : last[1] + 1, first[0] : last[0] + 1]
        window[_inside(outline[None], xs[None], ys[None])[0]] = number
    return labels


def _shared_area(
    outlines: NDArray[Any], low: NDArray[Any], high: NDArray[Any], one: int, others: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``(M,)``: the area that polygon ``one`` shares with each of the ``others``."""
    begin, end = np.maximum(low[others], low[one]), np.minimum(high[others], high[one])
    at = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    xs, ys = (begin[:, d, None] + (end - begin)[:, d, None] * at for d in (0, 1))
    both = _inside(outlines[others], xs, ys) & _inside(outlines[[one]], xs, ys)
    return np.asarray(both.mean(axis=(1, 2)) * (end - begin).prod(axis=1), dtype=np.float64)


def _inside(outlines: NDArray[Any], xs: NDArray[Any], ys: NDArray[Any]) -> NDArray[np.bool_]:
    """``(M, T, S)``: whether each of S equally spaced x and T y, ascending, is in its polygon.

    The edges that cross a row are found for all rows at once, and a point is inside when an odd number of them is to
    its left. ``outlines`` is ``(M, rays, 2)`` or, for one polygon everywhere, ``(1, rays, 2)``.
    """
    count, (rows, columns) = len(xs), (ys.shape[1], xs.shape[1])
    below = outlines[:, :, 1, None] <= ys[:, None, :]  # (M, rays, T)
    which, edge, row = np.nonzero(below != np.roll(below, -1, axis=1))
    polygon = which if len(outlines) > 1 else np.zeros_like(which)
    x1, y1 = outlines[polygon, edge].T
    x2, y2 = outlines[polygon, (edge + 1) % outlines.shape[1]].T
    crossing = x1 + (ys[which, row] - y1) / (y2 - y1) * (x2 - x1)
    step = (xs[:, -1] - xs[:, 0])[which] / max(columns - 1, 1)
    first = np.ceil((crossing - xs[which, 0]) / np.where(step > 0, step, 1.0)).clip(0, columns).astype(np.int64)
    flat = (which * rows + row) * (columns + 1) + first
    starts = np.bincount(flat, minlength=count * rows * (columns + 1)).reshape(count, rows, columns + 1)
    return np.asarray(starts[:, :, :-1].cumsum(axis=2) % 2 == 1)


def _as_tensor(image: NDArray[np.uint8] | Tensor) -> Tensor:
    """``(1, 3, H, W)`` float32 in [0, 1]."""
    if isinstance(image, Tensor):
        if image.ndim == 3 and image.shape[0] == 3 and image.is_floating_point() and image.numel():
            return image[None].float()
    elif image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    raise BadInput(
        f"an image of {tuple(image.shape)} {image.dtype}: give uint8 (H, W, 3) or a tensor (3, H, W) in [0, 1]"
    )


def _candidates(
    network: nn.Module, whole: Tensor, threshold: float, tile: int, overlap: int, border: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Points ``(N, 2)``, distances ``(N, rays)`` and scores ``(N,)`` of the pixels above the threshold."""
    height, width = whole.shape[-2:]
    rows, columns = -(-height // GRID), -(-width // GRID)  # the map without what is padded
    found = []
    for top, left, prob, dist in _tiles(network, whole, tile, overlap):
        row, column = torch.nonzero(prob > threshold, as_tuple=True)
        score, reach = prob[row, column], dist[:, row, column].T
        row, column = row + top // GRID, column + left // GRID
        allowed = (row >= border) & (row < rows - border) & (column >= border) & (column < columns - border)
        place = torch.stack([column, row], 1) * GRID
        found.append([part[allowed].cpu().double().numpy() for part in (place, reach, score)])
    points, rays, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return points, rays, scores


def _tiles(network: nn.Module, whole: Tensor, tile: int, overlap: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Top and left in pixels, prob ``(h, w)`` and dist ``(rays, h, w)`` of each tile, its surroundings cut off."""
    if tile < _MULTIPLE or overlap < 0 or tile % _MULTIPLE or overlap % _MULTIPLE:
        raise BadInput(f"tile {tile} and overlap {overlap}: give multiples of {_MULTIPLE}")
    height, width = whole.shape[-2:]
    limits = percentile_limits(whole)
    down, right = -height % _MULTIPLE, -width % _MULTIPLE
    mirrored = down < height and right < width
    whole = F.pad(whole, (0, right, 0, down), mode="reflect" if mirrored else "replicate")
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            y, x = max(0, top - overlap), max(0, left - overlap)
            outputs = network(whole[..., y : top + tile + overlap, x : left + tile + overlap], limits)
            own = np.s_[:, (top - y) // GRID : (top - y + tile) // GRID, (left - x) // GRID : (left - x + tile) // GRID]
            prob, dist = outputs["prob"][0][own][0], outputs["dist"][0][own]
            if not (prob.isfinite().all() and dist.isfinite().all()):
                raise Failed("the network says what is not a number of this image: train it again with a lower --lr")
            yield top, left, prob, dist
