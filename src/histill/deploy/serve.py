"""Class and probabilities of images that nobody has labelled, or their masks."""

from __future__ import annotations

from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histill.data.decode import decode, load
from histill.data.images import few, given_path, images_below, read_manifest, read_paths
from histill.deploy.deliver import open_any
from histill.deploy.outline import Outlined, outline_folder, write_pictures
from histill.deploy.predictor import Predictor, one_line, predict_folder
from histill.errors import BadInput
from histill.files import atomic
from histill.progress import notice, progress
from histill.run import Run

__all__ = ["predict"]

_WRITERS = 4

Row: TypeAlias = dict[str, Any]


def predict(
    model: Run | str | Path,
    images: str | Path,
    out: str | Path | None = None,
    *,
    batch_size: int = 32,
    strict: bool = False,
    device: str = "auto",
    code: Path | None = None,
) -> pd.DataFrame:
    """Class and probabilities of an image, of every image below a folder, or of those that a manifest lists.

    Of a network that outlines: a mask of each, and how much of it each class or how many nuclei it is; what the network
    sees of an image is told in `histill.deploy.outline.outline_folder`.

    Args:
        model: a run or its folder, an ``.onnx`` or a TorchScript file, or the folder of an export with early exit.
        images: an image, a folder or a CSV file with a column ``path``, and where known ``mpp``, microns per pixel.
        out: a ``.csv`` or ``.parquet`` file to write, atomically. Of a network that outlines also, beside ``NAME.csv``,
            the folders ``NAME.masks`` (PNG at the images' own size: class numbers with a palette, or 16-bit numbers of
            nuclei) and ``NAME.outlines`` (the images with outlines), under the images' own names.
        batch_size: images at once.
        strict: an unreadable image is an error; otherwise it is left out with a notice.
        device: where a run computes: ``auto``, ``cpu``, ``cuda`` or ``mps``; exported files compute on the CPU.
        code: the Python file of a network that is not Histill's.

    Returns:
        A row per image: ``image`` (relative to the folder or manifest), ``prediction``, ``prob_<class>``, and with
        early exit ``exit``, where it left (from 1). Of a network that outlines: ``image``, ``mask`` (with ``out``,
        relative to its folder), ``nuclei`` (their number, of a run that learnt them), ``share_<class>`` of the pixels,
        ``area_um2_<class>`` where the manifest, or else the images that the run was trained on, tell the microns per
        pixel, and ``confidence``, the mean probability of what was said of the pixels, or of the nuclei.

    Raises:
        BadInput: no model, no images, or an ``out`` that is neither CSV nor Parquet.
    """
    images = given_path(images, "predict")
    if batch_size < 1:
        raise BadInput(f"batch_size={batch_size}: must be at least 1")
    out = None if out is None else Path(out)
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise BadInput(f"--out {out}: end it in .csv or .parquet")
    if out is not None and out.exists() and images.is_file() and out.samefile(images):
        raise BadInput(f"--out {out} is the list of the images itself; give another file")
    root, paths = _listed(images)
    predictor = open_any(model, device=device, code=code)
    model = model.path if isinstance(model, Run) else Path(model)
    dimensions = predictor.logits(_one(predictor.image_size)).ndim if predictor.classes else 0
    if dimensions not in (2, 4):
        raise BadInput(
            f"{model} does not sort images into classes, nor outline them; predict gives each image a class or a mask"
        )
    if dimensions == 4:
        rows, failed = _outlined(predictor, model, images, root, paths, out, batch_size)
    else:
        rows, failed = _classified(predictor, root, paths, batch_size)
    if failed and (strict or not rows):
        raise BadInput(f"{len(failed)} unreadable images: {few(failed)}")
    if failed:
        notice(f"{len(failed)} unreadable images were left out: {few(failed)}")
    table = pd.DataFrame(rows)
    if out is not None:
        with atomic(out) as temporary:
            table.to_csv(temporary, index=False) if out.suffix == ".csv" else table.to_parquet(temporary, index=False)
    return table


def _classified(predictor: Predictor, root: Path, paths: list[Path], batch_size: int) -> tuple[list[Row], list[str]]:
    """The rows of the table, and why images are not in it."""
    rows: list[Row] = []
    failed = []
    with progress("predicting", len(paths)) as bar:
        for found in predict_folder(
            predictor, paths, lambda path: load(path, predictor.image_size), batch=batch_size, progress=bar.advance
        ):
            if (p := found.probabilities) is None:
                failed.append(found.error)
                continue
            row: Row = {
                "image": Path(found.path).relative_to(root).as_posix(),
                "prediction": predictor.classes[int(p.argmax())],
            }
            row |= {f"prob_{c}": float(v) for c, v in zip(predictor.classes, p)}
            rows.append(row | ({} if found.exit is None else {"exit": found.exit}))
    return rows, failed


