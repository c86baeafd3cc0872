"""A slide whose lesion is known to the pixel, and models that see colour."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from histill.deploy.formats import to_torchscript
from histill.types import Outputs

PINK, PURPLE, WHITE = (225, 160, 200), (120, 60, 150), (245, 245, 245)
CLASSES = ("normal", "tumour")
TILE = 32


class Purple(nn.Module):
    """A steep logistic of a tile's mean green: half where as much of it is purple as pink."""

    def __init__(self, steep: float = 40.0) -> None:
        super().__init__()
        self.steep = steep

    def forward(self, images: Tensor) -> Outputs:
        green = images[:, 1].mean((1, 2))
        z = self.steep * ((PINK[1] + PURPLE[1]) / 2 / 255 - green)
        return Outputs(logits=torch.stack([-z, z], 1) / 2)


class Outline(nn.Module):
    """The same of every pixel: a segmentation network of one channel."""

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(logits=40 * ((PINK[1] + PURPLE[1]) / 2 / 255 - images[:, 1:2]))


def model(path: Path, network: nn.Module | None = None, *, mpp: float | None = 1.0) -> Path:
    """A TorchScript file."""
    return to_torchscript(network or Purple(), path, image_size=TILE, classes=CLASSES, mpp=mpp)


def model_of_outlines(path: Path) -> Path:
    """A TorchScript file that outlines what is purple."""
    traced = torch.jit.trace(_Bare(Outline()), torch.rand(2, 3, TILE, TILE))
    card = json.dumps({"classes": ["tumour"], "image_size": TILE, "mpp": 1.0})
    torch.jit.save(traced, path, _extra_files={"histill.json": card})
    return path


class _Bare(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)["logits"]
        return logits


def truth(width: int, height: int) -> NDArray[np.uint8]:
    """``(height, width)``: 0 glass, 1 tissue, 2 a ring of tumour and a disc of it."""
    y, x = np.mgrid[:height, :width] / min(width, height)
    found = (np.hypot(x - 0.5, y - 0.5) < 0.46).astype(np.uint8)
    away = np.hypot(x - 0.45, y - 0.45)
    found[(away < 0.25) & (away > 0.09)] = 2
    found[np.hypot(x - 0.72, y - 0.72) < 0.07] = 2
    return found


def slide(path: Path, *, width: int = 1024, height: int = 1024, mpp: float | None = 0.5) -> Path:
    """A tiled TIFF with a level of half the size, and beside it ``<stem>.mask.png``."""
    kinds = truth(width, height)
    pixels = np.array([WHITE, PINK, PURPLE], np.uint8)[kinds]
    noise = np.random.default_rng(0).integers(-6, 7, pixels.shape)
    pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    small = np.asarray(Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BOX))
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate((pixels, small)):
            if mpp:
                per_cm = 1e4 / mpp / 2**number
                options |= {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            file.write(level, subfiletype=number, **options)
    Image.fromarray(kinds).save(path.with_suffix(".mask.png"))
    return path
