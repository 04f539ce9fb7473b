"""Every measure against SciPy or a slow computation by hand; constants and noise are at chance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from clap2diffusion.base.statistics import RESAMPLES, bootstrap, interval, summary
from clap2diffusion.judging.metrics import (
    both_found,
    cmmd,
    compare,
    distinct_share,
    pairwise_distance,
    ranks_of_truth,
    spearman,
    win_rates,
)

RNG = np.random.default_rng(0)


def unit(*shape: int) -> np.ndarray:
    x = RNG.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_interval_agrees_with_scipys_bootstrap():
    values = np.random.default_rng(3).gamma(2.0, size=40)
    mean, low, high = interval(values)
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile",
                                     rng=0).confidence_interval
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=0.03)


def test_interval_of_another_statistic_resamples_whole_clips():
    pairs = RNG.standard_normal((30, 2)) @ [[1, 0.8], [0, 0.6]]
    value, low, high = summary(*bootstrap(pairs, spearman))
    expected = scipy.stats.bootstrap(
        (pairs[:, 0], pairs[:, 1]), lambda a, b: scipy.stats.spearmanr(a, b).statistic, paired=True,
        vectorized=False,
        n_resamples=1000, method="percentile", rng=0).confidence_interval
    assert value == pytest.approx(scipy.stats.spearmanr(*pairs.T).statistic)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.06)


def test_ranks_and_win_rates_by_counting():
    # rounded: ties occur
    similarity, truth = np.round(RNG.standard_normal((20, 12)), 1), RNG.integers(12, size=20)
    ranks, wins = ranks_of_truth(similarity, truth), win_rates(similarity, truth)
    for row, t, rank, win in zip(similarity, truth, ranks, wins, strict=True):
        others = [value for j, value in enumerate(row) if j != t]
        assert rank == 1 + sum(value >= row[t] for value in others)
        assert win == pytest.approx(sum((value < row[t]) + 0.5 * (value == row[t]) for value in others) / 11)
        # without ties the win rate is the Mann-Whitney statistic of one against the others
        assert win == pytest.approx(scipy.stats.mannwhitneyu([row[t]], others).statistic / 11)


def test_a_constant_judge_is_never_right():
    similarity, truth = np.zeros((6, 10)), np.arange(6)
    assert (ranks_of_truth(similarity, truth) == 10).all()
    assert (win_rates(similarity, truth) == 0.5).all()


def test_both_found_wants_the_two_best_in_any_order():
    similarity = np.array([[0.1, 0.9, 0.8, 0.0], [0.9, 0.1, 0.2, 0.8], [0.5, 0.6, 0.4, 0.1]])
    assert both_found(similarity, [{2, 1}, {0, 1}, {0, 1}]).tolist() == [1, 0, 1]
    noise = both_found(RNG.standard_normal((20000, 10)), [{0, 1}] * 20000).mean()
    assert noise == pytest.approx(1 / math.comb(10, 2), abs=0.004)


def slow_cmmd(x, y) -> float:
    """Jayasumana et al. 2024, eq. 4, term by term."""
    def k(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * 10 ** 2))
    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(k(a, b) for a in x for b in y) / (n * m)
    return 1000 * (within_x + within_y - 2 * between)


def test_cmmd_is_the_papers_and_unbiased():
    x, y = unit(9, 5), unit(12, 5) + 0.3
    value, draws = cmmd(x, y)
    assert value == pytest.approx(slow_cmmd(x, y), rel=1e-9)
    assert draws.std() > 0 and np.percentile(draws, 2.5) < value < np.percentile(draws, 97.5)
    same = np.mean([cmmd(unit(20, 4), unit(20, 4))[0] for _ in range(200)])
    biased = 2 * 1000 / 20 * (1 - np.exp(-2 / 200))  # about what keeping the diagonal would add
    assert abs(same) < 0.05 * biased  # equal distributions: 0 on average


def test_cmmd_draws_do_not_see_copies_as_likeness():
    """The spread's middle is the value itself. Pairs of an item with its own copy would lift it."""
    x, y = unit(25, 8), unit(25, 8)
    value, draws = cmmd(x, y)
    assert abs(np.median(draws) - value) < 0.5 * draws.std()


def test_distance_and_distinct_share_by_hand():
    x = unit(5, 3)
    expected = np.mean([1 - float(np.dot(a, b)) for a, b in itertools.combinations(x, 2)])
    assert pairwise_distance(x) == pytest.approx(expected)
    pictures = np.stack([np.full((4, 4), v) for v in (0.1, 0.11, 0.5, 0.5, 0.9)])
    assert distinct_share(pictures) == pytest.approx(3 / 5)
    assert distinct_share(np.zeros((8, 3))) == pytest.approx(1 / 8)


@pytest.mark.parametrize("ties", (False, True))
def test_spearman_is_scipys(ties):
    pairs = RNG.standard_normal((40, 2)) @ [[1, 0.5], [0, 1]]
    if ties:
        pairs = np.round(pairs)
    assert spearman(pairs) == pytest.approx(scipy.stats.spearmanr(*pairs.T).statistic, abs=1e-12)
    assert spearman(np.stack([np.arange(5.0), np.ones(5)], 1)) == 0


def test_compare_is_paired_and_its_n_needed_would_show_the_difference():
    rng = np.random.default_rng(1)
    shared = rng.standard_normal(200) * 5  # the clips differ far more than the runs do
    a, b = shared + 0.4 + 0.1 * rng.standard_normal(200), shared
    found = compare(bootstrap(a), bootstrap(b), 200)
    assert found["verdict"] == "A better" and found["difference"] == pytest.approx(interval(a - b))
    assert compare(bootstrap(b), bootstrap(a), 200)["verdict"] == "B better"
    assert compare(bootstrap(a), bootstrap(b), 200, higher_is_better=False)["verdict"] == "B better"
    same = compare(bootstrap(a), bootstrap(a), 200)
    assert same["verdict"] == "no difference shown at this n" and same["n_needed"] is None

    small = compare(bootstrap(rng.standard_normal(50) + 0.1), (0.0, np.zeros(RESAMPLES)), 50)
    effect, spread = small["difference"][0], 1.0
    # closed form for the mean of unit normals: n = (1.96 + 0.84)^2 / effect^2, the spread being estimated
    # from 50
    assert small["n_needed"] == pytest.approx((1.96 + 0.8416) ** 2 * spread / effect ** 2, rel=0.5)
    shown = [compare(bootstrap(rng.standard_normal(small["n_needed"]) + effect),
                             (0.0, np.zeros(RESAMPLES)), small["n_needed"])["verdict"] for _ in range(20)]
    assert shown.count("A better") >= 10  # 80 % power
