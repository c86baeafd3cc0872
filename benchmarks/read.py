"""Tiles per second from slides, Histill beside OpenSlide: ``histill bench read`` on real and on generated files.

    python benchmarks/read.py OUT.json SLIDE... [--side 16384] [--seconds 10]

Each SLIDE is measured as it is, and then a TIFF that is generated: JPEG tiles of 256 px (quality 85, 4:2:0), ``--side``
pixels wide and high, made of phantom tissue whose 36 tiles repeat; it lies on the local disk and has just been written,
so that the disk is not what is measured. One thread; how the two are interleaved is said in `histill.slides.bench`.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from histill.data.phantom import draw
from histill.files import write_json
from histill.slides.bench import bench_read, table_of

TILE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("slides", type=Path, nargs="*")
    parser.add_argument("--side", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        made = write(Path(folder) / "generated.tiff", arguments.side)
        for path in (*arguments.slides, made):
            found.append(bench_read(path, seconds=arguments.seconds))
            print(table_of(found[-1]))
    write_json(arguments.out, {"command": "python benchmarks/read.py OUT.json SLIDE...", "slides": found})


def write(path: Path, side: int) -> Path:
    """A large slide of one level in little time: the same encoded tiles again and again."""
    image = draw("malignant", size=6 * TILE, seed=0).image
    encoded = []
    for top in range(0, len(image), TILE):
        for left in range(0, len(image), TILE):
            with io.BytesIO() as file:
                Image.fromarray(image[top : top + TILE, left : left + TILE]).save(file, "JPEG", quality=85)
                encoded.append(file.getvalue())
    order = np.random.default_rng(0).integers(0, len(encoded), (side // TILE) ** 2)

    def tiles() -> Iterator[bytes]:
        for number in order:
            yield encoded[number]

    tifffile.imwrite(
        path,
        tiles(),
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="ycbcr",
        subsampling=(2, 2),
        compression="jpeg",
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    return path


if __name__ == "__main__":
    main()
