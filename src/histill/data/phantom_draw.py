"""Draw phantom tissue: kinds and a place in, amounts of stain out (lengths in microns)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, special

from histill.data.phantom_field import (
    Array,
    Ints,
    Window,
    hashed,
    noise,
    normal,
    pixels,
    sites,
    uncrowded,
    uniform,
    uniforms,
    warped_noise,
)
from histill.data.phantom_kinds import KINDS, Kind

__all__ = ["Stains", "stain_tissue"]

NUCLEUS_REACH_UM = 9.0  # no nucleus reaches further from its centre


@dataclass(frozen=True)
class Stains:
    """Amounts ``(3, H, W)`` of haematoxylin, eosin and melanin; nuclei ``(H, W)`` from 1; own cells' area."""

    amounts: Array
    nuclei: Ints
    own: NDArray[np.bool_]


@dataclass(frozen=True)
class _Nuclei:
    """Columns of equal length, one row per nucleus."""

    x: Array
    y: Array
    radius: Array
    ratio: Array
    angle: Array
    wave: Array
    clumping: Array
    vesicular: Array
    nucleolus: Array
    darkness: Array
    pigment: Array
    priority: Array
    u: Array

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: NDArray[np.bool_] | Ints) -> _Nuclei:
        return _Nuclei(*(getattr(self, field.name)[index] for field in fields(self)))


def _join(parts: list[_Nuclei]) -> _Nuclei:
    return _Nuclei(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(_Nuclei)))


@dataclass(frozen=True)
class _Ground:
    """What lies under the nuclei of one kind: maps over the window."""

    own: Array  # 0 stroma .. 1 own cells
    clear: Array  # 0 .. 1 empty: lumen, vacuole
    line: Array  # eosin of rims and basement membranes


def _wave(theta: Array, u: Array) -> Array:
    """A smooth random contour of mean 0 and about unit variance; ``u`` ``(n, >=3)`` sets its phases."""
    turn = 2 * np.pi * u
    return np.asarray(
        np.cos(2 * theta + turn[:, 0]) + np.cos(3 * theta + turn[:, 1]) + 0.6 * np.cos(5 * theta + turn[:, 2])
    )


def _nuclei_of(kind: Kind, x: Array, y: Array, u: Array, angle: Array) -> _Nuclei:
    n = len(x)
    size = normal(u[:, 3])
    return _Nuclei(
        x=x,
        y=y,
        radius=np.minimum(kind.radius * np.exp(kind.pleomorphism * size), 0.7 * NUCLEUS_REACH_UM),
        ratio=kind.elongation * np.exp((0.12 + kind.pleomorphism) * 0.6 * normal(u[:, 4])),
        angle=angle,
        wave=np.full(n, kind.irregularity),
        clumping=np.full(n, kind.clumping),
        vesicular=np.clip(kind.vesicular * (0.4 + 1.2 * u[:, 5]), 0, 0.6),
        nucleolus=np.where(u[:, 6] < min(kind.nucleoli, 0.95), 1.0, 0.0),
        darkness=kind.darkness * np.exp(0.12 * normal(u[:, 7])),
        pigment=np.where(u[:, 8] < min(kind.pigment, 0.9), 0.4 + u[:, 9], 0.0),
        priority=u[:, 2],
        u=u,
    )


_SPINDLE = Kind(radius=2.6, pleomorphism=0.12, elongation=3.2, clumping=0.1, vesicular=0.1, nucleoli=0.0, darkness=0.72)
_LYMPHOCYTE = replace(KINDS["lymphoid"], clumping=0.22)


