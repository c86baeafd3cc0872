"""The one training loop. It knows nothing of any paper."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
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

from histill.accelerator import Tally
from histill.data.packed import Packed, pack
from histill.data.splits import with_unlabelled
from histill.data.views import VERSION
from histill.errors import BadInput, Failed, out_of_memory
from histill.evaluate import labels
from histill.evaluate.task import task_of
from histill.experiment import Experiment
from histill.files import atomic, cache_dir, digest, locked, read_json, sweep, write_json, writing
from histill.learner import Average, Learner, check_answers, freeze
from histill.machine import answers_bf16, at_speed, launch, logged
from histill.memory import Buffers, Fits, halved
from histill.progress import Bar, notice, progress
from histill.record import check_finished, check_same, describe, record
from histill.run import Run, without_weights
from histill.teachers import Cached, Keyed, bound
from histill.types import Outputs, Teacher, named, total

__all__ = ["kept_teacher", "train"]


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
    pieces: int = 1  # into which a batch is cut because it does not fit into memory
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
    describe(experiment.student)  # a network that could not be made again is refused before anything is done
    with locked(out) if fabric.is_global_zero else nullcontext():
        before = fabric.broadcast(read_json(out / "run.json") if (out / "run.json").exists() else None)
        if before is not None:
            if not resume:
                raise BadInput(f"{out} holds a run already; go on with --resume, or give another --out")
            if not isinstance(before, dict) or {"network", "status", "started"} - set(before):
                raise BadInput(f"{out / 'run.json'}: not a run of Histill")
        if before is None or before["status"] != "finished":
            if fabric.is_global_zero:
                sweep(out)
            with logged(fabric), at_speed(fabric):
                _train(experiment, out, before, fabric, compile, keep_checkpoint, checkpoint_seconds, command)
        else:
            check_finished(before, experiment, out)
            if fabric.is_global_zero and before.get("checkpoint_kept") is False:  # a kill came before it was removed
                (out / "checkpoint.pt").unlink(missing_ok=True)
        fabric.barrier()
        return Run(out, read_json(out / "run.json"), without_weights(experiment.student))


def _train(
    experiment: Experiment,
    out: Path,
    before: dict[str, Any] | None,
    fabric: Fabric,
    compile: bool,
    keep_checkpoint: bool,
    checkpoint_seconds: float,
    command: dict[str, Any] | None,
) -> None:
    data = with_unlabelled(experiment.data, experiment.unlabelled)
    packed = pack(data, experiment.image_size, strict=experiment.strict)
    for line in packed.images.notices:
        notice(line)
    rows = {split: np.array(packed.images.rows(split), dtype=np.int64) for split in ("train", "val", "test")}
    if not len(rows["train"]):
        raise BadInput(f"{experiment.data.root}: no training images; split the data first (histill.split)")
    if not len(rows["val"]) and experiment.select != "last":
        raise BadInput(f"{experiment.data.root}: no validation images to select by; give --val a share above 0")

    torch.manual_seed(experiment.seed)
    student = experiment.student().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    freeze(student, experiment.frozen)
    check_answers(student, data, experiment.image_size)
    learner = Learner(student, experiment)
    average = Average(student, experiment.ema, fabric.device) if experiment.ema else None
    optimizer = experiment.optimizer([p for p in learner.parameters() if p.requires_grad])
    rates = [group["lr"] for group in optimizer.param_groups]
    forward, optimizer = fabric.setup(torch.compile(learner) if compile else learner, optimizer)
    info = record(experiment, packed, student) | {
        "selection": {"rule": _rule(experiment)},
        "device": str(fabric.device),
        "precision": fabric._precision.precision,
        "processes": fabric.world_size,
        "command": command,
    }
    state = State()
    best: dict[str, Tensor] = {}
    checkpoint = out / "checkpoint.pt"
    if before is not None:
        check_same(before, info, out)
        info |= {name: before.get(name) for name in ("started", "command")}
        if saved := _load(checkpoint, fabric.device):
            try:
                learner.load_state_dict(saved["learner"])
            except RuntimeError:
                raise BadInput(f"{checkpoint} is of another version of Histill; remove it to start again") from None
            optimizer.load_state_dict(saved["optimizer"])
            fabric._precision.load_state_dict(saved["precision"])
            state, best = State(**saved["state"]), saved["best"]
            if average:
                average.network.load_state_dict(saved["average"])
    if experiment.teacher is not None:
        experiment = replace(experiment, teacher=bound(experiment.teacher, packed.images))
    teacher = kept_teacher(experiment, packed, fabric.device)
    if fabric.is_global_zero:
        if experiment.teacher is not None and len(rows["val"]):
            info["teacher"] |= _judge_teacher(experiment.teacher, experiment, packed, rows["val"], fabric)
        packed.images.save(out / "data.csv")
        write_json(out / "run.json", info)

    def save() -> None:
        tally.read(state.sums)
        if isinstance(teacher, Cached):
            teacher.flush()  # what was heard up to here is heard again after a resume, bit for bit
        if fabric.is_global_zero:
            everything = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
            everything |= {"state": asdict(state), "best": best}
            everything |= {"precision": fabric._precision.state_dict()}  # of 16-mixed: how far the loss is scaled up
            everything |= {"average": average.network.state_dict()} if average else {}
            with writing(checkpoint) as temporary:
                torch.save(everything, temporary)

    judged, buffers, tally = average.network if average else student, Buffers(learner), Tally()
    saved_at = time.monotonic()
    steps = math.ceil(len(rows["train"]) / experiment.batch_size)
    seen = state.epoch * len(rows["train"]) + state.step * experiment.batch_size
    with progress(f"training {out.name}", experiment.epochs * len(rows["train"]), done=seen) as bar:
        while not _over(experiment, state):
            learner.train()
            order = np.random.default_rng((experiment.seed, state.epoch)).permutation(rows["train"])
            while state.step < steps:
                start = time.monotonic()
                batch_rows = order[state.step * experiment.batch_size :][: experiment.batch_size]
                when = state.epoch + state.step / steps
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = float(rate * experiment.schedule(when))
                learner.begin(state.epoch * steps + state.step)
                if len(batch_rows) > 1 or steps == 1:
                    _step(experiment, packed, batch_rows, state, teacher, forward, optimizer, fabric, buffers, tally)
                    if average:
                        average.update(student, state.epoch * steps + state.step)
                state.step += 1
                if fabric.device.type == "cpu" or state.step == steps or state.step % Tally.EVERY == 0:
                    tally.read(state.sums)
                state.seconds += time.monotonic() - start
                _advance(bar, state, experiment, len(batch_rows))
                if time.monotonic() - saved_at >= checkpoint_seconds and state.step < steps:
                    save()
                    saved_at = time.monotonic()
            row = _close_epoch(state, optimizer, judged, packed, rows["val"], fabric)
            if _better(experiment, state, row):
                best = {k: v.detach().cpu().clone() for k, v in judged.state_dict().items()}
            if fabric.is_global_zero:
                _write_log(state, out)
                fabric.log_dict(row, step=state.epoch)
            state.epoch, state.step, state.images, state.seconds, state.sums = state.epoch + 1, 0, 0, 0.0, {}
            if _over(experiment, state) or time.monotonic() - saved_at >= checkpoint_seconds:
                save()
                saved_at = time.monotonic()
    if isinstance(teacher, Cached):
        teacher.flush()
    if fabric.is_global_zero:
        info["checkpoint_kept"] = keep_checkpoint
        _finish(experiment, out, info, state, judged, best, packed, rows, fabric)
        if not keep_checkpoint:
            checkpoint.unlink(missing_ok=True)


def _load(checkpoint: Path, device: torch.device) -> dict[str, Any] | None:
    if not checkpoint.exists():
        return None
    try:
        return dict(torch.load(checkpoint, map_location=device, weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError):
        raise BadInput(f"{checkpoint} is damaged; remove it to start again") from None


def _over(experiment: Experiment, state: State) -> bool:
    """Whether the last epoch is done, or ``patience`` of them brought nothing better."""
    stale = state.epoch - 1 - state.best_epoch
    return state.epoch >= experiment.epochs or (experiment.patience is not None and stale >= experiment.patience)


def _step(
    experiment: Experiment,
    packed: Packed,
    rows: NDArray[np.int64],
    state: State,
    teacher: Teacher | None,
    forward: Any,
    optimizer: Any,
    fabric: Fabric,
    buffers: Buffers,
    tally: Tally,
) -> None:
    """One step of the optimiser; where memory runs out on the way to the gradient, anew in more pieces."""
    buffers.keep()
    while True:
        pieces = math.ceil(len(rows) * state.pieces / experiment.batch_size)  # of a last, smaller batch fewer
        parts = fabric.world_size * experiment.accumulate * pieces
        try:
            raw = _gradient(experiment, packed, np.array_split(rows, parts), state, teacher, forward, fabric)
            break
        except Exception as error:
            if not out_of_memory(error):
                raise
        # Only here, where the error and the tensors of its frames are gone, can their memory be had again.
        state.pieces = halved(state.pieces, images=len(rows), parts=parts, processes=fabric.world_size)
        optimizer.zero_grad(set_to_none=True)
        buffers.restore()
    means = torch.stack(list(raw.values()))
    if fabric.world_size > 1:  # every process knows, logs and fails on the same figures
        means = fabric.all_reduce(means, reduce_op="sum")
    tally.add(f"epoch {state.epoch} step {state.step}", len(rows), list(raw), means)
    state.images += len(rows)
    if experiment.clip:  # a gradient that is not finite shows in the next step's loss, which names the term
        fabric.clip_gradients(forward, optimizer, max_norm=experiment.clip, error_if_nonfinite=False)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _gradient(
    experiment: Experiment,
    packed: Packed,
    parts: list[NDArray[np.int64]],
    state: State,
    teacher: Teacher | None,
    forward: Any,
    fabric: Fabric,
) -> dict[str, Tensor]:
    """Add a batch's gradient to that of the weights and return its raw terms.

    The batch is cut into a part per process, accumulation and piece; each counts by its size.
    """
    torch.manual_seed(_mixed(experiment.seed, state.epoch, state.step, fabric.global_rank))
    view = state.epoch % (experiment.views or experiment.epochs)
    mine, images = parts[fabric.global_rank :: fabric.world_size], sum(map(len, parts))
    raw: dict[str, Tensor] = {}
    for number, part in enumerate(mine):
        share = len(part) / images
        part = part if len(part) else parts[0][:1]  # a process without images still takes part, with no weight
        kind: dict[str, Any] = {"augment": experiment.augment, "seed": experiment.seed, "device": fabric.device}
        batch = packed.batch(part, torch.full((len(part),), view), **kind)
        said = named(teacher(batch), "the teacher") if teacher is not None else Outputs()
        waits = fabric.world_size > 1 and number < len(mine) - 1
        with fabric.no_backward_sync(forward) if waits else nullcontext():
            terms = forward(batch, said)
            fabric.backward(total(terms) * share * fabric.world_size)
        for name, (weight, loss) in terms.items():
            raw[name] = raw.get(name, 0.0) + loss.detach().float() * share
            state.sums[f"weight/{name}"] = float(weight)
    return raw


def _mixed(*numbers: int) -> int:
    """One seed of several numbers: what is random in a step depends on where the step is, not on what came before."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _close_epoch(
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
    weight = {n: state.sums[f"weight/{n}"] for n in names}
    row = {
        "epoch": state.epoch,
        "lr": optimizer.param_groups[0]["lr"],
        "images_per_second": state.images / max(state.seconds, 1e-9),
        "loss": sum(weight[n] * raw[n] for n in names),
        **{f"raw/{n}": raw[n] for n in names},
        **{f"weight/{n}": weight[n] for n in names},
    }
    if len(val) and fabric.is_global_zero:
        task = task_of(packed.images)
        said = task.ask(judged, packed, val, device=fabric.device)
        if not all(np.isfinite(values).all() for values in said.values()):
            raise Failed(
                f"the network gives no finite logits after epoch {state.epoch}; lower --lr, or clip the gradient"
            )
        row |= {f"val/{n}": v for n, v in task.validate(said, packed, val).items()}
    row = dict(fabric.broadcast(row))  # batch norms differ between processes; what they decide must not
    state.log.append(row)
    return row


