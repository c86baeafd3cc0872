"""The machine as Lightning Fabric sees it: device, precision, processes, loggers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger

from histill.errors import BadInput, require

__all__ = ["computes_bf16", "launch"]


def launch(device: str, precision: str, loggers: Iterable[str], out: Path) -> Fabric:
    """A launched Fabric: one process, or this one's place among those that ``torchrun`` or Slurm started.

    Raises:
        BadInput: no such device, precision or logger here.
    """
    device, _, index = device.partition(":")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device not in ("cpu", "cuda", "mps") or (index and not (device == "cuda" and index.isdigit())):
        raise BadInput(f"--device {device}: one of auto, cpu, cuda, cuda:1, mps")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device here; use --device cpu")
    if precision == "auto":
        precision = "bf16-mixed" if computes_bf16(device) else "32-true"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        fabric = Fabric(
            accelerator=device,
            devices=[int(index)] if index and device == "cuda" and world == 1 else local,
            num_nodes=max(1, world // local),
            strategy="ddp" if world > 1 else "auto",
            precision=precision,
            loggers=[_logger(name, out) for name in loggers],
        )
    except ValueError as error:
        raise BadInput(f"--device {device} --precision {precision}: {str(error).splitlines()[0]}") from None
    fabric.launch()
    return fabric


def computes_bf16(device: str) -> bool:
    """Whether bf16 is computed, not emulated: without AVX-512 BF16 or AMX it is many times slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _logger(name: str, out: Path) -> Logger:
    if name == "tensorboard":
        require("tensorboard", "tracking")
        from lightning_fabric.loggers import TensorBoardLogger

        return TensorBoardLogger(root_dir=out, name="tensorboard", version="")
    if name in ("mlflow", "wandb"):
        require(name, "tracking")
        made = require("pytorch_lightning.loggers", "tracking")
        if name == "mlflow":
            # MLflow has given up its folder of files; without a server it keeps a database, here in the run.
            uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.resolve() / 'mlflow.db'}"
            return made.MLFlowLogger(experiment_name="histill", run_name=out.name, tracking_uri=uri)
        return made.WandbLogger(project="histill", name=out.name, save_dir=out)
    raise BadInput(f"logger {name!r}: one of tensorboard, mlflow, wandb (log.csv is always written)")
