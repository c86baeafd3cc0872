"""What a viewer's tests look at: folders as `histill slide` leaves them, and a viewer on a port of its own."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from conftest import picture
from numpy.typing import NDArray
from PIL import Image

from histill.slides.view.library import Library
from histill.slides.view.server import Viewer

MAP_PX = 16  # level-0 pixels of a map's pixel in these tests
WIDTH, HEIGHT = 700, 530
COLORS = {"benign": [0, 158, 115], "malignant": [213, 94, 0]}
ODD = "liver & spleen é"  # a name that must be escaped everywhere


def write_map(path: Path, maps: NDArray[np.uint8], mpp: float = 0.5, halvings: int = 0) -> None:
    """``(C, H, W)`` as `histill slide` writes it: planes in tiles, smaller levels in SubIFDs."""
    per_cm = 1e4 / (mpp * MAP_PX)
    options: dict[str, Any] = {"tile": (16, 16), "compression": "zlib", "photometric": "minisblack", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(maps, subifds=halvings, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", **options)
        for _ in range(halvings):
            maps = maps[:, ::2, ::2]
            file.write(maps, subfiletype=1, **options)


def ramp(width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """``(2, H, W)``: malignant grows from left to right, benign is the rest."""
    columns, rows = -(-width // MAP_PX), -(-height // MAP_PX)
    malignant = np.broadcast_to(np.linspace(0, 255, columns).astype(np.uint8), (rows, columns))
    return np.stack([255 - malignant, malignant])


def square(x: float, y: float, side: float, label: str = "malignant") -> dict[str, Any]:
    """A lesion."""
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    said = {"classification": {"name": label, "color": COLORS[label]}, "measurements": {"mean probability": 0.9}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": said}


def write_result(
    root: Path, slide: Path, size: tuple[int, int], maps: NDArray[np.uint8], lesions: list[Any], name: str = "case"
) -> Path:
    """What `histill slide` leaves for one slide."""
    place = root / name
    place.mkdir(parents=True)
    said = {"name": name, "path": str(slide), "mpp": 0.5, "dimensions": list(size)}
    said |= {"classes": ["benign", "malignant"], "colors": COLORS, "layers": {"heatmap": "heatmap.ome.tiff"}}
    (place / "slide.json").write_text(json.dumps(said))
    write_map(place / "heatmap.ome.tiff", maps)
    (place / "lesions.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": lesions}))
    return place


def write_results(root: Path) -> Path:
    """Two slides of noise in ``student``, one oddly named, and a second model's maps of the other in ``teacher``."""
    noise = np.asarray(Image.fromarray(picture(3)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    Image.fromarray(noise).save(root / "slide.png")
    (root / "secret.txt").write_text("secret")
    for name in ("case", ODD):
        write_result(root / "student", root / "slide.png", (WIDTH, HEIGHT), ramp(), [square(40, 40, 200)], name)
    write_result(root / "teacher", root / "slide.png", (WIDTH, HEIGHT), ramp()[:, :, ::-1], [])
    return root


@contextmanager
def serving(library: Library, **options: Any) -> Iterator[Viewer]:
    """A viewer on a port of its own, in a thread."""
    viewer, loop = Viewer(library, **options), asyncio.new_event_loop()
    started, end = threading.Event(), asyncio.Event()

    async def serve() -> None:
        viewer.start()
        started.set()
        await end.wait()
        await viewer.stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield viewer
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(10)
        loop.close()


Answer = tuple[int, dict[str, str], bytes]


def ask(viewer: Viewer, target: str, method: str = "GET", **headers: str) -> Answer:
    """Status, headers with small names, body; the target is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", viewer.port, timeout=10)
    try:
        connection.putrequest(method, target, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def pixels(body: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(body)) as image:
        return np.asarray(image)
