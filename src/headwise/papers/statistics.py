"""Spread and tests for small samples: seeds, heads, prompts. numpy at import, scipy on use.

Differences are paired wherever both sides saw the same items. Random draws take a seed and are repeatable.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal

import numpy as np

__all__ = [
    "bootstrap_interval",
    "holm",
    "mean",
    "paired_bootstrap_interval",
    "permutation_test",
    "rank_correlation",
    "sd",
    "sign_flip_test",
    "t_interval",
    "worst",
]

Numbers = Sequence[float] | Sequence[int] | np.ndarray
Alternative = Literal["two-sided", "greater", "less"]


def _array(values: Numbers, where: str, least: int = 1) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < least:
        raise ValueError(f"{where}: got shape {array.shape}; expected a flat list of at least {least} numbers")
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: {int((~np.isfinite(array)).sum())} of {len(array)} numbers are not finite")
    return array


def mean(values: Numbers) -> float:
    """The arithmetic mean."""
    return math.fsum(_array(values, "mean")) / len(values)


def sd(values: Numbers) -> float:
    """The sample standard deviation (divisor n - 1). ValueError for fewer than two values."""
    return float(_array(values, "sd", least=2).std(ddof=1))


def worst(values: Numbers, *, larger_is_better: bool = True) -> float:
    """The worst value: the least where larger is better, else the greatest."""
    array = _array(values, "worst")
    return float(array.min() if larger_is_better else array.max())


def t_interval(values: Numbers, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean: mean +- t(n - 1) * sd / sqrt(n). One value: minus to plus infinity."""
    array = _array(values, "t_interval")
    _check_level(level, "t_interval")
    if len(array) == 1:
        return -math.inf, math.inf
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return mean(values) - half, mean(values) + half


def _check_level(level: float, where: str) -> None:
    if not 0 < level < 1:
        raise ValueError(f"{where}: level {level} is out of range; give a share between 0 and 1, such as 0.95")


def bootstrap_interval(
    values: Numbers,
    *,
    statistic: Callable[..., np.ndarray] = np.mean,
    level: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic over resampled items. statistic takes ``axis=-1``, as numpy's do."""
    array = _array(values, "bootstrap_interval")
    _check_level(level, "bootstrap_interval")
    rng = np.random.default_rng(seed)
    # Blocks bound the memory: draws x items indices at once would be gigabytes for a large corpus.
    block = max(1, 2_000_000 // len(array))
    sizes = [min(block, draws - start) for start in range(0, draws, block)]
    found = [statistic(array[rng.integers(0, len(array), (size, len(array)))], axis=-1) for size in sizes]
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap_interval(
    a: Numbers, b: Numbers, *, level: float = 0.95, draws: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of mean(a - b), resampling items; a[i] and b[i] are of the same item."""
    difference = _paired(a, b, "paired_bootstrap_interval")
    return bootstrap_interval(difference, level=level, draws=draws, seed=seed)


def _paired(a: Numbers, b: Numbers, where: str) -> np.ndarray:
    first, second = _array(a, where), _array(b, where)
    if len(first) != len(second):
        raise ValueError(f"{where}: got {len(first)} and {len(second)} numbers; items are paired, give equally many")
    return first - second


def _tail(null: np.ndarray, seen: float, alternative: Alternative) -> np.ndarray:
    # Equal sums may differ in the last bits by the order of addition: count them as equal.
    slack = 1e-12 * max(1.0, abs(seen))
    if alternative == "greater":
        return null >= seen - slack
    if alternative == "less":
        return null <= seen + slack
    if alternative == "two-sided":
        return np.abs(null) >= abs(seen) - slack
    raise ValueError(f"alternative: {alternative!r}; expected 'two-sided', 'greater' or 'less'")


def sign_flip_test(
    a: Numbers, b: Numbers, *, alternative: Alternative = "two-sided", draws: int = 10_000, seed: int = 0
) -> float:
    """p of mean(a - b) when the sign of each item's difference is a coin toss (paired permutation test).

    All sign patterns are enumerated where they are no more than ``draws``; sampled otherwise, with the seen one added.
    """
    difference = _paired(a, b, "sign_flip_test")
    seen = float(difference.mean())
    if 2 ** len(difference) <= draws:
        signs = np.array(list(product((1.0, -1.0), repeat=len(difference))))
        return float(_tail(signs @ difference / len(difference), seen, alternative).mean())
    rng = np.random.default_rng(seed)
    count = 0
    block = max(1, 2_000_000 // len(difference))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        signs = rng.integers(0, 2, (size, len(difference))) * 2.0 - 1.0
        count += int(_tail(signs @ difference / len(difference), seen, alternative).sum())
    return (count + 1) / (draws + 1)


def permutation_test(
    a: Numbers, b: Numbers, *, alternative: Alternative = "two-sided", draws: int = 10_000, seed: int = 0
) -> float:
    """p of mean(a) - mean(b) when items may belong to either group. Exact where few enough splits exist."""
    from scipy.stats import permutation_test as scipy_permutation_test

    first, second = _array(a, "permutation_test"), _array(b, "permutation_test")
    if alternative not in ("two-sided", "greater", "less"):
        raise ValueError(f"alternative: {alternative!r}; expected 'two-sided', 'greater' or 'less'")

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray | np.floating:
        return x.mean(axis=axis) - y.mean(axis=axis)

    found = scipy_permutation_test(
        (first, second),
        difference,
        vectorized=True,
        n_resamples=draws,
        alternative=alternative,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: Numbers) -> list[float]:
    """Holm's step-down adjustment: reject where the adjusted p is below the level; controls the family-wise error."""
    array = _array(p_values, "holm")
    if (array < 0).any() or (array > 1).any():
        raise ValueError("holm: a p-value lies outside 0..1; give probabilities")
    order = np.argsort(array, kind="stable")
    scaled = array[order] * (len(array) - np.arange(len(array)))
    adjusted = np.empty_like(array)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in adjusted]


def rank_correlation(a: Numbers, b: Numbers) -> float:
    """Spearman's rank correlation; ties share their mean rank. NaN where one side is constant."""
    from scipy.stats import rankdata

    _paired(a, b, "rank_correlation")
    first, second = rankdata(a), rankdata(b)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])
