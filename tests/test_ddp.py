"""Two processes that share each batch end where one does."""

from __future__ import annotations

import os
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
from histill.data import Images
from histill.experiment import Experiment
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


if __name__ == "__main__":
    work(Path(sys.argv[1]))
