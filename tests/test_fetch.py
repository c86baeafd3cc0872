"""A download that is cut off ends in the bytes of an undisturbed one; what is not the published file is not kept."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import picture
from PIL import Image

from histill.cli import run
from histill.data import fetch as module
from histill.data import read_images
from histill.data.fetch import download, fetch
from histill.data.sets import SETS, DataSet, File, Row
from histill.data.sets._record import pictures
from histill.errors import BadInput, Failed

CONTENT = os.urandom(300_000)


@dataclass
class Site:
    """A web server: what it holds, how it misbehaves, what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    tag: str = '"v1"'
    cuts: list[int] = field(default_factory=list)
    """After how many bytes each of the next answers breaks off."""
    refusals: list[int] = field(default_factory=list)
    kind: str = "application/octet-stream"
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            wanted, same = self.headers.get("Range", ""), self.headers.get("If-Range", site.tag)
            site.asked.append((name, wanted))
            if site.refusals:
                self.send_error(site.refusals.pop(0))
                return
            if name not in site.files:
                self.send_error(404)
                return
            content, start = site.files[name], 0
            if site.ranges and wanted and same == site.tag:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Type", site.kind)
            self.send_header("Content-Length", str(len(content) - start))
            if site.tag:
                self.send_header("ETag", site.tag)
            self.end_headers()
            part = content[start:]
            if site.cuts:
                part = part[: site.cuts.pop(0)]
            site.sent += len(part)
            self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_download_that_breaks_off_goes_on_by_itself(site: Site, tmp_path: Path) -> None:
    site.files, site.cuts = {"f": CONTENT}, [100_000, 70_000]
    download(f"{site.url}/f", tmp_path / "f.part")
    assert (tmp_path / "f.part").read_bytes() == CONTENT
    assert site.sent == len(CONTENT)  # no byte came twice
    assert [wanted for _, wanted in site.asked] == ["", "bytes=100000-", "bytes=170000-"]


def test_an_interrupted_download_goes_on_the_next_time(site: Site, tmp_path: Path) -> None:
    site.files, site.cuts = {"f": CONTENT}, [60_000] * 4
    with pytest.raises(Failed, match=r"cut off after 240,000 of 300,000 bytes"):
        download(f"{site.url}/f", tmp_path / "f.part")
    download(f"{site.url}/f", tmp_path / "f.part")
    assert (tmp_path / "f.part").read_bytes() == CONTENT
    assert site.sent == len(CONTENT)


def test_a_server_without_ranges_begins_again(site: Site, tmp_path: Path) -> None:
    site.files, site.cuts, site.ranges = {"f": CONTENT}, [100_000], False
    download(f"{site.url}/f", tmp_path / "f.part")
    assert (tmp_path / "f.part").read_bytes() == CONTENT
    assert site.sent == len(CONTENT) + 100_000


def test_a_file_that_changed_meanwhile_is_begun_again(site: Site, tmp_path: Path) -> None:
    site.files, site.cuts = {"f": CONTENT}, [60_000] * 4
    with pytest.raises(Failed):
        download(f"{site.url}/f", tmp_path / "f.part")
    site.files, site.tag = {"f": CONTENT[::-1]}, '"v2"'
    download(f"{site.url}/f", tmp_path / "f.part")
    assert (tmp_path / "f.part").read_bytes() == CONTENT[::-1]
    # and where it became shorter than what there is
    site.files, site.tag, site.cuts = {"f": CONTENT[:1000]}, '"v2"', []
    download(f"{site.url}/f", tmp_path / "f.part")
    assert (tmp_path / "f.part").read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("checked", [False, True])
def test_without_a_version_only_a_checksum_lets_it_go_on(site: Site, tmp_path: Path, checked: bool) -> None:
    site.files, site.cuts, site.tag = {"f": CONTENT}, [100_000], ""
    download(f"{site.url}/f", tmp_path / "f.part", checked=checked)
    assert (tmp_path / "f.part").read_bytes() == CONTENT
    assert site.sent == len(CONTENT) + (0 if checked else 100_000)


