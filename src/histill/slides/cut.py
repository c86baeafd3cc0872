"""Training patches from slides: ``histill tiles``. A grid, a mask that says what is in each patch, two presets.

``lesion`` cuts what the MAC-ResNet paper learns from (Huang et al., J. Pers. Med. 2023, 13:89): 512 px at 20x, half
overlapping, kept where more than 3/4 is one lesion, and without patches whose PNG is smaller than 330 kB. The bytes
stand for "too little tissue" and depend on the encoder, so that the share of tissue is asked for as well.
``pretrain`` cuts what the RCKD paper pretrains on (Kim et al., Bioengineering 2023, 10:1279): 1024 px at 20x side by
side, of a mean intensity from 50 to 245.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.data.images import few
from histill.errors import BadInput, Failed, HistillError
from histill.files import atomic, locked, read_json, sweep, write_json
from histill.progress import notice, progress, say
from histill.slides.grid import Grid
from histill.slides.regions import GEOJSON, class_name, is_geojson, paint, read_mask
from histill.slides.slide import Slide, check_name, open_slide
from histill.slides.tiles import Pixels
from histill.slides.tissue import find_tissue

__all__ = ["PRESETS", "Cut", "Cutting", "cut_slides", "find_slides", "mask_names"]

COLUMNS = ("path", "label", "patient", "site", "slide", "mpp", "x", "y")
TCGA = re.compile(r"^(TCGA-(\w\w)-\w{4})")
"""A TCGA barcode: its first 12 characters are the patient, the second field is the hospital."""

_MOST_MASK_PX = 1 << 26  # of a mask painted from GeoJSON
_MASK_PX_PER_TILE = 128  # along a side
_AT_ONCE = 64  # patches that wait to be encoded


@dataclass(frozen=True)
class Cut:
    """What is cut out and kept.

    Attributes:
        mpp: microns per pixel of a patch.
        tile: its side in pixels.
        stride: from one patch to the next, in pixels.
        share: a patch belongs to a class that covers more than this of it.
        min_tissue: the share of it that must be tissue; 0: tissue is not looked for.
        min_kb: kilobytes (1000 bytes) that its PNG must have, of the preset's tile (of another, by its area); 0: any.
        intensity: its mean, of all channels, must lie within.
        background: the label of patches in which nothing is marked; empty: they are left out.
    """

    mpp: float = 0.5
    tile: int = 512
    stride: int = 256
    share: float = 0.75
    min_tissue: float = 0.5
    min_kb: float = 330.0
    intensity: tuple[float, float] = (0.0, 255.0)
    background: str = "background"

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.tile:
            raise BadInput(f"--stride {self.stride}: 1 to {self.tile}, which is --tile")
        if not 0 <= self.share < 1:
            raise BadInput(f"--share {self.share:g}: from 0 to below 1")
        if self.min_kb < 0:
            raise BadInput(f"--min-kb {self.min_kb:g}: not negative")

    @property
    def grid(self) -> Grid:
        """Where patches may lie."""
        return Grid(self.mpp, self.tile, self.tile - self.stride, self.min_tissue)


PRESETS = {
    "lesion": Cut(),
    "pretrain": Cut(tile=1024, stride=1024, min_tissue=0.0, min_kb=0.0, intensity=(50.0, 245.0), background=""),
}


@dataclass(frozen=True)
class Cutting:
    """What came of it: patches by label, why others were left out, and which slides failed."""

    out: Path
    patches: dict[str, int]
    left_out: dict[str, int]
    slides: int
    failed: dict[str, str]

    def __str__(self) -> str:
        kept = ", ".join(f"{count:,} {label or 'unlabelled'}" for label, count in sorted(self.patches.items()))
        cut, noun = sum(self.patches.values()), "slide" if self.slides == 1 else "slides"
        lines = [f"{cut:,} patches of {self.slides} {noun} in {self.out}: {kept or 'none'}"]
        if self.left_out:
            lines.append("left out: " + ", ".join(f"{n:,} {why}" for why, n in sorted(self.left_out.items())))
        return "\n".join(lines)


def cut_slides(
    slides: Sequence[Path],
    out: Path,
    *,
    masks: Path | None = None,
    preset: Literal["lesion", "pretrain"] | None = None,
    classes: Sequence[str] = (),
    label: str | None = None,
    patient: str | None = None,
    site: str | None = None,
    slide_mpp: float | None = None,
    workers: int | None = None,
    **changes: Any,
) -> Cutting:
    """Cut patches out of ``slides`` into ``out``, with a ``manifest.csv`` that `histill.data.read_images` takes.

    A slide that is done is not cut again, so that a killed command goes on where it stopped, and slides may be added.

    Args:
        slides: files that `open_slide` reads, or folders of them.
        out: a folder; patches lie in ``out/LABEL/SLIDE_X_Y.png`` (unlabelled: ``out/SLIDE/...``).
        masks: a folder with a mask for each slide, ``SLIDE.png`` (values are classes, 0 is none) or ``SLIDE.geojson``;
            ``SLIDE.mask.png`` and ``SLIDE_mask.png`` will do.
        preset: what is cut, by default ``lesion`` with masks and ``pretrain`` without.
        classes: names of a mask image's values from 1 on; in GeoJSON the classes that are used, by default all.
        label: a regular expression that reads a slide's class off its path, for masks that say only where a lesion is.
        patient: a regular expression that reads the patient off a slide's path; by default a TCGA barcode's, else the
            slide's name.
        site: the same for where it was scanned; by default a TCGA barcode's hospital.
        slide_mpp: the slides' microns per pixel, where the files do not say.
        workers: patches encoded at once, by default a thread per processor.
        **changes: to the preset, fields of `Cut`; None changes nothing.

    Raises:
        BadInput: no slide, two of one name, other arguments than ``out`` was begun with.
        Failed: some slides could not be cut; the others were.
    """
    chosen = preset or ("lesion" if masks else "pretrain")
    if chosen == "lesion" and masks is None:
        raise BadInput("the preset lesion needs --masks DIR, which say where lesions are; or take --preset pretrain")
    if masks is not None and not masks.is_dir():
        raise BadInput(f"--masks {masks}: no such folder")
    changes = {name: value for name, value in changes.items() if value is not None}
    of = PRESETS[chosen]
    if "stride" not in changes:  # patches of another size overlap by as much
        changes["stride"] = max(1, changes.get("tile", of.tile) * of.stride // of.tile)
    rule = replace(of, **changes)
    if "min_kb" not in changes:
        rule = replace(rule, min_kb=rule.min_kb * (rule.tile / of.tile) ** 2)
    rule.grid  # noqa: B018 - complains of a tile that cannot be
    found = find_slides(slides)
    readers = {"label": _reader("--label", label), "patient": _reader("--patient", patient)}
    readers["site"] = _reader("--site", site)
    how: dict[str, Any] = {
        "cut": asdict(rule) | {"intensity": list(rule.intensity)},
        "classes": list(classes),
        "label": label,
        "patient": patient,
        "site": site,
        "slide_mpp": slide_mpp,
        "masks": masks is not None,
    }
    failed: dict[str, str] = {}
    with locked(out):
        for folder in (out, *(p for p in out.iterdir() if p.is_dir())):
            sweep(folder)
        begun = out / ".cut.json"
        if begun.exists():
            if read_json(begun) != how:
                raise BadInput(f"{out} holds patches cut with other arguments; give another --out or the same ones")
        elif (out / "manifest.csv").exists():
            raise BadInput(f"{out} has a manifest.csv that is not of patches cut here; give another --out")
        else:
            write_json(begun, how)
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            for number, path in enumerate(found, 1):
                try:
                    names = {key: read(path) for key, read in readers.items()}
                    where = f"{path.stem} ({number} of {len(found)})"
                    _cut_slide(path, out, rule, masks, tuple(classes), names, slide_mpp, pool, where)
                except (HistillError, OSError) as error:
                    failed[str(path)] = " ".join(str(error).split())
                    say(f"{path.name} failed: {failed[str(path)]}")
        done = _finish(out)
    result = replace(done, failed=failed)
    if failed:
        others = f"; the others are in {out}" if len(failed) < len(found) else ""
        raise Failed(f"{len(failed)} of {len(found)} slides failed: {few(failed.values(), 3)}{others}")
    if not sum(result.patches.values()):
        raise Failed(f"no patch was kept; left out: {few(f'{n} {why}' for why, n in result.left_out.items())}")
    return result


def mask_names(home: Path) -> list[str]:
    """What the values 1, 2, ... of mask images were called when patches were cut into ``home``."""
    begun = home / ".cut.json"
    named = read_json(begun)["classes"] if begun.is_file() else []
    return list(named) or [f"class{value}" for value in range(1, 255)]


def find_slides(given: Sequence[Path]) -> list[Path]:
    """The slides that files and folders stand for; `BadInput` where there is none, or two of one name."""
    found = []
    for path in map(Path, given):
        if path.is_dir() and not any(path.glob("*.dcm")):
            below = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and not _is_mask(p))
            if not below:
                raise BadInput(f"{path}: no slides in it ({', '.join(sorted(_SUFFIXES))})")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise BadInput(f"{path}: no such slide")
    if not found:
        raise BadInput("no slides were given")
    for path in found:
        check_name(path)
    if again := sorted(name for name, count in Counter(p.stem for p in found).items() if count > 1):
        raise BadInput(f"{len(again)} names belong to two slides: {few(again)}; rename them or use another --out")
    return found


_SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .mrxs .scn .vms .vmu .svslide .bif .czi .dcm .png .jpg .jpeg".split()  # noqa: SIM905
)


def _is_mask(path: Path) -> bool:
    return path.stem.lower().endswith((".mask", "_mask"))


def _reader(flag: str, pattern: str | None) -> Any:
    """A function of a slide's path -> what the pattern's first group (or all of it) finds there."""
    if pattern is None:
        return lambda path: ""
    try:
        find = re.compile(pattern)
    except re.error as error:
        raise BadInput(f"{flag} {pattern!r}: not a regular expression ({error})") from None

    def read(path: Path) -> str:
        match = find.search(path.as_posix())
        if not match or not (name := match[min(find.groups, 1)]):
            raise BadInput(f"{path}: {flag} {pattern!r} finds nothing in it")
        return str(name)

    return read


def _mask_of(path: Path, masks: Path) -> Path:
    """The one file in ``masks`` that is called like the slide."""
    endings = (".png", ".tif", ".tiff", *GEOJSON)
    there: list[Path] = []
    for name in (f"{path.stem}.mask", f"{path.stem}_mask", path.stem):
        there = there or [p for e in endings if (p := masks / f"{name}{e}").is_file() and p.resolve() != path.resolve()]
    if len(there) != 1:
        what = f"{len(there)} masks ({few(p.name for p in there)})" if there else "no mask"
        raise BadInput(f"{path.name}: {what} in {masks}; one is needed, such as {path.stem}.png or {path.stem}.geojson")
    return there[0]


class _Place(NamedTuple):
    """A patch in level-0 pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class _Marked:
    """A map of classes over a slide: numbers, 0 for none, and their names from 1 on."""

    values: NDArray[np.uint8]
    names: dict[int, str]
    downsample: tuple[float, float]

    def label(self, place: _Place, share: float) -> str | None:
        """The class of more than ``share`` of a patch: "" where nothing is marked in it, None where it is neither."""
        x, y, width, height = place
        rows, of_rows = _cover(y / self.downsample[1], height / self.downsample[1], self.values.shape[0])
        columns, of_columns = _cover(x / self.downsample[0], width / self.downsample[0], self.values.shape[1])
        part = self.values[rows, columns]
        present = np.unique(part)
        if not present.any():
            return ""
        for value in present[present > 0]:
            if of_rows @ (part == value) @ of_columns > share:
                return self.names.get(int(value))
        return None


