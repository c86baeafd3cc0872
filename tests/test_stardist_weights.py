"""StarDist's published weights compute what a plain reference of that network computes from the file's arrays."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import correlate

from histill.errors import BadInput
from histill.models import StarDist, load_keras

Array = NDArray[np.float64]

CHANNELS = {
    "conv2d_1": (3, 32),
    "conv2d_2": (32, 32),
    "down_level_0_no_0": (32, 32),
    "down_level_0_no_1": (32, 32),
    "down_level_1_no_0": (32, 64),
    "down_level_1_no_1": (64, 64),
    "down_level_2_no_0": (64, 128),
    "down_level_2_no_1": (128, 128),
    "middle_0": (128, 256),
    "middle_2": (256, 128),
    "up_level_2_no_0": (256, 128),
    "up_level_2_no_2": (128, 64),
    "up_level_1_no_0": (128, 64),
    "up_level_1_no_2": (64, 32),
    "up_level_0_no_0": (64, 32),
    "up_level_0_no_2": (32, 32),
    "features": (32, 128),
    "prob": (128, 1),
    "dist": (128, 32),
}
"""The layers of the released 2D_versatile_he as its TensorFlow graph names them."""


@functools.cache
def arrays() -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """A kernel (kh, kw, ci, co) and a bias for each, of such a size that the signal neither dies nor explodes."""
    rng = np.random.default_rng(0)
    made = {}
    for name, (ci, co) in CHANNELS.items():
        side = 1 if name in ("prob", "dist") else 3
        kernel = rng.normal(0, np.sqrt(2 / (side * side * ci)), (side, side, ci, co))
        made[name] = kernel.astype(np.float32), rng.normal(0, 0.1, co).astype(np.float32)
    return made


def write_h5(
    path: Path, change: Callable[[h5py.File], None] = lambda file: None, prefix: str = "", colon: str = ":0"
) -> Path:
    """As ``Model.save_weights`` writes it: a group a layer, in it the layer's own, in it kernel and bias."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in ("input", *CHANNELS, "max_0", "concatenate_1")]
        file.create_group("input")
        for name, (kernel, bias) in arrays().items():
            file[f"{prefix}{name}/{name}/kernel{colon}"] = kernel
            file[f"{prefix}{name}/{name}/bias{colon}"] = bias
        change(file)
    return path


def convolved(x: Array, name: str, relu: bool = True) -> Array:
    """``(H, W, ci) -> (H, W, co)``, same padding, in float64, straight from the file's arrays."""
    kernel, bias = (part.astype(np.float64) for part in arrays()[name])
    if kernel.shape[0] == 1:
        y = x @ kernel[0, 0] + bias
    else:
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))  # (H, W, ci, 3, 3)
        y = np.einsum("hwcij,ijco->hwo", windows, kernel, optimize=True) + bias
    return np.maximum(y, 0) if relu else y


def pooled(x: Array) -> Array:
    return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).max(axis=(1, 3))


def reference(image: Array) -> tuple[Array, Array]:
    """The published network on ``(H, W, 3)``: probability ``(H/2, W/2)`` and distances ``(H/2, W/2, 32)``."""
    low, high = np.percentile(image, [1, 99.8])
    x = pooled(convolved(convolved((image - low) / (high - low), "conv2d_1"), "conv2d_2"))
    skips = []
    for level in range(3):
        x = convolved(convolved(x, f"down_level_{level}_no_0"), f"down_level_{level}_no_1")
        skips.append(x)
        x = pooled(x)
    x = convolved(convolved(x, "middle_0"), "middle_2")
    for level in (2, 1, 0):
        x = np.concatenate([x.repeat(2, axis=0).repeat(2, axis=1), skips[level]], axis=-1)
        x = convolved(convolved(x, f"up_level_{level}_no_0"), f"up_level_{level}_no_2")
    x = convolved(x, "features")
    return 1 / (1 + np.exp(-convolved(x, "prob", relu=False)[..., 0])), convolved(x, "dist", relu=False)


def test_the_reference_convolution_is_a_correlation() -> None:
    x, (kernel, bias) = np.random.default_rng(1).normal(size=(5, 6, 3)), arrays()["conv2d_1"]
    expected = sum(correlate(x[..., c], kernel[:, :, c, 7].astype(np.float64), mode="constant") for c in range(3))
    np.testing.assert_allclose(convolved(x, "conv2d_1", relu=False)[..., 7], expected + bias[7])


