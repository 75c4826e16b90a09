"""Needles in symbols: filler text that holds `Q key w1 ... wn` once and asks for it at its end."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.tasks.bigram_backcopy import BigramBackcopy
from headwise.tasks.episodes import Episodes, as_ids, check_length, distinct

__all__ = ["needle_episodes"]


def needle_episodes(
    batch: int,
    words: Sequence[int] | Int[Tensor, " n"],
    text: BigramBackcopy | None = None,
    *,
    ask: int,
    answer: int,
    length: int,
    size: int = 6,
    depth: float | Sequence[float] | None = None,
    bos: int = 0,
    generator: torch.Generator | None = None,
) -> Episodes:
    """`BOS filler Q key w1..wn filler ANS Q key` -> w1..wn.

    text: what the filler is drawn from; None means random words of the pool, so that any integer vocabulary will do.
    ask, answer: the ids of the marks `Q` and `ANS`. depth: where the needle stands in the filler, from 0 (behind BOS)
    to 1 (before the question), one number or one for each sequence; None draws it. The filler never holds the key or a
    word of its needle. Spans: `needle` (w1..wn in the filler), `key`.
    """
    pool = as_ids(words, "needle_episodes")
    room = length - (2 * size + 5)  # filler with its BOS: what the two tellings (Q key w1..wn) and ANS leave
    check_length("needle_episodes", length, 2 * size + 6, f"a needle of {size} tokens and its question")
    if depth is None:
        share = torch.rand(batch, generator=generator)
    else:
        share = torch.as_tensor(depth, dtype=torch.float32).expand(batch)
        if bool(((share < 0) | (share > 1)).any()):
            raise ValueError(f"needle_episodes: depth is {depth}; expected numbers from 0 to 1")
    chosen = distinct(pool, batch, size + 1, generator)
    if text is None:
        left = distinct(pool, batch, len(pool), generator)
        left = left[~(left[:, :, None] == chosen[:, None]).any(-1)].view(batch, -1)
        if left.shape[1] == 0:
            raise ValueError(
                f"needle_episodes: a needle of {size} and its key use all {len(pool)} words; give more words"
            )
        picks = torch.randint(0, left.shape[1], (batch, room), generator=generator)
        filler = left.gather(1, picks)
        filler[:, 0] = bos
    else:
        avoid = torch.where(chosen < text.num_tokens, chosen, text.bos)
        filler = text.sample(batch, generator, length=room, avoid=avoid)
    at = 1 + (share * (room - 1)).round().long()[:, None]  # filler tokens before the needle, BOS among them
    telling = torch.cat([torch.full((batch, 1), ask), chosen], dim=1)
    columns = torch.arange(room + size + 2)
    inside = (columns >= at) & (columns < at + size + 2)
    outside = torch.where(columns < at, columns, columns - (size + 2)).clamp(min=0, max=room - 1)
    body = torch.where(inside, telling.gather(1, (columns - at).clamp(0, size + 1)), filler.gather(1, outside))
    ids = torch.cat([body, torch.full((batch, 1), answer), telling], dim=1)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, -size:] = True
    spans = {"needle": torch.cat([at + 2, at + 2 + size], dim=1), "key": torch.cat([at + 1, at + 2], dim=1)}
    return Episodes("needles", ids, answers, spans)
