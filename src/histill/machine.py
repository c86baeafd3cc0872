"""The machine as Lightning Fabric sees it: device, precision, processes, loggers."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy

from histill.errors import BadInput, require

__all__ = ["answers_bf16", "at_speed", "computes_bf16", "find_device", "kept_memory", "launch", "logged"]

_IN_BF16: ContextVar[bool] = ContextVar("_IN_BF16", default=False)


def launch(device: str, precision: str, loggers: Iterable[str], out: Path) -> Fabric:
    """A launched Fabric: one process, or this one's place among those that ``torchrun`` or Slurm started.

    Raises:
        BadInput: no such device, precision or logger here.
    """
    found = find_device(device)
    if isinstance(loggers, str):
        raise BadInput(f"loggers={loggers!r}: a list of names, such as [{loggers!r}]")
    tracked = [_logger(name, out) for name in loggers]
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # the precision is in run.json
    if precision == "auto":
        precision = "bf16-mixed" if computes_bf16(found.type) else "32-true"
    world, local, environment = _processes()
    try:
        fabric = Fabric(
            accelerator=found.type,
            devices=local if found.index is None or world > 1 else [found.index],
            num_nodes=max(1, world // local),
            # An objective may leave weights of the student unused, and DDP must be told to look for them.
            strategy=DDPStrategy(find_unused_parameters=True) if world > 1 else "auto",
            precision=precision,
            plugins=[environment],
            loggers=tracked,
        )
    except ValueError as error:
        raise BadInput(f"--device {device} --precision {precision}: {str(error).splitlines()[0]}") from None
    fabric.launch()
    if world > 1:
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Leave the other processes: Gloo's threads that live on at the end of the process abort it, now and then.

    Lightning does so for NCCL alone.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _processes() -> tuple[int, int, ClusterEnvironment]:
    """How many processes there are, how many of them on this machine, and who started them.

    ``sbatch`` sets variables of Slurm too, for a script that is one process; those of a step are of ``srun``.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]), TorchElasticEnvironment()
    tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{what}", "1")) for what in ("TASKS", "NODES"))
    if tasks == 1:
        return 1, 1, LightningEnvironment()
    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks // nodes)  # without it Fabric takes no more than one task
    return tasks, tasks // nodes, SLURMEnvironment()


def find_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` stands for; ``auto`` is the fastest there is.

    Raises:
        BadInput: another name, or no such device here.
    """
    kind, _, index = str(name).partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise BadInput(f"--device {name}: one of auto, cpu, cuda, cuda:1, mps")
    if kind == "cuda" and int(index or 0) >= (found := torch.cuda.device_count()):
        raise BadInput(f"--device {name}: torch sees {found or 'no'} CUDA devices here; use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise BadInput("--device mps: torch sees no such device here; use --device cpu")
    return torch.device(kind, int(index)) if index else torch.device(kind)


def computes_bf16(device: str) -> bool:
    """Whether bf16 is computed, not emulated: without AVX-512 BF16 or AMX it is many times slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def answers_bf16(device: str) -> bool:
    """Whether a frozen network answers in bf16 on this kind of device: on CUDA where that is computed, elsewhere where
    training (`at_speed`) says so; by itself, as when it is judged, in float32.
    """
    return computes_bf16(device) if device == "cuda" else _IN_BF16.get()


@contextmanager
def at_speed(fabric: Fabric) -> Iterator[None]:
    """What makes training fast, while the block runs: teachers answer in its precision, freed memory is kept."""
    token = _IN_BF16.set(str(fabric._precision.precision).startswith("bf16"))
    try:
        with kept_memory() if fabric.device.type == "cpu" else nullcontext():
            yield
    finally:
        _IN_BF16.reset(token)


@contextmanager
def kept_memory() -> Iterator[None]:
    """While the block runs, glibc keeps up to 2 GB of freed memory for the next tensors; elsewhere nothing happens.

    By itself it returns each large block to the system, which zeroes it page by page when the next layer asks for
    as much again: a tenth of a training step, a fifth of a forward. Whoever set ``MALLOC_...`` keeps that.
    """
    libc = _glibc()
    if libc is None or any(name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # what glibc's own rule comes to once it has seen large blocks
        libc.mallopt(_M_MMAP_MAX, 65_536)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**26)
        libc.malloc_trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # of Windows
        return None


@contextmanager
def logged(fabric: Fabric) -> Iterator[None]:
    """Close the loggers when the block ends and tell them how; a further run of this process then gets its own."""
    status, server = "failed", os.environ.get("MLFLOW_TRACKING_URI")
    try:
        yield
        status = "success"
    finally:
        for logger in fabric.loggers:
            logger.finalize(status)
            finish = getattr(getattr(logger, "_experiment", None), "finish", None)
            if finish is not None:  # of W&B, whose logger leaves its run open for the next one to write into
                finish(exit_code=int(status != "success"))
        if server is None:  # MLflow has set it to the database of this run, for whatever follows
            os.environ.pop("MLFLOW_TRACKING_URI", None)


def _logger(name: str, out: Path) -> Logger:
    if name == "tensorboard":
        require("tensorboard", "tracking")
        from lightning_fabric.loggers import TensorBoardLogger

        return TensorBoardLogger(root_dir=out, name="tensorboard", version="")
    if name in ("mlflow", "wandb"):
        require(name, "tracking")
        import histill.models._torchvision  # noqa: F401 - Lightning imports torchvision

        made = require("pytorch_lightning.loggers", "tracking")
        if name == "mlflow":
            # MLflow has given up its folder of files; without a server it keeps a database, here in the run.
            uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.resolve() / 'mlflow.db'}"
            return made.MLFlowLogger(experiment_name="histill", run_name=out.name, tracking_uri=uri)
        return made.WandbLogger(project="histill", name=out.name, save_dir=out)
    raise BadInput(f"logger {name!r}: one of tensorboard, mlflow, wandb (log.csv is always written)")
