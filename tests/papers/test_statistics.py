"""Spread and tests: known values, scipy where it has the same test, and properties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.papers.statistics import (
    bootstrap_interval,
    holm,
    mean,
    paired_bootstrap_interval,
    permutation_test,
    rank_correlation,
    sd,
    sign_flip_test,
    t_interval,
    worst,
)

numbers = st.floats(-1e6, 1e6)
samples = st.lists(numbers, min_size=2, max_size=12)
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_known_values():
    assert mean([1, 2, 4]) == pytest.approx(7 / 3)
    assert sd([2, 4, 4, 4, 5, 5, 7, 9]) == pytest.approx(math.sqrt(32 / 7))
    assert worst([0.3, 0.9]) == 0.3
    assert worst([0.3, 0.9], larger_is_better=False) == 0.9
    # mean 5, sd 1 of three values, t(2) at 97.5 % is 4.302653: half width 4.302653 / sqrt(3)
    low, high = t_interval([4, 5, 6])
    assert (low, high) == pytest.approx((5 - 2.484138, 5 + 2.484138), abs=1e-5)
    assert t_interval([1.0]) == (-math.inf, math.inf)


def test_mean_does_not_lose_small_values():
    assert mean([1e16, 1.0, -1e16]) == pytest.approx(1 / 3)


def test_holm_known_values():
    # Holm (1979): 0.01 * 4, then 0.005 * ... in order of size, each at least the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_sign_flip_is_exact_when_small():
    # All five differences positive: one pattern of 32 is as large, two in both directions.
    a, b = [2, 3, 4, 5, 6], [1, 1, 1, 1, 1]
    assert sign_flip_test(a, b, alternative="greater") == pytest.approx(1 / 32)
    assert sign_flip_test(a, b) == pytest.approx(2 / 32)
    assert sign_flip_test(a, b, alternative="less") == 1.0


def test_sign_flip_sampled_is_near_exact():
    rng = np.random.default_rng(3)
    a = rng.normal(0.3, 1, 12)
    exact = sign_flip_test(a, np.zeros(12))
    sampled = sign_flip_test(a, np.zeros(12), draws=4000)
    assert sampled == pytest.approx(exact, abs=0.04)


def test_permutation_known_value():
    # Of the 6 splits of {1, 2, 3, 4} into pairs, one has a mean as large as {3, 4}.
    assert permutation_test([3, 4], [1, 2], alternative="greater") == pytest.approx(1 / 6)
    assert permutation_test([3, 4], [1, 2]) == pytest.approx(2 / 6)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for draw in range(200):
        low, high = bootstrap_interval(rng.normal(1.0, 1.0, 40), draws=400, seed=draw)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_paired_interval_sees_what_an_unpaired_one_cannot():
    rng = np.random.default_rng(1)
    items = rng.normal(0, 10, 50)
    low, high = paired_bootstrap_interval(items + 0.5 + rng.normal(0, 0.1, 50), items)
    assert 0.4 < low < 0.5 < high < 0.6


@given(samples)
def test_intervals_hold_their_middle(values: list[float]):
    low, high = t_interval(values)
    assert low <= mean(values) <= high
    low, high = bootstrap_interval(values, draws=200)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= low <= high <= max(values) + slack


@given(samples, st.integers(0, 100))
def test_bootstrap_repeats_and_scales(values: list[float], seed: int):
    first = bootstrap_interval(values, draws=100, seed=seed)
    assert first == bootstrap_interval(values, draws=100, seed=seed)
    doubled = bootstrap_interval([2 * v for v in values], draws=100, seed=seed)
    assert doubled == pytest.approx((2 * first[0], 2 * first[1]), rel=1e-9, abs=1e-6)


@given(probabilities)
def test_holm_properties(p_values: list[float]):
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    assert min(adjusted) == pytest.approx(min(1.0, min(p_values) * len(p_values)))
    order = np.argsort(p_values, kind="stable")
    assert all(np.diff(np.asarray(adjusted)[order]) >= 0)
    # never stricter than Bonferroni
    assert all(q <= min(1.0, p * len(p_values)) + 1e-15 for p, q in zip(p_values, adjusted, strict=True))


@given(samples)
def test_sign_flip_p_is_a_probability_and_symmetric(values: list[float]):
    zero = [0.0] * len(values)
    p = sign_flip_test(values, zero, draws=5000)
    assert 0 < p <= 1
    assert sign_flip_test(zero, values, draws=5000) == pytest.approx(p)


@given(st.lists(st.integers(-50, 50), min_size=3, max_size=10))
def test_rank_correlation_sees_order_only(values: list[int]):
    r = rank_correlation(values, [v**3 + 2 * v for v in values])
    assert math.isnan(r) if len(set(values)) == 1 else r == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean([]), "mean: got shape .0,.; expected a flat list of at least 1"),
        (lambda: sd([1.0]), "at least 2"),
        (lambda: mean([1.0, math.nan]), "1 of 2 numbers are not finite"),
        (lambda: paired_bootstrap_interval([1, 2], [1]), "2 and 1 numbers; items are paired"),
        (lambda: bootstrap_interval([1, 2], level=1.5), "level 1.5 is out of range"),
        (lambda: holm([0.5, 1.5]), "outside 0..1"),
    ],
)
def test_refusals(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
