"""A model over whole slides: one pool of readers and one model for all of them, and nothing done twice.

Readers fetch batches of tiles while the model looks at earlier ones; the next slide is opened, and its first tiles are
read, while the last ones of this slide are looked at. What the model said is kept in chunks, so that a killed process
goes on where it was and ends with the same bytes. A slide that cannot be read is named at the end; the others go on.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histill.data.images import few
from histill.deploy.predictor import Leaving, one_line
from histill.errors import BadInput, Failed, HistillError
from histill.files import locked, read_json, write_json
from histill.progress import Bar, notice, progress, say
from histill.record import versions
from histill.slides.coarse import parents
from histill.slides.engine import Model, load_model
from histill.slides.grid import Grid
from histill.slides.lesions import lesion_classes
from histill.slides.options import Options, beside, depends_on
from histill.slides.results import Found, write_results
from histill.slides.segment import open_segmenters
from histill.slides.slide import Slide, check_name, open_slide
from histill.slides.spread import spread_slides
from histill.slides.state import State, key_of
from histill.slides.summary import summary_lines, summary_of
from histill.slides.tissue import Tissue, find_tissue

__all__ = ["predict_one", "predict_slide", "predict_slides", "summary_lines"]

_CHUNK = 16  # batches
_COARSE, _FINE = "coarse", "fine"

Rows: TypeAlias = dict[str, NDArray[Any]]


def predict_slide(model: str | Path | Model, slide: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Predict one slide into ``out/<its stem>``; as `predict_slides`, but what goes wrong is raised as it is.

    Returns:
        What ``slide.json`` holds.
    """
    predict_slides(model, [slide], out, **options)
    return dict(read_json(Path(out) / Path(slide).stem / "slide.json"))


