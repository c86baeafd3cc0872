"""From a trained network to something that runs where patients are: export, int8, timing, prediction."""

from __future__ import annotations

from histill.deploy.deliver import Exported, bench, export
from histill.deploy.formats import check_parity, to_onnx, to_qupath, to_torchscript
from histill.deploy.openvino import OpenVinoPredictor, to_openvino
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
from histill.deploy.serve import predict
from histill.deploy.timing import efficiency, latency, peak_memory

__all__ = [
    "Exported",
    "OnnxPredictor",
    "OpenVinoPredictor",
    "Prediction",
    "Predictor",
    "TorchPredictor",
    "TorchScriptPredictor",
    "bench",
    "check_parity",
    "efficiency",
    "export",
    "latency",
    "open_model",
    "peak_memory",
    "predict",
    "predict_folder",
    "quantize",
    "to_onnx",
    "to_openvino",
    "to_qupath",
    "to_torchscript",
]
