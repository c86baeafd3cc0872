"""Contrastive losses: naive references, the memory banks, who the negatives are."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from histill.errors import BadInput
from histill.losses import SSKD, CRDMemory, crd


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt()))


def test_crd_in_the_batch_is_infonce_both_ways() -> None:
    student, teacher = features(5, 4), features(5, 4, seed=1)
    scores = np.array([[cosine(s, t) / 0.1 for t in teacher] for s in student])
    expected = 0.0
    for table in (scores, scores.T):
        expected += np.mean([math.log(np.exp(row).sum()) - row[i] for i, row in enumerate(table)]) / 2
    assert crd(student, teacher, temperature=0.1).item() == pytest.approx(expected)


def test_crd_is_least_where_each_image_finds_itself() -> None:
    teacher = torch.eye(4)
    assert crd(3 * teacher, teacher).item() == pytest.approx(3 * math.exp(-1 / 0.07), rel=0.05, abs=1e-6)
    assert crd(teacher.roll(1, 0), teacher).item() > 10


@pytest.fixture
def memory() -> CRDMemory:
    torch.manual_seed(0)
    return CRDMemory(5, 6, images=9, width=4, negatives=7, labels=torch.tensor([0, 1, 2, 0, 1, 2, 0, -1, -1])).double()


def test_crd_memory_is_the_equation(memory: CRDMemory) -> None:
    student, teacher, index = features(3, 5), features(3, 6, seed=1), torch.tensor([4, 0, 8])
    banks = memory.memory_student.clone(), memory.memory_teacher.clone()
    torch.manual_seed(1)
    negatives = memory.draw(index)
    torch.manual_seed(1)
    loss = memory(student, teacher, index)

    expected = 0.0
    for linear, x, bank in ((memory.embed_student, student, banks[1]), (memory.embed_teacher, teacher, banks[0])):
        v = linear(x).detach()
        v = v / v.square().sum(1, keepdim=True).sqrt()
        e = np.array([[math.exp(float(v[b] @ bank[k]) / 0.07) for k in [index[b], *negatives[b]]] for b in range(3)])
        e /= e.mean() * 9
        h = e / (e + 7 / 9)
        expected += float(np.mean([-math.log(row[0]) - np.log(1 - row[1:]).sum() for row in h]))
    assert loss.item() == pytest.approx(expected)


def test_negatives_are_of_other_classes_and_unlabelled_images_of_their_own(memory: CRDMemory) -> None:
    label = [0, 1, 2, 0, 1, 2, 0, -1, -1]
    drawn = torch.cat([memory.draw(torch.arange(9)) for _ in range(60)], dim=1)
    for image in range(9):
        others = {k for k in range(9) if k != image and (label[k] != label[image] or label[k] < 0)}
        assert set(drawn[image].tolist()) == others


def test_negatives_without_labels_are_all_other_images() -> None:
    drawn = CRDMemory(2, 2, images=5, width=2, negatives=200).draw(torch.arange(5))
    for image in range(5):
        assert set(drawn[image].tolist()) == set(range(5)) - {image}


def test_the_banks_move_in_training_and_only_then(memory: CRDMemory) -> None:
    student, teacher, index = features(3, 5), features(3, 6, seed=1), torch.tensor([4, 0, 8])
    before = memory.memory_student.clone()
    memory.eval()(student, teacher, index)
    assert torch.equal(memory.memory_student, before)
    memory.train()(student, teacher, index)
    v = memory.embed_student(student)
    moved = 0.5 * before[index] + 0.5 * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(memory.memory_student[index], moved / moved.norm(dim=1, keepdim=True))
    rest = torch.tensor([1, 2, 3, 5, 6, 7])
    assert torch.equal(memory.memory_student[rest], before[rest])


def test_momentum_is_the_share_that_stays_and_banks_begin_at_about_unit_length() -> None:
    memory = CRDMemory(5, 6, images=400, width=32, negatives=7, momentum=0.9).double()
    for bank in (memory.memory_student, memory.memory_teacher):
        assert float(bank.square().sum(1).mean()) == pytest.approx(1, abs=0.05)
    student, teacher, index = features(3, 5), features(3, 6, seed=1), torch.tensor([4, 0, 8])
    before = memory.memory_teacher.clone()
    memory(student, teacher, index)
    v = memory.embed_teacher(teacher)
    moved = 0.9 * before[index] + 0.1 * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(memory.memory_teacher[index], moved / moved.norm(dim=1, keepdim=True))
    assert CRDMemory(2, 2, images=3).negatives == 16384  # as published


def test_the_normalizer_is_set_once_and_saved(memory: CRDMemory) -> None:
    memory(features(3, 5), features(3, 6, seed=1), torch.tensor([4, 0, 8]))
    first = memory.normalizer.clone()
    assert (first > 0).all()
    memory(features(3, 5, seed=2), features(3, 6, seed=3), torch.tensor([1, 2, 3]))
    assert torch.equal(memory.normalizer, first)
    assert {"normalizer", "memory_student", "memory_teacher"} <= set(memory.state_dict())
    assert "order" not in memory.state_dict()


def test_crd_memory_trains_both_projections(memory: CRDMemory) -> None:
    optimizer = torch.optim.SGD(memory.parameters(), lr=0.02)
    student, teacher, index = features(9, 5), features(9, 6, seed=1), torch.arange(9)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = memory(student, teacher, index)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in memory.parameters())
    assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.5


@pytest.mark.parametrize(
    ("labels", "message"), [(torch.zeros(4, dtype=torch.long), "one class"), (torch.arange(3), "4 images")]
)
def test_crd_memory_refuses_labels_that_leave_no_negatives(labels: Tensor, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        CRDMemory(2, 2, images=4, labels=labels)


def naive_sskd(sskd: SSKD, student: Tensor, teacher: Tensor) -> float:
    views, batch = student.shape[:2]
    p_s, p_t = sskd.head_student(student).detach(), sskd.head_teacher(teacher).detach()
    rows = []
    for v in range(1, views):
        for b in range(batch):
            a_s = np.array([cosine(p_s[v, b], p_s[0, j]) for j in range(batch)]) / 0.5
            a_t = np.array([cosine(p_t[v, b], p_t[0, j]) for j in range(batch)]) / 0.5
            p, q = np.exp(a_t) / np.exp(a_t).sum(), np.exp(a_s) / np.exp(a_s).sum()
            rank = int((a_t > a_t[b]).sum())
            rows.append((rank, -a_t[b], float((p * np.log(p / q)).sum())))
    right = [kl for rank, _, kl in rows if rank == 0]
    wrong = sorted(row for row in rows if row[0] > 0)
    kept = right + [kl for _, _, kl in wrong[: int(0.75 * len(wrong))]]
    return 0.25 * float(np.mean(kept))


@pytest.mark.parametrize("seed", range(4))
def test_sskd_is_the_equation(seed: int) -> None:
    torch.manual_seed(seed)
    sskd = SSKD(4, 6).double()
    student, teacher = features(4, 5, 4, seed=seed), features(4, 5, 6, seed=seed + 10)
    teacher = teacher[:1] + teacher  # views of an image resemble it, so that some answers are right
    assert sskd(student, teacher).item() == pytest.approx(naive_sskd(sskd, student, teacher))


def test_sskd_trains_the_students_head_and_pretext_the_teachers() -> None:
    sskd = SSKD(4, 6).double()
    student, teacher = features(4, 5, 4), features(4, 5, 6, seed=1)
    sskd(student, teacher).backward()
    assert all(parameter.grad is not None for parameter in sskd.head_student.parameters())
    assert all(parameter.grad is None for parameter in sskd.head_teacher.parameters())
    sskd.pretext(teacher).backward()
    assert all(parameter.grad is not None for parameter in sskd.head_teacher.parameters())


def test_pretext_is_a_classification_of_plain_images() -> None:
    sskd = SSKD(4, 6).double()
    teacher = features(3, 5, 6)
    p = sskd.head_teacher(teacher).detach()
    expected = []
    for v in (1, 2):
        for b in range(5):
            a = np.array([cosine(p[v, b], p[0, j]) for j in range(5)]) / 0.5
            expected.append(math.log(np.exp(a).sum()) - a[b])
    assert sskd.pretext(teacher).item() == pytest.approx(np.mean(expected))
