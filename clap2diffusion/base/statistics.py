"""Bootstrap intervals over clips, and how they are written. Everything is float64 NumPy.

Intervals are [value, low, high] of a 95 % percentile bootstrap, 2000 resamples with a fixed seed. Two runs
over the same clips are therefore resampled alike, and their differences are paired."""

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 2000


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


def show_interval(values: list[float] | None, digits: int = 3) -> str:
    """[value, low, high] as "0.123 [0.100, 0.146]"; "undefined" where there is no value or it is nan."""
    if values is None or values[0] is None or not math.isfinite(values[0]):
        return "undefined"
    return f"{values[0]:.{digits}f} [{values[1]:.{digits}f}, {values[2]:.{digits}f}]"
