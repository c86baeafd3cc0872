"""Whatever an image file holds comes out as upright 8-bit RGB with known values, or as one line that names the file."""

from __future__ import annotations

import errno
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from histill.data.decode import EXTENSIONS, MAX_PIXELS, decode, load, square
from histill.errors import BadInput

GREY = np.array([[0, 10, 100], [128, 200, 255]], np.uint8)
COLOUR = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10


def said(path: Path) -> tuple[NDArray[np.uint8], str]:
    picture, was = decode(path)
    assert picture.mode == "RGB"
    return np.asarray(picture), was


def grey(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.repeat(values[..., None], 3, axis=2)


def saved(tmp_path: Path, picture: Image.Image, name: str = "x.png", **options: object) -> Path:
    picture.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".PNG"])
def test_lossless_rgb_comes_out_as_it_is_and_is_called_plain(tmp_path: Path, suffix: str) -> None:
    assert suffix.lower() in EXTENSIONS
    pixels, was = said(saved(tmp_path, Image.fromarray(COLOUR), f"x{suffix}"))
    np.testing.assert_array_equal(pixels, COLOUR)
    assert was == ""


def test_lossless_webp_and_a_flat_jpeg(tmp_path: Path) -> None:
    np.testing.assert_array_equal(said(saved(tmp_path, Image.fromarray(COLOUR), "x.webp", lossless=True))[0], COLOUR)
    flat = Image.new("RGB", (16, 8), (200, 90, 120))
    assert np.abs(said(saved(tmp_path, flat, "x.jpg", quality=95))[0].astype(int) - (200, 90, 120)).max() <= 2


def test_8_bit_grey_is_repeated_over_the_channels(tmp_path: Path) -> None:
    pixels, was = said(saved(tmp_path, Image.fromarray(GREY)))
    np.testing.assert_array_equal(pixels, grey(GREY))
    assert was == "L"


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    pixels, was = said(saved(tmp_path, Image.fromarray(GREY > 100)))
    np.testing.assert_array_equal(pixels, grey(np.where(GREY > 100, 255, 0)))
    assert was == "1"


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_divided_by_257_however_dark_the_picture(tmp_path: Path, suffix: str) -> None:
    for values in ([[0, 257, 65535], [128 * 257, 300, 1]], [[0, 1, 2], [100, 200, 255]]):
        deep = np.array(values, np.uint16)
        pixels, was = said(saved(tmp_path, Image.fromarray(deep), f"deep{suffix}"))
        np.testing.assert_array_equal(pixels, grey(np.round(deep / 257)))
        assert was.startswith("I;16")


@pytest.mark.parametrize(
    ("dtype", "values", "white"),
    [
        (np.int32, [[0, 10, 255]], 255),
        (np.int32, [[-5, 256, 1000]], 65535),
        (np.int32, [[0, 65536, 131072]], 131072),
        (np.float32, [[0, 0.25, 1]], 1),
        (np.float32, [[0, 128.4, 255]], 255),
        (np.float32, [[np.nan, 100, 200]], 255),
    ],
)
def test_32_bit_grey_takes_the_least_usual_white(
    tmp_path: Path, dtype: type, values: list[list[float]], white: int
) -> None:
    deep = np.array(values, dtype)
    pixels, _ = said(saved(tmp_path, Image.fromarray(deep), "deep.tif"))
    expected = np.clip(np.nan_to_num(deep).astype(np.float64) * 255 / white, 0, 255).round()
    np.testing.assert_array_equal(pixels, grey(expected))


