"""What phantom tissue can be: its kinds, its patients, its scanners."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histill.data.phantom_field import Array, Window, hashed, new_key
from histill.errors import BadInput

__all__ = ["KINDS", "Kind", "Patient", "Scanner", "kind_of"]


@dataclass(frozen=True)
class Kind:
    """A class of tissue. Lengths in microns, shares in [0, 1], contrasts in optical density.

    Attributes:
        radius: median radius of a nucleus (of the circle of equal area).
        pleomorphism: standard deviation of the logarithm of that radius.
        spacing: one own nucleus per ``spacing ** 2`` where the kind's own cells lie.
        disorder: how far nuclei stray from even spacing; 0 is a lattice, 1 lets them crowd and touch.
        elongation: median axis ratio of a nucleus.
        irregularity: waviness of its contour.
        clumping: contrast of the chromatin texture.
        vesicular: how pale the inside of a nucleus is beside its rim.
        nucleoli: share of nuclei with a visible nucleolus.
        nest: share of the area that own cells occupy; stroma fills the rest.
        nest_size: length scale of the nests.
        cytoplasm: eosin in own cells.
        pigment: share of cells with melanin granules.
        lymphocytes: share of sites taken by a lymphocyte.
        gland: mean radius of glands, 0 for none.
        vacuole: mean radius of clear vacuoles, 0 for none.
        darkness: haematoxylin of a nucleus.
    """

    radius: float = 3.9
    pleomorphism: float = 0.14
    spacing: float = 11.0
    disorder: float = 0.7
    elongation: float = 1.25
    irregularity: float = 0.025
    clumping: float = 0.2
    vesicular: float = 0.2
    nucleoli: float = 0.2
    nest: float = 0.8
    nest_size: float = 20.0
    cytoplasm: float = 0.24
    pigment: float = 0.12
    lymphocytes: float = 0.06
    gland: float = 0.0
    vacuole: float = 0.0
    darkness: float = 0.72


# Benign and malignant differ in the mean size and density of nuclei by less than patients do; what tells them apart is
# how unequal, how crowded and how coarse the nuclei of one picture are. Both cover the same share of it, so that its
# colours say next to nothing.
KINDS: dict[str, Kind] = {
    "benign": Kind(
        radius=3.6,
        pleomorphism=0.08,
        spacing=10.6,
        disorder=0.6,
        irregularity=0.02,
        clumping=0.19,
        vesicular=0.22,
        nucleoli=0.2,
        nest_size=18.0,
        pigment=0.12,
    ),
    "malignant": Kind(
        radius=3.9,
        pleomorphism=0.22,
        spacing=11.2,
        disorder=0.85,
        irregularity=0.03,
        clumping=0.23,
        vesicular=0.25,
        nucleoli=0.4,
        nest_size=22.0,
        pigment=0.14,
    ),
    "stroma": Kind(nest=0.0, lymphocytes=0.05, pigment=0.03),
    "gland": Kind(radius=3.5, spacing=6.4, nest=0.0, gland=33.0, cytoplasm=0.24, pigment=0.0, elongation=1.8),
    "vacuolated": Kind(radius=3.3, pleomorphism=0.1, spacing=14.0, nest=1.0, vacuole=7.0, cytoplasm=0.3, pigment=0.01),
    "lymphoid": Kind(
        radius=2.75,
        pleomorphism=0.1,
        spacing=7.6,
        disorder=0.75,
        elongation=1.08,
        irregularity=0.012,
        nucleoli=0.03,
        nest=0.97,
        cytoplasm=0.16,
        pigment=0.0,
        darkness=0.9,
    ),
}


def kind_of(name: str) -> Kind:
    """The kind of that name; `BadInput` lists the names there are."""
    if name not in KINDS:
        raise BadInput(f"no tissue of kind {name!r}; there are: {', '.join(KINDS)}")
    return KINDS[name]


# How far patients differ in each cue: the standard deviation of its logarithm at difficulty 0.5.
PATIENT_SPREAD = {
    "radius": 0.12,
    "spacing": 0.13,
    "pleomorphism": 0.22,
    "disorder": 0.2,
    "elongation": 0.05,
    "irregularity": 0.4,
    "clumping": 0.25,
    "vesicular": 0.3,
    "nucleoli": 0.6,
    "nest": 0.1,
    "nest_size": 0.2,
    "cytoplasm": 0.2,
    "pigment": 0.7,
    "lymphocytes": 0.7,
    "darkness": 0.1,
}

# Unit stain vectors in optical density (R, G, B): haematoxylin, eosin, melanin.
STAIN_VECTORS = np.array([[0.60, 0.74, 0.30], [0.16, 0.90, 0.41], [0.38, 0.56, 0.73]])


@dataclass(frozen=True)
class Patient:
    """How one patient's tissue and its staining differ from the kind's mean: stain vectors ``(3, 3)``, cues."""

    vectors: Array
    cues: dict[str, float]

    @classmethod
    @lru_cache(maxsize=64)
    def number(cls, patient: int) -> Patient:
        rng = np.random.Generator(np.random.Philox(new_key(1, patient)))
        vectors = STAIN_VECTORS + rng.normal(0, [[0.03], [0.03], [0.02]], (3, 3))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        strength = np.exp(rng.normal(0, [0.16, 0.2, 0.1]))
        cues = {name: float(np.clip(rng.normal(), -2.5, 2.5)) for name in PATIENT_SPREAD}
        return cls(vectors * strength[:, None], cues)

    def kind(self, kind: Kind, difficulty: float) -> Kind:
        """The kind as this patient has it."""
        if not 0 <= difficulty <= 1:
            raise BadInput(f"phantom: difficulty={difficulty} must lie in [0, 1]")
        own = {
            name: getattr(kind, name) * float(np.exp(2 * difficulty * spread * self.cues[name]))
            for name, spread in PATIENT_SPREAD.items()
        }
        return replace(kind, **own)


@dataclass(frozen=True)
class Scanner:
    """White point ``(3,)`` in [0, 1], gamma, optical blur in microns, noise in grey levels, JPEG quality."""

    white: Array
    gamma: float
    blur_um: float
    noise: float
    quality: int

    @classmethod
    @lru_cache(maxsize=64)
    def number(cls, scanner: int) -> Scanner:
        rng = np.random.Generator(np.random.Philox(new_key(2, scanner)))
        return cls(
            white=0.955 + rng.uniform(-0.025, 0.025, 3),
            gamma=float(rng.uniform(0.9, 1.12)),
            blur_um=float(rng.uniform(0.2, 0.45)),
            noise=float(rng.uniform(1.0, 2.5)),
            quality=int(rng.integers(78, 94)),
        )

    def image(self, amounts: Array, patient: Patient, window: Window, key: int) -> NDArray[np.uint8]:
        """What the camera sees of stain amounts ``(3, H, W)``, ``(H, W, 3)``, before compression (Beer-Lambert)."""
        density = np.tensordot(amounts, patient.vectors, axes=(0, 0))
        light = self.white * np.exp(-np.log(10) * density * self.gamma)
        sigma = self.blur_um / window.mpp
        light = ndimage.gaussian_filter(light, (sigma, sigma, 0), mode="nearest", truncate=3)
        bits = hashed(
            key,
            99,
            np.arange(window.y, window.y + window.height)[:, None],
            np.arange(window.x, window.x + window.width)[None, :],
        )
        shifts = np.array([0, 21, 42], np.uint64)
        grain = ((bits[..., None] >> shifts) & np.uint64(0x1FFFFF)).astype(np.float64) * 2.0**-21 - 0.5
        level = 255 * light + self.noise * np.sqrt(12) * grain
        return np.asarray(np.clip(np.rint(level), 0, 255), np.uint8)
