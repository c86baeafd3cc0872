"""What is typed at a prompt answers in a line: what an object holds, or what was given in place of what is needed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from tiny import SIZE, experiment, no_page, table

import histill as hs
from histill.data import Images
from histill.errors import BadInput
from histill.run import Run


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
