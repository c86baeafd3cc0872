"""Every experiment of the RCKD paper, beside its numbers.

Kim et al., Bioengineering 10 (2023) 1279; see `histill.recipes.rckd` and `histill.recipes.baselines`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from histill.data.decode import decode
from histill.data.images import Images, read_unlabelled
from histill.data.splits import split
from histill.data.windows import kept_tissue, sampled
from histill.distill import read_parts
from histill.errors import BadInput
from histill.evaluate import figures
from histill.evaluate.cost import macs
from histill.evaluate.multiplicity import comparisons
from histill.evaluate.outlines import outlines
from histill.evaluate.report import Picture, Section, Table, Text, difference, share
from histill.experiment import Experiment
from histill.pretrain.pseudo import Kind, nuclei
from histill.progress import notice
from histill.recipes import baselines, rckd
from histill.run import Run
from histill.studies._common import Study
from histill.studies._rckd_supervised import Supervised, given_weights
from histill.transfer import check_apart

__all__ = ["PAPER", "study"]

_COLUMNS = ("BACH", "CRC", "BreakHis", "Lymphoma", "mean", "BACH WSI", "GlaS", "mean IoU")
_TABLES = """
random resnet18 53.7 80.2 85.0 63.7 70.6 .355 .83 .592
barlow-twins resnet18 71.4 93.7 93.8 77.8 84.1 .40 .861 .630
moco resnet18 59.7 93.8 96.9 76.0 81.6 .391 .864 .627
supervised resnet18 74.4 95.5 95.5 74.6 85 .373 .866 .619
rckd resnet18 83.9 95.0 98.0 93.8 92.6 .415 .915 .665
random CSAT 41.3 89.6 83.7 51.4 66.5 .355 .872 .613
barlow-twins CSAT 47.0 90.2 83.7 53.9 68.7 .342 .81 .576
moco CSAT 47.1 90.6 85.5 52.6 68.9 .35 .783 .566
supervised CSAT 77.0 95.8 96.1 76.5 86.3 .441 .902 .671
rckd CSAT 90.6 95.3 98.6 92.5 94.2 .435 .912 .673
supervised efficientnet_b0 82.2 96.8 97.4 84.7 90.2 .399 .861 .630
rckd efficientnet_b0 85.9 96.2 98.3 94.9 93.8 .438 .873 .655
supervised convnextv2_atto 78.6 95.1 96.6 77.2 86.8 .434 .901 .667
rckd convnextv2_atto 80.4 94.9 96.4 91.9 90.9 .38 .91 .645
supervised densenet121 61.3 93.8 96.3 71.5 80.7 .385 .804 .594
simclr resnet18 76.2 94.2 97.7 93.3 90.3 .386 .866 .626
mae vit_base_patch16_224 62.3 94.1 93.1 71.3 80.2 .378 .763 .570
"""

PAPER: dict[str, Any] = {
    "rows": {(m, n): tuple(map(float, values)) for m, n, *values in map(str.split, _TABLES.strip().splitlines())},
    "imagenet": {"resnet18": 75.7, "ResNet18SAT": 76.2, "CSAT-plain": 78.4, "CSAT": 78.6},  # top-1, Table 6
    "means": {"rckd": 92.8, "supervised": 87.0, "self-supervised": 78.9},  # Figure 10
    "best": {"image_size": 384, "lr": 1e-4, "freeze": "peg"},  # Figure 5
}
"""What the paper prints: accuracies in percent on four sets and mIoU on two, their means truncated; Tables 3 to 6."""

METHODS = {
    "random": "random weights",
    "barlow-twins": "Barlow Twins",
    "moco": "MoCo v2",
    "simclr": "SimCLR",
    "mae": "MAE",
    "supervised": "supervised",
    "rckd": "RCKD",
}
SELF_SUPERVISED = ("barlow-twins", "moco", "simclr", "mae")
ROWS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "3": (
        "Table 3: pretraining",
        tuple((m, n) for n in ("resnet18", "CSAT") for m in ("random", "barlow-twins", "moco", "supervised", "rckd")),
    ),
    "4": (
        "Table 4: other small backbones",
        tuple((m, n) for n in ("efficientnet_b0", "convnextv2_atto") for m in ("supervised", "rckd")),
    ),
    "5": (
        "Table 5: other pretraining (KimiaNet is a DenseNet-121 with labels)",
        (("supervised", "densenet121"), ("simclr", "resnet18"), ("mae", "vit_base_patch16_224")),
    ),
}
Tables = Literal["3", "4", "5", "6", "search"]


@dataclass
class _Work:
    """One study: its runs and its settings."""

    made: Study
    sets: dict[str, Images]
    patches: Images
    teacher: str
    supervised: Supervised
    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    rckd: dict[str, Any]
    labels: int | None
    redraw: bool
    head_width: int | None = None

    def weights(self, method: str, network: str) -> str | None:
        """What a row is fine-tuned from; None where it has to be left out."""
        if method == "random":
            return "none"
        if method == "supervised":
            return self.supervised.weights(network)
        return str(self.pretrained(method, network).path)

    def pretrained(self, method: str, network: str) -> Run:
        """The backbone of a row that learns from patches."""
        name, seed = f"pretrain-{method}-{network}", self.made.seeds[0]
        make: Any
        if method == "rckd":
            make = partial(rckd.pretrain, self.patches, self.teacher, network=network, **self.pretraining, **self.rckd)
        else:
            own: Any = {"method": method, "network": network, "head_width": self.head_width, **self.pretraining}
            make = partial(baselines.pretrain, self.patches, **own)
        return self.made.run(name, lambda s: make(seed=s), [seed])[0]

    def row(self, method: str, network: str) -> None:
        """Pretrain, and fine-tune on every set with every seed."""
        if (weights := self.weights(method, network)) is None:
            return
        for name, data in self.sets.items():
            tuned = partial(rckd.finetune, network=network, weights=weights, **self.finetuning)
            self.made.run(f"{method}-{network}-{name}", partial(self.tuned, data, tuned))

    def tuned(self, data: Images, make: Callable[..., Experiment], seed: int) -> Experiment:
        """The fine-tuning of one repeat."""
        return make(self.drawn(data, seed), seed=seed)

    def drawn(self, data: Images, seed: int) -> Images:
        """The images of one repeat: divided anew, and as many labelled ones as are to be used."""
        first = self.made.seeds[0]
        if self.redraw and seed != first:
            val, test = (len(data.rows(part)) / len(data) for part in ("val", "test"))
            data = split(data.with_frame(data.frame.assign(split="")), val=val, test=test, seed=seed)
        return fewer(data, self.labels, seed)


def fewer(data: Images, labels: int | None, seed: int) -> Images:
    """``labels`` of the training images, as many of each class as there can be; all of validation and test."""
    rows = np.array(data.rows("train"))
    if labels is None or labels >= len(rows):
        return data
    rng = np.random.default_rng([seed, 200])
    rows = rows[rng.permutation(len(rows))]
    kinds = data.frame["label"].to_numpy()[rows]
    turn = np.zeros(len(rows), dtype=np.int64)  # the how-manieth of its class an image is
    for kind in set(kinds):
        turn[kinds == kind] = np.arange((kinds == kind).sum())
    kept = set(rows[np.argsort(turn, kind="stable")[:labels]].tolist())
    keep = [i in kept or s != "train" for i, s in enumerate(data.frame["split"])]
    return data.with_frame(data.frame[keep])


def study(
    data: Images,
    *,
    out: Path,
    unlabelled: Path | None = None,
    teacher: str | None = None,
    others: Sequence[Path] = (),
    labelled: Path | None = None,
    supervised_weights: Sequence[str] = (),
    usi_teacher: str | None = None,
    tables: Sequence[Tables] = ("3", "4", "5", "6", "search"),
    methods: Sequence[str] = tuple(METHODS),
    networks: Sequence[str] = (),
    labels: int | None = None,
    image_size: int = 384,
    epochs: int = 200,
    batch_size: int = 64,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    lr: float = 1e-4,
    schedule: Literal["constant", "cosine"] = "constant",
    patience: int | None = 20,
    select: str = "loss",
    pretrain_image_size: int = 512,
    pretrain_epochs: int = 100,
    pretrain_batch_size: int = 64,
    head_width: int | None = None,
    rckd_optimizer: Literal["lars", "adamw"] = "lars",
    pseudo: Kind = "prob",
    threshold: float = 0.5,
    teacher_scale: float = 2.0,
    sample: int | None = 400_000,
    sizes: Sequence[int] = (224, 384),
    rates: Sequence[float] = (1e-3, 1e-4),
    seeds: int = 5,
    splits: Literal["new", "same"] = "new",
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> str:
    """Every experiment of the RCKD paper: backbones and pretrainings, fine-tuned on one's own sets.

    Args:
        data: the images with labels or masks, and their splits.
        out: the study's folder; what is done already is not done again.
        unlabelled: a folder of patches.
        teacher: a run of rckd.teacher, or the official StarDist weights.
        others: further sets, each a folder or a manifest, with labels or masks; split in the same shares.
        labelled: another labelled folder or manifest, for supervised pretraining and Table 6, which is judged on a test
            part of it; without it the supervised rows start from ImageNet weights, where they can be had.
        supervised_weights: NETWORK=WEIGHTS, a file, a run or imagenet, that the network's supervised row starts from.
        usi_teacher: what supervised pretraining learns from too (USI): a run of the labelled images' classes, or
            NETWORK or NETWORK=WEIGHTS, which learns them first, from ImageNet weights where they can be had.
        tables: 3, 4, 5, 6 (SAT, on the labelled folder), search (Figure 5).
        methods: which pretrainings, of random, barlow-twins, moco, simclr, mae, supervised and rckd.
        networks: which backbones, of those in the tables (none: all).
        labels: how many training images of each set are used (none: all).
        image_size: height and width in pixels of fine-tuning.
        epochs: of fine-tuning, at most.
        batch_size: of fine-tuning.
        optimizer: of fine-tuning; see rckd.finetune.
        lr: of fine-tuning.
        schedule: of fine-tuning.
        patience: of fine-tuning.
        select: of fine-tuning.
        pretrain_image_size: height and width in pixels of every pretraining.
        pretrain_epochs: passes over the patches of every pretraining.
        pretrain_batch_size: patches per step of every pretraining.
        head_width: of the self-supervised baselines' projections (default: as published, 8192 of Barlow Twins).
        rckd_optimizer: of RCKD; the baselines have their own.
        pseudo: see rckd.pretrain.
        threshold: see rckd.pretrain.
        teacher_scale: see rckd.pretrain.
        sample: how many patches, drawn at random; all pretrainings see the same.
        sizes: image sizes of the search.
        rates: learning rates of the search.
        seeds: how many fine-tunings each row has (paper: 5), and how many trainings Table 6; pretraining is done once.
        splits: new for each repeat, or the same one for all.
        seed: of the first repeat; the others follow.
        device: auto, cpu, cuda or mps.
        precision: Lightning Fabric's names, or auto.

    Raises:
        BadInput: no patches or no teacher, or what `histill.loop.train` refuses.
    """
    if unlabelled is None or teacher is None:
        raise BadInput("the rckd study needs patches and a segmenter: --unlabelled FOLDER --teacher RUN (rckd.teacher)")
    made = Study(Path(out), range(seed, seed + seeds), {"device": device, "precision": precision})
    if unknown := [m for m in methods if m not in METHODS]:
        raise BadInput(f"--methods {' '.join(unknown)}: of {', '.join(METHODS)}")
    known = list(dict.fromkeys(network for _, pairs in ROWS.values() for _, network in pairs))
    if unknown := [n for n in networks if n not in known]:
        raise BadInput(f"--networks {' '.join(unknown)}: of {', '.join(known)}")
    shares: dict[str, Any] = {part: len(data.rows(part)) / len(data) for part in ("val", "test")}
    sets = {data.root.name: data}
    for path in others:
        more = read_parts(Path(path), **shares, seed=seed, patient=None)
        sets[f"{more.root.name}{'' if more.root.name not in sets else len(sets)}"] = more
    patches = sampled(kept_tissue(read_unlabelled(unlabelled)), sample, seed=seed)
    first = None
    if labelled is not None:
        first = read_parts(Path(labelled), val=0.1, test=0.1, seed=seed, patient=None, target="labels")
    judged = list(sets.values())
    if splits == "new" and seeds > 1:  # every image is a test image some time
        judged = [one.with_frame(one.frame.assign(split="test")) for one in judged]
    for one in judged:
        check_apart(patches, one)
        if first is not None:
            check_apart(first, one, "--labelled")
    shown = [pair for table in ("3", "4", "5") if table in tables for pair in ROWS[table][1]]
    rows = [(method, network) for method, network in shown if method in methods and network in (networks or known)]
    pretraining = {"image_size": pretrain_image_size, "epochs": pretrain_epochs, "batch_size": pretrain_batch_size}
    given = given_weights(supervised_weights, [network for method, network in rows if method == "supervised"])
    supervised = Supervised(made, first, given, usi_teacher, pretraining, judged)
    supervised.check()
    work = _Work(
        made=made,
        sets=sets,
        patches=patches,
        teacher=teacher,
        supervised=supervised,
        pretraining=pretraining,
        finetuning={
            **{"image_size": image_size, "epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "lr": lr},
            **{"schedule": schedule, "patience": patience, "select": select},
        },
        rckd={
            **{"optimizer": rckd_optimizer, "pseudo": pseudo, "threshold": threshold},
            **{"teacher_scale": teacher_scale, "sample": None},
        },
        labels=labels,
        redraw=splits == "new",
        head_width=head_width,
    )
    sat = "6" in tables and supervised.sat()  # first: its trainings with the first seed start rows
    for method, network in dict.fromkeys(rows):
        work.row(method, network)
    search = _search(work, sizes, rates) if "search" in tables else {}
    return _report(work, tables, search, sat)


def _search(work: _Work, sizes: Sequence[int], rates: Sequence[float]) -> dict[tuple[int, float, str], str]:
    """Figure 5: image size, learning rate, and position encodings frozen or trained, on the first set's validation."""
    run, first = work.pretrained("rckd", "CSAT"), next(iter(work.sets.values()))
    found: dict[tuple[int, float, str], str] = {}
    for size in sizes:
        for rate in rates:
            for freeze in ("peg", "none"):
                name = found[size, rate, freeze] = f"search-{size}-{rate:g}-{freeze}"
                changed: dict[str, Any] = work.finetuning | {"image_size": size, "lr": rate, "freeze": freeze}
                tuned = partial(rckd.finetune, network="CSAT", weights=str(run.path), **changed)
                work.made.run(name, partial(work.tuned, first, tuned), work.made.seeds[:1])
    return found


