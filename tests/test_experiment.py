"""An experiment is checked when it is made; a recipe records how it was made."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Counting, Tiny, experiment, no_page, table

import histill as hs
from histill import cli
from histill.data import Images
from histill.errors import BadInput
from histill.experiment import Experiment, load_recipe, parts, recipe
from histill.record import describe
from histill.run import Run


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"batch_size": 1}, "batch_size=1: must be at least 2"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"image_size": 4}, "image_size=4"),
        ({"seed": -1}, "seed=-1"),
        ({"views": 0}, "views=0"),
        ({"patience": 0, "select": "loss"}, "patience=0"),
        ({"patience": 3, "select": "last"}, "patience waits for a better epoch"),
        ({"ema": 1.0}, "ema=1.0: between 0 and 1"),
        ({"clip": 0.0}, "clip=0.0: above 0"),
        ({"select": "f1"}, "select='f1': one of balanced_accuracy, accuracy, auroc, loss, last"),
        ({"positive": "cat"}, "positive='cat': the classes are benign, malignant"),
        ({"epochs": "3"}, "epochs='3': a whole number"),
        ({"batch_size": 2.5}, "batch_size=2.5: a whole number"),
        ({"seed": None}, "seed=None: a whole number"),
        ({"image_size": (32, 32)}, r"image_size=\(32, 32\): a whole number"),
        ({"views": "2"}, "views='2': a whole number"),
        ({"clip": "1"}, "clip='1': a number"),
        ({"augment": "flip"}, r"augment='flip': of the kind histill.data.Augment"),
        ({"unlabelled": "lesions"}, "unlabelled='lesions': of the kind histill.data.Images"),
        ({"optimizer": "adam"}, r"optimizer='adam': what can be called, such as functools.partial\(torch.optim.Adam"),
        ({"schedule": "cosine"}, "schedule='cosine': what can be called"),
    ],
)
def test_a_wrong_argument_is_refused_when_it_is_made(data: Images, change: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        experiment(data, **change)


def own(classes: int) -> Tiny:
    return Tiny(classes)


def test_a_network_is_described_so_that_it_can_be_made_again() -> None:
    assert describe(partial(Tiny, classes=3)) == {"function": "tiny:Tiny", "arguments": {"classes": 3}}
    assert describe(partial(own, classes=3))["function"] == "test_experiment:own"


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (Tiny, "give functools.partial"),
        (partial(Tiny, 2), "give functools.partial"),
        (partial(lambda: Tiny()), "cannot be found again by its name"),
        (partial(Tiny, width=torch.ones(1)), "must fit into JSON"),
        (partial(Tiny, width=float("nan")), "must fit into JSON"),
    ],
)
def test_a_network_that_cannot_be_made_again_is_refused(data: Images, tmp_path: Path, student: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        hs.train(experiment(data, student=student), tmp_path / "run")


# Recipes


@recipe
def small(
    data: Images, teacher: Any = None, *, lr: float = 0.1, seed: int = 0, sizes: tuple[int, ...] = (1, 2)
) -> Experiment:
    """A recipe."""
    return experiment(data, teacher=teacher, seed=seed, optimizer=partial(torch.optim.SGD, lr=lr))


def test_a_recipe_records_its_name_source_and_arguments(data: Images) -> None:
    record = small(data, Counting(), lr=0.5).recipe
    assert record["name"] == f"{Path(__file__).resolve()}:small"
    assert record["source"].startswith("@recipe\ndef small(")
    assert record["arguments"] == {
        "data": {"images": str(data.root), "hash": data.hash, "split_hash": data.split_hash},
        "teacher": "counting 7",
        "lr": 0.5,
        "seed": 0,
        "sizes": [1, 2],
    }
    json.dumps(record)
    assert small.__doc__ == "A recipe."


def test_a_record_is_the_same_in_every_process(data: Images) -> None:
    class Plain:
        pass

    assert "0x" not in small(data, Plain()).recipe["arguments"]["teacher"]


def test_what_a_recipe_draws_follows_its_seed(data: Images) -> None:
    drawn = []

    @recipe
    def drawing(data: Images, seed: int = 0) -> Experiment:
        drawn.append(float(torch.rand(())))
        return experiment(data, seed=seed)

    for seed in (3, 4, 3):
        drawing(data, seed=seed)
    assert drawn[0] == drawn[2] != drawn[1]


def test_recipes_are_found_by_name_or_file(tmp_path: Path) -> None:
    module, part = load_recipe("dsnet.teacher")
    assert (module.__name__, part, parts(module)) == ("histill.recipes.dsnet", "teacher", ["teacher", "student"])
    folder = tmp_path / "my.pypi"
    folder.mkdir()
    (folder / "own.py").write_text("def student(): return 5\n")
    module, part = load_recipe(f"{folder / 'own.py'}:student")
    assert getattr(module, part)() == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dsnett", "no recipe 'dsnett'; there are .*dsnet"),
        ("dsnet.pretrain", "has no part 'pretrain'; it has teacher, student"),
        ("os:system", "no recipe 'os:system'"),
        ("nowhere.py:student", "nowhere.py: no such file"),
    ],
)
def test_a_recipe_that_is_not_there_is_named(name: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        load_recipe(name)


def test_a_file_that_does_not_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(BadInput, match=r"broken.py does not run: ModuleNotFoundError: .*nothing_of_the_kind"):
        load_recipe(f"{tmp_path / 'broken.py'}:student")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(BadInput, match=r"empty.py: no function 'student' in it"):
        load_recipe(f"{tmp_path / 'empty.py'}:student")


RECIPE = '''
"""A recipe of one's own."""
from functools import partial
import torch
from torch import nn
import histill as hs
from histill.losses import cross_entropy
from histill.types import Outputs

