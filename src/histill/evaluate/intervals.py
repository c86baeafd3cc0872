"""95 % intervals by the bootstrap over patients, and paired differences.

Patients are drawn with replacement, as many as there are, and a patient brings all of their images; where
there are no patients, images are drawn. Every network that is compared sees the same draws. With several
seeds the seeds are drawn too, independently of the patients. Intervals are the 2.5th and 97.5th percentiles
of the resamples in which the figure is defined (a resample can lack a class), and None where fewer than one
in ten is.

Where nothing at all was wrong, every resample says 100 % and the percentiles have no width; the figure then
has Wilson's bound over the units behind it (and likewise at 0 %). The calibration error is biased upwards in
small samples and more so in resamples: its interval can lie above the figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from histill.errors import BadInput
from histill.evaluate.metrics import METRICS, Array, Scores, per_class

__all__ = [
    "Figure",
    "figures_over_seeds",
    "figures_with_intervals",
    "mcnemar",
    "paired_gain",
    "per_class_table",
]

Figure: TypeAlias = dict[str, Any]
"""``{"value", "low", "high"}``, floats or None where undefined; over several seeds also ``"seeds"``."""

LEVEL = 0.95


class Judged(Protocol):
    """What a network said of images, by whatever it is judged: `Scores` of labels, `MaskScores` of masks."""

    @property
    def units(self) -> NDArray[Any]:
        """``(N,)`` what is resampled."""

    @property
    def unit_names(self) -> NDArray[Any]:
        """``(U,)`` each unit once, sorted: the rows of a weight matrix."""

    def __len__(self) -> int: ...

    def figures(self, weights: Array | None = None, *, names: Sequence[str] | None = None) -> dict[str, Array]:
        """The figures of each weighting of the units, ``(R,)`` each."""

    def units_behind(self, name: str) -> int:
        """How many units a share is over."""


_CHUNK = 2_000_000  # weights of images held at once


def figures_with_intervals(
    scores: Judged, *, resamples: int = 2000, seed: int = 0, names: Sequence[str] | None = None
) -> dict[str, Figure]:
    """Each metric of `metrics` with its 95 % interval over patients."""
    values, samples = _sampled([scores], resamples, seed, names)
    return {name: _widened(_figure(values[name], samples[name], seed), name, scores) for name in values}


def figures_over_seeds(
    scores: Sequence[Judged], *, resamples: int = 2000, seed: int = 0, names: Sequence[str] | None = None
) -> dict[str, Figure]:
    """Each metric's mean over seeds, the interval over patients and seeds, and ``"seeds"``, each value.

    Resampling n seeds understates their spread by a factor of sqrt((n - 1) / n); with one seed the interval
    is that over patients.
    """
    values, samples = _sampled(scores, resamples, seed, names)
    return {
        name: {
            **_widened(_figure(values[name], samples[name], seed), name, scores[0]),
            "seeds": [_plain(value) for value in values[name]],
        }
        for name in values
    }


def paired_gain(
    a: Judged | Sequence[Judged],
    b: Judged | Sequence[Judged],
    *,
    resamples: int = 2000,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """``b`` minus ``a`` on the same images under the same draws, for each metric that both have.

    Of labels also ``mcnemar_p``, of the images that exactly one of the two gets right. It takes images as independent,
    which the images of one patient are not: trust the interval first. With several seeds, seed i of ``a`` is
    compared with seed i of ``b``; ``mcnemar_p_seeds`` holds each one's p and ``mcnemar_p`` their median,
    since pooling would count each image several times.

    Raises:
        BadInput: the two are not of the same images in the same order, or differ in the number of seeds.
    """
    several = isinstance(a, Sequence)
    before: list[Judged] = list(a) if isinstance(a, Sequence) else [a]
    after: list[Judged] = list(b) if isinstance(b, Sequence) else [b]
    if len(before) != len(after):
        raise BadInput(f"a paired comparison needs as many seeds on both sides, not {len(before)} and {len(after)}")
    for x, y in zip(before, after, strict=True):
        alike = np.array_equal(getattr(x, "labels", ()), getattr(y, "labels", ()))
        if not (alike and np.array_equal(x.units, y.units)):
            raise BadInput("a paired comparison needs the same images in the same order on both sides")
    if names is None and isinstance(before[0], Scores):
        both = all(isinstance(s, Scores) and s.teacher is not None for s in (*before, *after))
        names = [name for name in METRICS if both or name != "agreement"]
    values, samples = _sampled([*before, *after], resamples, seed, names)
    n = len(before)
    gain: dict[str, Any] = {}
    for name in values:
        value, sample = values[name][n:] - values[name][:n], samples[name][n:] - samples[name][:n]
        gain[name] = _figure(value, sample, seed)
        if several:
            gain[name]["seeds"] = [_plain(v) for v in value]
    pairs = zip(before, after, strict=True)
    if p := [mcnemar(x, y) for x, y in pairs if isinstance(x, Scores) and isinstance(y, Scores)]:
        gain["mcnemar_p"] = float(np.median(p))
        if several:
            gain["mcnemar_p_seeds"] = p
    return gain


def mcnemar(a: Scores, b: Scores) -> float:
    """Exact two-sided McNemar test: of the images that one alone gets right, a half should be each one's."""
    a_right, b_right = a.predictions == a.labels, b.predictions == b.labels
    only_a, only_b = int((a_right & ~b_right).sum()), int((b_right & ~a_right).sum())
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def per_class_table(
    scores: Scores, classes: Sequence[str] | None = None, *, resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """A row per class: name, support; sensitivity, specificity, precision, f1 and auroc with intervals."""
    universe = scores.unit_names
    parts = [per_class(scores, w) for w in _draws(len(universe), resamples, seed, len(scores.labels))]
    samples = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    values = per_class(scores)
    rows = []
    for c in range(scores.classes):
        row: dict[str, Any] = {
            "class": classes[c] if classes is not None else str(c),
            "support": int((scores.labels == c).sum()),
        }
        for name in values:
            if name != "support":
                units = scores.units_behind(name, c)
                figure = _figure(values[name][c], samples[name][c][None], seed)
                row[name] = _wilson(figure, units)
        rows.append(row)
    return rows


def _sampled(
    scores: Sequence[Judged], resamples: int, seed: int, names: Sequence[str] | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The metrics of several networks, ``(S,)``, and their values under common draws of units, ``(S, R)``."""
    if not scores:
        raise BadInput("no scores were given")
    universe = np.unique(np.concatenate([s.unit_names for s in scores]))
    rows = [np.searchsorted(universe, s.unit_names) for s in scores]
    values = [s.figures(names=names) for s in scores]
    shared = [name for name in values[0] if all(name in v for v in values)]
    images = max(len(s) for s in scores)
    parts = [
        [s.figures(weights[r], names=shared) for s, r in zip(scores, rows, strict=True)]
        for weights in _draws(len(universe), resamples, seed, images)
    ]
    return (
        {name: np.array([v[name][0] for v in values]) for name in shared},
        {name: np.concatenate([np.stack([v[name] for v in part]) for part in parts], axis=1) for name in shared},
    )


def _draws(units: int, resamples: int, seed: int, images: int) -> Iterator[Array]:
    """Multinomial weights of ``resamples`` bootstrap draws of ``units``, in pieces ``(units, R)``."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // max(images, units))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = rng.integers(units, size=(units, count)) * count + np.arange(count)
        yield np.bincount(drawn.ravel(), minlength=units * count).reshape(units, count).astype(np.float64)


def _figure(values: Array, samples: Array, seed: int) -> Figure:
    """The mean over S seeds, and percentiles over R resamples of units (the columns) and seeds (the rows)."""
    seeds, resamples = samples.shape
    picks = np.random.default_rng([seed, 1]).integers(seeds, size=(seeds, resamples))
    means = np.take_along_axis(samples, picks, axis=0).mean(axis=0)
    means = means[np.isfinite(means)]
    low, high = (None, None)
    if len(means) >= resamples / 10:
        low, high = (float(q) for q in np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return {"value": _plain(values.mean()), "low": low, "high": high}


def _widened(figure: Figure, name: str, scores: Judged) -> Figure:
    return _wilson(figure, scores.units_behind(name)) if name != "ece" else figure


def _wilson(figure: Figure, units: int) -> Figure:
    """Give a figure of exactly 0 or 1 without width Wilson's bound for 0 or ``units`` of ``units``."""
    z2 = float(norm.ppf((1 + LEVEL) / 2)) ** 2
    match figure:
        case {"value": 1.0, "low": 1.0}:
            return {**figure, "low": units / (units + z2)}
        case {"value": 0.0, "high": 0.0}:
            return {**figure, "high": z2 / (units + z2)}
    return figure


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
