"""The flat public interface: what it names is there, and quick to reach."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import histill as hs

ROOMS = {"data", "deploy", "evaluate", "losses", "models", "recipes", "schedules", "slides", "teachers", "types"}


def test_every_public_name_resolves() -> None:
    assert sorted(hs.__all__) == sorted(dir(hs)) == sorted(set(hs.__all__))
    for name in hs.__all__:
        assert getattr(hs, name) is not None
    assert {name for name in hs.__all__ if isinstance(getattr(hs, name), ModuleType)} == ROOMS


def test_the_interface_page_is_there() -> None:
    for name in ("read_images", "split", "train", "evaluate", "compare", "export", "predict", "recipe"):
        assert callable(getattr(hs, name)), name
    assert inspect.isclass(hs.Experiment)
    assert inspect.isclass(hs.Run)
    assert hs.recipes.dsnet.student.__name__ == "student"


@pytest.mark.parametrize("room", sorted(ROOMS - {"recipes"}))
def test_every_name_of_a_room_resolves(room: str) -> None:
    module = importlib.import_module(f"histill.{room}")
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None, name


def test_a_wrong_name_is_an_attribute_error() -> None:
    for module in (hs, hs.evaluate, hs.deploy, hs.recipes, hs.models):
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            module.nothing_of_the_kind


def test_functions_are_not_hidden_by_modules_of_the_same_name() -> None:

    for function in (hs.compare, hs.export, hs.predict, hs.deploy.bench, hs.evaluate.macs):
        assert inspect.isfunction(function)

    assert inspect.isfunction(hs.data.unpack)
    assert hs.data.split is hs.split
    assert hs.deploy.export is hs.export
    assert hs.deploy.predict is hs.predict


def test_evaluate_is_a_module_and_a_function() -> None:
    from histill.evaluate import metrics, paired_gain

    assert hs.evaluate.metrics is metrics
    assert hs.evaluate.paired_gain is paired_gain
    assert list(inspect.signature(hs.evaluate).parameters)[:2] == ["run", "data"]
    assert hs.evaluate.macs(hs.models.DSNet(2, 18), 18) > 0


def heavy(statement: str) -> set[str]:
    """What a fresh interpreter has imported of the slow libraries after a statement."""
    slow = "{'torch', 'timm', 'matplotlib', 'onnx', 'onnxruntime', 'sklearn', 'pandas'}"
    code = f"import sys\n{statement}\nprint(*({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    assert heavy("import histill, histill.cli") == set()
    assert "torch" not in heavy("import histill.evaluate.metrics, histill.evaluate.intervals")


def test_rooms_import_one_way() -> None:
    home = Path(hs.__file__).parent
    before: dict[str, set[str]] = {}
    for file in home.rglob("*.py"):
        room = file.relative_to(home).parts[0].removesuffix(".py")
        for node in ast.parse(file.read_text()).body:  # what a function imports, it may
            for name in [node.module] if isinstance(node, ast.ImportFrom) else []:
                if name and name.startswith("histill.") and (other := name.split(".")[1]) != room:
                    before.setdefault(room, set()).add(other)
    order = list(graphlib.TopologicalSorter(before).static_order())  # raises where there is a cycle
    shown = ("data", "evaluate", "experiment", "loop", "distill", "studies")
    assert [room for room in order if room in shown] == list(shown)
