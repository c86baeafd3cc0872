"""A leak planted in each kind of split is found, and what is not found is said here."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import MakeFolder, picture, write_classes
from PIL import Image, ImageOps

from histill.data import Images, read_images, read_masks, split
from histill.data.check import check
from histill.data.images import SPLITS, read_unlabelled
from histill.data.packed import pack
from histill.errors import BadInput
from histill.transfer import check_apart

PAIRS = list(combinations(SPLITS, 2))


@pytest.fixture
def three(folder: MakeFolder) -> Path:
    """Class folders of 40 px below train, val and test."""
    return folder({f"{part}/{label}": 3 for part in SPLITS for label in "ab"}, size=40)


def first(root: Path, part: str) -> Path:
    return sorted((root / part / "a").iterdir())[0]


def manifest(root: Path, **columns: list[str]) -> Path:
    """Six images listed with whatever columns."""
    write_classes(root, {"a": 3, "b": 3}, size=40)
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    pd.DataFrame({"path": paths, "label": [p[0] for p in paths], **columns}).to_csv(root / "m.csv", index=False)
    return root / "m.csv"


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_same_file_in_two_folders(three: Path, one: str, other: str) -> None:
    (three / other / "a" / "again.png").write_bytes(first(three, one).read_bytes())
    with pytest.raises(BadInput, match=r"leak: 1 images are in two splits: .*again\.png"):
        read_images(three)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_same_pixels_in_another_file(three: Path, one: str, other: str) -> None:
    Image.open(first(three, one)).save(three / other / "a" / "again.bmp")
    images = read_images(three)
    with pytest.raises(BadInput, match=r"leak: 1 images are in two splits: .*again\.bmp"):
        pack(images, 24)
    assert "the same picture in two splits" in check(images).errors[0]


@pytest.mark.parametrize("change", ["jpeg", "smaller", "brighter", "stained"])
def test_nearly_the_same_picture_is_noticed(three: Path, change: str) -> None:
    Image.fromarray(picture(900, size=160)).save(three / "train" / "a" / "large.png")
    large = Image.open(three / "train" / "a" / "large.png")
    again = three / "test" / "a" / "again.jpg"
    if change == "jpeg":
        large.save(again, quality=70)
    elif change == "smaller":
        large.resize((90, 90)).save(again, quality=95)
    else:
        scale = np.array([1.1, 1.1, 1.1] if change == "brighter" else [1.05, 0.95, 1.0])
        Image.fromarray((np.asarray(large) * scale).clip(0, 255).astype(np.uint8)).save(again, quality=95)
    found = check(read_images(three))
    assert [sorted(p["splits"]) for p in found.summary["near_copies"]] == [["test", "train"]]
    assert "leak: 1 pairs of nearly the same picture in two splits" in found.summary["notices"][-1]


@pytest.mark.parametrize("change", ["mirrored", "turned", "cut"])
def test_a_mirrored_turned_or_recut_copy_is_not_found(three: Path, change: str) -> None:
    """Nobody may think otherwise: only a patient, a slide or a site keeps such copies together."""
    large = Image.fromarray(picture(901, size=160))
    large.save(three / "train" / "a" / "large.png")
    changed = {"mirrored": ImageOps.mirror(large), "turned": large.rotate(20), "cut": large.crop((40, 30, 160, 150))}
    changed[change].save(three / "test" / "a" / "again.png")
    assert check(read_images(three)).summary["near_copies"] == []
    pack(read_images(three), 24)


@pytest.mark.parametrize("column", ["patient", "slide"])
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_manifest_that_divides_a_patient_or_a_slide(tmp_path: Path, column: str, one: str, other: str) -> None:
    names = ["p0", "p1", "p2", "p3", "p4", "p0"]
    parts = [one, "train", "val", "test", "train", other]
    with pytest.raises(BadInput, match="leak: 1 patients are in two splits: p0"):
        read_images(manifest(tmp_path / "data", **{column: names, "split": parts}))


def test_a_slide_is_not_divided_where_no_patient_is_named(tmp_path: Path) -> None:
    slides = [f"{'ab'[i // 12]}{i // 3 % 4}" for i in range(24)]
    root = write_classes(tmp_path / "data", {"a": 12, "b": 12})
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    table = pd.DataFrame({"path": paths, "label": [p[0] for p in paths], "slide": slides})
    table.to_csv(root / "m.csv", index=False)
    for seed in range(5):
        parts = split(read_images(root / "m.csv"), val=0.25, test=0.25, seed=seed).frame
        assert parts.groupby("slide")["split"].nunique().max() == 1
    named = table.assign(patient=[s[0] + str(int(s[1]) // 2) for s in slides])
    named.to_csv(root / "m.csv", index=False)
    assert set(read_images(root / "m.csv").frame["patient"]) == {"a0", "a1", "b0", "b1"}


def test_a_pattern_that_reads_patients_finds_one_in_two_folders(three: Path) -> None:
    (three / "test" / "a" / "p000_9.png").write_bytes(b"")
    Image.fromarray(picture(902, size=40)).save(three / "test" / "a" / "p000_9.png")
    with pytest.raises(BadInput, match="leak: 1 patients are in two splits: p000"):
        read_images(three, patient=r"p\d+")


def test_repeats_each_keep_patients_and_copies_whole(folder: MakeFolder) -> None:
    """Histill repeats a random split by seed; it has no folds."""
    root = folder({"a": 24, "b": 24}, per_patient=3)
    (root / "a" / "p090_0.png").write_bytes((root / "a" / "p001_3.png").read_bytes())
    data = read_images(root)
    for seed in range(20):
        frame = split(data, val=0.2, test=0.2, seed=seed).frame
        assert frame.groupby("content")["split"].nunique().max() == 1
    data = read_images(root, patient=r"p\d+")
    said = []
    for seed in range(20):
        try:
            frame = split(data, val=0.2, test=0.2, seed=seed).frame
            assert frame.groupby("patient")["split"].nunique().max() == 1
        except BadInput as error:  # the copy is called another patient's, and the two were divided
            said.append(str(error))
    assert 0 < len(said) < 20
    assert all("leak: 1 images are in two splits: a/p001_3.png" in line for line in said)


def masked(root: Path, suffix: str) -> Path:
    """Four images with masks; the last is the first again, in another split and perhaps another file."""
    rows = []
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number, part in enumerate(("train", "val", "test", "test")):
        pixels = Image.fromarray(picture(0 if number == 3 else number, size=40))
        name = f"images/{number}{suffix if number == 3 else '.png'}"
        pixels.save(root / name)
        mask = np.zeros((40, 40), np.uint8)
        mask[5 : 20 + number, 5:20] = 1
        Image.fromarray(mask).save(root / f"masks/{number}.png")
        rows.append({"path": name, "mask": f"masks/{number}.png", "split": part})
    pd.DataFrame(rows).to_csv(root / "m.csv", index=False)
    return root / "m.csv"


def test_an_image_with_another_mask_in_two_splits(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="leak: 1 images are in two splits"):
        read_masks(masked(tmp_path / "file", ".png"))
    images = read_masks(masked(tmp_path / "pixels", ".bmp"))
    with pytest.raises(BadInput, match="leak: 1 images are in two splits"):
        pack(images, 24)


@pytest.mark.parametrize(("part", "found"), [("val", True), ("test", True), ("train", False)])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_unlabelled_images_that_are_validation_or_test_images(
    three: Path, tmp_path: Path, part: str, found: bool, suffix: str
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    Image.fromarray(picture(903, size=40)).save(more / "own.png")
    Image.open(first(three, part)).save(more / f"again{suffix}")
    images: Images = split(read_images(three))
    if not found:
        check_apart(read_unlabelled(more), images)
        return
    with pytest.raises(
        BadInput, match=rf"leak: 1 images of --unlabelled are validation or test images: again\{suffix}"
    ):
        check_apart(read_unlabelled(more), images)


def test_tiles_of_one_slide_are_one_patients(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    pytest.importorskip("shapely")
    from histill.data.phantom import write_slide
    from histill.slides.cut import cut_slides

    for number in range(2):
        write_slide(tmp_path / "slides" / f"{number}.tiff", width=768, height=768, mpp=0.5, seed=number, levels=1)
    for name, patient, patients in (("own", None, 2), ("named", r"slides", 1)):
        cut_slides([tmp_path / "slides"], tmp_path / name, tile=128, stride=128, mpp=0.5, patient=patient)
        table = pd.read_csv(tmp_path / name / "manifest.csv", dtype=str)
        assert table["patient"].nunique() == patients
        assert table["slide"].nunique() == 2
