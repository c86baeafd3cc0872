"""Phantom tissue: what is drawn is what its truth says, everywhere the same, and colour does not give it away."""

from __future__ import annotations

import csv
import io
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histill import cli
from histill.data import phantom_field, phantom_slide
from histill.data.phantom import KINDS, Phantom, draw, write_images, write_slide
from histill.data.phantom_draw import stain_tissue
from histill.data.phantom_field import Window, new_key, noise, warped_noise
from histill.data.phantom_kinds import STAIN_VECTORS, Patient, Scanner
from histill.errors import BadInput

# -- randomness as a function of place


def test_the_hash_is_splitmix64() -> None:
    # The first output of SplitMix64 seeded with 0, from its authors' reference code.
    mixed = phantom_field._mix(np.array([0x9E3779B97F4A7C15], np.uint64))
    assert int(mixed[0]) == 0xE220A8397B1DCDAF


def test_noise_has_zero_mean_and_unit_variance() -> None:
    field = noise(7, 1, Window(0, 0, 600, 600, 0.1), 0.9)
    assert abs(field.mean()) < 0.05
    assert field.std() == pytest.approx(1, abs=0.05)
    other = noise(7, 2, Window(0, 0, 600, 600, 0.1), 0.9)
    assert abs(np.corrcoef(field.ravel(), other.ravel())[0, 1]) < 0.05


def test_noise_is_a_function_of_place() -> None:
    whole = noise(3, 1, Window(-50, -20, 200, 100, 0.5), 4.0)
    part = noise(3, 1, Window(10, 5, 40, 30, 0.5), 4.0)
    np.testing.assert_allclose(part, whole[25:55, 60:100], atol=1e-12)


def test_separable_noise_is_the_warped_noise_without_a_warp() -> None:
    window = Window(-30, 40, 50, 60, 0.25)
    u, v = np.meshgrid(window.xs_um / 3.0, window.ys_um / 3.0)
    expected = warped_noise(5, 9, u, v) / np.hypot(1, 0.25 / 3.0)
    np.testing.assert_allclose(noise(5, 9, window, 3.0), expected, atol=1e-12)


# -- pictures


def test_the_same_arguments_give_the_same_picture_and_others_another() -> None:
    arguments = {"kind": "benign", "size": 48, "seed": 1, "patient": 2, "scanner": 1}
    first = draw(**arguments)
    Patient.number.cache_clear()
    phantom_field._spline.cache_clear()
    again = draw(**arguments)
    assert all((getattr(first, f) == getattr(again, f)).all() for f in ("image", "nuclei", "lesion"))
    for change in ({"kind": "malignant"}, {"seed": 2}, {"patient": 3}, {"scanner": 2}, {"difficulty": 0.9}):
        other = draw(**(arguments | change))
        assert (other.image != first.image).mean() > 0.2, change
    scanned = draw(**(arguments | {"scanner": 2}))
    assert (scanned.nuclei == first.nuclei).all()  # a scanner changes the picture, not the tissue


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    size=st.integers(1, 70),
    mpp=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 10**6),
    patient=st.integers(0, 10**6),
)
def test_every_kind_draws_at_every_size(kind: str, size: int, mpp: float, seed: int, patient: int) -> None:
    phantom = draw(kind, size=size, mpp=mpp, seed=seed, patient=patient)
    assert phantom.image.shape == (size, size, 3)
    assert phantom.nuclei.shape == phantom.lesion.shape == (size, size)
    assert (phantom.image.dtype, phantom.nuclei.dtype, phantom.lesion.dtype) == (np.uint8, np.uint16, np.bool_)
    if kind == "stroma":
        assert not phantom.lesion.any()


