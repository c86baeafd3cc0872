"""Losses between logits: identities, numbers by hand, naive references."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from histill.losses import dist, dkd, kd, nkd, soft_cross_entropy

Array = NDArray[np.float64]
LOG3 = math.log(3.0)


def softmax(z: Array, temperature: float) -> Array:
    e = np.exp((z - z.max()) / temperature)
    return e / e.sum()


def kl(p: Array, q: Array) -> float:
    return sum(float(a * (math.log(a) - math.log(b))) for a, b in zip(p, q, strict=True) if a > 0)


def naive_kd(student: Array, teacher: Array, temperature: float) -> float:
    each = [kl(softmax(t, temperature), softmax(s, temperature)) for s, t in zip(student, teacher, strict=True)]
    return temperature**2 * float(np.mean(each))


def naive_dkd(
    student: Array, teacher: Array, label: NDArray[np.int64], alpha: float, beta: float, temperature: float
) -> float:
    each = []
    for s, t, y in zip(student, teacher, label, strict=True):
        if y < 0:
            continue
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        tckd = kl(np.array([p_t[y], 1 - p_t[y]]), np.array([p_s[y], 1 - p_s[y]]))
        others_t, others_s = np.delete(p_t, y), np.delete(p_s, y)
        each.append(alpha * tckd + beta * kl(others_t / others_t.sum(), others_s / others_s.sum()))
    return temperature**2 * float(np.mean(each)) if each else 0.0


def naive_nkd(student: Array, teacher: Array, label: NDArray[np.int64], gamma: float, temperature: float) -> float:
    each = []
    for s, t, y in zip(student, teacher, label, strict=True):
        if y < 0:
            continue
        target = -softmax(t, 1)[y] * math.log(softmax(s, 1)[y])
        n_t, n_s = softmax(np.delete(t, y), temperature), softmax(np.delete(s, y), temperature)
        each.append(target - gamma * temperature**2 * float((n_t * np.log(n_s)).sum()))
    return float(np.mean(each)) if each else 0.0


def pearson(a: Array, b: Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (np.sqrt((a**2).sum()) * np.sqrt((b**2).sum()) + 1e-8))


def naive_dist(student: Array, teacher: Array, beta: float, gamma: float, temperature: float) -> float:
    p_s = np.array([softmax(z, temperature) for z in student])
    p_t = np.array([softmax(z, temperature) for z in teacher])
    inter = np.mean([1 - pearson(a, b) for a, b in zip(p_s, p_t, strict=True)])
    intra = np.mean([1 - pearson(a, b) for a, b in zip(p_s.T, p_t.T, strict=True)])
    return float(temperature**2 * (beta * inter + gamma * intra))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    batch, classes = draw(st.integers(2, 6)), draw(st.integers(3, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    student, teacher = torch.randn(2, batch, classes, generator=generator, dtype=torch.float64).unbind()
    scale = draw(st.floats(0.5, 4))
    return (
        student * scale,
        teacher * 3,
        torch.randint(-1, classes, (batch,), generator=generator),
        draw(st.floats(1, 10)),
    )


@settings(deadline=None, max_examples=50)
@given(problems())
def test_each_is_its_equation(problem: tuple[Tensor, Tensor, Tensor, float]) -> None:
    student, teacher, label, temperature = problem
    s, t, y = student.numpy(), teacher.numpy(), label.numpy()
    assert kd(student, teacher, temperature=temperature).item() == pytest.approx(naive_kd(s, t, temperature))
    assert dkd(student, teacher, label, alpha=1.5, beta=4, temperature=temperature).item() == pytest.approx(
        naive_dkd(s, t, y, 1.5, 4, temperature)
    )
    assert nkd(student, teacher, label, gamma=1.5, temperature=temperature).item() == pytest.approx(
        naive_nkd(s, t, y, 1.5, temperature)
    )
    assert dist(student, teacher, beta=2, gamma=3, temperature=temperature).item() == pytest.approx(
        naive_dist(s, t, 2, 3, temperature), rel=1e-9, abs=1e-12
    )
    entropy_s = [-(softmax(b, temperature) * np.log(softmax(a, temperature))).sum() for a, b in zip(s, t, strict=True)]
    assert soft_cross_entropy(student, teacher, temperature=temperature).item() == pytest.approx(np.mean(entropy_s))


def test_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, LOG3]])  # 1/2 1/2 against 1/4 3/4
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kd(student, teacher, temperature=1).item() == pytest.approx(expected)
    assert kd(2 * student, 2 * teacher, temperature=2).item() == pytest.approx(4 * expected)
    assert soft_cross_entropy(2 * student, 2 * teacher, temperature=2).item() == pytest.approx(math.log(2))
    assert dkd(student, teacher, torch.tensor([0]), alpha=1, beta=8, temperature=1).item() == pytest.approx(expected)
    assert nkd(student, teacher, torch.tensor([1]), gamma=9, temperature=1).item() == pytest.approx(0.75 * math.log(2))


def test_kd_is_torchs_batchmean_divergence() -> None:
    student, teacher = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0)).unbind()
    expected = 9 * torch.nn.functional.kl_div(
        (student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(kd(student, teacher, temperature=3), expected)


def logits(batch: int = 4, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, batch, classes, generator=generator, dtype=torch.float64).unbind()
    return student.requires_grad_(), 3 * teacher


def centred(z: Tensor) -> Tensor:
    return z - z.mean(1, keepdim=True)


def test_kd_at_high_temperature_is_the_squared_error_of_centred_logits() -> None:
    student, teacher = logits()
    loss = kd(student, teacher, temperature=1e4)
    difference = centred(student.detach()) - centred(teacher)
    torch.testing.assert_close(loss.detach(), difference.square().sum(1).mean() / (2 * 5), rtol=1e-3, atol=0)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, difference / (4 * 5), rtol=1e-3, atol=1e-4)


def test_the_gradient_of_kd_keeps_its_size_as_the_temperature_grows() -> None:
    student, teacher = logits()
    norms = [torch.autograd.grad(kd(student, teacher, temperature=t), student)[0].norm().item() for t in (20, 40, 400)]
    assert norms[0] == pytest.approx(norms[2], rel=0.1)
    assert norms[1] == pytest.approx(norms[2], rel=0.05)


def test_kd_sees_a_softened_difference_of_logits_only() -> None:
    student, teacher = logits()
    shifted = kd(student + 7, teacher - torch.arange(4.0)[:, None], temperature=2)
    torch.testing.assert_close(shifted, kd(student, teacher, temperature=2))


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 50), st.floats(-100, 100), st.integers(0, 99))
def test_standardized_logits_do_not_know_scale_or_shift(scale: float, shift: float, seed: int) -> None:
    student, teacher = logits(seed=seed)
    expected = kd(student, teacher, temperature=2, standardize=True)
    for s, t in ((scale * student + shift, teacher), (student, scale * teacher + shift)):
        torch.testing.assert_close(kd(s, t, temperature=2, standardize=True), expected, rtol=1e-4, atol=1e-5)


def test_standardization_is_a_z_score_with_the_biased_deviation() -> None:
    student, teacher = logits()
    scores = [
        np.array([(z - z.mean()) / (z.std() + 1e-7) for z in each.detach().numpy()]) for each in (student, teacher)
    ]
    expected = naive_kd(*scores, temperature=3.0)
    assert kd(student, teacher, temperature=3, standardize=True).item() == pytest.approx(expected)


def test_standardization_sees_spreads_far_below_one() -> None:
    teacher = torch.tensor([[2.0, 0.0, -1.0]])
    loss = kd(teacher * 1e-3, teacher, temperature=1, standardize=True)  # what is added to the deviation is 1e-7
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_standardized_logits_that_are_all_equal_have_a_finite_gradient() -> None:
    student = torch.full((2, 3), 5.0).requires_grad_()
    loss = kd(student, torch.randn(2, 3), temperature=1, standardize=True)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_takes_kd_apart(temperature: float) -> None:
    student, teacher = logits(batch=1)
    for y in range(5):
        p_t = (teacher / temperature).softmax(1)[0, y].item()
        whole = dkd(student, teacher, torch.tensor([y]), alpha=1, beta=1 - p_t, temperature=temperature)
        torch.testing.assert_close(whole, kd(student, teacher, temperature=temperature))


def test_the_target_part_of_nkd_is_a_weighted_cross_entropy() -> None:
    student, teacher = logits()
    label = torch.tensor([0, 4, 2, 2])
    p_t = teacher.softmax(1)[torch.arange(4), label]
    expected = -(p_t * student.log_softmax(1)[torch.arange(4), label]).mean()
    torch.testing.assert_close(nkd(student, teacher, label, gamma=0, temperature=1), expected)


def test_dist_does_not_know_the_sharpness_of_two_classes() -> None:
    # With two classes every row is (1/2 + a, 1/2 - a): its correlation with another is the sign alone.
    teacher = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    agreed = dist(0.1 * teacher, teacher, beta=1, gamma=0, temperature=1)
    opposed = dist(-teacher, teacher, beta=1, gamma=0, temperature=1)
    assert agreed.item() == pytest.approx(0, abs=1e-5)
    assert opposed.item() == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("unlabelled", [[1], [0, 3], [0, 1, 2, 3]])
def test_unlabelled_images_are_left_out(unlabelled: list[int]) -> None:
    student, teacher = logits()
    label = torch.tensor([0, 1, 2, 3])
    label[unlabelled] = -1
    kept = label >= 0
    for loss in (
        lambda s, t, y: dkd(s, t, y, alpha=1, beta=8, temperature=4),
        lambda s, t, y: nkd(s, t, y, gamma=1.5, temperature=1),
    ):
        value = loss(student, teacher, label)
        (gradient,) = torch.autograd.grad(value, student)
        assert not gradient[unlabelled].any()
        assert torch.isfinite(gradient).all()
        if kept.any():
            torch.testing.assert_close(value, loss(student[kept], teacher[kept], label[kept]))
        else:
            assert value.item() == 0


def test_a_pixel_counts_as_an_image() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    label = torch.randint(-1, 5, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    flat_s, flat_t = (z.permute(0, 2, 3, 1).reshape(24, 5) for z in (student, teacher))
    for loss in (
        lambda s, t, y: kd(s, t, temperature=2, standardize=True),
        lambda s, t, y: soft_cross_entropy(s, t, temperature=2),
        lambda s, t, y: dist(s, t, beta=1, gamma=1, temperature=2),
        lambda s, t, y: dkd(s, t, y, alpha=1, beta=2, temperature=2),
        lambda s, t, y: nkd(s, t, y, gamma=1.5, temperature=2),
    ):
        torch.testing.assert_close(loss(student, teacher, label), loss(flat_s, flat_t, label.flatten()))
