"""The one training loop. It knows nothing of any paper."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from histill.data.images import Images
from histill.data.packed import Packed, pack
from histill.errors import BadInput, Failed
from histill.evaluate.metrics import Scores, metrics
from histill.evaluate.predict import predict_rows
from histill.experiment import Experiment
from histill.files import atomic, cache_dir, digest, locked, read_json, write_json
from histill.machine import launch
from histill.progress import Bar, notice, progress
from histill.run import Run, commit, describe, versions
from histill.teachers import Cached
from histill.types import Batch, Objective, Outputs, Teacher, Terms, total

__all__ = ["train"]

_VALIDATION = ("accuracy", "balanced_accuracy", "auroc")


class Learner(nn.Module):
    """Whatever trains, behind one forward: the student, and the objective where it has weights of its own."""

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(self, batch: Batch, teacher: Outputs) -> Terms:
        return self.objective(self.student(batch.images), teacher, batch)


@dataclass
class State:
    """Where a run is: all that an exact resume needs beside weights and optimiser."""

    epoch: int = 0
    step: int = 0
    best: float = -math.inf
    best_loss: float = math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    images: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)


def train(
    experiment: Experiment,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    precision: str = "auto",
    loggers: Sequence[str] = (),
    compile: bool = False,
    keep_checkpoint: bool = False,
    checkpoint_seconds: float = 30.0,
    command: dict[str, Any] | None = None,
) -> Run:
    """Run an experiment and leave a run folder.

    On the CPU the same experiment gives the same bits, whether or not it was killed and resumed on the way. Started
    by ``torchrun``, every process takes its share of each batch.

    Args:
        experiment: what to do.
        out: the run folder; refused where it holds a run already, unless ``resume``.
        resume: go on from the last checkpoint; a finished run is returned as it is.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        precision: Fabric's names (``32-true``, ``bf16-mixed``, ...); ``auto`` is bf16 where the machine computes in it.
        loggers: ``tensorboard``, ``mlflow``, ``wandb``, beside ``log.csv``, which is always written.
        compile: compile student and objective with `torch.compile`.
        keep_checkpoint: keep ``checkpoint.pt`` when the run ends.
        checkpoint_seconds: least time between checkpoints.
        command: what the command line was given, for ``run.json``.

    Raises:
        BadInput: the folder is taken, the data or an argument is wrong.
        Failed: a loss is not finite (the line names it), or the disk is full.
    """
    out = Path(out)
    fabric = launch(device, precision, loggers, out)
    with locked(out) if fabric.is_global_zero else nullcontext():
        if (out / "run.json").exists():
            if not resume:
                raise BadInput(f"{out} holds a run already; go on with --resume, or give another --out")
            run = Run.open(out)
            if run.finished:
                return run
        return _train(experiment, out, fabric, compile, keep_checkpoint, checkpoint_seconds, command)


def _train(
    experiment: Experiment,
    out: Path,
    fabric: Fabric,
    compile: bool,
    keep_checkpoint: bool,
    checkpoint_seconds: float,
    command: dict[str, Any] | None,
) -> Run:
    data = experiment.data if experiment.unlabelled is None else _joined(experiment.data, experiment.unlabelled)
    packed = pack(data, experiment.image_size, strict=experiment.strict)
    for line in packed.images.notices:
        notice(line)
    rows = {split: np.array(packed.images.rows(split), dtype=np.int64) for split in ("train", "val", "test")}
    if not len(rows["train"]):
        raise BadInput(f"{experiment.data.root}: no training images; split the data first (histill.split)")
    if not len(rows["val"]) and experiment.select != "last":
        raise BadInput(f"{experiment.data.root}: no validation images to select by; give some or select='last'")

    torch.manual_seed(experiment.seed)
    student = experiment.student().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = Learner(student, copy.deepcopy(experiment.objective))
    average = _Average(student, experiment.ema, fabric.device) if experiment.ema else None
    optimizer = experiment.optimizer(learner.parameters())
    rates = [group["lr"] for group in optimizer.param_groups]
    forward, optimizer = fabric.setup(torch.compile(learner) if compile else learner, optimizer)
    state = State()
    best: dict[str, Tensor] = {}
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=fabric.device, weights_only=True)
        learner.load_state_dict(saved["learner"])
        optimizer.load_state_dict(saved["optimizer"])
        state, best = State(**saved["state"]), saved["best"]
        if average:
            average.network.load_state_dict(saved["average"])

    info = _info(experiment, packed, rows, fabric, student) | {"command": command}
    if (out / "run.json").exists():
        _check_same(read_json(out / "run.json"), info, out)
        info |= {name: read_json(out / "run.json")[name] for name in ("started", "command")}
    if experiment.teacher is not None and len(rows["val"]):
        info["teacher"] = _judge_teacher(experiment.teacher, experiment, packed, rows["val"], fabric)
    if fabric.is_global_zero:
        packed.images.save(out / "data.csv")
        write_json(out / "run.json", info)
    teacher = _teacher(experiment, packed)

    def save() -> None:
        fabric.barrier()
        if fabric.is_global_zero:
            everything = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
            everything |= {"state": asdict(state), "best": best}
            everything |= {"average": average.network.state_dict()} if average else {}
            with atomic(checkpoint) as temporary:
                torch.save(everything, temporary)

    judged = average.network if average else student
    saved_at = time.monotonic()
    steps = math.ceil(len(rows["train"]) / experiment.batch_size)
    seen = state.epoch * len(rows["train"]) + state.step * experiment.batch_size
    with progress(f"training {out.name}", experiment.epochs * len(rows["train"])) as bar:
        bar.advance(seen)
        while state.epoch < experiment.epochs:
            learner.train()
            order = np.random.default_rng((experiment.seed, state.epoch)).permutation(rows["train"])
            while state.step < steps:
                start = time.monotonic()
                batch_rows = order[state.step * experiment.batch_size :][: experiment.batch_size]
                torch.manual_seed(_mixed(experiment.seed, state.epoch, state.step))
                when = state.epoch + state.step / steps
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * experiment.schedule(when)
                if len(batch_rows) > 1 or steps == 1:
                    _step(experiment, packed, batch_rows, state, teacher, forward, optimizer, fabric)
                    if average:
                        average.update(student, state.epoch * steps + state.step)
                state.step += 1
                state.seconds += time.monotonic() - start
                _advance(bar, state, experiment, len(batch_rows))
                if time.monotonic() - saved_at >= checkpoint_seconds and state.step < steps:
                    save()
                    saved_at = time.monotonic()
            row = _close_epoch(experiment, state, optimizer, judged, packed, rows["val"], fabric)
            if _better(experiment, state, row):
                best = {k: v.detach().cpu().clone() for k, v in judged.state_dict().items()}
            if fabric.is_global_zero:
                _write_log(state, out)
                fabric.log_dict(row, step=state.epoch)
            state.epoch, state.step, state.images, state.seconds, state.sums = state.epoch + 1, 0, 0, 0.0, {}
            stale = state.epoch - 1 - state.best_epoch
            stop = experiment.patience is not None and stale >= experiment.patience
            if stop or time.monotonic() - saved_at >= checkpoint_seconds or state.epoch == experiment.epochs:
                save()
                saved_at = time.monotonic()
            if stop:
                break
    if isinstance(teacher, Cached):
        teacher.flush()
    if fabric.is_global_zero:
        _finish(experiment, out, info, state, judged, best, packed, rows, fabric)
        if not keep_checkpoint:
            checkpoint.unlink(missing_ok=True)
    fabric.barrier()
    return Run.open(out) if experiment.student.func.__module__.startswith("histill.") else _own(out, experiment)


def _step(
    experiment: Experiment,
    packed: Packed,
    rows: NDArray[np.int64],
    state: State,
    teacher: Teacher | None,
    forward: Any,
    optimizer: Any,
    fabric: Fabric,
) -> None:
    """One step of the optimiser. The batch is cut into a part per process and accumulation; each counts by its size."""
    view = state.epoch % (experiment.views or experiment.epochs)
    parts = np.array_split(rows, fabric.world_size * experiment.accumulate)
    mine = parts[fabric.global_rank :: fabric.world_size]
    for number, part in enumerate(mine):
        share = len(part) / len(rows)
        part = part if len(part) else rows[:1]  # a process without images still takes part, with no weight
        views = torch.full((len(part),), view)
        batch = packed.batch(
            part,
            views,
            augment=experiment.augment,
            seed=experiment.seed,
            device=fabric.device,
        )
        said = teacher(batch) if teacher is not None else Outputs()
        waits = fabric.world_size > 1 and number < len(mine) - 1
        with fabric.no_backward_sync(forward) if waits else nullcontext():
            terms = forward(batch, said)
            fabric.backward(total(terms) * share * fabric.world_size)
        for name, (weight, loss) in terms.items():
            value = float(loss.detach())
            if not math.isfinite(value):
                raise Failed(
                    f"the loss term {name!r} is {value} in epoch {state.epoch} step {state.step}; "
                    "lower --lr, or clip the gradient; the last checkpoint is kept"
                )
            state.sums[f"raw/{name}"] = state.sums.get(f"raw/{name}", 0.0) + value * share * len(rows)
            state.sums[f"weight/{name}"] = float(weight)
    state.images += len(rows)
    if experiment.clip:
        fabric.clip_gradients(forward, optimizer, max_norm=experiment.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _mixed(*numbers: int) -> int:
    """One seed of several numbers: what is random in a step depends on where the step is, not on what came before."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _close_epoch(
    experiment: Experiment,
    state: State,
    optimizer: Any,
    judged: nn.Module,
    packed: Packed,
    val: NDArray[np.int64],
    fabric: Fabric,
) -> dict[str, float]:
    """The epoch's row of the log."""
    names = [name.removeprefix("raw/") for name in state.sums if name.startswith("raw/")]
    raw = {n: state.sums[f"raw/{n}"] / max(state.images, 1) for n in names}
    if fabric.world_size > 1:
        raw = {n: float(fabric.all_reduce(torch.tensor(v), reduce_op="sum")) for n, v in raw.items()}
    weight = {n: state.sums[f"weight/{n}"] for n in names}
    row = {
        "epoch": state.epoch,
        "lr": optimizer.param_groups[0]["lr"],
        "images_per_second": state.images / max(state.seconds, 1e-9),
        "loss": sum(weight[n] * raw[n] for n in names),
        **{f"raw/{n}": raw[n] for n in names},
        **{f"weight/{n}": weight[n] for n in names},
    }
    if len(val):
        said = predict_rows(judged, packed, val, device=fabric.device)["logits"]
        row |= {f"val/{n}": v for n, v in _validate(said, packed, val).items()}
    state.log.append(row)
    return row


