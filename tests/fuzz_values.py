"""Bytes and JSON bent at random, tables and outlines that are almost right: what `fuzz_targets` gives to readers."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

__all__ = ["ANYTHING", "OUTLINES", "TABLES", "Values", "bend", "bent", "changes", "swapped"]

Values = st.SearchStrategy[Any]
Bent = list[tuple[float, str, bytes]]

_ODD = [
    "",
    "0",
    "-1",
    "1e999",
    "nan",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\x1b[31m",
    "é",
    "\ud800",
    "=1+1",
    "<b>",
    "x" * 99,
]
_ODD += ["http://a/b", '"', ",", "\n", "\r\n", "\\", "C:\\x", "~", "%2e%2e", "\ufeff", "\u202e", "1" * 5000]
_BYTES = [b"", b"\0", b"\x01", b"\x7f", b"\x80", b"\xff", b"\0" * 4, b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff"]
_BYTES += [
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\x10\0\0\0",
    b"\0\0\1\0",
    b"\x00\x10",
    b"{",
    b"[",
    b'"',
    b",",
    b"-",
    b"9" * 20,
]


def bent(seeds: int, most: int = 8) -> Values:
    """``(seed, edits)``: which of the ``seeds``, and changes at relative places of its bytes."""
    edit = st.tuples(
        st.floats(0, 1, width=32),
        st.sampled_from(["set", "insert", "drop", "cut", "twice"]),
        st.one_of(st.sampled_from(_BYTES), st.binary(max_size=8)),
    )
    return st.tuples(st.integers(0, seeds - 1), st.lists(edit, max_size=most))


def bend(data: bytes, edits: Bent, within: tuple[int, int] | None = None) -> bytes:
    """The bytes after the edits, which lie ``within`` a part of them."""
    out = bytearray(data)
    first, last = within or (0, len(out))
    for place, how, new in edits:
        at = min(len(out), first + int(place * max(0, last - first)))
        if how == "set":
            out[at : at + len(new)] = new
        elif how == "insert":
            out[at:at] = new
        elif how == "drop":
            del out[at : at + max(1, len(new))]
        elif how == "cut" and len(new) > 4:  # seldom: little is left of it
            del out[at:]
        elif how == "twice":
            out[at:at] = out[at : at + 16 * max(1, len(new))]
    return bytes(out)


def _json_values() -> Values:
    numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.integers(-3, 300))
    leaf = st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(_ODD[:-1]), st.text(max_size=8))
    return st.recursive(
        leaf,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
        max_leaves=8,
    )


ANYTHING = _json_values()


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in inside for place in _places(each, (*at, key)))]


def swapped(text: str, changes: list[tuple[float, Any]]) -> str:
    """JSON in which some values are others, or gone (``...``)."""
    value = json.loads(text)
    for where, new in changes:
        places = _places(value)
        place = places[min(len(places) - 1, int(where * len(places)))]
        if not place:
            continue
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        if new is ...:
            del holder[place[-1]]
        else:
            holder[place[-1]] = new
    return json.dumps(value)


def changes(most: int = 3) -> Values:
    return st.lists(st.tuples(st.floats(0, 1, width=32), st.one_of(ANYTHING, st.just(...))), max_size=most)


_NAMES = ["path", "label", "patient", "split", "mask", "site", "slide", "mpp", "content", "more", "PATH"]
_FIELDS = st.one_of(
    st.sampled_from(["a/0.png", "a/1.png", "b/2.png", "b/3.png", "a", "b", "train", "val", "test", "p1", "p2", "0.5"]),
    st.sampled_from(_ODD),
    st.text(max_size=12),
)
TABLES = st.tuples(
    st.lists(st.sampled_from(_NAMES), min_size=1, max_size=8),
    st.lists(st.lists(_FIELDS, max_size=8), max_size=6),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
)
_COORDINATE = st.one_of(
    st.integers(-50, 500),
    st.floats(-50, 500, width=32),
    st.floats(),
    st.sampled_from([1e9, 1e308, 2**80, None, "1", True]),
)
_POINT = st.one_of(
    st.lists(st.integers(0, 64), min_size=2, max_size=2), st.lists(_COORDINATE, min_size=1, max_size=3), ANYTHING
)
_RING = st.one_of(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), min_size=3, max_size=24),
    st.lists(_POINT, max_size=8),
    ANYTHING,
)
_POLYGON = st.fixed_dictionaries({"type": st.just("Polygon"), "coordinates": st.lists(_RING, max_size=4)})
_MULTI = st.fixed_dictionaries(
    {"type": st.just("MultiPolygon"), "coordinates": st.lists(st.lists(_RING, max_size=3), max_size=4)}
)
_GEOMETRY = st.one_of(
    _POLYGON,
    _MULTI,
    st.fixed_dictionaries(
        {
            "type": st.just("GeometryCollection"),
            "geometries": st.lists(st.one_of(_POLYGON, _MULTI, ANYTHING), max_size=3),
        }
    ),
    st.fixed_dictionaries({"type": st.sampled_from(["Point", "LineString", "Circle", ""]), "coordinates": ANYTHING}),
    ANYTHING,
)
_FEATURE = st.fixed_dictionaries(
    {"type": st.just("Feature"), "geometry": _GEOMETRY},
    optional={
        "properties": st.one_of(
            ANYTHING,
            st.fixed_dictionaries({"classification": st.fixed_dictionaries({"name": ANYTHING}), "name": ANYTHING}),
        )
    },
)
_COLLECTION = st.fixed_dictionaries(
    {"type": st.just("FeatureCollection"), "features": st.one_of(st.lists(_FEATURE, max_size=4), ANYTHING)}
)
OUTLINES = st.one_of(_COLLECTION, _FEATURE, _GEOMETRY, st.lists(_FEATURE, max_size=3))
