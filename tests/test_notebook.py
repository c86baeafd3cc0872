"""What is typed at a prompt answers in a line: what an object holds, or what was given in place of what is needed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SIZE, Tiny, experiment, no_page, table
from torch import nn
from torch.nn import functional as F

import histill as hs
from histill.data import Augment, Images
from histill.errors import BadInput
from histill.machine import find_device
from histill.run import Run
from histill.teachers import Ensemble, as_teacher
from histill.types import Batch, Outputs, Terms


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return table(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def run(data: Images, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histill.evaluate.finish.finish", no_page)
        return hs.train(experiment(data), tmp_path_factory.mktemp("runs") / "run")


def test_images_say_how_many_they_are(data: Images) -> None:
    said = repr(data)
    assert said == f"Images(40 of benign, malignant: 24 train, 8 val, 8 test; {data.root})"
    assert repr(data.with_frame(data.frame.assign(split="", patient=["a", "b"] * 20))) == (
        f"Images(40 of benign, malignant: 40 no split, 2 patients; {data.root})"
    )


def test_a_run_says_what_it_is(run: Run) -> None:
    assert repr(run) == f"Run({str(run.path)!r}: Tiny, {SIZE} px, benign, malignant; finished)"


def test_images_are_copied_compared_and_pickled(data: Images) -> None:
    again = copy.deepcopy(data)
    assert again.hash == pickle.loads(pickle.dumps(data)).hash == data.hash
    assert data == data
    assert data != again
    assert len({data, again}) == 2
    assert (experiment(data) == experiment(again)) is False


def test_an_experiment_goes_to_another_process(data: Images) -> None:
    sent = pickle.loads(pickle.dumps(experiment(data)))
    assert (sent.data.split_hash, sent.schedule(0.5)) == (data.split_hash, 1.0)


def test_images_take_a_root_that_is_text(data: Images) -> None:
    assert Images(data.frame, str(data.root), list(data.classes)).paths() == data.paths()  # type: ignore[arg-type]


def test_a_run_predicts_as_its_own_table_says(run: Run, data: Images) -> None:
    """Also one of a network that its folder alone could not make."""
    said = hs.predict(run, data.root).set_index("image").loc[run.predictions["image"]]
    for name in run.classes:
        np.testing.assert_allclose(said[f"prob_{name}"], run.predictions[f"prob_{name}"], atol=2e-3)
    with pytest.raises(BadInput, match="--code"):
        hs.predict(run.path, data.root)


def test_another_format_is_refused_with_those_that_there_are(run: Run) -> None:
    with pytest.raises(BadInput, match="format 'tflite': one of onnx, openvino, torchscript, qupath"):
        hs.export(run, format="tflite")  # type: ignore[arg-type]


WRONG: dict[str, tuple[Callable[[Images], object], str]] = {
    "a table": (lambda data: hs.read_images(data.frame), "read_images: .*DataFrame; write it with to_csv"),  # type: ignore[arg-type]
    "masks": (lambda data: hs.read_masks(None), "read_masks: .* NoneType"),  # type: ignore[arg-type]
    "unlabelled": (lambda data: hs.read_unlabelled([data.root]), "read_unlabelled: .* list"),  # type: ignore[arg-type]
    "a split of a table": (lambda data: hs.split(data.frame), "histill.read_images .* DataFrame"),  # type: ignore[arg-type]
    "a list of runs": (lambda data: hs.compare(["a", "b"]), "one by one; .* list"),  # type: ignore[arg-type]
    "images to predict": (lambda data: hs.predict("student.onnx", data.paths()), "predict: .* list"),  # type: ignore[arg-type]
    "no images at once": (
        lambda data: hs.predict("student.onnx", data.root, batch_size=0),
        "batch_size=0: must be at least 1",
    ),
    "a model alone": (lambda data: hs.deploy.bench("nowhere/student.onnx"), "nowhere/student.onnx: no such file"),
    "a split's name": (lambda data: data.rows("validation"), "'validation': one of train, val, test"),
    "a frame without contents": (
        lambda data: Images(data.frame.drop(columns="content"), data.root, data.classes),
        "no column content; histill.read_images",
    ),
    "no frame": (lambda data: Images([1], data.root, data.classes), "not a table"),  # type: ignore[arg-type]
    "an unknown patient": (
        lambda data: hs.split(data.with_frame(data.frame.assign(patient=[np.nan, *["a"] * 39], split=""))),
        "1 images have NaN for a patient",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_line(name: str, data: Images) -> None:
    wrong, said = WRONG[name]
    with pytest.raises(BadInput, match=said) as caught:
        wrong(data)
    assert "\n" not in str(caught.value)


def plain(classes: int) -> nn.Module:
    """A network as timm and torchvision have them."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def vector(student: Outputs, teacher: Outputs, batch: Batch) -> Terms:
    return {"hard": (1.0, F.cross_entropy(student["logits"], batch.labels, reduction="none"))}


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "a network's tensor": ({"student": partial(plain, classes=2)}, "the student gives a Tensor, not named tensors"),
    "a teacher's tensor": ({"teacher": lambda batch: batch.images.mean((1, 2))}, "the teacher gives a Tensor, not"),
    "too few classes": ({"student": partial(Tiny, classes=1)}, r"logits of one image have the shape \(1, 1\), and the"),
    "too many classes": ({"student": partial(Tiny, classes=3)}, r"2 classes \(benign, malignant\): \(1, 2\)"),
    "a loss alone": ({"objective": lambda s, t, b: s["logits"].mean()}, "and this one gave a Tensor"),
    "nothing": (
        {"objective": lambda s, t, b: {}},
        r"an objective gives \{name: \(weight, loss\)\}, and this one gave \{\}",
    ),
    "no weight": (
        {"objective": lambda s, t, b: {"a": s["logits"].mean()}},
        "'a' is .weight, a tensor of one number., and",
    ),
    "a number": (
        {"objective": lambda s, t, b: {"a": (1.0, 2.0)}},
        "'a' is .weight, a tensor of one number., and not a",
    ),
    "a loss for each image": ({"objective": vector}, r"'hard' has the shape \(16,\); give its mean, one number"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_said_on_the_first_batch(name: str, data: Images, tmp_path: Path) -> None:
    change, said = MISFITS[name]
    with pytest.raises(BadInput, match=said):
        hs.train(experiment(data, batch_size=16, **change), tmp_path / "run")


def test_whatever_can_teach_is_taken_as_a_teacher(run: Run, data: Images) -> None:
    by_run = as_teacher(run, run.classes)
    with pytest.raises(BadInput, match="its network is tiny:Tiny"):  # a path is opened
        as_teacher(str(run.path), run.classes)
    network = run.network()
    assert repr(as_teacher(network, run.classes)) == "Frozen(Tiny, image_size=None)"
    both = Ensemble([by_run, by_run])
    assert as_teacher(both, run.classes) is both
    assert repr(both) == f"Ensemble(Frozen(Tiny, image_size={SIZE}), Frozen(Tiny, image_size={SIZE}), weighting='mean')"
    with pytest.raises(BadInput, match="a list is no teacher: give a run, a network, or what answers a batch"):
        as_teacher([run], run.classes)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"^Tiny in an ensemble has no key; wrap a network in histill.teachers.Frozen"):
        Ensemble([network])  # type: ignore[list-item]


