"""A trained network as one file that runs without Histill, checked against the network itself."""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from histill.deploy.predictor import Pixels, Predictor, TorchPredictor, one_line, open_model, write_card
from histill.errors import BadInput, Failed, require
from histill.files import atomic, write_json

__all__ = ["OPSET", "check_parity", "to_onnx", "to_qupath", "to_torchscript", "write_onnx"]

OPSET = 18
"""The ONNX operator set of every export: the oldest that the exporter writes, so the most runtimes read it."""


class _Logits(nn.Module):
    """A network that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *images: Tensor) -> Tensor:
        logits: Tensor = self.network(*images)["logits"]
        return logits


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what the exporters print, warn and log; what matters of it comes as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _prepare(network: nn.Module, image_size: int, classes: Sequence[str]) -> tuple[_Logits, Tensor]:
    """A copy of ``network`` for the CPU in eval mode that gives logits, and a batch to trace it with."""
    wrapped = _Logits(copy.deepcopy(network).cpu().eval()).requires_grad_(False)
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    count = wrapped(images).shape[1]
    if count != len(classes):
        raise BadInput(f"the network has {count} classes, but {len(classes)} names were given")
    return wrapped.eval(), images


def to_onnx(
    network: nn.Module,
    path: str | Path,
    *,
    image_size: int,
    classes: Sequence[str],
    mpp: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``network`` as one ONNX file of opset `OPSET`.

    Its input is ``images``, float32 ``(N, 3, image_size, image_size)`` RGB in [0, 1] for any ``N``, its output
    ``logits`` ``(N, C)``. The same network gives the same bytes.

    Args:
        network: its ``"logits"`` are exported; it is left as it is.
        path: the ``.onnx`` file.
        image_size: pixels.
        classes: names, in the order of the logits.
        mpp: microns per pixel at which it was trained; None for plain images.
        extra: more that the file says of itself, JSON-able.

    Raises:
        BadInput: the number of names is not that of the logits, or the extra ``deploy`` is missing.
        Failed: the exporter cannot express the network.
    """
    require("onnx", "deploy"), require("onnxscript", "deploy")
    wrapped, images = _prepare(network, image_size, classes)
    card = write_card(classes, image_size, mpp, extra)
    return write_onnx(wrapped, path, {"images": images}, ["logits"], card=card, name=type(network).__name__)


def write_onnx(
    module: nn.Module, path: str | Path, inputs: Mapping[str, Tensor], outputs: Sequence[str], *, card: str, name: str
) -> Path:
    """Write ``module``, tensors to tensors, as one ONNX file for any batch size.

    Args:
        module: in eval mode, on the CPU.
        path: the ``.onnx`` file.
        inputs: by name, a batch of two to trace it with, in the order of its arguments.
        outputs: names.
        card: what the file says of itself (`write_card`).
        name: of the network, for the error.

    Raises:
        Failed: the exporter cannot express it.
    """
    batch = {0: torch.export.Dim("batch")}
    with quiet():
        try:
            traced = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=(tuple(batch for _ in inputs),))
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                custom_translation_table={torch.ops.aten.adaptive_max_pool2d.default: _adaptive_max_pool},
                verbose=False,
            )
        except Exception as error:
            raise Failed(f"cannot express {name} in ONNX ({_cause(error)}); try torchscript") from error
    assert program is not None
    model = program.model_proto
    # The exporter notes the source line of every operator, with this machine's paths.
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    for part in (*model.graph.node, *values):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    images = re.escape(model.graph.input[0].type.tensor_type.shape.dim[0].dim_param)  # a name like s19
    for dim in (dim for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param):
        dim.dim_param = re.sub(rf"\b{images}\b", "batch", dim.dim_param)
    model.metadata_props.add(key="histill", value=card)
    with atomic(Path(path), tidy=True) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    return Path(path)


