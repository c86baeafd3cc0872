"""`histill doctor` says of each thing whether it works, what is missing and what to install, and never fails."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from histill import cli
from histill.commands import doctor
from histill.commands.doctor import Line, examine


@pytest.fixture(scope="module")
def lines() -> dict[str, Line]:
    return {line.name: line for line in examine()}


def test_what_the_tests_need_works(lines: dict[str, Line]) -> None:
    pytest.importorskip("openslide")
    for name in ("python", "torch", "device", "pictures", "slides", "folder", "[slides]"):
        assert lines[name].state == "works", lines[name]
    import torch

    assert torch.__version__ in lines["torch"].found
    assert "one was drawn and read" in lines["slides"].found
    assert lines["bf16"].state in ("works", "missing")
    assert f"{torch.get_num_threads()} of " in lines["threads"].found


def test_whatever_does_not_work_has_a_remedy(lines: dict[str, Line]) -> None:
    assert all(line.remedy for line in lines.values() if line.state == "poor")
    assert all("pip install" in line.remedy for name, line in lines.items() if line.state == "missing" and "[" in name)


def test_every_extra_has_a_line(lines: dict[str, Line]) -> None:
    extras = set(metadata.metadata("histill").get_all("Provides-Extra") or ()) - {"all", "dev", "docs"}
    assert {f"[{extra}]" for extra in extras} <= set(lines)


def test_as_json_and_as_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    here = [
        Line("python", "works", "3.11"),
        Line("[cluster]", "missing", "without ray", "pip install 'histill[cluster]'"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: iter(here))
    assert cli.run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {
        "name": "[cluster]",
        "state": "missing",
        "found": "without ray",
        "remedy": "pip install 'histill[cluster]'",
    }
    assert cli.run(["doctor"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["✓", "python", "3.11"]
    assert second.endswith("without ray: pip install 'histill[cluster]'")


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without(name: str) -> str:
        if name in ("openslide-python", "onnxruntime"):
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "tifffile" else version(name)

    monkeypatch.setattr(metadata, "version", without)
    found = {line.name: line for line in examine()}
    assert found["slides"].state == found["export"].state == "missing"
    assert found["[slides]"].remedy == "pip install 'histill[slides]'"
    assert "openslide-python" in found["[slides]"].found
    assert "tifffile" in found["[slides]"].found, "too old is as good as missing"


def test_a_broken_library_is_a_line_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ImportError("libopenslide.so.1: cannot open shared object file\nand more")

    monkeypatch.setattr(doctor, "_slides", broken)
    found = {line.name: line for line in examine()}
    assert found["slides"].state == "poor"
    assert found["slides"].found == "ImportError: libopenslide.so.1: cannot open shared object file"
    assert "folder" in found


def test_a_cache_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HISTILL_CACHE", str(tmp_path / "file" / "cache"))
    line = {line.name: line for line in examine()}["cache"]
    assert line.state == "poor"
    assert "HISTILL_CACHE" in line.remedy
