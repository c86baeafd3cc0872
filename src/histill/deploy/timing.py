"""What a model costs where it runs: size, arithmetic, memory, latency; several models side by side.

Run as a script, ``timing.py MODEL.onnx THREADS`` prints the memory of one model; it then imports neither PyTorch nor
Histill, so that only the model's own memory is counted.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

    from histill.deploy.predictor import Predictor

__all__ = ["efficiency", "latency", "peak_memory"]

_WARM_UP = 3


def latency(
    predictors: Mapping[str, Predictor],
    *,
    batch: int = 1,
    repeats: int = 100,
    seconds: float = 20.0,
    images: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda rounds: None,
) -> dict[str, dict[str, Any]]:
    """Time several models side by side: in every round each runs once, the first one taking turns.

    A slow moment of the machine then meets all of them, and a ratio within a round is worth more than two medians.

    Args:
        predictors: by name; the first is what the others are compared with.
        batch: images at a time.
        repeats: rounds, after 3 more that are not counted.
        seconds: no round begins after this time, once there are 5.
        images: by name, ``(N, 3, size, size)`` that the rounds go through in turn, N at least ``batch``: an early exit
            takes as long as its images are hard (default: noise, of which nothing can be said).
        progress: called with 1 after each round.

    Returns:
        For each name ``latency_ms`` (one batch) with ``median`` and ``p95``, ``images_per_second`` at the median,
        ``rounds``, and ``speedup``: the first model's time over this one's, as ``value`` (median of the rounds) with
        ``low`` and ``high`` (2.5th and 97.5th percentile of the rounds).
    """
    draw = np.random.default_rng(0)
    shown = images or {
        name: draw.random((batch, 3, predictor.image_size, predictor.image_size), dtype=np.float32)
        for name, predictor in predictors.items()
    }
    names = list(predictors)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(-_WARM_UP, repeats):
        if turn == 0:
            start = time.perf_counter()
        elif turn >= 5 and time.perf_counter() - start > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start_row = turn % (len(shown[name]) // batch) * batch
            now = shown[name][start_row : start_row + batch]
            began = time.perf_counter()
            predictors[name](now)
            elapsed = time.perf_counter() - began
            if turn >= 0:
                times[name].append(elapsed)
        if turn >= 0:
            progress(1)
    taken = {name: np.array(values) for name, values in times.items()}
    return {name: _summary(taken[names[0]], taken[name], batch) for name in names}


def _summary(first: Any, own: Any, batch: int) -> dict[str, Any]:
    ratio = first / own
    median = float(np.median(own))
    return {
        "latency_ms": {"median": 1e3 * median, "p95": 1e3 * float(np.percentile(own, 95))},
        "mean_ms": 1e3 * float(own.mean()),
        "images_per_second": batch / median,
        "rounds": len(own),
        "speedup": {
            "value": float(np.median(ratio)),
            "low": float(np.percentile(ratio, 2.5)),
            "high": float(np.percentile(ratio, 97.5)),
        },
    }


def efficiency(
    models: Mapping[str, tuple[nn.Module, Path]],
    *,
    batch: int = 16,
    threads: int | None = None,
    repeats: int = 100,
    seconds: float = 20.0,
    progress: Callable[[int], None] = lambda rounds: None,
) -> dict[str, dict[str, Any]]:
    """The cost of exported networks, timed side by side.

    Args:
        models: by name, a network and the ``.onnx`` file that was exported from it.
        batch: images at a time for the throughput.
        threads: CPU threads (default: PyTorch's number).
        repeats: rounds of each of the two timings; see `latency`.
        seconds: time for each of the two.
        progress: called with 1 after each round.

    Returns:
        For each name ``parameters`` and ``macs`` (of the network, at the file's image size), ``file_bytes``,
        ``peak_memory_bytes`` (`peak_memory`), ``latency_ms_batch1`` and ``latency_ms_batch<batch>``, each
        with ``median`` and ``p95``, and ``images_per_second`` at ``batch``.

    Raises:
        BadInput: a file cannot be opened.
        Failed: a file does not run in a process of its own.
    """
    from histill.deploy.predictor import open_model
    from histill.evaluate.cost import macs

    predictors = {name: open_model(path, threads=threads) for name, (_, path) in models.items()}
    limits: dict[str, Any] = {"repeats": repeats, "seconds": seconds, "progress": progress}
    single = latency(predictors, batch=1, **limits)
    many = latency(predictors, batch=batch, **limits)
    return {
        name: {
            "parameters": sum(weight.numel() for weight in network.parameters()),
            "macs": macs(network, predictors[name].image_size),
            "file_bytes": Path(path).stat().st_size,
            "peak_memory_bytes": peak_memory(path, threads=threads),
            "latency_ms_batch1": single[name]["latency_ms"],
            f"latency_ms_batch{batch}": many[name]["latency_ms"],
            "images_per_second": many[name]["images_per_second"],
        }
        for name, (network, path) in models.items()
    }


def peak_memory(model: str | Path, *, threads: int | None = None) -> int:
    """Bytes by which a fresh process grows, at its peak, to load an ``.onnx`` file and run one image.

    Raises:
        Failed: the process fails.
    """
    import torch

    from histill.errors import Failed

    # -P keeps this folder off the search path; ONNX Runtime is imported from where this process has it.
    command = [sys.executable, "-P", __file__, str(model), str(threads or torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"{model} does not run in a process of its own: {last}")
    return int(done.stdout)


def _peak_resident() -> int:
    """Bytes of this process's largest resident set so far."""
    try:
        # On Linux ru_maxrss starts from the parent's size, since the child began as its copy; VmHWM does not.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _main(model: str, threads: int) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    before = _peak_resident()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    shape = [side if isinstance(side, int) else 1 for side in entry.shape]
    session.run(None, {entry.name: np.zeros(shape, np.float32)})
    sys.stdout.write(str(_peak_resident() - before))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
