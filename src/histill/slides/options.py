"""How slides are looked at, and which of a user's files belongs to which slide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from histill.errors import BadInput
from histill.files import file_digest

__all__ = ["Options", "beside", "by_class", "depends_on"]


@dataclass(frozen=True)
class Options:
    """How slides are looked at; every field is an argument of `predict_slide`.

    Attributes:
        mpp: microns per pixel at which the model looks (default: those it was trained at).
        slide_mpp: the slide's own, in place of what its file says.
        tile: side of a tile in pixels at ``mpp`` (default: the model's image size).
        overlap: pixels at ``mpp`` that a tile shares with the next.
        min_tissue: share of a tile that must be tissue.
        batch_size: tiles at once.
        threads: readers (default: the machine's cores, 8 at most).
        mask: where to look, GeoJSON or an image over the slide; a folder with ``<slide stem>`` for many slides.
        truth: a reference mask, in the same ways: an image of 0 and 1 (or 255) marks lesions, one with larger values
            holds 0 for nothing and k for the k-th class.
        truth_classes: names of an image's values 1, 2, ... where they are not the model's classes in their order; one
            that the model does not know is nothing.
        lesions: the classes that are lesions (default: `lesion_classes`).
        threshold: a lesion is where its class's probability is above it (default: above every other class's).
        min_area_um2: smaller lesions are left out, and smaller holes filled (default: a quarter of a tile).
        coarse_to_fine: first look at tiles ``coarse_factor`` times as wide, and closer only where the model's
            confidence is below this; the rest keep what was said of the wide tile.
        coarse_factor: how many times.
        coarse_model: what takes the wide look (default: the same model, which must then not mind the magnification).
        features: also ``features.h5``, as CLAM reads it.
        segment: by class, the model that outlines it (`histill.slides.segment`).
        resume: go on with what another process left; otherwise start anew.
    """

    mpp: float | None = None
    slide_mpp: float | None = None
    tile: int | None = None
    overlap: int = 0
    min_tissue: float = 0.1
    batch_size: int = 32
    threads: int | None = None
    mask: Path | None = None
    truth: Path | None = None
    truth_classes: Sequence[str] = ()
    lesions: tuple[str, ...] = ()
    threshold: float | None = None
    min_area_um2: float | None = None
    coarse_to_fine: float | None = None
    coarse_factor: float = 2.0
    coarse_model: Path | None = None
    features: bool = False
    segment: Mapping[str, Path] = field(default_factory=dict)
    resume: bool = True

    def __post_init__(self) -> None:
        shares = {"threshold": self.threshold, "coarse_to_fine": self.coarse_to_fine}
        for name, share in shares.items():
            if share is not None and not 0 < share < 1:
                raise BadInput(f"--{name.replace('_', '-')} {share}: a probability between 0 and 1")
        if self.batch_size < 1 or (self.threads is not None and self.threads < 1):
            raise BadInput(f"--batch-size {self.batch_size}, --threads {self.threads}: at least 1")
        if self.coarse_factor <= 1:
            raise BadInput(f"--coarse-factor {self.coarse_factor}: more than 1")
        if self.min_area_um2 is not None and self.min_area_um2 < 0:
            raise BadInput(f"--min-area-um2 {self.min_area_um2}: square microns, not negative")


def beside(path: Path | None, slide: Path, what: str) -> Path | None:
    """The file that belongs to a slide: ``path`` itself, or in a folder what bears the slide's stem."""
    if path is None or Path(path).is_file():
        return None if path is None else Path(path)
    names = [f"{slide.stem}{end}" for end in (".geojson", ".geojson.gz", ".json", ".png", ".mask.png", ".tif", ".tiff")]
    found = next((Path(path) / name for name in names if (Path(path) / name).is_file()), None)
    if found is None:
        raise BadInput(f"--{what} {path}: no such file, nor a folder with {names[0]} or {names[3]}")
    return found


def by_class(pairs: Sequence[str]) -> dict[str, Path]:
    """``CLASS=FILE`` as a dictionary; `BadInput` where it is not."""
    found = {}
    for pair in pairs:
        label, equals, path = pair.partition("=")
        if not (label and equals and path):
            raise BadInput(f"--segment {pair}: give CLASS=MODEL, such as tumour=unet.pt")
        found[label] = Path(path)
    return found


def depends_on(options: Options, slide: Path) -> dict[str, Any]:
    """What the files of ``slide`` depend on, of what was asked for: values, and digests of files."""
    said = asdict(options)
    for name in ("threads", "resume"):
        del said[name]
    for name in ("mask", "truth"):
        found = beside(getattr(options, name), slide, name)
        said[name] = None if found is None else file_digest(found)
    said["segment"] = {label: _weights(Path(path)) for label, path in options.segment.items()}
    return said


def _weights(path: Path) -> str:
    return file_digest(path if path.is_file() else path / "model.safetensors")
