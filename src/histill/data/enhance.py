"""Images made larger before anything else is done with them: by a super-resolution network, or plainly resampled.

KD_ConvNeXt puts all of its photographs through Real-ESRGAN first. Any single-image network that spandrel knows will do
(`pip install 'histill[enhance]'`); no weights come with Histill.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from histill.data.decode import MAX_PIXELS, decode
from histill.data.images import few, images_below, read_manifest
from histill.errors import BadInput, require
from histill.files import atomic, file_digest, locked, read_json, write_json
from histill.progress import notice, progress

__all__ = ["OVERLAP", "enhance"]

OVERLAP = 32
"""Pixels around a tile that the network sees and that are then cut away, so that no seam shows.

A network that looks no further than this gives the same pixels whole and in tiles. Real-ESRGAN's RRDBNet has a
receptive field of some 350 pixels: there the two agree as far as what lies beyond 32 pixels does not matter to it.
"""

Enlarge: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""``(H, W, 3)`` -> ``(s H, s W, 3)``."""


def enhance(
    images: str | Path,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    scale: int | None = None,
    tile: int = 512,
    device: str = "auto",
    strict: bool = False,
) -> Path:
    """Write every image enlarged, as PNG, in the same folders below ``out``; and the manifest, where one came.

    What is there already is not done again, so a call that was interrupted is simply repeated.

    Args:
        images: a folder, searched through, or a CSV manifest with a column ``path``.
        out: the folder to write to; never that of the images.
        weights: a ``.safetensors`` or ``.pth`` file of a network that spandrel knows (Real-ESRGAN, SwinIR, ...);
            without it images are resampled (Lanczos), which adds no detail.
        scale: how many times as wide and high (default: the network's own; 2 without one). Where it is not the
            network's own, its output is resampled to it.
        tile: side in pixels of what the network sees at once; larger images are cut, with `OVERLAP` pixels around.
        device: auto, cpu, cuda or mps.
        strict: an unreadable image is an error; otherwise it is left out with a notice.

    Returns:
        What the other commands take as ``--data``: ``out``, or the manifest in it.

    Raises:
        BadInput: no images, an ``out`` that holds something else, weights that are no such network, ``strict`` and an
            unreadable image, or none that is readable.
    """
    images, out = Path(images), Path(out)
    table = _listed(images)
    root = images if images.is_dir() else images.parent
    targets = [out / Path(path).with_suffix(".png") for path in table["path"]]
    _check_place(images, root, out, table["path"].tolist(), targets)
    if tile < 2 * OVERLAP or (scale is not None and scale < 1):
        raise BadInput(
            f"--tile {tile} and --scale {scale}: a tile has {2 * OVERLAP} pixels or more, a scale is above 0"
        )
    if weights is None:
        notice("no --weights: images are resampled (Lanczos), which adds no detail")
        scale = scale or 2
        enlarge = _resampled(scale)
    else:
        enlarge, scale = _network(Path(weights), scale, tile, device)
    with locked(out):
        _check_same(out, {"weights": None if weights is None else file_digest(Path(weights)), "scale": scale})
        for left in out.rglob(".*.tmp"):
            left.unlink()
        done = [target.exists() for target in targets]
        failed: dict[str, str] = {}
        with progress("enhancing", len(targets), done=sum(done)) as bar:
            for path, target in ((p, t) for p, t, there in zip(table["path"], targets, done, strict=True) if not there):
                try:
                    _one(root / path, target, enlarge, scale)
                except BadInput as error:
                    if strict:
                        raise
                    failed[path] = str(error)
                bar.advance()
        if len(failed) == len(targets):
            raise BadInput(f"{images}: none of {len(targets)} images could be enhanced: {few(failed.values(), 1)}")
        if failed:
            notice(f"{len(failed)} images were left out: {few(failed.values())}")
        if images.is_dir():
            return out
        kept = table[~table["path"].isin(failed)]
        kept = kept.assign(path=[Path(path).with_suffix(".png").as_posix() for path in kept["path"]])
        with atomic(out / images.name) as temporary:
            kept.to_csv(temporary, index=False)
        return out / images.name


def _listed(images: Path) -> pd.DataFrame:
    """A row per image: its path, and the columns of a manifest that say something."""
    if images.is_dir():
        table = pd.DataFrame({"path": [path.relative_to(images).as_posix() for path in images_below(images)]})
    elif images.is_file():
        table = read_manifest(images, needed=("path",)).drop_duplicates()
        table = table[[column for column in table if (table[column] != "").any()]]
        if "mask" in table:
            notice("masks are not enlarged: the column mask is left out")
            table = table.drop(columns="mask")
    else:
        raise BadInput(f"{images}: no such folder or manifest")
    if not len(table):
        raise BadInput(f"{images}: no images in it")
    return table


