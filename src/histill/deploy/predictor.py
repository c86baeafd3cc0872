"""A trained classifier as a plain function of pixels, whichever runtime it lives in."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import nn

from histill.deploy.script import check_script
from histill.errors import BadInput, require
from histill.files import parse_json
from histill.memory import Fits

if TYPE_CHECKING:
    from histill.deploy.openvino import OpenVinoPredictor

__all__ = [
    "Leaving",
    "OnnxPredictor",
    "Prediction",
    "Predictor",
    "TorchPredictor",
    "TorchScriptPredictor",
    "open_model",
    "predict_folder",
]

MOST_SIZE = 8192
"""Pixels of a side; a model file is tried with an image of the size that it names."""
MOST_CLASSES = 1 << 16
"""Of a model; more outputs are no classes."""
Pixels = NDArray[np.float32]
"""``(B, 3, H, W)`` RGB in [0, 1]."""


class Predictor(Protocol):
    """Images to class probabilities.

    Attributes:
        classes: names, in the order of the columns.
        image_size: height and width of the images that it takes, in pixels.
        mpp: microns per pixel at which it looks; None for plain images.
        temperature: by which its logits are divided to be calibrated, fitted on the run's validation images; None where
            it is not known. It is not applied.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> int: ...
    @property
    def mpp(self) -> float | None: ...
    @property
    def temperature(self) -> float | None: ...

    def logits(self, images: Pixels) -> Pixels:
        """``(B, 3, H, W)`` in [0, 1] -> ``(B, C)`` before the softmax."""

    def __call__(self, images: Pixels) -> Pixels:
        """``(B, 3, H, W)`` in [0, 1] -> ``(B, C)`` probabilities."""


@runtime_checkable
class Leaving(Protocol):
    """A `Predictor` with early exit."""

    def leave(self, images: Pixels) -> tuple[Pixels, NDArray[np.int64]]:
        """``(B, 3, H, W)`` in [0, 1] -> ``(B, C)`` probabilities, and the exit ``(B,)`` of each image, from 1."""


