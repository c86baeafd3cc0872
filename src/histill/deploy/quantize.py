"""Static 8-bit integers for ONNX Runtime on the CPU, calibrated on images."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from histill.deploy.export import quiet
from histill.deploy.predictor import Pixels, one_line
from histill.errors import BadInput, Failed, require
from histill.files import atomic

__all__ = ["quantize"]

_WEIGHTED = ("Conv", "Gemm", "MatMul")


class _Batches:
    """Calibration batches as ONNX Runtime asks for them."""

    def __init__(self, name: str, batches: Iterable[Pixels]) -> None:
        self.name, self.count = name, 0
        self.batches: Iterator[Pixels] = iter(batches)

    def get_next(self) -> dict[str, Pixels] | None:
        images = next(self.batches, None)
        if images is None:
            return None
        self.count += len(images)
        return {self.name: images}

    def __iter__(self) -> Iterator[dict[str, Pixels]]:
        return iter(self.get_next, None)


def quantize(model: str | Path, out: str | Path, calibration: Iterable[Pixels]) -> Path:
    """placeholder"""