def _outlined(
    predictor: Predictor, model: Path, images: Path, root: Path, paths: list[Path], out: Path | None, batch_size: int
) -> tuple[list[Row], list[str]]:
    """The same of masks, whose pictures are written beside ``out``."""
    homes = None if out is None else (out.with_suffix(".masks"), out.with_suffix(".outlines"))
    if images.is_dir() and homes:  # where --out lies among the images, so do the pictures of an earlier call
        earlier = [home.resolve() for home in homes]
        paths = [path for path in paths if not any(path.resolve().is_relative_to(home) for home in earlier)]
        if not paths:
            raise BadInput(f"{images}: no images in it")
    names = _pictures([path.relative_to(root) for path in paths])
    mpp, seen = _microns(model, images, paths), _seen(model, predictor)
    scales = {path: value / seen for path, value in mpp.items()} if seen else {}

    def row(found: Outlined) -> Row | str:
        """An image's row once its pictures are written, or why there is none."""
        name = found.path.relative_to(root)
        if found.labels is None:
            return found.error
        of_it: Row = {"image": name.as_posix()}
        if homes:
            try:
                picture = decode(found.path)[0]
            except (OSError, BadInput) as error:  # it has gone since
                return one_line(error)
            mask, outlines = (home / names[name] for home in homes)
            write_pictures(found, picture, mask, outlines)
            of_it["mask"] = mask.relative_to(homes[0].parent).as_posix()
        if found.nuclei is not None:
            of_it["nuclei"] = found.nuclei
        said = found.labels if found.nuclei is None else found.labels > 0
        pixels = {c: int((said == number).sum()) for number, c in enumerate(predictor.classes)}
        of_it |= {f"share_{c}": count / said.size for c, count in pixels.items()}
        if mpp:
            of_it |= {f"area_um2_{c}": count * mpp.get(found.path, np.nan) ** 2 for c, count in pixels.items()}
        return of_it | {"confidence": found.confidence}

    said: list[Row | str] = []
    with progress("outlining", len(paths)) as bar, ThreadPoolExecutor(_WRITERS) as pool:
        waiting: deque[Future[Row | str]] = deque()
        for found in outline_folder(predictor, paths, batch=batch_size, scales=scales):
            waiting.append(pool.submit(row, found))
            if len(waiting) > _WRITERS:
                said.append(waiting.popleft().result())
                bar.advance()
        for last in waiting:
            said.append(last.result())
            bar.advance()
    return [one for one in said if not isinstance(one, str)], [one for one in said if isinstance(one, str)]


def _pictures(names: list[Path]) -> dict[Path, Path]:
    """What the pictures of each image are called: as it is, in PNG; with its ending where two would be the same."""
    short = {name: name.with_suffix(".png") for name in names}
    times = Counter(short.values())
    return {n: png if times[png] == 1 else n.with_name(f"{n.name}.png") for n, png in short.items()}


def _microns(model: Path, images: Path, paths: list[Path]) -> dict[Path, float]:
    """Microns per pixel of the images where they are known: by the manifest, or as in the images of the run."""
    if images.suffix.lower() == ".csv":
        frame = read_manifest(images, needed=("path",))
        if told := {images.parent / path: float(mpp) for path, mpp in zip(frame["path"], frame["mpp"]) if mpp}:
            return told
    known = set(Run.open(model).data.frame["mpp"]) if (model / "run.json").is_file() else set()
    return dict.fromkeys(paths, float(known.pop())) if len(known) == 1 and "" not in known else {}


def _seen(model: Path, predictor: Predictor) -> float | None:
    """Microns per pixel at which the network looks, where it is known."""
    said = Run.open(model).info.get("mpp") if (model / "run.json").is_file() else predictor.mpp
    return float(said) if isinstance(said, int | float) and said > 0 else None


def _one(size: int) -> NDArray[np.float32]:
    return np.zeros((1, 3, size, size), np.float32)


def _listed(images: Path) -> tuple[Path, list[Path]]:
    """The root that names are relative to, and the images."""
    if images.is_dir():
        root, paths = images, images_below(images)
    elif images.suffix.lower() == ".csv" and images.is_file():
        root, paths = images.parent, read_paths(images)
    elif images.is_file():
        return images.parent, [images]
    else:
        raise BadInput(f"{images}: no such image, folder or manifest")
    if not paths:
        raise BadInput(f"{images}: no images in it")
    return root, paths
