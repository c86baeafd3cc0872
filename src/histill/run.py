"""A run is a folder; whatever comes after training reads the folder and nothing else."""

from __future__ import annotations

import functools
import importlib
import inspect
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from histill.data.images import Images
from histill.errors import BadInput
from histill.files import read_json

__all__ = ["Run", "describe", "versions"]


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: the folder.
        info: what ``run.json`` says.
        build: makes the untrained network.
    """

    path: Path
    info: dict[str, Any]
    build: Callable[[], nn.Module]

    @classmethod
    def open(cls, path: str | Path, *, code: Path | None = None) -> Run:
        """Open a run folder.

        Args:
            path: the folder.
            code: the Python file of a network that is not Histill's own; it is run, so it must be yours.

        Raises:
            BadInput: no run there, or a network whose code was not given.
        """
        path = Path(path)
        if not (path / "run.json").is_file():
            raise BadInput(f"{path}: not a run folder (no run.json in it)")
        info = read_json(path / "run.json")
        try:
            network = info["network"]
            arguments = network["arguments"]
            # The run's own weights follow; those it started from need not be had again.
            arguments = arguments | {"weights": None} if "weights" in arguments else arguments
            build = functools.partial(_resolve(path, network["function"], code), **arguments)
            info["classes"], info["image_size"], info["status"]
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path / 'run.json'}: not a run of Histill ({error})") from None
        return cls(path, info, build)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the logits."""
        return tuple(self.info["classes"])

    @property
    def image_size(self) -> int:
        """Height and width in pixels that the network was trained at."""
        return int(self.info["image_size"])

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.info["status"] == "finished")

    @property
    def data(self) -> Images:
        """The images that it was trained and judged on."""
        return Images.load(self.path / "data.csv")

    @property
    def log(self) -> pd.DataFrame:
        """A row per epoch."""
        return pd.read_csv(self.path / "log.csv")

    @property
    def metrics(self) -> dict[str, Any]:
        """Figures with intervals, per split."""
        return dict(read_json(self.path / "metrics.json"))

    @property
    def predictions(self) -> pd.DataFrame:
        """A row per image of validation and test."""
        return pd.read_parquet(self.path / "predictions.parquet")

    def network(self) -> nn.Module:
        """The student with its best-on-validation weights, in eval mode on the CPU.

        Raises:
            BadInput: the weights are missing or do not fit.
        """
        from safetensors.torch import load_file

        file = self.path / "model.safetensors"
        if not file.is_file():
            raise BadInput(
                f"{self.path}: no model.safetensors yet (status: {self.info['status']}); finish it with --resume"
            )
        network = self.build()
        try:
            network.load_state_dict(load_file(file))
        except Exception as error:  # noqa: BLE001 - safetensors and torch raise many kinds
            raise BadInput(f"{file}: does not fit the network of run.json ({str(error).splitlines()[0]})") from None
        return network.eval()


def _resolve(path: Path, function: str, code: Path | None) -> Callable[..., nn.Module]:
    """The function that ``module:name`` stands for. Only Histill's own modules are imported on a run's word."""
    module, _, name = function.partition(":")
    if module.startswith("histill.models."):
        found = getattr(importlib.import_module(module), name)
        if not (inspect.isclass(found) and issubclass(found, nn.Module)) and getattr(found, "__module__", "") != module:
            raise BadInput(f"{path / 'run.json'}: {function} is no network")
        return found  # type: ignore[no-any-return]
    if code is None:
        raise BadInput(f"{path}: its network is {function}, not one of Histill's; give its file with --code")
    from histill.experiment import load_file

    return getattr(load_file(Path(code)), name)  # type: ignore[no-any-return]


def describe(student: functools.partial[nn.Module]) -> dict[str, Any]:
    """How a network is made, as ``run.json`` keeps it.

    Raises:
        BadInput: it is not a `functools.partial` of a module-level function or class with keyword arguments.
    """
    if not isinstance(student, functools.partial) or student.args:
        raise BadInput(
            "student: give functools.partial(Network, keyword=value, ...), so that the run can make it again"
        )
    return {
        "function": f"{student.func.__module__}:{student.func.__qualname__}",
        "arguments": student.keywords,
    }


def versions() -> dict[str, str]:
    """What was installed."""
    found = {"python": platform.python_version()}
    for name in ("histill", "torch", "timm", "lightning-fabric", "numpy", "pillow", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the working folder's repository, if it is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