def test_a_part_of_another_address_is_not_gone_on_with(site: Site, tmp_path: Path) -> None:
    site.files, site.cuts = {"f": CONTENT, "g": CONTENT[::-1]}, [60_000] * 4
    with pytest.raises(Failed):
        download(f"{site.url}/f", tmp_path / "f.part", checked=True)
    download(f"{site.url}/g", tmp_path / "f.part", checked=True)
    assert (tmp_path / "f.part").read_bytes() == CONTENT[::-1]


def test_a_busy_server_is_asked_again_and_a_refusal_is_said(site: Site, tmp_path: Path) -> None:
    site.files, site.refusals = {"f": CONTENT}, [503, 429]
    download(f"{site.url}/f", tmp_path / "f.part")
    assert len(site.asked) == 3
    with pytest.raises(Failed, match="404"):
        download(f"{site.url}/none", tmp_path / "none.part")
    assert len(site.asked) == 4
    site.refusals = [500] * 9
    with pytest.raises(Failed, match="500"):
        download(f"{site.url}/f", tmp_path / "g.part")


def test_a_page_to_sign_in_is_no_file(site: Site, tmp_path: Path) -> None:
    site.files, site.kind = {"f.zip": b"<html>sign in</html>"}, "text/html; charset=utf-8"
    with pytest.raises(Failed, match="sent a web page"):
        download(f"{site.url}/f.zip", tmp_path / "f.part")
    assert not (tmp_path / "f.part").exists()


def test_other_schemes_are_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(BadInput, match="only http and https"):
        download((tmp_path / "secret").as_uri(), tmp_path / "f.part")


# Whole data sets


