"""Outlines on a slide as QuPath reads them, and outlines that a user drew there.

QuPath takes a FeatureCollection of valid polygons in level-0 pixels: rings closed, holes as inner rings, an ``id`` that
is a UUID, ``properties`` with ``objectType``, ``classification`` and ``measurements``
(https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html). What JTS refuses, QuPath does not
load, so everything is mended by GEOS, which follows the same rules, before it is written.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from histill.errors import BadInput, require
from histill.files import atomic, parse_json
from histill.progress import notice

if TYPE_CHECKING:
    from shapely import MultiPolygon, Polygon

__all__ = [
    "FEW",
    "LARGE",
    "MOST_BYTES",
    "Box",
    "Color",
    "Feature",
    "Kind",
    "Shape",
    "mend",
    "read_geojson",
    "write_geojson",
]

Box: TypeAlias = tuple[float, float, float, float]
"""``x, y, width, height`` in level-0 pixels."""
Shape: TypeAlias = "Box | Polygon | MultiPolygon"
Color: TypeAlias = tuple[int, int, int]
Kind: TypeAlias = Literal["lesion", "tile", "cell"]

FEW = 500
"""More lesions than this are written as detections, which QuPath draws quickly and cannot edit, not as annotations."""
LARGE = 20_000
"""More features than this are gzipped, which QuPath reads as well."""

_DECIMALS = 2
MOST_BYTES = 256 << 20  # unpacked; the objects that JSON becomes take up to twenty times as much
_MOST_MENDED = 200_000  # points
_MOST_CROSSINGS = 100_000  # of a file's outlines with themselves; they can grow with the square of the points
_MOST_TEXT = 1000  # characters of a class or a name
_SPACE = uuid.UUID("8a3d1c0e-9c0b-5d83-b1f5-6a2f5b6f0c11")


@dataclass(frozen=True)
class Feature:
    """One outline.

    Attributes:
        shape: in level-0 pixels; tiles are boxes.
        label: its class; empty for none.
        measurements: numbers by name; what is not finite is left out of the file.
        name: what QuPath shows beside it.
    """

    shape: Shape
    label: str = ""
    measurements: Mapping[str, float] = field(default_factory=dict)
    name: str = ""


def write_geojson(
    path: str | Path,
    features: Iterable[Feature],
    *,
    slide: str,
    kind: Kind = "lesion",
    colors: Mapping[str, Color] | None = None,
) -> Path:
    """Write outlines as QuPath loads them, one after the other, atomically.

    Args:
        path: a ``.geojson`` file; more than `LARGE` features are written to ``.geojson.gz`` beside it instead, as are
            any where ``path`` ends so. What the other of the two held is removed.
        features: in the order of the file. What has no area after rounding to a hundredth of a pixel is left out, with
            a notice.
        slide: digest of the slide; with kind, class and place it makes the ids, so the same outlines have the same.
        kind: ``lesion`` becomes an annotation, or a detection where there are more than `FEW`; ``tile`` and ``cell``
            are QuPath's own.
        colors: RGB of each class, 0 to 255.

    Returns:
        The file that was written.

    Raises:
        BadInput: a coordinate that is not finite.
    """
    path, stream = Path(path), iter(features)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    zipped = plain.with_name(plain.name + ".gz")
    first = list(itertools.islice(stream, LARGE + 1))
    target = zipped if len(first) > LARGE or path.suffix == ".gz" else plain
    type_ = {"lesion": "annotation" if len(first) <= FEW else "detection"}.get(kind, kind)
    lost, seen = 0, set[uuid.UUID]()
    with atomic(target) as temporary, _open(temporary, target.suffix == ".gz") as file:
        file.write(b'{"type":"FeatureCollection","features":[')
        comma = b"\n"
        for feature in itertools.chain(first, stream):
            geometry = _geometry(feature.shape)
            if geometry is None:
                lost += 1
                continue
            place = f"{slide}/{kind}/{feature.label}/{json.dumps(geometry)}"
            id_ = uuid.uuid5(_SPACE, place)
            while id_ in seen:  # the same outline twice
                id_ = uuid.uuid5(id_, place)
            seen.add(id_)
            written = {
                "type": "Feature",
                "id": str(id_),
                "geometry": geometry,
                "properties": _properties(feature, type_, colors or {}),
            }
            file.write(comma + json.dumps(written, ensure_ascii=False, allow_nan=False).encode())
            comma = b",\n"
        file.write(b"\n]}\n")
    (plain if target == zipped else zipped).unlink(missing_ok=True)
    if lost:
        notice(f"{target.name}: {lost} outlines without an area were left out")
    return target


@contextmanager
def _open(path: Path, zipped: bool) -> Iterator[IO[bytes]]:
    with path.open("wb") as raw:
        if not zipped:
            yield raw
            return
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:  # no name and no clock, so the same bytes
            yield file  # type: ignore[misc]


def _properties(feature: Feature, type_: str, colors: Mapping[str, Color]) -> dict[str, Any]:
    said: dict[str, Any] = {"objectType": type_}
    if feature.name:
        said["name"] = feature.name
    if feature.label:
        said["classification"] = {"name": feature.label, "color": list(colors.get(feature.label, (200, 200, 200)))}
    numbers = {name: float(value) for name, value in feature.measurements.items() if math.isfinite(value)}
    return said | {"measurements": numbers}


def _geometry(shape: Shape) -> dict[str, Any] | None:
    """What GeoJSON says of a shape; None where nothing is left of it."""
    if isinstance(shape, tuple):
        x, y, width, height = shape
        if not all(map(math.isfinite, shape)):
            raise BadInput(f"a tile at {x}, {y} of {width} by {height} pixels is nowhere")
        left, top, right, bottom = map(_number, (x, y, x + width, y + height))
        if left >= right or top >= bottom:
            return None
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        return {"type": "Polygon", "coordinates": [ring]}
    mended = mend(shape)
    if mended is None:
        return None
    if mended.geom_type == "Polygon":
        return {"type": "Polygon", "coordinates": _rings(mended)}
    return {"type": "MultiPolygon", "coordinates": [_rings(part) for part in mended.geoms]}


def _rings(polygon: Any) -> list[list[list[float]]]:
    rings = (polygon.exterior, *polygon.interiors)
    return [[[_number(x), _number(y)] for x, y in ring.coords] for ring in rings]


def _number(value: float) -> float:
    """Two decimals at most, and none where there are none."""
    value = round(float(value), _DECIMALS)
    return int(value) if value.is_integer() else value


def mend(shape: Polygon | MultiPolygon) -> Polygon | MultiPolygon | None:
    """The same area as valid polygons on a grid of a hundredth of a pixel; None where none is left.

    Outer rings run counterclockwise and holes clockwise where y points up (RFC 7946). A single part is a Polygon.

    Raises:
        BadInput: a coordinate that is not finite.
    """
    shapely = require("shapely", "slides")
    if not np.isfinite(shapely.get_coordinates(shape)).all():
        raise BadInput("an outline has a coordinate that is not a number")
    found: Any = shape
    for attempt in range(6):
        if not found.is_valid:
            found = shapely.make_valid(found, method="structure", keep_collapsed=False)
        if attempt > 1:  # rounding brings parts into contact again and again: draw them a little apart
            found = found.buffer(-attempt * 10.0**-_DECIMALS, join_style="mitre")
        found = shapely.set_precision(found, 10.0**-_DECIMALS)
        found = shapely.transform(found, lambda xy: np.round(xy, _DECIMALS))
        parts = [part for part in _polygons(found) if part.area > 0]
        if not parts:
            return None
        found = shapely.orient_polygons(parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts))
        if found.is_valid:
            return found
    valid = [part for part in parts if part.is_valid]
    return shapely.orient_polygons(max(valid, key=lambda part: part.area)) if valid else None


def _polygons(shape: Any) -> list[Any]:
    """The polygons of a geometry, whatever it holds."""
    if shape.geom_type == "Polygon":
        return [] if shape.is_empty else [shape]
    return [part for each in getattr(shape, "geoms", ()) for part in _polygons(each)]


def read_geojson(path: str | Path) -> list[Feature]:
    """The areas that a user drew, from a ``.geojson`` file, gzipped or not.

    A FeatureCollection, a list of features, a feature or a geometry will do. Open rings are closed and outlines that
    cross themselves are mended; points and lines have no area and are left out. Each is said in a notice.

    Raises:
        BadInput: no such file, no GeoJSON, or a coordinate that is no number; the line names the feature.
    """
    shapely = require("shapely", "slides")
    path = Path(path)
    features, mended, empty, crossings = [], 0, 0, 0
    for number, entry in enumerate(_entries(_load(path), path), 1):
        where = f"{path}: feature {number}"
        if not isinstance(entry, dict):
            raise BadInput(f"{where} is no GeoJSON object")
        geometry = entry.get("geometry") if entry.get("type") == "Feature" else entry
        parts = _read(geometry, where) if geometry is not None else []
        shape = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
        if not shape.is_valid:
            if (points := len(shapely.get_coordinates(shape))) > _MOST_MENDED:
                raise BadInput(f"{where} crosses itself and has {points:,} points; simplify it where it was drawn")
            crossings += _crossings(shape)
            if crossings > _MOST_CROSSINGS:
                raise BadInput(f"{where} crosses itself too often to be mended; draw it again")
            mended += 1
            parts = _polygons(shapely.make_valid(shape, method="structure", keep_collapsed=False))
        parts = [part for part in parts if part.area > 0]
        whole = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
        shape = whole if whole.is_valid else mend(whole)  # what was made valid may still touch itself by a rounding
        if shape is None or shape.is_empty:
            empty += 1
            continue
        properties = entry.get("properties")
        label, name = _named(properties if isinstance(properties, dict) else {})
        features.append(Feature(shape, label, name=name))
    if mended:
        notice(f"{path}: {mended} outlines crossed themselves and were mended")
    if empty:
        notice(f"{path}: {empty} features without an area were left out")
    return features


def _crossings(shape: Any) -> int:
    """About how many pairs of its edges lie across each other: those whose boxes meet, neighbours apart."""
    shapely = require("shapely", "slides")
    rings = [ring for part in _polygons(shape) for ring in (part.exterior, *part.interiors)]
    points = [shapely.get_coordinates(ring) for ring in rings]
    edges = shapely.linestrings(np.concatenate([np.stack([p[:-1], p[1:]], 1) for p in points]))
    step = -(-len(edges) // 2000)  # of a long outline some edges stand for all
    met = len(shapely.STRtree(edges).query(edges[::step])[0])
    return max(0, met * step - 3 * len(edges)) // 2


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            data = bytearray()
            with gzip.GzipFile(fileobj=raw) if zipped else raw as file:
                while block := file.read(1 << 20):  # in pieces, or Python sets aside as much as is asked for
                    data += block
                    if len(data) > MOST_BYTES:
                        raise BadInput(f"{path} holds more than {MOST_BYTES >> 20} MB; split it")
        return parse_json(data)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except BadInput:
        raise
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise BadInput(f"{path} is not valid GeoJSON ({error})") from None


def _entries(found: Any, path: Path) -> list[Any]:
    if isinstance(found, list):
        return found
    if isinstance(found, dict) and found.get("type") == "FeatureCollection":
        if not isinstance(found.get("features"), list):
            raise BadInput(f"{path}: a FeatureCollection needs a list of features")
        return list(found["features"])
    if isinstance(found, dict) and isinstance(found.get("type"), str):
        return [found]
    raise BadInput(f"{path} is JSON, but no GeoJSON")


def _read(geometry: Any, where: str) -> list[Any]:
    """The polygons of a geometry as they were drawn."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "GeometryCollection":
        inside = geometry.get("geometries")
        if not isinstance(inside, list):
            raise BadInput(f"{where}: a GeometryCollection needs a list of geometries")
        if any(isinstance(each, dict) and each.get("type") == "GeometryCollection" for each in inside):
            raise BadInput(f"{where}: collections within collections are not read")
        return [part for each in inside for part in _read(each, where)]
    if kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        return []
    if kind not in ("Polygon", "MultiPolygon"):
        raise BadInput(f"{where}: a geometry of type {kind!r}; Polygon or MultiPolygon is needed")
    coordinates = geometry.get("coordinates")
    polygons = [coordinates] if kind == "Polygon" else coordinates
    if not isinstance(polygons, list) or not all(isinstance(rings, list) for rings in polygons):
        raise BadInput(f"{where}: the coordinates of a {kind} are lists of rings")
    read = []
    for rings in polygons:
        outlines = [_ring(ring, where) for ring in rings]
        if outlines and outlines[0] is not None:
            shapely = require("shapely", "slides")
            read.append(shapely.Polygon(outlines[0], [hole for hole in outlines[1:] if hole is not None]))
    return read


