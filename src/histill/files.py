"""Files that are never half-written: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from histill.errors import BadInput, Failed, HistillError

__all__ = [
    "atomic",
    "cache_dir",
    "digest",
    "file_digest",
    "locked",
    "read_json",
    "sweep",
    "write_json",
    "write_text",
    "writing",
]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`atomic` for torch and safetensors, which report a failed write in words of their own: `Failed`, one line."""
    try:
        with atomic(path) as temporary:
            yield temporary
    except HistillError:
        raise
    except Exception as error:  # noqa: BLE001 - torch raises RuntimeError, safetensors an error of its own
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Failed(f"cannot write {path}: is the disk full? What was saved before is kept ({why})") from None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinities are refused (`ValueError`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; `BadInput` names the file where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON ({error})") from None


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, in its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir(*parts: str) -> Path:
    """A folder for what can be made again: ``$HISTILL_CACHE``, else ``~/.cache/histill``."""
    root = Path(os.environ.get("HISTILL_CACHE") or Path.home() / ".cache" / "histill")
    path = root.joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``; only who holds it may."""
    for left in (*folder.glob(".*.tmp"), *folder.glob("figures/.*.tmp")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold ``folder`` for this process (released even by a kill); an error takes it away again where it left nothing.

    Raises:
        BadInput: another process holds it; with ``wait`` its turn is awaited.
    """
    lock = folder / ".lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = lock.open("a")
        except FileNotFoundError:
            continue  # who held it has just taken the folder away
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise BadInput(f"another process is writing to {folder}; wait for it or give another --out") from None
            try:
                held = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except FileNotFoundError:
                held = False
            if not held:
                continue
            try:
                yield
            except BaseException:
                if list(folder.iterdir()) == [lock]:
                    lock.unlink()
                    with suppress(OSError):  # another process is at it already
                        folder.rmdir()
                raise
            return
