"""The papers' sets of experiments on real images, at a size that two cores train.

    python benchmarks/studies.py dsnet DATA OUT

DATA holds the image folders named in `TASKS`, each with a ``labels.csv`` (file, label, split, group), and
``imagenet_mobilenet`` (ImageNet weights of MobileNet). A teacher that starts from those weights is trained first where
the task names one; then `histill study NAME` runs. The summary, with task, settings and versions, goes to
benchmarks/results/study-NAME.json, the tables to study-NAME.txt, the figures without images into the folder study-NAME.

What the settings were chosen by is in benchmarks/LOG.md; none was chosen on test images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent / "results"
HISTILL = Path(sys.executable).parent / "histill"


@dataclass(frozen=True)
class Task:
    """One study on one data set.

    Attributes:
        images: the folder in DATA.
        labels: the classes that are taken (none: all).
        split: keep the data's own test images; otherwise the study draws its splits by group.
        flags: of `histill study`; WEIGHTS stands for the file of ImageNet weights.
        teacher: flags of `histill train NAME.teacher`, where the study does not train its teacher itself; it starts
            from the ImageNet weights.
        network: whose ImageNet weights these are, by timm's name.
        study: its name, where the task has another.
        other: a second folder in DATA, for what is learnt before; OTHER stands for it in the flags.
    """

    images: str
    flags: str
    labels: tuple[str, ...] = ()
    split: bool = True
    teacher: str = ""
    network: str = ""
    study: str = ""
    other: str = ""


PUBLISHED = {
    "mobilenetv1_100": "mobilenet_v1_1.0_224_quant_embedding_extractor.npz",
    "mobilenetv2_100": "mobilenet_v2_1.0_224_quant.npz",
}

SHOW_IMAGES = ("gallery*", "attention*")
"""Figures that show the images themselves, which are not ours to publish; they stay in OUT."""

LUNG = ("lung_aca", "lung_n", "lung_scc")
MAC = "--val 0.2 --background lung_n --image-size 80 --epochs 5 --batch-size 16 --lr 3e-4 --weights none"

TASKS = {
    "dsnet": Task(
        "isic_derm",
        labels=("melanoma", "nevus"),
        flags="--val 0.2 --positive melanoma --image-size 80 --epochs 20 --weights none "
        "--networks resnet50 resnet101 inception_v3 efficientnet_b0 mobilenet_v1 dsnet",
        network="mobilenetv1_100",
        teacher="--network mobilenet_v1 --val 0.2 --positive melanoma --image-size 128 --epochs 12 --batch-size 32 "
        "--lr 3e-4",
    ),
    "dsnet-notebook": Task(
        "isic_derm",
        labels=("melanoma", "nevus"),
        flags="--val 0.2 --seeds 3 --positive melanoma --image-size 80 --epochs 20 --weights none "
        "--temperatures 10 --networks dsnet --batch-sizes 32",
        network="mobilenetv1_100",
        teacher="--network mobilenet_v1 --val 0.2 --positive melanoma --image-size 128 --epochs 12 --batch-size 32 "
        "--lr 3e-4",
        study="dsnet",
    ),
    "mac-resnet": Task("lc25000", labels=LUNG, flags=f"{MAC} --tables 4 5 6", study="mac-resnet"),
    "mac-resnet-distilled": Task(
        "lc25000", labels=LUNG, flags=f"{MAC} --tables distilled --seeds 3", study="mac-resnet"
    ),
    "mac-resnet-blocks": Task("lc25000", labels=LUNG, flags=f"{MAC} --tables 1 2 3 ladder", study="mac-resnet"),
    "multi-exit": Task(
        "herlev",
        flags="--val 0.2 --seeds 3 --image-size 64 --epochs 10 --batch-size 16 --lr 0.01 --pretrain-data OTHER "
        "--pretrain-epochs 6 --tables 3 4 --precision 32-true",
        other="lc25000",
        network="mobilenetv2_100",
        teacher="--network mobilenetv2_100 --val 0.2 --image-size 128 --epochs 20 --batch-size 32 --lr 0.01 "
        "--precision 32-true",
    ),
    "multi-exit-methods": Task(
        "herlev",
        flags="--val 0.2 --seeds 3 --image-size 64 --epochs 10 --batch-size 16 --lr 0.01 --tables 5 "
        "--precision bf16-mixed",
        network="mobilenetv2_100",
        teacher="--network mobilenetv2_100 --val 0.2 --image-size 128 --epochs 20 --batch-size 32 --lr 0.01 "
        "--precision bf16-mixed",
        study="multi-exit",
    ),
    "methods": Task(
        "lc25000",
        flags="--val 0.2 --seeds 3 --student resnet10t --weights none --image-size 48 --epochs 6 --batch-size 32 "
        "--views 4 --precision 32-true",
        network="mobilenetv2_100",
        teacher="--network mobilenetv2_100 --val 0.2 --image-size 96 --epochs 20 --batch-size 32 --lr 0.01 "
        "--precision 32-true",
    ),
    "kd-convnext": Task(
        "lc25000",
        labels=LUNG,
        split=False,
        flags="--val 0.1 --test 0.1 --seeds 3 --image-size 64 --epochs 16 --batch-size 16 --network convnext_atto "
        "--weights none --teacher-network mobilenetv2_100 --teacher-weights WEIGHTS --teacher-epochs 10 "
        "--networks tf_efficientnetv2_b0 --alphas 0 0.5 1 --betas 0.5 1 2 "
        "--precision 32-true",
        network="mobilenetv2_100",
    ),
    "kd-convnext-repeats": Task(
        "lc25000",
        labels=LUNG,
        split=False,
        flags="--val 0.1 --test 0.1 --seeds 5 --image-size 64 --epochs 16 --batch-size 16 --network convnext_atto "
        "--weights none --teacher-network mobilenetv2_100 --teacher-weights WEIGHTS --teacher-epochs 10 "
        "--tables 2 --precision bf16-mixed",
        network="mobilenetv2_100",
        study="kd-convnext",
    ),
    "kd-convnext-networks": Task(
        "lc25000",
        labels=LUNG,
        split=False,
        flags="--val 0.1 --test 0.1 --seeds 1 --image-size 64 --epochs 16 --batch-size 16 --network convnext_atto "
        "--weights none --teacher-network mobilenetv2_100 --teacher-weights WEIGHTS --teacher-epochs 10 "
        "--networks tf_efficientnetv2_b0 davit_tiny coatnet_nano_rw_224 --tables 7 "
        "--precision bf16-mixed",
        network="mobilenetv2_100",
        study="kd-convnext",
    ),
}


def manifest(task: Task, source: Path, out: Path) -> Path:
    """The task's images, copied, and their manifest; a group is a patient."""
    table = pd.read_csv(source / "labels.csv")
    table = table[table["split"].isin(["train", "test"])]
    if task.labels:
        table = table[table["label"].isin(task.labels)]
    table = table.rename(columns={"file": "path", "group": "patient"})
    table = table[["path", "label", "patient", *(["split"] if task.split else [])]]
    for path in table["path"]:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, out / path)
    table.to_csv(out / "manifest.csv", index=False)
    return out / "manifest.csv"


