"""Tissue is found where it is: not on ink, shadows or dust, and its shares of rectangles are exact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from slide_files import Places, slide_of

from histill.data.phantom import write_slide
from histill.errors import BadInput
from histill.slides import Tissue, find_tissue, open_slide
from histill.slides.tissue import _dilated, _even, _ink, _without_small, tissue_mask, tissue_picture

UM = 10.0
GLASS = np.array([243.0, 241.0, 244.0])
EOSIN, HAEMATOXYLIN = np.array([0.05, 0.30, 0.10]), np.array([0.40, 0.43, 0.20])
INKS = {"blue": (0.9, 0.6, 0.15), "green": (0.8, 0.25, 0.6), "black": (0.8, 0.85, 0.8), "red": (0.05, 0.8, 0.65)}
Density = NDArray[np.float64]


def section(seed: int = 0) -> tuple[Density, NDArray[np.bool_]]:
    """Optical density ``(300, 400, 3)`` of a section 3 by 4 mm, and where it is: eosin and grains of haematoxylin."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:300, :400]
    where = ((x - 200) / 150) ** 2 + ((y - 150) / 110) ** 2 + 0.1 * np.sin(x / 17) < 1
    grains = ndimage.gaussian_filter(rng.random((300, 400)), 1.0)
    grains = np.clip((grains - np.quantile(grains, 0.6)) * 12, 0, 1)
    density = where[..., None] * (EOSIN * rng.uniform(0.7, 1.2, (300, 400, 1)) + grains[..., None] * HAEMATOXYLIN * 0.6)
    return density, where


def photograph(density: Density, seed: int = 1) -> NDArray[np.uint8]:
    light = GLASS * 10.0**-density + np.random.default_rng(seed).normal(0, 1.5, density.shape)
    return np.asarray(np.clip(np.rint(light), 0, 255), np.uint8)


def drawn(*shapes: tuple[str, object, int]) -> Density:
    """Amount of ink, 0 to 1, of lines and rings in mask pixels."""
    picture = Image.new("L", (400, 300))
    draw = ImageDraw.Draw(picture)
    for kind, points, width in shapes:
        if kind == "line":
            draw.line(points, fill=255, width=width)  # type: ignore[arg-type]
        else:
            draw.ellipse(points, outline=255, width=width)  # type: ignore[arg-type]
    return ndimage.gaussian_filter(np.asarray(picture, np.float64) / 255, 0.7)


STROKES = (("line", [(10, 20), (200, 120), (390, 280)], 12), ("ring", (60, 60, 220, 220), 8))


def test_a_section_is_found_and_glass_is_not() -> None:
    density, where = section()
    mask = tissue_mask(photograph(density), UM)
    assert mask[where].mean() > 0.98
    assert (~mask)[~ndimage.binary_dilation(where, iterations=4)].all()


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_ink_is_no_tissue_on_glass_or_on_tissue(ink: str, seed: int) -> None:
    density, where = section(seed)
    amount = drawn(*STROKES)
    mask = tissue_mask(photograph(density + amount[..., None] * np.array(INKS[ink])), UM)
    assert (~mask)[amount > 0.6].mean() > 0.97
    far = ~ndimage.binary_dilation(amount > 0.05, iterations=8)
    assert mask[where & far].mean() > 0.97
    assert (~mask)[far & ~ndimage.binary_dilation(where, iterations=4)].all()


def test_even_is_where_the_density_varies_by_less_than_a_fifth() -> None:
    board = np.where(np.indices((20, 20)).sum(0) % 2, 1.0, -1.0).astype(np.float32)
    assert _even(0.5 + 0.5 * 0.19 * board).all()
    assert not _even(0.5 + 0.5 * 0.22 * board).any()
    point = np.ones((20, 20), np.float32)
    point[10, 10] = 3  # seen from two pixels away
    assert np.argwhere(~_even(point)).tolist() == [[y, x] for y in range(8, 13) for x in range(8, 13)]


