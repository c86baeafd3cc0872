"""How often a 95 % interval holds the truth, on simulated patients whose truth is known.

    python benchmarks/interval_coverage.py [--repeats 500] [--only WHAT]

Every repeat draws patients of several images each (2 to 8; the latent scores of one patient's images are correlated by
a half), asks Histill for its intervals, and looks whether they hold the figure that 60,000 patients give.
"percentile" is the usual bootstrap interval of the same draws: the 2.5th and 97.5th percentiles, seeds drawn too.
Results go to benchmarks/results/coverage.{json,txt,png} and docs/images/coverage.png; about 10 minutes of one core. It
goes on where it stopped: remove the JSON file for another run. 500 repeats tell coverage to 2 points (two standard
errors). --only does one part and prints it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax
from scipy.stats import norm

from histill.evaluate.intervals import Judged, _difference, _figure, _sampled, _units
from histill.evaluate.masks import MaskScores
from histill.evaluate.metrics import METRICS, Scores
from histill.files import write_json

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs/images/coverage.png"
LABELS = tuple(name for name in METRICS if name != "agreement")
MASKS = ("miou", "mdice", "pixel_accuracy", "object_f1", "panoptic_quality")
PATIENTS = (20, 50, 200)
RESAMPLES = 400
BAND = (93.0, 97.0)

Networks = list[Judged]
World = Callable[[np.random.Generator, int], tuple[Networks, Networks]]
"""Patients -> what the seeds of one network, and of another, said of the same images."""


def world(
    rng: np.random.Generator,
    patients: int,
    *,
    classes: int = 2,
    skill: float = 1.0,
    gain: float = 0.2,
    images: tuple[int, int] = (2, 8),
    seeds: int = 1,
    spread: float = 0.0,
    quantile: float | None = None,
) -> tuple[Networks, Networks]:
    """Two networks whose scores share what the image shows; a seed's skill varies by ``spread``."""
    prevalence = np.array([0.6, 0.4] if classes == 2 else [0.5, 0.3, 0.2])
    while True:
        own = rng.choice(classes, p=prevalence, size=patients)
        if np.bincount(own, minlength=classes).min() >= 2:
            break
    units = np.repeat(np.arange(patients), rng.integers(images[0], images[1] + 1, size=patients))
    labels, size = own[units], (1 if classes == 2 else classes,)

    def correlated(scale: float) -> NDArray[np.float64]:
        alone = rng.normal(size=(len(units), *size))
        return scale * np.sqrt(0.5) * (rng.normal(size=(patients, *size))[units] + alone)

    shown = correlated(np.sqrt(0.8))
    signs = (2 * labels - 1)[:, None] if classes == 2 else 1.8 * np.eye(classes)[labels]

    def network(skill: float) -> Scores:
        z = skill * signs + shown + correlated(np.sqrt(0.2))
        p = expit(3 * z) if classes == 2 else softmax(2 * z, axis=1)
        positive = 1 if classes == 2 else None
        return Scores(labels, np.concatenate([1 - p, p], axis=1) if classes == 2 else p, units, positive=positive)

    def trained(skill: float) -> Networks:
        steps = rng.normal(size=seeds) if quantile is None else np.full(seeds, quantile)
        return [network(skill + spread * step) for step in steps]

    return trained(skill), trained(skill + gain)


