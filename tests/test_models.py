"""One contract for every network, and what each paper says of its own."""

from __future__ import annotations

import copy
import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import parameters
from torch import Tensor, nn

import histill.models as models
from histill.errors import BadInput
from histill.evaluate.cost import macs
from histill.models import (
    CSAT,
    SAT,
    SCAN,
    DSNet,
    KerasHead,
    MACResNet,
    MSDNet,
    MultiExitResNet18,
    Regressors,
    ResNet18SAT,
    StarDist,
    Timm,
    UNet,
    UNetDecoder,
    attention_crop,
)
from histill.models.csat import GlobalResponseNorm, Transformer
from histill.types import Outputs

CLASSES = 3


@dataclass(frozen=True)
class Case:
    """A network by name and JSON-able arguments, and what it promises."""

    name: str
    arguments: dict[str, Any]
    size: int
    features: dict[str, tuple[int, ...]]
    idle: tuple[str, ...] = ()  # patterns of parameters whose gradient is zero but for rounding, by design

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        arguments = json.loads(json.dumps(self.arguments))
        classes = {} if self.name == "StarDist" else {"classes": CLASSES}
        module: nn.Module = getattr(models, self.name)(**classes, **arguments)
        return module


# timm learnt in 1.0.31 to give an Inception's stages.
_STAGED = hasattr(importlib.import_module("timm.models.inception_v3").InceptionV3, "forward_intermediates")
_INCEPTION = {"stage1": (64, 45, 45)} if _STAGED else {}
CASES = {
    "dsnet": Case(
        "DSNet", {"image_size": 32}, 32, {"conv1": (128, 30, 30), "conv2": (64, 13, 13), "conv3": (32, 4, 4)}
    ),
    "keras-resnet50": Case(
        "KerasHead",
        {"name": "resnet50"},
        64,
        {"stage5": (2048, 2, 2), "pooled": (2048,)},
        ("network.*conv?.bias", "network.*downsample.0.bias"),
    ),
    "keras-inception": Case("KerasHead", {"name": "inception_v3"}, 96, {**_INCEPTION, "pooled": (2048,)}),
    "timm-resnet": Case(
        "Timm",
        {"name": "resnet18", "zero_init_last": False},
        64,
        {"stage1": (64, 32, 32), "stage5": (512, 2, 2), "pooled": (512,)},
    ),
    "timm-convnext": Case("Timm", {"name": "test_convnext"}, 64, {"stage4": (64, 2, 2), "pooled": (64,)}),
    "timm-vit": Case("Timm", {"name": "test_vit", "img_size": 64}, 64, {"stage6": (64, 4, 4), "pooled": (64,)}),
    "timm-swin": Case(
        "Timm",
        {"name": "swin_tiny_patch4_window7_224", "img_size": 64, "window_size": 2, "depths": [1, 1, 1, 1]},
        64,
        {"stage1": (96, 16, 16), "stage4": (768, 2, 2), "pooled": (768,)},
    ),
    "timm-distilled": Case("Timm", {"name": "deit_tiny_distilled_patch16_224", "img_size": 32, "depth": 2}, 32, {}),
    "mac-resnet": Case(
        "MACResNet",
        {"dares": ["layer2", "layer4"]},
        64,
        {"layer4": (2048, 2, 2), "attention": (32, 2, 2), "pooled": (2048,)},
    ),
    "multi-exit": Case(
        "MultiExitResNet18",
        {},
        64,
        {"exit1": (3,), "exit1_features": (512, 2, 2), "exit4_features": (512, 2, 2), "layer3": (256, 4, 4)},
        ("exits.?.context.mask.bias",),  # softmax does not see what is added to all places
    ),
    "multi-exit-cifar": Case(
        "MultiExitResNet18",
        {"stem": "cifar", "fusion": "mul", "attention": False},
        32,
        {"exit1_features": (512, 4, 4), "exit2_features": (512, 4, 4)},
        ("exits.?.context.mask.bias",),
    ),
    "csat": Case(
        "CSAT",
        {},
        64,
        {"stage1": (32, 16, 16), "stage2": (48, 8, 8), "stage3": (96, 4, 4), "stage4": (176, 2, 2), "pooled": (176,)},
    ),
    "csat-plain": Case("CSAT", {"sat": False}, 32, {"stage4": (176, 1, 1)}),
    "resnet18-sat": Case("ResNet18SAT", {"gate": "sigmoid"}, 64, {"layer4": (512, 2, 2), "pooled": (512,)}),
    "stardist": Case(
        "StarDist", {"rays": 8}, 32, {"prob": (1, 16, 16), "dist": (8, 16, 16), "features": (128, 16, 16)}
    ),
    "stridenet": Case(
        "StrideNet",
        {},
        64,
        {"stage1": (16, 16, 16), "stage2": (32, 8, 8), "stage3": (64, 4, 4), "stage4": (96, 2, 2), "pooled": (96,)},
    ),
    "unet-csat": Case("UNet", {"backbone": "CSAT"}, 64, {"logits": (3, 64, 64), "stage1": (32, 16, 16)}),
    "unet-timm": Case("UNet", {"backbone": "resnet18", "zero_init_last": False}, 64, {"logits": (3, 64, 64)}),
    "unet-vit": Case(
        "UNet", {"backbone": "test_vit", "img_size": 64}, 64, {"logits": (3, 64, 64), "stage3": (64, 4, 4)}
    ),
}
EXPORTED = (
    "dsnet",
    "stridenet",
    *(pytest.param(case, marks=pytest.mark.slow) for case in ("timm-convnext", "csat", "multi-exit", "unet-vit")),
)


