"""The measures of an evaluation: ranks, win rate, CMMD, diversity, rank correlation, comparison of two runs.

Everything is float64 NumPy and knows nothing of models or files. A similarity (n, m) holds the cosines of n
pictures with m references, all embeddings of unit length."""

import math

import numpy as np
from scipy.stats import rankdata, t

from clap2diffusion.base.statistics import FEWEST, resamples, summary


def ranks_of_truth(similarity: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Rank (n,) of column truth[i] in row i, 1 = best. A tie counts against the truth."""
    true = similarity[np.arange(len(truth)), truth][:, None]
    return (similarity >= true).sum(1)


def win_rates(similarity: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """For each picture the share (n,) of the other references that the true one beats; a tie counts half.
    The win rate of SonicDiffusion's AIS and IIS (Biner et al. 2024, arXiv 2405.00878). Chance is 0.5."""
    true = similarity[np.arange(len(truth)), truth][:, None]
    better = (similarity < true).sum(1) + 0.5 * ((similarity == true).sum(1) - 1)
    return better / (similarity.shape[1] - 1)


def found_of_two(similarity: np.ndarray, truth: list[set[int]]) -> np.ndarray:
    """How many (n,) of the two classes of truth[i] are among the two best of m. Both are, of guesses, in 1 of
    m choose 2. Where one of the two is drawn rightly and the other is guessed, both are in 1 of m - 1."""
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :2]
    return np.array([len(classes & set(map(int, two))) for two, classes in zip(best, truth, strict=True)])


def cmmd(x: np.ndarray, y: np.ndarray, shared: np.ndarray | None = None, sigma: float = 10.0
         ) -> tuple[float, np.ndarray]:
    """Squared maximum mean discrepancy of embeddings x (n, D) and y (m, D), and its resampled values.
    CMMD (Jayasumana et al. 2024, arXiv 2401.09603, eq. 4): Gaussian kernel of sigma 10 on unit-length
    embeddings, times 1000. It is unbiased, so small n may be compared, and equal distributions can give a
    little less than 0. Google's code takes the biased estimator and the paper CLIP's embeddings: figures of
    theirs are not comparable. A resample weighs each item by how often it was drawn. It leaves out an item's
    pair with itself, because copies would count as likeness.
    shared (n, n): which pairs (i, j) of x and y come of one clip. They too would count as likeness, so they
    are left out, and clips are resampled as a whole. None: x and y are of different clips."""
    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        squares = (x ** 2).sum(1)[:, None] + (y ** 2).sum(1)[None] - 2 * x @ y.T
        return np.exp(-np.maximum(squares, 0) / (2 * sigma ** 2))

    def mean(u: np.ndarray, k: np.ndarray, kept: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Of k (n, m) over the pairs that are kept, by weights u (r, n) and v (r, m): (r,)."""
        return ((u @ (k * kept)) * v).sum(1) / ((u @ kept) * v).sum(1)
    kxx, kyy, kxy = kernel(x, x), kernel(y, y), kernel(x, y)
    between = np.ones(kxy.shape) if shared is None else 1.0 - shared

    def value(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return 1000.0 * (mean(u, kxx, 1 - np.eye(len(x)), u) + mean(v, kyy, 1 - np.eye(len(y)), v)
                         - 2 * mean(u, kxy, between, v))

    def drawn(n: int, seed: int) -> np.ndarray:
        return np.stack([np.bincount(pick, minlength=n) for pick in resamples(n, seed)]).astype(float)
    whole = value(np.ones((1, len(x))), np.ones((1, len(y))))
    return float(whole[0]), value(drawn(len(x), 0), drawn(len(y), 0 if shared is not None else 1))


def pairwise_distance(x: np.ndarray) -> float:
    """Mean cosine distance between the distinct pairs of unit-length embeddings (n, D)."""
    return float((1 - x @ x.T)[np.triu_indices(len(x), 1)].mean())


def distinct_share(pictures: np.ndarray, tolerance: float = 0.02) -> float:
    """Share of pictures (n, ...) in [0, 1] whose RMS distance to all distinct ones before is > tolerance."""
    kept: list[np.ndarray] = []
    for picture in pictures:
        if all(np.sqrt(np.mean((picture - other) ** 2)) > tolerance for other in kept):
            kept.append(picture)
    return len(kept) / len(pictures)


def spearman(pairs: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of the two columns: pairs (..., n, 2) -> (...). It is 0 where a column is
    constant, for a constant follows nothing (scipy.stats.spearmanr gives nan)."""
    ranks = rankdata(pairs, axis=-2)
    a, b = np.moveaxis(ranks - ranks.mean(-2, keepdims=True), -1, 0)
    norm = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), norm, out=np.zeros_like(norm), where=norm > 0)


def bootstrap_spearman(pairs: np.ndarray) -> tuple[float, np.ndarray]:
    """Spearman's correlation of pairs (n, 2) and its resampled values, many at a time for speed."""
    parts = np.array_split(resamples(len(pairs)), 1 + len(pairs) // 100)  # this bounds the memory
    return float(spearman(pairs)), np.concatenate([spearman(pairs[picks]) for picks in parts])


def compare(a: tuple[float, np.ndarray], b: tuple[float, np.ndarray], n: int,
            higher_is_better: bool = True) -> dict:
    """The difference a - b of two bootstraps over the same n clips: interval, verdict, n that would show it.
    Both were resampled alike, so the differences of their draws are those of the paired bootstrap. n_needed
    is the number of clips at which a difference of this size has 80 % power in a two-sided 5 % test: n (1.96
    + 0.84)^2 (standard error / difference)^2, a normal approximation, and None for a difference of 0, to
    rounding. Fewer than FEWEST clips get no verdict."""
    draws = a[1] - b[1]
    value, low, high = summary(a[0] - b[0], draws)
    better = "A better" if (low > 0) == higher_is_better else "B better"
    verdict = better if low > 0 or high < 0 else "no difference shown at this n"
    if n < FEWEST:
        verdict = f"too few clips ({n}) to tell"
    z = (1.959964 + 0.841621) * float(np.std(draws)) / value if abs(value) > 1e-12 else 0.0
    needed = math.ceil(n * z ** 2) or None
    return {"difference": [value, low, high], "n": n, "verdict": verdict, "n_needed": needed}


def over_clips_and_seeds(by_seed: np.ndarray, draws: np.ndarray, n: int) -> tuple[list[float], float]:
    """[mean, low, high] and the p-value of a difference that holds for other clips and other seeds alike.
    by_seed (S,): each training seed's difference on the same n clips. draws (2000,): resampled means over the
    seeds, where all seeds share the clips that are drawn. Both variances are added: min F' (Clark 1973, "The
    language-as-fixed-effect fallacy") with Satterthwaite's degrees of freedom. It is conservative. One seed
    tells nothing about others: then the interval is of clips alone, and p is 1."""
    value, of_clips, of_seeds, s = float(by_seed.mean()), float(draws.var(ddof=1)), 0.0, len(by_seed)
    if s > 1:
        of_seeds = float(by_seed.var(ddof=1)) / s
    error = math.sqrt(of_clips + of_seeds)
    if not error:
        return [value] * 3, float(value == 0 or s == 1)
    freedom = error ** 4 / (of_clips ** 2 / max(1, n - 1) + of_seeds ** 2 / max(1, s - 1))
    half = error * float(t.ppf(0.975, freedom))
    return [value, value - half, value + half], 2 * float(t.sf(abs(value) / error, freedom)) if s > 1 else 1.0
