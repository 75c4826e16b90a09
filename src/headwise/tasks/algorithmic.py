"""Algorithms on short lists of numbers, in ranges of one's choice, recall by key, and chains of pointers.

All but `sort` are cumulative: the i-th answer is that of the first i numbers.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["ALGORITHMS", "Hops", "Recall", "algorithm", "number_lists", "pointer_hops", "recall_by_key"]

ALGORITHMS = ("sum", "min", "max", "median", "sort", "max-subarray")


def number_lists(
    count: int,
    length: int = 8,
    *,
    low: float = -2.0,
    high: float = 2.0,
    reject: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b n"]:
    """Lists of numbers: for each two ends drawn evenly from [low, high], then numbers drawn evenly between them.

    reject: ends that both lie in this range are drawn again, so that a list of a wide test range is not one of the
    training range. Raises ValueError for low above high, and where reject leaves nothing to draw.
    """
    if not low <= high or count < 1 or length < 1:
        raise ValueError(
            f"number_lists: count {count}, length {length}, low {low}, high {high}; expected 1 or more and low <= high"
        )
    if reject is not None and reject[0] <= low and high <= reject[1]:
        raise ValueError(f"number_lists: reject {reject} covers [{low}, {high}], nothing is left to draw; pass None")

    def draw(number: int) -> Tensor:
        return low + (high - low) * torch.rand(number, 2, generator=generator)

    ends = draw(count)
    while reject is not None:
        again = ((ends >= reject[0]) & (ends <= reject[1])).all(1)
        if not again.any():
            break
        ends[again] = draw(int(again.sum()))
    first, last = ends.sort(1).values.split(1, 1)
    return first + (last - first) * torch.rand(count, length, generator=generator)


def algorithm(task: str, values: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Answers of a task of `ALGORITHMS`. median: of an even number the middle of the two. max-subarray: not empty.

    Raises ValueError for another task.
    """
    if task == "sum":
        return values.cumsum(1)
    if task == "min":
        return values.cummin(1).values
    if task == "max":
        return values.cummax(1).values
    if task == "sort":
        return values.sort(1).values
    if task == "median":
        firsts = [values[:, :count].sort(1).values for count in range(1, values.shape[1] + 1)]
        return torch.stack([(one[:, (i - 1) // 2] + one[:, i // 2]) / 2 for i, one in enumerate(firsts, 1)], 1)
    if task == "max-subarray":
        sums = torch.nn.functional.pad(values.cumsum(1), (1, 0))
        return (sums[:, 1:] - sums.cummin(1).values[:, :-1]).cummax(1).values
    raise ValueError(f"algorithm: task is {task!r}; choose one of {', '.join(ALGORITHMS)}")


@dataclass(frozen=True)
class Recall:
    """Pairs of a key and a value, then a key that was seen: tokens `[b n d]` and the value's number `[b]`."""

    tokens: Float[Tensor, "b n d"]
    answers: Int[Tensor, " b"]


def recall_by_key(count: int, *, pairs: int = 7, symbols: int = 16, generator: torch.Generator | None = None) -> Recall:
    """Associative recall: one token a pair (unit vectors of key and value side by side), the last the key alone.

    Keys of a list differ. Raises ValueError for more pairs than symbols.
    """
    if not 1 <= pairs <= symbols or count < 1:
        raise ValueError(f"recall_by_key: count {count}, pairs {pairs}, symbols {symbols}; expected pairs <= symbols")
    keys = torch.rand(count, symbols, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(symbols, (count, pairs), generator=generator)
    asked = torch.randint(pairs, (count, 1), generator=generator)
    unit = torch.eye(symbols)
    tokens = torch.zeros(count, pairs + 1, 2 * symbols)
    tokens[:, :-1, :symbols], tokens[:, :-1, symbols:] = unit[keys], unit[values]
    tokens[:, -1, :symbols] = unit[keys.gather(1, asked)[:, 0]]
    return Recall(tokens, values.gather(1, asked)[:, 0])


@dataclass(frozen=True)
class Hops:
    """Lists of pointers and numbers: tokens `[b n n+1]`, pointers `[b n]`, numbers and answers `[b n]`.

    A token is the unit vector of the place that it points to, with its own number behind it.
    """

    tokens: Float[Tensor, "b n d"]
    pointers: Int[Tensor, "b n"]
    numbers: Float[Tensor, "b n"]
    answers: Float[Tensor, "b n"]


def pointer_hops(
    count: int,
    length: int = 8,
    *,
    hops: int = 2,
    low: float = -2.0,
    high: float = 2.0,
    generator: torch.Generator | None = None,
) -> Hops:
    """Chains of pointers: the i-th answer is the number of the place that `hops` pointers lead to from place i.

    Pointers are drawn evenly over all places, their own included, and numbers evenly from [low, high], each by itself,
    so that nothing but the right number helps. Which places must be read is in the tokens alone.
    Raises ValueError for hops, length or count below 1, and low above high.
    """
    if min(count, length, hops) < 1 or not low <= high:
        raise ValueError(
            f"pointer_hops: count {count}, length {length}, hops {hops}, low {low}, high {high}; expected 1 or more "
            "and low <= high"
        )
    numbers = low + (high - low) * torch.rand(count, length, generator=generator)
    pointers = torch.randint(length, (count, length), generator=generator)
    reached = pointers
    for _ in range(hops - 1):
        reached = pointers.gather(1, reached)
    tokens = torch.cat([torch.nn.functional.one_hot(pointers, length).to(numbers), numbers[..., None]], -1)
    return Hops(tokens, pointers, numbers, numbers.gather(1, reached))