def _validate(logits: NDArray[np.float64], packed: Packed, rows: NDArray[np.int64]) -> dict[str, float]:
    labels = packed.labels[torch.from_numpy(rows)].numpy()
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    scores = Scores(labels, np.exp(log_p), np.arange(len(rows)))
    figures = metrics(scores, names=_VALIDATION)
    return {
        "loss": float(-log_p[np.arange(len(rows)), labels].mean()),
        **{n: float(figures[n][0]) for n in _VALIDATION},
    }


def _better(experiment: Experiment, state: State, row: dict[str, float]) -> bool:
    """Whether this epoch's weights are to be kept; remembers it."""
    loss = row.get("val/loss", math.inf)
    if experiment.select == "last":
        value = float(state.epoch)
    elif experiment.select == "loss":
        value = -loss
    else:
        value = row[f"val/{experiment.select}"]
    better = (value, -loss) > (state.best, -state.best_loss)
    if better:
        state.best, state.best_loss, state.best_epoch = value, loss, state.epoch
    return better


def _rule(experiment: Experiment) -> str:
    if experiment.select == "last":
        return "the last epoch"
    what = {"loss": "lowest validation cross-entropy"}.get(experiment.select, f"highest validation {experiment.select}")
    return f"{what}, ties: lower validation cross-entropy, then the earlier epoch"