@functools.cache
def built(case: str) -> nn.Module:
    return CASES[case].build()


def on_meta(make: Callable[..., nn.Module], *arguments: Any, **named: Any) -> int:
    """The parameters of a network that is described and not filled."""
    with torch.device("meta"):
        return parameters(make(*arguments, **named))


def images(case: str, count: int = 2) -> Tensor:
    size = CASES[case].size
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_evaluation_is_named_repeatable_and_independent_of_the_batch(case: str) -> None:
    network, batch = built(case).eval(), images(case)
    outputs = network(batch)
    assert isinstance(outputs, Outputs)
    assert outputs["logits"].shape[:2] == (2, CLASSES if CASES[case].name != "StarDist" else 1)
    for name, shape in CASES[case].features.items():
        assert outputs[name].shape == (2, *shape), name
    again, alone = network(batch), network(batch[1:])
    for name, tensor in outputs.items():
        assert tensor.isfinite().all(), name
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)
        torch.testing.assert_close(alone[name], tensor[1:], rtol=1e-3, atol=1e-4 * float(tensor.abs().max()))


def test_gradient_reaches_every_trainable_parameter(case: str) -> None:
    network = built(case).train()
    network.zero_grad()
    outputs = network(images(case, 3))
    torch.stack(
        [(tensor * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)).sum() for tensor in outputs.values()]
    ).sum().backward()
    still = {n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert {name for name in still if not any(fnmatchcase(name, idle) for idle in CASES[case].idle)} == set()


@torch.no_grad()
def test_state_survives_safetensors_and_channels_last(case: str, tmp_path: Path) -> None:
    network, batch = built(case).eval(), images(case)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "model.safetensors"
    )
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.fill_(0.5)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    expected = network(batch)["logits"]
    torch.testing.assert_close(other(batch)["logits"], expected, rtol=0, atol=0)
    last = other.to(memory_format=torch.channels_last)(batch.to(memory_format=torch.channels_last))["logits"]
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("case", EXPORTED)
def test_export_to_onnx_agrees(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = built(case).eval()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(images)["logits"]
            return logits

    network, batch = Logits().eval(), images(case, 3)
    batch_size = torch.export.Dim("batch")
    program = torch.onnx.export(
        network, (batch[:2],), dynamo=True, dynamic_shapes={"images": {0: batch_size}}, verbose=False
    )
    assert program is not None
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network(batch), rtol=1e-3, atol=1e-4)


def test_every_exported_name_exists() -> None:
    assert all(callable(getattr(models, name)) for name in models.__all__)
    with pytest.raises(AttributeError, match="ResNet19"):
        models.ResNet19


# The melanoma paper's networks


def test_dsnet_has_the_papers_parameters() -> None:
    assert parameters(DSNet()) == 268_898
    assert parameters(DSNet(classes=7)) == 268_898 + 5 * 86_529


