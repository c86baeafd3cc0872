"""``histill doctor``: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from histill import __version__
from histill.commands import app, show
from histill.errors import HistillError

State = Literal["works", "missing", "poor"]
_MARKS: dict[State, tuple[str, str]] = {"works": ("✓", "green"), "missing": ("·", "dim"), "poor": ("!", "yellow")}
_WIDTH = 12
_LITTLE = 10e9
_NOT_FOR_USE = ("all", "dev", "docs")


@dataclass(frozen=True)
class Line:
    """One thing: its name, whether it works, what was found, and what to do where it does not."""

    name: str
    state: State
    found: str
    remedy: str = ""


@app.command
def doctor(*, json: bool = False) -> None:
    """What works on this machine: device, precision, slide reader, codecs, extras, disk; and what to install.

    Args:
        json: the same as JSON.
    """
    if json:
        from json import dumps

        show(dumps([asdict(line) for line in examine()], indent=2))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in examine():
        mark, colour = _MARKS[line.state]
        text = Text.assemble((f"{mark} ", colour), f"{line.name:{_WIDTH}}", line.found)
        console.print(text + Text(f": {line.remedy}", colour) if line.remedy else text)


def examine() -> Iterator[Line]:
    """Look at everything, each by itself: what cannot even be looked at is a line as well."""
    looks: tuple[tuple[str, Callable[[], Line | list[Line]]], ...] = (
        ("python", _python),
        ("core", _core),
        ("torch", _torch),
        ("device", _device),
        ("precision", _precision),
        ("threads", _threads),
        ("pictures", _pictures),
        ("slides", _slides),
        ("export", _export),
        ("extras", _extras),
        ("cache", _cache),
        ("folder", _folder),
    )
    for name, look in looks:
        try:
            found = look()
        except Exception as error:  # noqa: BLE001 - whatever is broken, the other lines are still wanted
            said = (str(error).strip().splitlines() or [""])[0]
            found = Line(name, "poor", f"{type(error).__name__}: {said}"[:160], "install it again")
        yield from [found] if isinstance(found, Line) else found


def _python() -> Line:
    return Line("python", "works", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _core() -> Line:
    """The libraries without which nothing works."""
    held = _required("")
    poor = [f"{name} {have or 'is missing'} (needs {wanted})" for name, wanted, have, fits in held if not fits]
    if poor:
        return Line("histill", "poor", f"{__version__}; {', '.join(poor)}", "pip install --upgrade histill")
    return Line("histill", "works", f"{__version__}, {len(held)} libraries")


def _torch() -> Line:
    import torch

    import histill.models._torchvision  # noqa: F401 - torchvision as Histill imports it

    return Line("torch", "works", f"{torch.__version__}, torchvision {metadata.version('torchvision')}")


def _device() -> Line:
    import torch

    from histill.machine import find_device

    device = find_device("auto")
    if device.type == "cuda":
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Line("device", "works", ", ".join(f"{c.name}, {c.total_memory / 2**30:.0f} GiB" for c in cards))
    if torch.version.cuda and shutil.which("nvidia-smi"):
        return Line("device", "poor", "cpu: torch sees no CUDA device", "look at what nvidia-smi says of the driver")
    return Line("device", "works", f"{device.type} ({torch.backends.cpu.get_cpu_capability()})")


def _precision() -> Line:
    from histill.machine import computes_bf16, find_device

    if computes_bf16(find_device("auto").type):
        return Line("bf16", "works", "computed: training takes it")
    return Line("bf16", "missing", "emulated here: training stays with float32")


def _threads() -> Line:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads < cores:
        return Line("threads", "poor", f"{threads} of {cores} cores", "unset OMP_NUM_THREADS, or raise it")
    return Line("threads", "works", f"{threads} of {cores} cores")


def _pictures() -> Line:
    from PIL import features

    asked = {"JPEG": "jpg", "JPEG 2000": "jpg_2000", "TIFF": "libtiff", "WebP": "webp"}
    lacking = [name for name, feature in asked.items() if not features.check(feature)]
    if lacking:
        return Line("pictures", "poor", f"Pillow lacks {', '.join(lacking)}", "pip install --force-reinstall pillow")
    turbo = " (libjpeg-turbo)" if features.check_feature("libjpeg_turbo") else ""
    return Line("pictures", "works", f"{', '.join(asked)}{turbo}")


def _slides() -> Line:
    """Draws a small slide, reads it by OpenSlide and by its tiles, and compares."""
    if _lacking("slides"):
        return Line("slides", "missing", "cannot be read", "pip install 'histill[slides]'")
    import imagecodecs
    import numpy as np
    import openslide

    from histill.data.phantom import write_slide
    from histill.slides import open_slide

    with tempfile.TemporaryDirectory() as folder:
        path = write_slide(Path(folder) / "slide.tiff", width=512, height=512, levels=2)
        with open_slide(path) as slide, openslide.OpenSlide(path) as other:
            ours, reader = slide.read(64, 64, 256, 256), slide.reader
            theirs = np.asarray(other.read_region((64, 64), 0, (256, 256)).convert("RGB"))
    versions = f"OpenSlide {openslide.__library_version__}, imagecodecs {imagecodecs.__version__}"
    if not np.array_equal(ours, theirs):
        return Line("slides", "poor", f"{versions}: two readers differ by pixels", "pip install -U 'histill[slides]'")
    return Line("slides", "works", f"{versions}; one was drawn and read ({reader})")


def _export() -> Line:
    if _lacking("deploy"):
        return Line("export", "missing", "TorchScript alone", "pip install 'histill[deploy]'")
    import onnxruntime

    return Line(
        "export", "works", f"ONNX Runtime {onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}"
    )


def _extras() -> list[Line]:
    lines = []
    for extra in sorted(set(metadata.metadata("histill").get_all("Provides-Extra") or ()) - set(_NOT_FOR_USE)):
        remedy = f"pip install 'histill[{extra}]'"
        if lacking := _lacking(extra):
            lines.append(Line(f"[{extra}]", "missing", f"without {', '.join(lacking)}", remedy))
        else:
            lines.append(Line(f"[{extra}]", "works", ", ".join(f"{n} {have}" for n, _, have, _ in _required(extra))))
    return lines


def _cache() -> Line:
    from histill.files import cache_dir

    try:
        folder = cache_dir()
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except (HistillError, OSError) as error:
        return Line("cache", "poor", str(error), "set HISTILL_CACHE to a folder that can be written to")
    said = f"{folder}, {free / 1e9:.0f} GB free"
    if free < _LITTLE:
        return Line("cache", "poor", said, "set HISTILL_CACHE to a larger disk")
    return Line("cache", "works", said)


def _folder() -> Line:
    here = Path.cwd()
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError:
        return Line("folder", "poor", f"{here} cannot be written to", "give --out another folder")
    return Line("folder", "works", f"{here} can be written to")


def _lacking(extra: str) -> list[str]:
    return [f"{name} {wanted}".strip() for name, wanted, _, fits in _required(extra) if not fits]


def _required(extra: str) -> list[tuple[str, str, str, bool]]:
    """What Histill's metadata says an extra needs (the core: ""): name, versions wanted, version held, does it fit."""
    from packaging.requirements import Requirement

    found: list[tuple[str, str, str, bool]] = []
    for line in metadata.requires("histill") or []:
        need = Requirement(line)
        chosen = (
            need.marker is None if not extra else need.marker is not None and need.marker.evaluate({"extra": extra})
        )
        if not chosen:
            continue
        if need.name == "histill":
            found += [held for other in sorted(need.extras) for held in _required(other)]
            continue
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            have = ""
        fits = bool(have) and need.specifier.contains(have, prereleases=True)
        found.append((need.name, str(need.specifier), have, fits))
    return found
