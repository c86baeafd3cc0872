"""The teacher and the larger students of the melanoma paper, with the head that it gave them.

Khan et al., Comput. Biol. Med. 2022, 146:105581; the networks are those of Keras.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.adapter import create, intermediates
from histill.models.parts import Normalize, glorot
from histill.models.weights import load_weights
from histill.types import Outputs

__all__ = ["KerasHead"]

# Keras's names, and the published weights nearest to Keras's own.
_NETWORKS = {
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "vgg16": "vgg16.tv_in1k",
    "inception_v3": "inception_v3.tf_in1k",
    "efficientnet_b0": "tf_efficientnet_b0.aa_in1k",
    "mobilenet_v1": "mobilenetv1_100.ra4_e3600_r224_in1k",
}


class KerasHead(nn.Module):
    """A network without its top, then global average pooling, dropout, batch norm and a linear layer.

    Parameters are those of Keras: a ResNet's convolutions have biases, InceptionV3's batch norms no scale (it
    is frozen at one). Strides and padding are those of the published PyTorch weights. The head's batch norm
    keeps PyTorch's momentum 0.1: with Keras's 0.01 its averages lag behind in trainings of some hundred steps.

    Args:
        name: ``resnet50 resnet101 vgg16 inception_v3 efficientnet_b0 mobilenet_v1``, one of them.
        classes: Number of classes.
        weights: None, ``"imagenet"``, or anything that `load_weights` takes.
        dropout: Share of the pooled features that are dropped in training.

    Outputs: ``stage1``, ``stage2``, ... (B, C, H, W); ``pooled`` (B, D); ``logits`` (B, classes).

    Raises:
        BadInput: Unknown name, or weights that do not fit.
        Failed: Weights that cannot be fetched.
    """

    input_size = 224

    def __init__(self, name: str, classes: int = 2, weights: str | None = None, dropout: float = 0.5) -> None:
        super().__init__()
        if name not in _NETWORKS:
            raise BadInput(f"KerasHead has no {name!r}: choose from {', '.join(_NETWORKS)}, or use Timm")
        arguments = {"zero_init_last": False} if name.startswith("resnet") else {}
        self.network = create(_NETWORKS[name], 0, pretrained=weights == "imagenet", **arguments)
        self.normalize = Normalize(self.network.pretrained_cfg["mean"], self.network.pretrained_cfg["std"])
        if name == "vgg16":
            self.network.pre_logits = nn.Identity()
        if name.startswith("resnet"):
            _add_biases(self.network)
        if name == "inception_v3":
            _freeze_scales(self.network)
        width = self.network.num_features
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(width, eps=1e-3)
        self.fc = nn.Linear(width, classes)
        self.fc.apply(glorot)
        if weights != "imagenet":
            new_biases = ("network.*conv?.bias", "network.*downsample.0.bias") if name.startswith("resnet") else ()
            load_weights(self, weights, fresh=("norm.*", "fc.*", *new_biases))

    def forward(self, images: Tensor) -> Outputs:
        last, outputs = intermediates(self.network, self.normalize(images))
        pooled = last.mean((2, 3))
        outputs["pooled"] = pooled
        outputs["logits"] = self.fc(self.norm(self.dropout(pooled)))
        return outputs


def _add_biases(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))


def _freeze_scales(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)
