"""What every loss promises, written once and run over all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from histill import losses
from histill.errors import BadInput
from histill.losses.guide import table
from histill.types import Terms, total

CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A loss as ``make(dtype)(student, teacher, label) -> scalar``."""

    make: Callable[[torch.dtype], Callable[[Tensor, Tensor, Tensor], Tensor]]
    shape: tuple[int, ...] = (CLASSES,)
    zero: bool = False  # 0, its least value, where student and teacher agree
    teacher: bool = True
    one_shape: bool = True  # refuses a teacher of another shape
    per_image: bool = True  # a mean over images that do not know of each other
    permutable: bool = True
    batch_dim: int = 0


def plain(loss: Callable[[Tensor, Tensor, Tensor], Tensor], **options: object) -> Case:
    return Case(lambda dtype: loss, **options)  # type: ignore[arg-type]


def module(make: Callable[[], torch.nn.Module], **options: object) -> Case:
    def seeded(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        torch.manual_seed(0)
        network = make().to(torch.float64 if dtype == torch.float64 else torch.float32)

        def call(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
            if isinstance(network, losses.ReviewKD):
                return network([student, F.avg_pool2d(student, 2)], [teacher, F.avg_pool2d(teacher, 2)])
            if isinstance(network, losses.CRDMemory):
                torch.manual_seed(1)
                network.eval()
                return network(student, teacher, torch.arange(len(student), device=student.device))
            if isinstance(network, losses.Projection):
                return network(student, [teacher, teacher])
            return network(student, teacher)

        return call

    return Case(seeded, **options)  # type: ignore[arg-type]


def exits(terms: Callable[[list[Tensor], list[Tensor], Tensor, Tensor], Terms]) -> Case:
    def call(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        logits = list(student.unbind(1))
        return total(terms(logits, [z * 2 for z in logits], label, teacher[:, 0]))

    return plain(call, shape=(3, CLASSES), one_shape=False)


def star(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    prob, dist = teacher[:, 0].sigmoid(), teacher[:, 1:].abs()
    return total(losses.star_loss(student[:, :1], student[:, 1:], prob, dist))


MAPS = (6, 5, 5)
DENSE = (CLASSES, 4, 4)
RELATION = {"shape": (7,), "zero": True, "one_shape": False, "per_image": False}

CASES: dict[str, Case] = {
    "cross_entropy": plain(lambda s, t, y: losses.cross_entropy(s, y), teacher=False),
    "cross_entropy smoothed": plain(lambda s, t, y: losses.cross_entropy(s, y, smoothing=0.1), teacher=False),
    "cross_entropy weighted": plain(
        lambda s, t, y: losses.cross_entropy(s, y, weight=torch.arange(1, 6).to(s)), teacher=False
    ),
    "cross_entropy dense": plain(lambda s, t, y: losses.cross_entropy(s, y), shape=DENSE, teacher=False),
    "focal": plain(lambda s, t, y: losses.focal(s, y), teacher=False),
    "focal gamma 0.5": plain(lambda s, t, y: losses.focal(s, y, gamma=0.5, alpha=0.25), teacher=False),
    "focal dense": plain(
        lambda s, t, y: losses.focal(s, y, alpha=torch.arange(1, 6).to(s)), shape=DENSE, teacher=False
    ),
    "dice": plain(lambda s, t, y: losses.dice(s, y), shape=DENSE, teacher=False),
    "star_loss": plain(star, shape=DENSE),
    "kd": plain(lambda s, t, y: losses.kd(s, t, temperature=4), zero=True),
    "kd dense": plain(lambda s, t, y: losses.kd(s, t, temperature=1), shape=DENSE, zero=True),
    "kd standardized": plain(lambda s, t, y: losses.kd(s, t, temperature=2, standardize=True), zero=True),
    "soft_cross_entropy": plain(lambda s, t, y: losses.soft_cross_entropy(s, t, temperature=10)),
    "dkd": plain(lambda s, t, y: losses.dkd(s, t, y, alpha=1, beta=8, temperature=4), zero=True),
    "dkd dense": plain(lambda s, t, y: losses.dkd(s, t, y, alpha=1, beta=2, temperature=1), shape=DENSE, zero=True),
    "dist": plain(lambda s, t, y: losses.dist(s, t, beta=2, gamma=2, temperature=4), zero=True),
    "nkd": plain(lambda s, t, y: losses.nkd(s, t, y, gamma=1.5, temperature=2)),
    "hint": plain(lambda s, t, y: losses.hint(s, t), shape=MAPS, zero=True),
    "attention_transfer": plain(
        lambda s, t, y: losses.attention_transfer(s, t), shape=MAPS, zero=True, one_shape=False
    ),
    "VID": module(lambda: losses.VID(6, 6), shape=MAPS, one_shape=False),
    "AB": module(lambda: losses.AB(6, 6), shape=MAPS),
    "ReviewKD": module(lambda: losses.ReviewKD([6, 6], [6, 6]), shape=(6, 8, 8), one_shape=False),
    "rkd_distance": plain(lambda s, t, y: losses.rkd_distance(s, t), **RELATION),
    "rkd_angle": plain(lambda s, t, y: losses.rkd_angle(s, t), **RELATION),
    "pkt": plain(lambda s, t, y: losses.pkt(s, t), **RELATION),
    "similarity": plain(lambda s, t, y: losses.similarity(s, t), **RELATION),
    "correlation": plain(lambda s, t, y: losses.correlation(s, t), **RELATION),
    "cosine": plain(lambda s, t, y: losses.cosine(s, t), shape=(7,), zero=True),
    "cosine dense": plain(lambda s, t, y: losses.cosine(s, t), shape=MAPS, zero=True),
    "smooth_l1": plain(lambda s, t, y: losses.smooth_l1(s, t), shape=MAPS, zero=True),
    "Projection": module(lambda: losses.Projection(7, [7, 7], nested=[2, 4]), shape=(7,)),
    "crd": plain(lambda s, t, y: losses.crd(s, t), per_image=False),
    "CRDMemory": module(
        lambda: losses.CRDMemory(7, 7, 20, width=4, negatives=6),
        shape=(7,),
        one_shape=False,
        per_image=False,
        permutable=False,
    ),
    "SSKD": module(lambda: losses.SSKD(7, 7), shape=(7,), one_shape=False, per_image=False, batch_dim=1),
    "self_distillation": exits(lambda z, f, y, t: losses.self_distillation(z, f, y, teacher=t)),
    "self_distillation alone": exits(lambda z, f, y, t: losses.self_distillation(z, f, y)),
    "self_distillation reverse": exits(
        lambda z, f, y, t: losses.self_distillation(z, f, y, teacher=t, deep_ce="once", reverse=True)
    ),
    "be_your_own_teacher": exits(lambda z, f, y, t: losses.be_your_own_teacher(z, f, y)),
}
TAUGHT = [name for name, case in CASES.items() if case.teacher and "alone" not in name and "own" not in name]


def inputs(
    case: Case, batch: int, dtype: torch.dtype = torch.float64, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(case.shape) * 100 + batch)
    shape = (batch, *case.shape) if case.batch_dim == 0 else (3, batch, *case.shape)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    label = torch.randint(CLASSES, (batch, *(case.shape[1:] if case.shape == DENSE else ())), generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), label


def test_the_table_covers_every_loss() -> None:
    covered = {name.split()[0] for name in CASES}
    assert covered == set(losses.__all__) - {"GUIDE"}


@pytest.mark.parametrize("name", CASES)
def test_is_a_finite_scalar_that_teaches_the_student(name: str) -> None:
    student, teacher, label = inputs(CASES[name], 6)
    loss = CASES[name].make(torch.float64)(student, teacher, label)
    assert loss.shape == ()
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", TAUGHT)
def test_looks_at_the_teacher_and_gives_it_no_gradient(name: str) -> None:
    student, teacher, label = inputs(CASES[name], 6)
    call = CASES[name].make(torch.float64)
    teacher.requires_grad_()
    loss = call(student, teacher, label)
    loss.backward()
    assert teacher.grad is None or not teacher.grad.any()
    other = call(student, teacher.detach() ** 2, label)
    assert not torch.isclose(other, loss)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.zero])
def test_is_zero_where_student_and_teacher_agree_and_positive_elsewhere(name: str) -> None:
    student, teacher, label = inputs(CASES[name], 6)
    call = CASES[name].make(torch.float64)
    agreed = call(teacher.clone().requires_grad_(), teacher, label)
    # Pearson's correlation as published has 1e-8 in its denominator.
    assert abs(agreed.item()) < (1e-4 if name == "dist" else 1e-9)
    assert call(student, teacher, label) > 1e-4


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.shape != (3, CLASSES)])
def test_gradcheck(name: str) -> None:
    batch = 1 if CASES[name].shape in (DENSE, MAPS, (6, 8, 8)) else 3
    student, teacher, label = inputs(CASES[name], batch)
    call = CASES[name].make(torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: call(x, teacher, label), student, eps=1e-6, atol=1e-5, rtol=1e-3, fast_mode=True
    )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.permutable])