@pytest.mark.parametrize("kind", ["benign", "malignant", "gland", "vacuolated", "lymphoid", "stroma"])
def test_nuclei_hold_more_haematoxylin_than_what_surrounds_them(kind: str) -> None:
    phantom = draw(kind, size=160, patient=4)
    density = -np.log10(np.clip(phantom.image, 1, None) / 255)
    haematoxylin = (density @ np.linalg.pinv(Patient.number(4).vectors))[..., 0]
    nuclei = phantom.nuclei > 0
    ring = ndimage.binary_dilation(nuclei, iterations=5) & ~ndimage.binary_dilation(nuclei, iterations=2)
    assert nuclei.any()
    assert np.median(haematoxylin[nuclei]) > np.median(haematoxylin[ring]) + 0.3


def test_light_follows_beer_and_lambert() -> None:
    camera = Scanner(np.full(3, 0.9), gamma=1.0, blur_um=0.0, noise=0.0, quality=90)
    person = Patient(STAIN_VECTORS, {})
    amounts = np.zeros((3, 1, 3))
    amounts[0, 0, 1], amounts[1, 0, 2] = 0.5, 0.25
    image = camera.image(amounts, person, Window(0, 0, 3, 1, 0.5), key=0)
    expected = 255 * 0.9 * 10.0 ** -np.stack([np.zeros(3), 0.5 * STAIN_VECTORS[0], 0.25 * STAIN_VECTORS[1]])
    np.testing.assert_array_equal(image[0], np.rint(expected))


def test_glands_have_a_clear_lumen_inside_a_ring_of_nuclei() -> None:
    stains = stain_tissue(new_key(0, 1), Window(0, 0, 400, 400, 0.5), [(KINDS["gland"], np.ones((400, 400)))])
    lumen = stains.own & (stains.amounts.sum(0) < 0.12)
    pieces, count = ndimage.label(ndimage.binary_opening(lumen, iterations=3))
    areas = ndimage.sum_labels(lumen, pieces, np.arange(1, count + 1)) * 0.25
    middle = int(np.argmax(areas)) + 1
    assert areas.max() > 200  # um^2
    away = ndimage.distance_transform_edt(pieces != middle) * 0.5
    nuclei = stains.nuclei > 0
    assert nuclei[away < 2].mean() < 0.02  # the odd lymphocyte
    # The palisade: nuclei cover far more of the shell 6 to 14 um from the lumen than of the tissue at large.
    assert nuclei[(away > 6) & (away < 14)].mean() > 1.5 * nuclei[away > 40].mean()


def test_vacuoles_are_round_holes() -> None:
    phantom = draw("vacuolated", size=256, patient=1)
    holes, count = ndimage.label(ndimage.binary_opening(phantom.image.min(2) > 205, iterations=3))
    inner = [
        (window, holes[window] == n + 1)
        for n, window in enumerate(ndimage.find_objects(holes))
        if all(s.start > 0 and s.stop < 256 for s in window)
    ]
    assert count >= 5
    roundness = [hole.sum() / (np.pi / 4 * hole.shape[0] * hole.shape[1]) for _, hole in inner]
    assert np.median(roundness) == pytest.approx(1, abs=0.1)  # an ellipse fills pi / 4 of its box


def _areas(kind: str, patient: int, *, mpp: float = 0.5, size: int = 192, difficulty: float = 0.5) -> np.ndarray:
    """Areas in um^2 of the whole nuclei of own cells."""
    phantom = draw(kind, size=size, mpp=mpp, patient=patient, difficulty=difficulty)
    edge = np.concatenate([phantom.nuclei[[0, -1]].ravel(), phantom.nuclei[:, [0, -1]].ravel()])
    whole = np.where(phantom.lesion & ~np.isin(phantom.nuclei, edge), phantom.nuclei, 0)
    return np.bincount(whole.ravel())[1:][np.bincount(whole.ravel())[1:] > 0] * mpp**2


