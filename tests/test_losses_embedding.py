"""Embedding losses are their equations: by hand, by invariances, and Matryoshka's sum written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from histill.errors import BadInput
from histill.losses import Projection, cosine, hint, smooth_l1


def test_cosine_by_hand() -> None:
    student = torch.tensor([[3.0, 0.0], [1.0, 1.0], [2.0, -2.0]])
    teacher = torch.tensor([[7.0, 0.0], [0.0, 5.0], [-1.0, 1.0]])
    assert cosine(student, teacher).item() == pytest.approx((0 + (1 - math.sqrt(0.5)) + 2) / 3)


def test_cosine_of_maps_is_the_mean_over_places() -> None:
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
    torch.testing.assert_close(cosine(student, teacher), cosine(*rows))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), factor=st.floats(0.01, 100))
def test_cosine_does_not_see_lengths_but_sees_the_mean(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(cosine(student * factor, teacher / factor), cosine(student, teacher))
    shifted = cosine(student + 50, teacher + 50)  # what standardising a teacher is for
    assert shifted < cosine(student, teacher) + 1e-12
    assert shifted < 0.05


def test_smooth_l1_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.5, 1.0, -3.0]])
    assert smooth_l1(student, teacher).item() == pytest.approx((0.125 + 0.5 + 2.5) / 3)
    assert smooth_l1(student, teacher, beta=2).item() == pytest.approx((0.0625 + 0.25 + 2.0) / 3)


def set_maps(projection: Projection, make: list[list[tuple[Tensor, Tensor]]]) -> None:
    for maps, pairs in zip(projection.maps, make):
        for layer, (weight, bias) in zip(maps, pairs):  # type: ignore[arg-type]
            layer.weight.data, layer.bias.data = weight, bias


@pytest.mark.parametrize("loss", [cosine, hint, smooth_l1])
def test_projection_is_the_sum_over_widths_and_the_mean_over_teachers(loss) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    widths, outs = [2, 3, 5], [4, 6]
    projection = Projection(5, outs, nested=(3, 2), loss=loss)
    made = [[(torch.randn(out, m), torch.randn(out)) for m in widths] for out in outs]
    set_maps(projection, made)
    z, teachers = torch.randn(7, 5), [torch.randn(7, out) for out in outs]
    expected = 0.0
    for pairs, e in zip(made, teachers):
        for m, (w, b) in zip(widths, pairs):
            expected += loss(z[:, :m] @ w.T + b, e).item() / 2
    assert projection(z, teachers).item() == pytest.approx(expected, rel=1e-5)


def test_the_first_numbers_learn_at_every_width_and_the_last_at_one() -> None:
    torch.manual_seed(0)
    projection = Projection(6, [4], nested=(2, 4))
    z = torch.randn(8, 6, requires_grad=True)
    projection(z, [torch.randn(8, 4)]).backward()
    assert z.grad is not None
    for m, w in zip((2, 4, 6), projection.maps[0]):  # type: ignore[arg-type]
        assert isinstance(w, nn.Linear)
        assert w.in_features == m
        assert w.weight.grad is not None
        assert w.weight.grad.abs().max() > 0
    narrow = z.detach().clone().requires_grad_()
    only = cosine(projection.maps[0][0](narrow[:, :2]), torch.ones(8, 4))  # type: ignore[index]
    (gradient,) = torch.autograd.grad(only, narrow)
    assert gradient[:, 2:].abs().max() == 0


def test_a_linear_teacher_is_matched_exactly() -> None:
    """A teacher that is a linear image of the student's embedding is learnt to zero, also at the nested width."""
    torch.manual_seed(0)
    z = torch.randn(64, 6)
    teacher = z[:, :3] @ torch.randn(3, 9)
    projection = Projection(6, [9], nested=(3,), loss=hint)
    optimizer = torch.optim.LBFGS(projection.parameters(), max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = projection(z, [teacher])
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert projection(z, [teacher]).item() < 1e-6


@pytest.mark.parametrize("nested", [(6,), (0,), (2, 7)])
def test_a_nested_width_that_is_none_is_said(nested: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="below the student's 6"):
        Projection(6, [4], nested=nested)
