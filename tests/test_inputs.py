"""What a student is shown in a training step, where that is more than the batch's images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SIZE, Counting, Tiny, experiment, no_page, table
from torch import Tensor
from torch.nn import functional as F

import histill as hs
from histill.data import pack
from histill.errors import BadInput
from histill.types import Batch, Outputs, Terms


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


def darkened(batch: Batch, teacher: Outputs) -> Tensor:
    """The images, and the images as dark as the teacher is sure."""
    return torch.cat([batch.images, batch.images * teacher["logits"].softmax(1).amax(1)[:, None, None, None]])


def halves(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    plain, dark = student["logits"].chunk(2)
    return {
        "plain": (0.25, F.cross_entropy(plain, batch.labels)),
        "dark": (0.75, F.cross_entropy(dark, batch.labels)),
    }


def test_the_objective_gets_the_outputs_of_all_that_was_shown(tmp_path: Path) -> None:
    data, teacher = table(tmp_path / "data"), Counting()
    shown = experiment(data, teacher=teacher, inputs=darkened, objective=halves, batch_size=100, epochs=1)
    run = hs.train(shown, tmp_path / "run", precision="32-true")
    torch.manual_seed(0)
    network = Tiny().requires_grad_(False)
    packed = pack(data, SIZE)
    batch = packed.batch(np.array(packed.images.rows("train")))
    sure = teacher(batch)["logits"].softmax(1).amax(1)
    plain, dark = (
        F.cross_entropy(network(images)["logits"], batch.labels)
        for images in (batch.images, batch.images * sure[:, None, None, None])
    )
    assert run.log["raw/plain"][0] == pytest.approx(float(plain), rel=1e-5)
    assert run.log["raw/dark"][0] == pytest.approx(float(dark), rel=1e-5)
    assert run.log["loss"][0] == pytest.approx(0.25 * float(plain) + 0.75 * float(dark), rel=1e-5)


def test_a_killed_run_does_not_go_on_with_other_inputs(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    hs.train(experiment(data, teacher=Counting(), inputs=darkened, objective=halves), tmp_path / "run")
    record = (tmp_path / "run" / "run.json").read_text()
    assert "darkened" in record
    (tmp_path / "run" / "run.json").write_text(record.replace('"finished"', '"running"'))
    with pytest.raises(BadInput, match="inputs"):
        hs.train(experiment(data, teacher=Counting(), objective=halves), tmp_path / "run", resume=True)
