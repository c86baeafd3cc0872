"""Networks for small images have the counts of their papers, and CIFAR-100's archive is read without a pickle."""

from __future__ import annotations

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from histill.cli import run
from histill.data import read_images
from histill.data.cifar import unpack_cifar
from histill.errors import BadInput
from histill.models import Cifar
from histill.models.cifar import CIFAR_NETWORKS
from histill.studies.methods import PAPER

PARAMETERS = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13_cifar": 9_462_180,
    "resnet18_cifar": 11_220_132,
    "resnet50_cifar": 23_705_252,
    "resnet152_cifar": 58_341_028,
}
"""At 100 classes, as the benchmark and the cervical cell paper have them."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        network = Cifar(name)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("depth", "widths"), [*((depth, (16, 16, 32, 64)) for depth in (20, 32, 44, 56, 110)), (8, (32, 64, 128, 256))]
)
def test_a_resnets_count_follows_from_its_depth_and_widths(depth: int, widths: tuple[int, ...]) -> None:
    # Convolutions k*k*ci*co, batch norms 2*co, a shortcut where the width changes, a linear layer.
    stem, blocks = 27 * widths[0] + 2 * widths[0], (depth - 2) // 6
    count = stem + 100 * widths[-1] + 100
    for ci, co in pairwise(widths):
        count += 9 * ci * co + 9 * co * co + 4 * co + (blocks - 1) * (18 * co * co + 4 * co)
        count += ci * co + 2 * co if ci != co else 0
    with torch.device("meta"):
        network = Cifar(f"resnet{depth}" + ("x4" if widths[0] == 32 else ""))
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("depth", [16, 40])
def test_a_wide_resnets_count_follows_from_its_depth_and_factor(depth: int, factor: int) -> None:
    # A norm before each convolution, of what comes in; a shortcut without one; a norm before the linear layer.
    blocks, width = (depth - 4) // 6, 64 * factor
    count = 27 * 16 + 2 * width + 100 * width + 100
    for ci, co in pairwise((16, 16 * factor, 32 * factor, width)):
        count += 2 * ci + 9 * ci * co + 2 * co + 9 * co * co + (blocks - 1) * (4 * co + 18 * co * co)
        count += ci * co if ci != co else 0
    with torch.device("meta"):
        network = Cifar(f"wrn_{depth}_{factor}")
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_1", "vgg8", "resnet18_cifar"])
def test_stages_halve_and_the_classifier_sees_the_pooled_last(name: str) -> None:
    network = Cifar(name, classes=7).eval()
    with torch.no_grad():
        outputs = network(torch.rand(2, 3, 32, 32))
        again = network.fc(network.last(outputs[f"stage{len(network.stages)}"]).mean((2, 3)))
    sides = [outputs[f"stage{k}"].shape[-1] for k in range(1, len(network.stages) + 1)]
    assert sides[:3] == [32, 16, 8]
    assert sides == sorted(sides, reverse=True)
    assert outputs["logits"].shape == (2, 7)
    assert torch.equal(outputs["logits"], again)


def test_another_classifier_may_start_from_the_same_trunk(tmp_path: Path) -> None:
    one = Cifar("resnet8x4", 5)
    torch.save(one.state_dict(), tmp_path / "one.pt")
    other = Cifar("resnet8x4", 3, weights=str(tmp_path / "one.pt"))
    assert torch.equal(one.stages[2][0].conv1.weight, other.stages[2][0].conv1.weight)


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(BadInput, match=r"no network named 'resnet9'.*resnet8x4"):
        Cifar("resnet9")


def test_every_published_pair_is_there() -> None:
    assert {name for pair in PAPER for name in pair} <= set(CIFAR_NETWORKS)
    assert PAPER["resnet32x4", "resnet8x4"]["crd-memory"] == 75.51
    assert PAPER["resnet152_cifar", "resnet18_cifar"]["sskd"] == 80.36


# The archive

NAMES = [f"class_{number}" for number in range(100)]


def records(labels: list[int], seed: int) -> NDArray[np.uint8]:
    made = np.random.default_rng(seed).integers(0, 256, (len(labels), 3074), dtype=np.uint8)
    made[:, 1] = labels
    return made


def archive(path: Path, **files: bytes) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-100-binary/{name.replace('__', '.')}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def whole(path: Path, train: NDArray[np.uint8], test: NDArray[np.uint8]) -> Path:
    names = "\n".join(NAMES).encode()
    return archive(path, fine_label_names__txt=names, train__bin=train.tobytes(), test__bin=test.tobytes())


def test_images_come_out_as_they_were_and_copies_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = records([3, 7, 3, 7], 0), records([3, 7], 1)
    train[2, 2:] = test[0, 2:]  # a leak
    train[3, 2:] = train[0, 2:]  # one picture with two labels
    assert run(["data", "cifar", str(whole(tmp_path / "c.tar.gz", train, test)), str(tmp_path / "out")]) == 0
    images = read_images(tmp_path / "out")
    assert images.frame[["path", "label", "split"]].values.tolist() == [
        ["test/class_3/00000.png", "class_3", "test"],
        ["test/class_7/00001.png", "class_7", "test"],
        ["train/class_3/00000.png", "class_3", "train"],
        ["train/class_7/00001.png", "class_7", "train"],
    ]
    pixels = np.asarray(Image.open(tmp_path / "out/train/class_7/00001.png"))
    assert pixels.shape == (32, 32, 3)
    red, green, blue = train[1, 2:].reshape(3, 32, 32)
    assert (pixels == np.stack([red, green, blue], -1)).all()


def test_what_is_not_the_archive_is_refused(tmp_path: Path) -> None:
    good = records([0, 1], 0)
    names = "\n".join(NAMES).encode()
    wrong = good.copy()
    wrong[0, 1] = 100
    cases = {
        "does not exist": tmp_path / "none.tar.gz",
        "not cifar-100-binary": archive(tmp_path / "a.tar.gz", other__bin=b"x"),
        "100 class names": archive(tmp_path / "b.tar.gz", fine_label_names__txt=b"../../etc\n" * 100),
        "does not hold up to": archive(tmp_path / "c.tar.gz", fine_label_names__txt=names, test__bin=b"x" * 3073),
        "label above 99": whole(tmp_path / "d.tar.gz", good, wrong),
    }
    (tmp_path / "plain.tar.gz").write_bytes(b"no archive at all")
    cases["not cifar-100-binary.tar.gz"] = tmp_path / "plain.tar.gz"
    for said, path in cases.items():
        with pytest.raises(BadInput, match=said):
            unpack_cifar(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(BadInput, match="is not empty"):
        unpack_cifar(whole(tmp_path / "e.tar.gz", good, good), tmp_path / "full")
