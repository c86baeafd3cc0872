"""Kill Histill at random moments, start it again, and compare what it leaves with what an undisturbed process leaves.

    python tests/soak.py --kills 50 --seed 0 --out benchmarks/results/soak.json

Half of the kills come after a random time, half at a random operation on files: just before one is opened to be
written, renamed, removed, linked, made to last (fsync, flush, fallocate); before a rename often with the file cut
short, as if its last bytes had not been written. Every process is a fork of one that has imported everything. When the
killed one is dead, every file that it leaves is compared with the undisturbed process's, and the next is started.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import slides_tiny
import torch
from tiny import SIZE, Counting, everything, table

import histill as hs
from histill.data import Augment, pack
from histill.files import cache_dir
from histill.recipes import dsnet
from histill.teachers import Cached

VIEWS, BATCH = 3, 4
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}


class Operations:
    """Counts what this process does to files below a folder; the ``fatal``-th is its last (0: none is)."""

    def __init__(self, below: Path, fatal: int = 0, *, torn: float | None = None) -> None:
        self.below, self.fatal, self.torn, self.count, self.dying = f"{below}/", fatal, torn, 0, False
        sys.addaudithook(self._audit)
        for module, name in ((os, "fsync"), (os, "posix_fallocate"), (np.memmap, "flush")):
            setattr(module, name, self._counted(getattr(module, name)))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self.dying:
            return
        path = arguments[0]
        if event == "open" and (isinstance(path, int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if os.fspath(path).startswith(self.below):
            self._one(os.fspath(path) if event == "os.rename" else None)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self._one()
            found = function(*arguments)
            self._one()
            return found

        return counted

    def _one(self, renamed: str | None = None) -> None:
        self.count += 1
        if self.count == self.fatal:
            self.dying = True
            if renamed and self.torn is not None and Path(renamed).is_file():
                os.truncate(renamed, int(self.torn * Path(renamed).stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Life:
    """How a process ended: its status (-9: killed), its seconds, and what it did to files, where it ended by itself."""

    status: int
    seconds: float
    operations: int
    said: str


def live(
    work: Callable[[], None], below: Path, *, seconds: float | None = None, fatal: int = 0, torn: float | None = None
) -> Life:
    """``work`` in a fork of this process, killed after so many seconds or at its ``fatal``-th operation on files."""
    heard, tells = os.pipe()
    start = time.monotonic()
    log = below.with_name(f"{below.name}.log")
    log.touch()  # a child may be killed before its first step
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(heard)
            os.chdir(below.parent)  # in no repository, whose commit a run would keep
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            done = Operations(below, fatal, torn=torn)
            work()
            modules = [n for n in sys.modules if n.split(".")[0] in WARM]
            with os.fdopen(tells, "w") as pipe:
                pipe.write(json.dumps([done.count, modules]) + "\n")
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it is, the parent reads it
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(tells)
    told = b""
    while select.select([heard], [], [], None if seconds is None else max(0, start + seconds - time.monotonic()))[0]:
        if not (part := os.read(heard, 65536)):
            break
        told += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(heard)
    _, status = os.waitpid(child, 0)
    lived = time.monotonic() - start
    count, modules = json.loads(told) if told.endswith(b"\n") else (0, [])  # a killed one may have told half of it
    for name in modules:
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)
    said = log.read_text(errors="replace").strip()
    return Life(os.waitstatus_to_exitcode(status), lived, count, said)


WARM = {
    "histill", "torch", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "matplotlib", "tifffile", "shapely", "h5py",
    "openslide", "contourpy", "scipy", "sklearn", "PIL", "pyarrow", "pandas", "sympy", "imagecodecs", "jinja2",
}  # fmt: skip
"""What later processes have imported already, where an earlier one needed it."""


@dataclass(frozen=True)
class Kind:
    """Something that is killed: ``prepare(root)`` once, ``work(root, out)`` at each start."""

    prepare: Callable[[Path], None]
    work: Callable[[Path, Path], None]
    unlike: Callable[[Path, Path], list[str]]  # after a kill: files of the first folder that are not the second's


def images(root: Path) -> None:
    table(root / "data")


def train(root: Path, out: Path) -> None:
    """Dropout, a moving average, accumulation, a teacher behind a cache; a checkpoint after every step."""
    made = everything(table(root / "data"), out / "cache", epochs=4)
    hs.train(made, out / "run", resume=True, checkpoint_seconds=0)


def fill(root: Path, out: Path) -> None:
    """Decode and pack the images, then ask a teacher about three views of each; on disk after each batch."""
    os.environ["HISTILL_CACHE"] = str(out)
    packed = pack(table(root / "data"), SIZE)
    count, teacher = len(packed.images), Counting()
    cached = Cached(teacher, cache_dir("teachers", "one"), images=count, views=VIEWS, identity={"seed": 0})
    for view in range(VIEWS):
        for rows in np.array_split(np.arange(count), count // BATCH):
            views = torch.full((len(rows),), view)
            cached(packed.batch(rows, views, augment=Augment(rotate=90), seed=0))
            cached.flush()


def slide(root: Path) -> None:
    slides_tiny.slide(root / "one.tif", width=640, height=640)
    slides_tiny.model(root / "purple.pt")


def predict(root: Path, out: Path) -> None:
    """A slide tile by tile, with a reference, to a map, outlines and a page."""
    from histill.slides.predict import predict_slide

    truth = root / "one.mask.png"
    predict_slide(root / "purple.pt", root / "one.tif", out, batch_size=1, truth=truth, min_area_um2=100)


def trained(root: Path) -> None:
    made = dsnet.student(data=table(root / "data"), image_size=SIZE, epochs=1, batch_size=8)
    hs.train(made, root / "run")


def export(root: Path, out: Path) -> None:
    """ONNX and int8. TorchScript is left out: it writes down from where in the program it was traced."""
    hs.export(root / "run", out / "student.onnx", int8=True)


def read(path: Path) -> Any:
    """What a file says, but for times: bytes, or what is left of JSON and tables."""
    if path.name == "run.json":
        said = json.loads(path.read_text())
        return {name: value for name, value in said.items() if name not in ("started", "seconds")}
    if path.name in ("slide.json", "summary.json"):
        return _timeless(json.loads(path.read_text()))
    if path.name == "log.csv":
        return pd.read_csv(path).drop(columns="images_per_second").to_dict("records")
    return path.read_bytes()


def _timeless(said: Any) -> Any:
    if not isinstance(said, dict):
        return said
    return {name: _timeless(value) for name, value in said.items() if name not in ("timing", "resumed")}


def files(folder: Path) -> dict[str, Path]:
    """Every file that anyone would read; hidden ones are a process's own."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path for name, path in found.items() if not any(part.startswith(".") for part in Path(name).parts)}


