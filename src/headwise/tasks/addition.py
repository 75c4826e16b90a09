"""Addition of one-digit numbers modulo ten, in symbols."""

import torch

from headwise.tasks.bigram_backcopy import BigramBackcopy
from headwise.tasks.episodes import Episodes, at, place
from headwise.tasks.symbols import Symbols

__all__ = ["addition_episodes"]


def addition_episodes(
    batch: int,
    symbols: Symbols,
    *,
    sums: int = 1,
    length: int | None = None,
    text: BigramBackcopy | None = None,
    generator: torch.Generator | None = None,
) -> Episodes:
    """`a + b = c .`, `sums` times in one sequence; c = (a + b) mod 10 and every c is an answer.

    The twin changes the second operand of the last sum. Spans of the last sum: `first`, `operator`, `second`, `equals`.
    """
    if sums < 1:
        raise ValueError(f"addition_episodes: sums is {sums}; expected at least 1")
    values = torch.randint(0, 10, (batch, sums, 2), generator=generator)
    other = values.clone()
    other[:, -1, 1] = (values[:, -1, 1] + torch.randint(1, 10, (batch,), generator=generator)) % 10

    def tell(values: torch.Tensor) -> torch.Tensor:
        def mark(name: str) -> torch.Tensor:
            return symbols.ids(name).expand(batch, sums)

        a, b, c = (symbols.digits[v] for v in (values[..., 0], values[..., 1], values.sum(-1) % 10))
        return torch.stack([a, mark("+"), b, mark("="), c, mark(".")], dim=2).flatten(1)[:, :-1]

    start = torch.full((batch,), 6 * (sums - 1))
    spans = {name: at(start + i) for i, name in enumerate(["first", "operator", "second", "equals"])}
    return place(
        "addition",
        tell(values),
        [6 * i + 4 for i in range(sums)],
        text=text,
        length=length,
        generator=generator,
        spans=spans,
        twin=tell(other),
    )
