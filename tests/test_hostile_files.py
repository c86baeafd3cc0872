"""Pictures, slides, archives, manifests and outlines made to do harm are one clear line, in bounded time and memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from fuzz_targets import assert_line
from PIL import Image
from slide_files import picture, write_jpeg_tiff

from histill.cli import run
from histill.data.archives import read_member, unpack
from histill.data.decode import decode
from histill.data.images import read_images, read_unlabelled
from histill.errors import BadInput
from histill.slides.cut import cut_slides
from histill.slides.geojson import read_geojson
from histill.slides.predict import predict_slides
from histill.slides.regions import read_mask
from histill.slides.slide import open_slide
from histill.slides.view.heat import HeatFile

LIMIT_MB = 400
"""What a reader may take above the interpreter and its libraries where it refuses."""


def refused(work: Callable[[], Any], *words: str, seconds: float = 5.0) -> None:
    """One line that holds the words, before the time is over (of the processor: the machine may be busy)."""
    began = time.process_time()
    with pytest.raises(BadInput) as caught:
        work()
    assert time.process_time() - began < seconds
    assert_line(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def bounded(code: str, *arguments: object) -> str:
    """What ``code`` prints for each path, in a process with `LIMIT_MB` of address space above what its imports take."""
    setup = (
        "import sys, resource\nfrom pathlib import Path\nfrom histill.errors import BadInput\n"
        "from histill.data.decode import decode\nfrom histill.data.archives import unpack, read_member\n"
        "from histill.slides.slide import open_slide\nfrom histill.slides.geojson import read_geojson\n"
        "from histill.data.images import read_images\nimport shapely, tifffile, imagecodecs, openslide\n"
        "size = next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmSize')) << 10\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (size + ({LIMIT_MB} << 20),) * 2)\n"
        "for path in map(Path, sys.argv[1:]):\n  try:\n    "
    )
    ending = "\n    print('read')\n  except BadInput as error:\n    print('refused:', error)\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + code + ending, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-600:]
    return done.stdout.strip()


# Pictures.


def png(path: Path, width: int, height: int, kind: int = 2, rows: bytes = b"") -> Path:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_bombs_are_known_by_their_headers(tmp_path: Path) -> None:
    refused(lambda: decode(png(tmp_path / "a.png", 100_000, 100_000)), "a.png", "178,956,970 pixels")
    whole = bytearray(_encoded("JPEG"))
    at = whole.index(b"\xff\xc0")
    whole[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    (tmp_path / "a.jpg").write_bytes(whole)
    refused(lambda: decode(tmp_path / "a.jpg"), "a.jpg", "pixels")
    for kind, place in (("BMP", 18), ("WEBP", None)):
        data = bytearray(_encoded(kind))
        if place:
            data[place : place + 8] = struct.pack("<ii", 100_000, 100_000)
        else:
            data = data[:200]
        (tmp_path / "b").write_bytes(data)
        refused(lambda: decode(tmp_path / "b"), "/b: ")


def _encoded(kind: str) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(picture(40, 40)).save(file, kind)
        return file.getvalue()


def test_a_bomb_within_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", 100, 100, rows=zlib.compress(bytes(300 << 20), 9))
    assert bounded("decode(path)", path) == "read"  # as much as its header says, and no more
    big = zlib.compress(bytes(300 << 20), 9)
    body = path.read_bytes()
    chunk = b"zTXt" + b"Comment\0\0" + big
    path.write_bytes(
        body[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + body[33:]
    )
    assert bounded("decode(path)", path).startswith(("refused", "read"))


def test_postscript_called_png_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    refused(lambda: decode(tmp_path / "a.png"), "a.png: not an image of a known kind")
    with io.BytesIO() as file:
        Image.fromarray(picture(9, 9)).save(file, "PPM")
        (tmp_path / "a.png").write_bytes(file.getvalue())
    refused(lambda: decode(tmp_path / "a.png"), "not an image of a known kind")


def test_a_pipe_called_png_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadInput, match="a pipe"):
        decode(tmp_path / "a.png")


def test_a_phone_s_picture_of_two_is_its_first(tmp_path: Path) -> None:
    first, second = Image.fromarray(picture(40, 40)), Image.fromarray(picture(40, 40, 1))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    decoded = np.asarray(decode(tmp_path / "a.jpg")[0]).astype(int)
    assert np.abs(decoded - picture(40, 40)).mean() < 20


def test_wide_greyscale_in_parts_is_what_it_was_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (37, 23)).astype(np.uint16)
    floats = np.where(values > 60_000, np.nan, values / 65535).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "i.png")
    Image.fromarray(floats).save(tmp_path / "f.tif")
    whole = [np.asarray(decode(tmp_path / name)[0]) for name in ("i.png", "f.tif")]
    assert (whole[0][..., 0] == np.round(values * (255 / 65535))).all()
    assert (whole[1][..., 0] == np.round(np.nan_to_num(floats.astype(float)) * 255)).all()
    monkeypatch.setattr("histill.data.decode._PART_PX", 50)
    for name, before in zip(("i.png", "f.tif"), whole):
        assert (np.asarray(decode(tmp_path / name)[0]) == before).all()


# Slides.


def tiff(path: Path, directories: int, tags: list[tuple[int, int, int, int]], *, shared: bytes = b"") -> Path:
    """Little-endian TIFF: ``directories`` of the same ``(tag, kind, count, value)``, behind ``shared`` bytes at 8."""
    start = 8 + len(shared)
    length = 2 + 12 * len(tags) + 4
    out = bytearray(b"II*\0" + struct.pack("<I", start) + shared)
    for number in range(directories):
        after = start + (number + 1) * length if number + 1 < directories else 0
        out += (
            struct.pack("<H", len(tags))
            + b"".join(struct.pack("<HHII", *tag) for tag in tags)
            + struct.pack("<I", after)
        )
    path.write_bytes(out)
    return path


def test_directories_that_share_what_they_point_to(tmp_path: Path) -> None:
    shared = bytes(4 << 20)
    count = len(shared) // 4
    size = [(256, 4, 1, 256), (257, 4, 1, 256), (322, 4, 1, 256), (323, 4, 1, 256)]
    places = [(324, 4, count, 8), (325, 4, count, 8)]
    one = tiff(tmp_path / "a.tiff", 4000, [*size, *places], shared=shared)
    other = tiff(tmp_path / "b.tiff", 4000, [*size, (270, 2, len(shared), 8)], shared=shared)
    assert max(one.stat().st_size, other.stat().st_size) < 5 << 20
    assert bounded("open_slide(path)", one, other).count("tags of more than") == 2
    refused(
        lambda: open_slide(tiff(tmp_path / "c.tiff", 4000, [*size[:2], *((t, 3, 1, 1) for t in range(600, 1600))])),
        "tags",
    )
    refused(lambda: open_slide(tiff(tmp_path / "d.tiff", 5000, size)), "more than 4096 directories")


@pytest.mark.parametrize(
    ("tags", "word"),
    [
        ([(256, 4, 1, 4_000_000), (257, 4, 1, 4_000_000)], "4,000,000 x 4,000,000 pixels"),
        ([(256, 9, 1, 0xFFFFFFFF), (257, 4, 1, 9)], "damaged"),
        ([(256, 4, 1, 9), (257, 4, 1, 9), (273, 4, 1, 0x7FFFFFFF), (279, 4, 0xFFFFFFFF, 8)], "damaged"),
        ([(256, 4, 1, 9), (257, 4, 1, 9), (273, 4, 1, 0x7FFFFFFF), (279, 4, 1, 0x7FFFFFFF)], ".tiff"),
        ([(256, 4, 1, 9), (257, 4, 1, 9), (322, 4, 1, 16), (323, 4, 1, 16), (324, 1, 1, 8), (325, 4, 1, 8)], "type 1"),
        ([(256, 4, 1, 9), (257, 4, 1, 9), (322, 4, 1, 0), (323, 4, 1, 0x80000000), (324, 4, 1, 8)], "tiles of"),
    ],
)
def test_sizes_and_places_that_cannot_be(tmp_path: Path, tags: list[Any], word: str) -> None:
    refused(lambda: open_slide(tiff(tmp_path / "a.tiff", 1, tags, shared=bytes(64))), word)


def test_descriptions_that_take_long_to_search(tmp_path: Path) -> None:
    for text in ("<OME " + "<Pixels " * 400_000, "<OME <Pixels " + "a" * 3_000_000 + ">", "<OME " + "<a" * 1_000_000):
        path = tmp_path / "a.ome.tiff"
        tifffile.imwrite(path, picture(64, 64), tile=(64, 64), description=text, metadata=None, photometric="rgb")
        began = time.process_time()
        with open_slide(path) as slide:
            assert slide.dimensions == (64, 64)
        assert time.process_time() - began < 5
    text = '<OME <Pixels SizeC="' + "9" * 3000 + '" PhysicalSizeX="1e999" PhysicalSizeXUnit="µm">'
    tifffile.imwrite(path, picture(64, 64), tile=(64, 64), description=text.encode(), metadata=None, photometric="rgb")
    with open_slide(path) as slide:
        assert slide.mpp is None


@pytest.mark.parametrize("name", ["..svs", "...svs"])
def test_a_slide_is_written_under_no_name_that_is_another_folder(tmp_path: Path, name: str) -> None:
    out, slide = tmp_path / "a" / "out", tmp_path / name
    assert (out / slide.stem).resolve() in (out, out.parent)  # the trap
    slide.write_bytes(b"")
    with pytest.raises(BadInput, match="rename it"):
        predict_slides(tmp_path / "model", [slide], out)
    with pytest.raises(BadInput, match="rename it"):
        cut_slides([slide], out)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_a_tile_that_unpacks_to_gigabytes(tmp_path: Path, compression: str) -> None:
    import imagecodecs

    bomb = getattr(imagecodecs, f"{compression}_encode")(bytes(600 << 20))
    path = _one_tile(tmp_path / "a.ome.tiff", bomb, compression)
    assert bounded("s = open_slide(path); s.read(0, 0, 64, 64)", path).startswith(("refused", "read"))


def _one_tile(path: Path, tile: bytes, compression: str) -> Path:
    tifffile.imwrite(
        path,
        iter([tile]),
        shape=(64, 64, 3),
        dtype=np.uint8,
        tile=(64, 64),
        compression=compression,
        photometric="rgb",
        metadata=None,
        description="<OME>",
    )
    return path


def test_a_tile_that_claims_another_size(tmp_path: Path) -> None:
    import imagecodecs

    tile = bytearray(imagecodecs.jpeg2k_encode(picture(64, 64)))
    at = tile.index(b"\xff\x4f\xff\x51") + 8
    tile[at : at + 8] = struct.pack(">II", 60_000, 60_000)
    path = _one_tile(tmp_path / "a.ome.tiff", bytes(tile), "jpeg2000")
    assert "claims another size" in bounded("open_slide(path).read(0, 0, 64, 64)", path)
    path = tmp_path / "g.ome.tiff"
    tifffile.imwrite(
        path, picture(64, 64)[..., 0], tile=(64, 64), compression="jpeg", description="<OME>", metadata=None
    )
    data = path.read_bytes()
    at = data.index(b"\xff\xc0")
    path.write_bytes(data[: at + 5] + struct.pack(">HH", 65_000, 65_000) + data[at + 9 :])
    assert "claims another size" in bounded("open_slide(path).read(0, 0, 64, 64)", path)
    tifffile.imwrite(
        path, picture(64, 64), tile=(64, 64), compression="png", description="<OME>", photometric="rgb", metadata=None
    )
    refused(lambda: open_slide(path), "compression 34933 is not read")


def test_a_mask_is_measured_before_it_is_decoded(tmp_path: Path) -> None:
    slide = open_slide(write_jpeg_tiff(tmp_path / "s.tiff", [picture(128, 128)]))
    refused(lambda: read_mask(png(tmp_path / "m.png", 30_000, 30_000), slide), "too large for a mask")
    refused(lambda: read_mask(png(tmp_path / "m.png", 30_000, 100, kind=0), slide), "do not cover")


def test_a_map_of_a_stranger(tmp_path: Path) -> None:
    path = tiff(tmp_path / "heatmap.ome.tiff", 5000, [(256, 4, 1, 9), (257, 4, 1, 9)])
    refused(lambda: HeatFile(path, 16.0), "more than 4096 directories")


# Archives.


def test_a_tar_of_nothing_but_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tarfile.TarInfo("a/b")
    info.type = tarfile.DIRTYPE
    block = info.tobuf()
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        for _ in range(300):
            file.write(block * 256)
    monkeypatch.setattr("histill.data.archives._MOST_FILES", 1000)
    refused(lambda: unpack(tmp_path / "a.tar.gz", tmp_path / "out"), "1,000 members", seconds=20)
    monkeypatch.setattr("histill.data.archives._MOST_FILES", 10**9)
    refused(lambda: unpack(tmp_path / "a.tar.gz", tmp_path / "out"), "decompression bomb", seconds=20)
    assert not (tmp_path / "out").exists()


def test_a_tar_header_of_gigabytes(tmp_path: Path) -> None:
    zeros, paths = gzip.compress(bytes(600 << 20), 1), []
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        info = tarfile.TarInfo("h")
        info.type, info.size = kind, 600 << 20
        paths.append(tmp_path / f"{kind!r}.tar.gz")
        paths[-1].write_bytes(gzip.compress(info.tobuf()) + zeros)
    for code in ("unpack(path, path.with_name('out'))", "read_member(path, 'a', 'an archive', 100)"):
        lines = bounded(code, *paths).splitlines()
        assert len(lines) == 3
        assert all(line.startswith("refused: ") and "header of" in line for line in lines), lines


def test_sizes_that_lie(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.bin", bytes(1 << 20))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    place = data.index(b"PK\x01\x02") + 24
    data[place : place + 4] = struct.pack("<I", 5)
    (tmp_path / "a.zip").write_bytes(data)
    refused(lambda: unpack(tmp_path / "a.zip", tmp_path / "out"), "a.bin")
    data[place : place + 4] = struct.pack("<I", 1 << 31)
    (tmp_path / "a.zip").write_bytes(data)
    unpack(tmp_path / "a.zip", tmp_path / "whole")
    assert (tmp_path / "whole" / "a.bin").read_bytes() == bytes(1 << 20)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        info = tarfile.TarInfo("b")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    data = bytearray((tmp_path / "b.tar").read_bytes())
    data[124:136] = b"77777777777\0"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    (tmp_path / "b.tar").write_bytes(data)
    refused(lambda: unpack(tmp_path / "b.tar", tmp_path / "out"), "b.tar")
    refused(lambda: read_member(tmp_path / "b.tar", "c", "an archive", 9), "b.tar")


def test_a_name_as_long_as_it_likes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x" * 5000, b"1")
    refused(lambda: unpack(tmp_path / "a.zip", tmp_path / "out"), "too long a name")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"]


# Manifests.


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        Image.fromarray(picture(9, 9, ord(name))).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("path,label\n../../etc/passwd,x\n", "lies outside"),
        ("path,label\n/etc/passwd,x\n", "lies outside"),
        ("path,label\nb/../../x.png,x\n", "lies outside"),
        ("path,label\nhttps://evil.example/a.png,x\n", "not a file's path"),
        ("path,label\nfile:///etc/passwd,x\n", "not a file's path"),
        ("path,label\na\0.png,x\n", "not a file's path"),
        ("path,label\na.png,\x1b]0;owned\x07\nb.png,y\n", "control characters"),
        ("path,label,patient\na.png,x,p\x9b2J\nb.png,y,q\n", "control characters"),
        ("path,label\na.png," + "x" * 100_000 + "\nb.png,y\n", "100,000 characters"),
        ("path,label" + ",c" * 30_000 + "\na.png,x\n", "more than 1,000 columns"),
        ('"path\n' + "," * 3_000_000 + '"', "no end"),
        ("path,label,label\na.png,x,y\n", "there twice"),
        ("path,label\na.png,x,y,z\n", "not a CSV manifest"),
        ('path,label\n"a.png,x\n', "manifest"),
    ],
)
def test_manifests_made_to_do_harm(two: Path, text: str, word: str) -> None:
    (two / "m.csv").write_text(text, encoding="utf-8", newline="")
    refused(lambda: read_images(two / "m.csv"), "m.csv", word)


def test_encodings_and_packing_are_not_guessed(two: Path) -> None:
    text = "path,label\na.png,x\nb.png,y\n"
    (two / "m.csv").write_text(text, encoding="utf-16")
    refused(lambda: read_images(two / "m.csv"), "not UTF-8")
    (two / "m.csv.gz").write_bytes(gzip.compress(text.encode()))
    refused(lambda: read_images(two / "m.csv.gz"), "not UTF-8")


def test_links_out_of_the_folder_are_said(two: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    away = tmp_path_factory.mktemp("away") / "c.png"
    Image.fromarray(picture(9, 9, 3)).save(away)
    (two / "c.png").symlink_to(away)
    (two / "d").symlink_to(away.parent)
    (two / "e.png").symlink_to(two / "b.png")
    (two / "m.csv").write_text("path,label\na.png,x\nb.png,y\nc.png,x\ne.png,y\n")
    assert any(
        "1 images are links to outside" in line and "c.png" in line for line in read_images(two / "m.csv").notices
    )
    (two / "m.csv").write_text("path,label\na.png,x\nb.png,y\nd/c.png,x\n")
    assert any("d/c.png" in line for line in read_images(two / "m.csv").notices)


def test_names_of_files_and_folders_that_a_terminal_obeys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x\x1b[2J", "y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(picture(9, 9, len(name))).save(tmp_path / "data" / name / "1.png")
    refused(lambda: read_images(tmp_path / "data"), "control characters", "\\x1b")
    refused(lambda: read_unlabelled(tmp_path / "data"), "control characters")
    assert run(["data", "check", str(tmp_path / "none\x1b[31m\nb")]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[31m" in said
    assert said.count("\n") == 1
    assert "\x1b" not in said


# Outlines.


def outlines(path: Path, *rings: Any, kind: str = "Polygon") -> Path:
    features = [{"type": "Feature", "geometry": {"type": kind, "coordinates": [ring]}} for ring in rings]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_outlines_that_cross_themselves_beyond_mending(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tangle = rng.uniform(0, 1000, (4000, 2)).tolist()
    refused(lambda: read_geojson(outlines(tmp_path / "a.geojson", tangle)), "feature 1 crosses itself too often")
    few = [rng.uniform(0, 1000, (300, 2)).tolist() for _ in range(200)]
    refused(lambda: read_geojson(outlines(tmp_path / "a.geojson", *few)), "too often", seconds=20)
    turn = np.linspace(0, 2 * np.pi, 3000)
    ring = np.stack([500 + 400 * np.cos(turn), 500 + 400 * np.sin(turn)], 1)
    ring[[10, 11]] = ring[[11, 10]]
    assert len(read_geojson(outlines(tmp_path / "a.geojson", ring.tolist()))) == 1  # a slip of the hand is mended


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"type":"Polygon","coordinates":[[[0,0],[NaN,1],[1,1]]]}', "not a number of pixels"),
        ('{"type":"Polygon","coordinates":[[[0,0],[Infinity,1],[1,1]]]}', "not a number of pixels"),
        ('{"type":"Polygon","coordinates":[[[0,0],[1' + "0" * 400 + ",1],[1,1]]]}", "not a number of pixels"),
        ('{"type":"Polygon","coordinates":[[[0,0],["1","1"],[1,1]]]}', "a ring is a list"),
        ('{"type":"Polygon","coordinates":[[[0,0],[true,false],[1,1]]]}', "a ring is a list"),
        ('{"type":"Polygon","coordinates":' + "[" * 100_000 + "]" * 100_000 + "}", "GeoJSON"),
        ('{"type":"Polygon","coordinates":{"a":1}}', "lists of rings"),
        ('{"type":"GeometryCollection","geometries":[{"type":"GeometryCollection","geometries":[]}]}', "within"),
        ('{"type":"Feature","geometry":7}', "type None"),
        ('{"type":"Feature","geometry":null,"properties":{"name":"\\ud800"}}', "surrogates"),
        ("9" * 5000, "GeoJSON"),
    ],
)
def test_outlines_that_are_none(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "a.geojson").write_text(text)
    refused(lambda: read_geojson(tmp_path / "a.geojson"), "a.geojson", word)


def test_outlines_that_swell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = json.dumps([["x" * 1_000_000, 0], *([[0, 0]] * 20_000)])
    (tmp_path / "a.geojson").write_text('{"type":"Polygon","coordinates":[' + ring + "]}")
    assert "a ring is a list" in bounded("read_geojson(path)", tmp_path / "a.geojson")
    with gzip.open(tmp_path / "b.geojson.gz", "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b" " * (1 << 20))
    refused(lambda: read_geojson(tmp_path / "b.geojson.gz"), "more than 256 MB")