def left(folder: Path) -> list[str]:
    """Hidden files but for locks: what a process that came to its end must not leave."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return [name for name in found if any(part.startswith(".") for part in Path(name).parts)]


def unlike_files(out: Path, whole: Path) -> list[str]:
    """Files that are there and not, to the byte, those of the whole."""
    wanted, wrong = files(whole), []
    for name, path in files(out).items():
        try:
            if name.endswith("_files") or "_files/" in name:
                continue  # tiles of an overlay, named by its .dzi alone
            if name not in wanted or read(path) != read(wanted[name]):
                wrong.append(name)
        except Exception as error:  # noqa: BLE001 - a damaged file, whatever its kind
            wrong.append(f"{name} ({type(error).__name__})")
    for pyramid in out.rglob("*.dzi"):
        tiles = f"{pyramid.relative_to(out).as_posix()[:-4]}_files/"
        wrong += [n for n, p in wanted.items() if n.startswith(tiles) and not same(out / n, p)]
    return wrong


def same(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()


def unlike_run(out: Path, whole: Path) -> list[str]:
    """As `unlike_files` of a run under way: its log may end early, its checkpoint must be whole, its cache right."""
    wrong = [n for n in unlike_files(out, whole) if n.split(" ")[0] not in GROWING and not n.startswith("cache/")]
    run = out / "run"
    for name, check in GROWING.items():
        if (out / name).exists():
            try:
                check(run, whole / "run")
            except Exception as error:  # noqa: BLE001
                wrong.append(f"{name} ({type(error).__name__}: {error})")
    return wrong + unlike_cache(out / "cache", whole / "cache")


def _run_json(run: Path, whole: Path) -> None:
    said, wanted = read(run / "run.json"), read(whole / "run.json")
    if said["status"] == "finished":
        assert said == wanted, "another end"
    else:
        assert said["network"] == wanted["network"]


def _checkpoint(run: Path, whole: Path) -> None:
    assert torch.load(run / "checkpoint.pt", weights_only=True).keys() >= {"learner", "optimizer", "state", "best"}


def _log(run: Path, whole: Path) -> None:
    said = read(run / "log.csv")
    assert said == read(whole / "log.csv")[: len(said)], "another course"


GROWING = {"run/run.json": _run_json, "run/checkpoint.pt": _checkpoint, "run/log.csv": _log}


def unlike_cache(out: Path, whole: Path) -> list[str]:
    """Values that are marked as known and are not those of the whole, and files that are not as large."""
    wrong = []
    for known in out.rglob("known.npy"):
        home, wanted = known.parent, whole / known.parent.relative_to(out)
        marks = np.load(known)
        if not marks.any():
            continue
        said, right = (np.load(folder / "logits.npy") for folder in (home, wanted))
        if not np.array_equal(said[marks], right[marks]):
            wrong.append(f"{home.name}/logits.npy holds other values")
    return wrong


def unlike_pack(out: Path, whole: Path) -> list[str]:
    """As `unlike_cache`; pixels must be whole where their index is."""
    wrong = unlike_cache(out, whole)
    for index in out.rglob("index.json"):
        pixels = index.with_name("pixels.npy")
        if not same(pixels, whole / pixels.relative_to(out)) or not same(index, whole / index.relative_to(out)):
            wrong.append("pixels.npy under a whole index")
    return wrong


KINDS = {
    "training": Kind(images, train, unlike_run),
    "cache": Kind(images, fill, unlike_pack),
    "slide": Kind(slide, predict, unlike_files),
    "export": Kind(trained, export, unlike_files),
}


@dataclass
class Found:
    """What came of killing one kind."""

    kills: int = 0
    by_time: int = 0
    by_operation: int = 0
    starts: int = 0
    finished: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    operations: int = 0
    undisturbed_seconds: float = 0.0
    compared: list[str] = field(default_factory=list)
    half_written: list[str] = field(default_factory=list)
    failed_starts: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not (self.half_written or self.failed_starts or self.mismatches or self.left_over)


def soak(name: str, root: Path, *, kills: int, seed: int, say: Callable[[str], None] = lambda line: None) -> Found:
    """Kill one kind until it has been killed so many times and the last run has come to its end."""
    kind, draw, found = KINDS[name], random.Random(f"{name} {seed}"), Found()
    root.mkdir(parents=True)
    os.environ["HISTILL_CACHE"] = str(root / "histill-cache")
    start = time.monotonic()
    prepared = live(partial(kind.prepare, root), root / "preparing")
    whole = root / "whole"
    undisturbed = live(partial(kind.work, root, whole), whole)
    if prepared.status or undisturbed.status:
        raise RuntimeError(f"{name} does not work undisturbed: {prepared.said or undisturbed.said}")
    again = live(partial(kind.work, root, root / "again"), root / "again")  # now everything has been imported
    found.operations, found.undisturbed_seconds = again.operations, again.seconds
    found.compared = sorted({n if "_files/" not in n else n.split("_files/")[0] + "_files/" for n in files(whole)})
    found.mismatches += [f"undisturbed, twice: {n}" for n in differences(root / "again", whole)]
    out = root / "run0"
    while found.kills < kills or out.exists():
        timed, moment = _moment(draw, again) if found.kills < kills else (False, {})
        life = live(partial(kind.work, root, out), out, **moment)
        found.starts += 1
        at = f"{name}, seed {seed}, start {found.starts}, {moment}"
        if life.status == -signal.SIGKILL:
            found.kills += 1
            found.by_time += timed
            found.by_operation += not timed
            if out.exists():
                found.half_written += [f"{at}: {n}" for n in kind.unlike(out, whole)]
                for temporary in out.rglob(".*.tmp"):  # an hour passes
                    os.utime(temporary, (time.time() - 3600,) * 2)
            continue
        if life.status:
            found.failed_starts.append(f"{at}: {life.said.splitlines()[-1] if life.said else life.status}")
            say(f"{at} failed:\n{life.said}")
        else:
            found.mismatches += [f"{at}: {n}" for n in differences(out, whole)]
            found.left_over += [f"{at}: {n}" for n in left(out)]
        found.finished += 1
        say(f"{name}: {found.kills} kills, {found.finished} runs, sound: {found.sound}")
        if found.sound:
            shutil.rmtree(out)
        out = root / f"run{found.finished}"
    found.seconds = time.monotonic() - start
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    found.processor_seconds = spent.ru_utime + spent.ru_stime
    return found


def _moment(draw: random.Random, whole: Life) -> tuple[bool, dict[str, Any]]:
    """When to kill: after a time, or at an operation on files with this share of a file that would be renamed."""
    if draw.random() < 0.5:
        return True, {"seconds": draw.uniform(0.0, 1.05 * whole.seconds)}
    return False, {"fatal": draw.randint(1, whole.operations), "torn": draw.choice([None, 0.0, draw.random()])}


def differences(out: Path, whole: Path) -> list[str]:
    """Files that only one has, and files that are not the same but for times."""
    ours, wanted = files(out), files(whole)
    wrong = sorted(ours.keys() ^ wanted.keys())
    return wrong + [name for name in ours.keys() & wanted.keys() if read(ours[name]) != read(wanted[name])]


@contextmanager
def scratch(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            yield Path(folder)


def say_it(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def side_by_side(names: list[str], root: Path, *, kills: int, seed: int) -> dict[str, Found]:
    """Each kind in a process of its own, as they wait as much as they work."""
    children = {}
    for name in names:
        children[name] = os.fork()
        if not children[name]:
            try:
                found = soak(name, root / name, kills=kills, seed=seed, say=say_it)
                (root / f"{name}.json").write_text(json.dumps(asdict(found)))
                os._exit(0)
            except BaseException:  # noqa: BLE001 - whatever it is, the parent says which kind ended
                traceback.print_exc()
            finally:
                os._exit(1)
    ended = {name: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for name, child in children.items()}
    if any(ended.values()):
        raise SystemExit(f"no result of {', '.join(name for name, status in ended.items() if status)}: see above")
    return {name: Found(**json.loads((root / f"{name}.json").read_text())) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill Histill at random moments and compare what it leaves.")
    parser.add_argument("--kills", type=int, default=50, help="of each kind")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: a new one, which is printed)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--keep", type=Path, help="a folder for what the processes leave")
    chosen = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if chosen.seed is None else chosen.seed
    say_it(f"seed {seed}")
    os.environ["HISTILL_QUIET"] = "1"
    torch.set_num_threads(1)
    start = time.monotonic()
    if chosen.keep:
        chosen.keep.mkdir(parents=True)
    with scratch(chosen.keep) as root:
        found = side_by_side(chosen.kinds, root, kills=chosen.kills, seed=seed)
    summary = {
        "command": f"python tests/soak.py --kills {chosen.kills} --seed {seed}",
        "seed": seed,
        "seconds": time.monotonic() - start,
        "processor_seconds": sum(f.processor_seconds for f in found.values()),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "kills": sum(f.kills for f in found.values()),
        "but_for": "started and seconds in run.json, images_per_second in log.csv, timing and resumed in slide.json "
        "and summary.json",
        "kinds": {name: asdict(f) for name, f in found.items()},
    }
    text = json.dumps(summary, indent=2) + "\n"
    sys.stdout.write(text)
    if chosen.out:
        chosen.out.write_text(text)
    sys.exit(0 if all(f.sound for f in found.values()) else 1)


if __name__ == "__main__":
    main()
