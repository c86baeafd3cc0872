"""Reading is timed beside OpenSlide on the same tiles, and the two agree on their pixels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from slide_files import picture, write_jpeg_tiff

from histill.cli import run
from histill.slides.bench import bench_read, table_of


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histill.slides.bench.ALIGNED", 5)
    monkeypatch.setattr("histill.slides.bench.GRID", 5)


def test_both_are_timed_on_the_same_tiles(tmp_path: Path) -> None:
    path = write_jpeg_tiff(tmp_path / "a.tiff", [picture(700, 900)], tile=(128, 128))
    found = bench_read(path, seconds=0.01)
    assert found["slide"]["reader"] == "jpeg tiles"
    assert found["aligned"]["tile"] == [128, 128]
    assert found["grid"]["tile"] == [224, 224]
    for kind in ("aligned", "grid"):
        assert found[kind]["identical"] is True
        assert found[kind]["rounds"] >= 5
        for unit in ("tiles_per_second", "tiles_per_processor_second"):
            for rates in found[kind][unit].values():
                assert 0 < rates["low"] <= rates["median"] <= rates["high"]
    assert "the same pixels" in table_of(found)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jpeg_tiff(tmp_path / "a.tiff", [picture(500, 500)])
    assert run(["bench", "read", str(path), "--seconds", "0.01", "--out", str(tmp_path / "out")]) == 0
    assert "openslide" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["slide"]["name"] == "a.tiff"
    assert run(["bench", "read"]) == 2
    assert "histill bench read SLIDE" in capsys.readouterr().err
    Image.fromarray(picture(50, 50)).save(tmp_path / "a.png")
    assert run(["bench", "read", str(tmp_path / "a.png")]) == 2
    assert "nothing to compare" in capsys.readouterr().err