def test_dsnet_is_initialised_as_keras_does() -> None:
    network = DSNet()
    limit = (6 / (3 * 9 + 128 * 9)) ** 0.5
    assert network.conv1.weight.abs().max() <= limit
    assert network.conv1.weight.abs().max() > 0.99 * limit
    assert not any(p.any() for n, p in network.named_parameters() if n.endswith("bias"))


def test_dsnet_says_which_images_it_takes() -> None:
    with pytest.raises(BadInput, match="32x32 pixels, not 48x32"):
        DSNet(image_size=32)(torch.zeros(1, 3, 32, 48))
    with pytest.raises(BadInput, match="at least 18"):
        DSNet(image_size=17)
    assert DSNet(image_size=18)(torch.zeros(1, 3, 18, 18))["conv3"].shape == (1, 32, 1, 1)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet50", 23_542_786),
        ("resnet101", 42_561_026),
        ("vgg16", 14_716_738),
        ("inception_v3", 21_776_546),
        ("efficientnet_b0", 4_012_670),
        ("mobilenet_v1", 3_211_074),
    ],
)
def test_keras_networks_have_the_papers_parameters(name: str, count: int) -> None:
    assert on_meta(KerasHead, name, 2) == count


def test_a_wrong_name_is_answered_with_the_right_ones() -> None:
    with pytest.raises(BadInput, match=r"resnet50, resnet101, vgg16"):
        KerasHead("resnet", 2)
    with pytest.raises(BadInput, match=r"did you mean convnext_tiny"):
        Timm("convnext_tinny", 2)
    with pytest.raises(BadInput, match="'nope' of resnet18: it has a1_in1k"):
        Timm("resnet18.nope", 2)
    with pytest.raises(BadInput, match=r"does not take these arguments.*'depht'"):
        Timm("test_vit", 2, depht=3)


# The other papers' networks


@pytest.mark.parametrize(
    ("dares", "count"),
    [
        ((), 23_835_776),
        (("layer2",), 24_101_218),
        (("layer3",), 25_155_170),
        (("layer4",), 27_516_514),
        (("layer2", "layer3"), 24_101_218 + 1_319_394),
        (("layer2", "layer4"), 27_781_956),
        (("layer3", "layer4"), 27_516_514 + 1_319_394),
        (("layer2", "layer3", "layer4"), 27_781_956 + 1_319_394),
    ],
)
def test_mac_resnet_counts_every_combination_of_dares(dares: tuple[str, ...], count: int) -> None:
    assert on_meta(MACResNet, 4, dares=dares, sample_input=False, spp=False) == count


def test_mac_resnet_counts_the_other_parts() -> None:
    plain = {"attention": False, "dares": (), "sample_input": False, "spp": False}
    assert on_meta(MACResNet, 4, **plain) == 23_516_228
    assert on_meta(MACResNet, 4, spp=False) == 27_801_188
    assert on_meta(MACResNet, 4) == 28_347_496
    with pytest.raises(BadInput, match="layer2, layer3 and layer4, not layer1"):
        MACResNet(4, dares=["layer1"])