def _metric(data: Images) -> str:
    return "miou" if data.masks else "accuracy"


def _report(work: _Work, tables: Sequence[str], search: dict[tuple[int, float, str], str], sat: bool) -> str:
    made = work.made
    summary: dict[str, Any] = {"rows": {}, "gain": {}, "gain_over_self_supervised": {}}
    summary |= {"search_validation": {}, "sat": {}, "sat_gain": {}}
    for name in work.sets:
        for pair in dict.fromkeys(p for t in ("3", "4", "5") if t in tables for p in ROWS[t][1]):
            if (row := f"{pair[0]}-{pair[1]}-{name}") in made.runs:
                summary["rows"][row] = made.figures(row)
                if pair[0] != "random" and (base := f"random-{pair[1]}-{name}") in made.runs:
                    summary["gain"][row] = made.gain(row, base)
                for other in SELF_SUPERVISED if pair[0] == "rckd" else ():
                    if (theirs := f"{other}-{pair[1]}-{name}") in made.runs:
                        summary["gain_over_self_supervised"][f"{row} over {other}"] = made.gain(row, theirs)
    sections: list[Section] = []
    for table in ("3", "4", "5"):
        if table in tables:
            sections.append(_table(work, table, summary))
    if search:
        metric = _metric(next(iter(work.sets.values())))
        values = {key: made.figures(name, "val")[metric] for key, name in search.items()}
        summary["search_validation"] = {"-".join(map(str, key)): value for key, value in values.items()}
        cells: list[list[object]] = [
            [str(s), f"{r:g}", {"peg": "frozen"}.get(f, "trained"), share(v)] for (s, r, f), v in values.items()
        ]
        note = f"First repeat, validation ({metric}). The paper takes 384 pixels, 0.0001, frozen."
        sections.append(Table(["pixels", "learning rate", "position encodings", "validation"], cells, "Figure 5", note))
        path = made.out / "figures" / "search.png"
        named = {f"{s} px, {r:g}, {'frozen' if f == 'peg' else 'trained'}": v for (s, r, f), v in values.items()}
        figures.bars(named, path, xlabel=f"validation {metric}")
        sections.append(Picture(path, "Figure 5: image size, learning rate, position encodings."))
    if sat:
        sections.append(work.supervised.table(PAPER["imagenet"], summary))
    sections += [*_pictures(work, summary), _words(work)]
    answer = _answer(work, summary)
    for what, why in work.supervised.skipped.items():
        notice(f"{what}: left out, as {why}")
    return made.finish("RCKD: every experiment of the paper", answer, sections, summary)


