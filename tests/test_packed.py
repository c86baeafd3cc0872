"""Decoded once, whole or not at all, and a row number means the same image everywhere."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeFolder, picture
from PIL import Image

from histill.data import Images, Packed, pack, read_images, split
from histill.data.decode import decode, load, square
from histill.data.views import Augment
from histill.errors import BadInput, Failed


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def damage(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_bytes(b"no picture: " + name.encode())


def pixels_of(packed: Packed) -> np.ndarray:
    return np.asarray(packed.pixels)[packed.stored]


def test_packed_pixels_are_those_of_the_files(folder: MakeFolder) -> None:
    images = read_images(folder({"a": 3, "b": 2}))
    for size in (24, 16, 31):
        packed = pack(images, size)
        assert packed.size == size
        assert isinstance(packed.pixels, np.memmap)
        assert not packed.pixels.flags.writeable
        batch = packed.batch(np.arange(5))
        assert torch.equal(batch.images, torch.stack([torch.from_numpy(load(path, size)) for path in images.paths()]))
        assert batch.labels.tolist() == [0, 0, 0, 1, 1]
        assert batch.ids.tolist() == [0, 1, 2, 3, 4]


def test_the_second_time_no_image_is_opened(folder: MakeFolder) -> None:
    root = folder({"a": 3, "b": 3})
    images = read_images(root)
    before = pixels_of(pack(images, 16)).copy()
    shutil.rmtree(root)
    again = pack(images, 16)
    np.testing.assert_array_equal(pixels_of(again), before)
    assert again.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(BadInput, match="no such file"):
        pack(images, 17)


def test_the_same_contents_elsewhere_are_packed_already_and_other_contents_are_not(folder: MakeFolder) -> None:
    cache = Path(os.environ["HISTILL_CACHE"]) / "packed"
    for name, count in (("one", 3), ("two", 3), ("three", 4)):
        pack(read_images(folder({"a": count, "b": 2}, name=name)), 16)
    assert len(list(cache.iterdir())) == 2


def test_unreadable_images_are_left_out_and_everything_else_stays_in_step(folder: MakeFolder) -> None:
    root = folder({"a": 4, "b": 4})
    damage(root, "a/p001_1.png", "b/p004_0.png")
    images = read_images(root)
    packed = pack(images, 20)
    kept = [f"a/p{i:03d}_{i}.png" for i in (0, 2, 3)] + [f"b/p{4 + i:03d}_{i}.png" for i in (1, 2, 3)]
    assert packed.images.frame["path"].tolist() == kept
    (notice,) = packed.images.notices
    assert notice.startswith("2 unreadable images were left out: a/p001_1.png (")
    assert "b/p004_0.png (" in notice
    assert str(root) not in notice
    rows = np.array([5, 0, 3])
    batch = packed.batch(rows)
    assert batch.labels.tolist() == [1, 0, 1]
    for size, shown in ((20, batch.images), (33, batch.at(33)), (20, batch.at(20)), (20, batch.at(None))):
        expected = [torch.from_numpy(load(root / kept[row], size)) for row in rows]
        assert torch.equal(shown, torch.stack(expected))
    with pytest.raises(BadInput, match=r"2 unreadable images: a/p001_1\.png .*--strict"):
        pack(images, 20, strict=True)


def test_views_at_another_size_are_the_same_views(folder: MakeFolder) -> None:
    packed = pack(read_images(folder({"a": 2, "b": 2}, size=64)), 32)
    augment = Augment(rotate=180, brightness=0.2)
    batch = packed.batch(np.arange(4), torch.full((4,), 3), augment=augment, seed=5)
    large = batch.at(64)
    assert large.shape == (4, 3, 64, 64)
    assert (torch.nn.functional.avg_pool2d(large, 2) - batch.images).abs().mean() < 0.01
    assert torch.equal(large, packed.sized(64).batch(np.arange(4), torch.full((4,), 3), augment=augment, seed=5).images)


def test_unlabelled_images_have_no_class_number(folder: MakeFolder) -> None:
    images = read_images(folder({"a": 2, "b": 2}))
    frame = images.frame.assign(label=["a", "", "b", ""])
    assert pack(images.with_frame(frame), 16).labels.tolist() == [0, -1, 1, -1]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives an I/O error")
def test_a_file_that_cannot_be_read_just_now_is_not_remembered_as_unreadable(folder: MakeFolder) -> None:
    root = folder({"a": 3, "b": 3})
    images, file = read_images(root), root / "a" / "p001_1.png"
    aside = file.rename(root / "aside")
    file.symlink_to("/proc/self/mem")  # reads of it fail with EIO
    with pytest.raises(Failed, match=r"p001_1\.png cannot be read just now \(Input/output error\)"):
        pack(images, 16)
    file.unlink()
    with pytest.raises(BadInput, match=r"p001_1\.png: no such file"):
        pack(images, 16)
    aside.rename(file)
    packed = pack(images, 16)
    assert len(packed.images) == 6
    assert packed.images.notices == ()


def test_tiny_and_converted_images_are_named(folder: MakeFolder) -> None:
    root = folder({"a": 2, "b": 2})
    Image.fromarray(picture(50)[..., 0]).save(root / "a" / "grey.png")
    Image.fromarray(picture(51, size=9)).save(root / "b" / "small.png")
    assert pack(read_images(root), 16).images.notices == (
        "1 images of another mode were converted to RGB: a/grey.png (L)",
        "1 images are tiny: b/small.png (9x9)",
    )


# What would make figures worthless -----------------------------------------------------------------------------------


def test_one_picture_in_two_containers_in_two_splits_is_a_leak(folder: MakeFolder) -> None:
    root = folder({f"{split}/{label}": 2 for split in ("train", "test") for label in ("a", "b")})
    Image.open(root / "train" / "a" / "p000_0.png").save(root / "test" / "a" / "copy.bmp")
    images = read_images(root)  # the files differ, so it takes their pixels to know
    with pytest.raises(BadInput, match=r"leak: 1 images are in two splits: test/a/copy\.bmp, train/a/p000_0\.png"):
        pack(images, 16)


def test_one_picture_twice_within_a_split_is_no_leak(folder: MakeFolder) -> None:
    root = folder({f"{split}/{label}": 2 for split in ("train", "test") for label in ("a", "b")})
    Image.open(root / "train" / "a" / "p000_0.png").save(root / "train" / "a" / "copy.bmp")
    assert len(pack(read_images(root), 16).images) == 9


def test_pictures_that_look_alike_only_when_small_are_different_pictures(tmp_path: Path) -> None:
    for place, level in (("train", 100), ("test", 101)):
        for label, tint in (("a", 0), ("b", 40)):
            (tmp_path / place / label).mkdir(parents=True)
            pixels = np.full((32, 32, 3), 100 + tint, np.uint8)
            pixels[0, 0] = level
            Image.fromarray(pixels).save(tmp_path / place / label / "x.png")
    packed = pack(read_images(tmp_path), 1)
    assert len(packed.images) == 4


def test_a_class_or_a_split_lost_to_damage_is_an_error(folder: MakeFolder) -> None:
    root = folder({"a": 2, "b": 2})
    damage(root, "b/p002_0.png", "b/p003_1.png")
    with pytest.raises(BadInput, match="no readable image is left of class b"):
        pack(read_images(root), 16)
    root = folder({f"{place}/{label}": 1 for place in ("train", "val") for label in "ab"}, name="splits")
    damage(root, *(str(p.relative_to(root)) for p in (root / "val").rglob("*.png")))
    with pytest.raises(BadInput, match="no readable image is left of split val"):
        pack(read_images(root), 16)


# Whole or not at all -------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = read_images(folder({"a": 3, "b": 3}))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 6 * 16 * 16 * 3 - 1))
    with pytest.raises(Failed, match="packing 6 images takes"):
        pack(images, 16, folder=tmp_path / "packs")
    assert list((tmp_path / "packs").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 6 * 16 * 16 * 3))
    assert len(pack(images, 16, folder=tmp_path / "packs").images) == 6


def test_what_a_kill_left_half_written_is_not_taken_for_whole(folder: MakeFolder, tmp_path: Path) -> None:
    images, home = read_images(folder({"a": 3, "b": 3})), tmp_path / "packs"
    whole = pixels_of(pack(images, 16, folder=home)).copy()
    (pack_folder,) = home.iterdir()
    (pack_folder / "index.json").unlink()
    half = (pack_folder / "pixels.npy").read_bytes()[:1000]
    (pack_folder / "pixels.npy").unlink()  # another file, as this process has mapped the first
    (pack_folder / "pixels.npy").write_bytes(half)
    np.testing.assert_array_equal(pixels_of(pack(images, 16, folder=home)), whole)
    assert files(pack_folder) == [".lock", "index.json", "pixels.npy"]


@pytest.mark.parametrize(
    ("name", "bytes_"), [("pixels.npy", None), ("pixels.npy", b"short"), ("index.json", b"[]"), ("index.json", b"{}")]
)
def test_a_pack_that_was_damaged_is_named(folder: MakeFolder, tmp_path: Path, name: str, bytes_: bytes | None) -> None:
    images = read_images(folder({"a": 2, "b": 2}))
    pack(images, 16, folder=tmp_path / "packs")
    (home,) = (tmp_path / "packs").iterdir()
    (home / name).unlink()
    if bytes_ is not None:
        (home / name).write_bytes(bytes_)
    with pytest.raises(BadInput, match=f"{home}.*it is made again"):
        pack(images, 16, folder=tmp_path / "packs")
    shutil.rmtree(home)
    assert len(pack(images, 16, folder=tmp_path / "packs").pixels) == 4


def test_an_interrupted_packing_leaves_nothing(
    folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, home = read_images(folder({"a": 3, "b": 3})), tmp_path / "packs"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("histill.data.packed.square", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(images, 16, folder=home)
    monkeypatch.undo()
    assert list(home.iterdir()) == []
    assert len(pack(images, 16, folder=home).images) == 6


def _pack_at_once(images: Images, home: Path, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    packed = pack(images, 48, folder=home)  # without torch's threads, which do not survive a fork
    np.testing.assert_array_equal(pixels_of(packed), np.stack([square(decode(path)[0], 48) for path in images.paths()]))


def test_several_processes_pack_at_once_and_all_have_it(folder: MakeFolder, tmp_path: Path) -> None:
    images, home = read_images(folder({"a": 40, "b": 40})), tmp_path / "packs"
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    workers = [context.Process(target=_pack_at_once, args=(images, home, start)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    (pack_folder,) = home.iterdir()
    assert files(pack_folder) == [".lock", "index.json", "pixels.npy"]


def test_a_split_table_packs_and_keeps_its_splits(folder: MakeFolder) -> None:
    parts = split(read_images(folder({"a": 12, "b": 12})), val=0.25, test=0.25)
    packed = pack(parts, 16)
    for name in ("train", "val", "test"):
        assert packed.images.rows(name) == parts.rows(name)
