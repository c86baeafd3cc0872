"""A viewer in the browser for what `histill slide` wrote: slides, maps, lesions, two models side by side."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

from histill.errors import require
from histill.progress import notice

__all__ = ["view"]


def view(
    folder: Path,
    *,
    against: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the slides of ``folder`` until interrupted.

    Args:
        folder: what ``histill slide`` wrote with ``--out``, or the folder of one slide in it.
        against: what it wrote with another model; its maps are shown beside, and the disagreement.
        host: where to listen; off loopback a token is required, and made where none is given.
        port: 0 for any that is free.
        token: required of every request where given.
        ready: called with the address to open.

    Raises:
        BadInput: no slides, or an address that cannot be listened on.
    """
    require("tornado", "viewer")
    from histill.slides.view.library import Library
    from histill.slides.view.server import Viewer, is_loopback

    viewer = Viewer(Library(folder, against), host, port, token)
    if not is_loopback(host):
        notice(
            "what the browser is sent is not encrypted; over a network you do not trust, use ssh -L instead of --host"
        )

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        ready(viewer.start())
        await stop.wait()
        await viewer.stop()

    asyncio.run(serve())
