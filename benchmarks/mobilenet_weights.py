"""ImageNet weights of MobileNet as published for the Edge TPU -> a .safetensors file for timm's network of that name.

    python benchmarks/mobilenet_weights.py WEIGHTS.npz mobilenetv2_100 IMAGES OUT.safetensors

The published network is quantised, has its batch norms folded into the convolutions, and wants pixels in [-1, 1].
Fine-tuning wants batch norms that do something and takes timm's normalisation. So: the weights are dequantised, the
normalisation is folded into the first layer, and each batch norm gets the mean and variance that its input has on
IMAGES (a folder), with a scale and a shift that undo them: the network computes what it did, and can be trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from histill.data.decode import EXTENSIONS, load
from histill.models.adapter import create


def published(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each convolution, in running order."""
    with np.load(path, allow_pickle=False) as file:
        count = sum(name.endswith("_q") for name in file.files)
        layers = []
        for k in range(count):
            scale = np.asarray(file[f"w{k:02}_scale"], dtype=np.float32).reshape(-1, 1, 1, 1)
            zero = np.asarray(file[f"w{k:02}_zero"], dtype=np.float32).reshape(-1, 1, 1, 1)
            weight = (file[f"w{k:02}_q"].astype(np.float32) - zero) * scale
            layers.append((torch.from_numpy(weight), torch.from_numpy(file[f"b{k:02}"].astype(np.float32))))
    return layers


def unfold(network: nn.Module, layers: list[tuple[Tensor, Tensor]], images: Tensor) -> None:
    """Give timm's network the folded weights, and its batch norms statistics that leave the function as it was."""
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(convs) == len(norms) <= len(layers), (len(convs), len(norms), len(layers))
    std, mean = (torch.tensor(network.pretrained_cfg[k]) for k in ("std", "mean"))
    seen: dict[nn.BatchNorm2d, tuple[Tensor, Tensor]] = {}
    for number, (conv, norm, (weight, bias)) in enumerate(zip(convs, norms, layers, strict=False)):
        if number == 0:
            bias = bias + (weight * ((mean - 0.5) / 0.5).view(1, 3, 1, 1)).sum((1, 2, 3))
            weight = weight * (std / 0.5).view(1, 3, 1, 1)
        assert conv.weight.shape == weight.shape, (number, conv.weight.shape, weight.shape)
        conv.weight.data.copy_(weight)
        norm.weight.data.fill_((1 + norm.eps) ** 0.5)
        norm.bias.data.copy_(bias)
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        norm.register_forward_hook(
            lambda m, _, out: seen.__setitem__(m, (out.mean((0, 2, 3)), out.var((0, 2, 3)))) if m not in seen else None
        )
    with torch.no_grad():
        network.eval()((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    for norm in norms:
        centre, spread = seen[norm]
        spread = spread.clamp(min=1e-3)
        norm.running_mean.copy_(centre - norm.bias.data)
        norm.running_var.copy_(spread)
        norm.weight.data.copy_((spread + norm.eps).sqrt())
        norm.bias.data.copy_(centre)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("weights", "name", "images", "out"):
        parser.add_argument(name, type=str if name == "name" else Path)
    arguments = parser.parse_args()
    network = create(arguments.name, 1001, pretrained=False)
    paths = sorted(p for p in arguments.images.rglob("*") if p.suffix.lower() in EXTENSIONS)
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(128, len(paths))).astype(int)]
    images = torch.stack([torch.from_numpy(load(path, 128)) for path in chosen])
    layers = published(arguments.weights)
    unfold(network, layers, images)
    if len(layers) > len([m for m in network.modules() if isinstance(m, nn.Conv2d)]):
        network.classifier.weight.data.copy_(layers[-1][0].flatten(1))
        network.classifier.bias.data.copy_(layers[-1][1])
    save_file(network.state_dict(), arguments.out)
    print(f"{arguments.out}: {arguments.name}, batch norms set on {len(chosen)} images")


if __name__ == "__main__":
    main()
