"""The bootstrap: what it must equal, what it must cover, and what pairing must cancel."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from histill.errors import BadInput
from histill.evaluate.delong import delong
from histill.evaluate.intervals import (
    figures_over_seeds,
    figures_with_intervals,
    mcnemar,
    paired_gain,
    per_class_table,
)
from histill.evaluate.masks import MaskScores
from histill.evaluate.metrics import Scores, metrics, per_class


def drawn(seed: int, images: int = 240, classes: int = 3, skill: float = 1.5, per_unit: int = 1) -> Scores:
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(99).integers(classes, size=images)  # the same images for every seed
    p = np.exp(rng.normal(size=(images, classes)) + skill * np.eye(classes)[labels])
    return Scores(labels, p / p.sum(axis=1, keepdims=True), np.arange(images) // per_unit, teacher=labels)


def answers(right: list[int]) -> Scores:
    """Two classes, all images of class 0, answered right (1) or wrong (0)."""
    p = np.where(np.array(right)[:, None] == 1, [0.8, 0.2], [0.2, 0.8])
    return Scores(np.zeros(len(right), int), p, np.arange(len(right)))


def test_values_are_the_metrics_and_lie_in_their_intervals() -> None:
    s = drawn(0, per_unit=3)
    got, expected = figures_with_intervals(s, resamples=400), metrics(s)
    assert {k: v["value"] for k, v in got.items()} == pytest.approx({k: v[0] for k, v in expected.items()})
    for name in set(got) - {"ece"}:
        assert got[name]["low"] < got[name]["value"] < got[name]["high"]
    assert got == figures_with_intervals(s, resamples=400)
    assert got != figures_with_intervals(s, resamples=400, seed=1)


def test_interval_equals_a_naive_bootstrap_over_patients() -> None:
    s = drawn(1, images=120, per_unit=4)
    right = (s.predictions == s.labels).reshape(30, 4).mean(axis=1)
    naive = np.random.default_rng(5).choice(right, size=(20_000, 30)).mean(axis=1).std() * np.sqrt(30 / 29)
    got = figures_with_intervals(s, resamples=8000)["accuracy"]
    # Wilson's bounds solve (value - bound)^2 = t^2 bound (1 - bound) / n; n is what would vary as much.
    value, t = right.mean(), 2.045230  # t of 29 degrees of freedom, from a table
    independent = value * (1 - value) / naive**2
    bounds = np.roots([1 + t**2 / independent, -2 * value - t**2 / independent, value**2])
    assert (got["low"], got["high"]) == pytest.approx(tuple(sorted(bounds)), abs=0.005)


def test_interval_covers_the_truth() -> None:
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        figure = figures_with_intervals(
            answers((rng.random(100) < 0.8).astype(int).tolist()), resamples=300, names=["accuracy"]
        )["accuracy"]
        covered += figure["low"] <= 0.8 <= figure["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_patients_widen_the_interval() -> None:
    right = np.repeat(np.random.default_rng(0).random(25) < 0.7, 10).astype(int)  # a patient's images agree
    images = answers(right.tolist())
    patients = Scores(images.labels, images.probabilities, np.arange(250) // 10)
    width = [f["high"] - f["low"] for f in (figures_with_intervals(s)["accuracy"] for s in (images, patients))]
    assert width[1] == pytest.approx(np.sqrt(10) * width[0], rel=0.2)


def test_names_of_patients_do_as_well_as_numbers() -> None:
    s = drawn(2, per_unit=4)
    named = Scores(s.labels, s.probabilities, np.array([f"P{u:03}" for u in s.units]), teacher=s.teacher)
    assert figures_with_intervals(named, resamples=100) == figures_with_intervals(s, resamples=100)


def test_nothing_wrong_still_has_an_interval() -> None:
    # Wilson's lower bound for 40 of 40 is 40 / (40 + 1.96^2) = 0.9124; an empty width would claim certainty.
    got = figures_with_intervals(answers([1] * 40), resamples=50)
    assert got["accuracy"]["value"] == got["accuracy"]["high"] == 1
    assert got["accuracy"]["low"] == pytest.approx(0.91237, abs=1e-4)
    wrong = figures_with_intervals(answers([0] * 40), resamples=50)["accuracy"]
    assert (wrong["low"], wrong["high"]) == (0, pytest.approx(1 - 0.91237, abs=1e-4))
    # of two classes with 90 and 10 images the rarer one limits what is known: 20 units
    labels = np.array([0] * 90 + [1] * 10)
    both = figures_with_intervals(Scores(labels, np.eye(2)[labels], np.arange(100)), resamples=50)
    assert both["accuracy"]["low"] == pytest.approx(100 / (100 + 1.959964**2), abs=1e-6)
    assert both["balanced_accuracy"]["low"] == pytest.approx(20 / (20 + 1.959964**2), abs=1e-6)
    assert both["auroc"]["low"] == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)  # each is compared with the ten


def test_an_auroc_knows_no_more_than_the_fewer_of_both_kinds() -> None:
    # Fifty patients with the disease and one without, whose five images are all that the fifty are compared with.
    rng = np.random.default_rng(0)
    labels, units = np.array([1] * 50 + [0] * 5), np.array([*range(50), *[50] * 5])
    p = np.concatenate([rng.uniform(0.3, 1, 50), rng.uniform(0, 0.6, 5)])
    one = Scores(labels, np.stack([1 - p, p], 1), units, positive=1)
    got = figures_with_intervals(one, resamples=200)["auroc"]
    assert got == {"value": pytest.approx(0.904), "low": None, "high": None}
    unnamed = Scores(labels, np.stack([1 - p, p], 1), units)
    assert figures_with_intervals(unnamed, resamples=200)["auroc"] == got, "whichever class is the positive one"
    better = Scores(labels, np.eye(2)[labels], units, positive=1)
    assert paired_gain(one, better, resamples=200)["auroc"]["p"] is None
    for rows in (per_class_table(better, resamples=200), per_class_table(one, resamples=200)):
        assert rows[0]["auroc"] == pytest.approx(rows[1]["auroc"])  # of two classes it is one figure


def test_how_many_patients_a_figure_is_over_by_hand() -> None:
    # Class 0 is seen in patients a, b and d, class 1 in c and d, class 2 in e: the rarest class has one patient.
    labels, units = np.array([0, 0, 0, 1, 1, 0, 2]), np.array(list("aabcdde"))
    p = np.eye(3)[labels]
    macro, of_1 = Scores(labels, p, units, teacher=labels), Scores(labels, p, units, positive=1)
    assert [macro.units_behind(name) for name in ("accuracy", "agreement")] == [5, 5]
    means = ("balanced_accuracy", "macro_f1", "sensitivity", "specificity", "auroc")
    assert [macro.units_behind(name) for name in means] == [3] * 5
    assert [of_1.units_behind(name) for name in means] == [3, 3, 2, 4, 2]  # d has images of class 1 and of class 0
    assert [macro.units_behind(name, 0) for name in ("f1", "specificity", "auroc")] == [3, 3, 3]
    both = Scores(np.array([0, 1, 0, 1]), np.eye(2)[[0, 1, 0, 1]], np.array(list("aabb")))
    assert both.units_behind("balanced_accuracy") == 2  # never more patients than there are


def test_patients_who_are_all_alike_are_as_many_as_they_are() -> None:
    # Two patients, of whose three images two are right: no draw differs from another, and two patients know little.
    labels, right = np.tile([0, 1, 0], 2), np.tile([1, 1, 0], 2)
    p = np.where(labels == right, 0.8, 0.2)[:, None] * np.eye(2)[labels]
    p += (1 - p.sum(axis=1, keepdims=True)) * np.eye(2)[1 - labels]
    got = figures_with_intervals(Scores(labels, p, np.arange(6) // 3), resamples=200)["accuracy"]
    z2, v = 1.959964**2, got["value"]
    middle, half = v + z2 / 4, np.sqrt(z2 * (v * (1 - v) / 2 + z2 / 16))  # Wilson of two
    assert (got["low"], got["high"]) == pytest.approx(((middle - half) / (1 + z2 / 2), (middle + half) / (1 + z2 / 2)))


def test_delong_is_sure_of_nothing_where_nothing_varies() -> None:
    labels = np.array([1] * 7 + [0] * 3)
    same, right = (Scores(labels, np.stack([1 - p, p], 1), np.arange(10)) for p in (np.full(10, 0.5), labels * 0.9))
    found = delong(same, right)
    assert (found.a, found.b, found.difference) == (0.5, 1.0, 0.5)
    assert np.isnan([found.error, found.low, found.high, found.p]).all()
    assert delong(right, right).p == 1
    alone = Scores(labels, same.probabilities, np.zeros(10))
    assert delong(alone, alone).p == 1


def test_an_iou_of_one_patient_s_class_has_no_interval() -> None:
    # In every draw that holds that patient it is the same, which says nothing of others.
    counts = np.zeros((50, 2, 3))
    counts[:, 0] = np.random.default_rng(0).integers(100, 900, (50, 3))
    counts[0, 1] = 80, 0, 20
    found = MaskScores(counts, np.arange(50), ("gland", "tumour"))
    got = figures_with_intervals(found, resamples=200)
    for name in ("iou_tumour", "dice_tumour"):
        assert got[name]["value"] > 0.7
        assert (got[name]["low"], got[name]["high"]) == (None, None)
    assert got["iou_gland"]["low"] < got["iou_gland"]["value"] < got["iou_gland"]["high"]
    assert found.units_behind("miou") == 2
    assert found.units_behind("iou_gland") == found.units_behind("pixel_accuracy") == 50


def test_undefined_figures_are_none_and_everything_is_json() -> None:
    got = figures_with_intervals(answers([1, 0, 1]), resamples=50)
    assert got["auroc"] == {"value": None, "low": None, "high": None}
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    gain = paired_gain([drawn(0), drawn(1)], [drawn(2), drawn(3)], resamples=50)
    assert json.loads(json.dumps(gain, allow_nan=False)) == gain
    table = per_class_table(drawn(0), resamples=50)
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_resamples_without_a_class_are_left_out() -> None:
    # One image of class 1, told right: it is in about 63 % of the resamples, and there its recall is 1.
    labels = np.array([0] * 20 + [1])
    said = np.array([0] * 10 + [1] * 11)
    got = figures_with_intervals(Scores(labels, np.eye(2)[said], np.arange(21)))["balanced_accuracy"]
    assert got["value"] == pytest.approx(0.75)
    # Nothing is known of the recall of a class with one image: t of one degree of freedom is 12.7.
    assert 0.05 < got["low"] < 0.15
    assert 0.95 < got["high"] < 1


def test_one_seed_is_the_plain_figure() -> None:
    s = drawn(3)
    plain = figures_with_intervals(s, resamples=200)
    over = figures_over_seeds([s], resamples=200)
    assert {k: {**v, "seeds": [v["value"]]} for k, v in plain.items()} == over


def test_seeds_are_averaged_and_widen_the_interval() -> None:
    # Three trainings that differ by 0, 10 and 20 points on 4,000 images: the seeds are all the spread there is.
    trainings = [answers([1] * (2800 + k * 400) + [0] * (1200 - k * 400)) for k in range(3)]
    got = figures_over_seeds(trainings, names=["accuracy"])["accuracy"]
    assert got["seeds"] == pytest.approx([0.7, 0.8, 0.9])
    assert got["value"] == pytest.approx(0.8)
    # Their mean has the error 0.1 / sqrt(3), and t of two degrees of freedom is 4.303: Wilson's interval for 0.8 of 48.
    assert (got["low"], got["high"]) == pytest.approx((0.4896, 0.9434), abs=0.005)


def test_seeds_may_have_different_test_sets() -> None:
    whole = drawn(4, per_unit=4)
    parts = [
        Scores(whole.labels[rows], whole.probabilities[rows], whole.units[rows])
        for rows in (whole.units < 40, whole.units >= 20)
    ]
    got = figures_over_seeds(parts, resamples=300)["accuracy"]
    assert got["seeds"] == pytest.approx([float(metrics(p)["accuracy"][0]) for p in parts])
    assert got["low"] < got["value"] < got["high"]


def test_a_network_gains_nothing_over_itself() -> None:
    s = drawn(5, per_unit=2)
    gain = paired_gain(s, s, resamples=200)
    assert gain.pop("mcnemar_p") == 1
    assert set(gain) == set(metrics(s))
    assert all((f["value"], f["p"]) == (0, 1) and f["low"] <= 0 <= f["high"] for f in gain.values())
    assert gain["accuracy"]["high"] - gain["accuracy"]["low"] < 0.03  # what has not differed on 120 patients
    several = paired_gain([s, drawn(6)], [s, drawn(6)], resamples=200)
    assert (several["accuracy"]["value"], several["accuracy"]["p"]) == (0, 1)
    assert several["accuracy"]["seeds"] == [0, 0]
    assert several["mcnemar_p_seeds"] == [1, 1]


def test_gain_is_antisymmetric_and_narrower_than_unpaired() -> None:
    a = drawn(7, skill=1.5)
    right = np.eye(3)[a.labels]
    b = Scores(a.labels, 0.7 * a.probabilities + 0.3 * right, a.units, teacher=a.teacher)  # a, nudged
    there, back = paired_gain(a, b), paired_gain(b, a)
    for name in metrics(a):
        assert there[name]["value"] == pytest.approx(-back[name]["value"])
        assert there[name]["low"] == pytest.approx(-back[name]["high"])
    alone = [figures_with_intervals(s)["accuracy"] for s in (a, b)]
    assert there["accuracy"]["value"] == pytest.approx(alone[1]["value"] - alone[0]["value"])
    unpaired = sum(f["high"] - f["low"] for f in alone)
    assert there["accuracy"]["high"] - there["accuracy"]["low"] < 0.6 * unpaired


def test_the_gain_of_each_seed_is_after_less_before() -> None:
    before, after = [drawn(0, skill=0.5), drawn(1, skill=0.5)], [drawn(2, skill=3.0), drawn(3, skill=2.0)]
    gain = paired_gain(before, after, resamples=50, names=["accuracy"])["accuracy"]
    each = [float(metrics(b)["accuracy"][0] - metrics(a)["accuracy"][0]) for a, b in zip(before, after, strict=True)]
    assert gain["seeds"] == pytest.approx(each)
    assert gain["value"] == pytest.approx(np.mean(each))
    assert min(each) > 0


def test_gain_lacks_agreement_where_one_side_has_no_teacher() -> None:
    a = drawn(8)
    b = Scores(a.labels, a.probabilities, a.units)
    assert "agreement" not in paired_gain(a, b, resamples=20)


def test_mcnemar_by_hand() -> None:
    # Right alone: a on 1 image, b on 6. P(at most 1 of 7 heads) = (1 + 7) / 128, two-sided 16 / 128.
    a = answers([1] + [0] * 6 + [1] * 5 + [0] * 3)
    b = answers([0] + [1] * 6 + [1] * 5 + [0] * 3)
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(16 / 128)
    assert paired_gain(a, b, resamples=20)["mcnemar_p"] == pytest.approx(16 / 128)
    three = paired_gain([a, a, a], [b, a, b], resamples=20)
    assert three["mcnemar_p_seeds"] == pytest.approx([0.125, 1, 0.125])
    assert three["mcnemar_p"] == pytest.approx(0.125)


def test_unpaired_scores_are_refused() -> None:
    a = drawn(0)
    with pytest.raises(BadInput, match="same images"):
        paired_gain(a, Scores(a.labels[::-1], a.probabilities, a.units))
    with pytest.raises(BadInput, match="same images"):
        paired_gain(a, Scores(a.labels, a.probabilities, a.units + 1))
    with pytest.raises(BadInput, match="seeds"):
        paired_gain([a], [a, a])
    with pytest.raises(BadInput, match="no scores"):
        figures_over_seeds([])


def test_per_class_table() -> None:
    s = drawn(9, per_unit=2)
    rows = per_class_table(s, ["x", "y", "z"], resamples=300)
    values = per_class(s)
    assert [row["class"] for row in rows] == ["x", "y", "z"]
    assert sum(row["support"] for row in rows) == 240
    for c, row in enumerate(rows):
        for name in ("sensitivity", "specificity", "precision", "f1", "auroc"):
            assert row[name]["value"] == pytest.approx(values[name][c, 0])
            assert row[name]["low"] < row[name]["value"] < row[name]["high"]


def test_three_thousand_images_take_about_a_second() -> None:
    s = drawn(0, images=3000, classes=2)
    start = time.process_time()
    figures_with_intervals(s)
    assert time.process_time() - start < 4  # 0.7 s of one core where it was written; a loop would take minutes
