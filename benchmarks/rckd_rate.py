"""CSAT again at lower learning rates: what those of benchmarks/rckd.py did to it.

    python benchmarks/rckd_rate.py OUT [random|rckd]

OUT is that of benchmarks/rckd.py, whose folders and rows are used. CSAT is pretrained by RCKD at 1e-4 instead of 1e-3
and fine-tuned on lung and colon at 1e-3 and 3e-4, from random weights and from there; for each of the two the rate with
the better validation accuracy of the first seed is taken, and run with every seed. A second word runs one of the two
alone. Results go to benchmarks/results/rckd_rate.json.
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

PRETRAIN = (
    "--network CSAT --image-size 96 --epochs 20 --batch-size 32 --optimizer adamw --lr 1e-4 --teacher-scale 1 "
    "--pseudo instances"
)
FINETUNE: dict[str, Any] = {"network": "CSAT", "image_size": 96, "epochs": 20, "batch_size": 16, "optimizer": "adamw"}
RATES = (1e-3, 3e-4)
SEEDS = (0, 1, 2)


def pretrained(out: Path) -> Path:
    """The run at 1e-4."""
    run = out / "csat-0.0001"
    if not (run / "run.json").exists():
        given = ["--unlabelled", out / "patches", "--teacher", out / "segmenter"]
        call(HISTILL, "train", "rckd.pretrain", *given, *PRETRAIN.split(), "--out", run)
    return run


def features(run: Path, out: Path) -> dict[str, float]:
    """Mean absolute value of the deepest features, and the spread between patches of the pooled ones."""
    network = hs.models.CSAT(5, weights=str(run)).eval()
    images = read_unlabelled(out / "patches")
    packed = pack(images.with_frame(images.frame.iloc[::20]), 96)
    with torch.no_grad():
        said = network(packed.batch(torch.arange(len(packed.images)).numpy()).images)
    return {"stage4": float(said["stage4"].abs().mean()), "pooled_spread": float(said["pooled"].std(0).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("only", nargs="?", choices=("random", "rckd"))
    arguments = parser.parse_args()
    out: Path = arguments.out
    lung = read_parts(out / "lung_colon" / "manifest.csv", val=0.2, test=0.15, seed=0, patient=None)
    weights = {"random": "none", "rckd": str(pretrained(out))}

    def tune(start: str, rate: float, seed: int) -> hs.Run:
        home = out / "rate" / f"{start}-{rate:g}-seed{seed}"
        settings = {"weights": weights[start], "lr": rate, "schedule": "cosine", "seed": seed, **FINETUNE}
        return hs.train(rckd.finetune(fewer(lung, 200, seed), **settings), home, resume=True)

    shown: dict[str, Any] = {"command": "python benchmarks/rckd_rate.py OUT"}
    rows = {}
    for start in [arguments.only] if arguments.only else weights:
        reached = {rate: float(tune(start, rate, 0).log["val/accuracy"].max()) for rate in RATES}
        best = max(RATES, key=lambda rate: reached[rate])
        rows[start] = [scores_of(tune(start, best, seed)) for seed in SEEDS]
        shown[start] = {"validation": {f"{r:g}": v for r, v in reached.items()}, "rate": best}
        shown[start] |= figures_over_seeds(rows[start], names=["accuracy", "balanced_accuracy"])
    if arguments.only:
        return
    shown["gain"] = paired_gain(rows["random"], rows["rckd"], names=["accuracy", "balanced_accuracy"])
    study = out / "study" / "runs" / "pretrain-rckd-CSAT-seed0"
    shown["features"] = {"1e-3": features(study, out), "1e-4": features(pretrained(out), out)}
    (RESULTS / "rckd_rate.json").write_text(json.dumps(shown, indent=1) + "\n")
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
