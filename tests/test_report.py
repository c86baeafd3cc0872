"""The report says what the figures say, in words that claim no more; and the figures are drawn whole."""

from __future__ import annotations

import copy
import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import PROGRAM, Browser
from PIL import Image

from histill.errors import BadInput
from histill.evaluate import figures
from histill.evaluate.finish import counts
from histill.evaluate.intervals import figures_over_seeds, figures_with_intervals, paired_gain
from histill.evaluate.metrics import Scores, confusion, roc_curve
from histill.evaluate.metrics import reliability as bins_of
from histill.evaluate.report import (
    Card,
    Cards,
    Picture,
    Section,
    Table,
    Text,
    count,
    difference,
    distill_report,
    run_report,
    share,
    write_report,
)

EVIL = "<script>alert('x')</script>"
CLASSES = ["benign", "malignant $x", "in situ"]


def figure(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high}


def scores(seed: int, skill: float) -> Scores:
    rng = np.random.default_rng(seed)
    labels = np.arange(90) % 3
    p = np.exp(rng.normal(size=(90, 3)) + skill * np.eye(3)[labels])
    return Scores(labels, p / p.sum(axis=1, keepdims=True), np.arange(90) // 3, teacher=labels)


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    teacher, alone, distilled = scores(0, 3), scores(1, 1), scores(2, 2)
    return {
        "test": {
            "teacher": figures_with_intervals(teacher, resamples=100, names=["accuracy", "auroc", "ece"]),
            "student_alone": figures_with_intervals(alone, resamples=100),
            "student_distilled": figures_with_intervals(distilled, resamples=100),
            "gain": paired_gain(alone, distilled, resamples=100),
        },
        "efficiency": {
            "teacher": {
                "parameters": 23_542_786,
                "macs": 3.87e9,
                "file_bytes": 94_400_000,
                "peak_memory_bytes": 310_000_000,
                "latency_ms_batch1": {"median": 80.0, "p95": 90.0},
                "images_per_second": 14.0,
            },
            "student": {
                "parameters": 268_898,
                "macs": 1.19e9,
                "file_bytes": 1_080_000,
                "peak_memory_bytes": 62_000_000,
                "latency_ms_batch1": {"median": 5.0, "p95": 6.0},
                "images_per_second": 210.0,
            },
        },
        "export": {
            "onnx": {"path": "runs/student.onnx", "max_abs_diff": 3e-6, "accuracy": 0.8, "accuracy_lost": 0.0},
            "int8": {"path": "student.int8.onnx", "max_abs_diff": 0.04, "accuracy": 0.79, "accuracy_lost": 0.01},
        },
    }


def text_of(path: Path) -> str:
    """What a reader sees: no style, no tags, one space."""
    page = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def with_gain(summary: dict[str, Any], value: float, low: float | None, high: float | None) -> dict[str, Any]:
    changed = copy.deepcopy(summary)
    changed["test"]["gain"]["accuracy"] = figure(value, low, high)
    changed["test"]["student_distilled"]["accuracy"] = figure(0.831, 0.78, 0.875)
    changed["test"]["teacher"]["accuracy"] = figure(0.862, 0.8, 0.9)
    return changed


def test_numbers_are_written_as_people_write_them() -> None:
    assert share(figure(0.831, 0.78, 0.875)) == "83.1 % (78.0 to 87.5)"
    assert share(figure(0.5)) == "50.0 %"
    assert share(figure(None)) == "not defined"
    assert difference(figure(-0.0042, -0.02, 0.011)) == "−0.4 points (−2.0 to +1.1)"
    assert [count(n) for n in (23_542_786, 268_898, 812, 3.87e9)] == [
        "23.5 million",
        "269 thousand",
        "812",
        "3.87 billion",
    ]


@pytest.mark.parametrize(
    ("gain", "says"),
    [
        ((0.032, 0.008, 0.056), "Distillation helped: the distilled student is right on 83.1 % (78.0 to 87.5) of the "
         "test images, 3.2 points more than the same network trained alone (+0.8 to +5.6)."),
        ((0.01, -0.006, 0.029), "Distillation is not shown to help"),
        ((0.01, -0.006, 0.029), "1.0 point more than the same network trained alone, but the interval (−0.6 to +2.9) "
         "includes zero."),
        ((0.01, 0.0, 0.02), "Distillation is not shown to help"),
        ((-0.004, -0.02, 0.012), "Distillation did not help"),
        ((-0.004, -0.02, 0.012), "0.4 points less"),
        ((-0.03, -0.05, -0.01), "Distillation did harm"),
        ((0.0, 0.0, 0.0), "Distillation did not help"),
        ((0.0, -0.01, 0.01), "exactly as many as the same network trained alone"),
        ((0.03, None, None), "Whether distillation helped cannot be said"),
    ],
)  # fmt: skip
def test_the_answer_claims_no_more_than_the_interval(
    summary: dict[str, Any], tmp_path: Path, gain: tuple[float, float | None, float | None], says: str
) -> None:
    text = text_of(distill_report(tmp_path, with_gain(summary, *gain)))
    assert says in text
    assert ("Distillation helped" in text) == (gain[1] is not None and gain[1] > 0)


def test_the_answer_says_what_it_costs(summary: dict[str, Any], tmp_path: Path) -> None:
    text = text_of(distill_report(tmp_path, with_gain(summary, 0.03, 0.01, 0.05)))
    assert (
        "It is 3.1 points below its teacher, has 88 times fewer parameters and is 16.0 times faster; "
        "stored as int8 it loses another 1.0 point." in text
    )
    changed = with_gain(summary, 0.03, 0.01, 0.05)
    changed["test"]["teacher"]["accuracy"] = figure(0.821, 0.7, 0.9)
    changed["efficiency"]["student"]["latency_ms_batch1"]["median"] = 160.0
    changed["export"]["int8"]["accuracy_lost"] = 0.0
    text = text_of(distill_report(tmp_path, changed))
    assert "It is 1.0 point above its teacher, has 88 times fewer parameters and is 2.0 times slower" in text
    assert "stored as int8 it loses nothing" in text
    changed["efficiency"]["student"] = changed["efficiency"]["teacher"]
    assert "has as many parameters and is as fast" in text_of(distill_report(tmp_path, changed))
    del changed["efficiency"], changed["export"]
    changed["test"]["teacher"]["accuracy"] = figure(0.831, 0.7, 0.9)
    assert "It is level with its teacher. Intervals are 95 %." in text_of(distill_report(tmp_path, changed))


def test_the_answer_says_what_the_intervals_are_over(summary: dict[str, Any], tmp_path: Path) -> None:
    text = text_of(distill_report(tmp_path, summary, counts={"test": {"images": 512, "patients": 64}}))
    assert "Intervals (95 %) are over 64 patients with 512 images." in text
    assert "One seed" in text
    assert "name no patients" not in text
    text = text_of(distill_report(tmp_path, summary, counts={"test": {"images": 1512}}))
    assert "Intervals (95 %) are over 1,512 images." in text
    assert "The data name no patients" in text
    text = text_of(distill_report(tmp_path, summary, counts={"test": {"images": 90, "patients": 9}}))
    assert "Only 9 patients in the test split" in text
    seeds = copy.deepcopy(summary)
    seeds["test"]["student_distilled"] = figures_over_seeds([scores(2, 2), scores(3, 2), scores(4, 2)], resamples=50)
    text = text_of(distill_report(tmp_path, seeds, counts={"test": {"images": 90, "patients": 30}}))
    assert "over 30 patients with 90 images and 3 seeds." in text
    assert "One seed" not in text


def test_an_interval_without_width_is_explained(summary: dict[str, Any], tmp_path: Path) -> None:
    same = text_of(distill_report(tmp_path, with_gain(summary, 0.0, 0.0, 0.0)))
    assert "no width: nothing was seen to differ, which is not that nothing does" in same
    assert "no width" not in text_of(distill_report(tmp_path, with_gain(summary, 0.0, -0.1, 0.1)))


def test_the_page_says_how_times_were_taken_and_of_whom_the_settings_are(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    text = text_of(distill_report(tmp_path, summary, settings={"lr": 0.1}, teacher_settings={"lr": 0.2}))
    assert "in ONNX Runtime on this machine's CPU, in turns" in text
    assert re.search(r"Settings of the distilled student Name Value lr 0\.1 .*of the teacher Name Value lr 0\.2", text)


def test_the_int8_student_stands_beside_the_other_with_its_own_gain(summary: dict[str, Any], tmp_path: Path) -> None:
    small = summary["efficiency"]["student"] | {"file_bytes": 295_000, "latency_ms_batch1": {"median": 4.0, "p95": 5.0}}
    both = summary | {"efficiency": summary["efficiency"] | {"student_int8": small}}
    text = text_of(distill_report(tmp_path, both))
    assert "Teacher Student Gain Student, int8 Gain" in text
    assert "Latency of one image, median 80 ms 5 ms 16.0× 4 ms 20×" in text
    assert "File 94.4 MB 1.08 MB 87× 0.295 MB 320×" in text
    assert "Images per second 14.0 210.0 15.0× 210.0 15.0×" in text
    assert "Student, int8" not in text_of(distill_report(tmp_path, summary))


def test_the_report_holds_the_figures(summary: dict[str, Any], tmp_path: Path) -> None:
    path = distill_report(tmp_path, summary, settings={"temperature": 10.0}, versions={"torch": "2.11"})
    assert path == tmp_path / "report.html"
    text = text_of(path)
    for part in ("student_alone", "student_distilled"):
        for name in set(summary["test"][part]) - {"auroc"}:
            assert share(summary["test"][part][name]) in text
    auroc = summary["test"]["teacher"]["auroc"]
    assert f"{auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f})" in text
    assert difference(summary["test"]["gain"]["macro_f1"]).replace(" points", "") in text
    for shown in ("23,542,786", "268,898", "94.4 MB", "80 ms", "student.int8.onnx", "temperature 10", "2.11", "16.0×"):
        assert shown in text
    assert text.endswith("For research use only. Not for diagnosis.")
    first = path.read_bytes()
    distill_report(tmp_path, summary, settings={"temperature": 10.0}, versions={"torch": "2.11"})
    assert path.read_bytes() == first


def test_everything_is_escaped_and_nothing_is_fetched(summary: dict[str, Any], tmp_path: Path) -> None:
    png = tmp_path / "p.png"
    Image.new("RGB", (8, 8)).save(png)
    sections: list[Section] = [
        Cards([Card(EVIL, EVIL, EVIL)], EVIL),
        Text([EVIL], EVIL),
        Text([EVIL], notice=True),
        Table([EVIL, EVIL], [[EVIL, EVIL], [1, 2.5]], EVIL, EVIL),
        Picture(png, EVIL + '" onload="x', EVIL),
    ]
    hostile = {f"</title>{EVIL}": EVIL}
    pages = [
        write_report(tmp_path / "a.html", title=EVIL, subtitle=EVIL, answer=EVIL, sections=sections),
        distill_report(
            tmp_path,
            summary,
            title=EVIL,
            counts={"test": {"images": 90, EVIL: 90}},
            settings=hostile,
            versions=hostile,
            notices=[EVIL],
        ),
    ]
    for path in pages:
        page = path.read_text(encoding="utf-8")
        assert "<script" not in page
        assert 'onload="' not in page
        assert not re.search(r"https?:|src=\"(?!data:)|href=|url\(|@import", page)
        assert text_of(path).count(EVIL) >= 3
    assert not list(tmp_path.glob(".*"))


def test_pictures_are_embedded_at_their_printed_size(tmp_path: Path) -> None:
    png = tmp_path / "p.png"
    Image.new("RGB", (320, 20), "red").save(png, dpi=(160, 160))
    page = write_report(tmp_path / "a.html", title="t", answer="a", sections=[Picture(png, "caption")]).read_text()
    assert 'width="192"' in page  # 2 inches of 96
    assert page.count("data:image/png;base64,") == 1
    with pytest.raises(BadInput, match="no picture"):
        write_report(tmp_path / "b.html", title="t", answer="a", sections=[Picture(tmp_path / "q.png", "c")])
    (tmp_path / "q.png").write_text("not a picture")
    with pytest.raises(BadInput, match="not a PNG"):
        write_report(tmp_path / "b.html", title="t", answer="a", sections=[Picture(tmp_path / "q.png", "c")])
    with pytest.raises(BadInput, match="2 cells"):
        write_report(tmp_path / "b.html", title="t", answer="a", sections=[Table(["a", "b"], [[1]])])
    assert not (tmp_path / "b.html").exists()


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium")
def test_no_figure_is_cut_off_in_a_window_of_usual_width(tmp_path: Path) -> None:
    cell = "100.0 % (82.4 to 100.0)"
    columns = ["class", "images", "sensitivity", "specificity", "precision", "F1", "AUROC"]
    made = write_report(
        tmp_path / "x.html", title="t", answer="a", sections=[Table(columns, [["melanoma", "18", *[cell] * 5]])]
    )
    with Browser(tmp_path / "profile", 1200, 800) as page:
        page.go(made.as_uri())
        assert page.run("document.querySelector('.table').scrollWidth <= document.querySelector('.table').clientWidth")


def test_a_zero_in_a_confusion_matrix_can_be_read(tmp_path: Path) -> None:
    figures.confusion(np.array([[5, 0], [0, 5]]), ["a", "b"], tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        grey = np.asarray(picture.convert("L"), int)
    dark = np.argwhere(grey < 100)  # the two full cells
    (top, left), (bottom, right) = dark.min(0), dark.max(0)
    y, x = (3 * top + bottom) // 4, (left + 3 * right) // 4  # amid the upper right cell
    near = grey[y - 12 : y + 12, x - 12 : x + 12]
    assert near.max() > 230
    assert near.min() < 140


def test_patients_of_the_training_images_are_those_that_are_in_no_other_split() -> None:
    table = pd.DataFrame({"split": ["val", "test", "test", "test"], "patient": ["a", "b", "b", "c"]})
    info = {"data": {"images": {"train": 9, "val": 1, "test": 3}, "patients": 8}}
    assert {split: held["patients"] for split, held in counts(info, table).items()} == {"train": 5, "val": 1, "test": 2}


def test_run_report(tmp_path: Path) -> None:
    got = figures_with_intervals(scores(0, 2), resamples=50)
    text = text_of(
        run_report(
            tmp_path, {"val": got, "test": got}, title="Teacher", counts={"test": {"images": 90, "patients": 30}}
        )
    )
    assert f"The network is right on {share(got['accuracy'])} of the test images" in text
    assert "over 30 patients" in text
    value, _, between = share(got["accuracy"]).rstrip(")").partition(" (")
    assert f"Accuracy {value} 95 % interval {between}" in text
    text = text_of(run_report(tmp_path, {"val": got}, title="Teacher"))
    assert "of the validation images, on which it was chosen" in text
    with pytest.raises(BadInput, match="nothing to report"):
        run_report(tmp_path, {}, title="Teacher")


def test_every_figure_is_drawn_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    s, other = scores(0, 2), scores(1, 1)
    epochs = np.arange(1, 6)
    log = pd.DataFrame({
        "epoch": epochs, "lr": 0.1 / epochs, "images_per_second": 9.0, "loss": 1 / epochs, "raw/kd": 1 / epochs,
        "weight/kd": 0.9, "raw/cross_entropy": 1 / epochs, "weight/cross_entropy": 0.1, "val/accuracy": epochs / 5,
    })  # fmt: skip
    undefined = figure(None)
    drawings: dict[str, Any] = {
        "confusion": lambda p: figures.confusion(confusion(s), CLASSES, p, title="Student"),
        "confusions": lambda p: figures.confusions({"Teacher": confusion(s), "b": confusion(other)}, CLASSES, p),
        "many": lambda p: figures.confusion(np.eye(40, dtype=int), [str(c) for c in range(40)], p),
        "roc": lambda p: figures.roc({"$a": (*roc_curve(s, 0), undefined), "b": (*roc_curve(s, 1), figure(0.9))}, p),
        "reliability": lambda p: figures.reliability({"before": bins_of(s), "after": bins_of(other)}, p),
        "training": lambda p: figures.training(log, p),
        "training_alone": lambda p: figures.training(log[["epoch", "lr", "loss"]], p),
        "gain": lambda p: figures.gain({**paired_gain(other, s, resamples=50), "auroc": undefined}, p),
        "gallery": lambda p: figures.gallery(np.zeros((7, 8, 8, 3)), s.labels, s.probabilities, CLASSES, p),
        "softened": lambda p: figures.softened(np.array([3.0, 1.0, 0.0]), [1, 10], CLASSES, p),
        "sweep": lambda p: figures.sweep([1, 3], [0.8, 0.9], [0.7, 0.8], [0.9, 1], p, paper=[np.nan, 0.85]),
    }  # fmt: skip
    for name, draw in drawings.items():
        draw(tmp_path / "a" / f"{name}.png")
        with Image.open(tmp_path / "a" / f"{name}.png") as image:
            image.load()
            assert image.format == "PNG", name
            assert np.ptp(np.asarray(image.convert("L"))) > 100, name
    assert len(list((tmp_path / "a").iterdir())) == len(drawings)
    for name in ("roc", "gain"):
        drawings[name](tmp_path / "b" / f"{name}.png")
        assert (tmp_path / "a" / f"{name}.png").read_bytes() == (tmp_path / "b" / f"{name}.png").read_bytes()


def test_drawing_leaves_the_global_style_and_a_failed_figure_leaves_nothing(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with pytest.raises(IndexError):
        figures.confusions({"a": np.eye(2), "b": np.ones((2, 2))}, ["too", "many", "names"], tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before
    assert not list(tmp_path.iterdir())
