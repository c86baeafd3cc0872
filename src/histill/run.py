"""A run is a folder; whatever comes after training reads the folder and nothing else."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from torch import nn

from histill.data.images import Images, few
from histill.errors import BadInput, HistillError
from histill.files import read_json

__all__ = ["Run", "read_log", "without_weights"]

_MOST_SIZE = 8192  # pixels of a side
_MOST_TIMES, _SMALL_BYTES = 100, 64 << 20  # a table's size in memory, by its file's


@dataclass(frozen=True, repr=False)
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
            code: the Python file of a network that is not Histill's own; it is run, so it must be yours. Without it
                such a run can be read, but its network not be built.

        Raises:
            BadInput: no run there.
        """
        path = Path(path)
        if not (path / "run.json").is_file():
            runs = sorted(found.parent for level in ("*", "*/*") for found in path.glob(f"{level}/run.json"))
            there = f"; there are {few(runs)}" if runs else ""
            raise BadInput(f"{path}: not a run folder (no run.json in it){there}")
        info = read_json(path / "run.json")
        try:
            network = info["network"]
            function, arguments = network["function"], network["arguments"]
            _check(info)
            build = functools.partial(_resolve(path, function, code), **arguments)
        except BadInput:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            why = f"{type(error).__name__}: {str(error)[:200]}"
            raise BadInput(f"{path / 'run.json'}: not a run of Histill ({why})") from None
        return cls(path, info, without_weights(build))

    def __repr__(self) -> str:
        network, status = self.info["network"]["function"].rsplit(":")[-1], self.info["status"]
        return f"Run({str(self.path)!r}: {network}, {self.image_size} px, {few(self.classes)}; {status})"

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
        return read_log(self.path)

    @property
    def metrics(self) -> dict[str, Any]:
        """Figures with intervals, per split."""
        figures = read_json(self.path / "metrics.json")
        if not isinstance(figures, dict):
            raise BadInput(f"{self.path / 'metrics.json'}: not figures of a run")
        return figures

    @property
    def temperature(self) -> float | None:
        """That calibrates the network, fitted on the validation images; None where there is none."""
        value = self.metrics.get("temperature") if (self.path / "metrics.json").is_file() else None
        return float(value) if isinstance(value, (int, float)) and 0 < value < math.inf else None

    @property
    def predictions(self) -> pd.DataFrame:
        """A row per image of validation and test; `BadInput` where they are missing or damaged."""
        return _read(self.path / "predictions.parquet")

    @property
    def last(self) -> pd.DataFrame:
        """The same of the last epoch's weights, which are the run's own where none were chosen."""
        return self.predictions if self.info["select"] == "last" else _read(self.path / "last.parquet")

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
        try:
            if self.info["network"]["function"].startswith("histill."):
                _check_sizes(self.build, file)
            network = self.build()
            network.load_state_dict(load_file(file))
        except HistillError:
            raise
        except Exception as error:  # noqa: BLE001 - safetensors and torch raise many kinds
            raise BadInput(f"{file}: does not fit the network of run.json ({str(error).splitlines()[0]})") from None
        return network.eval()


def _check_sizes(build: Callable[[], nn.Module], file: Path) -> None:
    """Raise where the weights do not fit, before memory is set aside for a network as large as a run likes to say."""
    with safe_open(file, "pt") as weights:
        there = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    with torch.device("meta"):
        needed = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    if differ := [name for name in needed if there.get(name) != needed[name]]:
        raise ValueError(f"{differ[0]} is {there.get(differ[0])} in it, and {needed[differ[0]]} in the network")


def read_log(folder: Path) -> pd.DataFrame:
    """A row per epoch of ``log.csv``; `BadInput` where it is missing or damaged."""
    file = folder / "log.csv"
    try:
        return pd.read_csv(file)
    except (OSError, ValueError) as error:  # of pandas' errors all are the latter
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{file}: not a readable log ({why})") from None


def _check(info: dict[str, Any]) -> None:
    """Raise where what every reader of a run relies on is not there or not what it should be."""
    names = info["classes"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("classes are not a list of names")
    if len(set(names)) != len(names):
        raise ValueError("a class is named twice")
    if type(info["image_size"]) is not int or not 0 < info["image_size"] <= _MOST_SIZE:
        raise ValueError(f"an image size of {info['image_size']!r:.50}")
    for name, kinds in (("status", str), ("select", str), ("positive", str | None)):
        if not isinstance(info[name], kinds):
            raise TypeError(f"{name} is {info[name]!r:.50}")
    if not isinstance(info["data"]["hash"], str) or info["data"].get("masks", "") not in ("", "classes", "instances"):
        raise ValueError("what it says of its data cannot be")


def _read(file: Path) -> pd.DataFrame:
    try:
        import pyarrow.parquet as pq

        said, size = pq.read_metadata(file), file.stat().st_size
        if said.num_rows * said.num_columns * 8 > max(_SMALL_BYTES, _MOST_TIMES * size):
            raise ValueError(f"{said.num_rows:,} rows in a file of {size:,} bytes")
        return pd.read_parquet(file)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - pyarrow and pandas raise what the damage leads to
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{file}: not readable predictions ({why})") from None


def without_weights(build: functools.partial[nn.Module]) -> functools.partial[nn.Module]:
    """``build`` from random weights: the run's own follow, and those it started from need not be had again."""
    return functools.partial(build, weights=None) if "weights" in build.keywords else build


def _resolve(path: Path, function: str, code: Path | None) -> Callable[..., nn.Module]:
    """The network that ``module:name`` stands for: on a run's word one of Histill's own, and nothing else of it."""
    module, _, name = function.partition(":")
    if module.startswith("histill."):
        try:
            known = re.fullmatch(r"histill\.models\.[a-z]\w*", module) and importlib.import_module(module)
        except ImportError:
            known = None
        found = getattr(known, name, None)
        if getattr(found, "__module__", "") != module or not _makes_network(found):
            raise BadInput(f"{path / 'run.json'}: {function} is no network of Histill")
        return found  # type: ignore[return-value]
    if code is None:
        return functools.partial(_needs_code, path, function)
    from histill.experiment import load_file

    if (found := getattr(load_file(Path(code).resolve()), name, None)) is None:
        raise BadInput(f"{path}: its network is {function}, but {code} has no {name}")
    return found  # type: ignore[no-any-return]


def _needs_code(path: Path, function: str, **arguments: Any) -> nn.Module:
    raise BadInput(f"{path}: its network is {function}, not one of Histill's; give its file with --code")


def _makes_network(found: Any) -> bool:
    """Whether it is a network's class, or a function that says that it returns one."""
    if inspect.isfunction(found):
        found = typing.get_type_hints(found).get("return")
    return inspect.isclass(found) and issubclass(found, nn.Module)
