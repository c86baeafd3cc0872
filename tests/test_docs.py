"""What the pages say can be done: commands parse, code runs, links lead somewhere, examples keep their contracts."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import cyclopts
import layouts
import pytest
import test_losses_contract
import test_models
import test_recipes
import test_sets
from conftest import write_classes
from PIL import Image

import histill
from histill import cli, losses, models
from histill.commands import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMING: tuple[str, ...] = ()
"""Pages that may not be there yet; an entry here goes when its page comes."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [p for p in PAGES if "_build" not in p.parts and not p.name.startswith("_")]
NAMES = [p.relative_to(ROOT).as_posix() for p in PAGES]
FENCE = re.compile(r"^( *)(```+)\s*\{?([\w-]*)\}?[^\n]*\n(.*?)^\1\2\s*$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^`([\w./]+\.py)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("sh", "console", "bash", "")


class Block(NamedTuple):
    language: str
    text: str


def blocks(text: str) -> Iterator[Block]:
    """Fenced and indented code, in order; directives of the site are no code."""
    for found in FENCE.finditer(text):
        if found[3] not in ("toctree", "include"):
            yield Block(found[3], found[4])
    rest, indented = FENCE.sub("\n", text), []
    for line in [*rest.splitlines(), "."]:
        if line.startswith("    ") and not line.lstrip().startswith(("-", "*")):
            indented.append(line[4:])
        elif line.strip() and indented:
            yield Block("", "\n".join(indented) + "\n")
            indented = []


def commands(text: str, program: str = "histill") -> Iterator[str]:
    """Every line of shell that runs ``program``, without its comment."""
    for block in blocks(text):
        if block.language in SHELL:
            for line in block.text.replace("\\\n", " ").splitlines():
                found = re.match(rf"\s*(?:\$ )?(?:torchrun .*? -m |srun (?:\S+ )*?)?({program}(?: .*)?)$", line)
                if found and "$" not in found[1]:  # what a script's variables hold is not said here
                    yield re.sub(r"\s+#\s.*$", "", found[1])


def parse(line: str) -> None:
    """Bind a command line to what it would call, and call nothing; raises what the command line would say."""
    line = re.sub(r"\b(?:NAME|RECIPE)\b", "dsnet", line).replace(".PART", ".student")
    tokens = [t for t in shlex.split(re.sub(r"[\[\]]", " ", line))[1:] if t != "..."]
    if tokens and tokens[0] in cli.VERBS:
        from histill.verbs import recipe_command

        verb, command = recipe_command(tokens, cli.VERBS[tokens[0]])
        del app[verb]
        app.command(command, name=verb)
    app.parse_args(tokens, exit_on_error=False, print_error=False)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that pages show, and ``lesions/`` with a folder per class."""
    for page in PAGES:
        for name, code in FILE.findall(page.read_text(encoding="utf-8")):
            (tmp_path / Path(name).name).write_text(code, encoding="utf-8")
    (tmp_path / "mine.py").exists() or pytest.fail("the tutorial shows no mine.py")
    write_classes(tmp_path / "lesions", {"benign": 20, "malignant": 20}, per_patient=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_that_there_is(name: str, written: Path) -> None:
    failed = []
    for line in commands((ROOT / name).read_text(encoding="utf-8")):
        try:
            parse(line)
        except (cyclopts.CycloptsError, histill.errors.HistillError, ValueError) as error:
            failed.append(f"{line}: {' '.join(str(error).split())}")
    assert failed == []


@pytest.mark.parametrize("name", NAMES)
def test_every_command_in_passing_is_one_that_there_is(name: str, written: Path) -> None:
    """In running text arguments may be left out, but nothing may be named that is not there."""
    text = FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    failed = []
    for said in re.findall(r"`(histill [^`]+)`", text):
        line = " ".join(said.split())
        if line.removeprefix("histill ") in cli.VERBS:  # which want the name of a recipe even for their help
            continue
        try:
            parse(line)
        except (cyclopts.MissingArgumentError, cyclopts.CommandCollisionError):
            continue
        except (cyclopts.CycloptsError, histill.errors.HistillError, ValueError) as error:
            failed.append(f"{line}: {' '.join(str(error).split())}")
    assert failed == []


@pytest.mark.parametrize("name", NAMES)
def test_every_target_of_make_is_in_the_makefile(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for line in commands((ROOT / name).read_text(encoding="utf-8"), "make")}
    assert named <= targets


def test_a_wrong_command_would_be_found(written: Path) -> None:
    for line in ("histill slyde a.svs", "histill bench --fast a.onnx", "histill distill dsnet --data d --out o --T 4"):
        with pytest.raises((cyclopts.CycloptsError, histill.errors.HistillError)):
            parse(line)
    with pytest.raises(cyclopts.MissingArgumentError):
        parse("histill predict model.onnx")
    assert [b.text for b in blocks("a\n\n    histill x\n\nb\n\n```sh\nhistill y\n```\n")] == [
        "histill y\n",
        "histill x\n",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_python_compiles_and_what_it_imports_is_there(
    name: str, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(written))
    for block in blocks((ROOT / name).read_text(encoding="utf-8")):
        lines = block.text.lstrip()
        if block.language == "python" or (not block.language and lines.startswith(("import ", "from "))):
            row = re.match(r'"\w+": ', lines)  # of a table in the tests
            for node in ast.walk(ast.parse("{" + block.text + "}" if row else block.text)):
                resolve(node)


def resolve(node: ast.AST) -> None:
    """An import, or a name below ``hs``, is there."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            importlib.import_module(alias.name)
    elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
        module = importlib.import_module(node.module or "")
        assert all(a.name == "*" or hasattr(module, a.name) for a in node.names), ast.unparse(node)
    elif isinstance(node, ast.Attribute) and (said := ast.unparse(node)).startswith("hs."):
        found: Any = histill
        for part in said.split(".")[1:]:
            if not isinstance(found, ModuleType):
                break
            found = getattr(found, part)


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_leads_to_a_file(name: str) -> None:
    text = FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", t)]
    assert {
        t for t in targets if t and Path(t).name not in COMING and not (ROOT / name).parent.joinpath(t).exists()
    } == set()


def test_every_page_is_one_click_from_the_first() -> None:
    first = (DOCS / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", first))
    for room in ("tutorials", "howto", "concepts"):
        assert {p.relative_to(DOCS).as_posix() for p in (DOCS / room).glob("*.md")} <= linked
    assert {f"{p.stem}.md" for p in DOCS.glob("*.md") if p.name[0] not in "_i"} <= linked


# Code that is run


@pytest.mark.parametrize(
    "name",
    ["howto/teacher", "howto/dataset", "howto/loss", "howto/recipe", "concepts/calibration", "concepts/intervals"],
)
def test_the_code_of_a_page_runs_as_written(name: str, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.evaluate.finish.finish", lambda out, info: None)  # drawing takes longer than the rest
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "page"}
    for path, _ in FILE.findall(text):
        __import__("histill.experiment", fromlist=["load_file"]).load_file(written / path)
    for block in blocks(FILE.sub("", text)):
        if block.language == "python":
            exec(compile(block.text, f"{name}.md", "exec"), names)
    if name == "howto/teacher":
        assert (written / "runs/student/model.safetensors").is_file()
        batch = histill.types.Batch(*[None] * 4, lambda size: None)._replace(images=_reds())
        assert names["Redness"]()(batch)["logits"].argmax(1).tolist() == [1, 0]


def _reds() -> Any:
    import torch

    return torch.stack([torch.full((3, 64, 64), value) for value in (0.9, -0.1)])


def test_commands_that_only_look_run(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["recipes"], ["losses"], ["teachers"], ["data", "fetch"]):
        assert cli.run(words) == 0
    assert "dsnet.student" in capsys.readouterr().out


def test_the_tutorials_loss_keeps_its_own_contract(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(written))
    for name in ("mine", "test_mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    contract = importlib.import_module("test_mine")
    run = [value for name, value in vars(contract).items() if name.startswith("test_")]
    assert len(run) == 4
    for check in run:
        check()
    for name in ("mine", "test_mine"):
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phone", "qupath", "loss"])
def test_a_tutorial_runs_as_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command in order, but those that do not end or compare eighteen methods."""
    monkeypatch.chdir(tmp_path)
    pages = ["phone", "loss"] if name == "loss" else [name]
    for page in pages:
        text = (DOCS / "tutorials" / f"{page}.md").read_text(encoding="utf-8")
        for path, code in FILE.findall(text):
            Path(path).write_text(code, encoding="utf-8")
        for block in blocks(FILE.sub("", text)):
            if block.language == "python":
                exec(compile(block.text, page, "exec"), {})
            lines = block.text.splitlines() if block.language == "sh" else []
            for line in lines:
                words = shlex.split(line, comments=True)
                if words[:2] in (["histill", "view"], ["histill", "study"]) and "mine.py:study" not in words:
                    continue
                done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
                assert done.returncode == 0, (line, done.stderr)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    words = ["-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "reference" / "losses.html").read_text(encoding="utf-8")
    functions = [name for name in losses.__all__ if callable(getattr(losses, name))]
    assert [name for name in functions if f'id="histill.losses.{name}"' not in page] == []


# What CONTRIBUTING.md shows, put to the contracts

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SHOWN = dict(FILE.findall(CONTRIBUTING))
ROWS = {
    key: row
    for row in re.findall(r"^```python\n(\"(?:.*)\n)```$", CONTRIBUTING, re.MULTILINE)
    for key in [row.split('"')[1]]
}


def shown(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module that the page shows at ``path``, imported by the name that it would have."""
    (file := tmp_path / Path(path).name).write_text(SHOWN[path], encoding="utf-8")
    name = path.removeprefix("src/").removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_each_example_is_formatted_and_under_thirty_lines_with_its_contract(tmp_path: Path) -> None:
    for section in CONTRIBUTING.split("\n## ")[1:-1]:
        parts = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        assert sum(bool(line.strip()) for part in parts for line in part.splitlines()) < 30, section[:20]
    assert len(SHOWN) == 4
    for path, code in SHOWN.items():
        (tmp_path / "shown.py").write_text(code)
        words = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "120", "shown.py"]
        assert subprocess.run(words, cwd=tmp_path, capture_output=True, check=False).returncode == 0, path


def test_the_network_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = shown("src/histill/models/pebble.py", monkeypatch, tmp_path)
    monkeypatch.setattr(models, "Pebble", module.Pebble, raising=False)
    row = eval("{" + ROWS["pebble"] + "}", vars(test_models))
    monkeypatch.setitem(test_models.CASES, "pebble", row["pebble"])
    test_models.test_evaluation_is_named_repeatable_and_independent_of_the_batch("pebble")
    test_models.test_gradient_reaches_every_trainable_parameter("pebble")
    test_models.test_state_survives_safetensors_and_channels_last("pebble", tmp_path)


def test_the_loss_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    module = shown("src/histill/losses/hellinger.py", monkeypatch, tmp_path)
    monkeypatch.setattr(losses, "hellinger", module.hellinger, raising=False)
    row = eval("{" + ROWS["hellinger"] + "}", vars(test_losses_contract))
    monkeypatch.setitem(test_losses_contract.CASES, "hellinger", row["hellinger"])
    contract = vars(test_losses_contract)
    ran = 0
    for name, check in contract.items():
        wanted = check.__code__.co_varnames[: check.__code__.co_argcount] if name.startswith("test_") else ()
        if "name" in wanted and {*wanted} <= {"name", "dtype"}:
            for dtype in (torch.float16, torch.bfloat16, torch.float32) if "dtype" in wanted else (None,):
                check(**{"name": "hellinger"} | ({} if dtype is None else {"dtype": dtype}))
                ran += 1
    assert ran >= 12
    # By hand: one image of p = (0.1, 0.9) against (0.5, 0.5): 1 - (sqrt(0.05) + sqrt(0.45)).
    said = module.hellinger(torch.tensor([[1.0, 9.0]]).log(), torch.zeros(1, 2), temperature=1)
    assert abs(float(said) - (1 - 0.05**0.5 - 0.45**0.5)) < 1e-6


def test_the_recipe_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown("src/histill/recipes/chord.py", monkeypatch, tmp_path)
    row = eval("{" + ROWS["chord"] + "}")["chord"]
    row |= {"epochs": 1, "teacher_epochs": 1, "batch_size": 8, "weights": "none", "teacher_weights": "none"}
    monkeypatch.setitem(test_recipes.TINY, "chord", row)
    test_recipes.test_every_argument_is_described_and_the_shared_ones_have_the_same_names("chord")
    test_recipes.test_alone_and_distilled_differ_in_the_teacher_alone("chord", tmp_path, monkeypatch)


def test_the_data_set_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module = shown("src/histill/data/sets/marbles.py", monkeypatch, tmp_path)
    (layout,) = re.findall(r"^```python\n(def marbles.*?)^```$", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"Path": Path, "image": layouts.image}
    exec(layout, names)
    (record,) = module.SETS
    monkeypatch.setitem(test_sets.SETS, "marbles", record)
    monkeypatch.setitem(layouts.LAYOUTS, "marbles", names["marbles"])

    def laid(name: str) -> Path:
        return layouts.lay(name, tmp_path / "laid")

    test_sets.test_a_record_is_complete(record)
    test_sets.test_a_folder_becomes_a_table("marbles", laid, capfd)
    (tmp_path / "wrong").mkdir()
    test_sets.test_another_layout_is_refused_with_one_line("marbles", tmp_path / "wrong")
    assert histill.data.read_images(tmp_path / "laid" / "manifest.csv").frame["patient"].nunique() == 8


def test_the_pictures_of_the_concepts_are_those_that_the_script_draws() -> None:
    text = (DOCS / "pictures.py").read_text(encoding="utf-8")
    drawn = set(re.findall(r'OUT / "(\w+\.png)"', text))
    linked = {
        Path(t).name
        for p in (DOCS / "concepts").glob("*.md")
        for t in re.findall(r"!\[[^]]*\]\(([^)]+)\)", p.read_text())
    }
    assert linked == drawn
    for name in drawn:
        with Image.open(DOCS / "images" / name) as picture:
            assert min(picture.size) > 300
