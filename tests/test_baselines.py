"""The baselines of pretraining run from images to a backbone that other recipes start from."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_classes
from PIL import Image
from safetensors.torch import load_file
from tiny import no_page, table
from torch import Tensor

import histill as hs
from histill.data import Images, read_unlabelled
from histill.data.phantom import draw
from histill.errors import BadInput
from histill.experiment import recipe_name
from histill.models import CSAT, Timm
from histill.pretrain import objectives
from histill.recipes import baselines

TINY: dict[str, dict[str, Any]] = {
    "barlow-twins": {"network": "test_resnet", "head_width": 16},
    "simclr": {"network": "test_resnet"},
    "moco": {"network": "test_resnet", "head_width": 16},
    "mae": {"network": "test_vit", "head_width": 32},
}


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """22 patches of tissue, unlabelled: two batches of 8 and one of 6."""
    folder = tmp_path_factory.mktemp("patches")
    for seed in range(22):
        tissue = draw(("benign", "malignant")[seed % 2], size=32, mpp=0.5, seed=seed)
        Image.fromarray(tissue.image).save(folder / f"{seed}.png")
    return read_unlabelled(folder)


def pretraining(patches: Images, method: Any, **changes: Any) -> hs.Experiment:
    chosen = {"image_size": 32, "epochs": 2, "batch_size": 8, **TINY[method], **changes}
    return baselines.pretrain(patches, method=method, **chosen)


@pytest.mark.parametrize("method", TINY)
def test_a_backbone_is_left_that_a_classifier_starts_from(
    method: str, patches: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histill.evaluate.unjudged.finish", no_page)
    experiment = pretraining(patches, method)
    run = hs.train(experiment, tmp_path / "run")
    assert run.finished
    assert np.isfinite(run.log["loss"]).all()
    assert len(run.log) == 2
    weights = load_file(run.path / "model.safetensors")
    assert all(name.startswith("network.") for name in weights), "the backbone and nothing else"
    torch.manual_seed(experiment.seed)
    untrained = experiment.student().state_dict()
    changed = [n for n, v in weights.items() if v.is_floating_point() and not torch.equal(v, untrained[n])]
    assert len(changed) > len(weights) / 2
    size = {"img_size": 32} if method == "mae" else {}
    fresh = Timm(TINY[method]["network"], 3, str(run.path), **size).state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in weights.items() if "num_batches" not in name)


def test_moco_that_is_interrupted_goes_on_to_the_same_bits(
    patches: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, calls = objectives.MoCo.compare, [0]

    def counted(self: objectives.MoCo, query: Tensor, key: Tensor) -> Tensor:
        calls[0] -= 1
        if calls[0] == 0:
            raise KeyboardInterrupt
        return compare(self, query, key)

    monkeypatch.setattr(objectives.MoCo, "compare", counted)
    monkeypatch.setattr("histill.evaluate.unjudged.finish", no_page)
    kind: dict[str, Any] = {"resume": True, "checkpoint_seconds": 0, "keep_checkpoint": True}
    for name, interruptions in (("whole", (0,)), ("torn", (3, 2, 0))):
        for call in interruptions:
            calls[0] = call
            with pytest.raises(KeyboardInterrupt) if call else nullcontext():
                hs.train(pretraining(patches, "moco", momentum=0.5), tmp_path / name, **kind)
    whole, torn = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["learner"] for n in ("whole", "torn"))
    assert {"objective.loss.memory_bank.bank", "objective.loss.memory_bank.bank_ptr"} <= set(whole)
    assert all(torch.equal(value, torn[name]) for name, value in whole.items())
    models = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "torn")]
    assert models[0] == models[1]


def test_published_settings(patches: Images) -> None:
    made = {method: pretraining(patches, method, epochs=100) for method in TINY}
    rates = {}
    for method, experiment in made.items():
        groups = experiment.optimizer(experiment.student().parameters()).param_groups
        rates[method] = [group["lr"] * 256 / 8 for group in groups]
    assert rates["barlow-twins"] == pytest.approx([0.2, 0.0048])
    assert rates["simclr"] == pytest.approx([0.3, 0.3])
    assert rates["moco"] == pytest.approx([0.03])
    assert rates["mae"] == pytest.approx([1.5e-4, 1.5e-4])
    peaks = {m: max(range(100), key=e.schedule) for m, e in made.items()}
    assert peaks == {"barlow-twins": 10, "simclr": 10, "moco": 0, "mae": 5}
    assert made["barlow-twins"].schedule(100) == pytest.approx(0.001)
    (group,) = made["moco"].optimizer(torch.nn.Linear(2, 2).parameters()).param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    group = made["mae"].optimizer(torch.nn.Linear(2, 2).parameters()).param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.05)
    bank = made["moco"].objective.loss.memory_bank.bank  # type: ignore[attr-defined]
    assert bank.shape == (8, 16), "half of 22 images in whole batches of 8"
    colours = {m: (e.augment.brightness, e.augment.saturation) for m, e in made.items()}
    assert colours == {"barlow-twins": (0.4, 0.2), "simclr": (0.8, 0.8), "moco": (0.4, 0.4), "mae": (0.0, 0.0)}


def test_usi_trains_as_published(tmp_path: Path) -> None:
    """Ridnik et al. 2022: AdamW at 2e-3 for 1024 images, weight decay 2e-2, 5 of 300 epochs up from a twentieth."""
    made = baselines.supervised(table(tmp_path / "data", count=12, size=32), network="test_resnet", image_size=32)
    groups = made.optimizer(torch.nn.Linear(2, 2).parameters()).param_groups
    assert {group["lr"] * 1024 / 64 for group in groups} == {2e-3}
    assert max(group["weight_decay"] for group in groups) == 2e-2
    assert (made.epochs, max(range(300), key=made.schedule)) == (300, 5)
    assert (made.schedule(0), made.schedule(300)) == pytest.approx((0.05, 5e-4))


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        ("barlow-twins", {"optimizer": "adamw"}, "--lr"),
        ("barlow-twins", {"temperature": 0.1}, "--temperature"),
        ("simclr", {"queue": 16}, "--queue"),
        ("moco", {"momentum": 1.0}, "--momentum"),
        ("mae", {"network": "CSAT"}, "vision transformer"),
        ("mae", {"network": "test_resnet"}, "vision transformer"),
        ("mae", {"image_size": 40}, "multiple of 16"),
        ("mae", {"head_width": 30}, "head_width"),
        ("simclr", {"network": "resnet19"}, "did you mean"),
    ],
)
def test_what_does_not_go_together_is_refused(patches: Images, method: str, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        pretraining(patches, method, **wrong)
    with pytest.raises(BadInput, match="barlow-twins, simclr, moco, mae"):
        baselines.pretrain(patches, method="dino")  # type: ignore[arg-type]


def test_labels_first_and_then_a_teacher_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    data = table(tmp_path / "data", count=30, size=32)
    chosen: dict[str, Any] = {"network": "test_resnet", "image_size": 32, "epochs": 1, "batch_size": 8}
    alone = hs.train(baselines.supervised(data, **chosen), tmp_path / "alone")
    assert set(alone.log.filter(regex="^raw/")) == {"raw/hard"}
    heard = hs.train(baselines.supervised(data, alone, **chosen), tmp_path / "heard")
    assert heard.log["weight/kd"].tolist() == [5.0]
    assert (
        heard.info["teacher"]["validation"]["accuracy"]
        == alone.predictions.query("split == 'val'").eval("prediction == label").mean()
    ), "the teacher is judged on images that are not mixed"
    plain = baselines.supervised(data, alone, mix=False, **chosen)
    assert plain.inputs is None
    assert Timm("test_resnet", 7, str(heard.path)).state_dict().keys() == heard.network().state_dict().keys()


def test_csat_takes_both(patches: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.unjudged.finish", no_page)
    one = pretraining(patches, "barlow-twins", network="CSAT", epochs=1)
    run = hs.train(one, tmp_path / "csat")
    started = CSAT(4, weights=str(run.path))
    assert torch.equal(started.stages[0][0].norm.weight, run.network().stages[0][0].norm.weight)  # type: ignore[union-attr, index]
    assert {recipe_name(baselines.pretrain), recipe_name(baselines.supervised)} == {
        "baselines.pretrain",
        "baselines.supervised",
    }
    labelled = hs.split(hs.read_images(write_classes(tmp_path / "l", {"a": 6, "b": 6, "c": 6})), val=0.2, test=0.2)
    network = baselines.supervised(labelled, network="CSAT", weights=str(run.path)).student()
    assert isinstance(network, CSAT)
    assert network.fc.out_features == 3
