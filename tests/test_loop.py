"""The training loop against gradient descent written out by hand."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny import SIZE, Counting, Normed, Tiny, both, everything, experiment, hard, no_page, table
from torch import Tensor, nn
from torch.nn import functional as F

import histill as hs
from histill.data import Images, pack
from histill.errors import BadInput, Failed
from histill.experiment import Experiment
from histill.learner import Average
from histill.run import Run
from histill.schedules import cosine, steps, warmup
from histill.types import Batch, Outputs, Terms


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data")


def weights(run: Run) -> dict[str, Tensor]:
    return load_file(run.path / "model.safetensors")


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def descent(data: Images, steps: int, lr: float, seed: int = 0) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Full-batch gradient descent without the library's loop: the weights from the first to the last, and losses."""
    torch.manual_seed(seed)
    network = Tiny()
    packed = pack(data, SIZE)
    rows = np.array(packed.images.rows("train"))
    batch = packed.batch(rows)
    history, losses = [{k: v.clone() for k, v in network.state_dict().items()}], []
    for _ in range(steps):
        loss = F.cross_entropy(network(batch.images)["logits"], batch.labels)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(network.parameters(), gradients):
                weight -= lr * gradient
        history.append({k: v.clone() for k, v in network.state_dict().items()})
        losses.append(float(loss.detach()))
    return history, losses


# Same experiment, same bits


def test_the_same_experiment_gives_the_same_bits(data: Images, tmp_path: Path) -> None:
    runs = [hs.train(everything(data, tmp_path / f"cache{i}"), tmp_path / f"run{i}") for i in (0, 1)]
    for file in ("model.safetensors", "predictions.parquet"):
        assert (runs[0].path / file).read_bytes() == (runs[1].path / file).read_bytes()
    logs = [run.log.drop(columns="images_per_second") for run in runs]
    pd.testing.assert_frame_equal(*logs, check_exact=True)


def test_the_state_of_the_process_changes_nothing(data: Images, tmp_path: Path) -> None:
    one = hs.train(everything(data, tmp_path / "cache0"), tmp_path / "one")
    torch.manual_seed(123)
    torch.rand(17)
    other = hs.train(everything(data, tmp_path / "cache1"), tmp_path / "other")
    assert apart(weights(one), weights(other)) == 0


@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 0.4}])
def test_another_seed_or_learning_rate_gives_other_weights(data: Images, tmp_path: Path, change: Any) -> None:
    if "lr" in change:
        change = {"optimizer": partial(torch.optim.SGD, **change)}
    one = hs.train(experiment(data), tmp_path / "one")
    other = hs.train(experiment(data, **change), tmp_path / "other")
    assert apart(weights(one), weights(other)) > 1e-4


# Arithmetic


def test_a_step_is_gradient_descent_on_the_mean_over_the_batch(data: Images, tmp_path: Path) -> None:
    history, losses = descent(data, 3, lr=0.5)
    run = hs.train(experiment(data, batch_size=100, epochs=3), tmp_path / "run", precision="32-true")
    assert apart(weights(run), history[-1]) < 1e-6
    assert run.log["raw/hard"].tolist() == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(data: Images, tmp_path: Path, accumulate: int) -> None:
    # 24 training images in batches of 7: the last has three, which 2 and 8 do not divide.
    kind: dict[str, Any] = {"objective": both, "teacher": Counting(), "batch_size": 7}
    whole = hs.train(experiment(data, **kind), tmp_path / "whole", precision="32-true")
    cut = hs.train(experiment(data, **kind, accumulate=accumulate), tmp_path / "cut", precision="32-true")
    assert apart(weights(whole), weights(cut)) < 1e-6
    np.testing.assert_allclose(whole.log["loss"], cut.log["loss"], rtol=1e-5)


def test_a_clipped_step_is_as_long_as_the_clip(data: Images, tmp_path: Path) -> None:
    kind: dict[str, Any] = {"batch_size": 100, "epochs": 1, "optimizer": partial(torch.optim.SGD, lr=1.0)}
    history, _ = descent(data, 1, lr=1.0)
    free = {name: history[1][name] - history[0][name] for name in history[0]}
    norm = math.sqrt(sum(float((step**2).sum()) for step in free.values()))
    run = hs.train(experiment(data, **kind, clip=norm / 4), tmp_path / "run", precision="32-true")
    assert all(torch.allclose(now - history[0][name], free[name] / 4, atol=1e-6) for name, now in weights(run).items())


