"""Many comparisons: how many a table makes, and which differences remain when that is allowed for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["comparisons", "holm"]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down p values (1979), in the order given.

    Where nothing differs, any of them is below 0.05 in 5 % of cases at most, however the tests hang together.
    """
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(np.asarray(p, float)[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def comparisons(p: Mapping[str, float | None], of: str = "") -> str:
    """A line under a table of differences, from their p values by name; those without one are counted all the same.

    ``of`` says of what, such as the metric.
    """
    what = f" of {of}" if of else ""
    if len(p) < 2:
        return f"One comparison{what}." if p else f"No comparison{what}."
    known = {name: value for name, value in p.items() if value is not None}
    left = [name for name, value in zip(known, holm(list(known.values())), strict=True) if value < 0.05]
    remain = "none differs" if not left else f"{', '.join(left)} {'differ' if len(left) > 1 else 'differs'}"
    return (
        f"{len(p)} comparisons{what}; the intervals are not corrected for their number, and one in twenty leaves out "
        f"zero where there is nothing. With Holm's correction {remain} from zero (p < 0.05)."
    )