def test_cmyk(tmp_path: Path) -> None:
    ink = np.zeros((2, 2, 4), np.uint8)
    ink[0, 1], ink[1, 0], ink[1, 1] = (255, 0, 0, 0), (0, 0, 0, 255), (0, 255, 255, 0)
    pixels, was = said(saved(tmp_path, Image.frombytes("CMYK", (2, 2), ink.tobytes()), "x.tif"))
    np.testing.assert_array_equal(pixels, [[[255, 255, 255], [0, 255, 255]], [[0, 0, 0], [255, 0, 0]]])
    assert was == "CMYK"
    paper = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    assert said(saved(tmp_path, paper, "x.jpg"))[0].min() >= 253


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8)
    pixels, was = said(saved(tmp_path, Image.fromarray(rgba)))
    np.testing.assert_array_equal(pixels, [[[10, 20, 30], [255, 255, 255], [204, 224, 244]]])  # 0.2 c + 0.8 * 255
    assert was == "RGBA"
    la = np.array([[[40, 255], [40, 0], [0, 51]]], np.uint8)
    pixels, was = said(saved(tmp_path, Image.fromarray(la)))
    np.testing.assert_array_equal(pixels, grey(np.array([[40, 255, 204]])))
    assert was == "LA"


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    pixels, was = said(saved(tmp_path, palette))
    np.testing.assert_array_equal(pixels, [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]])
    assert was == "P"
    pixels, _ = said(saved(tmp_path, palette, "seen_through.png", transparency=1))
    np.testing.assert_array_equal(pixels, [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]])


def test_a_transparent_colour_of_a_plain_rgb_file(tmp_path: Path) -> None:
    pixels, was = said(saved(tmp_path, Image.fromarray(COLOUR), transparency=tuple(int(v) for v in COLOUR[0, 1])))
    expected = COLOUR.copy()
    expected[0, 1] = 255
    np.testing.assert_array_equal(pixels, expected)
    assert was


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation_is_followed(tmp_path: Path, orientation: int, upright: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(COLOUR), exif=exif)
    np.testing.assert_array_equal(said(path)[0], upright(COLOUR))  # type: ignore[operator]


def test_the_first_page_of_a_multi_page_tiff(tmp_path: Path) -> None:
    first, second = Image.fromarray(COLOUR), Image.new("RGB", (4, 2), "red")
    path = saved(tmp_path, first, "pages.tif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(said(path)[0], COLOUR)


def test_a_single_pixel_fills_the_square(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (1, 1), (51, 102, 255)))
    image = load(path, 8)
    assert image.shape == (3, 8, 8)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, np.broadcast_to(np.array([0.2, 0.4, 1.0])[:, None, None], (3, 8, 8)), atol=1e-7)


def test_load_is_decode_and_square_over_255(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels))
    resized = square(Image.fromarray(pixels), 20)
    assert resized.shape == (20, 20, 3)
    np.testing.assert_array_equal(load(path, 20), resized.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(square(Image.fromarray(pixels[:40, :40]), 40), pixels[:40, :40])
    assert abs(resized.mean() - pixels.mean()) < 1


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def damaged(tmp_path: Path) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    jpeg = (tmp_path / "whole.jpg").read_bytes()
    return {
        "empty.png": b"",
        "text.jpg": b"this is no picture",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header.jpg": jpeg[:20],
        "bomb.png": bomb(40_000, 40_000),
        "short.png": bomb(2_000, 2_000),
    }


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives an I/O error")
def test_trouble_of_the_machine_is_told_from_damage_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(BadInput):
        decode(tmp_path / "cut.png")
    with pytest.raises(OSError, match="/proc/self/mem") as caught:
        decode(Path("/proc/self/mem"))
    assert caught.value.errno == errno.EIO
    assert not isinstance(caught.value, BadInput)


def test_what_cannot_be_read_is_one_line_with_the_path(tmp_path: Path) -> None:
    for name, content in damaged(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput) as error:
            decode(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name) + ": ")
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match=r"gone\.png: no such file"):
        decode(tmp_path / "gone.png")
    with pytest.raises(BadInput):
        decode(tmp_path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(40_000, 40_000))
    with pytest.raises(BadInput, match=f"more than {MAX_PIXELS:,} pixels"):
        decode(tmp_path / "bomb.png")


def test_decoding_in_threads_leaves_the_warnings_of_the_process_alone(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(COLOUR))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(decode, [path] * 200))
        warnings.warn("still heard", UserWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["still heard"]
