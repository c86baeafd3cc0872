"""Published data sets from where they are published: download, go on, verify, unpack, manifest."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from histill.data.archives import gunzip, unpack
from histill.data.sets import DataSet, File, chosen, get, manifest
from histill.data.sets._manifest import By
from histill.errors import BadInput, Failed
from histill.files import locked, read_json, sweep, write_json
from histill.progress import Bar, notice, progress, say

__all__ = ["download", "fetch", "next_command"]

_MEGABYTE = 1 << 20
_TRIES = 4
_PAUSE_S = 1.0
_TIMEOUT_S = 60.0
_MOST_BYTES = 1 << 40
_RECORD = "fetched.json"
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_TROUBLE = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


def fetch(name: str, out: str | Path | None = None, *, by: By = "patient") -> Path:
    """Download a data set, verify and unpack it, write its manifest; goes on where it stopped.

    ``out/fetched.json`` keeps the digest of every file; an archive that was unpacked may be deleted.

    Args:
        name: of the data set (`histill.data.sets.SETS`).
        out: the folder; by default one called like the data set.
        by: as for `histill.data.sets.manifest`.

    Raises:
        BadInput: no such data set, or no split of eva; files that have to be asked for are missing, with the page
            where.
        Failed: the server does not answer, sends something else, or a checksum is wrong.
    """
    data = get(name)
    chosen(data, by)  # before hours of downloading
    folder = Path(name if out is None else out)
    with locked(folder):
        sweep(folder)
        record = read_json(folder / _RECORD) if (folder / _RECORD).exists() else {}
        if not isinstance(record, dict) or not all(isinstance(state, dict) for state in record.values()):
            raise BadInput(f"{folder / _RECORD} is not what this command writes; remove it")
        missing = []
        for file in data.files:
            state = record.setdefault(file.name, {})
            if state.get("unpacked"):
                continue
            if not (folder / file.name).exists() and not file.url:
                missing.append(file.name)
                continue
            _have(data, file, folder, state)
            write_json(folder / _RECORD, record)
            _open(file, folder, state)
            write_json(folder / _RECORD, record)
        return _manifest(data, folder, by, missing)


def next_command(data: DataSet, path: Path) -> str:
    """What to run on a manifest next."""
    return " ".join(
        ["histill", data.command, "--data", shlex.quote(str(path)), "--out", f"runs/{data.name}", data.flags]
    ).strip()


def _manifest(data: DataSet, folder: Path, by: By, missing: list[str]) -> Path:
    by_hand = [file.name for file in data.files if file.name.endswith(".7z")]
    try:
        return manifest(data, folder, by=by)
    except BadInput as error:
        if missing:
            raise BadInput(
                f"{data.name}: {data.access} ({data.homepage}), put {' and '.join(missing)} into {folder}, unpacked or "
                f"not, and run this again (now: {error})"
            ) from None
        if by_hand:
            raise BadInput(
                f"{data.name}: 7-Zip archives are unpacked by hand: cd {shlex.quote(str(folder))} && "
                f"{' && '.join(f'7z x {name}' for name in by_hand)}; then run this again (now: {error})"
            ) from None
        raise


def _have(data: DataSet, file: File, folder: Path, state: dict[str, Any]) -> None:
    """See that the file is there and is the published one."""
    target = folder / file.name
    if target.exists():
        found = target.stat()
        if state.get("sha256") and (state["bytes"], state["changed_ns"]) == (found.st_size, found.st_mtime_ns):
            return
        if wrong := _verify(file, target, state):
            raise Failed(f"{target}: {wrong}; remove it and run this again")
    else:
        part = folder / f"{file.name}.part"
        _room(file, folder, part)
        try:
            download(file.url, part, size=file.size, checked=file.checksum is not None)
        except Failed as error:
            raise Failed(f"{error}; run this again to go on, or download it by hand ({data.homepage})") from None
        if wrong := _verify(file, part, state):
            part.unlink()
            _note(part).unlink(missing_ok=True)
            raise Failed(f"{file.url}: {wrong}; what came was removed, run this again")
        os.replace(part, target)
        _note(part).unlink(missing_ok=True)
    found = target.stat()
    state.update(url=file.url, bytes=found.st_size, changed_ns=found.st_mtime_ns, published=file.checksum)


def _room(file: File, folder: Path, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    if file.size and file.size - have > (free := shutil.disk_usage(folder).free):
        raise BadInput(
            f"{folder}: {file.name} needs {file.size - have:,} bytes and {free:,} are free; give another --out"
        )


def _verify(file: File, path: Path, state: dict[str, Any]) -> str:
    """What is wrong with the file, empty where nothing is; its SHA-256 goes into ``state``."""
    kind, _, published = (file.checksum or "sha256:").partition(":")
    sums = {name: hashlib.new(name) for name in {"sha256", kind}}
    with progress(f"verifying {file.name}", _megabytes(path.stat().st_size), "MB") as bar, path.open("rb") as source:
        while block := source.read(_MEGABYTE):
            for one in sums.values():
                one.update(block)
            bar.advance()
    if published and (found := sums[kind].hexdigest()) != published:
        return f"its {kind} is {found}, published is {published}"
    sha256 = sums["sha256"].hexdigest()
    if not published and state.get("sha256", sha256) != sha256:
        return f"its sha256 is {sha256}, that of the first download was {state['sha256']}"
    state["sha256"] = sha256
    return ""


def _open(file: File, folder: Path, state: dict[str, Any]) -> None:
    """Unpack the file, where it is packed, into the folder."""
    source = folder / file.name
    if file.name.endswith(_ARCHIVES):
        temporary = folder / f".{uuid.uuid4().hex[:8]}.tmp"
        try:
            unpack(source, temporary)
            _move(temporary, folder / file.into, file.into)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    elif file.name.endswith(".gz"):
        gunzip(source, source.with_suffix(""))
    else:
        return
    state["unpacked"] = True
    say(f"{source} is unpacked and may be deleted")


def _move(source: Path, target: Path, own: str) -> None:
    """Move what was unpacked to its place, file by file, so that a killed move can be done again.

    A folder that the archive brings and that is called like its ``own`` place is not put into it twice.
    """
    if own and (source / own).is_dir():
        source = source / own
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)


def download(url: str, part: Path, *, size: int | None = None, checked: bool = False) -> None:
    """Download ``url`` into ``part``, which is kept when it is cut off and continued (HTTP Range) the next time.

    Only a part of the same file is continued: the server's ETag or date is kept beside it and sent along. Where the
    server gives neither, the part is continued if a checksum will tell, and otherwise begun again.

    Args:
        url: http or https.
        part: the file.
        size: bytes, for the bar, where the server does not say.
        checked: a published checksum is compared afterwards.

    Raises:
        Failed: the server refuses, or does not answer after several tries.
    """
    if not url.startswith(("https://", "http://")):
        raise BadInput(f"{url}: only http and https are downloaded")
    for attempt in range(_TRIES):
        try:
            _get(url, part, size, checked)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise Failed(f"{url}: the server says {error.code} {error.reason}") from None
            trouble: Exception = error
        except _TROUBLE as error:
            trouble = error
        if attempt + 1 < _TRIES:
            notice(f"{url}: {trouble}; trying again")
            time.sleep(_PAUSE_S * 2**attempt)
    raise Failed(f"{url}: {trouble}")


def _get(url: str, part: Path, size: int | None, checked: bool) -> None:
    """One request; a part that was cut off is continued."""
    kept = _kept(url, part)
    have = part.stat().st_size if kept or (kept is not None and checked) else 0
    headers = {"User-Agent": "histill", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", **({"If-Range": kept} if kept else {})}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink(missing_ok=True)  # longer than the file: it is another one by now
        raise ConnectionError("the file has changed") from None
    with answer:
        kind = answer.headers.get_content_type()
        if kind == "text/html" and not url.endswith((".html", ".htm")):
            raise Failed(f"{url}: the server sent a web page, not the file; it may want a sign-in")
        going_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not going_on:
            have = 0
        tag = answer.headers.get("ETag") or ""
        validator = tag if tag.startswith('"') else answer.headers.get("Last-Modified") or ""  # a weak tag will not do
        write_json(_note(part), {"url": url, "validator": validator})
        length = answer.headers.get("Content-Length")
        if length is not None and not re.fullmatch("[0-9]{1,15}", length):
            raise Failed(f"{url}: the server does not say a length that can be ({length!r})")
        total = have + int(length) if length else size or 0
        with (
            progress(
                f"downloading {part.name.removesuffix('.part')}", _megabytes(total), "MB", done=have // _MEGABYTE
            ) as bar,
            part.open("ab" if going_on else "wb") as file,
        ):
            _copy(answer, file, bar, url)
    if length and (came := part.stat().st_size) != total:
        raise ConnectionError(f"cut off after {came:,} of {total:,} bytes")


def _copy(source: http.client.HTTPResponse | Any, target: IO[bytes], bar: Bar, url: str) -> None:
    rest = 0
    while block := source.read(1 << 16):
        target.write(block)
        if target.tell() > _MOST_BYTES:
            raise Failed(f"{url}: the server sends more than {_MOST_BYTES:,} bytes; it is not the data set")
        rest += len(block)
        if rest >= _MEGABYTE:
            bar.advance(rest // _MEGABYTE)
            rest %= _MEGABYTE


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _kept(url: str, part: Path) -> str | None:
    """What the server called the version that ``part`` is of, empty where it did not; None where there is no part."""
    with suppress(BadInput, OSError, AttributeError, TypeError, json.JSONDecodeError):
        note = read_json(_note(part))
        if part.exists() and note.get("url") == url and re.fullmatch(r"[ -~]*", note["validator"]):
            return str(note["validator"])
    return None


def _megabytes(count: int) -> int:
    return max(1, -(-count // _MEGABYTE))