def _check_place(images: Path, root: Path, out: Path, paths: list[str], targets: list[Path]) -> None:
    """Refuse an ``out`` where images would be overwritten, or found again as images to enhance."""
    if images.is_dir() and out.resolve().is_relative_to(root.resolve()):
        raise BadInput(f"{out} lies in {images}, whose images are enhanced: give a folder beside it")
    there = {os.path.realpath(root / path) for path in paths}
    if over := [target for target in targets if os.path.realpath(target) in there]:
        raise BadInput(f"{len(over)} images would be written over: {few(over)}; give another folder")
    twice = pd.Series(targets)[pd.Series(targets).duplicated()]
    if len(twice):
        raise BadInput(f"{images}: {len(twice)} images are listed twice or differ by their suffix alone: {few(twice)}")


def _check_same(out: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but images enhanced in the same way."""
    record = out / "enhance.json"
    if record.exists():
        there = read_json(record)
        if there != settings:
            raise BadInput(f"{out} holds images enhanced otherwise ({there}); give another folder")
    elif any(path.name != ".lock" for path in out.iterdir()):
        raise BadInput(f"{out} is not empty; give another folder")
    else:
        write_json(record, settings)


def _one(path: Path, target: Path, enlarge: Enlarge, scale: int) -> None:
    picture, _ = decode(path)
    if picture.width * picture.height * scale**2 > MAX_PIXELS:
        raise BadInput(f"{path}: more than {MAX_PIXELS:,} pixels at {scale} times the size; give a smaller --scale")
    with atomic(target) as temporary:
        Image.fromarray(enlarge(np.asarray(picture))).save(temporary, format="PNG")


def _resampled(scale: int) -> Enlarge:
    def enlarge(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = (scale * pixels.shape[1], scale * pixels.shape[0])
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))

    return enlarge


def _network(weights: Path, scale: int | None, tile: int, device: str) -> tuple[Enlarge, int]:
    """A super-resolution network, and the scale of what comes out."""
    import torch

    from histill.machine import find_device

    network = _load(weights, str(find_device(device)))
    scale = scale or int(network.scale)

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        images = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).to(network.device)[None].float().div(255)
        return np.asarray(network(images)[0].mul(255).round().byte().permute(1, 2, 0).cpu().numpy())

    def enlarge(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        large = tiled(run, pixels, int(network.scale), tile)
        if scale == network.scale:
            return large
        size = (scale * pixels.shape[1], scale * pixels.shape[0])
        return np.asarray(Image.fromarray(large).resize(size, Image.Resampling.LANCZOS))

    return enlarge, scale


def tiled(run: Enlarge, pixels: NDArray[np.uint8], scale: int, tile: int) -> NDArray[np.uint8]:
    """``run`` on tiles of at most ``tile`` pixels, of which `OVERLAP` on each inner side are cut away again."""
    height, width = pixels.shape[:2]
    if max(height, width) <= tile:
        return run(pixels)
    large = np.empty((scale * height, scale * width, 3), np.uint8)
    step = tile - 2 * OVERLAP
    for top in range(0, height, step):
        for left in range(0, width, step):
            bottom, right = min(top + step, height), min(left + step, width)
            y, x = max(top - OVERLAP, 0), max(left - OVERLAP, 0)
            seen = run(pixels[y : bottom + OVERLAP, x : right + OVERLAP])
            core = seen[scale * (top - y) : scale * (bottom - y), scale * (left - x) : scale * (right - x)]
            large[scale * top : scale * bottom, scale * left : scale * right] = core
    return large


def _load(weights: Path, device: str) -> Any:
    """The network of a weight file, by the names and shapes in it; nothing is unpickled but tensors."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    import histill.models._torchvision  # noqa: F401 (before spandrel, which imports torchvision)

    spandrel = require("spandrel", "enhance")
    if not weights.is_file():
        raise BadInput(f"--weights {weights}: no such file")
    try:
        state = (
            load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, "cpu", weights_only=True)
        )
        network = spandrel.ModelLoader(device).load_from_state_dict(spandrel.canonicalize_state_dict(state))
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, AttributeError):
        raise BadInput(f"--weights {weights}: damaged, or not a safe weight file (.safetensors, .pth)") from None
    except spandrel.UnsupportedModelError:
        raise BadInput(f"--weights {weights}: not a network that spandrel knows") from None
    plain = isinstance(network, spandrel.ImageModelDescriptor)  # others want a mask too
    if not plain or (network.input_channels, network.output_channels) != (3, 3):
        raise BadInput(f"--weights {weights}: {network.architecture.name} does not map RGB images to RGB images")
    return network.eval()
