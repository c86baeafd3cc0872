"""Metrics of classification, in two steps: counts per unit first, the metric second.

Whatever is counted is summed per **unit** (a patient, or an image where there are no patients), and every
metric is a function of weighted sums of those counts. A bootstrap over patients is then a matrix of weights,
a column for each resample, and `metrics` answers for all columns at once; a column of ones is the data.

Macro means run over the classes that have images in the data. A resample that lacks one of them does not
estimate that mean, and its figure is nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from histill.errors import BadInput

__all__ = [
    "EXTRA_METRICS",
    "METRICS",
    "OWN_METRICS",
    "Reliability",
    "Scores",
    "confusion",
    "metrics",
    "per_class",
    "ratio",
    "reliability",
    "roc_curve",
]

METRICS = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "auroc",
    "sensitivity",
    "specificity",
    "ece",
    "agreement",
)
"""What every table of figures holds; ``agreement`` only where there is a teacher."""
OWN_METRICS = tuple(name for name in METRICS if name != "agreement")
"""Those that need no teacher."""
EXTRA_METRICS = ("macro_precision", "f1_of_means")
"""What a run has besides, as some papers print them."""

BINS = 15

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """What a network said of ``N`` labelled images.

    Attributes:
        labels: ``(N,)`` class numbers, 0 to C-1.
        probabilities: ``(N, C)`` in [0, 1].
        units: ``(N,)`` what is resampled, numbers or names: the patient, or the image itself. The same
            patient has the same name in every `Scores` that is compared.
        teacher: ``(N,)`` the classes that the teacher predicts, for `agreement`.
        positive: the class of `sensitivity`, `specificity` (and of `auroc` where there are two classes); None
            for macro means, one against the rest.

    Raises:
        BadInput: shapes that do not fit, labels outside 0 to C-1, probabilities outside [0, 1].
    """

    labels: NDArray[Any]
    probabilities: NDArray[Any]
    units: NDArray[Any]
    teacher: NDArray[Any] | None = None
    positive: int | None = None

    def __post_init__(self) -> None:
        for name in ("labels", "probabilities", "units", "teacher"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(value))
        if self.probabilities.ndim != 2 or self.probabilities.shape[1] < 2:
            raise BadInput(f"probabilities: shape {self.probabilities.shape}, give (images, classes)")
        images, classes = self.probabilities.shape
        if images == 0:
            raise BadInput("scores: no images, nothing can be measured")
        for name in ("labels", "units", "teacher"):
            value = getattr(self, name)
            if value is not None and value.shape != (images,):
                raise BadInput(f"{name}: shape {value.shape} beside {images} rows of probabilities")
        for name in ("labels", "teacher"):
            value = getattr(self, name)
            if value is not None and not (
                np.issubdtype(value.dtype, np.integer) and value.min() >= 0 and value.max() < classes
            ):
                raise BadInput(f"{name}: class numbers from 0 to {classes - 1} are needed")
        if self.positive is not None and not 0 <= self.positive < classes:
            raise BadInput(f"positive: {self.positive}, give a class number from 0 to {classes - 1}")
        if not (self.probabilities.min() >= 0 and self.probabilities.max() <= 1 + 1e-6):
            raise BadInput("probabilities: values outside 0 to 1, or not numbers; give softmax outputs, not logits")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return int(self.probabilities.shape[1])

    def figures(self, weights: Array | None = None, *, names: Sequence[str] | None = None) -> dict[str, Array]:
        """See `metrics`."""
        return metrics(self, weights, names=names)

    def units_behind(self, name: str, target: int | None = None) -> int:
        """How many units a share is over; for a macro mean the rarest class's, times the classes.

        ``target`` is the class that the share is of (default: the positive one).
        """
        target = self.positive if target is None else target

        def units(mask: NDArray[np.bool_]) -> int:
            return len(np.unique(self.unit_rows[mask]))

        everyone = len(self.unit_names)
        if name in ("accuracy", "agreement"):
            return everyone
        if name == "auroc" and len(self.present) == 2:  # the same number whichever class is the positive one
            return min(units(self.labels == c) for c in self.present)
        if target is None or name in ("balanced_accuracy", "macro_f1"):
            return min(everyone, len(self.present) * min(units(self.labels == c) for c in self.present))
        if name == "specificity":
            return units(self.labels != target)
        if name == "auroc":  # a pair needs both, and knows no more than the fewer
            return min(units(self.labels == target), units(self.labels != target))
        return units(self.labels == target)

    @cached_property
    def predictions(self) -> NDArray[np.int64]:
        """``(N,)`` the class of the highest probability."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    @cached_property
    def present(self) -> NDArray[np.int64]:
        """The classes that have images."""
        return np.unique(self.labels).astype(np.int64)

    @cached_property
    def _units(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        names, rows = np.unique(self.units, return_inverse=True)
        return names, rows.astype(np.int64)

    @property
    def unit_names(self) -> NDArray[Any]:
        """``(U,)`` each unit once, sorted: the rows of a weight matrix."""
        return self._units[0]

    @property
    def unit_rows(self) -> NDArray[np.int64]:
        """``(N,)`` each image's row in a weight matrix."""
        return self._units[1]

    @cached_property
    def _one_hot(self) -> tuple[Array, Array]:
        eye = np.eye(self.classes)
        return eye[self.labels], eye[self.predictions]

    @cached_property
    def _counts(self) -> Array:
        """``(U, 3C + 2 + BINS)``: correct, predicted and actual per class; images; agreements; gaps per bin."""
        actual, predicted = self._one_hot
        confidence = self.probabilities.max(axis=1)
        correct = self.predictions == self.labels
        agrees = self.predictions == self.teacher if self.teacher is not None else np.zeros(len(correct))
        gaps = np.eye(BINS)[_bins(confidence)] * (confidence - correct)[:, None]
        ones = np.ones(len(correct))
        rows = np.column_stack([actual * predicted, predicted, actual, ones, agrees, gaps])
        counts = np.zeros((len(self.unit_names), rows.shape[1]))
        np.add.at(counts, self.unit_rows, rows)
        return counts


def metrics(scores: Scores, weights: Array | None = None, *, names: Sequence[str] | None = None) -> dict[str, Array]:
    """The metrics of each weighting of the units.

    accuracy; balanced_accuracy, the macro mean of recall; macro_f1, the mean of the classes' F1;
    auroc, of the positive class (class 1 unless named) of two, else the macro mean of one against the rest;
    sensitivity and specificity, of the positive class where one is named, else macro means; ece, the expected
    calibration error of the top label in 15 equal bins, closed above (Guo et al. 2017, eq. 3); agreement, the
    share of images with the teacher's class. On request macro_precision, and f1_of_means, the harmonic mean
    of macro precision and macro recall that some papers call F1.

    Args:
        scores: the images.
        weights: ``(U, R)`` how often each of `Scores.unit_names` counts; ones where None, with R = 1.
        names: which metrics; `METRICS` where None.

    Returns:
        ``(R,)`` for each name, nan where undefined (one class only, or a class missing from the resample).
    """
    weights = np.ones((len(scores.unit_names), 1)) if weights is None else weights
    names = (OWN_METRICS if scores.teacher is None else METRICS) if names is None else names
    if "agreement" in names and scores.teacher is None:
        raise BadInput("agreement: these scores have no teacher")
    classes, present = scores.classes, scores.present
    sums = scores._counts.T @ weights
    correct, predicted, actual = sums[: 3 * classes].reshape(3, classes, -1)
    images, agreed, gaps = sums[3 * classes], sums[3 * classes + 1], sums[3 * classes + 2 :]
    each = _one_vs_rest(correct, predicted, actual, images)

    def macro(name: str) -> Array:
        return np.asarray(each[name][present].mean(axis=0))

    def chosen(name: str) -> Array:
        return macro(name) if scores.positive is None else np.asarray(each[name][scores.positive])

    def auroc() -> Array:
        if classes == 2:
            return _auroc(scores, 1 if scores.positive is None else scores.positive, weights)
        return np.asarray(np.mean([_auroc(scores, int(c), weights) for c in present], axis=0))

    def f1_of_means() -> Array:
        precision, recall = macro("precision"), macro("sensitivity")
        return 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)

    formulas = {
        "accuracy": lambda: ratio(correct.sum(axis=0), images),
        "balanced_accuracy": lambda: macro("sensitivity"),
        "macro_f1": lambda: macro("f1"),
        "auroc": auroc,
        "sensitivity": lambda: chosen("sensitivity"),
        "specificity": lambda: chosen("specificity"),
        "ece": lambda: ratio(np.abs(gaps).sum(axis=0), images),
        "agreement": lambda: ratio(agreed, images),
        "macro_precision": lambda: macro("precision"),
        "f1_of_means": f1_of_means,
    }
    return {name: formulas[name]() for name in names}


