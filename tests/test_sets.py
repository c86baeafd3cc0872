"""Every published layout is read as it was published, and what comes of it can be trained on."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import h5py
import numpy as np
import pytest
from layouts import box, image, lay, mask, text
from numpy.typing import NDArray
from PIL import Image

from histill.cli import run
from histill.data import read_images, read_masks
from histill.data.decode import decode
from histill.data.sets import SETS, DataSet, get, manifest, page, read
from histill.data.sets._pixels import draw, number
from histill.data.sets.bach_wsi import in_classes
from histill.errors import BadInput

DOCS = Path(__file__).parents[1] / "docs" / "datasets.md"
WITHOUT_SLIDES = [name for name in SETS if name != "bach-wsi"]


@pytest.fixture
def laid(tmp_path: Path) -> Callable[[str], Path]:
    """``laid(name)`` -> a folder in the published layout of that data set."""

    def make(name: str) -> Path:
        return lay(name, tmp_path / "data")

    return make


Laid = Callable[[str], Path]


def listed(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pixels(folder: Path, row: dict[str, str]) -> NDArray[np.int64]:
    return np.asarray(Image.open(folder / row["mask"])).astype(np.int64)


# The contract, for every set


@pytest.mark.parametrize(
    "data",
    [*SETS.values(), *(data.eva for data in SETS.values() if data.eva)],
    ids=[*SETS, *(f"{name}-by-eva" for name, data in SETS.items() if data.eva)],
)
def test_a_record_is_complete(data: DataSet) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", data.name)
    for words in (data.what, data.use, data.licence, data.citation, data.split, data.patient, data.pitfalls):
        assert len(words) > 2
        assert "\n" not in words
    assert urlparse(data.homepage).scheme == "https"
    assert len(data.classes) == len(set(data.classes)) >= 2
    assert data.total > 0
    assert set(data.images) == {""} or {"train"} < set(data.images) <= {"train", "val", "test"}
    assert len({file.name for file in data.files}) == len(data.files) > 0
    lengths = {"md5": 32, "sha1": 40, "sha256": 64}
    for file in data.files:
        assert file.url == "" or urlparse(file.url).scheme in ("https", "http")
        if file.checksum is not None:
            kind, _, digits = file.checksum.partition(":")
            assert re.fullmatch(r"[0-9a-f]+", digits)
            assert len(digits) == lengths[kind]
    assert (data.checksums == "none published") <= all(file.checksum is None for file in data.files)
    # What has no address is asked for, and the page says how.
    assert any(not file.url for file in data.files) == bool(data.access)


@pytest.mark.parametrize("name", WITHOUT_SLIDES)
def test_a_folder_becomes_a_table(name: str, laid: Laid, capfd: pytest.CaptureFixture[str]) -> None:
    data, folder = SETS[name], laid(name)
    images = read(data, folder)
    assert len(images)
    if data.task == "labels":
        assert set(images.classes) == set(data.classes)
        assert images.masks == ""
    else:
        assert images.classes == data.classes
        assert images.masks == ("classes" if data.task == "masks" else "instances")
    # Nobody is in two parts.
    known = images.frame[images.frame["patient"] != ""]
    assert (known.groupby("patient")["split"].nunique() <= 1).all()
    assert "is not the whole of" in capfd.readouterr().err
    # Again: the same bytes, nothing converted anew.
    path = folder / f"{data.manifest}.csv"
    before, written = path.read_bytes(), {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}
    assert manifest(data, folder) == path
    assert path.read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")} == written


@pytest.mark.parametrize("name", WITHOUT_SLIDES)
def test_by_image_patients_are_not_looked_at(name: str, laid: Laid) -> None:
    data, folder = SETS[name], laid(name)
    path = manifest(data, folder, by="image")
    assert path.name == f"{data.manifest}_image.csv"
    rows = listed(path)
    assert "patient" not in rows[0]
    assert ({row["split"] for row in rows} if "split" in rows[0] else {""}) == set(data.images)


@pytest.mark.parametrize("name", SETS)
def test_another_layout_is_refused_with_one_line(name: str, tmp_path: Path) -> None:
    image(tmp_path / "benign/a.png")
    with pytest.raises(BadInput) as caught:
        manifest(SETS[name], tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.csv"))
    with pytest.raises(BadInput, match="no such folder"):
        manifest(SETS[name], tmp_path / "none")


def test_the_page_is_in_step() -> None:
    before, table, after = re.split(r"<!-- (?:table|end) -->\n", DOCS.read_text(encoding="utf-8"))
    assert table == page(SETS.values())
    assert before
    assert after


def test_no_notice_where_the_set_is_whole(laid: Laid, capfd: pytest.CaptureFixture[str]) -> None:
    data, folder = SETS["bach"], laid("bach")
    manifest(replace(data, images={"": 12}), folder)
    assert capfd.readouterr().err == ""
    manifest(data, folder)
    assert "is not the whole of bach as published (12 of 400 images)" in capfd.readouterr().err


# What each layout says


def one(folder: Path, name: str, end: str, by: str = "patient") -> dict[str, str]:
    rows = listed(manifest(SETS[name], folder, by=by))  # type: ignore[arg-type]
    (found,) = [row for row in rows if row["path"].endswith(end)]
    return found


@pytest.mark.parametrize(
    ("name", "end", "said"),
    [
        ("bach", "Invasive/iv002.tif", {"label": "Invasive"}),
        ("nct-crc", "100K/TUM/TUM-AAAFLCLY.tif", {"label": "TUM", "split": "train"}),
        ("nct-crc", "7K/TUM/TUM-TCGA-AAICEQFN.tif", {"label": "TUM", "split": "test"}),
        ("breakhis", "B_A-14-22549CD-40-001.png", {"label": "benign", "patient": "14-22549", "site": "40X"}),
        ("breakhis", "M_LC-14-13412-400-001.png", {"label": "malignant", "patient": "14-13412", "site": "400X"}),
        ("lymphoma", "FL/sj-05-1374-R2_006.tif", {"label": "FL", "patient": "sj-05-1374"}),
        ("lymphoma", "FL/unnamed_001.tif", {"label": "FL", "patient": ""}),
        ("pcam", "train/000/000001.png", {"label": "tumor", "patient": "camelyon16_train_tumor_000", "split": "train"}),
        ("pcam", "val/000/000005.png", {"label": "no_tumor", "split": "val"}),
        ("mhist", "MHIST_aaf.png", {"label": "HP", "split": "test"}),
        ("lc25000", "lungscc4.jpeg", {"label": "lung_scc", "patient": "tile-9"}),
        ("sipakmed", "im_Parabasal/CROPPED/002_01.bmp", {"label": "Parabasal", "patient": "Parabasal-002"}),
        ("isic-2018", "Training_Input/ISIC_0024307.jpg", {"label": "MEL", "patient": "HAM_MEL_0", "split": "train"}),
        ("isic-2018", "Test_Input/ISIC_0024328.jpg", {"label": "MEL", "patient": "", "split": "test"}),
        ("isic-2019", "ISIC_0000003_downsampled.jpg", {"label": "AK", "patient": "BCN_0000001"}),
        ("isic-2019", "ISIC_0000005.jpg", {"label": "DF", "patient": ""}),
        ("isic-2020", "train/ISIC_2637014.jpg", {"label": "malignant", "patient": "IP_0000001"}),
        ("ham10000", "part_2/ISIC_0027420.jpg", {"label": "bcc", "patient": "HAM_0000001", "site": "vidir_modern"}),
        ("monuseg", "TCGA-18-5592-01Z-00-DX1.tif", {"patient": "TCGA-18-5592", "site": "18", "split": "train"}),
        ("tnbc", "Slide_11/11_2.png", {"patient": "11"}),
        ("pathmnist", "train/000003.png", {"label": "lymphocytes", "split": "train"}),
        ("bloodmnist-64", "val/000003.png", {"label": SETS["bloodmnist"].classes[3], "split": "val"}),
        ("retinamnist-224", "test/000004.png", {"label": "4", "split": "test"}),
        ("breastmnist", "test/000001.png", {"label": "normal, benign", "split": "test"}),
        ("organsmnist-128", "val/000010.png", {"label": "spleen", "split": "val"}),
        ("chestmnist", "train/000000.png", {"label": "no finding", "split": "train"}),
        ("chestmnist-64", "test/000001.png", {"label": "finding", "split": "test"}),
    ],
)
def test_what_the_names_say(name: str, end: str, said: dict[str, str], laid: Laid) -> None:
    row = one(laid(name), name, end)
    assert {key: row[key] for key in said} == said


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bach", "ICIAR2018_BACH_Challenge"),
        ("breakhis", "BreaKHis_v1"),
        ("breakhis", "BreaKHis_v1/histology_slides"),
        ("glas", "Warwick QU Dataset (Released 2016_07_08)"),
        ("lc25000", "lung_colon_image_set"),
        ("tnbc", "TNBC_NucleiSegmentation"),
        ("dsb2018", "stage1_train"),
    ],
)
def test_the_folder_within_may_be_given(name: str, part: str, laid: Laid) -> None:
    folder = laid(name)
    assert len(listed(manifest(SETS[name], folder / part))) == len(listed(manifest(SETS[name], folder)))


def test_a_kaggle_copy_has_the_folder_twice(laid: Laid) -> None:
    folder = laid("sipakmed")
    for label in SETS["sipakmed"].classes:
        (folder / f"im_{label}").rename(folder / "moved")
        (folder / f"im_{label}").mkdir()
        (folder / "moved").rename(folder / f"im_{label}/im_{label}")
    assert len(listed(manifest(SETS["sipakmed"], folder))) == 15


def test_one_case_of_breakhis_stays_together(laid: Laid) -> None:
    rows = listed(manifest(SETS["breakhis"], laid("breakhis")))
    cases: dict[str, set[str]] = {}
    for row in rows:
        cases.setdefault(row["patient"], set()).add(row["path"].split("/")[-3])
    assert cases["14-13412"] == {"SOB_M_DC_14-13412", "SOB_M_LC_14-13412"}
    assert cases["14-22549"] == {"SOB_B_A_14-22549AB", "SOB_B_A_14-22549CD"}


def test_a_published_split_that_divides_patients_is_left_out(laid: Laid, capfd: pytest.CaptureFixture[str]) -> None:
    folder = laid("glas")
    rows = listed(manifest(SETS["glas"], folder))
    assert "split" not in rows[0]
    assert {row["patient"] for row in rows} == {"4", "10", "2", "13"}
    assert "the published split has 1 patients in two parts" in capfd.readouterr().err
    by_image = listed(manifest(SETS["glas"], folder, by="image"))
    assert {row["path"].split("/")[-1]: row["split"] for row in by_image} == {
        "testA_1.bmp": "test",
        "testB_1.bmp": "test",
        "train_1.bmp": "train",
        "train_2.bmp": "train",
        "train_3.bmp": "train",
    }


def test_glands_have_their_class(laid: Laid) -> None:
    folder = laid("glas")
    expected = np.zeros((24, 24), int)
    expected[2:9, 2:9] = expected[12:20, 12:20] = 1
    for name, malignant in (("glas", 1), ("glas-graded", 2)):
        assert (pixels(folder, one(folder, name, "train_1.bmp")) == malignant * expected).all()
        assert (pixels(folder, one(folder, name, "train_2.bmp")) == expected).all()
    assert (folder / "manifest.csv").exists()
    assert (folder / "manifest_graded.csv").exists()


def test_pictures_of_pcam_are_its_pixels(laid: Laid) -> None:
    folder = laid("pcam")
    rows = [row for row in listed(manifest(SETS["pcam"], folder)) if row["split"] == "test"]
    with h5py.File(folder / "camelyonpatch_level_2_split_test_x.h5") as file:
        for place, row in enumerate(rows):
            assert (np.asarray(Image.open(folder / row["path"])) == file["x"][place]).all()


def test_pcam_goes_on_where_it_stopped(laid: Laid) -> None:
    folder = laid("pcam")
    manifest(SETS["pcam"], folder)
    gone = folder / "converted/pcam/train/000/000002.png"
    content = gone.read_bytes()
    gone.unlink()
    manifest(SETS["pcam"], folder)
    assert gone.read_bytes() == content
    (folder / "camelyonpatch_level_2_split_train_meta.csv").unlink()
    assert one(folder, "pcam", "train/000/000001.png")["patient"] == ""


def test_damaged_files_are_named(laid: Laid) -> None:
    folder = laid("pcam")
    (folder / "camelyonpatch_level_2_split_train_y.h5").unlink()
    with pytest.raises(BadInput, match=r"train_y\.h5 is missing"):
        manifest(SETS["pcam"], folder)
    (folder / "camelyonpatch_level_2_split_train_x.h5").write_bytes(b"no HDF5")
    with pytest.raises(BadInput, match="not a file of PatchCamelyon"):
        manifest(SETS["pcam"], folder)
    folder = laid("pathmnist")
    whole = (folder / "pathmnist.npz").read_bytes()
    (folder / "pathmnist.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="not a file of MedMNIST"):
        manifest(SETS["pathmnist"], folder)


def test_pictures_of_medmnist_are_its_pixels(laid: Laid) -> None:
    folder = laid("retinamnist-64")
    rows = [row for row in listed(manifest(SETS["retinamnist-64"], folder)) if row["split"] == "val"]
    with np.load(folder / "retinamnist_64.npz") as arrays:
        for place, row in enumerate(rows):
            assert (np.asarray(Image.open(folder / row["path"])) == arrays["val_images"][place]).all()
            assert row["label"] == str(arrays["val_labels"][place, 0])


@pytest.mark.parametrize("name", ["octmnist", "chestmnist-64", "tissuemnist-128"])
def test_grey_pictures_of_medmnist_stay_grey_and_are_read_as_rgb(name: str, laid: Laid) -> None:
    folder = laid(name)
    rows = [row for row in listed(manifest(SETS[name], folder)) if row["split"] == "train"]
    with np.load(folder / SETS[name].files[0].name) as arrays:
        for place, row in enumerate(rows):
            with Image.open(folder / row["path"]) as picture:
                assert picture.mode == "L"
                assert (np.asarray(picture) == arrays["train_images"][place]).all()
            read_as = np.asarray(decode(folder / row["path"])[0])
            assert (read_as == arrays["train_images"][place][..., None]).all()
            assert read_as.shape[2] == 3


def test_any_of_fourteen_findings_is_a_finding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays, labels = {}, {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = rng.integers(0, 256, (15, 28, 28), dtype=np.uint8)
        labels[f"{part}_labels"] = np.eye(15, 14, dtype=np.uint8)  # one of each, and none
    np.savez(tmp_path / "chestmnist.npz", **arrays, **labels)
    for row in listed(manifest(SETS["chestmnist"], tmp_path)):
        assert row["label"] == ("no finding" if row["path"].endswith("000014.png") else "finding")
    for wrong in (np.eye(15, 14, dtype=np.uint8) * 2, np.eye(15, 13, dtype=np.uint8), -np.eye(15, 14, dtype=np.int8)):
        np.savez(tmp_path / "chestmnist.npz", **arrays, **labels | {"val_labels": wrong})
        with pytest.raises(BadInput, match="not 14 of 0 and 1"):
            manifest(SETS["chestmnist"], tmp_path)


def test_medmnist_is_whole() -> None:
    names = {name.partition("-")[0] for name in SETS if "mnist" in name}
    assert len(names) == 12
    for name in names:
        sizes = [SETS[name], *(SETS[f"{name}-{side}"] for side in (64, 128, 224))]
        stems = [name, *(f"{name}_{side}" for side in (64, 128, 224))]
        assert [data.files[0].name for data in sizes] == [f"{stem}.npz" for stem in stems]
        assert len({data.files[0].checksum for data in sizes}) == 4
    assert len({SETS[name].files[0].checksum for name in SETS if "mnist" in name}) == 48


def test_copies_that_contradict_one_another_are_listed_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{part}_images": rng.integers(0, 256, (12, 28, 28, 3), dtype=np.uint8) for part in ("train", "val", "test")
    }
    labels = {f"{part}_labels": np.arange(12)[:, None] % 5 for part in ("train", "val", "test")}
    arrays["train_images"][0] = arrays["test_images"][0]  # a leak
    arrays["train_images"][1] = arrays["val_images"][2]  # a leak with another label
    arrays["val_images"][3] = arrays["val_images"][4]  # two labels within a split
    arrays["test_images"][5] = arrays["test_images"][0]  # the same in everything but for train's
    arrays["test_images"][11] = arrays["test_images"][6]  # the same in everything: it stays
    np.savez(tmp_path / "retinamnist.npz", **arrays, **labels)
    images = read(SETS["retinamnist"], tmp_path)
    listed_ = {path.removeprefix("converted/retinamnist/").removesuffix(".png") for path in images.frame["path"]}
    everything = {f"{part}/{n:06d}" for part in ("train", "val", "test") for n in range(12)}
    assert everything - listed_ == {"train/000000", "train/000001", "val/000004", "test/000005"}
    assert "4 copies of other images" in capfd.readouterr().err


def test_nothing_of_medmnist_is_unpickled(tmp_path: Path) -> None:
    evil = np.array([{"a": 1}] * 3, dtype=object)
    np.savez(tmp_path / "pathmnist.npz", train_labels=evil, train_images=evil)
    with pytest.raises(BadInput, match=r"pathmnist\.npz"):
        manifest(SETS["pathmnist"], tmp_path)


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    arrays = {f"{part}_images": np.zeros((1, 28, 28, 3), np.uint8) for part in ("train", "val", "test")}
    np.savez(tmp_path / "retinamnist.npz", **arrays, **{n.replace("images", "labels"): [[5]] for n in arrays})  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="label 5, where there are 5 classes"):
        manifest(SETS["retinamnist"], tmp_path)


def test_outlines_become_numbered_nuclei(laid: Laid) -> None:
    folder = laid("monuseg")
    found = pixels(folder, one(folder, "monuseg", "TCGA-18-5592-01Z-00-DX1.tif"))
    expected = np.zeros((24, 24), int)
    expected[5:13, 5:16] = 2
    expected[2:9, 2:9] = 1  # the first has the pixel
    assert (found == expected).all()
    assert Image.open(folder / "converted/monuseg/TCGA-18-5592-01Z-00-DX1.png").mode == "I;16"


def test_a_mask_file_each_becomes_numbered_nuclei(laid: Laid) -> None:
    folder = laid("dsb2018")
    found = pixels(folder, one(folder, "dsb2018", f"{0:064x}.png"))
    expected = np.zeros((24, 24), int)
    expected[5:12, 5:15] = 2
    expected[2:8, 2:8] = 1
    assert (found == expected).all()


def test_black_and_white_masks_are_taken_apart(laid: Laid) -> None:
    folder = laid("tnbc")
    found = pixels(folder, one(folder, "tnbc", "02_1.png"))
    assert [(found == n).sum() for n in range(3)] == [24 * 24 - 36 - 48, 36, 48]
    mask(folder / "TNBC_NucleiSegmentation/GT_02/02_2.png", (2, 2, 8, 8), (8, 2, 12, 8), values=(1, 2))
    (folder / "converted/tnbc/02_2.png").unlink()
    found = pixels(folder, one(folder, "tnbc", "02_2.png"))
    assert [(found == n).sum() for n in (1, 2)] == [36, 24]  # numbers that are there already are kept


def test_duplicates_of_isic_2020_are_left_out(laid: Laid) -> None:
    rows = listed(manifest(SETS["isic-2020"], laid("isic-2020")))
    assert len(rows) == 7
    assert not any("2637018" in row["path"] for row in rows)


def test_twins_are_said_to_leak_where_the_tiles_are_unknown(laid: Laid, capfd: pytest.CaptureFixture[str]) -> None:
    folder = laid("lc25000")
    (folder / "lc25000_image_groups.csv").unlink()
    assert "patient" not in listed(manifest(SETS["lc25000"], folder))[0]
    assert "a split will leak" in capfd.readouterr().err


def test_a_row_of_two_classes_is_refused(laid: Laid) -> None:
    folder = laid("isic-2019")
    truth = folder / "ISIC_2019_Training_GroundTruth.csv"
    truth.write_text(truth.read_text().replace("ISIC_0000000,1.0,0.0", "ISIC_0000000,1.0,1.0"))
    with pytest.raises(BadInput, match="ISIC_0000000 has 2 classes, not one"):
        manifest(SETS["isic-2019"], folder)


def test_missing_columns_are_named(laid: Laid) -> None:
    folder = laid("mhist")
    text(folder / "annotations.csv", "Image Name,Label", "MHIST_aaa.png,HP")
    with pytest.raises(BadInput, match="no column Majority Vote Label, Partition; it has Image Name, Label"):
        manifest(SETS["mhist"], folder)


# Whole slides


def test_a_slide_is_cut_into_patches_with_classes(laid: Laid) -> None:
    pytest.importorskip("openslide")
    folder = laid("bach-wsi")
    rows = listed(manifest(SETS["bach-wsi"], folder))
    assert {(row["patient"], row["split"]) for row in rows} == {("A01", "train")}
    # 2,600 x 1,400 pixels of 0.8 um are two whole patches across and one down.
    assert {row["path"].split("/")[-1] for row in rows} <= {"A01_000_000.png", "A01_001_000.png"}
    first = one(folder, "bach-wsi", "A01_000_000.png")
    found = pixels(folder, first)
    assert found.shape == (1024, 1024)
    expected = np.zeros((1024, 1024), int)
    expected[100:300, 100:300] = 1
    expected[200:400, 200:400] = 3
    assert (found != expected).mean() < 0.002  # outlines are a pixel wide
    images = read_masks(folder / "manifest_wsi.csv", kind="classes", classes=SETS["bach-wsi"].classes)
    assert images.classes == ("normal", "benign", "in situ", "invasive")
    # The patch shows the slide where its name says.
    whole = Image.open(folder / "ICIAR2018_BACH_Challenge/WSI/A01.svs").convert("RGB")
    near = np.asarray(whole.crop((0, 0, 1280, 1280)).resize((1024, 1024), Image.Resampling.BOX)).astype(int)
    assert np.abs(near - np.asarray(Image.open(folder / first["path"])).astype(int)).mean() < 6


def test_words_of_an_outline() -> None:
    def of(*said: str) -> Iterator[tuple[str, list[tuple[float, float]]]]:
        return iter([(word, box(0, 0, 1, 1)) for word in said])

    assert [n for n, _ in in_classes(of("Carcinoma invasive", "Benign", "Carcinoma in situ"))] == [1, 2, 3]
    with pytest.raises(BadInput, match="'necrosis'"):
        in_classes(of("necrosis"))


def test_numbering_by_hand() -> None:
    whole = np.ones((2, 3), np.uint8)
    left = whole.copy()
    left[:, 2] = 0
    assert number([left, whole, whole], (2, 3)).tolist() == [[1, 1, 2], [1, 1, 2]]
    with pytest.raises(BadInput, match="3 x 2 pixels for an image of 9 x 9"):
        number([whole], (9, 9))
    assert draw([], (2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


# As a user


def test_the_manifest_command_says_what_is_next(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    folder = laid("sipakmed")
    assert run(["data", "manifest", "sipakmed", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"next: histill distill multi-exit --data {folder}/manifest.csv" in said
    assert said.rstrip().endswith("--val 0.2 --test 0.2")
    assert len(read_images(folder / "manifest.csv")) == 15
    assert run(["data", "manifest", "sipakmed", str(folder / "none")]) == 2
    assert get("sipakmed") is SETS["sipakmed"]
