"""Plain generated prose and facts, for haystacks where the user gives no text."""

from collections.abc import Sequence

import torch

# ruff: noqa: SIM905 (words read better in a line than in a list)

__all__ = []

PEOPLE = "Anna Boris Clara David Elena Frank Greta Henry Irene Jonas Klara Lewis Maria Nils Olga Peter".split()
PLACES = "the harbour|the old mill|the school|the market|the station|the library|the north field|the bakery".split("|")
TIMES = "In the morning|After lunch|On Sunday|In the winter|Before the storm|Late at night|Every spring|That day".split(
    "|"
)
ACTIONS = (
    "walked slowly to|came back from|painted a picture of|waited for a friend at|told a long story about|"
    "read a letter in front of|thought again about|carried two heavy bags to"
).split("|")
RESULTS = (
    "nobody noticed|the rain stopped soon|the children laughed|it took the whole day|there was little to see|"
    "the dog stayed at home|the lamp was still burning|everybody had gone"
).split("|")
OBJECTS = "map key ring violin ladder mirror basket lantern coin ticket".split()
COLOURS = "red green yellow black silver blue white brown".split()
HIDING = "under the stairs|behind the stove|in the third drawer|below the bridge|inside the clock|above the door".split(
    "|"
)


def prose(characters: int, generator: torch.Generator) -> str:
    """Simple sentences, at least this many characters."""
    parts: list[str] = []
    size = 0
    while size < characters:
        when, who, did, where, so = (_pick(pool, generator) for pool in (TIMES, PEOPLE, ACTIONS, PLACES, RESULTS))
        parts.append(f"{when} {who} {did} {where}, and {so}. ")
        size += len(parts[-1])
    return "".join(parts)


def fact(generator: torch.Generator) -> tuple[str, str, str]:
    """A sentence, a question about it and the answer, whose words stand in the sentence."""
    who, colour, thing, hidden, near = (_pick(p, generator) for p in (PEOPLE, COLOURS, OBJECTS, HIDING, PLACES))
    answer = f"{hidden} in a {_pick(COLOURS, generator)} box near {near}"
    subject = f"the {colour} {thing} of {who}"
    return f"{subject[0].upper()}{subject[1:]} is kept {answer}.", f"Where is {subject} kept?", answer


def _pick(pool: Sequence[str], generator: torch.Generator) -> str:
    return pool[int(torch.randint(0, len(pool), (), generator=generator))]
