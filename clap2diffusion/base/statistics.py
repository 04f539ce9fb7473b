"""Bootstrap intervals over clips, and how they are written. Everything is float64 NumPy.

Intervals are [value, low, high] of a 95 % percentile bootstrap, 2000 resamples with a fixed seed. Two runs
over the same clips are therefore resampled alike, and their differences are paired."""

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np

RESAMPLES = 2000
FEWEST = 10  # clips; percentile intervals of fewer are too narrow


def stratified(labels: list, n: int, seed: int = 0) -> list[int]:
    """Positions of n of the labels, in order; all for 0 or more than there are. Each label keeps its share,
    to within one, and every place has the same chance, that of a rare label too. The seed decides."""
    if not 0 < n < len(labels):
        return list(range(len(labels)))
    rng, places = np.random.default_rng([seed, 19]), defaultdict(list)
    for i in rng.permutation(len(labels)).tolist():
        places[labels[i]].append(i)
    # systematic sampling: a label's places lie evenly on [0, 1), from a random start; the first n are taken
    key = {i: (rank + start) / len(group) for group, start in zip(places.values(), rng.random(len(places)))
           for rank, i in enumerate(group)}
    return sorted(sorted(key, key=key.__getitem__)[:n])


def resamples(n: int, seed: int = 0) -> np.ndarray:
    """Indices (2000, n) of the bootstrap's resamples of n clips."""
    return np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))


def bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], float] | None = None
              ) -> tuple[float, np.ndarray]:
    """The mean over clips, or a `statistic` of the clips' values (n, ...), and its 2000 resampled values."""
    values = np.asarray(values)
    picks = resamples(len(values))
    if statistic is None:
        return float(values.mean()), values[picks].mean(1)
    return float(statistic(values)), np.array([statistic(values[pick]) for pick in picks])


def summary(value: float, draws: np.ndarray) -> list[float]:
    """[value, low, high] of a bootstrap."""
    return [value, *np.percentile(draws, [2.5, 97.5]).tolist()]


def interval(values: np.ndarray) -> list[float]:
    return summary(*bootstrap(values))


def interval_where(values: np.ndarray, where: np.ndarray) -> list[float] | None:
    """The interval over clips of the mean of those of a clip's values (n, k) that `where` (n, k) names. Clips
    without any are left out; None if all are."""
    n = where.sum(1)
    return interval((values * where).sum(1)[n > 0] / n[n > 0]) if n.any() else None


def show_interval(values: list[float] | None, digits: int = 3) -> str:
    """[value, low, high] as "0.123 [0.100, 0.146]"; "undefined" where there is no value or it is nan."""
    if values is None or values[0] is None or not math.isfinite(values[0]):
        return "undefined"
    return f"{values[0]:.{digits}f} [{values[1]:.{digits}f}, {values[2]:.{digits}f}]"


def few_to_whiten(n: int, width: int) -> str:
    """What must be said of a whitening of `width` directions that saw n clips; '' if they can span them."""
    return "" if n > width else (
        f"{n} training clips meet a whitening of {width} directions: they span at most {max(0, n - 1)}, and "
        "what differs in the others alone sounds alike to the adapter; take more clips, or --no-whiten")
