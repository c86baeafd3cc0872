"""The viewer's HTTP server: one process, one port, GET and HEAD, and nothing but what the library names.

Loopback by default; elsewhere a token is required. A request is refused where its Host is a name that is not this
machine's (DNS rebinding), where it comes from another site, where it is too large or too slow.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote_to_bytes

import jinja2
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from histill.errors import BadInput, HistillError, require
from histill.progress import notice
from histill.slides.view import render
from histill.slides.view.cache import Lru
from histill.slides.view.library import Entry, Library

__all__ = ["Limits", "Viewer", "is_loopback"]

_HERE = Path(__file__).parent
_BOKEH = ("bokeh.min.js", "bokeh-api.min.js")
_OWN = {"viewer.js": "text/javascript", "plane.js": "text/javascript", "viewer.css": "text/css"}
_PATIENCE_S = 1.0  # with connections that are open when the viewer stops
_TILE = re.compile(r"(0|[1-9][0-9]{0,8})_(0|[1-9][0-9]{0,8})")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Server": "histill",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # an address may hold the token
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Limits:
    """What one client may take of the machine.

    Attributes:
        header_s: seconds in which a request's headers, or the next request on an idle connection, must have come.
        body_s: seconds for a body, which nothing here needs.
        header_bytes: of a request's headers and address.
        body_bytes: of a body.
        connections: at once; more are closed.
        threads: that read and compress tiles.
        waiting: tiles that wait for a thread; more are answered 503.
        cache_bytes: of finished tiles that are kept.
    """

    header_s: float = 60.0
    body_s: float = 5.0
    header_bytes: int = 16_384
    body_bytes: int = 1024
    connections: int = 256
    threads: int = field(default_factory=lambda: max(2, min(4, os.cpu_count() or 2)))
    waiting: int = 512
    cache_bytes: int = 1 << 26


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on ``host``."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host or None, 0, flags=socket.AI_PASSIVE)}
    except (OSError, UnicodeError):
        raise BadInput(f"--host {host} is not an address of this machine") from None
    return bool(host) and all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in found)


class Viewer:
    """A library on a port; `start` within a running event loop, `stop` ends it.

    Args:
        library: what there is to see.
        host: where to listen.
        port: 0 for any that is free.
        token: required of every request where given; off loopback one is made where none is given.
        limits: what one client may take.
    """

    def __init__(
        self,
        library: Library,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        if not 0 <= port <= 65535:
            raise BadInput(f"--port {port}: 0 (any) to 65535")
        if token is not None and not re.fullmatch(r"[!-~]{1,256}", token):
            raise BadInput("--token: 1 to 256 letters, digits and signs, without spaces")
        self.library, self.host, self.limits = library, host, limits or Limits()
        self.token = token if token is not None or is_loopback(host) else secrets.token_urlsafe(24)
        self.port = port
        self.session = secrets.token_urlsafe(32)
        self.tiles: Lru[bytes] = Lru(self.limits.cache_bytes, len)
        self.pool = ThreadPoolExecutor(self.limits.threads, thread_name_prefix="tiles")
        self.waiting = 0
        self.names = {"localhost", host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()} - {""}
        self.static = {name: (_HERE / "static" / name, kind) for name, kind in _OWN.items()}
        bokeh = Path(require("bokeh.util.paths", "viewer").static_path())
        self.static |= {name: (bokeh / "js" / name, "text/javascript") for name in _BOKEH}
        loader = jinja2.FileSystemLoader(_HERE / "templates")
        self.pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
        self.pages.filters["segment"] = lambda text: quote(text, safe="")
        self._server: _Server | None = None

    def start(self) -> str:
        """Listen; returns the address to open."""
        try:
            # With any free port, IPv4 and IPv6 would get two; one family is enough for one name.
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            sockets = bind_sockets(self.port, self.host or None, family=family)
        except (OSError, UnicodeError) as error:
            raise BadInput(f"cannot listen on {self.host}:{self.port}: {error}") from None
        self.port = sockets[0].getsockname()[1]
        limits = self.limits
        self._server = _Server(
            Application([(r".*", _Handler, {"viewer": self})], log_function=lambda handler: None),
            max_header_size=limits.header_bytes,
            max_body_size=limits.body_bytes,
            max_buffer_size=max(limits.header_bytes, limits.body_bytes) * 2,
            idle_connection_timeout=limits.header_s,
            body_timeout=limits.body_s,
        )
        self._server.limit = limits.connections
        self._server.add_sockets(sockets)
        # They would say every malformed request, and with it what others sent us.
        for name in ("tornado.access", "tornado.general"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return self.address

    @property
    def address(self) -> str:
        """With the token, where one is needed."""
        host = self.host
        if host in ("", "0.0.0.0", "::"):
            host = _own_address()
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}/" + (f"?token={quote(self.token, safe='')}" if self.token else "")

    async def stop(self) -> None:
        """Stop listening and close what is open."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self._server is not None:
            self._server.stop()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._server.close_all_connections(), _PATIENCE_S)

    async def work(self, key: str, make: Callable[[], bytes]) -> bytes:
        """Bytes from the cache, or made by a thread of the pool."""
        if self.waiting >= self.limits.waiting + self.limits.threads:
            raise HTTPError(503)
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, self.tiles.get, key, make)
        except asyncio.CancelledError:  # the viewer stops
            raise HTTPError(503) from None
        finally:
            self.waiting -= 1

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine: an address, or one of its names, whatever the port.

        A page elsewhere can point a name of its own at this machine (DNS rebinding), but not an address.
        """
        name = host.rsplit(":", 1)[0] if re.search(r":[0-9]*$", host) else host
        try:
            ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
        except ValueError:
            return name.lower().rstrip(".") in self.names
        return True


def _own_address() -> str:
    """The address under which others see this machine; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        try:
            link.connect(("192.0.2.1", 9))  # reserved for documentation (RFC 5737)
            return str(link.getsockname()[0])
        except OSError:
            return "127.0.0.1"


