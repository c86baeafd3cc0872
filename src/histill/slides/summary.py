"""What a call over slides leaves besides their folders: ``summary.json``, and its lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from histill.slides.engine import Model
from histill.slides.lesions import froc

__all__ = ["summary_lines", "summary_of"]


def summary_of(
    done: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str], model: Model, seconds: float
) -> dict[str, Any]:
    """What ``summary.json`` holds.

    Args:
        done: by stem what ``slide.json`` holds.
        failed: by stem what was wrong.
        model: which looked.
        seconds: that the call took.
    """
    kept = ("call", "lesions", "tiles", "mpp", "dimensions", "timing", "agreement", "exits", "layers")
    tiles = sum(said["tiles"]["looked_at"] for said in done.values())
    found: dict[str, Any] = {
        "model": {"name": model.name, "digest": model.digest, "classes": list(model.classes)},
        "slides": {stem: {name: said[name] for name in kept if name in said} for stem, said in done.items()},
        "failed": dict(failed),
        "timing": {"wall_s": seconds, "tiles": tiles, "tiles_per_second": tiles / seconds if seconds else None},
    }
    left = Counter[str]()
    for said in done.values():
        left.update(said.get("exits", {}))
    if left:
        found["exits"] = {k: count / left.total() for k, count in sorted(left.items())}
    hits = [said["agreement"]["hits"] for said in done.values() if said.get("agreement")]
    if hits:
        scored = [([-np.inf if s is None else s for s in hit["lesions"]], hit["false_positives"]) for hit in hits]
        found["froc"] = froc(scored)
    return found


def summary_lines(summary: Mapping[str, Any], out: str | Path) -> str:
    """What ``summary.json`` holds, a line per slide, for people."""
    lines = []
    for stem, said in summary["slides"].items():
        call, lesions = said["call"], said["lesions"]
        if call["label"] is None:
            lines.append(f"{stem}: no tissue")
            continue
        area, noun = sum(lesions["area_um2"].values()) / 1e6, "lesion" if lesions["count"] == 1 else "lesions"
        line = f"{stem}: {call['label']} ({call['probability']:.2f}), {lesions['count']} {noun} of {area:.2f} mm2"
        judged = said.get("agreement")
        if judged and judged["dice"] is not None:
            line += f", Dice {judged['dice']:.3f}"
        lines.append(f"{line}: {Path(out) / stem / said['layers']['page']}")
    if "exits" in summary:
        shares = ", ".join(f"{k}: {100 * share:.0f} %" for k, share in summary["exits"].items())
        lines.append(f"tiles left at exit {shares}")
    return "\n".join(lines)