def _table(work: _Work, table: str, summary: dict[str, Any]) -> Table:
    heading, pairs = ROWS[table]
    cells: list[list[object]] = []
    for method, network in pairs:
        if not any(f"{method}-{network}-{name}" in summary["rows"] for name in work.sets):
            continue  # it was not asked for, or left out
        own: list[object] = []
        for name, data in work.sets.items():
            row, metric = f"{method}-{network}-{name}", _metric(data)
            own.append(share(summary["rows"][row][metric]) if row in summary["rows"] else "-")
            own.append(difference(summary["gain"][row][metric]) if row in summary["gain"] else "-")
        paper = " ".join(f"{v:g}" for v in PAPER["rows"][method, network])
        start = f" ({work.supervised.starts[network]})" if method == "supervised" else ""
        cells.append([network, METHODS[method] + start, *own, paper])
    columns = [c for name, d in work.sets.items() for c in (f"{name}, {_metric(d)}", "minus random")]
    note = (
        f"Mean of {len(work.made.seeds)} fine-tunings (95 % interval over patients and repeats), differences paired. "
        f"Paper: {', '.join(_COLUMNS)}. {_compared(work, pairs, summary['gain'])}"
    )
    return Table(["backbone", "pretraining", *columns, "paper"], cells, heading, note)