def _cover(start: float, length: float, most: int) -> tuple[slice, NDArray[np.float64]]:
    """The pixels that an interval touches, and the share of the interval that lies in each."""
    first, last = max(0, int(np.floor(start + 1e-6))), min(most, int(np.ceil(start + length - 1e-6)))
    edges = np.arange(first, last + 1)
    inside = np.minimum(edges[1:], start + length) - np.maximum(edges[:-1], start)
    return slice(first, last), np.clip(inside, 0, 1) / length


def _marked(slide: Slide, mask: Path, classes: tuple[str, ...], label: str, l0_tile: float) -> _Marked:
    width, height = slide.dimensions
    if not is_geojson(mask):
        values = read_mask(mask, slide)
        present = [int(v) for v in np.unique(values) if v]
        if present == [255]:  # how black and white is saved
            values, present = np.minimum(values, 1), [1]
        names = {v: class_name(classes[v - 1] if v <= len(classes) else label or f"class{v}") for v in present}
        if classes and max(present, default=0) > len(classes):
            raise BadInput(f"{mask}: value {max(present)} has no name; --classes names {len(classes)}")
        return _Marked(values, names, (width / values.shape[1], height / values.shape[0]))
    from histill.slides.geojson import read_geojson

    shapes: dict[str, list[Any]] = {}
    for feature in read_geojson(mask):
        name = class_name(label or feature.label or "lesion")
        shapes.setdefault(name, []).append(feature.shape)
    if len(shapes) > 255:
        raise BadInput(f"{mask}: {len(shapes)} classes; 255 can be told apart")
    down = max(1.0, l0_tile / _MASK_PX_PER_TILE, (width * height / _MOST_MASK_PX) ** 0.5)
    size = max(1, round(height / down)), max(1, round(width / down))
    values = np.zeros(size, np.uint8)
    scale = (width / size[1], height / size[0])
    names = dict(enumerate(sorted(shapes), 1))
    for value, name in names.items():
        paint(values, shapes[name], scale, value)
    wanted = {class_name(c) for c in classes}
    return _Marked(values, {v: n for v, n in names.items() if not wanted or n in wanted}, scale)


