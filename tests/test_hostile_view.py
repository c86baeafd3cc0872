"""Whatever is sent to the viewer, it answers 2xx, 3xx or 4xx, gives nothing away, and goes on answering."""

from __future__ import annotations

import hmac
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from viewing import HEIGHT, WIDTH, ask, ramp, serving, square, write_result, write_results

from histill.slides.view import server
from histill.slides.view.library import Library
from histill.slides.view.server import Limits, Viewer

SECRET = b"a secret of this machine"


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    root = write_results(tmp_path_factory.mktemp("view"))
    (root / "secret.txt").write_bytes(SECRET)
    (root / "student" / "secret.txt").write_bytes(SECRET)
    (root / "student" / "case" / "link.txt").symlink_to(root / "secret.txt")
    with serving(Library(root / "student", root / "teacher"), limits=Limits(header_s=1.0, body_s=1.0)) as running:
        yield running


def send(viewer: Viewer, request: bytes) -> bytes:
    """What comes back to raw bytes, until the server hangs up or has nothing more to say."""
    said = b""
    with socket.create_connection(("127.0.0.1", viewer.port), timeout=5) as link:
        try:
            link.sendall(request)
            link.shutdown(socket.SHUT_WR)
            while part := link.recv(65536):
                said += part
        except OSError:  # it hung up
            pass
    return said


def check(viewer: Viewer, said: bytes) -> None:
    assert SECRET not in said
    assert b"Traceback" not in said
    for status in re.findall(rb"(?m)^HTTP/1\.[01] (\d{3})", said):
        assert status[:1] in b"1234", status
    assert ask(viewer, "/")[0] == 200


_PARTS = """
    slides overlays view static case malignant against:malignant disagreement 10 9 0 -1 0_0.jpeg 1_2.png 0_0.png
    99999999_0.jpeg slide.json lesions.geojson thumbnail.jpeg viewer.js .. . %2e%2e %252e%252e%252f secret.txt link.txt
    ..%2f..%2fsecret.txt %00 %ff % ~ %2fetc%2fpasswd C:%5C \\..\\ ;x=y é 0x1 1e3 ٣ __init__.py {{7*7}}
    """
PARTS = st.sampled_from([*_PARTS.split(), "", "9" * 400])
_QUERIES = """
    ? ?threshold=0.5 ?threshold=nan ?threshold=1e999 ?threshold=%00 ?threshold=0.1&threshold=1 ?threshold=٣ ?token=x
    ?v=../.. ?v=1&v=2 ?% ?threshold=0_1 ?=&=&
    """
