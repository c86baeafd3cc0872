"""A network that outlines says of new images what it was judged by: masks at their own size, shares, areas, nuclei."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import no_page
from torch import nn
from torch.nn import functional as F

import histill as hs
from histill import cli
from histill.data import pack, read_masks, split
from histill.data.phantom import write_images
from histill.deploy import TorchPredictor, outline
from histill.deploy.outline import COLOURS, label_map
from histill.errors import BadInput
from histill.evaluate import masks as judged
from histill.models.stardist_instances import predict_instances
from histill.recipes import rckd
from histill.run import Run
from histill.types import Outputs


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantom patches of 48 pixels with nucleus masks; every file says that a pixel is half a micron."""
    root = tmp_path_factory.mktemp("tissue") / "set"
    write_images(root, patients=6, images_per_patient=2, size=48, masks=True)
    table = pd.read_csv(root / "manifest.csv")
    table.assign(mpp=0.5)[["path", "mask", "patient", "mpp"]].to_csv(root / "half.csv", index=False)
    return root


def _trained(made: hs.experiment.Experiment, out: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histill.evaluate.finish_masks.finish", no_page)
        return hs.train(made, out)


@pytest.fixture(scope="module")
def run(tissue: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A U-Net on class masks, that calls about half of the pixels nucleus."""
    data = split(read_masks(tissue / "half.csv", kind="instances"), val=0.25, test=0.25)
    how: dict[str, Any] = {"optimizer": "adamw", "lr": 0.01, "loss": "dice", "select": "last"}
    made = rckd.finetune(data, network="test_resnet", image_size=32, epochs=12, batch_size=4, **how)
    return _trained(made, tmp_path_factory.mktemp("runs") / "unet")


@pytest.fixture(scope="module")
def nuclei(tissue: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """StarDist after an epoch, when it is sure of nothing yet; so it is made sure of half of what it sees."""
    data = split(read_masks(tissue / "manifest.csv", kind="instances"), val=0.25, test=0.25)
    run = _trained(rckd.teacher(data, image_size=48, epochs=1), tmp_path_factory.mktemp("runs") / "stardist")
    network = run.network()
    with torch.no_grad():
        seen = network(pack(data, 48).batch(np.arange(4)).images)["logits"]
        network.prob.bias -= seen.quantile(0.5)  # type: ignore[union-attr, operator]
        network.dist.bias += 4  # type: ignore[union-attr, operator]
    save_file(network.state_dict(), run.path / "model.safetensors")
    return run


@pytest.fixture
def images(tissue: Path, tmp_path: Path) -> Path:
    """Three of several sizes, two of them of one name, in two folders, and one that cannot be read."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    paths = sorted((tissue / "images").glob("*.png"))
    Image.open(paths[0]).resize((70, 50)).save(root / "deep/a.png")
    Image.open(paths[1]).resize((41, 64)).save(root / "deep/a.jpg")
    Image.open(paths[2]).save(root / "b.png")
    (root / "broken.png").write_bytes(b"\x89PNG nothing")
    return root


@pytest.mark.parametrize(("channels", "size"), [(1, (40, 31)), (2, (300, 12)), (3, (24, 24)), (5, (9, 7)), (3, (1, 1))])
def test_a_masks_pixels_are_those_that_the_judge_takes(
    channels: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outline, "_BAND", 7)
    logits = torch.randn(channels, 24, 24, generator=torch.Generator().manual_seed(channels)) * 3
    labels, confidence = label_map(logits.numpy(), size)
    full = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)
    expected = judged.label_map(Outputs(logits=logits[None]), size)[0].numpy()
    assert (labels != expected).mean() < 1e-3  # rounding, where two are equal
    both = torch.cat([torch.zeros_like(full), full], 1) if channels == 1 else full
    assert confidence == pytest.approx(float(both.softmax(1).max(1).values.mean()), rel=1e-4)


@pytest.mark.parametrize("kind", ["run", "onnx", "torchscript"])
def test_each_image_gets_its_mask_and_its_row(
    kind: str, run: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run.path
    if kind != "run":
        pytest.importorskip("onnxruntime")
        model = Path(
            hs.export(run, tmp_path / ("m.onnx" if kind == "onnx" else "m.pt"), format=kind).files[kind]["path"]  # type: ignore[arg-type]
        )
    out = tmp_path / "out" / "said.csv"
    assert cli.run(["predict", str(model), str(images), "--out", str(out), "--batch-size", "2"]) == 0
    said = capsys.readouterr().err
    assert "1 unreadable images were left out" in said
    assert "broken.png" in said
    table = pd.read_csv(out)
    areas = ["area_um2_background", "area_um2_nucleus"] if kind == "run" else []  # of the run's own images
    assert list(table) == ["image", "mask", "share_background", "share_nucleus", *areas, "confidence"]
    assert table["image"].tolist() == ["b.png", "deep/a.jpg", "deep/a.png"]
    assert table["mask"].tolist() == ["said.masks/b.png", "said.masks/deep/a.jpg.png", "said.masks/deep/a.png.png"]
    network = run.network()
    for row in table.to_dict("records"):
        picture = Image.open(images / row["image"]).convert("RGB")
        small = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=3.0))
        with torch.no_grad():
            outputs = network(torch.from_numpy(small.copy()).permute(2, 0, 1)[None] / 255)
        expected = judged.label_map(outputs, (picture.height, picture.width))[0].numpy()
        mask = Image.open(out.parent / row["mask"])
        assert (mask.mode, mask.size) == ("P", picture.size)
        drawn = np.asarray(mask)
        assert (drawn == expected).mean() > 0.999
        assert 0 < drawn.mean() < 1
        assert row["share_nucleus"] == pytest.approx((drawn == 1).mean())
        assert row["share_background"] + row["share_nucleus"] == pytest.approx(1)
        assert 0.5 < row["confidence"] < 1
        if kind == "run":
            assert row["area_um2_nucleus"] == (drawn == 1).sum() * 0.25
        assert np.array_equal(np.asarray(mask.convert("RGB"))[drawn == 1][0], COLOURS[0])
        # The outline runs between the classes, and nothing else of the image is touched.
        outlined = np.asarray(Image.open(out.parent / row["mask"].replace("said.masks", "said.outlines")))
        pen = (outlined != np.asarray(picture)).any(2)
        assert pen.any()
        assert (outlined[pen] == COLOURS[0]).all()
        near = np.stack(
            [
                np.roll(np.pad(drawn, 2, mode="constant"), (y, x), (0, 1))
                for y in (-2, -1, 0, 1, 2)
                for x in (-2, -1, 0, 1, 2)
            ]
        )
        edge = (near.min(0) != near.max(0))[2:-2, 2:-2]
        assert not (pen & ~edge).any()
    assert not list(out.parent.rglob(".*"))


