"""What keeps an accelerator busy: within a training step nothing waits for it.

A device computes what it is given in turn, while the processor goes on to give it more. A number that is read, a mask
that is used as an index and a tensor that comes from pageable memory wait until all that was given is computed, and
then the device waits for the next step to be prepared. ``tests/test_accelerator.py`` counts such places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from histill.errors import Failed

__all__ = ["Tally", "sent"]


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; CUDA fetches it from pinned memory when it gets there, and nobody waits for it."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")  # MPS may read the memory after it was given back


class Tally:
    """The raw terms of the loss by step; they stay on the device until `read`."""

    EVERY = 64
    """Steps after which a device is read at the latest, so that a loss that is not finite ends a run soon."""

    def __init__(self) -> None:
        self.unread: list[tuple[str, int, Sequence[str], Tensor]] = []

    def add(self, when: str, images: int, names: Sequence[str], raw: Tensor) -> None:
        """The means ``(T,)`` of a step's terms over its images, in the order of their names."""
        self.unread.append((when, images, names, raw))

    def read(self, sums: dict[str, float]) -> None:
        """Add what was not read to ``sums``, under ``raw/NAME``, each mean times its images.

        Raises:
            Failed: a term is not finite; the line says which, and when that was.
        """
        unread, self.unread = self.unread, []
        values = iter(torch.cat([raw for *_, raw in unread]).cpu().tolist() if unread else [])
        for when, images, names, _ in unread:
            for name in names:
                value = next(values)
                if not math.isfinite(value):
                    raise Failed(f"the loss term {name!r} is {value} in {when}; lower --lr, or clip the gradient")
                sums[f"raw/{name}"] = sums.get(f"raw/{name}", 0.0) + value * images
