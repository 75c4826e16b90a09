"""Small generated tasks of three kinds, in which a few words of a sentence decide: classes, questions, inference.

classes: filler words and a few cue words of one class, as sentiment or topic; some labels are wrong.
questions: a passage of facts (a name, then its value) among filler; the question is a name, the answer its value.
inference: the same passages; the hypothesis is a name and a value: it follows, is contradicted, or says nothing known.
`read_text_classes` reads files of one's own in the first form.

Paper: headwise/papers/attention_adversarial_training.py (Kitada and Iyatomi, 2021).
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwise.errors import InputError

__all__ = [
    "SentenceBatch",
    "TextClasses",
    "cue_inference",
    "cue_questions",
    "cue_sentences",
    "read_text_classes",
    "word_ids",
]

PAD, UNKNOWN = 0, 1
FIRST_WORD = 2


@dataclass(frozen=True)
class SentenceBatch:
    """Sentences padded on the right with 0. cues: True at the words that decide. query_ids: the second of a pair.

    clean: the labels before some were made wrong.
    """

    input_ids: Int[Tensor, "n t"]
    labels: Int[Tensor, " n"]
    cues: Bool[Tensor, "n t"]
    clean: Int[Tensor, " n"]
    query_ids: Int[Tensor, "n q"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def mask(self) -> Bool[Tensor, "n t"]:
        """True for real words."""
        return self.input_ids != PAD

    def part(self, index: slice | Tensor) -> "SentenceBatch":
        """Some of the sentences."""
        values: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        for name, value in values.items():
            values[name] = None if value is None else value[index]
        return SentenceBatch(**values)


def cue_sentences(
    number: int,
    generator: torch.Generator,
    *,
    num_classes: int = 2,
    vocab_size: int = 300,
    cue_words: int = 15,
    lengths: tuple[int, int] = (8, 20),
    cues: tuple[int, int] = (1, 3),
    noise: float = 0.05,
) -> SentenceBatch:
    """Sentences of filler with some cue words of their class; a share `noise` of labels is replaced by another class.

    vocab_size counts padding and the unknown word; cue words of class c are `cue_words` ids from 2 + c * cue_words on.
    lengths, cues: smallest and largest number of words, and of cues among them.
    Raises ValueError for numbers that do not fit each other.
    """
    where = "cue_sentences"
    first_filler = FIRST_WORD + num_classes * cue_words
    if num_classes < 2 or cue_words < 1 or first_filler >= vocab_size:
        raise ValueError(
            f"{where}: {num_classes} classes of {cue_words} cue words leave no filler in a vocabulary of {vocab_size}"
        )
    if not 1 <= cues[0] <= cues[1] <= lengths[0] <= lengths[1]:
        raise ValueError(f"{where}: cues {cues} and lengths {lengths}; expected 1 <= least <= most cues <= words")
    if not 0 <= noise < 1:
        raise ValueError(f"{where}: noise is {noise}; expected a share from 0 to below 1")
    clean = torch.randint(num_classes, (number,), generator=generator)
    length = _between(lengths, number, generator)
    many = _between(cues, number, generator)
    ids = torch.randint(first_filler, vocab_size, (number, lengths[1]), generator=generator)
    place = torch.arange(lengths[1])
    real = place < length[:, None]
    # The places of the cues: the first of a random order of the real words.
    order = torch.rand(ids.shape, generator=generator).masked_fill(~real, 2.0).argsort(1).argsort(1)
    chosen = order < many[:, None]
    words = torch.randint(cue_words, ids.shape, generator=generator) + FIRST_WORD + clean[:, None] * cue_words
    ids = torch.where(chosen, words, ids).masked_fill(~real, PAD)
    wrong = torch.rand(number, generator=generator) < noise
    other = (clean + torch.randint(1, num_classes, (number,), generator=generator)) % num_classes
    return SentenceBatch(ids, torch.where(wrong, other, clean), chosen, clean)


def _between(limits: tuple[int, int], number: int, generator: torch.Generator) -> Tensor:
    return torch.randint(limits[0], limits[1] + 1, (number,), generator=generator)


def cue_questions(
    number: int,
    generator: torch.Generator,
    *,
    names: int = 8,
    values: int = 6,
    facts: int = 3,
    length: int = 14,
    vocab_size: int = 60,
) -> SentenceBatch:
    """Passages of `facts` facts of different names; the query is one of the names, the label the number of its value.

    Names are ids from 2 on, then values, then filler. A fact is two neighbouring words. cues: the fact asked for.
    """
    ids, named, told, starts = _passages("cue_questions", number, generator, names, values, facts, length, vocab_size)
    asked = torch.randint(facts, (number, 1), generator=generator)
    label = told.gather(1, asked)[:, 0]
    query = named.gather(1, asked) + FIRST_WORD
    return SentenceBatch(ids, label, _cues(ids, starts.gather(1, asked)), label, query)


def cue_inference(
    number: int,
    generator: torch.Generator,
    *,
    names: int = 8,
    values: int = 6,
    facts: int = 3,
    length: int = 14,
    vocab_size: int = 60,
) -> SentenceBatch:
    """Premises as in `cue_questions`, and hypotheses of a name and a value.

    Labels: 0 it follows, 1 it is contradicted (another value), 2 the name does not occur. cues: the fact about the
    name, none for label 2.
    """
    ids, named, told, starts = _passages("cue_inference", number, generator, names, values, facts, length, vocab_size)
    label = torch.randint(3, (number,), generator=generator)
    asked = torch.randint(facts, (number, 1), generator=generator)
    true = told.gather(1, asked)
    other = (true + torch.randint(1, values, (number, 1), generator=generator)) % values
    absent = torch.ones(number, names).scatter_(1, named, 0.0)
    name = torch.where(label[:, None] == 2, torch.multinomial(absent, 1, generator=generator), named.gather(1, asked))
    value = torch.where(label[:, None] == 1, other, true)
    query = torch.cat([name + FIRST_WORD, value + FIRST_WORD + names], 1)
    cues = _cues(ids, starts.gather(1, asked)) & (label != 2)[:, None]
    return SentenceBatch(ids, label, cues, label, query)


def _passages(
    where: str,
    number: int,
    generator: torch.Generator,
    names: int,
    values: int,
    facts: int,
    length: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Passages `[n t]`, the names and values of their facts `[n f]` and where these stand."""
    filler = FIRST_WORD + names + values
    if not 1 <= facts < names or values < 2 or length < 2 * facts or filler >= vocab_size:
        raise ValueError(
            f"{where}: {facts} facts of {names} names and {values} values in {length} of {vocab_size} words do not "
            "fit; a name must be left over, a fact takes two words, and filler words are needed"
        )
    ids = torch.randint(filler, vocab_size, (number, length), generator=generator)
    named = torch.rand(number, names, generator=generator).argsort(1)[:, :facts]
    told = torch.randint(values, (number, facts), generator=generator)
    # Facts take two words each: choose places among length - facts slots, then make room for the second words.
    slots = torch.rand(number, length - facts, generator=generator).argsort(1)[:, :facts].sort(1).values
    starts = slots + torch.arange(facts)
    ids.scatter_(1, starts, named + FIRST_WORD)
    ids.scatter_(1, starts + 1, told + FIRST_WORD + names)
    return ids, named, told, starts


