"""A run's network compiled by OpenVINO for the CPU: the same weights, sooner than PyTorch computes them."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from histill.deploy.formats import check_parity, to_onnx
from histill.deploy.openvino import OpenVinoPredictor, for_cpu, to_openvino
from histill.deploy.predictor import one_line
from histill.errors import HistillError
from histill.files import cache_dir
from histill.progress import notice, say
from histill.run import Run

__all__ = ["compiled"]

_NEEDED = ("openvino", "onnx", "onnxscript")


def compiled(run: Run, network: nn.Module, digest: str, *, bf16: bool) -> OpenVinoPredictor | None:
    """The network as OpenVINO runs it, or None where that is not installed or cannot express it, which is said aloud.

    The network is converted once, checked (logits within 1e-3 of PyTorch's in float32), and kept.

    Args:
        run: whose network it is.
        network: on the CPU, in eval mode; it is left as it is.
        digest: of weights and architecture, under which it is kept.
        bf16: compute in bfloat16.
    """
    if not all(find_spec(name) for name in _NEEDED):
        return None
    import openvino

    kept = cache_dir("openvino") / f"{digest[:24]}-{openvino.__version__.split('-')[0]}.xml"
    try:
        if not kept.is_file():
            say(f"compiling {run.path.name} for this CPU, once")
            _convert(run, network, kept)
        made = for_cpu(openvino.Core().read_model(kept), torch.get_num_threads(), bf16=bf16)
    except (HistillError, RuntimeError) as error:
        notice(f"{run.path.name} runs in PyTorch, as OpenVINO does not take it: {one_line(error)}")
        return None
    return OpenVinoPredictor(made, run.classes, run.image_size)


def _convert(run: Run, network: nn.Module, path: Path) -> None:
    size = run.image_size
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        onnx = to_onnx(network, Path(scratch, "model.onnx"), image_size=size, classes=run.classes)
        ready = to_openvino(onnx, Path(scratch, path.name))
        check_parity(network, ready, images.numpy())
        to_openvino(onnx, path)
