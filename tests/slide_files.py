"""Slides that tests make themselves: tiled TIFF with the JPEG of scanners, and pixels that say where they lie."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histill.slides.slide import Slide
from histill.slides.ways import Way

Pixels = NDArray[np.uint8]


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """Smooth colours with some noise, nowhere the same."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse).astype(int) + rng.integers(-8, 9, (height, width, 3)), 0, 255).astype(np.uint8)


def write_jpeg_tiff(
    path: Path,
    levels: Sequence[Pixels],
    *,
    tile: tuple[int, int] = (64, 64),
    subsampling: str = "4:2:0",
    rgb: bool = False,
    tables: bool = False,
    missing: Sequence[int] = (),
    halved: Sequence[int] = (),
    mpp: tuple[float, float] | None = (0.5, 0.5),
    bigtiff: bool = False,
    byteorder: str = "<",
    description: str | None = None,
) -> Path:
    """A pyramid of JPEG tiles (high, wide): YCbCr or RGB, whole streams or with tables of their own.

    ``missing`` tiles of level 0 have no bytes, ``halved`` ones lack their second half.
    """
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as file:
        for number, level in enumerate(levels):
            streams, shared = _streams(level, tile, subsampling, rgb, tables)
            for lost in missing if number == 0 else ():
                streams[lost] = b""
            for lost in halved if number == 0 else ():
                streams[lost] = streams[lost][: len(streams[lost]) // 2]
            across = {"4:2:0": (2, 2), "4:2:2": (2, 1), "4:4:4": (1, 1)}[subsampling]
            file.write(
                iter(streams),
                shape=level.shape,
                dtype=np.uint8,
                tile=tile,
                photometric="rgb" if rgb else "ycbcr",
                compression="jpeg",
                compressionargs={"outcolorspace": "rgb"} if rgb else None,
                subsampling=None if rgb else across,
                extratags=[(347, 7, len(shared), shared, True)] if tables else [],
                resolution=tuple(1e4 * 2**number / m for m in mpp) if mpp else None,
                resolutionunit="CENTIMETER" if mpp else None,
                subfiletype=int(number > 0),
                description=description if number == 0 else None,
                metadata=None,
            )
    return path


def write_dicom(folder: Path, levels: Sequence[Pixels], *, tile: int = 64, mpp: float = 0.5) -> Path:
    """A series of VL Whole Slide Microscopy instances, one file a level, JPEG baseline (DICOM PS3.3 A.32.8)."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.sequence import Sequence as Items
    from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

    folder.mkdir()
    study, series, frame = (generate_uid() for _ in range(3))
    high, wide = levels[0].shape[:2]
    for number, level in enumerate(levels):
        streams, _ = _streams(level, (tile, tile), "4:2:2", False, False)
        spacing, optics, shared = Dataset(), Dataset(), Dataset()
        spacing.PixelSpacing = [mpp / 1000 * wide / level.shape[1]] * 2  # mm
        optics.OpticalPathIdentifier = "1"
        shared.PixelMeasuresSequence = Items([spacing])
        one = Dataset()
        one.SOPClassUID, one.SOPInstanceUID = VLWholeSlideMicroscopyImageStorage, generate_uid()
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.Modality, one.PatientID, one.InstanceNumber = "SM", "one", number + 1
        one.ImageType = [*(("DERIVED", "PRIMARY") if number else ("ORIGINAL", "PRIMARY")), "VOLUME", "NONE"]
        one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, "YBR_FULL_422", 0
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 8, 8, 7, 0
        one.Rows, one.Columns, one.NumberOfFrames = tile, tile, len(streams)
        one.TotalPixelMatrixRows, one.TotalPixelMatrixColumns = level.shape[:2]
        one.TotalPixelMatrixFocalPlanes = one.NumberOfOpticalPaths = 1
        one.DimensionOrganizationType = "TILED_FULL"
        one.ImagedVolumeHeight, one.ImagedVolumeWidth = high * mpp / 1000, wide * mpp / 1000
        one.SharedFunctionalGroupsSequence, one.OpticalPathSequence = Items([shared]), Items([optics])
        one.PixelData = encapsulate(streams)
        one["PixelData"].VR, one["PixelData"].is_undefined_length = "OB", True
        one.file_meta = FileMetaDataset()
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
        one.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        one.save_as(folder / f"level{number}.dcm", enforce_file_format=True)
    return folder


def _streams(
    level: Pixels, tile: tuple[int, int], subsampling: str, rgb: bool, tables: bool
) -> tuple[list[bytes], bytes]:
    streams, shared = [], b""
    for top in range(0, level.shape[0], tile[0]):
        for left in range(0, level.shape[1], tile[1]):
            part = level[top : top + tile[0], left : left + tile[1]]
            padded = np.pad(part, ((0, tile[0] - part.shape[0]), (0, tile[1] - part.shape[1]), (0, 0)), mode="edge")
            with io.BytesIO() as file:
                how = {"keep_rgb": True} if rgb else {"subsampling": subsampling}
                Image.fromarray(padded).save(file, "JPEG", quality=85, **how)
                stream = file.getvalue()
            if tables:
                shared, stream = _parted(stream)
            streams.append(stream)
    return streams, shared


def _parted(stream: bytes) -> tuple[bytes, bytes]:
    """A JPEG stream as its tables and an abbreviated stream without them."""
    tables = rest = b"\xff\xd8"
    place = 2
    while stream[place + 1] != 0xDA:
        length = 2 + struct.unpack(">H", stream[place + 2 : place + 4])[0]
        segment = stream[place : place + length]
        if stream[place + 1] in (0xDB, 0xC4):
            tables += segment
        elif stream[place + 1] != 0xE0:
            rest += segment
        place += length
    return tables + b"\xff\xd9", rest + stream[place:]


class Places:
    """Pixels that say where they lie: red and green are x and y of the level's pixel, of 256; blue is the level."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.sizes = list(sizes)
        self.asked: list[tuple[int, int, int, int, int]] = []

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        wide, tall = self.sizes[level]
        assert x >= 0
        assert y >= 0
        assert 1 <= width <= wide - x
        assert 1 <= height <= tall - y
        self.asked.append((level, x, y, width, height))
        out = np.empty((height, width, 3), np.uint8)
        out[..., 0] = (np.arange(x, x + width) % 256)[None, :]
        out[..., 1] = (np.arange(y, y + height) % 256)[:, None]
        out[..., 2] = level
        return out

    def close(self) -> None:
        pass


class Ramp(Places):
    """Red and green grow with x and y over the whole slide, so that a resized place can be read off its colour."""

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        super().region(level, x, y, width, height)
        wide, tall = self.sizes[level]
        out = np.zeros((height, width, 3), np.uint8)
        out[..., 0] = np.rint(255 * (np.arange(x, x + width) + 0.5) / wide)[None, :]
        out[..., 1] = np.rint(255 * (np.arange(y, y + height) + 0.5) / tall)[:, None]
        return out


def slide_of(source: Places, mpp: float | None = 0.25, **properties: str) -> Slide:
    """A slide of such pixels."""
    return Slide(Path("slide.svs"), Way(source, "test", "", properties), mpp)
