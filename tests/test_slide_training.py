"""A recipe takes slides and masks, and ends with what whole slides of the test split are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from slide_files import picture, write_jpeg_tiff

import histill as hs
from histill import cli
from histill.data import read_masks, split
from histill.data.images import read_images
from histill.data.phantom import write_images
from histill.errors import BadInput, Failed
from histill.recipes import rckd
from histill.record import trained_mpp
from histill.slides import training
from histill.slides.cut import PRESETS, cut_slides
from histill.slides.training import judge_slides


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The papers' patches are of slides that take minutes to draw."""
    from dataclasses import replace

    small = {"tile": 64, "stride": 64, "min_kb": 0.0, "min_tissue": 0.0}
    monkeypatch.setitem(PRESETS, "lesion", replace(PRESETS["lesion"], **small))
    monkeypatch.setitem(PRESETS, "pretrain", replace(PRESETS["pretrain"], **small))


def slides_of(root: Path, count: int = 6) -> Path:
    """Slides whose left half is marked, as class 1 in even ones and 2 in odd ones, and coloured accordingly."""
    for name in ("slides", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        pixels = picture(256, 384, i)
        pixels[:, :192, i % 2] //= 3
        write_jpeg_tiff(root / "slides" / f"s{i}.tiff", [pixels], mpp=(0.5, 0.5))
        mask = Image.new("L", (96, 64))
        mask.paste(1 + i % 2, (0, 0, 48, 64))
        mask.save(root / "masks" / f"s{i}.png")
    return root


def words_of(root: Path, out: Path, *more: str) -> list[str]:
    """What every recipe is told: the slides, their masks, and a third of them aside twice."""
    words = ["--slides", str(root / "slides"), "--masks", str(root / "masks"), "--classes", "odd", "even"]
    return [*words, "--out", str(out), "--batch-size", "8", "--val", "0.34", "--test", "0.34", *more]


def test_the_resolution_of_patches_is_that_of_the_run(tmp_path: Path) -> None:
    root = slides_of(tmp_path, 2)
    cut_slides([root / "slides"], tmp_path / "out", masks=root / "masks", classes=("a", "b"))
    images = read_images(tmp_path / "out" / "manifest.csv")
    assert set(images.frame["mpp"]) == {"0.5"}
    assert set(images.frame["slide"]) == {"s0.tiff", "s1.tiff"}
    assert trained_mpp(images, 32) == pytest.approx(1.0)  # 64 px of 0.5 um, seen as 32
    other = images.with_frame(images.frame.assign(mpp=["0.25", *images.frame["mpp"][1:]]))
    assert trained_mpp(other, 32) is None


def test_a_recipe_takes_slides_and_its_run_is_judged_on_slides(tmp_path: Path) -> None:
    root, out = slides_of(tmp_path / "in"), tmp_path / "out"
    own = ("--image-size", "32", "--epochs", "2", "--lr", "0.003")
    assert cli.run(["train", "dsnet.student", *words_of(root, out, *own)]) == 0
    manifest = pd.read_csv(out / "patches" / "manifest.csv")
    assert set(manifest["label"]) == {"odd", "even", "background"}
    run = hs.Run.open(out)
    assert run.info["mpp"] == pytest.approx(1.0)
    found = judge_slides({"mine": run}, [root / "slides"], tmp_path / "slides", masks=root / "masks")["slides"]["mine"]
    frame = run.data.frame
    tested = set(frame["slide"][frame["split"] == "test"])
    assert set(found["slides"]) == tested
    assert all(row["label"] == ("odd", "even")[int(name[1]) % 2] for name, row in found["slides"].items())
    # Masks are numbered as --classes says, and the run's classes are sorted: background, even, odd.
    for name, row in found["slides"].items():
        defined = {label for label, one in row["agreement"]["classes"].items() if one["iou"] is not None}
        assert ("odd", "even")[int(name[1]) % 2] in defined, "the class that the mask marks"
        assert defined - {row["label"]} <= {row["called"]}, "and none that is neither marked nor called"
    right = sum(row["label"] == row["called"] for row in found["slides"].values())
    assert found["accuracy"]["value"] == right / len(tested)
    assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]
    stem = Path(next(iter(tested))).stem
    assert (tmp_path / "slides" / "mine" / stem / "lesions.geojson").is_file()
    assert json.loads((tmp_path / "slides" / "summary.json").read_text())["slides"]["mine"] == found
    damaged = root / "slides" / next(iter(tested))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:2000])
    with pytest.raises(Failed, match=f"{damaged.stem}.*the others are judged"):
        judge_slides({"mine": run}, [root / "slides"], tmp_path / "again", masks=root / "masks")
    left = json.loads((tmp_path / "again" / "summary.json").read_text())["slides"]["mine"]["slides"]
    assert set(left) == tested - {damaged.name}
    damaged.write_bytes(whole)
    elsewhere = next(p for p in sorted((root / "slides").iterdir()) if p.name not in tested)
    with pytest.raises(BadInput, match="none of the slides is in the test split"):
        judge_slides({"mine": run}, [elsewhere], tmp_path / "none", masks=root / "masks")


