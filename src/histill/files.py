"""Files that are never half-written: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from histill.errors import BadInput, Failed, HistillError

__all__ = [
    "atomic",
    "cache_dir",
    "check_room",
    "claim",
    "digest",
    "file_digest",
    "full_disk",
    "locked",
    "parse_json",
    "read_json",
    "sweep",
    "to_disk",
    "write_json",
    "write_text",
    "writing",
]


_STALE_S = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def atomic(path: Path, *, durable: bool = False, tidy: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    A kill leaves the old file or the new one, and the temporary one, which `sweep` removes where a folder has one
    writer. With ``durable`` so does a loss of power: the bytes are on the disk before the name is. With ``tidy``
    temporary files of this ``path`` that have not been written to for a minute are removed.

    Raises:
        Failed: the disk is full.
        BadInput: the folder may not be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if tidy:
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                with suppress(FileNotFoundError):  # somebody else was faster
                    if time.time() - left.stat().st_mtime > _STALE_S:
                        left.unlink()
        yield temporary
        if durable:
            to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            to_disk(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) or error from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`atomic` and durable, for torch and safetensors, which report a failed write in words of their own.

    Whoever may read the other files may read this one: safetensors makes files that only their owner may read.
    """
    try:
        with atomic(path, durable=True) as temporary:
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            temporary.unlink()
            yield temporary
            temporary.chmod(mode)
    except HistillError:
        raise
    except Exception as error:  # noqa: BLE001 - torch raises RuntimeError, safetensors an error of its own
        number = errno.ENOSPC if os.access(Path(path).parent, os.W_OK) else errno.EROFS
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _cannot_write(path, OSError(number, why)) or error from None


def to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def _cannot_write(path: Path, error: OSError) -> HistillError | None:
    """What to say of a full or a write-protected disk; None where the error is another one."""
    why = error.strerror or str(error)
    if error.errno in _FULL or os.strerror(errno.ENOSPC) in str(error):  # HDF5 hides the number in a text
        return Failed(f"cannot write {path}: disk full ({why}); make room and start again, what was done is kept")
    here = (None, *map(str, (path, *path.parents)))
    if error.errno in _FORBIDDEN and (error.filename in here or path.name in str(error.filename)):
        cached = path.is_relative_to(_cache_root())
        remedy = "set HISTILL_CACHE to another folder" if cached else "give another --out"
        return BadInput(f"cannot write {path}: {why}; {remedy}")
    return None


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """For what is written to ``path`` in other ways than `atomic`: a full disk is the same line."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) or error from None


def check_room(folder: Path, size: int, what: str) -> None:
    """`Failed` where ``what`` takes more bytes than the disk of ``folder`` has free."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise Failed(
            f"{what} takes {size / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free; make room"
            + (", or set HISTILL_CACHE to another disk" if folder.is_relative_to(_cache_root()) else "")
        )


def claim(path: Path) -> None:
    """Take the space on disk that a sparse file has not taken yet.

    A memory-mapped array is such a file, and a disk that is full when a page of it is written ends the process
    (SIGBUS). Here it is an error.

    Raises:
        Failed: the disk is full; the file is removed.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
            return
        path.unlink(missing_ok=True)
        raise _cannot_write(path, error) or error from None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic(path, tidy=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, durably; NaN and infinities are refused (`ValueError`)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic(path, durable=True, tidy=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; `BadInput` names the file where it is missing or damaged."""
    try:
        return parse_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON ({error})") from None


def parse_json(text: bytes | bytearray) -> Any:
    """What JSON in UTF-8, with a mark of byte order or without, says.

    Raises:
        ValueError: no JSON, or half a character in it (a lone surrogate), which could be written nowhere.
        RecursionError: brackets within brackets without end.
    """
    found = json.loads(text.decode("utf-8-sig"))
    if re.search(rb"\\u[dD]", text):
        json.dumps(found, ensure_ascii=False).encode()
    return found


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, in its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir(*parts: str) -> Path:
    """A folder for what can be made again: ``$HISTILL_CACHE``, else ``~/.cache/histill``."""
    path = _cache_root().joinpath(*parts)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) or error from None
    return path


def _cache_root() -> Path:
    if told := os.environ.get("HISTILL_CACHE"):
        return Path(told)
    try:
        return Path.home() / ".cache" / "histill"
    except RuntimeError:  # a container's user without a name
        raise BadInput("this user has no home folder to keep what can be made again; set HISTILL_CACHE") from None


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``; only who holds it may."""
    for left in (*folder.glob(".*.tmp"), *folder.glob("figures/.*.tmp")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold ``folder`` for this process (released even by a kill); an error takes it away again where it left nothing.

    The lock is `flock`'s. On NFS it holds between machines from version 4 on, or with a lock daemon; where a file
    system has no locks at all, a notice says so.

    Raises:
        BadInput: another process holds it (with ``wait`` its turn is awaited), or it may not be written to.
    """
    lock = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                file = lock.open("a")
            except FileNotFoundError:
                continue  # who held it has just taken the folder away
        except OSError as error:
            raise _cannot_write(folder, error) or error from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise BadInput(f"another process is writing to {folder}; wait for it or give another --out") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                from histill.progress import notice

                notice(f"{folder} lies where files cannot be locked: see that no other process writes to it")
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
