"""Indirect objects and coloured objects as English prompts in minimal pairs, and readers of the published files.

Every pair is two prompts that differ in one word, with the answers that follow them. Texts know no tokenizer;
`encode_pairs` makes ids of them and refuses, by name, what a tokenizer cuts into several tokens.
"""

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwise._files import read_json
from headwise.errors import InputError

__all__ = [
    "EncodedPairs",
    "MinimalPair",
    "coloured_object_pairs",
    "encode_pairs",
    "indirect_object_pairs",
    "load_colored_objects",
    "load_indirect_objects",
]

# ruff: noqa: SIM905 (words read better in a line than in a list)
NAMES = "Mary John Tom James Anna Paul Mark Kate Sarah David Alice Peter Laura Robert Emma Simon".split()
PLACES = "shop school park station market library garden office".split()
GIFTS = "drink book ring letter ticket flower basket jacket".split()
FORMS = (
    "When {a} and {b} went to the {place}, {s} gave a {gift} to",
    "After {a} and {b} left the {place}, {s} handed a {gift} to",
    "While {a} and {b} were at the {place}, {s} decided to give a {gift} to",
    "Then, {a} and {b} had a long day at the {place}. Afterwards {s} gave a {gift} to",
)
COLOURS = "red orange yellow green blue purple brown black".split()
OBJECTS = (
    "cup pencil book key plate bottle envelope scarf lamp stapler notebook candle mug ribbon coin ball umbrella"
).split()
PLACES_OF_THINGS = "table desk floor".split()
OPENINGS = ("there is", "you see", "I see")
THING = re.compile(r"\b(?:a|an) ([a-z]+) ([a-z]+)")
QUESTION = re.compile(r"What color is the ([a-z]+)\?")


@dataclass(frozen=True)
class MinimalPair:
    """Two prompts and the answers that follow them, with the space in front.

    form: which template it is made of. wrong: answers that the prompt offers and that are not its own.
    """

    prompt: str
    answer: str
    twin: str
    twin_answer: str
    form: str = ""
    wrong: tuple[str, ...] = ()


def indirect_object_pairs(
    n: int, *, form: Literal["both", "ABBA", "BABA"] = "both", names: Sequence[str] = NAMES, seed: int = 0
) -> list[MinimalPair]:
    """ "When A and B went to the shop, B gave a drink to" -> " A"; in the twin A gives, so that B receives.

    form: "ABBA" names the receiver first, "BABA" the giver first, "both" takes turns: a head that looks at a fixed
    place is right in one half only. Raises ValueError for fewer than two names.
    """
    if form not in ("both", "ABBA", "BABA"):
        raise ValueError(f"indirect_object_pairs: form is {form!r}; choose both, ABBA or BABA")
    if len(set(names)) < 2 or n < 1:
        raise ValueError(f"indirect_object_pairs: {n} pairs of {len(set(names))} names; give 1 or more, of 2 or more")
    draw, found = random.Random(seed), []
    for number in range(n):
        order = form if form != "both" else ("ABBA", "BABA")[number % 2]
        receiver, giver = draw.sample(list(dict.fromkeys(names)), 2)
        first, second = (receiver, giver) if order == "ABBA" else (giver, receiver)
        filled = {"a": first, "b": second, "place": draw.choice(PLACES), "gift": draw.choice(GIFTS)}
        text = draw.choice(FORMS)
        found.append(
            MinimalPair(
                text.format(s=giver, **filled),
                f" {receiver}",
                text.format(s=receiver, **filled),
                f" {giver}",
                order,
                (f" {giver}",),
            )
        )
    return found


def coloured_object_pairs(n: int, *, objects: int = 3, shots: int = 1, seed: int = 0) -> list[MinimalPair]:
    """ "Q: On the desk, there is a red cup, ... What color is the cup?" -> " Red"; the twin asks for another thing.

    objects: things of a scene, chance is 1 / objects. shots: worked examples in front, one in the official prompts.
    Raises ValueError for fewer than two objects, or more than there are colours.
    """
    if not 2 <= objects <= len(COLOURS) or shots < 0 or n < 1:
        raise ValueError(
            f"coloured_object_pairs: {n} pairs, {objects} objects, {shots} shots; expected 1 or more, 2 to "
            f"{len(COLOURS)}, and 0 or more"
        )
    draw, found = random.Random(seed), []
    for _ in range(n):
        examples = ""
        for _ in range(shots):
            scene, told = _scene(draw, objects)
            thing, colour = draw.choice(told)
            examples += f"{scene} What color is the {thing}?\nA: {colour.capitalize()}\n"
        scene, told = _scene(draw, objects)
        (thing, colour), (other, other_colour) = draw.sample(told, 2)
        found.append(
            MinimalPair(
                f"{examples}{scene} What color is the {thing}?\nA:",
                f" {colour.capitalize()}",
                f"{examples}{scene} What color is the {other}?\nA:",
                f" {other_colour.capitalize()}",
                "coloured objects",
                tuple(f" {one.capitalize()}" for _, one in told if one != colour),
            )
        )
    return found


def _scene(draw: random.Random, objects: int) -> tuple[str, list[tuple[str, str]]]:
    things, colours = draw.sample(OBJECTS, objects), draw.sample(COLOURS, objects)
    told = [(str(thing), str(colour)) for thing, colour in zip(things, colours, strict=True)]
    parts = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing}" for thing, colour in told]
    listed = f"{', '.join(parts[:-1])}, and {parts[-1]}" if objects > 2 else " and ".join(parts)
    return f"Q: On the {draw.choice(PLACES_OF_THINGS)}, {draw.choice(OPENINGS)} {listed}.", told


