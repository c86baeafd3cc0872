"""What an embedding knows: a linear probe and nearest neighbours on the embeddings of a network or any teacher.

Nothing is trained but the probe, so the figures say what is in the embedding, and they need seconds. What is chosen
(the regularisation, the number of neighbours) is chosen on the validation images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.data.packed import Packed
from histill.errors import BadInput
from histill.evaluate.intervals import Figure, figures_with_intervals
from histill.evaluate.metrics import OWN_METRICS, Array, Scores, metrics
from histill.progress import progress
from histill.types import Teacher

__all__ = ["Embedded", "embed", "embedded", "fit_knn", "fit_linear", "knn", "linear_probe", "probe"]

Predictor: TypeAlias = Callable[[NDArray[Any]], Array]
"""Embeddings ``(N, D)`` -> probabilities ``(N, C)``."""

REGULARISATIONS = tuple(10.0**k for k in range(-5, 3))
"""C of scikit-learn's logistic regression, the inverse of the penalty's weight; the smallest first."""

NEIGHBOURS = (1, 5, 10, 20, 50)
_TEMPERATURE = 0.07
_CHUNK = 2048


@dataclass(frozen=True, eq=False)
class Embedded:
    """The embeddings of ``N`` labelled images.

    Attributes:
        values: ``(N, D)``.
        labels: ``(N,)`` class numbers.
        units: ``(N,)`` the patient, or the image where none is known; see `Scores`.
    """

    values: NDArray[np.float32]
    labels: NDArray[Any]
    units: NDArray[Any]


def embed(
    network: nn.Module | Teacher,
    packed: Packed,
    rows: NDArray[np.int64],
    *,
    output: str = "pooled",
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """What a network or a teacher makes of the images themselves: ``(N, D)``.

    Args:
        network: a network, whose mode is left as it was, or a teacher, which is asked as in training.
        packed: the images.
        rows: which ones.
        output: the embedding's name; of a map the mean over its places is taken.
        change: ``(images, ids) -> images``, what is done to the images first.
        device: where it computes.
        batch_size: images at once.
    """
    mode = network.training if isinstance(network, nn.Module) else False
    if isinstance(network, nn.Module):
        network.eval()
    said: list[Tensor] = []
    with torch.no_grad(), progress("embedding", len(rows)) as bar:
        for start in range(0, len(rows), batch_size):
            batch = packed.batch(rows[start : start + batch_size], device=device)
            if change is not None:
                render, ids = batch.render, batch.ids
                batch = batch._replace(
                    images=change(batch.images, ids), render=lambda size, r=render, i=ids: change(r(size), i)
                )
            outputs = network(batch.images) if isinstance(network, nn.Module) else network(batch)
            value = outputs[output]
            said.append((value if value.ndim == 2 else value.flatten(2).mean(2)).float().cpu())
            bar.advance(len(batch.ids))
    if isinstance(network, nn.Module):
        network.train(mode)
    return torch.cat(said).numpy()


def embedded(network: nn.Module | Teacher, packed: Packed, split: str, **options: Any) -> Embedded:
    """The labelled images of a split, embedded (``options`` as for `embed`).

    Raises:
        BadInput: there are none.
    """
    rows = labelled(packed, split)
    units = packed.images.units.to_numpy()[rows]
    return Embedded(embed(network, packed, rows, **options), packed.labels.numpy()[rows], units)


def labelled(packed: Packed, split: str) -> NDArray[np.int64]:
    """The rows of a split that have labels; `BadInput` where there are none."""
    rows = np.array(packed.images.rows(split), dtype=np.int64)
    rows = rows[packed.labels.numpy()[rows] >= 0]
    if not len(rows):
        raise BadInput(f"{packed.images.root}: no labelled {split} images; a probe needs train, val and test")
    return rows


def fit_linear(
    train: Embedded, val: Embedded, classes: int, *, choices: Sequence[float] = REGULARISATIONS
) -> Predictor:
    """Logistic regression on standardised embeddings; of ``choices`` the C with the best balanced accuracy on ``val``.

    Ties go to the smaller C. Mean and deviation are those of ``train``, and the probe has seen ``train`` alone.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, std = train.values.mean(0), train.values.std(0)
    std = np.where(std > 0, std, 1)

    def ready(values: NDArray[Any]) -> Array:
        return np.asarray((values - mean) / std, np.float64)

    def predictor(model: Any) -> Predictor:
        def predict(values: NDArray[Any]) -> Array:
            probabilities = np.zeros((len(values), classes))
            probabilities[:, model.classes_] = model.predict_proba(ready(values))
            return probabilities

        return predict

    if len(np.unique(train.labels)) < 2:
        raise BadInput("a linear probe needs training images of two classes")
    fitted = []
    with progress("linear probe", len(choices), "fits") as bar:
        for c in choices:
            with warnings.catch_warnings():  # a fit that stopped early is judged like the others
                warnings.simplefilter("ignore", ConvergenceWarning)
                fitted.append(predictor(LogisticRegression(C=c, max_iter=500).fit(ready(train.values), train.labels)))
            bar.advance()
    return _best(fitted, val)


