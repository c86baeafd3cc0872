"""Small students are launch-bound: how near the loop comes to the bare arithmetic of networks that take milliseconds.

    python benchmarks/small.py [--device cuda] [--small]

Steps per second of `histill.train` (views that flip, a cached teacher, cross-entropy and KD, Adam, every check that
training makes) beside a plain PyTorch loop that has images, labels and the teacher's logits as tensors, flips and
trains, and never looks at its loss. Networks: DSNet, wrn_16_1 and resnet8x4 at 32 px, batches of 8 and 64, float32, one
thread. The two take turns in one process, a first epoch apart; ratios are of a round, and the median and range of the
rounds are shown.

Also: what each part of our step costs by itself; the compiled step (`torch.compile` of student, loss and optimiser);
several students over one pass of the teacher; and four seeds of one network as one network with stacked weights
(`torch.vmap`). Writes benchmarks/results/small.json and .txt. With ``--device cuda`` the first table alone, all tensors
of the plain loop lying there, to small-cuda.json and .txt; that was not run, as there was no such device.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, beside, leave
from growth import write_images
from torch import Tensor, nn
from torch.nn import functional as F

import histill as hs
import histill.evaluate.finish
from histill.accelerator import Tally
from histill.data import Augment, Images, pack, read_images
from histill.experiment import Experiment
from histill.loop import _mixed, kept_teacher
from histill.losses import cross_entropy, kd
from histill.memory import Buffers
from histill.models import Cifar, DSNet
from histill.teachers import Frozen
from histill.types import Batch, Outputs, Terms

SIZE, CLASSES = 32, 2
NETWORKS: dict[str, partial[nn.Module]] = {
    "DSNet": partial(DSNet, classes=CLASSES, image_size=SIZE),
    "wrn_16_1": partial(Cifar, name="wrn_16_1", classes=CLASSES),
    "resnet8x4": partial(Cifar, name="resnet8x4", classes=CLASSES),
}
STEPS = {("DSNet", 8): 60, ("DSNet", 64): 20, ("wrn_16_1", 8): 40, ("wrn_16_1", 64): 10, ("resnet8x4", 8): 16}
STEPS[("resnet8x4", 64)] = 4


def both(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    soft = kd(student["logits"], teacher["logits"], temperature=4.0)
    return {"hard": (0.1, cross_entropy(student["logits"], batch.labels)), "soft": (0.9, soft)}


def experiment(data: Images, network: str, teacher: Frozen, **changes: Any) -> Experiment:
    kind: dict[str, Any] = {"data": data, "student": NETWORKS[network], "objective": both, "image_size": SIZE}
    kind |= {"teacher": teacher, "views": 1, "augment": Augment(), "epochs": 2}
    return Experiment(**kind | {"optimizer": partial(torch.optim.Adam, lr=1e-3)} | changes)


def ours(data: Images, network: str, batch: int, teacher: Frozen, scratch: Path, device: str) -> float:
    """Steps per second of the second epoch, as the log has them."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        made = experiment(data, network, teacher, batch_size=batch)
        run = hs.train(made, Path(out) / "run", device=device, precision="32-true")
        return float(run.log["images_per_second"].iloc[-1]) / batch


Step = Callable[[Tensor, Tensor, Tensor], None]


def plain_step(network: nn.Module, *, compiled: bool = False) -> Step:
    """Forward, loss, backward and Adam."""
    network = network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def loss_of(images: Tensor, labels: Tensor, said: Tensor) -> Tensor:
        logits = network(images)["logits"]
        soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(said / 4, 1), reduction="batchmean") * 16
        return 0.1 * F.cross_entropy(logits, labels) + 0.9 * soft

    forward = torch.compile(loss_of) if compiled else loss_of
    move = torch.compile(optimizer.step) if compiled else optimizer.step

    def step(images: Tensor, labels: Tensor, said: Tensor) -> None:
        forward(images, labels, said).backward()
        move()
        optimizer.zero_grad(set_to_none=True)

    return step


def tensors(data: Images, split_: str, teacher: Frozen) -> tuple[Tensor, Tensor, Tensor]:
    """All images as uint8 ``(N, 3, S, S)``, labels, the teacher's logits."""
    packed = pack(data, SIZE)
    rows = np.array(packed.images.rows(split_), dtype=np.int64)
    images = torch.from_numpy(packed.pixels[packed.stored[rows]]).permute(0, 3, 1, 2)
    return images, packed.labels[rows], teacher(packed.batch(rows))["logits"]


def plain(step: Step, held: tuple[Tensor, Tensor, Tensor], batch: int, steps: int) -> float:
    """Steps per second."""
    images, labels, said = held
    start = time.perf_counter()
    order = torch.randperm(len(images), device=images.device)
    for number in range(steps):
        rows = order[number * batch : (number + 1) * batch]
        shown = images[rows].float().div_(255)
        for dim in (2, 3):
            flipped = (torch.rand(len(rows), device=images.device) < 0.5)[:, None, None, None]
            shown = torch.where(flipped, shown.flip(dim), shown)
        step(shown.contiguous(memory_format=torch.channels_last), labels[rows], said[rows])
    if images.is_cuda:
        torch.cuda.synchronize()
    return steps / (time.perf_counter() - start)


