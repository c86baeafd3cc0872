"""95 % intervals over patients, and paired differences.

Patients are drawn with replacement, as many as there are, and a patient brings all of their images; where
there are no patients, images are drawn. Every network that is compared sees the same draws. The spread of the
draws is the standard error (times sqrt(n / (n - 1)), as n drawn of n vary too little), of the draws in which the
figure is defined (a draw can lack a class). From it, with Student's t for the units that the figure is over:

- a share has Wilson's interval for as many independent units as would vary as much: v (1 - v) / se^2 (Korn and
  Graubard 1998 do the same for Clopper and Pearson's). Where nothing varies, as where nothing at all was wrong,
  there are as many as there are units.
- an AUROC is v +- t se on the logit scale.
- a difference b - a has the interval that those of a and b make (Zou and Donner 2008; of two shares Newcombe's method
  10, 1998). Below, it reaches sqrt((b - low_b)^2 + (high_a - a)^2 - 2 r (b - low_b) (high_a - a)), above likewise, and
  r, the correlation of a and b, follows from the standard errors of a, b and b - a. Over seeds it reaches further, as
  t of the difference's degrees of freedom is larger. Where a and b lie in the middle of their intervals this is t se of
  the difference; where both are right of nearly everything, that says too little.
- the calibration error is biased upwards in small samples, and a draw's by as much again: its interval lies around
  the figure less that bias, and always holds the figure. Of a calibrated network it still lies too high: see the tests.
  A difference of two is t se, as their biases are much the same.

With several seeds their spread is added: what of it the patients do not explain, over the number of seeds, with the
degrees of freedom by Satterthwaite (1946). Three seeds know little of their spread, and t says so.

Percentiles of the draws, the usual interval, hold the truth too seldom with few patients; what these hold is simulated
by ``benchmarks/interval_coverage.py`` (docs/statistics.md). There is no interval over one unit, nor where fewer than
one draw in ten defines the figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from histill.errors import BadInput
from histill.evaluate.metrics import METRICS, OWN_METRICS, Array, Scores, per_class

__all__ = [
    "Figure",
    "figures_over_seeds",
    "figures_with_intervals",
    "mcnemar",
    "paired_gain",
    "per_class_table",
]

Figure: TypeAlias = dict[str, Any]
"""``{"value", "low", "high"}``, floats or None where undefined; over several seeds also ``"seeds"``, of a difference
``"p"``: 1 less the level at which its interval would end at zero, so below 0.05 where that leaves out zero."""

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
_NOTHING = 1e-12  # a standard error that is rounding


def figures_with_intervals(
    scores: Judged, *, resamples: int = 2000, seed: int = 0, names: Sequence[str] | None = None
) -> dict[str, Figure]:
    """Each metric of `metrics` with its 95 % interval over patients."""
    values, samples = _sampled([scores], resamples, seed, names)
    return {name: _figure(name, values[name], samples[name], _units([scores], name)) for name in values}


def figures_over_seeds(
    scores: Sequence[Judged], *, resamples: int = 2000, seed: int = 0, names: Sequence[str] | None = None
) -> dict[str, Figure]:
    """Each metric's mean over seeds, the interval over patients and seeds, and ``"seeds"``, each value.

    With one seed the interval is that over patients, and says nothing of other trainings.
    """
    values, samples = _sampled(scores, resamples, seed, names)
    return {
        name: {
            **_figure(name, values[name], samples[name], _units(scores, name)),
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
    """``b`` minus ``a`` on the same images under the same draws, for each metric that both have, with its ``p``.

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
        names = METRICS if both else OWN_METRICS
    values, samples = _sampled([*before, *after], resamples, seed, names)
    n = len(before)
    gain: dict[str, Any] = {}
    for name in values:
        sides = (values[name][:n], samples[name][:n]), (values[name][n:], samples[name][n:])
        gain[name] = _difference(name, *sides, _units([*before, *after], name))
        if several:
            gain[name]["seeds"] = [_plain(v) for v in values[name][n:] - values[name][:n]]
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
                row[name] = _figure(name, values[name][c], samples[name][c][None], scores.units_behind(name, c))
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


def _units(scores: Sequence[Judged], name: str) -> int:
    """How many units a figure is over; of several networks the fewest."""
    return min(len(s.unit_names) if name == "ece" else s.units_behind(name) for s in scores)


def _spread(values: Array, samples: Array, units: int) -> tuple[float, float, Array] | None:
    """Standard error of the mean over S seeds, degrees of freedom, the mean's draws; None where there is no interval.

    ``values`` are ``(S,)``, ``samples`` ``(S, R)``: the same under R draws of the units.
    """
    defined = samples[:, np.isfinite(samples).all(axis=0)]
    seeds, resamples = defined.shape
    if units < 2 or resamples < max(2, samples.shape[1] / 10) or not np.isfinite(values).all():
        return None
    small = units / (units - 1)
    draws = defined.mean(axis=0)
    patients = float(draws.var(ddof=1)) * small
    squared, freedom = patients, float(units - 1)
    if seeds > 1:
        between = float(values.var(ddof=1)) / seeds
        # One seed varies over patients more than the mean of all does: so much of the seeds' spread is the patients'.
        alone = float(defined.var(axis=1, ddof=1).mean()) * small
        shared = max(alone - patients, 0.0) / (seeds - 1)
        squared += max(between - shared, 0.0)
        parts = patients**2 / (units - 1) + between**2 / (seeds - 1)
        freedom = max(squared**2 / parts, 1.0) if parts else freedom
    return float(np.sqrt(squared)), freedom, draws


