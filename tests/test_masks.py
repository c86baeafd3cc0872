"""Masks are read, move with their images, are counted per image, and a network learns from them; so from no labels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import STILL, experiment
from torch import Tensor, nn
from torch.nn import functional as F

import histill as hs
from histill.data import Augment, Images, pack, read_images, read_masks, read_unlabelled, split
from histill.data.masks import has_masks
from histill.data.views import NONE, follow, render
from histill.errors import BadInput
from histill.evaluate.intervals import figures_with_intervals
from histill.evaluate.masks import MaskScores, ask, label_map, predictions, scores
from histill.files import file_digest
from histill.types import Batch, Outputs, Terms


def write_pairs(root: Path, count: int = 12, size: int = 24, *, kind: str = "classes") -> Path:
    """Dark squares on light ground: mask 1 (255 in half of them) or, of instances, 16-bit numbers, two to an image."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        image, mask = rng.integers(170, 250, (size, size, 3), dtype=np.uint8), np.zeros((size, size), np.uint16)
        for number in (1, 2):
            y, x = rng.integers(1, size - 9, 2)
            image[y : y + 8, x : x + 8] //= 3
            mask[y : y + 8, x : x + 8] = number
        Image.fromarray(image).save(root / "images" / f"i{i:02d}.png")
        drawn = Image.fromarray(mask) if kind == "instances" else Image.fromarray(((mask > 0) * 255).astype(np.uint8))
        drawn.save(root / "masks" / f"i{i:02d}.png")
    return root


def test_a_folder_of_images_and_masks_is_read_with_its_classes(tmp_path: Path) -> None:
    images = read_masks(write_pairs(tmp_path / "two"))
    assert (images.masks, images.classes, len(images)) == ("classes", ("background", "foreground"), 12)
    assert images.frame["mask_content"].iloc[3] == file_digest(tmp_path / "two/masks/i03.png")
    numbered = read_masks(write_pairs(tmp_path / "nuclei", kind="instances"))
    assert (numbered.masks, numbered.classes) == ("instances", ("background", "nucleus"))
    assert read_masks(tmp_path / "two", classes=("stroma", "gland")).classes == ("stroma", "gland")


