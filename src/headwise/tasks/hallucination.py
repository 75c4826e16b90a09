"""How often a text names what a picture does not show: CHAIR for captions, yes-or-no polling (POPE) for questions.

CHAIR: Rohrbach et al., 2018; polling: Li et al., 2023 (POPE).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Chair", "Polling", "chair", "polling"]


@dataclass(frozen=True)
class Chair:
    """chair_s: share of captions with a named object that is not there. chair_i: of all objects that captions name (an
    object counts once a caption), the share that is not there; nan where nothing is named. recall: share of the objects
    that are there that their caption names. length: mean number of words. Read the last two with the first two: a
    caption that says less hallucinates less.
    """

    chair_s: float
    chair_i: float
    recall: float
    length: float


def chair(
    captions: Sequence[str],
    objects: Sequence[Collection[str]],
    synonyms: Mapping[str, Collection[str]] | None = None,
) -> Chair:
    """CHAIR of captions against what is in their pictures.

    objects: the names of the objects of each picture. synonyms: object name -> other words for it (of one word or
    more); every object that is to be noticed must be in `objects` of some picture or here. A caption is read as lower
    case words; longer names are looked for first, so that "hot dog" is no dog.
    Raises ValueError for lists of different lengths, none at all, and a word that means two objects.
    """
    if len(captions) != len(objects) or not captions:
        raise ValueError(f"chair: {len(captions)} captions but objects of {len(objects)} pictures; they must match")
    names = {name for held in objects for name in held} | set(synonyms or {})
    meaning = {_words(name): name for name in sorted(names)}
    for name, others in (synonyms or {}).items():
        for other in others:
            if meaning.setdefault(_words(other), name) != name:
                raise ValueError(f"chair: {other!r} means {meaning[_words(other)]!r} and {name!r}; it can mean one")
    longest = max(map(len, meaning), default=1)
    with_wrong = named = wrong = found = there = words = 0
    for caption, held in zip(captions, objects, strict=True):
        text, said, at = _words(caption), set(), 0
        while at < len(text):
            size = next((n for n in range(longest, 0, -1) if text[at : at + n] in meaning), 0)
            if size:
                said.add(meaning[text[at : at + size]])
            at += max(1, size)
        absent = said - set(held)
        with_wrong += bool(absent)
        named, wrong, words = named + len(said), wrong + len(absent), words + len(text)
        found, there = found + len(said & set(held)), there + len(set(held))
    return Chair(
        with_wrong / len(captions),
        wrong / named if named else float("nan"),
        found / there if there else float("nan"),
        words / len(captions),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[\w'-]+", text.lower()))


@dataclass(frozen=True)
class Polling:
    """Of yes-or-no answers, "yes" being the positive class: accuracy, precision, recall, F1, share of yes; unread is
    the share of answers that are neither. Precision is 0 where nobody says yes, F1 where nothing right is found."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float
    unread: float


def polling(answers: Sequence[str | bool | None], truth: Sequence[bool]) -> Polling:
    """Score yes-or-no answers.

    answers: texts, whose first word of "yes" and "no" counts, or booleans; None, and a text with neither word, is wrong
    and counted as unread. Raises ValueError for lists of different lengths, or none.
    """
    if len(answers) != len(truth) or not answers:
        raise ValueError(f"polling: {len(answers)} answers but {len(truth)} questions; they must match")
    read = [_said(answer) if isinstance(answer, str) else answer for answer in answers]
    pairs = list(zip(read, map(bool, truth), strict=True))
    hits = sum(said is True and right for said, right in pairs)
    yes = sum(said is True for said in read)
    positives = sum(map(bool, truth))
    precision, recall = hits / yes if yes else 0.0, hits / positives if positives else float("nan")
    return Polling(
        accuracy=sum(said == right for said, right in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes=yes / len(pairs),
        unread=sum(said is None for said in read) / len(pairs),
    )


def _said(text: str) -> bool | None:
    found = [word for word in _words(text) if word in ("yes", "no")]
    return found[0] == "yes" if found else None
