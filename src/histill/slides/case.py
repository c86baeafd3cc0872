"""One page about one slide that stands alone: the answer, where it comes from, and how it was made.

Pictures are embedded, there is no script and no address, and every string is escaped: names of slides and classes come
from users. A page holds no clock, so the same slide gives the same bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from histill.errors import require
from histill.files import write_text
from histill.slides.engine import Model, answers
from histill.slides.geojson import Color
from histill.slides.grid import Grid
from histill.slides.lesions import Lesion
from histill.slides.slide import Slide

__all__ = ["Case", "write_case"]

_SHOWN_LESIONS = 50  # in the table
_DRAWN_LESIONS = 500
_TILE_PX = 168  # of a telling tile on the page
_STAGED = 3  # of them with what each stage answers to
_QUALITY = 85


@dataclass(frozen=True, eq=False)
class Case:
    """What the page shows.

    Attributes:
        name: of the slide.
        slide: open; the telling tiles are read from it.
        thumbnail: of the slide.
        overlay: ``(H, W, 4)`` RGBA of the heatmap.
        l0_pixel: level-0 pixels that a pixel of the overlay is wide.
        lesions: largest first.
        labels: the classes that are lesions.
        colors: of the classes.
        classes: of the model.
        call: from `call_slide`.
        tiles: all of them.
        grid: of the tiles.
        model: which looked.
        settings: by name.
        versions: by name.
        judged: agreement with a reference mask, or None.
        segmented: areas that U-Nets outlined, or None.
    """

    name: str
    slide: Slide
    thumbnail: Image.Image
    overlay: NDArray[np.uint8]
    l0_pixel: float
    lesions: Sequence[Lesion]
    labels: Sequence[str]
    colors: Mapping[str, Color]
    classes: Sequence[str]
    call: Mapping[str, Any]
    tiles: pd.DataFrame
    grid: Grid
    model: Model
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    judged: Mapping[str, Any] | None = None
    segmented: Mapping[str, Any] | None = None


def write_case(path: Path, case: Case) -> Path:
    """Write the page, atomically."""
    given = case.slide.mpp_given
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("histill.slides"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    width, height = case.slide.dimensions
    page = environment.get_template("case.html").render(
        name=case.name,
        answer=_answer(case),
        cards=_cards(case),
        width=width,
        height=height,
        mpp=f"{case.slide.require_mpp():.4g} µm per pixel" + (f" ({given})" if given else ""),
        scale=_scale(case),
        thumbnail=_embedded(case.thumbnail.convert("RGB"), "JPEG"),
        overlay=_embedded(_over(case), "PNG"),
        outlines=_outlines(case),
        legend=[(name, _hex(case.colors[name]), name in case.labels) for name in case.classes],
        lesions=_lesion_rows(case),
        more_lesions=max(0, len(case.lesions) - _SHOWN_LESIONS),
        tiles=_telling(case),
        label=case.call["label"],
        calibrated=case.call["label"] is not None and case.call["calibrated"],
        classes=_class_rows(case),
        judged=_judged_rows(case),
        segmented=_segmented_rows(case),
        settings=[(name.replace("_", " "), _said(value)) for name, value in case.settings.items() if value is not None],
        versions=list(case.versions.items()),
        model=case.model,
    )
    write_text(path, page)
    return path


def area(um2: float) -> str:
    """Square millimetres where they are many square microns."""
    return f"{um2 / 1e6:,.2f} mm²" if um2 >= 1e4 else f"{um2:,.0f} µm²"


def _scale(case: Case) -> tuple[str, float]:
    """A bar of a round length, at most a fifth of the slide: what it says, and its percentage of the width."""
    width = case.slide.dimensions[0] * case.slide.require_mpp()
    power = 10.0 ** np.floor(np.log10(width / 5))
    um = float(max((step * power for step in (2, 5) if step * power <= width / 5), default=power))
    return f"{um / 1e3:g} mm" if um >= 1e3 else f"{um:g} µm", 100 * um / width


def _answer(case: Case) -> str:
    label = case.call["label"]
    if label is None:
        return "No tissue was found on this slide, so the model saw none of it."
    share, calibrated = case.call["probability"], case.call["calibrated"]
    how = "calibrated on the run's validation tiles" if calibrated else "not calibrated"
    if not case.lesions:
        return (
            f"No lesion was outlined. Most tiles look {label}; its ten likeliest have a mean probability of "
            f"{share:.2f} ({how})."
        )
    own = [lesion for lesion in case.lesions if lesion.label == label]
    total = sum(lesion.area_um2 for lesion in own)
    words = "one region" if len(own) == 1 else f"{len(own):,} regions"
    return (
        f"Called {label}: {words} of together {area(total)}; the ten likeliest tiles have a mean probability of "
        f"{share:.2f} ({how})."
    )


def _cards(case: Case) -> list[tuple[str, str, str]]:
    if case.call["label"] is None:
        return [("Tiles", "0", "no tissue was found")]
    label, largest = case.call["label"], case.lesions[0] if case.lesions else None
    share = case.call["tile_share"][label]
    mm2 = len(case.tiles) * ((case.grid.tile - case.grid.overlap) * case.grid.mpp / 1e3) ** 2
    return [
        ("Call", label, f"{100 * share:.1f} % of the tiles"),
        ("Probability", f"{case.call['probability']:.2f}", "mean of the ten likeliest tiles"),
        (
            "Largest lesion",
            area(largest.area_um2) if largest else "none",
            f"{largest.label}, {largest.diameter_um / 1e3:.2f} mm across" if largest else "no outline is large enough",
        ),
        (
            "Looked at",
            f"{len(case.tiles):,} tiles",
            f"about {mm2:,.1f} mm² at {case.grid.mpp:g} µm per pixel{_left(case)}",
        ),
    ]


def _left(case: Case) -> str:
    """Where the tiles left a network with exits."""
    if "exit" not in case.tiles or not (case.tiles["exit"] > 0).any():
        return ""
    left = exits_of(case.tiles)
    return "; left at exit " + ", ".join(f"{k}: {100 * share:.0f} %" for k, share in (left / left.sum()).items())


def exits_of(tiles: pd.DataFrame) -> pd.Series[int]:
    """How many tiles left a network with exits at each; without those that only a wide look saw."""
    return tiles["exit"][tiles["exit"] > 0].value_counts().sort_index()


def _over(case: Case) -> Image.Image:
    """The overlay at the thumbnail's size; its last pixels may reach beyond the slide."""
    box = tuple(side / case.l0_pixel for side in case.slide.dimensions)
    picture = Image.fromarray(case.overlay, "RGBA")
    box = (min(box[0], picture.width), min(box[1], picture.height))
    return picture.resize(case.thumbnail.size, Image.Resampling.BILINEAR, box=(0, 0, *box))


