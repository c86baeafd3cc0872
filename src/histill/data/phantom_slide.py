"""Whole phantom slides: tiled pyramids drawn block by block, in memory that does not grow with their height."""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.data.phantom_draw import stain_tissue
from histill.data.phantom_field import Array, Window, hashed, new_key, noise, uniforms
from histill.data.phantom_kinds import Kind, Patient, Scanner, kind_of
from histill.errors import BadInput
from histill.files import atomic

__all__ = ["MASK_DOWNSAMPLE", "write_slide"]

MASK_DOWNSAMPLE = 16
"""One pixel of a slide's mask is this many of its level 0, each way."""

HALO_UM = 32.0  # what lies further away than this does not change a pixel
BLOCK_PX = 768
PEN_INK = np.array([0.8, 0.55, 0.14])  # blue felt pen, optical density

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class _Layout:
    """Where the tissue and its lesions lie on a slide of ``extent_um`` (x, y)."""

    key: int
    extent_um: tuple[float, float]
    lesions: int

    def weights(self, window: Window) -> list[Array]:
        """One map in [0, 1] per kind; what they leave is glass."""
        width, height = self.extent_um
        short = min(width, height)
        x, y = window.xs_um[None, :] / width - 0.5, window.ys_um[:, None] / height - 0.5
        ragged = 0.6 * noise(self.key, 201, window, short / 6) + 0.15 * noise(self.key, 202, window, short / 30)
        # A rounded rectangle with a ragged outline, softened over a few microns.
        inside = 0.42 - (np.abs(x) ** 3 + np.abs(y) ** 3) ** (1 / 3) + 0.045 * ragged
        maps = [np.clip(inside * short / 6, 0, 1)]
        lobes = 0.5 * noise(self.key, 203, window, short / 9) + 0.2 * noise(self.key, 204, window, short / 30)
        for lesion in range(self.lesions):
            u = uniforms(hashed(self.key, 205, np.array([lesion]), np.array([0])))[0]
            turn = 2 * np.pi * ((lesion + 0.6 * u[0]) / self.lesions + 0.25)
            off = 0.17 + 0.06 * u[1] if self.lesions > 1 else 0.1 * u[1]
            away = np.hypot((x - off * np.cos(turn)) * width / short, (y - off * np.sin(turn)) * height / short)
            radius = (0.23 + 0.05 * u[2]) / np.sqrt(self.lesions)
            here = np.clip((radius - away + 0.07 * lobes) * short / 12 + 0.5, 0, 1)
            tissue = maps[0] if lesion == 0 else np.sum(maps, axis=0)
            maps = [one * (1 - here) for one in maps] + [tissue * here]
        return maps

    def pen(self, window: Window) -> Array:
        """Ink of a pen stroke around the middle of the slide, as someone marks a finding."""
        width, height = self.extent_um
        short = min(width, height)
        x, y = window.xs_um[None, :] - width / 2, window.ys_um[:, None] - height / 2
        wobble = 0.02 * noise(self.key, 210, window, short / 5)
        off = np.abs(np.hypot(x / 1.15, y) / short - 0.36 - wobble) * short
        stroke = np.clip((0.012 * short - off) / 8 + 0.5, 0, 1) * (np.arctan2(y, x) < 2.4)
        return np.asarray(stroke * (0.75 + 0.12 * noise(self.key, 211, window, 40.0)))


def _tiles(rows: Iterator[Pixels], tile: int, quality: int) -> Iterator[bytes]:
    """The JPEG tiles of an image that comes as bands of whole tile rows, in reading order."""
    for band in rows:
        for top in range(0, band.shape[0], tile):
            for left in range(0, band.shape[1], tile):
                with io.BytesIO() as file:
                    Image.fromarray(band[top : top + tile, left : left + tile]).save(
                        file, "JPEG", quality=quality, subsampling="4:2:0"
                    )
                    yield file.getvalue()


