"""MAC-ResNet, the eyelid tumour teacher (Huang et al., J. Pers. Med. 2023, 13:89).

The paper leaves the blocks' inside open; what is chosen here is said where it is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.parts import Normalize
from histill.models.resnet import Bottleneck, initialise, stage
from histill.models.weights import load_weights
from histill.types import Outputs

__all__ = ["MACResNet", "attention_crop"]

_STAGES = {"layer1": (64, 3, 1), "layer2": (128, 4, 2), "layer3": (256, 6, 2), "layer4": (512, 3, 2)}
_MAPS = 32


class SqueezeExcite(nn.Module):
    """Channel attention with a reduction of 16 (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 16, 1)
        self.expand = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class OuterResidual(nn.Module):
    """What makes a stage a DARes-block: the deep layer fused with the middle and the shallow one.

    ``u = last + middle``, ``out = ReLU(sigmoid(conv7x7([mean_c u, max_c u])) * u + BN(conv1x1(first)))``. The
    block's inner residuals carry channel attention. Our reading of the paper's double-layer nested residual.
    """

    def __init__(self, ci: int, co: int, stride: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))

    def forward(self, first: Tensor, middle: Tensor, last: Tensor) -> Tensor:
        u = last + middle
        gate = self.spatial(torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True)], 1)).sigmoid()
        return F.relu(gate * u + self.shortcut(first))