def masks(rng: np.random.Generator, patients: int) -> tuple[Networks, Networks]:
    """Pixels and nuclei found, made up and missed; the second network finds more."""
    units = np.repeat(np.arange(patients), rng.integers(2, 9, size=patients))
    n = len(units)
    hard = 0.6 * (rng.normal(size=patients)[units] + rng.normal(size=n))
    area = 1e4 * expit(rng.normal(size=patients)[units] + 0.5 * rng.normal(size=n) - 1)
    nuclei = rng.poisson(10 * np.exp(0.4 * rng.normal(size=patients))[units])

    def network(gain: float) -> MaskScores:
        found = expit(1.5 + gain + hard + 0.3 * rng.normal(size=n))
        tp, fp = area * found, area * 0.5 * (1 - found)
        counts = np.stack([np.stack([1e4 - area - fp, area - tp, fp], 1), np.stack([tp, fp, area - tp], 1)], axis=1)
        hit, extra = rng.binomial(nuclei, found), rng.poisson(3 * (1 - found))
        objects = np.stack([hit, extra, nuclei - hit, hit * (0.7 + 0.05 * hard.clip(-2, 2))], axis=1)
        return MaskScores(counts, units, ("stroma", "tumour"), objects.astype(float))

    return [network(0.0)], [network(0.2)]


PARTS: dict[str, tuple[World, Sequence[str], tuple[int, ...]]] = {
    "two classes, 84 % right": (world, LABELS, PATIENTS),
    "two classes, 98 % right": (partial(world, skill=2.0), LABELS, PATIENTS),
    "three classes": (partial(world, classes=3), LABELS, PATIENTS),
    "one image each": (partial(world, images=(1, 1)), LABELS, PATIENTS),
    "masks": (masks, MASKS, PATIENTS),
    "three seeds that differ little": (partial(world, seeds=3, spread=0.1), LABELS, (20, 50)),
    "three seeds that differ much": (partial(world, seeds=3, spread=0.3), LABELS, (20, 50)),
}


