"""Bad input on the command line: exit status 2, one line that says what to do, nothing trained and nothing left."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import MakeFolder, write_classes
from PIL import Image

from histill.cli import run
from histill.run import Run

SMALL = {"--image-size": "18", "--epochs": "1", "--batch-size": "8"}
TEACHER = {"--teacher-network": "mobilenetv3_small_050", "--teacher-weights": "none"}
VERBS = ("train", "distill")


def command(verb: str, out: Path | str, **flags: object) -> list[str]:
    """``histill train dsnet.student`` or ``histill distill dsnet`` on as little as there is."""
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in flags.items()}
    trained = verb == "distill" and "teacher" not in flags  # with flags of its own, which a given one has no use for
    chosen = SMALL | (TEACHER if trained else {}) | {"--out": str(out)} | given
    return [verb, "dsnet.student" if verb == "train" else "dsnet", *(t for flag in chosen.items() for t in flag)]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> object:
    """``refused(tokens, *words, status=2)``: runs, and checks status, line and that no file came or went."""

    def check(tokens: list[object], *words: str, status: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert run([str(token) for token in tokens]) == status
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, said.err
        assert lines[0].startswith("histill: ")
        assert "Traceback" not in said.err
        for word in words:
            assert word in lines[0], lines[0]
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return check


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch; not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTILL_CACHE", str(root / "cache"))
        patch.setenv("HISTILL_QUIET", "1")
        data = write_classes(root / "data", {"a": 12, "b": 12})
        assert run(command("train", root / "run", data=data)) == 0
    return root / "run"


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# What is given as data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_no_data_or_nothing_there(verb: str, refused, tmp_path: Path, folder: MakeFolder) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    refused(command(verb, out), "--data", "class folders or a CSV manifest")
    refused(command(verb, out, data=tmp_path / "gone"), "gone", "no such folder or manifest")
    (tmp_path / "empty").mkdir()
    refused(command(verb, out, data=tmp_path / "empty"), "empty", "no class folders")
    root = folder({"a": 4, "b": 4})
    (root / "c").mkdir()
    refused(command(verb, out, data=root), "data/c: empty class folder", "fill it or remove it")
    refused(command(verb, out, data=folder({"a": 4}, name="one")), "one class only (a)")


@pytest.mark.parametrize("verb", VERBS)
def test_unreadable_images(verb: str, refused, tmp_path: Path, folder: MakeFolder) -> None:  # type: ignore[no-untyped-def]
    root, out = folder({"a": 12, "b": 12}), tmp_path / "out"
    (root / "a" / "p000_0.png").write_bytes(b"no picture")
    refused([*command(verb, out, data=root), "--strict"], "1 unreadable images: a/p000_0.png", "--strict")
    for path in root.rglob("*.png"):
        path.write_bytes(str(path).encode())
    refused(command(verb, out, data=root), "none of 24 images is readable")


@pytest.mark.parametrize("verb", VERBS)
def test_leaks(verb: str, refused, tmp_path: Path, folder: MakeFolder) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    root = folder({f"{split}/{label}": 4 for split in ("train", "val", "test") for label in "ab"})
    refused(command(verb, out, data=root, patient=r"p0\d"), "leak: ", "patients are in two splits")
    Image.open(root / "train" / "a" / "p000_0.png").save(root / "test" / "a" / "copy.bmp")
    refused(command(verb, out, data=root), "leak: 1 images are in two splits", "test/a/copy.bmp", "train/a/p000_0.png")
    shutil.copy(root / "train" / "a" / "p000_0.png", root / "val" / "a" / "copy.png")
    refused(command(verb, out, data=root), "leak: 1 images are in two splits", "val/a/copy.png", "train/a/p000_0.png")


MANIFESTS = {
    "path,class\na/p000_0.png,a\n": ["no column label"],
    "path,label\n": ["no rows"],
    "": ["not a CSV manifest"],
    "path,label\na/p000_0.png,x\na/p000_0.png,y\n": ["two labels", "a/p000_0.png"],
    "path,label\n../x.png,a\n": ["row 2", "outside"],
    "path,label\n/etc/hostname,a\n": ["row 2", "outside"],
    "path,label\nhttp://example.org/x.png,a\n": ["row 2", "not a file's path"],
    "path,label\nx\x1b[31m.png,a\n": ["row 2", "not a file's path"],
    "path,label\ngone.png,a\n": ["do not exist"],
    "path,label,split\na/p000_0.png,a,train\nb/p002_0.png,b,hold-out\n": ["unknown split 'hold-out'"],
    "path,label,split\na/p000_0.png,a,train\na/p001_1.png,b,train\nb/p002_0.png,c,test\n": ["no training image has: c"],
    "path,label,split,patient\na/p000_0.png,a,train,p\na/p001_1.png,b,train,q\nb/p002_0.png,a,test,p\n": ["leak", "p"],
}


@pytest.mark.parametrize("text", MANIFESTS)
def test_bad_manifests(text: str, refused, tmp_path: Path, folder: MakeFolder) -> None:  # type: ignore[no-untyped-def]
    manifest = folder({"a": 2, "b": 2}) / "manifest.csv"
    manifest.write_bytes(text.encode())
    for verb in VERBS:
        line = refused(command(verb, tmp_path / "out", data=manifest), *MANIFESTS[text])
        assert line.isprintable()
    refused(["data", "check", manifest], *MANIFESTS[text])


def test_a_manifest_that_is_not_utf8(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "manifest.csv").write_bytes("path,label\nä.png,a\n".encode("latin-1"))
    refused(command("train", tmp_path / "out", data=tmp_path / "manifest.csv"), "manifest.csv: not UTF-8")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"val": 0.6, "test": 0.6}, ["val=0.6", "test=0.6", "below 1"]),
        ({"val": -0.1}, ["val=-0.1"]),
        ({"val": 0}, ["no validation images"]),
        ({"val": 0.01, "patient": r"p\d\d"}, ["too few patients"]),
        ({"patient": "("}, ["--patient", "regular expression"]),
        ({"patient": "z"}, ["--patient 'z' finds no patient in 24 images"]),
        ({"unlabelled": "gone"}, ["--unlabelled gone: no such folder"]),
    ],
)
def test_bad_ways_to_divide_the_data(  # type: ignore[no-untyped-def]
    verb: str, flags: dict[str, object], words: list[str], refused, tmp_path: Path, folder: MakeFolder
) -> None:
    refused(command(verb, tmp_path / "out", data=folder({"a": 12, "b": 12}), **flags), *words)


# Flags ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"bogus": 1}, ["--bogus"]),
        ({"epochs": "x"}, ["--epochs", '"x"']),
        ({"epochs": 0}, ["epochs=0", "at least 1"]),
        ({"batch_size": 1}, ["batch_size=1", "at least 2"]),
        ({"image_size": 4}, ["image_size=4", "at least 8"]),
        ({"image_size": 16}, ["at least 18 pixels", "--image-size"]),
        ({"temperature": 0}, ["--temperature 0.0: above 0"]),
        ({"temperature": "nan"}, ["--temperature nan"]),
        ({"alpha": 2}, ["--alpha 2.0: between 0 and 1"]),
        ({"lr": -1}, ["learning rate", "-1"]),
        ({"lr": "inf"}, ["--lr inf"]),
        ({"views": 0}, ["views=0"]),
        ({"patience": 0}, ["patience=0"]),
        ({"positive": "zz"}, ["positive", "'zz'", "the classes are a, b"]),
        ({"schedule": "zigzag"}, ["--schedule", "cosine", "constant"]),
        ({"network": "resnet5"}, ["resnet5", "did you mean"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"seed": 2**80}, ["seed=", "below 2^63"]),
        ({"device": "toaster"}, ["--device toaster", "cpu"]),
        ({"precision": "8-ish"}, ["--precision 8-ish"]),
        ({"teacher": "gone"}, ["gone: not a run folder"]),
    ],
)
def test_bad_values(verb: str, flags: dict[str, object], words: list[str], refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = write_classes(tmp_path / "data", {"a": 12, "b": 12})
    refused(command(verb, tmp_path / "out", data=data, **flags), *words)


def test_flags_of_distill_alone(refused, tmp_path: Path, folder: MakeFolder) -> None:  # type: ignore[no-untyped-def]
    data, out = folder({"a": 12, "b": 12}), tmp_path / "out"
    refused(command("distill", out, data=data, seeds=0), "--seeds 0", "at least 1")
    refused(command("distill", out, data=data, test=0), "no test images", "--test")
    refused(command("distill", out, data=data, teacher_epochs=0), "epochs=0")
    refused(command("distill", out, data=data, teacher_network="resnet5"), "resnet5")


def test_a_recipe_that_is_not_there_is_answered_with_those_that_are(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused(["train"], "needs a recipe: baselines, dsnet", "file.py:function")
    refused(["distill", "dsnett", "--out", tmp_path / "out"], "no recipe 'dsnett'", "dsnet")
    refused(["train", "dsnet.nurse", "--out", tmp_path / "out"], "teacher, student")
    refused(["train", "dsnet.KERAS", "--out", tmp_path / "out"], "no part 'KERAS'", "teacher, student")
    refused(["train", "dsnet", "--out", tmp_path / "out"], "dsnet.teacher", "dsnet.student")
    refused(["distill", "dsnet.teacher", "--data", tmp_path, "--out", tmp_path / "out"], "dsnet.teacher")
    refused(["train", tmp_path / "gone.py:f", "--out", tmp_path / "out"], "gone.py: no such file")
    refused(["no-such-command"], "no-such-command")
    refused(["train", "dsnet.student", "--data", tmp_path], "--out")
    refused(["train", "dsnet.student", "stray", "--data", tmp_path, "--out", tmp_path / "out"], "stray")


def test_the_users_own_recipe(refused, tmp_path: Path, folder: MakeFolder) -> None:  # type: ignore[no-untyped-def]
    data, out = folder({"a": 12, "b": 12}), tmp_path / "out"
    bodies = {
        "empty": "",
        "odd": "def f(:\n",
        "fails": "raise RuntimeError('no')",
        "divides": "def f(data):\n    1 / 0\n",
    }
    bodies["seedless"] = "def student(data, teacher=None):\n    pass\n"
    bodies["stops"] = "def f(data):\n    raise KeyboardInterrupt\n"
    bodies["eats"] = "import torch\ndef f(data):\n    raise torch.OutOfMemoryError('of 80 GB')\n"
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        rest = ["--data", data, "--out", out]
        refused(["train", f"{tmp_path}/empty.py:f", *rest], "empty.py", "no function 'f'")
        refused(["train", f"{tmp_path}/empty.py", *rest], "empty.py has no recipe")
        refused(["distill", f"{tmp_path}/empty.py", *rest], "empty.py has no function 'student'")
        refused(["distill", f"{tmp_path}/seedless.py", *rest], "'student' needs the argument seed")
        refused(["train", f"{tmp_path}/odd.py:f", *rest], "odd.py", "SyntaxError")
        refused(["train", f"{tmp_path}/fails.py:f", *rest], "fails.py", "RuntimeError: no")
        refused(["train", f"{tmp_path}/divides.py:f", *rest], "ZeroDivisionError", "HISTILL_DEBUG=1", status=1)
        refused(["train", f"{tmp_path}/eats.py:f", *rest], "out of memory", "--batch-size", status=1)
        refused(["train", f"{tmp_path}/stops.py:f", *rest], "interrupted", "--resume", status=130)
    finally:
        sys.dont_write_bytecode = before


def test_debug_shows_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HISTILL_DEBUG", "1")
    assert run(["data", "check", str(tmp_path / "gone")]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "images.py" in said
    assert said.splitlines()[-1].startswith("histill: --data")


# --out and --resume --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_an_out_that_holds_a_run_or_is_no_folder(  # type: ignore[no-untyped-def]
    verb: str, refused, tmp_path: Path, folder: MakeFolder, trained: Path
) -> None:
    data, before = folder({"a": 12, "b": 12}), files(trained)
    refused(command(verb, trained, data=data), "holds a run already", "--resume", "--out")
    assert files(trained) == before
    (tmp_path / "file").write_text("mine")
    refused(command(verb, tmp_path / "file", data=data), f"--out {tmp_path / 'file'}", "is a file; give a folder")
    refused(command(verb, tmp_path / "file" / "below", data=data), "file is a file; give a folder")
    assert (tmp_path / "file").read_text() == "mine"
    if Path("/proc/self").is_dir():
        refused(command(verb, "/proc/nobody", data=data), "/proc/nobody", status=2 if os.geteuid() else 1)


def test_a_folder_that_was_there_stays_as_it_was(refused, tmp_path: Path, folder: MakeFolder) -> None:  # type: ignore[no-untyped-def]
    data = folder({"a": 12, "b": 12})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for verb in VERBS:
        refused(command(verb, tmp_path / "out", data=data, device="toaster"), "--device toaster")
    assert files(tmp_path / "out") == {"notes.txt": b"mine"}


def test_resume(refused, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    before = files(trained)
    for tokens in (["train", "--resume", "--out", trained], ["train", "dsnet.student", f"--out={trained}", "--resume"]):
        assert run([str(token) for token in tokens]) == 0
        assert capsys.readouterr().err == f"{trained} is finished; nothing to do\n"
    assert files(trained) == before
    for verb in VERBS:
        refused([verb, "--resume", "--out", tmp_path / "gone"], "gone holds nothing to go on with")
        refused([verb, "--resume"], "needs a recipe")
    for number, text in enumerate(('{"recipe": 1}', "[]", '{"status": "running"}', "{")):
        (tmp_path / f"{number}").mkdir()
        for verb, file in zip(VERBS, ("run.json", "distill.json")):
            (tmp_path / f"{number}" / file).write_text(text)
            refused([verb, "--resume", "--out", tmp_path / f"{number}"], file)
    half = shutil.copytree(trained, tmp_path / "half")
    info = json.loads((half / "run.json").read_text()) | {"status": "running"}
    (half / "run.json").write_text(json.dumps(info))
    # 60 is the default and nevertheless not what the run was started with.
    refused(["train", "--resume", "--out", half, "--epochs", "60"], "--epochs 60 differs from the run's 1", "--resume")
    (half / "run.json").write_text(json.dumps(info | {"command": None}))
    refused(["train", "--resume", "--out", half], "was not started by histill train")


# Runs and models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def not_runs(tmp_path: Path, trained: Path) -> dict[str, Path]:
    info = json.loads((trained / "run.json").read_text())
    made = {name: tmp_path / name for name in ("gone", "empty", "file", "keyless", "damaged", "foreign", "unfinished")}
    made["file"].write_text("no run")
    for name, text in (
        ("empty", None),
        ("keyless", "{}"),
        ("damaged", "{"),
        ("foreign", json.dumps(info | {"network": info["network"] | {"function": "os:system"}})),
        ("unfinished", json.dumps(info | {"status": "running"})),
    ):
        made[name].mkdir()
        if text is not None:
            (made[name] / "run.json").write_text(text)
    return made


@pytest.mark.parametrize(
    "tokens",
    [
        ["evaluate", "THING"],
        ["evaluate", "THING", "--data", "DATA"],
        ["compare", "RUN", "THING"],
        ["export", "THING", "--out", "OUT.onnx"],
        ["bench", "THING", "--seconds", "0.1"],
        ["predict", "THING", "DATA", "--out", "OUT.csv"],
    ],
)
def test_what_is_no_run_or_model(  # type: ignore[no-untyped-def]
    tokens: list[str], refused, tmp_path: Path, trained: Path, not_runs: dict[str, Path], folder: MakeFolder
) -> None:
    data = folder({"a": 2, "b": 2})
    words = {"RUN": trained, "DATA": data, "OUT.onnx": tmp_path / "x.onnx", "OUT.csv": tmp_path / "x.csv"}
    for name, thing in not_runs.items():
        refused([words.get(token, thing if token == "THING" else token) for token in tokens], name)


@pytest.mark.parametrize("name", ["junk.onnx", "junk.pt", "junk.torchscript", "junk.pkl"])
def test_what_is_no_model_file(name: str, refused, tmp_path: Path, folder: MakeFolder) -> None:  # type: ignore[no-untyped-def]
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    refused(["predict", tmp_path / name, folder({"a": 1}), "--out", tmp_path / "p.csv"], name)
    refused(["bench", tmp_path / name], name)


def test_arguments_of_the_other_commands(refused, tmp_path: Path, trained: Path, folder: MakeFolder) -> None:  # type: ignore[no-untyped-def]
    data = folder({"a": 2, "b": 2})
    (tmp_path / "file").write_text("mine")
    (tmp_path / "none").mkdir()
    predict = ["predict", trained]
    refused([*predict, data], "--out")
    refused([*predict, data, "--out", tmp_path / "p.txt"], "p.txt", ".csv or .parquet")
    refused([*predict, data, "--out", tmp_path / "file" / "p.csv"], "file")
    refused([*predict, data, "--out", tmp_path / "p.csv", "--batch-size", "0"], "--batch-size", ">= 1")
    refused([*predict, tmp_path / "gone", "--out", tmp_path / "p.csv"], "gone", "no such image, folder or manifest")
    refused([*predict, tmp_path / "none", "--out", tmp_path / "p.csv"], "none", "no images")
    refused([*predict, tmp_path / "file", "--out", tmp_path / "p.csv"], "file", "unreadable")
    refused(["evaluate", trained, "--data", tmp_path / "gone"], "gone")
    refused(["evaluate", trained, "--data", folder({"a": 2, "z": 2}, name="other")], "was not trained on: z")
    refused(["compare", trained], "two runs or more")
    refused(["compare", trained, trained, "--split", "train"], "--split")
    refused(["bench"], "a run, an .onnx, an .xml of OpenVINO or a TorchScript file")
    refused(["bench", trained, "--seconds", "0"], "--seconds")
    refused(["export", trained, "--format", "gguf"], "--format", "onnx")
    refused(["export", trained, "--format", "qupath", "--out", tmp_path / "q"], "--mpp")
    refused(["export", trained, "--format", "torchscript", "--int8", "--out", tmp_path / "m.pt"], "--int8", "onnx")
    refused(["data", "check", data, "--out", tmp_path / "file"], "file")
    refused(["data", "phantom", data], "data is already there")


def test_predict_leaves_out_what_it_cannot_read_and_says_so(
    tmp_path: Path, trained: Path, folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder({"a": 3})
    (data / "a" / "p001_1.png").write_bytes(b"")
    assert run(["predict", str(trained), str(data), "--out", str(tmp_path / "p.csv")]) == 0
    assert capsys.readouterr().err.startswith("note: 1 unreadable images were left out: ")
    table = pd.read_csv(tmp_path / "p.csv")
    assert table["image"].tolist() == ["a/p000_0.png", "a/p002_2.png"]
    assert list(table.columns) == ["image", "prediction", *(f"prob_{c}" for c in Run.open(trained).classes)]
    assert (table[["prob_a", "prob_b"]].sum(axis=1) - 1).abs().max() < 1e-6


# The command itself --------------------------------------------------------------------------------------------------


def test_help_answers_at_once_and_without_heavy_imports() -> None:
    code = "import sys; from histill.cli import run; print(run(['--help']), *sorted(sys.modules), file=sys.stderr)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert time.perf_counter() - start < 1.5
    assert done.stderr.startswith("0 ")
    for name in ("demo", "distill", "train", "study", "evaluate", "compare", "predict", "export", "bench", "data"):
        assert name in done.stdout
    assert "research use only" in done.stdout.lower()
    assert {"torch", "pandas", "numpy", "timm", "matplotlib", "onnx", "sklearn", "PIL"}.isdisjoint(done.stderr.split())


SHOW = """
from histill.cli import main
from histill.commands import app, show
app.command(lambda: show("µm " * 9999), name="micron")
main(["micron"])
"""


@pytest.mark.parametrize(("encoding", "said"), [("ascii", b"\\xb5m "), ("utf-8", "µm ".encode())])
def test_an_answer_is_shown_in_any_alphabet_and_to_readers_that_have_enough(encoding: str, said: bytes) -> None:
    how: dict[str, Any] = {"env": os.environ | {"PYTHONIOENCODING": encoding}, "timeout": 60, "check": False}
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, **how)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", said * 9999 + b"\n")
    reader, writer = os.pipe()
    os.close(reader)  # gone, as `head` goes
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run([sys.executable, "-c", SHOW], stdout=pipe, stderr=subprocess.PIPE, **how)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_turns_the_text_behind_it_is_refused_and_escaped(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,label\na.png,benign\nb.png,\u202emalignant\n", encoding="utf-8")
    assert r"\u202emalignant" in refused(["data", "check", manifest])
    assert r"\u2066x" in refused(["data", "check", tmp_path / "\u2066x"])


def test_status_and_line_of_a_process() -> None:
    code = "from histill.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "predikt"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith('histill: Unknown command "predikt". Did you mean "predict"?')
    assert done.stderr.count("\n") == 1


def test_help_says_what_the_teacher_gets_where_nothing_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["distill", "dsnet", "--help"]) == 0
    said = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert re.search(r"--teacher-network STR [^(]*\(as in the paper\)[^(]*\(default: resnet50\)", said)
    assert re.search(r"--teacher-epochs INT the teacher's \(default: --epochs if given, else 30\)", said)
    assert re.search(r"--teacher-lr FLOAT the teacher's; learning rate of Adam \(default: 0\.0001\)", said)


def test_help_says_what_the_pretraining_gets_where_nothing_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["distill", "foundation", "--help"]) == 0
    said = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "--pretrain-epochs INT of the pretraining: passes over the images (default: 100)." in said
    assert "(default: ())" not in said


def test_what_one_recipe_began_is_not_gone_on_with_by_another(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "distill.json").write_text('{"recipe": "dsnet", "arguments": {}}')
    (tmp_path / "summary.json").write_text("{}")
    assert "is of dsnet, not of multi-exit" in refused(["distill", "multi-exit", "--out", tmp_path, "--resume"])


def test_flags_of_a_teacher_that_is_given_are_refused(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    flags = ["--data", tmp_path, "--out", tmp_path / "out", "--teacher", tmp_path / "t", "--teacher-lr", "0.1"]
    line = refused(["distill", "dsnet", *flags])
    assert line.startswith("histill: --teacher-lr: of a teacher that is trained here;")
    assert line.rstrip().endswith("t is trained already")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_recipe_names_its_own_flags(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "dsnet.student" if verb == "train" else "dsnet", "--help"]) == 0
    said = capsys.readouterr().out
    for flag in ("--data", "--out", "--temperature", "--alpha", "--image-size", "--resume", "--teacher", "--strict"):
        assert flag in said
    assert run([verb, "--help"]) == 0
    assert "recipe" in capsys.readouterr().out