class _Server(HTTPServer):
    """With a bound on connections."""

    limit = 0
    count = 0

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        if self.count >= self.limit:
            stream.close()
            return
        self.count += 1
        super().handle_stream(stream, address)

    def on_close(self, server_conn: object) -> None:
        self.count -= 1
        super().on_close(server_conn)


class _Handler(RequestHandler):
    """Answers everything; `get` divides by the first part of the path."""

    SUPPORTED_METHODS = ("GET", "HEAD")

    def initialize(self, viewer: Viewer) -> None:
        self.viewer = viewer

    def set_default_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        """Who asks, from where, and whether they may."""
        headers = self.request.headers
        hosts = headers.get_list("Host")
        if len(hosts) != 1:
            raise HTTPError(400)
        if not self.viewer.knows(hosts[0]):
            raise HTTPError(403)
        origin = headers.get("Origin")
        if origin is not None and origin != f"http://{hosts[0]}" and origin != f"https://{hosts[0]}":
            raise HTTPError(403)
        if headers.get("Sec-Fetch-Site") in ("cross-site", "same-site") and headers.get("Sec-Fetch-Mode") != "navigate":
            raise HTTPError(403)
        if self.request.body:
            raise HTTPError(400)
        self._admit()

    def _admit(self) -> None:
        token, port = self.viewer.token, self.viewer.port
        if token is None:
            return
        given = parse_qs(self.request.query).get("token", [])
        if len(given) == 1 and _same(given[0], token):
            # Of the process, not the token itself: other servers on this host, whatever their port, are sent it too.
            self.set_cookie(f"histill-{port}", self.viewer.session, httponly=True, samesite="Strict", path="/")
        elif given or not _same(self.get_cookie(f"histill-{port}", ""), self.viewer.session):
            raise HTTPError(401)

    async def get(self) -> None:
        parts = self._parts()
        match parts:
            case [""]:
                self._page("slides.html", entries=list(self.viewer.library.entries.values()))
            case ["view", name]:
                self._page("slide.html", entry=self._entry(name))
            case ["static", name]:
                self._static(name)
            case ["slides", name, "slide.json"]:
                self._json(self._entry(name).describe())
            case ["slides", name, "lesions.geojson"]:
                self._lesions(self._entry(name))
            case ["slides", name, "thumbnail.jpeg"]:
                entry = self._entry(name)
                slide = self.viewer.library.slide
                await self._tile(entry, "image/jpeg", lambda: render.thumbnail_jpeg(slide(entry)))
            case ["slides", name, level, tile]:
                await self._slide_tile(self._entry(name), level, tile)
            case ["overlays", name, layer, level, tile]:
                await self._overlay_tile(self._entry(name), layer, level, tile)
            case _:
                raise HTTPError(404)

    head = get

    def _parts(self) -> list[str]:
        """The path between its slashes, each part decoded once; what is not UTF-8 or holds a NUL is malformed."""
        path = self.request.path
        if not path.startswith("/") or _ESCAPE.search(path):
            raise HTTPError(400)
        try:
            parts = [unquote_to_bytes(part).decode("utf-8") for part in path[1:].split("/")]
        except UnicodeDecodeError:
            raise HTTPError(400) from None
        if any("\0" in part for part in parts):
            raise HTTPError(400)
        return parts

    def _entry(self, name: str) -> Entry:
        try:
            return self.viewer.library.entries[name]
        except KeyError:
            raise HTTPError(404) from None

    def _grid(self, entry: Entry, level: str, tile: str, suffix: str) -> tuple[int, int, int]:
        """Level, column and row; 400 where they are no numbers, 404 where there is no such tile."""
        stem, dot, kind = tile.rpartition(".")
        found = _TILE.fullmatch(stem)
        if not found or not dot or not _NUMBER.fullmatch(level):
            raise HTTPError(400)
        place = int(level), int(found[1]), int(found[2])
        if kind != suffix or not entry.zoom.has(*place):
            raise HTTPError(404)
        return place

    async def _slide_tile(self, entry: Entry, level: str, tile: str) -> None:
        place = self._grid(entry, level, tile, "jpeg")
        slide = self.viewer.library.slide
        await self._tile(entry, "image/jpeg", lambda: render.tile_jpeg(slide(entry), entry.zoom, *place))

    async def _overlay_tile(self, entry: Entry, name: str, level: str, tile: str) -> None:
        layer = entry.layers.get(name)
        if layer is None:
            raise HTTPError(404)
        place = self._grid(entry, level, tile, "png")
        threshold = self._threshold()
        box = entry.zoom.box(*place)

        def make() -> bytes:
            values = render.heat_values(layer.heat, entry.zoom, place[0], box)
            return render.overlay_png(values, layer.color, threshold, layer.opaque)

        await self._tile(entry, "image/png", make, f"threshold={threshold!r}")

    def _threshold(self) -> float:
        given = parse_qs(self.request.query, keep_blank_values=True).get("threshold", ["0"])
        try:
            threshold = float(given[0])
        except ValueError:
            raise HTTPError(400) from None
        if len(given) != 1 or not (math.isfinite(threshold) and 0 <= threshold <= 1):
            raise HTTPError(400)
        return threshold

    async def _tile(self, entry: Entry, kind: str, make: Callable[[], bytes], options: str = "") -> None:
        key = f"{entry.version} {self.request.path} {options}"
        self._kept(entry, key)
        self.set_header("Content-Type", kind)
        if self.check_etag_header():
            self.set_status(304)
            return
        try:
            body = await self.viewer.work(key, make)
        except HistillError as error:
            notice(str(error))
            raise HTTPError(500) from None
        self.write(body)

    def _kept(self, entry: Entry, key: str) -> None:
        """A tile whose address names the version may be kept; any other is asked for again, and is then 304."""
        named = parse_qs(self.request.query).get("v") == [entry.version]
        self.set_header("Cache-Control", f"private, {'max-age=86400, immutable' if named else 'no-cache'}")
        self.set_header("Etag", f'"{hashlib.sha256(key.encode()).hexdigest()[:32]}"')

    def compute_etag(self) -> str | None:
        """Set by whoever knows it; otherwise a hash of the body."""
        own: str | None = self._headers.get("Etag")
        return own if own is not None else super().compute_etag()

    def _lesions(self, entry: Entry) -> None:
        if entry.lesions is None:
            raise HTTPError(404)
        self._kept(entry, f"{entry.version} lesions")
        self.set_header("Content-Type", "application/geo+json")
        if self.check_etag_header():
            self.set_status(304)
            return
        if entry.lesions.suffix == ".gz":
            self.set_header("Content-Encoding", "gzip")
        try:
            self.write(entry.lesions.read_bytes())
        except FileNotFoundError:
            raise HTTPError(404) from None

    def _static(self, name: str) -> None:
        if name not in self.viewer.static:
            raise HTTPError(404)
        path, kind = self.viewer.static[name]
        self.set_header("Content-Type", f"{kind}; charset=utf-8")
        self.set_header("Cache-Control", "private, no-cache")
        self.write(path.read_bytes())

    def _page(self, template: str, **values: Any) -> None:
        self.set_header("Cache-Control", "private, no-store")
        self.write(self.viewer.pages.get_template(template).render(library=self.viewer.library, **values))

    def _json(self, value: Any) -> None:
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "private, no-cache")
        self.write(json.dumps(value, ensure_ascii=False))

    def write_error(self, status_code: int, **_: Any) -> None:
        """A line, without what was asked for."""
        said = {
            400: "malformed request",
            401: "this viewer needs its token: open the address that histill view printed",
            403: "refused: open the viewer by the address that histill view printed",
            404: "there is no such page",
            405: "only GET and HEAD",
            503: "busy; try again",
        }
        for name in ("Etag", "Cache-Control"):
            self.clear_header(name)
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        if status_code == 405:
            self.set_header("Allow", "GET, HEAD")
        self.finish(f"{said.get(status_code, 'it failed')}\n")

    def log_exception(self, kind: Any, error: Any, trace: Any) -> None:
        """A line where it is ours, nothing where it is theirs."""
        if not isinstance(error, HTTPError):
            notice(f"viewer: {kind.__name__}: {error}")


def _same(given: str | None, expected: str) -> bool:
    return hmac.compare_digest((given or "").encode(), expected.encode())
