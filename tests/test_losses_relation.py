"""Losses between relations: numbers by hand, naive references, invariances."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from histill.errors import BadInput
from histill.losses import correlation, pkt, rkd_angle, rkd_distance, similarity

Array = NDArray[np.float64]
Loss = Callable[..., Tensor]


def smooth_l1(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def cosine(a: Array, b: Array) -> float:
    norms = math.sqrt((a**2).sum()) * math.sqrt((b**2).sum())
    return float((a * b).sum()) / norms if norms > 0 else 0.0


def naive_distance(student: Array, teacher: Array) -> float:
    n = len(student)
    tables = []
    for x in (student, teacher):
        d = np.array([[math.sqrt(((x[i] - x[j]) ** 2).sum()) for j in range(n)] for i in range(n)])
        tables.append(d / d[d > 0].mean())
    return float(np.mean([smooth_l1(s - t) for s, t in zip(tables[0].flat, tables[1].flat, strict=True)]))


def naive_angle(student: Array, teacher: Array) -> float:
    return float(
        np.mean(
            [
                smooth_l1(
                    cosine(*(student[a] - student[j] for a in (i, k)))
                    - cosine(*(teacher[a] - teacher[j] for a in (i, k)))
                )
                for i, j, k in itertools.product(range(len(student)), repeat=3)
            ]
        )
    )


def naive_pkt(student: Array, teacher: Array) -> float:
    n, tables = len(student), []
    for x in (student, teacher):
        a = np.array([[(cosine(x[i], x[j]) + 1) / 2 for j in range(n)] for i in range(n)])
        tables.append(a / a.sum(1, keepdims=True))
    q, p = tables
    return float(np.mean([p[i, j] * math.log((p[i, j] + 1e-7) / (q[i, j] + 1e-7)) for i in range(n) for j in range(n)]))


def naive_similarity(student: Array, teacher: Array) -> float:
    n, tables = len(student), []
    for x in (student, teacher):
        g = np.array([[(x[i] * x[j]).sum() for j in range(n)] for i in range(n)])
        tables.append(np.array([row / math.sqrt((row**2).sum()) for row in g]))
    return float(((tables[0] - tables[1]) ** 2).sum() / n**2)


def naive_correlation(student: Array, teacher: Array) -> float:
    n, tables = len(student), []
    for x in (student, teacher):
        k = np.zeros((n, n))
        for i, j, p in itertools.product(range(n), range(n), range(3)):
            k[i, j] += math.exp(-0.8) * 0.8**p / math.factorial(p) * cosine(x[i], x[j]) ** p
        tables.append(k)
    return float(((tables[0] - tables[1]) ** 2).sum() / n**2)


REFERENCES = {
    rkd_distance: naive_distance,
    rkd_angle: naive_angle,
    pkt: naive_pkt,
    similarity: naive_similarity,
    correlation: naive_correlation,
}
every_loss = pytest.mark.parametrize("loss", REFERENCES, ids=lambda loss: loss.__name__)


def features(batch: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_loss
@settings(deadline=None, max_examples=20)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_each_is_its_equation(loss: Loss, batch: int, width_s: int, width_t: int, seed: int) -> None:
    student, teacher = features(batch, width_s, seed), 3 * features(batch, width_t, seed + 1)
    expected = REFERENCES[loss](student.numpy(), teacher.numpy())
    assert loss(student, teacher).item() == pytest.approx(expected, abs=1e-10)


def test_rkd_by_hand() -> None:
    # A 3-4-5 triangle (mean side 4) against an equilateral one; right angle, acos .6, acos .8 against 60 degrees.
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    distances = 2 * (smooth_l1(3 / 4 - 1) + smooth_l1(1 - 1) + smooth_l1(5 / 4 - 1)) / 9
    angles = 2 * (smooth_l1(0 - 0.5) + smooth_l1(0.6 - 0.5) + smooth_l1(0.8 - 0.5)) / 27
    assert rkd_distance(student, teacher).item() == pytest.approx(distances, abs=1e-7)
    assert rkd_angle(student, teacher).item() == pytest.approx(angles, abs=1e-7)


def test_similarity_by_hand() -> None:
    # Gram matrices: the identity against all ones, rows (1, 1)/sqrt(2).
    student, teacher = torch.eye(2), torch.ones(2, 1)
    expected = (2 * (1 - math.sqrt(0.5)) ** 2 + 2 * 0.5) / 4
    assert similarity(student, teacher).item() == pytest.approx(expected)


@every_loss
def test_does_not_see_a_rotation_of_the_features(loss: Loss) -> None:
    student, teacher = features(6, 5), features(6, 5, seed=1)
    rotation, _ = torch.linalg.qr(features(5, 5, seed=2))
    torch.testing.assert_close(loss(student @ rotation, teacher), loss(student, teacher))


@every_loss
def test_does_not_see_the_scale_of_the_features(loss: Loss) -> None:
    student, teacher = features(6, 5), features(6, 5, seed=1)
    torch.testing.assert_close(loss(9 * student, teacher), loss(student, teacher))


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_rkd_does_not_see_a_shift(loss: Loss) -> None:
    student, teacher = features(6, 5), features(6, 5, seed=1)
    torch.testing.assert_close(loss(student + 5, teacher), loss(student, teacher))


@every_loss
def test_maps_are_vectors(loss: Loss) -> None:
    student, teacher = features(4, 12), features(4, 18, seed=1)
    as_maps = loss(student.reshape(4, 3, 2, 2), teacher.reshape(4, 2, 3, 3))
    torch.testing.assert_close(as_maps, loss(student, teacher))


@every_loss
def test_refuses_another_batch(loss: Loss) -> None:
    with pytest.raises(BadInput, match="4 images and teacher 3"):
        loss(features(4, 2), features(3, 2))


@every_loss
def test_a_batch_of_one_has_no_loss(loss: Loss) -> None:
    assert loss(features(1, 4), features(1, 4, seed=1)).item() == pytest.approx(0, abs=1e-12)
