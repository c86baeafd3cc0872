"""Images are enlarged as the network says, whole or in tiles, each once, and never over the ones that came."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import maximum_filter

from histill import cli
from histill.data import enhance as home
from histill.data.enhance import OVERLAP, enhance, tiled
from histill.data.images import read_images
from histill.errors import BadInput
from histill.models import _torchvision  # noqa: F401 (before spandrel)


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """Real-ESRGAN's architecture, small: one block of three dense ones, three channels, twice the size."""
    esrgan = pytest.importorskip("spandrel.architectures.ESRGAN")
    torch.manual_seed(0)
    made: torch.nn.Module = esrgan.ESRGAN(num_filters=3, num_blocks=1, scale=2)
    last = list(made.modules())[-1]
    with torch.no_grad():  # pixels over the whole range, few of them clipped
        last.weight *= 0.2 / made(torch.from_numpy(picture(0)).permute(2, 0, 1)[None] / 255).std()
        last.bias.fill_(0.5)
    return made.eval()


@pytest.fixture(params=["model.safetensors", "model.pth"])
def weights(request: Any, network: torch.nn.Module, tmp_path: Path) -> Path:
    """The same weights in both kinds of file; Real-ESRGAN's own files keep them under ``params_ema``."""
    path = tmp_path / request.param
    if path.suffix == ".pth":
        torch.save({"params_ema": network.state_dict()}, path)
    else:
        save_file(network.state_dict(), path)
    return path


