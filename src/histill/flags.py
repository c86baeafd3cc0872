"""Flags of recipes: read off their signatures, with the help from their docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import cyclopts

__all__ = [
    "COMMON",
    "LACKING",
    "PATHS",
    "SLIDES",
    "SPLIT",
    "WORDS",
    "command_of",
    "common",
    "described",
    "merged",
    "read_data",
    "signature_flags",
]

COMMON: tuple[tuple[str, Any, Any, str], ...] = (
    ("data", Path | None, None, "a folder of class folders (optionally under train/ val/ test/) or a CSV manifest."),
    ("out", Path, inspect.Parameter.empty, "where the results go."),
    ("val", float, 0.15, "share of the images for validation, where the data brings no split."),
    ("test", float, 0.15, "share of the images for the test, where the data brings no split."),
    ("split_seed", int | None, None, "seed of that split (default: --seed)."),
    ("patient", str | None, None, "regular expression that reads the patient off an image's path."),
    (
        "target",
        Literal["auto", "labels", "masks", "instances"],
        "auto",
        "labels, masks of classes, or masks of numbered nuclei (auto: masks, of a folder of images/ and masks/ or a "
        "manifest without labels).",
    ),
    ("classes", list[str] | None, None, "names of the classes 0, 1, ... that masks hold."),
    (
        "slides",
        list[Path] | None,
        None,
        "whole slides, or folders of them, cut into OUT/patches: with --masks labelled patches in place of --data, "
        "without them unlabelled ones in place of --unlabelled; a recipe that needs both cuts the second from the "
        "training slides.",
    ),
    ("masks", Path | None, None, "a folder with a mask image or QuPath GeoJSON for each slide."),
    (
        "slide_mpp",
        float | None,
        None,
        "microns per pixel, for every slide; a note is printed where a file says another.",
    ),
    ("device", str, "auto", "auto, cpu, cuda or mps."),
    ("precision", str, "auto", "auto, 32-true, bf16-mixed, ... (Lightning Fabric's names)."),
    ("resume", bool, False, "go on with what --out holds; needs --out alone."),
)
SLIDES = ("slides", "masks", "slide_mpp")
SPLIT = ("val", "test", "split_seed", "patient", "target", "classes")
"""How ``--data`` is read and divided."""

LACKING = {
    "data": "--data: give a folder of class folders or a CSV manifest",
    "unlabelled": "--unlabelled: give a folder of images; they need no labels",
}
WORDS: dict[str, tuple[Any, str]] = {
    "teacher": (list[str] | None, "what it learns from: a run, or a file or a name that the recipe knows."),
    "unlabelled": (Path | None, "a folder of images."),
}
PATHS: dict[str, tuple[Any, str]] = {
    "teacher": (list[Path] | None, "a run to learn from, or several; without it the student learns alone."),
    "unlabelled": (Path | None, "a folder of further images, which join with the teacher's word only."),
}


def signature_flags(
    function: Callable[..., Any], paths: dict[str, tuple[Any, str]] = PATHS
) -> dict[str, tuple[Any, Any, str]]:
    """A recipe's arguments as flags: name -> type, default, help. Runs and tables are given as ``paths``."""
    texts = described(function)
    hints = get_type_hints(inspect.unwrap(function))
    flags: dict[str, tuple[Any, Any, str]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "data":
            continue
        if name in paths:
            kind, text = paths[name]
            flags[name] = (kind, None, texts.get(name, text))
        else:
            unhinted = str if parameter.default in (None, inspect.Parameter.empty) else type(parameter.default)
            flags[name] = (hints.get(name, unhinted), parameter.default, texts.get(name, ""))
    return flags


def described(function: Callable[..., Any]) -> dict[str, str]:
    """The ``Args`` of a docstring."""
    doc = inspect.getdoc(function) or ""
    found: dict[str, str] = {}
    for line in doc.partition("Args:\n")[2].split("\n\n")[0].splitlines():
        name, colon, text = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     ") and colon and name.isidentifier():
            found[name] = text
        elif found:
            found[list(found)[-1]] += " " + line.strip()
    return found


def command_of(
    doc: str, flags: dict[str, tuple[Any, Any, str]], work: Callable[[dict[str, Any]], Any], kind: str = "recipe"
) -> Any:
    """A function of a recipe's (or study's) name and of flags for cyclopts; ``work`` gets those that were given."""

    def command(name: str, /, **values: Any) -> Any:
        return work(values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    first = inspect.Parameter(kind, inspect.Parameter.POSITIONAL_ONLY, annotation=str)
    parameters = [inspect.Parameter(n, keyword, annotation=_aliased(n, t), default=d) for n, (t, d, _) in flags.items()]
    command.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {kind: str} | {p.name: p.annotation for p in parameters}
    lines = "\n".join(f"    {n}: {text}" for n, (_, _, text) in flags.items())
    command.__doc__ = f"{doc}\n\nArgs:\n    {kind}: its name, or file.py:function.\n{lines}\n"
    return command


def _aliased(name: str, kind: Any) -> Any:
    """The student's network also goes by ``--student``."""
    return Annotated[kind, cyclopts.Parameter(alias="--student")] if name == "network" else kind


def read_data(values: dict[str, Any]) -> Any:
    """The images of ``--data`` with their split."""
    from histill.distill import read_parts

    seed = values.get("seed", 0) if values["split_seed"] is None else values["split_seed"]
    return read_parts(Path(values["data"]), seed=seed, **{n: values[n] for n in SPLIT if n != "split_seed"})


def merged(*some: dict[str, tuple[Any, Any, str]]) -> dict[str, tuple[Any, Any, str]]:
    return {name: flag for flags in some for name, flag in flags.items()}


def common(*names: str) -> dict[str, tuple[Any, Any, str]]:
    return {n: (t, d, h) for n, t, d, h in COMMON if not names or n in names}
