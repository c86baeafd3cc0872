"""Pathology foundation models as networks: what their model cards say, and one module that runs any of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.parts import IMAGENET_MEAN, IMAGENET_STD, Normalize
from histill.models.weights import fill, hub, read_weights
from histill.types import Outputs

__all__ = ["CARDS", "Card", "Foundation", "from_transformers", "table"]

Pooling = Literal["cls", "mean", "cls+mean"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One model, as its card gives it. Licence and access were read there and can change: the page is what counts.

    Attributes:
        hub: owner/model on the Hugging Face hub; its page is `page`.
        timm: the timm architecture that the published weights fit.
        arguments: of `timm.create_model`, JSON-able; layers by their name in `timm.layers`.
        width: of the embedding that its authors use.
        pooling: what that is: the class token, or that token and the mean of the patch tokens, one after the other.
        patch: side of a patch in pixels.
        prefix: how many tokens (class and registers) come before those of the patches.
        parameters: exact, without a head.
        mpp: microns per pixel of the training images, the most usual first.
        mean, std: of images in [0, 1].
        licence: of the weights.
        access: how one gets them.
        use: when to take it.
    """

    name: str
    hub: str
    timm: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    width: int
    pooling: Pooling = "cls"
    patch: int
    prefix: int = 1
    parameters: int
    mpp: tuple[float, ...] = (0.5,)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    licence: str
    access: str
    use: str

    @property
    def page(self) -> str:
        """Where the card is, and where access is asked for."""
        return f"https://huggingface.co/{self.hub}"


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
_BIOPTIMUS_MEAN, _BIOPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
_BY_TERMS = "gated: accept the terms on its page"
_BY_REQUEST = "gated: ask on its page with an institutional address"
_OPEN = "open"
_ND = "CC-BY-NC-ND-4.0"

_ALL = (
    Card(
        name="uni",
        hub="MahmoodLab/UNI",
        timm="vit_large_patch16_224",
        arguments={"init_values": 1e-5, "dynamic_img_size": True},
        width=1024,
        patch=16,
        parameters=303_350_784,
        licence=_ND,
        access=_BY_REQUEST,
        use="the reference of many papers; a third of the cost of the giants",
    ),
    Card(
        name="uni2-h",
        hub="MahmoodLab/UNI2-h",
        timm="vit_giant_patch14_224",
        arguments={
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "no_embed_class": True,
            "reg_tokens": 8,
            "dynamic_img_size": True,
            **_SWIGLU,
        },
        width=1536,
        patch=14,
        prefix=9,
        parameters=681_394_176,
        licence=_ND,
        access=_BY_REQUEST,
        use="H&E and immunohistochemistry, at half the cost of the giants",
    ),
    Card(
        name="virchow",
        hub="paige-ai/Virchow",
        timm="vit_huge_patch14_224",
        arguments={
            "img_size": 224,
            "init_values": 1e-5,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "dynamic_img_size": True,
            **_SWIGLU,
        },
        width=2560,
        pooling="cls+mean",
        patch=14,
        parameters=631_229_184,
        licence="Apache-2.0",
        access=_BY_REQUEST,
        use="a licence that allows products; H&E at 20x only",
    ),
    Card(
        name="virchow2",
        hub="paige-ai/Virchow2",
        timm="vit_huge_patch14_224",
        arguments={
            "img_size": 224,
            "init_values": 1e-5,
            "reg_tokens": 4,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "dynamic_img_size": True,
            **_SWIGLU,
        },
        width=2560,
        pooling="cls+mean",
        patch=14,
        prefix=5,
        parameters=631_239_424,
        mpp=(0.5, 0.25, 1.0, 2.0),
        licence=_ND,
        access=_BY_REQUEST,
        use="several magnifications, H&E and immunohistochemistry",
    ),
    Card(
        name="h-optimus-0",
        hub="bioptimus/H-optimus-0",
        timm="vit_giant_patch14_reg4_dinov2",
        arguments={"img_size": 224, "init_values": 1e-5, "global_pool": "token", "dynamic_img_size": False},
        width=1536,
        patch=14,
        prefix=5,
        parameters=1_134_774_272,
        mean=_BIOPTIMUS_MEAN,
        std=_BIOPTIMUS_STD,
        licence="Apache-2.0",
        access=_BY_TERMS,
        use="a giant whose licence allows products",
    ),
    Card(
        name="h-optimus-1",
        hub="bioptimus/H-optimus-1",
        timm="vit_giant_patch14_reg4_dinov2",
        arguments={"img_size": 224, "init_values": 1e-5, "global_pool": "token", "dynamic_img_size": False},
        width=1536,
        patch=14,
        prefix=5,
        parameters=1_134_774_272,
        mean=_BIOPTIMUS_MEAN,
        std=_BIOPTIMUS_STD,
        licence=_ND,
        access=_BY_REQUEST,
        use="as h-optimus-0, trained on more slides; for research only",
    ),
    Card(
        name="h0-mini",
        hub="bioptimus/H0-mini",
        timm="vit_base_patch14_reg4_dinov2",
        arguments={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, "global_pool": "", **_SWIGLU},
        width=768,
        patch=14,
        prefix=5,
        parameters=85_739_520,
        mean=_BIOPTIMUS_MEAN,
        std=_BIOPTIMUS_STD,
        licence=_ND,
        access=_BY_REQUEST,
        use="itself distilled, from h-optimus-0: robust to stain and scanner, and fast enough without a cache",
    ),
    Card(
        name="gigapath",
        hub="prov-gigapath/prov-gigapath",
        timm="vit_giant_patch14_dinov2",
        arguments={
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
        },
        width=1536,
        patch=16,
        parameters=1_134_953_984,
        licence="Apache-2.0, with conditions on its page",
        access=_BY_TERMS,
        use="where its slide encoder follows; this is its tile encoder",
    ),
    Card(
        name="kaiko-vits16",
        hub="1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms",
        timm="vit_small_patch16_224",
        arguments={"dynamic_img_size": True},
        width=384,
        patch=16,
        parameters=21_665_664,
        mpp=(0.5, 0.25, 1.0, 2.0),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="Kaiko, non-commercial",
        access=_OPEN,
        use="nothing to ask for, several magnifications, runs on a CPU",
    ),
    Card(
        name="lunit-vits8",
        hub="1aurent/vit_small_patch8_224.lunit_dino",
        timm="vit_small_patch8_224",
        width=384,
        patch=8,
        parameters=21_670_272,
        mpp=(0.5, 0.25),
        mean=(0.70322989, 0.53606487, 0.66096631),
        std=(0.21716536, 0.26081574, 0.20723464),
        licence="Lunit, non-commercial",
        access=_OPEN,
        use="nothing to ask for; tokens of 8 pixels, the finest maps here",
    ),
    Card(
        name="phikon",
        hub="owkin/phikon",
        timm="vit_base_patch16_224",
        width=768,
        patch=16,
        parameters=85_798_656,
        licence="Owkin, non-commercial",
        access=_OPEN,
        use="nothing to ask for; trained on TCGA, so not a fair judge of TCGA",
    ),
    Card(
        name="phikon-v2",
        hub="owkin/phikon-v2",
        timm="vit_large_patch16_224",
        arguments={"init_values": 1e-5},
        width=1024,
        patch=16,
        parameters=303_350_784,
        licence="Owkin, non-commercial",
        access=_OPEN,
        use="the largest with nothing to ask for; trained on TCGA, CPTAC and GTEx",
    ),
)
CARDS: Mapping[str, Card] = MappingProxyType({card.name: card for card in _ALL})
"""The models by name."""


