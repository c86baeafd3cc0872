"""Early exit: an image leaves a network with exits at the first one that is sure enough.

After exit k the answer is the mean of the probabilities of exits 1 to k, and its confidence is the largest of them; the
image leaves where that reaches the threshold. Whoever stays to the end gets the network's own answer (Eq. 7 of the
multi-exit paper), so a high enough threshold loses nothing, and a runtime needs only the logits of the exits it has
passed. The threshold is fitted on validation: the lowest, and so the cheapest, that loses no more than what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.errors import BadInput
from histill.evaluate.cost import macs
from histill.evaluate.finish import exit_count, scores
from histill.evaluate.intervals import figures_with_intervals, paired_gain
from histill.evaluate.metrics import Array, Scores
from histill.evaluate.report import Table, difference, share
from histill.run import Run

__all__ = ["Curve", "cost", "curve", "early_exit", "leave", "passing", "segments_of", "threshold_for"]


@dataclass(frozen=True, eq=False)
class Curve:
    """What every threshold gives on some labelled images, from nobody leaving early to everybody at the first exit.

    Attributes:
        threshold: ``(T,)`` falling; each is halfway between two confidences, so that rounding moves nobody.
        accuracy: ``(T,)`` shares.
        cost: ``(T,)`` mean cost per image, falling, in the unit of the exits' costs.
    """

    threshold: Array
    accuracy: Array
    cost: Array


def passing(probabilities: Array) -> Array:
    """Exits' probabilities ``(N, K, C)`` -> the answer after each exit ``(N, K, C)``, the mean of those passed."""
    return np.asarray(probabilities.cumsum(1) / np.arange(1, probabilities.shape[1] + 1)[:, None])


def leave(answers: Array, threshold: float) -> NDArray[np.int64]:
    """Answers after each exit ``(N, K, C)`` -> where each image leaves ``(N,)``, 0 to K-1."""
    sure = answers.max(-1) >= threshold
    sure[:, -1] = True
    return np.asarray(sure.argmax(1), dtype=np.int64)


def curve(answers: Array, labels: NDArray[Any], costs: Sequence[float]) -> Curve:
    """Accuracy and mean cost at every threshold that makes a difference.

    Args:
        answers: ``(N, K, C)`` after each exit.
        labels: ``(N,)`` class numbers.
        costs: of an image that leaves at each of the K exits.
    """
    images = len(answers)
    right = (answers.argmax(-1) == labels[:, None]).astype(float)  # (N, K)
    # An image leaves at the first exit whose confidence reaches the threshold: as the threshold falls past the
    # largest confidence up to exit k, it leaves at k rather than later.
    reached = np.maximum.accumulate(answers.max(-1)[:, :-1], axis=1).ravel()
    order = np.argsort(-reached, kind="stable")
    gained = (right[:, :-1] - right[:, 1:]).ravel()[order]
    saved = np.tile(np.diff(costs), images)[order]
    values = np.concatenate([[2.0], reached[order], [0.0]])
    accuracy = (right[:, -1].sum() + np.concatenate([[0], gained.cumsum()])) / images
    mean_cost = costs[-1] - np.concatenate([[0], saved.cumsum()]) / images
    differ = values[:-1] - values[1:] > 1e-9  # equal confidences leave together
    middle = (values[:-1] + values[1:]) / 2
    return Curve(middle[differ], accuracy[differ], mean_cost[differ])


def threshold_for(found: Curve, loss: float) -> float:
    """The lowest threshold whose accuracy is at most ``loss`` (a share) below that of the whole network."""
    enough = found.accuracy >= found.accuracy[0] - loss - 1e-12
    return float(found.threshold[np.flatnonzero(enough)[-1]])


class _First(nn.Module):
    """The first segments of a network, one after the other."""

    def __init__(self, segments: Sequence[nn.Module]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)

    def forward(self, images: Tensor) -> None:
        carried: Sequence[Tensor] = (images,)
        for segment in self.segments:
            _, *carried = segment(*carried)


def segments_of(network: nn.Module) -> list[nn.Module]:
    """The segments of a network with exits.

    Raises:
        BadInput: it has none.
    """
    if not hasattr(network, "segments"):
        raise BadInput(
            f"{type(network).__name__} has no exits to leave at; early exit is for multi-exit, scan and msdnet"
        )
    return list(network.segments())  # type: ignore[operator]


def cost(network: nn.Module, size: int) -> list[int]:
    """Multiply-accumulates of an image that leaves at each exit, the exits on its way included (see `macs`)."""
    segments = segments_of(network)
    return [macs(_First(segments[: k + 1]), size) for k in range(len(segments))]


