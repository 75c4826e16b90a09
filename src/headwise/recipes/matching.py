"""Networks of equal cost: the width and the inner width at which a count of a network meets a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["MatchedSize", "match_size"]

CLOSE = 0.005  # of the budget: as good as equal
TRIES = 12


@dataclass(frozen=True)
class MatchedSize:
    """A width, the ratio of the inner width to it, and the count there."""

    width: int
    ratio: float
    count: int


def match_size(
    count: Callable[[int, float], int],
    target: int,
    widths: Sequence[int],
    *,
    ratio: float = 2.0,
    bounds: tuple[float, float] = (0.25, 8.0),
) -> MatchedSize:
    """The width and the ratio at which `count(width, ratio)` is nearest to target.

    count: parameters or operations; it grows with the ratio, of which int(width * ratio) alone matters (units of an MLP
    of a transformer, channels of a second stage). ratio: the one that is wanted; of the widths that meet the budget
    within half a percent the one with the ratio nearest to it (as a factor) is taken, and without such a width the
    one nearest to the budget. bounds: of the ratio.
    Raises ValueError for a budget that is no positive number, and without widths.
    """
    if target < 1 or not widths:
        raise ValueError(f"match_size: target is {target}, widths {list(widths)}; expected a budget and some widths")
    found = [_one_width(count, target, width, bounds) for width in widths]

    def order(size: MatchedSize) -> tuple[float, float]:
        off = abs(size.count / target - 1)
        return (0.0 if off <= CLOSE else off, abs(math.log(size.ratio / ratio)))

    return min(found, key=order)


def _one_width(count: Callable[[int, float], int], target: int, width: int, bounds: tuple[float, float]) -> MatchedSize:
    """By secants between inner widths: one step where the count is linear in it, as it is in an MLP's."""

    def at(units: int) -> MatchedSize:
        ratio = round((units + 0.5) / width, 6)
        return MatchedSize(width, ratio, count(width, ratio))

    low, high = (at(max(1, round(width * bound))) for bound in bounds)
    best = min(low, high, key=lambda size: abs(size.count - target))
    below, above = int(low.ratio * width), int(high.ratio * width)
    for _ in range(TRIES):
        if not low.count < target < high.count or above - below < 2 or abs(best.count / target - 1) <= CLOSE / 5:
            break
        step = (target - low.count) / (high.count - low.count) * (above - below)
        units = min(max(below + round(step), below + 1), above - 1)
        here = at(units)
        best = min(best, here, key=lambda size: abs(size.count - target))
        if here.count < target:
            low, below = here, units
        else:
            high, above = here, units
    return best