@pytest.mark.parametrize("colour", [(0.5, 0.43, 0.3), (0.5, 0.5, 0.5)], ids=["bluish", "grey"])
def test_faint_ink_is_told_from_stain_by_its_evenness(colour: tuple[float, float, float]) -> None:
    board = np.where(np.indices((96, 96)).sum(0) % 2, 1.55, 0.93).astype(np.float32)  # a quarter about its mean
    for grains, expected in ((np.ones_like(board), True), (board, False)):
        density = np.zeros((3, 160, 160), np.float32)
        density[:, 32:128, 32:128] = np.array(colour, np.float32)[:, None, None] * grains
        assert _ink(density, UM)[64:96, 64:96].all() == expected
        assert _ink(density, UM)[64:96, 64:96].any() == expected


def test_a_lymph_follicle_is_tissue() -> None:
    density, _ = section()
    y, x = np.mgrid[:300, :400]
    follicle = (x - 180) ** 2 + (y - 140) ** 2 < 25**2
    rng = np.random.default_rng(3)
    density = np.where(follicle[..., None], HAEMATOXYLIN * rng.uniform(0.9, 1.5, (300, 400, 1)), density)
    assert tissue_mask(photograph(density), UM)[follicle].mean() > 0.98


def test_blood_is_tissue_though_it_has_the_colour_of_red_ink() -> None:
    density, _ = section()
    y, x = np.mgrid[:300, :400]
    lake, vessel = (x - 180) ** 2 + (y - 140) ** 2 < 25**2, (abs(y - 200) < 4) & (abs(x - 200) < 45)
    density = np.where((lake | vessel)[..., None], np.array([0.09, 0.55, 0.48]), density)
    mask = tissue_mask(photograph(density), UM)
    assert mask[lake].mean() > 0.98
    assert mask[vessel].mean() > 0.98


def test_shadows_edges_and_dust_are_no_tissue() -> None:
    density, where = section()
    density = density + 0.0
    density[:, 380:386] += 0.35  # the edge of the cover slip, grey
    density[270:290, 20:60] += np.array([0.25, 0.24, 0.26])  # a shadow
    density[20:24, 20:24] += EOSIN * 2  # a crumb of 40 microns
    mask = tissue_mask(photograph(density), UM)
    assert not mask[~ndimage.binary_dilation(where, iterations=4)].any()


def test_small_pieces_are_dust_and_small_holes_belong_to_the_tissue() -> None:
    density, where = section()
    density[20:30, 20:30] = density[20:45, 350:375] = EOSIN  # of 10,000 and of 62,500 square microns
    density[120:128, 150:158] = density[140:165, 220:245] = 0  # of 6,400 and of 62,500
    mask = tissue_mask(photograph(density), UM)
    assert where[110:170, 140:250].all()
    assert not mask[15:35, 15:35].any()
    assert mask[22:43, 352:373].mean() > 0.98
    assert mask[116:132, 146:162].mean() > 0.98
    assert not mask[145:160, 225:240].any()


def test_pieces_are_counted_and_growth_is_measured_in_pixels() -> None:
    mask = np.zeros((12, 12), np.bool_)
    mask[1, 1:4] = mask[5, 5:10] = True
    assert [int(_without_small(mask, least).sum()) for least in (3, 4, 5, 5.5)] == [8, 5, 5, 0]
    assert not _without_small(np.zeros((4, 4), np.bool_), 1).any()
    point = np.zeros((15, 15), np.bool_)
    point[7, 7] = True
    for radius in (1, 2, 3, 5):
        y, x = _dilated(point, radius).nonzero()
        assert (x.min(), x.max(), y.min(), y.max()) == (7 - radius, 7 + radius) * 2
        assert np.hypot(x - 7, y - 7).max() <= radius * 1.11  # an octagon about the circle


@pytest.mark.parametrize("value", [0, 128, 244, 255])
def test_a_slide_of_one_grey_has_no_tissue(value: int) -> None:
    assert not tissue_mask(np.full((60, 80, 3), value, np.uint8), UM).any()


def test_a_slide_full_of_tissue_is_all_tissue() -> None:
    density, where = section()
    inner = density[100:200, 130:270]
    assert where[100:200, 130:270].all()
    assert tissue_mask(photograph(inner), UM).mean() > 0.99


