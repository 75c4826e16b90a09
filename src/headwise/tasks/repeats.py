"""Repeats: a random segment, told again and again to the end of the sequence; what induction heads are for."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.tasks.episodes import Episodes, as_ids, check_length, distinct

__all__ = ["repeated_segments"]


def repeated_segments(
    batch: int,
    words: Sequence[int] | Int[Tensor, " n"],
    *,
    length: int,
    segment: tuple[int, int | None] = (3, None),
    bos: int = 0,
    generator: torch.Generator | None = None,
) -> Episodes:
    """BOS, a segment of different random words, and its copies until `length` is full.

    segment: shortest and longest segment; None means a third of the sequence (or all words). Answers are all tokens
    from the second of the first copy on: before it nothing says that the segment has ended. `spans["segment"]` is the
    first telling. Raises ValueError where no segment fits twice.
    """
    pool = as_ids(words, "repeated_segments")
    low, high = segment
    high = min(len(pool), max(low, (length - 1) // 3) if high is None else high)
    if not 1 <= low <= high:
        raise ValueError(f"repeated_segments: segment is {segment} over {len(pool)} words; expected 1 <= low <= high")
    check_length("repeated_segments", length, 2 * low + 1, "two tellings and BOS")
    high = min(high, (length - 1) // 2)
    sizes = torch.randint(low, high + 1, (batch, 1), generator=generator)
    tokens = distinct(pool, batch, high, generator)
    columns = torch.arange(length - 1)
    body = tokens.gather(1, columns % sizes)
    ids = torch.cat([torch.full((batch, 1), bos), body], dim=1)
    answers = torch.arange(length) >= sizes + 2
    return Episodes("repeats", ids, answers, {"segment": torch.cat([torch.ones_like(sizes), 1 + sizes], dim=1)})
