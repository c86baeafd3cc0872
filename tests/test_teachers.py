"""Teachers stay as they are, see what the student sees, and are asked once."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import SIZE, Counting, Normed, Tiny, both, everything, experiment, no_page, process, table
from torch import Tensor, nn
from torch.nn import functional as F

import histill as hs
from histill import cli
from histill.data import Augment, Images, Packed, pack, read_unlabelled
from histill.errors import BadInput, Failed
from histill.loop import kept_teacher
from histill.models import MACResNet, StarDist
from histill.models.parts import Normalize
from histill.run import Run
from histill.teachers import Cached, Ensemble, Frozen, as_teacher
from histill.types import Batch, Outputs

TURNED = Augment(rotate=180, zoom=0.2)


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data", size=40)


@pytest.fixture(scope="module")
def packed(data: Images, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(data, SIZE, folder=tmp_path_factory.mktemp("packed"))


def batch_of(packed: Packed, rows: Any = range(6), view: int = 3) -> Batch:
    rows = np.array(rows)
    return packed.batch(rows, torch.full((len(rows),), view), augment=TURNED, seed=5)


def weights(run: Run) -> bytes:
    return (run.path / "model.safetensors").read_bytes()


# Frozen


def test_a_frozen_teacher_never_changes_and_stays_outside_the_checkpoint(data: Images, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Normed().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run = hs.train(experiment(data, objective=both, teacher=Frozen(network)), tmp_path / "run", keep_checkpoint=True)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    checkpoint = torch.load(run.path / "checkpoint.pt", weights_only=True)
    assert set(checkpoint["learner"]) == {f"student.{name}" for name in Tiny().state_dict()}
    assert set(load_file(run.path / "model.safetensors")) == set(Tiny().state_dict())


def test_a_frozen_teacher_gives_no_gradient(packed: Packed) -> None:
    outputs = Frozen(Tiny())(batch_of(packed))
    assert {name: value.requires_grad for name, value in outputs.items()} == {"logits": False, "pooled": False}


class Looking(nn.Module):
    """Gives back the images that it was given."""

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(logits=images.flatten(1))


def test_at_another_size_it_sees_the_view_drawn_at_that_size(packed: Packed) -> None:
    batch = batch_of(packed)
    seen = Frozen(Looking(), image_size=36, key="looking")(batch)["logits"].view(6, 3, 36, 36)
    larger = batch_of(packed.sized(36)).images
    assert torch.equal(seen, larger)
    enlarged = F.interpolate(batch.images, size=36, mode="bilinear")
    assert (seen - enlarged).abs().mean() > 0.01
    # The same view: shrunk again it is nearly what the student sees, and another view is not.
    shrunk, other = F.avg_pool2d(seen, 2), batch_of(packed, view=4).images
    assert (shrunk - batch.images).abs().mean() < 0.3 * (shrunk - other).abs().mean()
    same = Frozen(Looking(), key="looking")(batch)["logits"].view(6, 3, SIZE, SIZE)
    assert torch.equal(same, batch.images)


def test_the_key_names_weights_and_size() -> None:
    torch.manual_seed(0)
    network = Tiny()
    key = Frozen(network).key
    assert Frozen(network).key == key != Frozen(network, image_size=32).key
    with torch.no_grad():
        network.head.bias[0] += 1e-6
    assert Frozen(network).key != key


def test_the_key_tells_the_same_weights_behind_other_settings_apart() -> None:
    torch.manual_seed(0)

    def keys(*networks: nn.Module) -> set[str]:
        for other in networks[1:]:
            other.load_state_dict(networks[0].state_dict())
        return {Frozen(network).key for network in networks}

    assert len(keys(StarDist(), StarDist(upsample="bilinear"), StarDist())) == 2
    looks = (MACResNet(2, dares=(), spp=False, **own) for own in ({}, {"threshold": 0.3}, {"crop": False}))  # type: ignore[arg-type]
    assert len(keys(*looks)) == 3
    assert len(keys(*(nn.Sequential(Normalize(std=std), nn.ReLU()) for std in ((1, 1, 1), (2, 2, 2))))) == 2
    assert len(keys(nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU()))) == 2


# Ensemble


class Fixed:
    def __init__(self, *logits: list[float]) -> None:
        self.logits, self.key = torch.tensor(logits), f"fixed {logits}"

    def __call__(self, batch: Batch) -> Outputs:
        return Outputs(logits=self.logits)


def test_an_ensemble_is_the_log_of_the_mean_probability(packed: Packed) -> None:
    # Probabilities (0.8, 0.2) and (0.5, 0.5), whatever is added to the logits: mean (0.65, 0.35).
    one, other = Fixed([np.log(4.0), 0.0]), Fixed([7.0, 7.0])
    said = Ensemble([one, other])(batch_of(packed, [0]))["logits"]
    np.testing.assert_allclose(said, np.log([[0.65, 0.35]]), rtol=1e-6)
    assert Ensemble([one]).key != Ensemble([one, other]).key != Ensemble([other, one]).key


def test_a_teachers_confidence_is_the_published_weight_and_the_mean_without_a_label(packed: Packed) -> None:
    # exp(CE) is 1/p of the label: of class 0 (1/0.8, 1/0.4), of class 1 (1/0.2, 1/0.6).
    one = Fixed([np.log(4.0), 0.0], [np.log(4.0), 0.0], [np.log(4.0), 0.0])
    other = Fixed([np.log(2 / 3), 0.0], [np.log(2 / 3), 0.0], [np.log(2 / 3), 0.0])
    teacher = Ensemble([one, other], "confidence")
    batch = batch_of(packed, [0, 1, 2])._replace(labels=torch.tensor([0, 1, -1]))
    ce = np.log([[1 / 0.8, 1 / 0.4], [1 / 0.2, 1 / 0.6]])
    w = 1 - np.exp(ce) / np.exp(ce).sum(1, keepdims=True)
    p = [float(w[0] @ [0.8, 0.4]), float(w[1] @ [0.8, 0.4]), 0.6]
    np.testing.assert_allclose(teacher(batch)["logits"].exp(), [[q, 1 - q] for q in p], rtol=1e-5)
    assert (w[:, 0] > w[:, 1]).tolist() == [True, False], "who is nearer to the label counts for more"
    assert teacher.key != Ensemble([one, other]).key
    alone = Ensemble([one], "confidence")(batch)["logits"]
    np.testing.assert_allclose(alone, one(batch)["logits"].log_softmax(1), atol=1e-6)
    with pytest.raises(BadInput, match="mean or confidence"):
        Ensemble([one], "vote")  # type: ignore[arg-type]


def test_no_teacher_is_judged_with_the_labels_in_its_hands(data: Images, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Looking(Counting):
        def __call__(self, batch: Batch) -> Outputs:
            seen.append(batch.labels)
            return super().__call__(batch)

    hs.train(experiment(data, objective=both, teacher=Looking(), epochs=1), tmp_path / "run")
    assert sum(len(labels) for labels in seen if (labels == -1).all()) == len(data.rows("val"))
    assert sum(len(labels) for labels in seen if (labels >= 0).all()) == len(data.rows("train"))


def test_several_teachers_are_given_by_their_runs(data: Images, tmp_path: Path) -> None:
    for number in (0, 1):
        made = hs.recipes.methods.teacher(
            data, network="wrn_16_1", weights="none", image_size=SIZE, epochs=1, batch_size=8, seed=number
        )
        hs.train(made, tmp_path / f"teacher{number}")
    teachers = [str(tmp_path / f"teacher{number}") for number in (0, 1)]
    data.frame.to_csv(data.root / "manifest.csv", index=False)
    command = ["train", "methods.student", "--data", str(data.root / "manifest.csv"), "--out", str(tmp_path / "out")]
    command += ["--network", "wrn_16_1", "--image-size", str(SIZE), "--epochs", "1", "--batch-size", "8"]
    several = [word for path in teachers for word in ("--teacher", path)]
    assert cli.run([*command, *several, "--weighting", "confidence"]) == 0
    run = Run.open(tmp_path / "out")
    assert run.info["recipe"]["arguments"]["teacher"] == " + ".join(teachers)
    both_of_them = [as_teacher(Run.open(path), data.classes) for path in teachers]
    assert run.info["teacher"]["key"] == Ensemble(both_of_them, "confidence").key
    assert cli.run(["train", "--resume", "--out", str(tmp_path / "out")]) == 0


def test_an_ensemble_of_none_is_refused() -> None:
    with pytest.raises(BadInput, match="at least one teacher"):
        Ensemble([])


# Cached


def test_the_second_pass_and_the_second_run_ask_nothing(data: Images, tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    runs = [
        hs.train(everything(data, tmp_path / "cache", teacher=t), tmp_path / name)
        for name, t in (("one", first), ("two", second))
    ]
    val = len(data.rows("val"))
    # 2 views of 24 images in 4 epochs; the validation images before the start.
    assert first.images == 2 * 24 + val
    assert second.images == val
    assert weights(runs[0]) == weights(runs[1])


def test_a_cached_and_an_online_run_end_at_the_same_weights(data: Images, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = Frozen(Normed())
    cached, online = (
        hs.train(everything(data, cache, teacher=teacher), tmp_path / name, precision="32-true")
        for name, cache in (("cached", tmp_path / "cache"), ("online", False))
    )
    for name, value in load_file(cached.path / "model.safetensors").items():
        # An image's answer may differ in its last bit with the batch around it, and Adam divides by small numbers.
        assert torch.allclose(value, load_file(online.path / "model.safetensors")[name], atol=1e-6), name
    np.testing.assert_allclose(cached.log["raw/soft"], online.log["raw/soft"], rtol=1e-5)


def make(teacher: Any, folder: Path, packed: Packed, **changes: Any) -> Cached:
    folder.mkdir(exist_ok=True)
    kind: dict[str, Any] = {"images": len(packed.images), "views": 5, "identity": {"rotate": 180, "seed": 5}}
    return Cached(teacher, folder, **kind | changes)


def test_a_view_is_kept_apart_from_other_views(packed: Packed, tmp_path: Path) -> None:
    cached = make(Counting(), tmp_path / "cache", packed)
    for view in (3, 4, 3):
        batch = batch_of(packed, [4, 0, 2], view)
        assert torch.equal(cached(batch)["logits"], Counting()(batch)["logits"])
    assert (cached.asked, cached.read) == (6, 3)


def test_half_precision_halves_the_file(packed: Packed, tmp_path: Path) -> None:
    sizes = []
    for dtype, error in ((torch.float32, 0.0), (torch.float16, 2e-2)):
        folder = tmp_path / str(dtype)
        cached = make(Counting(), folder, packed, dtype=dtype)
        batch = batch_of(packed)
        said = cached(batch)["logits"]
        assert said.dtype == torch.float32
        assert (said - Counting()(batch)["logits"]).abs().max() <= error
        sizes.append((folder / "logits.npy").stat().st_size - 128)
    assert sizes == [5 * 40 * 2 * 4, 5 * 40 * 2 * 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": Counting(8)}, "teacher"),
        ({"augment": Augment(rotate=91, brightness=0.2)}, "rotate"),
        ({"seed": 1}, "seed"),
        ({"views": 3}, "shape"),
        ({"image_size": 19, "student": partial(Tiny)}, "image_size"),
        ({"cache_outputs": ("pooled",)}, "outputs"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(data: Images, tmp_path: Path, change: Any, said: str) -> None:
    hs.train(everything(data, tmp_path / "cache"), tmp_path / "one")
    with pytest.raises(BadInput, match=rf"caches something else \({said} differ\)"):
        hs.train(everything(data, tmp_path / "cache", **change), tmp_path / "two")


def test_a_cache_of_other_images_is_refused(data: Images, tmp_path: Path) -> None:
    hs.train(everything(data, tmp_path / "cache"), tmp_path / "one")
    fewer = data.with_frame(data.frame.drop(index=data.rows("train")[0]))
    with pytest.raises(BadInput, match=r"\(data, shape differ\)"):
        hs.train(everything(fewer, tmp_path / "cache"), tmp_path / "two")


def test_what_was_answered_on_another_kind_of_device_is_not_taken(data: Images, tmp_path: Path, packed: Packed) -> None:
    on_cpu, on_cuda = (
        kept_teacher(everything(data, True), packed, torch.device(kind)).folder  # type: ignore[union-attr]
        for kind in ("cpu", "cuda:1")
    )
    assert on_cpu != on_cuda
    hs.train(everything(data, tmp_path / "cache"), tmp_path / "run", device="cpu")
    with pytest.raises(BadInput, match=r"caches something else \(device differ\)"):
        kept_teacher(everything(data, tmp_path / "cache"), packed, torch.device("cuda"))


def test_without_a_folder_another_teacher_gets_another_cache(data: Images, tmp_path: Path) -> None:
    for number, seed in enumerate((7, 8, 7)):
        teacher = Counting(seed)
        hs.train(everything(data, True, teacher=teacher), tmp_path / str(number))
        assert (teacher.images > 40) == (number < 2)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("logits.npy", lambda f: f.write_bytes(f.read_bytes()[:-8]), "made again"),  # NumPy would put zeros there
        ("logits.npy", lambda f: np.save(f, np.zeros((2, 3, 2), np.float32)), "made again"),
        ("logits.npy", lambda f: f.unlink(), "made again"),
        ("known.npy", lambda f: f.write_bytes(f.read_bytes()[:-8]), "made again"),
        ("known.npy", lambda f: f.write_bytes(b""), "made again"),
        ("cache.json", lambda f: f.write_text("[1]"), "made again"),
    ],
    ids=["cut", "shape", "gone", "known cut", "known empty", "json"],
)
def test_a_damaged_cache_is_never_taken_for_answers(
    data: Images, tmp_path: Path, name: str, damage: Any, said: str
) -> None:
    hs.train(everything(data, tmp_path / "cache"), tmp_path / "one")
    damage(tmp_path / "cache" / name)
    before = {f.name: f.read_bytes() for f in (tmp_path / "cache").iterdir()}
    with pytest.raises(BadInput, match=said):
        hs.train(everything(data, tmp_path / "cache"), tmp_path / "two")
    assert {f.name: f.read_bytes() for f in (tmp_path / "cache").iterdir()} == before


def test_its_size_is_said(data: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hs.train(everything(data, tmp_path / "cache"), tmp_path / "run")
    assert f"teacher's cache: 40 images x 2 views, 0.0 MB, in {tmp_path / 'cache'}" in capsys.readouterr().err


class Wide:
    key = "wide"

    def __call__(self, batch: Batch) -> Outputs:
        return Outputs(logits=torch.zeros(len(batch.ids), 500_000))


def test_a_disk_too_small_is_said_before_it_is_filled(packed: Packed, tmp_path: Path) -> None:
    views = 1_000_000
    cached = make(Wide(), tmp_path / "cache", packed, views=views)
    free = shutil.disk_usage(tmp_path).free
    assert views * 40 * 500_000 * 4 > free, "80 TB"
    with pytest.raises(Failed, match=r"the teacher's cache takes 80000\.0 GB, .* has [\d.]+ GB"):
        cached(batch_of(packed, [0]))
    assert not (tmp_path / "cache/logits.npy").exists()


# Several processes, and killed ones


def fill(root: Path, name: str) -> None:
    hs.train(everything(table(root / "data"), root / "cache"), root / name)


def test_two_processes_fill_one_cache_and_both_end_right(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    children = [process(fill, tmp_path, name) for name in ("one", "two")]
    alone = hs.train(everything(data, tmp_path / "own"), tmp_path / "alone")
    for child, name in zip(children, ("one", "two")):
        child.join()
        assert child.exitcode == 0
        assert (tmp_path / name / "model.safetensors").read_bytes() == weights(alone)
    assert (tmp_path / "cache/logits.npy").read_bytes() == (tmp_path / "own/logits.npy").read_bytes()


class Dying(Counting):
    """Dies while it is asked the third time."""

    asked = 0

    def __call__(self, batch: Batch) -> Outputs:
        self.asked += 1
        if self.asked == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def die(root: Path) -> None:
    packed = pack(table(root / "data"), SIZE)
    cached = make(Dying(), root / "cache", packed)
    for start in (0, 4, 8):
        cached(batch_of(packed, range(start, start + 4)))
        if start == 0:
            cached.flush()


def test_a_cache_goes_on_where_a_kill_left_it(tmp_path: Path) -> None:
    packed = pack(table(tmp_path / "data"), SIZE)
    child = process(die, tmp_path)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    teacher = Counting()
    cached = make(teacher, tmp_path / "cache", packed)
    for start in (0, 4, 8):
        batch = batch_of(packed, range(start, start + 4))
        assert torch.equal(cached(batch)["logits"], Counting()(batch)["logits"])
    assert teacher.images == 8, "what was flushed is known, the rest is asked again"


# Images without labels


def unlabelled(root: Path, count: int = 10) -> Images:
    folder = root / "more"
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(100 + number).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return read_unlabelled(folder)


def test_unlabelled_images_join_the_soft_term_only(tmp_path: Path) -> None:
    data, teacher = table(tmp_path / "data"), Counting()
    more = unlabelled(tmp_path)
    run = hs.train(
        experiment(data, unlabelled=more, objective=both, teacher=teacher, batch_size=100, epochs=1),
        tmp_path / "run",
        precision="32-true",
    )
    torch.manual_seed(0)
    network = Tiny()
    packed = pack(data, SIZE)
    labelled = packed.batch(np.array(packed.images.rows("train")))
    extra = pack(more, SIZE).batch(np.arange(10))
    with torch.no_grad():
        hard = F.cross_entropy(network(labelled.images)["logits"], labelled.labels)
        soft = [
            -(teacher(b)["logits"].softmax(1) * network(b.images)["logits"].log_softmax(1)).sum(1)
            for b in (labelled, extra)
        ]
    assert run.log["raw/hard"][0] == pytest.approx(float(hard), rel=1e-5)
    assert run.log["raw/soft"][0] == pytest.approx(float(torch.cat(soft).mean()), rel=1e-5)
    counts = run.info["data"]
    assert (counts["images"]["train"], counts["unlabelled"]) == (34, 10)
    assert set(run.predictions["split"]) == {"val", "test"}
    assert set(run.predictions["label"]) == {"benign", "malignant"}


def copied(data: Images, more: Images, split: str, suffix: str) -> Images:
    source = data.root / data.frame["path"][data.rows(split)[0]]
    copy = more.root / f"copy{suffix}"
    Image.open(source).save(copy) if suffix != source.suffix else shutil.copy(source, copy)
    return read_unlabelled(more.root)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_an_unlabelled_copy_of_a_judged_image_is_a_leak(tmp_path: Path, split: str, suffix: str) -> None:
    data = table(tmp_path / "data")
    more = copied(data, unlabelled(tmp_path), split, suffix)
    with pytest.raises(BadInput, match=r"leak: 1 images are in two splits: .*more/copy"):
        hs.train(experiment(data, unlabelled=more, objective=both, teacher=Counting()), tmp_path / "run")


def test_an_unlabelled_copy_of_a_training_image_is_left_out(tmp_path: Path) -> None:
    data = table(tmp_path / "data")
    more = copied(data, unlabelled(tmp_path), "train", ".png")
    run = hs.train(experiment(data, unlabelled=more, objective=both, teacher=Counting()), tmp_path / "run")
    assert run.info["data"]["unlabelled"] == 10
    assert run.info["notices"] == ["1 unlabelled images are among the labelled training images, left out"]


# What the teacher knows


class Tinted:
    """Knows the classes by their tint."""

    key = "tinted"

    def __call__(self, batch: Batch) -> Outputs:
        red, green, _ = batch.images.mean((2, 3)).T
        return Outputs(logits=20 * torch.stack([red, green], 1))


def test_the_teacher_is_judged_before_the_student_starts(data: Images, tmp_path: Path, capsys: Any) -> None:
    run = hs.train(experiment(data, teacher=Tinted()), tmp_path / "run")
    packed = pack(data, SIZE)
    batch = packed.batch(np.array(packed.images.rows("val")))
    logits = Tinted()(batch)["logits"]
    found = run.info["teacher"]["validation"]
    assert run.info["teacher"]["key"] == "tinted"
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == batch.labels).float().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, batch.labels)), rel=1e-5)
    assert found["accuracy"] == 1
    assert "teacher" not in capsys.readouterr().err


def test_a_useless_teacher_is_said_to_be_one(data: Images, tmp_path: Path, capsys: Any) -> None:
    class Opposite(Tinted):
        def __call__(self, batch: Batch) -> Outputs:
            return Outputs(logits=-super().__call__(batch)["logits"])

    hs.train(experiment(data, teacher=Opposite()), tmp_path / "run")
    assert "the teacher is hardly better than chance on validation (balanced accuracy 0.000)" in capsys.readouterr().err


def test_chance_is_exceeded_by_two_standard_deviations(data: Images, tmp_path: Path, capsys: Any) -> None:
    """Of 8 images in two classes 1/2 + 2 sqrt(1/4 / 8) = 0.854: six right could be luck, seven are not."""
    val = data.rows("val")
    assert len(val) == 8

    class Mistaken(Tinted):
        def __init__(self, wrong: int) -> None:
            super().__init__()
            self.wrong = torch.tensor(val[:wrong])

        def __call__(self, batch: Batch) -> Outputs:
            sign = torch.where(torch.isin(batch.ids, self.wrong), -1, 1)[:, None]
            return Outputs(logits=sign * super().__call__(batch)["logits"])

    for wrong, warned in ((2, True), (1, False)):
        run = hs.train(experiment(data, teacher=Mistaken(wrong), epochs=1), tmp_path / str(wrong))
        assert run.info["teacher"]["validation"]["accuracy"] == 1 - wrong / 8
        assert ("hardly better than chance" in capsys.readouterr().err) == warned


def test_a_teacher_is_judged_without_being_told_the_labels(data: Images, tmp_path: Path) -> None:
    class Told(Tinted):
        """Repeats the label where it is given one, as a teacher may that is asked of training images."""

        def __call__(self, batch: Batch) -> Outputs:
            return Outputs(logits=10 * F.one_hot(batch.labels.clamp(min=0), 2).float())

    run = hs.train(experiment(data, teacher=Told(), epochs=1), tmp_path / "run")
    assert run.info["teacher"]["validation"]["balanced_accuracy"] == 0.5


class Features:
    key = "features"

    def __call__(self, batch: Batch) -> Outputs:
        return Outputs(pooled=batch.images.mean((2, 3)))


def test_a_teacher_of_another_task_is_not_judged(data: Images, tmp_path: Path) -> None:
    run = hs.train(experiment(data, teacher=Features()), tmp_path / "run")
    assert run.info["teacher"] == {"key": "features"}


def test_a_run_as_teacher_looks_at_its_own_size_and_knows_its_classes(data: Images, tmp_path: Path) -> None:
    run = hs.train(experiment(data, image_size=30), tmp_path / "run")
    teacher = as_teacher(run, ("benign", "malignant"))
    assert isinstance(teacher, Frozen)
    assert teacher.image_size == 30
    with pytest.raises(BadInput, match="trained on the classes benign, malignant, the data has cat, dog"):
        as_teacher(run, ("cat", "dog"))
    counting = Counting()
    assert as_teacher(counting, ("a", "b")) is counting