def _outlines(case: Case) -> list[dict[str, Any]]:
    """Paths in level-0 pixels, no finer than the thumbnail shows."""
    shapely = require("shapely", "slides")
    fine = case.slide.dimensions[0] / case.thumbnail.width / 2
    drawn = []
    for number, lesion in enumerate(case.lesions[:_DRAWN_LESIONS], 1):
        shape = shapely.simplify(lesion.polygon, fine)
        rings = [ring for part in getattr(shape, "geoms", [shape]) for ring in (part.exterior, *part.interiors)]
        path = " ".join("M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in ring.coords[:-1]) + "Z" for ring in rings)
        drawn.append({"path": path, "color": _hex(case.colors[lesion.label]), "title": f"{number}: {lesion.label}"})
    return drawn


def _lesion_rows(case: Case) -> list[list[str]]:
    return [
        [
            str(number),
            lesion.label,
            area(lesion.area_um2),
            f"{lesion.diameter_um:,.0f}",
            f"{lesion.perimeter_um:,.0f}",
            f"{lesion.probability:.2f}",
            f"{lesion.peak_probability:.2f}",
            f"{lesion.peak[0]:.0f}, {lesion.peak[1]:.0f}",
        ]
        for number, lesion in enumerate(case.lesions[:_SHOWN_LESIONS], 1)
    ]


def _class_rows(case: Case) -> list[list[str]]:
    if case.call["label"] is None:
        return []
    areas = case.call["lesion_area_um2"]
    return [
        [name, f"{100 * case.call['tile_share'][name]:.1f} %", area(areas[name]) if name in areas else "–"]
        for name in case.classes
    ]


def _judged_rows(case: Case) -> list[list[str]]:
    if case.judged is None:
        return []
    each = {"all lesions": case.judged, **case.judged["classes"]}
    return [[name, *(_share(found[metric]) for metric in ("iou", "dice"))] for name, found in each.items()]


def _segmented_rows(case: Case) -> list[list[str]]:
    return [] if case.segmented is None else [[name, area(um2)] for name, um2 in case.segmented["area_um2"].items()]


def _telling(case: Case) -> list[dict[str, Any]]:
    """The tiles on which the call rests, with where the network looked if it says so."""
    evidence = case.call.get("evidence", [])
    if not evidence:
        return []
    pixels = [case.grid.read(case.slide, tile["x"], tile["y"]) for tile in evidence]
    images = np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    maps = answers(case.model, images)
    attention = maps.pop("attention", None)
    shown = []
    for number, (tile, image) in enumerate(zip(evidence, pixels)):
        shown.append(
            {
                "data": _embedded(_small(Image.fromarray(image)), "JPEG"),
                "caption": f"{tile['probability']:.3f} at {tile['x']}, {tile['y']}",
                "attention": "" if attention is None else _faded(image, attention[number]),
                "stages": {name: _faded(image, of[number]) for name, of in maps.items()} if number < _STAGED else {},
            }
        )
    return shown


def _faded(image: NDArray[np.uint8], answer: NDArray[np.float32]) -> str:
    """What the network answers to stays as it is, the rest fades."""
    light = 255 - (255 - image) * (0.15 + 0.85 * answer[..., None])
    return _embedded(_small(Image.fromarray(np.asarray(np.rint(light), np.uint8))), "JPEG")


def _small(picture: Image.Image) -> Image.Image:
    return picture.resize((_TILE_PX, _TILE_PX), Image.Resampling.BILINEAR, reducing_gap=3.0)


def _embedded(picture: Image.Image, kind: str) -> str:
    with io.BytesIO() as file:
        picture.save(file, kind, **({"quality": _QUALITY} if kind == "JPEG" else {}))
        return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _share(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
