"""Indirect objects: "A and B. B gave the cup to" asks for A, the person who is named once."""

import torch

from headwise.tasks.bigram_backcopy import BigramBackcopy
from headwise.tasks.episodes import Episodes, at, distinct, place
from headwise.tasks.symbols import Symbols

__all__ = ["indirect_object_episodes"]


def indirect_object_episodes(
    batch: int,
    symbols: Symbols,
    *,
    length: int | None = None,
    text: BigramBackcopy | None = None,
    generator: torch.Generator | None = None,
) -> Episodes:
    """`A AND B . S GAVE thing TO` -> the one of A and B who is not S.

    The twin lets the other person give, so that the answer changes. Spans: `io` (the answer's telling), `subject`
    (the first telling of S), `subject-again`. length: filler text in front makes the sequence that long.
    """
    people = distinct(symbols.people, batch, 2, generator)
    giver = torch.randint(0, 2, (batch, 1), generator=generator)
    thing = distinct(symbols.things, batch, 1, generator)

    def tell(giver: torch.Tensor) -> torch.Tensor:
        def mark(name: str) -> torch.Tensor:
            return symbols.ids(name).expand(batch, 1)

        subject, receiver = people.gather(1, giver), people.gather(1, 1 - giver)
        first, second = people[:, :1], people[:, 1:]
        parts = [first, mark("AND"), second, mark("."), subject, mark("GAVE"), thing, mark("TO"), receiver]
        return torch.cat(parts, dim=1)

    spans = {
        "io": at(2 * (1 - giver[:, 0])),
        "subject": at(2 * giver[:, 0]),
        "subject-again": at(torch.full((batch,), 4)),
    }
    return place(
        "indirect_objects",
        tell(giver),
        [8],
        text=text,
        length=length,
        generator=generator,
        spans=spans,
        twin=tell(1 - giver),
    )