def _adaptive_max_pool(images: Any, output_size: Sequence[int]) -> Any:
    """Adaptive max pooling in ONNX, which the exporter lacks: a maximum over each of the windows that PyTorch takes."""
    from onnxscript import opset18 as op

    pooled = images
    for axis, count in zip((2, 3), output_size):
        size = images.shape[axis]
        windows = [(index * size // count, -(-(index + 1) * size // count)) for index in range(count)]
        cut = [op.Slice(pooled, _ints(start), _ints(end), _ints(axis)) for start, end in windows]
        pooled = op.Concat(*(op.ReduceMax(part, _ints(axis)) for part in cut), axis=axis)
    return pooled, pooled  # the second is where PyTorch gives the places of the maxima


def _ints(*values: int) -> Any:
    from onnxscript import opset18 as op

    return op.Constant(value_ints=values)


def _cause(error: BaseException) -> str:
    """The line of the first error in a chain: the exporter's last one only says that there was another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def to_torchscript(
    network: nn.Module,
    path: str | Path,
    *,
    image_size: int,
    classes: Sequence[str],
    mpp: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``network`` as a frozen TorchScript module, images to logits; arguments as for `to_onnx`."""
    wrapped, images = _prepare(network, image_size, classes)
    # Saved through memory: given a file name, torch.jit writes that name, here a temporary one, into the file.
    buffer = io.BytesIO()
    with quiet():
        try:
            traced = torch.jit.trace(wrapped, images)  # type: ignore[no-untyped-call]
            frozen = torch.jit.freeze(traced)
            card = {"histill.json": write_card(classes, image_size, mpp, extra)}
            torch.jit.save(frozen, buffer, _extra_files=card)
        except RuntimeError as error:
            raise Failed(f"cannot express {type(network).__name__} in TorchScript ({_cause(error)})") from error
    with atomic(Path(path), tidy=True) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return Path(path)


def to_qupath(
    network: nn.Module,
    folder: str | Path,
    *,
    image_size: int,
    classes: Sequence[str],
    mpp: float | None,
    architecture: str,
) -> Path:
    """Write the folder that WSInfer and QuPath's WSInfer extension load as a local model.

    Both apply the softmax themselves, so the module gives logits; the network normalises for itself, so that the
    transform is only Resize and ToTensor (WSInfer model-config specification 1.0).

    Args:
        network: its ``"logits"`` are exported; it is left as it is.
        folder: receives ``torchscript_model.pt`` and ``config.json``.
        image_size: pixels.
        classes: names, in the order of the logits.
        mpp: microns per pixel at which it was trained.
        architecture: its name, for people.

    Raises:
        BadInput: no ``mpp``, a name twice, or as for `to_onnx`.
        Failed: TorchScript cannot express the network.
    """
    if not mpp:
        raise BadInput("QuPath cuts tiles by resolution: give --mpp, the microns per pixel at which the model looks")
    if len(set(classes)) != len(classes):
        raise BadInput("QuPath needs class names that differ")
    folder = Path(folder)
    (folder / "config.json").unlink(missing_ok=True)  # written last: what it describes is whole
    to_torchscript(network, folder / "torchscript_model.pt", image_size=image_size, classes=classes, mpp=mpp)
    write_json(
        folder / "config.json",
        {
            "spec_version": "1.0",
            "architecture": architecture,
            "num_classes": len(classes),
            "class_names": list(classes),
            "patch_size_pixels": image_size,
            "spacing_um_px": mpp,
            "transform": [{"name": "Resize", "arguments": {"size": image_size}}, {"name": "ToTensor"}],
        },
    )
    return folder


def check_parity(
    network: nn.Module, exported: Predictor | str | Path, images: Pixels, *, tolerance: float = 1e-3
) -> dict[str, float]:
    """The largest absolute difference between the logits of ``network`` and of its export.

    Logits, because a softmax near 0 or 1 hides differences. The first image also goes alone, so that a graph that
    has kept the batch size of its tracing is found.

    Args:
        network: the original; it is switched to eval mode.
        exported: a predictor, or a file, which is deleted where it fails.
        images: ``(B, 3, size, size)`` RGB in [0, 1].
        tolerance: what is allowed; float32 kernels differ by about 1e-5 of the largest logit, int8 by far more.

    Returns:
        ``{"max_abs_diff": ...}``

    Raises:
        Failed: the difference is above ``tolerance``, or not a number.
    """
    file = Path(exported) if isinstance(exported, str | Path) else None
    other = exported if not isinstance(exported, str | Path) else open_model(exported)

    def reject(why: str) -> Failed:
        if file is None:
            return Failed(f"the export {why}")
        file.unlink()
        if file.suffix == ".xml":
            file.with_suffix(".bin").unlink(missing_ok=True)  # its weights
        return Failed(f"{file} {why}; the file was deleted")

    original = TorchPredictor(network, other.classes, other.image_size)
    largest = 0.0
    for chunk in (images[:1], *(images[start : start + 32] for start in range(0, len(images), 32))):
        ours = original.logits(chunk)
        try:
            theirs = other.logits(chunk)
        except Exception as error:
            raise reject(f"does not run on a batch of {len(chunk)}: {one_line(error)}") from error
        with np.errstate(invalid="ignore"):
            difference = np.where(ours == theirs, 0, np.abs(ours - theirs)).max()
        largest = float(np.maximum(largest, difference))
    if not largest <= tolerance:
        raise reject(f"differs from the network by up to {largest:.3g} in its logits (allowed: {tolerance:.3g})")
    return {"max_abs_diff": largest}
