"""Work that outgrows one machine: the functions of one process, called by the workers of a Ray cluster.

The workers answer, whoever called them writes. A worker that dies loses the piece it had in hand, which another takes
up; an error in one piece is that piece's answer and stops no other. Ray runs whatever it is sent by who reaches its
ports: a cluster of this module's own listens on this machine alone and asks for a token that nobody else has.
"""

from __future__ import annotations

import io
import os
import secrets
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from typing import Any, TypeVar

from histill.errors import BadInput, Failed, HistillError, require
from histill.progress import notice, progress, say

__all__ = ["joined", "spread"]

T = TypeVar("T")
R = TypeVar("R")

_LIVES = 3  # workers that may die over one piece


@contextmanager
def joined(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster; one that is connected already is taken as it is, and left so.

    Args:
        address: ``HOST:PORT``, or ``auto``: that of ``RAY_ADDRESS`` where it is set, otherwise a cluster of this
            machine's cores, for as long as the block lasts. What else runs on this machine is not looked for: it may be
            another command's own.

    Raises:
        BadInput: Ray is not installed, or nothing answers there.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield sys.modules["ray"]
        return
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    passed = {name: os.environ[name] for name in ("HISTILL_CACHE", "HF_HOME", "TORCH_HOME") if name in os.environ}
    options["runtime_env"] = {"env_vars": passed | {"HISTILL_QUIET": "1", "RANK": "0"}}  # RANK: of no training
    if address:
        _check(address)
        options["address"] = address
    elif "ray" in sys.modules and not _read:
        raise BadInput("--ray auto: Ray was imported before, without a token; call ray.init() first, and it is used")
    else:
        options |= {"address": "local", "include_dashboard": False}
    with _environment(_QUIET if address else _QUIET | _PRIVATE):  # Ray reads it when it is imported
        ray = require("ray", "cluster")
        if not address:
            _read.append(True)
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput(f"--ray {address or 'auto'}: {str(error).strip().splitlines()[0]}") from None
        try:
            yield ray
        finally:
            ray.shutdown()


_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # it would warn of what is to come
}
_PRIVATE = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # one for the process, as Ray reads it once
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its name for: on the loopback address
}


_read: list[bool] = []
"""Whether Ray was imported with `_PRIVATE`."""


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check(address: str) -> None:
    """`BadInput` where nothing listens; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and host and port.isdigit()):
        raise BadInput(f"--ray {address}: auto, or HOST:PORT of a cluster's head, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise BadInput(
            f"--ray {address}: no cluster answers there ({error}); start one with ray start --head"
        ) from None


def spread(
    make: Callable[[], Callable[[T], R]],
    items: Sequence[T],
    *,
    ray: str,
    what: str,
    unit: str,
    names: Sequence[str],
    cpus: int | None = None,
    gpu: bool = False,
) -> Iterator[tuple[int, R | HistillError]]:
    """The answer to every item with the item's number, in the order in which they come, under a bar.

    Args:
        make: called once by each worker, for the function of an item. Both are pickled, and so are the answers.
        items: what is asked; begun in their order.
        ray: as ``address`` of `joined`.
        what: stands beside the bar.
        unit: of it.
        names: of the items, for notices.
        cpus: cores of each worker (default: one, or with GPUs its share of the machine's).
        gpu: a worker may have a GPU; it gets one where the cluster has any.

    Yields:
        The answer, or the error that was raised: `Failed` where workers died over the item again and again.

    Raises:
        BadInput: no machine of the cluster has so many cores.
    """
    with joined(ray) as its:
        there = its.cluster_resources()
        gpus = int(there.get("GPU", 0)) if gpu else 0
        cores = cpus or (max(1, int(there.get("CPU", 1)) // gpus) if gpus else 1)
        most = max((int(node["Resources"].get("CPU", 0)) for node in its.nodes() if node["Alive"]), default=0)
        if cores > most:
            raise BadInput(f"--threads {cores}: no machine of the cluster has more than {most} cores")
        remote = its.remote(num_cpus=cores, num_gpus=int(gpus > 0), max_retries=0)(_work)
        made = its.put((version("histill"), cores, make))
        waiting, deaths = deque(range(len(items))), Counter[int]()
        running: dict[Any, int] = {}
        with progress(what, len(items), unit) as bar:
            while waiting or running:
                there = its.cluster_resources()  # machines come and go
                slots = (gpus and int(there.get("GPU", 0))) or int(there.get("CPU", 0)) // cores
                while waiting and len(running) < max(1, slots) + 2:
                    number = waiting.popleft()
                    running[remote.remote([made], items[number])] = number
                for done in its.wait(list(running), timeout=5)[0]:
                    number = running.pop(done)
                    try:
                        answer, lines = its.get(done)
                    except its.exceptions.RayTaskError as error:
                        answer, lines = _own(error), []
                    except its.exceptions.RayError as error:  # the worker's end, not the work's
                        deaths[number] += 1
                        why = type(error).__name__
                        if deaths[number] < _LIVES:
                            notice(f"the worker over {names[number]} died ({why}); another takes it up")
                            waiting.append(number)
                            continue
                        answer, lines = Failed(f"{names[number]}: {_LIVES} workers died over it ({why})"), []
                    for line in lines:
                        say(line)
                    bar.advance()
                    yield number, answer


def _own(error: Any) -> HistillError:
    """What a worker raised, as an error of ours."""
    cause = error.cause
    if isinstance(cause, HistillError):
        return cause
    return Failed(f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}")


_made: dict[Any, Callable[[Any], Any]] = {}
"""What this worker has made, by the reference of its maker: the last one."""


def _work(reference: list[Any], item: Any) -> tuple[Any, list[str]]:
    """In a worker: the answer, and the notices that there were."""
    import ray
    import torch

    if reference[0] not in _made:
        _made.clear()
        theirs, cores, make = ray.get(reference[0])
        if theirs != (ours := version("histill")):
            raise Failed(f"a worker has Histill {ours}, not {theirs}; install one version on all machines")
        torch.set_num_threads(cores)
        _made[reference[0]] = make()
    with redirect_stderr(io.StringIO()) as said:
        answer = _made[reference[0]](item)
    return answer, [line for line in said.getvalue().splitlines() if line.startswith("note: ")]