def test_a_teacher_that_cannot_be_kept_is_said(data: Images, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chosen: dict[str, Any] = {"teacher": lambda batch: Outputs(logits=batch.images.mean((2, 3))[:, :2]), "views": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histill.evaluate.finish.finish", no_page)
        hs.train(experiment(data, **chosen), tmp_path / "run")
    assert "note: the teacher has no key (function), so that it is asked in every epoch" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rotate": -1.0}, r"Augment\(rotate=-1.0\): a number from 0 to 180"),
        ({"subset": 2}, r"Augment\(subset=2\): a number from 0 to 1"),
        ({"noise": float("nan")}, r"Augment\(noise=nan\): a number from 0$"),
        ({"hue": "a"}, r"Augment\(hue='a'\): a number from 0 to 1"),
        ({"zoom": float("inf")}, r"Augment\(zoom=inf\): a number from 0$"),
    ],
)
def test_a_view_changes_by_a_number_in_its_range(change: Any, said: str) -> None:
    assert Augment(zoom=2.0, rotate=180, subset=0.5).zoom == 2
    with pytest.raises(BadInput, match=said):
        Augment(**change)


def test_a_device_and_loggers_as_torch_and_python_have_them(data: Images, tmp_path: Path) -> None:
    assert find_device(torch.device("cpu")) == torch.device("cpu")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"^loggers='tensorboard': a list of names, such as \['tensorboard'\]"):
        hs.train(experiment(data), tmp_path / "run", loggers="tensorboard")
    with pytest.raises(BadInput, match=r"^logger 'comet': one of tensorboard, mlflow, wandb"):
        hs.train(experiment(data), tmp_path / "run", loggers=["comet"])


def test_an_argument_that_a_recipe_lacks_is_said_with_its_name(data: Images) -> None:
    with pytest.raises(TypeError, match=r"histill.recipes.dsnet.student: got an unexpected keyword argument 'epoch'"):
        hs.recipes.dsnet.student(data, epoch=1)  # type: ignore[call-arg]
