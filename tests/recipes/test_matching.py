"""Sizes that meet a budget: against a search through all of them."""

import pytest

from headwise.recipes.matching import match_size


def linear(width: int, ratio: float) -> int:
    """An MLP and four projections of two layers."""
    return 2 * (4 * width**2 + 2 * width * int(width * ratio))


def curved(width: int, ratio: float) -> int:
    wide = int(width * ratio)
    return 9 * (width**2 + width * wide + 3 * wide**2)


@pytest.mark.parametrize("count", [linear, curved])
@pytest.mark.parametrize("target", [9_000, 20_011, 61_234])
def test_the_budget_is_met_with_the_ratio_nearest_to_the_wanted_one(count, target):
    widths = (16, 24, 32, 40, 48, 56, 64, 96)
    found = match_size(count, target, widths, ratio=2.0, bounds=(0.25, 8.0))
    assert found.count == count(found.width, found.ratio)
    every = {
        (width, units): abs(count(width, units / width + 1e-9) / target - 1)
        for width in widths
        for units in range(width // 4, 8 * width + 1)
    }
    off = abs(found.count / target - 1)
    assert off <= max(0.005, min(every.values()) + 1e-12)

    def from_two(ratio: float) -> float:
        return max(ratio, 2) / min(ratio, 2)

    for (width, units), other in every.items():  # no other width that meets it has a ratio nearer to 2
        if off <= 0.005 and width != found.width and other <= 0.001:
            assert from_two(units / width) > 0.97 * from_two(found.ratio)


def test_a_budget_out_of_reach_gives_the_nearest():
    small = match_size(linear, 10, (16, 32), bounds=(0.5, 4.0))
    assert (small.width, int(small.width * small.ratio)) == (16, 8) and small.count == linear(16, 0.5)
    large = match_size(linear, 10**9, (16, 32), bounds=(0.5, 4.0))
    assert (large.width, int(large.width * large.ratio)) == (32, 128)


def test_no_budget_is_refused():
    with pytest.raises(ValueError, match=r"target is 0, widths \[16\]"):
        match_size(linear, 0, (16,))
    with pytest.raises(ValueError, match=r"widths \[\]"):
        match_size(linear, 100, ())