def _better(experiment: Experiment, state: State, row: dict[str, float]) -> bool:
    """Whether this epoch's weights are to be kept; remembers it."""
    loss = row.get("val/loss", math.inf)
    if experiment.select == "last":
        value = float(state.epoch)
    elif experiment.select == "loss":
        value = -loss
    else:
        if f"val/{experiment.select}" not in row:
            named = ", ".join(n.removeprefix("val/") for n in row if n.startswith("val/"))
            raise BadInput(f"select={experiment.select!r}: this network is judged by {named}")
        value = row[f"val/{experiment.select}"]
    if math.isnan(value):  # a figure that the validation images cannot give
        value = -math.inf
    better = state.best_epoch < 0 or (value, -loss) > (state.best, -state.best_loss)  # something is always kept
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
    shown = "balanced_accuracy" if experiment.select in ("last", "loss") else experiment.select
    figure = f" val {last[f'val/{shown}']:.3f}" if f"val/{shown}" in last else ""
    bar.advance(images, f"epoch {state.epoch + 1}/{experiment.epochs}{figure}")


def _judge_teacher(
    teacher: Teacher, experiment: Experiment, packed: Packed, val: NDArray[np.int64], fabric: Fabric
) -> dict[str, Any]:
    """What the teacher knows of the labels of the validation images, before the student starts."""
    if task_of(packed.images) is not labels:
        return {}
    teacher = getattr(teacher, "teacher", teacher) if isinstance(teacher, Cached) else teacher
    said, fits = [], Fits("the teacher")

    def ask(rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
        batch = packed.batch(rows, device=fabric.device)
        unlabelled = batch._replace(labels=torch.full_like(batch.labels, -1))  # it may use those of training
        outputs = named(teacher(unlabelled), "the teacher")
        if "logits" not in outputs or outputs["logits"].shape[1:] != (len(experiment.data.classes),):
            return None
        logits: NDArray[np.float64] = outputs["logits"].cpu().double().numpy()
        return logits

    for start in range(0, len(val), 64):
        for logits in fits(ask, val[start : start + 64]):
            if logits is None:
                return {}
            said.append(logits)
    figures = labels.validate({"logits": np.concatenate(said)}, packed, val)
    share, chance = figures["balanced_accuracy"], 1 / len(experiment.data.classes)
    if share < chance + 2 * math.sqrt(chance * (1 - chance) / len(val)):
        notice(
            f"the teacher is hardly better than chance on validation (balanced accuracy {share:.3f}); expect no gain"
        )
    return {"validation": {name: value if math.isfinite(value) else None for name, value in figures.items()}}


def kept_teacher(experiment: Experiment, packed: Packed, device: torch.device) -> Teacher | None:
    """The teacher behind a cache, where views are counted: they come again, in this run or in the next one's.

    Part of the key is the kind of device and whether a teacher answers in bf16 there.
    """
    teacher, views = experiment.teacher, experiment.views
    if teacher is None or not experiment.cache or views is None or isinstance(teacher, Cached):
        return teacher
    if not isinstance(teacher, Keyed):
        notice(
            f"the teacher has no key ({type(teacher).__name__}), so that it is asked in every epoch, not once a view"
        )
        return teacher
    identity = {
        "image_size": experiment.image_size,
        "device": device.type + (" bf16" if answers_bf16(device.type) else ""),
        "data": digest(packed.images.frame[["content", "label"]].values.tolist()),
        **experiment.augment.key(experiment.seed),
        "drawn": VERSION,
    }
    images, outputs = len(packed.images), experiment.cache_outputs
    key = digest([teacher.key, identity, images, views, outputs])[:24]
    folder = cache_dir("teachers", key) if experiment.cache is True else Path(experiment.cache)
    folder.mkdir(parents=True, exist_ok=True)
    return Cached(teacher, folder, images=images, views=views, identity=identity, outputs=outputs)


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
    task = task_of(packed.images)
    rows_judged = np.concatenate([rows["val"], rows["test"]])

    def judge(file: str) -> None:
        said = task.ask(judged, packed, rows_judged, device=fabric.device)
        with atomic(out / file, durable=True) as temporary:
            task.predictions(packed.images, rows_judged, said).to_parquet(temporary, index=False)

    if experiment.select != "last":
        judge("last.parquet")
    with writing(out / "model.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in best.items()}, temporary)
    judged.load_state_dict(best)
    judge("predictions.parquet")
    info["selection"] |= {
        "epoch": state.best_epoch,
        "value": state.best if abs(state.best) < math.inf else None,
    }
    started = datetime.fromisoformat(info["started"])
    info |= {"epochs_run": state.epoch, "seconds": (datetime.now(UTC) - started).total_seconds()}
    task.finish(out, info)
    write_json(out / "run.json", info | {"status": "finished"})
