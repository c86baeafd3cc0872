"""RCKD: a segmenter is asked once per patch, a student learns to say the same, and its backbone starts what follows."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import no_page, table

import histill as hs
from histill import cli
from histill.data import pack, read_masks, read_unlabelled, split
from histill.data.phantom import write_images
from histill.data.windows import kept_tissue, sampled, starts, windows
from histill.errors import BadInput
from histill.losses.star import star_distances
from histill.models import CSAT, StarDist, UNet
from histill.models.stardist_instances import predict_instances
from histill.pretrain.pseudo import nuclei, pseudo_label
from histill.recipes import rckd
from histill.types import Batch, Outputs

NUCLEI = {"image_size": 64, "batch_size": 4}


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantom patches with nucleus masks, of eight patients."""
    root = tmp_path_factory.mktemp("tissue") / "set"
    write_images(root, patients=8, images_per_patient=2, size=64, masks=True)
    return root


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory, tissue: Path) -> Path:
    """A run of rckd.teacher, two epochs long."""
    out = tmp_path_factory.mktemp("run") / "teacher"
    data = split(read_masks(tissue / "manifest.csv", kind="instances"), val=0.25, test=0.25)
    hs.train(rckd.teacher(data, epochs=2, **NUCLEI), out)
    return out


@given(length=st.integers(1, 900), window=st.integers(16, 300), stride=st.integers(1, 300))
def test_windows_cover_an_image_and_stay_inside(length: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    found = starts(length, window, stride)
    covered = {p for s in found for p in range(s, s + window)}
    assert set(range(length)) <= covered
    assert found[0] == 0
    assert all(s + window <= max(length, window) for s in found)
    assert len(found) <= -(-length // stride) + 1


def test_windows_are_the_images_own_pixels_with_their_masks_and_patients(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    rng = np.random.default_rng(0)
    picture, mask = rng.integers(0, 255, (40, 72, 3), np.uint8), rng.integers(0, 9, (40, 72)).astype(np.uint16)
    Image.fromarray(picture).save(tmp_path / "images/a.png")
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    cut = windows(read_masks(tmp_path), 48)
    assert len(cut) == 2
    assert cut.frame["patient"].nunique() == 1
    assert (cut.frame["patient"] != "").all(), "or the windows of one image could lie in two splits"
    batch = pack(cut, 48).batch(np.arange(2))
    assert batch.masks is not None
    assert torch.equal(batch.masks[1, :40], torch.from_numpy(mask[:, 24:72].astype(np.int64)))
    assert (batch.masks[1, 40:] == -1).all()  # the picture is mirrored there, and a nucleus would be two
    assert torch.equal(batch.images[1, :, 40:], batch.images[1, :, 32:40].flip(1))
    assert torch.allclose(batch.images[0, :, :40], torch.from_numpy(picture[:, :48]).permute(2, 0, 1) / 255)


def test_windows_of_classes_keep_what_is_marked_and_what_nobody_knows(tmp_path: Path) -> None:
    picture, mask = np.full((8, 24, 3), 200, np.uint8), np.zeros((8, 24), np.uint8)
    picture[:, 16:] = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    mask[2, 3], mask[5, 18] = 2, 255  # of three classes 255 is unknown
    for name, pixels in (("images", picture), ("masks", mask)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    images = read_masks(tmp_path)
    cut = windows(images, 8)
    assert len(cut) == 2, "of one colour are the first, which is marked, and the second, which is left out"
    masks = pack(cut, 8).batch(np.arange(2)).masks
    assert masks is not None
    assert [masks[row].nonzero().tolist() for row in (0, 1)] == [[[2, 3]], [[5, 2]]]
    assert (int(masks[0, 2, 3]), int(masks[1, 5, 2])) == (2, -1)
    dense = pack(windows(images, 8, stride=4), 8)
    shown = [dense.batch(np.array([row])).images[0] * 255 for row in range(3)]
    assert len(dense.images) == 3, "from 0, 12 and 16"
    assert torch.equal(shown[1].round().byte(), torch.from_numpy(picture[:, 12:20].copy()).permute(2, 0, 1))


def test_blank_windows_are_no_leak(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i, split_ in enumerate(("train", "val", "test")):
        picture = np.full((64, 128, 3), 255, np.uint8)
        picture[:, 64:] = np.random.default_rng(i).integers(0, 255, (64, 64, 3))
        Image.fromarray(picture).save(tmp_path / f"images/{split_}.png")
        Image.fromarray((picture[..., 0] < 99).astype(np.uint16)).save(tmp_path / f"masks/{split_}.png")
    rows = [f"images/{s}.png,masks/{s}.png,{s}" for s in ("train", "val", "test")]
    (tmp_path / "m.csv").write_text("path,mask,split\n" + "\n".join(rows))
    cut = windows(read_masks(tmp_path / "m.csv"), 64)
    assert len(cut) == 3  # a white half of each is left out
    assert len(pack(cut, 64).images) == 3


def test_background_is_left_out_by_mean_intensity_and_stain(tmp_path: Path) -> None:
    for name, colour in (("dark", 20), ("light", 250), ("grey", 128)):
        Image.new("RGB", (32, 32), (colour,) * 3).save(tmp_path / f"{name}.png")
    Image.new("RGB", (32, 32), (200, 120, 190)).save(tmp_path / "tissue.png")
    images = read_unlabelled(tmp_path)
    assert kept_tissue(images).frame["path"].tolist() == ["grey.png", "tissue.png"]
    stained = kept_tissue(images, min_tissue=0.5)
    assert stained.frame["path"].tolist() == ["tissue.png"]
    assert "3 images show no tissue" in stained.notices[0]
    with pytest.raises(BadInput, match="none of 4 images shows tissue"):
        kept_tissue(images, dark=251)


def test_a_sample_is_drawn_once_for_a_seed(tissue: Path) -> None:
    images = read_unlabelled(tissue / "images")
    first = sampled(images, 5, seed=1)
    assert len(first) == 5
    assert first.frame.equals(sampled(images, 5, seed=1).frame)
    assert not first.frame.equals(sampled(images, 5, seed=2).frame)
    assert sampled(images, None) is images


def test_pseudo_labels_are_equations_1_and_2_and_asked_once(tissue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = StarDist().eval()
    images = sampled(read_unlabelled(tissue / "images"), 3)
    said = pseudo_label(images, network, scale=1.0, threshold=0.5)
    assert (said.masks, said.classes) == ("classes", ("background", "nucleus"))
    for path, mask in zip(images.paths(), said.frame["mask"]):
        picture = np.asarray(Image.open(path).convert("RGB"))
        with torch.no_grad():
            prob = network(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255)["prob"]
        drawn = np.asarray(Image.open(mask))
        assert drawn.shape == (64, 64)
        assert (drawn[::2, ::2] == (prob[0, 0] >= 0.5).numpy()).all()  # its map is of every second pixel

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr("histill.pretrain.pseudo.nuclei", never)
    again = pseudo_label(images, network, scale=1.0, threshold=0.5)
    assert again.frame.equals(said.frame)
    with pytest.raises(AssertionError, match="asked again"):
        pseudo_label(images, network, scale=1.0, threshold=0.4)


def test_a_pseudo_label_of_instances_is_their_union(tissue: Path) -> None:
    """A network that is sure of everything outlines a nucleus at every point, of which most are suppressed."""
    torch.manual_seed(1)
    network = StarDist().eval()
    network.prob.bias.data.fill_(5.0)
    network.dist.bias.data.fill_(6.0)
    picture = np.asarray(Image.open(next((tissue / "images").glob("*.png"))))
    found = predict_instances(network, picture, scale=2.0, prob_threshold=0.6)
    assert 5 < len(found.scores) < 400
    drawn = nuclei(network, picture, kind="instances", scale=2.0, threshold=0.6)
    assert np.array_equal(drawn, found.labels > 0)
    assert 0.3 < drawn.mean() <= 1


def test_the_teachers_loss_falls_and_its_nuclei_are_counted(segmenter: Path) -> None:
    run = hs.Run.open(segmenter)
    assert run.log["loss"].iloc[-1] < run.log["loss"].iloc[0]
    assert {"val/object_f1", "val/miou", "raw/prob", "raw/dist"} <= set(run.log.columns)
    assert {"object_f1", "panoptic_quality", "iou_nucleus"} <= set(run.metrics["test"])
    assert (run.path / "figures/outlines.png").stat().st_size > 10_000
    assert "truth and prediction" in (run.path / "report.html").read_text()


def test_a_teacher_that_outlines_the_truth_counts_every_nucleus(tissue: Path) -> None:
    """Targets turned into outputs: what the network is taught is what the metric rewards."""
    data = read_masks(tissue / "manifest.csv", kind="instances")
    batch = pack(windows(data, 64), 64).batch(np.arange(4))
    assert batch.masks is not None
    prob, dist = star_distances(batch.masks)
    said = StarDist().instances(Outputs(prob=prob[:, None], dist=dist), (64, 64))
    drawn, truth = torch.from_numpy(said > 0), batch.masks > 0
    iou = (drawn & truth).sum() / (drawn | truth).sum()
    assert iou > 0.8


def test_the_defaults_are_the_papers(tissue: Path, segmenter: Path, tmp_path: Path) -> None:
    taken = {name: one.default for name, one in inspect.signature(rckd.pretrain).parameters.items()}
    expected = {"image_size": 512, "epochs": 100, "batch_size": 64, "warm": 10, "pseudo": "prob", "threshold": 0.5}
    expected |= {"teacher_scale": 2, "sample": 400_000, "dark": 50, "light": 245, "optimizer": "lars"}
    assert {name: taken[name] for name in expected} == expected
    small: dict[str, Any] = {"network": "test_resnet", "image_size": 64, "teacher_scale": 1.0}
    first = rckd.pretrain(read_unlabelled(tissue / "images"), hs.Run.open(segmenter), **small)
    layer = torch.nn.Linear(2, 2)
    # Barlow Twins' rates, 0.2 and 0.0048 for 256 images, of 64; ten epochs up, then down to a thousandth.
    assert [group["lr"] for group in first.optimizer(layer.parameters()).param_groups] == pytest.approx([0.05, 0.0012])
    assert max(range(101), key=first.schedule) == 10
    assert first.schedule(100) == pytest.approx(0.001)

    fine = rckd.finetune(table(tmp_path / "labels"))
    assert (fine.image_size, fine.epochs, fine.batch_size, fine.patience, fine.select) == (384, 200, 64, 20, "loss")
    (group,) = fine.optimizer(layer.parameters()).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1e-4, 0.9, 0)
    assert {fine.schedule(epoch) for epoch in range(200)} == {1.0}
    objective: Any = fine.objective
    assert (objective.keywords["alpha"], objective.keywords["gamma"]) == (0.25, 2.0)
    assert rckd.finetune(table(tmp_path / "labels"), select="last").patience is None, "nothing to wait for"

    taught = rckd.teacher(split(read_masks(tissue / "manifest.csv", kind="instances"), val=0.25, test=0.25), epochs=4)
    assert (taught.image_size, taught.batch_size, taught.clip) == (256, 4, 10.0)
    assert taught.optimizer(layer.parameters()).param_groups[0]["lr"] == 3e-4


def test_the_student_learns_eq_3(tissue: Path) -> None:
    masks = torch.tensor([[[0, 1], [1, -1]]])
    logits = torch.tensor([[[[0.0, 0.0], [1.0, 5.0]], [[0.0, 2.0], [0.0, 5.0]]]])
    batch = Batch(torch.zeros(1, 3, 2, 2), torch.tensor([-1]), torch.zeros(1), torch.zeros(1), lambda size: None, masks)  # type: ignore[arg-type, return-value]
    weight, loss = rckd.nuclei(Outputs(logits=logits), Outputs(), batch)["pixels"]
    expected = (np.log(2) + np.log(1 + np.exp(-2)) + np.log(1 + np.exp(1))) / 3
    assert (weight, float(loss)) == (1.0, pytest.approx(expected, rel=1e-6))


@pytest.mark.parametrize(("network", "size"), [("CSAT", 64), ("test_resnet", 64), ("vit_tiny_patch16_224", 48)])
def test_the_pretrained_backbone_starts_classifier_and_segmenter(
    network: str, size: int, segmenter: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    patches = read_unlabelled(tissue / "images")
    first = rckd.pretrain(
        patches, hs.Run.open(segmenter), network=network, image_size=64, epochs=1, batch_size=8, teacher_scale=1.0
    )
    run = hs.train(first, tmp_path / "pretrained")
    assert run.finished
    tiny: dict[str, Any] = {"image_size": size, "epochs": 1, "batch_size": 8, "network": network}
    labels = table(tmp_path / "labels", size=64)
    fine = rckd.finetune(labels, weights=str(run.path), **tiny)
    made = fine.student()
    ours, theirs = made.state_dict(), run.network().state_dict()
    shared = [name for name in ours if f"backbone.{name}" in theirs and "fc" not in name]
    assert len(shared) > 20
    placed = {"network.pos_embed"} if size != 64 else set()  # a transformer's positions, resampled
    assert all(torch.equal(ours[n], theirs[f"backbone.{n}"]) for n in shared if ours[n].ndim and n not in placed)
    assert hs.train(fine, tmp_path / "fine").finished
    if network != "test_resnet":
        numbered = split(read_masks(tissue / "manifest.csv", kind="instances"), val=0.25, test=0.25)
        dense = rckd.finetune(numbered, weights=str(run.path), **tiny)
        if network == "CSAT":
            drawn = hs.train(dense, tmp_path / "dense")  # any nucleus is the class nucleus
            assert set(drawn.metrics["test"]) >= {"miou", "iou_nucleus"}
        assert isinstance(dense.student(), UNet)
        started = dense.student().state_dict()
        again = [name for name in ours if f"backbone.{name}" in started and name not in placed and "fc" not in name]
        assert all(torch.equal(started[f"backbone.{name}"], theirs[f"backbone.{name}"]) for name in again)
        for name in placed:
            assert torch.equal(started[f"backbone.{name}"], ours[name])


def test_fine_tuning_on_masks_learns_the_loss_that_is_asked_for(tissue: Path, tmp_path: Path) -> None:
    """Two pixels of a rare class in 16, said with p = 1/2 everywhere: hand-computed focal and Dice."""
    masks = torch.zeros(1, 4, 4, dtype=torch.long)
    masks[0, 0, :2] = 1
    batch = Batch(torch.zeros(1, 3, 4, 4), torch.tensor([-1]), torch.zeros(1), torch.zeros(1), lambda size: None, masks)  # type: ignore[arg-type, return-value]
    said = Outputs(logits=torch.zeros(1, 2, 4, 4))
    focal = 0.25 * 0.5**2 * np.log(2)
    dice = 1 - np.mean([(2 * 7 + 1) / (8 + 14 + 1), (2 * 1 + 1) / (8 + 2 + 1)])
    for name, expected in (("focal", [focal]), ("dice", [dice]), ("focal+dice", [focal, dice])):
        terms = rckd.labelled(said, Outputs(), batch, loss=name)
        assert list(terms) == name.split("+")
        assert [weight for weight, _ in terms.values()] == [1.0] * len(terms)
        assert [float(loss) for _, loss in terms.values()] == pytest.approx(expected, rel=1e-5)

    data = split(read_masks(tissue / "manifest.csv", kind="instances"), val=0.25, test=0.25)
    tiny: dict[str, Any] = {"network": "test_resnet", "image_size": 32, "epochs": 1, "batch_size": 8}
    log = hs.train(rckd.finetune(data, loss="focal+dice", **tiny), tmp_path / "run").log
    assert {"raw/focal", "raw/dice", "weight/dice"} <= set(log.columns)
    assert log["loss"][0] == pytest.approx(log["raw/focal"][0] + log["raw/dice"][0], rel=1e-5)


def test_position_encodings_stay_as_pretraining_left_them(tissue: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.pt"
    torch.manual_seed(3)
    torch.save(CSAT(7).state_dict(), start)
    made = rckd.finetune(table(tmp_path / "d"), weights=str(start), image_size=32, epochs=1, batch_size=8, lr=0.1)
    assert made.frozen == ("*.peg.*",)
    run = hs.train(made, tmp_path / "run")
    before, after = torch.load(start, weights_only=True), run.network().state_dict()
    moved = {
        name: not torch.equal(before[name], after[name]) for name in before if before[name].shape == after[name].shape
    }
    assert not any(changed for name, changed in moved.items() if ".peg." in name)
    assert sum(changed for name, changed in moved.items() if ".peg." not in name) > 100
    assert rckd.finetune(table(tmp_path / "d"), image_size=32).frozen == ()
    with pytest.raises(BadInput, match="no parameter named nothing"):
        hs.train(partial(hs.Experiment, **vars(made) | {"frozen": ("nothing",)})(), tmp_path / "other")


def test_a_run_judged_on_its_own_test_images_again_says_the_same(tissue: Path, segmenter: Path, tmp_path: Path) -> None:
    run = hs.Run.open(segmenter)
    frame = run.data.frame
    test = frame[frame["split"] == "test"]
    (tmp_path / "m.csv").write_text("path,mask\n")
    for kind in ("path", "mask"):
        for file in test[kind]:
            target = tmp_path / Path(file).name
            target.write_bytes((run.data.root / file).read_bytes())
    rows = [f"{Path(p).name},{Path(m).name}" for p, m in zip(test["path"], test["mask"])]
    (tmp_path / "m.csv").write_text("path,mask\n" + "\n".join(rows))
    again = hs.evaluate(run, tmp_path / "m.csv")["data"]
    for name in ("miou", "object_f1"):
        assert again[name]["value"] == pytest.approx(run.metrics["test"][name]["value"], abs=1e-6)


def test_what_does_not_fit_is_one_clear_line(tissue: Path, tmp_path: Path) -> None:
    patches = read_unlabelled(tissue / "images")
    with pytest.raises(BadInput, match="give --teacher RUN"):
        rckd.pretrain(patches)
    with pytest.raises(BadInput, match="--target instances"):
        rckd.teacher(table(tmp_path / "d"))
    with pytest.raises(BadInput, match="needs labels or masks"):
        rckd.finetune(patches)
    with pytest.raises(BadInput, match="--loss focal\\+dice: Dice is of masks"):
        rckd.finetune(table(tmp_path / "d"), loss="focal+dice")
    with pytest.raises(BadInput, match=r"--loss iou: focal, dice or focal\+dice"):
        rckd.finetune(table(tmp_path / "d"), loss="iou")  # type: ignore[arg-type]


def test_distill_rckd_pretrains_once_and_compares_with_random_weights(
    segmenter: Path, tissue: Path, tmp_path: Path
) -> None:
    table(tmp_path / "data", count=48, size=40)
    out = tmp_path / "out"
    words = ["--data", str(tmp_path / "data"), "--out", str(out), "--unlabelled", str(tissue / "images")]
    words += ["--teacher", str(segmenter), "--image-size", "32", "--epochs", "1", "--batch-size", "8", "--seeds", "2"]
    words += ["--pretrain-epochs", "1", "--pretrain-image-size", "32", "--pretrain-batch-size", "8", "--lr", "0.01"]
    words += ["--network", "test_resnet", "--val", "0.2", "--test", "0.25"]
    assert cli.run(["distill", "rckd", *words]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["test"]) == {"student_alone", "student_distilled", "gain"}
    assert len(summary["test"]["gain"]["accuracy"]["seeds"]) == 2
    assert summary["export"]["onnx"]["max_abs_diff"] < 1e-3
    assert set(summary["efficiency"]) == {"student", "student_int8"}
    page = (out / "report.html").read_text()
    assert "unlabelled images." in page
    runs = sorted(p.parent.relative_to(out).as_posix() for p in out.rglob("run.json"))
    assert runs == ["pretrained", *(f"seed{i}/student_{r}" for i in range(2) for r in ("alone", "distilled"))]
    alone, distilled = (hs.Run.open(out / "seed0" / f"student_{r}") for r in ("alone", "distilled"))
    same = ("image_size", "epochs", "batch_size", "optimizer", "schedule", "augment", "seed", "select")
    assert all(alone.info[name] == distilled.info[name] for name in same)
    assert cli.run(["distill", "--out", str(out), "--resume"]) == 0


def test_patches_that_are_test_images_are_a_leak(segmenter: Path, tmp_path: Path, capsys: Any) -> None:
    table(tmp_path / "data", count=48, size=40)
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--teacher", str(segmenter)]
    for i, path in enumerate(sorted((tmp_path / "data").rglob("*.png"))):
        again = tmp_path / "again" / f"{i}.bmp"  # other files, the same pictures
        again.parent.mkdir(exist_ok=True)
        Image.open(path).save(again)
    assert cli.run(["distill", "rckd", *words, "--unlabelled", str(again.parent)]) == 2
    assert "leak" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing was begun
