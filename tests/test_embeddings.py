"""Embeddings of a folder reach the right image whatever their format; several teachers keep apart and in one scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import SIZE, Tiny, table

from histill.data import Images, Packed, pack, read_unlabelled
from histill.errors import BadInput
from histill.models import Foundation
from histill.teachers import Cached, Embeddings, Frozen, Several, Standardised, bound, open_teacher, standardise
from histill.types import Batch, NoOutput, Outputs

WIDTH = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data", 20)


@pytest.fixture(scope="module")
def packed(data: Images, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(data, SIZE, folder=tmp_path_factory.mktemp("packed"))


def values(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def write_parquet(out: Path, names: list[str], rows: Any) -> Path:
    frame = pd.DataFrame({"image": names, **{f"f{i}": rows[:, i] for i in range(WIDTH)}})
    frame.to_parquet(out / "e.parquet")
    return out / "e.parquet"


def write_lists(out: Path, names: list[str], rows: Any) -> Path:
    pd.DataFrame({"image": names, "patient": "x", "embedding": list(rows)}).to_parquet(out / "e.parquet")
    return out


def write_npy(out: Path, names: list[str], rows: Any) -> Path:
    np.save(out / "e.npy", rows)
    (out / "e.txt").write_text("\n".join(names))
    return out


NAMINGS: dict[str, Callable[[Images, str], str]] = {
    "path": lambda images, path: path,
    "whole path": lambda images, path: str((images.root / path).absolute()),
    "name": lambda images, path: path.rsplit("/", 1)[-1],
    "stem": lambda images, path: Path(path).stem,
}


@pytest.mark.parametrize("write", [write_parquet, write_lists, write_npy])
@pytest.mark.parametrize("naming", NAMINGS)
def test_each_image_gets_its_own_embedding(
    write: Any, naming: str, data: Images, packed: Packed, tmp_path: Path
) -> None:
    paths, rows = list(data.frame["path"]), values(len(data) + 1)
    order = np.random.default_rng(1).permutation(len(data))
    names = [NAMINGS[naming](data, paths[i]) for i in order]
    source = write(tmp_path, [*names, "of_another_image"], np.concatenate([rows[order], rows[-1:]]))
    teacher = Embeddings(source).of(packed.images)
    ids = np.array([3, 17, 4])
    for view in (0, 5):  # whatever the view
        said = teacher(packed.batch(ids, torch.full((3,), view)))
        assert said["pooled"].dtype == torch.float32
        assert np.array_equal(said["pooled"].numpy(), rows[ids])
    assert teacher.width == WIDTH


def write_slide(file: Path, coords: Any, features: Any) -> None:
    with h5py.File(file, "w") as inside:
        inside["coords"], inside["features"] = coords, features


@pytest.mark.parametrize("layout", ["{slide}/{x}_{y}.png", "tiles/{slide}_{x}_{y}.png"])
def test_tiles_find_their_place_in_clam_and_trident_files(layout: str, tmp_path: Path) -> None:
    rows = {slide: values(4, seed) for seed, slide in enumerate(("TCGA-A1.abc", "S-2"))}
    coords = np.array([[0, 0], [0, 256], [256, 0], [1024, 512]])
    (tmp_path / "features").mkdir()
    expected = {}
    for seed, (slide, features) in enumerate(rows.items()):
        write_slide(tmp_path / "features" / f"{slide}.h5", coords, features)
        for number, (x, y) in enumerate(coords[:3]):
            path = layout.format(slide=slide, x=x, y=y)
            (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([seed, number]).integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / path)
            expected[path] = features[number]
    packed = pack(read_unlabelled(tmp_path / "images"), 16)
    teacher = Embeddings(tmp_path / "features").of(packed.images)
    said = teacher(packed.batch(np.arange(6)))["pooled"].numpy()
    for path, row in zip(packed.images.frame["path"], said):
        assert np.array_equal(row, expected[path])


def test_what_is_missing_or_twice_is_one_line(data: Images, packed: Packed, tmp_path: Path) -> None:
    paths = list(data.frame["path"])

    def source(names: list[str], rows: Any | None = None) -> Path:
        return write_parquet(tmp_path, names, values(len(names)) if rows is None else rows)

    with pytest.raises(BadInput, match=rf"no embedding of 2 of 20 images: {paths[0]}, {paths[1]}; those there are"):
        Embeddings(source(paths[2:])).of(data)
    with pytest.raises(BadInput, match="1 images are there twice"):
        Embeddings(source([*paths, paths[4]]))
    with pytest.raises(BadInput, match="not finite"):
        Embeddings(source(paths, values(len(paths)) * np.nan)).of(data)
    with pytest.raises(BadInput, match="Bind the embeddings"):
        Embeddings(source(paths))(packed.batch(np.arange(2)))
    twins = data.with_frame(data.frame.assign(path=[f"{i % 10}/one.png" for i in range(20)]))
    with pytest.raises(BadInput, match=r"0/one.png and 1/one.png would share an embedding"):
        Embeddings(source(["one.png"])).of(twins)


def test_files_that_are_no_embeddings_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file or folder"):
        Embeddings(tmp_path / "none")
    with pytest.raises(BadInput, match=r"no embeddings in it \(\.h5, \.parquet, \.npy\)"):
        Embeddings(tmp_path)
    np.save(tmp_path / "e.npy", values(3))
    with pytest.raises(BadInput, match=r"no e\.txt beside it"):
        Embeddings(tmp_path)
    (tmp_path / "e.txt").write_text("a\nb\n")
    with pytest.raises(BadInput, match=r"\(3, 5\) of 2 images"):
        Embeddings(tmp_path)
    (tmp_path / "e.txt").write_text("a\nb\nc\n")
    write_slide(tmp_path / "s.h5", np.zeros((2, 2)), values(2)[:, :3])
    with pytest.raises(BadInput, match=r"several widths \(e\.npy 5, s\.h5 3\)"):
        Embeddings(tmp_path)
    write_slide(tmp_path / "s.h5", np.zeros((4, 2)), values(2))
    with pytest.raises(BadInput, match="do not fit"):
        Embeddings(tmp_path)
    (tmp_path / "s.h5").write_bytes(b"no HDF5")
    with pytest.raises(BadInput, match=r"s\.h5: not readable embeddings"):
        Embeddings(tmp_path / "s.h5")
    pd.DataFrame({"name": ["a"]}).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(BadInput, match="no column image; it has name"):
        Embeddings(tmp_path / "p.parquet")


def test_the_key_of_bound_embeddings_is_that_of_their_values(data: Images, tmp_path: Path) -> None:
    paths, rows = list(data.frame["path"]), values(len(data))
    one = Embeddings(write_parquet(tmp_path, paths, rows)).of(data)
    two = Embeddings(write_npy(tmp_path / "..", paths[::-1], rows[::-1]) / "e.npy").of(data)
    assert one.key == two.key
    rows[7, 2] += 1
    assert Embeddings(write_parquet(tmp_path, paths, rows)).of(data).key != one.key


class Far:
    """A teacher off the origin, of one dimension that never changes, and of large scale."""

    key = "far"
    asked = 0

    def __call__(self, batch: Batch) -> Outputs:
        self.asked += len(batch.ids)
        means = batch.images.mean((2, 3))  # (B, 3)
        still = torch.full((len(means), 1), 3.25)
        pooled = torch.cat([means * torch.tensor([1e3, 1.0, 0.1]) + 40, still], 1)
        return Outputs(pooled=pooled, tokens=batch.images[:, :2, ::3, ::3] * 7 - 2, logits=pooled)


def test_standardised_outputs_have_mean_0_and_variance_1_on_the_training_images(packed: Packed, tmp_path: Path) -> None:
    rows = np.array(packed.images.rows("train"))
    teacher = standardise(Far(), packed, outputs=("pooled", "tokens"), device="cpu", batch_size=5, folder=tmp_path)
    said = teacher(packed.batch(rows))
    assert set(said) == {"pooled", "tokens"}
    raw = Far()(packed.batch(rows))
    expected = (raw["pooled"] - raw["pooled"].mean(0)) / raw["pooled"].std(0, unbiased=False)
    torch.testing.assert_close(said["pooled"][:, 0], expected[:, 0], atol=1e-3, rtol=1e-3)
    assert said["pooled"].mean(0).abs().max() < 1e-2
    torch.testing.assert_close(said["pooled"].std(0, unbiased=False)[:2], torch.ones(2), atol=1e-2, rtol=0)
    assert said["pooled"][:, 3].abs().max() == 0  # what never changes says nothing, and is not divided by nothing
    channels = said["tokens"].movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(channels.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(channels.std(0, unbiased=False), torch.ones(2), atol=1e-4, rtol=0)


def test_standards_are_measured_once_for_a_teacher_and_its_images(packed: Packed, tmp_path: Path) -> None:
    first, again, fewer = Far(), Far(), Far()
    one = standardise(first, packed, device="cpu", folder=tmp_path)
    two = standardise(again, packed, device="cpu", folder=tmp_path)
    assert (first.asked, again.asked) == (len(packed.images.rows("train")), 0)
    assert one.key == two.key
    assert np.array_equal(one.standards["pooled"][0], two.standards["pooled"][0])
    assert standardise(fewer, packed, device="cpu", most=4, folder=tmp_path).key != one.key
    assert fewer.asked == 4
    with pytest.raises(NoOutput, match="no output named 'nothing'"):
        standardise(Far(), packed, outputs=("nothing",), device="cpu", folder=tmp_path)
    none = pack(packed.images.with_frame(packed.images.frame.assign(split="test")), SIZE)
    with pytest.raises(BadInput, match="no training images"):
        standardise(Far(), none, device="cpu", folder=tmp_path)


def networks() -> tuple[Frozen, Frozen]:
    made = []
    for seed, width in ((1, 3), (2, 6)):
        torch.manual_seed(seed)
        made.append(Frozen(Tiny(width=width)))
    return made[0], made[1]


def test_several_teachers_keep_their_names_apart_and_can_be_cached(packed: Packed, tmp_path: Path) -> None:
    one, two = networks()
    both, batch = Several([one, two]), packed.batch(np.arange(4))
    said = both(batch)
    assert {name: tuple(value.shape) for name, value in said.items()} == {"pooled0": (4, 3), "pooled1": (4, 6)}
    assert torch.equal(said["pooled1"], two(batch)["pooled"])
    assert Several([two, one]).key != both.key
    cached = Cached(both, tmp_path, images=len(packed.images), views=2, identity={}, outputs=("pooled0", "pooled1"))
    for _ in range(2):
        assert torch.equal(cached(batch)["pooled1"], said["pooled1"])
    assert (cached.asked, cached.read) == (4, 4)
    with pytest.raises(BadInput, match="at least one"):
        Several([])


def test_tokens_of_a_foundation_model_are_cached_as_they_are(packed: Packed, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Foundation("kaiko-vits16", weights=None, img_size=32, depth=1, embed_dim=12, num_heads=2)
    teacher = standardise(
        Frozen(network, image_size=32), packed, outputs=("pooled", "tokens"), device="cpu", folder=tmp_path
    )
    batch = packed.batch(np.arange(5))
    cached = Cached(
        Several([teacher]),
        tmp_path / "cache",
        images=len(packed.images),
        views=1,
        identity={},
        outputs=("pooled0", "tokens0"),
    )
    expected = teacher(batch)
    for _ in range(2):
        said = cached(batch)
        torch.testing.assert_close(said["tokens0"], expected["tokens"])
        torch.testing.assert_close(said["pooled0"], expected["pooled"])
    assert said["tokens0"].shape == (5, 12, 2, 2)


def test_binding_reaches_embeddings_inside_other_teachers(data: Images, packed: Packed, tmp_path: Path) -> None:
    paths, rows = list(data.frame["path"]), values(len(data))
    saved = Embeddings(write_parquet(tmp_path, paths, rows))
    inner = Standardised(saved, {"pooled": (np.zeros(WIDTH, np.float32), np.full(WIDTH, 2, np.float32))}, key="k")
    network, _ = networks()
    ready = bound(Several([network, inner]), packed.images)
    said = ready(packed.batch(np.array([11, 2])))
    assert np.allclose(said["pooled1"].numpy(), rows[[11, 2]] / 2)
    assert bound(network, packed.images) is network
    # A table that lost an image numbers the others anew, and so do the embeddings.
    shorter = packed.images.with_frame(packed.images.frame.drop(index=0))
    again = bound(saved, shorter)
    assert np.array_equal(again(packed.batch(np.array([0])))["pooled"].numpy(), rows[[1]])


def test_a_teacher_is_opened_by_what_it_is_called(data: Images, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(Foundation("kaiko-vits16", weights=None).network.state_dict(), tmp_path / "w.safetensors")
    opened = open_teacher(f"kaiko-vits16={tmp_path / 'w.safetensors'}")
    assert isinstance(opened, Frozen)
    assert opened.image_size == 224
    write_parquet(tmp_path, list(data.frame["path"]), values(len(data)))
    assert isinstance(open_teacher(tmp_path / "e.parquet"), Embeddings)
    assert isinstance(open_teacher(str(tmp_path)), Embeddings)
    assert open_teacher(opened) is opened
    with pytest.raises(
        BadInput, match=r"--teacher uni3: neither a run, .* nor a network of timm, nor a foundation model \(uni,"
    ):
        open_teacher("uni3")


def test_any_network_of_timm_is_a_teacher_of_its_pooled_features(tmp_path: Path, data: Images) -> None:
    from safetensors.torch import save_file

    from histill.models import Timm

    network = Timm("mobilenetv3_small_050", 0).eval()
    save_file(network.network.state_dict(), tmp_path / "w.safetensors")
    opened = open_teacher(f"mobilenetv3_small_050={tmp_path / 'w.safetensors'}")
    assert isinstance(opened, Frozen)
    assert opened.image_size == 224
    batch = pack(data, 224).batch(np.array([0, 1]))
    with torch.no_grad():
        assert torch.allclose(opened(batch)["pooled"], network(batch.images)["pooled"], atol=1e-5)
