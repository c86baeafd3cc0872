"""Changes of stain and scanner are what they say, and the table says how far an embedding follows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import table
from torch import Tensor, nn

from histill.data import Packed, pack, read_unlabelled
from histill.data.phantom import draw
from histill.evaluate.robust import _STAINS, CHANGES, robustness, robustness_figure
from histill.types import Batch, Outputs


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    data = table(tmp_path_factory.mktemp("images") / "data", 40)
    return pack(data, 24, folder=tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def tissue() -> Tensor:
    pixels = [draw(kind, size=224, mpp=0.5, seed=7).image for kind in ("benign", "malignant")]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def draws(count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CHANGES)
def test_stronger_steps_change_tissue_more_and_stay_in_range(name: str, tissue: Tensor) -> None:
    change = CHANGES[name]
    assert list(change.steps) == sorted(change.steps)
    distances = []
    for strength in change.steps:
        changed = change.apply(tissue, strength, draws())
        assert changed.shape == tissue.shape
        assert 0 <= changed.min() <= changed.max() <= 1
        distances.append(float((changed - tissue).abs().mean()))
    assert distances == sorted(distances)
    assert distances[0] > 1e-3


@pytest.mark.parametrize("name", ["stain", "white point", "gamma"])
def test_no_strength_is_no_change(name: str, tissue: Tensor) -> None:
    torch.testing.assert_close(CHANGES[name].apply(tissue, 0.0, draws()), tissue.clamp(min=1 / 255), atol=5e-3, rtol=0)


def test_stain_changes_the_amounts_of_two_dyes_and_leaves_white_alone() -> None:
    vectors = np.array(_STAINS) / np.linalg.norm(_STAINS, axis=1, keepdims=True)
    for amounts in ((0.8, 0.0, 0.0), (0.0, 0.7, 0.0), (0.3, 0.4, 0.1)):
        colour = torch.tensor(10.0 ** -(np.array(amounts) @ vectors), dtype=torch.float32)
        images = colour.view(1, 3, 1, 1).expand(1, 3, 4, 4)
        more_h_less_e = torch.tensor([[0.9, 0.1, 0.5, 0.5]])
        changed = CHANGES["stain"].apply(images, 0.25, more_h_less_e)
        expected = 10.0 ** -(np.array(amounts) * [1.25, 0.75, 1] @ vectors)
        assert np.allclose(changed[0, :, 0, 0].numpy(), expected, atol=1e-4)
    white = torch.ones(1, 3, 4, 4)
    torch.testing.assert_close(CHANGES["stain"].apply(white, 0.4, draws(1)), white)


def test_white_point_and_gamma_by_hand() -> None:
    grey = torch.full((1, 3, 2, 2), 0.5)
    tinted = CHANGES["white point"].apply(grey, 0.2, torch.tensor([[0.8, 0.3, 0.55, 0.0]]))
    assert tinted[0, :, 0, 0].tolist() == pytest.approx([0.5, 0.4, 0.45])
    darker, brighter = (CHANGES["gamma"].apply(grey, np.log(2), torch.full((1, 4), d)) for d in (0.9, 0.1))
    assert darker.flatten()[0].item() == pytest.approx(0.25)
    assert brighter.flatten()[0].item() == pytest.approx(0.5**0.5)


def test_blur_takes_fine_detail_and_keeps_the_mean(tissue: Tensor) -> None:
    blurred = CHANGES["blur"].apply(tissue, 2.0, draws())
    assert blurred.diff(dim=3).abs().mean() < 0.6 * tissue.diff(dim=3).abs().mean()
    torch.testing.assert_close(blurred.mean(), tissue.mean(), atol=5e-3, rtol=0)


def test_jpeg_is_that_of_the_library(tissue: Tensor, tmp_path: Path) -> None:
    pixels = (tissue[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=40)
    expected = np.asarray(Image.open(tmp_path / "x.jpg"))
    changed = CHANGES["JPEG"].apply(tissue, 60, draws())
    assert np.array_equal((changed[0] * 255).round().byte().permute(1, 2, 0).numpy(), expected)


class Seeing(nn.Module):
    """What it sees of an image by ``look``."""

    def __init__(self, look) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.look = look

    def forward(self, images: Tensor) -> Outputs:
        seen = self.look(images)
        return Outputs(pooled=seen, logits=seen)


def colour(images: Tensor) -> Tensor:
    return images.mean((2, 3))


def brightest(images: Tensor) -> Tensor:
    """Where the image is brightest in each channel: a gamma does not move it."""
    return nn.functional.one_hot(images.flatten(2).argmax(2), 24 * 24).flatten(1).float()


def test_what_does_not_see_a_change_does_not_move_and_what_sees_only_it_does(packed: Packed) -> None:
    blind = robustness(Seeing(brightest), packed, changes={"gamma": CHANGES["gamma"]})
    assert blind["moved"].abs().max() < 1e-6
    assert blind["linear"].nunique() == blind["knn"].nunique() == 1
    sees = robustness(Seeing(colour), packed, changes={"gamma": CHANGES["gamma"]})
    assert sees["moved"].iloc[0] == pytest.approx(0, abs=1e-6)
    assert sees["moved"].iloc[-1] > 0.3
    assert list(sees["strength"]) == [0, 0.1, 0.2, 0.3, 0.4]
    assert (sees["moved_low"] <= sees["moved_high"]).all()
    for name in ("knn", "linear"):
        assert (sees[f"{name}_low"] <= sees[name]).all()
        assert (sees[name] <= sees[f"{name}_high"]).all()


def test_another_image_is_1_away_on_average(packed: Packed) -> None:
    """The scale of the figure: embeddings that have nothing to do with each other are 1 apart."""
    generator = torch.Generator().manual_seed(0)

    def nothing(images: Tensor) -> Tensor:
        return torch.randn(len(images), 64, generator=generator) + 5

    found = robustness(Seeing(nothing), packed, changes={"blur": CHANGES["blur"]})
    assert found["moved"].iloc[1:].mean() == pytest.approx(1, abs=0.1)


def test_a_teacher_sees_the_change_at_its_own_size_and_the_batch_does_not_matter(packed: Packed) -> None:
    def teacher(batch: Batch) -> Outputs:
        return Outputs(pooled=colour(batch.at(32)))

    change = {"stain": CHANGES["stain"]}
    one, two = (robustness(teacher, packed, changes=change, batch_size=n) for n in (3, 64))
    assert np.allclose(one["moved"], two["moved"], atol=1e-6)
    assert one["moved"].iloc[-1] > 0.01


def test_unlabelled_images_have_no_accuracy(packed: Packed, tmp_path: Path) -> None:
    plain = pack(read_unlabelled(packed.images.root), 24, folder=tmp_path)
    found = robustness(Seeing(colour), plain, changes={"blur": CHANGES["blur"]})
    assert set(found) == {"change", "strength", "moved", "moved_low", "moved_high"}


def test_figures_are_drawn_with_and_without_accuracy(packed: Packed, tmp_path: Path) -> None:
    found = robustness(Seeing(colour), packed, changes={n: CHANGES[n] for n in ("gamma", "blur")})
    bare = found.drop(columns=[c for c in found if c.startswith(("knn", "linear"))])
    for name, tables in (("one", {"a": found, "b": found}), ("two", {"a": bare})):
        robustness_figure(tables, tmp_path / f"{name}.png")
    sizes = {p.stem: Image.open(p).size for p in tmp_path.glob("*.png")}
    assert sizes["one"][1] > sizes["two"][1]
    assert set(sizes) == {"one", "two"}