def said(network: torch.nn.Module, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    with torch.inference_mode():
        images = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255
        large = network(images).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    return np.asarray((large * 255).round(), dtype=np.uint8)


def test_a_networks_pixels_are_its_own(folder: Any, tmp_path: Path, network: torch.nn.Module, weights: Path) -> None:
    data = folder({"benign": 1, "malignant": 1}, suffix=".bmp")
    out = enhance(data, tmp_path / "out", weights=weights)
    for path in data.rglob("*.bmp"):
        large = pixels((out / path.relative_to(data)).with_suffix(".png"))
        assert large.shape == (48, 48, 3)
        assert large.std() > 5
        np.testing.assert_array_equal(large, said(network, pixels(path)))


def test_another_scale_is_resampled_from_the_networks(
    folder: Any, tmp_path: Path, network: torch.nn.Module, weights: Path
) -> None:
    data = folder({"a": 1})
    source = next(data.rglob("*.png"))
    out = enhance(data, tmp_path / "out", weights=weights, scale=3)
    expected = Image.fromarray(said(network, pixels(source))).resize((72, 72), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(pixels(out / source.relative_to(data)), np.asarray(expected))


def test_tiles_are_the_whole_where_the_network_looks_no_further_than_their_overlap() -> None:
    image = picture(0, size=200)[:150]
    seen = []

    def brightest(part: NDArray[np.uint8], reach: int) -> NDArray[np.uint8]:
        """Twice the size; each pixel the brightest within ``reach`` of its place."""
        seen.append(part.shape[:2])
        side = 2 * reach + 1
        return np.asarray(maximum_filter(part, (side, side, 1), mode="constant").repeat(2, 0).repeat(2, 1))

    for reach in (OVERLAP, OVERLAP + 1):
        parts = tiled(partial(brightest, reach=reach), image, 2, 96)
        assert np.array_equal(parts, brightest(image, reach)) == (reach == OVERLAP)
    assert max(max(shape) for shape in seen[:-1] if shape != (150, 200)) == 96


def test_a_network_that_looks_near_gives_the_same_in_tiles(network: torch.nn.Module) -> None:
    # 1 + 3 x 5 + 1 convolutions of 3x3, and three at twice the size: 19 pixels to each side.
    image = picture(0, size=100)[:40]
    parts = tiled(partial(said, network), image, 2, 96).astype(int)
    assert np.abs(parts - said(network, image)).max() <= 1  # the last bit of a sum may depend on the picture's size


def test_a_tile_that_holds_the_picture_is_the_picture() -> None:
    image = picture(0, size=70)
    np.testing.assert_array_equal(tiled(lambda part: part, image, 1, 70), image)
    np.testing.assert_array_equal(tiled(lambda part: part, image, 1, 2 * OVERLAP + 1), image)


def test_without_weights_images_are_resampled_and_it_says_so(folder: Any, tmp_path: Path, capsys: Any) -> None:
    data = folder({"train/a": 1, "train/b": 2}, suffix=".jpg")
    assert enhance(data, tmp_path / "out", scale=3) == tmp_path / "out"
    assert "adds no detail" in capsys.readouterr().err
    for path in data.rglob("*.jpg"):
        large = Image.open(path).resize((72, 72), Image.Resampling.LANCZOS)
        written = (tmp_path / "out" / path.relative_to(data)).with_suffix(".png")
        np.testing.assert_array_equal(pixels(written), np.asarray(large))
    assert read_images(tmp_path / "out").classes == ("a", "b")


def test_what_is_done_is_not_done_again(folder: Any, tmp_path: Path, monkeypatch: Any) -> None:
    data, out = folder({"a": 2, "b": 2}), tmp_path / "out"
    done: list[Path] = []
    one = home._one

    def counting(path: Path, target: Path, *rest: Any) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(target)
        one(path, target, *rest)

    monkeypatch.setattr(home, "_one", counting)
    with pytest.raises(KeyboardInterrupt):
        enhance(data, out)
    before = {path: path.stat().st_mtime_ns for path in done}
    (out / "a" / ".x.png.12345678.tmp").touch()  # what a kill leaves
    monkeypatch.setattr(home, "_one", one)
    enhance(data, out)
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert len(list(out.rglob("*.png"))) == 4
    assert not list(out.rglob("*.tmp"))
    with pytest.raises(BadInput, match="enhanced otherwise"):
        enhance(data, out, scale=4)


def test_a_manifest_comes_along(folder: Any, tmp_path: Path, capsys: Any) -> None:
    data = folder({"a": 1, "b": 2}, suffix=".jpg")
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.jpg"))
    (data / names[2]).write_bytes(b"not a picture")
    rows = [f"{name},{name[0]},p{number},{names[0]}" for number, name in enumerate(names)]
    (data / "list.csv").write_text("path,label,patient,mask\n" + "\n".join(rows) + "\n")
    out = enhance(data / "list.csv", tmp_path / "out")
    assert out == tmp_path / "out" / "list.csv"
    frame = read_images(out).frame
    assert frame["path"].tolist() == [name.replace(".jpg", ".png") for name in names[:2]]
    assert frame["patient"].tolist() == ["p0", "p1"]
    error = capsys.readouterr().err
    assert f"1 images were left out: {data / names[2]}" in error
    assert "mask is left out" in error
    with pytest.raises(BadInput, match="not an image"):
        enhance(data / "list.csv", tmp_path / "strict", strict=True)


def test_nothing_is_written_over(folder: Any, tmp_path: Path) -> None:
    data = folder({"a": 1, "b": 1})
    before = {path: path.read_bytes() for path in data.rglob("*.png")}
    for out in (data, data / "large"):
        with pytest.raises(BadInput, match="give a folder beside it"):
            enhance(data, out)
    (data / "list.csv").write_text("path\n" + "\n".join(p.relative_to(data).as_posix() for p in before) + "\n")
    with pytest.raises(BadInput, match="2 images would be written over"):
        enhance(data / "list.csv", data)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(BadInput, match="is not empty"):
        enhance(data, tmp_path / "full")
    source = next(iter(before))
    Image.open(source).save(source.with_suffix(".bmp"))
    with pytest.raises(BadInput, match="differ by their suffix alone"):
        enhance(data, tmp_path / "out")
    assert {path: path.read_bytes() for path in data.rglob("*.png")} == before


@pytest.mark.parametrize("kind", ["missing", "damaged", "pickled", "other"])
def test_weights_that_are_no_such_network_are_refused(folder: Any, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("spandrel")
    path = tmp_path / "weights.pth"
    if kind == "damaged":
        path.write_bytes(b"PK\x03\x04 not a file")
    elif kind == "pickled":
        torch.save({"state": Path("x")}, path)
    elif kind == "other":
        torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    said = {"missing": "no such file", "other": "not a network that spandrel knows"}.get(kind, "damaged, or not a safe")
    with pytest.raises(BadInput, match=said):
        enhance(folder({"a": 1}), tmp_path / "out", weights=path)
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(folder: Any, tmp_path: Path, capsys: Any) -> None:
    data, out = folder({"a": 1, "b": 1}), tmp_path / "out"
    assert cli.run(["data", "enhance", str(data), str(out), "--scale", "2"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip() == str(out)
    assert json.loads((out / "enhance.json").read_text()) == {"weights": None, "scale": 2}
    assert cli.run(["data", "enhance", str(tmp_path / "none"), str(out)]) == 2
    assert cli.run(["data", "enhance", str(data), str(out), "--tile", "10"]) == 2
    assert (
        cli.run(["data", "enhance", str(data), str(tmp_path / "x"), "--device", "abacus"]) == 0
    )  # nothing to run on it
