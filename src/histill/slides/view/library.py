"""What there is to see: the slides under a folder that `histill slide` wrote, found once, when the viewer starts.

Whatever a browser asks for is looked up here by its name; no path is ever made from what it sends.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histill.errors import BadInput, HistillError, require
from histill.files import read_json
from histill.progress import notice, progress
from histill.slides import Slide, open_slide
from histill.slides.geojson import MOST_BYTES
from histill.slides.slide import MAX_MPP
from histill.slides.view.geometry import DeepZoom
from histill.slides.view.heat import Channel, Difference, Heat, HeatFile, Label
from histill.slides.view.render import Color
from histill.slides.ways import check_directories

__all__ = ["DISAGREEMENT", "Entry", "Layer", "Library"]

DISAGREEMENT = "disagreement"
AGAINST = "against:"
"""Before a class, the layer of the other model."""
MASK = "mask:"
"""Before a class, what was segmented as it."""

_DISAGREEMENT_COLOR = (0, 180, 255)  # unlike stains and classes
_TURNS = 0.5  # a difference by which the answer turns is shown opaque
_PALETTE: Sequence[Color] = ((0, 158, 115), (213, 94, 0), (0, 114, 178), (204, 121, 167), (230, 159, 0), (86, 180, 233))
_OPEN_SLIDES = 16


@dataclass(frozen=True)
class Layer:
    """A map that can be laid over a slide.

    Attributes:
        group: whose it is, as the page says it.
        title: what it is, as the page says it.
        color: RGB.
        heat: its values.
        opaque: from which value on it is drawn opaque.
    """

    group: str
    title: str
    color: Color
    heat: Heat
    opaque: float = 1.0


@dataclass(frozen=True, eq=False)
class Entry:
    """A slide and what was predicted on it.

    Attributes:
        name: the name of its folder, by which it is asked for.
        slide_path: the slide's file.
        mpp: microns per level-0 pixel, None where unknown.
        zoom: its grid.
        classes: their names.
        layers: by name; classes, those of the other model, and how far the two lie apart.
        first: the layers that are shown at first.
        threshold: from which probability on the lesions were outlined.
        lesions: the outlines' file.
        version: changes when any of the files does.
    """

    name: str
    slide_path: Path
    mpp: float | None
    zoom: DeepZoom
    classes: tuple[str, ...]
    layers: Mapping[str, Layer]
    first: tuple[str, ...]
    threshold: float
    lesions: Path | None
    version: str
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def describe(self) -> dict[str, Any]:
        """What the page needs to know."""
        return {
            "name": self.name,
            "file": self.slide_path.name,
            "width": self.zoom.width,
            "height": self.zoom.height,
            "levels": self.zoom.last + 1,
            "mpp": self.mpp,
            "lesions": self.lesions is not None,
            "version": self.version,
            "threshold": self.threshold,
            "layers": [
                {
                    "name": name,
                    "group": layer.group,
                    "title": layer.title,
                    "color": list(layer.color),
                    "pixel": layer.heat.pixel,
                    "shown": name in self.first,
                    "of_probability": name != DISAGREEMENT,
                }
                for name, layer in self.layers.items()
            ],
        }


class Library:
    """The slides of a folder, in the order of their names, some of them open.

    Args:
        folder: holds a folder per slide, or is one.
        against: the same of another model, whose maps are shown beside and subtracted.

    Raises:
        BadInput: no such folder, or no slide in it.
    """

    def __init__(self, folder: Path, against: Path | None = None) -> None:
        self.folder, self.against = folder, against
        places, others = _folders(folder), _folders(against) if against is not None else {}
        if against is not None and (folder / "slide.json").is_file() and (against / "slide.json").is_file():
            others = dict(zip(places, others.values()))  # one slide's folders, whatever their names
        self.entries: dict[str, Entry] = {}
        with progress("slides", len(places), "slides") as bar:
            for name, place in places.items():
                try:
                    self.entries[name] = _entry(name, place, folder, others.get(name), against)
                except HistillError as error:
                    notice(f"left out: {error}")
                bar.advance()
        if not self.entries:
            raise BadInput(f"{folder} holds no slide that can be shown; write one with histill slide MODEL SLIDE --out")
        if against is not None and not set(others) & set(self.entries):
            raise BadInput(f"{against} has none of the slides of {folder}")
        self._open: dict[str, Slide] = {}
        self._lock = threading.Lock()

    def slide(self, entry: Entry) -> Slide:
        """The open slide of an entry; the longest open is left to the garbage collector where many are open."""
        with self._lock:
            if entry.name in self._open:
                return self._open[entry.name]
        with entry._lock:  # opened once, however many ask
            with self._lock:
                if entry.name in self._open:
                    return self._open[entry.name]
            slide = open_slide(entry.slide_path, mpp=entry.mpp)
            with self._lock:
                self._open[entry.name] = slide
                if len(self._open) > _OPEN_SLIDES:
                    self._open.pop(next(iter(self._open)))
            return slide


def _folders(root: Path) -> dict[str, Path]:
    """Folders with a ``slide.json`` that lie in ``root`` or are it; links that lead out of it are not followed."""
    if not root.is_dir():
        raise BadInput(f"{root} is not a folder; give what histill slide wrote with --out")
    places = [root] if (root / "slide.json").is_file() else sorted(root.iterdir())
    found = {}
    for place in places:
        if not place.is_dir() or not (place / "slide.json").is_file():
            continue
        if _inside(place / "slide.json", root):
            found[place.resolve().name if place == root else place.name] = place
        else:
            notice(f"left out: {place} leads out of {root}")
    return found


def _inside(path: Path, root: Path) -> bool:
    """Whether ``path``, links followed, is a file under ``root``."""
    return path.is_file() and path.resolve().is_relative_to(root.resolve())


def _entry(name: str, place: Path, root: Path, other: Path | None, against: Path | None) -> Entry:
    said = _said(place)
    slide_path = Path(said["path"])
    if not slide_path.is_absolute():
        slide_path = place / slide_path
    with open_slide(slide_path, mpp=said["mpp"]) as slide:
        size, mpp = slide.dimensions, slide.mpp
    if size != said["dimensions"]:
        raise BadInput(
            f"{place}: {slide_path.name} is {size[0]} x {size[1]}, the prediction {said['dimensions'][0]} x "
            f"{said['dimensions'][1]} pixels; run histill slide again"
        )
    files = [slide_path, place / "slide.json"]
    layers: dict[str, Layer] = {}
    mine = _map(place / "heatmap.ome.tiff", root, said, size)
    if mine is not None:
        files.append(mine.path)
        layers = _classes(mine, said, root.resolve().name)
    first = tuple(label for label in said["lesions"] or said["classes"][1:] or said["classes"] if label in layers)
    mask = _map(place / "mask.ome.tiff", root, said, size)
    if mask is not None:
        files.append(mask.path)
        title = f"{root.resolve().name}, segmented"
        for n, label in enumerate(said["classes"], 1):
            layers[MASK + label] = Layer(title, label, said["colors"][label], Label(mask, n))
    if other is not None and against is not None:
        theirs_said = _said(other)
        theirs = _map(other / "heatmap.ome.tiff", against, theirs_said, size)
        if theirs_said["dimensions"] != size:
            notice(f"{name}: {other} is of another slide, and not shown")
        elif theirs is not None:
            files.append(theirs.path)
            title = against.resolve().name
            theirs_said["colors"] |= said["colors"]
            layers |= {AGAINST + label: layer for label, layer in _classes(theirs, theirs_said, title).items()}
            layers |= _disagreement(mine, said, theirs, theirs_said, f"{root.resolve().name} against {title}")
    lesions = next((p for p in (place / "lesions.geojson", place / "lesions.geojson.gz") if _inside(p, root)), None)
    if lesions is not None and lesions.stat().st_size > MOST_BYTES:
        notice(f"left out: {lesions} has more than {MOST_BYTES >> 20} MB")
        lesions = None
    if lesions is not None:
        files.append(lesions)
    return Entry(
        name=name,
        slide_path=slide_path,
        mpp=mpp,
        zoom=DeepZoom(*size),
        classes=tuple(said["classes"]),
        layers=layers,
        first=first,
        threshold=said["threshold"],
        lesions=lesions,
        version=_version(files),
    )


def _classes(heat: HeatFile, said: Mapping[str, Any], group: str) -> dict[str, Layer]:
    labels = said["classes"][: heat.channels]
    return {label: Layer(group, label, said["colors"][label], Channel(heat, n)) for n, label in enumerate(labels)}


def _disagreement(
    mine: HeatFile | None, said: Mapping[str, Any], theirs: HeatFile, theirs_said: Mapping[str, Any], group: str
) -> dict[str, Layer]:
    """The layer, or none where the two models share no class."""
    if mine is None:
        return {}
    channels = {label: n for n, label in enumerate(theirs_said["classes"][: theirs.channels])}
    both = [(n, channels[label]) for n, label in enumerate(said["classes"][: mine.channels]) if label in channels]
    if not both:
        notice(f"{mine.path} and {theirs.path} share no class, so they are not subtracted")
        return {}
    return {DISAGREEMENT: Layer(group, DISAGREEMENT, _DISAGREEMENT_COLOR, Difference(mine, theirs, both), _TURNS)}


def _said(place: Path) -> dict[str, Any]:
    """``slide.json``, checked."""
    path = place / "slide.json"
    said = read_json(path)
    wrong = f"{path} is not what histill slide writes"
    if not isinstance(said, dict) or not isinstance(said.get("path"), str) or not said["path"]:
        raise BadInput(f"{wrong}: no path of the slide")
    size = said.get("dimensions")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise BadInput(f"{wrong}: dimensions are not two numbers of pixels")
    classes = said.get("classes")
    if not isinstance(classes, list) or not all(isinstance(label, str) and label for label in classes):
        raise BadInput(f"{wrong}: classes are not a list of names")
    mpp = said.get("mpp")
    if mpp is not None and not (type(mpp) in (int, float) and 0 < mpp <= MAX_MPP):
        raise BadInput(f"{wrong}: mpp is not a number of microns")
    settings = said.get("settings") if isinstance(said.get("settings"), dict) else {}
    threshold, lesions = settings.get("threshold"), settings.get("lesions")  # type: ignore[union-attr]
    colors = said.get("colors") if isinstance(said.get("colors"), dict) else {}
    return {
        "path": said["path"],
        "dimensions": tuple(size),
        "classes": classes,
        "mpp": mpp,
        "threshold": float(threshold) if isinstance(threshold, (int, float)) and 0 < threshold < 1 else 0.5,
        "lesions": [label for label in classes if label in lesions] if isinstance(lesions, list) else [],
        "colors": {
            label: _color(colors.get(label), _PALETTE[n % len(_PALETTE)])  # type: ignore[union-attr]
            for n, label in enumerate(classes)
        },
    }


def _color(said: Any, otherwise: Color) -> Color:
    if isinstance(said, list) and len(said) == 3 and all(type(c) is int and 0 <= c <= 255 for c in said):
        return said[0], said[1], said[2]
    return otherwise


def _map(path: Path, root: Path, said: Mapping[str, Any], size: tuple[int, int]) -> HeatFile | None:
    """A map of a slide, or none where its folder has none."""
    return HeatFile(path, _l0_pixel(path, said["mpp"], size)) if _inside(path, root) else None


def _l0_pixel(path: Path, mpp: float | None, size: tuple[int, int]) -> float:
    """Level-0 pixels that a pixel of the map is wide: by its resolution, else by its size."""
    tifffile = require("tifffile", "slides")
    check_directories(path)
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            width, height = page.imagewidth, page.imagelength
            above, below = page.tags["XResolution"].value if "XResolution" in page.tags else (0, 1)
            unit = int(page.tags["ResolutionUnit"].value) if "ResolutionUnit" in page.tags else 0
    except Exception as error:  # noqa: BLE001 - tifffile raises what it meets
        raise BadInput(f"{path}: not a TIFF that can be read ({error})") from None
    by_size: float = max(size[0] / width, size[1] / height)
    if mpp and unit == 3 and above and below:
        pixel = 1e4 * below / above / mpp
        if abs(width * pixel - size[0]) <= 2 * pixel and abs(height * pixel - size[1]) <= 2 * pixel:
            return float(pixel)
    return by_size


def _version(files: Sequence[Path]) -> str:
    """A short name of the files as they are now."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