def _cut_slide(
    path: Path,
    out: Path,
    rule: Cut,
    masks: Path | None,
    classes: tuple[str, ...],
    names: dict[str, str],
    slide_mpp: float | None,
    pool: ThreadPoolExecutor,
    where: str,
) -> None:
    """Cut one slide; its rows are written last, and a slide that has them is done."""
    record = out / ".slides" / f"{path.stem}.json"
    with open_slide(path, slide_mpp) as slide:
        if record.exists():
            if _record(record)["digest"] != slide.digest:
                raise BadInput(f"{path}: {out} holds patches of another slide of this name")
            return
        for remark in slide.remarks:
            notice(f"{path.name}: {remark}")
        grid = rule.grid
        table = grid.tiles(slide, find_tissue(slide) if rule.min_tissue > 0 else None)
        width, height = slide.dimensions
        inside = (table["x"] + table["width"] <= width) & (table["y"] + table["height"] <= height)
        left_out = Counter({"beyond the edge": int((~inside).sum())})
        places = [_Place(*map(int, row)) for row in table[inside].to_numpy()]
        labels = [""] * len(places)
        if masks is not None:
            marked = _marked(slide, _mask_of(path, masks), classes, names["label"], grid.plan(slide).l0_span)
            found = [marked.label(place, rule.share) for place in places]
            left_out["between classes"] = sum(label is None for label in found)
            left_out["unmarked"] = sum(label == "" for label in found) if not rule.background else 0
            kept = [(p, label or rule.background) for p, label in zip(places, found) if label is not None]
            kept = [(place, label) for place, label in kept if label]
            places, labels = [place for place, _ in kept], [label for _, label in kept]

        def one(task: tuple[_Place, str]) -> dict[str, str] | str:
            (x, y, _, _), label = task
            pixels = grid.read(slide, x, y)
            if not rule.intensity[0] <= pixels.mean() <= rule.intensity[1]:
                return "of another intensity"
            data = _png(pixels)
            if len(data) < 1000 * rule.min_kb:
                return f"below {rule.min_kb:g} kB"
            place = f"{label or path.stem}/{path.stem}_{x}_{y}.png"
            with atomic(out / place) as temporary:
                temporary.write_bytes(data)
            return {"path": place, "label": label, "x": str(x), "y": str(y)}

        rows = []
        with progress(where, len(places), "patches") as bar:
            for result in _in_turn(pool, one, list(zip(places, labels))):
                if isinstance(result, str):
                    left_out[result] += 1
                else:
                    rows.append(result)
                bar.advance()
        known = TCGA.match(path.stem)
        person = names["patient"] or (known[1] if known else path.stem)
        site = names["site"] or (known[2] if known else "")
        of_slide = {"patient": person, "site": site, "slide": path.name, "mpp": f"{rule.mpp:g}"}
        rows = [row | of_slide for row in rows]
        write_json(record, {"digest": slide.digest, "left_out": {k: n for k, n in left_out.items() if n}, "rows": rows})


def _record(path: Path) -> dict[str, Any]:
    """What was kept of a slide that is done; `BadInput` where it is not what is written here."""
    found = read_json(path)
    kinds = {"digest": str, "left_out": dict, "rows": list}
    sound = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    if not sound or not all(isinstance(row, dict) and set(row) <= set(COLUMNS) for row in found["rows"]):
        raise BadInput(f"{path} is no record of a slide's patches; remove it, and the slide is cut again")
    return dict(found)


def _in_turn(pool: ThreadPoolExecutor, function: Any, tasks: list[Any]) -> Iterator[Any]:
    """Results in order, with few tasks waiting: patches of a whole slide do not fit into memory."""
    for start in range(0, len(tasks), _AT_ONCE):
        yield from pool.map(function, tasks[start : start + _AT_ONCE])


def _png(pixels: Pixels) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


def _finish(out: Path) -> Cutting:
    """The manifest of every slide that is done."""
    patches: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    records = sorted((out / ".slides").glob("*.json"))
    with atomic(out / "manifest.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record in records:
            found = _record(record)
            left_out.update(found["left_out"])
            for row in found["rows"]:
                patches[row["label"]] += 1
                writer.writerow(row)
    return Cutting(out, dict(patches), dict(left_out), len(records), {})
