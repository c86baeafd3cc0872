"""The multi-exit recipe is the paper's equations, its parts differ where they should, and its networks count right."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import Counting, no_page, table
from torch import Tensor, nn

import histill as hs
from histill.data import Images
from histill.errors import BadInput
from histill.models import SCAN, MSDNet, MultiExitResNet18, ResNet18
from histill.recipes import multi_exit
from histill.types import Batch, Outputs, total


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data")


def batch(labels: list[int]) -> Batch:
    images, ids = torch.zeros(len(labels), 3, 4, 4), torch.arange(len(labels))
    return Batch(images, torch.tensor(labels), ids, torch.zeros_like(ids), lambda size: images)


def outputs(exits: int, seed: int = 0) -> Outputs:
    draw = torch.Generator().manual_seed(seed)
    said = Outputs(logits=torch.randn(4, 3, generator=draw))
    for m in range(1, exits + 1):
        said[f"exit{m}"] = torch.randn(4, 3, generator=draw)
        said[f"exit{m}_features"] = torch.randn(4, 5, 2, 2, generator=draw)
    return said


LABELS = batch([0, 1, 2, 1])
SETTINGS: dict[str, Any] = {"temperature": 3.0, "feature_weight": 0.03, "deep_ce": "paper", "reverse": False}


def ce(logits: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits, LABELS.labels))


def kl(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> float:
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return float(temperature**2 * (p * (p / q).log()).sum(1).mean())


def test_with_a_teacher_the_loss_is_equations_4_to_6() -> None:
    student, teacher = outputs(4), outputs(0, seed=1)
    s = [student[f"exit{m}"] for m in (1, 2, 3, 4)]
    f = [student[f"exit{m}_features"] for m in (1, 2, 3, 4)]
    expected = sum(
        kl(s[m], teacher["logits"]) + ce(s[m]) + ce(s[3]) + kl(s[m], s[3]) + 0.03 * float(((f[m] - f[3]) ** 2).mean())
        for m in range(4)
    )
    terms = multi_exit.multi_exit(student, teacher, LABELS, method="self-distillation", **SETTINGS)
    assert float(total(terms)) == pytest.approx(expected, rel=1e-5)


def test_alone_only_the_teachers_terms_are_gone() -> None:
    student = outputs(4)
    taught = multi_exit.multi_exit(student, outputs(0, 1), LABELS, method="self-distillation", **SETTINGS)
    alone = multi_exit.multi_exit(student, Outputs(), LABELS, method="self-distillation", **SETTINGS)
    assert set(taught) - set(alone) == {"kd", "deep_ce"}
    assert {n: float(v) for n, (_, v) in alone.items()} == {n: float(taught[n][1]) for n in alone}


def test_the_baseline_is_the_sum_of_the_exits_cross_entropies() -> None:
    student = outputs(3)
    expected = sum(ce(student[f"exit{m}"]) for m in (1, 2, 3))
    baseline = multi_exit.multi_exit(student, Outputs(), LABELS, method="none", **SETTINGS)
    assert float(total(baseline)) == pytest.approx(expected, rel=1e-6)
    assert float(total(multi_exit.labels(student, Outputs(), LABELS))) == pytest.approx(expected, rel=1e-6)
    plain = outputs(0)
    assert float(total(multi_exit.labels(plain, Outputs(), LABELS))) == pytest.approx(ce(plain["logits"]), rel=1e-6)


def test_scans_own_loss_takes_a_teacher_beside_it() -> None:
    student, teacher = outputs(3), outputs(0, 1)
    s = [student[f"exit{m}"] for m in (1, 2, 3)]
    f = [student[f"exit{m}_features"] for m in (1, 2, 3)]
    own = ce(s[2]) + sum(
        0.5 * ce(s[m]) + 0.5 * kl(s[m], s[2]) + 0.03 * float(((f[m] - f[2]) ** 2).mean()) for m in range(2)
    )
    alone = multi_exit.multi_exit(student, Outputs(), LABELS, method="scan", **SETTINGS)
    assert float(total(alone)) == pytest.approx(own, rel=1e-5)
    taught = multi_exit.multi_exit(student, teacher, LABELS, method="scan", **SETTINGS)
    assert float(total(taught)) == pytest.approx(own + sum(kl(x, teacher["logits"]) for x in s), rel=1e-5)


def test_a_network_with_one_exit_learns_from_labels_and_teacher() -> None:
    student, teacher = outputs(0), outputs(0, 1)
    found = total(multi_exit.one_exit(student, teacher, LABELS, temperature=3.0))
    assert float(found) == pytest.approx(ce(student["logits"]) + kl(student["logits"], teacher["logits"]), rel=1e-5)


def test_the_defaults_are_the_papers(data: Images) -> None:
    made = multi_exit.student(data, Counting(), weights="none")
    assert (made.epochs, made.batch_size, made.optimizer.keywords) == (  # type: ignore[attr-defined]
        180,
        128,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    )
    assert [round(made.schedule(e), 6) for e in (5, 99.9, 100, 149.9, 150, 179)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    scaled = multi_exit.student(data, weights="none", epochs=18)
    assert [round(scaled.schedule(e), 6) for e in (0.5, 9.9, 10, 14.9, 15)] == [1, 1, 0.1, 0.1, 0.01]
    assert made.objective.keywords == SETTINGS | {"method": "self-distillation"}  # type: ignore[attr-defined]
    taught = multi_exit.teacher(data, weights="none")
    assert taught.student.keywords["name"] == "resnest50d"
    assert taught.optimizer.keywords["lr"] == 1e-2  # type: ignore[attr-defined]


def test_alone_and_distilled_differ_in_the_teacher_alone(data: Images) -> None:
    alone, distilled = (multi_exit.student(data, t, weights="none", seed=3) for t in (None, Counting()))
    same = ("schedule", "student", "optimizer", "objective")  # compared by what they do
    differing = {
        f.name
        for f in dataclasses.fields(alone)
        if f.name not in same and getattr(alone, f.name) != getattr(distilled, f.name)
    }
    assert differing == {"teacher", "recipe"}
    assert [alone.schedule(e) for e in range(180)] == [distilled.schedule(e) for e in range(180)]
    for name in ("student", "optimizer", "objective"):
        one, other = getattr(alone, name), getattr(distilled, name)
        assert (one.func, one.keywords) == (other.func, other.keywords)
    assert multi_exit.student(data, weights="none", unlabelled=data).unlabelled is None


def test_transfer_starts_the_student_from_a_run_of_other_classes(data: Images, tmp_path: Path) -> None:
    def small(made: Any) -> Any:
        keywords = {k: v for k, v in made.student.keywords.items() if k != "attention"}
        sizes = {"scales": 2, "blocks": 2, "base": 1, "step": 1, "channels": 4, "growth": 2}
        return dataclasses.replace(made, student=partial(MSDNet, **keywords, **sizes))

    common: dict[str, Any] = {"network": "msdnet", "stem": "cifar", "image_size": 16, "batch_size": 8, "lr": 0.01}
    first = small(multi_exit.pretrain(data, epochs=1, **common))
    run = hs.train(first, tmp_path / "first", precision="32-true")
    assert set(run.log.columns) >= {"raw/ce", "val/accuracy"}
    before = run.network().state_dict()
    sizes = {k: v for k, v in first.student.keywords.items() if k not in ("classes", "weights")}
    after = MSDNet(5, **sizes, weights=str(run.path)).state_dict()
    heads = {n for n in after if ".fc." in n}
    assert len(heads) == 4
    assert all(torch.equal(before[n], after[n]) for n in after if n not in heads)
    assert after["exits.0.fc.weight"].shape[0] == 5
    taught = small(multi_exit.student(data, run, epochs=1, views=1, **common))
    done = hs.train(taught, tmp_path / "student", precision="32-true")
    terms = [f"raw/{n}" for n in ("ce", "self", "feature", "kd", "deep_ce")]
    weights = [1, 1, 0.03, 1, 2]  # two exits
    assert float(done.log["loss"][0]) == pytest.approx(sum(w * done.log[n][0] for w, n in zip(weights, terms)))
    assert {"exit1_prob_benign", "exit2_prob_malignant"} <= set(done.predictions.columns)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"temperature": 0}, "--temperature 0: above 0"),
        ({"feature_weight": -1}, "--feature-weight -1: 0 or more"),
        ({"network": "scan", "attention": False}, "scan does not have them"),
        ({"network": "test_resnet", "stem": "cifar"}, "has its own stem"),
        ({"network": "resnet18", "reverse": True}, "--reverse goes with"),
    ],
)
def test_wrong_arguments_are_refused(data: Images, arguments: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        multi_exit.student(data, **{"weights": "none"} | arguments)


def test_every_argument_is_described() -> None:
    for part in (multi_exit.teacher, multi_exit.pretrain, multi_exit.student):
        described = inspect.getdoc(part) or ""
        for name in inspect.signature(part).parameters:
            assert f"\n    {name}: " in described, name


# The comparison networks


def on_meta(make: Any, *arguments: Any, **named: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make(*arguments, **named).parameters())


def test_the_plain_resnet18_has_the_papers_parameters() -> None:
    assert on_meta(ResNet18, 100, "cifar") == 11_220_132
    assert on_meta(ResNet18, 5, "cifar") == 11_171_397
    assert on_meta(ResNet18, 5) == 11_179_077


def test_scan_counts_its_parts() -> None:
    plain = on_meta(ResNet18, 5, "cifar")
    attention = sum(2 * 9 * c + 2 * c * c + 2 * 2 * c + 2 * c for c in (64, 128, 256))
    assert attention == 182_784
    # 1x1 to 128, k x k, 1x1 to 512, each with batch norm.
    shallow = sum(
        c * 128 + 128 * 128 * k * k + 128 * 512 + 2 * (128 + 128 + 512) for c, k in ((64, 8), (128, 4), (256, 2))
    )
    assert on_meta(SCAN, 5, "cifar") == plain + attention + shallow + 3 * (512 * 5 + 5)


def test_msdnet_counts_by_hand() -> None:
    # Two scales of 4 and 8 channels; a layer adds 2 and 4 (2 from each scale). Batch norm: 2 per channel.
    stem = (3 * 4 * 9 + 8) + (4 * 8 * 9 + 16)
    # Scale 0: 4 -> 1x1 to 2 -> 3x3 to 2. Scale 1: from scale 0 4 -> 2 -> 2; from itself 8 -> 4 (twice 2) -> 2.
    fine = (4 * 2 + 4) + (2 * 2 * 9 + 4)
    coarse = (8 * 4 + 8) + (4 * 2 * 9 + 4)
    first = fine + fine + coarse
    # The second block keeps the coarse scale, which still hears of the fine one: 6 -> 2 -> 2; itself 12 -> 4 -> 2;
    # its 16 channels are halved.
    second = (6 * 2 + 4) + (2 * 2 * 9 + 4) + (12 * 4 + 8) + (4 * 2 * 9 + 4) + (16 * 8 + 16)
    exits = sum((c * 128 * 9 + 256) + (128 * 128 * 9 + 256) + 128 * 3 + 3 for c in (12, 8))
    made = {"stem": "cifar", "scales": 2, "blocks": 2, "base": 1, "step": 1, "channels": 4, "growth": 2}
    assert on_meta(MSDNet, 3, **made) == stem + first + second + exits


@pytest.mark.parametrize("make", [SCAN, MSDNet, ResNet18])
def test_the_networks_train_whole_and_answer_alike_for_any_batch(make: Any) -> None:
    torch.manual_seed(0)
    network = make(classes=3, stem="cifar")
    images = torch.rand(3, 3, 16, 16)
    said = network(images)
    torch.stack([(v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in said.values()]).sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(images)["logits"][1:2], network(images[1:2])["logits"], rtol=1e-3, atol=1e-4)
        exits = [v.softmax(-1) for n, v in network(images).items() if n.startswith("exit") and n[4:].isdigit()]
        if exits:
            torch.testing.assert_close(network(images)["logits"].exp(), torch.stack(exits).mean(0))


def test_imagenet_weights_fill_the_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    published = ResNet18(1000).state_dict()
    monkeypatch.setattr("histill.models.weights.imagenet", lambda name: published)
    for make, stem in ((MultiExitResNet18, "imagenet"), (SCAN, "cifar"), (ResNet18, "imagenet")):
        state = make(5, stem=stem, weights="imagenet").state_dict()
        torch.testing.assert_close(state["layer3.0.conv1.weight"], published["layer3.0.conv1.weight"])
        assert (state["conv1.weight"].shape == published["conv1.weight"].shape) == (stem == "imagenet")
    save_file(published, tmp_path / "plain.safetensors")
    with pytest.raises(BadInput, match="has no exits"):
        SCAN(5, weights=str(tmp_path / "plain.safetensors"))


def test_networks_say_what_they_cannot_be() -> None:
    with pytest.raises(BadInput, match="29 pixels"):
        SCAN(2)(torch.zeros(1, 3, 24, 24))
    for bad in ({"stem": "vit"}, {"blocks": 2}):
        with pytest.raises(BadInput):
            MSDNet(2, **bad)
