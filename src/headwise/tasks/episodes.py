"""What every synthetic task hands out: sequences, which of their tokens the task determines, and where things stand."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.tasks.bigram_backcopy import BigramBackcopy

__all__ = ["Episodes", "answer_accuracy"]


@dataclass(frozen=True)
class Episodes:
    """b sequences of t tokens, nothing padded.

    answers: True at the tokens that the task determines; token i is predicted by the logits of row i - 1.
    spans: name -> [start, end) in each sequence (what to look for, where it stands).
    twin: the counterfactual sequences of equal length, where the task has them: the same prompt with another answer.
    """

    task: str
    input_ids: Int[Tensor, "b t"]
    answers: Bool[Tensor, "b t"]
    spans: dict[str, Int[Tensor, "b 2"]] = field(default_factory=dict)
    twin: Int[Tensor, "b t"] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def rows(self) -> Bool[Tensor, "b t"]:
        """The rows whose output is an answer: `answers` one step earlier."""
        return torch.cat([self.answers[:, 1:], torch.zeros_like(self.answers[:, :1])], dim=1)


def answer_accuracy(logits: Float[Tensor, "b t v"], episodes: Episodes) -> dict[str, float]:
    """Teacher-forced accuracy on the answers: `tokens` (share of tokens right), `sequences` (share wholly right)."""
    right = logits[:, :-1].argmax(-1) == episodes.input_ids[:, 1:]
    asked = episodes.answers[:, 1:]
    return {
        "tokens": float(right[asked].float().mean()),
        "sequences": float((right | ~asked).all(-1).float().mean()),
    }


def check_length(where: str, length: int, needed: int, what: str) -> None:
    """Raise ValueError where an episode does not fit."""
    if length < needed:
        raise ValueError(f"{where}: length is {length}; {what} need at least {needed} tokens; ask for longer sequences")


def distinct(pool: Int[Tensor, " n"], batch: int, count: int, generator: torch.Generator | None) -> Int[Tensor, "b c"]:
    """`count` different members of the pool for each of `batch` sequences."""
    if count > len(pool):
        raise ValueError(f"distinct: {count} different tokens asked of a pool of {len(pool)}; give a larger pool")
    return pool[torch.rand(batch, len(pool), generator=generator).argsort(-1)[:, :count]]


def as_ids(pool: Sequence[int] | Int[Tensor, " n"], where: str) -> Int[Tensor, " n"]:
    """A pool of token ids as a tensor; it must hold different ids."""
    ids = torch.as_tensor(pool, dtype=torch.long)
    if ids.ndim != 1 or len(ids) == 0 or len(ids.unique()) != len(ids):
        raise ValueError(f"{where}: the pool of tokens is {tuple(ids.tolist())[:8]}...; give different ids in one list")
    return ids


def place(
    task: str,
    body: Int[Tensor, "b n"],
    answers: Sequence[int],
    *,
    text: BigramBackcopy | None,
    length: int | None,
    generator: torch.Generator | None,
    spans: dict[str, Int[Tensor, "b 2"]] | None = None,
    twin: Int[Tensor, "b n"] | None = None,
    bos: int = 0,
) -> Episodes:
    """Put BOS and filler text in front of a body, so that it ends a sequence of `length` tokens.

    answers: columns of the body; spans: relative to the body. The filler holds no token of its body (or of its twin),
    so that what the answer depends on stands in the body alone. Without `text`, BOS alone comes before the body.
    """
    batch, size = body.shape
    check_length(f"tasks.{task}", size + 1 if length is None else length, size + 1, "these episodes")
    front = torch.full((batch, 1), bos)
    if length is not None and length > size + 1:
        if text is None:
            raise ValueError(
                f"tasks.{task}: length is {length} but there is no text to fill it; give text= or no length"
            )
        avoid = body if twin is None else torch.cat([body, twin], dim=1)
        avoid = torch.where(avoid < text.num_tokens, avoid, text.bos)  # BOS never comes anyway
        front = text.sample(batch, generator, length=length - size, avoid=avoid)
    offset = front.shape[1]
    mask = torch.zeros(batch, offset + size, dtype=torch.bool)
    mask[:, [offset + column for column in answers]] = True
    return Episodes(
        task,
        torch.cat([front, body], dim=1),
        mask,
        {name: span + offset for name, span in (spans or {}).items()},
        None if twin is None else torch.cat([front, twin], dim=1),
    )


def at(columns: Int[Tensor, " b"]) -> Int[Tensor, "b 2"]:
    """Spans of one token each."""
    return torch.stack([columns, columns + 1], dim=1)
