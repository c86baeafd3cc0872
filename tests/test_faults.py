"""A disk that fills and a person who interrupts: one line, and nothing that was done is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from conftest import MakeFolder

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from histill.cli import main
main(sys.argv[2:])
"""


def listen() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(data: Path, out: Path, *more: str) -> list[str]:
    flags = ["--image-size", "32", "--batch-size", "8", "--val", "0.25", "--test", "0.25"]
    return ["train", "dsnet.student", "--data", str(data), "--out", str(out), *flags, *more]


def test_a_disk_that_fills_is_one_line_and_the_run_goes_on_when_there_is_room(
    folder: MakeFolder, tmp_path: Path
) -> None:
    data, out = folder({"benign": 12, "malignant": 12}), tmp_path / "run"
    command = [sys.executable, "-c", LIMITED, "100000", *train(data, out, "--epochs", "1")]
    full = subprocess.run(command, capture_output=True, text=True, check=False)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    last = full.stderr.strip().splitlines()[-1]
    assert "cannot write" in last
    assert "checkpoint.pt" in last
    assert "disk full" in last
    assert not (out / "checkpoint.pt").exists()
    assert not list(out.glob(".*.tmp"))
    again = [sys.executable, "-m", "histill", "train", "--out", str(out), "--resume"]
    assert subprocess.run(again, capture_output=True, check=False).returncode == 0
    assert (out / "model.safetensors").exists()


def test_an_interrupted_run_says_so_and_can_go_on(folder: MakeFolder, tmp_path: Path) -> None:
    data, out = folder({"benign": 12, "malignant": 12}), tmp_path / "run"
    command = [sys.executable, "-m", "histill", *train(data, out, "--epochs", "4000")]
    # A shell that runs this suite in the background has Ctrl-C ignored, and children inherit that.
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 60
    while not (out / "log.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said
    assert "--resume" in said.strip().splitlines()[-1]
    assert len(pd.read_csv(out / "log.csv")) >= 1
    assert not list(out.glob(".*.tmp"))
