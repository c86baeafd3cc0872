"""RCKD against random weights and supervised pretraining on oral cancer: `histill study rckd`, Table 3, CSAT.

    python benchmarks/oral.py DATA SCARCE OUT

DATA is the folder of oral_oscc (``labels.csv``; images of 224 px, normal and cancer). Those of 400x are taken; blocks
of ten file numbers stand for patients, whom nobody published. SCARCE is the folder of ``benchmarks/scarce.py``: its
unlabelled tiles of lung and colon, its nucleus segmenter, its labelled lung and colon for supervised pretraining. 200
labels are learnt from, splits are drawn anew for each of three repeats (20 % validation, 25 % test, by block), the
epoch is chosen on validation. The study's page and ``summary.json`` go to OUT; its figures to
benchmarks/results/oral.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pandas as pd

from histill.cli import run
from histill.files import write_json

RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, str] = {
    **{"val": "0.2", "test": "0.25", "labels": "200", "tables": "3", "networks": "CSAT"},
    **{
        "methods": "random supervised rckd",
        "seeds": "3",
        "image-size": "128",
        "epochs": "30",
        "batch-size": "16",
        "optimizer": "adamw",
        "lr": "1e-3",
    },
    **{"schedule": "cosine", "patience": "30", "select": "balanced_accuracy", "pretrain-image-size": "128"},
    **{"pretrain-epochs": "10", "pretrain-batch-size": "32", "teacher-scale": "1", "pseudo": "instances"},
    "rckd-optimizer": "adamw",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "scarce", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    data, scarce, out = (path.resolve() for path in (arguments.data, arguments.scarce, arguments.out))
    table = pd.read_csv(data / "labels.csv")
    table = table[table["magnification"] == "400x"]
    manifest = out / "images" / "oral.csv"
    for file in table["file"]:
        (out / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / file, out / "images" / file)
    rows = {"path": table["file"], "label": table["label"], "patient": table["group"]}
    pd.DataFrame(rows).to_csv(manifest, index=False)
    words = ["--data", str(manifest), "--unlabelled", str(scarce / "unlabelled")]
    words += ["--teacher", str(scarce / "segmenter"), "--labelled", str(scarce / "lung_colon" / "manifest.csv")]
    words += [word for name, values in SETTINGS.items() for value in values.split() for word in (f"--{name}", value)]
    if run(["study", "rckd", *words, "--out", str(out / "study")]):
        raise SystemExit(1)
    summary = json.loads((out / "study" / "summary.json").read_text())
    write_json(RESULTS / "oral.json", {"command": "python benchmarks/oral.py DATA SCARCE OUT", **summary})


if __name__ == "__main__":
    main()