def test_a_phantom_slide_is_found(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tiff", width=320, height=240, mpp=2.0, seed=3)
    truth = Image.fromarray(np.asarray(Image.open(tmp_path / "a.mask.png")) > 0)
    with open_slide(tmp_path / "a.tiff") as slide:
        mask = find_tissue(slide).mask
    where = np.asarray(truth.resize(mask.shape[::-1]))
    assert mask[ndimage.binary_erosion(where, iterations=3)].mean() > 0.99  # but for 30 microns at its outline
    assert not mask[~ndimage.binary_dilation(where, iterations=3)].any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    x=st.integers(-50, 330),
    y=st.integers(-50, 220),
    width=st.integers(1, 200),
    height=st.integers(1, 200),
)
def test_a_fraction_is_exact(seed: int, x: int, y: int, width: int, height: int) -> None:
    mask = np.random.default_rng(seed).random((20, 30)) < 0.4
    tissue = Tissue(mask, (10.0, 10.0))
    full = np.kron(mask, np.ones((10, 10)))  # level 0, 300 by 200
    inside = full[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)]
    assert tissue.fraction(x, y, width, height) == pytest.approx(inside.sum() / (width * height), abs=1e-9)


def test_a_fraction_of_parts_of_pixels() -> None:
    tissue = Tissue(np.array([[True, False]]), (7.5, 10.0))
    assert tissue.fraction(0, 0, 15, 10) == pytest.approx(0.5)
    assert tissue.fraction(5, 0, 5, 10) == pytest.approx(0.5)
    shares = tissue.fraction(np.array([0, 7]), np.array([0, 0]), np.array([7, 1]), np.array([5, 5]))
    assert shares == pytest.approx([1.0, 0.5])


def test_contours_enclose_the_mask_with_holes() -> None:
    mask = np.zeros((40, 60), bool)
    mask[5:30, 10:50] = True
    mask[12:20, 20:30] = False
    mask[33:38, 2:8] = True
    pieces = Tissue(mask, (4.0, 3.0)).contours
    assert sorted(len(piece) for piece in pieces) == [1, 2]
    area = 0.0
    for piece in pieces:
        for number, ring in enumerate(piece):
            assert np.array_equal(ring[0], ring[-1])
            x, y = ring.T
            own = abs(float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1]))) / 2
            area += own if number == 0 else -own
    assert area == pytest.approx(mask.sum() * 12, rel=0.01)  # corners are cut
    left = min(float(ring[:, 0].min()) for piece in pieces for ring in piece)
    assert left == 2 * 4.0


def test_the_users_mask_or_geojson_instead(tmp_path: Path) -> None:
    slide = slide_of(Places([(4000, 2000)]), mpp=0.5)
    mask = np.zeros((100, 200), np.uint8)
    mask[20:60, 40:120] = 3
    Image.fromarray(mask).save(tmp_path / "mask.png")
    corners = [[800, 400], [2400, 400], [2400, 1200], [800, 1200], [800, 400]]
    shape = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [corners]}, "properties": {}}
    (tmp_path / "mask.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [shape]}))
    for name in ("mask.png", "mask.geojson"):
        tissue = find_tissue(slide, tmp_path / name)
        assert tissue.fraction(0, 0, 4000, 2000) == pytest.approx(0.16)
        assert tissue.fraction(800, 400, 1600, 800) == pytest.approx(1.0)
        assert tissue.fraction(0, 0, 800, 2000) == 0
    Image.fromarray(mask[:50]).save(tmp_path / "other.png")
    with pytest.raises(BadInput, match="do not cover"):
        find_tissue(slide, tmp_path / "other.png")
    with pytest.raises(BadInput, match="no such mask"):
        find_tissue(slide, tmp_path / "none.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match="not a readable mask"):
        find_tissue(slide, tmp_path / "bad.png")


def test_a_picture_of_it(tmp_path: Path) -> None:
    density, where = section()
    Image.fromarray(photograph(density)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=UM) as slide:
        tissue = find_tissue(slide)
        picture = np.asarray(tissue_picture(slide, tissue, 400))
    assert picture.shape == (300, 400, 3)
    assert ((picture == (0, 110, 60)).all(-1)).sum() > 500
    assert picture[5, 5].max() < 210  # glass is shaded
    assert where.any()
