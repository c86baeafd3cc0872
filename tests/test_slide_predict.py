"""A slide becomes tiles, a map, outlines and a page that say the same; killed or not, at the same bytes; and one bad
slide stops no other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

pytest.importorskip("shapely")
pytest.importorskip("tifffile")
pytest.importorskip("openslide")

import slides_tiny
from slides_tiny import CLASSES, TILE, Purple
from test_geojson import check, shape_of
from tiny import process

from histill.deploy.predictor import TorchPredictor
from histill.errors import BadInput, Failed
from histill.slides.coarse import compare_tiles
from histill.slides.engine import Model, load_model
from histill.slides.predict import predict_slide, predict_slides
from histill.slides.state import State, key_of
from histill.slides.summary import summary_lines
from histill.types import Outputs


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slides_tiny.slide(tmp_path_factory.mktemp("slides") / "one.tif")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slides_tiny.slide(tmp_path_factory.mktemp("slides") / "one.tif", width=640, height=640)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slides_tiny.model(tmp_path_factory.mktemp("models") / "purple.pt")


@pytest.fixture(scope="module")
def done(slide: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    predict_slide(model, slide, out, overlap=16, truth=slide.with_suffix(".mask.png"), min_area_um2=100)
    return out / "one"


def said_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "slide.json").read_text()))


def files(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold times."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}
    return {name: p.read_bytes() for name, p in found.items() if p.name not in ("slide.json", "summary.json")}


def test_tiles_hold_what_the_model_says_of_their_pixels(done: Path, slide: Path) -> None:
    table = pd.read_parquet(done / "tiles.parquet")
    assert list(table) == ["slide", "x", "y", "width", "height", "prob_normal", "prob_tumour"]
    assert set(table["slide"]) == {"one"}
    assert (table[["width", "height"]] == 2 * TILE).all(axis=None)  # 1.0 um per pixel on a slide of 0.5
    kinds = slides_tiny.truth(1024, 1024)
    for row in table.itertuples():
        seen = kinds[row.y : row.y + 64, row.x : row.x + 64]
        if seen.size == 64 * 64 and seen.min() > 0:  # no glass
            purple = float((seen == 2).mean())
            if abs(purple - 0.5) > 0.1:
                assert (row.prob_tumour > 0.5) == (purple > 0.5)
    assert np.allclose(table["prob_normal"] + table["prob_tumour"], 1, atol=1e-6)


def test_outlines_fit_the_lesion(done: Path) -> None:
    said = said_of(done)
    assert said["agreement"]["dice"] > 0.9
    assert said["agreement"]["classes"]["tumour"] == {k: said["agreement"][k] for k in ("iou", "dice")}
    features = check(done / "lesions.geojson", types={"annotation"})
    assert [f["properties"]["classification"]["name"] for f in features] == ["tumour", "tumour"]
    assert len(features[0]["geometry"]["coordinates"]) == 2, "the ring has its hole"
    area = np.pi * (0.25**2 - 0.09**2) * 512**2  # um^2
    assert features[0]["properties"]["measurements"]["area um^2"] == pytest.approx(area, rel=0.08)
    assert shape_of(features[0]).area / 4 == pytest.approx(
        features[0]["properties"]["measurements"]["area um^2"], rel=1e-3
    )
    assert features[0]["properties"]["measurements"]["max diameter um"] == pytest.approx(0.5 * 512, rel=0.06)
    assert said["agreement"]["hits"]["false_positives"] == []
    assert len(said["agreement"]["hits"]["lesions"]) == 2
    assert None not in said["agreement"]["hits"]["lesions"]


def test_a_reference_may_have_numbers_of_its_own(model: Path, slide: Path, done: Path, tmp_path: Path) -> None:
    kinds = slides_tiny.truth(1024, 1024)
    Image.fromarray(np.array([0, 3, 1], np.uint8)[kinds]).save(tmp_path / "other.png")
    Image.fromarray(np.array([0, 1, 0], np.uint8)[kinds]).save(tmp_path / "healthy.png")
    options = {"overlap": 16, "min_area_um2": 100}
    names = ("tumour", "not known to the model", "normal")
    said = predict_slide(model, slide, tmp_path / "a", truth=tmp_path / "other.png", truth_classes=names, **options)
    assert said["agreement"] == said_of(done)["agreement"]
    named = {"truth": tmp_path / "healthy.png", "truth_classes": ("normal", "tumour")}
    said = predict_slide(model, slide, tmp_path / "b", **named, **options)
    assert said["agreement"]["hits"]["lesions"] == []  # 1 is no lesion where it has a name
    with pytest.raises(BadInput, match="value 3 has no name; 2 are named"):
        predict_slide(model, slide, tmp_path / "c", truth=tmp_path / "other.png", truth_classes=names[:2], **options)


def test_every_file_is_named_and_there(done: Path) -> None:
    said = said_of(done)
    assert set(said["layers"]) == {
        "table", "tiles", "lesions", "heatmap", "overlay", "thumbnail", "tissue", "page",
    }  # fmt: skip
    assert all((done / name).is_file() for name in said["layers"].values())
    assert not (done / ".state").exists()
    assert said["classes"] == list(CLASSES)
    assert said["dimensions"] == [1024, 1024]
    assert said["mpp"] == pytest.approx(0.5)
    assert said["call"]["label"] == "tumour"
    assert set(said["timing"]) == {"prepare", "read", "infer", "post", "write"}
    assert len(check(done / "tiles.geojson", types={"tile"})) == said["tiles"]["count"]
    summary = json.loads((done.parent / "summary.json").read_text())
    assert summary["slides"]["one"]["call"] == said["call"]
    assert summary["failed"] == {}
    assert summary["froc"]["score"] == 1.0


def test_the_page_stands_alone_and_escapes(small: Path, tmp_path: Path) -> None:
    names = ("normal", "<script>alert(1)</script>")
    predictor = TorchPredictor(Purple(), names, TILE)
    made = Model(predictor, "<b>model</b>", "0" * 64, mpp=1.0)
    place = tmp_path / "<i>slide.tif"
    place.write_bytes(small.read_bytes())
    predict_slide(made, place, tmp_path / "out", min_area_um2=100)
    page = (tmp_path / "out" / "<i>slide" / "case.html").read_text()
    assert "<script" not in page
    assert "<b>model" not in page
    assert "<i>" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;script&gt;alert(1)" in page
    assert page.count('<figure><img src="data:image/jpeg') == 10
    assert "research use only" in page


def test_overlap_batches_and_threads_do_not_change_the_rows(small: Path, model: Path, tmp_path: Path) -> None:
    for name, options in {"a": {"batch_size": 7, "threads": 1}, "b": {"batch_size": 64, "threads": 4}}.items():
        predict_slide(model, small, tmp_path / name, **options)
    one, other = (pd.read_parquet(tmp_path / name / "one" / "tiles.parquet") for name in "ab")
    assert compare_tiles(one, other)["largest_difference"] < 1e-5


def test_without_a_resolution_the_line_names_the_flag(model: Path, slide: Path, tmp_path: Path) -> None:
    bare = slides_tiny.slide(tmp_path / "bare.tif", mpp=None)
    with pytest.raises(BadInput, match="--slide-mpp"):
        predict_slide(model, bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert predict_slide(model, bare, tmp_path / "out", slide_mpp=0.5)["mpp"] == 0.5
    unsaid = slides_tiny.model(tmp_path / "unsaid.pt", mpp=None)
    with pytest.raises(BadInput, match="--mpp"):
        predict_slide(unsaid, slide, tmp_path / "out")


def test_one_bad_slide_stops_no_other(model: Path, small: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide at all")
    bare = slides_tiny.slide(tmp_path / "bare.tif", mpp=None)
    with pytest.raises(Failed, match=r"3 of 4 slides failed.*bad\.svs.*gone\.tif.*bare\.tif.*; the others are done"):
        predict_slides(model, [bad, tmp_path / "gone.tif", small, bare], tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["slides"]) == ["one"]
    assert list(summary["failed"]) == ["bad", "gone", "bare"]
    with pytest.raises(BadInput, match="both be written"):
        predict_slides(model, [small, tmp_path / "one.tif"], tmp_path / "out")


def test_a_slide_is_done_once_its_files_are_on_the_disk(
    small: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    sync, replace, before = os.fsync, os.replace, set[int]()

    def noted(held: int) -> None:
        synced.add(os.fstat(held).st_ino)
        sync(held)

    def renamed(source: Any, target: Any) -> None:
        if Path(target).name == "slide.json":
            before.update(synced)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    said = predict_slide(model, small, tmp_path)
    there = {name: tmp_path / "one" / name for name in said["layers"].values()}
    assert [name for name, path in there.items() if path.stat().st_ino not in before] == []
    whole = there["tiles.parquet"].read_bytes()
    there["tiles.parquet"].write_bytes(b"")  # as a disk that lost power may leave it
    predict_slide(model, small, tmp_path)
    assert there["tiles.parquet"].read_bytes() == whole
    (tmp_path / "one" / "slide.json").write_text("[]")
    with pytest.raises(BadInput, match="what no histill slide wrote"):
        predict_slide(model, small, tmp_path)


class Odd(Purple):
    """Purple tissue has no number."""

    def forward(self, images: torch.Tensor) -> Outputs:
        logits = super().forward(images)["logits"]
        return Outputs(logits=torch.where(logits.argmax(1, keepdim=True) > 0, torch.nan, logits))


def test_tiles_without_an_answer_are_no_class(small: Path, tmp_path: Path) -> None:
    odd = slides_tiny.model(tmp_path / "odd.pt", Odd())
    with pytest.raises(Failed, match=r"odd\.pt answers \d+ of \d+ tiles with what is not a number"):
        predict_slide(odd, small, tmp_path / "out")
    assert not (tmp_path / "out" / "one" / "slide.json").exists()


def test_a_slide_without_tissue_has_files_all_the_same(model: Path, tmp_path: Path) -> None:
    import tifffile

    tifffile.imwrite(
        tmp_path / "glass.tif",
        np.full((512, 512, 3), 245, np.uint8),
        tile=(256, 256),
        photometric="rgb",
        resolution=(2e4, 2e4),
        resolutionunit="CENTIMETER",
    )
    said = predict_slide(model, tmp_path / "glass.tif", tmp_path / "out")
    assert said["call"]["label"] is None
    assert said["tiles"]["count"] == 0
    assert check(tmp_path / "out" / "glass" / "lesions.geojson") == []
    assert "No tissue was found" in (tmp_path / "out" / "glass" / "case.html").read_text()


def test_a_finished_slide_is_left_alone_and_another_setting_is_refused(
    model: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict_slide(model, small, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("*")}
    predict_slide(model, small, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("*")} == before
    lesions = (tmp_path / "one" / "lesions.geojson").read_bytes()
    (tmp_path / "one" / "lesions.geojson").unlink()
    predict_slide(model, small, tmp_path)
    assert (tmp_path / "one" / "lesions.geojson").read_bytes() == lesions
    with pytest.raises(BadInput, match=r"overlap 0, not 8; give another --out, or --no-resume"):
        predict_slide(model, small, tmp_path, overlap=8)
    other = slides_tiny.model(tmp_path / "other.pt", Purple(steep=10))
    with pytest.raises(BadInput, match="another model"):
        predict_slide(other, small, tmp_path)
    assert predict_slide(model, small, tmp_path, overlap=8, resume=False)["settings"]["overlap"] == 8


def test_chunks_of_other_versions_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = key_of("slide", "model", {"tile": 32})
    rows = {"probabilities": np.ones((3, 2), np.float32)}
    State(tmp_path, key, made_by={"device": "cpu", "torch": "2.1"}).save("fine", 0, rows)
    again = State(tmp_path, key, made_by={"device": "cpu", "torch": "2.1"}).load("fine", 0, 3)
    assert again is not None
    assert np.array_equal(again["probabilities"], rows["probabilities"])
    for other in ({"device": "cuda", "torch": "2.1"}, {"device": "cuda", "torch": "2.2"}):
        state = State(tmp_path, key, made_by=other)
        assert state.load("fine", 0, 3) is None
        assert "looked at again" in capsys.readouterr().err
        state.save("fine", 0, rows)


def test_another_way_to_the_pixels_is_said(small: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    said = predict_slide(model, small, tmp_path)
    assert "one.tif: read by openslide, as its tiles are not 8-bit RGB in JPEG" in capsys.readouterr().err
    assert said["settings"]["reader"] == "openslide (its tiles are not 8-bit RGB in JPEG)"
    assert "openslide (its tiles" in (tmp_path / "one" / "case.html").read_text()


def test_a_resolution_that_was_given_is_told_where_the_areas_are(
    small: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = slides_tiny.slide(tmp_path / "bare.tif", width=640, height=640, mpp=None)
    predict_slide(model, small, tmp_path / "own")
    assert "as given" not in capsys.readouterr().err
    own = (tmp_path / "own" / "one" / "case.html").read_text()
    assert "640 × 640 pixels · 0.5 µm per pixel · read by" in own
    assert re.search(r'"width: 15.625%"></span>50 µm', own), "a bar of 50 of the 320 microns"
    predict_slide(model, bare, tmp_path / "given", slide_mpp=0.25)
    assert (
        "0.25 µm per pixel (as given; the file does not say)" in (tmp_path / "given" / "bare" / "case.html").read_text()
    )
    assert "as given" not in capsys.readouterr().err
    predict_slide(model, small, tmp_path / "against", slide_mpp=0.25)
    assert "one.tif: 0.25 microns per pixel as given; the file says 0.5" in capsys.readouterr().err
    assert "0.25 µm per pixel (as given; the file says 0.5)" in (tmp_path / "against" / "one" / "case.html").read_text()


def test_one_lesion_is_one_lesion() -> None:
    said = {"call": {"label": "t", "probability": 0.5}, "layers": {"page": "case.html"}}
    lines = summary_lines(
        {"slides": {str(n): said | {"lesions": {"count": n, "area_um2": {"t": 5e5}}} for n in (0, 1, 2)}}, "out"
    ).splitlines()
    assert [re.search(r"\d lesions?", line)[0] for line in lines] == ["0 lesions", "1 lesion", "2 lesions"]  # type: ignore[index]


def slow_work(model: str, slide: str, out: str) -> None:
    """Predict so slowly that there is time to kill it."""
    loaded = load_model(model)
    quick = loaded.look

    def look(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return quick(*arguments, **options)

    object.__setattr__(loaded, "look", look)
    predict_slide(loaded, slide, out, batch_size=1)


def test_killed_and_started_again_it_ends_with_the_same_bytes(model: Path, small: Path, tmp_path: Path) -> None:
    predict_slide(model, small, tmp_path / "whole", batch_size=1)
    child = process(slow_work, str(model), str(small), str(tmp_path / "killed"))
    state = tmp_path / "killed" / "one" / ".state"
    for _ in range(600):
        if len(list(state.glob("fine*.npz"))) >= 2:
            break
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (tmp_path / "killed" / "one" / "slide.json").exists()
    (state / ".fine000001.npz.0.tmp").write_bytes(b"half")
    (state / "fine000001.npz").write_bytes(b"damaged")
    said = predict_slide(model, small, tmp_path / "killed", batch_size=1)
    assert 16 <= said["tiles"]["resumed"] < said["tiles"]["count"]
    assert files(tmp_path / "killed" / "one") == files(tmp_path / "whole" / "one")


def test_from_coarse_to_fine(model: Path, slide: Path, tmp_path: Path) -> None:
    whole = predict_slide(model, slide, tmp_path / "whole")
    said = predict_slide(model, slide, tmp_path / "coarse", coarse_to_fine=0.99)
    tables = [pd.read_parquet(tmp_path / name / "one" / "tiles.parquet") for name in ("whole", "coarse")]
    found = compare_tiles(*tables)
    assert found["agreement"] > 0.97
    assert said["tiles"]["by_pass"]["fine"] < 0.7 * whole["tiles"]["count"]
    assert tables[1]["coarse"].sum() == whole["tiles"]["count"] - said["tiles"]["by_pass"]["fine"]
    close = ~tables[1]["coarse"]
    assert np.allclose(tables[1]["prob_tumour"][close], tables[0]["prob_tumour"][close], atol=1e-5)


def test_another_model_takes_the_wide_look(model: Path, slide: Path, tmp_path: Path) -> None:
    opposite = slides_tiny.model(tmp_path / "opposite.pt", Purple(steep=-40), mpp=2.0)
    predict_slide(model, slide, tmp_path / "out", coarse_to_fine=0.99, coarse_model=opposite)
    table = pd.read_parquet(tmp_path / "out" / "one" / "tiles.parquet")
    whole = predict_slide(model, slide, tmp_path / "whole")
    honest = pd.read_parquet(tmp_path / "whole" / "one" / "tiles.parquet")
    wide = table["coarse"].to_numpy()
    assert 0 < wide.sum() < whole["tiles"]["count"]
    same = (table["prob_tumour"] > 0.5) == (honest["prob_tumour"] > 0.5)
    assert same[~wide].all()
    assert same[wide].mean() < 0.1  # a wide tile that is surely one may hold a few of the other


def test_early_exit_says_where_each_tile_left(small: Path, tmp_path: Path) -> None:
    class Leaves:
        classes, image_size, mpp = CLASSES, TILE, 1.0
        logits = __call__ = None

        def leave(self, images: Any) -> Any:
            tumour = (images[:, 1].mean((1, 2)) < 0.45).astype(np.float32)
            return np.stack([1 - tumour, tumour], 1), np.where(tumour > 0, 2, 1)

    made = Model(Leaves(), "leaves", "1" * 64, mpp=1.0)  # type: ignore[arg-type]
    said = predict_slide(made, small, tmp_path)
    table = pd.read_parquet(tmp_path / "one" / "tiles.parquet")
    assert ((table["exit"] == 2) == (table["prob_tumour"] == 1)).all()
    assert said["exits"] == {"1": int((table["exit"] == 1).sum()), "2": int((table["exit"] == 2).sum())}
    wide = predict_slide(made, small, tmp_path / "wide", coarse_to_fine=0.4)
    assert wide["tiles"]["by_pass"]["fine"] == 0
    assert wide["exits"] == {}
    assert (pd.read_parquet(tmp_path / "wide" / "one" / "tiles.parquet")["exit"] == 0).all()
    with pytest.raises(BadInput, match="temperature null, not 2"):
        predict_slide(dataclasses.replace(made, temperature=2.0), small, tmp_path)
    first = 100 * (table["exit"] == 1).mean()
    assert f"left at exit 1: {first:.0f} %, 2: {100 - first:.0f} %" in (tmp_path / "one" / "case.html").read_text()


class Pooled(Purple):
    def forward(self, images: torch.Tensor) -> Outputs:
        outputs = super().forward(images)
        outputs["pooled"] = images.mean((2, 3))
        outputs["attention"] = images[:, :, ::4, ::4]
        return outputs


def test_features_as_clam_reads_them(small: Path, model: Path, tmp_path: Path) -> None:
    made = Model(TorchPredictor(Pooled(), CLASSES, TILE), "pooled", "2" * 64, mpp=1.0)
    predict_slide(made, small, tmp_path, features=True, batch_size=8)
    table = pd.read_parquet(tmp_path / "one" / "tiles.parquet")
    with h5py.File(tmp_path / "one" / "features.h5") as file:
        assert np.array_equal(file["coords"], table[["x", "y"]])
        features = file["features"][:]
    z = 40 * ((slides_tiny.PINK[1] + slides_tiny.PURPLE[1]) / 510 - features[:, 1])
    assert np.allclose(1 / (1 + np.exp(-z)), table["prob_tumour"], atol=1e-5)
    assert (tmp_path / "one" / "case.html").read_text().count("Where the network looks") == 10
    with pytest.raises(BadInput, match="need a run"):
        predict_slide(model, small, tmp_path / "b", features=True)


def test_each_class_has_its_unet(slide: Path, model: Path, tmp_path: Path) -> None:
    outline = slides_tiny.model_of_outlines(tmp_path / "outline.pt")
    said = predict_slide(
        model, slide, tmp_path / "out", segment={"tumour": outline}, overlap=16, truth=slide.with_suffix(".mask.png")
    )
    import tifffile

    mask = tifffile.imread(tmp_path / "out" / "one" / "mask.ome.tiff")
    kinds = slides_tiny.truth(1024, 1024)[::2, ::2]
    assert mask.shape == (512, 512)
    assert set(np.unique(mask)) == {0, 2}
    both, either = ((mask == 2) & (kinds == 2)).sum(), ((mask == 2) | (kinds == 2)).sum()
    assert both / either > 0.85  # a pixel needs the vote of most tiles over it, and at the rim some are normal
    assert said["segmentation"]["area_um2"] == {"tumour": float((mask == 2).sum())}
    features = check(tmp_path / "out" / "one" / "lesions.geojson", types={"annotation"})
    drawn = sum(f["properties"]["measurements"]["area um^2"] for f in features)
    assert drawn == pytest.approx(said["segmentation"]["area_um2"]["tumour"], rel=0.02)
    assert said["call"]["lesion_area_um2"]["tumour"] == pytest.approx(drawn, rel=1e-3)
    assert said["agreement"]["iou"] == pytest.approx(both / either, abs=0.02)  # of the outlines that U-Nets drew
    with pytest.raises(BadInput, match="outlines"):
        predict_slide(outline, slide, tmp_path / "b", mpp=1.0)
    with pytest.raises(BadInput, match=r"not an outline"):
        predict_slide(model, slide, tmp_path / "c", segment={"tumour": model})
    with pytest.raises(BadInput, match="classes are normal, tumour"):
        predict_slide(model, slide, tmp_path / "d", segment={"other": outline})
    with pytest.raises(BadInput, match=r"gone\.pt: no such file"):
        predict_slide(model, slide, tmp_path / "e", segment={"tumour": tmp_path / "gone.pt"})
    assert not any((tmp_path / name).exists() for name in "bcde"), "all was known before the slide was looked at"


def test_wrong_arguments_are_one_line(slide: Path, model: Path, tmp_path: Path) -> None:
    for options, line in (
        ({"threshold": 1.5}, "--threshold"),
        ({"batch_size": 0}, "--batch-size"),
        ({"coarse_factor": 1.0}, "--coarse-factor"),
        ({"lesions": ("x",)}, "--lesions x"),
        ({"truth": Path("gone")}, "--truth gone"),
        ({"min_area_um2": -1.0}, "--min-area-um2"),
        ({"overlap": 32}, "overlap"),
    ):
        with pytest.raises(BadInput, match=line):
            predict_slide(model, slide, tmp_path / "out", **options)