class Pointwise(nn.Module):
    """Says of each pixel what it is without looking at any other, at half of the size."""

    def forward(self, images: torch.Tensor) -> Outputs:
        halved = F.avg_pool2d(images, 2)
        return Outputs(logits=torch.stack([halved[:, 0], halved[:, 1] + 0.1, 2 * halved[:, 2] - 0.4], 1))


def test_a_wide_field_is_seen_at_the_scale_of_training_without_seams(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (6, 9, 3), np.uint8)).resize((300, 200)).save(tmp_path / "wide.png")
    Image.fromarray(rng.integers(0, 255, (6, 9, 3), np.uint8)).resize((60, 60)).save(tmp_path / "like.png")
    (tmp_path / "bad.png").write_text("nothing")
    Image.fromarray(rng.integers(0, 255, (2, 9, 3), np.uint8)).resize((300, 40)).save(tmp_path / "strip.png")
    paths = [tmp_path / name for name in ("wide.png", "like.png", "strip.png", "bad.png", "gone.png")]
    predictor = TorchPredictor(Pointwise(), ("a", "b", "c"), 32)
    found = list(outline.outline_folder(predictor, paths, batch=5, scales=dict.fromkeys(paths, 0.5)))
    assert [one.path for one in found] == paths
    assert [one.error != "" for one in found] == [False, False, False, True, True]
    for one, size in (
        (found[0], (150, 100)),
        (found[1], (32, 32)),
        (found[2], (150, 20)),
    ):  # the second is squeezed, as it is like training's
        picture = Image.open(one.path)
        small = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
        logits = Pointwise()(torch.from_numpy(small.copy()).permute(2, 0, 1)[None] / 255)["logits"]
        if one is not found[1]:
            logits = F.interpolate(logits, (size[1], size[0]), mode="bilinear", align_corners=False)
        expected = judged.label_map(Outputs(logits=logits), (picture.height, picture.width))[0].numpy()
        assert one.labels is not None
        assert len(np.unique(one.labels)) == 3
        assert (one.labels == expected).mean() > 0.99  # within a tile's outermost pixel the neighbours are not known
    huge = outline.outline_folder(predictor, paths[:1], scales={paths[0]: 1e4})
    assert "cut it into tiles" in next(iter(huge)).error


