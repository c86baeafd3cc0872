"""The objectives of self-supervised pretraining are their papers' equations, and what must not train does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Tiny
from torch import Tensor, nn

from histill.data.views import Augment, render
from histill.errors import BadInput
from histill.models import CSAT, ResNet18SAT, Timm, load_weights
from histill.models.masked import MaskedTimm
from histill.pretrain.lars import LARS, adamw, lars, rising, sgd
from histill.pretrain.mixing import Mix, Mixed, supervised
from histill.pretrain.objectives import MAE, BarlowTwins, MoCo, SimCLR, two_views
from histill.types import Batch, Outputs, total

VIEWS = Augment(zoom=0.5, brightness=0.3)


def batch(count: int = 4, size: int = 16, *, seed: int = 0, view: int = 0, classes: int = 3) -> Batch:
    """A batch of random pictures in one view, as the loop would make it."""
    rng = np.random.default_rng(seed)
    ids, views = torch.arange(count), torch.full((count,), view)
    stored: dict[int, Tensor] = {}

    def at(size: int, twin: int = 0) -> Tensor:
        if size not in stored:
            stored[size] = torch.from_numpy(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8))
        return render(stored[size], ids, views + (twin << 40), augment=VIEWS, seed=seed)

    return Batch(at(size), ids % classes, ids, views, at)


# Optimisers


def naive_lars(
    weights: list[Tensor], gradients: list[list[Tensor]], rates: list[tuple[float, float]], decay: float, eta: float
) -> list[Tensor]:
    """The recipe's definition in numpy and float64, a step and a tensor at a time."""
    values = [w.double().numpy().copy() for w in weights]
    moments = [np.zeros_like(v) for v in values]
    for step, (lr, lr_vectors) in enumerate(rates):
        for k, value in enumerate(values):
            change = gradients[step][k].double().numpy()
            if value.ndim > 1:
                change = change + decay * value
                size, length = np.sqrt((value**2).sum()), np.sqrt((change**2).sum())
                if size > 0 and length > 0:
                    change = change * eta * size / length
            moments[k] = 0.9 * moments[k] + change
            values[k] = value - (lr if value.ndim > 1 else lr_vectors) * moments[k]
    return [torch.as_tensor(v) for v in values]


@pytest.mark.parametrize("decay", [1e-6, 0.3])
def test_lars_is_the_definition_step_by_step(decay: float) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, 4), torch.randn(5), torch.zeros(2, 2), torch.randn(1, 1, 6), torch.tensor(0.7)]
    gradients = [[torch.randn_like(w) for w in weights] for _ in range(5)]
    gradients[2][0].zero_()  # nothing but decay
    rates = [(0.0, 0.0), (0.1, 0.0024), (0.2, 0.0048), (0.15, 0.004), (0.1, 0.002)]
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = lars(parameters, lr=0.2, lr_vectors=0.0048, weight_decay=decay)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.0048]
    for step, pair in enumerate(rates):
        for group, rate in zip(optimizer.param_groups, pair):
            group["lr"] = rate
        for p, gradient in zip(parameters, gradients[step]):
            p.grad = gradient.clone()
        optimizer.step()
    for p, wanted in zip(parameters, naive_lars(weights, gradients, rates, decay, 1e-3)):
        assert torch.allclose(p.double(), wanted, rtol=1e-5, atol=1e-7)


def test_lars_differs_from_the_kept_one_that_scales_by_another_norm() -> None:
    """With the recipe's decay hardly, with a stronger one plainly: the sum of two norms is not the norm of a sum."""
    from timm.optim import Lars

    def moved(make: Callable[[list[nn.Parameter]], Any]) -> Tensor:
        p = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        p.grad = torch.tensor([[-3.0, -4.0]]) * 0.5
        make([p]).step()
        return p.detach() - torch.tensor([[3.0, 4.0]])

    ours = moved(lambda p: LARS(p, 1.0, weight_decay=0.25))
    kept = moved(lambda p: Lars(p, lr=1.0, momentum=0.9, weight_decay=0.25))
    assert torch.allclose(ours.norm(), torch.tensor(1e-3 * 5), atol=1e-6)  # eta |p|, whatever the gradient
    assert torch.allclose(kept.norm(), torch.tensor(1e-3 * 5 / 3), atol=1e-6)