def fit_knn(train: Embedded, val: Embedded, classes: int, *, choices: Sequence[int] = NEIGHBOURS) -> Predictor:
    """Nearest neighbours by cosine; of ``choices`` the number with the best balanced accuracy on ``val``.

    A neighbour of similarity s votes with weight ``exp(s / 0.07)`` (Wu et al. 2018). Ties go to fewer neighbours.
    """

    def predictor(k: int) -> Predictor:
        known, label = _unit(train.values), np.eye(classes)[train.labels]

        def predict(values: NDArray[Any]) -> Array:
            parts = []
            for start in range(0, len(values), _CHUNK):
                similarity = _unit(values[start : start + _CHUNK]) @ known.T
                nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
                votes = np.exp((np.take_along_axis(similarity, nearest, 1) - 1) / _TEMPERATURE)
                parts.append(np.einsum("nk,nkc->nc", votes, label[nearest]))
            summed = np.concatenate(parts)
            return np.asarray(summed / summed.sum(1, keepdims=True))

        return predict

    return _best([predictor(k) for k in choices if k <= len(train.values)] or [predictor(1)], val)


def linear_probe(train: Embedded, val: Embedded, test: Embedded, classes: int) -> Scores:
    """What `fit_linear` says of ``test``."""
    return Scores(test.labels, fit_linear(train, val, classes)(test.values), test.units)


def knn(train: Embedded, val: Embedded, test: Embedded, classes: int) -> Scores:
    """What `fit_knn` says of ``test``."""
    return Scores(test.labels, fit_knn(train, val, classes)(test.values), test.units)


def probe(network: nn.Module | Teacher, packed: Packed, **options: Any) -> dict[str, dict[str, Figure]]:
    """``linear`` and ``knn``: each metric on the test images with its 95 % interval (``options`` as for `embed`)."""
    train, val, test = (embedded(network, packed, split, **options) for split in ("train", "val", "test"))
    classes = len(packed.images.classes)
    return {
        "linear": figures_with_intervals(linear_probe(train, val, test, classes), names=OWN_METRICS),
        "knn": figures_with_intervals(knn(train, val, test, classes), names=OWN_METRICS),
    }


def _best(fitted: Sequence[Predictor], val: Embedded) -> Predictor:
    """The first of those with the best balanced accuracy."""
    scores = [Scores(val.labels, predict(val.values), val.units) for predict in fitted]
    figures = [float(metrics(s, names=["balanced_accuracy"])["balanced_accuracy"][0]) for s in scores]
    return fitted[int(np.argmax(np.nan_to_num(figures, nan=-1.0)))]


def _unit(values: NDArray[Any]) -> Array:
    values = np.asarray(values, np.float64)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(norms > 0, norms, 1))
