"""The metrics against scikit-learn, numbers computed by hand, and their invariances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn import metrics as sk

from histill.errors import BadInput
from histill.evaluate import calibration
from histill.evaluate.finish import tempered
from histill.evaluate.metrics import METRICS, Scores, confusion, metrics, per_class, reliability, roc_curve


def drawn(seed: int, images: int = 200, classes: int = 3, decimals: int | None = None) -> Scores:
    """Scores with some skill; rounding the logits makes ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    labels[:classes] = np.arange(classes)
    logits = rng.normal(size=(images, classes)) + 1.2 * np.eye(classes)[labels]
    if decimals is not None:
        logits = logits.round(decimals)
    p = np.exp(logits)
    teacher = np.where(rng.random(images) < 0.8, labels, 0)
    return Scores(labels, p / p.sum(axis=1, keepdims=True), np.arange(images), teacher=teacher)


def point(scores: Scores, *names: str) -> dict[str, float]:
    return {name: float(v[0]) for name, v in metrics(scores, names=names or None).items()}


def _sk_specificities(scores: Scores) -> NDArray[np.float64]:
    matrices = sk.multilabel_confusion_matrix(scores.labels, scores.predictions)
    return np.array([m[0, 0] / m[0].sum() for m in matrices])


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("decimals", [None, 0])
def test_metrics_equal_scikit_learn(classes: int, decimals: int | None) -> None:
    s = drawn(classes, classes=classes, decimals=decimals)
    y, p, said = s.labels, s.probabilities, s.predictions
    precision, recall, _, _ = sk.precision_recall_fscore_support(y, said, average="macro", zero_division=0)
    auroc = sk.roc_auc_score(y, p[:, 1]) if classes == 2 else sk.roc_auc_score(y, p, multi_class="ovr")
    expected = {
        "accuracy": sk.accuracy_score(y, said),
        "balanced_accuracy": sk.balanced_accuracy_score(y, said),
        "macro_f1": sk.f1_score(y, said, average="macro"),
        "auroc": auroc,
        "sensitivity": sk.recall_score(y, said, average="macro"),
        "specificity": _sk_specificities(s).mean(),
        "agreement": np.mean(said == s.teacher),
        "macro_precision": precision,
        "f1_of_means": 2 * precision * recall / (precision + recall),
    }
    assert point(s, *expected) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_weights_of_units_are_sample_weights(classes: int) -> None:
    plain = drawn(5, classes=classes, decimals=1)
    s = Scores(plain.labels, plain.probabilities, np.arange(200) // 4, teacher=plain.teacher)
    weights = np.random.default_rng(0).integers(0, 4, size=(50, 3)).astype(float)
    got = metrics(s, weights)
    for r in range(3):
        w = weights[s.unit_rows, r]
        assert got["accuracy"][r] == pytest.approx(sk.accuracy_score(s.labels, s.predictions, sample_weight=w))
        assert got["macro_f1"][r] == pytest.approx(
            sk.f1_score(s.labels, s.predictions, average="macro", sample_weight=w)
        )
        p = s.probabilities[:, 1] if classes == 2 else s.probabilities
        assert got["auroc"][r] == pytest.approx(
            sk.roc_auc_score(s.labels, p, multi_class="ovr", sample_weight=w), abs=1e-12
        )
        # the calibration error of repeated rows, written out
        rows = np.repeat(np.arange(200), w.astype(int))
        again = Scores(s.labels[rows], s.probabilities[rows], np.arange(len(rows)))
        assert got["ece"][r] == pytest.approx(point(again, "ece")["ece"])


def test_per_class_equals_scikit_learn() -> None:
    s = drawn(2, classes=4)
    got = {name: v[:, 0] for name, v in per_class(s).items()}
    precision, recall, f1, support = sk.precision_recall_fscore_support(s.labels, s.predictions, zero_division=0)
    for name, expected in {"precision": precision, "sensitivity": recall, "f1": f1, "support": support}.items():
        np.testing.assert_allclose(got[name], expected)
    np.testing.assert_allclose(got["specificity"], _sk_specificities(s))
    np.testing.assert_allclose(got["auroc"], [sk.roc_auc_score(s.labels == c, s.probabilities[:, c]) for c in range(4)])
    np.testing.assert_array_equal(confusion(s), sk.confusion_matrix(s.labels, s.predictions))


def test_calibration_error_by_hand() -> None:
    # Bins are a fifteenth wide and closed above: 0.60 (= 9/15) and 0.55 share the ninth, 0.90 and 0.88 the
    # fourteenth. Ninth: confidence 1.15, right 1, gap 0.15. Fourteenth: 1.78 and 1, gap 0.78.
    p = np.array([0.60, 0.55, 0.90, 0.88])
    s = Scores(np.array([0, 1, 0, 1]), np.column_stack([p, 1 - p]), np.arange(4))
    assert point(s, "ece")["ece"] == pytest.approx((0.15 + 0.78) / 4)
    bins = reliability(s)
    assert bins.count[[8, 13]].tolist() == [2, 2]
    assert bins.count.sum() == 4
    assert bins.accuracy[[8, 13]].tolist() == [0.5, 0.5]
    assert bins.confidence[8] == pytest.approx(0.575)
    assert np.isnan(bins.accuracy[0])


def test_positive_class_chooses_sensitivity_specificity_and_auroc() -> None:
    # Truth 0 0 0 1 1, said 0 0 1 1 0: class 0 has 2 of 3, class 1 has 1 of 2.
    p1 = np.array([0.1, 0.2, 0.7, 0.9, 0.4])
    labels, p = np.array([0, 0, 0, 1, 1]), np.column_stack([1 - p1, p1])
    of_1 = point(Scores(labels, p, np.arange(5), positive=1))
    of_0 = point(Scores(labels, p, np.arange(5), positive=0))
    macro = point(Scores(labels, p, np.arange(5)))
    assert (of_1["sensitivity"], of_1["specificity"]) == pytest.approx((1 / 2, 2 / 3))
    assert (of_0["sensitivity"], of_0["specificity"]) == pytest.approx((2 / 3, 1 / 2))
    assert macro["sensitivity"] == macro["balanced_accuracy"] == pytest.approx(7 / 12)
    assert of_1["auroc"] == macro["auroc"] == pytest.approx(5 / 6)  # 5 of 6 pairs in order
    tied = Scores(labels, np.full((5, 2), 0.5), np.arange(5))
    assert point(tied, "auroc")["auroc"] == 0.5


def test_the_f1_of_means_of_the_lung_paper() -> None:
    # Zheng et al. 2023, figure 8: the diagonal, the row of MIA and the totals of rows and columns are printed; the
    # nine other errors are placed so that the totals hold, which is all that precision and recall see.
    matrix = np.array([[3, 2, 0, 0, 0], [0, 122, 0, 0, 0], [0, 1, 11, 1, 3], [0, 0, 2, 10, 0], [0, 9, 6, 6, 33]])
    assert matrix.sum(axis=0).tolist() == [3, 134, 19, 17, 36]
    assert matrix.sum(axis=1).tolist() == [5, 122, 16, 12, 54]
    rows = [(t, s) for t, s in np.ndindex(5, 5) for _ in range(matrix[t, s])]
    labels, said = (np.array(x) for x in zip(*rows, strict=True))
    got = point(Scores(labels, np.eye(5)[said], np.arange(len(rows))), "accuracy", "macro_f1", "f1_of_means")
    assert got["accuracy"] == pytest.approx(179 / 209)
    assert got["f1_of_means"] == pytest.approx(0.7717, abs=1e-4)
    assert got["macro_f1"] == pytest.approx(0.7509, abs=1e-4)


def test_absent_class_is_left_out_of_macro_means() -> None:
    s = drawn(3, classes=3)
    four = Scores(s.labels, np.column_stack([s.probabilities, np.zeros(200)]), s.units, teacher=s.teacher)
    assert point(four) == pytest.approx(point(s))
    assert np.isnan(per_class(four)["sensitivity"][3, 0])
    assert per_class(four)["specificity"][3, 0] == 1
    one = Scores(np.zeros(4, int), np.full((4, 2), 0.5), np.arange(4))
    assert np.isnan(point(one)["auroc"])
    assert point(one)["balanced_accuracy"] == 1
    never_predicted = Scores(np.array([0, 1]), np.array([[0.9, 0.1], [0.9, 0.1]]), np.arange(2))
    assert per_class(never_predicted)["precision"][:, 0].tolist() == [0.5, 0]


@pytest.mark.parametrize("decimals", [None, 0])
def test_roc_curve_equals_scikit_learn(decimals: int | None) -> None:
    s = drawn(4, classes=2, decimals=decimals)
    false, true = roc_curve(s, 1)
    expected = sk.roc_curve(s.labels, s.probabilities[:, 1], drop_intermediate=False)
    np.testing.assert_allclose((false, true), expected[:2])
    assert np.trapezoid(true, false) == pytest.approx(point(s)["auroc"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 5), st.integers(0, 2))
def test_metrics_lie_in_the_unit_interval_and_ignore_order(seed: int, n: int, classes: int, decimals: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), size=n).round(decimals)
    labels, units, teacher = rng.integers(classes, size=n), rng.integers(5, size=n), rng.integers(classes, size=n)
    shuffle = rng.permutation(n)
    names = [*METRICS, "macro_precision", "f1_of_means"]
    got = point(Scores(labels, p, units, teacher=teacher), *names)
    again = point(Scores(labels[shuffle], p[shuffle], units[shuffle], teacher=teacher[shuffle]), *names)
    assert got == pytest.approx(again, nan_ok=True, abs=1e-12)
    assert all(np.isnan(v) or -1e-12 <= v <= 1 + 1e-12 for v in got.values())
    defined = {name for name, v in got.items() if not np.isnan(v)}
    assert defined >= set(names) - {"auroc", "specificity"}