def _stamp(window: Window, nuclei: _Nuclei, amounts: Array, texture: Array) -> Ints:
    """Paint nuclei over ``amounts`` in place and return their instance labels."""
    mpp = window.mpp
    long = nuclei.radius * np.sqrt(nuclei.ratio)
    short = nuclei.radius / np.sqrt(nuclei.ratio)
    reach = np.minimum(long * (1 + 2 * nuclei.wave) + mpp, NUCLEUS_REACH_UM + mpp)
    n, row, column, dx, dy = pixels(window, nuclei.x, nuclei.y, reach)
    cos, sin = np.cos(nuclei.angle)[n], np.sin(nuclei.angle)[n]
    u, v = (cos * dx + sin * dy) / long[n], (cos * dy - sin * dx) / short[n]
    contour = 1 + nuclei.wave[n] * _wave(np.arctan2(v, u), nuclei.u[n, 10:13])
    depth = (1 - np.hypot(u, v) / contour) * short[n]
    near = depth > -0.5 * np.hypot(0.5, mpp)
    n, row, column, depth, u, v = n[near], row[near], column[near], depth[near], u[near], v[near]

    soft = np.hypot(0.4, 0.3 * mpp)
    rim = np.exp(-(((depth - 0.35) / soft) ** 2)) * 0.4 / soft
    grain = texture[row, column]
    pale = nuclei.vesicular[n] * np.clip(depth / 1.5, 0, 1)
    chromatin = 1 - pale + (0.05 + 0.7 * nuclei.vesicular[n]) * rim + nuclei.clumping[n] * (1 + pale) * grain
    # One nucleolus, off centre; its radius is a share of the nucleus, as in vesicular nuclei.
    offset_u, offset_v = 0.7 * (nuclei.u[n, 13] - 0.5), 0.7 * (nuclei.u[n, 14] - 0.5)
    away = np.hypot(u - offset_u, v - offset_v) * nuclei.radius[n]
    size = (0.16 + 0.12 * nuclei.u[n, 15]) * nuclei.radius[n] + 0.15
    dot = nuclei.nucleolus[n] * np.exp(-((away / size) ** 4))
    haematoxylin = nuclei.darkness[n] * np.clip(chromatin + 0.45 * dot, 0.25, 2)
    eosin = 0.16 + 0.3 * dot

    labels = np.zeros(window.shape, np.int64)
    inside = depth > 0
    # With repeated indices numpy keeps the last, so a nucleus lies over those before it.
    labels[row[inside], column[inside]] = n[inside] + 1
    cover = np.clip(depth / np.hypot(0.5, mpp) + 0.5, 0, 1)
    over = labels[row, column]
    keep = (over == n + 1) | (over == 0)  # its own pixels and its soft edge, not where another lies over it
    row, column, cover = row[keep], column[keep], cover[keep]
    for amount, value in ((amounts[0], haematoxylin[keep]), (amounts[1], eosin[keep])):
        amount[row, column] += cover * (value - amount[row, column])
    return labels


def _ground(key: int, window: Window, kind: Kind) -> tuple[_Ground, _Nuclei | None]:
    """The kind's nests, glands and vacuoles; the nuclei that belong to glands, if there are any."""
    own = np.zeros(window.shape)
    clear = np.zeros(window.shape)
    line = np.zeros(window.shape)
    lining = None
    if kind.nest >= 1:
        own[:] = 1
    elif kind.nest > 0:
        field = noise(key, 10, window, kind.nest_size) + 0.25 * noise(key, 11, window, kind.nest_size / 3)
        edge = float(special.ndtri(1 - kind.nest)) * np.hypot(1, 0.25)
        own = np.clip((field - edge) * kind.nest_size / 6 + 0.5, 0, 1)
        # Nests shrink from their stroma when tissue is fixed: a pale cleft, here and there.
        cleft = np.exp(-(((field - edge + 0.08) * kind.nest_size / 1.5) ** 2))
        clear = 0.8 * cleft * np.clip(noise(key, 12, window, 14.0), 0, 1)
    if kind.vacuole > 0:
        x, y, u = sites(key, 20, window, 2.1 * kind.vacuole, 0.9, 3 * kind.vacuole)
        radius = np.minimum(kind.vacuole * np.exp(0.45 * normal(u[:, 3]) - 0.1), 2 * kind.vacuole)
        keep = (u[:, 4] < 0.75) & uncrowded(x, y, 0.9 * radius, radius)
        x, y, u, radius = x[keep], y[keep], u[keep], radius[keep]
        n, row, column, dx, dy = pixels(window, x, y, radius * 1.25)
        contour = 1 + 0.03 * _wave(np.arctan2(dy, dx), u[n, 10:13])
        depth = radius[n] * contour - np.hypot(dx, dy)
        np.maximum.at(clear, (row, column), np.clip(depth / window.mpp + 0.5, 0, 1) * 0.96)
        np.maximum.at(line, (row, column), 0.12 * np.exp(-(((depth + 0.5) / np.hypot(0.6, 0.3 * window.mpp)) ** 2)))
    if kind.gland > 0:
        x, y, u = sites(key, 30, window, 2.1 * kind.gland, 0.35, 2.2 * kind.gland)
        radius = kind.gland * (0.8 + 0.35 * u[:, 3])
        stretch, turn = 1 + 0.35 * u[:, 4], 2 * np.pi * u[:, 5]
        long, short = radius * np.sqrt(stretch), radius / np.sqrt(stretch)
        n, row, column, dx, dy = pixels(window, x, y, 1.35 * long)
        cos, sin = np.cos(turn)[n], np.sin(turn)[n]
        a, b = (cos * dx + sin * dy) / long[n], (cos * dy - sin * dx) / short[n]
        rho = np.full(window.shape, 9.0)
        contour = 1 + 0.05 * _wave(np.arctan2(b, a), u[n, 10:13])
        np.minimum.at(rho, (row, column), np.hypot(a, b) / contour)
        own = np.clip((1 - rho) * kind.gland / 1.5 + 0.5, 0, 1)
        lumen = 0.45 + 0.035 * noise(key, 31, window, 5.0)
        inside = np.clip((lumen - rho) * kind.gland / 1.5 + 0.5, 0, 1)
        clear = inside * np.clip(0.9 - 0.2 * np.clip(noise(key, 32, window, 9.0) - 0.6, 0, 2), 0, 1)
        line = 0.22 * np.exp(-(((rho - 1.02) * kind.gland / 0.9) ** 2))
        line += 0.12 * np.exp(-(((rho - lumen) * kind.gland / 1.2) ** 2))
        lining = _palisade(key, kind, x, y, u, long, short, turn)
    return _Ground(own, clear, line), lining


