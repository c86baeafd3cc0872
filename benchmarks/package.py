"""What is published, installed as a stranger would: wheel and sdist, every extra, the oldest and the newest libraries.

    python benchmarks/package.py [--extras base slides ...] [--versions lowest newest] [--home DIR]
                                   [--result FILE]

The wheel is built from the sdist, and looked into. For each extra a fresh virtual environment gets the wheel with
constraints.txt; there every module is imported (or says which library it lacks, and that library must be another
extra's), and ``histill --help`` and ``histill doctor`` run; under ``all`` a user's script is type-checked too.
``lowest`` installs exactly the lower bounds of pyproject.toml (constraints-min.txt, which this writes), ``newest`` no
constraints at all; both run the tests named below. Environments go to --home (a temporary folder), and one that is
there is used again. Results are added to FILE (benchmarks/results/packaging.json). Minutes for each environment,
most of them torch's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from histill.files import write_json

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/packaging.json"
LOWEST = ROOT / "constraints-min.txt"
NOT_FOR_USE = ("dev", "docs")
ASSETS = (".js", ".css", ".html", ".json", ".typed", ".svg", ".png")
TESTS = (
    *("intervals", "metrics", "statistics_worked", "statistics_leaks", "images", "splits", "packed", "views", "masks"),
    *("loop", "losses_contract", "losses_response", "models", "run", "api", "doctor", "deploy"),
    *("slide", "geojson", "heatmap", "tissue", "pretrain", "enhance"),
)
IMPORTS = """
import importlib, json, pkgutil, histill
from histill.errors import BadInput
good, lacking, broken = [], {}, {}
for module in pkgutil.walk_packages(histill.__path__, "histill."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
        good.append(module.name)
    except ModuleNotFoundError as error:
        lacking[module.name] = (error.name or "").split(".")[0]
    except BadInput as error:
        lacking[module.name] = str(error)
    except Exception as error:
        broken[module.name] = repr(error)
print(json.dumps({"imported": len(good), "lacking": lacking, "broken": broken}))
"""
SCRIPT = """
from pathlib import Path

import numpy as np

import histill as hs
from histill.evaluate.intervals import Figure, figures_with_intervals
from histill.evaluate.metrics import Scores

scores = Scores(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]), np.arange(2))
figures: dict[str, Figure] = figures_with_intervals(scores)
images: hs.Images = hs.split(hs.read_images(Path("lesions")), val=0.2)
reveal_type(hs.compare("a", "b"))
hs.split(images, val="a fifth")
"""


def lower_bounds() -> dict[str, str]:
    """Each library's lower bound in pyproject.toml, extras for users included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        line for extra, lines in project["optional-dependencies"].items() if extra not in NOT_FOR_USE for line in lines
    ]
    found = (re.fullmatch(r"([\w.-]+)>=([\d.]+)", line) for line in (*project["dependencies"], *extras))
    return dict(sorted((match[1].lower(), match[2]) for match in found if match))


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    given = {"text": True, "capture_output": True, "env": environment, **options}
    return subprocess.run([str(c) for c in command], check=False, **given)


def need(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, done.args))[:300]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def fresh(home: Path, name: str) -> Path:
    """The Python of a virtual environment that has nothing in it but pip."""
    venv = home / f"venv-{name}"
    if not venv.exists():
        need(run([sys.executable, "-m", "venv", venv]))
    return venv / "bin/python"


def install(python: Path, *what: str | Path) -> float:
    """Seconds that it took."""
    start = time.monotonic()
    need(run([python, "-m", "pip", "install", "--quiet", "--no-compile", *what]))
    return time.monotonic() - start


