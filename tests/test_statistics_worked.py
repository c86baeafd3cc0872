"""Figures and tests are those of SciPy, of naive references and of worked examples in print."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, t

from histill.errors import BadInput
from histill.evaluate.delong import delong
from histill.evaluate.intervals import _difference, _figure, _wilson, figures_with_intervals, mcnemar, paired_gain
from histill.evaluate.metrics import Scores, metrics
from histill.evaluate.multiplicity import comparisons, holm


def binary(labels: NDArray[np.int64], values: NDArray[np.float64], units: NDArray[np.int64] | None = None) -> Scores:
    return Scores(labels, np.stack([1 - values, values], 1), np.arange(len(labels)) if units is None else units)


def pair(seed: int, images: int = 40, per_unit: int = 1, decimals: int = 1) -> tuple[Scores, Scores]:
    rng = np.random.default_rng(seed)
    units = np.arange(images) // per_unit
    labels = (np.arange(images) % 3 == 0).astype(int)
    shown = labels * 0.8 + rng.normal(size=images) + rng.normal(size=images)[units]
    values = [np.round(1 / (1 + np.exp(-shown - 0.7 * rng.normal(size=images))), decimals) for _ in range(2)]
    return binary(labels, values[0], units), binary(labels, values[1], units)


def test_wilson_in_newcombe() -> None:
    # Newcombe 1998 (Stat. Med. 17:857), Table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    printed = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (x, n), bounds in printed.items():
        assert _wilson(x / n, n, 1.959964) == pytest.approx(bounds, abs=5e-5)


def test_an_interval_of_independent_images_is_nearly_wilsons() -> None:
    right = np.arange(263) < 81
    p = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
    found = figures_with_intervals(Scores(np.zeros(263, int), p, np.arange(263)), names=["accuracy"])["accuracy"]
    assert (found["low"], found["high"]) == pytest.approx((0.2553, 0.3662), abs=0.006)


def test_mcnemar_in_agresti() -> None:
    # Agresti, Categorical Data Analysis, prime minister: 150 and 86 changed their minds; z^2 = 34.71 of 86 - 150.
    a = np.repeat([1, 0, 1, 0], [794, 86, 150, 570])
    b = np.repeat([1, 1, 0, 0], [794, 86, 150, 570])
    said = [np.where(x[:, None] == 1, [0.8, 0.2], [0.2, 0.8]) for x in (a, b)]
    first, second = (Scores(np.zeros(1600, int), p, np.arange(1600)) for p in said)
    assert mcnemar(first, second) == pytest.approx(3.716e-5, rel=0.01)  # exact; the score test has 3.1e-5
    gain = paired_gain(first, second, names=["accuracy"])["accuracy"]
    # the difference there is 0.04, its standard error 0.0095
    assert gain["value"] == pytest.approx(-0.04)
    assert (gain["high"] - gain["low"]) / 2 == pytest.approx(1.96 * 0.0095, rel=0.05)


def square_and_add(
    both: int, first: int, second: int, neither: int, z: float, phi: float | None = None
) -> tuple[float, float]:
    """Newcombe 1998 (Stat. Med. 17:2635), method 10 without its correction, from the four counts of a paired table."""
    n = both + first + second + neither
    a, b = (both + first) / n, (both + second) / n
    (low_a, high_a), (low_b, high_b) = _wilson(a, n, z), _wilson(b, n, z)
    if phi is None:
        phi = (both * neither - first * second) / np.sqrt(n**4 * a * b * (1 - a) * (1 - b))
    low = b - a - np.sqrt((b - low_b) ** 2 + (high_a - a) ** 2 - 2 * phi * (b - low_b) * (high_a - a))
    return low, b - a + np.sqrt((high_b - b) ** 2 + (a - low_a) ** 2 - 2 * phi * (high_b - b) * (a - low_a))


def test_square_and_add_in_fagerland() -> None:
    # Fagerland et al. 2013, airway hyper-responsiveness: -0.507 to -0.026 (its corrected phi is 0 there).
    assert square_and_add(1, 7, 1, 12, 1.959964, phi=0) == pytest.approx((-0.507, -0.026), abs=5e-4)


def paired(counts: tuple[int, int, int, int]) -> dict[str, float]:
    """The difference of two accuracies over as many independent images."""
    a, b = (np.repeat(said, counts) for said in ([1, 1, 0, 0], [1, 0, 1, 0]))
    draws = np.random.default_rng(0).multinomial(len(a), np.ones(len(a)) / len(a), size=20_000).T / len(a)
    return _difference("accuracy", *((np.array([x.mean()]), (x @ draws)[None]) for x in (a, b)), len(a))


@pytest.mark.parametrize("counts", [(150, 8, 20, 22), (185, 3, 9, 3), (90, 40, 30, 40)])
def test_a_difference_of_two_shares_is_newcombes(counts: tuple[int, int, int, int]) -> None:
    found, freedom = paired(counts), sum(counts) - 1
    assert (found["low"], found["high"]) == pytest.approx(square_and_add(*counts, t.ppf(0.975, freedom)), abs=0.002)
    ends = square_and_add(*counts, t.ppf(1 - found["p"] / 2, freedom))
    assert ends[0 if found["value"] > 0 else 1] == pytest.approx(0, abs=0.001)  # p is where the interval ends at zero


def test_a_difference_from_a_network_that_is_always_right() -> None:
    # Wilson's alone: of 200 of 200 (with z), and of 191 of 200 (with t).
    found, z = paired((191, 0, 9, 0)), 1.959964
    low, high = _wilson(0.955, 200, t.ppf(0.975, 199))
    assert found["low"] == pytest.approx(0.045 - np.hypot(1 - _wilson(1, 200, z)[0], high - 0.955), abs=0.002)
    assert found["high"] == pytest.approx(0.045 + 0.955 - low, abs=0.002)


def test_where_figures_lie_in_the_middle_a_difference_is_the_paired_t_test() -> None:
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    a, b = rng.random((2, 400))
    b = 0.5 * (a + b) + 0.02
    draws = rng.multinomial(400, np.ones(400) / 400, size=20_000).T / 400
    sides = (np.array([a.mean()]), (a @ draws)[None]), (np.array([b.mean()]), (b @ draws)[None])
    found, exact = _difference("mdice", *sides, 400), ttest_rel(b, a)
    assert found["p"] == pytest.approx(exact.pvalue, rel=0.1)
    assert (found["low"], found["high"]) == pytest.approx(tuple(exact.confidence_interval()), abs=0.001)


def test_two_that_are_both_right_of_everything_may_yet_differ() -> None:
    still = np.array([1.0]), np.ones((1, 50))
    found = _difference("accuracy", still, still, 20)
    assert (found["low"], found["high"]) == pytest.approx((-0.1611, 0.1611), abs=5e-5)  # Newcombe's 0 of 20
    assert (found["value"], found["p"]) == (0, 1)


def test_seeds_of_one_test_set_by_hand() -> None:
    # 10, 20 and 30 points, which patients do not explain: mean 0.2, error 0.1 / sqrt(3), two degrees of freedom.
    values = np.array([0.1, 0.2, 0.3])
    nothing, some = ((v, np.tile(v[:, None], 50)) for v in (np.zeros(3), values))
    found = _difference("ece", nothing, some, 40)
    assert (found["low"], found["high"]) == pytest.approx(
        (0.2 - 4.302653 * 0.057735, 0.2 + 4.302653 * 0.057735), abs=1e-6
    )
    assert found["p"] == pytest.approx(2 * t.sf(0.2 / 0.057735, 2), rel=1e-4)
    # Of a share beside one that is all but always 0.5 of everything: Wilson's, 0.7 x 0.3 / 0.057735^2 = 63 patients.
    half, more = ((v, np.tile(v[:, None], 50)) for v in (np.full(3, 0.5), values + 0.5))
    found = _difference("accuracy", (half[0], half[1] + np.tile([-1e-7, 1e-7], 25)), more, 40)
    low, high = _wilson(0.7, 63, 2.022691)  # t of 39 patients, and as much further as that of 3 seeds is larger
    assert found["low"] == pytest.approx(0.2 - (0.7 - low) * 4.302653 / 2.022691, abs=1e-5)
    assert found["high"] == pytest.approx(0.2 + (high - 0.7) * 4.302653 / 2.022691, abs=1e-5)


def test_spread_that_the_patients_explain_is_counted_once() -> None:
    # Three repeats on thirds of the patients, the same network: the mean is that of all the patients.
    rng = np.random.default_rng(1)
    right = (rng.random(300) < 0.7).astype(float)
    draws = rng.multinomial(300, np.ones(300) / 300, size=3000).T
    thirds = np.arange(300) // 100
    samples = np.stack([right[thirds == k] @ draws[thirds == k] / draws[thirds == k].sum(0) for k in range(3)])
    found = _figure("accuracy", np.array([right[thirds == k].mean() for k in range(3)]), samples, 100)
    width = 2 * 1.96 * np.sqrt(0.7 * 0.3 / 300)
    assert 0.75 * width < found["high"] - found["low"] < 1.6 * width


def naive_delong(a: Scores, b: Scores) -> tuple[float, float]:
    """The difference and its standard error as DeLong et al. 1988 write them, by comparing every pair of images."""
    sides = []
    for s in (a, b):
        x, y = s.probabilities[s.labels == 1, 1], s.probabilities[s.labels == 0, 1]
        sides.append(np.array([[1.0 if p > q else 0.5 if p == q else 0.0 for q in y] for p in x]))
    v10, v01 = (np.stack([won.mean(axis) for won in sides]) for axis in (1, 0))
    s10, s01 = np.cov(v10), np.cov(v01)
    contrast = np.array([-1, 1])
    variance = contrast @ (s10 / v10.shape[1] + s01 / v01.shape[1]) @ contrast
    return float(sides[1].mean() - sides[0].mean()), float(np.sqrt(variance))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([9, 20, 41]), st.sampled_from([1, 3]))
def test_delong_is_the_naive_one(seed: int, images: int, decimals: int) -> None:
    a, b = pair(seed, images, decimals=decimals)
    found = delong(a, b)
    assert (found.difference, found.error) == pytest.approx(naive_delong(a, b), abs=1e-12)
    areas = [
        mannwhitneyu(s.probabilities[s.labels == 1, 1], s.probabilities[s.labels == 0, 1]).statistic for s in (a, b)
    ]
    pairs = (a.labels == 1).sum() * (a.labels == 0).sum()
    assert (found.a, found.b) == pytest.approx(tuple(area / pairs for area in areas))
    back = delong(b, a)
    assert (back.difference, back.p) == pytest.approx((-found.difference, found.p), nan_ok=True)


def naive_obuchowski(a: Scores, b: Scores) -> float:
    """Obuchowski 1997, equations 2 to 4, patient by patient."""
    per: dict[int, list[list[float]]] = {}
    m, n = int((a.labels == 1).sum()), int((a.labels == 0).sum())

    def won(s: Scores, i: int, j: int) -> float:
        p, q = s.probabilities[i, 1], s.probabilities[j, 1]
        return 1.0 if p > q else 0.5 if p == q else 0.0

    ones, zeros = np.flatnonzero(a.labels == 1), np.flatnonzero(a.labels == 0)
    area = sum(won(b, i, j) - won(a, i, j) for i in ones for j in zeros) / (m * n)
    for u in np.unique(a.units):
        v10 = [sum(won(b, i, j) - won(a, i, j) for j in zeros) / n - area for i in ones if a.units[i] == u]
        v01 = [sum(won(b, i, j) - won(a, i, j) for i in ones) / m - area for j in zeros if a.units[j] == u]
        per[u] = [v10, v01]
    i10, i01, units = sum(bool(v[0]) for v in per.values()), sum(bool(v[1]) for v in per.values()), len(per)
    s10 = i10 / ((i10 - 1) * m) * sum(sum(v[0]) ** 2 for v in per.values())
    s01 = i01 / ((i01 - 1) * n) * sum(sum(v[1]) ** 2 for v in per.values())
    s11 = units / (units - 1) * sum(sum(v[0]) * sum(v[1]) for v in per.values())
    return float(np.sqrt(s10 / m + s01 / n + 2 * s11 / (m * n)))


@pytest.mark.parametrize("per_unit", [2, 4])
def test_patients_of_several_images_are_obuchowskis_clusters(per_unit: int) -> None:
    a, b = pair(3, 40, per_unit)
    found = delong(a, b)
    assert found.error == pytest.approx(naive_obuchowski(a, b))
    alone = delong(*(Scores(s.labels, s.probabilities, np.arange(40)) for s in (a, b)))
    assert found.difference == alone.difference
    assert found.error != pytest.approx(alone.error)


def test_delong_and_the_bootstrap_agree() -> None:
    a, b = pair(4, 400, 2, decimals=6)
    exact, drawn = delong(a, b), paired_gain(a, b, names=["auroc"])["auroc"]
    assert drawn["value"] == pytest.approx(exact.difference)
    assert (drawn["high"] - drawn["low"]) == pytest.approx(exact.high - exact.low, rel=0.1)
    assert drawn["p"] == pytest.approx(exact.p, abs=0.05)


def test_delongs_p_is_even_where_nothing_differs() -> None:
    p = np.array([delong(*pair(seed, 120, decimals=6)).p for seed in range(400)])
    assert 0.025 < (p < 0.05).mean() < 0.08
    assert 0.42 < (p < 0.5).mean() < 0.58


def test_delong_refuses_what_has_no_answer() -> None:
    a, b = pair(0)
    assert delong(a, a).p == 1
    with pytest.raises(BadInput, match="same images"):
        delong(a, Scores(1 - b.labels, b.probabilities, b.units))
    with pytest.raises(BadInput, match="one kind"):
        delong(*(binary(np.zeros(5, int), np.linspace(0, 1, 5)) for _ in range(2)))
    three = Scores(np.arange(3), np.eye(3), np.arange(3))
    with pytest.raises(BadInput, match="must be named"):
        delong(three, three)


def test_holm_by_hand() -> None:
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 (not less than the last), 0.04 * 1 (nor that)
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


def test_holm_keeps_false_alarms_to_one_in_twenty() -> None:
    p = np.random.default_rng(0).random((2000, 8))
    assert ((p < 0.05).any(1)).mean() > 0.3
    assert (np.array([min(holm(row.tolist())) for row in p]) < 0.05).mean() == pytest.approx(0.05, abs=0.012)


def test_a_table_says_how_many_comparisons_it_makes() -> None:
    said = comparisons({"a": 0.001, "b": 0.03, "c": None, "d": 0.9}, "accuracy")
    assert said.startswith("4 comparisons of accuracy;")
    assert "With Holm's correction a differs from zero" in said
    assert "none differs" in comparisons({"a": 0.04, "b": 0.03})
    assert "a, b differ from" in comparisons({"a": 0.001, "b": 0.003})
    assert comparisons({"a": 0.5}) == "One comparison."


def test_a_table_of_four_counts_by_hand() -> None:
    labels, said = np.repeat([0, 0, 1, 1], [20, 5, 10, 15]), np.repeat([0, 1, 0, 1], [20, 5, 10, 15])
    found = {k: float(v[0]) for k, v in metrics(Scores(labels, np.eye(2)[said], np.arange(50))).items()}
    assert found["accuracy"] == 0.7
    assert found["balanced_accuracy"] == pytest.approx((20 / 25 + 15 / 25) / 2)
    assert found["macro_f1"] == pytest.approx((40 / 55 + 30 / 45) / 2)