def test_frozen_parameters_are_in_no_group() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    for made in (
        lars(layer.parameters(), lr=1.0),
        adamw(layer.parameters(), lr=1.0, weight_decay=0.1),
        sgd(layer.parameters(), lr=1.0, weight_decay=0.1),
    ):
        assert [p is layer.weight for group in made.param_groups for p in group["params"]] == [True]


def test_only_weights_are_decayed_by_adamw() -> None:
    groups = adamw(nn.Linear(2, 2).parameters(), lr=1.0, weight_decay=0.1).param_groups
    assert [(group["params"][0].ndim, group["weight_decay"]) for group in groups] == [(2, 0.1), (1, 0.0)]


def test_the_schedule_rises_and_falls_as_barlow_twins_does() -> None:
    """Its formula, written out: 0 to 1 over 10 epochs, then q + 0.001 (1 - q), q half a cosine over the other 90."""
    schedule = rising(100, 10, final=0.001)
    for epoch in (0, 2.5, 5, 10, 37.25, 55, 99.9):
        q = 0.5 * (1 + math.cos(math.pi * (epoch - 10) / 90))
        wanted = epoch / 10 if epoch < 10 else q + 0.001 * (1 - q)
        assert schedule(epoch) == pytest.approx(wanted)
    assert rising(10, 0)(0) == 1
    assert rising(300, 5, start=0.05)(0) == 0.05


# Two views


def test_two_views_are_the_batch_and_independent_views_of_the_same_images() -> None:
    given = batch()
    both = two_views(given, Outputs())
    assert both.shape == (8, 3, 16, 16)
    assert torch.equal(both[:4], given.images)
    assert torch.equal(both, two_views(given, Outputs()))
    assert (both[4:] != given.images).flatten(1).any(1).all()


@pytest.mark.parametrize("make", [BarlowTwins, SimCLR])
def test_one_view_where_two_are_wanted_is_named(make: type[nn.Module]) -> None:
    with pytest.raises(BadInput, match="two_views"):
        make(3, head_width=4)(Outputs(pooled=torch.randn(4, 3)), Outputs(), batch())


# Barlow Twins


def test_barlow_twins_is_its_equation() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(32, 6), torch.randn(32, 6)
    a, b = ((z.double() - z.double().mean(0)) / z.double().std(0, unbiased=False) for z in (first, second))
    c = a.T @ b / 32
    wanted = sum((1 - c[i, i]) ** 2 for i in range(6)) + 0.0051 * sum(
        c[i, j] ** 2 for i in range(6) for j in range(6) if i != j
    )
    found = BarlowTwins(3, head_width=6).compare(first, second)
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)  # batch norm's epsilon


def test_barlow_twins_of_identical_views_is_the_redundancy_alone() -> None:
    torch.manual_seed(0)
    z = torch.randn(64, 5)
    z = (z - z.mean(0)) / z.std(0, unbiased=False)
    c = (z.T @ z / 64).fill_diagonal_(0)
    assert float(BarlowTwins(3, head_width=5).compare(z, z)) == pytest.approx(0.0051 * float((c**2).sum()), rel=1e-3)
    whitened = torch.linalg.qr(z)[0] * 8  # no correlation left
    whitened = torch.linalg.qr(whitened - whitened.mean(0))[0] * 8
    assert float(BarlowTwins(3, head_width=5).compare(whitened, whitened)) < 1e-6


# SimCLR


def test_simclr_is_naive_nt_xent() -> None:
    torch.manual_seed(0)
    first, second, temperature = torch.randn(5, 7), torch.randn(5, 7), 0.3
    z = torch.cat([first, second]).double()
    cosine = [[float(a @ b / a.norm() / b.norm()) for b in z] for a in z]
    losses = []
    for i in range(10):
        others = sum(math.exp(cosine[i][k] / temperature) for k in range(10) if k != i)
        losses.append(-math.log(math.exp(cosine[i][(i + 5) % 10] / temperature) / others))
    found = SimCLR(3, temperature=temperature).compare(first, second)
    assert float(found) == pytest.approx(sum(losses) / 10, rel=1e-5)


# MoCo


