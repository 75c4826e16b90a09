"""Addition of one-digit numbers in symbols."""

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
    modulus: int | None = None,
    length: int | None = None,
    text: BigramBackcopy | None = None,
    generator: torch.Generator | None = None,
) -> Episodes:
    """`a + b = c .`, `sums` times in one sequence; every c is an answer.

    modulus: None keeps to sums of one digit, c even over 0 to 9 and a over 0 to c
    (never 9, so that the twin has another sum); 10 takes every pair of digits and
    c = (a + b) mod 10, which is far harder to learn, because one operand alone says nothing about c.
    The twin changes the second operand of the last sum. Spans of the last sum: `first`, `operator`, `second`, `equals`.
    """
    if sums < 1:
        raise ValueError(f"addition_episodes: sums is {sums}; expected at least 1")
    if modulus not in (None, 10):
        raise ValueError(f"addition_episodes: modulus is {modulus}; expected None (no carry) or 10")
    if modulus is None:
        total = torch.randint(0, 10, (batch, sums), generator=generator)
        first = (torch.rand(batch, sums, generator=generator) * (total + 1).clamp(max=9)).long()
        values = torch.stack([first, total - first], dim=2)
        room = 10 - values[:, -1, 0]  # second operands that keep to one digit, at least two of them
    else:
        values = torch.randint(0, 10, (batch, sums, 2), generator=generator)
        room = torch.full((batch,), 10)
    other = values.clone()
    step = 1 + (torch.rand(batch, generator=generator) * (room - 1)).long()
    other[:, -1, 1] = (values[:, -1, 1] + step) % room

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
