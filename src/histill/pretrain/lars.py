"""The optimisers and the schedule of self-supervised pretraining; LARS is defined as in Barlow Twins' recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from histill.schedules import Schedule, cosine

__all__ = ["LARS", "adamw", "lars", "rising", "sgd"]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as Barlow Twins trains with it.

    For each tensor ``d = g + wd p``; ``d <- eta |p| / |d| d`` where neither norm is 0; ``m <- mu m + d``;
    ``p <- p - lr m``. A group with ``adapt`` False is neither decayed nor scaled: plain momentum.

    Kept implementations differ: timm's and lightly's divide by ``|g| + wd |p|``, not by ``|g + wd p|``, and add an
    epsilon; both tie the scaling to the weight decay.

    Args:
        params: parameters or groups.
        lr: learning rate.
        weight_decay: wd.
        momentum: mu.
        eta: the trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 1e-6,
        momentum: float = 0.9,
        eta: float = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta, "adapt": True}
        super().__init__(cast(Any, params), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; ``closure`` computes the gradients anew and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self._moved(p, group))
        return loss

    def _moved(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The tensor's momentum after this gradient."""
        assert p.grad is not None
        change = p.grad
        if group["adapt"]:
            change = change + group["weight_decay"] * p
            size, step = torch.linalg.vector_norm(p), torch.linalg.vector_norm(change)
            usable = (size > 0) & (step > 0)
            change = change * torch.where(usable, group["eta"] * size / step, 1.0)  # 0/0 is not chosen
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        momentum: Tensor = state["momentum"]
        return momentum.mul_(group["momentum"]).add_(change)


def lars(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    lr_vectors: float | None = None,
    weight_decay: float = 1e-6,
    momentum: float = 0.9,
    eta: float = 1e-3,
) -> LARS:
    """`LARS` over the parameters that train: weights adapted and decayed; vectors (biases, norms) not.

    Args:
        parameters: of whatever trains; frozen ones are left out.
        lr: learning rate of the weights at its peak (Barlow Twins: 0.2 times the batch size / 256).
        lr_vectors: of biases and norms (Barlow Twins: 0.0048 times the same); None: ``lr``.
        weight_decay: of the weights.
        momentum: of both.
        eta: the trust coefficient.
    """
    weights, vectors = _by_dimension(parameters)
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": vectors, "lr": lr if lr_vectors is None else lr_vectors, "weight_decay": 0.0, "adapt": False},
    ]
    some = [group for group in groups if group["params"]]
    return LARS(some, lr, weight_decay=weight_decay, momentum=momentum, eta=eta)


def adamw(
    parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW over the parameters that train; biases and norms are not decayed."""
    weights, vectors = _by_dimension(parameters)
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
    some = [group for group in groups if group["params"]]
    return torch.optim.AdamW(some, lr=lr, weight_decay=weight_decay, betas=betas)


def sgd(
    parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.9
) -> torch.optim.SGD:
    """SGD with momentum over the parameters that train; all are decayed."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.SGD(trained, lr=lr, weight_decay=weight_decay, momentum=momentum)


def rising(epochs: float, warm: float, *, start: float = 0.0, final: float = 0.0) -> Schedule:
    """Linear from ``start`` to 1 over ``warm`` epochs, then half a cosine down to ``final`` over what is left."""
    falling = cosine(max(epochs - warm, 1e-9), final=final)
    return lambda epoch: start + (1 - start) * epoch / warm if epoch < warm else falling(epoch - warm)


def _by_dimension(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that train: those of two and more dimensions, and the rest."""
    trained = [p for p in parameters if p.requires_grad]
    return [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