def side_by_side(
    data: dict[int, Images], teacher: Frozen, scratch: Path, rounds: int, device: str
) -> list[dict[str, Any]]:
    rows = []
    for (network, batch), steps in STEPS.items():
        table = data[batch * steps]
        step, (images, labels, said) = plain_step(NETWORKS[network]().to(device)), tensors(table, "train", teacher)
        held = images.to(device), labels.to(device), said.to(device)
        plain(step, held, batch, steps)
        pairs = []
        for number in range(rounds):
            turns = [
                lambda: ours(table, network, batch, teacher, scratch, device),  # noqa: B023
                lambda: plain(step, held, batch, steps),  # noqa: B023
            ]
            first = number % 2
            found = {first: turns[first](), 1 - first: turns[1 - first]()}
            pairs.append([found[0], found[1]])
        ratios = sorted(a / b for a, b in pairs)
        row = {"network": network, "batch": batch, "pairs": pairs, "ratio": statistics.median(ratios)}
        rows.append(row | {"low": ratios[0], "high": ratios[-1]})
        print(
            f"{network} batch {batch}: {[[round(x, 1) for x in pair] for pair in pairs]} {row['ratio']:.2f}", flush=True
        )
    return rows


def timed(work: Callable[[], object], times: int) -> float:
    """Median processor microseconds of a call."""
    work()
    found = []
    for _ in range(times):
        start = time.thread_time()
        work()
        found.append(1e6 * (time.thread_time() - start))
    return statistics.median(found)


def parts_of_a_step(data: Images, teacher: Frozen, batch: int, times: int) -> dict[str, float]:
    """Microseconds that a step spends beside forward, backward and optimiser."""
    made = experiment(data, "wrn_16_1", teacher, batch_size=batch)
    packed = pack(data, SIZE)
    rows = np.array(packed.images.rows("train"), dtype=np.int64)[:batch]
    views = torch.zeros(batch, dtype=torch.int64)

    def drawn() -> Batch:
        return packed.batch(rows, views, augment=made.augment, seed=0)

    cached: Any = kept_teacher(made, packed, torch.device("cpu"))
    shown = drawn()
    cached(shown)
    buffers, losses, tally = Buffers(NETWORKS["wrn_16_1"]()), [torch.rand(()) for _ in range(2)], Tally()

    def looked_at() -> None:
        tally.add("a step", batch, ["hard", "soft"], torch.stack(losses))
        tally.read({})

    return {
        "views": timed(drawn, times),
        "of these pixels to float": timed(lambda: torch.from_numpy(packed.pixels[rows]).float().div(255), times),
        "teacher's cache": timed(lambda: cached(shown), times),
        "seeding": timed(lambda: torch.manual_seed(_mixed(0, 1, 2, 3)), times),
        "keeping batch norm": timed(buffers.keep, times),
        "looking at the losses": timed(looked_at, times),
    }


