"""Whole slides: reading, tissue, tiles, and what a model sees in them. Coordinates are level-0 pixels, (x, y)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histill.slides.cut import cut_slides
    from histill.slides.geojson import read_geojson, write_geojson
    from histill.slides.grid import Grid
    from histill.slides.predict import predict_slide, predict_slides
    from histill.slides.slide import Slide, open_slide
    from histill.slides.tissue import Tissue, find_tissue, tissue_picture

__all__ = [
    "Grid",
    "Slide",
    "Tissue",
    "cut_slides",
    "find_tissue",
    "open_slide",
    "predict_slide",
    "predict_slides",
    "read_geojson",
    "tissue_picture",
    "write_geojson",
]

_HOMES = {
    "Grid": "grid",
    "Slide": "slide",
    "Tissue": "tissue",
    "cut_slides": "cut",
    "find_tissue": "tissue",
    "open_slide": "slide",
    "predict_slide": "predict",
    "predict_slides": "predict",
    "read_geojson": "geojson",
    "tissue_picture": "tissue",
    "write_geojson": "geojson",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"histill.slides.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
