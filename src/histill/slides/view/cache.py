"""Least recently used things, in a bounded number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Lru"]

T = TypeVar("T")


class Lru(Generic[T]):
    """What was made is kept until ``limit_bytes`` are held, then the longest unused goes.

    Threads may ask at the same time. Two that miss the same thing at once both make it: that is rarer than waiting
    for each other would be slow.
    """

    def __init__(self, limit_bytes: int, size: Callable[[T], int]) -> None:
        self.limit_bytes, self._size = limit_bytes, size
        self.bytes = 0
        self._held: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is held under ``key``, or what ``make`` gives."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = make()
        with self._lock:
            if key not in self._held:
                self._held[key] = made
                self.bytes += self._size(made)
            while self.bytes > self.limit_bytes:
                self.bytes -= self._size(self._held.popitem(last=False)[1])
        return made