def _advance(bar: Bar, state: State, experiment: Experiment, images: int) -> None:
    last = state.log[-1] if state.log else {}
    figure = f" val {last['val/balanced_accuracy']:.3f}" if "val/balanced_accuracy" in last else ""
    bar.advance(images, f"epoch {state.epoch + 1}/{experiment.epochs}{figure}")


def _judge_teacher(
    teacher: Teacher, experiment: Experiment, packed: Packed, val: NDArray[np.int64], fabric: Fabric
) -> dict[str, Any]:
    """What the teacher knows of the validation images, before the student starts."""
    teacher = getattr(teacher, "teacher", teacher) if isinstance(teacher, Cached) else teacher
    said = []
    for start in range(0, len(val), 64):
        outputs = teacher(packed.batch(val[start : start + 64], device=fabric.device))
        if "logits" not in outputs or outputs["logits"].shape[1:] != (len(experiment.data.classes),):
            return {"key": getattr(teacher, "key", "")}
        said.append(outputs["logits"].double().cpu().numpy())
    figures = _validate(np.concatenate(said), packed, val)
    share, chance = figures["balanced_accuracy"], 1 / len(experiment.data.classes)
    if share < chance + 2 * math.sqrt(chance * (1 - chance) / len(val)):
        notice(
            f"the teacher is hardly better than chance on validation (balanced accuracy {share:.3f}); expect no gain"
        )
    return {"key": getattr(teacher, "key", ""), "validation": figures}


def _teacher(experiment: Experiment, packed: Packed) -> Teacher | None:
    """The teacher behind a cache, where its views come again."""
    teacher, views = experiment.teacher, experiment.views
    if teacher is None or not experiment.cache or views is None or views >= experiment.epochs:
        return teacher
    if isinstance(teacher, Cached) or not hasattr(teacher, "key"):
        return teacher
    identity = {
        "views": experiment.augment.key(experiment.seed),
        "pixels": digest(packed.images.frame["content"].tolist()),
        "size": experiment.image_size,
    }
    shape = {"images": len(packed.images), "views": views}
    key = digest([teacher.key, identity, shape, experiment.cache_outputs])[:24]
    folder = cache_dir("teachers", key) if experiment.cache is True else Path(experiment.cache)
    folder.mkdir(parents=True, exist_ok=True)
    return Cached(teacher, folder, **shape, identity=identity, outputs=experiment.cache_outputs)


