"""Schedules are functions of time: epoch in, multiplier of the learning rate out."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histill.errors import BadInput
from histill.schedules import Schedule, constant, cosine, steps, warm_cosine, warm_restarts, warmup


def test_constant_is_one() -> None:
    assert [constant()(e) for e in (0, 0.5, 1000)] == [1, 1, 1]


def test_cosine_falls_from_one_to_its_final_value() -> None:
    multiplier = cosine(10, final=0.2)
    assert [multiplier(e) for e in (0, 2.5, 5, 10)] == pytest.approx([1, 0.2 + 0.8 * (2 + math.sqrt(2)) / 4, 0.6, 0.2])
    assert multiplier(25) == pytest.approx(0.2)


def test_warm_restarts_begin_again_each_period_longer() -> None:
    multiplier = warm_restarts(2, factor=2)  # periods 0-2, 2-6, 6-14
    assert [multiplier(e) for e in (0, 1, 2, 4, 6, 10)] == pytest.approx([1, 0.5, 1, 0.5, 1, 0.5])
    assert multiplier(1.999) < 0.01 < multiplier(2.0)


def test_warm_restarts_of_equal_length() -> None:
    multiplier = warm_restarts(5, final=0.1)
    assert [multiplier(e) for e in (0, 2.5, 5, 7.5)] == pytest.approx([1, 0.55, 1, 0.55])


def test_steps_multiply_at_each_milestone() -> None:
    multiplier = steps([150, 180, 210])
    assert [multiplier(e) for e in (0, 149.9, 150, 180, 239)] == pytest.approx([1, 1, 0.1, 0.01, 0.001])


def test_warm_up_rises_linearly_then_leaves_the_other_alone() -> None:
    multiplier = warmup(4, cosine(8))
    assert multiplier(0) == pytest.approx(1e-3 / 4)
    assert multiplier(2) == pytest.approx((2 + 1e-3) / 4 * cosine(8)(2))
    assert multiplier(4) == pytest.approx(0.5)
    assert multiplier(6) == pytest.approx(cosine(8)(6))


def test_no_warm_up_is_the_other_schedule() -> None:
    assert warmup(0, constant())(0) == 1


@given(epoch=st.floats(0, 500), period=st.floats(1, 50), factor=st.floats(1, 3))
def test_multipliers_lie_between_final_and_one(epoch: float, period: float, factor: float) -> None:
    for schedule in (cosine(period, final=0.1), warm_restarts(period, factor=factor, final=0.1)):
        assert 0.1 - 1e-12 <= schedule(epoch) <= 1 + 1e-12


@pytest.mark.parametrize(("epochs", "warm"), [(30, 1.0), (4, 0.4)])
def test_warm_cosine_warms_up_for_an_epoch_or_a_tenth(epochs: float, warm: float) -> None:
    made, plain = warm_cosine(epochs), cosine(epochs)
    assert made(warm / 2) == pytest.approx(plain(warm / 2) / 2, rel=0.01)
    assert [made(warm + k) for k in range(3)] == [plain(warm + k) for k in range(3)]


@pytest.mark.parametrize(
    "schedule",
    [
        constant(),
        cosine(9, final=0.1),
        steps([2, 5]),
        warm_cosine(12),
        warm_restarts(2, factor=2),
        warmup(3, steps([4])),
    ],
)
def test_a_schedule_can_be_sent_to_another_process(schedule: Schedule) -> None:
    sent = pickle.loads(pickle.dumps(schedule))
    assert [sent(e / 4) for e in range(60)] == [schedule(e / 4) for e in range(60)]


@pytest.mark.parametrize(("period", "factor"), [(0, 1), (-1, 2), (2, 0.5), (float("nan"), 1)])
def test_periods_that_would_end_are_refused(period: float, factor: float) -> None:
    with pytest.raises(BadInput, match="a period above 0, a factor of 1 or more"):
        warm_restarts(period, factor=factor)
