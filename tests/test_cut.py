"""Patches are cut where the mask says, named as it says, once, and with a manifest that training takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from slide_files import picture, write_jpeg_tiff
from tiny import bytes_of

from histill.cli import run
from histill.data import read_images, read_unlabelled
from histill.errors import BadInput, Failed, HistillError
from histill.slides.cut import PRESETS, Cut, cut_slides

SMALL = {"tile": 64, "stride": 32, "min_kb": 0.0, "min_tissue": 0.0}


def slide(path: Path, *, seed: int = 0, width: int = 400, height: int = 300, mpp: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_jpeg_tiff(path, [picture(height, width, seed)], mpp=(mpp, mpp))


def mask_of(width: int = 100, height: int = 75) -> np.ndarray:
    """Classes 1 and 2 at a quarter of the slide's size, with edges that no grid has."""
    mask = np.zeros((height, width), np.uint8)
    mask[9:50, 7:43] = 1
    mask[31:70, 55:93] = 2
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    slide(tmp_path / "slides" / "TCGA-AB-1234-01Z-00.tiff")
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask_of()).save(tmp_path / "masks" / "TCGA-AB-1234-01Z-00.png")
    return tmp_path


def test_labels_are_those_of_a_pixel_by_pixel_count(folder: Path) -> None:
    found = cut_slides([folder / "slides"], folder / "out", masks=folder / "masks", classes=("cm", "bcc"), **SMALL)
    rows = pd.read_csv(folder / "out" / "manifest.csv", dtype=str)
    full = np.kron(mask_of(), np.ones((4, 4), np.uint8))
    expected = {}
    for y in range(0, 300 - 64 + 1, 32):
        for x in range(0, 400 - 64 + 1, 32):
            part = full[y : y + 64, x : x + 64]
            shares = [(part == value).mean() for value in (1, 2)]
            if not part.any():
                expected[x, y] = "background"
            elif max(shares) > 0.75:
                expected[x, y] = ("cm", "bcc")[int(np.argmax(shares))]
    assert {(int(r.x), int(r.y)): r.label for r in rows.itertuples()} == expected
    assert set(expected.values()) == {"cm", "bcc", "background"}
    assert found.patches == {name: list(expected.values()).count(name) for name in ("cm", "bcc", "background")}
    assert list(rows) == ["path", "label", "patient", "site", "slide", "mpp", "x", "y"]
    assert set(rows["patient"]) == {"TCGA-AB-1234"}
    assert set(rows["site"]) == {"AB"}
    row = rows.iloc[0]
    pixels = np.asarray(Image.open(folder / "out" / row["path"]))
    assert pixels.shape == (64, 64, 3)
    left, top = int(row["x"]), int(row["y"])
    source = picture(300, 400)[top : top + 64, left : left + 64]
    assert np.abs(pixels.astype(int) - source).mean() < 12  # a JPEG of it


def test_training_takes_the_manifest_and_the_folder(folder: Path) -> None:
    cut_slides([folder / "slides"], folder / "out", masks=folder / "masks", classes=("cm", "bcc"), **SMALL)
    images = read_images(folder / "out" / "manifest.csv")
    assert images.classes == ("background", "bcc", "cm")
    assert images.has_patients
    assert read_images(folder / "out").classes == images.classes


def test_geojson_cuts_as_its_mask_does(folder: Path) -> None:
    boxes = {"cm": (28, 36, 172, 200), "bcc": (220, 124, 372, 280)}
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[a, b], [c, b], [c, d], [a, d], [a, b]]]},
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for name, (a, b, c, d) in boxes.items()
    ]
    (folder / "json").mkdir()
    text = json.dumps({"type": "FeatureCollection", "features": features})
    (folder / "json" / "TCGA-AB-1234-01Z-00.geojson").write_text(text)
    cut_slides([folder / "slides"], folder / "a", masks=folder / "masks", classes=("cm", "bcc"), **SMALL)
    cut_slides([folder / "slides"], folder / "b", masks=folder / "json", **SMALL)
    assert (folder / "a" / "manifest.csv").read_text() == (folder / "b" / "manifest.csv").read_text()
    only = cut_slides([folder / "slides"], folder / "c", masks=folder / "json", classes=("bcc",), **SMALL)
    assert set(only.patches) == {"bcc", "background"}


