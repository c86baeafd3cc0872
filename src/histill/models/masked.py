"""A vision transformer of timm that in training sees a part of its patches: the encoder of masked autoencoding."""

from __future__ import annotations

import math
from typing import Any

import histill.models._torchvision  # noqa: F401 (before timm)

import torch  # isort: skip
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from histill.errors import BadInput, require
from histill.models.adapter import Timm
from histill.types import Outputs

__all__ = ["MaskedTimm"]


class MaskedTimm(Timm):
    """`Timm` without a head, whose weights it shares; in training it encodes visible patches alone (MAE).

    Args:
        name: A vision transformer of timm, such as ``"vit_base_patch16_224"``.
        ratio: Share of the patches that are hidden, drawn anew for each image.
        weights: As for `Timm`; without them it starts as in MAE: linear layers Glorot uniform, positions fixed
            sines and cosines.
        arguments: Passed to `timm.create_model`.

    Outputs in evaluation: those of `Timm`. In training, with P prefix tokens and N patches of p x p pixels:
    ``visible`` (B, P + kept, D), the encoded tokens; ``kept`` (B, P + kept) and ``hidden`` (B, N - kept), places in
    the sequence; ``patches`` (B, N, 3pp), the normalised images; ``logits`` (B, D), the first token.

    Raises:
        BadInput: Another kind of network, or lightly is not installed.
    """

    def __init__(self, name: str, ratio: float = 0.75, weights: str | None = None, **arguments: Any) -> None:
        super().__init__(name, 0, weights, **arguments)
        vit = self.network
        if type(vit) is not VisionTransformer:  # one of its kin would add tokens or positions in a way of its own
            raise BadInput(f"mae hides patches of a plain vision transformer, such as vit_base_patch16_224, not {name}")
        self.ratio = ratio
        fresh = weights is None
        masked = require("lightly.models.modules", "pretrain").MaskedVisionTransformerTIMM(
            vit,
            weight_initialization="" if fresh else "skip",
            pos_embed_initialization="sincos" if fresh else "skip",
        )
        self._masked = (masked,)  # not a part of this network: it holds the same one under another name

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.network.patch_embed.patch_size[0])

    def forward(self, images: Tensor) -> Outputs:
        if not self.training:
            return super().forward(images)
        images = self.normalize(images)
        places = (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size)
        kept, hidden = self._drawn(len(images), places, images.device)
        visible = self._masked[0].encode(images, idx_keep=kept)
        patches = require("lightly.models.utils", "pretrain").patchify(images, self.patch_size)
        return Outputs(visible=visible, kept=kept, hidden=hidden, patches=patches, logits=visible[:, 0])

    def _drawn(self, images: int, places: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which tokens are kept and which hidden; prefix tokens are kept."""
        prefix, count = self.network.num_prefix_tokens, max(1, math.floor(places * (1 - self.ratio)))
        order = torch.rand(images, places, device=device).argsort(1) + prefix
        always = torch.arange(prefix, device=device).expand(images, -1)
        return torch.cat([always, order[:, :count]], 1), order[:, count:]
