"""How ``make docs`` makes the pages: MyST for the Markdown, autodoc for the reference, warnings as errors.

A page under ``docs/reference`` holds lines such as ``<!-- members histill.losses -->``, which become that module's
public names with their docstrings, and ``<!-- commands -->``, which becomes the help of every command.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import histill

project = "Histill"
author = "The Histill developers"
copyright = "The Histill developers, Apache-2.0"
version = release = histill.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_*.md"]
html_theme = "furo"
html_title = "Histill"
html_static_path: list[str] = []
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"

myst_enable_extensions = ["smartquotes"]
myst_heading_anchors = 3
default_role = "py:obj"  # a name in backticks that is not in the reference stays a name

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

HERE = Path(__file__).parent
COMING: tuple[str, ...] = ()
"""Pages that may not be there yet: a link to one is left out until it is. An entry goes when its page comes."""
RECIPE_PARTS = ("teacher", "student", "pretrain", "supervised", "finetune")


def members(module: str) -> str:
    """A block of autodoc directives for every name in a module's ``__all__``."""
    found = importlib.import_module(module)
    lines = []
    for name in found.__all__:
        value = getattr(found, name)
        if inspect.ismodule(value) or isinstance(value, tuple):
            continue
        if inspect.isclass(value):
            again = ["   :no-index:"] if module != "histill" and name in histill.__all__ else []
            lines += [f".. autoclass:: {module}.{name}", "   :members:", *again, ""]
        elif inspect.isroutine(value):
            lines += [f".. autofunction:: {module}.{name}", ""]
        elif not name.startswith("__"):
            home = getattr(found, "_HOMES", {}).get(name)  # where the words about it are
            lines += [f".. autodata:: {module}.{home}.{name}" if home else f".. autodata:: {module}.{name}"]
            lines += ["   :no-value:", ""]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def recipes() -> str:
    """Every recipe's parts; what their arguments are is what the flags of ``histill train`` are."""
    from histill.experiment import load_recipe
    from histill.experiment import recipes as names

    text = []
    for name in names():
        module, _ = load_recipe(name)
        text += [f"## `{name}`", "", *(module.__doc__ or "").strip().splitlines()[:1], "", "```{eval-rst}"]
        for part in RECIPE_PARTS:
            if callable(getattr(module, part, None)):
                text += [f".. autofunction:: {module.__name__}.{part}", ""]
        text += ["```", ""]
    return "\n".join(text)


def commands() -> str:
    """The help of every command, as the command line itself gives it."""
    from histill.cli import app

    text = app.generate_docs(output_format="markdown", heading_level=1)
    text = text[text.index("## histill") :]
    return re.sub(r"^```console$", "```text", text, flags=re.MULTILINE)


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put what is generated in place of its mark."""
    text = re.sub(r"^<!-- members ([\w.]+) -->$", lambda found: members(found[1]), source[0], flags=re.MULTILINE)
    for mark, make in (("<!-- commands -->", commands), ("<!-- recipes -->", recipes)):
        if f"\n{mark}\n" in text:
            text = text.replace(mark, make())
    for page in COMING:
        if not (HERE / page).is_file():
            text = re.sub(rf"\[([^]]*)\]\((?:\.\./)?{page}\)", r"\1", text)
            text = re.sub(rf"^{page.removesuffix('.md')}\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^]]*)\]\((\.\./benchmarks/[\w/]+\.md)\)", r"{download}`\1 <\2>`", text)
    source[0] = text


def as_written(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A `dict` or a `tuple` that is documented by name has no docstring of its own; its type's says nothing."""
    if what == "data" and not inspect.isfunction(obj) and lines[:1] == (inspect.getdoc(obj) or "").splitlines()[:1]:
        lines[:] = []


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", as_written, priority=400)