def test_a_black_and_white_mask_takes_its_class_from_the_path(tmp_path: Path) -> None:
    for name in ("bcc/a", "cm/b"):
        slide(tmp_path / f"{name}.tiff", seed=len(name))
    (tmp_path / "masks").mkdir()
    for name in "ab":
        Image.fromarray(np.where(mask_of() == 1, 255, 0).astype(np.uint8)).save(tmp_path / "masks" / f"{name}_mask.png")
    slides = [tmp_path / "bcc", tmp_path / "cm"]
    how = {"label": r"/(bcc|cm)/", "background": "", "site": r"(\w+)/\w\.tiff", **SMALL}
    found = cut_slides(slides, tmp_path / "out", masks=tmp_path / "masks", **how)
    assert set(found.patches) == {"bcc", "cm"}
    rows = pd.read_csv(tmp_path / "out" / "manifest.csv", dtype=str)
    assert rows.groupby("slide")["label"].first().to_dict() == {"a.tiff": "bcc", "b.tiff": "cm"}
    assert rows.groupby("patient")["site"].first().to_dict() == {"a": "bcc", "b": "cm"}


def test_presets_are_the_papers() -> None:
    assert PRESETS["lesion"] == Cut(mpp=0.5, tile=512, stride=256, share=0.75, min_kb=330.0)
    pretrain = PRESETS["pretrain"]
    assert (pretrain.mpp, pretrain.tile, pretrain.stride, pretrain.intensity) == (0.5, 1024, 1024, (50.0, 245.0))


def test_pretraining_keeps_what_is_neither_dark_nor_white(tmp_path: Path) -> None:
    full = np.zeros((64, 64 * 5, 3), np.uint8)
    for number, grey in enumerate((30, 60, 150, 240, 250)):
        full[:, 64 * number : 64 * number + 64] = grey
    write_jpeg_tiff(tmp_path / "a.tiff", [full])
    found = cut_slides([tmp_path / "a.tiff"], tmp_path / "out", tile=64, stride=64)
    assert found.patches == {"": 3}
    assert found.left_out == {"of another intensity": 2}
    assert len(read_unlabelled(tmp_path / "out")) == 3
    assert sorted(p.name for p in (tmp_path / "out" / "a").glob("*.png")) == [
        "a_128_0.png",
        "a_192_0.png",
        "a_64_0.png",
    ]


@pytest.mark.parametrize(
    ("preset", "columns"), [("lesion", [0, 32, 64, 96, 128, 160, 192]), ("pretrain", [0, 64, 128, 192])]
)
def test_patches_of_another_size_overlap_as_the_preset_s_do(
    tmp_path: Path, preset: Literal["lesion", "pretrain"], columns: list[int]
) -> None:
    write_jpeg_tiff(tmp_path / "a.tiff", [picture(64, 256)])
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.ones((16, 64), np.uint8)).save(tmp_path / "masks" / "a.png")
    masks = tmp_path / "masks" if preset == "lesion" else None
    cut_slides([tmp_path / "a.tiff"], tmp_path / "out", preset=preset, masks=masks, tile=64, min_tissue=0.0, min_kb=0.0)
    assert sorted(pd.read_csv(tmp_path / "out" / "manifest.csv")["x"].unique()) == columns


def test_small_files_and_little_tissue_are_left_out(tmp_path: Path) -> None:
    full = np.full((256, 256, 3), 244, np.uint8)
    full[:, :128] = picture(256, 128) // 2 + [110, 20, 90]  # tissue, as rough as noise
    write_jpeg_tiff(tmp_path / "a.tiff", [full], mpp=(8.0, 8.0))
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "masks" / "a.png")
    how = {"masks": tmp_path / "masks", "mpp": 8.0, "tile": 64, "stride": 64}
    by_bytes = cut_slides([tmp_path / "a.tiff"], tmp_path / "b", min_tissue=0.0, min_kb=4.0, **how)
    by_tissue = cut_slides([tmp_path / "a.tiff"], tmp_path / "c", min_tissue=0.5, min_kb=0.0, **how)
    assert by_bytes.patches == by_tissue.patches == {"background": 8}
    assert by_bytes.left_out == {"below 4 kB": 8}
    # Of another tile than the preset's 512 px the bytes go with the area: 330 kB / 64.
    with pytest.raises(Failed, match=r"16 below 5\.15625 kB"):
        cut_slides([tmp_path / "a.tiff"], tmp_path / "d", min_tissue=0.0, **how)