@pytest.mark.parametrize("kind", ["h5", "zip", "folder", "whole model", "keras 3", "other numbers"])
def test_published_weights_compute_what_the_arrays_say(kind: str, tmp_path: Path) -> None:
    def renumber(file: h5py.File) -> None:
        for old, new in (("conv2d_2", "conv2d_10"), ("conv2d_1", "conv2d_9")):
            file.move(old, new)

    weights = tmp_path / "weights_best.h5"
    write_h5(
        weights,
        renumber if kind == "other numbers" else lambda file: None,
        prefix="model_weights/" if kind == "whole model" else "",
        colon="" if kind == "keras 3" else ":0",
    )
    given = weights
    if kind == "zip":
        given = tmp_path / "python_2D_versatile_he.zip"
        with zipfile.ZipFile(given, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("config.json", "{}")
            archive.write(weights, "weights_best.h5")
        weights.unlink()
    network = StarDist().eval()
    load_keras(network, tmp_path if kind == "folder" else given)
    image = np.random.default_rng(2).random((32, 48, 3)).astype(np.float32)
    with torch.no_grad():
        outputs = network(torch.from_numpy(image).permute(2, 0, 1)[None])
    prob, dist = reference(image.astype(np.float64))
    assert prob.std() > 0.05
    np.testing.assert_allclose(outputs["prob"][0, 0], prob, atol=1e-4)
    np.testing.assert_allclose(outputs["dist"][0].permute(1, 2, 0), dist, atol=1e-4 * np.abs(dist).max())


def replaced(name: str, **options: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        if options:
            file.create_dataset(name, **options)

    return change


def linked(file: h5py.File) -> None:
    del file["prob/prob/bias:0"]
    file["prob/prob/bias:0"] = h5py.ExternalLink("secret.h5", "/prob/prob/bias:0")


BIAS = "middle_0/middle_0/bias:0"
MISFITS: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "a layer less": (replaced(BIAS), "has no middle_0/bias"),
    "no grid of 2": (lambda file: file.__delitem__("conv2d_2"), "1 layers before its U-Net"),
    "64 rays": (
        replaced("dist/dist/kernel:0", data=np.zeros((1, 1, 128, 64), np.float32)),
        r"needs floats \(1, 1, 128, 32\)",
    ),
    "a terabyte": (replaced(BIAS, shape=(2**38,), dtype="f4", chunks=(1024,)), "needs floats"),
    "text": (replaced(BIAS, data=np.array([b"x"] * 256)), "needs floats"),
    "not a number": (replaced(BIAS, data=np.full(256, np.nan, np.float32)), "not a number"),
    "bytes of another file": (
        replaced(BIAS, shape=(256,), dtype="f4", external=[("/etc/passwd", 0, 1024)]),
        "needs floats",
    ),
    "a link to another file": (linked, "has no prob/bias"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_file_that_does_not_fit_is_one_clear_line(misfit: str, tmp_path: Path) -> None:
    change, message = MISFITS[misfit]
    write_h5(tmp_path / "secret.h5")
    path = write_h5(tmp_path / "weights.h5", change)
    network = StarDist()
    before = network.state_dict()["middle.0.bias"].clone()
    with pytest.raises(BadInput, match=message) as raised:
        load_keras(network, path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    torch.testing.assert_close(network.state_dict()["middle.0.bias"], before, rtol=0, atol=0)


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n" + b"\x00" * 600, b"PK\x03\x04 no archive"])
def test_a_damaged_file_is_one_clear_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.h5").write_bytes(content)
    with pytest.raises(BadInput, match="damaged"):
        load_keras(StarDist(), tmp_path / "w.h5")
    with pytest.raises(BadInput, match="there is no weight file"):
        load_keras(StarDist(), tmp_path / "missing.h5")


def test_archives_that_are_not_the_published_one(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.h5", b"")
    with pytest.raises(BadInput, match=r"holds 0 files weights_best\.h5"):
        load_keras(StarDist(), path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights_best.h5", bytes(65 << 20))
    with pytest.raises(BadInput, match="unpacks to more than 64 MiB"):
        load_keras(StarDist(), path)


def test_a_truncated_file_is_one_clear_line(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "w.h5")
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(BadInput, match=r"damaged|cannot be read"):
        load_keras(StarDist(), path)
