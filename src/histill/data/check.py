"""A picture of what was read: classes, sizes, copies, near-copies, unreadable files, a contact sheet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from histill.data.decode import decode
from histill.data.images import Images, few, of_each
from histill.data.masks import shares_of
from histill.errors import BadInput
from histill.files import atomic, write_json
from histill.progress import progress

__all__ = ["Check", "check"]

_NEAR = 8
_LISTED = 10_000
_BLOCK = 1024
_SHEET = (8, 96)


@dataclass(frozen=True)
class Check:
    """What `check` found; prints as text.

    Attributes:
        summary: counts by class and split, sizes, modes, and the lists of what is odd, JSON-able.
        errors: what would stop a training, one line each.
    """

    summary: dict[str, Any]
    errors: tuple[str, ...]

    def __str__(self) -> str:
        s = self.summary
        unit = f"{s['patients']} patients" if s["patients"] else "no patients known: intervals will be over images"
        kind = f"masks of {s['masks']}" if s["masks"] else f"{len(s['classes'])} classes"
        lines = [f"{s['images']} images, {kind}, {unit}", "", _grid(s["counts"]), ""]
        if s["masks"]:
            lines.append("pixels " + ", ".join(f"{name} {share:.1%}" for name, share in s["pixels"].items()))
        if s["masks"] == "instances":
            lines.append(f"nuclei {s['nuclei']:,}")
        lines.append(f"sizes {s['sizes']['smallest']} to {s['sizes']['largest']} px, median {s['sizes']['median']}")
        lines += [f"note: {line}" for line in s["notices"]]
        lines += [f"error: {line}" for line in self.errors] or ["nothing that would stop a training"]
        return "\n".join(lines)


def check(images: Images, out: Path | None = None) -> Check:
    """Open every image and look.

    Two pictures are near-copies where their 256-bit difference hashes (dHash: the sign of the horizontal gradient of a
    17 x 16 reduction) differ in 8 bits or fewer. A turned or re-cut copy is not found. Every picture is compared with
    every other: seconds for 20,000, a minute or two for 100,000. The search ends when 10,000 near-copies are found.

    Args:
        images: a table with or without splits.
        out: a folder for ``check.json`` and the contact sheet ``images.png``.
    """
    looks = list(of_each(images.paths(), _look, "looking"))
    table = images.frame.assign(label=images.frame["label"].replace("", "all")) if images.masks else images.frame
    frame = pd.concat([table, pd.DataFrame(looks, index=images.frame.index)], axis=1)
    readable = frame[frame["error"] == ""]
    if not len(readable):
        raise BadInput(f"{images.root}: none of {len(frame)} images is readable")
    notices, errors = list(images.notices), list[str]()
    if len(bad := frame[frame["error"] != ""]):
        notices.append(f"{len(bad)} unreadable images: {few(bad['error'])}")
    if len(odd := readable[readable["mode"] != ""]):
        notices.append(f"{len(odd)} images of another mode: {few(odd['path'] + ' (' + odd['mode'] + ')')}")
    copies, near = _pairs(readable)
    for pairs, what in ((copies, "the same picture"), (near, "nearly the same picture")):
        across = [p for p in pairs if p["splits"][0] != p["splits"][1]]
        within = [p for p in pairs if p["splits"][0] == p["splits"][1]]
        torn = [p for p in pairs if p["labels"][0] != p["labels"][1]]
        if across:
            line = f"leak: {len(across)} pairs of {what} in two splits: {few(_named(across))}"
            (errors if pairs is copies else notices).append(line)
        if within:
            notices.append(f"{len(within)} pairs of {what}: {few(_named(within))}")
        if torn:
            notices.append(f"{len(torn)} pairs of {what} with two labels: {few(_named(torn))}")
    sides = np.sort(readable[["width", "height"]].to_numpy().max(1))
    summary = {
        "root": str(images.root),
        "images": len(images),
        "classes": list(images.classes),
        "masks": images.masks,
        "patients": int(images.frame["patient"].replace("", None).nunique()) if images.has_patients else 0,
        "counts": _counts(frame),
        "sizes": {"smallest": int(sides[0]), "median": int(np.median(sides)), "largest": int(sides[-1])},
        "unreadable": bad["error"].tolist(),
        "copies": copies,
        "near_copies": near,
        "notices": notices,
        "errors": errors,
    }
    if images.masks:
        summary["pixels"], summary["nuclei"] = shares_of(images)
    if out is not None:
        write_json(out / "check.json", summary)
        _contact_sheet(images, readable, out / "images.png")
    return Check(summary, tuple(errors))


def _look(path: Path) -> dict[str, Any]:
    try:
        picture, mode = decode(path)
    except (BadInput, OSError) as error:
        return {"error": str(error), "mode": "", "width": 0, "height": 0, "pixels": "", "dhash": None}
    grey = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    flat = grey.max() - grey.min() < 8  # an empty field is like every other: its hash says nothing
    return {
        "error": "",
        "mode": mode,
        "width": picture.width,
        "height": picture.height,
        "pixels": hash((picture.size, picture.tobytes())),
        "dhash": None if flat else bits,
    }


def _pairs(frame: pd.DataFrame) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs of copies, each with the first of its kind, and of near-copies."""
    rows = list(zip(frame["path"], frame["label"], frame["split"]))
    first: dict[int, int] = {}
    copies = []
    for row, pixels in enumerate(frame["pixels"]):
        if (before := first.setdefault(pixels, row)) != row:
            copies.append(_pair(rows[before], rows[row], 0))
    hashed = [row for pixels, row in first.items() if frame["dhash"].iloc[row] is not None]
    near = [_pair(rows[hashed[a]], rows[hashed[b]], bits) for a, b, bits in _near(frame["dhash"].iloc[hashed].tolist())]
    return copies, near


