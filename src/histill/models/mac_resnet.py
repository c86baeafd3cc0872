"""MAC-ResNet, the eyelid tumour teacher (Huang et al., J. Pers. Med. 2023, 13:89).

The paper leaves the blocks' inside open; what is chosen here is said where it is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histill.accelerator import sent
from histill.errors import BadInput
from histill.models.parts import Normalize
from histill.models.resnet import Bottleneck, initialise, stage
from histill.models.weights import load_weights
from histill.types import Outputs

__all__ = ["MACResNet", "attention_crop", "attention_mask", "mean_crop"]

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
        crop: With attention: look twice, at the image and at its AttentionPicture, and answer with the mean of the
            two, as WS-DAN does. In training it is `attention_crop`'s, by a map drawn from torch's global generator,
            in evaluation `mean_crop`'s, so that an image has one answer.
        threshold: Theta of the crop's mask.
        weights: None, ``"imagenet"`` (a ResNet-50's weights in all parts that it has), or anything that
            `load_weights` takes.

    Outputs, for images of 512: ``layer1`` (B, 256, 128, 128), ``layer2`` (B, 512, 64, 64), ``layer3``
    (B, 1024, 32, 32), ``layer4`` (B, 2048, 16, 16); ``pooled`` (B, 2048); ``attention`` (B, 32, 16, 16) where it
    has one; ``logits`` (B, classes). Where it looks twice all of these are of the first look, but ``logits`` is the
    mean of ``raw_logits`` and ``crop_logits``.

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
        crop: bool = True,
        threshold: float = 0.5,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if unknown := set(dares) - {"layer2", "layer3", "layer4"}:
            raise BadInput(f"dares may name layer2, layer3 and layer4, not {', '.join(sorted(unknown))}")
        if not 0 <= threshold < 1:
            raise BadInput(f"threshold {threshold}: a share of the map's range, at least 0 and below 1")
        self.crop, self.threshold = attention and crop, threshold
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
        outputs = self._look(images)
        if self.crop:
            picture = attention_crop if self.training else mean_crop
            outputs["raw_logits"] = outputs["logits"]
            outputs["crop_logits"] = self._look(picture(images, outputs["attention"], self.threshold))["logits"]
            outputs["logits"] = (outputs["raw_logits"] + outputs["crop_logits"]) / 2
        return outputs

    def _look(self, images: Tensor) -> Outputs:
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
    """The AttentionPicture of BACM: where one attention map is high, enlarged to the images' size.

    For each image one of its maps is drawn uniformly; the box around its `attention_mask` is cut out of the image and
    resized bilinearly. A map without any contrast gives the whole image.

    Args:
        images: ``(B, 3, H, W)``.
        attention: ``(B, M, h, w)``.
        threshold: Share of a map's range, in [0, 1).
        generator: A CPU generator for the draw.

    Returns: ``(B, 3, H, W)``, without gradient.
    """
    drawn = torch.randint(attention.shape[1], (len(attention),), generator=generator)
    maps = attention[torch.arange(len(attention), device=attention.device), sent(drawn, attention.device)]
    return _cut(images, attention_mask(maps, images.shape[-2:], threshold)[1])


@torch.no_grad()
def mean_crop(images: Tensor, attention: Tensor, threshold: float = 0.5) -> Tensor:
    """The AttentionPicture by the mean of an image's maps, which does not depend on chance.

    The mean map is masked as it is, not enlarged, so that the box is of whole cells. A side that may lie at any pixel
    jumps by one where rounding differs, from one runtime or batch to another, and the logits by tenths. Of images of
    224 pixels that is about one in 300, with cells about one in 5,000 (see ``docs/recipes/mac-resnet.md``).

    Arguments and result as for `attention_crop`.
    """
    return _cut(images, attention_mask(attention.mean(1), attention.shape[-2:], threshold)[1])


def attention_mask(maps: Tensor, size: Sequence[int], threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Eq. 1, ``A* = (A - min A) / (max A - min A)``, enlarged to ``size``, and the mask ``A* > threshold``.

    ``(B, h, w)`` -> ``(B, H, W)`` float32, zeros where a map has no contrast, and ``(B, H, W)`` bool.
    """
    maps = maps.float()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    if tuple(size) != tuple(maps.shape[1:]):
        maps = F.interpolate(maps[:, None], list(size), mode="bilinear", align_corners=False)[:, 0]
    return maps, maps > threshold


def _cut(images: Tensor, mask: Tensor) -> Tensor:
    """The box around each ``mask`` ``(B, h, w)``, at the size of the images ``(B, 3, H, W)``; all where it is empty.

    What slicing and bilinear `interpolate` give: samples are kept half a pixel within the box, so that nothing from
    outside bleeds into the crop.
    """
    height, width = images.shape[-2:]
    y, x = _places(mask.any(2), height), _places(mask.any(1), width)
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], 3)  # (B, H, W, 2)
    crops = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.to(images.dtype)


def _places(hit: Tensor, length: int) -> Tensor:
    """Where to sample an axis of ``length`` pixels to enlarge the span from the first to the last hit to all of it.

    ``(B, l)`` bool, of cells or pixels -> ``(B, length)`` in the -1 to 1 of `grid_sample`.
    """
    cells = hit.shape[1]
    cell, pixel = (torch.arange(n, device=hit.device, dtype=torch.float32) for n in (cells, length))
    hit = hit | ~hit.any(1, keepdim=True)
    start = torch.where(hit, cell, cells).amin(1, keepdim=True) * (length / cells)
    end = torch.where(hit, cell + 1, 0).amax(1, keepdim=True) * (length / cells)
    place = start + (pixel + 0.5) * ((end - start) / length)
    return 2 * torch.minimum(torch.maximum(place, start + 0.5), end - 0.5) / length - 1


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
