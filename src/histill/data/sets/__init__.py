"""Published data sets by name: where they are, what they hold, and a reader of each one's layout."""

from __future__ import annotations

from difflib import get_close_matches

from histill.data.sets import (
    bach,
    bach_wsi,
    breakhis,
    dsb2018,
    glas,
    ham10000,
    isic,
    lc25000,
    lymphoma,
    medmnist,
    mhist,
    monuseg,
    nct_crc,
    pcam,
    sipakmed,
    tnbc,
)
from histill.data.sets._manifest import chosen, manifest, read
from histill.data.sets._page import listing, page
from histill.data.sets._record import DataSet, File, Row
from histill.errors import BadInput

__all__ = ["SETS", "DataSet", "File", "Row", "chosen", "get", "listing", "manifest", "page", "read"]

_MODULES = (
    bach,
    bach_wsi,
    nct_crc,
    breakhis,
    lymphoma,
    glas,
    pcam,
    mhist,
    lc25000,
    sipakmed,
    isic,
    ham10000,
    monuseg,
    tnbc,
    dsb2018,
    medmnist,
)
SETS: dict[str, DataSet] = {data.name: data for module in _MODULES for data in module.SETS}
"""Every data set by name."""


def get(name: str) -> DataSet:
    """The data set called ``name``.

    Raises:
        BadInput: there is none; the nearest names are said.
    """
    if name in SETS:
        return SETS[name]
    near = get_close_matches(name.lower().replace("_", "-"), SETS, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "histill data fetch lists them"
    raise BadInput(f"no data set is called {name!r}; {hint}")
