"""What early exit saves: an ONNX file per exit against one file of the whole network, on a run's own test images.

    python benchmarks/early_exit.py RUN OUT.json [--loss 0.01]

RUN is a finished run of a network with exits. Timed side by side in ONNX Runtime on real images, one at a time and 16
at once: the whole network in one file; the segments with nobody leaving, which is what the cut costs; and the segments
with the threshold that was fitted on validation. With early exit the mean counts: the median is one exit's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from histill.data.decode import load
from histill.deploy import export, latency, open_model
from histill.deploy.early_exit import open_exits
from histill.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--loss", type=float, default=0.01)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    run = Run.open(arguments.run)
    data = run.data
    rows = data.rows("test")
    order = np.random.default_rng(0).permutation(rows)  # a table in order of classes would time one class first
    images = np.stack([load(data.root / data.frame["path"][row], run.image_size) for row in order])
    with tempfile.TemporaryDirectory() as folder:
        whole = export(run, Path(folder) / "whole.onnx").files["onnx"]
        early = export(run, Path(folder) / "exits", early_exit=arguments.loss).files["exits"]
        leaving = open_exits(Path(folder) / "exits")
        models = {
            "whole": open_model(Path(folder) / "whole.onnx"),
            "segments, nobody leaves": replace(leaving, threshold=float("inf")),
            "segments, early exit": leaving,
        }
        sizes = {
            "whole": (Path(folder) / "whole.onnx").stat().st_size,
            "segments": sum(file.stat().st_size for file in (Path(folder) / "exits").glob("*.onnx")),
        }
        shown = dict.fromkeys(models, images)
        times: dict[str, Any] = {
            f"batch {batch}": latency(models, batch=batch, repeats=400, seconds=arguments.seconds, images=shown)
            for batch in (1, 16)
            if len(images) >= batch
        }
        exits = leaving.leave(images)[1]
    found = {
        "command": "python benchmarks/early_exit.py RUN OUT.json",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "run": {key: run.info[key] for key in ("image_size", "parameters", "commit")}
        | {"recipe": run.info["recipe"].get("name"), "data": run.info["data"]["hash"]},
        "loss": arguments.loss,
        "threshold": early["threshold"],
        "macs": early["macs"],
        "leaving": [float((exits == k).mean()) for k in range(1, len(early["macs"]["exits"]) + 1)],
        "accuracy": {"whole": whole.get("accuracy"), "early exit": early.get("accuracy")},
        "max_abs_diff": {"whole": whole["max_abs_diff"], "segments": early["max_abs_diff"]},
        "file_bytes": sizes,
        "times": times,
    }
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    for batch, rows_ in times.items():
        for name, row in rows_.items():
            print(f"{batch:9} {name:24} mean {row['mean_ms']:8.2f} ms, median {row['latency_ms']['median']:8.2f} ms")


if __name__ == "__main__":
    main()