def build(home: Path) -> tuple[Path, dict[str, Any]]:
    """The wheel, made from the sdist, and what is in the two."""
    python = fresh(home, "build")
    install(python, "build")
    need(run([python, "-m", "build", "--outdir", home / "dist", ROOT]))
    wheel, sdist = next((home / "dist").glob("*.whl")), next((home / "dist").glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        metadata = archive.read(next(n for n in inside if n.endswith("METADATA"))).decode()
    tracked = need(run(["git", "-C", ROOT, "ls-files", "src/histill"])).split()
    missing = sorted({path.removeprefix("src/") for path in tracked if (ROOT / path).exists()} - inside)
    foreign = sorted(
        n for n in inside if not n.startswith(("histill/", f"histill-{wheel.name.split('-')[1]}.dist-info/"))
    )
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    found = {
        "wheel": {
            "bytes": wheel.stat().st_size,
            "files": len(inside),
            "assets": sorted(n for n in inside if n.endswith(ASSETS)),
            "missing": missing,
            "foreign": foreign,
            "typed": "histill/py.typed" in inside,
            "addresses_in_requirements": re.findall(r"Requires-Dist: .*@.*", metadata),
        },
        "sdist": {"bytes": sdist.stat().st_size, "files": len(names)},
    }
    if missing or foreign or not found["wheel"]["typed"]:
        raise SystemExit(f"the wheel is not whole: missing {missing}, foreign {foreign}")
    return wheel, found


def installed(home: Path, wheel: Path, extra: str) -> dict[str, Any]:
    """A fresh environment with an extra, and what works in it."""
    python = fresh(home, extra)
    what = str(wheel) if extra == "base" else f"{wheel}[{extra}]"
    seconds = install(python, "--constraint", ROOT / "constraints.txt", what)
    with tempfile.TemporaryDirectory() as empty:
        help_ = need(run([python.with_name("histill"), "--help"], cwd=empty))
        doctor = {
            r["name"]: r for r in json.loads(need(run([python.with_name("histill"), "doctor", "--json"], cwd=empty)))
        }
        modules = json.loads(need(run([python, "-c", IMPORTS], cwd=empty)).splitlines()[-1])
    if modules["broken"] or "distill" not in help_ or (extra == "all" and modules["lacking"]):
        raise SystemExit(f"[{extra}]: {modules}")
    return {
        "seconds": seconds,
        "packages": len(json.loads(need(run([python, "-m", "pip", "list", "--format", "json"])))),
        "modules_imported": modules["imported"],
        "modules_lacking": sorted(set(modules["lacking"].values())),
        "doctor": {name: row["state"] for name, row in doctor.items()},
    }


def typed(home: Path, extra: str) -> dict[str, Any]:
    """Mypy on a user's script against the installed wheel; the last line of the script is wrong on purpose."""
    python = fresh(home, extra)
    install(python, "--constraint", ROOT / "constraints.txt", "mypy")
    with tempfile.TemporaryDirectory() as empty:
        script = Path(empty) / "user.py"
        script.write_text(SCRIPT)
        said = run([python, "-m", "mypy", "--strict", "--cache-dir", empty, script.name], cwd=empty).stdout
    errors = [line for line in said.splitlines() if " error: " in line]
    sees = 'Revealed type is "histill.comparison.Comparison"' in said
    if not sees or len(errors) != 1 or "arg-type" not in errors[0]:
        raise SystemExit(f"types: {said}")
    return {"compare_is": "Comparison", "wrong_call_refused": errors[0]}


def tested(home: Path, wheel: Path, which: str) -> dict[str, Any]:
    """The tests with the lowest or the newest libraries."""
    python = fresh(home, which)
    bounds = ["--constraint", str(LOWEST)] if which == "lowest" else ["--upgrade"]
    extras = "deploy,enhance,pretrain,slides,viewer"
    seconds = install(python, *bounds, f"{wheel}[{extras}]", "pytest", "hypothesis", "pydicom")
    files = [ROOT / f"tests/test_{name}.py" for name in TESTS]
    done = run([python, "-m", "pytest", "-p", "no:cacheprovider", *files], cwd=ROOT)
    names = set(lower_bounds())
    held = json.loads(need(run([python, "-m", "pip", "list", "--format", "json"])))
    return {
        "install_seconds": seconds,
        "tests": next((line for line in reversed(done.stdout.splitlines()) if " passed" in line), "none passed"),
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE),
        "versions": {p["name"].lower(): p["version"] for p in held if p["name"].lower() in names},
    }


def main() -> None:
    extras = list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    every = ["base", *(e for e in extras if e not in NOT_FOR_USE)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extras", nargs="*", default=every, choices=every)
    parser.add_argument("--versions", nargs="*", default=[], choices=["lowest", "newest"])
    parser.add_argument("--home", type=Path)
    parser.add_argument("--result", type=Path, default=RESULT)
    chosen = parser.parse_args()
    bounds = "# The lower bounds of pyproject.toml, which benchmarks/package.py installs and tests.\n"
    LOWEST.write_text(bounds + "".join(f"{name}=={version}\n" for name, version in lower_bounds().items()))
    with tempfile.TemporaryDirectory() as temporary:
        home = (chosen.home or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        wheel, found = build(home)
        add(chosen.result, found)
        for extra in chosen.extras:
            add(chosen.result, {"installed": {extra: installed(home, wheel, extra)}})
            if extra == "all":
                add(chosen.result, {"typed": typed(home, extra)})
        for which in chosen.versions:
            add(chosen.result, {which: tested(home, wheel, which)})


def add(path: Path, found: dict[str, Any]) -> None:
    """Add to the results that are there."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    installed_before = results.get("installed", {})
    results |= found
    if "installed" in found:
        results["installed"] = installed_before | found["installed"]
    write_json(path, results)
    print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
