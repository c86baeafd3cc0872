"""Losses between the logits of student and teacher (response-based distillation).

Logits are ``(B, C)``, or ``(B, C, H, W)`` of a dense task, where each pixel counts as an image. The teacher is a
constant: it is detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from histill.losses._shared import constant, kl, mean_labelled, precise, rows

__all__ = ["dist", "dkd", "kd", "nkd", "soft_cross_entropy"]


@precise
def kd(student: Tensor, teacher: Tensor, *, temperature: float, standardize: bool = False) -> Tensor:
    """Distillation of softened probabilities (Hinton et al. 2015).

    ``L = T^2 mean_b KL(softmax(z_t / T) || softmax(z_s / T))``: torch's ``batchmean`` KL. The factor keeps the
    gradient's size as T grows; as T goes to infinity L goes to ``mean_b |z_s - z_t|^2 / (2 C)`` of centred logits.

    Args:
        student: ``(B, C)`` logits.
        teacher: ``(B, C)`` logits.
        temperature: T, above 0; 1 for USI (Ridnik et al. 2022).
        standardize: replace each image's logits by their z-scores over the classes, ``(z - mean) / (std + 1e-7)``
            with the biased std (logit standardization, Sun et al. 2024), so that only their shape has to match. Of two
            classes it is 1 and -1 always, and nothing can be learnt.
    """
    teacher = constant(student, teacher)
    if standardize:
        student, teacher = _standardized(student), _standardized(teacher)
    log_s, log_t = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return temperature**2 * kl(log_t, log_s).mean()


def _standardized(logits: Tensor) -> Tensor:
    std, mean = torch.std_mean(logits, dim=1, correction=0, keepdim=True)
    return (logits - mean) / (std + 1e-7)


@precise
def soft_cross_entropy(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy with the teacher's softened probabilities, without the factor T^2 (DSNet, equation 5).

    ``L = mean_b -sum_c softmax(z_t / T)_c log softmax(z_s / T)_c``; its least value is the teacher's entropy.

    Args:
        student: ``(B, C)`` logits.
        teacher: ``(B, C)`` logits.
        temperature: T, above 0.
    """
    teacher = constant(student, teacher)
    log_s, p_t = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    return -(p_t * log_s).sum(1).mean()


@precise
def dkd(student: Tensor, teacher: Tensor, label: Tensor, *, alpha: float, beta: float, temperature: float) -> Tensor:
    """Decoupled distillation (Zhao et al. 2022, equation 7): how sure, and what else it might be, weighed apart.

    ``L = T^2 mean_b (alpha TCKD + beta NCKD)``; TCKD is the KL of (true class, any other class), NCKD the KL among
    the other classes. ``kd`` is ``TCKD + (1 - p_t[y]) NCKD``, which mutes NCKD where the teacher is sure.

    Args:
        student: ``(B, C)`` logits.
        teacher: ``(B, C)`` logits.
        label: ``(B,)`` class numbers; images of label -1 are left out of the mean.
        alpha: weight of TCKD; 1 as published.
        beta: weight of NCKD; 1 to 8 as published, more where the teacher is surer.
        temperature: T; 4 on CIFAR-100 and 1 on ImageNet as published.
    """
    teacher = constant(student, teacher)
    z_s, flat_label = rows(student / temperature, label)
    z_t, _ = rows(teacher / temperature, label)
    tckd = kl(_true_and_rest(z_t, flat_label), _true_and_rest(z_s, flat_label))
    nckd = kl(_others(z_t, flat_label).log_softmax(1), _others(z_s, flat_label).log_softmax(1))
    return temperature**2 * mean_labelled(alpha * tckd + beta * nckd, flat_label)


@precise
def nkd(student: Tensor, teacher: Tensor, label: Tensor, *, gamma: float, temperature: float) -> Tensor:
    """Normalized distillation (NKD; Yang et al. 2023), without the cross-entropy that goes with it.

    ``L = mean_b (-p_t[y] log p_s[y] - gamma T^2 sum_{c != y} N(p_t)_c log N(p_s)_c)``, N the softmax over the other
    classes at temperature T; the true class is taken at temperature 1.

    Args:
        student: ``(B, C)`` logits.
        teacher: ``(B, C)`` logits.
        label: ``(B,)`` class numbers; images of label -1 are left out of the mean.
        gamma: 1.5 as published.
        temperature: T; 1 as published.
    """
    teacher = constant(student, teacher)
    z_s, flat_label = rows(student, label)
    z_t, _ = rows(teacher, label)
    y = flat_label.clamp(min=0)[:, None]
    target = -(z_t.softmax(1).gather(1, y) * z_s.log_softmax(1).gather(1, y)).squeeze(1)
    p_t = (_others(z_t, flat_label) / temperature).softmax(1)
    log_s = (_others(z_s, flat_label) / temperature).log_softmax(1)
    return mean_labelled(target - gamma * temperature**2 * (p_t * log_s).sum(1), flat_label)


def _others(logits: Tensor, label: Tensor) -> Tensor:
    """``(N, C - 1)``: the logits of the classes that the label is not."""
    classes = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, classes + (classes >= label.clamp(min=0)[:, None]))


def _true_and_rest(logits: Tensor, label: Tensor) -> Tensor:
    """``(N, 2)``: log-probabilities of the true class and of all others together."""
    log_p = logits.log_softmax(1)
    true = log_p.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
    return torch.stack([true, _others(log_p, label).logsumexp(1)], dim=1)


@precise
def dist(student: Tensor, teacher: Tensor, *, beta: float, gamma: float, temperature: float) -> Tensor:
    """Distillation from a stronger teacher (DIST; Huang et al. 2022): match relations, not values.

    ``L = T^2 (beta mean_b (1 - r(p_s[b], p_t[b])) + gamma mean_c (1 - r(p_s[:, c], p_t[:, c])))``, r Pearson's
    correlation of softened probabilities, with 1e-8 added to its denominator as in its authors' code: where there
    is no spread, as over a batch of one, r is 0.

    Args:
        student: ``(B, C)`` logits.
        teacher: ``(B, C)`` logits.
        beta: weight of the relation between classes; 1 on ImageNet, 2 on CIFAR-100 as published.
        gamma: weight of the relation within a class; as beta.
        temperature: T; 1 on ImageNet, 4 on CIFAR-100 as published.
    """
    teacher = constant(student, teacher)
    p_s = (student / temperature).softmax(1).movedim(1, -1).flatten(0, -2)
    p_t = (teacher / temperature).softmax(1).movedim(1, -1).flatten(0, -2)
    inter = (1 - _pearson(p_s, p_t)).mean()
    intra = (1 - _pearson(p_s.T, p_t.T)).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / (norms + 1e-8)