class Learner(nn.Module):
    """What the training loop trains, in miniature: the student, and an objective that follows it."""

    def __init__(self, student: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        if isinstance(objective, MoCo):
            objective.follow(student)

    def forward(self, given: Batch) -> Tensor:
        two = isinstance(self.objective, BarlowTwins | SimCLR)
        shown = two_views(given, Outputs()) if two else given.images
        return total(self.objective(self.student(shown), Outputs(), given))


def moco_learner(queue: int = 8, **options: float) -> tuple[Learner, torch.optim.Optimizer]:
    torch.manual_seed(3)
    learner = Learner(Timm("test_resnet", 0), MoCo(96, head_width=4, queue=queue, **options))
    return learner, sgd(learner.parameters(), lr=0.1, weight_decay=1e-4)


def trained(learner: nn.Module, optimizer: torch.optim.Optimizer, given: Batch) -> float:
    optimizer.zero_grad()
    loss: Tensor = learner(given)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def test_moco_is_its_equation_and_remembers_keys_in_order() -> None:
    torch.manual_seed(0)
    objective = MoCo(3, head_width=4, queue=6, temperature=0.2)
    bank = objective.loss.memory_bank.bank
    queue = bank.clone()
    for number in range(3):  # 2 + 2 + 2 keys, then the first place again
        query, key = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
        q, k = query.detach().double(), key.double()
        q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
        wanted = 0.0
        for i in range(2):
            own = math.exp(float(q[i] @ k[i]) / 0.2)
            wanted -= math.log(own / (own + sum(math.exp(float(q[i] @ old) / 0.2) for old in queue.double()))) / 2
        assert float(objective.compare(query, key).detach()) == pytest.approx(wanted, rel=1e-4)
        queue[2 * number : 2 * number + 2] = k.float()
        assert torch.allclose(bank, queue)
    objective.compare(torch.randn(2, 4, requires_grad=True), key)
    assert torch.allclose(bank[:2], k.float())


def test_moco_copy_follows_by_the_momentum_and_is_not_optimised() -> None:
    learner, optimizer = moco_learner(momentum=0.75)
    objective = learner.objective
    assert isinstance(objective, MoCo)
    pairs = [(learner.student, objective.key_student), (objective.head, objective.key_head)]
    for ours, theirs in pairs:
        assert isinstance(theirs, nn.Module)
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    trained(learner, optimizer, batch(size=32))
    moved = [[p.detach().clone() for p in ours.parameters()] for ours, _ in pairs]
    before = [[p.clone() for p in theirs.parameters()] for _, theirs in pairs]  # type: ignore[union-attr]
    assert any(not torch.equal(a, b) for a, b in zip(moved[0], before[0]))
    trained(learner, optimizer, batch(size=32, view=1))
    for (_, theirs), new, old in zip(pairs, moved, before):
        for p, a, b in zip(theirs.parameters(), new, old):  # type: ignore[union-attr]
            assert torch.allclose(p, 0.75 * b + 0.25 * a, atol=1e-7)
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for _, theirs in pairs:
        assert isinstance(theirs, nn.Module)
        assert all(id(p) not in optimised and p.grad is None and not p.requires_grad for p in theirs.parameters())
    assert optimised == {id(p) for module, _ in pairs for p in module.parameters()}


def test_moco_does_not_move_in_evaluation() -> None:
    learner, optimizer = moco_learner()
    trained(learner, optimizer, batch(size=32))
    learner.eval()
    before = copy.deepcopy(learner.state_dict())
    with torch.no_grad():
        learner(batch(size=32, view=1))
    assert all(torch.equal(before[name], value) for name, value in learner.state_dict().items())


def test_moco_goes_on_from_a_checkpoint_to_the_same_bits() -> None:
    learner, optimizer = moco_learner()
    losses = [trained(learner, optimizer, batch(size=32, view=view)) for view in range(2)]
    saved = copy.deepcopy((learner.state_dict(), optimizer.state_dict()))
    losses += [trained(learner, optimizer, batch(size=32, view=view)) for view in range(2, 4)]
    again, its_optimizer = moco_learner()
    again.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    assert [trained(again, its_optimizer, batch(size=32, view=view)) for view in range(2, 4)] == losses[2:]
    for name, value in learner.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert "objective.loss.memory_bank.bank" in saved[0]
    assert "objective.key_student.network.conv1.0.weight" in saved[0]
    assert not any(name.startswith("objective._student") for name in saved[0])


def test_moco_without_its_student_says_so() -> None:
    with pytest.raises(BadInput, match="follow"):
        MoCo(3, head_width=4, queue=4)(Outputs(pooled=torch.randn(4, 3)), Outputs(), batch())


# MAE


def masked(**options: Any) -> MaskedTimm:
    torch.manual_seed(0)
    return MaskedTimm("test_vit", img_size=64, **options)


def mae(network: MaskedTimm) -> MAE:
    return MAE(network.network.embed_dim, 16, 16, head_width=32, depth=1, heads=4)


def test_mae_hides_three_quarters_of_each_image_anew() -> None:
    said = masked().train()(batch(size=64).images)
    assert said["visible"].shape == (4, 1 + 4, 64)
    assert said["hidden"].shape == (4, 12)
    assert (said["kept"][:, 0] == 0).all()
    for kept, hidden in zip(said["kept"], said["hidden"]):
        assert sorted(torch.cat([kept, hidden]).tolist()) == list(range(17))
    assert len({tuple(sorted(hidden.tolist())) for hidden in said["hidden"]}) > 1


def test_mae_encoder_sees_visible_patches_alone() -> None:
    network = masked().train()
    images = batch(size=64).images
    torch.manual_seed(5)
    said = network(images)
    changed = images.clone()
    for image, hidden in zip(changed, said["hidden"] - 1):
        for place in hidden.tolist():
            row, column = divmod(place, 4)
            image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 0.5
    torch.manual_seed(5)
    assert torch.equal(network(changed)["visible"], said["visible"])
    nothing_hidden = masked(ratio=0.0).train()
    all_seen, whole = nothing_hidden(images), nothing_hidden.network.forward_features(nothing_hidden.normalize(images))
    in_order = all_seen["visible"].gather(1, all_seen["kept"].argsort(1)[..., None].expand_as(whole))
    assert torch.allclose(in_order, whole, atol=1e-5)


def test_mae_is_the_error_on_normalised_hidden_patches() -> None:
    network = masked().train()
    objective = mae(network)
    given = batch(size=64)
    said = network(given.images)
    loss = objective(said, Outputs(), given)["mae"][1]
    drawn: list[Tensor] = []
    objective.predict.register_forward_hook(lambda module, args, out: drawn.append(out.detach()))
    objective(said, Outputs(), given)
    images = network.normalize(given.images)
    wanted, count = 0.0, 0
    for number, hidden in enumerate((said["hidden"] - 1).tolist()):
        for place, prediction in zip(hidden, drawn[0][number]):
            row, column = divmod(place, 4)
            patch = images[number, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].permute(1, 2, 0)
            patch = patch.flatten().double()
            wanted += float((((patch - patch.mean()) / (patch.var() + 1e-6).sqrt() - prediction) ** 2).mean())
            count += 1
    assert float(loss.detach()) == pytest.approx(wanted / count, rel=1e-4)
    elsewhere = said["patches"].clone()
    for number, kept in enumerate((said["kept"][:, 1:] - 1).tolist()):
        elsewhere[number, kept] = 7.0  # patches that were seen do not count
    assert torch.equal(objective(Outputs(said | {"patches": elsewhere}), Outputs(), given)["mae"][1], loss)


def test_mae_backbone_loads_into_the_plain_network(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    network = masked().eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    plain = Timm("test_vit", 5, str(tmp_path / "model.safetensors"), img_size=64).eval()
    images = batch(size=64).images
    assert torch.equal(plain(images)["pooled"], network(images)["pooled"])
    load_weights(masked(), tmp_path / "model.safetensors")


def test_mae_refuses_what_has_no_patches_to_hide() -> None:
    with pytest.raises(BadInput, match="vision transformer"):
        MaskedTimm("test_resnet")
    with pytest.raises(BadInput, match="head_width"):
        MAE(4, 4, 4, head_width=30)


# Every backbone with every method

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "CSAT": lambda: CSAT(1),
    "ResNet18SAT": lambda: ResNet18SAT(1),
    "resnet18": lambda: Timm("resnet18", 0),
    "efficientnet": lambda: Timm("test_efficientnet", 0),
    "convnextv2": lambda: Timm("test_convnext2", 0),
    "densenet": lambda: Timm("densenet121", 0, growth_rate=8, block_config=(2, 2)),
    "vit": lambda: Timm("test_vit", 0, img_size=32),
}
METHODS: dict[str, Callable[[int], nn.Module]] = {
    "barlow-twins": lambda width: BarlowTwins(width, head_width=16),
    "simclr": lambda width: SimCLR(width, head_width=8),
    "moco": lambda width: MoCo(width, head_width=8, queue=8),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_learns_by_every_method(backbone: str) -> None:
    torch.manual_seed(0)
    student = BACKBONES[backbone]()
    with torch.no_grad():
        width = student.eval()(torch.zeros(1, 3, 32, 32))["pooled"].shape[1]
    for method, make in METHODS.items():
        learner = Learner(copy.deepcopy(student), make(width)).train()
        optimizer = lars(learner.parameters(), lr=0.05, lr_vectors=0.0012)
        given = batch(size=32)
        assert math.isfinite(trained(learner, optimizer, given)), method
        first = next(p for p in learner.student.parameters() if p.ndim == 4)
        assert first.grad is not None
        assert first.grad.abs().max() > 0, method


def test_mae_trains_its_transformer() -> None:
    network = masked()
    learner = Learner(network, mae(network)).train()
    optimizer = adamw(learner.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.95))
    given = batch(size=64)
    losses = []
    for _ in range(30):
        torch.manual_seed(1)
        losses.append(trained(learner, optimizer, given))
    assert losses[-1] < 0.9 * losses[0]
    assert network.network.patch_embed.proj.weight.grad.abs().max() > 0
    assert network.network.pos_embed.grad is None  # fixed


@pytest.mark.parametrize("method", METHODS)
def test_losses_fall_on_a_batch_that_comes_again(method: str) -> None:
    torch.manual_seed(0)
    learner = Learner(Tiny(width=16), METHODS[method](16)).train()
    optimizer = sgd(learner.parameters(), lr=0.05, weight_decay=0.0)
    given = batch(16)
    losses = [trained(learner, optimizer, given) for _ in range(25)]
    if method == "moco":  # the queue fills with this batch's own keys, so that it is the first steps that count
        assert all(map(math.isfinite, losses))
    else:
        assert losses[-1] < 0.9 * losses[0]


# Labels and a teacher


class Means:
    """A teacher whose logits are the means of what it is shown, at its own size."""

    key = "means"

    def __call__(self, given: Batch) -> Outputs:
        return Outputs(logits=given.render(8).mean((2, 3)))


def test_the_teachers_loss_is_usi() -> None:
    torch.manual_seed(0)
    student, teacher, given = torch.randn(4, 3), torch.randn(4, 3), batch()
    terms = supervised(Outputs(logits=student), Outputs(logits=teacher), given)
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    assert float(terms["hard"][1]) == pytest.approx(-float(q[range(4), given.labels].log().mean()), rel=1e-5)
    assert terms["kd"][0] == 5
    assert float(terms["kd"][1]) == pytest.approx(float((p * (p / q).log()).sum() / 4), rel=1e-4)
    assert set(supervised(Outputs(logits=student), Outputs(), given)) == {"hard"}


def test_mixed_images_have_mixed_labels_and_the_share_is_that_of_the_pixels() -> None:
    mix, seen = Mix(seed=4), set()
    white, black = torch.ones(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    for view in range(12):
        given = batch(2, 64, view=view)._replace(images=torch.cat([white, black]))
        share, box = mix.draw(given)
        shown = mix.inputs(given, Outputs())
        assert (share, box) == mix.draw(given)
        assert 0 <= share <= 1
        assert float(shown[0].mean()) == pytest.approx(share, abs=0.04)  # a box ends between pixels
        assert torch.allclose(shown[0] + shown[1], torch.ones(3, 64, 64), atol=1e-6)
        assert set(shown.unique().tolist()) <= {0.0, 1.0} or box is None
        seen.add(box is None)
        logits = torch.randn(2, 3)
        hard = supervised(Outputs(logits=logits), Outputs(), given, mix=mix)["hard"][1]
        log_q = logits.log_softmax(1)
        own, other = log_q[range(2), given.labels].mean(), log_q[range(2), given.labels.flip(0)].mean()
        assert float(hard) == pytest.approx(-float(share * own + (1 - share) * other), rel=1e-4)
    assert seen == {True, False}


def test_the_teacher_is_shown_the_same_mixture_at_its_own_size() -> None:
    mix = Mix(seed=1, switch=0.0)
    teacher = Mixed(Means(), mix)
    for view in range(3):
        given = batch(4, 16, view=view)
        share = mix.draw(given)[0]
        plain = given.render(8).mean((2, 3))
        assert torch.allclose(teacher(given)["logits"], share * plain + (1 - share) * plain.flip(0), atol=1e-6)
        judged = given._replace(labels=torch.full((4,), -1))
        assert torch.equal(teacher(judged)["logits"], plain)
        assert torch.equal(mix.inputs(judged, Outputs()), given.images)
    assert teacher.key != Mixed(Means(), Mix(seed=2)).key
