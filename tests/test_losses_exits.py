"""Losses of several exits, against the equations written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

from histill.errors import BadInput
from histill.losses import be_your_own_teacher, self_distillation
from histill.types import total

Outputs = tuple[list[Tensor], list[Tensor], Tensor, Tensor]


@pytest.fixture
def outputs() -> Outputs:
    generator = torch.Generator().manual_seed(0)
    exits = [torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]
    features = [torch.randn(6, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]
    return exits, features, torch.arange(6) % 3, torch.randn(6, 3, generator=generator, dtype=torch.float64)


def ce(logits: Tensor, label: Tensor) -> float:
    z = logits.detach().numpy()
    return float(np.mean([np.log(np.exp(row).sum()) - row[y] for row, y in zip(z, label.tolist(), strict=True)]))


def soft_kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    p, q = (np.exp(z.detach().numpy() / temperature) for z in (teacher, student))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float(temperature**2 * (p * np.log(p / q)).sum(1).mean())


def mse(a: Tensor, b: Tensor) -> float:
    return float(((a - b).detach() ** 2).mean())


def test_equations_4_to_6_as_printed(outputs: Outputs) -> None:
    exits, features, label, teacher = outputs
    expected = 0.0
    for s, f in zip(exits, features, strict=True):
        expected += soft_kl(s, teacher, 3) + ce(s, label) + ce(exits[-1], label)
        expected += soft_kl(s, exits[-1], 3) + 0.03 * mse(f, features[-1])
    terms = self_distillation(exits, features, label, teacher=teacher)
    assert total(terms).item() == pytest.approx(expected)
    assert set(terms) == {"ce", "deep_ce", "kd", "self", "feature"}


def test_once_counts_the_deepest_exit_once(outputs: Outputs) -> None:
    exits, features, label, teacher = outputs
    paper = total(self_distillation(exits, features, label, teacher=teacher))
    once = total(self_distillation(exits, features, label, teacher=teacher, deep_ce="once"))
    assert (paper - once).item() == pytest.approx(4 * ce(exits[-1], label))


def test_without_a_teacher(outputs: Outputs) -> None:
    exits, features, label, _ = outputs
    expected = 0.0
    for s, f in zip(exits, features, strict=True):
        expected += ce(s, label) + soft_kl(s, exits[-1], 2) + 0.1 * mse(f, features[-1])
    terms = self_distillation(exits, features, label, temperature=2, feature_weight=0.1)
    assert total(terms).item() == pytest.approx(expected)
    assert set(terms) == {"ce", "self", "feature"}


def test_reverse_swaps_the_divergence(outputs: Outputs) -> None:
    exits, features, label, teacher = outputs
    terms = self_distillation(exits, features, label, teacher=teacher, reverse=True)
    assert terms["kd"][1].item() == pytest.approx(sum(soft_kl(teacher, s, 3) for s in exits))
    assert terms["self"][1].item() == pytest.approx(sum(soft_kl(exits[-1], s, 3) for s in exits))


def test_be_your_own_teacher(outputs: Outputs) -> None:
    exits, features, label, _ = outputs
    expected = ce(exits[-1], label)
    for s, f in zip(exits[:-1], features[:-1], strict=True):
        expected += 0.7 * ce(s, label) + 0.3 * soft_kl(s, exits[-1], 3) + 0.03 * mse(f, features[-1])
    assert total(be_your_own_teacher(exits, features, label)).item() == pytest.approx(expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_deepest_exit_learns_nothing_from_the_shallow_ones(outputs: Outputs, reverse: bool) -> None:
    exits, features, label, _ = outputs
    terms = self_distillation(exits, features, label, reverse=reverse)
    (terms["self"][1] + terms["feature"][1]).backward()
    assert exits[-1].grad is None
    assert features[-1].grad is None
    assert all(x.grad is not None and x.grad.any() for x in [*exits[:-1], *features[:-1]])


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_of_the_shallow_exits(outputs: Outputs, reverse: bool) -> None:
    exits, features, label, teacher = outputs

    def loss(shallow: Tensor, feature: Tensor) -> Tensor:
        z, f = [shallow, *exits[1:]], [feature, *features[1:]]
        return total(self_distillation(z, f, label, teacher=teacher, reverse=reverse))

    assert torch.autograd.gradcheck(loss, (exits[0], features[0]))
    assert torch.autograd.gradcheck(
        lambda z, f: total(be_your_own_teacher([z, *exits[1:]], [f, *features[1:]], label)), (exits[0], features[0])
    )


def test_unlabelled_images_still_learn_from_the_teachers(
    outputs: Outputs,
) -> None:
    exits, features, label, teacher = outputs
    terms = self_distillation(exits, features, torch.full_like(label, -1), teacher=teacher)
    assert terms["ce"][1].item() == terms["deep_ce"][1].item() == 0
    assert terms["kd"][1].item() > 0


def test_refuses_exits_without_features(outputs: Outputs) -> None:
    exits, features, label, _ = outputs
    for loss in (self_distillation, be_your_own_teacher):
        with pytest.raises(BadInput, match="4 exits and 3 features"):
            loss(exits, features[:3], label)