def test_tissue_keeps_its_size_in_microns() -> None:
    fine, middle, coarse = (_areas("malignant", 3, mpp=mpp, size=int(128 / mpp)) for mpp in (0.25, 0.5, 1.0))
    assert np.median(middle) == pytest.approx(np.median(fine), rel=0.06)
    assert np.median(coarse) == pytest.approx(np.median(fine), rel=0.1)
    assert 15 < np.median(fine) < 110
    near = draw("malignant", size=256, mpp=0.25, patient=3).image.astype(float)
    far = draw("malignant", size=128, mpp=0.5, patient=3).image.astype(float)
    means = near.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.corrcoef(means.ravel(), far.ravel())[0, 1] > 0.95


def test_malignant_nuclei_are_larger_and_more_unequal() -> None:
    spread, size = [], []
    for patient in range(8):
        benign, malignant = (np.log(_areas(kind, patient)) for kind in ("benign", "malignant"))
        size.append(np.median(malignant) - np.median(benign))
        spread.append(np.ptp(np.percentile(malignant, [16, 84])) - np.ptp(np.percentile(benign, [16, 84])))
    assert np.mean(size) > 0
    assert np.mean(spread) > 0.1
    assert sum(s > 0 for s in spread) >= 7


def test_difficulty_is_the_spread_between_patients() -> None:
    radius = {d: [Patient.number(p).kind(KINDS["benign"], d).radius for p in range(60)] for d in (0.0, 0.25, 0.5, 1.0)}
    assert np.ptp(radius[0.0]) == 0
    log_sd = {d: np.std(np.log(r)) for d, r in radius.items()}
    assert log_sd[0.5] == pytest.approx(2 * log_sd[0.25])
    assert log_sd[1.0] == pytest.approx(2 * log_sd[0.5])


def _colours(image: np.ndarray) -> np.ndarray:
    flat = image.reshape(-1, 3).astype(float)
    return np.concatenate([flat.mean(0), flat.std(0), *np.percentile(flat, [10, 90], axis=0)])


def _nuclear(nuclei: np.ndarray) -> np.ndarray:
    edge = np.concatenate([nuclei[[0, -1]].ravel(), nuclei[:, [0, -1]].ravel()])
    labels, area = np.unique(nuclei[~np.isin(nuclei, edge)], return_counts=True)
    size = np.log(area[(labels > 0) & (area > 8)])
    return np.array([np.median(size), np.log(len(np.unique(nuclei))), size.std(), *np.percentile(size, [16, 84])])


