"""Early exit, int8 and coarse-to-fine on slides, each alone and together: what each saves, what it costs in agreement.

    python benchmarks/slides_modes.py OUT [--repeats 2]

Phantom slides that the script makes: four to learn from, two to look at. A multi-exit network learns from their tiles
at 0.5 um/px, a ResNet-10 from wider ones at 1 um/px, which is what takes the wide look. Then `predict_slides` looks at
the two slides in every way, forwards and backwards, each in a folder of its own, after one slide that is not counted.
Agreement is with the whole network, tile by tile; Dice is with the truth. Results go to
benchmarks/results/slides_modes.json and .txt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import RESULTS, leave, processor, spread
from studies import HISTILL, call

from histill.slides import predict_slides
from histill.slides.coarse import compare_tiles

LEARN, LOOK = (11, 12, 13, 14), (3, 4)
TILES = ["--classes", "benign", "malignant", "--min-kb", "0", "--background"]
FINE = "--network multi-exit --method none --weights none --image-size 96 --epochs 4 --lr 0.01 --schedule cosine"
WIDE = "--network resnet10t --image-size 96 --epochs 4 --optimizer adamw --lr 1e-3 --schedule cosine --select accuracy"
CONFIDENT = 0.9
WHOLE = "whole network"


def prepared(out: Path) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """The ways, and the slides to look at."""
    for folder, seeds in (("learn", LEARN), ("look", LOOK)):
        for seed in seeds:
            if not (path := out / folder / f"s{seed}.tiff").exists():
                call(HISTILL, "data", "phantom", path, "--slide", "--seed", seed)
    for name, mpp, stride, recipe, flags in (
        ("fine", 0.5, 96, "multi-exit.student", FINE),
        ("wide", 1.0, 48, "rckd.finetune", WIDE),
    ):
        cut = ["--masks", out / "learn", *TILES, "", "--tile", 96, "--stride", stride, "--mpp", mpp]
        if not (out / name / "manifest.csv").exists():
            call(HISTILL, "tiles", out / "learn", *cut, "--out", out / name)
        if not (out / f"run-{name}" / "metrics.json").exists():
            given = ["--data", out / name / "manifest.csv", "--val", 0.25, "--test", 0, "--batch-size", 32]
            call(HISTILL, "train", recipe, *given, *flags.split(), "--out", out / f"run-{name}")
    run, wide = out / "run-fine", {"coarse_to_fine": CONFIDENT, "coarse_model": out / "run-wide"}
    if not (run / "exits").exists():
        call(HISTILL, "export", run, "--int8")
        call(HISTILL, "export", run, "--early-exit", 0.01)
    ways: dict[str, dict[str, Any]] = {
        WHOLE: {"model": run},
        "int8": {"model": run / "model.int8.onnx", "mpp": 0.5},
        "early exit": {"model": run / "exits", "mpp": 0.5},
        "coarse-to-fine": {"model": run, **wide},
        "coarse-to-fine, int8": {"model": run / "model.int8.onnx", "mpp": 0.5, **wide},
        "coarse-to-fine, early exit": {"model": run / "exits", "mpp": 0.5, **wide},
    }
    return ways, [out / "look" / f"s{seed}.tiff" for seed in LOOK]


def looked(way: dict[str, Any], slides: list[Path], folder: Path) -> dict[str, Any]:
    """Seconds, tiles, and the table of tiles."""
    shutil.rmtree(folder, ignore_errors=True)
    rest = {name: value for name, value in way.items() if name != "model"}
    start = time.perf_counter()
    said = predict_slides(way["model"], slides, folder, lesions=("malignant",), truth=slides[0].parent, **rest)
    seconds = time.perf_counter() - start
    table = pd.concat(pd.read_parquet(folder / slide.stem / "tiles.parquet") for slide in slides)
    dice = [json.loads((folder / slide.stem / "slide.json").read_text())["agreement"]["dice"] for slide in slides]
    infer = sum(one["timing"]["infer"]["busy_s"] for one in said["slides"].values())
    found = {"seconds": seconds, "infer_s": infer, "tiles": len(table), "dice": float(np.mean(dice))}
    for column in ("exit", "coarse"):
        if column in table:
            found[column] = table[column].value_counts(normalize=True).sort_index().to_dict()
    return found | {"table": table.reset_index(drop=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    ways, slides = prepared(arguments.out)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for way in ways.values():
        looked(way, slides[:1], arguments.out / "warm")
    for number in range(arguments.repeats):
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            rounds[name].append(looked(ways[name], slides, arguments.out / "looked" / name.replace(" ", "-")))
    found: dict[str, Any] = {
        "command": "python benchmarks/slides_modes.py OUT",
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "settings": {"fine": FINE, "wide": WIDE, "confident": CONFIDENT},
        "ways": {},
    }
    columns = f"{'':<28}{'tiles/s':>9}{'times as fast':>24}{'same class':>12}{'mean |dp|':>11}{'Dice':>7}  tiles"
    lines = [f"{rounds[WHOLE][0]['tiles']:,} tiles of {len(slides)} phantom slides", columns]
    for name, its in rounds.items():
        rate = spread([one["tiles"] / one["seconds"] for one in its])
        ratio = spread([a["seconds"] / b["seconds"] for a, b in zip(rounds[WHOLE], its)])
        same = compare_tiles(rounds[WHOLE][-1]["table"], its[-1]["table"])
        more = {key: its[-1][key] for key in ("exit", "coarse", "dice", "tiles") if key in its[-1]}
        found["ways"][name] = {"tiles_per_second": rate, "ratio": ratio, "agreement": same, **more}
        shares = "; ".join(
            f"{key} " + ", ".join(f"{value}: {100 * share:.0f} %" for value, share in more[key].items())
            for key in ("exit", "coarse")
            if key in more
        )
        times = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        lines.append(
            f"{name:<28}{rate['median']:>9.1f}{times:>24}{100 * same['agreement']:>11.1f}%"
            f"{same['mean_difference']:>11.3f}{more['dice']:>7.3f}  {shares}"
        )
    leave(RESULTS / "slides_modes.json", found, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
