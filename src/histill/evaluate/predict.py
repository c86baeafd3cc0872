"""What a network says of packed images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.data.packed import Packed
from histill.memory import fits_of

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

    def look(part: NDArray[np.int64]) -> dict[str, Tensor]:
        outputs = network(packed.batch(part, device=device).images).items()
        logits = {n: v for n, v in outputs if n == "logits" or (n.startswith("exit") and n[4:].isdigit())}
        return {name: value.cpu().double() for name, value in logits.items()}

    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            for piece in fits_of(network, "judging")(look, rows[start : start + batch_size]):
                for name, value in piece.items():
                    said.setdefault(name, []).append(value)
    network.train(mode)
    return {name: torch.cat(values).numpy() for name, values in said.items()}
