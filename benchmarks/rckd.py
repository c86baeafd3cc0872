"""RCKD on real tissue: a nucleus segmenter, pretraining on unlabelled patches, fine-tuning with few labels.

    python benchmarks/rckd.py DATA OUT

DATA holds ``dsb2018_he`` (nuclei with instance masks), ``nuinsseg_unlabelled`` (patches), and the sets that the student
is judged on: ``lc25000`` (five classes of lung and colon) and ``ebhi_glands`` (glands, masks), each with a
``labels.csv`` (file, label, split, group, mask). The segmenter is trained first (its test figures go into the summary),
then `histill study rckd` runs. Results go to benchmarks/results/rckd.json and rckd.txt, the figures into rckd/.

Every setting was fixed before any test figure was seen; what was tried is in benchmarks/LOG.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from studies import HISTILL, RESULTS, call

from histill.data.decode import decode
from histill.evaluate.outlines import outlines
from histill.models import predict_instances
from histill.recipes import rckd

SEGMENTER = "--epochs 50 --batch-size 4 --lr 1e-3"
STUDY = (
    "--tables 3 --methods random barlow-twins rckd --labels 200 --seeds 3 --splits same --image-size 96 --epochs 20 "
    "--batch-size 16 --optimizer adamw --lr 1e-3 --schedule cosine --pretrain-image-size 96 --pretrain-epochs 20 "
    "--pretrain-batch-size 32 --head-width 1024 --rckd-optimizer adamw --teacher-scale 1 --pseudo instances --val 0.2"
)
SHOWN = ("balls.png", "pretraining.png")
"""Figures without images; the others show data that are not ours to publish, but for the patches (CC BY 4.0)."""


def manifest(source: Path, out: Path, columns: list[str], where: str = "") -> Path:
    """The images of a folder, copied, and their manifest; a group is a patient."""
    table = pd.read_csv(source / "labels.csv")
    table = table[table["split"].isin(["train", "test"])]
    table = (table.query(where) if where else table).rename(columns={"file": "path", "group": "patient"})
    for column in {"path", "mask"} & set(columns):
        for path in table[column]:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, out / path)
    table[[*columns, "split"]].to_csv(out / "manifest.csv", index=False)
    return out / "manifest.csv"


def show_nuclei(segmenter: Path, table: Path, path: Path) -> None:
    """Outlines of the first eight test images, truth and prediction (CC0)."""
    network, few = rckd.segmenter(segmenter), pd.read_csv(table).query("split == 'test'").head(8)
    images = [np.asarray(decode(table.parent / name)[0]) for name in few["path"]]
    truth = [np.asarray(Image.open(table.parent / name)).astype(np.int32) for name in few["mask"]]
    with torch.no_grad():
        said = [predict_instances(network, image).labels for image in images]
    outlines(images, truth, path.with_suffix(".png"), predicted=said)
    Image.open(path.with_suffix(".png")).convert("RGB").save(path, quality=88)
    path.with_suffix(".png").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    nuclei = manifest(data / "dsb2018_he", out / "nuclei", ["path", "mask", "patient"])
    lung = manifest(data / "lc25000", out / "lung_colon", ["path", "label", "patient"], "role == 'tile'")
    glands = manifest(data / "ebhi_glands", out / "glands", ["path", "mask", "patient"])
    patches = out / "patches"
    shutil.copytree(data / "nuinsseg_unlabelled", patches, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md"))

    segmenter = out / "segmenter"
    if not (segmenter / "run.json").exists():
        call(HISTILL, "train", "rckd.teacher", "--data", nuclei, "--out", segmenter, *SEGMENTER.split())
    elif json.loads((segmenter / "run.json").read_text())["status"] != "finished":
        call(HISTILL, "train", "--out", segmenter, "--resume")
    given = ["--unlabelled", patches, "--teacher", segmenter, "--others", glands]
    study = out / "study"
    tables = call(HISTILL, "study", "rckd", "--data", lung, "--out", study, *given, *STUDY.split())
    info = json.loads((study / "runs" / "pretrain-rckd-CSAT-seed0" / "run.json").read_text())
    shown = {
        "command": "python benchmarks/rckd.py DATA OUT",
        "settings": {"segmenter": SEGMENTER, "study": STUDY},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": info["device"]},
        **{name: info[name] for name in ("precision", "versions", "commit")},
        "segmenter": json.loads((segmenter / "metrics.json").read_text()),
        "patches": info["data"]["images"],
        **json.loads((study / "summary.json").read_text()),
    }
    (RESULTS / "rckd.json").write_text(json.dumps(shown, indent=1) + "\n")
    (RESULTS / "rckd.txt").write_text(tables[: tables.rfind("\nreport:")] + "\n")
    shutil.rmtree(RESULTS / "rckd", ignore_errors=True)
    (RESULTS / "rckd").mkdir(parents=True)
    for name in SHOWN:
        shutil.copyfile(study / "figures" / name, RESULTS / "rckd" / name)
    show_nuclei(segmenter, nuclei, RESULTS / "rckd" / "nuclei.jpg")


if __name__ == "__main__":
    main()