class SpatialPyramid(nn.Module):
    """Max pools of 1, 2 and 4 bins a side, concatenated and classified (He et al. 2015, SPPNet)."""

    def __init__(self, ci: int, classes: int, width: int = 256) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(ci, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width * (1 + 4 + 16), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        logits: Tensor = self.fc(torch.cat([F.adaptive_max_pool2d(x, side).flatten(1) for side in (1, 2, 4)], 1))
        return logits


class MACResNet(nn.Module):
    """ResNet-50 with the parts of MAC-ResNet, each to be had or left out; without any it is plain ResNet-50.

    Args:
        classes: Number of classes.
        attention: BACM: 32 attention maps and bilinear attention pooling (WS-DAN) in place of average pooling.
        dares: The stages that are DARes-blocks, of ``layer2``, ``layer3``, ``layer4``.
        sample_input: Three 3x3 convolutions in place of the first 7x7.
        spp: A spatial pyramid whose logits are added.
        weights: None, ``"imagenet"`` (a ResNet-50's weights in all parts that it has), or anything that
            `load_weights` takes.

    Outputs, for images of 512: ``layer1`` (B, 256, 128, 128), ``layer2`` (B, 512, 64, 64), ``layer3``
    (B, 1024, 32, 32), ``layer4`` (B, 2048, 16, 16); ``pooled`` (B, 2048); ``attention`` (B, 32, 16, 16) where it
    has one; ``logits`` (B, classes).

    Raises:
        BadInput: A stage that cannot be a DARes-block, or weights that do not fit.
    """

    def __init__(
        self,
        classes: int,
        attention: bool = True,
        dares: Sequence[str] = ("layer2", "layer4"),
        sample_input: bool = True,
        spp: bool = True,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if unknown := set(dares) - {"layer2", "layer3", "layer4"}:
            raise BadInput(f"dares may name layer2, layer3 and layer4, not {', '.join(sorted(unknown))}")
        self.normalize = Normalize()
        self.conv1 = _sample_input() if sample_input else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.outer = nn.ModuleDict()
        ci = 64
        for name, (width, depth, stride) in _STAGES.items():
            co = 4 * width
            if name in dares:
                blocks = stage(Bottleneck, ci, width, depth, stride, lambda co=co: SqueezeExcite(co))  # type: ignore[misc]
                self.outer[name] = OuterResidual(ci, co, stride)
            else:
                blocks = stage(Bottleneck, ci, width, depth, stride)
            self.add_module(name, blocks)
            ci = co
        self.attention = (
            nn.Sequential(nn.Conv2d(ci, _MAPS, 1, bias=False), nn.BatchNorm2d(_MAPS), nn.ReLU()) if attention else None
        )
        self.fc = nn.Linear(_MAPS * ci, classes, bias=False) if attention else nn.Linear(ci, classes)
        self.spp = SpatialPyramid(ci, classes) if spp else None
        self.apply(initialise)
        fresh = ["fc.*", "spp.fc.*"]
        if weights == "imagenet":
            fresh += ["attention.*", "spp.*", "outer.*", "layer?.?.attention.*"] + ["conv1.*"] * sample_input
        load_weights(self, weights, fresh=fresh, pretrained="resnet50.tv_in1k")

    def forward(self, images: Tensor) -> Outputs:
        outputs = Outputs()
        x = F.relu(self.bn1(self.conv1(self.normalize(images))))  # (B, 64, 256, 256)
        x = F.max_pool2d(x, 3, 2, 1)  # (B, 64, 128, 128)
        for name in _STAGES:
            x = outputs[name] = self._stage(name, x)
        outputs["pooled"] = x.mean((2, 3))
        if self.attention is None:
            logits = self.fc(outputs["pooled"])
        else:
            outputs["attention"] = self.attention(x)  # (B, 32, 16, 16)
            logits = self.fc(100 * bilinear_attention_pooling(x, outputs["attention"]))
        outputs["logits"] = logits if self.spp is None else logits + self.spp(x)
        return outputs

    def _stage(self, name: str, x: Tensor) -> Tensor:
        states = [x]
        for block in self.get_submodule(name).children():
            states.append(block(states[-1]))
        if name not in self.outer:
            return states[-1]
        middle = 1 + (len(states) - 2) // 2
        out: Tensor = self.outer[name](states[0], states[middle], states[-1])
        return out


def bilinear_attention_pooling(features: Tensor, attention: Tensor) -> Tensor:
    """``f[m, c] = mean_hw(A_m F_c)``, signed square root, unit length (Hu et al. 2019, WS-DAN).

    ``(B, C, H, W)`` and ``(B, M, H, W)`` -> ``(B, M * C)``.
    """
    pooled = torch.einsum("bmhw,bchw->bmc", attention, features) / features[0, 0].numel()
    pooled = pooled.sign() * (pooled.abs() + 1e-6).sqrt()
    return F.normalize(pooled.flatten(1), dim=1)


@torch.no_grad()
def attention_crop(
    images: Tensor, attention: Tensor, threshold: float = 0.5, *, generator: torch.Generator | None = None
) -> Tensor:
    """The AttentionPicture of BACM: where one attention map is high, enlarged to the images' size (Eq. 1).

    For each image one of its maps is drawn uniformly, scaled to [0, 1], enlarged and cut at ``threshold``; the box
    around what is above is cropped out of the image. A map without any contrast gives the whole image. Pass the
    mean map, ``attention.mean(1, keepdim=True)``, for a crop that does not depend on chance.

    Args:
        images: ``(B, 3, H, W)``.
        attention: ``(B, M, h, w)``.
        threshold: Share of a map's range, in [0, 1).
        generator: A CPU generator for the draw.

    Returns: ``(B, 3, H, W)``, without gradient.
    """
    size = images.shape[-2:]
    drawn = torch.randint(attention.shape[1], (len(attention),), generator=generator).to(attention.device)
    maps = attention[torch.arange(len(attention), device=attention.device), drawn]  # (B, h, w)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    masks = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0] > threshold
    crops = []
    for image, mask in zip(images, masks, strict=True):
        rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
        if rows:
            image = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        crops.append(F.interpolate(image[None], size, mode="bilinear", align_corners=False))
    return torch.cat(crops)


def _sample_input() -> nn.Sequential:
    """Three 3x3 convolutions in place of ResNet's 7x7, the first of stride 2; a norm and a ReLU follow the last."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 1, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 1, 1, bias=False),
    )
