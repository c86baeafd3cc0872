"""What a slide of 100,000 x 100,000 pixels takes: time and memory of its heatmap, a U-Net's mask and all files.

    python benchmarks/large_slide.py OUT.json [--side 100000]

The slide is a TIFF of JPEG tiles (256 px, two levels) of phantom tissue from edge to edge, in which discs are darker.
The classifier is a mean of green, so that it costs nothing; tiles that it calls dark go to a U-Net (StrideNet as its
backbone, random weights, computed in float32). What the U-Net says is multiplied by 0 and added to the colour of each
pixel, so that it costs what a U-Net costs and marks an area that is known. One process, two threads. Memory is sampled
every 10 ms, by the step that is under way: private pages, and with them those of mapped files, which the system may
take back at any time. Linux only.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from growth import Mean
from memory import memory
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from histill.data.phantom import draw
from histill.deploy.formats import to_torchscript
from histill.files import write_json
from histill.models import UNet
from histill.types import Outputs

TILE, MODEL, MPP, KINDS = 256, 224, 0.5, 16
LIGHT, DARK = 1.0, 0.55


class Colour(nn.Module):
    """A U-Net whose word is that of each pixel's colour."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(1, "StrideNet")

    def forward(self, images: Tensor) -> Outputs:
        smooth = nn.functional.avg_pool2d(images[:, 1:2], 31, 1, 15, count_include_pad=False)
        return Outputs(logits=40 * (0.5 - smooth) + 0 * self.unet(images)["logits"])


def discs(count: int) -> NDArray[np.bool_]:
    """``(count, count)`` tiles: six discs with a radius of a fiftieth to a twenty-fifth of the side."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:count, :count] / count
    found = np.zeros((count, count), np.bool_)
    for _ in range(6):
        (a, b), radius = rng.random(2), rng.uniform(0.02, 0.04)
        found |= np.hypot(x - a, y - b) < radius
    return found


def write_slide(path: Path, side: int) -> float:
    """Returns the share of the slide that is dark."""
    tissue = np.asarray(draw("benign", size=TILE * 4, mpp=MPP, seed=0).image).astype(np.float32)
    tissue *= 0.65 * 255 / tissue[..., 1].mean()
    pictures: list[list[NDArray[np.uint8]]] = []
    for shade in (LIGHT, DARK):
        whole = np.clip(tissue * shade, 0, 255).astype(np.uint8)
        pictures.append(
            [whole[y : y + TILE, x : x + TILE] for y in range(0, 4 * TILE, TILE) for x in range(0, 4 * TILE, TILE)]
        )
    encoded = [[_jpeg(picture) for picture in of] for of in pictures]
    count = math.ceil(side / TILE)
    dark = discs(count).astype(int)
    which = np.random.default_rng(1).integers(0, KINDS, (count, count))

    def tiles() -> Iterator[bytes]:
        for row in range(count):
            for column in range(count):
                yield encoded[dark[row, column]][which[row, column]]

    small = [[np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BOX)) for p in of] for of in pictures]
    level = np.array(small)[dark, which].transpose(0, 2, 1, 3, 4).reshape(count * 16, count * 16, 3)
    level = level[: side // 16, : side // 16]
    wide = math.ceil(level.shape[0] / TILE)
    padded = np.zeros((wide * TILE, wide * TILE, 3), np.uint8)
    padded[: level.shape[0], : level.shape[1]] = level

    def coarse() -> Iterator[bytes]:
        for row in range(wide):
            for column in range(wide):
                yield _jpeg(padded[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE])

    options: dict[str, Any] = {
        "tile": (TILE, TILE),
        "compression": "jpeg",
        "photometric": "ycbcr",
        "subsampling": (2, 2),
        "dtype": np.uint8,
        "metadata": None,
        "resolutionunit": "CENTIMETER",
    }
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number, (what, shape) in enumerate(((tiles(), (side, side, 3)), (coarse(), level.shape))):
            per_cm = 1e4 / MPP / 16**number
            file.write(what, shape=shape, subfiletype=number, resolution=(per_cm, per_cm), **options)
    return float(dark.mean())


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(picture).save(file, "JPEG", quality=85)
        return file.getvalue()


STEPS = {
    "find_tissue": "finding tissue",
    "_look": "classifying",
    "segment": "U-Nets",
    "over": "outlines of the mask",
    "find_lesions": "outlines",
    "write_ome_tiff": "writing maps",
    "write_deepzoom": "writing maps",
    "write_case": "the page",
}


class Peaks(threading.Thread):
    """The most memory of each step: private, and private with mapped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.found = threading.Event(), dict[str, dict[str, int]]()

    def run(self) -> None:
        while not self.done.wait(0.01):
            private, mapped = memory()
            names = list[str]()
            for frame in sys._current_frames().values():
                while frame is not None:
                    names.append(frame.f_code.co_name)
                    frame = frame.f_back
            step = next((said for name, said in STEPS.items() if name in names), "other")
            most = self.found.setdefault(step, {"private": 0, "with_mapped": 0})
            most["private"] = max(most["private"], private)
            most["with_mapped"] = max(most["with_mapped"], private + mapped)


def predicting(model: Path, unet: Path, slide: Path, out: Path, sender: Any) -> None:
    from histill.slides import predict_slide

    torch.set_num_threads(2)
    peaks = Peaks()
    peaks.start()
    start = time.monotonic()
    said = predict_slide(model, slide, out, segment={"dark": unet}, threads=2)
    seconds = time.monotonic() - start
    peaks.done.set()
    peaks.join()
    most = {kind: max(step[kind] for step in peaks.found.values()) for kind in ("private", "with_mapped")}
    sender.send({"seconds": seconds, "memory_bytes": most | {"steps": peaks.found}, "slide.json": said})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        share = write_slide(home / "large.tiff", arguments.side)
        classes = ("light", "dark")
        model = to_torchscript(Mean(), home / "mean.pt", image_size=MODEL, classes=classes, mpp=MPP)
        torch.manual_seed(0)
        unet = to_torchscript(Colour(), home / "unet.pt", image_size=MODEL, classes=("dark",), mpp=MPP)
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=predicting, args=(model, unet, home / "large.tiff", home / "out", sender))
        child.start()
        sender.close()
        found = receiver.recv()
        child.join()
        said = found.pop("slide.json")
        size = (home / "large.tiff").stat().st_size
    area = (arguments.side * MPP) ** 2
    summary = {
        "command": "python benchmarks/large_slide.py OUT.json",
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "side": arguments.side,
        "file_bytes": size,
        "tiles": said["tiles"]["count"],
        "timing": said["timing"],
        **found,
        "dark_share": share,
        "marked_share": said["segmentation"]["area_um2"]["dark"] / area,
        "outlined_share": said["lesions"]["area_um2"]["dark"] / area,
        "lesions": said["lesions"]["count"],
    }
    write_json(arguments.out, summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