def _near(hashes: list[NDArray[np.uint8]]) -> list[tuple[int, int, int]]:
    """Pairs of hashes at most `_NEAR` bits apart, ``(row, later row, bits apart)``."""
    if not hashes:
        return []
    # With bits as -1 and 1 the product of two hashes is their length less twice the distance: one matrix product.
    signs = np.unpackbits(np.stack(hashes), axis=1).astype(np.float32) * 2 - 1
    pairs: list[tuple[int, int, int]] = []
    with progress("comparing", len(signs)) as bar:
        for start in range(0, len(signs), _BLOCK):
            apart = (signs.shape[1] - signs[start : start + _BLOCK] @ signs[start:].T) / 2
            for a, b in np.argwhere(np.triu(apart <= _NEAR, 1)):
                pairs.append((start + int(a), start + int(b), int(apart[a, b])))
                if len(pairs) == _LISTED:
                    return pairs
            bar.advance(len(apart))
    return pairs


def _pair(a: tuple[str, ...], b: tuple[str, ...], bits_apart: int) -> dict[str, Any]:
    paths, labels, splits = (list(both) for both in zip(a, b))
    return {"paths": paths, "labels": labels, "splits": splits, "bits_apart": bits_apart}


def _named(pairs: list[dict[str, Any]]) -> list[str]:
    return [" = ".join(pair["paths"]) for pair in pairs]


def _counts(frame: pd.DataFrame) -> dict[str, dict[str, int]]:
    splits = frame["split"].where(frame["split"] != "", "images")
    table = pd.crosstab(frame["label"], splits)
    return {str(label): {str(s): int(n) for s, n in row.items()} for label, row in table.iterrows()}


def _grid(counts: dict[str, dict[str, int]]) -> str:
    splits = sorted({s for row in counts.values() for s in row})
    width = max(len(label) for label in counts) + 2
    lines = [" " * width + "".join(f"{s:>9}" for s in splits)]
    lines += [f"{label:{width}}" + "".join(f"{row.get(s, 0):>9}" for s in splits) for label, row in counts.items()]
    return "\n".join(lines)


def _contact_sheet(images: Images, readable: pd.DataFrame, path: Path) -> None:
    """Some images of each label, a row each, chosen evenly over the table."""
    labels = sorted(set(readable["label"]) | (set() if images.masks else set(images.classes)))
    columns, side = _SHEET
    margin = 18
    sheet = Image.new("RGB", (columns * side, len(labels) * (side + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        paths = readable["path"][readable["label"] == label].tolist()
        draw.text((4, row * (side + margin) + 3), f"{label} ({len(paths)})", fill="black")
        chosen = [paths[int(i)] for i in np.linspace(0, len(paths) - 1, min(columns, len(paths)))]
        for column, name in enumerate(chosen):
            picture = decode(images.root / name)[0]
            picture.thumbnail((side - 2, side - 2))
            sheet.paste(picture, (column * side, row * (side + margin) + margin))
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")
