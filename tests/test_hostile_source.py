"""Nothing in the package unpickles, evaluates or runs what a file says, but for the user's own code, by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import histill

ROOT = Path(histill.__file__).parent
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pd.read_pickle",
    "marshal.loads", "shelve.open", "joblib.load", "yaml.load", "torch.hub.load", "subprocess.getoutput",
}  # fmt: skip
IMPORTS = {
    "__init__.py": "its own names",
    "errors.py": "optional dependencies, by names in the source",
    "experiment.py": "recipes and studies by names that are listed, and the user's own file",
    "run.py": "a module of histill.models, once its name has been matched",
}
"""Where modules are imported by name, and by whose."""
RUN_FILES = {"experiment.py"}
"""Where a Python file is run: --code FILE and file.py:function, which are the user's own."""


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """File, what is called, and the call."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg}


def test_nothing_is_evaluated_or_unpickled() -> None:
    assert [(file, name) for file, name, _ in calls() if name in FORBIDDEN] == []


def test_checkpoints_and_arrays_are_loaded_without_pickle() -> None:
    loads = [(file, name, keywords(call)) for file, name, call in calls() if name in ("torch.load", "np.load")]
    assert len(loads) > 5  # or the names have changed, and this looks at nothing
    for file, name, said in loads:
        if name == "torch.load":
            assert said.get("weights_only") == "True", file
        else:
            assert said.get("allow_pickle", "False") == "False", file


def test_code_is_imported_by_name_in_few_places() -> None:
    found = {file for file, name, _ in calls() if name.endswith("import_module")}
    assert {file for file in found if Path(file).name not in IMPORTS} == set()
    assert {file for file, name, _ in calls() if name.endswith("exec_module")} == RUN_FILES


def test_no_shell() -> None:
    for file, name, call in calls():
        if name.startswith("subprocess."):
            assert keywords(call).get("shell", "False") == "False", file
        assert not name.startswith(("os.exec", "os.spawn")), file


def test_torchscript_is_looked_through_before_it_is_loaded() -> None:
    assert {file for file, name, _ in calls() if name == "torch.jit.load"} == {"deploy/predictor.py"}
    source = (ROOT / "deploy" / "predictor.py").read_text(encoding="utf-8")
    assert 0 < source.index("check_script(path)") < source.index("torch.jit.load(")


def test_pictures_are_opened_as_the_kinds_that_are_named() -> None:
    free = [(f, n) for f, n, c in calls() if n == "Image.open" and "formats" not in keywords(c)]
    assert {file for file, _ in free} <= {"evaluate/robust.py", "data/phantom.py"}  # what they have just encoded


def test_templates_escape() -> None:
    # A model card is text for people, not a page: what it takes from outside is escaped where it is put in.
    text = "deploy/model_card.py"
    environments = [keywords(call) for f, name, call in calls() if name.endswith("jinja2.Environment") and f != text]
    assert len(environments) >= 3
    assert all(said.get("autoescape") == "True" for said in environments)
    pages = [*ROOT.rglob("*.html"), *ROOT.rglob("*.jinja*")]
    assert len(pages) >= 4
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "|safe" not in text.replace(" ", ""), page
        assert "autoescape false" not in text, page
