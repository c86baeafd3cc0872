"""Self-supervised objectives with their heads: Barlow Twins, SimCLR, MoCo v2 and MAE.

Each is ``(student, teacher, batch) -> Terms`` with weights of its own; the teacher's outputs are not looked at. The
student's ``pooled`` features are projected by a head that is dropped afterwards. Losses and heads are lightly's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import histill.models._torchvision  # noqa: F401 (before lightly)
from histill.errors import BadInput, require
from histill.losses._shared import precise
from histill.types import Batch, Outputs, Terms

__all__ = ["MAE", "BarlowTwins", "MoCo", "SimCLR", "two_views"]


def two_views(batch: Batch, teacher: Outputs) -> Tensor:
    """What the student is shown: ``(2B, 3, H, W)``, the batch's views and then other views of the same images."""
    return torch.cat([batch.images, _other(batch)])


def _other(batch: Batch) -> Tensor:
    """``(B, 3, H, W)``: an independent view of each image."""
    return batch.render(batch.images.shape[-1], twin=1)


class BarlowTwins(nn.Module):
    """Barlow Twins (Zbontar et al. 2021, Eq. 1): two views agree feature by feature, and features do not repeat.

    ``L = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2``, C the correlation between the two views'
    projections over the batch. Shown `two_views`; each view goes through the head on its own.

    Args:
        width: of the student's pooled features.
        head_width: of all three layers of the head; 8192 as published.
        redundancy: lambda; 0.0051 as published.
    """

    def __init__(self, width: int, *, head_width: int = 8192, redundancy: float = 0.0051) -> None:
        super().__init__()
        self.head = _heads().BarlowTwinsProjectionHead(width, head_width, head_width)
        self.loss = _losses().BarlowTwinsLoss(redundancy)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        first, second = _halves(student["pooled"], batch)
        return {"barlow_twins": (1.0, self.compare(self.head(first), self.head(second)))}

    @precise
    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """``(B, D)`` projections of the two views -> scalar."""
        return self.loss(first, second)  # type: ignore[no-any-return]


