"""Randomness as a function of place, for phantom tissue.

All of it is an integer hash of lattice coordinates, so a region does not know where its picture ends: blocks of a
slide meet without a seam and the same tissue can be drawn at any resolution. Everything is float64 because byte
equality across machines needs rounding errors far below one grey level.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, spatial, special

__all__ = [
    "Array",
    "Ints",
    "Window",
    "hashed",
    "new_key",
    "noise",
    "normal",
    "pixels",
    "sites",
    "uncrowded",
    "uniform",
    "uniforms",
    "warped_noise",
]

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


def new_key(*numbers: int) -> int:
    """A 64-bit key for a tuple of non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def hashed(key: int, layer: int, rows: Ints, columns: Ints) -> NDArray[np.uint64]:
    """A 64-bit hash for each pair of broadcast integer coordinates."""
    start = np.array([(key + layer * 0x9E3779B97F4A7C15) & (2**64 - 1)], dtype=np.uint64)
    return _mix(_mix(_mix(start) ^ rows.astype(np.uint64)) + columns.astype(np.uint64))


def uniform(bits: NDArray[np.uint64]) -> Array:
    """Hashes as numbers in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniforms(bits: NDArray[np.uint64]) -> Array:
    """Sixteen numbers in [0, 1) for each hash, ``(n, 16)``."""
    return uniform(_mix(bits[:, None] + np.arange(1, 17).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)))


@dataclass(frozen=True)
class Window:
    """A raster over the tissue: pixel ``(x, y)`` of the plane at ``mpp`` is its upper left one."""

    x: int
    y: int
    width: int
    height: int
    mpp: float

    @cached_property
    def xs_um(self) -> Array:
        return np.asarray((self.x + np.arange(self.width) + 0.5) * self.mpp)

    @cached_property
    def ys_um(self) -> Array:
        return np.asarray((self.y + np.arange(self.height) + 0.5) * self.mpp)

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    def pad(self, pixels: int) -> Window:
        return Window(self.x - pixels, self.y - pixels, self.width + 2 * pixels, self.height + 2 * pixels, self.mpp)

    def at(self, field: Array, x_um: Array, y_um: Array) -> Array:
        """A field's value at places; beyond the raster, that of its nearest pixel."""
        column = np.clip(np.floor(x_um / self.mpp).astype(np.int64) - self.x, 0, self.width - 1)
        row = np.clip(np.floor(y_um / self.mpp).astype(np.int64) - self.y, 0, self.height - 1)
        return field[row, column]


@lru_cache(maxsize=32)  # pictures of a data set share their axes
def _spline(start: int, count: int, step: float) -> tuple[Ints, Array]:
    """The lattice points ``(m,)`` around ``(start + i + 0.5) * step`` and cubic B-spline weights ``(count, m)``."""
    position = (start + np.arange(count) + 0.5) * step
    base = np.floor(position)
    t = position - base
    s = 1 - t
    four = np.stack([s**3, 3 * t**3 - 6 * t**2 + 4, 3 * s**3 - 6 * s**2 + 4, t**3], axis=1) / 6
    first = base.astype(np.int64) - 1
    points = np.arange(first[0], first[-1] + 4)
    weights = np.zeros((count, len(points)))
    np.put_along_axis(weights, first[:, None] - first[0] + np.arange(4), four, axis=1)
    return points, weights


# The variance that one axis of the spline leaves of white noise, which is the standard deviation that two leave.
SPLINE_VARIANCE = 151 / 315


def noise(key: int, layer: int, window: Window, scale_um: float) -> Array:
    """Smooth noise of zero mean and unit variance over a window; detail finer than its pixels averages out."""
    columns, across = _spline(window.x, window.width, window.mpp / scale_um)
    rows, down = _spline(window.y, window.height, window.mpp / scale_um)
    lattice = uniform(hashed(key, layer, rows[:, None], columns[None, :])) - 0.5
    gain = np.sqrt(12) / SPLINE_VARIANCE / np.hypot(1, window.mpp / scale_um)
    return np.asarray(down @ (gain * lattice) @ across.T)