def test_masks_are_told_from_labels(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    assert has_masks(tmp_path / "pairs")
    (tmp_path / "labels.csv").write_text("path,label,mask\na.png,x,m.png\n")
    (tmp_path / "masks.csv").write_text('\ufeff"path","mask","patient"\na.png,m.png,1\n', encoding="utf-8")
    assert not has_masks(tmp_path / "labels.csv")
    assert has_masks(tmp_path / "masks.csv")


def test_a_mask_that_cannot_be_one_is_one_clear_line(tmp_path: Path) -> None:
    def refused(what: str, pixels: Any, word: str) -> None:
        root = write_pairs(tmp_path / what, 3)
        Image.fromarray(pixels).save(root / "masks" / "i01.png")
        with pytest.raises(BadInput, match=word):
            pack(read_masks(root, classes=("a", "b", "c")), 24)

    refused("large", np.zeros((25, 24), np.uint8), "not as large")
    refused("coloured", np.arange(24 * 24 * 3, dtype=np.uint8).reshape(24, 24, 3), "coloured")
    refused("many", np.full((24, 24), 7, np.uint8), "holds class 7")
    Image.new("L", (24, 24)).save(tmp_path / "many" / "masks" / "i01.png")
    root = write_pairs(tmp_path / "turned", 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(root / "images" / "i01.png").save(root / "images" / "i01.png", exif=exif)
    with pytest.raises(BadInput, match="turned by its EXIF tag"):
        read_masks(root)
    root = write_pairs(tmp_path / "jpeg", 3)
    (root / "masks" / "i01.png").unlink()
    Image.fromarray(np.arange(576, dtype=np.uint8).reshape(24, 24)).save(root / "masks" / "i01.jpg")
    with pytest.raises(BadInput, match="JPEG changes the numbers"):
        read_masks(root)
    root = write_pairs(tmp_path / "doubt", 3)
    Image.fromarray(np.tile(np.array([0, 1, 255], np.uint8), (24, 8))).save(root / "masks" / "i01.png")
    with pytest.raises(BadInput, match="is 255 a class or unknown"):
        read_masks(root)
    with pytest.raises(BadInput, match="a name is there twice"):
        read_masks(write_pairs(tmp_path / "twice", 2), classes=("a", "a"))
    root = write_pairs(tmp_path / "gone", 3)
    (root / "masks" / "i02.png").unlink()
    with pytest.raises(BadInput, match=r"no mask of the same name: i02\.png"):
        read_masks(root)
    (root / "masks" / "i02.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(BadInput, match="not a readable mask"):
        read_masks(root)


def test_with_two_classes_255_is_the_second_and_with_more_nobody_knows(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "d", 3)
    values = np.zeros((24, 24), np.uint8)
    values[:8], values[8:12] = 2, 255
    Image.fromarray(values).save(root / "masks" / "i00.png")
    images = read_masks(root, classes=("a", "b", "c"))
    batch = pack(images, 24).batch(np.arange(1))
    assert batch.masks is not None
    assert batch.masks[0, :8].unique().tolist() == [2]
    assert batch.masks[0, 8:12].unique().tolist() == [-1]
    two = read_masks(write_pairs(tmp_path / "two", 2))
    assert set(pack(two, 24).batch(np.arange(2)).masks.unique().tolist()) == {0, 1}  # type: ignore[union-attr]


@given(seed=st.integers(0, 999), rotate=st.sampled_from([0.0, 30.0, 180.0]), zoom=st.sampled_from([0.0, 0.5]))
@settings(max_examples=25, deadline=None)
def test_a_mask_moves_as_its_image_does(seed: int, rotate: float, zoom: float) -> None:
    """An image that shows its own mask still shows it in every view, but for what bicubic smooths at the edge."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((2, 40, 40), np.int64)
    for row in mask:
        y, x = rng.integers(2, 24, 2)
        row[y : y + 14, x : x + 12] = 1
    pixels = torch.from_numpy((mask[..., None] * 255).repeat(3, axis=3).astype(np.uint8))
    ids, views = torch.arange(2), torch.full((2,), seed)
    augment = Augment(rotate=rotate, zoom=zoom, shift=0.1 if zoom else 0.0)
    shown = render(pixels, ids, views, augment=augment, seed=3)[:, 0]
    moved = follow(torch.from_numpy(mask), ids, views, augment=augment, seed=3)
    assert set(moved.unique().tolist()) <= {0, 1}
    sure = (shown < 0.2) | (shown > 0.8)
    assert sure.float().mean() > 0.85
    assert ((shown > 0.5).long() == moved)[sure].float().mean() > 0.995


def test_without_augmentation_and_at_another_size_masks_are_those_of_the_nearest_pixels(tmp_path: Path) -> None:
    images = read_masks(write_pairs(tmp_path / "d", 2, kind="instances"))
    packed, half = pack(images, 24), pack(images, 12)
    whole = packed.batch(np.arange(2), augment=NONE).masks
    assert whole is not None
    expected = np.stack([np.asarray(Image.open(images.root / m)) for m in images.frame["mask"]]).astype(np.int64)
    assert torch.equal(whole, torch.from_numpy(expected))
    small = half.batch(np.arange(2)).masks
    assert small is not None
    assert torch.equal(small, whole[:, 1::2, 1::2])


@pytest.mark.parametrize(("side", "size"), [(64, 32), (64, 16), (60, 24)])
def test_a_reduced_mask_lies_where_its_image_does(tmp_path: Path, side: int, size: int) -> None:
    """The centre of a shape that image and mask both show is the same at every smaller size."""
    root = tmp_path / "d"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    y, x = np.mgrid[:side, :side]
    shape = np.hypot(y - 0.4 * side, x - 0.6 * side) < 0.25 * side
    Image.fromarray(np.repeat(shape[..., None] * np.uint8(255), 3, axis=2)).save(root / "images" / "a.png")
    Image.fromarray(shape.astype(np.uint8)).save(root / "masks" / "a.png")
    batch = pack(read_masks(root), size).batch(np.arange(1))
    assert batch.masks is not None
    rows = torch.arange(size, dtype=torch.float32)
    drawn, shown = batch.masks[0].float(), batch.images[0, 0]
    for axis in (0, 1):
        centres = [(m.sum(1 - axis) * rows).sum() / m.sum() for m in (drawn, shown)]
        assert abs(float(centres[0] - centres[1])) < 0.08


def test_a_twin_is_another_view_of_the_same_image(tmp_path: Path) -> None:
    packed = pack(read_masks(write_pairs(tmp_path / "d", 4)), 24)
    batch = packed.batch(np.arange(4), torch.zeros(4, dtype=torch.long), augment=Augment(brightness=0.3), seed=1)
    twin = batch.render(24, twin=1)
    assert torch.equal(batch.render(24), batch.images)
    assert torch.equal(twin, batch.render(24, twin=1))
    assert all(not torch.allclose(a, b, atol=0.02) for a, b in zip(batch.images, twin))
    ratio = (twin.mean((1, 2, 3)) / batch.images.mean((1, 2, 3))).log().abs()
    assert (ratio < 0.8).all()


COUNTS = np.array([[[10, 0, 5], [4, 5, 0]], [[2, 1, 1], [0, 1, 1]], [[20, 2, 0], [0, 0, 2]]], dtype=float)
"""Three images, two classes: tp, fp, fn."""


def test_iou_and_dice_are_of_the_sums_over_all_images() -> None:
    found = MaskScores(COUNTS, np.array(["p", "q", "p"]), ("a", "b")).figures()
    iou = (32 / (32 + 3 + 6), 4 / (4 + 6 + 3))
    dice = (64 / (64 + 3 + 6), 8 / (8 + 6 + 3))
    expected = {"miou": sum(iou) / 2, "mdice": sum(dice) / 2, "iou_a": iou[0], "iou_b": iou[1], "dice_b": dice[1]}
    assert {name: float(found[name][0]) for name in expected} == pytest.approx(expected)
    assert float(found["pixel_accuracy"][0]) == pytest.approx(36 / 45)


def test_a_resample_without_a_class_does_not_estimate_the_mean() -> None:
    """A rare class in one of six patients: intervals are of resamples that hold it, as those of labels are."""
    counts = np.zeros((6, 2, 3))
    counts[:, 0, 0], counts[:, 0, 2] = 90, 10
    counts[0, 1] = (20, 0, 60)
    found = MaskScores(counts, np.arange(6), ("common", "rare"))
    without = np.ones((6, 1))
    without[0] = 0
    assert np.isnan(found.figures(without, names=["miou"])["miou"][0])
    figure = figures_with_intervals(found, names=["miou"])["miou"]
    assert figure["value"] == pytest.approx((0.9 + 0.25) / 2)
    assert (figure["low"], figure["high"]) == pytest.approx(
        (0.12177, 0.92958), abs=1e-5
    )  # Wilson's: one patient, two classes
    absent = MaskScores(counts[1:], np.arange(5), ("common", "rare")).figures(names=["miou"])["miou"]
    assert float(absent[0]) == pytest.approx(0.9)  # nowhere in the truth: not a class of these images


def test_weights_of_units_count_their_images_as_often() -> None:
    found = MaskScores(COUNTS, np.array(["p", "q", "p"]), ("a", "b"))
    twice = found.figures(np.array([[2.0], [1.0]]), names=["miou"])["miou"]
    again = MaskScores(COUNTS[[0, 2, 0, 1, 2]], np.arange(5), ("a", "b")).figures(names=["miou"])["miou"]
    assert twice == pytest.approx(again)


def test_the_label_map_is_the_likeliest_class_at_full_size() -> None:
    logits = torch.tensor([[[[0.0, 9.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 9.0]]]])
    assert label_map({"logits": logits}, (2, 2)).tolist() == [[[1, 0], [0, 1]]]
    assert label_map({"logits": logits[:, :1] - 4}, (4, 4))[0, 0].tolist() == [0, 0, 1, 1]
    # Pixels have centres: enlarged, 9 and 0 are 9, 6.75, 2.25 and 0.
    assert label_map({"logits": logits[:, :1].flip(3) - 6.7}, (4, 4))[0, 0].tolist() == [1, 1, 0, 0]


class Drawn(nn.Module):
    """Says what it was made with, logit 2 for each pixel's class; remembers the mode in which it was asked."""

    def __init__(self, said: Tensor, classes: int) -> None:
        super().__init__()
        self.said, self.classes, self.modes = said, classes, list[bool]()

    def forward(self, images: Tensor) -> Outputs:
        self.modes.append(self.training)
        return Outputs(logits=2.0 * F.one_hot(self.said, self.classes).movedim(-1, 1))


@pytest.mark.parametrize("mode", [True, False])
def test_pixels_are_counted_by_hand_but_for_the_unknown_ones(tmp_path: Path, mode: bool) -> None:
    root = write_pairs(tmp_path / "d", 2)
    truth, said = np.zeros((2, 24, 24), np.uint8), torch.zeros(2, 24, 24, dtype=torch.long)
    truth[0, :8], truth[0, 8:12] = 2, 255
    said[0, 2:10], said[0, 12:, :6], said[1, :, :1] = 2, 1, 1
    for i in range(2):
        Image.fromarray(truth[i]).save(root / "masks" / f"i0{i}.png")
    images, network = read_masks(root, classes=("a", "b", "c")), Drawn(said, 3).train(mode)
    found = ask(network, pack(images, 24), np.arange(2))
    # Of the first image 48 pixels of c are called a, and 72 of a are called b; four rows are unknown.
    first, second = [[216, 48, 72], [0, 72, 0], [144, 0, 48]], [[552, 0, 24], [0, 24, 0], [0, 0, 0]]
    assert found["counts"].tolist() == [first, second]
    whole = np.log(np.exp(2) + 2)
    assert found["loss"] == pytest.approx([whole - 2 * 360 / 480, whole - 2 * 552 / 576])
    assert (network.modes, network.training) == ([False], mode)

    table = predictions(images, np.arange(2), found)
    assert table["dice_a"].tolist() == pytest.approx([432 / (432 + 48 + 72), 1104 / (1104 + 24)])
    assert table["iou_a"].tolist() == pytest.approx([216 / 336, 552 / 576])
    assert table["fn_c"].tolist() == [48, 0]
    again = scores(table, images.classes)
    assert (again.counts == found["counts"]).all()
    assert again.objects is None
    assert again.figures()["pixel_accuracy"][0] == pytest.approx((360 + 552) / (480 + 576))


def test_nuclei_are_counted_by_hand_as_pixels_and_as_objects(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "d", 2, kind="instances")
    truth, nuclei = np.zeros((24, 24), np.uint16), np.zeros((2, 24, 24), np.int64)
    truth[2:10, 2:10], truth[12:20, 12:20] = 1, 2
    nuclei[:, 2:10, 2:9], nuclei[:, 12:20, 2:10] = 1, 2  # the first nearly, the second elsewhere
    for i in range(2):
        Image.fromarray(truth).save(root / "masks" / f"i0{i}.png")
    images, network = read_masks(root), Drawn(torch.zeros(2, 24, 24, dtype=torch.long), 2)
    network.instances = lambda outputs, size: nuclei  # type: ignore[assignment]
    found = ask(network, pack(images, 24), np.arange(2))
    assert found["counts"].tolist() == [[[384, 72, 64], [56, 64, 72]]] * 2
    assert found["objects"].tolist() == [[1, 1, 1, 56 / 64]] * 2
    again = scores(predictions(images, np.arange(2), found), images.classes)
    assert again.figures(names=["object_f1", "panoptic_quality"]) == {"object_f1": 0.5, "panoptic_quality": 56 / 128}


def test_a_classifier_on_masks_is_one_clear_line() -> None:
    with pytest.raises(BadInput, match="take a network with a decoder"):
        label_map({"logits": torch.zeros(2, 3)}, (8, 8))


def test_it_is_refused_before_it_has_learnt_and_leaves_nothing(tmp_path: Path) -> None:
    data = split(read_masks(write_pairs(tmp_path / "data", 12)), val=0.25, test=0.25)
    with pytest.raises(BadInput, match="take a network with a decoder"):
        hs.train(experiment(data, select="miou"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Pixels(nn.Module):
    """Each pixel by itself, half as large as the image: darkness into two logits."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 2, stride=2)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(logits=self.conv(images))


def by_pixel(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    assert batch.masks is not None
    logits = F.interpolate(student["logits"], batch.masks.shape[-2:], mode="bilinear")
    return {"pixel": (1.0, F.cross_entropy(logits, batch.masks.clamp(max=1), ignore_index=-1))}


@pytest.mark.parametrize("kind", ["classes", "instances"])
def test_a_network_learns_masks_and_the_run_folder_says_how_well(tmp_path: Path, kind: str) -> None:
    data = split(read_masks(write_pairs(tmp_path / "data", 20, kind=kind)), val=0.2, test=0.2)
    made = experiment(
        data,
        student=partial(Pixels),
        objective=by_pixel,
        image_size=24,
        epochs=40,
        select="",
        augment=Augment(rotate=180),
        optimizer=partial(torch.optim.Adam, lr=0.05),
    )
    assert made.select == "miou"
    run = hs.train(made, tmp_path / "run")
    assert {"val/miou", "val/mdice", "val/loss", "raw/pixel"} <= set(run.log.columns)
    test = run.metrics["test"]
    assert test["miou"]["value"] > 0.7
    assert test["miou"]["low"] <= test["miou"]["value"] <= test["miou"]["high"]
    table = run.predictions
    assert (table[["tp_background", "fn_background"]].sum(axis=1) > 200).all()
    again = scores(table, run.classes, "test").figures(names=["miou"])["miou"]
    assert float(again[0]) == test["miou"]["value"]
    assert "mean IoU" in (run.path / "report.html").read_text()
    assert not (run.path / "figures/outlines.png").exists()  # the network is of this file, which the run cannot open
    assert run.data.masks == kind
    assert hs.train(made, run.path, resume=True).info == run.info


def test_images_without_labels_train_what_needs_none(tmp_path: Path) -> None:
    write_pairs(tmp_path / "d", 10)
    data = read_unlabelled(tmp_path / "d" / "images")
    assert data.classes == ()

    def darker(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        return {"own": (1.0, (student["logits"] - batch.images.mean((1, 2, 3))[:, None]).square().mean())}

    with pytest.raises(BadInput, match="select='loss': one of last"):
        experiment(data, objective=darker, select="loss")
    run = hs.train(experiment(data, objective=darker, select="", augment=STILL), tmp_path / "run")
    assert run.finished
    assert run.metrics == {}
    assert len(run.predictions) == 0
    assert run.log["loss"].iloc[-1] < run.log["loss"].iloc[0]
    assert "without labels" in (run.path / "report.html").read_text()


def test_labels_and_masks_of_one_manifest_are_two_data_sets(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "d", 6)
    rows = [f"images/i{i:02d}.png,{'ab'[i % 2]},masks/i{i:02d}.png" for i in range(6)]
    (root / "m.csv").write_text("path,label,mask\n" + "\n".join(rows))
    labels, masks = read_images(root / "m.csv"), read_masks(root / "m.csv")
    assert (labels.classes, labels.masks) == (("a", "b"), "")
    assert (masks.classes, masks.masks) == (("background", "foreground"), "classes")
    assert labels.hash != masks.hash
    masks.save(tmp_path / "t.csv")
    assert pd.testing.assert_frame_equal(Images.load(tmp_path / "t.csv").frame, masks.frame) is None
    assert Images.load(tmp_path / "t.csv").masks == "classes"
