"""A small folder in the published layout of each data set, names and columns as they were published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from conftest import picture
from PIL import Image

from histill.data.sets import SETS, DataSet

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


def bach(folder: Path, each: int = 3) -> None:
    for label, prefix in (("Benign", "b"), ("InSitu", "is"), ("Invasive", "iv"), ("Normal", "n")):
        for n in range(1, each + 1):
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


SLIDES_AT_40 = {
    "benign/SOB/fibroadenoma/SOB_B_F": "14134:36 14134E:29 25197:22 29960AB:18 23060CD:14 23060AB:23 9133:26 "
    "23222AB:17 21998CD:37 21998EF:31",
    "benign/SOB/tubular_adenoma/SOB_B_TA": "21978AB:16 3411F:16 16184:39 15275:12 16184CD:35 19854C:16 13200:15",
    "benign/SOB/phyllodes_tumor/SOB_B_PT": "21998AB:58",
    "malignant/SOB/ductal_carcinoma/SOB_M_DC": "18650:29 15572:23 2980:20 15792:14 13412:32 6241:32 11520:25 5694:22 "
    "5695:23 16716:38 2773:30 17614:39 2523:10 4364:1 14015:18 16336:13 15696:23 12312:32 4372:21 11031:14 16188:24 "
    "9461:26 5287:23 11951:27 16601:12 13993:37 10926:11 20629:36 16448:11 16875:14 3909:26 17915:26 2985:20 17901:26 "
    "20636:25 8168:10 14946:31 14926:20",
    "malignant/SOB/mucinous_carcinoma/SOB_M_MC": "18842:15 13418DE:15 18842D:16 13413:29 16456:46 12773:26 10147:15 "
    "19979:26 19979C:17",
}
"""How many images BreaKHis has at 40x of each slide (of 2014): all of the kinds that eva uses, and one of another."""


def breakhis_at_40(folder: Path) -> None:
    home = folder / "BreaKHis_v1/histology_slides/breast"
    for place, slides in SLIDES_AT_40.items():
        kind = place.rpartition("/")[2]
        for slide, count in (said.split(":") for said in slides.split()):
            for n in range(int(count)):
                image(home / f"{place}_14-{slide}/40X/{kind}-14-{slide}-40-{n + 1:03d}.png", size=8)


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


GREY = ("oct", "pneumonia", "breast", "tissue", "organa", "organc", "organs", "chest")
"""The sets of MedMNIST that are published with one channel, arrays of three axes; the others have a fourth of three."""


def medmnist(folder: Path, data: DataSet) -> None:
    rng = np.random.default_rng(0)
    name, _, size = data.name.partition("-")
    side, colours = int(size or 28), () if name.removesuffix("mnist") in GREY else (3,)
    arrays = {}
    for part in ("train", "val", "test"):
        labels = np.arange(len(data.classes), dtype=np.uint8)[:, None]
        if name == "chestmnist":  # no finding, two, one
            labels = np.eye(14, dtype=np.uint8)[[0, 3, 13]] | np.eye(14, dtype=np.uint8)[[0, 7, 13]]
            labels[0] = 0
        coarse = rng.integers(0, 256, (len(labels), 4, 4, *colours), dtype=np.uint8)
        arrays[f"{part}_images"] = coarse.repeat(side // 4, 1).repeat(side // 4, 2)
        arrays[f"{part}_labels"] = labels
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


def lay(name: str, folder: Path) -> Path:
    """Make the folder of the data set ``name``."""
    folder.mkdir(exist_ok=True)
    if name in LAYOUTS:
        LAYOUTS[name](folder)
    else:
        medmnist(folder, SETS[name])
    return folder