@pytest.mark.parametrize(
    ("labels", "p", "units", "extra", "says"),
    [
        ([0, 2], [[0.5, 0.5]] * 2, [0, 1], {}, "labels"),
        ([0, -1], [[0.5, 0.5]] * 2, [0, 1], {}, "labels"),
        ([0, 1], [[0.5, 0.5]] * 2, [0], {}, "units"),
        ([0, 1], [[3.0, -2.0]] * 2, [0, 1], {}, "softmax"),
        ([0, 1], [[np.nan, 0.5]] * 2, [0, 1], {}, "probabilities"),
        ([0, 1], [0.5, 0.5], [0, 1], {}, "classes"),
        ([0, 1], [[0.5, 0.5]] * 2, [0, 1], {"positive": 2}, "positive"),
        ([0, 1], [[0.5, 0.5]] * 2, [0, 1], {"teacher": [0, 5]}, "teacher"),
        ([], np.zeros((0, 2)), [], {}, "no images"),
    ],
)
def test_bad_scores_are_refused(
    labels: list[int], p: object, units: list[int], extra: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        Scores(np.array(labels), np.array(p), np.array(units), **extra)


def test_agreement_needs_a_teacher() -> None:
    s = Scores(np.array([0, 1]), np.full((2, 2), 0.5), np.arange(2))
    assert "agreement" not in metrics(s)
    with pytest.raises(BadInput, match="teacher"):
        metrics(s, names=["agreement"])


def test_temperature_is_recovered() -> None:
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(20_000, 4))
    labels = (softmax(logits, axis=1).cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    assert calibration.fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    hot = Scores(labels, softmax(3 * logits, axis=1), np.arange(20_000))
    log_p = np.log(hot.probabilities)
    assert calibration.fit_temperature(log_p, labels) == pytest.approx(
        calibration.fit_temperature(3 * logits, labels), rel=1e-4
    )
    cooled = tempered(hot, 3)
    np.testing.assert_allclose(
        cooled.probabilities, softmax(logits, axis=1), atol=1e-3
    )  # less than 1e-12 is taken for it
    assert np.array_equal(cooled.predictions, hot.predictions)
    assert point(cooled, "ece")["ece"] < 0.02 < point(hot, "ece")["ece"]


def test_temperature_refuses_infinite_logits() -> None:
    with pytest.raises(BadInput, match="finite"):
        calibration.fit_temperature(np.array([[-np.inf, 0.0]]), np.array([1]))