def predict_slides(
    model: str | Path | Model,
    slides: Sequence[str | Path],
    out: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    runtime: str = "auto",
    code: Path | None = None,
    ray: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predict slides, each into ``out/<its stem>``, and write ``out/summary.json``.

    Args:
        model: a run, an ``.onnx`` or TorchScript file, a folder of exit segments, or what `load_model` gave.
        slides: files.
        out: a folder.
        device: where a run computes.
        precision: as of `load_model`.
        runtime: as of `load_model`.
        code: the Python file of a network that is not Histill's.
        ray: a cluster that shares the slides among its workers (``auto`` or ``HOST:PORT``; `histill.cluster`).
        options: fields of `Options`.

    Returns:
        What ``summary.json`` holds: ``slides`` by stem, ``failed`` by stem with a line each, ``timing``.

    Raises:
        BadInput: arguments; of a single slide whatever is wrong with it.
        Failed: some slides of several failed; the line names them, the others are done.
    """
    try:
        asked = Options(**options)
    except TypeError as error:
        raise BadInput(f"histill slide: {error}") from None
    jobs = _jobs([Path(slide) for slide in slides], Path(out))
    how: dict[str, Any] = {"device": device, "precision": precision, "runtime": runtime, "code": code}
    loaded = model if isinstance(model, Model) else load_model(model, **how)
    wide = loaded if asked.coarse_model is None else load_model(asked.coarse_model, **how)
    work = _Work(loaded, wide, asked, jobs, device=device)
    start = time.monotonic()
    if ray is None:
        work.run()
    else:
        if isinstance(model, Model):
            raise BadInput("--ray: workers open the model themselves; give its path")
        paths = [job.path for job in jobs]
        for number, said in spread_slides(Path(model), paths, Path(out), asked, ray=ray, **how):
            if isinstance(said, HistillError):
                jobs[number].fail(said)
            else:
                jobs[number].said = said
    if len(jobs) == 1 and jobs[0].error is not None:
        raise jobs[0].error
    done = {job.path.stem: job.said for job in jobs if job.said is not None}
    wrong = {job.path.stem: one_line(job.error) for job in jobs if job.error is not None}
    summary = summary_of(done, wrong, loaded, time.monotonic() - start)
    write_json(Path(out) / "summary.json", summary)
    failed = [job for job in jobs if job.error is not None]
    if failed:
        for line in summary_lines(summary, out).splitlines():
            say(line)
        lines = [one_line(job.error) for job in failed if job.error is not None]
        others = "; the others are done" if len(failed) < len(jobs) else ""
        raise Failed(f"{len(failed)} of {len(jobs)} slides failed: {few(lines)}{others}")
    return summary


def predict_one(
    model: Model, wide: Model, options: Options, out: Path, slide: Path, *, device: str = "auto"
) -> dict[str, Any]:
    """One slide into ``out/<its stem>``, without a summary: what ``slide.json`` holds."""
    (job,) = _jobs([slide], out)
    _Work(model, wide, options, [job], device=device).run()
    if job.said is None:
        raise job.error or Failed(f"{slide}: given up")
    return job.said


@dataclass(eq=False)
class _Job:
    """One slide on its way."""

    path: Path
    folder: Path
    error: HistillError | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    slide: Slide | None = None
    tissue: Tissue | None = None
    grids: dict[str, Grid] = field(default_factory=dict)
    tiles: dict[str, pd.DataFrame] = field(default_factory=dict)
    wanted: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # rows of `tiles` that are looked at
    chunks: dict[str, dict[int, Rows]] = field(default_factory=dict)
    part: dict[str, dict[int, list[Rows]]] = field(default_factory=dict)  # batches of chunks that are not whole
    state: State | None = None
    bar: Bar | None = None
    bars: ExitStack = field(default_factory=ExitStack)
    timing: dict[str, dict[str, float]] = field(default_factory=dict)
    resumed: int = 0
    said: dict[str, Any] | None = None

    def spend(self, what: str, *, wall: float = 0.0, busy: float = 0.0) -> None:
        spent = self.timing.setdefault(what, {"wall_s": 0.0, "busy_s": 0.0})
        spent["wall_s"] += wall
        spent["busy_s"] += busy

    def fail(self, error: BaseException) -> None:
        """Give this slide up, and say why once."""
        if self.error is None:
            said = one_line(error) if isinstance(error, HistillError) else f"{type(error).__name__}: {one_line(error)}"
            line = said if self.path.stem in said else f"{self.path}: {said}"
            self.error = type(error)(line) if isinstance(error, HistillError) else Failed(line)
            notice(f"failed: {one_line(self.error)}")
        self.close()

    def close(self) -> None:
        self.bars.close()
        self.stack.close()


@dataclass(frozen=True)
class _Batch:
    """Tiles of one chunk that are read together."""

    job: _Job
    part: str
    chunk: int
    number: int
    rows: NDArray[np.int64]
    of: int  # how many batches the chunk has


@dataclass(frozen=True)
class _End:
    """All of a slide has been looked at."""

    job: _Job


_Step: TypeAlias = "_Batch | _End | None"


def _jobs(slides: Sequence[Path], out: Path) -> list[_Job]:
    if not slides:
        raise BadInput("no slide given")
    jobs = [_Job(path, out / path.stem) for path in slides]
    stems = [path.stem for path in slides]
    for number, stem in enumerate(stems):
        check_name(slides[number])
        if stem in stems[:number]:
            first = slides[stems.index(stem)]
            raise BadInput(
                f"{first} and {slides[number]} would both be written to {out / stem}; give two calls two --out"
            )
    return jobs


class _Work:
    """What one call does."""

    def __init__(self, model: Model, wide: Model, options: Options, jobs: list[_Job], *, device: str = "auto") -> None:
        self.model, self.wide, self.options, self.jobs = model, wide, options, jobs
        if wide.classes != model.classes:
            raise BadInput(f"{wide.name} has classes {', '.join(wide.classes)}, not those of {model.name}")
        self.tile = options.tile or model.predictor.image_size
        self.labels = lesion_classes(model.classes, given=options.lesions, positive=model.positive)
        mpp = options.mpp or model.mpp
        if mpp is None:
            raise BadInput(f"{model.name} does not say at which resolution it was trained; give it with --mpp")
        self.mpp = mpp
        self._try()
        self.segmenters = open_segmenters(options.segment, model.classes, tile=self.tile, device=device)

    def _try(self) -> None:
        """Look at one white tile: a model of another size, or one that is no classifier, is refused at once."""
        made_for = self.model.predictor.image_size
        trouble = f"{self.model.name} cannot look at tiles of {self.tile} pixels; it was made for --tile {made_for}"
        try:
            said = self.model.look(np.ones((1, 3, self.tile, self.tile), np.float32), features=self.options.features)
        except HistillError:
            raise
        except Exception as error:  # noqa: BLE001 - each runtime has errors of its own
            raise BadInput(f"{trouble} ({one_line(error)})") from None
        if said["probabilities"].shape != (1, len(self.model.classes)):
            raise BadInput(
                f"{self.model.name} outlines (a segmentation network); give a classifier, and this with --segment"
            )

    def run(self) -> None:
        threads = self.options.threads or min(8, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        try:
            for step, reading in _ahead(pool, self._steps(pool), self._read, threads + 2):
                if isinstance(step, _End):
                    self._end(step.job)
                elif reading is not None:
                    self._look(step, reading)
        finally:
            pool.shutdown(cancel_futures=True)
            for job in self.jobs:
                job.close()

    def _steps(self, pool: ThreadPoolExecutor) -> Iterator[_Step]:
        """What is to be read, slide after slide; None where what was read must first have been looked at."""
        opening = pool.submit(self._open, self.jobs[0])
        for number, job in enumerate(self.jobs):
            opening.result()
            if number + 1 < len(self.jobs):
                opening = pool.submit(self._open, self.jobs[number + 1])
            if job.error is None and job.said is None and _COARSE in job.tiles:
                yield from self._batches(job, _COARSE)
                yield None
                if job.error is None:
                    self._narrow(job)
            if job.error is None and job.said is None:
                yield from self._batches(job, _FINE)
            yield _End(job)

    def _open(self, job: _Job) -> None:
        """Everything before the first tile; what goes wrong is the slide's own trouble."""
        try:
            start = time.monotonic()
            slide = job.slide = job.stack.enter_context(open_slide(job.path, mpp=self.options.slide_mpp))
            grid = Grid(self.mpp, self.tile, self.options.overlap, self.options.min_tissue)
            grid.plan(slide)  # a slide without a resolution is refused before a folder is made
            job.stack.enter_context(locked(job.folder))
            settings = self._settings(job)
            key = key_of(slide.digest, self.model.digest, settings)
            made_by = {"device": self.model.device} | versions()
            job.state = State(job.folder, key, made_by=made_by, resume=self.options.resume)
            if job.state.finished:
                job.said = dict(read_json(job.folder / "slide.json"))
                return
            for remark in slide.remarks:
                notice(f"{job.path.name}: {remark}")
            job.tissue = find_tissue(slide, beside(self.options.mask, job.path, "mask"))
            job.grids[_FINE] = grid
            if self.options.coarse_to_fine is not None:
                # As wide as asked for, in as many pixels as the wide look's model takes.
                size = self.tile if self.wide is self.model else self.wide.predictor.image_size
                wide_mpp = self.mpp * self.options.coarse_factor * self.tile / size
                job.grids[_COARSE] = Grid(wide_mpp, size, 0, self.options.min_tissue)
            for part, its in job.grids.items():
                job.tiles[part] = its.tiles(slide, job.tissue)
                job.wanted[part] = np.arange(len(job.tiles[part]))
            spent = time.monotonic() - start
            job.spend("prepare", wall=spent, busy=spent)
        except Exception as error:  # noqa: BLE001 - one slide never stops the others
            job.fail(error)

    def _settings(self, job: _Job) -> dict[str, Any]:
        """What the files depend on."""
        return depends_on(self.options, job.path) | {
            "coarse_model": None if self.wide is self.model else self.wide.digest,
            "mpp": self.mpp,
            "tile": self.tile,
            "lesions": self.labels,
            "bf16": self.model.bf16,
            "runtime": self.model.runtime,
            "temperature": self.model.temperature,
        }

    def _batches(self, job: _Job, part: str) -> Iterator[_Batch]:
        rows, size = job.wanted[part], self.options.batch_size
        assert job.state is not None
        chunks = job.chunks[part] = {}
        for chunk, start in enumerate(range(0, len(rows), size * _CHUNK)):
            own = rows[start : start + size * _CHUNK]
            if (kept := job.state.load(part, chunk, len(own))) is not None:
                kept.pop("features", None)
                chunks[chunk] = kept
                job.resumed += len(own)
                continue
            pieces = [own[at : at + size] for at in range(0, len(own), size)]
            for number, piece in enumerate(pieces):
                if job.error is not None:
                    return
                yield _Batch(job, part, chunk, number, piece, len(pieces))

    def _read(self, batch: _Batch) -> tuple[NDArray[np.float32], float]:
        """``(B, 3, tile, tile)`` in [0, 1], and the seconds it took."""
        job, start = batch.job, time.monotonic()
        if job.error is not None or job.slide is None:
            raise Failed("given up")
        grid, places = job.grids[batch.part], job.tiles[batch.part]
        xs, ys = (places[name].to_numpy()[batch.rows] for name in ("x", "y"))
        images = np.empty((len(xs), 3, grid.tile, grid.tile), np.float32)
        for image, x, y in zip(images, xs, ys):
            np.multiply(grid.read(job.slide, int(x), int(y)).transpose(2, 0, 1), np.float32(1 / 255), out=image)
        return images, time.monotonic() - start

    def _look(self, batch: _Batch, reading: Future[tuple[NDArray[np.float32], float]]) -> None:
        job, start = batch.job, time.monotonic()
        if job.error is not None:
            return
        try:
            images, busy = reading.result()
            waited = time.monotonic()
            model = self.wide if batch.part == _COARSE else self.model
            said = model.look(images, features=self.options.features and batch.part == _FINE)
            looked = time.monotonic()
            job.spend("read", wall=waited - start, busy=busy)
            job.spend("infer", wall=looked - waited, busy=looked - waited)
            bar = self._bar(batch)
            self._keep(batch, said)
            bar.advance(len(batch.rows))
        except Exception as error:  # noqa: BLE001 - one slide never stops the others
            job.fail(error)

    def _bar(self, batch: _Batch) -> Bar:
        job, part = batch.job, batch.part
        name = f"{job.path.name} (wide)" if part == _COARSE else job.path.name
        if job.bar is None or job.bar.what != name:
            job.bars.close()
            done = sum(len(rows["probabilities"]) for rows in job.chunks[part].values())
            job.bar = job.bars.enter_context(progress(name, len(job.wanted[part]), "tiles", done=done))
        return job.bar

    def _keep(self, batch: _Batch, said: Rows) -> None:
        job = batch.job
        pieces = job.part.setdefault(batch.part, {}).setdefault(batch.chunk, [])
        pieces.append(said)
        if len(pieces) == batch.of:
            rows = {name: np.concatenate([piece[name] for piece in pieces]) for name in said}
            assert job.state is not None
            job.state.save(batch.part, batch.chunk, rows)
            rows.pop("features", None)  # they are many, and wait on the disk
            job.chunks[batch.part][batch.chunk] = rows
            del job.part[batch.part][batch.chunk]

    def _narrow(self, job: _Job) -> None:
        """Leave to the closer look what the wide one was not sure of."""
        parents = self._parents(job)
        wide = _joined(job.chunks[_COARSE], len(self.model.classes))
        sure = wide["probabilities"].max(1, initial=0) >= (self.options.coarse_to_fine or 0)
        settled = (parents >= 0) & np.append(sure, False)[parents]
        job.wanted[_FINE] = np.flatnonzero(~settled)

    def _parents(self, job: _Job) -> NDArray[np.int64]:
        assert job.slide is not None
        step = job.grids[_COARSE].plan(job.slide).l0_step
        return parents(job.tiles[_FINE], job.tiles[_COARSE], step=step, start=job.slide.bounds[:2])

    def _end(self, job: _Job) -> None:
        """Write the slide's files."""
        try:
            if job.error is not None:
                return
            if job.said is not None:
                notice(f"{job.path.name} is done already, in {job.folder}")
                return
            found = self._found(job)
            job.said = write_results(found, job.timing)
            assert job.state is not None
            job.state.done()
        except Exception as error:  # noqa: BLE001 - one slide never stops the others
            job.fail(error)
        finally:
            job.close()
            for held in (job.tiles, job.chunks, job.wanted, job.part):
                held.clear()

    def _features(self, job: _Job) -> Iterator[NDArray[np.float32]]:
        """The features of all tiles that were looked at, chunk by chunk."""
        assert job.state is not None
        for chunk, rows in sorted(job.chunks[_FINE].items()):
            kept = job.state.load(_FINE, chunk, len(rows["probabilities"]))
            if kept is None:
                raise Failed(f"{job.folder}: features were removed while they were needed; start again")
            yield kept["features"]

    def _found(self, job: _Job) -> Found:
        assert job.slide is not None
        assert job.tissue is not None
        assert job.state is not None
        tiles, classes = job.tiles[_FINE], self.model.classes
        rows = _joined(job.chunks[_FINE], len(classes))
        probabilities = np.zeros((len(tiles), len(classes)), np.float32)
        probabilities[job.wanted[_FINE]] = rows["probabilities"]
        table = tiles.copy()
        table.insert(0, "slide", job.path.stem)
        extra = {}
        if _COARSE in job.tiles:
            rest = np.ones(len(tiles), np.bool_)
            rest[job.wanted[_FINE]] = False
            wide = _joined(job.chunks[_COARSE], len(classes))["probabilities"]
            probabilities[rest] = wide[self._parents(job)[rest]]
            extra["coarse"] = rest
        for number, name in enumerate(classes):
            table[f"prob_{name}"] = probabilities[:, number]
        if "exits" in rows or (isinstance(self.model.predictor, Leaving) and not job.chunks[_FINE]):
            extra["exit"] = np.zeros(len(tiles), np.uint8)  # 0: the wide look was sure
            extra["exit"][job.wanted[_FINE]] = rows.get("exits", 0)
        for name, values in extra.items():
            table[name] = values
        plan = job.grids[_FINE].plan(job.slide)
        return Found(
            slide=job.slide,
            folder=job.folder,
            tissue=job.tissue,
            grid=job.grids[_FINE],
            tiles=table,
            features=self._features(job) if self.options.features else None,
            wanted=job.wanted[_FINE],
            stride=plan.l0_step,
            model=self.model,
            labels=self.labels,
            segmenters=self.segmenters,
            options=self.options,
            truth=beside(self.options.truth, job.path, "truth"),
            key=job.state.key,
            resumed=job.resumed,
            looked={part: len(rows) for part, rows in job.wanted.items()},
        )


def _ahead(
    pool: ThreadPoolExecutor, steps: Iterator[_Step], read: Any, most: int
) -> Iterator[tuple[_Batch | _End, Future[tuple[NDArray[np.float32], float]] | None]]:
    """The steps in order, each batch with its reading under way; at most ``most`` are read ahead."""
    waiting: deque[tuple[_Batch | _End, Future[tuple[NDArray[np.float32], float]] | None]] = deque()
    for step in steps:
        if step is None:
            while waiting:
                yield waiting.popleft()
            continue
        waiting.append((step, pool.submit(read, step) if isinstance(step, _Batch) else None))
        while len(waiting) > most:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _joined(chunks: Mapping[int, Rows], classes: int) -> Rows:
    """The rows of all chunks."""
    if not chunks:
        return {"probabilities": np.zeros((0, classes), np.float32)}
    return {name: np.concatenate([chunks[n][name] for n in sorted(chunks)]) for name in chunks[min(chunks)]}
