"""Arrays of a stranger's HDF5 file: numbers that lie in the file itself, and no more than it can hold.

A file may point to others (external and soft links, external storage, virtual data sets), hold Python's pickles as
opaque text, and claim arrays of any size that were never written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py

from histill.errors import BadInput

__all__ = ["MOST_TIMES", "SMALL_BYTES", "array"]

MOST_TIMES = 100
"""How many times as large as its file an array may be; embeddings and images pack to no less than a tenth."""
SMALL_BYTES = 64 << 20
"""Up to here any ratio is harmless."""


def array(file: h5py.File, name: str, path: Path) -> Any:
    """The data set called ``name``, not read yet.

    Raises:
        BadInput: it is not there, lies elsewhere, holds no numbers, or more than its file can.
    """
    try:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
            raise BadInput(f"{path}: {name} is a link or a folder, not an array of the file's own")
        found = file[name]
        if found.is_virtual or found.external:
            raise BadInput(f"{path}: {name} lies in another file; such are not read")
        if found.dtype.kind not in "fiub":
            raise BadInput(f"{path}: {name} holds {found.dtype}, not numbers")
        size = path.stat().st_size
        if found.nbytes > max(SMALL_BYTES, MOST_TIMES * size):
            raise BadInput(f"{path}: {name} claims {found.nbytes:,} bytes in a file of {size:,}")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: {name} cannot be read ({error})") from None
    return found
