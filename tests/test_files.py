"""Files are whole or not there, a folder has one writer, and what is said is one line."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from histill import progress as progress_module
from histill.errors import BadInput, Failed, HistillError, require
from histill.files import (
    atomic,
    cache_dir,
    digest,
    file_digest,
    locked,
    read_json,
    sweep,
    write_json,
    write_text,
    writing,
)
from histill.progress import notice, progress

FORK = multiprocessing.get_context("fork")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.txt"
    write_text(path, "first: naïve 中文")
    assert path.read_text(encoding="utf-8") == "first: naïve 中文"
    with pytest.raises(UnicodeEncodeError), atomic(path) as temporary:
        temporary.write_text("half\udc00", encoding="utf-8")
    assert path.read_text(encoding="utf-8").startswith("first")
    write_text(path, "second")
    assert path.read_text() == "second"
    assert names(path.parent) == ["x.txt"]


def test_json_is_strict_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"ä": [1, 2.5, None]})
    assert read_json(path) == {"ä": [1, 2.5, None]}
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"ä": [1, 2.5, None]}
    path.write_bytes(b'\xef\xbb\xbf["\\ud83d\\ude00", "\\\\ud800"]')
    assert read_json(path) == ["\N{GRINNING FACE}", "\\ud800"]
    half = (b'["\\ud83d"]', b'{"\\uDE00": 1}', b'["\xed\xa0\xbd"]')
    for text in (b"{", b"", b"\xff\xfe", b"[" * 100_000, *half):
        path.write_bytes(text)
        with pytest.raises(BadInput, match=r"x\.json is not valid JSON"):
            read_json(path)
    with pytest.raises(BadInput, match=r"gone\.json does not exist"):
        read_json(tmp_path / "gone.json")


def test_what_a_kill_left_of_a_text_goes_with_the_next_and_what_is_being_written_stays(tmp_path: Path) -> None:
    old, fresh, other = (tmp_path / f".{name}.tmp" for name in ("a.json.0", "a.json.1", "b.json.0"))
    for left in (old, fresh, other):
        left.write_text("{")
    for left in (old, other):
        os.utime(left, (0, 0))
    write_json(tmp_path / "a.json", {})
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", fresh.name, other.name}


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_the_cache_is_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTILL_CACHE", str(tmp_path / "here"))
    assert cache_dir("a", "b") == tmp_path / "here" / "a" / "b"
    assert (tmp_path / "here" / "a" / "b").is_dir()
    monkeypatch.delenv("HISTILL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir("a") == tmp_path / "home" / ".cache" / "histill" / "a"


def test_a_user_without_a_home_is_told_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does of a user whom nobody knows
    monkeypatch.delenv("HISTILL_CACHE", raising=False)
    with pytest.raises(RuntimeError, match="home"):  # the trap
        Path.home()
    with pytest.raises(BadInput, match="set HISTILL_CACHE"):
        cache_dir("packed")
    monkeypatch.setenv("HISTILL_CACHE", str(tmp_path))
    assert cache_dir("packed") == tmp_path / "packed"


def test_sweep_takes_what_a_kill_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for name in ("x.txt", ".x.txt.12345678.tmp", ".keep", "figures/.y.png.12345678.tmp", "figures/y.png"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".folder.tmp").mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == [".keep", "figures", "x.txt"]
    assert names(tmp_path / "figures") == ["y.png"]


def _hold(folder: Path, held: Event, done: Event) -> None:
    with locked(folder):
        held.set()
        done.wait(30)


def holder(folder: Path) -> tuple[multiprocessing.process.BaseProcess, Event]:
    """Another process that holds ``folder`` until it is told or killed."""
    held, done = FORK.Event(), FORK.Event()
    process = FORK.Process(target=_hold, args=(folder, held, done))
    process.start()
    assert held.wait(30)
    return process, done


def let_go(process: multiprocessing.process.BaseProcess, done: Event) -> None:
    done.set()


def kill(process: multiprocessing.process.BaseProcess, done: Event) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("end", [let_go, kill])
def test_a_folder_has_one_writer_until_it_ends_or_is_killed(tmp_path: Path, end: Callable[..., None]) -> None:
    process, done = holder(tmp_path / "out")
    try:
        with pytest.raises(BadInput, match=r"another process is writing to .*out"), locked(tmp_path / "out"):
            pass
        assert names(tmp_path / "out") == [".lock"]
    finally:
        end(process, done)
        process.join(30)
    with locked(tmp_path / "out"):
        (tmp_path / "out" / "x").write_text("mine")
    assert names(tmp_path / "out") == [".lock", "x"]


def test_an_error_takes_a_folder_away_again_where_it_left_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "out"):
        1 / 0
    assert names(tmp_path) == []
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "out"):
        1 / (tmp_path / "out" / "x").write_text("")
    assert names(tmp_path / "out") == [".lock", "x"]


def _append(folder: Path, number: int) -> None:
    try:
        with locked(folder, wait=True):
            if number % 3 == 0:
                raise ZeroDivisionError  # takes the folder away while others wait at it
            count = int((folder / "count").read_text()) if (folder / "count").exists() else 0
            (folder / "count").write_text(str(count + 1))
    except ZeroDivisionError:
        pass


def test_who_waits_has_its_turn_although_the_folder_goes_and_comes(tmp_path: Path) -> None:
    workers = [FORK.Process(target=_append, args=(tmp_path / "out", number)) for number in range(18)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 18
    assert (tmp_path / "out" / "count").read_text() == "12"


def test_errors_know_their_exit_status() -> None:
    assert (HistillError.status, Failed.status, BadInput.status) == (1, 1, 2)
    assert issubclass(BadInput, ValueError)
    assert issubclass(Failed, RuntimeError)


def test_a_missing_extra_is_named_and_a_broken_one_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert require("json", "deploy") is json
    with pytest.raises(BadInput, match=r"this needs no_such_module: pip install 'histill\[deploy\]'"):
        require("no_such_module.inner", "deploy")
    (tmp_path / "broken_module.py").write_text("import what_it_needs_itself")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs_itself"):
        require("broken_module", "deploy")


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HISTILL_QUIET")
    clock = iter([0.0, 10.0, 25.0, 30.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with progress("packing", 100, "tiles") as bar:
        for _ in range(3):
            bar.advance(25, "note")
    assert capsys.readouterr().err == "packing note 50/100 2.0 tiles/s, 25 s left\n"


def test_work_goes_on_where_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr("sys.stderr", gone)
        for _ in range(3):
            notice("x" * 100_000)
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):  # the trap
            gone.write("x" * 100_000)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


def test_a_name_on_a_bar_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("histill.progress.Console", lambda **_: console)
    monkeypatch.delenv("HISTILL_QUIET", raising=False)
    with progress("case [/red] [bold]\x1b[31m", 2, "tiles") as bar:
        bar.advance(2, "[/]\x1b[2J")
    assert r"case [/red] [bold]\x1b[31m [/]\x1b[2J" in screen.getvalue()


def test_a_bar_with_a_long_name_stays_on_one_line_of_a_usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("histill.progress.Console", lambda **_: console)
    monkeypatch.delenv("HISTILL_QUIET", raising=False)
    for what, rate in (
        ("training student_distilled epoch 20/60 val 0.812", r"[\d,.]+/s"),
        ("timing", r"[\d,.]+ images/s"),
    ):
        screen.truncate(0)
        with progress(what, 12_000) as bar:
            for _ in range(2):
                bar.advance(4_000)
                time.sleep(0.15)
        lines = [line for line in re.split(r"[\r\n]", screen.getvalue()) if "8000/12000" in line]
        assert lines, screen.getvalue()
        assert re.search(rf"8000/12000 {rate}\s+\d:\d\d:\d\d", lines[-1]), lines[-1]


def test_progress_that_goes_on_counts_only_its_own_for_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HISTILL_QUIET")
    clock = iter([0.0, 25.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with progress("training", 100, done=40) as bar:
        bar.advance(50)
    assert capsys.readouterr().err == "training  90/100 2.0 images/s, 5 s left\n"


def test_quiet_is_quiet_but_for_notices(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("packing", 2) as bar:
        bar.advance(2)
    assert capsys.readouterr().err == ""
    notice("1 image was left out")
    assert capsys.readouterr().err == "note: 1 image was left out\n"


def test_who_may_read_a_folders_files_may_read_the_weights(tmp_path: Path) -> None:
    write_text(tmp_path / "run.json", "{}")
    with writing(tmp_path / "model.safetensors") as temporary:
        save_file({"w": torch.zeros(2)}, temporary)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["run.json"]
