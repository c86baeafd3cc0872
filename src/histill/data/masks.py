"""Images with masks: a class for each pixel, or the nucleus that it is in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from histill.data.decode import EXTENSIONS, FORMATS
from histill.data.images import (
    COLUMNS,
    Images,
    check_leaks,
    contents_of,
    few,
    frame_of,
    given_path,
    images_below,
    of_each,
    passed_over,
    patients_of,
    read_manifest,
)
from histill.data.mapped import mapped
from histill.errors import BadInput
from histill.files import atomic, cache_dir, check_room, claim, digest, file_digest, locked, sweep

__all__ = ["UNKNOWN", "decode_mask", "has_masks", "pack_masks", "read_masks", "shares_of"]

UNKNOWN = 65535
"""What a packed mask holds where nobody knows; -1 in a batch."""

_VERSION = 2
_ORIENTATION = 0x0112
_FOLDERS = {"images": "masks", "image": "mask", "img": "mask", "imgs": "masks"}

Kind = Literal["auto", "classes", "instances"]


class _Seen(NamedTuple):
    content: str
    highest: int
    marked: bool
    wide: bool
    sizes: tuple[tuple[int, int], tuple[int, int]]


def has_masks(source: str | Path) -> bool:
    """Whether ``source`` is a folder of ``images/`` and ``masks/``, or a manifest with masks and without labels."""
    source = Path(source)
    if source.is_dir():
        return _pair(source) is not None
    if not source.is_file():
        return False
    try:
        with source.open(encoding="utf-8-sig") as file:
            header = {name.strip().strip('"').lower() for name in file.readline().split(",")}
    except UnicodeDecodeError:
        return False
    return "mask" in header and "label" not in header


def read_masks(
    source: str | Path, *, kind: Kind = "auto", classes: tuple[str, ...] = (), patient: str | None = None
) -> Images:
    """Read images with masks: a folder of ``images/`` and ``masks/`` with the same names, or a CSV manifest.

    A mask is a single-channel picture as large as its image. Of ``classes`` it holds class numbers from 0; 255 is the
    second of two classes, and a pixel that nobody knows of more. Of ``instances`` it holds the numbers of nuclei (8 or
    16 bits), 0 between them.

    Args:
        source: the folder, or a CSV file with ``path,mask`` and optional ``label,patient,split,site``.
        kind: what the masks hold; ``auto``: instances where a mask has 16 bits, else classes.
        classes: names of the classes 0, 1, ...; by default background and foreground, or
            background and nucleus, or ``class0`` and so on.
        patient: a regular expression that reads the patient off an image's relative path.

    Raises:
        BadInput: as `read_images`; also a mask that is missing, unreadable, of another size than its image, or holds
            more classes than there are names.
    """
    source = given_path(source, "read_masks")
    if source.is_dir():
        root, frame = source, _from_folders(source)
    elif source.is_file():
        root, frame = source.parent, read_manifest(source, needed=("path", "mask"))
    else:
        raise BadInput(f"--data {source}: no such folder or manifest")
    if patient is not None:
        frame["patient"] = patients_of(frame["path"], patient)
    frame["content"] = contents_of([root / path for path in frame["path"]])
    seen = list(of_each(range(len(frame)), partial(_see, root, frame), "reading masks"))
    frame["mask_content"] = [one.content for one in seen]
    if odd := [path for path, one in zip(frame["mask"], seen) if one.sizes[0] != one.sizes[1]]:
        raise BadInput(f"{source}: {len(odd)} masks are not as large as their images: {few(odd)}")
    found: Literal["classes", "instances"] = (
        kind if kind != "auto" else "instances" if any(one.wide for one in seen) else "classes"
    )
    highest = max(one.highest for one in seen)
    if found == "classes" and highest == 1 and len(classes) < 3 and any(one.marked for one in seen):
        raise BadInput(f"{source}: the masks hold 0, 1 and 255; is 255 a class or unknown? Write 0 and 255, or name 3")
    names = _named(source, found, classes, highest)
    notices = passed_over(source)
    copies = frame[frame.duplicated(["content", "split"], keep=False)]
    if len(copies):
        notices.append(f"{len(copies)} files are copies of one another within a split: {few(copies['path'])}")
    images = Images(frame[list(COLUMNS)].reset_index(drop=True), root, names, tuple(notices), found)
    check_leaks(images)
    return images


def _named(source: Path, kind: str, classes: tuple[str, ...], highest: int) -> tuple[str, ...]:
    if kind == "instances":
        if classes and len(classes) != 2:
            raise BadInput(f"--classes {' '.join(classes)}: masks of instances have two, what is between them and them")
        return tuple(classes) or ("background", "nucleus")
    numbers = max(2, highest + 1)
    if not classes:
        return ("background", "foreground") if numbers == 2 else tuple(f"class{i}" for i in range(numbers))
    if len(set(classes)) < len(classes):
        raise BadInput(f"--classes {' '.join(classes)}: a name is there twice")
    if len(classes) < numbers:
        raise BadInput(f"{source}: a mask holds class {highest}, and --classes names {len(classes)}, from 0")
    return tuple(classes)


def _see(root: Path, frame: pd.DataFrame, row: int) -> _Seen:
    path, mask = root / frame["path"].iloc[row], root / frame["mask"].iloc[row]
    values, mode = _open(mask)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            turned = picture.getexif().get(_ORIENTATION, 1)
            size = picture.size
        if turned != 1:
            raise BadInput(f"{path}: turned by its EXIF tag, and its mask is not; save it upright")
    except (OSError, Image.DecompressionBombError):
        size = (values.shape[1], values.shape[0])  # unreadable: the pack says so
    held = np.unique(values)
    if mask.suffix.lower() in (".jpg", ".jpeg") and len(held) > 2:
        raise BadInput(f"{mask}: JPEG changes the numbers of a mask, and this one holds {len(held)}; save it as PNG")
    highest = int(held[held != 255].max(initial=0))
    sizes = (size, (values.shape[1], values.shape[0]))
    return _Seen(file_digest(mask), highest, bool((held == 255).any()), mode.startswith("I"), sizes)


def _open(path: Path) -> tuple[NDArray[np.int32], str]:
    try:
        with Image.open(path, formats=FORMATS) as picture:
            mode, values = picture.mode, np.asarray(picture)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such mask") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: not a readable mask ({error})") from None
    if values.ndim == 3:
        colours = values[..., :3]
        if (colours != colours[..., :1]).any():
            raise BadInput(f"{path}: a coloured mask; give one channel of class numbers or instance numbers")
        values = colours[..., 0]
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() > UNKNOWN:
        raise BadInput(f"{path}: a mask holds numbers from 0 to {UNKNOWN}, this one {values.min()} to {values.max()}")
    return values.astype(np.int32), mode


def decode_mask(path: Path, images: Images) -> NDArray[np.uint16]:
    """``(H, W)``: class or instance numbers, `UNKNOWN` where nobody knows.

    Raises:
        BadInput: the mask is missing, unreadable, or holds a class without a name.
    """
    values, _ = _open(path)
    if images.masks == "classes":
        values = np.where(values == 255, 1 if len(images.classes) == 2 else UNKNOWN, values)
        if (wrong := values[(values >= len(images.classes)) & (values != UNKNOWN)]).size:
            raise BadInput(
                f"{path}: class {int(wrong.max())}, where the classes are {', '.join(images.classes)}, from 0"
            )
    return values.astype(np.uint16)


def pack_masks(images: Images, size: int, folder: Path | None = None) -> NDArray[np.uint16]:
    """``(N, size, size)``: every mask once, memory-mapped: of classes the commonest under each pixel, of instances the
    nearest (which at an even reduction lies a quarter of a pixel off).
    """
    key = digest([_VERSION, size, images.masks, len(images.classes), images.frame["mask_content"].tolist()])[:24]
    home = (folder or cache_dir("packed")) / key
    file = home / "masks.npy"
    if not file.exists():
        with locked(home, wait=True):
            if not file.exists():
                sweep(home)
                check_room(home, 2 * len(images) * size * size, f"packing {len(images)} masks")
                shape = (len(images), size, size)
                with atomic(file) as temporary:
                    array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint16, shape=shape)
                    claim(temporary)
                    paths = [images.root / mask for mask in images.frame["mask"]]
                    for row, mask in enumerate(of_each(paths, partial(decode_mask, images=images), "packing masks")):
                        array[row] = _nearest(mask, size) if images.masks == "instances" else _commonest(mask, size)
                    array.flush()
    packed: NDArray[np.uint16] = mapped(file)
    return packed


def _commonest(mask: NDArray[np.uint16], size: int) -> NDArray[np.uint16]:
    """The class of the largest area under each pixel; of equal ones the first."""
    if mask.shape == (size, size):
        return mask
    held = np.unique(mask)
    areas = np.stack([_area(mask == value, size) for value in held])
    return np.asarray(held[areas.argmax(0)])


def _area(part: NDArray[np.bool_], size: int) -> NDArray[np.float64]:
    """``(size, size)``: how much of each pixel is covered."""
    covered = part.astype(np.float64)
    for axis in (0, 1):
        side = covered.shape[axis]
        ends = np.arange(size + 1) * side / size
        whole = np.concatenate([np.zeros_like(covered.take([0], axis)), covered.cumsum(axis)], axis)
        low = np.minimum(ends.astype(int), side - 1)
        share = np.expand_dims(ends - low, 1 - axis)
        at_ends = whole.take(low, axis) * (1 - share) + whole.take(low + 1, axis) * share
        covered = np.diff(at_ends, axis=axis)
    return covered


def _nearest(mask: NDArray[np.uint16], size: int) -> NDArray[np.uint16]:
    rows, columns = (np.floor((np.arange(size) + 0.5) * side / size).astype(int) for side in mask.shape)
    picked: NDArray[np.uint16] = mask[rows[:, None], columns]
    return picked


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """The folders of images and of masks."""
    below = {p.name.lower(): p for p in folder.iterdir() if p.is_dir()}
    for images, masks in _FOLDERS.items():
        if images in below and masks in below:
            return below[images], below[masks]
    return None


def _from_folders(folder: Path) -> pd.DataFrame:
    pair = _pair(folder)
    if pair is None:
        raise BadInput(f"--data {folder}: no images/ and masks/ in it; or give a manifest with path and mask")
    images, masks = pair
    by_stem = {p.relative_to(masks).with_suffix(""): p for p in images_below(masks)}
    paths = images_below(images)
    if not paths:
        raise BadInput(f"{images}: no images ({', '.join(sorted(EXTENSIONS))}) in it")
    if missing := [p.name for p in paths if p.relative_to(images).with_suffix("") not in by_stem]:
        raise BadInput(f"{masks}: {len(missing)} images have no mask of the same name: {few(missing)}")
    return frame_of(
        path=[p.relative_to(folder).as_posix() for p in paths],
        mask=[by_stem[p.relative_to(images).with_suffix("")].relative_to(folder).as_posix() for p in paths],
    )


def shares_of(images: Images) -> tuple[dict[str, float], int]:
    """The share of each class in the pixels of which it is known, and how many nuclei there are."""
    paths = [images.root / mask for mask in images.frame["mask"]]
    nuclei, pixels = 0, np.zeros(len(images.classes))
    for mask in of_each(paths, partial(decode_mask, images=images), "counting"):
        known = mask[mask != UNKNOWN]
        nuclei += len(np.unique(known[known > 0])) if images.masks == "instances" else 0
        pixels += np.bincount(np.minimum(known, len(pixels) - 1).ravel(), minlength=len(pixels))
    return {name: float(share) for name, share in zip(images.classes, pixels / max(pixels.sum(), 1))}, nuclei
