"""One tool of `training.py` in a process of its own: it warms up, then trains an epoch whenever it is told to.

    python training_tools.py NAME JOB.json

It says ``ready`` once it is warm. Each line of standard input is then one epoch, answered by a line of JSON; the end of
the input is the end. Every tool trains the same pair of networks with SGD on ``0.5 CE + 0.5 T^2 KL``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TextIO

ALPHA, TEMPERATURE = 0.5, 4.0
RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NAMES = {"resnet50": "resnet50", "vit_large": "vit_large_patch16_224"}
"""Teachers: torchvision's name and timm's."""
CROPS = {"zoom": 0.46, "shift": 0.14}
"""Histill's views that vary as much as crops of 20 to 100 % of the area do."""

KEPT = ExitStack()
"""Open to the end of the process."""

Epochs = Iterator[dict[str, Any]]
"""The first step warms up; each further one is an epoch and what is to be told of it."""


class Turns:
    """Waits for the word to go on, and says what came of the turn before."""

    def __init__(self, answers: TextIO) -> None:
        self.answers, self.start, self.processor = answers, None, 0.0
        self.told: dict[str, Any] = {}

    def wait(self) -> None:
        if self.start is not None:
            self.told["seconds"] = time.perf_counter() - self.start
            self.told["processor_s"] = time.process_time() - self.processor  # without the workers that load
        print(json.dumps(self.told) if self.start is not None else "ready", file=self.answers, flush=True)
        self.told = {}
        if not sys.stdin.readline():
            os._exit(0)  # out of somebody's training loop
        self.start, self.processor = time.perf_counter(), time.process_time()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # tools print
    importlib.import_module("histill.models._torchvision")  # PyPI's is not compiled for a CPU-only torch
    name, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    turns = Turns(answers)
    if name.startswith("histill"):
        ours(name.removeprefix("histill "), job, turns)
    for told in TOOLS[name](job):
        turns.told = told
        turns.wait()


# Peers


def torchdistill(job: dict[str, Any]) -> Epochs:
    """As its ``examples/torchvision/image_classification.py`` trains, with a configuration like its samples'."""
    import torch
    from torchdistill.common import yaml_util
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.misc.log import MetricLogger, SmoothedValue
    from torchdistill.models.official import get_image_classification_model

    device = torch.device(job["device"])

    def box_of(folder: str) -> Any:
        file = Path(job["out"]) / "torchdistill.yaml"
        file.write_text(
            CONFIG.format(
                folder=folder,
                teacher={"vit_large": "vit_l_16"}.get(job["teacher"], job["teacher"]),  # torchvision's names
                batch=job["batch"],
                workers=job["workers"],
                pin=job["device"] != "cpu",
                classes=job["classes"],
            )
        )
        config = yaml_util.load_yaml_file(str(file))
        teacher, student = (
            get_image_classification_model(config["models"][f"{which}_model"], False).to(device)
            for which in ("teacher", "student")
        )
        return get_distillation_box(teacher, student, config["datasets"], config["train"], device, None, False, 1)

    def epoch(box: Any, number: int) -> float:
        box.pre_epoch_process(epoch=number)
        logger = MetricLogger(delimiter="  ")
        logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
        logger.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
        for images, targets, extra in logger.log_every(box.train_data_loader, 1000, "epoch"):
            start = time.time()
            images, targets = images.to(device), targets.to(device)
            loss = box.forward_process(images, targets, extra)
            box.post_forward_process(loss=loss)
            logger.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
            logger.meters["img/s"].update(images.shape[0] / (time.time() - start))
        box.post_epoch_process()
        return float(logger.meters["loss"].global_avg)

    epoch(box_of(job["warm"]), 0)
    box = box_of(job["train"])
    number, told = 0, {}
    while True:
        yield told
        told = {"loss": epoch(box, number), "teacher_in_training_mode": box.teacher_model.training}
        number += 1