QUERIES = st.sampled_from([*_QUERIES.split(), "", "?" + "a=b&" * 900])
_METHODS = "GET GET GET GET GET GET GET GET HEAD POST PUT DELETE OPTIONS TRACE CONNECT get GÉT PROPFIND"
METHODS = st.sampled_from([*_METHODS.split(), ""])
_HEADERS = """Host: 127.0.0.1
Host: evil.example
Host:
Host: [::1
Host: 127.0.0.1:99999999999
Host: é
Origin: null
Origin: http://127.0.0.1
If-None-Match: *
If-None-Match: W/"x", "y"
If-None-Match: ÿþ
Cookie: a=b; =; histill-1=é; $Version=1
Range: bytes=-1
Range: bytes=0-0,1-1
Content-Length: 5
Content-Length: -1
Content-Length: 9999999999
Content-Length: x
Content-Length: 0
Transfer-Encoding: chunked
Transfer-Encoding: identity
Expect: 100-continue
Upgrade: websocket
Connection: keep-alive, upgrade
 folded: header
no colon
Accept-Encoding: gzip
Sec-Fetch-Site: cross-site
Sec-Fetch-Site: same-origin
X-Forwarded-Host: evil.example
X-HTTP-Method-Override: POST
Forwarded: for=1.1.1.1
Authorization: Basic eDp5"""
HEADERS = st.sampled_from([*_HEADERS.splitlines(), "\x00: \x00", "A:" + "b" * 20_000, "Cookie: " + "a" * 9000])
BODIES = st.sampled_from(
    ["", "hello", "5\r\nhello\r\n0\r\n\r\n", "-1\r\n", "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "\0" * 99]
)
REQUESTS = st.builds(
    lambda method, path, query, version, headers, body: (
        f"{method} /{path}{query} {version}\r\n" + "".join(f"{h}\r\n" for h in headers) + f"\r\n{body}"
    ).encode("utf-8", "replace"),
    METHODS,
    st.lists(PARTS, max_size=6).map("/".join),
    QUERIES,
    st.sampled_from(["HTTP/1.1"] * 8 + ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9.9", ""]),
    st.lists(HEADERS, max_size=4).map(lambda more: ["Host: 127.0.0.1", "Connection: close", *more]),
    BODIES,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(request_=st.one_of(REQUESTS, REQUESTS, st.binary(max_size=200)))
def test_any_request_is_answered_or_hung_up_on(viewer: Viewer, request_: bytes) -> None:
    check(viewer, send(viewer, request_))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.lists(st.one_of(PARTS, st.text(max_size=6).map(lambda t: quote(t, errors="replace"))), max_size=6),
    query=QUERIES,
)
def test_any_path_is_of_the_library_or_refused(viewer: Viewer, path: list[str], query: str) -> None:
    target = quote("/" + "/".join(path) + query, safe="/%?&=:;~._-")
    status, headers, body = ask(viewer, target)
    assert status in (200, 304, 400, 404), target
    assert SECRET not in body
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in headers["content-security-policy"]
    if status != 200:
        assert len(body) < 100  # and nothing of what was asked for
    assert not set(headers) & {"access-control-allow-origin", "x-powered-by"}


def test_fields_of_a_megabyte(viewer: Viewer) -> None:
    line = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    for request in (
        b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        line + b"Cookie: " + b"a" * (1 << 20) + b"\r\n\r\n",
        line + b"A: b\r\n" * (1 << 18) + b"\r\n",
        b"A" * (1 << 20),
        line + b"Content-Length: 1048576\r\n\r\n" + b"x" * (1 << 20),
        line + b"Transfer-Encoding: chunked\r\n\r\n100000\r\n" + b"x" * (1 << 20),
    ):
        said = send(viewer, request)
        assert b"200 OK" not in said
        check(viewer, said)


def test_slow_clients_hold_up_nobody(viewer: Viewer) -> None:
    links = []
    try:
        for _ in range(40):
            link = socket.create_connection(("127.0.0.1", viewer.port), timeout=5)
            link.sendall(b"GET / HTTP/1.1\r\nHost: 127.")
            links.append(link)
        began = time.monotonic()
        assert ask(viewer, "/slides/case/9/0_0.jpeg")[0] == 200
        assert time.monotonic() - began < 5
        for link in links:  # and are hung up on
            link.settimeout(10)
            with suppress(ConnectionResetError):
                assert b"200" not in link.recv(1000)
    finally:
        for link in links:
            link.close()
    check(viewer, b"")


def test_a_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, viewer: Viewer, tmp_path: Path) -> None:
    compared: list[tuple[Any, Any]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(server.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    write_result(tmp_path / "out", viewer.library.entries["case"].slide_path, (WIDTH, HEIGHT), ramp(), [])
    with serving(Library(tmp_path / "out"), token="right") as locked:
        for wrong in ("wrong", "r", "right%20", "right%00", "%72ight%0a", "%ff"):
            assert ask(locked, f"/?token={wrong}")[0] == 401
        assert ask(locked, "/?token=%72ight")[0] == 200
        assert ask(locked, "/", Cookie=f"histill-{locked.port}=\u00e9".encode().decode("latin-1"))[0] == 401
    assert len(compared) >= 8


BAD = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_outlines_that_are_gone_or_of_gigabytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_results(tmp_path)
    file = root / "student/case/lesions.geojson"
    with serving(Library(root / "student")) as viewer:
        file.unlink()
        assert ask(viewer, "/slides/case/lesions.geojson")[0] == 404
    with file.open("wb") as sparse:
        sparse.truncate(1 << 30)
    assert Library(root / "student").entries["case"].lesions is None
    assert "lesions.geojson has more than 256 MB" in capsys.readouterr().err


def test_names_are_text_on_every_page(viewer: Viewer, tmp_path: Path) -> None:
    name = BAD.replace("/", "_")
    slide = tmp_path / f"{name}.png"
    slide.write_bytes(viewer.library.entries["case"].slide_path.read_bytes())
    place = write_result(tmp_path / f"o{name}", slide, (WIDTH, HEIGHT), ramp(), [square(40, 40, 200)], name)
    said = json.loads((place / "slide.json").read_text())
    said["classes"] = [BAD, "javascript:alert(1)"]
    (place / "slide.json").write_text(json.dumps(said))
    with serving(Library(tmp_path / f"o{name}")) as hostile:
        for target in ("/", f"/view/{quote(name, safe='')}"):
            status, headers, body = ask(hostile, target)
            assert status == 200
            assert headers["content-type"].startswith("text/html")
            page = body.decode()
            assert "<img src=x" not in page
            assert "<script>alert" not in page
            assert not re.search(r"<script(?! src=| type=\"module\" src=)", page)
            assert "&lt;img src=x" in page
        status, headers, body = ask(hostile, f"/slides/{quote(name, safe='')}/slide.json")
        assert (status, headers["content-type"]) == (200, "application/json")
        assert json.loads(body)["layers"][0]["name"] == BAD


@pytest.mark.parametrize("mpp", ["NaN", "1e999", "-1", "0", '"1"', "true", "1" + "0" * 400, "[1]"])
def test_a_resolution_that_cannot_be_is_left_out(viewer: Viewer, tmp_path: Path, mpp: str, capsys: Any) -> None:
    place = write_result(tmp_path / "out", viewer.library.entries["case"].slide_path, (WIDTH, HEIGHT), ramp(), [])
    text = (place / "slide.json").read_text()
    (place / "slide.json").write_text(text.replace('"mpp": 0.5', f'"mpp": {mpp}'))
    with pytest.raises(ValueError, match="holds no slide"):
        Library(tmp_path / "out")
    assert "mpp is not a number of microns" in capsys.readouterr().err
