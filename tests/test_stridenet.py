"""StrideNet has fewer parameters than DSNet and a twentieth of its arithmetic, and is a student wherever DSNet is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZE, no_page, parameters, table
from torch import nn

import histill as hs
from histill.errors import BadInput
from histill.evaluate import macs
from histill.models import DSNet, StrideNet, UNet
from histill.recipes import baselines, dsnet


def test_it_has_fewer_parameters_and_a_twentieth_of_dsnets_arithmetic() -> None:
    network = StrideNet(2)
    assert parameters(network) == 164_978 <= parameters(DSNet(2)) == 268_898
    # By hand: output side squared, times 9 times channels in and out, of the eight convolutions.
    convs = ((112, 3, 16), (56, 16, 16), (28, 16, 32), (28, 32, 32), (14, 32, 64), *2 * ((14, 64, 64),), (7, 64, 96))
    assert macs(network, 224, breakdown=True)["conv"] == sum(s * s * 9 * ci * co for s, ci, co in convs)
    assert 20 * macs(network, 224) < macs(DSNet(2), 224)


@torch.no_grad()
def test_its_first_batch_norm_takes_the_place_of_normalised_images() -> None:
    torch.manual_seed(0)
    stem, pixels = StrideNet(2).train().stem, torch.rand(8, 3, 64, 64)
    torch.testing.assert_close(stem(0.5 * pixels), stem(pixels), rtol=1e-3, atol=1e-3)


def test_it_reaches_the_same_answer_as_its_convolutions_with_batch_norm_folded_in() -> None:
    torch.manual_seed(0)
    network, pixels = StrideNet(3), torch.rand(4, 3, 48, 48)
    network.train()(pixels)
    network.eval()
    x = pixels
    with torch.no_grad():
        for conv, norm, _ in (block for block in network.modules() if type(block).__name__ == "Conv"):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            bias = norm.bias - norm.running_mean * scale
            x = nn.functional.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1), bias, conv.stride, 1).relu()
        expected = network.fc(x.mean((2, 3)))
        torch.testing.assert_close(network(pixels)["logits"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["stridenet", "StrideNet"])
def test_the_recipe_of_dsnet_distils_into_it(tmp_path: Path, name: str) -> None:
    data = table(tmp_path / "data")
    made = dsnet.student(data=data, network=name, image_size=SIZE, epochs=1, batch_size=8)
    assert (made.student.func, made.student.keywords) == (StrideNet, {"classes": 2, "weights": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histill.evaluate.finish.finish", no_page)
        run = hs.train(made, tmp_path / "run")
    again = hs.run.Run.open(tmp_path / "run").network()
    assert isinstance(again, StrideNet)
    assert len(run.predictions) == len(data.rows("val")) + len(data.rows("test"))
    with pytest.raises(BadInput, match="no ImageNet weights for StrideNet"):
        dsnet.student(data=data, network=name, weights="imagenet", image_size=SIZE).student()


def test_pretraining_and_unet_take_it_as_a_backbone(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    made: Any = baselines.supervised(data=data, network="StrideNet", image_size=SIZE)
    assert isinstance(made.student(), StrideNet)
    assert UNet(3, "stridenet")(torch.rand(2, 3, 64, 48))["logits"].shape == (2, 3, 64, 48)
