"""From a trained network to something that runs where patients are: export, int8, timing, prediction."""

from __future__ import annotations

from histill.deploy.bench import efficiency, latency, peak_memory
from histill.deploy.export import check_parity, to_onnx, to_qupath, to_torchscript
from histill.deploy.predictor import (
    OnnxPredictor,
    Prediction,
    Predictor,
    TorchPredictor,
    TorchScriptPredictor,
    open_model,
    predict_folder,
)
from histill.deploy.quantize import quantize

__all__ = [
    "OnnxPredictor",
    "Prediction",
    "Predictor",
    "TorchPredictor",
    "TorchScriptPredictor",
    "check_parity",
    "efficiency",
    "latency",
    "open_model",
    "peak_memory",
    "predict_folder",
    "quantize",
    "to_onnx",
    "to_qupath",
    "to_torchscript",
]