def test_the_crop_is_the_box_of_what_is_attended() -> None:
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    attention = torch.zeros(2, 1, 64, 64)
    attention[0, 0, 16:32, 8:40] = 5.0
    attention[1] = 0.3  # no contrast
    cropped = attention_crop(picture, attention)
    expected = nn.functional.interpolate(picture[:1, :, 16:32, 8:40], (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(cropped[:1], expected)
    torch.testing.assert_close(cropped[1], picture[1])
    # The threshold is a share of the map's own range.
    shifted = attention_crop(picture[:1], 7 + 3 * attention[:1], 0.9)
    torch.testing.assert_close(shifted, expected)


def test_the_crop_draws_each_map_alike() -> None:
    column = torch.arange(64.0).expand(1, 3, 64, 64)
    maps = torch.zeros(1, 2, 64, 64)
    maps[0, 0, :, :8], maps[0, 1, :, -8:] = 1, 1
    generator = torch.Generator().manual_seed(0)
    crops = attention_crop(column.expand(400, 3, 64, 64), maps.expand(400, 2, 64, 64), generator=generator)
    assert 160 < int((crops.mean((1, 2, 3)) < 32).sum()) < 240


@pytest.mark.parametrize(
    ("stem", "classes", "count"), [("cifar", 100, 12_328_968), ("cifar", 5, 12_134_028), ("imagenet", 5, 12_141_708)]
)
def test_multi_exit_has_the_papers_parameters(stem: str, classes: int, count: int) -> None:
    assert on_meta(MultiExitResNet18, classes, stem) == count


def test_what_multi_exit_is_compared_with_has_the_parameters_that_the_page_says() -> None:
    # An attention of c channels: two depthwise 3x3, two 1x1, three norms: 18 c + 2 c^2 + 6 c; c is 64, 128, 256.
    attention = sum(24 * c + 2 * c * c for c in (64, 128, 256))
    assert attention == 182_784
    assert on_meta(MultiExitResNet18, 5, "imagenet", attention=False) == 12_141_708 - attention
    assert on_meta(SCAN, 5, "cifar") == 12_996_692
    assert on_meta(MSDNet, 5, "cifar") == 1_489_188


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("convnext_small", 49_458_533),
        ("convnext_base", 87_571_589),
        ("swin_small_patch4_window7_224", 48_841_103),
        ("swin_base_patch4_window7_224", 86_748_349),
    ],
)
def test_the_larger_sizes_of_kd_convnext_have_their_parameters(name: str, count: int) -> None:
    assert on_meta(Timm, name, 5) == count


@torch.no_grad()
def test_multi_exit_answers_with_the_mean_of_its_probabilities() -> None:
    outputs = built("multi-exit").eval()(images("multi-exit"))
    mean = torch.stack([outputs[f"exit{k}"].softmax(-1) for k in (1, 2, 3, 4)]).mean(0)
    torch.testing.assert_close(outputs["logits"].exp(), mean)


def test_csat_and_resnet18_have_the_papers_parameters() -> None:
    assert on_meta(CSAT, 1000) == on_meta(CSAT, 1000, sat_variant="A") == 3_065_078
    assert on_meta(CSAT, 1000, sat=False) == 3_063_272
    assert on_meta(SAT) == on_meta(SAT, "A") == 129
    assert on_meta(ResNet18SAT, 1000) == 11_690_544
    assert on_meta(ResNet18SAT, 1000, sat=False) == 11_689_512


def test_csat_has_the_papers_macs() -> None:
    network = CSAT(1000)
    assert int(macs(network, 384) / 1e7) / 100 == 1.08
    kinds = macs(network, 384, breakdown=True)
    assert round((kinds["conv"] + kinds["linear"]) / 1e9, 4) == 1.0663
    # Softmax over the tokens of stages 3 and 4, two blocks of eight heads each, and 14 maps of 49.
    assert kinds["softmax"] == sum(n * t * (3 * t - 1) for n, t in ((16, 24**2), (16, 12**2), (14, 49)))


@torch.no_grad()
def test_sat_of_variant_a_attends_by_a_constant() -> None:
    spread = {}
    for variant in ("A", "B"):
        torch.manual_seed(0)
        sat = SAT(variant)
        for parameter in sat.parameters():
            nn.init.normal_(parameter)
        before = torch.rand(4, 1, 7, 7)
        added = sat.transformer(before) - before - sat.transformer.peg(before)
        spread[variant] = float(added.std((2, 3)).max())
    assert spread["A"] < 1e-6 < 1e-2 < spread["B"]


@torch.no_grad()
@pytest.mark.parametrize("gate", [None, "sigmoid"])
def test_sat_sees_the_mean_of_the_channels_and_then_their_largest(gate: Any) -> None:
    x = torch.randn(2, 3, 7, 7)  # of the size of the map, so that nothing is pooled or enlarged
    for number, seen in enumerate((x.mean(1, keepdim=True), x.amax(1, keepdim=True))):
        sat = SAT(gate=gate)
        sat.transformer = nn.Identity()
        nn.init.zeros_(sat.conv.weight)
        sat.conv.weight[0, number, 3, 3] = 1
        torch.testing.assert_close(sat(x), x * (seen if gate is None else seen.sigmoid()))


