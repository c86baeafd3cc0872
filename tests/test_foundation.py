"""Every foundation model builds in this timm as its card says, and says what its authors' code would say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from histill import cli
from histill.errors import BadInput, Failed
from histill.models import Foundation
from histill.models.foundation import CARDS, from_transformers

PUBLISHED = {  # parameters in millions as published (of GigaPath the tile encoder), width, first patch token
    "uni": (303, 1024, 1),
    "uni2-h": (681, 1536, 9),
    "virchow": (631, 2560, 1),
    "virchow2": (631, 2560, 5),
    "h-optimus-0": (1135, 1536, 5),
    "h-optimus-1": (1135, 1536, 5),
    "h0-mini": (86, 768, 5),
    "gigapath": (1135, 1536, 1),
    "kaiko-vits16": (21.7, 384, 1),
    "lunit-vits8": (21.7, 384, 1),
    "phikon": (85.8, 768, 1),
    "phikon-v2": (303, 1024, 1),
}
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2}


def small(name: str, **arguments: Any) -> Foundation:
    """The model in its own layout, but of two narrow blocks and random weights."""
    torch.manual_seed(3)
    network = Foundation(name, weights=None, **{**SMALL, **arguments}).eval()
    for parameter in network.parameters():  # layer scales start near zero, and would hide the blocks
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize("name", CARDS)
def test_at_full_size_it_has_the_published_parameters_widths_and_tokens(name: str) -> None:
    millions, width, first = PUBLISHED[name]
    card = CARDS[name]
    with torch.device("meta"):
        network = Foundation(name, weights=None)
        outputs = network(torch.empty(2, 3, 224, 224))
    count = sum(p.numel() for p in network.parameters())
    assert count == card.parameters
    assert count == pytest.approx(millions * 1e6, rel=0.005)
    assert network.network.num_prefix_tokens == card.prefix == first
    assert network.width == card.width == width
    assert outputs["pooled"].shape == outputs["logits"].shape == (2, width)
    token = width // 2 if card.pooling == "cls+mean" else width
    side = 224 // card.patch
    assert outputs["cls"].shape == (2, token)
    assert outputs["tokens"].shape == (2, token, side, side)
    gated = isinstance(getattr(network.network.blocks[0].mlp, "gate_last", None), bool)
    assert gated == ("vit_giant" in card.timm or "mlp_layer" in card.arguments)


def test_the_list_is_that_of_the_published_models_and_its_arguments_are_json() -> None:
    assert set(PUBLISHED) == set(CARDS)
    for card in CARDS.values():
        assert json.loads(json.dumps(dict(card.arguments))) == dict(card.arguments)
        assert card.page.count("/") == 4


@pytest.mark.parametrize("name", ["uni", "virchow", "virchow2", "h-optimus-0", "h0-mini", "lunit-vits8"])
def test_it_answers_as_timm_does_on_normalised_images(name: str) -> None:
    network, card = small(name), CARDS[name]
    images = torch.rand(2, 3, 224, 224)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
    with torch.no_grad():
        outputs, sequence = network(images), network.network.forward_features((images - mean) / std)
    first = PUBLISHED[name][2]
    patches = sequence[:, first:]
    expected = sequence[:, 0] if card.pooling == "cls" else torch.cat([sequence[:, 0], patches.mean(1)], 1)
    torch.testing.assert_close(outputs["pooled"], expected)
    side = 224 // card.patch
    assert patches.shape[1] == side * side
    torch.testing.assert_close(outputs["tokens"][:, :, 3, 5], patches[:, 3 * side + 5])
    if card.arguments.get("global_pool") != "":
        torch.testing.assert_close(outputs["pooled"], network.network((images - mean) / std))


def test_pooling_can_be_chosen() -> None:
    images = torch.rand(1, 3, 224, 224)
    said = {}
    for pooling in ("cls", "mean", "cls+mean"):
        network = small("kaiko-vits16", pooling=pooling)
        with torch.no_grad():
            said[pooling] = network(images)["pooled"]
        assert network.width == said[pooling].shape[1]
    torch.testing.assert_close(said["cls+mean"], torch.cat([said["cls"], said["mean"]], 1))
    with pytest.raises(BadInput, match="cls, mean or cls\\+mean"):
        small("kaiko-vits16", pooling="max")


def test_a_size_that_it_does_not_see_is_said() -> None:
    assert small("uni")(torch.rand(1, 3, 64, 96))["tokens"].shape[2:] == (4, 6)
    with pytest.raises(BadInput, match="uni sees images of a multiple of 16 pixels, not 60 x 64"):
        small("uni")(torch.rand(1, 3, 64, 60))
    with pytest.raises(BadInput, match="h-optimus-0 sees images of 224 x 224 pixels, not 256 x 256"):
        small("h-optimus-0")(torch.rand(1, 3, 256, 256))
    assert small("phikon", img_size=64)(torch.rand(1, 3, 64, 64))["tokens"].shape[2:] == (4, 4)


def test_weights_of_a_file_are_taken_and_a_misfit_is_said(tmp_path: Path) -> None:
    source = small("virchow2")
    save_file(source.network.state_dict(), tmp_path / "w.safetensors")
    torch.save({name: t.half() for name, t in source.network.state_dict().items()}, tmp_path / "w.pt")
    images = torch.rand(1, 3, 224, 224)
    network = Foundation("virchow2", weights=tmp_path / "w.safetensors", **SMALL).eval()
    assert torch.equal(network(images)["pooled"], source(images)["pooled"])
    assert not any(p.is_meta or p.dtype != torch.float32 for p in network.parameters())
    half = Foundation("virchow2", weights=str(tmp_path / "w.pt"), **SMALL).eval()
    torch.testing.assert_close(half(images)["pooled"], source(images)["pooled"], atol=0.05, rtol=0.05)
    with pytest.raises(BadInput, match=r"virchow2: .*w\.safetensors does not fit .*it has no cls_token 1x1x1280"):
        Foundation("virchow2", weights=tmp_path / "w.safetensors", depth=2)


def test_a_wrong_name_lists_the_names() -> None:
    with pytest.raises(BadInput, match=r"did you mean uni2-h.*phikon-v2"):
        Foundation("UNI2h", weights=None)


def test_without_a_network_the_hub_is_said_to_be_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        Failed, match=r"uni2-h \(https://huggingface\.co/MahmoodLab/UNI2-h\).*--teacher uni2-h=FILE"
    ) as error:
        Foundation("uni2-h")
    assert "\n" not in str(error.value)


# Weights as transformers names them


def hf_weights(kind: str, width: int = 24, depth: int = 2, places: int = 17) -> dict[str, Tensor]:
    """A ViTModel or Dinov2Model of two blocks in transformers' names: patch 16, 64 pixels, MLP four times as wide."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    def linear(name: str, out: int, inner: int) -> dict[str, Tensor]:
        return {f"{name}.weight": random(out, inner), f"{name}.bias": random(out)}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}

    state = {
        "embeddings.cls_token": random(1, 1, width),
        "embeddings.position_embeddings": random(1, places, width),
        "embeddings.patch_embeddings.projection.weight": random(width, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": random(width),
        **norm("layernorm"),
    }
    if kind == "dinov2":
        state["embeddings.mask_token"] = random(1, width)
    else:
        state |= linear("pooler.dense", width, width)
    for layer in range(depth):
        at = f"encoder.layer.{layer}."
        for part in ("query", "key", "value"):
            state |= linear(f"{at}attention.attention.{part}", width, width)
        state |= linear(f"{at}attention.output.dense", width, width)
        first, second = ("norm1", "norm2") if kind == "dinov2" else ("layernorm_before", "layernorm_after")
        up, down = ("mlp.fc1", "mlp.fc2") if kind == "dinov2" else ("intermediate.dense", "output.dense")
        state |= norm(at + first) | norm(at + second)
        state |= linear(at + up, 4 * width, width) | linear(at + down, width, 4 * width)
        if kind == "dinov2":
            state |= {f"{at}layer_scale{i}.lambda1": random(width) for i in (1, 2)}
    return state


def hf_forward(state: dict[str, Tensor], images: Tensor, kind: str, heads: int = 2) -> Tensor:
    """What those weights stand for, written out: tokens ``(B, N, D)`` after the last norm."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    patches = F.unfold(images, 16, stride=16).transpose(1, 2)  # (B, hw, 3 * 16 * 16)
    kernel = state["embeddings.patch_embeddings.projection.weight"].flatten(1)
    x = patches @ kernel.T + state["embeddings.patch_embeddings.projection.bias"]
    x = (
        torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
        + state["embeddings.position_embeddings"]
    )
    layer = 0
    while f"encoder.layer.{layer}.attention.output.dense.weight" in state:
        at = f"encoder.layer.{layer}."
        first, second = ("norm1", "norm2") if kind == "dinov2" else ("layernorm_before", "layernorm_after")
        up, down = ("mlp.fc1", "mlp.fc2") if kind == "dinov2" else ("intermediate.dense", "output.dense")
        y = norm(at + first, x)
        q, k, v = (linear(f"{at}attention.attention.{p}", y) for p in ("query", "key", "value"))
        seen = []
        for q_h, k_h, v_h in zip(*(t.chunk(heads, 2) for t in (q, k, v))):
            seen.append((q_h @ k_h.transpose(1, 2) / q_h.shape[2] ** 0.5).softmax(2) @ v_h)
        y = linear(f"{at}attention.output.dense", torch.cat(seen, 2))
        x = x + y * state.get(f"{at}layer_scale1.lambda1", torch.ones(1))
        y = linear(at + up, norm(at + second, x))
        y = linear(at + down, y * (1 + torch.erf(y / 2**0.5)) / 2)
        x = x + y * state.get(f"{at}layer_scale2.lambda1", torch.ones(1))
        layer += 1
    return norm("layernorm", x)


@pytest.mark.parametrize(("name", "kind"), [("phikon", "vit"), ("phikon-v2", "dinov2")])
@pytest.mark.parametrize("wrapped", [False, True])
def test_transformers_weights_give_the_same_tokens(name: str, kind: str, wrapped: bool, tmp_path: Path) -> None:
    state, file = hf_weights(kind), tmp_path / "model.safetensors"
    save_file({(f"{kind}." if wrapped else "") + key: tensor for key, tensor in state.items()}, file)
    network = Foundation(name, weights=file, img_size=64, **SMALL).eval()
    images = torch.rand(2, 3, 64, 64)
    card = CARDS[name]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
    expected = hf_forward(state, (images - mean) / std, kind)
    with torch.no_grad():
        outputs = network(images)
    torch.testing.assert_close(outputs["pooled"], expected[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs["tokens"].flatten(2).transpose(1, 2), expected[:, 1:], atol=1e-4, rtol=1e-4)


def test_weights_in_timm_s_own_names_stay_as_they_are() -> None:
    state = small("phikon").network.state_dict()
    assert from_transformers(state).keys() == state.keys()
    for kind, name in (("vit", "phikon"), ("dinov2", "phikon-v2")):
        full = small(name, img_size=64).network.state_dict()
        assert set(from_transformers(hf_weights(kind))) == set(full)


def test_the_command_prints_every_model_with_licence_and_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["teachers"]) == 0
    said = capsys.readouterr().out
    for card in CARDS.values():
        assert f"\n{card.name} " in said
        assert card.page in said
        assert card.licence in said
        assert f" {card.pooling} " in said
        assert f"minus {' '.join(f'{v:g}' for v in card.mean)}, over {' '.join(f'{v:g}' for v in card.std)}" in said
