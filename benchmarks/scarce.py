"""200 labels and a folder of unlabelled tissue: what each kind of pretraining buys a 3 M-parameter backbone.

    python benchmarks/scarce.py DATA OUT [START ...]

DATA is that of benchmarks/rckd.py, and holds ``imagenet_mobilenet`` (ImageNet weights of MobileNet). CSAT starts from
random weights, from Barlow Twins, from RCKD (a nucleus segmenter trained on ``dsb2018_he``), and from the embeddings of
a MobileNetV2 that was trained on ImageNet, the only large pretraining that is at hand. Each pretraining sees the same
images as often, but for one that goes on for longer: the patches of ``nuinsseg_unlabelled`` and the training images of
``lc25000`` without their labels. Then each start is fine-tuned on 200 labelled tiles of ``lc25000`` (five classes) and
on the glands of ``ebhi_glands`` (masks), by one recipe, at the learning rates of `RATES`; the one with the best
validation figure of the first seed is taken, for each start and set by itself, and run with every seed. Test images are
looked at once, at the end.

Further words are the starts that are run (default: all). Results go to benchmarks/results/scarce.json and scarce.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, leave
from rckd import SEGMENTER, manifest
from studies import HISTILL, PUBLISHED, call

import histill as hs
from histill.data.images import Images
from histill.distill import read_parts
from histill.evaluate.intervals import figures_over_seeds, paired_gain
from histill.evaluate.judge import scores_of
from histill.recipes import rckd
from histill.studies.rckd import fewer

SIZE = "--network CSAT --image-size 96 --epochs 20 --batch-size 32"
TEACHER = "mobilenetv2_100"
PRETRAIN = {
    "barlow-twins": f"{SIZE} --method barlow-twins --optimizer adamw --lr 3e-4 --head-width 1024",
    "rckd": f"{SIZE} --optimizer adamw --lr 1e-4 --teacher-scale 1 --pseudo instances",
    "embeddings": f"{SIZE} --lr 3e-4",
    "embeddings-long": f"{SIZE.replace('20', '40')} --lr 1e-3",
}
RECIPE = {
    "barlow-twins": "baselines.pretrain",
    "rckd": "rckd.pretrain",
    "embeddings": "foundation.pretrain",
    "embeddings-long": "foundation.pretrain",
}
SAID = {
    "random": "random weights",
    "barlow-twins": "Barlow Twins",
    "rckd": "RCKD, nucleus segmenter",
    "embeddings": "embeddings of MobileNetV2 (ImageNet)",
    "embeddings-long": "the same, 40 epochs at 1e-3",
}
FINETUNE: dict[str, Any] = {"network": "CSAT", "image_size": 96, "epochs": 30, "batch_size": 16, "optimizer": "adamw"}
METRIC = {"lung_colon": "accuracy", "glands": "miou"}
RATES = (1e-3, 3e-4)
SEEDS = (0, 1, 2)
LABELS = 200


def prepared(data: Path, out: Path) -> tuple[dict[str, Images], dict[str, list[Any]]]:
    """The sets that a student is judged on, and what each pretraining is told beside its settings."""
    lung = manifest(data / "lc25000", out / "lung_colon", ["path", "label", "patient"], "role == 'tile'")
    glands = manifest(data / "ebhi_glands", out / "glands", ["path", "mask", "patient"])
    nuclei = manifest(data / "dsb2018_he", out / "nuclei", ["path", "mask", "patient"])
    sets = {
        "lung_colon": read_parts(lung, val=0.2, test=0.15, seed=0, patient=None),
        "glands": read_parts(glands, val=0.2, test=0.15, seed=0, patient=None),
    }
    unlabelled = out / "unlabelled"
    shutil.copytree(data / "nuinsseg_unlabelled", unlabelled, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md"))
    frame = sets["lung_colon"].frame
    for path in frame["path"][frame["split"] == "train"]:
        shutil.copyfile(sets["lung_colon"].root / path, unlabelled / Path(path).name)
    weights = out / f"{TEACHER}.safetensors"
    if not weights.exists():
        published = data / "imagenet_mobilenet" / PUBLISHED[TEACHER]
        call(sys.executable, Path(__file__).parent / "mobilenet_weights.py", published, TEACHER, unlabelled, weights)
    segmenter = out / "segmenter"
    if not (segmenter / "run.json").exists():
        call(HISTILL, "train", "rckd.teacher", "--data", nuclei, "--out", segmenter, *SEGMENTER.split())
    told = {"barlow-twins": [], "rckd": ["--teacher", segmenter], "embeddings": ["--teacher", f"{TEACHER}={weights}"]}
    told["embeddings-long"] = told["embeddings"]
    return sets, {start: ["--unlabelled", unlabelled, *words] for start, words in told.items()}


def pretrained(start: str, words: list[Any], out: Path) -> str:
    """Weights to start from."""
    if start == "random":
        return "none"
    run = out / "pretrained" / start
    if not (run / "run.json").exists():
        call(HISTILL, "train", RECIPE[start], *words, *PRETRAIN[start].split(), "--out", run)
    elif json.loads((run / "run.json").read_text())["status"] != "finished":
        call(HISTILL, "train", "--out", run, "--resume")
    return str(run)


def tuned(start: str, name: str, images: Images, weights: str, out: Path, rate: float, seed: int) -> hs.Run:
    """One fine-tuning."""
    home = out / "tuned" / f"{start}-{name}-{rate:g}-seed{seed}"
    few = images if images.masks else fewer(images, LABELS, seed)
    settings = {"weights": weights, "lr": rate, "schedule": "cosine", "seed": seed, **FINETUNE}
    return hs.train(rckd.finetune(few, select=METRIC[name], **settings), home, resume=True)


def points(gain: dict[str, float]) -> str:
    """A difference in percentage points, with its interval."""
    return f"{100 * gain['value']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("starts", nargs="*", choices=[[], *SAID], default=[])
    arguments = parser.parse_args()
    out: Path = arguments.out
    sets, told = prepared(arguments.data, out)

    rows: dict[str, dict[str, Any]] = {name: {} for name in sets}
    chosen: dict[str, dict[str, Any]] = {name: {} for name in sets}
    info: dict[str, Any] = {}
    starts = [start for start in SAID if start in arguments.starts or not arguments.starts]
    for start in starts:
        weights = pretrained(start, told.get(start, []), out)
        for name, images in sets.items():
            tune = partial(tuned, start, name, images, weights, out)
            reached = {rate: float(tune(rate, 0).log[f"val/{METRIC[name]}"].max()) for rate in RATES}
            best = max(RATES, key=lambda rate: reached[rate])
            runs = [tune(best, seed) for seed in SEEDS]
            rows[name][start] = [scores_of(run) for run in runs]
            chosen[name][start] = {"validation": {f"{r:g}": v for r, v in reached.items()}, "rate": best}
            info = runs[0].info
    shown: dict[str, Any] = {
        "command": " ".join(["python benchmarks/scarce.py DATA OUT", *arguments.starts]),
        "settings": {"segmenter": SEGMENTER, "pretraining": PRETRAIN, "finetuning": FINETUNE, "labels": LABELS},
        "unlabelled": len(list((out / "unlabelled").iterdir())),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": info["device"]},
        **{name: info[name] for name in ("precision", "versions", "commit")},
    }
    lines = [f"{'start':38}" + "".join(f"{f'{n}, {METRIC[n]}':30}{'minus random':30}" for n in sets)]
    for start in starts:
        title = SAID[start]
        cells = ""
        for name in sets:
            metric = METRIC[name]
            found = figures_over_seeds(rows[name][start], names=[metric])
            row = {**chosen[name][start], **found}
            cell = [f"{100 * found[metric]['value']:.1f} % ({100 * found[metric]['low']:.1f} to "
                    f"{100 * found[metric]['high']:.1f})", "-"]  # fmt: skip
            if start != "random":
                row["gain"] = paired_gain(rows[name]["random"], rows[name][start], names=[metric])
                cell[1] = points(row["gain"][metric])
            shown.setdefault(name, {})[start] = row
            cells += f"{cell[0]:30}{cell[1]:30}"
        lines.append(f"{title:38}{cells}".rstrip())
    if {"rckd", "barlow-twins"} <= set(starts):
        cells = ""
        for name in sets:
            gain = paired_gain(rows[name]["barlow-twins"], rows[name]["rckd"], names=[METRIC[name]])
            shown[name]["rckd"]["gain_over_barlow_twins"] = gain
            cells += f"{points(gain[METRIC[name]]):60}"
        lines.append(f"{'RCKD minus Barlow Twins':38}{cells}".rstrip())
    lines.append(
        f"CSAT; mean of {len(SEEDS)} fine-tunings, 95 % interval over patients and repeats; "
        "differences in points, paired."
    )
    leave(RESULTS / "scarce.json", shown, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
