"""Networks: each maps images ``(B, 3, H, W)`` in [0, 1] to `Outputs` and names its own features."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histill.models.adapter import Timm
    from histill.models.cifar import Cifar
    from histill.models.csat import CSAT, SAT, ResNet18SAT
    from histill.models.dsnet import DSNet
    from histill.models.foundation import Foundation
    from histill.models.keras import KerasHead
    from histill.models.mac_resnet import MACResNet, attention_crop
    from histill.models.msdnet import MSDNet
    from histill.models.multi_exit import MultiExitResNet18, ResNet18
    from histill.models.regressors import Regressors
    from histill.models.scan import SCAN
    from histill.models.stardist import StarDist
    from histill.models.stardist_instances import predict_instances
    from histill.models.stardist_weights import load_keras
    from histill.models.stridenet import StrideNet
    from histill.models.unet import UNet, UNetDecoder
    from histill.models.weights import load_weights

__all__ = [
    "CSAT",
    "SAT",
    "SCAN",
    "Cifar",
    "DSNet",
    "Foundation",
    "KerasHead",
    "MACResNet",
    "MSDNet",
    "MultiExitResNet18",
    "Regressors",
    "ResNet18",
    "ResNet18SAT",
    "StarDist",
    "StrideNet",
    "Timm",
    "UNet",
    "UNetDecoder",
    "attention_crop",
    "load_keras",
    "load_weights",
    "predict_instances",
]

# timm and torchvision take seconds to import, and most networks need neither.
_HOMES = {
    "CSAT": "csat",
    "SAT": "csat",
    "SCAN": "scan",
    "Cifar": "cifar",
    "DSNet": "dsnet",
    "Foundation": "foundation",
    "KerasHead": "keras",
    "MACResNet": "mac_resnet",
    "MSDNet": "msdnet",
    "MultiExitResNet18": "multi_exit",
    "Regressors": "regressors",
    "ResNet18": "multi_exit",
    "ResNet18SAT": "csat",
    "StarDist": "stardist",
    "StrideNet": "stridenet",
    "Timm": "adapter",
    "UNet": "unet",
    "UNetDecoder": "unet",
    "attention_crop": "mac_resnet",
    "load_keras": "stardist_weights",
    "load_weights": "weights",
    "predict_instances": "stardist_instances",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"histill.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