def _cues(ids: Tensor, start: Tensor) -> Tensor:
    place = torch.arange(ids.shape[1])
    return (place == start) | (place == start + 1)


@dataclass(frozen=True)
class TextClasses:
    """Texts and the number of the label of each; `names` are the labels. pairs: the second text of each, or empty."""

    texts: list[str]
    labels: list[int]
    names: list[str]
    pairs: list[str]


def read_text_classes(
    path: str | Path, *, text: str = "text", label: str = "label", pair: str | None = None
) -> TextClasses:
    """Read labelled texts: JSONL with one object a line, or TSV with a header. text, label, pair: names of columns.

    Labels are numbered in sorted order, as numbers where all are whole numbers. This is how SST, IMDB, AG News, SNLI
    and the like come when saved as tables. Raises InputError for another ending, a column that is not there, a line
    that cannot be read, and a file without texts.
    """
    path = Path(path)
    wanted = [text, label] if pair is None else [text, label, pair]
    if path.suffix not in (".jsonl", ".ndjson", ".tsv"):
        raise InputError(f"{path}: its ending is {path.suffix!r}; give .jsonl, .ndjson or .tsv")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    rows: list[list[str]] = []
    for line, row in _rows(path):
        missing = [name for name in wanted if row.get(name) is None]
        if missing:
            raise InputError(f"{path}, line {line}: no {missing[0]!r}; its columns are {', '.join(map(str, row))}")
        rows.append([str(row[name]) for name in wanted])
    if not rows:
        raise InputError(f"{path}: it holds no texts")
    labels = {row[1] for row in rows}
    whole = all(name.lstrip("-").isdigit() for name in labels)
    names = sorted(labels, key=int) if whole else sorted(labels)
    number = {name: index for index, name in enumerate(names)}
    return TextClasses(
        [row[0] for row in rows], [number[row[1]] for row in rows], names, [row[2] for row in rows] if pair else []
    )


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".tsv":
            for row in (reader := csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)):
                yield reader.line_num, row
            return
        for line, content in enumerate(file, start=1):
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {line}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {line}: {type(row).__name__}, not an object")
            yield line, row


def word_ids(texts: list[str], *, least: int = 1) -> tuple[Callable[[list[str]], Int[Tensor, "n t"]], int]:
    """A function from texts to padded ids of lower-case words, and the size of its vocabulary.

    Words seen at least `least` times in the texts given here have ids of their own; others are the unknown word.
    """
    counts = Counter(word for one in texts for word in one.lower().split())
    known = sorted(word for word, count in counts.items() if count >= least)
    number = {word: index for index, word in enumerate(known, start=FIRST_WORD)}

    def encode(some: list[str]) -> Tensor:
        rows = [torch.tensor([number.get(word, UNKNOWN) for word in one.lower().split()] or [UNKNOWN]) for one in some]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    return encode, FIRST_WORD + len(known)
