"""Weights from files, runs, addresses and the hub: what fits is taken, what is missing is said, nothing is run."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from histill.errors import BadInput, Failed
from histill.models import CSAT, DSNet, KerasHead, MultiExitResNet18, ResNet18SAT, Timm, UNet, load_weights, weights


def same(one: nn.Module, other: nn.Module, names: Callable[[str], bool] = lambda name: True) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours if names(name))


def zeroed(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    return network


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_fills_the_network_of_the_same_names(suffix: str, tmp_path: Path) -> None:
    source, path = Timm("test_resnet", 3), tmp_path / f"weights{suffix}"
    state = source.network.state_dict()  # as timm itself would save it
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        save_file(state, path)
    assert same(Timm("test_resnet", 3, weights=str(path)), source)
    wider = Timm("test_resnet", 5, weights=str(path))
    assert same(wider.network, source.network, lambda name: not name.startswith("fc."))


def test_a_runs_folder_fills_another_head(tmp_path: Path) -> None:
    source = Timm("test_vit", 3)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert same(Timm("test_vit", 2, weights=str(tmp_path)), source, lambda name: "head" not in name)


def test_a_classifier_starts_from_a_segmenters_backbone(tmp_path: Path) -> None:
    for name, build in (
        ("CSAT", CSAT),
        ("test_convnext", functools.partial(Timm, "test_convnext")),
        ("test_vit", functools.partial(Timm, "test_vit")),
    ):
        segmenter = UNet(2, name)
        save_file(segmenter.state_dict(), tmp_path / "model.safetensors")
        classifier = build(4, weights=str(tmp_path))
        assert same(classifier, segmenter.backbone, lambda name: "fc" not in name and "head" not in name), name


def test_a_segmenter_freezes_the_head_that_it_does_not_use() -> None:
    segmenter = UNet(2, "efficientnet_b0")
    frozen = {name for name, p in segmenter.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"network.conv_head.weight", "network.bn2.weight", "network.bn2.bias"}


def test_keras_resnet_takes_a_plain_resnet_and_its_own_run(tmp_path: Path) -> None:
    plain = Timm("resnet50", 1000)
    save_file(plain.network.state_dict(), tmp_path / "resnet50.safetensors")
    network = KerasHead("resnet50", 2, weights=str(tmp_path / "resnet50.safetensors"))
    assert torch.equal(network.network.layer4[2].conv3.weight, plain.network.layer4[2].conv3.weight)
    assert not network.network.layer4[2].conv3.bias.any()
    nn.init.ones_(network.network.layer4[2].conv3.bias)
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    assert same(KerasHead("resnet50", 2, weights=str(tmp_path / "own.safetensors")), network)


def test_a_transformers_positions_follow_the_image_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large = Timm("test_vit", 3, img_size=96)
    with torch.no_grad():  # so that what is resampled is known: x of a place
        grid = torch.arange(6.0).repeat(6)[None, :, None]
        large.network.pos_embed[:, -36:] = grid
    save_file(large.state_dict(), tmp_path / "large.safetensors")
    small = Timm("test_vit", 3, str(tmp_path / "large.safetensors"), img_size=48)
    places = small.network.pos_embed.detach()[:, -9:, 0].reshape(3, 3)
    torch.testing.assert_close(places, places[:1].expand(3, 3))
    assert places[0, 1].item() == pytest.approx(2.5)
    assert 0 < places[0, 0] < places[0, 1] < places[0, 2] < 5
    torch.testing.assert_close(small.network.blocks[0].attn.qkv.weight, large.network.blocks[0].attn.qkv.weight)
    segmenter = UNet(2, "test_vit", str(tmp_path / "large.safetensors"), img_size=48)
    assert same(segmenter.backbone, small, lambda name: "head" not in name)
    cut = {n: t[:, :-1] if n.endswith("pos_embed") else t for n, t in large.state_dict().items()}
    save_file({n: t.contiguous() for n, t in cut.items()}, tmp_path / "cut.safetensors")
    with pytest.raises(BadInput, match="pos_embed"):
        Timm("test_vit", 3, str(tmp_path / "cut.safetensors"), img_size=48)


def test_what_a_file_leaves_unfilled_is_said(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = dict(DSNet(image_size=32).state_dict())
    save_file(state, path)
    network = zeroed(DSNet(image_size=64))
    with pytest.raises(BadInput, match=r"no fc.weight 2x4608 \(file: 2x512\)"):
        load_weights(network, path)
    assert not any(parameter.any() for parameter in network.parameters())
    load_weights(network, path, fresh=["fc.*"])
    assert torch.equal(network.conv1.weight, state["conv1.weight"])
    assert not network.fc.weight.any()
    with pytest.raises(BadInput, match="does not fit Linear"):
        load_weights(nn.Linear(2, 2), path, fresh=["*"])


def test_none_changes_nothing() -> None:
    network = zeroed(DSNet(image_size=32))
    load_weights(network, None)
    load_weights(network, "none")
    assert not any(parameter.any() for parameter in network.parameters())
    with pytest.raises(BadInput, match="no ImageNet weights for DSNet"):
        load_weights(network, "imagenet")


class Trap:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_untrusted_is_unpickled(tmp_path: Path) -> None:
    torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(BadInput, match="not a safe weight file"):
        load_weights(nn.Linear(2, 2), tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("name", "content"), [("a.pt", b"PK\x03\x04"), ("a.safetensors", b"\xff" * 40), ("a.pt", b"")])
def test_a_damaged_file_is_said(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match="damaged"):
        load_weights(nn.Linear(2, 2), tmp_path / name)
    with pytest.raises(BadInput, match="there is no weight file"):
        load_weights(nn.Linear(2, 2), tmp_path / "missing.pt")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    (tmp_path / "www").mkdir()
    handler = functools.partial(Quiet, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_an_address_is_fetched_once_and_checked(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTILL_CACHE", str(tmp_path / "cache"))
    source, file = nn.Linear(2, 2), tmp_path / "www" / "linear.safetensors"
    save_file(source.state_dict(), file)
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    cache = tmp_path / "cache" / "weights"

    with pytest.raises(BadInput, match="another checksum"):
        load_weights(nn.Linear(2, 2), f"{server}/linear.safetensors#sha256={'0' * 64}")
    assert list(cache.iterdir()) == []
    for unchecked in ("", "#sha256=abc", f"#md5={'0' * 64}", f"#crc={'0' * 32}"):
        with pytest.raises(BadInput, match="#sha256=<64 hex digits>"):
            load_weights(nn.Linear(2, 2), f"{server}/linear.safetensors{unchecked}")
    with pytest.raises(Failed, match=r"cannot fetch .*missing\.pt"):
        load_weights(nn.Linear(2, 2), f"{server}/missing.pt#sha256={checksum}")

    target = nn.Linear(2, 2)
    load_weights(target, f"{server}/linear.safetensors#sha256={checksum}")
    assert same(target, source)
    assert [path.name for path in cache.iterdir()] == [f"{checksum}.safetensors"]
    old = hashlib.md5(file.read_bytes()).hexdigest()  # what older collections have published
    load_weights(other := nn.Linear(2, 2), f"{server}/linear.safetensors#md5={old}")
    assert same(other, source)
    file.unlink()
    load_weights(target, f"{server}/linear.safetensors#sha256={checksum}")


def test_imagenet_without_a_network_fails_at_once_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for build in (lambda: Timm("resnet18", 2, weights="imagenet"), lambda: weights.imagenet("resnet18.tv_in1k")):
        with pytest.raises(Failed, match=r"resnet18.*cannot be reached.*--weights FILE or --weights none"):
            build()
    assert not constants.HF_HUB_OFFLINE


def test_imagenet_weights_come_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source, revision = Timm("resnet18", 1000), "0" * 40
    repository = tmp_path / "models--timm--resnet18.tv_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    save_file(source.network.state_dict(), repository / "snapshots" / revision / "model.safetensors")

    def body(name: str) -> bool:
        return "fc." not in name

    assert same(Timm("resnet18.tv_in1k", 1000, weights="imagenet"), source)
    assert same(Timm("resnet18.tv_in1k", 4, weights="imagenet"), source, body)
    for network in (MultiExitResNet18(4, weights="imagenet"), ResNet18SAT(4, weights="imagenet")):
        for name, tensor in source.network.state_dict().items():
            assert not body(name) or torch.equal(network.state_dict()[name], tensor), name
    small = MultiExitResNet18(4, "cifar", weights="imagenet")
    assert torch.equal(small.layer4[1].conv2.weight, source.network.layer4[1].conv2.weight)
