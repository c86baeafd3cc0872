"""Figures: one function each, which writes one PNG and returns nothing.

One style: legible at half a page's width, Okabe and Ito's colours (told apart by the colour-blind), the
same colour for the same network in every figure, and no ink that carries no information. Matplotlib is
imported when the first figure is drawn; its global state is left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from histill.evaluate.intervals import Figure as Interval
from histill.evaluate.metrics import Array, Reliability
from histill.files import atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "attention",
    "confusion",
    "confusions",
    "curves",
    "early_exit",
    "gain",
    "gallery",
    "reliability",
    "roc",
    "softened",
    "sweep",
    "training",
]

INK, MUTED, RULE = "#1f2933", "#66717d", "#d5dae0"
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#aa4499", "#56b4e9"
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, INK)
NETWORKS = {"teacher": MUTED, "student alone": VERMILION, "distilled student": BLUE}

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
}


def confusion(matrix: NDArray[Any], classes: Sequence[str], path: Path, *, title: str = "") -> None:
    """A confusion matrix: counts, coloured by the share of the true class (the row)."""
    confusions({title: matrix}, classes, path)


def confusions(matrices: Mapping[str, NDArray[Any]], classes: Sequence[str], path: Path) -> None:
    """Confusion matrices side by side, by title: teacher, student alone, distilled student."""
    n = len(classes)
    side = float(np.clip(0.62 * n, 2.1, 6.5))
    slanted = 0.6 if n > 2 else 0.0  # inches that class names at an angle take
    with drawing(path, (side + 0.55) * len(matrices) + 1.1, side + 1.25 + slanted) as figure:
        axes = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
        for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
            counts = np.asarray(matrix)
            share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            ax.imshow(share, cmap="Blues", vmin=0, vmax=1.15)
            for row, column in np.ndindex(n, n) if n <= 12 else ():
                colour = "white" if share[row, column] > 0.55 else INK if counts[row, column] else MUTED
                ax.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour)
            right = np.trace(counts) / max(counts.sum(), 1)
            ax.set_title(f"{title}\n" if title else "")
            ax.text(0, 1.03, f"{100 * right:.1f} % right", transform=ax.transAxes, color=MUTED)
            ax.set_xticks(range(n), classes, rotation=35 if n > 2 else 0, ha="right" if n > 2 else "center")
            ax.set_yticks(range(n), classes)
            if n > 30:
                ax.set_xticks([])
                ax.set_yticks([])
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
            ax.set_xlabel("predicted")
        axes[0].set_ylabel("true")


def roc(curves: Mapping[str, tuple[Array, Array, Interval]], path: Path) -> None:
    """ROC curves by name, each ``(false positive rate, true positive rate, auroc with its interval)``."""
    with drawing(path, 4.4, 4.4) as figure:
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], color=RULE, linewidth=1, zorder=1)
        for number, (name, (false, true, auroc)) in enumerate(curves.items()):
            label = f"{name}  {_span(auroc)}"
            ax.plot(false, true, color=_colour(name, number), label=label, clip_on=False)
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.set(xlabel="false positive rate (1 − specificity)", ylabel="true positive rate (sensitivity)")
        ax.grid(True)
        # On white: the curve of a network that is worse than chance runs where the legend is.
        ax.legend(
            loc="lower right",
            title="AUROC (95 % interval)",
            alignment="left",
            frameon=True,
            framealpha=0.85,
            edgecolor="none",
        )


def reliability(diagrams: Mapping[str, Reliability], path: Path) -> None:
    """Reliability diagrams side by side, by title: before and after the temperature, or by network."""
    with drawing(path, 3.1 * len(diagrams) + 0.5, 4.0) as figure:
        grid = figure.subplots(2, len(diagrams), squeeze=False, sharex=True, sharey="row", height_ratios=[4, 1])
        for (top, bottom), (title, bins) in zip(grid.T, diagrams.items(), strict=True):
            edges = np.linspace(0, 1, len(bins.count) + 1)
            middle, width = (edges[1:] + edges[:-1]) / 2, 0.9 / len(bins.count)
            top.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            top.bar(middle, np.nan_to_num(bins.accuracy), width, color=BLUE, alpha=0.85)
            top.hlines(bins.confidence, middle - width / 2, middle + width / 2, color=VERMILION)
            top.set(ylim=(0, 1), xlim=(0, 1), title=title)
            top.text(0.04, 0.93, f"ECE {100 * bins.ece:.1f} %", transform=top.transAxes, va="top")
            top.grid(True, axis="y")
            bottom.bar(middle, bins.count / bins.count.sum(), width, color=MUTED)
            bottom.set_xlabel("confidence")
        grid[0, 0].set_ylabel("accuracy (bars), confidence (lines)")
        grid[1, 0].set_ylabel("share")


def training(log: pd.DataFrame, path: Path) -> None:
    """Training curves from a run's log: weighted loss terms, validation figures, learning rate."""
    terms = [c.removeprefix("raw/") for c in log.columns if c.startswith("raw/")]
    shares = [c for c in log.columns if c.startswith("val/") and c != "val/loss"]
    epochs = log["epoch"]
    panels = 3 if shares else 2
    with drawing(path, 3.3 * panels, 2.9) as figure:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        loss = axes[0]
        if len(terms) > 1:
            for number, term in enumerate(terms):
                weighted = log[f"raw/{term}"] * log[f"weight/{term}"]
                loss.plot(epochs, weighted, color=CYCLE[number % 6], label=term.replace("_", " "))
        loss.plot(epochs, log["loss"], color=INK, label="total" if len(terms) > 1 else "training")
        if "val/loss" in log:
            loss.plot(epochs, log["val/loss"], color=INK, linestyle=(0, (4, 3)), label="validation")
        loss.set_title("Loss, weighted" if len(terms) > 1 else "Loss")
        loss.legend()
        for number, name in enumerate(shares):
            label = name.removeprefix("val/").replace("_", " ").replace("auroc", "AUROC")
            axes[1].plot(epochs, log[name], color=CYCLE[number % 6], label=label)
        if shares:
            axes[1].set_title("Validation")
            axes[1].legend()
        axes[-1].plot(epochs, log["lr"], color=MUTED)
        axes[-1].set_title("Learning rate")
        axes[-1].set_ylim(bottom=0)
        for ax in axes:
            ax.set_xlabel("epoch")
            ax.grid(True, axis="y")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.margins(x=0.02)
            for line in ax.lines if len(log) == 1 else ():
                line.set_marker("o")


