"""Readers of strangers' files take what is bent at random or refuse it in a line (at length: benchmarks/fuzz.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz_targets import TARGETS, assert_line
from hypothesis import HealthCheck, given, settings

from histill.errors import HistillError
from histill.files import read_json

DRIVER = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


@pytest.mark.parametrize("name", TARGETS)
def test_any_damage_is_a_value_or_a_line(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]

    @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(value=target.values)
    def look(value: Any) -> None:
        try:
            target.run(value, tmp_path)
        except HistillError as error:
            assert_line(error)

    look()


@pytest.mark.slow
def test_the_driver_counts_and_writes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(DRIVER),
        "pictures",
        "weights",
        "--minutes",
        "0.03",
        "--out",
        str(tmp_path / "f.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_json(tmp_path / "f.json")["targets"]
    assert set(found) == {"pictures", "weights"}
    for result in found.values():
        assert result["executions"] >= result["read"] + result["refused"] > 0
        assert result["findings"] == []
