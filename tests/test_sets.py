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
from conftest import picture
from numpy.typing import NDArray
from PIL import Image

from histill.cli import run
from histill.data import read_images, read_masks
from histill.data.sets import SETS, DataSet, get, manifest, page, read
from histill.data.sets._pixels import draw, number
from histill.data.sets.bach_wsi import in_classes
from histill.errors import BadInput

DOCS = Path(__file__).parents[1] / "docs" / "datasets.md"
_seed = iter(range(10**9))


def image(path: Path, size: int = 24, mode: str = "RGB") -> Path:
    """An image unlike any other, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(next(_seed), size=size)).convert(mode).save(path)
    return path


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def mask(path: Path, *boxes: tuple[int, int, int, int], size: int = 24, values: tuple[int, ...] = ()) -> None:
    """Rectangles (x0, y0, x1, y1), the last row and column left out, of 255 or of ``values``."""
    pixels = np.zeros((size, size), np.uint8)
    for place, (x0, y0, x1, y1) in enumerate(boxes):
        pixels[y0:y1, x0:x1] = values[place] if values else 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


# A small folder in each published layout


def bach(folder: Path) -> None:
    for label, prefix in (("Benign", "b"), ("InSitu", "is"), ("Invasive", "iv"), ("Normal", "n")):
        for n in range(1, 4):
            image(folder / "ICIAR2018_BACH_Challenge/Photos" / label / f"{prefix}{n:03d}.tif")
    text(folder / "ICIAR2018_BACH_Challenge/Photos/microscopy_ground_truth.csv", "n001.tif,Normal")
    text(folder / "ICIAR2018_BACH_Challenge/Photos/Normal/Thumbs.db", "")


OUTLINE = (
    '<Annotations MicronsPerPixel="0.5"><Annotation Id="1"><Regions><RegionAttributeHeaders/>{}</Regions>'
    "</Annotation></Annotations>"
)


def region(points: list[tuple[float, float]], said: str = "", attribute: str = "") -> str:
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
    attributes = (
        f'<Attributes><Attribute Name="9" Id="0" Value="{attribute}"/></Attributes>' if attribute else "<Attributes/>"
    )
    return f'<Region Id="1" Text="{said}">{attributes}<Vertices>{vertices}</Vertices></Region>'


def box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def bach_wsi(folder: Path) -> None:
    home = folder / "ICIAR2018_BACH_Challenge/WSI"
    home.mkdir(parents=True)
    tissue = Image.fromarray(picture(0, size=64)).resize((2600, 1400), Image.Resampling.BICUBIC)
    import tifffile

    options = {"photometric": "rgb", "tile": (256, 256), "resolution": (12_500, 12_500), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(home / "A01.svs", np.asarray(tissue), **options)
    # Level-0 pixels have 0.8 um, those of a patch 1: in the first patch 100 to 300 and 200 to 400.
    benign, invasive = box(125, 125, 375, 375), box(250, 250, 500, 500)
    text(home / "A01.xml", OUTLINE.format(region(invasive, attribute="Carcinoma invasive") + region(benign, "Benign")))


def nct_crc(folder: Path) -> None:
    for label in SETS["nct-crc"].classes:
        image(folder / f"NCT-CRC-HE-100K/{label}/{label}-AAAFLCLY.tif")
        image(folder / f"NCT-CRC-HE-100K/{label}/{label}-AAAMLLTW.tif")
        image(folder / f"CRC-VAL-HE-7K/{label}/{label}-TCGA-AAICEQFN.tif")


def breakhis(folder: Path) -> None:
    home = folder / "BreaKHis_v1/histology_slides/breast"
    text(home / "README.txt", "not an image")
    for short, place, slides in (
        ("B_A", "benign/SOB/adenosis", ("14-22549AB", "14-22549CD", "14-29960CD")),
        ("M_DC", "malignant/SOB/ductal_carcinoma", ("14-10926", "14-13412")),
        ("M_LC", "malignant/SOB/lobular_carcinoma", ("14-13412",)),
    ):
        for slide in slides:
            for power in ("40", "100", "200", "400"):
                name = f"SOB_{short}-{slide}-{power}-001.png"
                image(home / place / f"SOB_{short}_{slide}" / f"{power}X" / name)


def lymphoma(folder: Path) -> None:
    for label in ("CLL", "FL", "MCL"):
        for case, part in (("sj-05-1374", "R2_005"), ("sj-05-1374", "R2_006"), (f"sj-05-33{len(label)}", "R1_001")):
            image(folder / label / f"{case.replace('05', '05' if label == 'FL' else f'0{len(label)}')}-{part}.tif")
    image(folder / "FL" / "unnamed_001.tif")


def glas(folder: Path) -> None:
    home = folder / "Warwick QU Dataset (Released 2016_07_08)"
    lines = ["name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"]
    for name, patient, grade in (
        ("testA_1", 4, "benign"),
        ("testB_1", 10, "malignant"),
        ("train_1", 10, "malignant"),
        ("train_2", 2, "benign"),
        ("train_3", 13, "benign"),
    ):
        image(home / f"{name}.bmp")
        mask(home / f"{name}_anno.bmp", (2, 2, 9, 9), (12, 12, 20, 20), values=(1, 2))
        lines.append(f"{name},{patient}, {grade}, healthy")
    text(home / "Grade.csv", *lines)


def pcam(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "valid", "test"):
        name = f"camelyonpatch_level_2_split_{part}"
        with h5py.File(folder / f"{name}_x.h5", "w") as file:
            file["x"] = rng.integers(0, 256, (6, 96, 96, 3), dtype=np.uint8)
        with h5py.File(folder / f"{name}_y.h5", "w") as file:
            file["y"] = np.array([0, 1, 0, 1, 1, 0], np.uint8).reshape(6, 1, 1, 1)
        rows = [f"{n},{n * 100},{n * 50},True,{bool(n % 2)},camelyon16_{part}_tumor_{n // 2:03d}" for n in range(6)]
        text(folder / f"{name}_meta.csv", ",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi", *rows)


def mhist(folder: Path) -> None:
    lines = ["Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition"]
    for place, name in enumerate(("aaa", "aab", "aac", "aae", "aaf", "aag")):
        image(folder / f"images/MHIST_{name}.png")
        lines.append(f"MHIST_{name}.png,{'SSA' if place % 2 else 'HP'},{place},{'test' if place > 3 else 'train'}")
    text(folder / "annotations.csv", *lines)


def lc25000(folder: Path) -> None:
    lines = ["stem,filename,label,tissue,local_cluster_label,group_id"]
    for place, label in enumerate(SETS["lc25000"].classes):
        tissue, kind = label.split("_")
        for n in range(1, 5):
            name = f"{tissue}{kind}{n}"
            image(folder / f"lung_colon_image_set/{tissue}_image_sets/{label}/{name}.jpeg")
            lines.append(f"{name},{name}.jpeg,{label},{tissue},{n // 3},{2 * place + n // 3}")
    text(folder / "lc25000_image_groups.csv", *lines)


def sipakmed(folder: Path) -> None:
    for label in SETS["sipakmed"].classes:
        image(folder / f"im_{label}/001.bmp", 40)
        text(folder / f"im_{label}/001_cyt01.dat", "1.0,2.0")
        for name in ("001_01", "001_02", "002_01"):
            image(folder / f"im_{label}/CROPPED/{name}.bmp")
            text(folder / f"im_{label}/CROPPED/{name}_nuc.dat", "1.0,2.0")


def one_hot(path: Path, classes: tuple[str, ...], named: dict[str, str]) -> None:
    rows = [",".join([name, *("1.0" if label == c else "0.0" for c in classes)]) for name, label in named.items()]
    text(path, ",".join(["image", *classes]), *rows)


def isic_2018(folder: Path) -> None:
    classes = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    lesions = ["image,lesion_id,diagnosis_confirm_type"]
    at = 24306
    for part, each in (("Training", 2), ("Validation", 1), ("Test", 1)):
        named = {}
        for label in classes:
            for n in range(each):
                named[name := f"ISIC_{(at := at + 1):07d}"] = label
                image(folder / f"ISIC2018_Task3_{part}_Input/{name}.jpg")
                lesions += [f"{name},HAM_{label}_{n // 2},single image expert consensus"] if part == "Training" else []
        one_hot(folder / f"ISIC2018_Task3_{part}_GroundTruth/ISIC2018_Task3_{part}_GroundTruth.csv", classes, named)
        text(folder / f"ISIC2018_Task3_{part}_Input/LICENSE.txt", "CC BY-NC 4.0")
    text(folder / "ISIC2018_Task3_Training_LesionGroupings.csv", *lesions)


def isic_2019(folder: Path) -> None:
    classes = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
    named = {f"ISIC_{n:07d}{'_downsampled' * (n == 3)}": classes[n % 8] for n in range(16)}
    rows = [
        f"{name},55.0,anterior torso,{'' if n == 5 else f'BCN_{n // 2:07d}'},female" for n, name in enumerate(named)
    ]
    for name in named:
        image(folder / f"ISIC_2019_Training_Input/{name}.jpg")
    one_hot(folder / "ISIC_2019_Training_GroundTruth.csv", classes, named)
    text(folder / "ISIC_2019_Training_Metadata.csv", "image,age_approx,anatom_site_general,lesion_id,sex", *rows)


def isic_2020(folder: Path) -> None:
    rows = [
        "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"
    ]
    for n in range(8):
        name, kind = f"ISIC_{2637011 + n}", "malignant" if n % 3 == 0 else "benign"
        image(folder / f"train/{name}.jpg")
        rows.append(f"{name},IP_{n // 2:07d},IL_{n:07d},male,45.0,head/neck,unknown,{kind},{int(n % 3 == 0)}")
    text(folder / "ISIC_2020_Training_GroundTruth_v2.csv", *rows)
    text(folder / "ISIC_2020_Training_Duplicates.csv", "image_name_1,image_name_2", "ISIC_2637011,ISIC_2637018")


def ham10000(folder: Path) -> None:
    rows = ["lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"]
    for n, label in enumerate(SETS["ham10000"].classes * 2):
        name = f"ISIC_{27419 + n:07d}"
        image(folder / f"HAM10000_images_part_{1 + n % 2}/{name}.jpg")
        rows.append(f"HAM_{n % 7:07d},{name},{label},histo,80.0,male,scalp,{'vidir_modern' if n % 2 else 'rosendahl'}")
    text(folder / "HAM10000_metadata.csv", *rows)


def monuseg(folder: Path) -> None:
    outlines = OUTLINE.format(region(box(2, 2, 8, 8)) + region(box(5, 5, 15, 12)) + region([(1, 1), (2, 2)]))
    for place, name in (
        ("MoNuSeg 2018 Training Data/{}", "TCGA-18-5592-01Z-00-DX1"),
        ("MoNuSeg 2018 Training Data/{}", "TCGA-38-6178-01Z-00-DX1"),
        ("MoNuSegTestData", "TCGA-2Z-A9J9-01A-01-TS1"),
    ):
        image(folder / place.format("Tissue Images") / f"{name}.tif")
        text(folder / place.format("Annotations") / f"{name}.xml", outlines)


def tnbc(folder: Path) -> None:
    for slide in ("01", "02", "11"):
        for n in (1, 2):
            image(folder / f"TNBC_NucleiSegmentation/Slide_{slide}/{slide}_{n}.png", mode="RGBA")
            mask(folder / f"TNBC_NucleiSegmentation/GT_{slide}/{slide}_{n}.png", (2, 2, 8, 8), (12, 3, 20, 9))
    image(folder / "__MACOSX/TNBC_NucleiSegmentation/Slide_01/._01_1.png")


def dsb2018(folder: Path) -> None:
    for n in range(3):
        name = f"{n:064x}"
        image(folder / f"stage1_train/{name}/images/{name}.png", mode="RGBA")
        mask(folder / f"stage1_train/{name}/masks/{1:064x}.png", (2, 2, 8, 8))
        mask(folder / f"stage1_train/{name}/masks/{2:064x}.png", (5, 5, 15, 12))
        mask(folder / f"stage1_train/{name}/masks/{3:064x}.png")


def medmnist(folder: Path, data: DataSet) -> None:
    rng = np.random.default_rng(0)
    side, arrays = int(data.name.partition("-")[2] or 28), {}
    for part in ("train", "val", "test"):
        labels = np.arange(len(data.classes))
        coarse = rng.integers(0, 256, (len(labels), 4, 4, 3), dtype=np.uint8)
        arrays[f"{part}_images"] = coarse.repeat(side // 4, 1).repeat(side // 4, 2)
        arrays[f"{part}_labels"] = labels[:, None].astype(np.uint8)
    np.savez_compressed(folder / data.files[0].name, **arrays)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "bach": bach,
    "bach-wsi": bach_wsi,
    "nct-crc": nct_crc,
    "breakhis": breakhis,
    "lymphoma": lymphoma,
    "glas": glas,
    "glas-graded": glas,
    "pcam": pcam,
    "mhist": mhist,
    "lc25000": lc25000,
    "sipakmed": sipakmed,
    "isic-2018": isic_2018,
    "isic-2019": isic_2019,
    "isic-2020": isic_2020,
    "ham10000": ham10000,
    "monuseg": monuseg,
    "tnbc": tnbc,
    "dsb2018": dsb2018,
}
WITHOUT_SLIDES = [name for name in SETS if name != "bach-wsi"]


@pytest.fixture
def laid(tmp_path: Path) -> Callable[[str], Path]:
    """``laid(name)`` -> a folder in the published layout of that data set."""

    def make(name: str) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        if name in LAYOUTS:
            LAYOUTS[name](folder)
        else:
            medmnist(folder, SETS[name])
        return folder

    return make


Laid = Callable[[str], Path]


def listed(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pixels(folder: Path, row: dict[str, str]) -> NDArray[np.int64]:
    return np.asarray(Image.open(folder / row["mask"])).astype(np.int64)


# The contract, for every set


@pytest.mark.parametrize("data", SETS.values(), ids=SETS)
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