def gain(figures: Mapping[str, Any], path: Path, *, title: str = "Distilled minus alone") -> None:
    """Paired differences with their intervals about a zero line, in percentage points (see `paired_gain`).

    A difference whose interval leaves out zero is filled, the others are hollow. Calibration error is shown
    like the rest although less of it is better: its label says so.
    """
    shown = [name for name, f in figures.items() if isinstance(f, Mapping) and f.get("low") is not None]
    with drawing(path, 5.6, 0.34 * len(shown) + 1.15) as figure:
        ax = figure.subplots()
        ax.axvline(0, color=INK, linewidth=1)
        for row, name in enumerate(shown):
            value, low, high = (100 * figures[name][key] for key in ("value", "low", "high"))
            sure = low > 0 or high < 0
            good = (value < 0) if name == "ece" else (value > 0)
            colour = MUTED if not sure else BLUE if good else VERMILION
            ax.plot([low, high], [row, row], color=colour, solid_capstyle="butt")
            face = colour if sure else "white"
            ax.plot(value, row, "o", color=colour, markerfacecolor=face, markersize=6.5)
            ax.annotate(
                f"{_signed(value)}  ({_signed(low)} to {_signed(high)})",
                (1.02, row),
                xycoords=("axes fraction", "data"),
                va="center",
                color=INK if sure else MUTED,
            )
        names = {"ece": "calibration error (less is better)", "auroc": "AUROC × 100"}
        ax.set_yticks(range(len(shown)), [names.get(n, _words(n)) for n in shown])
        ax.set_ylim(len(shown) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(True, axis="x")
        ax.set_xlabel("percentage points, with 95 % interval")
        ax.set_title(title)


def gallery(
    images: NDArray[Any],
    labels: NDArray[Any],
    probabilities: NDArray[Any],
    classes: Sequence[str],
    path: Path,
    *,
    columns: int = 6,
) -> None:
    """Images ``(N, H, W, 3)`` in [0, 1] or uint8, with true and predicted class; wrong ones are outlined."""
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    with drawing(path, 1.75 * columns, 2.25 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for ax in grid.flat:
            ax.axis("off")
        for ax, image, label, p in zip(grid.flat, images, labels, probabilities, strict=False):
            predicted = int(np.argmax(p))
            wrong = predicted != label
            ax.axis("on")
            ax.imshow(image)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(wrong)
            ax.spines[:].set(color=VERMILION, linewidth=3)
            said = f"{classes[predicted]} {100 * p[predicted]:.0f} %"
            ax.set_title(said, fontsize=8.5, color=VERMILION if wrong else INK, pad=5)
            true = f"is {classes[int(label)]}, given {100 * p[int(label)]:.0f} %" if wrong else "right"
            ax.set_xlabel(true, fontsize=8, color=INK if wrong else MUTED)


def attention(
    images: NDArray[Any], maps: Array, masks: NDArray[Any], crops: NDArray[Any], titles: Sequence[str], path: Path
) -> None:
    """What a network looked at, a row per image: the image, its attention, the mask, the crop that it looked at again.

    Images and crops are ``(N, H, W, 3)`` in [0, 1] or uint8, maps ``(N, h, w)`` in [0, 1], masks ``(N, h, w)`` bool.
    """
    with drawing(path, 6.6, 1.72 * len(images) + 0.3) as figure:
        grid = figure.subplots(len(images), 4, squeeze=False)
        for ax in grid.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for axes, image, values, mask, crop, title in zip(grid, images, maps, masks, crops, titles, strict=True):
            height, width = image.shape[:2]
            over = {"extent": (-0.5, width - 0.5, height - 0.5, -0.5), "vmin": 0, "vmax": 1}
            for ax, picture in zip(axes, (image, image, image, crop), strict=True):
                ax.imshow(picture)
            axes[1].imshow(values, cmap="inferno", alpha=0.6, **over)
            axes[2].imshow(np.ma.masked_array(np.ones(mask.shape), mask), cmap="gray", alpha=0.75, **over)
            axes[0].set_ylabel(title, fontsize=8)
        for ax, name in zip(grid[0], ("image", "attention", "mask", "crop"), strict=True):
            ax.set_title(name)


def softened(logits: Array, temperatures: Sequence[float], classes: Sequence[str], path: Path) -> None:
    """The distribution ``softmax(logits / T)`` of one image, ``logits`` ``(C,)``, at several temperatures."""
    with drawing(path, 1.1 + 1.55 * len(temperatures), 2.7) as figure:
        axes = figure.subplots(1, len(temperatures), squeeze=False, sharey=True)[0]
        top = int(np.argmax(logits))
        for ax, t in zip(axes, temperatures, strict=True):
            p = np.exp((logits - np.max(logits)) / t)
            p /= p.sum()
            bars = ax.barh(range(len(classes)), p, color=[BLUE if c == top else SKY for c in range(len(p))])
            if len(classes) <= 12:
                ax.bar_label(bars, [f"{q:.2f}" for q in p], padding=3, fontsize=8)
            ax.set(title=f"T = {t:g}", xlim=(0, 1.3), xticks=[0, 0.5, 1], ylim=(len(classes) - 0.4, -0.6))
            ax.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(classes)), classes)
        figure.supxlabel("probability", fontsize=9)


