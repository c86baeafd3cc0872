"""Batches that do not fit into memory: cut in halves until they do, said once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from numpy.typing import NDArray
from torch import nn

from histill.errors import Failed, out_of_memory
from histill.progress import notice

__all__ = ["Buffers", "Fits", "fits_of", "halved"]

T = TypeVar("T")


class Fits:
    """How many images are looked at together: all that come until memory runs out, from then on half as many.

    Args:
        what: the work, as the notice names it.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.most: int | None = None

    def __call__(self, look: Callable[[NDArray[Any]], T], images: NDArray[Any]) -> list[T]:
        """What ``look`` says of the images, piece by piece; one piece where they fit.

        Raises:
            Failed: not even one image fits.
        """
        found: list[T] = []
        start = 0
        while start < len(images) or not found:
            part = images[start : start + (self.most or len(images))]
            try:
                found.append(look(part))
                start += len(part)
                continue
            except Exception as error:
                if not out_of_memory(error):
                    raise
            # Only here, where the error and the tensors of its frames are gone, can their memory be had again.
            self._halve(len(part))
        return found

    def _halve(self, tried: int) -> None:
        if tried < 2:
            raise Failed(f"{self.what}: out of memory with a single image; take a smaller image size or network")
        if self.most is None:
            notice(f"{self.what}: out of memory with {tried} images at once; going on with fewer")
        self.most = tried // 2
        _release()


_KNOWN: WeakKeyDictionary[Any, Fits] = WeakKeyDictionary()


def fits_of(network: Any, what: str) -> Fits:
    """The `Fits` of a network that is asked again and again, so that it is halved and said only once."""
    return _KNOWN.setdefault(network, Fits(what))


class Buffers:
    """What a forward changes beside gradients, such as the means of batch norm, kept for a step that begins anew."""

    def __init__(self, network: nn.Module) -> None:
        self.now = list(network.buffers())
        self.kept = [buffer.clone() for buffer in self.now]

    def keep(self) -> None:
        """Before a step."""
        if self.now:
            torch._foreach_copy_(self.kept, self.now)

    def restore(self) -> None:
        """As they were."""
        if self.now:
            torch._foreach_copy_(self.now, self.kept)


def halved(pieces: int, *, images: int, parts: int, processes: int) -> int:
    """How many pieces the parts of a training batch are cut into, after it ran out of memory in ``pieces``.

    Args:
        pieces: of each part.
        images: of the batch.
        parts: by process and accumulation, times the pieces that this batch was cut into.
        processes: how many train together.

    Raises:
        Failed: not even one image fits, or other processes wait in the middle of the step.
    """
    if processes > 1:
        raise Failed("out of memory in one of several processes; take a smaller --batch-size or more --accumulate")
    if parts >= images:
        raise Failed("out of memory with a single image; take a smaller --image-size or network")
    if pieces == 1:
        notice(f"out of memory with {math.ceil(images / parts)} images at once; batches are cut into smaller pieces")
    _release()
    return 2 * pieces


def _release() -> None:
    """Give back to the device what is cached for tensors that are gone."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
