"""How far stain and scanner move an embedding, and what that costs a probe on it.

Two laboratories stain and scan the same tissue differently. Here the test images are changed as a laboratory would,
in steps, and the embedding of the changed image is compared with that of the image itself. The probes were fitted on
images as they are.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from histill.data.packed import Packed
from histill.data.views import blurred, uniform
from histill.evaluate.figures import CYCLE, MUTED, drawing
from histill.evaluate.intervals import figures_with_intervals
from histill.evaluate.metrics import Scores
from histill.evaluate.probe import embed, embedded, fit_knn, fit_linear, labelled
from histill.types import Teacher

__all__ = ["CHANGES", "Change", "robustness", "robustness_figure"]

_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Optical density of haematoxylin, eosin and what is left, in R, G and B (Ruifrok and Johnston 2001)."""


@dataclass(frozen=True)
class Change:
    """One way in which laboratories differ.

    Attributes:
        label: what the steps are in.
        steps: strengths, growing; before the first is the image itself.
        apply: ``(images (B, 3, H, W), strength, draws (B, 4) in [0, 1)) -> images``. The draws say in which direction
            an image is changed; the strength says how far.
    """

    label: str
    steps: tuple[float, ...]
    apply: Callable[[Tensor, float, Tensor], Tensor]


def stain(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    """More or less of haematoxylin and of eosin: their amounts times ``1 +- strength``, each in its own direction.

    By Beer and Lambert's law the optical density ``-log10 I`` is a sum over the stains, so amounts are read off and
    changed there; white stays white.
    """
    vectors = torch.tensor(_STAINS, device=images.device)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    density = -torch.log10(images.clamp(min=1 / 255))
    amounts = torch.einsum("bchw,cs->bshw", density, torch.linalg.inv(vectors))
    factors = torch.cat([1 + strength * _signs(draws[:, :2]), torch.ones_like(draws[:, :1])], 1)
    return (10 ** -torch.einsum("bshw,sc->bchw", amounts * factors[:, :, None, None], vectors)).clamp(0, 1)


def white_point(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    """A lamp of another colour: each of R, G and B times ``1 - strength`` to 1, the brightest as it was."""
    gains = draws[:, :3]
    spread = (gains.amax(1, keepdim=True) - gains.amin(1, keepdim=True)).clamp(min=1e-6)
    return images * (1 - strength * (gains.amax(1, keepdim=True) - gains) / spread)[:, :, None, None]


def gamma(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    """A brighter or darker response: ``I ** exp(+-strength)``."""
    return images ** torch.exp(strength * _signs(draws[:, 0]))[:, None, None, None]


def blur(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    """Out of focus: a Gaussian of ``strength`` pixels where the image has 224, and as much of it elsewhere."""
    sigma = strength * images.shape[-1] / 224
    return blurred(images, torch.full((len(images),), sigma, device=images.device), math.ceil(3 * sigma))


def jpeg(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    """Compressed to quality ``100 - strength``."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([torch.from_numpy(_compressed(p, 100 - int(strength))) for p in pixels]).to(images)


def _compressed(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.float32]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=quality)
    return np.asarray(np.asarray(Image.open(file)).transpose(2, 0, 1) / 255, np.float32)


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0)


CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "stain": Change("stain amounts ± %", (0.1, 0.2, 0.3, 0.4), stain),
        "white point": Change("white point − %", (0.05, 0.1, 0.15, 0.2), white_point),
        "gamma": Change("log gamma ±", (0.1, 0.2, 0.3, 0.4), gamma),
        "blur": Change("blur σ, px of 224", (0.5, 1.0, 1.5, 2.0), blur),
        "JPEG": Change("100 − JPEG quality", (20, 40, 60, 80), jpeg),
    }
)
"""What is changed; the first of stain, the others of the scanner."""


def robustness(
    network: nn.Module | Teacher,
    packed: Packed,
    *,
    changes: Mapping[str, Change] = CHANGES,
    output: str = "pooled",
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> pd.DataFrame:
    """How an embedding takes changes of stain and scanner, on the test images.

    Args:
        network: a network or a teacher.
        packed: images; where train, val and test have labels, probes are fitted on the first two.
        changes: what is done.
        output: the embedding's name.
        seed: of the directions in which images are changed.
        device: where it computes.
        batch_size: images at once.

    Returns:
        A row per change and step (strength 0: the images themselves): ``change strength``; ``moved``, the mean of
        1 - cosine between the embedding before and after, centred on the mean of the images as they are, with
        ``moved_low`` and ``moved_high`` (a tenth of the images moves less, a tenth more). 1 is as far as another image
        lies on average, 0 nothing. Where there are labels, balanced accuracy on the changed images with its 95 %
        interval: ``knn linear``, and ``_low`` and ``_high`` of each.
    """
    options: dict[str, Any] = {"output": output, "device": device, "batch_size": batch_size}
    probes, test, rows = {}, None, np.array(packed.images.rows("test"), dtype=np.int64)
    if len(packed.images.classes) > 1:
        rows = labelled(packed, "test")
        train, val, test = (embedded(network, packed, split, **options) for split in ("train", "val", "test"))
        fits = {"knn": fit_knn, "linear": fit_linear}
        probes = {name: fit(train, val, len(packed.images.classes)) for name, fit in fits.items()}
    elif not len(rows):
        rows = np.arange(len(packed.images))
    before = embed(network, packed, rows, **options) if test is None else test.values
    centre = before.mean(0)
    table = []
    for name, change in changes.items():
        for strength in (0.0, *change.steps):
            after = (
                before
                if strength == 0
                else embed(network, packed, rows, change=_changing(change, strength, seed), **options)
            )
            moved = np.maximum(1 - _cosines(before - centre, after - centre), 0)
            row = {"change": name, "strength": strength, "moved": float(moved.mean())}
            row |= {f"moved_{k}": float(np.quantile(moved, q)) for k, q in (("low", 0.1), ("high", 0.9))}
            for probe_name, predict in probes.items():
                assert test is not None
                scores = Scores(test.labels, predict(after), test.units)
                figure = figures_with_intervals(scores, names=["balanced_accuracy"], resamples=500)["balanced_accuracy"]
                row |= {probe_name: figure["value"]} | {f"{probe_name}_{k}": figure[k] for k in ("low", "high")}
            table.append(row)
    return pd.DataFrame(table)


def _changing(change: Change, strength: float, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """An image is changed in the same direction whatever the batch, the strength and the network."""

    def work(images: Tensor, ids: Tensor) -> Tensor:
        draws = torch.from_numpy(uniform(seed, ids, torch.zeros_like(ids), 4)).to(images)
        return change.apply(images, strength, draws)

    return work


def _cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.where(norms > 0, norms, 1))


def robustness_figure(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """How far embeddings move, and balanced accuracy below where it is known: a column per change, a line per network.

    ``tables`` are those of `robustness`, by the name of the network.
    """
    first = next(iter(tables.values()))
    names, judged = list(dict.fromkeys(first["change"])), "linear" in first
    with drawing(path, 2.05 * len(names) + 0.6, 4.6 if judged else 2.7) as figure:
        grid = figure.subplots(1 + judged, len(names), squeeze=False, sharex="col", sharey="row")
        for column, name in enumerate(names):
            change = CHANGES.get(name)
            scale = 100 if change and "%" in change.label else 1
            for number, (network, table) in enumerate(tables.items()):
                rows = table[table["change"] == name]
                x, colour = scale * rows["strength"], CYCLE[number % len(CYCLE)]
                grid[0, column].fill_between(x, rows["moved_low"], rows["moved_high"], color=colour, alpha=0.13, lw=0)
                grid[0, column].plot(x, rows["moved"], "o-", color=colour, markersize=3.5, label=network)
                if judged:
                    low, high = 100 * rows["linear_low"], 100 * rows["linear_high"]
                    grid[1, column].fill_between(x, low, high, color=colour, alpha=0.13, lw=0)
                    grid[1, column].plot(x, 100 * rows["linear"], "o-", color=colour, markersize=3.5)
            grid[0, column].set_title(name)
            grid[-1, column].set_xlabel(change.label if change else "strength")
            grid[0, column].axhline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            for ax in grid[:, column]:
                ax.grid(True, axis="y")
                ax.set_xlim(left=0)
        grid[0, 0].set_ylim(bottom=0)
        grid[0, 0].set_ylabel("moved (1 − cosine);\ndashed: another image")
        if judged:
            grid[1, 0].set_ylabel("balanced accuracy, %\nlinear probe")
        if len(tables) > 1:
            handles, labels = grid[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(tables), 5))
