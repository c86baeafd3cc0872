"""What a network says of packed images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.data.packed import Packed

__all__ = ["predict_rows"]


def predict_rows(
    network: nn.Module,
    packed: Packed,
    rows: NDArray[np.int64],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> dict[str, NDArray[np.float64]]:
    """What a network says of the images themselves (no augmentation).

    Returns:
        ``logits`` and, of a network with exits, ``exit1`` and so on, each ``(N, C)`` float64. The network's mode is
        left as it was.
    """
    mode = network.training
    network.eval()
    said: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = packed.batch(rows[start : start + batch_size], device=device)
            for name, value in network(batch.images).items():
                if name == "logits" or (name.startswith("exit") and name[4:].isdigit()):
                    said.setdefault(name, []).append(value.double().cpu())
    network.train(mode)
    return {name: torch.cat(values).numpy() for name, values in said.items()}