@torch.no_grad()
def test_csats_transformer_is_attention_written_out() -> None:
    torch.manual_seed(0)
    block, x = Transformer(6, heads=2, head_width=4), torch.randn(2, 6, 3, 5)
    seen = x + block.peg(x)
    tokens = torch.stack([seen[:, :, y, column] for y in range(3) for column in range(5)], 1)  # (2, 15, 6)
    normed, heads = block.norm1(tokens), []
    for head in range(2):
        q, k, v = (normed @ block.qkv.weight[8 * part + 4 * head :][:4].T for part in range(3))
        scores = torch.einsum("bid,bjd->bij", q, k) / 2  # the square root of 4
        heads.append(torch.einsum("bij,bjd->bid", scores.exp() / scores.exp().sum(2, keepdim=True), v))
    tokens = tokens + block.project(torch.cat(heads, 2))
    tokens = tokens + block.mlp(block.norm2(tokens))
    found = block(x)
    for place in range(15):
        torch.testing.assert_close(found[:, :, place // 5, place % 5], tokens[:, place], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_global_response_is_an_images_channel_over_the_mean_of_its_channels() -> None:
    norm, x = GlobalResponseNorm(2), torch.tensor([[[[3.0, 1.0]], [[4.0, 1.0]]], [[[0.0, 2.0]], [[0.0, 6.0]]]])
    torch.testing.assert_close(norm(x), x)  # as it begins
    norm.gamma[:], norm.beta[:] = torch.tensor([2.0, 3.0]), torch.tensor([0.5, 0.0])
    lengths = torch.tensor([[5.0, 2**0.5], [0.0, 40**0.5]])  # of an image's channel over all places
    for image, (one, other) in enumerate(lengths):
        n = torch.tensor([one, other]) / ((one + other) / 2)
        expected = torch.tensor([2.0, 3.0]) * x[image] * n + torch.tensor([0.5, 0.0]) + x[image]
        torch.testing.assert_close(norm(x)[image], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sat_multiplies_by_one_map_for_all_channels() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 5, 14, 14) + 0.5
    ratio = SAT(gate="sigmoid")(x) / x
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert ((ratio > 0) & (ratio < 1)).all()
    for bad in ({"variant": "C"}, {"gate": "tanh"}):
        with pytest.raises(BadInput, match=r"SAT (are|is)"):
            SAT(**bad)


def test_stardist_decoder_and_regressors_have_the_known_parameters() -> None:
    assert on_meta(StarDist) == 1_425_761
    assert on_meta(UNetDecoder, 2) == 459_426
    assert on_meta(Regressors, (96, 192, 384, 768), (96, 192, 384, 768)) == 784_800
    with pytest.raises(BadInput, match="multiples of 16, not 40x32"):
        StarDist()(torch.zeros(1, 3, 32, 40))


@torch.no_grad()
def test_stardist_does_not_see_brightness_and_contrast() -> None:
    network, batch = built("stardist").eval(), images("stardist")
    torch.testing.assert_close(network(0.2 + 0.5 * batch)["logits"], network(batch)["logits"], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_regressors_bring_each_feature_to_the_teachers_width() -> None:
    features = [torch.rand(2, 4, 8, 8), torch.rand(2, 6, 4, 4)]
    assert [f.shape for f in Regressors((4, 6), (5, 7))(features)] == [(2, 5, 8, 8), (2, 7, 4, 4)]
    with pytest.raises(BadInput, match="student has 1 features and the teacher 2"):
        Regressors((4,), (5, 7))


def test_unet_wants_a_pyramid_and_takes_any_size() -> None:
    with pytest.raises(BadInput, match=r"levit_128s has neither a pyramid .* nor features of one scale"):
        UNet(2, "levit_128s")
    with torch.no_grad():
        assert built("unet-csat").eval()(torch.rand(1, 3, 50, 70))["logits"].shape == (1, 3, 50, 70)


@pytest.mark.parametrize(
    ("name", "depth", "patch", "prefix", "blocks", "unfolded"),
    [
        ("vit_tiny_patch16_224", 12, 16, 1, (3, 6, 9, 12), [4, 2, 1, 1]),
        ("vit_small_patch14_reg4_dinov2", 6, 14, 5, (2, 3, 5, 6), [4, 2, 1, 1]),
        ("vit_small_patch32_224", 4, 32, 1, (1, 2, 3, 4), [8, 4, 2, 1]),
        ("vit_small_patch8_224", 2, 8, 1, (1, 1, 2, 2), [2, 1, 1, 1]),
    ],
)
@torch.no_grad()
def test_a_decoder_reads_a_transformers_patches_at_four_depths(
    name: str, depth: int, patch: int, prefix: int, blocks: tuple[int, ...], unfolded: list[int]
) -> None:
    torch.manual_seed(0)
    network = UNet(3, name, img_size=3 * patch, depth=depth).eval()
    batch = torch.rand(1, 3, 3 * patch, 3 * patch)
    outputs = network(batch)
    assert outputs["logits"].shape == (1, 3, 3 * patch, 3 * patch)
    assert network.skips == tuple(f"stage{block}" for block in blocks)
    vit = network.backbone.network
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(network.backbone.normalize(batch))))
    for number, block in enumerate(vit.blocks, 1):
        tokens = block(tokens)
        if number in blocks:
            for place in range(9):
                expected = tokens[0, prefix + place]
                torch.testing.assert_close(outputs[f"stage{number}"][0, :, place // 3, place % 3], expected)
    levels = network.reassembled
    assert levels is not None
    assert [level.stride[0] for level in levels.levels] == unfolded
    pyramid = levels([outputs[skip] for skip in network.skips], batch.shape[-2:])
    width = vit.embed_dim
    for level, scale, wide in zip(pyramid, (4, 8, 16, 32), (width // 8, width // 4, width // 2, width)):
        assert level.shape == (1, wide, -(-3 * patch // scale), -(-3 * patch // scale))


@torch.no_grad()
def test_a_token_is_unfolded_into_the_pixels_of_its_patch() -> None:
    levels = UNet(2, "test_vit", img_size=48).reassembled
    assert levels is not None
    levels.levels[0].weight.copy_(torch.eye(64).view(64, 4, 4, 4)[:, :1].expand(64, 8, 4, 4))
    maps = torch.rand(2, 64, 3, 3)
    finest = levels([maps] * 4, torch.Size((48, 48)))[0]
    torch.testing.assert_close(finest[:, :1], nn.functional.pixel_shuffle(maps[:, :16], 4))


def test_a_transformer_with_a_decoder_says_which_images_it_takes() -> None:
    with torch.no_grad():
        assert UNet(2, "test_vit", dynamic_img_size=True)(torch.rand(2, 3, 32, 48))["logits"].shape == (2, 2, 32, 48)
    with pytest.raises(BadInput, match="vit_tiny_patch16_224 takes images of 32x32 pixels, not 48x32: build it with"):
        UNet(2, "vit_tiny_patch16_224", img_size=32, depth=1)(torch.rand(1, 3, 32, 48))
    with pytest.raises(BadInput, match="a multiple of 16 pixels, not 40x40"):
        UNet(2, "vit_tiny_patch16_224", img_size=40, depth=1)


# The adapter


def test_timm_normalises_as_the_network_was_pretrained() -> None:
    network = Timm("mobilenetv1_100", 2).eval()  # mean and standard deviation 0.5
    assert network.input_size == 224
    seen = network.normalize(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4))
    torch.testing.assert_close(seen[0, :, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))
    assert not any(name.startswith("normalize") for name in network.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext", "volo_d1_224", "levit_128s"])
def test_timm_gives_timms_own_logits(name: str) -> None:
    network = Timm(name, 4).eval()
    batch = torch.rand(1, 3, network.input_size, network.input_size)
    torch.testing.assert_close(network(batch)["logits"], network.network(network.normalize(batch)))


@torch.no_grad()
def test_timm_without_classes_gives_features() -> None:
    outputs = Timm("test_resnet", 0).eval()(torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(outputs["logits"], outputs["pooled"])


def test_a_layer_may_be_named() -> None:
    network = Timm("test_vit", 2, mlp_layer="SwiGLUPacked", act_layer="silu", img_size=32)
    assert type(network.network.blocks[0].mlp).__name__ == "GluMlp"
    assert network.input_size == 32