def packed() -> bytes:
    """An archive of six pictures of two classes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for number in range(6):
            image = io.BytesIO()
            Image.fromarray(picture(number, number % 2)).save(image, "png")
            archive.writestr(f"set/{'ab'[number % 2]}/p{number // 2}_{number}.png", image.getvalue())
    return content.getvalue()


def rows(folder: Path) -> Iterator[Row]:
    for label in "ab":
        for path in pictures(folder / "set" / label):
            yield Row(path, label, patient=path.name[:2])


@pytest.fixture
def small(site: Site, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    """A data set of one archive and one text file on the local server."""
    site.files = {"set.zip": packed(), "notes.txt": b"notes"}
    data = replace(
        SETS["bach"],
        name="small",
        files=(
            File("set.zip", f"{site.url}/set.zip", checksum=f"md5:{hashlib.md5(site.files['set.zip']).hexdigest()}"),
            File("notes.txt", f"{site.url}/notes.txt"),
        ),
        classes=("a", "b"),
        images={"": 6},
        rows=rows,
    )
    monkeypatch.setitem(SETS, "small", data)
    return data


def test_a_data_set_comes_ready_to_train(
    small: DataSet, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["data", "fetch", "small", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert f"next: histill distill dsnet --data {out}/manifest.csv --out runs/small --val 0.2 --test 0.2" in said.out
    images = read_images(out / "manifest.csv")
    assert len(images) == 6
    assert images.classes == ("a", "b")
    assert set(images.frame["patient"]) == {"p0", "p1", "p2"}
    assert not list(out.rglob("*.part*"))
    record = json.loads((out / "fetched.json").read_text())
    assert record["notes.txt"]["sha256"] == hashlib.sha256(b"notes").hexdigest()

    # Again: nothing is downloaded, even when the archive was deleted, and the manifest has the same bytes.
    manifest, before = (out / "manifest.csv").read_bytes(), len(site.asked)
    (out / "set.zip").unlink()
    (out / "manifest.csv").unlink()
    assert run(["data", "fetch", "small", "--out", str(out)]) == 0
    assert len(site.asked) == before
    assert (out / "manifest.csv").read_bytes() == manifest


def test_a_wrong_checksum_is_refused_and_not_kept(small: DataSet, site: Site, tmp_path: Path) -> None:
    good = site.files["set.zip"]
    site.files["set.zip"] = good[:-1] + b"?"
    with pytest.raises(Failed, match=r"its md5 is [0-9a-f]{32}, published is .*run this again"):
        fetch("small", tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.startswith("set")]
    site.files["set.zip"] = good
    assert fetch("small", tmp_path / "out").exists()


def test_a_second_download_is_compared_with_the_first(small: DataSet, site: Site, tmp_path: Path) -> None:
    fetch("small", tmp_path / "out")
    (tmp_path / "out/notes.txt").unlink()
    site.files["notes.txt"] = b"other"
    with pytest.raises(Failed, match="that of the first download was"):
        fetch("small", tmp_path / "out")
    assert not (tmp_path / "out/notes.txt").exists()


def test_a_file_that_was_put_there_is_checked_and_left(small: DataSet, site: Site, tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"something else")
    with pytest.raises(Failed, match=r"set\.zip: its md5 is"):
        fetch("small", tmp_path)
    assert (tmp_path / "set.zip").read_bytes() == b"something else"
    (tmp_path / "set.zip").write_bytes(site.files["set.zip"])
    fetch("small", tmp_path)
    assert "set.zip" not in [name for name, _ in site.asked]


def test_a_killed_unpacking_is_done_again(
    small: DataSet, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, moved = os.replace, []

    def dying(source: str | Path, target: str | Path) -> None:
        if str(target).endswith(".png"):
            moved.append(target)
            if len(moved) == 3:
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(module.os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        fetch("small", tmp_path / "out")
    monkeypatch.setattr(module.os, "replace", real)
    assert len(read_images(fetch("small", tmp_path / "out"))) == 6
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_what_has_to_be_asked_for_is_said(
    small: DataSet, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_hand = replace(small, access="fill in the form", files=(File("set.zip"),), homepage="https://example.org/set")
    monkeypatch.setitem(SETS, "small", by_hand)
    assert run(["data", "fetch", "small", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for word in ("fill in the form", "https://example.org/set", "set.zip", str(tmp_path / "out"), "run this again"):
        assert word in said
    assert not site.asked
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out/set.zip").write_bytes(site.files["set.zip"])
    assert run(["data", "fetch", "small", "--out", str(tmp_path / "out")]) == 0


def test_seven_zip_is_left_to_the_user(
    small: DataSet, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["set.7z"] = b"7z\xbc\xaf\x27\x1c"
    monkeypatch.setitem(SETS, "small", replace(small, files=(File("set.7z", f"{site.url}/set.7z"),)))
    with pytest.raises(BadInput, match=r"7z x set\.7z; then run this again"):
        fetch("small", tmp_path / "out")
    assert (tmp_path / "out/set.7z").exists()


def test_a_gzip_file_is_one_file(small: DataSet, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files["values.h5.gz"] = gzip.compress(CONTENT)
    files = (*small.files, File("values.h5.gz", f"{site.url}/values.h5.gz"))
    monkeypatch.setitem(SETS, "small", replace(small, files=files))
    fetch("small", tmp_path / "out")
    assert (tmp_path / "out/values.h5").read_bytes() == CONTENT


@pytest.mark.parametrize("own", ["", "part_1/"])
def test_an_archive_without_a_folder_gets_one(
    small: DataSet, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(f"{own}f.txt", "x")
    site.files["part_1.zip"] = content.getvalue()
    files = (*small.files, File("part_1.zip", f"{site.url}/part_1.zip", into="part_1"))
    monkeypatch.setitem(SETS, "small", replace(small, files=files))
    fetch("small", tmp_path / "out")
    assert (tmp_path / "out/part_1/f.txt").read_text() == "x"


def test_too_small_a_disk_is_said_before(
    small: DataSet, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETS, "small", replace(small, files=(replace(small.files[0], size=1 << 60),)))
    with pytest.raises(BadInput, match="are free; give another --out"):
        fetch("small", tmp_path / "out")
    assert not site.asked


def test_a_wrong_name_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "fetch", "nct_crc"]) == 2
    assert "did you mean nct-crc" in capsys.readouterr().err
    assert run(["data", "fetch", "zzz"]) == 2
    assert "histill data fetch lists them" in capsys.readouterr().err


def test_the_list_names_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "fetch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *SETS]
