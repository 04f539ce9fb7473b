"""The measures of evaluate.py on plain arrays: ranks, win rate, CMMD, diversity, rank correlation, bootstrap intervals.

Everything is float64 NumPy and knows nothing of models or files. Similarities are cosines of unit-length embeddings,
(n, m) from n pictures to m references. Intervals are [value, low, high] of a 95 % percentile bootstrap over the clips,
2000 resamples with a fixed seed, so two runs over the same clips are resampled alike and their differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 2000


def resamples(n: int, seed: int = 0) -> np.ndarray:
    """Indices (2000, n) of the bootstrap's resamples of n clips."""
    return np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))


def bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], float] | None = None,
              seed: int = 0) -> tuple[float, np.ndarray]:
    """The mean over clips, or another `statistic` of the clips' values (n, ...), and its 2000 resampled values."""
    values = np.asarray(values)
    picks = resamples(len(values), seed)
    if statistic is None:
        return float(values.mean()), values[picks].mean(1)
    return float(statistic(values)), np.array([statistic(values[pick]) for pick in picks])


def summary(value: float, draws: np.ndarray) -> list[float]:
    """[value, low, high] of a bootstrap."""
    return [value, *(float(v) for v in np.percentile(draws, [2.5, 97.5]))]


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], float] | None = None, seed: int = 0) -> list[float]:
    return summary(*bootstrap(values, statistic, seed))


def ranks_of_truth(similarity: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Rank (n,) of column truth[i] in row i, 1 = best. A tie counts against the truth, so a constant is never right."""
    true = similarity[np.arange(len(truth)), truth][:, None]
    return (similarity >= true).sum(1)


def win_rates(similarity: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """For each picture the share (n,) of the other references that the true one beats, a tie counting half.

    This is the win rate of SonicDiffusion's AIS and IIS (Biner et al. 2024, arXiv 2405.00878); chance is 0.5.
    """
    true = similarity[np.arange(len(truth)), truth][:, None]
    better = (similarity < true).sum(1) + 0.5 * ((similarity == true).sum(1) - 1)
    return better / (similarity.shape[1] - 1)


def both_found(similarity: np.ndarray, truth: list[set[int]]) -> np.ndarray:
    """Whether (n,) the two best of m classes are the two of truth[i], in either order; chance is 1 / (m choose 2)."""
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :2]
    return np.array([set(map(int, two)) == classes for two, classes in zip(best, truth, strict=True)], float)


def _kernel(x: np.ndarray, y: np.ndarray, sigma: float) -> np.ndarray:
    squares = (x ** 2).sum(1)[:, None] + (y ** 2).sum(1)[None] - 2 * x @ y.T
    return np.exp(-np.maximum(squares, 0) / (2 * sigma ** 2))


def cmmd(x: np.ndarray, y: np.ndarray, sigma: float = 10.0, scale: float = 1000.0) -> tuple[float, np.ndarray]:
    """Squared maximum mean discrepancy between embeddings x (n, D) and y (m, D), unbiased, and its resampled values.

    CMMD (Jayasumana et al. 2024, arXiv 2401.09603, eq. 4): Gaussian kernel of sigma 10 on unit-length embeddings, times
    1000. Unbiased, so it can be a little below 0 for equal distributions and may be compared over small n. Each resample
    weighs every item by how often it was drawn and leaves out an item's pair with itself: copies would look alike.
    """
    kxx, kyy, kxy = _kernel(x, x, sigma), _kernel(y, y, sigma), _kernel(x, y, sigma)
    np.fill_diagonal(kxx, 0)
    np.fill_diagonal(kyy, 0)

    def value(u: np.ndarray, v: np.ndarray) -> np.ndarray:  # weights (r, n) and (r, m) -> (r,)
        def within(k, w):
            return ((w @ k) * w).sum(1) / (w.sum(1) ** 2 - (w ** 2).sum(1))
        return scale * (within(kxx, u) + within(kyy, v) - 2 * ((u @ kxy) * v).sum(1) / (u.sum(1) * v.sum(1)))

    def drawn(n: int, seed: int) -> np.ndarray:
        return np.stack([np.bincount(pick, minlength=n) for pick in resamples(n, seed)]).astype(float)
    return float(value(np.ones((1, len(x))), np.ones((1, len(y))))[0]), value(drawn(len(x), 0), drawn(len(y), 1))


def pairwise_distance(x: np.ndarray) -> float:
    """Mean cosine distance between the distinct pairs of unit-length embeddings (n, D)."""
    upper = np.triu_indices(len(x), 1)
    return float((1 - x @ x.T)[upper].mean())


def distinct_share(pictures: np.ndarray, tolerance: float = 0.02) -> float:
    """Share of pictures (n, ...) in [0, 1] that differ from each earlier distinct one by an RMS above `tolerance`."""
    kept: list[np.ndarray] = []
    for picture in pictures:
        if all(np.sqrt(np.mean((picture - other) ** 2)) > tolerance for other in kept):
            kept.append(picture)
    return len(kept) / len(pictures)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (n,), ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(pairs: np.ndarray) -> float:
    """Spearman's rank correlation of the two columns of (n, 2); 0 if one of them is constant: a constant follows nothing."""
    a, b = _ranks(pairs[:, 0]), _ranks(pairs[:, 1])
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else 0.0


def compare(a: tuple[float, np.ndarray], b: tuple[float, np.ndarray], n: int, higher_is_better: bool = True) -> dict:
    """The difference a - b of two bootstraps over the same n clips: interval, verdict, and the n that would show it.

    Both were resampled alike, so the draws' differences are those of the paired bootstrap. n_needed is the number of clips
    at which a difference of this size has 80 % power in a two-sided 5 % test (n (1.96 + 0.84)^2 (standard error /
    difference)^2, normal approximation); None where the difference is 0.
    """
    draws = a[1] - b[1]
    value, low, high = summary(a[0] - b[0], draws)
    verdict = "no difference shown at this n"
    if low > 0 or high < 0:
        verdict = "A better" if (low > 0) == higher_is_better else "B better"
    needed = math.ceil(n * ((1.959964 + 0.841621) * float(np.std(draws)) / value) ** 2) if value else None
    return {"difference": [value, low, high], "n": n, "verdict": verdict, "n_needed": needed}