def load_colored_objects(path: str | os.PathLike[str]) -> list[MinimalPair]:
    """The published prompts of coloured objects: a JSON list of [prompt, label] pairs.

    The twin asks for the thing of the same scene that was told after the asked one (the first after the last).
    Raises InputError for a file of another kind, and for a prompt whose label is not in its scene.
    """
    found = []
    for number, (prompt, label) in enumerate(_pairs_of(path)):
        where = f"{os.fspath(path)}: prompt {number}"
        scene = prompt.rsplit("Q:", 1)[-1]
        asked, told = QUESTION.search(scene), [(thing, colour) for colour, thing in THING.findall(scene)]
        things = [thing for thing, _ in told]
        if asked is None or asked[1] not in things or len(told) < 2:
            raise InputError(f"{where} asks for none of the things of its scene ({', '.join(things) or 'none'})")
        place = things.index(asked[1])
        if told[place][1] != label.strip().lower():
            raise InputError(f"{where}: its label is {label!r} but the {asked[1]} of its scene is {told[place][1]}")
        other, colour = told[(place + 1) % len(told)]
        start = prompt.rindex(asked[0])
        twin = prompt[:start] + asked[0].replace(f" {asked[1]}?", f" {other}?") + prompt[start + len(asked[0]) :]
        wrong = tuple(f" {one.capitalize()}" for thing, one in told if thing != asked[1])
        found.append(
            MinimalPair(prompt, f" {label.strip()}", twin, f" {colour.capitalize()}", "coloured objects", wrong)
        )
    return found


def load_indirect_objects(path: str | os.PathLike[str]) -> list[MinimalPair]:
    """Prompts of indirect objects: a JSON list of [prompt, label] pairs, the label being the name that follows.

    The giver is the other name, told twice; in the twin the last telling of it is the receiver's name. Raises
    InputError for a file of another kind, and for a prompt in which no other name stands twice.
    """
    found = []
    for number, (prompt, label) in enumerate(_pairs_of(path)):
        receiver = label.strip()
        names = [word for word in re.findall(r"\b[A-Z][a-z]+\b", prompt) if word != receiver]
        twice = [name for name in dict.fromkeys(names) if names.count(name) == 2]
        if len(twice) != 1 or len(re.findall(rf"\b{re.escape(receiver)}\b", prompt)) != 1:
            raise InputError(
                f"{os.fspath(path)}: prompt {number} must tell the label {receiver!r} once and one other name twice"
            )
        giver = twice[0]
        start = [match.start() for match in re.finditer(rf"\b{re.escape(giver)}\b", prompt)][-1]
        twin = prompt[:start] + receiver + prompt[start + len(giver) :]
        order = "ABBA" if prompt.index(receiver) < prompt.index(giver) else "BABA"
        found.append(MinimalPair(prompt, f" {receiver}", twin, f" {giver}", order, (f" {giver}",)))
    return found


def _pairs_of(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    document = read_json(path)
    good = isinstance(document, list) and document
    if not good or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in document
    ):
        raise InputError(f"{os.fspath(path)}: holds no prompts; expected a JSON list of [prompt, label] pairs")
    return [(prompt, label) for prompt, label in document]


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as token ids, padded on the left: what `path_patch` takes, and its answers."""

    clean: dict[str, Int[Tensor, "b t"]]
    corrupt: dict[str, Int[Tensor, "b t"]]
    right: Int[Tensor, " b"]
    wrong: Int[Tensor, " b"]
    changed: Bool[Tensor, "b t"]
    """Where the two prompts of a pair differ."""


def encode_pairs(
    tokenizer: Any, pairs: Sequence[MinimalPair], *, add_special_tokens: bool = True, pad: int = 0
) -> EncodedPairs:
    """Ids of pairs under a tokenizer.

    Raises ValueError for answers of several tokens, naming the words, and for pairs whose prompts differ in length or
    in more than one token, naming the words that differ.
    """
    if not pairs:
        raise ValueError("encode_pairs: there are no pairs; give at least one")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    prompts, twins, answers = [], [], []
    several: dict[str, None] = {}
    uneven: dict[str, None] = {}
    for pair in pairs:
        one, other, said = ids(pair.prompt), ids(pair.twin), []
        for before, prompt, answer in ((one, pair.prompt, pair.answer), (other, pair.twin, pair.twin_answer)):
            whole = ids(prompt + answer)
            if whole[: len(before)] != before or len(whole) != len(before) + 1:
                several[answer.strip()] = None
            said.append(whole[-1])
        if len(one) != len(other) or sum(a != b for a, b in zip(one, other, strict=False)) != 1:
            words = [
                word for a, b in zip(pair.prompt.split(), pair.twin.split(), strict=False) if a != b for word in (a, b)
            ]
            uneven.update(dict.fromkeys(word.strip("?,.") for word in words))
        prompts.append(one)
        twins.append(other)
        answers.append(said)
    if several:
        raise ValueError(
            f"encode_pairs: under this tokenizer {', '.join(several)} are several tokens, or grow together with what "
            "stands before; leave these words out"
        )
    if uneven:
        raise ValueError(
            f"encode_pairs: under this tokenizer pairs differ in more than one token: {', '.join(uneven)}; leave these "
            "words out"
        )
    width = max(map(len, prompts))

    def batch(rows: list[list[int]]) -> dict[str, Tensor]:
        table = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": table, "attention_mask": mask}

    clean, corrupt = batch(prompts), batch(twins)
    right, wrong = torch.tensor(answers).T
    return EncodedPairs(clean, corrupt, right, wrong, clean["input_ids"] != corrupt["input_ids"])