def truths(make: World, names: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Each metric of both networks on patients without number, the mean over seeds without number."""
    options = make.keywords if isinstance(make, partial) else {}
    steps = norm.ppf((np.arange(24) + 0.5) / 24) if options.get("spread") else [None]
    found: list[list[dict[str, float]]] = [[], []]
    for step in steps:
        extra = {} if step is None else {"quantile": float(step), "seeds": 1}
        pair = make(np.random.default_rng(1), 60_000 if step is None else 10_000, **extra)
        for values, networks in zip(found, pair):
            values.append({name: float(v[0]) for name, v in networks[0].figures(names=names).items()})
    a, b = ({name: float(np.mean([v[name] for v in values])) for name in names} for values in found)
    return a, b


def covered(make: World, names: Sequence[str], patients: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A row per metric for figures, then for differences."""
    first, second = truths(make, names)
    rng = np.random.default_rng([patients, repeats])
    held: dict[tuple[str, str], list[tuple[bool, bool, float, float]]] = {}
    for repeat in range(repeats):
        a, b = make(rng, patients)
        values, samples = _sampled([*a, *b], RESAMPLES, repeat, names)
        picks = np.random.default_rng(repeat).integers(len(a), size=(len(a), RESAMPLES))
        for name in names:
            (va, vb), (sa, sb) = np.split(values[name], 2), np.split(samples[name], 2)
            units = _units([*a, *b], name)
            pairs = {
                "figure": (first[name], sa, _figure(name, va, sa, units)),
                "difference": (second[name] - first[name], sb - sa, _difference(name, (va, sa), (vb, sb), units)),
            }
            for what, (truth, sample, figure) in pairs.items():
                if figure["low"] is None:
                    continue
                drawn = np.take_along_axis(sample, picks, axis=0).mean(axis=0)
                low, high = np.nanquantile(drawn, [0.025, 0.975])
                ours = figure["low"] <= truth <= figure["high"]
                held.setdefault((what, name), []).append(
                    (ours, bool(low <= truth <= high), figure["high"] - figure["low"], high - low)
                )
    for (what, name), rows in held.items():
        ours, percentile, width, usual = np.array(rows, dtype=float).mean(axis=0)
        yield {
            "what": what,
            "metric": name,
            "patients": patients,
            "repeats": len(rows),
            "truth": first[name] if what == "figure" else second[name] - first[name],
            "coverage": 100 * ours,
            "percentile": 100 * percentile,
            "width": width,
            "percentile_width": usual,
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Coverage in %, that of percentiles in brackets, a column for each number of patients."""
    lines = []
    for part in dict.fromkeys(r["part"] for r in rows):
        for what in ("figure", "difference"):
            here = [r for r in rows if r["part"] == part and r["what"] == what]
            counts = sorted({r["patients"] for r in here})
            lines.append(f"{part}: {what}s, {here[0]['repeats']} repeats")
            lines.append(f"  {'':18}{'truth':>8}" + "".join(f"{f'{n} patients':>16}" for n in counts))
            for name in dict.fromkeys(r["metric"] for r in here):
                each = {r["patients"]: r for r in here if r["metric"] == name}
                cells = [
                    f"{each[n]['coverage']:.1f} ({each[n]['percentile']:.1f})" if n in each else "-" for n in counts
                ]
                truth = next(iter(each.values()))["truth"]
                lines.append(f"  {name.replace('_', ' '):18}{truth:8.3f}" + "".join(f"{c:>16}" for c in cells))
            lines.append("")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A point per metric: ours filled, percentiles hollow; a panel per part and number of patients' colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parts = list(dict.fromkeys(r["part"] for r in rows))
    figure, panels = plt.subplots(len(parts), 2, figsize=(11, 1.9 * len(parts)), sharex=True, layout="constrained")
    colours = {20: "#c1440e", 50: "#2a6f97", 200: "#2d3142"}
    for axes, part in zip(panels, parts, strict=True):
        for ax, what in zip(axes, ("figure", "difference"), strict=True):
            here = [r for r in rows if r["part"] == part and r["what"] == what]
            names = list(dict.fromkeys(r["metric"] for r in here))
            ax.axvspan(*BAND, color="#dfe9df", zorder=0)
            ax.axvline(95, color="#7a9a7a", linewidth=0.8, zorder=1)
            for r in here:
                y = names.index(r["metric"]) + {20: -0.22, 50: 0.0, 200: 0.22}[r["patients"]]
                colour = colours[r["patients"]]
                ax.plot(max(r["percentile"], 60), y, "o", mfc="none", mec=colour, ms=4, alpha=0.6)
                ax.plot(max(r["coverage"], 60), y, "o", color=colour, ms=4.5)
            ax.set_yticks(range(len(names)), [n.replace("_", " ") for n in names], fontsize=7)
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.set_xlim(59, 101)
            ax.set_title(f"{part}: {what}s", fontsize=8.5, loc="left")
            ax.spines[["top", "right"]].set_visible(False)
    for ax in panels[-1]:
        ax.set_xlabel("of 100 intervals hold the truth (60: 60 or fewer)", fontsize=8)
    marks = [plt.Line2D([], [], marker="o", ls="", color=c, label=f"{n} patients") for n, c in colours.items()]
    marks.append(plt.Line2D([], [], marker="o", ls="", mfc="none", color="grey", label="percentiles"))
    figure.legend(handles=marks, loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--only", help="a part's name begins so")
    chosen = parser.parse_args()
    done = RESULTS / "coverage.json"
    rows: list[dict[str, Any]] = json.loads(done.read_text()) if done.exists() and not chosen.only else []
    start = time.monotonic()
    for patients in PATIENTS:
        for part, (make, names, counts) in PARTS.items():
            if patients not in counts or not part.startswith(chosen.only or ""):
                continue
            if any((r["part"], r["patients"]) == (part, patients) for r in rows):
                continue
            rows += [{"part": part, **row} for row in covered(make, names, patients, chosen.repeats)]
            print(f"{part}, {patients} patients: {time.monotonic() - start:.0f} s", flush=True)
            if not chosen.only:
                write_json(done, rows)
    rows.sort(key=lambda r: (list(PARTS).index(r["part"]), r["what"] != "figure"))
    print(table(rows))
    if not chosen.only:
        write_json(done, rows)
        (RESULTS / "coverage.txt").write_text(table(rows))
        for path in (RESULTS / "coverage.png", PICTURE):
            draw(rows, path)


if __name__ == "__main__":
    main()
