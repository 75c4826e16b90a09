"""The 128 symbols of the synthetic tasks: readable names for integers, so that scans and prompts can be read."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

# ruff: noqa: SIM905 (words read better in a line than in a list)

__all__ = ["Symbols"]

PEOPLE = "Ann Ben Cleo Dan Eve Finn Gus Hal Ida Jack Kim Leo Mia Ned Ola Pia Quin Ray Sue Tom Uma Vic Wes Zoe".split()
THINGS = (
    "apple ball bell boat book bowl box cake card chair clock coat"
    " coin cup drum flag fork hat key kite lamp map pen ring"
).split()
COLOURS = "red orange yellow green blue purple brown black".split()
TRIGGERS = "again echo twice".split()
WORDS = (
    "air bird bread bridge cloud corn day door dust field fire fish garden grass hill horse house island lake leaf"
    " milk moon night ocean paper rain river road salt sand sea sky snow star stone tree wind"
).split()
DIGITS = [str(digit) for digit in range(10)]
LABELS = "A B C D E F G H".split()
MARKS = ["Q", "ANS", "AND", "GAVE", "TO", "COPY", "OPT", "+", "=", ".", "?", ":", "<pad>"]


class Symbols:
    """Token 0 is BOS, 1 to 96 are words (people, things, colours, triggers, others), then digits, labels and marks."""

    bos = 0
    names: tuple[str, ...] = (
        "<bos>", *PEOPLE, *THINGS, *COLOURS, *TRIGGERS, *WORDS, *DIGITS, *LABELS, *MARKS,
    )  # fmt: skip

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def index(self) -> dict[str, int]:
        return {name: token for token, name in enumerate(self.names)}

    def ids(self, names: Sequence[str] | str) -> Int[Tensor, " n"]:
        """Ids of names, or of a line of names separated by spaces. Raises ValueError for a name that is none."""
        parts = names.split() if isinstance(names, str) else list(names)
        if unknown := [name for name in parts if name not in self.index]:
            raise ValueError(f"Symbols: {unknown[0]!r} is no symbol; expected names such as 'Ann', 'red', 'Q' or '7'")
        return torch.tensor([self.index[name] for name in parts], dtype=torch.long)

    def text(self, ids: Int[Tensor, " n"] | Sequence[int]) -> str:
        """The names of ids, separated by spaces."""
        return " ".join(self.names[int(token)] for token in ids)

    @cached_property
    def words(self) -> Int[Tensor, " n"]:
        """All 96 content words; those that are triggers among them come at `triggers`."""
        return torch.arange(1, 97)

    @cached_property
    def plain_words(self) -> Int[Tensor, " n"]:
        """Content words that are no triggers: what repeats and needles are made of."""
        return self.words[~torch.isin(self.words, self.triggers)]

    @cached_property
    def people(self) -> Int[Tensor, " n"]:
        return self.ids(PEOPLE)

    @cached_property
    def things(self) -> Int[Tensor, " n"]:
        return self.ids(THINGS)

    @cached_property
    def colours(self) -> Int[Tensor, " n"]:
        return self.ids(COLOURS)

    @cached_property
    def triggers(self) -> Int[Tensor, " n"]:
        return self.ids(TRIGGERS)

    @cached_property
    def digits(self) -> Int[Tensor, " n"]:
        return self.ids(DIGITS)

    @cached_property
    def labels(self) -> Int[Tensor, " n"]:
        return self.ids(LABELS)
