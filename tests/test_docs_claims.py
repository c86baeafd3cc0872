"""What the pages say of files is so: an export answers without Histill, runs, tables and caches hold what is listed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import no_page, table

import histill as hs
from histill.files import cache_dir

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> hs.Images:
    return table(tmp_path_factory.mktemp("data") / "lesions")


@pytest.fixture(scope="module")
def taught(images: hs.Images, tmp_path_factory: pytest.TempPathFactory) -> hs.Run:
    return hs.train(
        hs.recipes.dsnet.student(data=images, image_size=18, epochs=1), tmp_path_factory.mktemp("run") / "t"
    )


def rows(page: str, heading: str) -> set[str]:
    """What stands in code in the first column of the first table below a heading."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    listed = re.search(r"^\|---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert listed
    return {name for row in listed[1].splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_code_without_histill_says_what_predict_and_the_temperature_say(
    taught: hs.Run,
    images: hs.Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    hs.export(taught, "student.onnx")
    turned = Image.Exif()
    turned[0x0112] = 6  # as a phone writes it: to be turned by 90 degrees
    Image.open(images.paths()[0]).resize((50, 31)).save("image.png", exif=turned)
    code = re.findall(r"^```python\n(.*?)^```$", (DOCS / "howto/deploy.md").read_text(encoding="utf-8"), re.M | re.S)[0]
    names: dict[str, Any] = {}
    exec(compile(code, "deploy.md", "exec"), names)
    capsys.readouterr()
    said = hs.predict("student.onnx", "image.png").iloc[0]
    sharp = np.array([said[f"prob_{name}"] for name in taught.classes])
    calm = sharp ** (1 / (taught.temperature or 1))
    np.testing.assert_allclose(names["odds"] / names["odds"].sum(), calm / calm.sum(), atol=1e-5)
    assert tuple(names["card"]["classes"]) == taught.classes


def test_a_run_folder_holds_what_its_page_lists(taught: hs.Run) -> None:
    listed = {name.rstrip("/") for name in rows("concepts/run.md", "# The run folder")}
    assert {path.name for path in taught.path.iterdir() if path.name[0] != "."} == listed - {"checkpoint.pt"}


def test_the_teacher_is_asked_again_where_the_page_says_so(
    taught: hs.Run, images: hs.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", no_page)

    def caches(name: str, **more: Any) -> set[Path]:
        given = {"image_size": 18, "epochs": 1, "views": 2} | more
        hs.train(hs.recipes.dsnet.student(data=images, teacher=taught, **given), tmp_path / name)
        return set(cache_dir("teachers").iterdir())

    there = caches("first")
    changes: list[tuple[dict[str, Any], int]] = [
        ({"epochs": 2, "lr": 1e-2, "temperature": 3.0}, 0),
        ({"network": "stridenet"}, 0),
        ({"views": 3}, 1),
        ({"seed": 1}, 1),
        ({"image_size": 20}, 1),
        ({"augment": "none"}, 1),
    ]
    for number, (change, begun) in enumerate(changes):
        now = caches(f"run{number}", **change)
        assert len(now - there) == begun, change
        there = now


def test_the_columns_of_a_manifest_are_those_that_are_read(images: hs.Images) -> None:
    assert rows("howto/dataset.md", "## The columns of a CSV") == set(images.frame.columns) - {
        "content",
        "mask_content",
    }


def test_the_cache_folders_are_those_that_the_code_makes() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in Path(hs.__file__).parent.rglob("*.py"))
    text = (DOCS / "install.md").read_text(encoding="utf-8").partition("## The cache folder\n")[2].partition("## ")[0]
    assert set(re.findall(r"cache_dir\(\"(\w+)\"", code)) == set(re.findall(r"`(\w+)`", text)) - {"HISTILL_CACHE"}
