"""Losses against labels: numbers by hand, naive references, unlabelled images."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from histill.errors import BadInput
from histill.losses import cross_entropy, dice, focal

Array = NDArray[np.float64]
Loss = Callable[..., torch.Tensor]
LOG3 = math.log(3.0)


def naive_log_softmax(z: Array) -> Array:
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def naive_cross_entropy(logits: Array, label: NDArray[np.int64], smoothing: float, weight: Array) -> float:
    total, mass = 0.0, 0.0
    for z, y in zip(logits, label, strict=True):
        if y < 0:
            continue
        log_p = naive_log_softmax(z)
        for c in range(len(z)):
            q = smoothing / len(z) + (1 - smoothing if c == y else 0.0)
            total -= weight[c] * q * log_p[c]
        mass += weight[y]
    return total / mass if mass else 0.0


def naive_focal(logits: Array, label: NDArray[np.int64], alpha: Array, gamma: float) -> float:
    losses = []
    for z, y in zip(logits, label, strict=True):
        if y >= 0:
            log_p = naive_log_softmax(z)[y]
            losses.append(-alpha[y] * (1 - np.exp(log_p)) ** gamma * log_p)
    return float(np.mean(losses)) if losses else 0.0


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    batch, classes = draw(st.integers(1, 6)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * draw(st.floats(0.1, 20))
    return logits, torch.randint(-1, classes, (batch,), generator=generator)


@settings(deadline=None, max_examples=40)
@given(problems(), st.floats(0, 0.5))
def test_cross_entropy_is_the_equation(problem: tuple[torch.Tensor, torch.Tensor], smoothing: float) -> None:
    logits, label = problem
    weight = torch.linspace(0.5, 2.0, logits.shape[1], dtype=torch.float64)
    for w in (None, weight):
        w_np = np.ones(logits.shape[1]) if w is None else w.numpy()
        expected = naive_cross_entropy(logits.numpy(), label.numpy(), smoothing, w_np)
        assert cross_entropy(logits, label, smoothing=smoothing, weight=w).item() == pytest.approx(expected)


@settings(deadline=None, max_examples=40)
@given(problems(), st.floats(0, 4))
def test_focal_is_the_equation(problem: tuple[torch.Tensor, torch.Tensor], gamma: float) -> None:
    logits, label = problem
    alpha = torch.linspace(0.5, 2.0, logits.shape[1], dtype=torch.float64)
    for a, a_np in ((None, np.ones(logits.shape[1])), (0.25, np.full(logits.shape[1], 0.25)), (alpha, alpha.numpy())):
        expected = naive_focal(logits.numpy(), label.numpy(), a_np, gamma)
        assert focal(logits, label, alpha=a, gamma=gamma).item() == pytest.approx(expected, abs=1e-12)


def test_by_hand() -> None:
    logits, label = torch.tensor([[0.0, LOG3], [0.0, 0.0]]), torch.tensor([1, 0])  # p = 3/4 and 1/2
    assert cross_entropy(logits, label).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    by_hand = (math.log(4 / 3) / 16 + math.log(2) / 4) / 2
    assert focal(logits, label).item() == pytest.approx(by_hand)
    assert focal(logits, label, alpha=0.25).item() == pytest.approx(by_hand / 4)


def test_weights_take_the_weighted_mean_as_torch_does() -> None:
    logits, label = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    weight = torch.tensor([1.0, 4.0, 0.5])
    for smoothing in (0.0, 0.2):
        expected = torch.nn.CrossEntropyLoss(weight, label_smoothing=smoothing)(logits, label)
        torch.testing.assert_close(cross_entropy(logits, label, weight=weight, smoothing=smoothing), expected)


def test_focal_without_focus_is_cross_entropy() -> None:
    logits, label = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    torch.testing.assert_close(focal(logits, label, gamma=0), cross_entropy(logits, label))


def test_focal_of_what_is_certain_has_a_finite_gradient_whatever_gamma_is() -> None:
    # p = 1 exactly: (1 - p)^0.5 has no slope at 0.
    logits = torch.tensor([[200.0, 0.0], [0.0, 1.0]], requires_grad=True)
    focal(logits, torch.tensor([0, 1]), gamma=0.5).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0].tolist() == [0, 0]
    assert logits.grad[1].abs().min() > 0


@pytest.mark.parametrize("loss", [cross_entropy, focal])
def test_an_unlabelled_image_is_as_good_as_absent(loss: Loss) -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([2, -1, 0, -1, 1])
    torch.testing.assert_close(loss(logits, label), loss(logits[label >= 0], label[label >= 0]))


@pytest.mark.parametrize("loss", [cross_entropy, focal])
@pytest.mark.parametrize("weight", [None, torch.ones(3)])
def test_no_labelled_image_is_a_zero_with_a_gradient(loss: Loss, weight: torch.Tensor | None) -> None:
    logits = torch.randn(4, 3).requires_grad_()
    options = {"alpha" if loss is focal else "weight": weight}
    value = loss(logits, torch.full((4,), -1), **options)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("loss", [cross_entropy, focal])
def test_a_pixel_counts_as_an_image(loss: Loss) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    label = torch.randint(-1, 3, (2, 4, 5), generator=generator)
    torch.testing.assert_close(loss(logits, label), loss(logits.permute(0, 2, 3, 1).reshape(40, 3), label.reshape(40)))


@pytest.mark.parametrize("loss", [cross_entropy, focal, dice])
def test_refuses_labels_that_do_not_fit(loss: Loss) -> None:
    with pytest.raises(BadInput, match="labels"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 8, dtype=torch.long))


def test_dice_is_the_equation() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64)
    label = torch.randint(-1, 4, (3, 5, 6), generator=generator)
    label[2] = -1
    expected = []
    for b in range(2):
        per_class = []
        for c in range(4):
            overlap = p_area = y_area = 0.0
            for i in range(5):
                for j in range(6):
                    if label[b, i, j] >= 0:
                        p = float(np.exp(naive_log_softmax(logits[b, :, i, j].numpy())[c]))
                        y = float(label[b, i, j] == c)
                        overlap, p_area, y_area = overlap + p * y, p_area + p, y_area + y
            per_class.append(1 - (2 * overlap + 1) / (p_area + y_area + 1))
        expected.append(np.mean(per_class))
    assert dice(logits, label).item() == pytest.approx(np.mean(expected))


def test_dice_by_hand() -> None:
    label = torch.tensor([[[0, 0], [0, 1]]])
    right = torch.nn.functional.one_hot(label, 2).movedim(-1, 1) * 100.0
    assert dice(right, label).item() == pytest.approx(0, abs=1e-6)
    # All wrong: class 0 has areas 1 and 3, class 1 areas 3 and 1, no overlap: 1 - 1/5 for both.
    assert dice(-right, label).item() == pytest.approx(0.8)


def test_dice_of_an_unlabelled_mask_is_a_zero_with_a_gradient() -> None:
    logits = torch.randn(2, 3, 4, 4).requires_grad_()
    value = dice(logits, torch.full((2, 4, 4), -1))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros_like(logits))
