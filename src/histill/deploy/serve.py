"""Class and probabilities of images that nobody has labelled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histill.data.decode import load
from histill.data.images import few, images_below, read_paths
from histill.deploy.deliver import open_any
from histill.deploy.predictor import predict_folder
from histill.errors import BadInput
from histill.files import atomic
from histill.progress import notice, progress

__all__ = ["predict"]


def predict(
    model: str | Path,
    images: str | Path,
    out: str | Path | None = None,
    *,
    batch_size: int = 32,
    strict: bool = False,
    device: str = "auto",
    code: Path | None = None,
) -> pd.DataFrame:
    """Class and probabilities of an image, of every image below a folder, or of those that a manifest lists.

    Args:
        model: a run, an ``.onnx`` or a TorchScript file, or the folder of an export with early exit.
        images: an image, a folder or a CSV file with a column ``path``.
        out: a ``.csv`` or ``.parquet`` file to write, atomically.
        batch_size: images at once.
        strict: an unreadable image is an error; otherwise it is left out with a notice.
        device: where a run computes: ``auto``, ``cpu``, ``cuda`` or ``mps``; exported files compute on the CPU.
        code: the Python file of a network that is not Histill's.

    Returns:
        A row per image: ``image`` (relative to the folder or manifest), ``prediction``, ``prob_<class>``, and with
        early exit ``exit``, where it left (from 1).

    Raises:
        BadInput: no model, no images, or an ``out`` that is neither CSV nor Parquet.
    """
    out = None if out is None else Path(out)
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise BadInput(f"--out {out}: end it in .csv or .parquet")
    root, paths = _listed(Path(images))
    predictor = open_any(model, device=device, code=code)
    if not predictor.classes or predictor.logits(_one(predictor.image_size)).ndim != 2:
        raise BadInput(f"{model} does not sort images into classes; predict gives a class to each image")
    rows, failed = [], []
    with progress("predicting", len(paths)) as bar:
        for found in predict_folder(
            predictor, paths, lambda path: load(path, predictor.image_size), batch=batch_size, progress=bar.advance
        ):
            if (p := found.probabilities) is None:
                failed.append(found.error)
                continue
            row: dict[str, object] = {
                "image": Path(found.path).relative_to(root).as_posix(),
                "prediction": predictor.classes[int(p.argmax())],
            }
            row |= {f"prob_{c}": float(v) for c, v in zip(predictor.classes, p)}
            rows.append(row | ({} if found.exit is None else {"exit": found.exit}))
    if failed and (strict or not rows):
        raise BadInput(f"{len(failed)} unreadable images: {few(failed)}")
    if failed:
        notice(f"{len(failed)} unreadable images were left out: {few(failed)}")
    table = pd.DataFrame(rows)
    if out is not None:
        with atomic(out) as temporary:
            table.to_csv(temporary, index=False) if out.suffix == ".csv" else table.to_parquet(temporary, index=False)
    return table


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
