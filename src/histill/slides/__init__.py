"""Whole slides: reading, tissue, tiles, and what a model sees in them. Coordinates are level-0 pixels, (x, y)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histill.slides.grid import Grid
    from histill.slides.slide import Slide, open_slide
    from histill.slides.tissue import Tissue, find_tissue

__all__ = ["Grid", "Slide", "Tissue", "find_tissue", "open_slide"]

_HOMES = {
    "Grid": "grid",
    "Slide": "slide",
    "Tissue": "tissue",
    "find_tissue": "tissue",
    "open_slide": "slide",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"histill.slides.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