def _shrink(band: Pixels, factor: int) -> Pixels:
    """The means of ``factor`` by ``factor`` boxes; what does not fill a box is left out."""
    height, width = band.shape[0] // factor, band.shape[1] // factor
    boxes = band[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.asarray(boxes.mean(axis=(1, 3)) + 0.5, np.uint8)


def _stored(level: Pixels, below: Pixels | None, tile: int, factor: int) -> Iterator[Pixels]:
    """Bands of a stored level, padded to whole tiles; fills the next level in passing."""
    height, width, _ = level.shape
    for top in range(0, height, tile * factor):
        band = np.asarray(level[top : top + tile * factor])
        if below is not None:
            small = _shrink(band, factor)
            below[top // factor : top // factor + len(small)] = small[: len(below) - top // factor]
        yield np.pad(band, ((0, -len(band) % tile), (0, -width % tile), (0, 0)), mode="edge")


def _start_tiff(file: BinaryIO) -> int:
    """Write a BigTIFF header; returns where the place of the first page is to be written."""
    file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
    return 8


def _write_page(
    file: BinaryIO,
    link: int,
    tiles: Iterator[bytes],
    size: tuple[int, int],
    tile: int,
    mpp: float,
    *,
    reduced: bool,
) -> int:
    """Write tiles and their directory (TIFF 6.0, BigTIFF); returns where the next page's place goes.

    By hand, because tifffile takes JPEG tiles only where imagecodecs is installed, ready-made ones too.
    """
    offsets, lengths = [], []
    for data in tiles:
        offsets.append(file.tell())
        lengths.append(len(data))
        file.write(data)
    per_cm = Fraction(1e4 / mpp).limit_denominator(10_000).as_integer_ratio()
    short, long, rational, long8 = (3, "H"), (4, "I"), (5, "I"), (16, "Q")
    tags: list[tuple[int, tuple[int, str], Sequence[int]]] = [
        (254, long, [int(reduced)]),  # NewSubfileType
        (256, long, [size[1]]),
        (257, long, [size[0]]),
        (258, short, [8, 8, 8]),  # BitsPerSample
        (259, short, [7]),  # Compression: JPEG
        (262, short, [6]),  # PhotometricInterpretation: YCbCr
        (277, short, [3]),  # SamplesPerPixel
        (282, rational, per_cm),  # XResolution
        (283, rational, per_cm),
        (284, short, [1]),  # PlanarConfiguration: interleaved
        (296, short, [3]),  # ResolutionUnit: centimetre
        (322, long, [tile]),
        (323, long, [tile]),
        (324, long8, offsets),
        (325, long8, lengths),
        (530, short, [2, 2]),  # YCbCrSubSampling
    ]
    entries = []
    for tag, (number, code), values in tags:
        value = struct.pack(f"<{len(values)}{code}", *values)
        if len(value) > 8:
            place = file.tell()
            file.write(value)
            value = struct.pack("<Q", place)
        count = 1 if number == 5 else len(values)  # a rational is a pair
        entries.append(struct.pack("<HHQ8s", tag, number, count, value))
    directory = file.tell()
    file.write(struct.pack("<Q", len(entries)) + b"".join(entries) + struct.pack("<Q", 0))
    end = file.tell()
    file.seek(link)
    file.write(struct.pack("<Q", directory))
    file.seek(end)
    return end - 8


def write_slide(
    path: str | Path,
    *,
    width: int = 4096,
    height: int = 3072,
    mpp: float = 0.5,
    kinds: Sequence[str] = ("benign", "malignant"),
    seed: int = 0,
    patient: int = 0,
    scanner: int = 0,
    difficulty: float = 0.5,
    pen: bool = False,
    levels: int | None = None,
    downsample: int = 4,
    tile: int = 256,
    quality: int = 85,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a phantom slide: a tiled pyramidal TIFF with JPEG tiles that OpenSlide reads (``generic-tiff``).

    Beside it, ``path.with_suffix(".mask.png")`` holds the truth at 1 / `MASK_DOWNSAMPLE` (16): 0 glass, 1 tissue of
    ``kinds[0]``, 2 a lesion of ``kinds[1]``, and so on.

    Args:
        path: the TIFF.
        width: pixels of level 0.
        height: pixels of level 0.
        mpp: microns per pixel of level 0.
        kinds: the tissue, then one lesion each, names in `KINDS`.
        seed: which slide of the patient.
        patient: as in `draw`.
        scanner: as in `draw`.
        difficulty: as in `draw`.
        pen: whether someone marked the slide with a blue pen.
        levels: how many; by default until no side is longer than 1024.
        downsample: the factor between levels, a power of two up to ``tile``.
        tile: pixels per side of a tile, a multiple of 16.
        quality: of the JPEG tiles, 1 to 95.
        progress: called with (blocks drawn, blocks in all).

    Raises:
        BadInput: an unknown kind or a number out of range.
    """
    path = Path(path)
    if tile < 16 or tile % 16 or downsample < 2 or tile % downsample or downsample & (downsample - 1):
        raise BadInput(f"phantom: tile={tile} must be a multiple of 16, downsample={downsample} a power of 2 up to it")
    if not kinds or min(width, height) < 16 or not 0 < mpp <= 16 or min(seed, patient, scanner) < 0:
        raise BadInput(
            f"phantom: width={width} and height={height} must be at least 16, mpp={mpp} in (0, 16], "
            f"seed={seed}, patient={patient} and scanner={scanner} not negative, and kinds not empty"
        )
    if (levels is not None and levels < 1) or not 1 <= quality <= 95:
        raise BadInput(f"phantom: levels={levels} must be at least 1, quality={quality} 1 to 95")
    sizes = [(height, width)]
    while (len(sizes) < levels) if levels is not None else max(sizes[-1]) > 1024:
        sizes.append((sizes[-1][0] // downsample, sizes[-1][1] // downsample))
        if min(sizes[-1]) < 1:
            break
    if min(sizes[-1]) < 1:
        raise BadInput(f"phantom: {width} x {height} has no {levels} levels at a downsample of {downsample}")

    person, camera = Patient.number(patient), Scanner.number(scanner)
    own = [person.kind(kind_of(kind), difficulty) for kind in kinds]
    key = new_key(4, seed, patient)
    layout = _Layout(key, (width * mpp, height * mpp), len(kinds) - 1)
    block = tile * max(1, BLOCK_PX // tile)

    def draw_bands(below: Pixels | None) -> Iterator[Pixels]:
        across = -(-width // tile) * tile
        tops = range(0, height, block)
        lefts = range(0, across, block)
        for i, top in enumerate(tops):
            tall = min(block, -(-(height - top) // tile) * tile)
            band = np.empty((tall, across, 3), np.uint8)
            for j, left in enumerate(lefts):
                window = Window(left, top, min(block, across - left), tall, mpp)
                band[:, left : left + window.width] = _draw_block(key, window, layout, own, person, camera, pen)
                if progress:
                    progress(i * len(lefts) + j + 1, len(tops) * len(lefts))
            if below is not None:
                small = _shrink(band[: height - top, :width], downsample)
                below[top // downsample : top // downsample + len(small)] = small
            yield band

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".phantom") as scratch, atomic(path) as temporary:
        stored = [
            np.memmap(Path(scratch) / f"level{n}", np.uint8, "w+", shape=(*size, 3))
            for n, size in enumerate(sizes[1:], start=1)
        ]
        with temporary.open("wb") as file:
            link = _start_tiff(file)
            for n, size in enumerate(sizes):
                below = stored[n] if n < len(stored) else None
                bands = draw_bands(below) if n == 0 else _stored(stored[n - 1], below, tile, downsample)
                tiles = _tiles(bands, tile, quality)
                link = _write_page(file, link, tiles, size, tile, mpp * width / size[1], reduced=n > 0)
    with atomic(path.with_suffix(".mask.png")) as temporary:
        coarse = Window(0, 0, -(-width // MASK_DOWNSAMPLE), -(-height // MASK_DOWNSAMPLE), mpp * MASK_DOWNSAMPLE)
        maps = layout.weights(coarse)
        truth = np.argmax([1 - np.sum(maps, axis=0), *maps], axis=0)
        Image.fromarray(truth.astype(np.uint8)).save(temporary, "PNG")
    return path


def _draw_block(
    key: int,
    window: Window,
    layout: _Layout,
    kinds: list[Kind],
    person: Patient,
    camera: Scanner,
    pen: bool,
) -> Pixels:
    halo = int(np.ceil(HALO_UM / window.mpp))
    wide = window.pad(halo)
    parts = [(kind, weight) for kind, weight in zip(kinds, layout.weights(wide)) if weight.any()]
    amounts = stain_tissue(key, wide, parts).amounts if parts else np.zeros((3, *wide.shape))
    amounts *= 1 + 0.06 * noise(key, 206, wide, 400.0)  # the section is not equally thick
    light: Pixels = camera.image(amounts, person, wide, key)[halo:-halo, halo:-halo]
    if not pen:
        return light
    ink = layout.pen(window)
    seen = light * np.exp(-np.log(10) * ink[..., None] * PEN_INK)
    return np.asarray(np.rint(seen), np.uint8)