class _Average:
    """Exponential moving average of weights and buffers; the decay starts low to forget the first ones."""

    def __init__(self, student: nn.Module, decay: float, device: torch.device) -> None:
        self.decay = decay
        self.network = copy.deepcopy(student).requires_grad_(False).to(device)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self.network.state_dict().values(), student.state_dict().values()):
            if mean.is_floating_point():
                mean.lerp_(value, weight)
            else:
                mean.copy_(value)


def _info(
    experiment: Experiment,
    packed: Packed,
    rows: dict[str, NDArray[np.int64]],
    fabric: Fabric,
    student: nn.Module,
) -> dict[str, Any]:
    """What ``run.json`` says when a run starts."""
    images = packed.images
    labelled = images.frame[images.frame["label"] != ""]
    return {
        "status": "running",
        "recipe": experiment.recipe,
        "network": describe(experiment.student),
        "parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "classes": list(experiment.data.classes),
        "positive": experiment.positive,
        "image_size": experiment.image_size,
        "epochs": experiment.epochs,
        "batch_size": experiment.batch_size,
        "views": experiment.views,
        "augment": asdict(experiment.augment),
        "seed": experiment.seed,
        "data": {
            "root": str(images.root),
            "hash": experiment.data.hash,
            "split_hash": experiment.data.split_hash,
            "images": {split: len(r) for split, r in rows.items()},
            "unlabelled": len(images) - len(labelled),
            "patients": labelled["patient"].nunique() if experiment.data.has_patients else None,
        },
        "notices": list(images.notices),
        "selection": {"rule": _rule(experiment)},
        "versions": versions(),
        "commit": commit(),
        "device": str(fabric.device),
        "precision": fabric._precision.precision,
        "processes": fabric.world_size,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Refuse to go on with other data or another network."""
    for name in (
        "network",
        "classes",
        "image_size",
        "epochs",
        "batch_size",
        "views",
        "augment",
        "seed",
        "precision",
    ):
        if before.get(name) != now[name]:
            raise BadInput(f"{out}: --resume with {name} {now[name]}, but the run has {before.get(name)}")
    for name in ("hash", "split_hash"):
        if before["data"][name] != now["data"][name]:
            raise BadInput(f"{out}: the images have changed since the run started; start a new one in another --out")


def _write_log(state: State, out: Path) -> None:
    with atomic(out / "log.csv") as temporary:
        pd.DataFrame(state.log).to_csv(temporary, index=False)


def _finish(
    experiment: Experiment,
    out: Path,
    info: dict[str, Any],
    state: State,
    judged: nn.Module,
    best: dict[str, Tensor],
    packed: Packed,
    rows: dict[str, NDArray[np.int64]],
    fabric: Fabric,
) -> None:
    """Leave the run folder whole: weights, predictions, figures, page, and last of all the word that it is finished."""
    from histill.evaluate.finish import finish, predictions

    with atomic(out / "model.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in best.items()}, temporary)
    judged.load_state_dict(best)
    rows_judged = np.concatenate([rows["val"], rows["test"]])
    said = predict_rows(judged, packed, rows_judged, device=fabric.device)
    with atomic(out / "predictions.parquet") as temporary:
        predictions(packed.images, rows_judged, said).to_parquet(temporary, index=False)
    info["selection"] |= {
        "epoch": state.best_epoch,
        "value": state.best if abs(state.best) < math.inf else None,
    }
    started = datetime.fromisoformat(info["started"])
    info |= {"epochs_run": state.epoch, "seconds": (datetime.now(UTC) - started).total_seconds()}
    finish(out, info)
    write_json(out / "run.json", info | {"status": "finished"})


def _own(out: Path, experiment: Experiment) -> Run:
    """The run of a network that is not ours, in the process that has its code."""
    return Run(out, read_json(out / "run.json"), experiment.student)


def _joined(data: Images, unlabelled: Images) -> Images:
    """Labelled and unlabelled images as one table, the unlabelled ones in the training split."""
    extra = unlabelled.frame.assign(path=[os.path.relpath(p, data.root) for p in unlabelled.paths()], split="train")
    known = set(data.frame["content"])
    fresh = extra[~extra["content"].isin(known)]
    lines = [f"{len(extra) - len(fresh)} unlabelled images are among the labelled ones, left out"] * (
        len(fresh) < len(extra)
    )
    return data.with_frame(pd.concat([data.frame, fresh]), *unlabelled.notices, *lines)
