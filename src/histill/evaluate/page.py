"""One HTML page that answers first, stands alone, and shows everything it was given as text.

Pictures are embedded, there is no script and no address, and every string is escaped: class and file names
come from users. A page holds no clock, so the same figures give the same bytes.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import jinja2
from PIL import Image, UnidentifiedImageError

from histill.errors import BadInput
from histill.files import write_text

__all__ = ["Card", "Cards", "Picture", "Section", "Table", "Text", "write_report"]

CSS_DPI = 96


@dataclass(frozen=True)
class Text:
    """Paragraphs, or with ``notice`` a list of things to know that stands out."""

    lines: Sequence[str]
    heading: str = ""
    notice: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells; a column whose cells are all numbers is set as numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    heading: str = ""
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file and its caption, shown at the size that the file names; small neighbours share a row.

    The first of several neighbours gives their heading.
    """

    path: Path
    caption: str
    heading: str = ""


@dataclass(frozen=True)
class Card:
    """One key number."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Cards:
    """Three or four key numbers side by side."""

    cards: Sequence[Card]
    heading: str = ""


Section: TypeAlias = Text | Table | Picture | Cards


def write_report(path: Path, *, title: str, answer: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Write one self-contained page and return its path.

    Args:
        path: the HTML file.
        title: the heading.
        answer: what was found, in a sentence or two.
        sections: in the order of the page; put `Cards` first.
        subtitle: a line above the title.

    Raises:
        BadInput: a picture is not there or is not a PNG, or a row has too many or too few cells.
    """
    path = Path(path)
    for section in sections:
        if isinstance(section, Table) and any(len(row) != len(section.columns) for row in section.rows):
            raise BadInput(f"table {section.heading!r}: every row needs {len(section.columns)} cells")
    tidy = [
        replace(s, rows=[[_cell(c) for c in row] for row in s.rows]) if isinstance(s, Table) else s for s in sections
    ]
    groups = [(kind, list(parts)) for kind, parts in itertools.groupby(tidy, key=lambda s: type(s).__name__)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("histill.evaluate"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(embedded=_embedded, numeric=_numeric)
    page = environment.get_template("report.html").render(title=title, subtitle=subtitle, answer=answer, groups=groups)
    write_text(path, page)
    return path


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers only."""
    cells = zip(*table.rows) if table.rows else [()] * len(table.columns)
    return [bool(column) and all(re.match(r"[+−-]?\d|–$|not defined$", str(c)) for c in column) for column in cells]


def _embedded(picture: Picture) -> tuple[str, int, str]:
    """The file in base64, its width in CSS pixels (96 to the inch), and its caption."""
    try:
        data = Path(picture.path).read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width = image.width * CSS_DPI / image.info.get("dpi", (CSS_DPI,))[0]
    except FileNotFoundError:
        raise BadInput(f"report: there is no picture {picture.path}") from None
    except UnidentifiedImageError:
        raise BadInput(f"report: {picture.path} is not a PNG") from None
    return base64.b64encode(data).decode(), round(width), picture.caption