class Foundation(nn.Module):
    """A pathology foundation model.

    Args:
        name: One of `CARDS`.
        weights: ``"hub"`` (from the Hugging Face hub, or its local cache), anything that `load_weights` takes (a file
            of the published weights, as timm or as transformers names them), or None for random ones.
        pooling: What ``pooled`` is: ``cls``, ``mean`` of the patch tokens, or ``cls+mean``; None as its authors do.
        arguments: In place of those of the card, for instance ``img_size=448``.

    Attributes:
        card: What is known of the model.
        input_size: Side in pixels of the images that it expects; with ``dynamic_img_size`` it takes every multiple
            of its patch.
        width: Of ``pooled``.

    Outputs, D the width of a token: ``pooled`` (B, width), ``cls`` (B, D), ``tokens`` (B, D, H / patch, W / patch),
    after the last norm; ``logits``, which are ``pooled``, as there is no classifier.

    Raises:
        BadInput: Unknown name or pooling, or weights that do not fit.
        Failed: Weights that cannot be fetched.
    """

    def __init__(
        self, name: str, weights: str | Path | None = "hub", pooling: Pooling | None = None, **arguments: Any
    ) -> None:
        from histill.models.adapter import create  # timm takes seconds to import, and the table needs none of it

        super().__init__()
        self.card = find(name)
        self.pooling = pooling or self.card.pooling
        if self.pooling not in ("cls", "mean", "cls+mean"):
            raise BadInput(f"pooling {self.pooling!r}: cls, mean or cls+mean")
        self.normalize = Normalize(self.card.mean, self.card.std)
        chosen = {**self.card.arguments, **arguments}
        given = None if weights in (None, "none") else _weights(self.card, str(weights))
        # Weights are taken as they come: a giant is then in memory once, not twice.
        with nullcontext() if given is None else torch.device("meta"):
            self.network: Any = create(self.card.timm, 0, pretrained=False, **chosen)
        if given is not None:
            fill(self.network, given, source=f"{self.card.name}: {weights}", assign=True)
        size = chosen.get("img_size", 224)
        self.input_size = int(size if isinstance(size, int) else size[-1])
        self.width = int(self.network.embed_dim) * (2 if self.pooling == "cls+mean" else 1)
        self._any_size = bool(chosen.get("dynamic_img_size"))
        self._patch = int(self.network.patch_embed.patch_size[0])

    def forward(self, images: Tensor) -> Outputs:
        height, width = images.shape[-2:]
        self._check(height, width)
        x = self.network.forward_features(self.normalize(images))  # (B, prefix + h w, D)
        cls, patches = x[:, 0], x[:, self.network.num_prefix_tokens :]
        pooled = cls if self.pooling == "cls" else patches.mean(1)
        if self.pooling == "cls+mean":
            pooled = torch.cat([cls, pooled], 1)
        tokens = patches.transpose(1, 2).unflatten(2, (height // self._patch, width // self._patch))
        return Outputs(pooled=pooled, cls=cls, tokens=tokens, logits=pooled)

    def _check(self, height: int, width: int) -> None:
        if self._any_size and height % self._patch == 0 and width % self._patch == 0:
            return
        if (height, width) != (self.input_size, self.input_size):
            sizes = f"a multiple of {self._patch}" if self._any_size else f"{self.input_size} x {self.input_size}"
            raise BadInput(f"{self.card.name} sees images of {sizes} pixels, not {width} x {height}")


def find(name: str) -> Card:
    """The card of a model.

    Raises:
        BadInput: no such model; the line lists the names.
    """
    if name not in CARDS:
        close = difflib.get_close_matches(name.lower(), CARDS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise BadInput(f"no foundation model {name!r}: {hint}there are {', '.join(CARDS)}")
    return CARDS[name]


def _weights(card: Card, weights: str) -> dict[str, Tensor]:
    if weights == "hub":
        from timm.models import load_state_dict_from_hf

        with hub(f"{card.name} ({card.page})", remedy=f"give weights=FILE, which is --teacher {card.name}=FILE"):
            state: dict[str, Tensor] = load_state_dict_from_hf(card.hub, weights_only=True)
    else:
        state = read_weights(weights)
    return {name: tensor.float() for name, tensor in from_transformers(state).items()}


_LAYER = "encoder.layer."
_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layernorm.", "norm."),
)
_LAYER_NAMES = (
    ("layernorm_before.", "norm1."),  # ViTModel
    ("layernorm_after.", "norm2."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("norm1.", "norm1."),  # Dinov2Model
    ("norm2.", "norm2."),
    ("mlp.fc1.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.fc2."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' ViTModel or Dinov2Model under the names of timm's vision transformer.

    Query, key and value become one matrix; the pooler and the mask token, which no embedding needs, are left out.
    Weights with other names come back as they are.
    """
    state = {name.removeprefix("vit.").removeprefix("dinov2."): tensor for name, tensor in state.items()}
    if "embeddings.cls_token" not in state:
        return state
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_LAYER):
            number, _, rest = name.removeprefix(_LAYER).partition(".")
            if (new := _renamed(rest, _LAYER_NAMES)) is not None:
                renamed[f"blocks.{number}.{new}"] = tensor
            elif rest.startswith("attention.attention.query."):
                kind = rest.rpartition(".")[2]
                parts = [state[f"{_LAYER}{number}.attention.attention.{p}.{kind}"] for p in ("query", "key", "value")]
                renamed[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
        elif (new := _renamed(name, _NAMES)) is not None:
            renamed[new] = tensor
    return renamed


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str | None:
    return next((new + name.removeprefix(old) for old, new in names if name.startswith(old)), None)


def table() -> str:
    """The models as text: what they are on one line, licence and access and when to use them below."""
    width = max(map(len, CARDS)) + 2
    lines = [f"{'name':<{width}}{'width':>5}  {'pooling':<9}{'patch':>5}  {'parameters':>10}  {'um/px':<16}licence"]
    for card in CARDS.values():
        size = f"{card.parameters / 1e6:,.0f} M"
        mpp = ", ".join(f"{value:g}" for value in sorted(card.mpp))
        known = f"{card.width:>5}  {card.pooling:<9}{card.patch:>5}  {size:>10}  {mpp:<16}{card.licence}"
        lines.append(f"{card.name:<{width}}{known}")
        mean, std = (" ".join(f"{v:g}" for v in values) for values in (card.mean, card.std))
        lines.append(f"{'':<{width}}pixels in [0, 1] minus {mean}, over {std}")
        lines.append(f"{'':<{width}}{card.use}")
        lines.append(f"{'':<{width}}{card.access}; {card.page}")
    lines.append(
        "A student that learnt from a teacher can fall under its licence (UNI's says so): read the page first."
    )
    return "\n".join(lines)