def sweep(
    x: Sequence[float],
    value: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    path: Path,
    *,
    paper: Sequence[float] | None = None,
    xlabel: str = "",
    ylabel: str = "accuracy",
) -> None:
    """A figure with its interval at each setting ``x``, and the paper's where it printed one (else nan)."""
    with drawing(path, 4.8, 3.2) as figure:
        ax = figure.subplots()
        place = np.arange(len(x))
        if paper is not None:
            ax.plot(place, paper, "D", color=VERMILION, markerfacecolor="white", label="paper")
        ax.vlines(place, low, high, color=BLUE, linewidth=1.6)
        ax.plot(place, value, "o-", color=BLUE, linewidth=1, markersize=5.5, label="here, 95 % interval")
        ax.set_xticks(place, [f"{v:g}" for v in x])  # evenly spaced: sweeps are rarely linear
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.grid(True, axis="y")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def curves(lines: Mapping[str, Array], path: Path, *, xlabel: str = "epoch", ylabel: str = "") -> None:
    """Lines by name, a value for each epoch; the darker the later the name, as settings have an order."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    with drawing(path, 4.8, 3.2) as figure:
        ax = figure.subplots()
        shades = colormaps["viridis_r"](np.linspace(0.15, 1, len(lines)))
        for (name, values), shade in zip(lines.items(), shades, strict=True):
            ax.plot(values, color=shade, label=name, marker="o" if len(values) == 1 else None)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(True, axis="y")
        ax.legend()


def bars(rows: Mapping[str, Mapping[str, Any]], path: Path, *, xlabel: str = "") -> None:
    """A figure by name with its 95 % interval, one below the other."""
    with drawing(path, 5.2, 0.32 * len(rows) + 0.9) as figure:
        ax = figure.subplots()
        for place, row in enumerate(rows.values()):
            low, high = (row["value"] if row[k] is None else row[k] for k in ("low", "high"))
            ax.hlines(place, low, high, color=BLUE, linewidth=1.6)
            ax.plot(row["value"], place, "o", color=BLUE, markersize=5.5)
            ax.annotate(
                f"{row['value']:.3f}", (high, place), (5, 0), textcoords="offset points", va="center", fontsize=8
            )
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
        ax.margins(x=0.12)
        ax.grid(True, axis="x")


def balls(rows: Sequence[tuple[str, float, float, float]], path: Path, *, ylabel: str = "accuracy") -> None:
    """Accuracy against multiply-accumulates; ``(name, GMAC, accuracy, million parameters)``, area by parameters."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with drawing(path, 6.4, 4.0) as figure:
        ax = figure.subplots()
        costs = sorted({gmac for _, gmac, _, _ in rows})
        for number, (name, gmac, value, millions) in enumerate(rows):
            ax.scatter(gmac, value, s=18 * millions, color=CYCLE[number % len(CYCLE)], alpha=0.55, linewidth=0)
            beside = sorted(v for _, g, v, _ in rows if g == gmac)  # of one network, differently trained
            shift = 9 * (beside.index(value) - (len(beside) - 1) / 2)
            left = gmac == costs[-1] and len(costs) > 1
            offset, side = ((-16, shift), "right") if left else ((16, shift), "left")
            ax.annotate(name, (gmac, value), offset, textcoords="offset points", ha=side, va="center", fontsize=7)
        ax.set_xscale("log")
        ax.set_xticks(costs)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set(xlabel="billion multiply-accumulates per image", ylabel=ylabel)
        ax.margins(0.18)
        ax.grid(True)


