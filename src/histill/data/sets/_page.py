"""The data sets as a list for a terminal, and as the table of the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from histill.data.sets._record import DataSet

__all__ = ["listing", "page"]


def listing(sets: Iterable[DataSet]) -> str:
    """One aligned line per data set."""
    lines = [("name", "images", "what is learnt", "licence", "access", "what it is")]
    for data in sets:
        learnt = (
            f"{len(data.classes)} classes" if data.task == "labels" else f"{data.task}, {len(data.classes)} classes"
        )
        access = "by hand" if data.access else "open"
        lines.append((data.name, f"{data.total:,}", learnt, data.licence.split(";")[0], access, data.what))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join(
            (*(cell.rjust(w) if i == 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))), line[5])
        )
        for line in lines
    )


def page(sets: Iterable[DataSet]) -> str:
    """The table of ``docs/datasets.md``."""
    lines = [
        "| name | what it is, and for what | images and split | patient | pitfalls | files |",
        "|---|---|---|---|---|---|",
    ]
    for _, same in groupby(sets, key=lambda data: (data.citation, data.classes, tuple(data.images.items()))):
        data, *others = same
        what = data.what.rpartition("; ")[0] if others else data.what  # the size is in the name
        learnt = f"{len(data.classes)} classes" if data.task == "labels" else f"{data.task}: {', '.join(data.classes)}"
        cells = (
            ", ".join([f"[`{data.name}`]({data.homepage})", *(f"`{other.name}`" for other in others)]),
            f"{what}; {learnt}. For {data.use}. {data.citation}.",
            f"{_counts(data)}. {_sentence(data.split)}{_eva(data)}",
            _sentence(data.patient),
            data.pitfalls,
            f"{_sentence(data.licence)} {_access(data)}",
        )
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _counts(data: DataSet) -> str:
    return ", ".join(f"{split} {count:,}".strip() for split, count in data.images.items())


def _eva(data: DataSet) -> str:
    return f" --by eva: {_counts(data.eva)}; {data.eva.split}." if data.eva else ""


def _access(data: DataSet) -> str:
    where = f"By hand: {data.access}." if data.access else "Open."
    known = sum(file.checksum is not None for file in data.files)
    return f"{where} Checksums: {data.checksums}" + (f" ({known} of {len(data.files)} files)." if known else ".")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
