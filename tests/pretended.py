"""A pretended accelerator: its numbers are of the CPU, its rules are those of CUDA.

A tensor that is sent there is another kind of tensor. What mixes it with one that is not is an error, as it is on CUDA,
and wherever the processor would have to wait for the device (a number is read, a mask is an index, a copy is not from
pinned memory) the place is written down. Results must be those of the CPU, as the CPU computes them. float64 is
refused, as Apple's MPS has none.

torch knows the device as ``meta:0``, the one kind beside the CPU whose gradients it computes without a driver.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from histill import loop, machine

THERE = torch.device("meta", 0)
_aten = torch.ops.aten
_ASKS = {
    _aten._local_scalar_dense.default,
    _aten._unique2.default,
    _aten.bincount.default,
    _aten.equal.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.unique_dim.default,
}
"""Operators that know the shape of their result, or their result, only when the device has computed it."""

_INDEX = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class There(Tensor):
    """A tensor on the pretended device."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> There:
        if near.dtype == torch.float64:
            raise TypeError("float64 on the device: MPS has none")
        kind = {"dtype": near.dtype, "layout": near.layout, "device": THERE}
        place = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        there: There = Tensor._make_wrapper_subclass(cls, near.shape, **place, **kind)  # type: ignore[attr-defined]
        there.near = near
        return there

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.near})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.near.__reduce_ex__(protocol)  # a checkpoint holds numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the pretended device, which is gone")


class Pretended(TorchDispatchMode):
    """While it is entered there is such a device.

    Attributes:
        waits: where the processor waited for it, as ``what file:line``.
        in_steps: those of them that are within a step of a training, from the second step on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.in_steps: list[str] = []

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=)` is made here and then sent
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled():  # there alone operators come that are made of others
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(tensor, There) for tensor in tensors)
        here = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim()]
        if any(tensor.device == THERE for tensor in here):
            raise RuntimeError(f"{func}: a tensor made of numbers on the device; make it here and send it")
        to_there = there
        if kwargs.get("device") is not None:
            to_there = torch.device(kwargs["device"]) == THERE
            kwargs["device"] = torch.device("cpu") if to_there else kwargs["device"]
        if func is _aten._to_copy.default:
            if there != to_there and not (to_there and kwargs.get("non_blocking")):
                self._wait("sent" if to_there else "brought back")
        elif func is _aten.copy_.default:
            mixed = isinstance(args[0], There) != isinstance(args[1], There)
            if mixed and not (isinstance(args[0], There) and (args[2:3] == (True,) or kwargs.get("non_blocking"))):
                self._wait("copied")
        elif there:
            if func in _ASKS:
                self._wait(str(func))
            if func in _INDEX:
                here = self._indexed(args)
            if here or kwargs.get("generator") is not None:
                shapes = [(type(tensor).__name__, tuple(tensor.shape)) for tensor in tensors]
                raise RuntimeError(f"{func}: tensors on two devices, or a generator of another: {shapes}")
        result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
        if not to_there:
            return result
        if func._schema.is_mutable and func._schema.name.endswith("_"):
            return args[0] if func._schema.returns else None
        result = tree_map(_there, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if func.is_view else result

    def _indexed(self, args: Any) -> list[Tensor]:
        """The tensors beside the index that are not there; an index may be, and is waited for."""
        one_value = len(args) > 2 and args[2].dim() == 0  # torch fills then, and does not ask how many
        for index in args[1]:
            if index is not None and not isinstance(index, There):
                self._wait("indexed from here")
            elif index is not None and index.dtype in (torch.bool, torch.uint8) and not one_value:
                self._wait("indexed by a mask")
        return [t for t in (args[0], *args[2:3]) if not isinstance(t, There) and t.dim()]

    def _wait(self, what: str) -> None:
        stack = [frame for frame in traceback.extract_stack() if "/histill/" in frame.filename]
        where = f"{Path(stack[-1].filename).name}:{stack[-1].lineno}" if stack else "backward"
        self.waits.append(f"{what} {where}")


def _near(value: Any) -> Any:
    return value.near if isinstance(value, There) else value


def _there(value: Any) -> Any:
    return There(value) if isinstance(value, Tensor) and not isinstance(value, There) else value


class _Anywhere(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """While the block runs ``device="meta:0"`` is one to compute on, for everything in Histill."""

    def launch(device: str, precision: str, loggers: Any, out: Path) -> Fabric:
        strategy = SingleDeviceStrategy(device=torch.device(device))
        return Fabric(strategy=strategy, precision="32-true", accelerator=_Anywhere())

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    step: Callable[..., None] = loop._step
    load = loop._load

    def watched(experiment: Any, packed: Any, rows: Any, state: Any, *others: Any) -> None:
        before = len(device.waits)
        step(experiment, packed, rows, state, *others)
        if state.epoch or state.step:  # in the first the teacher is sent
            device.in_steps += device.waits[before:]

    find = machine.find_device
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    monkeypatch.setattr(loop, "launch", launch)
    monkeypatch.setattr(loop, "_step", watched)
    monkeypatch.setattr(loop, "_load", lambda checkpoint, device: load(checkpoint, torch.device("cpu")))
    for module in [m for name, m in sys.modules.items() if name.startswith("histill") and hasattr(m, "find_device")]:
        monkeypatch.setattr(module, "find_device", lambda name: THERE if name == "meta:0" else find(name))
    monkeypatch.setattr(torch, "autocast", Autocast)
    torch.__future__.set_swap_module_params_on_conversion(True)  # an optimiser keeps its parameters, as with CUDA
    try:
        with Pretended() as device, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* which is a no-op")  # it is not, here
            yield device
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
