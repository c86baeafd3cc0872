"""How fast a slide is read, here and by OpenSlide: ``histill bench read SLIDE``."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from histill.errors import BadInput, require
from histill.files import write_json
from histill.progress import progress
from histill.slides.slide import Slide, open_slide
from histill.slides.sources import over_white
from histill.slides.tiles import Pixels

__all__ = ["bench_command", "bench_read", "table_of"]

ALIGNED, GRID = 64, 256  # tiles in a round
MODEL_PX = 224  # of the tiles that a model takes
MOST = 1 << 14  # tiles, taken again from the first when they are used up
OPENSLIDE_CACHE = 32 << 20  # bytes, what OpenSlide comes with

Reader = Callable[[int, int], Pixels]


def bench_read(path: str | Path, *, seconds: float = 5.0, seed: int = 0) -> dict[str, Any]:
    """Tiles per second of level 0, one thread, ours and OpenSlide's in turns within one run.

    Rounds of tiles alternate between the two until each had ``seconds`` (five rounds at least), after a round apart to
    warm up. ``aligned`` are the file's own tiles in random order, each decoded anew: neither side has a cache. ``grid``
    is a pass over the slide in squares of `MODEL_PX` side by side, row by row, as a model takes them. OpenSlide has
    room for as many tiles as we have (its pixels have four bytes), and both are emptied when the pass begins again.
    Beside the clock's seconds stand the processor's, which other programs on the machine do not lengthen.

    Returns:
        ``slide``, ``machine``, and for each of the two kinds ``tile``, ``identical`` (whether every pixel agreed),
        and under ``histill``, ``openslide`` and ``ratio`` of both seconds ``{"median", "low", "high"}`` over rounds.

    Raises:
        BadInput: OpenSlide cannot read the slide, so that there is nothing to compare.
    """
    openslide = require("openslide", "slides")
    with open_slide(path) as slide:
        try:
            other = openslide.OpenSlide(str(slide.path))
        except openslide.OpenSlideError as error:
            raise BadInput(f"{path}: OpenSlide does not read it, so there is nothing to compare ({error})") from None
        rng = np.random.default_rng(seed)
        own = tuple(int(other.properties.get(f"openslide.level[0].tile-{side}", 256)) for side in ("width", "height"))
        room = max(OPENSLIDE_CACHE, slide.cache_bytes * 4 // 3)
        tile = (min(own[0], 1024), min(own[1], 1024))
        found = {}
        with progress("reading", 2, "comparisons") as bar:
            for kind, size, cache, count in (
                ("aligned", tile, 0, ALIGNED),
                ("grid", (MODEL_PX, MODEL_PX), room, GRID),
            ):

                def fresh(cache: int = cache) -> None:
                    slide.forget()
                    other.set_cache(openslide.OpenSlideCache(cache))

                places = _places(slide, size, rng, shuffled=kind == "aligned")
                found[kind] = _compare(slide, other, places, size, seconds, fresh, count)
                bar.advance()
        other.close()
        return {
            "slide": {
                "name": slide.path.name,
                "dimensions": list(slide.dimensions),
                "levels": len(slide.level_dimensions),
                "bytes": slide.path.stat().st_size,
                "reader": slide.reader,
                "why": slide.why,
            },
            "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": 1},
            "versions": {
                "openslide": openslide.__library_version__,
                **{name: version(name) for name in ("openslide-python", "imagecodecs", "numpy", "pillow")},
            },
            **found,
        }


def bench_command(slides: Sequence[Path], *, out: Path | None, seconds: float) -> str:
    """``histill bench read``: the table; the figures as JSON in ``out/summary.json``."""
    if len(slides) != 1:
        raise BadInput(f"bench read takes one slide, {len(slides)} were given: histill bench read SLIDE")
    found = bench_read(slides[0], seconds=seconds)
    if out is not None:
        write_json(out / "summary.json", found)
    return table_of(found)


def _places(slide: Slide, size: tuple[int, int], rng: np.random.Generator, *, shuffled: bool) -> list[tuple[int, int]]:
    """Where tiles lie side by side within the slide, from its middle on: there is more often tissue than glass."""
    across, down = (max(1, side // tile) for side, tile in zip(slide.dimensions, size))
    first = across * (down // 3)
    numbers = (np.arange(min(across * down, MOST)) + first) % (across * down)
    if shuffled:
        rng.shuffle(numbers)
    return [(int(n % across) * size[0], int(n // across) * size[1]) for n in numbers]


def _compare(
    slide: Slide,
    other: Any,
    places: Sequence[tuple[int, int]],
    size: tuple[int, int],
    seconds: float,
    fresh: Callable[[], None],
    count: int,
) -> dict[str, Any]:
    """``fresh`` empties the caches whenever the ``places`` begin again; a round is ``count`` of them."""
    count = min(count, len(places))
    passes = len(places) // count  # rounds until they begin again

    def ours(x: int, y: int) -> Pixels:
        return slide.read(x, y, *size)

    def theirs(x: int, y: int) -> Pixels:
        return over_white(other.read_region((x, y), 0, size))

    def usual(x: int, y: int) -> Any:  # what one writes with OpenSlide, without our work of laying it over white
        return np.asarray(other.read_region((x, y), 0, size).convert("RGB"))

    identical = all(np.array_equal(ours(*place), theirs(*place)) for place in places[:ALIGNED])
    readers: dict[str, Callable[[int, int], Any]] = {"histill": ours, "openslide": usual}
    wall: dict[str, list[float]] = {name: [] for name in readers}
    cpu: dict[str, list[float]] = {name: [] for name in readers}
    spent, number = 0.0, 0
    while spent < 2 * seconds or number < 6:
        first = number % passes * count
        batch = places[first : first + count]
        if first == 0:
            fresh()
        for name in sorted(readers, reverse=number % 2 == 1):
            began, began_cpu = time.perf_counter(), time.process_time()
            for place in batch:
                readers[name](*place)
            took, took_cpu = time.perf_counter() - began, time.process_time() - began_cpu
            if number:  # the first round warms up
                wall[name].append(count / took)
                cpu[name].append(count / took_cpu)
                spent += took
        number += 1
    return {
        "tile": list(size),
        "identical": bool(identical),
        "rounds": number - 1,
        "tiles_per_second": _summary(wall),
        "tiles_per_processor_second": _summary(cpu),
    }


def _summary(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    ratio = [a / b for a, b in zip(rates["histill"], rates["openslide"])]
    return {
        name: {"median": float(np.median(v)), "low": float(min(v)), "high": float(max(v))}
        for name, v in (*rates.items(), ("ratio", ratio))
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table_of(found: dict[str, Any]) -> str:
    """The figures of `bench_read` as a few lines."""
    slide = found["slide"]
    lines = [
        f"{slide['name']}: {slide['dimensions'][0]} x {slide['dimensions'][1]}, read by {slide['reader']}"
        + (f" ({slide['why']})" if slide["why"] else ""),
        f"{'tiles/s, one thread':<22}{'histill':>10}{'openslide':>11}{'ratio':>8}  (range of the ratio)",
    ]
    for kind in ("aligned", "grid"):
        for unit, words in (("tiles_per_second", ""), ("tiles_per_processor_second", " cpu")):
            rates = found[kind][unit]
            ours, theirs, ratio = (rates[name] for name in ("histill", "openslide", "ratio"))
            lines.append(
                f"{kind + ' ' + str(found[kind]['tile'][0]) + ' px' + words:<22}"
                f"{ours['median']:>10,.0f}{theirs['median']:>11,.0f}{ratio['median']:>8.1f}"
                f"  ({ratio['low']:.1f} to {ratio['high']:.1f})"
            )
        lines.append(f"{kind}: {'the same pixels' if found[kind]['identical'] else 'PIXELS DIFFER'}")
    return "\n".join(lines)
