"""BACH, part B: ten whole slides of breast tissue with outlines, cut into patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from histill.data.sets._pixels import Pixels, Region, regions, save
from histill.data.sets._record import CONVERTED, DataSet, Row, find
from histill.data.sets.bach import ARCHIVE, CITATION
from histill.errors import BadInput, require
from histill.files import write_text

__all__ = ["SETS", "cut", "in_classes"]

_SIDE = 1024
_UM = 1.0
"""Micrometres per pixel of a patch: 10x."""
_TISSUE = 0.05
_SPLITS = ("train",) * 5 + ("val",) * 3 + ("test",) * 2


def rows(folder: Path) -> Iterator[Row]:
    """``ICIAR2018_BACH_Challenge/WSI/A01.svs`` and ``A01.xml`` beside it."""
    home = find(folder, "ICIAR2018_BACH_Challenge", "WSI")
    for place, split in enumerate(_SPLITS):
        slide = home / f"A{place + 1:02d}.svs"
        if slide.is_file():
            out = folder / CONVERTED / BACH_WSI.name / slide.stem
            for path in cut(slide, slide.with_suffix(".xml"), out):
                mask = path.with_name(path.name.replace(".png", "_mask.png"))
                yield Row(path, patient=slide.stem, split=split, mask=mask)


def cut(slide: Path, outlines: Path, out: Path) -> list[Path]:
    """Cut a slide into patches of 1024 pixels at 10x that do not overlap; each with a mask of class numbers.

    Patches without tissue (fewer than 5 % coloured pixels) and without an outline are left out, and those that would
    reach beyond the slide. Classes come from the outlines, the graver where two overlap; the rest is normal.

    Raises:
        BadInput: OpenSlide is not installed or cannot read the slide, or a resolution is missing.
    """
    openslide = require("openslide", "slides")
    done = out / "patches.txt"
    if done.exists():
        return [out / name for name in done.read_text(encoding="utf-8").split()]
    try:
        whole = openslide.OpenSlide(str(slide))
    except openslide.OpenSlideError as error:
        raise BadInput(f"{slide}: OpenSlide cannot read it ({error})") from None
    with whole:
        if not (um := float(whole.properties.get("openslide.mpp-x", 0))):
            raise BadInput(f"{slide}: the file does not say how many micrometres a pixel has")
        l0_side = _SIDE * _UM / um
        found = in_classes(regions(outlines))
        columns, lines = int(whole.dimensions[0] // l0_side), int(whole.dimensions[1] // l0_side)
        kept: list[Path] = []

        def patches() -> Iterator[tuple[Path, Pixels | Callable[[], Pixels]]]:
            for place in range(columns * lines):
                l0_x, l0_y = (place % columns) * l0_side, (place // columns) * l0_side
                path = out / f"{slide.stem}_{place % columns:03d}_{place // columns:03d}.png"
                mask = _mask(found, l0_x, l0_y, um / _UM)
                pixels = _patch(whole, l0_x, l0_y, l0_side)
                if mask.any() or (np.ptp(pixels, axis=2) > 20).mean() >= _TISSUE:
                    kept.append(path)
                    yield path.with_name(path.name.replace(".png", "_mask.png")), mask
                    yield path, partial(np.asarray, pixels)

        save(patches(), 2 * columns * lines, f"cutting {slide.name}")
    write_text(done, "\n".join(path.name for path in kept))
    return kept


def in_classes(found: Iterator[Region]) -> list[tuple[int, list[tuple[float, float]]]]:
    """Outlines with their class numbers, the graver last; unknown words are an error."""
    numbered = []
    for said, points in found:
        lower = said.lower()
        number = next((n for n, word in enumerate(("benign", "in situ", "invasive"), 1) if word in lower), 0)
        if number == 0:
            raise BadInput(f"an outline says {said!r}; benign, in situ or invasive is expected")
        numbered.append((number, points))
    return sorted(numbered, key=lambda one: one[0])


def _mask(
    found: list[tuple[int, list[tuple[float, float]]]], l0_x: float, l0_y: float, scale: float
) -> NDArray[np.uint8]:
    picture = Image.new("L", (_SIDE, _SIDE))
    pen = ImageDraw.Draw(picture)
    for number, points in found:
        if len(points) > 2:
            pen.polygon([((x - l0_x) * scale, (y - l0_y) * scale) for x, y in points], fill=number)
    return np.asarray(picture)


def _patch(slide: Any, l0_x: float, l0_y: float, l0_side: float) -> NDArray[np.uint8]:
    """``(1024, 1024, 3)``, from the level that has just enough pixels."""
    level = slide.get_best_level_for_downsample(l0_side / _SIDE)
    side = max(1, round(l0_side / slide.level_downsamples[level]))
    seen = slide.read_region((round(l0_x), round(l0_y)), level, (side, side))
    white = Image.new("RGBA", seen.size, (255, 255, 255, 255))
    picture = Image.alpha_composite(white, seen).convert("RGB")
    return np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0))


BACH_WSI = DataSet(
    name="bach-wsi",
    what="breast, patches of 1024 pixels at 10x from ten outlined slides",
    use="RCKD's segmentation into four classes",
    homepage="https://iciar2018-challenge.grand-challenge.org/Dataset/",
    files=(ARCHIVE,),
    checksums="Zenodo record 3632035, as the eva benchmark recorded it",
    licence="CC BY-NC-ND 4.0",
    citation=CITATION,
    classes=("normal", "benign", "in situ", "invasive"),
    images={"train": 2388, "val": 1214, "test": 881},
    split="RCKD: slides 5/3/2, 2,388, 1,214 and 881 patches; which slides is not said, here A01-A05, A06-A08, A09-A10",
    patient="the slide",
    pitfalls="RCKD does not say which patches it kept; counts here differ by the rule for background. Two test slides: "
    "an interval over patients means little.",
    rows=rows,
    task="masks",
    command="train rckd.finetune",
    manifest="manifest_wsi",
)
SETS = (BACH_WSI,)