def test_does_not_depend_on_the_order_of_the_batch(name: str) -> None:
    case = CASES[name]
    student, teacher, label = inputs(case, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    call = case.make(torch.float64)
    shuffled = call(
        student.index_select(case.batch_dim, order), teacher.index_select(case.batch_dim, order), label[order]
    )
    torch.testing.assert_close(shuffled, call(student, teacher, label))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.per_image])
def test_is_a_mean_over_the_batch(name: str) -> None:
    student, teacher, label = inputs(CASES[name], 4)
    call = CASES[name].make(torch.float64)
    twice = call(torch.cat([student, student]), torch.cat([teacher, teacher]), torch.cat([label, label]))
    torch.testing.assert_close(twice, call(student, teacher, label))


@pytest.mark.parametrize("name", CASES)
def test_takes_a_batch_of_one(name: str) -> None:
    student, teacher, label = inputs(CASES[name], 1)
    loss = CASES[name].make(torch.float64)(student, teacher, label)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_is_finite_at_the_edge_of_half_precision(name: str, dtype: torch.dtype) -> None:
    student, teacher, label = inputs(CASES[name], 4, dtype, scale=1e4)
    loss = CASES[name].make(dtype)(student, teacher, label)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", CASES)
def test_survives_a_student_that_says_nothing(name: str) -> None:
    student, teacher, label = inputs(CASES[name], 4, torch.float32)
    silent = torch.zeros_like(student).requires_grad_()
    loss = CASES[name].make(torch.float32)(silent, teacher, label)
    (gradient,) = torch.autograd.grad(loss, silent)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    if name not in ("dist", "kd standardized"):  # these divide by a spread of 0, plus 1e-8 and 1e-7 as published
        assert gradient.abs().max() < 1e3


@pytest.mark.parametrize("name", CASES)
def test_is_computed_in_float32_under_autocast(name: str) -> None:
    student, teacher, label = inputs(CASES[name], 4, torch.float32)
    call = CASES[name].make(torch.float32)
    with torch.no_grad():
        expected = call(student, teacher, label)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(call(student, teacher, label), expected)


@pytest.mark.parametrize("name", [name for name in TAUGHT if CASES[name].one_shape])
def test_refuses_a_teacher_of_another_shape(name: str) -> None:
    student, teacher, label = inputs(CASES[name], 4)
    with pytest.raises(BadInput, match="shape"):
        CASES[name].make(torch.float64)(student, teacher[:, :1], label)


def test_the_guide_has_a_row_for_every_loss() -> None:
    assert {row.name for row in losses.GUIDE} == set(losses.__all__) - {"GUIDE"}
    assert all(vars(row).values() for row in losses.GUIDE)


def test_the_printed_guide_names_every_family_once_and_every_loss() -> None:
    lines = table().splitlines()
    families = [line for line in lines if line and not line.startswith(" ")]
    assert len(families) == len(set(families))
    assert set(families) == {row.family for row in losses.GUIDE}
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == [
        row.name for row in losses.GUIDE
    ]
