"""The eyelid tumour recipe: the paper's equations, the crop as slicing would cut it, and what it asks of a teacher."""

from __future__ import annotations

import inspect
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Counting, Tiny, no_page, table
from torch import Tensor
from torch.nn import functional as F

import histill as hs
from histill import cli
from histill.data import Images
from histill.data.views import NONE
from histill.distill import distill
from histill.errors import BadInput
from histill.evaluate.finish import finish
from histill.losses import cross_entropy, focal
from histill.models import MACResNet, Timm, attention_crop
from histill.models import mac_resnet as network
from histill.models.mac_resnet import attention_mask, mean_crop
from histill.recipes import mac_resnet
from histill.types import Batch, Outputs, total

SMALL = {"layer1": (8, 1, 1), "layer2": (8, 1, 2), "layer3": (8, 2, 2), "layer4": (8, 2, 2)}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network with fewer and narrower blocks, and no page at the end of a run."""
    monkeypatch.setattr(network, "_STAGES", SMALL)
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data", 32)


def batch(labels: list[int], size: int = 8) -> Batch:
    images = torch.rand(len(labels), 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(len(labels))
    return Batch(images, torch.tensor(labels), ids, torch.zeros_like(ids), lambda size: images)


def log_p(logits: list[float], label: int) -> float:
    return logits[label] - math.log(sum(map(math.exp, logits)))


def focal_by_hand(logits: list[float], label: int) -> float:
    p = math.exp(log_p(logits, label))
    return -0.25 * (1 - p) ** 2 * math.log(p)


FOCAL = partial(focal, alpha=0.25, gamma=2.0)
IMAGE, CROP = [[2.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [3.0, 0.0]]
TEACHER = Outputs(
    logits=torch.tensor([[4.0 * math.log(3), 0.0], [0.0, 0.0]]), crop_logits=torch.tensor([[1.0, 1.0], [0.0, 2.0]])
)
"""At temperature 4 it says (3/4, 1/4) and (1/2, 1/2)."""

# The equations


def kl_by_hand() -> float:
    """T squared KL(T_SL || S_SP) of `IMAGE` at T = 4, the mean of the two images."""
    loss = 0.0
    for target, logits in (((0.75, 0.25), [0.5, 0.0]), ((0.5, 0.5), [0.0, 1.0])):
        loss += sum(t * (math.log(t) - log_p(logits, c)) for c, t in enumerate(target))
    return 16 * loss / 2


def labels_by_hand(logits: list[list[float]]) -> float:
    return sum(focal_by_hand(row, label) for label, row in enumerate(logits)) / 2


def test_equation_4_weighs_the_labels_and_the_teacher() -> None:
    student = Outputs(logits=torch.tensor(IMAGE))
    terms = mac_resnet.distilled(student, TEACHER, batch([0, 1]), loss=FOCAL, alpha=0.3, temperature=4)
    assert {name: weight for name, (weight, _) in terms.items()} == {"hard": 0.7, "soft": 0.3}
    assert float(total(terms)) == pytest.approx(0.7 * labels_by_hand(IMAGE) + 0.3 * kl_by_hand(), rel=1e-5)


def test_equation_5_adds_what_the_student_says_of_the_crop() -> None:
    student = Outputs(logits=torch.tensor(IMAGE + CROP))
    terms = mac_resnet.distilled_with_crop(student, TEACHER, batch([0, 1]), loss=FOCAL, alpha=0.3, temperature=4)
    expected = 0.5 * (0.7 * labels_by_hand(IMAGE) + 0.3 * kl_by_hand()) + 0.5 * labels_by_hand(CROP)
    assert float(total(terms)) == pytest.approx(expected, rel=1e-5)


def test_equation_5_as_printed_has_a_last_term_without_gradient() -> None:
    logits = torch.tensor(IMAGE, requires_grad=True)
    terms = mac_resnet.distilled_as_printed(
        Outputs(logits=logits), TEACHER, batch([0, 1]), loss=FOCAL, alpha=0.3, temperature=4
    )
    expected = 0.5 * (0.7 * labels_by_hand(IMAGE) + 0.3 * kl_by_hand()) + 0.5 * labels_by_hand([[1, 1], [0, 2]])
    assert float(total(terms).detach()) == pytest.approx(expected, rel=1e-5)
    assert not terms["crop"][1].requires_grad


def test_the_teacher_learns_from_the_image_and_from_its_crop() -> None:
    said = Outputs(logits=torch.zeros(2, 2), raw_logits=torch.tensor(IMAGE), crop_logits=torch.tensor(CROP))
    terms = mac_resnet.twice(said, Outputs(), batch([0, 1]), loss=FOCAL)
    assert float(total(terms)) == pytest.approx((labels_by_hand(IMAGE) + labels_by_hand(CROP)) / 2, rel=1e-5)
    once = mac_resnet.twice(Outputs(logits=torch.tensor(IMAGE)), Outputs(), batch([0, 1]), loss=FOCAL)
    assert float(total(once)) == pytest.approx(labels_by_hand(IMAGE), rel=1e-5)


def test_the_student_is_shown_the_images_and_where_the_teacher_looks() -> None:
    some = batch([0, 1, 0])
    attention = torch.zeros(3, 1, 8, 8)
    attention[:, :, 2:5, 1:7] = 1
    shown = mac_resnet.image_and_crop(some, Outputs(attention=attention), threshold=0.5)
    assert torch.equal(shown[:3], some.images)
    torch.testing.assert_close(shown[3:], sliced(some.images, attention[:, 0] > 0.5))


# The crop


def sliced(images: Tensor, masks: Tensor) -> Tensor:
    """Cut out and resize, an image at a time."""
    crops = []
    for image, mask in zip(images, masks):
        rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
        if rows:
            image = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        crops.append(F.interpolate(image[None], images.shape[-2:], mode="bilinear", align_corners=False))
    return torch.cat(crops)


@given(seed=st.integers(0, 10_000), size=st.sampled_from([8, 15, 32]), share=st.floats(0, 0.3))
@settings(max_examples=30, deadline=None)
def test_the_crop_is_what_slicing_and_interpolating_give(seed: int, size: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(5, 3, size, size, generator=generator)
    attention = (torch.rand(5, 1, size, size, generator=generator) < share / size).float()
    attention[0] = 0  # nothing
    attention[1], attention[2] = 0, 0
    attention[1, 0, size - 1, 0] = attention[2, 0, 2, 5] = 1  # one pixel
    crops = attention_crop(images, attention)
    torch.testing.assert_close(crops, sliced(images, attention[:, 0] > 0.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(crops[0], images[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(crops[2], images[2, :, 2:3, 5:6].expand(3, size, size), rtol=0, atol=1e-5)


def test_the_mask_is_equation_1_enlarged_and_cut_at_the_threshold() -> None:
    maps = torch.tensor([[[1.0, 3.0], [5.0, 2.0]], [[7.0, 7.0], [7.0, 7.0]]])
    values, mask = attention_mask(maps, (2, 2), 0.3)
    torch.testing.assert_close(values[0], torch.tensor([[0.0, 0.5], [1.0, 0.25]]))
    assert mask[0].tolist() == [[False, True], [True, False]]
    assert not mask[1].any()
    large, mask = attention_mask(maps, (4, 4), 0.3)
    torch.testing.assert_close(large[0, 0], torch.tensor([0, 0.125, 0.375, 0.5]))
    assert torch.equal(mask, large > 0.3)


def test_the_mean_crop_is_of_whole_cells() -> None:
    images = torch.rand(2, 3, 32, 32)
    attention = torch.zeros(2, 2, 4, 4)
    attention[0, 0, 1, 1], attention[0, 1, 2, 1] = 1, 0.9
    expected = F.interpolate(images[:1, :, 8:24, 8:16], (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(mean_crop(images, attention)[:1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(mean_crop(images, attention)[1], images[1], rtol=0, atol=1e-5)


def test_evaluation_looks_at_the_mean_crop_and_training_at_a_drawn_one() -> None:
    torch.manual_seed(0)
    made, images = MACResNet(3).eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        said = made(images)
        again = made._look(mean_crop(images, said["attention"]))
        torch.testing.assert_close(said["crop_logits"], again["logits"])
        torch.testing.assert_close(said["logits"], (said["raw_logits"] + said["crop_logits"]) / 2)
        assert not torch.equal(said["raw_logits"], said["crop_logits"])
        made.train()
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(made(images)["crop_logits"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert set(MACResNet(3, attention=False).eval()(images)) == {f"layer{n}" for n in range(1, 5)} | {
        "pooled",
        "logits",
    }
    with pytest.raises(BadInput, match="threshold 1"):
        MACResNet(3, threshold=1.0)


# The parts


@torch.no_grad()
def test_bilinear_pooling_is_signed_roots_of_products_of_unit_length() -> None:
    features, attention = torch.randn(2, 3, 2, 2), torch.rand(2, 4, 2, 2)
    for image, found in enumerate(network.bilinear_attention_pooling(features, attention)):
        f = [float((a * x).mean()) for a in attention[image] for x in features[image]]
        roots = torch.tensor([math.copysign(math.sqrt(abs(value) + 1e-6), value) for value in f])
        torch.testing.assert_close(found, roots / roots.square().sum().sqrt(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_outer_residual_gates_the_sum_of_the_deep_and_the_middle_layer() -> None:
    block = network.OuterResidual(4, 3, 1).eval()
    first, middle, last = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    both = middle + last
    for number, seen in enumerate((both.mean(1, keepdim=True), both.amax(1, keepdim=True))):
        torch.nn.init.zeros_(block.spatial.weight)
        block.spatial.weight[0, number, 3, 3] = 1
        expected = (both / (1 + (-seen).exp()) + block.shortcut(first)).clamp(min=0)
        torch.testing.assert_close(block(first, middle, last), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_pyramid_takes_the_largest_of_1_of_4_and_of_16_places() -> None:
    pyramid, x = network.SpatialPyramid(3, 2, width=5).eval(), torch.randn(2, 3, 8, 8)
    reduced, bins = pyramid.reduce(x), []
    for side in (1, 2, 4):
        cells = reduced.unflatten(3, (side, -1)).unflatten(2, (side, -1))  # (B, 5, side, 8 / side, side, 8 / side)
        bins.append(cells.amax((3, 5)).flatten(1))
    torch.testing.assert_close(pyramid(x), pyramid.fc(torch.cat(bins, 1)))


@torch.no_grad()
def test_logits_are_of_the_attention_a_hundredfold_and_of_the_pyramid_and_the_mean_of_two_looks() -> None:
    whole = MACResNet(2).eval()
    said = whole(torch.rand(2, 3, 64, 64))
    pooled = network.bilinear_attention_pooling(said["layer4"], said["attention"])
    assert whole.spp is not None
    torch.testing.assert_close(said["raw_logits"], whole.fc(100 * pooled) + whole.spp(said["layer4"]))
    torch.testing.assert_close(said["logits"], (said["raw_logits"] + said["crop_logits"]) / 2)


@torch.no_grad()
def test_the_middle_layer_is_that_of_the_middle_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_STAGES", SMALL | {"layer2": (8, 4, 2), "layer4": (8, 3, 2)})
    whole = MACResNet(2, crop=False).eval()
    for name, ci, middle in (("layer2", 32, 2), ("layer4", 32, 2)):  # of four blocks and of three
        x, states = torch.randn(1, ci, 8, 8), []
        state = x
        for block in whole.get_submodule(name).children():
            states.append(state := block(state))
        expected = whole.outer[name](x, states[middle - 1], states[-1])
        torch.testing.assert_close(whole._stage(name, x), expected)


# The recipe


def test_the_defaults_are_the_papers(data: Images) -> None:
    teacher, student = mac_resnet.teacher(data, weights="none"), mac_resnet.student(data, weights="none")
    assert teacher.student.keywords["dares"] == ["layer2", "layer4"]
    assert mac_resnet.teacher(data, weights="none", dares=["none"]).student.keywords["dares"] == []
    for made in (teacher, student):
        assert (made.batch_size, made.epochs, made.image_size) == (8, 50, 512)
        assert made.optimizer.keywords["lr"] == 1e-5  # type: ignore[attr-defined]
        assert [made.schedule(epoch) for epoch in (0, 5, 10, 45)] == pytest.approx([1, 0.5, 1, 0.5])
    often = mac_resnet.teacher(data, weights="none", epochs=5, period=2)
    assert [often.schedule(epoch) for epoch in (0, 1, 2, 3, 4)] == pytest.approx([1, 0.5, 1, 0.5, 1])
    with pytest.raises(BadInput, match="--period 0: at least 1"):
        mac_resnet.student(data, weights="none", period=0)
    assert student.student.keywords == {
        "classes": 2, "attention": False, "dares": [], "sample_input": False, "spp": False, "weights": None,
    }  # fmt: skip


def test_each_loss_is_that_of_its_name(data: Images) -> None:
    logits, labels = torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([0, 0])
    for name, expected in (
        ("focal", focal(logits, labels, alpha=0.25, gamma=2)),
        ("cross-entropy", cross_entropy(logits, labels)),
        ("label-smoothing", cross_entropy(logits, labels, smoothing=0.1)),
    ):
        made = mac_resnet.teacher(data, weights="none", loss=name)  # type: ignore[arg-type]
        assert torch.equal(made.objective.keywords["loss"](logits, labels), expected)  # type: ignore[attr-defined]


def test_what_is_kept_of_the_teacher_follows_from_the_crops_term(data: Images) -> None:
    for term, kept in (
        ("student", ("attention", "logits")),
        ("teacher", ("crop_logits", "logits")),
        ("none", ("logits",)),
    ):
        made = mac_resnet.student(data, Counting(), network="test_resnet", weights="none", crop_term=term)  # type: ignore[arg-type]
        assert made.cache_outputs == kept
        assert (made.inputs is not None) == (term == "student")
        objective: Any = made.objective
        criterion = objective.keywords["loss"].keywords
        given = (objective.keywords["alpha"], objective.keywords["temperature"], criterion["alpha"], criterion["gamma"])
        assert given == (0.5, 4.0, 0.25, 2.0)
        assert (made.augment.subset, made.augment.edges) == (0.5, 0.1)
    assert mac_resnet.student(data, weights="none", augment="none").augment == NONE
    assert mac_resnet.student(data, weights="none", unlabelled=data).unlabelled is None
    assert mac_resnet.student(data, network="test_resnet", weights="none").student.func is Timm


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"alpha": -0.1}, "--alpha -0.1"), ({"temperature": 0}, "--temperature 0"), ({"threshold": 1}, "--threshold 1")],
)
def test_wrong_arguments_are_refused(data: Images, arguments: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        mac_resnet.student(data, weights="none", **arguments)


def test_every_argument_is_described() -> None:
    for part in (mac_resnet.teacher, mac_resnet.student):
        described = inspect.getdoc(part) or ""
        assert all(f"\n    {name}: " in described for name in inspect.signature(part).parameters)


def test_a_teacher_without_attention_can_teach_without_crops(data: Images, tmp_path: Path) -> None:
    taught: dict[str, Any] = {"network": "test_resnet", "weights": "none", "image_size": 32, "epochs": 1}
    run = hs.train(hs.recipes.dsnet.teacher(data, **taught), tmp_path / "teacher", precision="32-true")
    with pytest.raises(BadInput, match=r"no 'attention'.*--crop-term none"):
        mac_resnet.student(data, run, **taught)
    with pytest.raises(BadInput, match="no 'crop_logits'"):
        mac_resnet.student(data, run, crop_term="teacher", **taught)
    made = mac_resnet.student(data, run, crop_term="none", **taught)
    done = hs.train(made, tmp_path / "student", precision="32-true")
    assert {"raw/hard", "raw/soft"} <= set(done.log.columns)
    assert "raw/crop" not in done.log


def test_teacher_and_student_train_from_the_command_line(data: Images, tmp_path: Path, capsys: Any) -> None:
    common = ["--data", str(data.root), "--val", "0.2", "--test", "0.2", "--image-size", "64", "--weights", "none"]
    common += ["--epochs", "2", "--lr", "1e-3", "--precision", "32-true"]
    taught, out = tmp_path / "teacher", tmp_path / "student"
    teacher = ["--dares", "layer2", "--out", str(taught)]
    assert cli.run(["train", "mac-resnet.teacher", *common, *teacher]) == 0, capsys.readouterr().err
    student = ["--teacher", str(taught), "--network", "test_resnet", "--views", "1", "--out", str(out)]
    assert cli.run(["train", "mac-resnet.student", *common, *student]) == 0, capsys.readouterr().err
    log = hs.Run.open(out).log
    terms = 0.25 * log["raw/hard"] + 0.25 * log["raw/soft"] + 0.5 * log["raw/crop"]
    assert log["loss"].tolist() == pytest.approx(terms.tolist())
    assert hs.Run.open(taught).info["network"]["arguments"]["dares"] == ["layer2"]


@pytest.mark.slow
def test_pages_show_what_the_teacher_looks_at(data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", finish)
    monkeypatch.setattr("histill.distill.deliver", lambda *some: {"efficiency": {}, "export": {}})
    common: dict[str, Any] = {"image_size": 64, "epochs": 1, "weights": "none"}
    student = common | {"network": "test_resnet", "views": 1}
    distill("mac-resnet", data.root, tmp_path, precision="32-true", student_arguments=student, teacher_arguments=common)
    for home, shown in ((tmp_path, True), (tmp_path / "teacher", True), (tmp_path / "student_alone", False)):
        assert (home / "figures" / "attention.png").is_file() == shown
        assert ("looks at: the mean of its maps, the mask, the crop" in (home / "report.html").read_text()) == shown


@pytest.mark.slow
def test_a_network_that_looks_twice_can_be_exported(data: Images, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    made = mac_resnet.teacher(data, weights="none", image_size=64, epochs=1, lr=1e-3)
    run = hs.train(made, tmp_path / "teacher", precision="32-true")
    for kind, ending in (("onnx", "onnx"), ("torchscript", "pt")):
        assert hs.export(run, tmp_path / kind / f"model.{ending}", format=kind).files[kind]["max_abs_diff"] < 1e-3  # type: ignore[arg-type]


def test_a_cached_teacher_teaches_what_an_asked_one_does(data: Images, tmp_path: Path) -> None:
    """The draw of the map is the step's, not the teacher's: reading its answers changes no random number."""

    class Looking(Counting):
        def __call__(self, batch: Batch) -> Outputs:
            said = super().__call__(batch)
            return Outputs(said, attention=F.avg_pool2d(batch.images, 4))

    logs = []
    for cache in (True, False):
        made = mac_resnet.student(
            data, Looking(), network="test_resnet", weights="none", image_size=32, epochs=3, lr=1e-3, views=1
        )
        made = hs.Experiment(**{**vars(made), "student": partial(Tiny, classes=2), "cache": cache})
        logs.append(hs.train(made, tmp_path / str(cache), precision="32-true").log.drop(columns="images_per_second"))
    assert logs[0].equals(logs[1])
