"""What is kept of a slide while it is being predicted, so that a killed process goes on where it was.

Rows are kept in chunks of whole batches. A batch holds the same tiles whether the work was interrupted or not, so the
model computes the same bits, and every file ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histill.errors import BadInput
from histill.files import atomic, digest, read_json, sweep, write_json
from histill.progress import notice

__all__ = ["CODE", "State", "key_of"]

CODE = 2
"""Raised with every change of the code that changes what is predicted; what an older one left is not mixed in."""

Rows = dict[str, NDArray[Any]]


def key_of(slide: str, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for rows to be the same: the slide's and the model's digests, settings, code."""
    made = {"slide": slide, "model": model, "settings": dict(settings), "code": CODE}
    return dict(json.loads(json.dumps(made, sort_keys=True)))


class State:
    """The chunks of one slide, in ``.state`` of its folder.

    Args:
        folder: of the slide; the caller holds its lock.
        key: from `key_of`.
        made_by: the device and the versions of what computes. Where they are not those of the chunks that are there,
            the chunks are thrown away: other ones give other last bits.
        resume: go on with what is there; otherwise it is thrown away.

    Raises:
        BadInput: what is there was predicted from another slide, by another model or with other settings.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        *,
        made_by: Mapping[str, str] | None = None,
        resume: bool = True,
    ) -> None:
        self.folder, self.key = folder / ".state", dict(key)
        sweep(folder)
        if not resume:
            (folder / "slide.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        for path in (folder / "slide.json", self.folder / "key.json"):
            if path.is_file():
                said = read_json(path)
                there = said if path.name == "key.json" else said.get("key") if isinstance(said, dict) else None
                if there != self.key:
                    raise BadInput(f"{folder} holds {_other(there, self.key)}; give another --out, or --no-resume")
        self.finished = (folder / "slide.json").is_file() and _whole(folder)
        if self.finished:
            self.done()  # a kill came before they were thrown away
        else:
            made = self.folder / "made_by.json"
            if made.is_file() and read_json(made) != dict(made_by or {}):
                notice(f"{folder.name} was begun on another device or with other versions; it is looked at again")
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            write_json(made, dict(made_by or {}))
            write_json(self.folder / "key.json", self.key)

    def save(self, part: str, number: int, rows: Rows) -> None:
        """Keep chunk ``number`` of ``part``."""
        with atomic(self._path(part, number)) as temporary, temporary.open("wb") as file:
            np.savez(file, **rows)  # type: ignore[arg-type]

    def load(self, part: str, number: int, count: int) -> Rows | None:
        """Chunk ``number`` where it is there, whole and of ``count`` rows."""
        path = self._path(part, number)
        try:
            with np.load(path, allow_pickle=False) as file:
                rows = {name: file[name] for name in file.files}
        except FileNotFoundError:
            return None
        except Exception:  # noqa: BLE001 - zipfile, zlib and NumPy each have errors of their own
            path.unlink(missing_ok=True)  # a disk that lost power may hold a name without its bytes
            return None
        return rows if all(len(values) == count for values in rows.values()) else None

    def done(self) -> None:
        """Throw the chunks away: the slide's files are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: str, number: int) -> Path:
        return self.folder / f"{part}{number:06d}.npz"


def _whole(folder: Path) -> bool:
    """Whether every file that ``slide.json`` names is there, and not empty."""
    layers = read_json(folder / "slide.json").get("layers")
    if not isinstance(layers, dict):
        return False
    paths = [folder / str(name) for name in layers.values()]
    return all(path.is_file() and path.stat().st_size for path in paths)


def _other(there: Any, here: Mapping[str, Any]) -> str:
    """What differs, in words."""
    if not isinstance(there, dict):
        return "what no histill slide wrote"
    if there.get("slide") != here["slide"]:
        return "another slide of the same name"
    if there.get("model") != here["model"]:
        return "the predictions of another model"
    if there.get("code") != here["code"]:
        return "the predictions of another version of Histill"
    before, now = there.get("settings") or {}, here["settings"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            return f"predictions with {name} {_short(before.get(name))}, not {_short(now.get(name))}"
    return "other predictions"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else digest(value)[:12]