def test_a_killed_cut_goes_on_and_a_done_one_changes_nothing(folder: Path) -> None:
    slide(folder / "slides" / "b.tiff", seed=5)
    Image.fromarray(mask_of()).save(folder / "masks" / "b.png")
    how = {"masks": folder / "masks", "classes": ("cm", "bcc"), **SMALL}
    cut_slides([folder / "slides"], folder / "out", **how)
    whole = bytes_of(folder / "out")
    again = folder / "again"
    cut_slides([folder / "slides" / "b.tiff"], again, **how)
    times = {p: p.stat().st_mtime_ns for p in again.rglob("*.png")}
    (again / "cm" / ".b_32_64.png.0123abcd.tmp").write_bytes(b"half")  # what a kill leaves
    (again / "manifest.csv").unlink()
    found = cut_slides([folder / "slides"], again, **how)
    assert found.slides == 2
    assert bytes_of(again) == whole
    assert all(p.stat().st_mtime_ns == before for p, before in times.items())
    assert not list(again.rglob("*.tmp"))
    with pytest.raises(BadInput, match="other arguments"):
        cut_slides([folder / "slides"], again, **(how | {"stride": 64}))
    slide(folder / "other" / "b.tiff", seed=9)
    with pytest.raises(Failed, match="another slide of this name"):
        cut_slides([folder / "other" / "b.tiff"], again, **how)


def test_one_bad_slide_does_not_stop_the_others(folder: Path) -> None:
    (folder / "slides" / "bad.tiff").write_bytes(b"II*\0junk")
    slide(folder / "slides" / "unmarked.tiff")
    with pytest.raises(Failed, match=r"2 of 3 slides failed: .*bad\.tiff: .*unmarked\.tiff: no mask in"):
        cut_slides([folder / "slides"], folder / "out", masks=folder / "masks", classes=("cm", "bcc"), **SMALL)
    assert len(pd.read_csv(folder / "out" / "manifest.csv")) > 10


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"preset": "lesion"}, "needs --masks"),
        ({"masks": Path("nowhere")}, "no such folder"),
        ({"tile": 64, "stride": 65}, "--stride 65"),
        ({"patient": "("}, "--patient.*not a regular expression"),
    ],
)
def test_arguments_that_cannot_be(folder: Path, how: dict[str, object], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        cut_slides([folder / "slides"], folder / "out", **how)  # type: ignore[arg-type]


def test_a_mask_with_too_many_values_or_two_slides_of_one_name(folder: Path) -> None:
    with pytest.raises(Failed, match="value 2 has no name"):
        cut_slides([folder / "slides"], folder / "out", masks=folder / "masks", classes=("cm",), **SMALL)
    slide(folder / "more" / "TCGA-AB-1234-01Z-00.tiff")
    with pytest.raises(BadInput, match="two slides"):
        cut_slides([folder / "slides", folder / "more"], folder / "out", **SMALL)


@pytest.mark.parametrize("text", ["[]", '{"digest": "x"}', '{"digest": "x", "left_out": {}, "rows": [{"odd": 1}]}'])
def test_a_damaged_record_is_named(folder: Path, tmp_path: Path, text: str) -> None:
    slides, how = [folder / "slides"], {"preset": "pretrain", **SMALL}
    cut_slides(slides, tmp_path / "out", **how)  # type: ignore[arg-type]
    for name in ("TCGA-AB-1234-01Z-00.json", "another.json"):
        record = tmp_path / "out" / ".slides" / name
        before = record.read_text() if record.exists() else None
        record.write_text(text)
        with pytest.raises(HistillError, match=rf"{name} is no record"):
            cut_slides(slides, tmp_path / "out", **how)  # type: ignore[arg-type]
        record.unlink()
        if before:
            record.write_text(before)


def test_a_manifest_of_somebody_else_s_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.csv").write_text("path,label\n")
    with pytest.raises(BadInput, match=r"has a manifest\.csv that is not of patches"):
        cut_slides([folder / "slides"], tmp_path / "mine", preset="pretrain")
    assert (tmp_path / "mine" / "manifest.csv").read_text() == "path,label\n"


def test_no_patch_at_all_says_what_left_them_out(folder: Path) -> None:
    with pytest.raises(Failed, match=r"no patch was kept; left out: .*below 1000 kB"):
        cut_slides([folder / "slides"], folder / "out", masks=folder / "masks", **(SMALL | {"min_kb": 1000.0}))


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"tiles {folder}/slides --out {folder}/out --masks {folder}/masks --classes cm bcc --tile 64 --stride 32"
    assert run([*words.split(), "--min-kb", "0", "--min-tissue", "0"]) == 0
    assert re.search(r"\d+ patches of 1 slide in", capsys.readouterr().out)
    assert run(f"tiles {folder}/none.svs --out {folder}/b".split()) == 2
    assert "no such slide" in capsys.readouterr().err
