"""Every measure against SciPy or a slow computation by hand; constants and noise are at chance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from clap2diffusion.base.statistics import (
    RESAMPLES,
    bootstrap,
    few_to_whiten,
    interval,
    stratified,
    summary,
)
from clap2diffusion.judging.metrics import (
    cmmd,
    compare,
    distinct_share,
    found_of_two,
    over_clips_and_seeds,
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


def test_found_of_two_wants_the_two_best_in_any_order():
    similarity = np.array([[0.1, 0.9, 0.8, 0.0], [0.9, 0.1, 0.2, 0.8], [0.5, 0.6, 0.4, 0.1]])
    assert found_of_two(similarity, [{2, 1}, {0, 1}, {0, 1}]).tolist() == [2, 1, 2]
    noise = RNG.standard_normal((20000, 10))
    found = found_of_two(noise, [{0, 1}] * 20000)
    assert (found == 2).mean() == pytest.approx(1 / math.comb(10, 2), abs=0.004)
    assert (found >= 1).mean() == pytest.approx(1 - math.comb(8, 2) / math.comb(10, 2), abs=0.01)
    noise[:, 0] = 9.0  # a generator that draws the first of the two, always
    assert (found_of_two(noise, [{0, 1}] * 20000) == 2).mean() == pytest.approx(1 / 9, abs=0.007)


def test_a_choice_by_label_keeps_the_labels_shares_however_the_rows_are_sorted():
    labels = [name for name, many in (("a", 600), ("b", 300), ("c", 90), ("d", 10)) for _ in range(many)]
    for seed in range(5):
        chosen = stratified(labels, 100, seed)
        assert chosen == sorted(set(chosen)) and len(chosen) == 100
        of = {name: [i for i in chosen if labels[i] == name] for name in "abcd"}
        assert [len(of[name]) for name in "abcd"] == pytest.approx([60, 30, 9, 1], abs=1)
        assert np.mean(of["a"]) == pytest.approx(300, abs=90)  # not its first ones
    assert stratified(labels, 100, 0) != stratified(labels, 100, 1)
    classes = [i // 50 for i in range(309 * 50)]  # VGGSound's, sorted by class
    assert len({classes[i] for i in stratified(classes, 200)}) == 200
    assert len({classes[i] for i in stratified(classes, 700)}) == 309
    rare = ["common"] * 500 + [f"rare {i}" for i in range(500)]
    assert sum(rare[i] != "common" for i in stratified(rare, 250)) == pytest.approx(125, abs=30)
    chosen = [stratified([*"aaaaaaabbc"], 4, seed) for seed in range(2000)]
    shares = np.bincount(np.concatenate(chosen)) / 2000
    assert shares == pytest.approx(np.full(10, 0.4), abs=0.05)  # every place has the same chance
    assert stratified(labels, 0) == stratified(labels, 1000) == [*range(1000)]


def slow_cmmd(x, y, shared=()) -> float:
    """Jayasumana et al. 2024, eq. 4, term by term, without the pairs of one clip."""
    def k(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * 10 ** 2))
    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    different = [(i, j) for i in range(n) for j in range(m) if (i, j) not in shared]
    between = sum(k(x[i], y[j]) for i, j in different) / len(different)
    return 1000 * (within_x + within_y - 2 * between)


def test_cmmd_is_the_papers_and_unbiased():
    x, y = unit(9, 5), unit(12, 5) + 0.3
    value, draws = cmmd(x, y)
    assert value == pytest.approx(slow_cmmd(x, y), rel=1e-9)
    assert draws.std() > 0 and np.percentile(draws, 2.5) < value < np.percentile(draws, 97.5)
    same = np.mean([cmmd(unit(20, 4), unit(20, 4))[0] for _ in range(200)])
    biased = 2 * 1000 / 20 * (1 - np.exp(-2 / 200))  # about what keeping the diagonal would add
    assert abs(same) < 0.05 * biased  # equal distributions: 0 on average


def test_cmmd_leaves_out_pairs_of_one_clip():
    x, others = unit(8, 5), [3, 0, 5, 1, 2, 7, 4, 6]
    own = np.eye(8, dtype=bool)
    pairs = {(i, i) for i in range(8)}
    assert cmmd(x, x, own)[0] == pytest.approx(slow_cmmd(x, x, pairs), abs=1e-9) == pytest.approx(0, abs=1e-9)
    y = unit(8, 5)
    assert cmmd(x, y, own | own[others])[0] == pytest.approx(
        slow_cmmd(x, y, pairs | {(i, j) for i, j in enumerate(others)}), rel=1e-9)


@pytest.mark.parametrize("paired", (True, False, "by class"))
@pytest.mark.parametrize("n", (50, 100, 300))
def test_cmmd_of_equal_distributions_has_0_in_its_interval(n, paired):
    """Paired: picture i and real picture i show one clip, as with the right sound. By class: they show two
    clips of one class, as the reference of real pictures."""
    inside = []
    for seed in range(8):
        rng = np.random.default_rng([n, seed])
        classes = np.array([3 * rng.standard_normal(32) for _ in range(10)])

        def draw(clips, rng=rng):
            x = clips + 0.3 * rng.standard_normal((n, 32))
            return x / np.linalg.norm(x, axis=1, keepdims=True)
        kinds, others = rng.integers(10, size=n), rng.integers(10, size=n)
        clips, same, apart = (classes[of] + rng.standard_normal((n, 32)) for of in (kinds, kinds, others))
        x, y = draw(clips), draw({True: clips, False: apart}.get(paired, same))
        _, low, high = summary(*cmmd(x, y, np.eye(n, dtype=bool) if paired else None))
        inside.append(low <= 0 <= high)
    assert sum(inside) >= 7


def test_a_difference_over_clips_and_seeds_is_called_real_in_one_of_twenty_nulls():
    """Seeds differ among themselves, clips differ among themselves, and the variant has no effect."""
    rng, bold, over_clips_alone = np.random.default_rng(4), 0, 0
    for _ in range(600):
        seeds, clips = rng.standard_normal((3, 1)), rng.standard_normal(60)
        noise = 0.1 * seeds + 0.1 * clips + rng.standard_normal((3, 60))
        picks = rng.integers(0, 60, (300, 60))
        draws = noise.mean(0)[picks].mean(1)
        (value, low, high), p = over_clips_and_seeds(noise.mean(1), draws, 60)
        bold += p < 0.05
        assert (p < 0.05) == (low > 0 or high < 0) and low < value < high
        over_clips_alone += not np.percentile(draws, 2.5) < 0 < np.percentile(draws, 97.5)
    assert bold <= 0.05 * 600 < over_clips_alone
    real = rng.standard_normal((3, 1)) * 0.1 + rng.standard_normal((3, 60)) + 1
    assert over_clips_and_seeds(real.mean(1), real.mean(0)[picks].mean(1), 60)[1] < 0.05
    assert over_clips_and_seeds(np.zeros(3), np.zeros(300), 60) == ([0, 0, 0], 1)
    assert over_clips_and_seeds(np.ones(1), real.mean(0)[picks].mean(1), 60)[1] == 1  # one seed: who knows


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


def test_few_clips_get_no_verdict_and_a_difference_of_rounding_needs_no_clips():
    draws = np.linspace(0.5, 0.6, RESAMPLES), np.linspace(0.1, 0.2, RESAMPLES)
    assert compare((0.55, draws[0]), (0.15, draws[1]), 10)["verdict"] == "A better"
    assert compare((0.55, draws[0]), (0.15, draws[1]), 9)["verdict"] == "too few clips (9) to tell"
    for tiny in (1e-17, 5e-324):
        noise = RNG.standard_normal(RESAMPLES)
        assert compare((tiny, noise), (0.0, 0 * noise), 50)["n_needed"] is None


def test_a_whitening_that_few_clips_cannot_fill_is_said(capsys):
    import torch

    from common import whitening
    embeds = torch.nn.functional.normalize(torch.randn(600, 512, generator=torch.Generator().manual_seed(0)))
    whitening(embeds[:22])
    said = "22 training clips meet a whitening of 512 directions: they span at most 21"
    assert f"warning: {said}" in capsys.readouterr().err and few_to_whiten(22, 512).startswith(said)
    embeds[30:] = 0  # silence is no sound to span anything
    whitening(embeds)
    assert "warning: 30 training clips meet a whitening of 512" in capsys.readouterr().err
    whitening(torch.nn.functional.normalize(torch.randn(600, 512)))
    assert capsys.readouterr().err == "" == few_to_whiten(513, 512)
    assert few_to_whiten(512, 512)  # they span 511
