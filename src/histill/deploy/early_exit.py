"""A network with exits as one ONNX file per exit, and a predictor that runs no further than an image needs.

A single file with all exits would compute all of them for every image. Cut at the exits, a batch runs up to the first
exit, the images that are sure enough leave, and only the others go on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.deploy.formats import write_onnx
from histill.deploy.predictor import MOST_SIZE, Pixels, one_line, onnx_session, write_card
from histill.errors import BadInput, require
from histill.evaluate.early_exit import segments_of
from histill.files import file_digest, read_json, write_json

__all__ = ["ExitsPredictor", "open_exits", "to_exits"]


class _Piece(nn.Module):
    """A segment; of the last only the logits."""

    def __init__(self, segment: nn.Module, last: bool) -> None:
        super().__init__()
        self.segment, self.last = segment, last

    def forward(self, *carried: Tensor) -> tuple[Tensor, ...]:
        said: tuple[Tensor, ...] = self.segment(*carried)
        return said[:1] if self.last else said


def to_exits(
    network: nn.Module,
    folder: str | Path,
    *,
    threshold: float,
    image_size: int,
    classes: Sequence[str],
    mpp: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``exit1.onnx`` and so on, and ``exits.json`` with what is needed to run them.

    ``exit1.onnx`` takes ``images``, every other file what the one before gives beside its logits (``after1_1``, ...);
    each gives the ``logits`` of its exit and, but for the last, what goes on. `ExitsPredictor` says how they are run.

    Args:
        network: has ``segments()``, each ``(*carried) -> (logits, *carried)``; it is left as it is.
        folder: is made; ``exits.json`` is written last.
        threshold: of the confidence at which an image leaves.
        image_size: pixels.
        classes: names, in the order of the logits.
        mpp: microns per pixel at which it was trained; None for plain images.
        extra: more that ``exits.json`` says, JSON-able.

    Raises:
        BadInput: a network without exits, or the extra ``deploy`` is missing.
        Failed: the exporter cannot express a segment.
    """
    require("onnx", "deploy"), require("onnxscript", "deploy")
    folder = Path(folder)
    segments = segments_of(copy.deepcopy(network).cpu().eval().requires_grad_(False))
    carried: dict[str, Tensor] = {"images": torch.rand(2, 3, image_size, image_size)}
    files = []
    for k, segment in enumerate(segments, 1):
        piece = _Piece(segment, last=k == len(segments)).eval()
        said = piece(*carried.values())
        outputs = ["logits", *(f"after{k}_{n}" for n in range(1, len(said)))]
        card = write_card(classes, image_size, mpp, {"exit": k})
        file = folder / f"exit{k}.onnx"
        write_onnx(piece, file, carried, outputs, card=card, name=type(network).__name__)
        files.append({"file": file.name, "sha256": file_digest(file)})
        carried = dict(zip(outputs[1:], said[1:]))
    card_ = {"classes": list(classes), "image_size": image_size, "mpp": mpp, "threshold": threshold, "exits": files}
    write_json(folder / "exits.json", {**(extra or {}), **card_})
    return folder


@dataclass(frozen=True)
class ExitsPredictor:
    """Exit segments in ONNX Runtime on the CPU.

    Attributes:
        sessions: of the segments, shallow to deep.
        classes: names, in the order of the columns.
        image_size: height and width of the images that it takes, in pixels.
        threshold: an image leaves where the largest of its mean probabilities so far reaches it.
        mpp: microns per pixel at which it looks; None for plain images.
        temperature: None; the run's was fitted on the answers of its last exit.
    """

    sessions: tuple[Any, ...]
    classes: tuple[str, ...]
    image_size: int
    threshold: float
    mpp: float | None = None
    temperature: None = None

    def leave(self, images: Pixels) -> tuple[Pixels, NDArray[np.int64]]:
        """``(B, 3, H, W)`` in [0, 1] -> ``(B, C)`` probabilities, and the exit ``(B,)`` of each image, from 1.

        The probabilities are the mean of those of the exits that the image has passed.
        """
        answers, exits = self._leave(images)
        return np.exp(answers).astype(np.float32), exits

    def logits(self, images: Pixels) -> Pixels:
        """The logarithm of the probabilities, as of a network that answers with their mean."""
        return self._leave(images)[0].astype(np.float32)

    def __call__(self, images: Pixels) -> Pixels:
        return self.leave(images)[0]

    def _leave(self, images: Pixels) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Log-probabilities ``(B, C)`` and exits; logarithms, so that a probability of 1e-50 is kept."""
        answers = np.full((len(images), len(self.classes)), -np.inf)
        exits = np.zeros(len(images), dtype=np.int64)
        rows, passed, carried = np.arange(len(images)), answers, [images]
        for k, session in enumerate(self.sessions, 1):
            names = [entry.name for entry in session.get_inputs()]
            logits, *carried = session.run(None, dict(zip(names, carried)))
            log_p = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True)
            passed = np.logaddexp(passed, log_p)
            answers[rows], exits[rows] = passed - np.log(k), k  # whoever goes on has them replaced
            on = np.exp(answers[rows].max(1)) < self.threshold
            if not on.any():
                break
            rows, passed, carried = rows[on], passed[on], [x[on] for x in carried]
        return answers, exits


def open_exits(folder: str | Path, *, threads: int | None = None) -> ExitsPredictor:
    """Open what `to_exits` wrote and run it once, to know that it works.

    Args:
        folder: with ``exits.json``.
        threads: CPU threads (default: PyTorch's number).

    Raises:
        BadInput: a file is missing, damaged or not the one that was exported.
    """
    folder = Path(folder)
    card = read_json(folder / "exits.json")
    try:
        classes, size, mpp = tuple(map(str, card["classes"])), int(card["image_size"]), card["mpp"]
        files = [(folder / Path(entry["file"]).name, entry["sha256"]) for entry in card["exits"]]
        threshold = float(card["threshold"])
        files[0], classes[0]
        if not 0 < size <= MOST_SIZE or not all(isinstance(name, str) for name in card["classes"]):
            raise ValueError
        if mpp is not None and not (type(mpp) in (int, float) and 0 < mpp < np.inf):
            raise ValueError
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError):
        raise BadInput(f"{folder / 'exits.json'} is damaged; export it again") from None
    for file, digest in files:
        if not file.is_file() or file_digest(file) != digest:
            raise BadInput(f"{file} is missing or not the one that was exported; export it again")
    sessions = tuple(onnx_session(file, threads or torch.get_num_threads()) for file, _ in files)
    predictor = ExitsPredictor(sessions, classes, size, np.inf, mpp)
    try:
        predictor(np.zeros((1, 3, size, size), np.float32))
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no base class
        raise BadInput(f"{folder} does not take images of (1, 3, {size}, {size}): {one_line(error)}") from None
    return ExitsPredictor(sessions, classes, size, threshold, mpp)