@pytest.mark.slow
def test_distill_takes_slides_and_ends_with_slides(tmp_path: Path) -> None:
    root, out = slides_of(tmp_path / "in"), tmp_path / "out"
    own = ("--image-size", "32", "--epochs", "2", "--lr", "0.003")
    own = (*own, "--teacher-network", "dsnet", "--teacher-weights", "none")
    assert cli.run(["distill", "dsnet", *words_of(root, out, *own)]) == 0
    found = json.loads((out / "slides" / "summary.json").read_text())["slides"]
    assert set(found) == {"teacher", "student_alone", "student_distilled"}
    assert (out / "slides" / "student_distilled").is_dir()
    assert cli.run(["distill", "--out", str(out), "--resume"]) == 0


@pytest.mark.slow
def test_distill_mac_resnet_takes_slides_and_ends_with_slides(tmp_path: Path) -> None:
    root, out = slides_of(tmp_path / "in"), tmp_path / "out"
    own = ("--image-size", "64", "--epochs", "1", "--views", "1", "--lr", "0.001")
    own = (*own, "--network", "resnet18", "--weights", "none", "--teacher-weights", "none")
    assert cli.run(["distill", "mac-resnet", *words_of(root, out, *own)]) == 0
    found = json.loads((out / "slides" / "summary.json").read_text())["slides"]
    assert set(found) == {"teacher", "student_alone", "student_distilled"}


@pytest.mark.slow
def test_distill_rckd_cuts_what_it_pretrains_on_from_the_training_slides(tmp_path: Path) -> None:
    root, out = slides_of(tmp_path / "in"), tmp_path / "out"
    write_images(tmp_path / "nuclei", patients=8, images_per_patient=1, size=64, masks=True)
    nuclei = split(read_masks(tmp_path / "nuclei" / "manifest.csv", kind="instances"), val=0.25, test=0.25)
    hs.train(rckd.teacher(nuclei, epochs=1, image_size=64, batch_size=4), tmp_path / "segmenter")
    own = ("--image-size", "32", "--epochs", "1", "--lr", "0.01", "--network", "test_resnet")
    own = (*own, "--pretrain-epochs", "1", "--pretrain-image-size", "32", "--pretrain-batch-size", "4")
    assert cli.run(["distill", "rckd", *words_of(root, out, "--teacher", str(tmp_path / "segmenter"), *own)]) == 0
    labelled = hs.Run.open(
        out / "seed0" / "student_distilled" if (out / "seed0").is_dir() else out / "student_distilled"
    )
    frame = labelled.data.frame
    seen = set(pd.read_csv(out / "unlabelled" / "patches" / "manifest.csv")["slide"])
    assert seen == set(frame["slide"][frame["split"] == "train"])
    found = json.loads((out / "slides" / "summary.json").read_text())["slides"]
    assert set(found) == {"student_alone", "student_distilled"}
    assert cli.run(["distill", "--out", str(out), "--resume"]) == 0


def test_a_label_is_that_of_most_lesion_patches() -> None:
    assert training._slide_label(pd.Series(["background"] * 9 + ["bcc"] * 2 + ["cm"])) == "bcc"
    assert training._slide_label(pd.Series(["background"] * 3)) == "background"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--masks", "m"], "of which --slides"),
        (["--slides", "s", "--masks", "m", "--data", "d"], "in place of --data"),
        (["--slides", "nowhere", "--masks", "m"], "--masks m: no such folder"),
    ],
)
def test_what_does_not_go_together_is_said(words: list[str], line: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.run(["train", "dsnet.student", "--out", str(tmp_path / "o"), *words]) == 2
    assert line in capsys.readouterr().err
