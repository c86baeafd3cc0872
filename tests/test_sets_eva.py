"""By eva, the sets that eva splits have its parts, and what it reports on is a test that nothing is chosen on."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import pytest
from layouts import bach, breakhis_at_40, lay
from test_sets import listed

from histill.cli import run
from histill.data import split
from histill.data.sets import SETS, get, manifest, read
from histill.errors import BadInput

# What eva 0.4.5 itself expects to find, its "val" called test where it has no other.
EVA = {
    "bach": {"train": 268, "test": 132},
    "breakhis": {"train": 1_132, "test": 339},
    "nct-crc": {"train": 100_000, "test": 7_180},
    "mhist": {"train": 2_175, "test": 977},
    "pcam": {"train": 262_144, "val": 32_768, "test": 32_768},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of BACH, and of BreaKHis at 40x, with all their images."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("bach", "breakhis")}
    bach(folders["bach"], 100)
    breakhis_at_40(folders["breakhis"])
    return folders


def test_eva_splits_five_of_the_sets() -> None:
    assert {name: data.eva.images for name, data in SETS.items() if data.eva} == EVA


@pytest.mark.parametrize("name", ["bach", "breakhis"])
def test_the_whole_set_by_eva_has_evas_sizes(
    name: str, whole: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    images = read(SETS[name], whole[name], by="eva")
    assert images.frame["split"].value_counts().to_dict() == EVA[name]
    assert capfd.readouterr().err == ""
    assert (whole[name] / "manifest_eva.csv").exists()
    # The test stays as it is where a validation part is cut.
    parts = split(images, val=0.2)
    assert set(parts.frame["path"][parts.frame["split"] == "test"]) == {
        path for path, part in zip(images.frame["path"], images.frame["split"]) if part == "test"
    }
    assert (parts.frame["split"] == "val").any()


def test_bach_by_eva_is_counted_in_order(whole: dict[str, Path]) -> None:
    rows = {Path(row["path"]).stem: row["split"] for row in listed(manifest(SETS["bach"], whole["bach"], by="eva"))}
    # Place 0 is b001, 100 is001, 200 iv001, 300 n001; by hand from the ranges of training.
    train = [(0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400)]
    names = [f"{prefix}{n:03d}" for prefix in ("b", "is", "iv", "n") for n in range(1, 101)]
    assert {name for name, part in rows.items() if part == "train"} == {n for a, b in train for n in names[a:b]}
    assert (rows["b041"], rows["b042"], rows["n045"], rows["n046"]) == ("train", "test", "train", "test")


def test_bach_by_eva_is_not_counted_with_one_missing(tmp_path: Path) -> None:
    bach(tmp_path, 100)
    next(tmp_path.rglob("iv050.tif")).unlink()
    with pytest.raises(BadInput, match="100 photographs of each class; there are Benign 100, InSitu 100, Invasive 99,"):
        manifest(SETS["bach"], tmp_path, by="eva")


def test_breakhis_by_eva_has_four_kinds_and_no_slide_in_both(whole: dict[str, Path]) -> None:
    rows = listed(manifest(SETS["breakhis"], whole["breakhis"], by="eva"))
    assert {row["label"] for row in rows} == {"DC", "F", "MC", "TA"}
    parts = {part: {row["patient"] for row in rows if row["split"] == part} for part in ("train", "test")}
    assert len(parts["test"]) == 14
    assert not parts["train"] & parts["test"]
    # But for letters, four cases are: what the record says.
    cases = {part: {re.sub("[A-Z]", "", slide) for slide in slides} for part, slides in parts.items()}
    assert cases["train"] & cases["test"] == {"14-16184", "14-18842", "14-19979", "14-23060"}
    assert get("breakhis").eva.split.endswith("so cases 16184, 18842, 19979 and 23060 are in both")  # type: ignore[union-attr]


def test_breakhis_by_eva_is_at_40x_alone(tmp_path: Path) -> None:
    rows = listed(manifest(SETS["breakhis"], lay("breakhis", tmp_path / "data"), by="eva"))
    assert [(row["label"], row["site"], row["patient"]) for row in rows] == [
        ("DC", "40X", "14-10926"),
        ("DC", "40X", "14-13412"),
    ]


@pytest.mark.parametrize("name", ["nct-crc", "mhist", "pcam"])
def test_by_eva_may_be_as_published(name: str, tmp_path: Path) -> None:
    folder = lay(name, tmp_path / "data")
    path = manifest(SETS[name], folder, by="eva")
    assert path.name == "manifest_eva.csv"
    assert path.read_bytes() == manifest(SETS[name], folder).read_bytes()
    assert {row["split"] for row in listed(path)} == set(EVA[name])


def test_evas_test_stays_whole_where_two_slides_have_a_blank_tile(tmp_path: Path) -> None:
    folder = lay("pcam", tmp_path / "data")
    for part in ("train", "test"):
        with h5py.File(folder / f"camelyonpatch_level_2_split_{part}_x.h5", "a") as file:
            file["x"][0] = file["x"][2] = 255 if part == "test" else 254  # both without tumour, of two slides
    counts = {}
    for by in ("patient", "eva"):
        rows = listed(manifest(SETS["pcam"], folder, by=by))  # type: ignore[arg-type]
        counts[by] = [sum(row["split"] == part for row in rows) for part in ("train", "val", "test")]
    assert counts == {"patient": [5, 6, 5], "eva": [5, 6, 6]}


@pytest.mark.parametrize("name", sorted(set(SETS) - set(EVA)))
def test_a_set_that_eva_does_not_split_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        manifest(SETS[name], tmp_path, by="eva")
    assert str(caught.value) == f"--by eva: the eva benchmark has no split of {name}; give --by patient or --by image"


def test_by_eva_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lay("mhist", tmp_path / "data")
    assert run(["data", "manifest", "mhist", str(folder), "--by", "eva"]) == 0
    assert f"next: histill distill dsnet --data {folder}/manifest_eva.csv" in capsys.readouterr().out
    # Refused before anything is downloaded or made.
    assert run(["data", "fetch", "sipakmed", "--out", str(tmp_path / "none"), "--by", "eva"]) == 2
    assert "the eva benchmark has no split of sipakmed" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