def _palisade(key: int, kind: Kind, x: Array, y: Array, u: Array, long: Array, short: Array, turn: Array) -> _Nuclei:
    """Nuclei side by side along the base of each gland's epithelium, pointing at its lumen."""
    count = np.rint(2 * np.pi * 0.78 * np.sqrt(long * short) / kind.spacing).astype(np.int64)
    gland = np.repeat(np.arange(len(x)), count)
    index = np.arange(len(gland)) - np.repeat(np.cumsum(count) - count, count)
    first = (u[:, 6] * 2.0**32).astype(np.int64)
    bits = hashed(key, 33, first[gland], index)
    w = uniforms(bits)
    theta = 2 * np.pi * (index + 0.5 * w[:, 0]) / count[gland]
    rho = (0.77 + 0.1 * (w[:, 1] - 0.5)) * (1 + 0.05 * _wave(theta, u[gland, 10:13]))
    a, b = rho * long[gland] * np.cos(theta), rho * short[gland] * np.sin(theta)
    cos, sin = np.cos(turn)[gland], np.sin(turn)[gland]
    px, py = cos * a - sin * b, sin * a + cos * b
    angle = np.arctan2(py, px) + 0.25 * (w[:, 2] - 0.5)
    return _nuclei_of(kind, x[gland] + px, y[gland] + py, w, angle)


@dataclass(frozen=True)
class _Fibres:
    """Collagen: noise stretched along lines that a smooth displacement bends into waves."""

    key: int
    along: Array
    across: Array
    direction: Array  # radians

    @classmethod
    def over(cls, key: int, window: Window) -> _Fibres:
        origin = np.zeros(1, np.int64)
        turn = 2 * np.pi * float(uniform(hashed(key, 1, origin, origin))[0])
        x, y = window.xs_um[None, :], window.ys_um[:, None]
        wide = window.pad(1)
        bend = 30 * noise(key, 2, wide, 110.0) + 4 * noise(key, 3, wide, 28.0)
        right = (bend[1:-1, 2:] - bend[1:-1, :-2]) / (2 * window.mpp) - np.sin(turn)
        down = (bend[2:, 1:-1] - bend[:-2, 1:-1]) / (2 * window.mpp) + np.cos(turn)
        along = np.cos(turn) * x + np.sin(turn) * y
        across = np.cos(turn) * y - np.sin(turn) * x + bend[1:-1, 1:-1]
        return cls(key, along, across, np.arctan2(-right, down))

    def eosin(self, where: NDArray[np.bool_], mpp: float) -> Array:
        """Eosin of the collagen at the pixels of ``where``, zero elsewhere."""
        eosin = np.zeros(where.shape)
        if where.any():
            along, across = self.along[where], self.across[where]
            fibre = warped_noise(self.key, 4, along / 14, across / np.hypot(1.1, mpp))
            bundle = warped_noise(self.key, 5, along / 30, across / 4)
            gap = np.clip((-bundle - 0.3 * fibre - 1.3) * 2, 0, 1)
            eosin[where] = np.clip(0.25 + 0.045 * fibre + 0.03 * bundle, 0.02, None) * (1 - 0.85 * gap)
        return eosin


