"""A picture of what was read: classes, sizes, copies, near-copies, unreadable files, a contact sheet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from histill.data.decode import decode
from histill.data.images import Images, few
from histill.errors import BadInput
from histill.files import atomic, write_json
from histill.progress import progress

__all__ = ["Check", "check"]

_NEAR = 8
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
        lines = [f"{s['images']} images, {len(s['classes'])} classes, {unit}", "", _grid(s["counts"]), ""]
        lines.append(f"sizes {s['sizes']['smallest']} to {s['sizes']['largest']} px, median {s['sizes']['median']}")
        lines += [f"note: {line}" for line in s["notices"]]
        lines += [f"error: {line}" for line in self.errors] or ["nothing that would stop a training"]
        return "\n".join(lines)


def check(images: Images, out: Path | None = None) -> Check:
    """Open every image and look.

    Two pictures are near-copies where their 256-bit difference hashes (dHash: the sign of the horizontal gradient of a
    17 x 16 reduction) differ in 8 bits or fewer. A turned or re-cut copy is not found.

    Args:
        images: a table with or without splits.
        out: a folder for ``check.json`` and the contact sheet ``images.png``.
    """
    with progress("looking", len(images)) as bar, ThreadPoolExecutor() as pool:
        looks = []
        for look in pool.map(_look, images.paths()):
            looks.append(look)
            bar.advance()
    frame = images.frame.assign(**pd.DataFrame(looks).to_dict("list"))
    readable = frame[frame["error"] == ""]
    if not len(readable):
        raise BadInput(f"{images.root}: none of {len(frame)} images is readable")
    notices, errors = list(images.notices), []
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
        "patients": int(images.frame["patient"].nunique()) if images.has_patients else 0,
        "counts": _counts(frame),
        "sizes": {"smallest": int(sides[0]), "median": int(np.median(sides)), "largest": int(sides[-1])},
        "unreadable": bad["error"].tolist(),
        "copies": copies,
        "near_copies": near,
        "notices": notices,
        "errors": errors,
    }
    if out is not None:
        write_json(out / "check.json", summary)
        _contact_sheet(images, readable, out / "images.png")
    return Check(summary, tuple(errors))


def _look(path: Path) -> dict[str, Any]:
    try:
        picture, mode = decode(path)
    except BadInput as error:
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
    """Pairs of copies and of near-copies."""
    frame = frame.reset_index(drop=True)
    copies: list[dict[str, Any]] = []
    for _, group in frame.groupby("pixels"):
        first, *others = group.index
        copies += [_pair(frame, first, other, 0) for other in others]
    hashed = frame[[d is not None for d in frame["dhash"]]]
    bits = np.stack(hashed["dhash"].tolist()) if len(hashed) else np.zeros((0, 32), np.uint8)
    near: list[dict[str, Any]] = []
    for row in range(len(bits)):
        apart = _BITS[bits[row] ^ bits[row + 1 :]].sum(1)
        for other in np.flatnonzero(apart <= _NEAR) + row + 1:
            a, b = hashed.index[row], hashed.index[other]
            if frame["pixels"][a] != frame["pixels"][b]:
                near.append(_pair(frame, a, b, int(apart[other - row - 1])))
    return copies, near


_BITS: NDArray[np.uint8] = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


def _pair(frame: pd.DataFrame, a: int, b: int, apart: int) -> dict[str, Any]:
    both = frame.loc[[a, b]]
    return {c + "s": both[c].tolist() for c in ("path", "label", "split")} | {"bits_apart": apart}


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
    """Some images of each class, a row each, chosen evenly over the table."""
    columns, side = _SHEET
    margin = 18
    sheet = Image.new("RGB", (columns * side, len(images.classes) * (side + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(images.classes):
        paths = readable["path"][readable["label"] == label].tolist()
        draw.text((4, row * (side + margin) + 3), f"{label} ({len(paths)})", fill="black")
        chosen = [paths[int(i)] for i in np.linspace(0, len(paths) - 1, min(columns, len(paths)))]
        for column, name in enumerate(chosen):
            picture = decode(images.root / name)[0]
            picture.thumbnail((side - 2, side - 2))
            sheet.paste(picture, (column * side, row * (side + margin) + margin))
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")
