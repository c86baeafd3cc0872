"""Import torchvision beside a torch that it was not compiled for.

The wheels of torchvision on PyPI are built for CUDA. Beside a CPU-only torch their compiled library does not load, and
the import then fails on the first operator that it wants to describe. Histill uses none of those operators
(box suppression), so declaring them is enough. timm imports torchvision, so import this module before timm.
"""

from __future__ import annotations

import torch

__all__: list[str] = []

try:
    import torchvision
except RuntimeError as error:
    if "does not exist" not in str(error):
        raise
    _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    import torchvision  # noqa: F401