CONFIG = """\
datasets:
  train: !import_call
    key: 'torchvision.datasets.ImageFolder'
    init:
      kwargs:
        root: '{folder}'
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call
                  key: 'torchvision.transforms.RandomResizedCrop'
                  init:
                    kwargs:
                      size: [224, 224]
                      scale: [0.2, 1.0]
                - !import_call
                  key: 'torchvision.transforms.RandomHorizontalFlip'
                  init:
                    kwargs:
                      p: 0.5
                - !import_call
                  key: 'torchvision.transforms.ToTensor'
                  init:
                - !import_call
                  key: 'torchvision.transforms.Normalize'
                  init:
                    kwargs:
                      mean: [0.485, 0.456, 0.406]
                      std: [0.229, 0.224, 0.225]
models:
  teacher_model:
    key: '{teacher}'
    kwargs:
      num_classes: {classes}
      weights:
  student_model:
    key: 'resnet18'
    kwargs:
      num_classes: {classes}
train:
  log_freq: 1000
  num_epochs: 1000
  train_data_loader:
    dataset_id: 'train'
    sampler:
      class_or_func: !import_get
        key: 'torch.utils.data.RandomSampler'
      kwargs:
    kwargs:
      batch_size: {batch}
      num_workers: {workers}
      pin_memory: {pin}
      drop_last: False
    cache_output:
  teacher:
    forward_proc: 'forward_batch_only'
    sequential: []
    wrapper: 'DataParallel'
    requires_grad: False
  student:
    forward_proc: 'forward_batch_only'
    adaptations:
    sequential: []
    wrapper: 'DistributedDataParallel'
    requires_grad: True
    frozen_modules: []
  optimizer:
    key: 'SGD'
    kwargs:
      lr: 0.01
      momentum: 0.9
      weight_decay: 0.0005
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        kd:
          criterion:
            key: 'KDLoss'
            kwargs:
              student_module_path: '.'
              student_module_io: 'output'
              teacher_module_path: '.'
              teacher_module_io: 'output'
              temperature: 4.0
              alpha: 0.5
              reduction: 'batchmean'
          weight: 1.0
"""