class Own(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, images):
        return Outputs(logits=self.head(images.mean((2, 3))))

def hard(student, teacher, batch):
    return {"hard": (1.0, cross_entropy(student["logits"], batch.labels))}

@hs.recipe
def student(data, *, lr: float = 0.1, epochs: int = 2, seed: int = 0) -> hs.Experiment:
    """One's own student.

    Args:
        lr: learning rate.
        epochs: passes over the images.
        seed: of everything.
    """
    return hs.Experiment(
        data=data, student=partial(Own, classes=len(data.classes)), objective=hard, image_size=16,
        epochs=epochs, optimizer=partial(torch.optim.SGD, lr=lr), seed=seed,
    )
'''


def test_a_users_recipe_trains_from_the_command_line(data: Images, tmp_path: Path, capsys: Any) -> None:
    file, out = tmp_path / "own.py", tmp_path / "run"
    file.write_text(RECIPE)
    command = ["train", f"{file}:student", "--data", str(data.root), "--out", str(out), "--val", "0.2", "--lr", "0.3"]
    assert cli.run(command) == 0, capsys.readouterr().err
    info = json.loads((out / "run.json").read_text())
    assert info["recipe"]["name"] == f"{file}:student"
    assert info["recipe"]["arguments"] == info["recipe"]["arguments"] | {"lr": 0.3, "epochs": 2, "seed": 0}
    assert info["network"]["function"] == "histill_user_own:Own"
    assert Run.open(out, code=file).network() is not None
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert cli.run(["train", "--out", str(out), "--resume"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert cli.run(["train", *command[1:], "--resume"]) == 0
    assert cli.run(command) == 2
    assert "holds a run already; go on with --resume" in capsys.readouterr().err


def test_a_users_unfinished_run_goes_on_with_out_alone(data: Images, tmp_path: Path, capsys: Any) -> None:
    file, out = tmp_path / "own.py", tmp_path / "run"
    file.write_text(RECIPE)
    assert cli.run(["train", f"{file}:student", "--data", str(data.root), "--out", str(out)]) == 0
    weights = (out / "model.safetensors").read_bytes()
    info = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(info | {"status": "running"}))
    (out / "model.safetensors").unlink()
    assert cli.run(["train", "--out", str(out), "--resume", "--lr", "0.7"]) == 2
    assert "--lr 0.7 differs from the run's 0.1" in capsys.readouterr().err
    assert cli.run(["train", "--out", str(out), "--resume"]) == 0, capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == weights


def test_a_recipe_keeps_its_signature_for_the_flags() -> None:
    assert list(inspect.signature(small).parameters) == ["data", "teacher", "lr", "seed", "sizes"]