def _ring(ring: Any, where: str) -> np.ndarray[Any, Any] | None:
    """``(N, 2)`` closed; None where it has no three points."""
    sound = isinstance(ring, list) and all(
        isinstance(point, list)
        and len(point) >= 2
        and type(point[0]) in (int, float)
        and type(point[1]) in (int, float)
        for point in ring
    )
    if not sound:  # seen before NumPy does, which sets aside for each number as much as the longest text needs
        raise BadInput(f"{where}: a ring is a list of [x, y] numbers")
    try:
        points = np.array([point[:2] for point in ring], np.float64).reshape(-1, 2)
    except OverflowError:
        points = np.full((1, 2), np.inf)
    if not np.isfinite(points).all() or (len(points) and np.abs(points).max() > 1e9):
        raise BadInput(f"{where}: a coordinate is not a number of pixels (NaN or infinite)")
    if len(points) and (points[0] != points[-1]).any():
        points = np.concatenate([points, points[:1]])
    return points if len(points) >= 4 else None


def _named(properties: Mapping[str, Any]) -> tuple[str, str]:
    """Class and name, as QuPath writes them."""
    classification = properties.get("classification")
    label = classification.get("name") if isinstance(classification, dict) else classification
    names = properties.get("name"), label
    name, label = (each[:_MOST_TEXT] if isinstance(each, str) else "" for each in names)
    return label, name
