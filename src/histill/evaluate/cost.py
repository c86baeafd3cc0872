"""The cost of a network: multiply-accumulates as THOP counts them."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["macs"]


@overload
def macs(network: nn.Module, size: int, *, breakdown: Literal[False] = False) -> int: ...
@overload
def macs(network: nn.Module, size: int, *, breakdown: Literal[True]) -> dict[str, int]: ...
def macs(network: nn.Module, size: int, *, breakdown: bool = False) -> int | dict[str, int]:
    """Multiply-accumulates for one image of ``size`` x ``size`` pixels in evaluation mode.

    Counted by THOP's rules, so that figures compare with the literature: layers that are modules count,
    functions and operators (attention's matrix products, activations, additions) do not. Convolution and
    linear layer: the weights that each output value sees, no bias. Batch, layer, group and instance norm: 4 per
    value, 2 without affine weights. Softmax: 3n - 1 per row of n. Average pooling: 1 per output value;
    adaptive: the window's size plus 1. Upsampling: 11 per output value where bilinear, 259 where bicubic.

    Nothing is computed: the network runs on PyTorch's meta device.

    Args:
        network: Any network of images ``(1, 3, size, size)``; left as it was.
        size: Side of the image in pixels.
        breakdown: Return the count of each kind of layer (``conv``, ``linear``, ``norm``, ``softmax``,
            ``pool``, ``upsample``) instead of their sum.
    """
    counted: Counter[str] = Counter()

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if rule := _rule(module, inputs[0], output):
            kind, number = rule
            counted[kind] += number

    modes = {module: module.training for module in network.modules()}
    handles = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, _COUNTED)]
    weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    on_meta = {name: tensor.detach().to("meta") for name, tensor in weights.items()}
    try:
        network.eval()
        with torch.no_grad():
            functional_call(network, on_meta, (torch.empty(1, 3, size, size, device="meta"),))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return dict(counted) if breakdown else sum(counted.values())


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_COUNTED = (*_CONVS, nn.Linear, *_NORMS, nn.Softmax, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample)


def _rule(module: nn.Module, x: Tensor, y: Tensor) -> tuple[str, int] | None:
    if isinstance(module, _CONVS):
        return "conv", y.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return "linear", y.numel() * module.in_features
    if isinstance(module, _NORMS):
        affine = module.elementwise_affine if isinstance(module, nn.LayerNorm) else module.affine
        return "norm", x.numel() * (4 if affine else 2)
    if isinstance(module, nn.Softmax):
        n = x.shape[-1 if module.dim is None else module.dim]
        return "softmax", x.numel() // n * (3 * n - 1)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        window = (x.shape[-2] // y.shape[-2]) * (x.shape[-1] // y.shape[-1])
        return "pool", y.numel() * (window + 1)
    if isinstance(module, nn.AvgPool2d):
        return "pool", y.numel()
    if isinstance(module, nn.Upsample):
        return {"bilinear": ("upsample", 11 * y.numel()), "bicubic": ("upsample", 259 * y.numel())}.get(module.mode)
    return None
