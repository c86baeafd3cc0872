"""Two processes that share each batch end where one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_classes
from PIL import Image
from safetensors.torch import load_file
from tiny import Counting, Normed, both, experiment, no_page, table
from torch.nn import functional as F

import histill as hs
from histill.cli import run
from histill.data import Images
from histill.experiment import Experiment
from histill.machine import _processes
from histill.types import Batch, Outputs, Terms

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed part")


def experiments(data: Images) -> dict[str, Experiment]:
    """24 training images in batches of 7: the last has three, two of two processes and two parts get one or none."""
    kind: dict[str, Any] = {"objective": both, "teacher": Counting(), "batch_size": 7, "epochs": 3}
    return {
        "plain": experiment(data, **kind),
        "accumulated": experiment(data, **kind, accumulate=2),
        "cached": experiment(data, **kind, views=1, clip=0.5, ema=0.5, select="loss"),
        "unused": experiment(data, **kind | {"objective": headless}, accumulate=2),
    }


def headless(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    """Leaves the student's last layer unused."""
    return {"hint": (1.0, F.mse_loss(student["pooled"], teacher["logits"].repeat(1, 2)[:, :3]))}


def stopping(data: Images) -> Experiment:
    """Each process has its own batch norms, and one must not stop before the other."""
    wild = partial(torch.optim.SGD, lr=3.0)
    return experiment(data, student=partial(Normed, classes=2), epochs=12, patience=2, select="loss", optimizer=wild)


def work(root: Path) -> None:
    import histill.evaluate.finish

    histill.evaluate.finish.finish = no_page
    data = table(root / "data")
    for name, made in experiments(data).items():
        hs.train(made, root / "two" / name, device="cpu", precision="32-true")
    hs.train(stopping(data), root / "two" / "stopping", device="cpu")
    hs.train(stopping(data), root / "two" / "stopping", device="cpu", resume=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ddp")
    grey = next((write_classes(root / "data", {"benign": 20, "malignant": 20}) / "benign").iterdir())
    Image.open(grey).convert("L").save(grey)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        str(root),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HISTILL_CACHE": str(root / "cache")}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "stderr").write_text(done.stderr)
    return root


@pytest.mark.parametrize("name", ["plain", "accumulated", "cached", "unused"])
def test_two_processes_end_at_the_weights_of_one(root: Path, tmp_path: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)
    alone = hs.train(experiments(table(root / "data"))[name], tmp_path / name, precision="32-true")
    two = root / "two" / name
    for key, value in load_file(alone.path / "model.safetensors").items():
        assert torch.allclose(value, load_file(two / "model.safetensors")[key], atol=1e-6), key
    together = hs.Run(two, {}, alone.build)
    columns = [c for c in alone.log if c != "images_per_second"]
    np.testing.assert_allclose(together.log[columns], alone.log[columns], rtol=1e-5)
    np.testing.assert_allclose(together.predictions["prob_benign"], alone.predictions["prob_benign"], atol=1e-6)


def test_they_stop_together(root: Path) -> None:
    log = hs.Run(root / "two/stopping", {}, Normed).log
    assert 3 <= len(log) < 12
    best = int(log["val/loss"].idxmin())
    assert len(log) == best + 3


def test_one_of_them_speaks(root: Path) -> None:
    # Five runs, each with a notice; the sixth is finished already.
    assert (root / "stderr").read_text().count("1 images of another mode were converted to RGB") == 5


RECIPE = """
import histill.evaluate.finish
from tiny import Counting, both, experiment, no_page
from histill.experiment import recipe

histill.evaluate.finish.finish = no_page

@recipe
def student(data, *, seed: int = 0):
    return experiment(data, objective=both, teacher=Counting(), batch_size=7, epochs=3, accumulate=2, seed=seed)
"""


def end_of(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(out / "model.safetensors"))


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """``histill train`` of 24 images in batches of 7 and parts of 4 and 3, and what one process makes of it."""
    root = tmp_path_factory.mktemp("command")
    table(root / "data")
    (root / "mine.py").write_text(RECIPE)
    arguments = ["train", f"{root / 'mine.py'}:student", "--data", str(root / "data"), "--precision", "32-true"]
    launch = [sys.executable, "-m", "histill", *arguments, "--out", str(root / "alone")]
    done = subprocess.run(launch, env=surroundings(root), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return arguments, root


def surroundings(root: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK"))}
    own = {"OMP_NUM_THREADS": "1", "HISTILL_CACHE": str(root / "cache"), "PYTHONPATH": str(Path(__file__).parent)}
    return kept | own


def check_same_end(root: Path, name: str) -> None:
    alone, two = end_of(root / "alone"), end_of(root / name)
    for key, value in alone.items():
        assert torch.allclose(value, two[key], atol=1e-6), key
    info = [json.loads((root / folder / "run.json").read_text()) for folder in ("alone", name)]
    assert [i["processes"] for i in info] == [1, 2]
    assert {i["status"] for i in info} == {"finished"}


@pytest.mark.slow
def test_the_command_under_torchrun(command: tuple[list[str], Path]) -> None:
    arguments, root = command
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch = [*torchrun, "-m", "histill", *arguments, "--out", str(root / "two")]
    done = subprocess.run(launch, env=surroundings(root), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_end(root, "two")
    assert done.stderr.count("report.html") == 1, "one of them speaks"


def slurm(rank: int, port: int) -> dict[str, str]:
    """The variables of task ``rank`` of ``srun --ntasks 2`` on one machine, in a job of four tasks a node."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "interactive", "SLURM_NNODES": "1"}
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}
    return step | job | place | {"MASTER_PORT": str(port)}


@pytest.mark.slow
def test_the_command_under_srun(command: tuple[list[str], Path]) -> None:
    """Not Slurm itself, but two processes with the variables that it sets."""
    arguments, root = command
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "histill", *arguments, "--out", str(root / "slurm")]
    tasks = [
        subprocess.Popen(launch, env=surroundings(root) | slurm(rank, port), stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    check_same_end(root, "slurm")
    assert [text.count("report.html") for text in said] == [1, 0]


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, (1, 1, "LightningEnvironment")),
        # A batch script is one process, however many tasks the job has.
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "0"}, (1, 1, "LightningEnvironment")),
        ({**slurm(1, 1), "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, (8, 4, "SLURMEnvironment")),
        ({**slurm(1, 1), "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}, (6, 3, "TorchElasticEnvironment")),
    ],
)
def test_who_started_the_processes(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: tuple[int, int, str]
) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name.endswith("WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    world, local, environment = _processes()
    assert (world, local, type(environment).__name__) == found


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill", "dsnet", "--data", "x"], "histill train"),
        (["cache", "dsnet.student", "--data", "x"], "histill train"),
        (["train", "dsnet.student", "--slides", "x.svs", "--masks", "y"], "histill tiles"),
    ],
)
def test_what_many_processes_cannot_share_is_refused(
    tmp_path: Path, monkeypatch: Any, capsys: Any, name: str, arguments: list[str], said: str
) -> None:
    monkeypatch.setenv(name, "2")
    assert run([*arguments, *(["--out", str(tmp_path / "out")] if arguments[0] != "cache" else [])]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
