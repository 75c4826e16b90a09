"""Coloured objects: a few things with their colours, then one is asked for."""

import torch

from headwise.tasks.bigram_backcopy import BigramBackcopy
from headwise.tasks.episodes import Episodes, at, distinct, place
from headwise.tasks.symbols import Symbols

__all__ = ["coloured_object_episodes"]


def coloured_object_episodes(
    batch: int,
    symbols: Symbols,
    *,
    objects: int = 3,
    closing: bool = True,
    length: int | None = None,
    text: BigramBackcopy | None = None,
    generator: torch.Generator | None = None,
) -> Episodes:
    """`thing colour thing colour thing colour COPY thing TO` -> that thing's colour; chance is 1 / objects.

    closing: whether TO stands between the asked thing and its colour; without it the colour follows the thing as in the
    scene, and an induction head suffices.
    The twin asks for another thing of the same scene. Spans: `object` and `colour` (the asked pair in the scene),
    `twin-colour`. Raises ValueError for fewer than two objects or more than there are colours.
    """
    if not 2 <= objects <= len(symbols.colours):
        raise ValueError(
            f"coloured_object_episodes: objects is {objects}; expected 2 to {len(symbols.colours)}, one colour each"
        )
    things = distinct(symbols.things, batch, objects, generator)
    colours = distinct(symbols.colours, batch, objects, generator)
    asked = torch.rand(batch, objects, generator=generator).argsort(-1)[:, :2]
    scene = torch.stack([things, colours], dim=2).flatten(1)
    copy, end = symbols.ids("COPY").expand(batch, 1), symbols.ids("TO" if closing else "").expand(batch, -1)

    def tell(which: torch.Tensor) -> torch.Tensor:
        return torch.cat([scene, copy, things.gather(1, which), end, colours.gather(1, which)], dim=1)

    one, other = asked[:, :1], asked[:, 1:]
    spans = {"object": at(2 * one[:, 0]), "colour": at(2 * one[:, 0] + 1), "twin-colour": at(2 * other[:, 0] + 1)}
    return place(
        "coloured_objects",
        tell(one),
        [2 * objects + 2 + closing],
        text=text,
        length=length,
        generator=generator,
        spans=spans,
        twin=tell(other),
    )