def test_colour_does_not_tell_the_classes_apart_and_nuclei_do() -> None:
    colours, nuclear, label, patient = [], [], [], []
    for p in range(48):
        for field in range(3):
            phantom = draw(("benign", "malignant")[p % 2], mpp=1.0, seed=field, patient=p, scanner=p // 2 % 3)
            colours.append(_colours(phantom.image))
            nuclear.append(_nuclear(phantom.nuclei))
            label.append(p % 2)
            patient.append(p)

    def score(features: list[np.ndarray]) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
        said = cross_val_predict(model, np.stack(features), label, groups=patient, cv=GroupKFold(8))
        return float(balanced_accuracy_score(label, said))

    assert score(colours) <= 0.62
    assert score(nuclear) >= 0.85


@pytest.mark.parametrize(
    "wrong", [{"kind": "bone"}, {"size": 0}, {"mpp": 0}, {"seed": -1}, {"patient": -1}, {"difficulty": 1.5}]
)
def test_draw_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        draw(**({"kind": "benign"} | wrong))


# -- data sets


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_data_set_has_one_diagnosis_per_patient_and_sites_that_do_not_know_it(tmp_path: Path) -> None:
    manifest = write_images(
        tmp_path / "set",
        patients=12,
        images_per_patient=2,
        size=32,
        scanners=3,
        masks=True,
        unlabelled=3,
    )
    rows = list(csv.DictReader(manifest.open(encoding="utf-8")))
    assert list(rows[0]) == ["path", "label", "patient", "site", "mask"]
    assert len(rows) == 24
    people = {row["patient"]: {r["label"] for r in rows if r["patient"] == row["patient"]} for row in rows}
    assert len(people) == 12
    assert all(len(labels) == 1 for labels in people.values())
    assert set(Counter((row["label"], row["site"]) for row in rows).values()) == {4}
    for row in rows[:3]:
        image, mask = (np.asarray(Image.open(manifest.parent / row[c])) for c in ("path", "mask"))
        patient, field = row["patient"].removeprefix("p"), Path(row["path"]).stem.split("_")[1]
        same = draw(
            row["label"],
            size=32,
            mpp=1.0,
            seed=int(field),
            patient=int(patient),
            scanner=int(row["site"].removeprefix("scanner")),
        )
        assert (image == same.image).all()
        assert (mask == same.nuclei).all()
    assert len(list((tmp_path / "set" / "unlabelled").iterdir())) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_data_set_is_its_arguments(tmp_path: Path) -> None:
    small = {"patients": 4, "images_per_patient": 1, "size": 24, "kinds": ("gland", "stroma", "lymphoid")}
    first = write_images(tmp_path / "a", **small)
    again = write_images(tmp_path / "b", **small)
    other = write_images(tmp_path / "c", seed=1, **small)
    assert _files(first.parent) == _files(again.parent)
    assert not set(_files(first.parent).values()) & set(_files(other.parent).values())


def test_a_data_set_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def stop(kind: str, **options: Any) -> Phantom:
        drawn.append(kind)
        if len(drawn) == 3:
            raise RuntimeError
        return draw(kind, **options)

    monkeypatch.setattr("histill.data.phantom.draw", stop)
    with pytest.raises(RuntimeError):
        write_images(tmp_path / "set", size=16, patients=2)
    assert len(drawn) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_refuses(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(BadInput, match="already there"):
        write_images(tmp_path / "full")
    for wrong in ({"patients": 1}, {"kinds": ("benign", "benign")}, {"kinds": ("bone", "benign")}, {"scanners": 0}):
        with pytest.raises(BadInput):
            write_images(tmp_path / "new", size=8, **{"patients": 2, "images_per_patient": 1} | wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


# -- slides

SLIDE = {"width": 1200, "height": 800, "mpp": 0.5, "kinds": ("stroma", "malignant"), "seed": 2, "quality": 95}


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slide") / "s.tiff", levels=3, **SLIDE)


def _level(path: Path, level: int) -> np.ndarray:
    """The pixels of a level, its tiles decoded one by one."""
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        across = -(-page.imagewidth // page.tilewidth)
        whole = np.zeros((-(-page.imagelength // page.tilelength) * page.tilelength, across * page.tilewidth, 3))
        for n, (offset, length) in enumerate(zip(page.dataoffsets, page.databytecounts)):
            tiff.filehandle.seek(offset)
            tile = np.asarray(Image.open(io.BytesIO(tiff.filehandle.read(length))))
            top, left = n // across * page.tilelength, n % across * page.tilewidth
            whole[top : top + page.tilelength, left : left + page.tilewidth] = tile
        return whole[: page.imagelength, : page.imagewidth]


def test_a_slide_is_a_tiled_pyramid_with_its_resolution(slide: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffFile(slide) as tiff:
        pages = list(tiff.pages)
        assert [page.shape for page in pages] == [(800, 1200, 3), (200, 300, 3), (50, 75, 3)]
        assert all(page.is_tiled and page.compression == 7 and page.photometric == 6 for page in pages)
        assert [page.is_reduced for page in pages] == [False, True, True]
        for page, mpp in zip(pages, (0.5, 2.0, 8.0)):
            across, down = page.get_resolution("CENTIMETER")
            assert 1e4 / across == pytest.approx(mpp)
            assert 1e4 / down == pytest.approx(mpp)


def test_openslide_reads_it(slide: Path) -> None:
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(slide) as opened:
        assert opened.level_dimensions == ((1200, 800), (300, 200), (75, 50))
        assert float(opened.properties["openslide.mpp-x"]) == 0.5
        region = np.asarray(opened.read_region((500, 300), 0, (64, 48)))[..., :3]
    # libtiff may upsample chroma by another filter than Pillow does.
    assert np.abs(region - _level(slide, 0)[300:348, 500:564]).mean() < 4


def test_pillow_reads_it(slide: Path) -> None:
    with Image.open(slide) as opened:
        assert opened.size == (1200, 800)
        opened.seek(1)
        assert opened.size == (300, 200)
        assert np.abs(np.asarray(opened.convert("RGB")) - _level(slide, 1)).mean() < 4


def test_a_level_is_the_mean_of_the_one_above(slide: Path) -> None:
    # In luminance, because JPEG halves the resolution of colour.
    levels = [_level(slide, n) @ [0.299, 0.587, 0.114] for n in range(3)]
    for above, below in pairwise(levels):
        height, width = below.shape
        means = above.reshape(height, 4, width, 4).mean(axis=(1, 3))
        assert np.abs(means - below).mean() < 2
        shifted = np.abs(means - np.roll(below, 1, axis=1)).mean()
        assert np.abs(means - below).mean() < 0.3 * shifted


def test_the_mask_says_where_glass_and_lesion_are(slide: Path) -> None:
    truth = np.asarray(Image.open(slide.with_suffix(".mask.png")))
    assert truth.shape == (50, 75)
    assert set(np.unique(truth)) == {0, 1, 2}
    light = _level(slide, 0).reshape(50, 16, 75, 16, 3).mean(axis=(1, 3))
    inner = {k: ndimage.binary_erosion(truth == k, border_value=1) for k in (0, 1, 2)}
    assert light[inner[0]].min() > 225
    assert (light[inner[1]].mean(axis=1) < 225).mean() > 0.99  # but for gaps between fibres
    # Own cells are there and only there: red is what haematoxylin takes and eosin leaves.
    assert light[inner[2]][:, 0].mean() < light[inner[1]][:, 0].mean() - 15


def test_blocks_meet_without_a_seam(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A gland, a nucleus or a fibre on the border of two blocks is the same as if there were none.
    drawn = {}
    for block in (256, 512):
        monkeypatch.setattr(phantom_slide, "BLOCK_PX", block)
        path = write_slide(
            tmp_path / f"{block}.tiff", width=512, height=512, kinds=("gland", "vacuolated"), pen=True, tile=128
        )
        drawn[block] = path.read_bytes()
    assert drawn[256] == drawn[512]


def test_a_pen_mark_darkens_and_moves_nothing(slide: Path, tmp_path: Path) -> None:
    marked = write_slide(tmp_path / "pen.tiff", levels=1, pen=True, **SLIDE)
    plain, inked = _level(slide, 0), _level(marked, 0)
    changed = (plain - inked)[..., 0] > 40
    assert 0.02 < changed.mean() < 0.25
    assert (inked[changed][:, 2] > inked[changed][:, 0]).mean() > 0.95  # blue ink
    assert np.median(np.abs(plain - inked)) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"tile": 100},
        {"downsample": 3},
        {"downsample": 1},
        {"kinds": ()},
        {"kinds": ("bone",)},
        {"mpp": 0},
        {"levels": 9},
        {"width": 8},
        {"levels": 0},
        {"quality": 0},
    ],
)
def test_a_slide_refuses(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        write_slide(tmp_path / "s.tiff", **({"width": 64, "height": 64} | wrong))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kinds", [["--kinds", "gland", "vacuolated"], ["--kinds", "gland", "--kinds", "vacuolated"]])
def test_the_command_takes_several_values_after_a_flag_or_the_flag_several_times(
    tmp_path: Path, kinds: list[str]
) -> None:
    out = tmp_path / "tissue"
    assert (
        cli.run(["data", "phantom", str(out), "--patients", "4", "--images-per-patient", "1", "--size", "24", *kinds])
        == 0
    )
    assert set(pd.read_csv(out / "manifest.csv")["label"]) == {"gland", "vacuolated"}