def test_the_moving_average_follows_its_recursion(data: Images, tmp_path: Path) -> None:
    history, _ = descent(data, 4, lr=0.5)
    mean = history[0]
    for step, now in enumerate(history[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        mean = {name: decay * mean[name] + (1 - decay) * now[name] for name in mean}
    run = hs.train(experiment(data, batch_size=100, epochs=4, ema=0.3), tmp_path / "run", precision="32-true")
    assert apart(weights(run), mean) < 1e-6
    assert apart(weights(run), history[-1]) > 1e-4


def test_terms_weights_and_their_weighted_sum_are_logged(data: Images, tmp_path: Path) -> None:
    log = hs.train(experiment(data, objective=partial(both, alpha=0.25), teacher=Counting()), tmp_path / "run").log
    assert list(log.columns) == [
        *("epoch", "lr", "images_per_second", "loss", "raw/hard", "raw/soft", "weight/hard", "weight/soft"),
        *("val/loss", "val/accuracy", "val/balanced_accuracy", "val/auroc"),
    ]
    assert log["epoch"].tolist() == [0, 1]
    assert set(log["weight/hard"]) == {0.25}
    assert set(log["weight/soft"]) == {2.0}
    np.testing.assert_allclose(log["loss"], 0.25 * log["raw/hard"] + 2 * log["raw/soft"], rtol=1e-12)
    assert (log["images_per_second"] > 0).all()


@pytest.mark.parametrize("schedule", [cosine(3), warmup(2, cosine(3)), steps([1, 2])])
def test_the_optimiser_follows_the_schedule(data: Images, tmp_path: Path, schedule: Any) -> None:
    run = hs.train(experiment(data, epochs=3, schedule=schedule), tmp_path / "run")
    # Three batches of 8 to an epoch; the log has the rate of the last.
    assert run.log["lr"].tolist() == pytest.approx([0.5 * schedule(epoch + 2 / 3) for epoch in range(3)], rel=1e-12)


def test_an_image_left_over_does_not_stop_batch_norm(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    rows = len(data.rows("train"))
    run = hs.train(
        experiment(data, student=partial(Normed, classes=2), batch_size=rows - 1, optimizer=torch.optim.SGD),
        tmp_path / "run",
    )
    assert np.isfinite(run.log["loss"]).all()


def test_an_objectives_own_weights_are_trained_and_not_shipped(data: Images, tmp_path: Path) -> None:
    torch.manual_seed(5)
    objective = Projected()
    before = objective.project.weight.detach().clone()
    run = hs.train(experiment(data, objective=objective, teacher=Counting()), tmp_path / "run", keep_checkpoint=True)
    learner = torch.load(run.path / "checkpoint.pt", weights_only=True)["learner"]
    trained = learner["objective.project.weight"]
    assert (trained - before).abs().max() > 1e-4
    assert torch.equal(objective.project.weight, before), "the experiment itself stays as it was made"
    assert weights(run).keys() == Tiny().state_dict().keys()
    assert {name.split(".")[0] for name in learner} == {"student", "objective"}


class Projected(nn.Module):
    """An objective with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 2)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
        return {
            "hard": (1.0, F.cross_entropy(student["logits"], batch.labels)),
            "hint": (1.0, F.mse_loss(self.project(student["pooled"]), teacher["logits"])),
        }


class Still(Normed):
    """Comes in evaluation mode, as a network does whose maker has tried it."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()


def test_a_network_trains_in_training_mode_in_every_epoch(data: Images, tmp_path: Path) -> None:
    run = hs.train(experiment(data, student=partial(Still), epochs=3), tmp_path / "run")
    assert weights(run)["norm.num_batches_tracked"] == 3 * 3  # 24 images in batches of 8


def test_an_average_follows_a_batch_norms_count() -> None:
    student = Normed().train()
    average = Average(student, 0.9, torch.device("cpu"))
    for step in range(4):
        student(torch.rand(4, 3, SIZE, SIZE))
        average.update(student, step)
    assert average.network.state_dict()["norm.num_batches_tracked"] == 4


SHOWN: list[list[int]] = []


def remembering(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    SHOWN.append(batch.ids.tolist())
    return hard(student, teacher, batch)


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(data: Images, tmp_path: Path) -> None:
    orders = []
    for seed in (0, 1):
        SHOWN.clear()
        hs.train(experiment(data, objective=remembering, epochs=3, seed=seed), tmp_path / str(seed))
        assert [len(part) for part in SHOWN] == 9 * [8]
        orders += [[one for part in SHOWN[epoch : epoch + 3] for one in part] for epoch in (0, 3, 6)]
    assert all(sorted(order) == sorted(data.rows("train")) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


# Which epoch is kept


@pytest.mark.parametrize("select", ["balanced_accuracy", "accuracy", "auroc", "loss", "last"])
def test_the_epoch_is_kept_that_the_log_says(data: Images, tmp_path: Path, select: str) -> None:
    # A rate rather too high for it: the figures go up and down, and every image has its own.
    kind: dict[str, Any] = {"epochs": 6, "seed": 1, "student": partial(Tiny, classes=2, width=16)}
    kind |= {"optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9)}
    run = hs.train(experiment(data, **kind, select=select), tmp_path / "run")
    log = run.log
    value = {"last": log["epoch"], "loss": -log["val/loss"]}.get(select, log.get(f"val/{select}"))
    best = max(range(6), key=lambda e: (value[e], -log["val/loss"][e], -e))
    assert run.info["selection"]["epoch"] == best
    table = run.predictions
    val = table[table["split"] == "val"]
    assert (val["prediction"] == val["label"]).mean() == pytest.approx(log["val/accuracy"][best])
    table["loss"] = -np.log(np.where(table["label"] == "benign", table["prob_benign"], table["prob_malignant"]))
    loss = table.groupby("split")["loss"].mean()
    assert loss["val"] == pytest.approx(log["val/loss"][best], abs=1e-9)
    assert loss["test"] != pytest.approx(loss["val"], rel=0.1)  # or nobody could tell which split chose the epoch
    network = run.build()
    network.load_state_dict(weights(run))
    packed = pack(data, SIZE)
    rows = np.array(packed.images.rows("test"))
    with torch.no_grad():
        p = network(packed.batch(rows).images)["logits"].softmax(1)
    np.testing.assert_allclose(table[table["split"] == "test"]["prob_malignant"], p[:, 1], atol=1e-6)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_last_epochs_predictions_are_kept_beside_those_of_the_best(
    data: Images, tmp_path: Path, ema: float | None
) -> None:
    kind: dict[str, Any] = {"epochs": 6, "ema": ema, "seed": 1, "student": partial(Tiny, classes=2, width=16)}
    kind |= {"optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9)}
    chosen = hs.train(experiment(data, **kind, select="loss"), tmp_path / "chosen")
    last = hs.train(experiment(data, **kind, select="last"), tmp_path / "last")
    pd.testing.assert_frame_equal(chosen.last, last.predictions)
    pd.testing.assert_frame_equal(last.last, last.predictions)
    assert chosen.info["selection"]["epoch"] < 5
    assert not chosen.last.equals(chosen.predictions)
    assert chosen.last["prob_benign"].nunique() == len(chosen.last)  # its neurons are alive


def test_training_stops_when_nothing_gets_better(data: Images, tmp_path: Path) -> None:
    still = partial(torch.optim.SGD, lr=0.0)
    run = hs.train(experiment(data, epochs=9, patience=3, select="loss", optimizer=still), tmp_path / "run")
    assert len(run.log) == run.info["epochs_run"] == 4
    assert run.info["selection"]["epoch"] == 0


def test_a_figure_that_validation_cannot_give_does_not_lose_the_weights(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    frame = data.frame.copy()
    frame.loc[(frame["split"] == "val") & (frame["label"] == "benign"), "split"] = "train"
    run = hs.train(experiment(data.with_frame(frame), select="auroc", teacher=Counting()), tmp_path / "run")
    assert run.log["val/auroc"].isna().all()
    assert run.info["teacher"]["validation"]["auroc"] is None
    assert weights(run).keys() == Tiny().state_dict().keys()


# What goes wrong


def nan_later(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    bad = student["logits"].sum() * (math.nan if 3 in batch.ids.tolist() else 1.0)
    return {"fine": (1.0, student["logits"].square().mean()), "ratio": (0.1, bad)}


def test_a_loss_that_is_not_finite_stops_with_its_name(data: Images, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"the loss term 'ratio' is nan in epoch 0 step \d"):
        hs.train(experiment(data, objective=nan_later), tmp_path / "run")
    assert not (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_weights_that_explode_are_named_by_their_loss(data: Images, tmp_path: Path, clip: float | None) -> None:
    wild = experiment(data, optimizer=partial(torch.optim.SGD, lr=1e38), epochs=4, clip=clip)
    with pytest.raises(Failed, match=r"'hard' is|no finite logits"):
        hs.train(wild, tmp_path / "run")


def nan_in_epoch_1(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    return {"ratio": (1.0, student["logits"].mean() * (math.nan if batch.views[0] == 1 else 1.0))}


def misspelt(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    return {"hint": (1.0, student["layer9"].mean())}


def needy(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    return {"soft": (1.0, teacher["logits"].mean())}


def test_an_output_that_is_not_there_fails_with_those_that_are(data: Images, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no output named 'layer9'; this network gives: logits, pooled"):
        hs.train(experiment(data, objective=misspelt), tmp_path / "run")
    with pytest.raises(BadInput, match=r"no output named 'logits'.*no teacher"):
        hs.train(experiment(data, objective=needy), tmp_path / "other")


def test_data_without_a_training_or_validation_part_is_refused(data: Images, tmp_path: Path) -> None:
    for split, kind, said in (("train", {}, "no training images"), ("val", {"select": "loss"}, "no validation images")):
        less = data.with_frame(data.frame[data.frame["split"] != split])
        with pytest.raises(BadInput, match=said):
            hs.train(experiment(less, **kind), tmp_path / split)
        assert not (tmp_path / split).exists(), "a run that never began leaves nothing"


def test_training_images_alone_are_enough_for_the_last_epoch(data: Images, tmp_path: Path) -> None:
    alone = data.with_frame(data.frame[data.frame["split"] == "train"])
    run = hs.train(experiment(alone), tmp_path / "run")
    assert run.finished
    assert len(run.predictions) == 0
    assert not [c for c in run.log if c.startswith("val/")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "tpu"}, "auto, cpu, cuda"),
        ({"device": "cuda:x"}, "auto, cpu, cuda"),
        ({"precision": "3-bit"}, "3-bit"),
        ({"loggers": ["clearml"]}, "logger 'clearml': one of tensorboard, mlflow, wandb"),
    ],
)
def test_a_machine_that_is_not_there_is_refused(data: Images, tmp_path: Path, options: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        hs.train(experiment(data), tmp_path / "run", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused(data: Images, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no CUDA device"):
        hs.train(experiment(data), tmp_path / "run", device="cuda")


# Loggers and compilation


def test_tensorboard_gets_what_the_log_has(data: Images, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = hs.train(experiment(data), tmp_path / "run", loggers=["tensorboard"])
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("raw/hard")] == [0, 1]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(run.log["loss"].tolist(), rel=1e-6)


@pytest.mark.slow  # MLflow makes its database first, which takes seconds
def test_mlflow_gets_what_the_log_has_and_how_the_run_ended(data: Images, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    run = hs.train(experiment(data), tmp_path / "run", loggers=["mlflow"])
    with pytest.raises(Failed):
        hs.train(experiment(data, objective=nan_in_epoch_1), tmp_path / "bad", loggers=["mlflow"])
    for folder, status, epochs in (("run", "FINISHED", 2), ("bad", "FAILED", 1)):
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / folder / 'mlflow.db'}")
        (kept,) = client.search_runs([client.get_experiment_by_name("histill").experiment_id])
        assert (kept.info.run_name, kept.info.status) == (folder, status)
        log = hs.Run(tmp_path / folder, {}, run.build).log
        assert len(log) == epochs
        for column in log.columns:
            history = sorted(client.get_metric_history(kept.info.run_id, column), key=lambda m: m.step)
            assert [m.step for m in history] == list(range(epochs))
            np.testing.assert_allclose([m.value for m in history], log[column], rtol=1e-12)


@pytest.mark.slow  # imports take seconds, and W&B has a process of its own
def test_each_run_has_its_own_in_wandb(data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("one", "two"):
        hs.train(experiment(data), tmp_path / name, loggers=["wandb"])
        assert wandb.run is None, "left open, the next run would write into it"
    wandb.teardown()  # waits for W&B's own process to have written all
    for name in ("one", "two"):
        (kept,) = (tmp_path / name / "wandb").glob("offline-run-*/run-*.wandb")
        written = kept.read_bytes()
        for column in ("raw/hard", "val/balanced_accuracy"):
            assert column.encode() in written


def test_loggers_are_told_how_the_run_ended(data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from lightning_fabric.loggers import TensorBoardLogger

    said: list[str] = []
    monkeypatch.setattr(TensorBoardLogger, "finalize", lambda self, status: said.append(status))
    hs.train(experiment(data), tmp_path / "run", loggers=["tensorboard"])
    with pytest.raises(Failed):
        hs.train(experiment(data, objective=nan_in_epoch_1), tmp_path / "bad", loggers=["tensorboard"])
    assert said == ["success", "failed"]


def test_a_logger_that_is_not_installed_is_named_with_its_extra(
    data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(BadInput, match=r"mlflow.*histill\[tracking\]"):
        hs.train(experiment(data), tmp_path / "run", loggers=["mlflow"])


@pytest.mark.slow
def test_a_compiled_run_ends_at_nearly_the_same_weights(data: Images, tmp_path: Path) -> None:
    plain = hs.train(experiment(data), tmp_path / "plain")
    compiled = hs.train(experiment(data), tmp_path / "compiled", compile=True)
    assert apart(weights(plain), weights(compiled)) < 1e-4


def test_compilation_is_asked_of_torch(data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    hs.train(experiment(data, epochs=1), tmp_path / "run", compile=True)
    assert [type(module).__name__ for module in compiled] == ["Learner"]


def test_an_experiment_can_be_run_again(data: Images, tmp_path: Path) -> None:
    made: Experiment = experiment(data, objective=hard)
    assert apart(weights(hs.train(made, tmp_path / "one")), weights(hs.train(made, tmp_path / "two"))) == 0