def call(*words: object) -> str:
    """Run a command; its progress is shown, what it prints is returned."""
    return subprocess.run([str(w) for w in words], check=True, text=True, stdout=subprocess.PIPE).stdout


def imagenet(task: Task, data: Path, table: Path, out: Path) -> Path:
    """The ImageNet weights of the task's network."""
    weights = out / f"{task.network}.safetensors"
    if not weights.exists():
        convert = Path(__file__).parent / "mobilenet_weights.py"
        published = data / "imagenet_mobilenet" / PUBLISHED[task.network]
        call(sys.executable, convert, published, task.network, table.parent, weights)
    return weights


def trained_teacher(name: str, task: Task, table: Path, weights: Path, out: Path) -> list[str]:
    """``--teacher RUN``, trained from ImageNet weights."""
    run = out / "teacher"
    if not (run / "run.json").exists():
        call(
            HISTILL,
            "train",
            f"{name}.teacher",
            "--data",
            table,
            "--out",
            run,
            "--weights",
            weights,
            *task.teacher.split(),
        )
    elif json.loads((run / "run.json").read_text())["status"] != "finished":
        call(HISTILL, "train", "--out", run, "--resume")
    return ["--teacher", str(run)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=TASKS)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    name, data, out = arguments.name, arguments.data, arguments.out
    task = TASKS[name]
    table = manifest(task, data / task.images, out / "images")
    weights = imagenet(task, data, table, out) if task.network else Path()
    teacher = trained_teacher(task.study or name, task, table, weights, out) if task.teacher else []
    words = {"WEIGHTS": str(weights)}
    if task.other:
        words["OTHER"] = str(manifest(Task(task.other, ""), data / task.other, out / "other"))
    flags = [words.get(word, word) for word in task.flags.split()]
    study = out / "study"
    tables = call(HISTILL, "study", task.study or name, "--data", table, "--out", study, *teacher, *flags)
    RESULTS.mkdir(exist_ok=True)
    first = next(iter(sorted(study.glob("runs/*/run.json"))))
    info = json.loads(first.read_text())
    shown = {
        "command": f"python benchmarks/studies.py {name} DATA OUT",
        "images": task.images,
        "classes": info["classes"],
        "settings": {"study": task.flags, "teacher": task.teacher, "teacher_weights": task.network or None},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": info["device"]},
        "precision": info["precision"],
        "versions": info["versions"],
        "commit": info["commit"],
        "data": {key: info["data"][key] for key in ("images", "patients", "hash", "split_hash")},
        "selection": info["selection"]["rule"],
        **json.loads((study / "summary.json").read_text()),
    }
    (RESULTS / f"study-{name}.json").write_text(json.dumps(shown, indent=1) + "\n")
    (RESULTS / f"study-{name}.txt").write_text(tables[: tables.rfind("\nreport:")] + "\n")
    pictures = RESULTS / f"study-{name}"
    shutil.rmtree(pictures, ignore_errors=True)
    shutil.copytree(study / "figures", pictures, ignore=shutil.ignore_patterns(*SHOW_IMAGES))


if __name__ == "__main__":
    main()
