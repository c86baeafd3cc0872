"""Archives of others -> files, in one folder and nowhere else; what an archive claims is not believed."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from histill.errors import BadInput
from histill.files import atomic
from histill.progress import notice, progress

__all__ = ["gunzip", "read_member", "unpack"]

_MEGABYTE = 1 << 20
_MOST_BYTES = 1 << 40
"""More than any data set of images here; a tebibyte."""
_MOST_FILES = 5_000_000
_MOST_TIMES = 200
"""How many times as large as its archive the content may be. Images stay below 3, CSV and XML below 20, empty masks
can reach 100; a bomb has 1,000 and more."""
_SMALL = 16 * _MEGABYTE
"""Up to here any ratio is harmless."""
_MOST_HEADER = 16 * _MEGABYTE
"""Of a tar member; it is read into memory."""
_SEVEN_ZIP = b"7z\xbc\xaf\x27\x1c"
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError)


class _Member(NamedTuple):
    name: str
    kind: Literal["file", "folder", "link", "other"]
    file: IO[bytes] | None
    link: str
    read: int
    """Bytes of the archive behind this member, for the bar."""
    crc: int | None = None
    """What the archive says of its content; `zipfile` does not look where it stops too early."""


class _Limit:
    """Counts what is written and refuses what no honest archive holds."""

    def __init__(self, archive: Path, most_bytes: int) -> None:
        self.archive, self.most_bytes = archive, most_bytes
        self.packed = max(archive.stat().st_size, 1)
        self.written = self.files = self.members = 0

    def add(self, count: int) -> None:
        self.written += count
        if self.written > self.most_bytes:
            raise BadInput(f"{self.archive}: holds more than {self.most_bytes:,} bytes; nothing was unpacked")
        if self.written > _SMALL and self.written > _MOST_TIMES * self.packed:
            raise BadInput(
                f"{self.archive}: swells to more than {_MOST_TIMES} times its size, as a decompression bomb does; "
                "nothing was unpacked"
            )

    def add_member(self) -> None:
        self.members += 1
        if self.members > _MOST_FILES:
            raise BadInput(f"{self.archive}: holds more than {_MOST_FILES:,} members; nothing was unpacked")

    def reach(self, place: int) -> None:
        """So far has been read of what a packed tar unpacks to, headers and what is left out included."""
        if place > _SMALL and place > _MOST_TIMES * self.packed:
            raise BadInput(
                f"{self.archive}: swells to more than {_MOST_TIMES} times its size, as a decompression bomb does; "
                "nothing was unpacked"
            )


def unpack(archive: str | Path, out: str | Path, *, most_bytes: int = _MOST_BYTES) -> int:
    """Unpack a zip or tar (gz, bz2, xz) archive into ``out``, a new or empty folder; returns how many files.

    All or nothing: members go to a temporary folder beside ``out`` that takes its place at the end. Links that stay
    inside are left out with a notice.

    Args:
        archive: the file; its kind is read off its content.
        out: the folder.
        most_bytes: the most that it may unpack to.

    Raises:
        BadInput: not such an archive, damaged or locked by a password; a member or a link that leaves ``out``, a
            device, two members of one name, a decompression bomb; ``out`` is taken.
    """
    archive, out = Path(archive), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is not an empty folder; give another")
    if not archive.is_file():
        raise BadInput(f"{archive} does not exist" if not archive.exists() else f"{archive} is not a file")
    limit = _Limit(archive, most_bytes)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        temporary.mkdir(parents=True)
        links = _fill(archive, temporary, limit)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
    if links:
        notice(f"{archive}: {links} links were left out")
    return limit.files


def _fill(archive: Path, folder: Path, limit: _Limit) -> int:
    """Write every member below ``folder``; returns how many links were left out."""
    links, before = 0, 0
    with (
        progress(f"unpacking {archive.name}", -(-limit.packed // _MEGABYTE), "MB") as bar,
        _members(archive, limit) as all_,
    ):
        for member in all_:
            limit.add_member()
            parts = _parts(archive, member.name)
            target = folder.joinpath(*parts)
            try:
                if member.kind == "other":
                    raise BadInput(f"{archive}: {member.name!r} is a device or the like; nothing was unpacked")
                if member.kind == "link":
                    _check_link(archive, member)
                    links += 1
                elif member.kind == "folder":
                    target.mkdir(parents=True, exist_ok=True)
                elif parts and member.file is not None:
                    limit.files += 1
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("xb") as file:
                        if _copy(member.file, file, limit) != member.crc and member.crc is not None:
                            raise zipfile.BadZipFile(f"{member.name!r} is not what it says")
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                raise BadInput(f"{archive}: two members are called {member.name!r}; nothing was unpacked") from None
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                raise BadInput(f"{archive}: {member.name[:40]!r}... is too long a name; nothing was unpacked") from None
            if (now := member.read // _MEGABYTE) > before:
                bar.advance(now - before)
                before = now
    return links


def _copy(source: IO[bytes], target: IO[bytes], limit: _Limit) -> int:
    """Copy, and return the CRC-32 of what came."""
    crc = 0
    while block := source.read(_MEGABYTE):
        limit.add(len(block))
        target.write(block)
        crc = zlib.crc32(block, crc)
    return crc


@contextmanager
def _members(archive: Path, limit: _Limit) -> Iterator[Iterator[_Member]]:
    """What the archive holds, in order; its damage is `BadInput`, the disk's trouble stays what it is."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as whole:
                yield _of_zip(archive, whole)
        else:
            with (
                archive.open("rb") as raw,
                _Unpacked(raw, limit) as stream,
                _tar(stream) as tar,
            ):
                yield _of_tar(tar, raw)
    except _DAMAGE as error:
        raise BadInput(_why(archive, error)) from None
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise
        raise BadInput(_why(archive, error)) from None  # gzip's word for damage, and a place that no file has
    except (ValueError, struct.error, OverflowError, IndexError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(_why(archive, error)) from None  # a number that cannot be, a member without a name
    except MemoryError:
        raise BadInput(f"{archive} asks for more memory than there is to unpack it; nothing was unpacked") from None


class _Unpacked:
    """A tar file's bytes, unpacked where it is packed: a file for `tarfile` that lets nobody read without measure.

    `tarfile` reads a member's header whole, however long it says that it is, and skips what is not wanted: neither is
    counted where files are written.
    """

    def __init__(self, raw: IO[bytes], limit: _Limit) -> None:
        head = raw.read(6)
        raw.seek(0)
        kinds: dict[bytes, Callable[[IO[bytes]], Any]] = {
            b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
            b"BZh": bz2.BZ2File,
            b"\xfd7zXZ\0": lzma.LZMAFile,
            b"]\0\0": lzma.LZMAFile,
        }
        opened = next((kind for magic, kind in kinds.items() if head.startswith(magic)), None)
        self.file, self.limit = opened(raw) if opened else raw, limit

    def __enter__(self) -> _Unpacked:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, count: int) -> bytes:
        if count > _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        data: bytes = self.file.read(count)
        self.tell()
        return data

    def seek(self, place: int) -> int:
        here: int = self.file.tell()
        while here + _MOST_HEADER < place:  # forward in steps, so that the limit is met on the way
            self.file.seek(here := here + _MOST_HEADER)
            self.limit.reach(here)
        self.file.seek(place)
        return self.tell()

    def tell(self) -> int:
        here: int = self.file.tell()
        self.limit.reach(here)
        return here