def answers_of(table: pd.DataFrame, classes: Sequence[str]) -> Array:
    """The answers after each exit ``(N, K, C)`` of a predictions table."""
    exits = range(1, exit_count(table, classes) + 1)
    each = [table[[f"exit{k}_prob_{c}" for c in classes]].to_numpy(dtype=np.float64) for k in exits]
    return passing(np.stack(each, axis=1))


def early_exit(run: Run, *, loss: float = 0.01) -> dict[str, Any]:
    """Fit a run's threshold on validation and judge it on the test images.

    Args:
        run: a finished run of a network with exits.
        loss: accuracy (a share) that may be lost on validation against the whole network.

    Returns:
        ``loss``, ``threshold``, ``validation`` (``accuracy`` and ``whole``, the network's); ``macs``: ``exits`` (of an
        image that leaves at each), ``mean`` and ``whole``; of the test images, where there are any, ``accuracy`` with
        its interval, ``gain`` (against the whole network, paired), ``leaving`` (share by exit), ``exits`` (each exit's
        own accuracy) and ``whole``; ``curve`` on the test images (validation where there are none): ``threshold``,
        ``accuracy``, ``macs``.

    Raises:
        BadInput: a network without exits, no validation images, or a loss outside 0 to 1.
    """
    if not 0 <= loss < 1:
        raise BadInput(f"early exit: a loss in accuracy of {loss}; give a share from 0 to 1, such as 0.01")
    costs = cost(run.network(), run.image_size)
    table, positive = run.predictions, run.info["positive"]
    by_split = dict(iter(table.groupby("split", sort=False)))
    if "val" not in by_split:
        raise BadInput(f"{run.path} has no validation images to fit a threshold on")
    held = scores(by_split["val"], run.classes)
    fitted = curve(answers_of(by_split["val"], run.classes), held.labels, costs)
    threshold = threshold_for(fitted, loss)
    at = int(np.flatnonzero(fitted.threshold == threshold)[0])
    found: dict[str, Any] = {
        "loss": loss,
        "threshold": threshold,
        "validation": {"accuracy": float(fitted.accuracy[at]), "whole": float(fitted.accuracy[0])},
        "macs": {"exits": costs, "mean": float(fitted.cost[at]), "whole": costs[-1]},
    }
    shown = fitted
    if "test" in by_split:
        part = by_split["test"]
        whole = scores(part, run.classes, positive=positive)
        answers = answers_of(part, run.classes)
        left = leave(answers, threshold)
        early = replace(whole, probabilities=answers[np.arange(len(left)), left])
        shown = curve(answers, whole.labels, costs)
        found["macs"]["mean"] = float(np.mean(np.array(costs)[left]))
        found |= {
            "accuracy": _accuracy(early),
            "gain": paired_gain(whole, early, names=["accuracy"])["accuracy"],
            "leaving": [float((left == k).mean()) for k in range(len(costs))],
            "exits": [_accuracy(scores(part, run.classes, exit=k + 1)) for k in range(len(costs))],
            "whole": _accuracy(whole),
        }
    found["curve"] = {
        "threshold": shown.threshold.tolist(),
        "accuracy": shown.accuracy.tolist(),
        "macs": shown.cost.tolist(),
    }
    return found


def _accuracy(judged: Scores) -> dict[str, Any]:
    return figures_with_intervals(judged, names=["accuracy"])["accuracy"]


def exit_table(found: dict[str, Any]) -> Table:
    """What `early_exit` found on the test images, for a page."""
    spent = found["macs"]
    rows = [
        [f"always exit {k}", share(figure), f"{macs_ / 1e6:,.1f}", f"{100 * part:.0f} %"]
        for k, (figure, macs_, part) in enumerate(zip(found["exits"], spent["exits"], found["leaving"]), 1)
    ]
    rows.append(["whole network", share(found["whole"]), f"{spent['whole'] / 1e6:,.1f}", "-"])
    rows.append(["early exit", share(found["accuracy"]), f"{spent['mean'] / 1e6:,.1f}", "-"])
    held = found["validation"]
    return Table(
        ["answer", "accuracy", "MMAC per image", "images that leave there"],
        rows,
        "Early exit",
        f"Threshold {found['threshold']:.3f}, the lowest that loses at most {100 * found['loss']:g} points on "
        f"validation ({100 * held['accuracy']:.1f} % against {100 * held['whole']:.1f} %). On the test images "
        f"{difference(found['gain'])} against the whole network, which is the mean of all exits.",
    )