def per_class(scores: Scores, weights: Array | None = None) -> dict[str, Array]:
    """Support, sensitivity, specificity, precision, f1, auroc of each class against the rest; ``(C, R)`` each.

    `precision` is 0 for a class that was never predicted; all but specificity are nan for one without images.
    """
    weights = np.ones((len(scores.unit_names), 1)) if weights is None else weights
    classes = scores.classes
    sums = scores._counts.T @ weights
    correct, predicted, actual = sums[: 3 * classes].reshape(3, classes, -1)
    auroc = np.stack([_auroc(scores, c, weights) for c in range(classes)])
    return {"support": actual, **_one_vs_rest(correct, predicted, actual, sums[3 * classes]), "auroc": auroc}


def confusion(scores: Scores) -> NDArray[np.int64]:
    """``(C, C)`` counts of images: rows the true class, columns the predicted."""
    matrix = np.zeros((scores.classes, scores.classes), dtype=np.int64)
    np.add.at(matrix, (scores.labels, scores.predictions), 1)
    return matrix


def roc_curve(scores: Scores, target: int) -> tuple[Array, Array]:
    """False and true positive rates of class ``target`` against the rest, from (0, 0) to (1, 1)."""
    values, positive = scores.probabilities[:, target], scores.labels == target
    order = np.argsort(-values, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # tied images pass together
    true, false = np.cumsum(positive[order])[ends], np.cumsum(~positive[order])[ends]
    return np.insert(ratio(false, false[-1]), 0, 0.0), np.insert(ratio(true, true[-1]), 0, 0.0)


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram by bin: `count`, mean `confidence`, `accuracy` (nan if empty); and the `ece`."""

    count: NDArray[np.int64]
    confidence: Array
    accuracy: Array
    ece: float


def reliability(scores: Scores) -> Reliability:
    """Confidence of the top label against accuracy, in the bins of `ece`."""
    confidence = scores.probabilities.max(axis=1)
    place = _bins(confidence)
    count = np.bincount(place, minlength=BINS)
    mean_confidence = ratio(np.bincount(place, confidence, BINS), count)
    accuracy = ratio(np.bincount(place, scores.predictions == scores.labels, BINS), count)
    return Reliability(count, mean_confidence, accuracy, float(metrics(scores, names=["ece"])["ece"][0]))


def _bins(confidence: Array) -> NDArray[np.int64]:
    return np.asarray(np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1), dtype=np.int64)


def ratio(a: NDArray[Any], b: NDArray[Any]) -> Array:
    """``a / b``, nan where ``b`` is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    return np.asarray(np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0))


