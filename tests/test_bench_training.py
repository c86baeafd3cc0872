"""The benchmark of training tells medians and ratios of the same round, and says which target was missed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("training")


def round_of(**seconds: float) -> dict[str, dict[str, float]]:
    names = {"peer": "torchdistill", "online": "histill online", "limit": "limit: student and teacher"}
    return {names[name]: {"images": 60, "seconds": s} for name, s in seconds.items()}


def test_ratios_are_of_a_round_and_targets_are_judged_by_their_median(bench: ModuleType) -> None:
    rounds = [round_of(peer=10, online=4, limit=3), round_of(peer=30, online=6, limit=6), round_of(peer=20, online=10)]
    rounds[0]["histill online"]["decode_s"] = 6.0
    found = bench.summary(rounds, "resnet50")
    assert found["images_per_second"]["histill online"] == {"median": 10, "low": 6, "high": 15}
    assert found["ratio"]["histill online / torchdistill"] == {"median": 2.5, "low": 2, "high": 5}
    assert found["ratio"]["histill online / limit: student and teacher"] == {"median": 0.875, "low": 0.75, "high": 1}
    assert found["targets"]["histill online / torchdistill"]["reached"] is True
    assert found["targets"]["histill online / limit: student and teacher"]["reached"] is False
    assert found["decode_ms_per_image"] == 100
    assert found["first_epoch_with_decoding"] == {"histill online": pytest.approx(5)}


def test_the_table_says_what_was_missed_and_what_failed(bench: ModuleType) -> None:
    found = {
        "teacher": "resnet50",
        "batch": 32,
        "device": "cpu",
        "machine": {"processor": "P", "cores": 2},
        "rounds": [1],
        "images_of_an_epoch": 60,
        "failed": {"timm's task": "no such thing"},
        "versions": {"torch": "2"},
    }
    text = bench.table(found | bench.summary([round_of(peer=10, online=5, limit=5)], "resnet50"))
    assert "target 2.4: MISSED" in text
    assert "target 0.95: reached" in text
    assert "failed: timm's task: no such thing" in text