def _tar(stream: Any) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode="r:")


def _why(archive: Path, error: Exception) -> str:
    with archive.open("rb") as file:
        start = file.read(6)
    if start == _SEVEN_ZIP:
        return f"{archive}: 7-Zip archives are not unpacked here; use: 7z x {archive.name}"
    return f"{archive}: not a whole zip or tar archive ({' '.join(str(error).split()) or 'it ends too early'})"


def _of_zip(archive: Path, whole: zipfile.ZipFile) -> Iterator[_Member]:
    read = 0
    for info in whole.infolist():
        if info.flag_bits & 1:
            raise BadInput(f"{archive}: {info.filename!r} is locked by a password; unpack it by hand")
        read += info.compress_size
        mode = info.external_attr >> 16
        if stat.S_ISLNK(mode):
            link = whole.read(info).decode("utf-8", "replace") if info.file_size < 4096 else "/"
            yield _Member(info.filename, "link", None, link, read)
        elif info.is_dir() or info.filename.endswith("\\"):
            yield _Member(info.filename, "folder", None, "", read)
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            yield _Member(info.filename, "other", None, "", read)
        else:
            with whole.open(info) as file:
                yield _Member(info.filename, "file", file, "", read, info.CRC)


def _of_tar(tar: tarfile.TarFile, raw: IO[bytes]) -> Iterator[_Member]:
    for info in tar:
        if info.isdir():
            yield _Member(info.name, "folder", None, "", raw.tell())
        elif info.issym():
            yield _Member(info.name, "link", None, info.linkname, raw.tell())
        elif info.islnk():  # its target is named from the top
            depth = len([p for p in info.name.split("/") if p not in ("", ".")]) - 1
            link = info.linkname if info.linkname.startswith("/") else "../" * depth + info.linkname
            yield _Member(info.name, "link", None, link, raw.tell())
        elif info.isreg():
            yield _Member(info.name, "file", tar.extractfile(info), "", raw.tell())
        else:
            yield _Member(info.name, "other", None, "", raw.tell())