def _one_vs_rest(correct: Array, predicted: Array, actual: Array, images: Array) -> dict[str, Array]:
    rest = images - actual
    has_images = np.where(actual > 0, 1.0, np.nan)
    return {
        "sensitivity": ratio(correct, actual),
        "specificity": ratio(rest - (predicted - correct), rest),
        "precision": np.nan_to_num(ratio(correct, predicted)) * has_images,
        "f1": ratio(2 * correct, predicted + actual) * has_images,
    }


def _auroc(scores: Scores, target: int, weights: Array) -> Array:
    """Mann-Whitney: the share of (positive, negative) pairs in the right order, ties a half; ``(R,)``."""
    values, positive = scores.probabilities[:, target], scores.labels == target
    order = np.argsort(values, kind="stable")
    drawn = weights[scores.unit_rows[order]]
    positives = drawn * positive[order, None]
    negatives = drawn - positives
    starts = np.append(0, np.flatnonzero(np.diff(values[order])) + 1)
    if len(starts) < len(values):
        positives, negatives = np.add.reduceat(positives, starts), np.add.reduceat(negatives, starts)
    below = np.cumsum(negatives, axis=0) - negatives / 2
    won = np.einsum("nr,nr->r", below, positives)
    return ratio(won, positives.sum(axis=0) * negatives.sum(axis=0))