def compiled(data: Images, teacher: Frozen, network: str, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    held = tensors(data, "train", teacher)
    torch.manual_seed(0)
    step = {False: plain_step(NETWORKS[network]()), True: plain_step(NETWORKS[network](), compiled=True)}
    plain(step[False], held, batch, 2)
    start = time.perf_counter()
    plain(step[True], held, batch, 2)
    first = time.perf_counter() - start
    pairs = [[plain(step[True], held, batch, steps), plain(step[False], held, batch, steps)] for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    found = {"network": network, "batch": batch, "pairs": pairs, "first_call_s": first}
    return found | {"ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


def over_one_pass(data: Images, teacher: Frozen, scratch: Path) -> dict[str, Any]:
    """Processor seconds of three students, each asking the teacher, and sharing its answers; 4 epochs, 2 views."""
    found: dict[str, Any] = {}
    for name, cache in (("asked by each", False), ("asked once", scratch / "kept")):
        found[name] = []
        for network in NETWORKS:
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                made = experiment(data, network, teacher, batch_size=64, epochs=4, views=2, cache=cache)
                Path(scratch / "kept").mkdir(exist_ok=True)
                start = time.process_time()
                hs.train(made, Path(out) / "run", device="cpu", precision="32-true")
                found[name].append(time.process_time() - start)
    sums = {name: sum(seconds) for name, seconds in found.items()}
    return {"students": list(NETWORKS), "seconds": found, "ratio": sums["asked by each"] / sums["asked once"]}


def stacked(data: Images, teacher: Frozen, batch: int, steps: int, rounds: int, seeds: int = 4) -> dict[str, Any]:
    """Four seeds of DSNet: their steps one after another, and one step of all with `torch.vmap`."""
    held = tensors(data, "train", teacher)
    alone = [plain_step(NETWORKS["DSNet"]()) for _ in range(seeds)]
    networks = [NETWORKS["DSNet"]().train() for _ in range(seeds)]
    weights, _ = torch.func.stack_module_state(networks)
    optimizer = torch.optim.Adam(weights.values(), lr=1e-3)

    def loss_of(own: dict[str, Tensor], images: Tensor, labels: Tensor, said: Tensor) -> Tensor:
        logits = torch.func.functional_call(networks[0], own, (images,))["logits"]
        away = F.log_softmax(said / 4, 1) - F.log_softmax(logits / 4, 1)  # vmap has no rule for F.kl_div
        soft = 16 * (F.softmax(said / 4, 1) * away).sum(1).mean()
        return 0.1 * F.cross_entropy(logits, labels) + 0.9 * soft

    every = torch.vmap(loss_of, in_dims=(0, None, None, None), randomness="different")

    def together(images: Tensor, labels: Tensor, said: Tensor) -> None:
        every(weights, images, labels, said).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def in_turn(images: Tensor, labels: Tensor, said: Tensor) -> None:
        for step in alone:
            step(images, labels, said)

    for step in (together, in_turn):
        plain(step, held, batch, 2)
    pairs = [[plain(together, held, batch, steps), plain(in_turn, held, batch, steps)] for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    found = {"seeds": seeds, "batch": batch, "pairs": pairs}
    return found | {"ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


def text_of(found: dict[str, Any]) -> str:
    lines = [f"{'network':12}{'batch':>6}{'ours':>10}{'plain':>10}  steps/s{'ratio':>8}  (range)"]
    for row in found.get("side_by_side", ()):
        own, other = (statistics.median(pair[i] for pair in row["pairs"]) for i in (0, 1))
        line = f"{row['network']:12}{row['batch']:>6}{own:>10.1f}{other:>10.1f}         "
        lines.append(f"{line}{row['ratio']:>8.2f}  ({row['low']:.2f} to {row['high']:.2f})")
    for batch, parts in found.get("parts", {}).items():
        said = ", ".join(f"{name} {value:,.0f}" for name, value in parts.items())
        lines.append(f"beside the network, batch {batch}, microseconds: {said}")
    for row in found.get("compiled", ()):
        lines.append(
            f"compiled, {row['network']} batch {row['batch']}: {row['ratio']:.2f} ({row['low']:.2f} to "
            f"{row['high']:.2f}) times the plain loop, after {row['first_call_s']:.0f} s of compiling"
        )
    if shared := found.get("one_pass"):
        count = len(shared["students"])
        lines.append(f"{count} students over one pass of the teacher: {shared['ratio']:.2f} times as fast")
    for row in found.get("stacked", ()):
        lines.append(
            f"{row['seeds']} seeds of DSNet stacked, batch {row['batch']}: {row['ratio']:.2f} ({row['low']:.2f} to "
            f"{row['high']:.2f}) times the same one after another"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="see that everything runs; writes nothing")
    parser.add_argument("--part", choices=("all", "steps", "rest"), default="all", help="steps: the first table alone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    small, rounds, part, device = arguments.small, 2 if arguments.small else 3, arguments.part, arguments.device
    if small:
        STEPS.update(dict.fromkeys(STEPS, 3))
    torch.set_num_threads(1)
    histill.evaluate.finish.finish = lambda out, info: None  # the page is no part of a step
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ |= {"HISTILL_CACHE": f"{scratch}/cache", "HISTILL_QUIET": "1"}
        rows = write_images(scratch / "images", 1600, SIZE)
        data = {}
        for images in {batch * steps for (_, batch), steps in STEPS.items()} | {640}:
            listed = [f"{row},{'train' if i < images else 'val'}" for i, row in enumerate(rows[: images + 8])]
            manifest = scratch / "images" / f"{images}.csv"
            manifest.write_text("\n".join(["path,label,split", *listed]) + "\n", encoding="utf-8")
            data[images] = read_images(manifest)
        torch.manual_seed(0)
        teacher = Frozen(Cifar("resnet32x4", classes=CLASSES))
        found: dict[str, Any] = {}
        if part != "rest":
            found["side_by_side"] = side_by_side(data, teacher, scratch, rounds, device)
        if part == "steps" or device != "cpu":
            return end(found, small, device)
        some, times = data[640], 20 if small else 200
        found["parts"] = {batch: parts_of_a_step(some, teacher, batch, times) for batch in (8, 64)}
        cases = [("DSNet", 8, 40), ("wrn_16_1", 8, 30)][: 1 if small else 2]
        found["compiled"] = [compiled(some, teacher, *case, rounds) for case in cases]
        found["one_pass"] = over_one_pass(data[8 * STEPS["DSNet", 8]] if small else some, teacher, scratch)
        found["stacked"] = [stacked(some, teacher, batch, 3 if small else 9, rounds) for batch in (8, 64)]
    return end(found, small, device)


def end(found: dict[str, Any], small: bool, device: str) -> None:
    """Print what was found; keep it beside the other part's."""
    if small:
        print(text_of(found), end="")
        return
    out = RESULTS / ("small.json" if device == "cpu" else f"small-{device}.json")
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    more = {"command": "python benchmarks/small.py", "machine": machine, "torch": torch.__version__}
    found = beside(out, found)
    leave(out, found | more, text_of(found))


if __name__ == "__main__":
    main()
