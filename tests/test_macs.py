"""Multiply-accumulates, against figures counted by hand and published ones."""

from __future__ import annotations

import pytest
import torch
from tiny import parameters
from torch import Tensor, nn

from histill.evaluate.cost import macs
from histill.models import DSNet, Timm
from histill.types import Outputs


class Every(nn.Module):
    """One layer of every kind that is counted, and functions that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.plain_norm = nn.BatchNorm2d(16, affine=False)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.pool = nn.AvgPool2d(2)
        self.adaptive = nn.AdaptiveAvgPool2d(2)
        self.layer_norm = nn.LayerNorm(64)
        self.fc = nn.Linear(64, 10)
        self.softmax = nn.Softmax(-1)

    def forward(self, images: Tensor) -> Outputs:
        x = self.grouped(self.conv(images))  # (1, 16, 4, 4)
        x = self.up(self.plain_norm(self.norm(x)).relu())  # (1, 16, 8, 8)
        x = self.adaptive(self.pool(x))  # (1, 16, 4, 4), (1, 16, 2, 2)
        logits = self.fc(self.layer_norm(x.flatten(1)))
        return Outputs(logits=torch.softmax(self.softmax(logits), -1))


def test_each_kind_of_layer_counts_what_thop_counts() -> None:
    assert macs(Every(), 8, breakdown=True) == {
        "conv": 8 * 4 * 4 * 27 + 16 * 4 * 4 * 2 * 9,
        "norm": 4 * 256 + 2 * 256 + 4 * 64,
        "upsample": 11 * 16 * 8 * 8,
        "pool": 16 * 4 * 4 + 16 * 2 * 2 * (2 * 2 + 1),
        "linear": 64 * 10,
        "softmax": 3 * 10 - 1,
    }
    assert macs(Every(), 8) == sum(macs(Every(), 8, breakdown=True).values())


def test_the_network_is_left_as_it_was() -> None:
    network = Every()
    network.norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    macs(network, 8)
    assert [module.training for module in network.modules()] == modes
    assert not any(module._forward_hooks for module in network.modules())
    after = network.state_dict()
    assert all(after[name].device.type == "cpu" and torch.equal(after[name], before[name]) for name in before)


def test_a_failing_network_is_left_as_it_was_too() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1))
    with pytest.raises(RuntimeError):
        macs(network, 8)
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_resnet18_at_384_is_what_the_papers_print() -> None:
    network = Timm("resnet18", 1000)
    kinds = macs(network, 384, breakdown=True)
    assert int(macs(network, 384) / 1e7) / 100 == 5.35
    assert round((kinds["conv"] + kinds["linear"]) / 1e9, 3) == 5.330
    assert parameters(network) == 11_689_512


def test_vit_base_at_384_is_what_the_papers_print() -> None:
    with torch.device("meta"):
        network = Timm("vit_base_patch16_384", 1000)
    assert int(macs(network, 384) / 1e8) / 10 == 49.3


def test_dsnet_by_hand() -> None:
    assert macs(DSNet(2, 224), 224, breakdown=True) == {
        "conv": 128 * 222**2 * 27 + 64 * 109**2 * 128 * 9 + 32 * 52**2 * 64 * 9,
        "linear": 32 * 52**2 * 2,
    }
