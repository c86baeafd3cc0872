"""Small whole files of every kind that is read, which fuzzing bends."""

from __future__ import annotations

import io
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import tifffile
import torch
from PIL import Image
from safetensors.torch import save_file
from slide_files import picture, write_jpeg_tiff

__all__ = ["archives", "embeddings", "pictures", "slides", "weights"]


@cache
def slides() -> list[tuple[bytes, tuple[int, int]]]:
    """Small slides, and where in them the directories lie."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.tiff"
        two = [picture(150, 200), picture(75, 100)]
        svs = "Aperio Image Library v11.2.1\n200x150 |AppMag = 20|MPP = 0.5"
        for options in (
            {},
            {"tables": True, "bigtiff": True},
            {"rgb": True, "byteorder": ">"},
            {"description": svs, "missing": (1,)},
            {"subsampling": "4:4:4", "halved": (2,), "description": svs},
        ):
            write_jpeg_tiff(path, two, **options)
            found.append(path.read_bytes())
        for compression in ("zlib", "lzw", "jpeg2000", None, "webp", "zstd", "packbits", "lzma", "png", "jpegxl"):
            tifffile.imwrite(
                path,
                two[0],
                tile=(64, 64),
                photometric="rgb",
                compression=compression,
                metadata=None,
                resolution=(20000, 20000),
                resolutionunit="CENTIMETER",
            )
            found.append(path.read_bytes())
        for compression in ("zlib", "jpeg"):
            with tifffile.TiffWriter(path, ome=True) as file:
                options = {"tile": (64, 64), "compression": compression, "photometric": "rgb"}
                file.write(two[0], subifds=1, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, **options)
                file.write(two[1], subfiletype=1, **options)
            found.append(path.read_bytes())
        tifffile.imwrite(path, two[0][..., 0], tile=(64, 64), compression="jpeg")
        found.append(path.read_bytes())
        tifffile.imwrite(path, two[0][:100, :100])
        found.append(path.read_bytes())
    return [(data, _directory(data)) for data in found]


def _directory(data: bytes) -> tuple[int, int]:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first = file.pages.first.offset
        return first, min(len(data), first + 20 * len(file.pages.first.tags) + 16)


@cache
def weights() -> list[tuple[str, bytes]]:
    tensors = {"conv.weight": torch.zeros(2, 3), "head.bias": torch.ones(4, dtype=torch.float16)}
    found = []
    for value in (tensors, {"state_dict": tensors}, {"model": {"model": tensors}}):
        for new in (True, False):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=new)
            found.append((".pt", file.getvalue()))
    with tempfile.TemporaryDirectory() as place:
        save_file(tensors, f"{place}/a.safetensors")
        found.append((".safetensors", Path(place, "a.safetensors").read_bytes()))
    return found


@cache
def embeddings() -> list[tuple[str, bytes]]:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    h5 = io.BytesIO()
    with h5py.File(h5, "w") as file:
        file["features"], file["coords"] = values, np.arange(8).reshape(4, 2)
    lists, columns, npy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    names = ["a", "b", "c", "d"]
    pd.DataFrame({"image": names, "embedding": list(values)}).to_parquet(lists)
    pd.DataFrame({"image": names, **{str(n): values[:, n] for n in range(3)}}).to_parquet(columns)
    np.save(npy, values)
    return [
        (".h5", h5.getvalue()),
        (".parquet", lists.getvalue()),
        (".parquet", columns.getvalue()),
        (".npy", npy.getvalue()),
    ]


@cache
def archives() -> list[bytes]:
    found = []
    members = {"a/one.txt": b"one" * 50, "a/two.bin": bytes(2000), "b.csv": b"path,label\n"}
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        found.append(file.getvalue())
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        for layout in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode=mode, format=layout) as tar:
                for name, data in {**members, "é" * 60 + "/" + "x" * 99: b"long"}.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                link = tarfile.TarInfo("a/link")
                link.type, link.linkname = tarfile.SYMTYPE, "one.txt"
                tar.addfile(link)
            found.append(file.getvalue())
    return found


@cache
def pictures() -> list[bytes]:
    found = []
    rgb = Image.fromarray(picture(20, 30))
    for kind, options in (
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("WEBP", {}),
    ):
        file = io.BytesIO()
        rgb.save(file, kind, **options)
        found.append(file.getvalue())
    for mode in ("P", "I;16", "LA", "1", "CMYK"):
        file = io.BytesIO()
        (rgb.convert("L").convert("I").convert(mode) if mode == "I;16" else rgb.convert(mode)).save(
            file, "TIFF" if mode == "CMYK" else "PNG"
        )
        found.append(file.getvalue())
    return found