def early_exit(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy against multiply-accumulates: every threshold, the fitted one, and each exit by itself.

    ``found`` is what `histill.evaluate.early_exit.early_exit` returns.
    """
    line, spent = found["curve"], found["macs"]
    with drawing(path, 4.8, 3.6) as figure:
        ax = figure.subplots()
        ax.step(
            np.array(line["macs"]) / 1e6,
            100 * np.array(line["accuracy"]),
            where="post",
            color=BLUE,
            linewidth=1.2,
            label="early exit, every threshold",
        )
        if "exits" in found:
            values = [100 * figure_["value"] for figure_ in found["exits"]]
            ax.plot(np.array(spent["exits"]) / 1e6, values, "D", color=MUTED, label="each exit alone")
            for k, (x, y) in enumerate(zip(spent["exits"], values), 1):
                ax.annotate(str(k), (x / 1e6, y), xytext=(5, -10), textcoords="offset points", color=MUTED)
            ax.plot(spent["whole"] / 1e6, 100 * found["whole"]["value"], "s", color=INK, label="whole network")
            value, low, high = (100 * found["accuracy"][key] for key in ("value", "low", "high"))
            ax.vlines(spent["mean"] / 1e6, low, high, color=VERMILION, linewidth=1.4)
            ax.plot(spent["mean"] / 1e6, value, "o", color=VERMILION, label="threshold from validation")
        ax.set(xlabel="million multiply-accumulates per image", ylabel="accuracy, %", xlim=(0, None))
        ax.grid(True)
        figure.legend(loc="outside lower center", ncols=2)


@contextlib.contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches that is at ``path``, whole, once the block is left."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic(path) as temporary:  # without matplotlib's version: the same figure is the same bytes
            figure.savefig(temporary, format="png", metadata={"Software": None})


def _colour(name: str, number: int) -> str:
    return NETWORKS.get(name.lower(), CYCLE[number % len(CYCLE)])


def _words(name: str) -> str:
    return {"macro_f1": "macro F1"}.get(name, name.replace("_", " "))


def _span(figure: Interval) -> str:
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    if value is None:
        return "not defined"
    return f"{value:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")
