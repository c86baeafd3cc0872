"""A slide's pixels are OpenSlide's bit for bit, white outside; what a file says of itself is believed within reason."""

from __future__ import annotations

import pickle
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_files import Pixels, Places, picture, slide_of, write_dicom, write_jpeg_tiff

from histill.errors import BadInput
from histill.slides import open_slide
from histill.slides.jpeg_tiles import JpegTiles
from histill.slides.tiles import TileCache

REGIONS = [
    (0, 0, 64, 64),  # a tile
    (128, 64, 64, 64),
    (33, 70, 150, 90),  # parts of several
    (192, 128, 64, 64),  # the corner tile, whose edge is cut
    (150, 130, 200, 100),  # beyond the edge
    (-20, -30, 60, 70),
    (500, 500, 10, 12),  # nothing of it
    (7, 9, 1, 1),
]


def reference(path: Path, x: int, y: int, width: int, height: int, level: int = 0) -> Pixels:
    """OpenSlide's answer over white."""
    with openslide.OpenSlide(path) as slide:
        region = slide.read_region((x, y), level, (width, height))
    white = Image.new("RGB", region.size, (255, 255, 255))
    white.paste(region, mask=region.getchannel("A"))
    return np.asarray(white)


KINDS = {
    "ycbcr 4:2:0": {},
    "ycbcr 4:2:2": {"subsampling": "4:2:2"},
    "ycbcr 4:4:4": {"subsampling": "4:4:4"},
    "rgb": {"rgb": True},
    "tables": {"tables": True},
    "tables, rgb": {"tables": True, "rgb": True},
    "tiles higher than wide": {"tile": (128, 48)},
    "BigTIFF": {"bigtiff": True},
    "a missing tile": {"missing": [5]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_jpeg_tiles_are_openslides_bytes(tmp_path: Path, kind: str) -> None:
    full = picture(170, 230)
    path = write_jpeg_tiff(tmp_path / "a.tiff", [full, full[::2, ::2]], **KINDS[kind])
    with open_slide(path) as slide:
        assert (slide.reader, slide.why) == ("jpeg tiles", "")
        assert (slide.dimensions, slide.level_dimensions) == ((230, 170), ((230, 170), (115, 85)))
        for region in REGIONS:
            assert np.array_equal(slide.read(*region), reference(path, *region)), region
        for x, y, width, height in ((0, 0, 115, 85), (128, 64, 30, 40), (-10, -6, 50, 50)):
            assert np.array_equal(slide.read(x, y, width, height, 1), reference(path, x, y, width, height, 1))
        assert np.abs(slide.read(0, 0, 230, 170)[:60, :60].astype(int) - full[:60, :60]).mean() < 12  # and it is it


def test_the_fast_way_decodes_for_itself(tmp_path: Path) -> None:
    path = write_jpeg_tiff(tmp_path / "a.tiff", [picture(170, 230)])
    with open_slide(path) as slide:
        assert isinstance(slide._source, JpegTiles)
        slide._source.other = Places([(230, 170)])
        assert np.array_equal(slide.read(33, 70, 150, 90), reference(path, 33, 70, 150, 90))
        assert slide._source.other.asked == []


def test_big_endian_which_openslide_does_not_take(tmp_path: Path) -> None:
    full = picture(170, 230)
    little = write_jpeg_tiff(tmp_path / "a.tiff", [full, full[::2, ::2]])
    big = write_jpeg_tiff(tmp_path / "b.tiff", [full, full[::2, ::2]], byteorder=">")
    with open_slide(little) as a, open_slide(big) as b:
        assert b.reader == "jpeg tiles"
        assert (a.mpp, a.level_downsamples) == (b.mpp, b.level_downsamples)
        for level in (0, 1):
            assert np.array_equal(a.read(10, 20, 100, 80, level), b.read(10, 20, 100, 80, level))


def test_a_place_between_two_pixels_of_a_level_is_the_nearest(tmp_path: Path) -> None:
    full = picture(160, 160)
    with open_slide(write_jpeg_tiff(tmp_path / "a.tiff", [full, full[::4, ::4]])) as slide:
        whole = slide.read(0, 0, 40, 40, 1)
        assert np.array_equal(slide.read(33, 41, 20, 20, 1), whole[10:30, 8:28])
        assert np.array_equal(slide.read(35, 43, 20, 20, 1), whole[11:31, 9:29])


def test_a_tile_cut_short_is_an_error_and_costs_itself_alone(tmp_path: Path) -> None:
    path = write_jpeg_tiff(tmp_path / "a.tiff", [picture(170, 230)], halved=[5])
    with open_slide(path) as slide:
        before = slide.read(0, 0, 64, 64)
        for _ in range(2):
            with pytest.raises(BadInput, match=r"a\.tiff: cannot be read at x 64, y 64"):
                slide.read(64, 64, 64, 64)
            assert np.array_equal(slide.read(0, 0, 64, 64), before)


def test_an_svs_without_some_tiles_is_left_to_openslide(tmp_path: Path) -> None:
    # OpenSlide draws an Aperio tile that is missing from the other levels.
    text = "Aperio Image Library v11\r\n230x170 (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"
    whole = write_jpeg_tiff(tmp_path / "a.svs", [picture(170, 230)], description=text)
    lacking = write_jpeg_tiff(tmp_path / "b.svs", [picture(170, 230)], description=text, missing=[5])
    with open_slide(whole) as slide:
        assert (slide.reader, slide.mpp) == ("jpeg tiles", 0.499)
        assert np.array_equal(slide.read(10, 20, 200, 140), reference(whole, 10, 20, 200, 140))
    with open_slide(lacking) as slide:
        assert slide.reader == "openslide"
        assert "lacks tiles" in slide.why
        assert np.array_equal(slide.read(10, 20, 200, 140), reference(lacking, 10, 20, 200, 140))


@pytest.mark.parametrize("compression", ["zlib", "lzw", None])
def test_other_compressions_fall_back_to_openslide_and_say_so(tmp_path: Path, compression: str | None) -> None:
    full = picture(170, 230)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate((full, full[::3, ::3])):
            file.write(level, tile=(64, 64), photometric="rgb", compression=compression, subfiletype=int(number > 0))
    with open_slide(path) as slide:
        assert slide.reader == "openslide"
        assert "JPEG" in slide.why
        assert np.array_equal(slide.read(0, 0, 230, 170), full)
        for x, y in ((0, 0), (31, 17), (-5, 100)):  # also where OpenSlide blends pixels
            assert np.array_equal(slide.read(x, y, 50, 40, 1), reference(path, x, y, 50, 40, 1))


@pytest.mark.parametrize("compression", ["jpeg", "zlib", "zstd", "jpeg2000"])
def test_ome_tiff_has_all_its_levels_and_its_microns(tmp_path: Path, compression: str) -> None:
    full = picture(170, 230)
    path = tmp_path / "a.ome.tiff"
    how = {"tile": (64, 64), "photometric": "rgb", "compression": compression}
    with tifffile.TiffWriter(path, ome=True) as file:
        size = {"PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
        file.write(full, subifds=1, metadata=size, **how)
        file.write(full[::2, ::2].copy(), subfiletype=1, **how)
    with tifffile.TiffFile(path) as file:
        stored = [level.asarray() for level in file.series[0].levels]
    with open_slide(path) as slide:
        assert slide.mpp == 0.25
        assert slide.reader == ("jpeg tiles" if compression == "jpeg" else "tiff tiles")
        assert slide.level_dimensions == ((230, 170), (115, 85))
        assert np.array_equal(slide.read(0, 0, 230, 170), stored[0])
        assert np.array_equal(slide.read(40, 60, 70, 50, 1), stored[1][30:80, 20:90])
        assert slide.read(220, 160, 20, 20)[15, 15].tolist() == [255, 255, 255]


def test_dicom_is_a_folder_or_any_of_its_files(tmp_path: Path) -> None:
    full = picture(300, 420)
    folder = write_dicom(tmp_path / "series", [full, full[::2, ::2].copy()])
    for path in (folder, folder / "level1.dcm"):
        with open_slide(path) as slide:
            assert slide.reader == "openslide"
            assert slide.level_dimensions == ((420, 300), (210, 150))
            assert slide.mpp == pytest.approx(0.5)
            for level, wanted in enumerate((full, full[::2, ::2])):
                high, wide = wanted.shape[:2]
                read = slide.read(0, 0, wide, high, level)
                assert np.array_equal(read, reference(folder / "level0.dcm", 0, 0, wide, high, level))
                assert np.abs(read.astype(int) - wanted).mean() < 8  # JPEG, with colours at half the width


def test_fluorescence_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tiff"
    tifffile.imwrite(path, np.zeros((3, 128, 128), np.uint8), tile=(64, 64), photometric="minisblack", ome=True)
    with pytest.raises(BadInput, match="3 channels"):
        open_slide(path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_plain_image_is_a_slide_of_one_level(tmp_path: Path, suffix: str) -> None:
    full = picture(50, 70)
    Image.fromarray(full).save(tmp_path / f"a{suffix}")
    with open_slide(tmp_path / f"a{suffix}", mpp=0.5) as slide:
        assert (slide.reader, slide.level_dimensions, slide.mpp) == ("image", ((70, 50),), 0.5)
        assert np.array_equal(slide.read(0, 0, 70, 50), full)
        assert slide.read(60, 40, 20, 20)[15, 15].tolist() == [255, 255, 255]


def test_transparency_is_white(tmp_path: Path) -> None:
    rgba = np.dstack([picture(40, 40), np.zeros((40, 40), np.uint8)])
    rgba[:20, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        assert np.array_equal(slide.read(0, 0, 40, 20), rgba[:20, :, :3])
        assert (slide.read(0, 20, 40, 20) == 255).all()


@pytest.mark.parametrize(
    ("stated", "why"),
    [(None, "does not say"), ((352.8, 352.8), "cannot be"), ((0.5, 0.53), "not square")],
)
def test_a_resolution_that_is_missing_or_absurd_names_the_flag(
    tmp_path: Path, stated: tuple[float, float] | None, why: str
) -> None:
    path = write_jpeg_tiff(tmp_path / "a.tiff", [picture(64, 64)], mpp=stated)
    with open_slide(path) as slide:
        assert slide.mpp is None
        with pytest.raises(BadInput, match=f"{why}.*--slide-mpp"):
            slide.require_mpp()
    with open_slide(path, mpp=0.25) as slide:
        assert slide.require_mpp() == 0.25
    for absurd in (0.0, -1.0, 60.0, float("nan")):
        with pytest.raises(BadInput, match="--slide-mpp"):
            open_slide(path, mpp=absurd)


def test_microns_per_pixel_of_the_file(tmp_path: Path) -> None:
    with open_slide(write_jpeg_tiff(tmp_path / "a.tiff", [picture(64, 64)], mpp=(0.5, 0.51))) as slide:
        assert slide.require_mpp() == pytest.approx((0.5 * 0.51) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("region", "why"),
    [
        ((0, 0, 0, 5), "0 x 5"),
        ((0, 0, 5, -1), "-1"),
        ((0, 0, 1 << 20, 1 << 20), "can be read"),
        ((0, 0, 5, 5, 1), "level 1"),
    ],
)
def test_regions_that_cannot_be(tmp_path: Path, region: tuple[int, ...], why: str) -> None:
    path = write_jpeg_tiff(tmp_path / "a.tiff", [picture(64, 64)])
    with open_slide(path) as slide, pytest.raises(BadInput, match=why):
        slide.read(*region)


def test_threads_read_the_same_as_one(tmp_path: Path) -> None:
    path = write_jpeg_tiff(tmp_path / "a.tiff", [picture(400, 400)], missing=[3])
    rng = np.random.default_rng(0)
    regions = [(*map(int, rng.integers(-20, 380, 2)), *map(int, rng.integers(1, 150, 2))) for _ in range(120)]
    with open_slide(path) as slide:
        alone = [slide.read(*region) for region in regions]
        slide.forget()
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda region: slide.read(*region), regions))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together))


def test_what_is_read_belongs_to_the_reader(tmp_path: Path) -> None:
    with open_slide(write_jpeg_tiff(tmp_path / "a.tiff", [picture(128, 128)])) as slide:
        slide.read(10, 10, 100, 100)  # now the tiles are kept
        first = slide.read(0, 0, 64, 64)
        before = first.copy()
        first[:] = 0
        assert np.array_equal(slide.read(0, 0, 64, 64), before)


def test_a_cache_is_bounded_and_forgets_the_oldest() -> None:
    cache = TileCache(limit=1000)
    for number in range(20):
        cache.put(0, number, np.zeros((10, 10, 3), np.uint8))
        cache.get(0, 0)
    assert cache.bytes <= 1000
    assert cache.get(0, 0) is not None
    assert cache.get(0, 1) is None
    assert cache.get(0, 19) is not None
    cache.put(0, 50, np.zeros((20, 20, 3), np.uint8))  # larger than all of it
    assert cache.get(0, 50) is None


def test_a_thumbnail_in_strips_is_the_mean_of_boxes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = picture(90, 120)
    Image.fromarray(full).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        boxes = full.reshape(18, 5, 24, 5, 3).mean((1, 3))
        assert np.abs(slide.thumbnail(24) - boxes).max() <= 1
        whole = [slide.thumbnail(longest) for longest in (1, 7, 50, 120, 500)]
        monkeypatch.setattr("histill.slides.slide._STRIP_PX", 300)
        for picture_, longest in zip(whole, (1, 7, 50, 120, 500)):
            assert max(picture_.shape[:2]) == min(longest, 120)
            assert np.array_equal(slide.thumbnail(longest), picture_)


def test_bounds_lie_within_the_slide() -> None:
    assert slide_of(Places([(100, 80)])).bounds == (0, 0, 100, 80)
    stated = {"openslide.bounds-x": "10", "openslide.bounds-y": "20", "openslide.bounds-width": "50"}
    assert slide_of(Places([(100, 80)]), **stated).bounds == (0, 0, 100, 80)
    assert slide_of(Places([(100, 80)]), **stated, **{"openslide.bounds-height": "90"}).bounds == (10, 20, 50, 60)


def test_a_digest_names_the_content(tmp_path: Path) -> None:
    one = write_jpeg_tiff(tmp_path / "a.tiff", [picture(128, 128)])
    copy = tmp_path / "b.tiff"
    copy.write_bytes(one.read_bytes())
    other = write_jpeg_tiff(tmp_path / "c.tiff", [picture(128, 128, seed=1)])
    with open_slide(one) as a, open_slide(copy) as b, open_slide(other) as c:
        assert a.digest == b.digest != c.digest


def test_a_slide_goes_to_another_process_as_its_path(tmp_path: Path) -> None:
    path = write_jpeg_tiff(tmp_path / "a.tiff", [picture(128, 128)])
    with open_slide(path, mpp=0.3) as slide, pickle.loads(pickle.dumps(slide)) as again:
        assert again.mpp == 0.3
        assert np.array_equal(again.read(3, 4, 50, 60), slide.read(3, 4, 50, 60))


def test_no_slide(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"no slide at all")
    for path, why in (
        (tmp_path / "none.svs", "no such slide"),
        (tmp_path, "a folder"),
        (tmp_path / "a.svs", "not a slide"),
    ):
        with pytest.raises(BadInput, match=why):
            open_slide(path)


def _patched(
    data: bytes, tag: int, *, kind: int | None = None, count: int | None = None, value: int | None = None
) -> bytes:
    """A classic little-endian TIFF with an entry of its first directory changed."""
    place = struct.unpack("<I", data[4:8])[0]
    for number in range(struct.unpack("<H", data[place : place + 2])[0]):
        start = place + 2 + 12 * number
        entry = list(struct.unpack("<HHII", data[start : start + 12]))
        if entry[0] == tag:
            entry[1:] = [new if new is not None else old for new, old in zip((kind, count, value), entry[1:])]
            return data[:start] + struct.pack("<HHII", *entry) + data[start + 12 :]
    raise KeyError(tag)


HOSTILE = {
    "a billion tags' worth of places": {"tag": 324, "count": 1 << 30},
    "a description of gigabytes": {"tag": 282, "count": 1 << 31},
    "a negative width": {"tag": 256, "kind": 4, "value": 0xFFFFFFFF},
    "no height": {"tag": 257, "kind": 4, "value": 0},
    "no tiles": {"tag": 322, "kind": 4, "value": 0},
    "huge tiles": {"tag": 323, "kind": 4, "value": 1 << 30},
    "places that are text": {"tag": 324, "kind": 2},
    "places beyond the file": {"tag": 324, "value": 0x7FFFFFF0},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tiff_is_one_line_at_once(tmp_path: Path, what: str) -> None:
    data = write_jpeg_tiff(tmp_path / "a.tiff", [picture(170, 230)]).read_bytes()
    path = tmp_path / "b.tiff"
    path.write_bytes(_patched(data, **HOSTILE[what]))
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"b\.tiff: .*damaged") as caught:
        open_slide(path)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 1


def test_directories_that_go_round_in_a_circle(tmp_path: Path) -> None:
    data = bytearray(write_jpeg_tiff(tmp_path / "a.tiff", [picture(64, 64)]).read_bytes())
    place = struct.unpack("<I", data[4:8])[0]
    end = place + 2 + 12 * struct.unpack("<H", data[place : place + 2])[0]
    data[end : end + 4] = struct.pack("<I", place)
    (tmp_path / "b.tiff").write_bytes(data)
    with pytest.raises(BadInput, match="circle"):
        open_slide(tmp_path / "b.tiff")


def test_a_tile_that_claims_to_be_huge_allocates_nothing(tmp_path: Path) -> None:
    path = write_jpeg_tiff(tmp_path / "a.tiff", [picture(64, 64)])
    data = path.read_bytes()
    start = data.index(b"\xff\xc0")
    path.write_bytes(data[: start + 5] + struct.pack(">HH", 65000, 65000) + data[start + 9 :])
    with open_slide(path) as slide, pytest.raises(BadInput):
        slide.read(0, 0, 64, 64)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0, 1, 127, 255])), min_size=1, max_size=6),
    cut=st.one_of(st.just(1.0), st.floats(0, 1)),
    ome=st.booleans(),
)
def test_any_damage_is_bad_input_or_pixels(
    tmp_path: Path, changes: list[tuple[float, int]], cut: float, ome: bool
) -> None:
    source = tmp_path / ("a.ome.tiff" if ome else "a.tiff")
    if not source.exists() and ome:
        tifffile.imwrite(source, picture(100, 100), tile=(64, 64), photometric="rgb", compression="zlib", ome=True)
    elif not source.exists():
        write_jpeg_tiff(source, [picture(100, 100)], tables=True)
    data = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as file:
        place = file.pages.first.offset
    for where, value in changes:  # in the header and the directory, where it hurts
        data[int(where * 7) if where < 0.1 else min(len(data) - 1, place + int(where * 250))] = value
    path = tmp_path / f"b{''.join(source.suffixes)}"
    path.write_bytes(data[: int(len(data) * cut)])
    try:
        with open_slide(path) as slide:
            assert slide.read(0, 0, 100, 100).shape == (100, 100, 3)
    except BadInput as error:
        lines = str(error).count("\n")
    else:
        lines = 0
    assert lines == 0
