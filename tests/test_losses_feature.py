"""Losses between feature maps: numbers by hand and naive references."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from histill.errors import BadInput
from histill.losses import AB, VID, ReviewKD, attention_transfer, hint
from histill.models import Regressors


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hint_by_hand() -> None:
    assert hint(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 4.0], [0.0, 2.0]])).item() == 2.0


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 99))
def test_hint_is_the_equation(shape: list[int], seed: int) -> None:
    student, teacher = maps(*shape, seed=seed), maps(*shape, seed=seed + 1)
    total = sum((student[place].item() - teacher[place].item()) ** 2 for place in np.ndindex(*shape))
    assert hint(student, teacher).item() == pytest.approx(total / math.prod(shape), abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_hint_through_a_regressor_is_the_equation(b: int, c_s: int, c_t: int, h: int, seed: int) -> None:
    torch.manual_seed(seed)
    regressors = Regressors([c_s], [c_t]).double()
    student, teacher = maps(b, c_s, h, 3, seed=seed), maps(b, c_t, h, 3, seed=seed + 1)
    weight, bias = (p.detach().numpy() for p in (regressors[0].weight, regressors[0].bias))
    total = 0.0
    for n, c, y, x in np.ndindex(b, c_t, h, 3):
        wide = bias[c] + sum(weight[c, k, 0, 0] * student[n, k, y, x].item() for k in range(c_s))
        total += (wide - teacher[n, c, y, x].item()) ** 2
    (wider,) = regressors([student])
    assert hint(wider, teacher).item() == pytest.approx(total / (b * c_t * h * 3), abs=1e-12)


def test_hint_refuses_to_broadcast() -> None:
    with pytest.raises(BadInput, match=r"\(4, 8\) and teacher \(4, 1\)"):
        hint(torch.zeros(4, 8), torch.zeros(4, 1))


def test_attention_transfer_by_hand() -> None:
    # Squared-mean maps (9, 16) and (1, 0): scaled (9, 16)/sqrt(337) and (1, 0).
    student = torch.tensor([[[[3.0, 4.0]], [[-3.0, 4.0]]]])
    teacher = torch.tensor([[[[5.0, 0.0]]]])
    expected = ((9 / math.sqrt(337) - 1) ** 2 + 256 / 337) / 2
    assert attention_transfer(student, teacher).item() == pytest.approx(expected)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99)
)
def test_attention_transfer_is_the_equation(b: int, c_s: int, c_t: int, h: int, w: int, seed: int) -> None:
    student, teacher = maps(b, c_s, h, w, seed=seed), maps(b, c_t, h, w, seed=seed + 1)
    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        q_s, q_t = ((f**2).sum(0).ravel() for f in (s, t))
        total += (((q_s / np.sqrt((q_s**2).sum())) - (q_t / np.sqrt((q_t**2).sum()))) ** 2).sum()
    assert attention_transfer(student, teacher).item() == pytest.approx(total / (b * h * w), abs=1e-12)


def test_attention_transfer_knows_neither_scale_nor_sign() -> None:
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    torch.testing.assert_close(attention_transfer(-7 * student, teacher), attention_transfer(student, teacher))


def test_attention_transfer_pools_the_larger_map() -> None:
    student, teacher = maps(2, 3, 8, 4), maps(2, 5, 4, 4, seed=1)
    pooled = student.square().mean(1).reshape(2, 4, 2, 4).mean(2)
    expected = attention_transfer(pooled.sqrt()[:, None], teacher)
    torch.testing.assert_close(attention_transfer(student, teacher), expected)
    torch.testing.assert_close(attention_transfer(teacher, student), expected)


def test_vid_is_a_gaussian_likelihood_with_a_variance_per_channel() -> None:
    torch.manual_seed(0)
    vid = VID(3, 4).double()
    with torch.no_grad():
        vid.scale.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    student, teacher = maps(2, 3, 4, 4), maps(2, 4, 2, 2, seed=1)
    weights = [layer.weight.detach().numpy()[:, :, 0, 0] for layer in (vid.mean[0], vid.mean[2], vid.mean[4])]
    expected = []
    for b in range(2):
        for i in range(2):
            for j in range(2):
                x = student[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)).numpy()
                for n, weight in enumerate(weights):
                    x = weight @ x
                    x = np.maximum(x, 0) if n < 2 else x
                for c in range(4):
                    variance = math.log1p(math.exp(c - 1)) + 1e-5
                    error = teacher[b, c, i, j].item() - x[c]
                    expected.append(error**2 / (2 * variance) + math.log(variance) / 2)
    assert vid(student, teacher).item() == pytest.approx(np.mean(expected))


def test_vid_starts_at_the_published_variance() -> None:
    vid = VID(3, 4).double()
    for parameter in vid.mean.parameters():
        torch.nn.init.zeros_(parameter)
    teacher = maps(2, 4, 3, 3)
    expected = teacher.square().mean().item() / 10 + math.log(5) / 2
    assert vid(maps(2, 3, 3, 3), teacher).item() == pytest.approx(expected)


def test_vid_learns_to_predict_the_teacher() -> None:
    torch.manual_seed(0)
    vid = VID(4, 4)
    student = maps(8, 4, 3, 3).float()
    teacher = 2 * student.abs()
    optimizer = torch.optim.Adam(vid.parameters(), lr=0.02)
    before = vid(student, teacher).item()
    for _ in range(150):
        optimizer.zero_grad()
        vid(student, teacher).backward()
        optimizer.step()
    assert vid(student, teacher).item() < before - 0.5


def test_ab_is_a_squared_hinge_on_the_side_of_the_boundary() -> None:
    torch.manual_seed(0)
    ab = AB(3, 4, margin=0.7).double().eval()
    student, teacher = maps(2, 3, 2, 2), maps(2, 4, 2, 2, seed=1)
    teacher[0, 0, 0, 0] = 0.0
    connected = ab.connect(student)
    expected = [
        max(0.0, 0.7 - s) ** 2 if t > 0 else max(0.0, 0.7 + s) ** 2
        for s, t in zip(connected.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    ]
    assert ab(student, teacher).item() == pytest.approx(np.mean(expected))


def test_ab_does_not_care_how_strongly_the_teacher_fires() -> None:
    ab = AB(3, 4)
    student, teacher = maps(2, 3, 2, 2).float(), maps(2, 4, 2, 2, seed=1).float()
    torch.testing.assert_close(ab(student, 100 * teacher), ab(student, teacher))


def hierarchical(student: Tensor, teacher: Tensor) -> float:
    h, w = student.shape[2:]
    weights, errors = [1.0], [((student - teacher) ** 2).mean().item()]
    for size in (4, 2, 1):
        if size < h:
            s, t = (f.reshape(*f.shape[:2], size, h // size, size, w // size).mean((3, 5)) for f in (student, teacher))
            weights.append(weights[-1] / 2)
            errors.append(((s - t) ** 2).mean().item())
    return float(np.average(errors, weights=weights))


def test_review_mixes_each_stage_with_the_deeper_ones() -> None:
    torch.manual_seed(0)
    review = ReviewKD([2, 3, 5], [4, 6, 7]).double()
    student = [maps(2, 2, 8, 8), maps(2, 3, 4, 4), maps(2, 5, 1, 1)]
    teacher = [maps(2, 4, 8, 8, seed=1), maps(2, 6, 4, 4, seed=2), maps(2, 7, 1, 1, seed=3)]
    expected, deeper = 0.0, None
    for stage in (2, 1, 0):
        fusion = review.fusions[stage]
        x = fusion.reduce(student[stage])
        if deeper is not None:
            ratio = x.shape[2] // deeper.shape[2]
            deeper = deeper.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)
            gate = fusion.attention(torch.cat([x, deeper], 1))
            x = gate[:, :1] * x + gate[:, 1:] * deeper
        deeper = x
        expected += hierarchical(fusion.expand(x), teacher[stage])
    assert review(student, teacher).item() == pytest.approx(expected)


def test_review_takes_the_teachers_size() -> None:
    review = ReviewKD([2, 3], [4, 6])
    loss = review(
        [torch.randn(2, 2, 8, 6), torch.randn(2, 3, 4, 3)], [torch.randn(2, 4, 16, 12), torch.randn(2, 6, 8, 6)]
    )
    assert torch.isfinite(loss)


def test_review_refuses_stages_that_do_not_pair() -> None:
    with pytest.raises(BadInput, match="2 student stages and 1 teacher"):
        ReviewKD([2, 3], [4])


@pytest.mark.parametrize("module", [VID(3, 4), AB(3, 4)])
def test_the_projection_trains_with_the_student(module: torch.nn.Module) -> None:
    module(torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
