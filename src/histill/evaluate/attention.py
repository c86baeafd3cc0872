"""What a MAC-ResNet looked at, for the pages of its run, of its distillation and of its study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from histill.data.decode import load
from histill.evaluate import figures
from histill.models.mac_resnet import MACResNet, attention_mask, mean_crop
from histill.run import Run

__all__ = ["looked_at"]


def looked_at(run: Run, table: pd.DataFrame, path: Path, *, root: Path | None = None, most: int = 6) -> bool:
    """Draw images of a predictions table, spread evenly, with attention, mask and crop as in evaluation.

    Args:
        run: of the network.
        table: what it said of the images.
        path: the figure's file.
        root: where the images are (default: those of the run).
        most: how many images.

    Returns: False, and nothing is drawn, of a network without attention or a table without images.
    """
    function = run.info["network"]["function"]  # only Histill's own is built here, and only where it is wanted
    if not len(table) or not (function.startswith("histill.") and function.endswith(":MACResNet")):
        return False
    network = run.network()
    if not isinstance(network, MACResNet) or network.attention is None:
        return False
    table = table.iloc[np.linspace(0, len(table) - 1, min(most, len(table))).astype(int)]
    root = root or run.data.root
    images = torch.from_numpy(np.stack([load(root / name, run.image_size) for name in table["image"]]))
    with torch.no_grad():
        attention = network(images)["attention"]
    maps, masks = attention_mask(attention.mean(1), attention.shape[-2:], network.threshold)
    crops = mean_crop(images, attention, network.threshold)
    titles = [f"{label}\nsaid {said}" for label, said in zip(table["label"], table["prediction"])]
    pictures, cut = (some.permute(0, 2, 3, 1).clamp(0, 1).numpy() for some in (images, crops))
    figures.attention(pictures, maps.double().numpy(), masks.numpy(), cut, titles, path)
    return True
