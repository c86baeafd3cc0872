"""Images -> table -> split -> packed pixels -> views."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histill.data.archives import unpack
    from histill.data.images import Images, read_images, read_unlabelled
    from histill.data.masks import read_masks
    from histill.data.packed import Packed, pack
    from histill.data.splits import split
    from histill.data.views import Augment

__all__ = [
    "Augment",
    "Images",
    "Packed",
    "pack",
    "read_images",
    "read_masks",
    "read_unlabelled",
    "split",
    "unpack",
]

# Half of these import torch, which what only reads slides or files has no need of.
_HOMES = {
    "Augment": "views",
    "Images": "images",
    "Packed": "packed",
    "pack": "packed",
    "read_images": "images",
    "read_masks": "masks",
    "read_unlabelled": "images",
    "split": "splits",
    "unpack": "archives",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(importlib.import_module(f"histill.data.{_HOMES[name]}"), name)
        globals()[name] = found  # over a module of the same name
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
