"""What the benchmarks share: the machine's name, medians with their range, and how they leave what they found.

Needs nothing but Python and NumPy, as some of it runs where Histill is not installed.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name, where Linux tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": float(np.median(values)), "low": min(values), "high": max(values)}


def leave(out: Path, found: dict[str, Any], text: str) -> None:
    """Write OUT, which ends in .json, and the table beside it as .txt, and print the table."""
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".txt").write_text(text, encoding="utf-8")
    print(text, end="")


def beside(out: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What was found, with what another part of the benchmark left in OUT before."""
    return {**json.loads(out.read_text(encoding="utf-8")), **found} if out.is_file() else found