def _figure(name: str, values: Array, samples: Array, units: int) -> Figure:
    """A metric's mean over S seeds and its interval, from R draws of its units, ``(S, R)``."""
    value = values.mean()
    spread = _spread(values, samples, units)
    if spread is None:
        return {"value": _plain(value), "low": None, "high": None}
    low, high = _ends(name, value, spread, units, LEVEL)
    return {"value": _plain(value), "low": low, "high": high}


def _ends(name: str, value: float, spread: tuple[float, float, Array], units: int, level: float) -> tuple[float, float]:
    """The interval of a figure at a level of confidence, from its `_spread`."""
    error, freedom, draws = spread
    t = float(student.ppf((1 + level) / 2, freedom))
    if name == "ece":
        # Each bin's gap and its noise add as squares do, and a draw adds the noise once more.
        middle = float(np.sqrt(max(0.0, 2 * value**2 - draws.mean() ** 2)))
        return max(0.0, min(value, middle - t * error)), min(1.0, max(value, middle + t * error))
    if value in (0, 1) or not error > _NOTHING:
        return _wilson(value, units, float(norm.ppf((1 + level) / 2)))
    if name == "auroc":
        half = t * error / (value * (1 - value))
        return float(expit(logit(value) - half)), float(expit(logit(value) + half))
    return _wilson(value, value * (1 - value) / error**2, t)


def _difference(name: str, before: tuple[Array, Array], after: tuple[Array, Array], units: int) -> Figure:
    """The mean over S seeds of a difference, its interval, and ``p``; of both sides the values and their draws."""
    (a, drawn_a), (b, drawn_b) = before, after
    value = float(b.mean() - a.mean())
    both = np.isfinite(drawn_a).all(axis=0) & np.isfinite(drawn_b).all(axis=0)
    drawn_a, drawn_b = np.where(both, drawn_a, np.nan), np.where(both, drawn_b, np.nan)
    spread_a, spread_b = _spread(a, drawn_a, units), _spread(b, drawn_b, units)
    spread = _spread(b - a, drawn_b - drawn_a, units)
    if spread is None or spread_a is None or spread_b is None:
        return {"value": _plain(value), "low": None, "high": None, "p": None}
    error, freedom, _ = spread
    (error_a, _, means_a), (error_b, _, means_b) = spread_a, spread_b
    alike = error_a**2 + error_b**2 - error**2  # twice their covariance
    r = float(np.clip(alike / (2 * error_a * error_b), -1, 1)) if min(error_a, error_b) > _NOTHING else 0.0

    def ends(level: float) -> tuple[float, float]:
        t, alone = student.ppf((1 + level) / 2, [freedom, units - 1])
        if name == "ece":
            down = up = t * error
        else:
            low_a, high_a = _ends(name, a.mean(), (error_a, units - 1, means_a), units, level)
            low_b, high_b = _ends(name, b.mean(), (error_b, units - 1, means_b), units, level)
            below, above = (b.mean() - low_b, high_a - a.mean()), (high_b - b.mean(), a.mean() - low_a)
            # Few seeds make t large, and the ends of large t lopsided, which would not cancel: it comes in afterwards.
            wider = t / alone if alone > 0 else 1.0
            down, up = (wider * np.sqrt(max(0.0, x * x + y * y - 2 * r * x * y)) for x, y in (below, above))
        return float(max(-1.0, value - down)), float(min(1.0, value + up))

    low, high = ends(LEVEL)
    return {"value": value, "low": low, "high": high, "p": _p(value, ends)}


def _p(value: float, ends: Callable[[float], tuple[float, float]]) -> float | None:
    """1 less the level of confidence at which an interval ends at zero; None where it has no width at any."""
    if value == 0:
        return 1.0
    least = 1e-12

    def end(p: float) -> float:
        return ends(1 - p)[0 if value > 0 else 1]

    if end(least) == value:
        return None
    return float(brentq(end, least, 1.0, rtol=1e-9)) if end(least) * value < 0 else least


def _wilson(value: float, units: float, z: float) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of ``units``."""
    z2 = z * z
    middle, half = value + z2 / (2 * units), z * np.sqrt(value * (1 - value) / units + z2 / (4 * units**2))
    low, high = ((middle + sign * half) / (1 + z2 / units) for sign in (-1, 1))
    return (0.0 if value == 0 else float(low)), (1.0 if value == 1 else float(high))


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
