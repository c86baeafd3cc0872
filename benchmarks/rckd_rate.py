"""RCKD's CSAT again, pretrained at lower learning rates: what the rate of benchmarks/rckd.py did to it.

    python benchmarks/rckd_rate.py OUT

OUT is that of benchmarks/rckd.py, whose folders and rows from random weights are used. For each rate CSAT is pretrained
with otherwise the same settings; the size of its deepest features is measured; the rate with the best validation
accuracy of the first fine-tuning (lung and colon) is fine-tuned with every seed on both sets. Results go to
benchmarks/results/rckd_rate.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from studies import HISTILL, RESULTS, call

import histill as hs
from histill.data.images import read_unlabelled
from histill.data.packed import pack
from histill.distill import read_parts
from histill.evaluate.intervals import figures_over_seeds, paired_gain
from histill.evaluate.judge import scores_of
from histill.recipes import rckd
from histill.studies.rckd import fewer

RATES = (1e-3, 3e-4, 1e-4)
PRETRAIN = (
    "--network CSAT --image-size 96 --epochs 20 --batch-size 32 --optimizer adamw --teacher-scale 1 --pseudo instances"
)
FINETUNE: dict[str, Any] = {"network": "CSAT", "image_size": 96, "epochs": 20, "batch_size": 16, "optimizer": "adamw"}
FINETUNE |= {"lr": 1e-3, "schedule": "cosine"}
SETS = {"lung_colon": "accuracy", "glands": "miou"}
SEEDS = (0, 1, 2)


def pretrained(rate: float, out: Path) -> Path:
    """The run at this rate; the first is the study's own."""
    if rate == RATES[0]:
        return out / "study" / "runs" / "pretrain-rckd-CSAT-seed0"
    run = out / f"csat-{rate:g}"
    if not (run / "run.json").exists():
        given = ["--unlabelled", out / "patches", "--teacher", out / "segmenter", "--lr", f"{rate:g}"]
        call(HISTILL, "train", "rckd.pretrain", *given, *PRETRAIN.split(), "--out", run)
    return run


def features(run: Path, out: Path) -> dict[str, float]:
    """Mean absolute value of the deepest features, and the spread between patches of the pooled ones."""
    network = hs.models.CSAT(5, weights=str(run)).eval()
    images = read_unlabelled(out / "patches")
    batch = pack(images.with_frame(images.frame.iloc[::20]), 96)
    with torch.no_grad():
        said = network(batch.batch(torch.arange(len(batch.images)).numpy()).images)
    return {"stage4": float(said["stage4"].abs().mean()), "pooled_spread": float(said["pooled"].std(0).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    lung = read_parts(out / "lung_colon" / "manifest.csv", val=0.2, test=0.15, seed=0, patient=None)
    shares: dict[str, Any] = {part: len(lung.rows(part)) / len(lung) for part in ("val", "test")}  # as the study has it
    glands = read_parts(out / "glands" / "manifest.csv", seed=0, patient=None, **shares)
    sets = {"lung_colon": lung, "glands": glands}

    def tune(rate: float, name: str, seed: int) -> hs.Run:
        made = rckd.finetune(fewer(sets[name], 200, seed), weights=str(pretrained(rate, out)), seed=seed, **FINETUNE)
        return hs.train(made, out / "rate" / f"{rate:g}-{name}-seed{seed}", resume=True)

    tried = {}
    for rate in RATES:
        run = tune(rate, "lung_colon", 0)
        tried[rate] = features(pretrained(rate, out), out) | {
            "validation_accuracy": float(run.log["val/accuracy"].max())
        }
    best = max(RATES, key=lambda rate: tried[rate]["validation_accuracy"])
    shown: dict[str, Any] = {
        "command": "python benchmarks/rckd_rate.py OUT",
        "rates": {f"{r:g}": t for r, t in tried.items()},
    }
    shown["chosen_on_validation"] = best
    for name, metric in SETS.items():
        ours = [scores_of(tune(best, name, seed)) for seed in SEEDS]
        base = [scores_of(hs.Run.open(out / "study" / "runs" / f"random-CSAT-{name}-seed{s}")) for s in SEEDS]
        gain = paired_gain(base, ours, names=[metric])[metric]
        shown[name] = {metric: figures_over_seeds(ours, names=[metric])[metric], "minus_random": gain}
    (RESULTS / "rckd_rate.json").write_text(json.dumps(shown, indent=1) + "\n")
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