def test_a_run_that_knows_its_microns_cuts_wide_images_into_tiles(run: Run, tmp_path: Path) -> None:
    """It was trained on 48 pixels of half a micron: 96 pixels of a quarter are the same field, and seen whole."""
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(100, 255, (24, 24, 3), np.uint8)).resize((96, 96)).save(tmp_path / "a.png")
    asked: list[float] = []

    def ask(predictor: Any, paths: Any, *, batch: int, scales: Any) -> Any:
        asked.extend(scales.values())
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histill.deploy.serve.outline_folder", ask)
        for manifest in ("path\na.png\n", "path,mpp\na.png,0.25\n", "path,mpp\na.png,\n"):
            (tmp_path / "m.csv").write_text(manifest)
            hs.predict(run.path, tmp_path / "m.csv")
    assert asked == pytest.approx([32 / 48, 32 / 96, 32 / 48])
    whole = hs.predict(run.path, tmp_path / "a.png", tmp_path / "tiles.csv")
    (tmp_path / "m.csv").write_text("path,mpp\na.png,0.25\n")
    one = hs.predict(run.path, tmp_path / "m.csv", tmp_path / "one.csv")
    assert whole["area_um2_nucleus"][0] + whole["area_um2_background"][0] == 96 * 96 * 0.25
    assert one["area_um2_nucleus"][0] + one["area_um2_background"][0] == 96 * 96 / 16
    assert (tmp_path / "tiles.masks/a.png").read_bytes() != (tmp_path / "one.masks/a.png").read_bytes()


def test_masks_that_were_predicted_are_masks_to_learn_from(run: Run, tissue: Path, tmp_path: Path) -> None:
    table = hs.predict(run.path, tissue / "images", tmp_path / "said.parquet")
    assert len(table) == 12
    for name in table["image"]:
        (tmp_path / name).symlink_to(tissue / "images" / name)
    table.rename(columns={"image": "path"})[["path", "mask"]].to_csv(tmp_path / "m.csv", index=False)
    again = read_masks(tmp_path / "m.csv")
    assert (again.masks, len(again.classes)) == ("classes", 2)


def test_the_same_call_again_does_not_predict_its_own_pictures(run: Run, images: Path) -> None:
    out = images / "said.csv"
    first = hs.predict(run.path, images, out)
    before = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    assert len(before) == 4 + 1 + 2 * 3
    assert hs.predict(run.path, images, out).equals(first)
    assert {path: path.read_bytes() for path in images.rglob("*") if path.is_file()} == before
    assert "mask" not in hs.predict(run.path, images / "b.png")  # without --out nothing is written


def test_a_run_on_nuclei_numbers_and_counts_them(nuclei: Run, tissue: Path, tmp_path: Path) -> None:
    names = [path.name for path in sorted((tissue / "images").glob("*.png"))][:3]
    for name in names:
        Image.open(tissue / "images" / name).resize((90, 70)).save(tmp_path / name)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "empty.png")
    (tmp_path / "m.csv").write_text(
        "path,mpp\n" + "\n".join(f"{name},0.25" for name in names) + "\nempty.png,\ngone.png,\n"
    )
    (tmp_path / "gone.png").write_text("nothing")
    table = hs.predict(nuclei.path, tmp_path / "m.csv", tmp_path / "out.csv").set_index("image")
    assert table.index.tolist() == [*names, "empty.png"]
    network: Any = nuclei.network()
    for name in names:
        found = predict_instances(network, np.asarray(Image.open(tmp_path / name)), prob_threshold=0.5)
        mask = Image.open(tmp_path / table.loc[name, "mask"])
        drawn = np.asarray(mask)
        assert mask.mode == "I;16"
        assert np.array_equal(drawn, found.labels)
        assert table.loc[name, "nuclei"] == len(set(drawn[drawn > 0].tolist())) > 0
        assert table.loc[name, "share_nucleus"] == pytest.approx((drawn > 0).mean())
        assert table.loc[name, "area_um2_nucleus"] == pytest.approx((drawn > 0).sum() / 16)
        assert table.loc[name, "confidence"] == pytest.approx(found.scores.mean())
    assert np.isnan(table.loc["empty.png", "area_um2_nucleus"])  # its resolution is not known


def test_what_cannot_be_outlined_is_one_clear_line(run: Run, images: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"1 unreadable images: .*broken.png"):
        hs.predict(run.path, images, tmp_path / "said.csv", strict=True)
    assert not (tmp_path / "said.csv").exists()
    (tmp_path / "only").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "only/x.png")
    (tmp_path / "only/said.masks").mkdir()
    (tmp_path / "only/x.png").rename(tmp_path / "only/said.masks/x.png")
    with pytest.raises(BadInput, match="no images in it"):
        hs.predict(run.path, tmp_path / "only", tmp_path / "only/said.csv")