def _compared(work: _Work, pairs: Sequence[tuple[str, str]], gains: dict[str, Any]) -> str:
    rows = {f"{m}-{n}-{name}": _metric(data) for m, n in pairs for name, data in work.sets.items()}
    return comparisons({row: gains[row][metric]["p"] for row, metric in rows.items() if row in gains})


def _pictures(work: _Work, summary: dict[str, Any]) -> list[Section]:
    home = work.made.out / "figures"
    segmenter = rckd.segmenter(work.teacher)
    few = sampled(work.patches, 8, seed=1)
    shown = [np.asarray(decode(path)[0]) for path in few.paths()]
    known = {
        name: work.rckd[key]
        for name, key in (("kind", "pseudo"), ("threshold", "threshold"), ("scale", "teacher_scale"))
    }
    outlines(shown, [nuclei(segmenter, image, **known).astype(int) for image in shown], home / "pseudo-labels.png")
    sections: list[Section] = [
        Picture(home / "pseudo-labels.png", "Figure 3: what the segmenter says of unlabelled patches.", "Figures")
    ]
    for number, (name, data) in enumerate(work.sets.items()):
        metric, suffix = _metric(data), f"-{number + 1}" if number else ""
        rows = {row: f[metric] for row, f in summary["rows"].items() if row.endswith(f"-{name}")}
        if len(rows) < 2:
            continue
        titles = {row: row.removesuffix(f"-{name}") for row in rows}
        bars, round_ = home / f"pretraining{suffix}.png", home / f"balls{suffix}.png"
        figures.bars({titles[row]: f for row, f in rows.items()}, bars, xlabel=f"test {metric}")
        balls = []
        for row, figure in rows.items():
            run = work.made.runs[row][0]
            network, size = run.network(), run.image_size
            weights = sum(p.numel() for p in network.parameters())
            balls.append((titles[row], macs(network, size) / 1e9, figure["value"], weights / 1e6))
        figures.balls(balls, round_, ylabel=f"test {metric}")
        paper = ", ".join(f"{METHODS.get(kind, kind)} {mean} %" for kind, mean in PAPER["means"].items())
        sections += [
            Picture(
                bars, f"Figures 6 to 8: {name}, mean over the repeats with 95 % intervals; the paper's in the tables."
            ),
            Picture(
                round_,
                f"Figure 10: {name}, {metric} against multiply-accumulates; areas are parameters. The paper's means "
                f"over backbones and its four labelled sets: {paper}.",
            ),
        ]
    return sections


