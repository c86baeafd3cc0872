"""The published weights of StarDist's H&E model, read from Keras's file without TensorFlow.

They are ``weights_best.h5`` in ``python_2D_versatile_he.zip`` of stardist/stardist-models (BSD-3-Clause; trained on
MoNuSeg, CC BY-NC-SA, and TNBC, CC BY), md5 bf34cb3c0e5b3435971e18d66778a4ec.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
import torch
from torch import Tensor

from histill.errors import BadInput
from histill.models.stardist import StarDist
from histill.models.weights import local

__all__ = ["load_keras"]

_FILE = "weights_best.h5"
_LARGEST = 64 << 20  # bytes of the unpacked file; the published one has 6 million
_STEM = ("grid.0", "grid.2")  # Keras numbers them by what else was built: conv2d_1 and conv2d_2, conv2d and conv2d_1
_LAYERS = {
    "down_level_0_no_0": "down.0.0",
    "down_level_0_no_1": "down.0.2",
    "down_level_1_no_0": "down.1.0",
    "down_level_1_no_1": "down.1.2",
    "down_level_2_no_0": "down.2.0",
    "down_level_2_no_1": "down.2.2",
    "middle_0": "middle.0",
    "middle_2": "middle.2",
    "up_level_2_no_0": "up.0.0",
    "up_level_2_no_2": "up.0.2",
    "up_level_1_no_0": "up.1.0",
    "up_level_1_no_2": "up.1.2",
    "up_level_0_no_0": "up.2.0",
    "up_level_0_no_2": "up.2.2",
    "features": "features",
    "prob": "prob",
    "dist": "dist",
}
"""Keras's name of each layer, and ours."""


def load_keras(network: StarDist, weights: str | Path) -> None:
    """Fill ``network`` with the weights of StarDist's Keras model.

    Args:
        network: With as many rays as the file, 32 in the published one, and ``upsample="nearest"``, as it was trained.
        weights: The ``.h5`` file, the published archive or its folder, or ``"https://...#sha256=..."`` or
            ``#md5=...`` of either.

    Raises:
        BadInput: A file that is missing, unreadable, or of another network.
        Failed: The file could not be fetched.
    """
    path = local(weights)
    own, state = network.state_dict(), {}
    with _opened(path) as file:
        layers = _arrays(path, file)
        stem = sorted((name for name in layers if re.fullmatch(r"conv2d(_\d+)?", name)), key=lambda n: (len(n), n))
        if len(stem) != len(_STEM):
            raise BadInput(f"{path} has {len(stem)} layers before its U-Net, not 2: it is no StarDist model of grid 2")
        for theirs, ours in {**dict(zip(stem, _STEM, strict=True)), **_LAYERS}.items():
            for kind, name in (("kernel", f"{ours}.weight"), ("bias", f"{ours}.bias")):
                state[name] = _read(path, layers, theirs, kind, tuple(own[name].shape))
    network.load_state_dict(state)


def _opened(path: Path) -> BinaryIO:
    """The ``.h5`` file, of a folder or an archive the one that was best in validation."""
    if path.is_dir():
        path = path / _FILE
    if not path.is_file():
        raise BadInput(f"there is no weight file {path}: give StarDist's {_FILE}, its folder, or the published .zip")
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    try:
        with zipfile.ZipFile(path) as archive:
            found = [info for info in archive.infolist() if Path(info.filename).name == _FILE]
            if len(found) != 1:
                raise BadInput(f"{path} holds {len(found)} files {_FILE}: give StarDist's published archive")
            with archive.open(found[0]) as member:
                content = member.read(_LARGEST + 1)
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, NotImplementedError, EOFError):
        raise BadInput(f"{path} is a damaged archive: download it again") from None
    if len(content) > _LARGEST:
        raise BadInput(f"{path} unpacks to more than {_LARGEST >> 20} MiB: it is no StarDist model")
    return io.BytesIO(content)


def _arrays(path: Path, file: BinaryIO) -> dict[str, dict[str, h5py.Dataset]]:
    """The file's arrays by layer and kind, not yet read: ``.../down_level_0_no_0/kernel:0``."""
    layers: dict[str, dict[str, h5py.Dataset]] = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        parts = name.split("/")
        if isinstance(item, h5py.Dataset) and len(parts) > 1:
            layers.setdefault(parts[-2], {})[parts[-1].removesuffix(":0")] = item

    try:
        h5py.File(file, "r").visititems(note)  # which follows no link, so nothing of another file is read
    except (OSError, RuntimeError, KeyError, ValueError, UnicodeDecodeError):
        raise BadInput(f"{path} is damaged or no Keras .h5 file: give StarDist's {_FILE}") from None
    return layers


def _read(
    path: Path, layers: dict[str, dict[str, h5py.Dataset]], layer: str, kind: str, shape: tuple[int, ...]
) -> Tensor:
    """One layer's kernel ``(kh, kw, ci, co) -> (co, ci, kh, kw)`` or bias, once its shape is known to fit."""
    data = layers.get(layer, {}).get(kind)
    if data is None:
        raise BadInput(f"{path} has no {layer}/{kind}: it is no StarDist model of 2 dimensions, depth 3 and grid 2")
    expected = (*shape[2:], shape[1], shape[0]) if kind == "kernel" else shape
    if data.shape != expected or data.dtype.kind != "f" or data.is_virtual or data.external:
        raise BadInput(f"{path}: {layer}/{kind} is {data.shape} {data.dtype}, and this network needs floats {expected}")
    try:
        values = np.asarray(data[()], dtype=np.float32)
    except (OSError, RuntimeError, ValueError):
        raise BadInput(f"{path}: {layer}/{kind} cannot be read: the file is damaged") from None
    if not np.isfinite(values).all():
        raise BadInput(f"{path}: {layer}/{kind} holds what is not a number")
    return torch.from_numpy(values.transpose(3, 2, 0, 1).copy() if kind == "kernel" else values)