@dataclass(frozen=True)
class TorchPredictor:
    """A network in PyTorch, on the device where its weights are; it is switched to eval mode."""

    network: nn.Module
    classes: tuple[str, ...]
    image_size: int
    mpp: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        self.network.eval()

    @torch.inference_mode()
    def logits(self, images: Pixels) -> Pixels:
        device = next((weight.device for weight in self.network.parameters()), torch.device("cpu"))
        outputs = self.network(torch.from_numpy(images).to(device))
        logits: Pixels = outputs["logits"].float().cpu().numpy()
        return logits

    def __call__(self, images: Pixels) -> Pixels:
        logits = self.logits(images)
        if logits.shape[1] != len(self.classes):
            raise BadInput(f"the network tells {logits.shape[1]} classes apart, its run names {len(self.classes)}")
        return softmax(logits, axis=1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TorchScriptPredictor:
    """A TorchScript module, images to logits."""

    module: torch.jit.ScriptModule
    classes: tuple[str, ...]
    image_size: int
    mpp: float | None = None
    temperature: float | None = None

    @torch.inference_mode()
    def logits(self, images: Pixels) -> Pixels:
        logits: Pixels = self.module(torch.from_numpy(images)).numpy()
        return logits

    def __call__(self, images: Pixels) -> Pixels:
        return softmax(self.logits(images), axis=1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class OnnxPredictor:
    """An ONNX Runtime session on the CPU, images to logits (the first output)."""

    session: Any
    classes: tuple[str, ...]
    image_size: int
    mpp: float | None = None
    temperature: float | None = None

    def logits(self, images: Pixels) -> Pixels:
        logits: Pixels = self.session.run(None, {self.session.get_inputs()[0].name: images})[0]
        return logits

    def __call__(self, images: Pixels) -> Pixels:
        return softmax(self.logits(images), axis=1)  # type: ignore[no-any-return]


def open_model(path: str | Path, *, threads: int | None = None, image_size: int | None = None) -> Predictor:
    """Open an ``.onnx``, an OpenVINO ``.xml`` or a TorchScript ``.pt``/``.torchscript`` file, and run it once.

    Class names, image size and resolution are read from what the export wrote into the file. In a file of another
    origin the classes are named ``class0`` and so on, its output is taken for logits, and its input for RGB in
    [0, 1]. TorchScript is loaded by libtorch's own reader, which runs no Python pickle, once its code has been looked
    through (`histill.deploy.script`).

    Args:
        path: the file.
        threads: CPU threads (default: PyTorch's number). For TorchScript this sets PyTorch's own, for the process.
        image_size: pixels, for a file that does not say it.

    Raises:
        BadInput: the file is missing, damaged, no classifier of images, or does not say its image size.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    if path.suffix == ".onnx":
        make, text, static = _open_onnx(path, threads or torch.get_num_threads())
    elif path.suffix in (".pt", ".torchscript"):
        make, text, static = _open_torchscript(path, threads)
    elif path.suffix == ".xml":
        from histill.deploy.openvino import open_openvino

        make, text, static = open_openvino(path, threads or torch.get_num_threads())
    else:
        raise BadInput(f"{path}: not a model file; give a run folder, .onnx, .xml, .pt or .torchscript")

    card = _read_card(text, path)
    size = card.get("image_size") or static
    if image_size and size and image_size != size:
        raise BadInput(f"{path} takes images of {size} pixels, not {image_size}")
    size = size or image_size
    if size and size > MOST_SIZE:
        raise BadInput(f"{path} takes images of {size:,} pixels a side; {MOST_SIZE:,} at most")
    if not size:
        raise BadInput(
            f"{path} does not say its image size; export it with histill export, or open it with image_size="
        )

    predictor = replace(
        make(tuple(card.get("classes", ())), size, card.get("mpp")), temperature=card.get("temperature")
    )
    try:
        shape = predictor.logits(np.zeros((1, 3, size, size), np.float32)).shape
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no base class
        raise BadInput(f"{path} does not take images of (1, 3, {size}, {size}): {one_line(error)}") from None
    if not predictor.classes and len(shape) > 1 and shape[1] <= MOST_CLASSES:
        predictor = replace(predictor, classes=tuple(f"class{index}" for index in range(shape[1])))
    if len(shape) not in (2, 4) or shape[:2] != (1, len(predictor.classes)):
        raise BadInput(f"{path} gives an output of shape {tuple(shape)}, not one logit for each of its classes")
    return predictor


Opened: TypeAlias = "tuple[Callable[..., OnnxPredictor | OpenVinoPredictor | TorchScriptPredictor], str, int | None]"
"""What makes the predictor, what the file says of itself, and the image size that its graph fixes."""


def _open_onnx(path: Path, threads: int) -> Opened:
    session = onnx_session(path, threads)
    entries = session.get_inputs()
    shape: list[int | str] = entries[0].shape
    if len(entries) != 1 or len(shape) != 4:
        raise BadInput(f"{path} is no image model: it needs one input of shape (N, 3, size, size)")
    if isinstance(shape[0], int):
        raise BadInput(f"{path} takes exactly {shape[0]} images at a time; export it with a dynamic batch")
    text = session.get_modelmeta().custom_metadata_map.get("histill", "")
    return partial(OnnxPredictor, session), text, shape[3] if isinstance(shape[3], int) else None


def onnx_session(path: Path, threads: int) -> Any:
    """An ONNX Runtime session on the CPU; `BadInput` where the file is not a model."""
    onnxruntime = require("onnxruntime", "deploy")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that wait for the next call by spinning take the cores from the next segment, or model, or reader.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no base class
        raise BadInput(f"{path} is not a usable ONNX model ({one_line(error)})") from None


def _open_torchscript(path: Path, threads: int | None) -> Opened:
    extra: dict[str, Any] = {"histill.json": ""}
    check_script(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of TorchScript, which QuPath reads
            module = torch.jit.load(path, map_location="cpu", _extra_files=extra)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{path} is not a usable TorchScript model ({one_line(error)})") from None
    if threads:
        torch.set_num_threads(threads)
    return partial(TorchScriptPredictor, module.eval()), bytes(extra["histill.json"]).decode(errors="replace"), None


def write_card(
    classes: Sequence[str], image_size: int, mpp: float | None, extra: Mapping[str, Any] | None = None
) -> str:
    """What an exported file says of itself, as JSON."""
    card = {**(extra or {}), "classes": list(classes), "image_size": image_size, "mpp": mpp}
    return json.dumps(card, ensure_ascii=False, allow_nan=False)


def _read_card(text: str, path: Path) -> dict[str, Any]:
    """The card of ``text``, empty where there is none; `BadInput` where it is not what an export writes."""
    if not text:
        return {}
    try:
        card = parse_json(text.encode())
        classes, size, mpp, temperature = card["classes"], card["image_size"], card["mpp"], card.get("temperature")
        sound = (
            bool(classes)
            and len(classes) <= MOST_CLASSES
            and all(isinstance(name, str) for name in classes)
            and len(set(classes)) == len(classes)
            and type(size) is int
            and 0 < size <= MOST_SIZE
            and all(x is None or (type(x) in (int, float) and 0 < x < np.inf) for x in (mpp, temperature))
        )
    except (OverflowError, ValueError, TypeError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise BadInput(f"{path}: what it says of its classes and size is damaged; export it again")
    return dict(card)


def one_line(error: BaseException) -> str:
    """The first line of a foreign error, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@dataclass(frozen=True)
class Prediction:
    """One image's probabilities ``(C,)`` and the exit where it left, or the line that says why there are none."""

    path: Path
    probabilities: Pixels | None
    error: str = ""
    exit: int | None = None


def predict_folder(
    predictor: Predictor,
    paths: Iterable[Path],
    load: Callable[[Path], Pixels],
    *,
    batch: int = 32,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[Prediction]:
    """Predict images in the order of ``paths``; an unreadable one is reported and the rest goes on.

    Args:
        predictor: what predicts.
        paths: image files.
        load: path -> ``(3, size, size)`` RGB in [0, 1]; its `OSError` and `ValueError` (`BadInput`) are reported.
        batch: images at a time; they are decoded in parallel.
        progress: called with the number of images done since the last call.
    """

    def attempt(path: Path) -> Pixels | Exception:
        try:
            return load(path)
        except (OSError, ValueError) as error:
            return error

    remaining, fits = list(paths), Fits("predicting")
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(remaining), batch):
            chunk = remaining[start : start + batch]
            loaded = list(pool.map(attempt, chunk))
            images = [image for image in loaded if not isinstance(image, Exception)]
            rows = iter(_said(predictor, images, fits))
            for path, image in zip(chunk, loaded):
                if isinstance(image, Exception):
                    yield Prediction(path, None, one_line(image))
                else:
                    probabilities, exit = next(rows)
                    if np.isnan(probabilities).any():  # of which the first class would be called the likeliest
                        yield Prediction(path, None, f"{path}: the model's answer is not a number")
                        continue
                    yield Prediction(path, probabilities, exit=exit)
            progress(len(chunk))


def _said(predictor: Predictor, images: list[Pixels], fits: Fits) -> list[tuple[Pixels, int | None]]:
    """Each image's probabilities and, with early exit, where it left."""
    if not images:
        return []
    if isinstance(predictor, Leaving):
        pieces = fits(predictor.leave, np.stack(images))
        return [(p, int(e)) for probabilities, exits in pieces for p, e in zip(probabilities, exits)]
    return [(p, None) for probabilities in fits(predictor, np.stack(images)) for p in probabilities]
