"""What a share, a difference of two models and an agreement are worth. numpy only."""
import math
import statistics

import numpy as np

Z_95 = 1.959964  # of the normal distribution
DRAWS = 10_000  # of the bootstrap


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, hits of n: unlike p +- 2 sd it holds near 0 and 1, too."""
    share = hits / n
    squared = Z_95 ** 2 / n
    middle = (share + squared / 2) / (1 + squared)
    half = math.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    return max(middle - half, 0.), min(middle + half, 1.)


def bootstrap(differences: list[list[float]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of all differences, [[a clip's] of a prompt], over other prompts:
    whole prompts are drawn, because clips of one prompt resemble each other."""
    sums = np.array([sum(some) for some in differences])
    counts = np.array([len(some) for some in differences])
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(DRAWS):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, (.025, .975))
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of so many clips that only one, and only the other model passes: the chance
    of a split as uneven among gained + lost throws of a coin."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1., 2 * tail / 2 ** n)


def ranks(values) -> np.ndarray:
    """The rank of each value from 1 on; equal ones share the mean of theirs."""
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[which]


def correlations(a: list[float], b: list[float]) -> tuple[float, float]:
    """(Pearson's, Spearman's); NaN where one side never varies, or there are not two of each."""
    try:
        return (statistics.correlation(a, b),
                statistics.correlation(ranks(a).tolist(), ranks(b).tolist()))
    except statistics.StatisticsError:
        return math.nan, math.nan
