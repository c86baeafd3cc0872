"""``histill data check`` finds what was planted, and shows it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeFolder, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from histill.cli import run
from histill.data import read_images, split
from histill.data.check import _near, check
from histill.errors import BadInput


def test_a_sound_folder_is_counted_and_called_sound(folder: MakeFolder) -> None:
    found = check(split(read_images(folder({"benign": 12, "malignant": 6}), patient=r"p\d+"), val=0.25, test=0.25))
    assert found.errors == ()
    assert found.summary["counts"] == {
        "benign": {"test": 3, "train": 6, "val": 3},
        "malignant": {"test": 1, "train": 3, "val": 2},
    }
    assert (found.summary["images"], found.summary["patients"]) == (18, 18)
    assert found.summary["sizes"] == {"smallest": 24, "median": 24, "largest": 24}
    assert found.summary["copies"] == found.summary["near_copies"] == found.summary["notices"] == []
    text = str(found)
    assert text.startswith("18 images, 2 classes, 18 patients")
    assert text.endswith("nothing that would stop a training")


def test_sizes_modes_and_unreadable_files_are_told(folder: MakeFolder) -> None:
    root = folder({"a": 3, "b": 3})
    Image.fromarray(picture(70, size=50)[:30, :, 0]).save(root / "a" / "grey.png")
    (root / "b" / "bad.png").write_bytes(b"no picture")
    found = check(read_images(root))
    assert found.summary["sizes"] == {"smallest": 24, "median": 24, "largest": 50}
    assert found.summary["notices"][0].startswith("1 unreadable images: ")
    assert found.summary["notices"][1] == "1 images of another mode: a/grey.png (L)"
    assert found.summary["unreadable"] == [f"{root / 'b' / 'bad.png'}: not an image of a known kind"]
    assert "no patients known: intervals will be over images" in str(found)
    for path in root.rglob("*.png"):
        path.write_bytes(str(path).encode())
    with pytest.raises(BadInput, match="none of 8 images is readable"):
        check(read_images(root))


@pytest.mark.parametrize(("place", "is_error"), [("test/a", True), ("train/a", False)])
def test_a_copy_in_another_container_is_found(folder: MakeFolder, place: str, is_error: bool) -> None:
    root = folder({f"{name}/{label}": 3 for name in ("train", "test") for label in "ab"}, size=40)
    Image.open(root / "train" / "a" / "p000_0.png").save(root / place / "copy.bmp")
    found = check(read_images(root))
    pair = {"train/a/p000_0.png", f"{place}/copy.bmp"}
    assert [set(p["paths"]) for p in found.summary["copies"]] == [pair]
    assert found.summary["near_copies"] == []
    lines = found.errors if is_error else found.summary["notices"]
    assert len(lines) == 1
    assert lines[0].startswith("leak: 1 pairs of the same picture in two splits" if is_error else "1 pairs of the same")
    assert all(name in lines[0] for name in pair)
    assert len(found.errors) == is_error


def test_a_compressed_copy_is_nearly_the_same_picture(folder: MakeFolder) -> None:
    root = folder({f"{name}/{label}": 8 for name in ("train", "test") for label in "ab"}, size=64)
    Image.open(root / "train" / "a" / "p000_0.png").save(root / "test" / "a" / "again.jpg", quality=75)
    Image.open(root / "train" / "b" / "p008_0.png").resize((48, 48)).save(root / "train" / "a" / "small.png")
    found = check(read_images(root))
    near = [set(pair["paths"]) for pair in found.summary["near_copies"]]
    expected = ({"train/a/p000_0.png", "test/a/again.jpg"}, {"train/b/p008_0.png", "train/a/small.png"})
    assert len(near) == 2
    assert all(pair in near for pair in expected)
    assert all(0 <= pair["bits_apart"] <= 8 for pair in found.summary["near_copies"])
    assert found.errors == ()  # nearly the same is for people to judge
    text = "\n".join(found.summary["notices"])
    assert "leak: 1 pairs of nearly the same picture in two splits" in text
    assert "1 pairs of nearly the same picture with two labels" in text


def test_empty_fields_are_not_like_one_another(tmp_path: Path) -> None:
    for label, level in (("a", 200), ("b", 240)):
        (tmp_path / label).mkdir()
        for shade in range(3):
            Image.new("RGB", (32, 32), (level + shade,) * 3).save(tmp_path / label / f"{shade}.png")
    assert check(read_images(tmp_path)).summary["near_copies"] == []


def naive(hashes: list[NDArray[np.uint8]]) -> list[tuple[int, int, int]]:
    numbers = [int.from_bytes(h.tobytes()) for h in hashes]
    apart = [
        (a, b, (numbers[a] ^ numbers[b]).bit_count()) for a in range(len(numbers)) for b in range(a + 1, len(numbers))
    ]
    return [pair for pair in apart if pair[2] <= 8]


@given(seed=st.integers(0, 999), flips=st.lists(st.lists(st.integers(0, 255), max_size=12), max_size=12))
@settings(max_examples=30, deadline=None)
def test_near_hashes_are_those_that_counting_bits_finds(seed: int, flips: list[list[int]]) -> None:
    bits = np.random.default_rng(seed).integers(0, 2, (6, 256), dtype=np.uint8)
    for number, places in enumerate(flips):
        changed = bits[number % 6].copy()
        changed[places] ^= 1
        bits = np.vstack([bits, changed])
    hashes = list(np.packbits(bits, axis=1))
    assert _near(hashes) == naive(hashes)
    assert _near([]) == []


def test_thousands_are_compared_in_a_moment_and_a_flood_ends() -> None:
    hashes = list(np.random.default_rng(0).integers(0, 256, (4000, 32), dtype=np.uint8))
    hashes[3999] = hashes[17].copy()
    hashes[3999][5] ^= 3
    start = time.perf_counter()
    assert _near(hashes) == [(17, 3999, 2)]
    assert time.perf_counter() - start < 5
    assert len(_near([hashes[0]] * 1000)) == 10_000


def test_the_sheet_shows_every_class_and_the_json_is_the_summary(folder: MakeFolder, tmp_path: Path) -> None:
    found = check(read_images(folder({"a": 20, "b": 3, "c": 1}, size=120)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "check.json").read_text()) == found.summary
    with Image.open(tmp_path / "out" / "images.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (8 * 96, 3 * 114)
        pixels = np.asarray(sheet.convert("RGB"))
    shown = [
        [(pixels[row * 114 + 18 :][:94, column * 96 :][:, :94] != 255).mean() > 0.9 for column in range(8)]
        for row in range(3)
    ]
    assert shown == [[True] * 8, [True] * 3 + [False] * 5, [True] + [False] * 7]
    assert all((pixels[row * 114 :][:18, :100] < 100).any() for row in range(3))  # the class's name
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["check.json", "images.png"]


def test_the_command(folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder({f"{name}/{label}": 3 for name in ("train", "test") for label in "ab"})
    assert run(["data", "check", str(root), "--out", str(tmp_path / "out"), "--patient", r"p\d+"]) == 0
    said = capsys.readouterr()
    assert "12 images, 2 classes, 12 patients" in said.out
    assert said.err == ""
    (root / "test" / "b" / "bad.png").write_bytes(b"")
    assert run(["data", "check", str(root)]) == 0
    assert run(["data", "check", str(root), "--strict"]) == 2
    assert "bad.png" in capsys.readouterr().err
    Image.open(root / "train" / "a" / "p000_0.png").save(root / "test" / "a" / "copy.bmp")
    assert run(["data", "check", str(root)]) == 2
    assert capsys.readouterr().err.startswith("histill: leak: 1 pairs of the same picture in two splits")


def test_images_with_masks_are_looked_at_like_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks of 16 bits, one nucleus of a quarter of each; the first picture is in two splits, in two formats."""
    rows = ["path,mask,split"]
    mask = np.zeros((24, 24), np.uint16)
    mask[:12, :12] = 300
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for number, (name, part) in enumerate((("a.png", "train"), ("b.png", "train"), ("c.bmp", "val"))):
        Image.fromarray(picture(number % 2)).save(tmp_path / name)
        rows.append(f"{name},mask.png,{part}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    assert run(["data", "check", str(tmp_path / "manifest.csv"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().out
    assert "3 images, masks of instances, no patients known" in said
    assert "pixels background 75.0%, nucleus 25.0%\nnuclei 3\n" in said
    assert "leak: 1 pairs of the same picture in two splits: a.png = c.bmp" in said
    summary = json.loads((tmp_path / "out" / "check.json").read_text())
    assert summary["counts"] == {"all": {"train": 2, "val": 1}}
    assert (summary["masks"], summary["nuclei"], summary["pixels"]) == (
        "instances",
        3,
        {"background": 0.75, "nucleus": 0.25},
    )
    with Image.open(tmp_path / "out" / "images.png") as sheet:
        assert sheet.size == (8 * 96, 96 + 18)