class SimCLR(nn.Module):
    """SimCLR (Chen et al. 2020, Eq. 1): each view finds the other one of its image among all 2B - 1.

    ``L = -mean_i log exp(cos(z_i, z_j(i)) / T) / sum_{k != i} exp(cos(z_i, z_k) / T)``. Shown `two_views`.

    Args:
        width: of the student's pooled features, and of the head's hidden layer.
        head_width: of the projections; 128 as published.
        temperature: T; 0.1 as published for ImageNet, 0.5 for CIFAR-10's small images.
    """

    def __init__(self, width: int, *, head_width: int = 128, temperature: float = 0.1) -> None:
        super().__init__()
        self.head = _heads().SimCLRProjectionHead(width, width, head_width)
        self.loss = _losses().NTXentLoss(temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        first, second = _halves(self.head(student["pooled"]), batch)
        return {"simclr": (1.0, self.compare(first, second))}

    @precise
    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """``(B, D)`` projections of the two views -> scalar."""
        return self.loss(first, second)  # type: ignore[no-any-return]


class MoCo(nn.Module):
    """MoCo v2 (He et al. 2020, Eq. 1; Chen et al. 2020): a view finds its twin among the keys of earlier batches.

    ``L = -mean log exp(q k+ / T) / (exp(q k+ / T) + sum_{k in queue} exp(q k / T))``, all of unit length. Keys come
    from a copy of student and head that follows them, ``p_k <- m p_k + (1 - m) p_q`` before each batch (Eq. 2), and
    enter the queue after it. Copy and queue are part of the checkpoint; neither is trained.

    The student is shown the batch's views; this draws the other ones and shows them to the copy. Published MoCo
    shuffles the keys' batch among GPUs, so that batch norm does not give twins away; here it is one batch.

    Args:
        width: of the student's pooled features, and of the head's hidden layer.
        head_width: of queries and keys; 128 as published.
        queue: how many keys are remembered; 65536 as published, for 1.28 million images.
        temperature: T; 0.2 as published.
        momentum: m; 0.999 as published.
    """

    def __init__(
        self,
        width: int,
        *,
        head_width: int = 128,
        queue: int = 65536,
        temperature: float = 0.2,
        momentum: float = 0.999,
    ) -> None:
        super().__init__()
        self.head = _heads().MoCoProjectionHead(width, width, head_width)
        self.key_head = _frozen_copy(self.head)
        self.key_student: nn.Module | None = None
        self._student: tuple[nn.Module, ...] = ()
        self.loss = _losses().NTXentLoss(temperature, memory_bank_size=(queue, head_width))
        bank = self.loss.memory_bank
        for name, value in list(bank.named_buffers()):
            bank.register_buffer(name, value)  # lightly leaves them out of checkpoints
        self.momentum = momentum

    def follow(self, student: nn.Module) -> None:
        """Make the copy of ``student`` that keys come from, to be moved after it in every batch.

        The training loop calls this once, with the network that it trains.
        """
        self.key_student = _frozen_copy(student)
        self._student = (student,)  # a tuple, so that it is not a part of this module too

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        if self.key_student is None:
            raise BadInput("MoCo follows the student, and was not shown it: call objective.follow(student) first")
        if self.training:
            move = _utils().update_momentum
            move(self._student[0], self.key_student, self.momentum)
            move(self.head, self.key_head, self.momentum)
        with torch.no_grad():
            key = self.key_head(self.key_student(_other(batch))["pooled"])
        return {"moco": (1.0, self.compare(self.head(student["pooled"]), key))}

    @precise
    def compare(self, query: Tensor, key: Tensor) -> Tensor:
        """``(B, D)`` queries and their keys -> scalar; the keys then join the queue."""
        return self.loss(query, key)  # type: ignore[no-any-return]


class MAE(nn.Module):
    """Masked autoencoder (He et al. 2022): a small transformer draws the patches that the student did not see.

    ``L = mean |pixels of hidden patches - prediction|^2``, each patch's pixels normalised to mean 0 and variance 1.
    The student is a `histill.models.masked.MaskedTimm`.

    Args:
        width: of the student's tokens.
        patches: N, the number of patches of an image.
        patch_size: their side in pixels.
        prefix: the number of tokens before those of the patches.
        head_width: of the decoder; 512 as published.
        depth: of the decoder in blocks; 8 as published.
        heads: attention heads of the decoder; 16 as published.
    """

    def __init__(
        self,
        width: int,
        patches: int,
        patch_size: int,
        *,
        prefix: int = 1,
        head_width: int = 512,
        depth: int = 8,
        heads: int = 16,
    ) -> None:
        super().__init__()
        if head_width % heads or head_width % 4:
            raise BadInput(f"head_width={head_width}: a multiple of {max(heads, 4)}, the decoder's attention heads")
        self.prefix, self.length = prefix, prefix + patches
        self.embed = nn.Linear(width, head_width)
        self.decoder = _heads().MaskedVisionTransformerDecoderTIMM(
            patches, head_width, depth, heads, num_prefix_tokens=prefix
        )
        self.predict = nn.Linear(head_width, 3 * patch_size**2)
        for layer in (self.embed, self.predict):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        at, put = _utils().get_at_index, _utils().set_at_index
        visible = self.embed(student["visible"])
        tokens = self.decoder.mask_token.to(visible.dtype).expand(len(visible), self.length, -1)
        decoded = self.decoder(put(tokens, student["kept"], visible))
        predicted = self.predict(at(decoded, student["hidden"]))
        return {"mae": (1.0, self.compare(predicted, at(student["patches"], student["hidden"] - self.prefix)))}

    @precise
    def compare(self, predicted: Tensor, patches: Tensor) -> Tensor:
        """``(B, M, 3pp)`` predictions of hidden patches and their pixels -> scalar."""
        return F.mse_loss(predicted, _utils().normalize_mean_var(patches))


def _halves(both: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    if len(both) != 2 * len(batch.images):
        raise BadInput(f"{len(both)} outputs of {len(batch.images)} images: give Experiment.inputs=two_views")
    first, second = both.chunk(2)
    return first, second


def _frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


def _losses() -> Any:
    return require("lightly.loss", "pretrain")


def _heads() -> Any:
    return require("lightly.models.modules", "pretrain")


def _utils() -> Any:
    return require("lightly.models.utils", "pretrain")
