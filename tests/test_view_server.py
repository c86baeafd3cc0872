"""The viewer's server gives what the library names to who may have it, and nothing else to anyone, however they ask."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from viewing import COLORS, HEIGHT, ODD, WIDTH, Answer, ask, pixels, serving, write_results

from histill.errors import BadInput
from histill.slides.view.library import Library
from histill.slides.view.server import Limits, Viewer, is_loopback


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def viewer(results: Path) -> Iterator[Viewer]:
    with serving(Library(results / "student", results / "teacher")) as running:
        yield running


def test_tiles_and_overlays(viewer: Viewer) -> None:
    status, headers, body = ask(viewer, "/slides/case/10/0_0.jpeg")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert pixels(body).shape == (255, 255, 3)
    assert pixels(ask(viewer, "/slides/case/10/2_2.jpeg")[2]).shape == (23, 193, 3)
    assert pixels(ask(viewer, "/slides/case/0/0_0.jpeg")[2]).shape == (1, 1, 3)
    status, headers, body = ask(viewer, "/overlays/case/malignant/10/2_0.png?threshold=0.5")
    assert (status, headers["content-type"]) == (200, "image/png")
    overlay = pixels(body)
    assert overlay.shape == (255, 193, 4)
    assert (overlay[..., :3] == COLORS["malignant"]).all()
    assert overlay[..., 3].min() >= 128
    left = pixels(ask(viewer, "/overlays/case/malignant/10/0_0.png?threshold=0.5")[2])
    assert not left.any()  # the ramp is below a half there
    apart = pixels(ask(viewer, "/overlays/case/disagreement/9/0_0.png?threshold=0.9")[2])[..., 3]
    assert apart[:, 0].all()  # one says 0, the other 1
    assert not apart[:, 175].any()  # both say a half
    there = pixels(ask(viewer, "/overlays/case/against:malignant/10/0_0.png?threshold=0.5")[2])
    assert there[0, 0, 3] == 255
    odd = "liver%20%26%20spleen%20%C3%A9"
    assert ask(viewer, f"/slides/{odd}/10/0_0.jpeg")[0] == 200
    assert ask(viewer, f"/overlays/{odd}/benign/10/0_0.png")[0] == 200


def test_pages(viewer: Viewer) -> None:
    status, headers, body = ask(viewer, "/")
    assert status == 200
    assert "liver &amp; spleen é" in body.decode()
    assert "liver%20%26%20spleen%20%C3%A9" in body.decode()
    assert "esearch use only" in body.decode()
    assert "script-src 'self'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers
    assert b"http" not in ask(viewer, "/view/case")[2]  # nothing from elsewhere
    said = json.loads(ask(viewer, "/slides/case/slide.json")[2])
    assert (said["width"], said["height"], said["levels"], said["mpp"]) == (WIDTH, HEIGHT, 11, 0.5)
    assert str(viewer.library.folder) not in json.dumps(said)
    assert json.loads(ask(viewer, "/slides/case/lesions.geojson")[2])["features"][0]["geometry"]["type"] == "Polygon"
    assert pixels(ask(viewer, "/slides/case/thumbnail.jpeg")[2]).shape == (363, 480, 3)
    for name in ("viewer.js", "plane.js", "viewer.css", "bokeh.min.js", "bokeh-api.min.js"):
        status, headers, body = ask(viewer, f"/static/{name}")
        assert (status, len(body) > 1000) == (200, True), name
        assert headers["content-type"].startswith("text/")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/nothing", 404),
        ("/slides", 404),
        ("/slides/case", 404),
        ("/slides/other/10/0_0.jpeg", 404),
        ("/slides/case/11/0_0.jpeg", 404),
        ("/slides/case/10/3_0.jpeg", 404),
        ("/slides/case/10/0_3.jpeg", 404),
        ("/slides/case/10/0_0.png", 404),
        ("/slides/case/10/0_0.jpeg/", 404),
        ("/slides/case/-1/0_0.jpeg", 400),
        ("/slides/case/ten/0_0.jpeg", 400),
        ("/slides/case/010/0_0.jpeg", 400),
        ("/slides/case/%D9%A1/0_0.jpeg", 400),
        ("/slides/case/10/0.jpeg", 400),
        ("/slides/case/10/0_0", 400),
        ("/slides/case/10/0_-1.jpeg", 400),
        ("/slides/case/10/0_1e3.jpeg", 400),
        (f"/slides/case/10/{'9' * 5000}_0.jpeg", 400),
        (f"/slides/case/{'9' * 9}/0_0.jpeg", 404),
        ("/slides/c%00ase/10/0_0.jpeg", 400),
        ("/slides/%/10/0_0.jpeg", 400),
        ("/slides/%zz/10/0_0.jpeg", 400),
        ("/slides/%ff/10/0_0.jpeg", 400),
        ("/slides/%c0%ae%c0%ae/10/0_0.jpeg", 400),
        ("/overlays/case/other/10/0_0.png", 404),
        ("/overlays/case/malignant/10/0_0.jpeg", 404),
        ("/overlays/case/malignant/10/0_0.png?threshold=", 400),
        ("/overlays/case/malignant/10/0_0.png?threshold=much", 400),
        ("/overlays/case/malignant/10/0_0.png?threshold=nan", 400),
        ("/overlays/case/malignant/10/0_0.png?threshold=2", 400),
        ("/overlays/case/malignant/10/0_0.png?threshold=-0.1", 400),
        ("/overlays/case/malignant/10/0_0.png?threshold=1&threshold=0", 400),
        ("/overlays/case/malignant/10/0_0.png?threshold=1", 200),
        ("http://127.0.0.1/", 400),
        ("case", 400),
        ("*", 400),
    ],
)
def test_unknown_is_404_and_malformed_400(viewer: Viewer, target: str, status: int) -> None:
    assert ask(viewer, target)[0] == status


@pytest.mark.parametrize(
    "up", ["..", "%2e%2e", "%2E.", ".%2e", "%252e%252e", "..%00", "..%5c", "%c0%ae%c0%ae", "....//"]
)
@pytest.mark.parametrize("slash", ["/", "%2f", "%2F", "\\", "%5c", "//", "%252f", "/./"])
def test_no_way_out(viewer: Viewer, up: str, slash: str) -> None:
    for root in ("/static/", "/slides/", "/slides/case/", "/overlays/case/", "/view/", "/"):
        for goal in ("secret.txt", "etc/passwd", "slide.png"):
            status, _, body = ask(viewer, root + slash.join([up] * 3 + goal.split("/")))
            assert status in (400, 404)
            assert b"secret" not in body
            assert b"root:" not in body
    for target in ("/static/%2fetc%2fpasswd", "/static//etc/passwd", "//etc/passwd", "/static/__init__.py", "/static/"):
        assert ask(viewer, target)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_only_get_and_head(viewer: Viewer, method: str) -> None:
    status, headers, _ = ask(viewer, "/", method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_head_is_get_without_a_body(viewer: Viewer) -> None:
    for target in ("/", "/slides/case/9/0_0.jpeg", "/static/viewer.js"):
        status, headers, body = ask(viewer, target, "HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["content-length"]) == len(ask(viewer, target)[2])


def test_what_the_browser_may_keep(viewer: Viewer) -> None:
    target = "/slides/case/9/0_0.jpeg"
    _, headers, _ = ask(viewer, target)
    assert headers["cache-control"] == "private, no-cache"
    status, again, body = ask(viewer, target, If_None_Match=headers["etag"])
    assert (status, body, again["etag"]) == (304, b"", headers["etag"])
    assert ask(viewer, target, If_None_Match='"another"')[0] == 200
    version = viewer.library.entries["case"].version
    assert "immutable" in ask(viewer, f"{target}?v={version}")[1]["cache-control"]
    assert "immutable" not in ask(viewer, f"{target}?v=old")[1]["cache-control"]
    one, other = (ask(viewer, f"/overlays/case/malignant/9/0_0.png?threshold={t}")[1]["etag"] for t in (0.1, 0.2))
    assert one != other


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("evil.example:80", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("0x7f.1", 403),
        ("evil.example@127.0.0.1", 400),
    ],
)
def test_a_name_that_is_not_ours_is_refused(viewer: Viewer, host: str, status: int) -> None:
    assert ask(viewer, "/", Host=host)[0] == status


def test_other_sites_are_refused(viewer: Viewer) -> None:
    here = f"127.0.0.1:{viewer.port}"
    assert ask(viewer, "/", Host=here, Origin=f"http://{here}")[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://localhost"):
        assert ask(viewer, "/", Host=here, Origin=origin)[0] == 403
    assert ask(viewer, "/slides/case/9/0_0.jpeg", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert ask(viewer, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200  # a link to it
    assert ask(viewer, "/")[1]["cross-origin-resource-policy"] == "same-origin"


def test_the_token_becomes_a_cookie(results: Path) -> None:
    with serving(Library(results / "student"), token="s3cret") as viewer:
        assert viewer.address.endswith("/?token=s3cret")
        for target in (
            "/",
            "/?token=",
            "/?token=S3cret",
            "/?token=s3cret&token=s3cret",
            "/?token=s3cret%00",
            "/static/viewer.js",
        ):
            status, headers, body = ask(viewer, target)
            assert (status, "set-cookie" in headers, b"s3cret" in body) == (401, False, False), target
        assert ask(viewer, "/", Cookie=f"histill-{viewer.port}=s3cret")[0] == 401
        status, headers, body = ask(viewer, "/?token=s3cret")
        cookie = headers["set-cookie"]
        assert status == 200
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
        assert "s3cret" not in cookie
        assert b"s3cret" not in body
        kept = cookie.split(";")[0]
        assert ask(viewer, "/slides/case/9/0_0.jpeg", Cookie=kept)[0] == 200
        assert ask(viewer, "/?token=wrong", Cookie=kept)[0] == 401
        assert ask(viewer, "/", Cookie=kept + "x")[0] == 401


def test_off_loopback_there_is_always_a_token(results: Path) -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("")
    with serving(Library(results / "student"), host="0.0.0.0") as viewer:
        assert viewer.token is not None
        assert len(viewer.token) >= 32
        assert ask(viewer, "/")[0] == 401
        assert ask(viewer, f"/?token={viewer.token}")[0] == 200
    for token in ("", "with space", "é"):
        with pytest.raises(BadInput, match="--token"):
            Viewer(Library(results / "student"), token=token)
    with pytest.raises(BadInput, match="--host"):
        Viewer(Library(results / "student"), host="no such host")


def closed_after(viewer: Viewer, send: Any, patience: float = 5.0) -> tuple[float, bytes]:
    """Seconds until the server hangs up, and what it said before."""
    said, begun = b"", time.monotonic()
    with socket.create_connection(("127.0.0.1", viewer.port), timeout=patience) as link:
        try:
            send(link)
            while part := link.recv(65536):
                said += part
        except (ConnectionResetError, BrokenPipeError):
            pass
    return time.monotonic() - begun, said


def test_the_slow_and_the_large_are_cut_off(results: Path) -> None:
    limits = Limits(header_s=0.4, body_s=0.4, connections=4)
    with serving(Library(results / "student"), limits=limits) as viewer:

        def drip(link: socket.socket) -> None:  # a byte at a time, for ever
            link.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            for _ in range(100):
                link.sendall(b"X")
                time.sleep(0.05)

        took, said = closed_after(viewer, drip)
        assert took < 3
        assert b"200" not in said
        took, _ = closed_after(viewer, lambda link: None)  # not a word
        assert took < 3
        start = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        took, said = closed_after(viewer, lambda link: link.sendall(start + b"Content-Length: 9\r\n\r\nsl"))
        assert took < 3
        assert b"200 OK" not in said
        for large in (
            b"A: " + b"x" * 100_000 + b"\r\n\r\n",
            b"A: b\r\n" * 20_000 + b"\r\n",
            b"Content-Length: 1000000000\r\n\r\n",
        ):
            _, said = closed_after(viewer, lambda link, large=large: link.sendall(start + large))  # type: ignore[misc]
            assert b"200 OK" not in said
        idle = [socket.create_connection(("127.0.0.1", viewer.port), timeout=5) for _ in range(4)]
        time.sleep(0.1)
        assert closed_after(viewer, lambda link: link.sendall(start + b"\r\n"))[1] == b""  # one too many
        time.sleep(0.6)
        for link in idle:
            link.close()
        assert ask(viewer, "/")[0] == 200


def test_fifty_at_once(viewer: Viewer) -> None:
    zoom = viewer.library.entries["case"].zoom
    tiles = [(10, c, r) for c in range(3) for r in range(3)] + [(9, c, r) for c in range(2) for r in range(2)]
    tiles += [(n, 0, 0) for n in range(9)]
    targets = [(f"/slides/{name}/{n}/{c}_{r}.jpeg", (n, c, r)) for n, c, r in tiles for name in ("case", ODD)]
    targets += [(f"/overlays/case/malignant/{n}/{c}_{r}.png?threshold=0.{c + 2 * r}", (n, c, r)) for n, c, r in tiles]
    targets = targets[:50]
    assert len(targets) == 50
    before = threading.active_count()
    together = threading.Barrier(50)

    def one(target: str) -> Answer:
        together.wait(10)
        return ask(viewer, target.replace(" ", "%20").replace("&", "%26").replace("é", "%C3%A9"))

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(one, [target for target, _ in targets]))
    for (_, place), (status, _, body) in zip(targets, answers):
        assert status == 200
        assert pixels(body).shape[1::-1] == zoom.box(*place).size
    assert threading.active_count() - before <= viewer.limits.threads
    assert viewer.waiting == 0
    assert viewer.tiles.bytes <= viewer.limits.cache_bytes


def test_too_many_are_told_to_come_again(results: Path) -> None:
    with serving(Library(results / "student"), limits=Limits(threads=1, waiting=0)) as viewer:
        gate = threading.Event()
        viewer.pool.submit(gate.wait, 10)
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(ask, viewer, "/slides/case/9/0_0.jpeg")
            time.sleep(0.2)
            assert ask(viewer, "/slides/case/9/1_0.jpeg")[0] == 503
            gate.set()
            assert first.result()[0] == 200


def test_it_stops_while_it_works(results: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        with serving(Library(results / "student"), limits=Limits(threads=1)) as viewer:
            viewer.pool.submit(time.sleep, 1.0)
            asked = [pool.submit(_ask_or_not, viewer, f"/slides/case/10/{n}_0.jpeg") for n in range(3)]
            time.sleep(0.2)
            assert viewer.waiting == 3
            begun = time.monotonic()
        assert time.monotonic() - begun < 4
        assert {one.result() for one in asked} <= {None, 503}


def _ask_or_not(viewer: Viewer, target: str) -> int | None:
    try:
        return ask(viewer, target)[0]
    except (OSError, http.client.HTTPException):
        return None


def test_the_command_says_where_and_stops(results: Path) -> None:
    command = [sys.executable, "-m", "histill", "view", str(results / "student"), "--token", "t"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        host, target = address.removeprefix("http://").split("/", 1)
        connection = http.client.HTTPConnection(host, timeout=10)
        connection.request("GET", f"/{target}")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
