"""OpenVINO: an ONNX file in its own form, and the predictor that runs it on the CPU.

The file is read by OpenVINO's ONNX frontend, not by its converter, which reports its use to Intel.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from scipy.special import softmax

from histill.deploy.predictor import Opened, Pixels, one_line
from histill.errors import BadInput, Failed, require
from histill.files import atomic

__all__ = ["OpenVinoPredictor", "for_cpu", "open_openvino", "to_openvino"]


@dataclass(frozen=True)
class OpenVinoPredictor:
    """A model compiled by OpenVINO for the CPU, images to logits (the first output)."""

    compiled: Any
    classes: tuple[str, ...]
    image_size: int
    mpp: float | None = None
    temperature: float | None = None
    _busy: Lock = field(default_factory=Lock, repr=False, compare=False)

    def logits(self, images: Pixels) -> Pixels:
        with self._busy:  # a compiled model answers one caller at a time
            said = self.compiled(np.ascontiguousarray(images), share_inputs=True)[0]
            logits: Pixels = np.array(said)  # its memory is written again by the next call
        return logits

    def __call__(self, images: Pixels) -> Pixels:
        return softmax(self.logits(images), axis=1)  # type: ignore[no-any-return]


def to_openvino(model: str | Path, path: str | Path) -> Path:
    """Write an ``.onnx`` file, float32 or int8, as OpenVINO's ``.xml``, its weights beside it as ``.bin``.

    Weights keep their precision; OpenVINO would otherwise halve them on disk. What the file says of itself goes along.

    Args:
        model: what `to_onnx` or `quantize` wrote.
        path: the ``.xml`` file.

    Raises:
        BadInput: ``path`` has another suffix, ``model`` is no ONNX file, or the extra ``openvino`` is missing.
        Failed: OpenVINO does not know an operator of it.
    """
    openvino, onnx = require("openvino", "openvino"), require("onnx", "deploy")
    model, path = Path(model), Path(path)
    if path.suffix != ".xml":
        raise BadInput(f"{path}: OpenVINO's files end in .xml")
    if not model.is_file():
        raise BadInput(f"{model}: no such file")
    try:
        card = {entry.key: entry.value for entry in onnx.load(model).metadata_props}.get("histill", "")
    except Exception as error:  # noqa: BLE001 - protobuf's DecodeError lies in a module that moves
        raise BadInput(f"{model} is not a usable ONNX model ({one_line(error)})") from None
    try:
        read = openvino.Core().read_model(model)
    except RuntimeError as error:
        raise Failed(f"OpenVINO cannot express {model} ({one_line(error)})") from error
    read.set_rt_info(card.encode().hex(), "histill")  # in hexadecimal, as XML forbids some of what a name may hold
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as scratch:
        written = Path(scratch, path.name)
        openvino.save_model(read, written, compress_to_fp16=False)
        for part in (written.with_suffix(".bin"), written):  # the weights first: an .xml is never without them
            with atomic(path.with_suffix(part.suffix)) as temporary:
                part.replace(temporary)
    return path


def for_cpu(model: Any, threads: int, *, bf16: bool = False) -> Any:
    """What OpenVINO has read, compiled: in float32 unless ``bf16`` is asked for.

    Left to itself it takes bfloat16 where the CPU computes in it, and logits differ in the third digit.
    """
    hint = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
    return require("openvino", "openvino").Core().compile_model(model, "CPU", hint)


def open_openvino(path: Path, threads: int) -> Opened:
    """How `open_model` opens an ``.xml`` file with its ``.bin``.

    Raises:
        BadInput: damaged, without its ``.bin``, or no model of images for any batch.
    """
    openvino = require("openvino", "openvino")
    if not path.with_suffix(".bin").is_file():
        raise BadInput(f"{path} is without its weights, {path.with_suffix('.bin').name}")
    try:
        model = openvino.Core().read_model(path)
        text = bytes.fromhex(model.get_rt_info("histill").astype(str)) if model.has_rt_info("histill") else b""
        shapes = [entry.partial_shape for entry in model.inputs]
        compiled = for_cpu(model, threads)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{path} is not a usable OpenVINO model ({one_line(error)})") from None
    if len(shapes) != 1 or shapes[0].rank.is_dynamic or len(shapes[0]) != 4:
        raise BadInput(f"{path} is no image model: it needs one input of shape (N, 3, size, size)")
    if shapes[0][0].is_static:
        raise BadInput(
            f"{path} takes exactly {shapes[0][0].get_length()} images at a time; export it with a dynamic batch"
        )
    size = shapes[0][3].get_length() if shapes[0][3].is_static else None
    return partial(OpenVinoPredictor, compiled), text.decode(errors="replace"), size