def _cells_of(key: int, window: Window, kind: Kind, ground: _Ground, fibres: _Fibres) -> list[_Nuclei]:
    """The kind's own nuclei, the spindle nuclei of its stroma and its lymphocytes, before crowding."""
    found = []

    def add(cells: Kind, layer: int, spacing: float, disorder: float) -> None:
        x, y, u = sites(key, layer, window, spacing, disorder, NUCLEUS_REACH_UM)
        own, empty = window.at(ground.own, x, y), window.at(ground.clear, x, y)
        angle = 2 * np.pi * u[:, 9]
        if cells is kind:
            here = own > 0.5
        elif cells is _SPINDLE:
            here = (own < 0.3) & (u[:, 4] < 0.75)
            angle = window.at(fibres.direction, x, y) + 0.5 * (u[:, 9] - 0.5)
        else:  # lymphocytes come in groups
            crowd = np.clip(0.3 + noise(key, 61, window, 25.0), 0, 3)
            here = u[:, 8] < kind.lymphocytes * window.at(crowd, x, y)
        here &= empty < 0.3
        cells = cells if cells is kind or cells is _LYMPHOCYTE else replace(cells, pigment=kind.pigment)
        found.append(_nuclei_of(cells, x[here], y[here], u[here], angle[here]))

    if kind.nest > 0:
        add(kind, 40, kind.spacing, kind.disorder)
    add(_SPINDLE, 50, 15.0, 0.9)
    add(_LYMPHOCYTE, 60, 9.0, 1.0)
    return found


def stain_tissue(key: int, window: Window, parts: list[tuple[Kind, Array]]) -> Stains:
    """Draw tissue over a window.

    Args:
        key: which tissue; see `new_key`.
        window: where, and at which resolution.
        parts: each kind with its weight ``(H, W)``; where the weights sum to less than 1, glass shows.
    """
    mpp = window.mpp
    fibres = _Fibres.over(key, window)
    own, clear, line, cytoplasm, present = (np.zeros(window.shape) for _ in range(5))
    nuclei: list[_Nuclei] = []
    for kind, weight in parts:
        ground, lining = _ground(key, window, kind)
        own += weight * ground.own
        clear += weight * ground.clear
        line += weight * ground.line
        cytoplasm += weight * kind.cytoplasm
        present += weight
        found = _cells_of(key, window, kind, ground, fibres)
        for group in [*found, lining] if lining is not None else found:
            nuclei.append(group.take(window.at(weight, group.x, group.y) > 0.5))
    cells = _join(nuclei)
    cells = cells.take(uncrowded(cells.x, cells.y, 0.8 * cells.radius, cells.priority))
    cells = cells.take(np.argsort(cells.priority))

    amounts = np.zeros((3, *window.shape))
    texture = 0.8 * noise(key, 70, window, 0.55) + 0.6 * noise(key, 71, window, 1.1)
    labels = _stamp(window, cells, amounts, texture)
    nucleus = np.minimum(amounts[0] / 0.6, 1)

    # Each pixel belongs to the nearest nucleus: its cell.
    if labels.any():
        distance, (row, column) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
        cell, gap = labels[row, column] - 1, distance * mpp
        shade, carried = 0.85 + 0.3 * cells.u[cell, 5], cells.pigment[cell]
    else:
        cell, gap = labels, np.full(window.shape, 99.0)
        shade, carried = np.ones(window.shape), np.zeros(window.shape)
    border = np.zeros(window.shape)
    border[:, 1:] += cell[:, 1:] != cell[:, :-1]
    border[1:] += cell[1:] != cell[:-1]
    border = np.minimum(border, 1) * min(1.0, 0.5 / mpp)

    cloudy = noise(key, 72, window, 2.2)
    halo = 1 - 0.35 * np.exp(-((gap / 1.4) ** 2))
    body = cytoplasm * shade * halo * (1 + 0.16 * cloudy) + 0.07 * border
    stroma = np.clip(present - own, 0, 1)
    eosin = own * body + stroma * (fibres.eosin(stroma > 0, mpp) + 0.02 * cloudy)
    haze = 0.03 * present + own * (0.06 + 0.02 * cloudy)  # ribosomes, and what lies out of focus
    solid = 1 - clear
    amounts[0] += (1 - nucleus) * np.clip(haze * solid, 0, None)
    amounts[1] += (1 - nucleus) * np.clip((eosin + line) * solid, 0, None)
    granules = np.clip((noise(key, 73, window, 0.7) - 0.25) * 1.6, 0, 1.6)
    amounts[2] = 0.9 * granules * carried * np.exp(-gap / 3.2) * (1 - 0.8 * nucleus) * solid * present
    return Stains(amounts, labels, own > 0.5)
