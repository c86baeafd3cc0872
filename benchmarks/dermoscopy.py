"""Melanoma or nevus on a student of 0.27 M parameters: does distillation help on real images?

    python benchmarks/dermoscopy.py DATA OUT [--loss paper]

DATA holds ``isic_derm`` (518 ISIC images, melanoma and nevus, with a split by lesion) and ``imagenet_mobilenet``
(ImageNet weights of MobileNet V1). The teacher is one of the paper's networks, MobileNet V1 with its head, fine-tuned
from ImageNet at 128 px; the student is DSNet at 64 px, alone and distilled with the same views, schedule and seeds.
Everything that was chosen was chosen on validation (see benchmarks/LOG.md). The loss is Hinton's (T = 4, T squared), or
with ``--loss paper`` the paper's (T = 10 without T squared). What `histill distill` writes goes to OUT; the summary,
with settings, machine and command, to benchmarks/results/dermoscopy.json (dermoscopy-paper.json), the figure beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "--seeds": "3",
    "--val": "0.2",
    "--positive": "melanoma",
    "--image-size": "64",
    "--epochs": "50",
    "--views": "16",
    "--teacher-network": "mobilenet_v1",
    "--teacher-image-size": "128",
    "--teacher-epochs": "12",
    "--teacher-batch-size": "32",
    "--teacher-lr": "3e-4",
}
LOSSES = {"hinton": ["--temperature", "4", "--t-squared"], "paper": ["--temperature", "10"]}


def manifest(source: Path, out: Path) -> Path:
    """The two-class task as a manifest beside copies of its images; the split and the lesions are the data's own."""
    table = pd.read_csv(source / "labels.csv")
    table = table[table["label"].isin(["melanoma", "nevus"])]
    table = table.rename(columns={"file": "path", "group": "patient"})[["path", "label", "patient", "split"]]
    for path in table["path"]:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, out / path)
    table.to_csv(out / "manifest.csv", index=False)
    return out / "manifest.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--loss", choices=LOSSES, default="hinton")
    arguments = parser.parse_args()
    loss, name = LOSSES[arguments.loss], "dermoscopy" if arguments.loss == "hinton" else "dermoscopy-paper"
    images = arguments.out / "images"
    table = manifest(arguments.data / "isic_derm", images)
    weights = arguments.out / "mobilenet_v1.safetensors"
    published = arguments.data / "imagenet_mobilenet" / "mobilenet_v1_1.0_224_quant_embedding_extractor.npz"
    convert = Path(__file__).parent / "mobilenet_weights.py"
    subprocess.run([sys.executable, convert, published, "mobilenetv1_100", images, weights], check=True)
    options = [word for pair in SETTINGS.items() for word in pair]
    run = arguments.out / "distilled"
    call = ["distill", "dsnet", "--data", table, "--out", run, *options, *loss, "--teacher-weights", weights]
    if (run / "distill.json").exists():
        call = ["distill", "dsnet", "--out", run, "--resume"]
    subprocess.run([Path(sys.executable).parent / "histill", *call], check=True)
    RESULTS.mkdir(exist_ok=True)
    summary = json.loads((run / "summary.json").read_text())
    info = json.loads((run / "seed0" / "student_distilled" / "run.json").read_text())
    shown = {
        "command": f"python benchmarks/dermoscopy.py DATA OUT --loss {arguments.loss}",
        "settings": {**SETTINGS, "loss": " ".join(loss)},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": info["device"]},
        "versions": info["versions"],
        "commit": info["commit"],
        "data": {key: info["data"][key] for key in ("images", "patients", "hash", "split_hash")},
        "selection": info["selection"]["rule"],
        **summary,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(shown, indent=2) + "\n")
    shutil.copyfile(run / "figures" / "gain.png", RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