def timm_task(job: dict[str, Any]) -> Epochs:
    """As timm's ``train.py`` trains with ``--kd-model-name``: its data set, transforms, loader, task and optimiser."""
    import timm
    import torch
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2
    from timm.task import LogitDistillationTask

    device = torch.device(job["device"])
    student = timm.create_model("resnet18", num_classes=job["classes"]).to(device)
    teacher = timm.create_model(NAMES[job["teacher"]], num_classes=job["classes"]).to(device)
    task = LogitDistillationTask(
        student,
        teacher,
        criterion=torch.nn.CrossEntropyLoss(),
        task_loss_weight=ALPHA,
        temperature=TEMPERATURE,
        device=device,
        verbose=False,
    )
    optimizer = create_optimizer_v2(student, opt="sgd", lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")  # its --amp

    def loader_of(folder: str) -> Any:
        return create_loader(
            create_dataset("", root=folder, split="train"),
            input_size=(3, 224, 224),
            batch_size=job["batch"],
            is_training=True,
            use_prefetcher=device.type == "cuda",
            scale=(0.2, 1.0),
            color_jitter=None,
            interpolation="bilinear",
            num_workers=job["workers"],
            device=device,
        )

    def epoch(loader: Any) -> dict[str, Any]:
        task.train()
        losses, count = 0.0, 0
        for images, targets in loader:
            images, targets = images.to(device), targets.to(device)
            optimizer.zero_grad()
            with precision:
                result = task(images, targets)
            result["loss"].backward()
            optimizer.step()
            losses, count = losses + result["loss"].item() * len(images), count + len(images)
        return {"loss": losses / count, "images": count}

    epoch(loader_of(job["warm"]))
    loader, told = loader_of(job["train"]), {}
    while True:
        yield told
        told = epoch(loader)


def plain(job: dict[str, Any], *, bf16: bool) -> Epochs:
    """A loop as a careful user writes it: the teacher in eval mode without gradients; with ``bf16`` channels last."""
    import timm
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    device = torch.device(job["device"])
    layout = torch.channels_last if bf16 else torch.contiguous_format
    student = timm.create_model("resnet18", num_classes=job["classes"]).to(device, memory_format=layout).train()
    teacher = timm.create_model(NAMES[job["teacher"]], num_classes=job["classes"]).to(device, memory_format=layout)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    transform = T.Compose(
        [T.RandomResizedCrop(224, (0.2, 1.0)), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
    )

    def loader_of(folder: str) -> Any:
        return DataLoader(
            ImageFolder(folder, transform),
            job["batch"],
            shuffle=True,
            num_workers=job["workers"],
            persistent_workers=job["workers"] > 0,
            pin_memory=device.type == "cuda",
        )

    def epoch(loader: Any) -> dict[str, Any]:
        losses = 0.0
        for images, labels in loader:
            images = images.to(device, memory_format=layout, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with torch.no_grad(), precision:
                said = teacher(images)
            with precision:
                logits = student(images)
            loss = distilled(logits.float(), said.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses += loss.item() * len(images)
        return {"loss": losses / len(loader.dataset)}

    epoch(loader_of(job["warm"]))
    loader, told = loader_of(job["train"]), {}
    while True:
        yield told
        told = epoch(loader)


def distilled(logits: Any, said: Any, labels: Any) -> Any:
    import torch.nn.functional as F

    soft = F.kl_div((logits / TEMPERATURE).log_softmax(1), (said / TEMPERATURE).softmax(1), reduction="batchmean")
    return ALPHA * F.cross_entropy(logits, labels) + (1 - ALPHA) * TEMPERATURE**2 * soft


# The limit: what the networks alone allow


def limit(job: dict[str, Any], *, teacher: bool, given: bool, tuned: bool = True) -> Epochs:
    """The student, with a teacher or its logits or neither, on a batch that lies in memory, in bf16, channels last.

    ``tuned``: with what Histill asks of the allocator; without, as torch comes.
    """
    import timm
    import torch
    import torch.nn.functional as F

    if tuned:
        from histill.machine import kept_memory

        KEPT.enter_context(kept_memory())
    device = torch.device(job["device"])
    student = timm.create_model("resnet18", num_classes=job["classes"])
    student = student.to(device, memory_format=torch.channels_last).train()
    master = None
    if teacher:
        master = timm.create_model(NAMES[job["teacher"]], num_classes=job["classes"]).eval().requires_grad_(False)
        master = master.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    images = torch.rand(job["batch"], 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(job["batch"], device=device) % job["classes"]
    logits = torch.randn(job["batch"], job["classes"], device=device)

    def steps(count: int) -> None:
        for _ in range(count):
            with torch.autocast(device.type, torch.bfloat16):
                said = logits
                if master is not None:
                    with torch.no_grad():
                        said = master(images)
                out = student(images)
            known = teacher or given
            loss = distilled(out.float(), said.float(), labels) if known else F.cross_entropy(out.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    steps(2)
    while True:
        yield {}
        steps(job["images"] // job["batch"])


# Histill


def objective(student: Any, teacher: Any, batch: Any) -> Any:
    from histill import losses

    return {
        "hard": (ALPHA, losses.cross_entropy(student["logits"], batch.labels)),
        "soft": (1 - ALPHA, losses.kd(student["logits"], teacher["logits"], temperature=TEMPERATURE)),
    }


def ours(way: str, job: dict[str, Any], turns: Turns) -> None:
    """`histill.train` as anyone calls it; the schedule of the learning rate waits for the turn.

    online: a new view in every epoch, the teacher asked for each. filling: the same, its answers kept. reading: the
    answers kept of the first epoch, which is the warm-up.
    """
    import torch

    from histill import read_images, train
    from histill.data import Augment, pack
    from histill.experiment import Experiment
    from histill.models import Timm
    from histill.teachers import Frozen

    start = time.perf_counter()
    data = read_images(job["train"])
    data = data.with_frame(data.frame.assign(split="train"))
    read = time.perf_counter() - start
    pack(data, 224)
    decoded = time.perf_counter() - start - read
    torch.manual_seed(0)
    teacher = Frozen(Timm(NAMES[job["teacher"]], job["classes"]))
    epochs = 1000

    def schedule(epoch: float) -> float:
        if isinstance(epoch, float) and epoch.is_integer() and epoch >= 1:  # `run.json` asks with whole numbers
            turns.told = {"hash_s": read, "decode_s": decoded}
            turns.wait()
        return 1.0

    train(
        Experiment(
            data=data,
            student=partial(Timm, name="resnet18", classes=job["classes"]),
            objective=objective,
            image_size=224,
            teacher=teacher,
            augment=Augment(vflip=False, **CROPS),
            views={"online": None, "filling": epochs, "reading": 1}[way],
            cache=Path(job["out"]) / "cache" if way != "online" else False,
            epochs=epochs,
            batch_size=job["batch"],
            optimizer=partial(torch.optim.SGD, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY),
            schedule=schedule,
            select="last",
        ),
        Path(job["out"]) / "run",
        device=job["device"],
        checkpoint_seconds=3600.0,
    )


TOOLS: dict[str, Callable[[dict[str, Any]], Epochs]] = {
    "torchdistill": torchdistill,
    "timm's task": timm_task,
    "plain fp32": partial(plain, bf16=False),
    "plain bf16": partial(plain, bf16=True),
    "limit: student": partial(limit, teacher=False, given=False),
    "limit: student, torch as it comes": partial(limit, teacher=False, given=False, tuned=False),
    "limit: student and given logits": partial(limit, teacher=False, given=True),
    "limit: student and teacher": partial(limit, teacher=True, given=True),
}


if __name__ == "__main__":
    main()