def _words(work: _Work) -> Text:
    unit = next(iter(work.sets.values()))
    used = f"{work.labels} labelled images of each set" if work.labels else "all training images of each set"
    return Text(
        [
            f"All pretrainings see the same {len(work.patches):,} patches as often, at the same size; two views "
            "of each, where the method takes two. RCKD sets a fiftieth of them aside, on which its agreement with the "
            "segmenter is measured. Each backbone is pretrained once.",
            f"All fine-tunings use {used}, the same images, views, schedule and seeds; the epoch is chosen on "
            f"validation. Splits are by {'patient' if unit.has_patients else 'image, as no patients are known'}.",
            *work.supervised.words(),
        ],
        "How",
    )


def _answer(work: _Work, summary: dict[str, Any]) -> str:
    lines = []
    for name, data in work.sets.items():
        for network in dict.fromkeys(network for _, network in ROWS["3"][1]):
            if (row := f"rckd-{network}-{name}") in summary["gain"]:
                metric = _metric(data)
                gain, own = summary["gain"][row][metric], summary["rows"][row][metric]
                line = f"{network} on {name}: {share(own)} with RCKD, {difference(gain)} over random weights"
                others = {o: summary["gain_over_self_supervised"].get(f"{row} over {o}") for o in SELF_SUPERVISED}
                over = [f"{difference(g[metric])} over {METHODS[o]}" for o, g in others.items() if g is not None]
                lines.append(f"{', '.join([line, *over])}.")
    lines += work.supervised.answer(summary)
    return " ".join(lines) or "No row with RCKD and random weights was run."