def warped_noise(key: int, layer: int, u: Array, v: Array) -> Array:
    """The same noise at arbitrary places ``(u, v)`` given in lattice units."""
    low_u, low_v = int(np.floor(u.min())) - 2, int(np.floor(v.min())) - 2
    rows = np.arange(low_v, int(np.floor(v.max())) + 4)[:, None]
    columns = np.arange(low_u, int(np.floor(u.max())) + 4)[None, :]
    lattice = (uniform(hashed(key, layer, rows, columns)) - 0.5) * np.sqrt(12) / SPLINE_VARIANCE
    return np.asarray(ndimage.map_coordinates(lattice, [v - low_v, u - low_u], order=3, prefilter=False))


def sites(
    key: int, layer: int, window: Window, spacing: float, disorder: float, margin: float
) -> tuple[Array, Array, Array]:
    """Places of a disordered hexagonal lattice around a window: x ``(n,)``, y ``(n,)``, uniforms ``(n, 16)``."""
    pitch = spacing * np.sqrt(2 / np.sqrt(3))
    line = pitch * np.sqrt(3) / 2
    rows = np.arange(
        int(np.floor((window.ys_um[0] - margin) / line)) - 1,
        int(np.ceil((window.ys_um[-1] + margin) / line)) + 1,
    )
    columns = np.arange(
        int(np.floor((window.xs_um[0] - margin) / pitch)) - 2,
        int(np.ceil((window.xs_um[-1] + margin) / pitch)) + 1,
    )
    row, column = (grid.ravel() for grid in np.meshgrid(rows, columns, indexing="ij"))
    bits = hashed(key, layer, row, column)
    u = uniforms(bits)
    x = (column + 0.5 + 0.5 * (row % 2) + disorder * (u[:, 0] - 0.5) * 1.3) * pitch
    y = (row + 0.5 + disorder * (u[:, 1] - 0.5) * 1.3) * line
    near = (
        (x > window.xs_um[0] - margin)
        & (x < window.xs_um[-1] + margin)
        & (y > window.ys_um[0] - margin)
        & (y < window.ys_um[-1] + margin)
    )
    return x[near], y[near], u[near]


def normal(u: Array) -> Array:
    return np.asarray(special.ndtri(np.clip(u, 0.005, 0.995)))


def pixels(window: Window, x_um: Array, y_um: Array, reach_um: Array) -> tuple[Ints, Ints, Ints, Array, Array]:
    """All (object, pixel) pairs within reach: object, row, column, dx and dy in microns, in object order."""
    if len(x_um) == 0:
        none = np.zeros(0, np.int64)
        return none, none, none, np.zeros(0), np.zeros(0)
    radius = int(np.ceil(reach_um.max() / window.mpp)) + 1
    steps = np.arange(-radius, radius + 1)
    columns = np.floor(x_um / window.mpp).astype(np.int64)[:, None] + steps
    rows = np.floor(y_um / window.mpp).astype(np.int64)[:, None] + steps
    dx = (columns + 0.5) * window.mpp - x_um[:, None]
    dy = (rows + 0.5) * window.mpp - y_um[:, None]
    far = 4 * reach_um.max() ** 2
    columns, rows = columns - window.x, rows - window.y
    dx2 = np.where((columns >= 0) & (columns < window.width), dx**2, far)
    dy2 = np.where((rows >= 0) & (rows < window.height), dy**2, far)
    which, i, j = np.nonzero(dy2[:, :, None] + dx2[:, None, :] < (reach_um**2)[:, None, None])
    return which, rows[which, i], columns[which, j], dx[which, j], dy[which, i]


def uncrowded(x: Array, y: Array, reach: Array, priority: Array) -> NDArray[np.bool_]:
    """Matern's second hard-core process: an object gives way to any of higher priority that it would touch."""
    keep = np.ones(len(x), bool)
    if len(x) < 2:
        return keep
    tree = spatial.cKDTree(np.stack([x, y], axis=1))
    i, j = tree.query_pairs(2 * float(reach.max()), output_type="ndarray").T
    touch = np.hypot(x[i] - x[j], y[i] - y[j]) < reach[i] + reach[j]
    i, j = i[touch], j[touch]
    keep[np.where(priority[i] < priority[j], i, j)] = False
    return keep
