"""A headless Chromium that is told what to do over the DevTools protocol: where to go, what to press, what it sees."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tornado.websocket import WebSocketClientConnection, websocket_connect

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --force-device-scale-factor=1 "
    "--remote-debugging-port=0"
)
_WAIT_S = 30.0


class Browser:
    """One page of a given size; ``profile`` is a new folder."""

    def __init__(self, profile: Path, width: int = 1100, height: int = 700) -> None:
        assert PROGRAM is not None
        self.console: list[str] = []
        self._number = 0
        self._loop = asyncio.new_event_loop()
        self._process = subprocess.Popen(
            [PROGRAM, *_FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._socket: WebSocketClientConnection = self._loop.run_until_complete(self._connect(profile))
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.send("Emulation.setDeviceMetricsOverride", **size)
        except BaseException:
            self._process.kill()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.send("Browser.close")  # so that it takes its temporary files away
            self._process.wait(10)
        except (AssertionError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
        self._socket.close()
        self._loop.close()

    async def _connect(self, profile: Path) -> WebSocketClientConnection:
        until = time.monotonic() + _WAIT_S
        written = profile / "DevToolsActivePort"
        while not (written.exists() and len(written.read_text().splitlines()) == 2):
            assert time.monotonic() < until, "Chromium did not start"
            assert self._process.poll() is None, "Chromium ended at once"
            await asyncio.sleep(0.05)
        port = written.read_text().splitlines()[0]
        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=_WAIT_S) as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        return await websocket_connect(page["webSocketDebuggerUrl"], max_message_size=1 << 28)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its answer."""
        return self._loop.run_until_complete(asyncio.wait_for(self._send(method, parameters), _WAIT_S))

    async def _send(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        number = self._number
        await self._socket.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = await self._socket.read_message()
            assert message is not None, "Chromium went away"
            said = json.loads(message)
            if said.get("method") == "Runtime.exceptionThrown":
                thrown = said["params"]["exceptionDetails"]
                self.console.append(thrown.get("exception", {}).get("description", thrown["text"])[:500])
            elif said.get("method") == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.console.append(str(said["params"]["entry"]))
            elif said.get("method") == "Runtime.consoleAPICalled" and said["params"]["type"] in ("error", "warning"):
                self.console.append(str(said["params"]["args"]))
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Until the expression holds."""
        until = time.monotonic() + _WAIT_S
        while not self.run(script):
            assert time.monotonic() < until, f"{script} did not come true; {self.console}"
            time.sleep(0.05)

    def go(self, url: str, ready: str = "document.readyState === 'complete'") -> None:
        """Open a page and wait until ``ready`` holds."""
        self.send("Page.navigate", url=url)
        self.wait(f"location.href !== 'about:blank' && ({ready})")

    def key(self, text: str) -> None:
        """Press a key that writes a character."""
        self.send("Input.dispatchKeyEvent", type="keyDown", key=text, text=text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=text)

    def wheel(self, x: float, y: float, delta: float) -> None:
        """Turn the wheel; up is negative."""
        self.send("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)

    def drag(self, x: float, y: float, by_x: float, by_y: float) -> None:
        """Press, move in ten steps, release."""
        mouse = "Input.dispatchMouseEvent"
        self.send(mouse, type="mousePressed", x=x, y=y, button="left", buttons=1, clickCount=1)
        for step in range(1, 11):
            self.send(
                mouse, type="mouseMoved", x=x + by_x * step / 10, y=y + by_y * step / 10, button="left", buttons=1
            )
            time.sleep(0.02)
        self.send(mouse, type="mouseReleased", x=x + by_x, y=y + by_y, button="left", clickCount=1)

    def click(self, selector: str) -> None:
        """Click on the middle of an element, as a mouse does."""
        self.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'nearest'}})")
        box = self.run(f"JSON.stringify(document.querySelector({selector!r}).getBoundingClientRect())")
        where = json.loads(box)
        x, y = where["x"] + where["width"] / 2, where["y"] + where["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self) -> NDArray[np.uint8]:
        """``(height, width, 3)``: what the page looks like."""
        data = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
