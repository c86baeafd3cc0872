"""KD_ConvNeXt is the paper's equations 1 to 5, on any two networks of timm."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Counting, no_page, table
from torch import Tensor

import histill as hs
from histill import cli
from histill.data import Images, read_images, split
from histill.errors import BadInput
from histill.models import Regressors
from histill.recipes import kd_convnext
from histill.recipes._start import shapes as shapes_of
from histill.recipes.kd_convnext import Distilled, channel_norm, class_weights, pyramid, stages
from histill.teachers import Frozen
from histill.types import Batch, Outputs, total

NETWORKS: dict[str, Any] = {"network": "test_convnext", "weights": "none", "image_size": 32}


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data")


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return hs.models.Timm(name, 2).eval()


def batch(labels: list[int]) -> Batch:
    images = torch.zeros(len(labels), 3, 4, 4)
    ids = torch.arange(len(labels))
    return Batch(images, torch.tensor(labels), ids, torch.zeros_like(ids), lambda size: images)


def outputs(logits: list[list[float]], stages: list[Tensor]) -> Outputs:
    return Outputs(logits=torch.tensor(logits)) | {f"stage{n}": s for n, s in enumerate(stages, 1)}


def distilled(regressors: Regressors | None, **changes: Any) -> Distilled:
    chosen: dict[str, Any] = {"logits": True, "class_weights": [0.5, 1.5], "alpha": 0.3, "beta": 0.7}
    return Distilled(regressors, **chosen | {"gamma": 2.0, "temperature": 4.0} | changes)


def doubling(stages: int = 4) -> Regressors:
    """One channel each, twice the value and one more."""
    made = Regressors([1] * stages, [1] * stages)
    for convolution in made:
        torch.nn.init.constant_(convolution.weight, 2.0)
        torch.nn.init.constant_(convolution.bias, 1.0)
    return made


MAPS = [torch.full((2, 1, side, side), value) for side, value in ((8, 1.0), (4, 2.0), (2, 3.0), (1, 4.0))]
STUDENT = Outputs(outputs([[2.0, 0.0], [0.0, 4.0]], MAPS))
TEACHER = Outputs(outputs([[4.0 * math.log(3), 0.0], [0.0, 0.0]], [torch.zeros_like(m) for m in MAPS]))
"""At temperature 4 the teacher says (3/4, 1/4) and (1/2, 1/2); its features are zero."""


def test_the_distilled_loss_is_equations_1_to_5() -> None:
    terms = distilled(doubling())(STUDENT, TEACHER, batch([0, 1]))
    features = 3.0**2 + 5.0**2 + 7.0**2 + 9.0**2  # phi_s doubles and adds one; Eq. 1 sums over the stages
    log_z = (math.log(math.exp(0.5) + 1), math.log(1 + math.exp(1)))  # the student's logits over 4: (.5, 0), (0, 1)
    soft = -((0.75 * 0.5 - log_z[0]) + (0.5 * 1 - log_z[1])) / 2
    wrong = (1 - 1 / (1 + math.exp(-2)), 1 - 1 / (1 + math.exp(-4)))
    focal = -(0.5 * wrong[0] ** 2 * math.log(1 - wrong[0]) + 1.5 * wrong[1] ** 2 * math.log(1 - wrong[1])) / 2
    expected = {"features": (0.3, features), "soft": (0.7, soft), "focal": (0.7, focal)}
    assert {name: weight for name, (weight, _) in terms.items()} == {
        n: pytest.approx(w) for n, (w, _) in expected.items()
    }
    for name, (_, value) in expected.items():
        assert terms[name][1].item() == pytest.approx(value, rel=1e-5), name
    assert total(terms).item() == pytest.approx(0.3 * features + 0.7 * soft + 0.7 * focal, rel=1e-5)


def test_a_student_that_equals_its_teacher_has_no_feature_loss() -> None:
    same = Regressors([3] * 4, [3] * 4)
    for convolution in same:
        torch.nn.init.eye_(convolution.weight[..., 0, 0].data)
        torch.nn.init.zeros_(convolution.bias)
    said = Outputs(outputs([[1.0, 0.0]], [torch.randn(1, 3, side, side) for side in (8, 4, 2, 1)]))
    weights = [torch.eye(3)[:, :, None, None]] * 4
    for convolution, weight in zip(same, weights):
        convolution.weight.data.copy_(weight)
    assert float(distilled(same)(said, said, batch([0]))["features"][1]) == pytest.approx(0, abs=1e-10)


def test_figure_5_has_the_absolute_difference_and_hinton_the_square_of_the_temperature() -> None:
    terms = distilled(doubling(), distance="l1", t_squared=True)(STUDENT, TEACHER, batch([0, 1]))
    assert float(terms["features"][1]) == pytest.approx(3 + 5 + 7 + 9)
    assert terms["soft"][0] == pytest.approx(0.7 * 16)


def test_normalised_the_teachers_features_have_mean_0_and_variance_1_over_the_channels_of_a_place() -> None:
    features = 50 * torch.randn(2, 6, 3, 3) + 7
    for row, place in ((0, (1, 2)), (1, (0, 0))):
        at = features[row, :, *place]
        expected = (at - at.mean()) / at.std(correction=0)
        assert torch.allclose(channel_norm(features)[row, :, *place], expected, atol=1e-4)
    silent = [torch.zeros(2, 1, side, side) for side in (8, 4, 2, 1)]
    loud = Outputs(outputs([[0.0, 0.0]] * 2, [m + 40 for m in MAPS]))  # one channel: whatever it is, it is its own mean
    student = Outputs(outputs([[0.0, 0.0]] * 2, silent))
    terms = distilled(doubling(), normalized=True)(student, loud, batch([0, 1]))
    assert float(terms["features"][1]) == pytest.approx(4.0)  # phi_s(0) = 1 against 0, at four stages


def test_of_two_maps_the_larger_is_averaged_down() -> None:
    larger = torch.arange(16.0).reshape(1, 1, 4, 4)
    pooled = torch.tensor([[2.5, 4.5], [10.5, 12.5]])
    small = [torch.zeros(1, 1, 2, 2)] * 4
    for student, teacher in ((small, [larger] * 4), ([larger] * 4, small)):
        identity = doubling()
        for convolution in identity:
            torch.nn.init.ones_(convolution.weight)
            torch.nn.init.zeros_(convolution.bias)
        said = [Outputs(outputs([[0.0, 0.0]], maps)) for maps in (student, teacher)]
        found = distilled(identity)(said[0], said[1], batch([0]))["features"][1]
        assert float(found) == pytest.approx(4 * float(pooled.square().mean()))


def test_each_half_of_the_distillation_can_be_left_out() -> None:
    assert set(distilled(None)(STUDENT, TEACHER, batch([0, 1]))) == {"soft", "focal"}
    assert set(distilled(doubling(), logits=False)(STUDENT, TEACHER, batch([0, 1]))) == {"features", "focal"}


def test_images_without_a_label_have_no_focal_term() -> None:
    one, both = (distilled(doubling())(STUDENT, TEACHER, batch(labels)) for labels in ([0, -1], [0, 1]))
    assert float(one["focal"][1]) == pytest.approx(
        0.5 * (1 / (1 + math.exp(2))) ** 2 * math.log(1 + math.exp(-2)), rel=1e-5
    )
    for name in ("features", "soft"):
        assert float(one[name][1]) == float(both[name][1])


def test_rare_classes_weigh_more_and_the_mean_weight_is_one(folder: Any) -> None:
    counted = {"train/g1": 2, "train/g2": 8, "val/g1": 3, "val/g2": 3}
    weights = class_weights(split(read_images(folder(counted)), test=0.0))
    assert weights == pytest.approx([1.6, 0.4])


def test_the_papers_networks_have_its_stages_and_the_known_parameters(data: Images) -> None:
    five = dataclasses.replace(data, classes=("g1", "g2", "g3", "ais", "mia"))
    known = {"convnext_tiny": 27_823_973, "swin_tiny_patch4_window7_224": 27_523_199}
    known |= {"efficientnetv2_s": 20_183_893, "davit_tiny": 27_595_013, "coatnet_0_rw_224": 26_670_407}
    shapes = {}
    for name, parameters in known.items():
        make = kd_convnext.network_for(name, five, 224, "none")
        with torch.device("meta"):
            network = make()
        assert sum(p.numel() for p in network.parameters()) == parameters, name
        shapes[name] = [tuple(f.shape[1:]) for f in pyramid(shapes_of(make, 224))]
    assert shapes["convnext_tiny"] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]
    assert shapes["swin_tiny_patch4_window7_224"] == shapes["davit_tiny"] == shapes["coatnet_0_rw_224"]
    assert [s[1] for s in shapes["efficientnetv2_s"]] == [56, 28, 14, 7]
    widths = [shape[0] for shape in shapes["convnext_tiny"]]
    assert sum(p.numel() for p in Regressors(widths, widths).parameters()) == 784_800


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "coatnet_0_rw_224", "davit_tiny", "convnext_tiny"])
def test_networks_with_windows_or_positions_take_other_sizes(data: Images, name: str) -> None:
    assert shapes_of(kd_convnext.network_for(name, data, 64, "none"), 64)["logits"].shape == (1, 2)


def test_the_stages_that_are_compared_are_the_last_four() -> None:
    names = [f"stage{n}" for n in (1, 2, 10, 9, 3)]
    assert stages(Outputs(dict.fromkeys(names, torch.zeros(1)))) == ["stage2", "stage3", "stage9", "stage10"]
    with pytest.raises(BadInput, match="has 3: give one of timm's, or --no-features"):
        stages(Outputs(dict.fromkeys(names[:3], torch.zeros(1))))


def test_the_defaults_are_the_papers(data: Images) -> None:
    taught, made = kd_convnext.teacher(data, weights="none"), kd_convnext.student(data, weights="none")
    assert taught.student.keywords["name"] == "swin_tiny_patch4_window7_224"
    assert made.student.keywords["name"] == "convnext_tiny"
    for one in (taught, made):
        assert one.optimizer.func is torch.optim.AdamW  # type: ignore[attr-defined]
        assert one.optimizer.keywords == {"lr": 1e-3, "weight_decay": 5e-4}  # type: ignore[attr-defined]
        assert (one.epochs, one.batch_size, one.image_size, one.select) == (100, 32, 224, "accuracy")
        assert one.schedule(0) < 0.01
        assert one.schedule(1) == pytest.approx(1, abs=1e-3)
        assert one.schedule(50.5) < 0.5
    learned = inspect.signature(kd_convnext.student).parameters
    assert (learned["alpha"].default, learned["beta"].default) == (0.5, 1.0)
    assert (learned["gamma"].default, learned["temperature"].default) == (2.0, 4.0)
    assert not learned["normalized"].default
    assert not learned["t_squared"].default
    assert (made.augment.zoom, made.augment.shift) == (0.1, 0.1)


def test_alone_and_distilled_differ_in_the_teacher_alone(data: Images) -> None:
    taught = Frozen(network("test_convnext2"))
    one, other = (kd_convnext.student(data, t, seed=3, **NETWORKS) for t in (None, taught))
    differing = {
        f.name
        for f in dataclasses.fields(one)
        if f.name not in ("schedule", "student", "optimizer") and getattr(one, f.name) != getattr(other, f.name)
    }
    assert differing == {"teacher", "objective", "cache_outputs", "recipe"}
    for name in ("student", "optimizer"):
        assert getattr(one, name).keywords == getattr(other, name).keywords
    assert other.cache_outputs == ("logits", "stage1", "stage2", "stage3", "stage4")
    assert kd_convnext.student(data, unlabelled=data, **NETWORKS).unlabelled is None


def test_the_regressors_train_and_are_not_in_the_student(data: Images, tmp_path: Path) -> None:
    made = kd_convnext.student(
        data, Frozen(network("test_resnet")), epochs=3, batch_size=8, views=1, alpha=1, beta=0, lr=3e-3, **NETWORKS
    )
    widths = [(c.in_channels, c.out_channels) for c in made.objective.phi]  # type: ignore[attr-defined]
    own, its = (pyramid(network(n)(torch.zeros(1, 3, 32, 32))) for n in ("test_convnext", "test_resnet"))
    assert widths == [(s.shape[1], t.shape[1]) for s, t in zip(own, its)]
    run = hs.train(made, tmp_path / "run", precision="32-true")
    assert run.log["raw/features"].iloc[-1] < 0.9 * run.log["raw/features"].iloc[0]
    assert run.info["parameters"] == sum(p.numel() for p in hs.models.Timm("test_convnext", 2).parameters())
    assert not [name for name in run.network().state_dict() if "phi" in name]


def test_cached_features_are_those_that_were_heard(data: Images, tmp_path: Path) -> None:
    made = kd_convnext.student(data, Frozen(network("test_convnext2")), epochs=2, batch_size=8, views=1, **NETWORKS)
    logs = [
        hs.train(dataclasses.replace(made, cache=cache), tmp_path / name, precision="32-true").log
        for name, cache in (("cached", tmp_path / "features"), ("asked", False))
    ]
    np.testing.assert_allclose(logs[0]["raw/features"], logs[1]["raw/features"], rtol=1e-6)
    assert (tmp_path / "features" / "stage4.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"alpha": 1.5}, "--alpha 1.5: between 0 and 1"),
        ({"temperature": 0}, "--temperature 0: above 0"),
        ({"beta": -1}, "--beta -1: at least 0"),
        ({"gamma": -0.5}, "--gamma -0.5: at least 0"),
        ({"network": "convnext_minuscule"}, "convnext_minuscule"),
        ({"network": "coatnet_0_rw_224", "image_size": 50}, "--image-size 50: coatnet_0_rw_224 does not take it"),
    ],
)
def test_wrong_arguments_are_refused(data: Images, arguments: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        kd_convnext.student(data, Frozen(network("test_convnext")), **NETWORKS | arguments)


def test_a_teacher_without_features_teaches_by_its_logits_alone(data: Images) -> None:
    with pytest.raises(BadInput, match="--no-features"):
        kd_convnext.student(data, Counting(), **NETWORKS)
    assert kd_convnext.student(data, Counting(), features=False, **NETWORKS).cache_outputs == ("logits",)


def test_every_argument_is_described() -> None:
    for part in (kd_convnext.teacher, kd_convnext.student):
        described = inspect.getdoc(part) or ""
        for name in inspect.signature(part).parameters:
            assert f"\n    {name}: " in described, name


def test_it_distils_from_the_command_line(data: Images, tmp_path: Path, capsys: Any) -> None:
    taught, out = tmp_path / "teacher", tmp_path / "student"
    common = ["--data", str(data.root), "--epochs", "2", "--batch-size", "8", "--val", "0.2", "--test", "0.2"]
    common += ["--weights", "none", "--image-size", "32"]
    teacher = ["train", "kd-convnext.teacher", *common, "--network", "test_resnet", "--out", str(taught)]
    assert cli.run(teacher) == 0, capsys.readouterr().err
    student = ["train", "kd-convnext.student", *common, "--network", "test_convnext", "--out", str(out)]
    assert cli.run([*student, "--teacher", str(taught), "--temperature", "3"]) == 0, capsys.readouterr().err
    arguments = json.loads((out / "run.json").read_text())["recipe"]["arguments"]
    assert (arguments["teacher"], arguments["temperature"]) == (str(taught), 3.0)
    log = hs.Run.open(out).log
    np.testing.assert_allclose(
        log["loss"], 0.5 * log["raw/features"] + 0.5 * log["raw/soft"] + log["raw/focal"], rtol=1e-6
    )
