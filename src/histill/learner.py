"""What trains, behind one forward, and what goes along with it: frozen parameters, an average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from histill.data.images import Images
from histill.errors import BadInput
from histill.experiment import Experiment
from histill.types import Batch, Outputs, Terms, named

__all__ = ["Average", "Learner", "check_answers", "freeze"]


class Learner(nn.Module):
    """Whatever trains, behind one forward: the student, and the objective where it has weights of its own.

    An objective with a ``step`` is told before each step how many were done, so that it can change with time.
    """

    def __init__(self, student: nn.Module, experiment: Experiment) -> None:
        super().__init__()
        self.student = student
        self.objective = copy.deepcopy(experiment.objective)
        self.inputs = experiment.inputs
        follow = getattr(self.objective, "follow", None)
        if follow is not None:  # a momentum encoder starts as the student and moves after it
            follow(student)

    def begin(self, step: int) -> None:
        """Before each step: how many were done."""
        if hasattr(self.objective, "step"):
            self.objective.step = step

    def forward(self, batch: Batch, teacher: Outputs) -> Terms:
        shown = batch.images if self.inputs is None else self.inputs(batch, teacher)
        return self.objective(named(self.student(shown), "the student"), teacher, batch)


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Leave the parameters whose names fit a pattern as they are; `BadInput` where a pattern fits none."""
    for pattern in patterns:
        found = [p for name, p in network.named_parameters() if fnmatchcase(name, pattern)]
        if not found:
            raise BadInput(f"frozen: {type(network).__name__} has no parameter named {pattern}")
        for parameter in found:
            parameter.requires_grad_(False)


@torch.no_grad()
def check_answers(network: nn.Module, data: Images, size: int) -> None:
    """Ask a network once, so that one that cannot learn these labels or masks is refused before it has learnt.

    Raises:
        BadInput: it gives no named tensors, another number of classes, or one answer for an image with a mask.
    """
    from histill.evaluate.masks import label_map

    mode = network.training
    said = named(network.eval()(torch.zeros(1, 3, size, size)), "the student")
    network.train(mode)
    if data.masks:
        label_map(said, (size, size))
    elif data.classes and "logits" in said and said["logits"].shape != (1, len(data.classes)):
        raise BadInput(
            f"the student's logits of one image have the shape {tuple(said['logits'].shape)}, and the data has "
            f"{len(data.classes)} classes ({', '.join(data.classes)}): (1, {len(data.classes)})"
        )


class Average:
    """Exponential moving average of weights and buffers; the decay starts low to forget the first ones."""

    def __init__(self, student: nn.Module, decay: float, device: torch.device) -> None:
        self.decay = decay
        self.network = copy.deepcopy(student).requires_grad_(False).to(device)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        both = list(zip(self.network.state_dict().values(), student.state_dict().values()))
        real = [pair for pair in both if pair[0].is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in real], [value for _, value in real], weight)
        for count, value in both:
            if not count.is_floating_point():
                count.copy_(value)
