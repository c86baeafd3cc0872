"""An archive is unpacked whole into its folder or not at all, and nothing that it claims leads out of it."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import histill as hs
from histill.cli import run
from histill.data.archives import gunzip, read_member
from histill.errors import BadInput

unpack = hs.data.unpack
FILES = {"a/one.txt": b"one", "a/b/two.bin": bytes(range(256)) * 9, "three": b""}
LINKS = {"absolute": "/etc/passwd", "upwards": "../outside", "roundabout": "a/../../outside"}


def tarred(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def zipped(path: Path, files: dict[str, bytes], modes: dict[str, int] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (modes or {}).get(name, 0o644 | stat.S_IFREG) << 16
            archive.writestr(info, content)
    return path


def special(path: Path, kind: bytes, link: str = "", name: str = "entry") -> Path:
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("before"), io.BytesIO())
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, link
        tar.addfile(entry)
    return path


def refused(archive: Path, said: str) -> None:
    """Refused with one line that says so, nothing written anywhere."""
    out = archive.parent / "new" / "out"
    before = sorted(archive.parent.rglob("*"))
    with pytest.raises(BadInput, match=said) as caught:
        unpack(archive, out)
    assert "\n" not in str(caught.value)
    assert str(archive) in str(caught.value)
    assert sorted(archive.parent.rglob("*")) == before


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_what_goes_in_comes_out(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"x.{suffix}"
    if suffix == "zip":
        zipped(archive, {**FILES, "empty/": b""})
    else:
        tarred(archive, FILES, f"w:{suffix.partition('.')[2]}" if "." in suffix else "w")
    assert run(["data", "unpack", str(archive), str(tmp_path / "out")]) == 0
    found = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == FILES
    assert not any(path.stat().st_mode & 0o111 for path in found.values())


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:\\evil", "c:/evil", "a/..", "..", "\\\\host\\share"]
)
@pytest.mark.parametrize("make", [tarred, zipped])
def test_members_that_leave_are_refused(tmp_path: Path, name: str, make: object) -> None:
    home = tmp_path / "deep" / "home"
    home.mkdir(parents=True)
    make(home / "x.archive", {"good": b"1", name: b"2"})  # type: ignore[operator]
    refused(home / "x.archive", "would leave the folder")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "\\..", "..\\", "~", "$x"]), min_size=1, max_size=6))
def test_no_name_leads_out(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    home = tmp_path_factory.mktemp("names")
    archive = zipped(home / "x.zip", {"/".join(parts) + "/f": b"x"})
    try:
        unpack(archive, home / "out")
    except BadInput:
        assert not (home / "out").exists()
    written = [path for path in home.rglob("*") if path.is_file() and path != archive]
    assert all((home / "out") in path.parents for path in written)


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
def test_links_out_are_refused(tmp_path: Path, kind: bytes, link: str) -> None:
    refused(special(tmp_path / "x.tar", kind, link), "leads out of the folder")


def test_a_hard_link_is_named_from_the_top(tmp_path: Path) -> None:
    # From a/b/entry a symbolic ../../x stays inside, a hard link of that name does not.
    assert unpack(special(tmp_path / "a.tar", tarfile.SYMTYPE, "../../x", "a/b/entry"), tmp_path / "fine") == 1
    refused(special(tmp_path / "b.tar", tarfile.LNKTYPE, "../../x", "a/b/entry"), "leads out of the folder")


def test_links_in_a_zip_are_links_too(tmp_path: Path) -> None:
    mode = {"entry": stat.S_IFLNK | 0o777}
    refused(zipped(tmp_path / "x.zip", {"entry": b"../../outside"}, mode), "leads out of the folder")
    assert unpack(zipped(tmp_path / "y.zip", {"f": b"1", "entry": b"f"}, mode), tmp_path / "fine") == 1
    assert [path.name for path in (tmp_path / "fine").iterdir()] == ["f"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("inner")
        link.type, link.linkname = tarfile.SYMTYPE, "."
        tar.addfile(link)
        entry = tarfile.TarInfo("inner/file")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    assert unpack(tmp_path / "x.tar", tmp_path / "out") == 1
    assert (tmp_path / "out/inner/file").read_bytes() == b"x"
    assert not (tmp_path / "out/inner").is_symlink()


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    refused(special(tmp_path / "x.tar", kind), "is a device or the like")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_without_a_name_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a", b"bytes")
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(b"\x01\x00\x00\x00a", b"\x00\x00\x00\x00a").replace(b"a", b"\x00"))
    with pytest.raises(BadInput):
        hs.data.unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_asks_for_more_memory_than_there_is_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as file:
        file.addfile(tarfile.TarInfo("a"))

    def full(*_: object) -> object:
        raise MemoryError

    monkeypatch.setattr("lzma.LZMAFile.read", full)
    with pytest.raises(BadInput, match="more memory than there is"):
        hs.data.unpack(tmp_path / "a.tar.xz", tmp_path / "out")


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/f", b"1")
        archive.writestr("a/./f", b"2")
    refused(tmp_path / "x.zip", "two members are called")
    refused(zipped(tmp_path / "y.zip", {"a": b"1", "a/b": b"2"}), "two members are called")
    refused(zipped(tmp_path / "z.zip", {"a/b": b"1", "a": b"2"}), "two members are called")


@pytest.mark.parametrize("make", [tarred, zipped])
def test_bombs_are_refused(tmp_path: Path, make: object) -> None:
    make(tmp_path / "x.archive", {"small": b"1", "zeros": bytes(40 << 20)})  # type: ignore[operator]
    assert (tmp_path / "x.archive").stat().st_size < 1 << 17
    refused(tmp_path / "x.archive", "decompression bomb")


def test_many_small_bombs_are_one(tmp_path: Path) -> None:
    refused(zipped(tmp_path / "x.zip", {f"{n}": bytes(1 << 20) for n in range(40)}), "decompression bomb")


def test_empty_masks_are_no_bomb(tmp_path: Path) -> None:
    # 20 MB of pictures that compress 100 times, as masks do.
    masks = {f"{n}.bmp": bytes(990_000) + os.urandom(10_000) for n in range(20)}
    assert unpack(zipped(tmp_path / "x.zip", masks), tmp_path / "out") == 20


def test_the_limit_counts_what_is_written(tmp_path: Path) -> None:
    archive = tarred(tmp_path / "x.tar.gz", {"a": b"x" * 600, "b": b"x" * 600})
    assert unpack(archive, tmp_path / "enough", most_bytes=1200) == 2
    with pytest.raises(BadInput, match="more than 1,199 bytes"):
        unpack(archive, tmp_path / "less", most_bytes=1199)
    assert not (tmp_path / "less").exists()


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(40 << 20)))
    with pytest.raises(BadInput, match="decompression bomb"):
        gunzip(tmp_path / "x.gz", tmp_path / "x")
    (tmp_path / "y.gz").write_bytes(gzip.compress(b"content")[:-9])
    with pytest.raises(BadInput, match="not a whole gzip file"):
        gunzip(tmp_path / "y.gz", tmp_path / "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gz", "y.gz"]
    (tmp_path / "z.gz").write_bytes(gzip.compress(b"content"))
    gunzip(tmp_path / "z.gz", tmp_path / "z")
    assert (tmp_path / "z").read_bytes() == b"content"


@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
@pytest.mark.parametrize("make", [tarred, zipped])
def test_half_an_archive_is_refused(tmp_path: Path, make: object, share: float) -> None:
    make(tmp_path / "x.archive", {f"{n}": os.urandom(3000) for n in range(4)})  # type: ignore[operator]
    whole = (tmp_path / "x.archive").read_bytes()
    (tmp_path / "x.archive").write_bytes(whole[: int(len(whole) * share)])
    refused(tmp_path / "x.archive", "not a whole zip or tar archive")


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", {"f": os.urandom(5000)})
    content = bytearray(archive.read_bytes())
    content[2500] ^= 1
    archive.write_bytes(content)
    refused(archive, "not a whole zip or tar archive")


def test_other_files_are_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "x.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    refused(tmp_path / "x.7z", "7z x x.7z")
    (tmp_path / "plain").write_bytes(b"no archive at all" * 100)
    refused(tmp_path / "plain", "not a whole zip or tar archive")
    with pytest.raises(BadInput, match="does not exist"):
        unpack(tmp_path / "none.zip", tmp_path / "out")
    with pytest.raises(BadInput, match="is not a file"):
        unpack(tmp_path, tmp_path / "out")


def test_a_password_is_said(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", {"f": b"secret"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    refused(archive, "locked by a password")


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", {"f": b"1"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full/own").write_text("mine")
    (tmp_path / "file").touch()
    for taken in ("full", "file"):
        with pytest.raises(BadInput, match="is not an empty folder"):
            unpack(archive, tmp_path / taken)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["own"]
    (tmp_path / "empty").mkdir()
    assert unpack(archive, tmp_path / "empty") == 1


def test_names_that_are_none_are_refused(tmp_path: Path) -> None:
    refused(tarred(tmp_path / "x.tar.gz", {"a\nb": b"1"}), "is not a file's name")


def test_one_member_is_read_up_to_its_limit(tmp_path: Path) -> None:
    archive = tarred(tmp_path / "x.tar.gz", FILES)
    assert read_member(archive, "a/one.txt", "it", 10) == b"one"
    assert len(read_member(archive, "a/b/two.bin", "it", 10)) == 11
    with pytest.raises(BadInput, match=r"x.tar.gz: not it"):
        read_member(archive, "none", "it", 10)
