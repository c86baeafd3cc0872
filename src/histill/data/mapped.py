"""Arrays that lie in a cache folder, mapped into memory and never taken for whole where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from histill.errors import BadInput

__all__ = ["mapped"]


def mapped(path: Path, mode: Literal["r", "r+"] = "r") -> NDArray[Any]:
    """The array of a ``.npy`` file, mapped for reading or for writing too.

    Raises:
        BadInput: the file is missing, cut short or no array; its folder is one that can be made again.
    """
    try:
        # For writing NumPy would lengthen a file that was cut short, with zeros that nobody computed.
        found: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        return found if mode == "r" else np.lib.format.open_memmap(path, mode=mode)
    except (FileNotFoundError, ValueError, EOFError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise BadInput(f"{path} is damaged ({why}); remove {path.parent}, it is made again") from None
