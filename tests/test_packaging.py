"""What is published is whole, installs into an empty environment, and its bounds are those that are tested."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {n.lower().replace("_", "-"): version for n, version in (line.split("==") for line in lines)}


def required(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [r for r in map(Requirement, lines) if r.name != "histill"]


def test_constraints_are_versions_alone() -> None:
    """No address of a registry, no file of a machine: another machine installs the same from its own."""
    for name in ("constraints.txt", "constraints-min.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines), name
    assert not [r for r in required(*EXTRAS) if r.url]


def test_what_is_pinned_fits_what_is_asked_for() -> None:
    held = pins("constraints.txt")
    for need in required(*(e for e in EXTRAS if e not in ("tracking", "docs"))):
        version = held.get(need.name.lower().replace("_", "-"))
        assert version is not None, f"{need} is not pinned"
        assert need.specifier.contains(version), f"{need}, pinned to {version}"


def test_the_lowest_versions_are_the_bounds() -> None:
    lowest = pins("constraints-min.txt")
    for need in required(*(e for e in EXTRAS if e not in ("dev", "docs"))):
        bounds = [s.version for s in need.specifier if s.operator == ">="]
        assert bounds, f"{need} has no lower bound"
        assert Version(lowest[need.name.lower()]) == Version(bounds[0]), "run benchmarks/package.py"


def test_all_is_every_extra_that_users_take() -> None:
    (line,) = EXTRAS["all"]
    assert Requirement(line).extras == set(EXTRAS) - {"all", "dev", "docs", "tracking"}


def test_types_are_shipped() -> None:
    assert (ROOT / "src/histill/py.typed").is_file()


@pytest.mark.slow
def test_wheel_and_sdist_install_into_an_empty_environment(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/package.py", "--extras", "base", "--home", tmp_path]
    subprocess.run([*command, "--result", tmp_path / "found.json"], check=True, cwd=ROOT)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wheel"]["typed"]
    assert found["wheel"]["missing"] == found["wheel"]["foreign"] == found["wheel"]["addresses_in_requirements"] == []
    assert found["installed"]["base"]["doctor"]["torch"] == "works"
