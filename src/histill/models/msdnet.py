"""MSDNet, dense at several scales at once (Huang et al., ICLR 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from histill.errors import BadInput
from histill.models.multi_exit import mixture
from histill.models.parts import Normalize
from histill.models.resnet import initialise
from histill.models.weights import load_weights
from histill.types import Outputs

__all__ = ["MSDNet"]

_EXIT = 128


def _conv(ci: int, co: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(ci, co, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(co), nn.ReLU(inplace=True))


def _bottleneck(ci: int, co: int, factor: int, stride: int = 1) -> nn.Sequential:
    """1x1 to at most ``factor * co`` channels, then 3x3."""
    narrow = min(ci, factor * co)
    return nn.Sequential(_conv(ci, narrow, 1), _conv(narrow, co, 3, stride))


class Stem(nn.Module):
    """Images to one map per scale, each from the one before with stride 2."""

    def __init__(self, stem: str, widths: Sequence[int]) -> None:
        super().__init__()
        self.normalize = Normalize()
        large = stem == "imagenet"
        first = nn.Sequential(_conv(3, widths[0], 7, 2), nn.MaxPool2d(3, 2, 1)) if large else _conv(3, widths[0])
        downs = (_conv(ci, co, 3, 2) for ci, co in pairwise(widths))
        self.scales = nn.ModuleList([first, *downs])

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = self.normalize(images), []
        for scale in self.scales:
            x = scale(x)
            maps.append(x)
        return maps


class Dense(nn.Module):
    """One layer at every scale: a scale's own maps, and beside them what is made of the finer ones and of its own.

    Args:
        widths: Channels in, finest scale first.
        grown: Channels that are added to each scale that is kept, the last ones; a finer scale, where there is one,
            gives half of them, also one that ends here.
        factors: Of the bottlenecks, for all scales.
    """

    def __init__(self, widths: Sequence[int], grown: Sequence[int], factors: Sequence[int]) -> None:
        super().__init__()
        self.kept, self.finest = len(grown), len(grown) == len(widths)
        halves = [co if self.finest and s == 0 else co // 2 for s, co in enumerate(grown)]
        own, finer = slice(-self.kept, None), slice(None if self.finest else -self.kept - 1, -1)
        self.same = nn.ModuleList(_bottleneck(*sizes) for sizes in zip(widths[own], halves, factors[own]))
        down = zip(widths[finer], halves[self.finest :], factors[finer])
        self.down = nn.ModuleList(_bottleneck(*sizes, stride=2) for sizes in down)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        kept = maps[-self.kept :]
        own = [same(x) for same, x in zip(self.same, kept)]
        finer = [[down(x)] for down, x in zip(self.down, maps[-len(self.down) - 1 :])]
        if self.finest:
            finer = [[], *finer]
        return [torch.cat([x, *more, mine], 1) for x, more, mine in zip(kept, finer, own, strict=True)]


class Halve(nn.Module):
    """Half of the channels of every scale, by a 1x1 convolution each."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_conv(width, width // 2, 1) for width in widths)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [halve(x) for halve, x in zip(self.scales, maps, strict=True)]


class Classifier(nn.Module):
    """Two 3x3 convolutions of stride 2 on the coarsest map, average pool, linear."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(_conv(width, _EXIT, 3, 2), _conv(_EXIT, _EXIT, 3, 2))
        self.fc = nn.Linear(_EXIT, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.reduce(x).mean((2, 3))
        return pooled, self.fc(pooled)


class Segment(nn.Module):
    """A block and its exit: ``(*maps) -> (logits, *maps)``."""

    def __init__(self, stem: nn.Module | None, block: nn.Module, leave: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.leave = stem, block, leave

    def forward(self, *carried: Tensor) -> tuple[Tensor, ...]:
        maps = list(carried) if self.stem is None else self.stem(*carried)
        maps = self.block(maps)
        return self.leave(maps[-1])[1], *maps


class MSDNet(nn.Module):
    """Blocks of dense layers that run at several scales at once, a classifier on the coarsest after each block.

    Coarse maps are there from the first layer on, so an early exit has them too. The defaults are the widths of the
    paper's CIFAR networks with four exits, after 4, 6, 8 and 10 layers. As in the paper later blocks do without the
    finest scales, the last has the coarsest alone, and where one ends the channels are halved; the blocks at which that
    happens are spread evenly.

    Args:
        classes: Number of classes.
        stem: ``"imagenet"`` (7x7 of stride 2 and a pool) or ``"cifar"`` (3x3 of stride 1), for images of 32 to 64.
        scales: How many; scale s has 2^s times the channels and growth of the finest.
        blocks: How many, each with an exit.
        base: Layers of the first block.
        step: Layers of every other block.
        channels: Of the finest scale after the stem.
        growth: Channels that a layer adds to the finest scale.
        weights: None, or anything that `load_weights` takes but ``"imagenet"``.

    Outputs: for each exit k ``exit<k>`` (B, classes), its logits, and ``exit<k>_features`` (B, 128), what its linear
    layer sees; ``logits`` (B, classes), the log of the mean of the exits' probabilities.

    Raises:
        BadInput: An unknown stem, sizes that make no network, or weights that do not fit.
    """

    def __init__(
        self,
        classes: int,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        scales: int = 3,
        blocks: int = 4,
        base: int = 4,
        step: int = 2,
        channels: int = 16,
        growth: int = 6,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise BadInput(f"stem is imagenet or cifar, not {stem!r}")
        if min(scales, base, step, channels) < 1 or blocks < max(2, scales) or growth < 2:
            raise BadInput("MSDNet: at least as many blocks as scales, two blocks, growth 2, and 1 of everything else")
        factors = [2**s for s in range(scales)]
        widths = [channels * f for f in factors]
        self.stem = Stem(stem, widths)
        self.blocks, self.exits = nn.ModuleList(), nn.ModuleList()
        for b in range(blocks):
            layers: list[nn.Module] = []
            kept = scales - round(b * (scales - 1) / (blocks - 1))
            grown = [growth * 2**s for s in range(scales)][-kept:]
            for _ in range(step if b else base):
                layers.append(Dense(widths, grown, factors[-len(widths) :]))
                dropped = kept < len(widths)
                widths = [width + more for width, more in zip(widths[-kept:], grown)]
                if dropped:
                    layers.append(Halve(widths))
                    widths = [width // 2 for width in widths]
            self.blocks.append(nn.Sequential(*layers))
            self.exits.append(Classifier(widths[-1], classes))
        self.apply(initialise)
        load_weights(self, weights, fresh=["exits.*.fc.*"])

    def forward(self, images: Tensor) -> Outputs:
        outputs = Outputs()
        maps = self.stem(images)
        for k, (block, leave) in enumerate(zip(self.blocks, self.exits, strict=True), 1):
            maps = block(maps)
            outputs[f"exit{k}_features"], outputs[f"exit{k}"] = leave(maps[-1])
        outputs["logits"] = mixture([outputs[f"exit{k}"] for k in range(1, len(self.exits) + 1)])
        return outputs

    def segments(self) -> list[nn.Module]:
        """The network in pieces that end at an exit, for `histill.evaluate.early_exit`; they share its weights.

        Each maps what the one before carries (the first: images) to ``(logits, *carried)``.
        """
        stems = [self.stem, *[None] * (len(self.blocks) - 1)]
        return [Segment(*parts) for parts in zip(stems, self.blocks, self.exits, strict=True)]