def _parts(archive: Path, name: str) -> list[str]:
    """The member's path, refused where it could lead out of the folder."""
    clean = name.replace("\\", "/")
    parts = [part for part in clean.split("/") if part not in ("", ".")]
    if clean.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", clean):
        raise BadInput(f"{archive}: {name!r} would leave the folder; nothing was unpacked")
    if any(ord(c) < 32 or "\ud800" <= c <= "\udfff" for c in clean):
        raise BadInput(f"{archive}: {name!a} is not a file's name; nothing was unpacked")
    return parts


def _check_link(archive: Path, member: _Member) -> None:
    link = member.link.replace("\\", "/")
    whole = os.path.normpath(os.path.join(os.path.dirname(member.name), link))  # noqa: PTH120 - no file is meant
    if link.startswith("/") or re.match(r"[A-Za-z]:", link) or whole.split("/")[0] == "..":
        raise BadInput(f"{archive}: the link {member.name!r} leads out of the folder; nothing was unpacked")


def gunzip(archive: Path, target: Path, *, most_bytes: int = _MOST_BYTES) -> None:
    """Decompress one file, under the limits of `unpack`; it is there whole or not at all.

    Raises:
        BadInput: not gzip, damaged, or a decompression bomb.
    """
    limit, before = _Limit(archive, most_bytes), 0
    try:
        with (
            progress(f"unpacking {archive.name}", -(-limit.packed // _MEGABYTE), "MB") as bar,
            archive.open("rb") as raw,
            gzip.open(raw) as source,
            atomic(target) as temporary,
            temporary.open("wb") as file,
        ):
            while block := source.read(_MEGABYTE):
                limit.add(len(block))
                file.write(block)
                if (now := raw.tell() // _MEGABYTE) > before:
                    bar.advance(now - before)
                    before = now
    except (*_DAMAGE, gzip.BadGzipFile) as error:
        raise BadInput(_why(archive, error).replace("zip or tar archive", "gzip file")) from None


def read_member(archive: Path, name: str, what: str, most: int) -> bytes:
    """One file of a tar archive, one byte more than ``most`` at the most; nothing is written by the archive's names.

    Raises:
        BadInput: no such archive (``what`` it should be) or no such file in it.
    """
    try:
        limit = _Limit(archive, _MOST_BYTES)
        with archive.open("rb") as raw, _Unpacked(raw, limit) as stream, _tar(stream) as tar:
            file = tar.extractfile(name)
            if file is None:
                raise KeyError(name)
            data = bytearray()
            while len(data) <= most and (block := file.read(min(_MEGABYTE, most + 1 - len(data)))):
                data += block
            return bytes(data)
    except FileNotFoundError:
        raise BadInput(f"{archive} does not exist") from None
    except BadInput:
        raise
    except (KeyError, *_DAMAGE, OSError, ValueError) as error:
        raise BadInput(f"{archive}: not {what} ({' '.join(str(error).split())})") from None
