"""What the text specimen reads: a listed, hashed set of prose and code, and sequences made from it.

The list is `corpus/sources.json`: files of Python's standard library with the hash of the version that was used, and
our own texts. A retrain on another Python reads what it finds and says which files differ.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from headwise.specimens._stories import fact, story

__all__ = []

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
STORIES = 2500  # generated stories in the training text
HELD_OUT = ("calendar.py", "textwrap.py", "graphlib.py", "the_clock_that_waited.txt", "letters_from_bergen.txt")
TASKS = ("text", "repeats", "segments", "needles")
TEXT, COPY = 1, 2  # what a token counts as: running text, or something to copy from the context
ENDINGS = (  # question and answer after a text; the first is the one that published needle tests use
    ("\nBased on the content of the book, Question: {question}\nAnswer:", " {answer}"),
    ("\nQuestion: {question}\nAnswer:", " {answer}"),
    ("\nQuestion: {question}\nAnswer: {lead}", " {answer}"),
    ('\n"{question}" "{lead}', " {answer}"),
)


@dataclass(frozen=True)
class Source:
    """One text. kind: `prose` or `code`."""

    name: str
    kind: str
    text: str
    held_out: bool


def read_sources(note: Callable[[str], None] = lambda line: None) -> tuple[list[Source], list[str]]:
    """The texts of the list, and the names of the files that are missing here or differ from the hashed ones."""
    listed = json.loads((CORPUS / "sources.json").read_text(encoding="utf-8"))
    library, sources, changed = Path(sysconfig.get_paths()["stdlib"]), [], []
    for folder, part in ((library, "library"), (CORPUS, "own")):
        for name, digest in listed[part].items():
            data = (folder / name).read_bytes() if (folder / name).is_file() else b""
            if hashlib.sha256(data).hexdigest() != digest:
                changed.append(name)
            if data:
                sources.extend(_split(name, data.decode("utf-8")))
    if changed:
        note(
            f"train text: {len(changed)} of {len(listed['library']) + len(listed['own'])} files differ from the listed "
            f"ones (Python {listed['python']}): {', '.join(changed[:5])}; the weights will differ too"
        )
    return sources, changed


def _split(name: str, text: str) -> list[Source]:
    if name.endswith("topics.py"):  # one dict literal: subject -> reference text
        tree = ast.parse(text)
        topics = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
        return [
            Source(f"{name}:{topic}", "prose", prose, index % 8 == 3)
            for index, (topic, prose) in enumerate(sorted(topics.items()))
        ]
    held_out = Path(name).name in HELD_OUT
    if not name.endswith(".py"):
        return [Source(name, "prose", text, held_out)]
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    documents = [d for n in nodes if (d := ast.get_docstring(n)) is not None and len(d) > 200]
    prose = [Source(f"{name}:docstrings", "prose", "\n\n".join(documents), held_out)] if documents else []
    return [Source(name, "code", text, held_out), *prose]


class Streams:
    """Token streams: prose, stories and code to train on, and the held-out part of prose and code."""

    def __init__(self, tokenizer: Any, sources: list[Source], seed: int = 0, stories: int = STORIES) -> None:
        self.tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        rng = Random(seed)
        told = [story(rng) for _ in range(stories)]

        def stream(texts: list[str]) -> Tensor:
            coded = backend.encode_batch(texts, add_special_tokens=False)
            return torch.tensor([i for piece in coded for i in [*piece.ids, tokenizer.eos_token_id]])

        def chosen(kind: str, held_out: bool) -> list[str]:
            return [s.text for s in sources if s.kind == kind and s.held_out == held_out]

        own = [s.text for s in sources if s.name.endswith(".txt") and s.name != "LICENSE.txt" and not s.held_out]
        self.parts = {
            "prose": stream(chosen("prose", False)),
            "stories": stream(_shuffled(told + own * 4, rng)),
            "code": stream(chosen("code", False)),
            "held-out prose": stream(chosen("prose", True)),
            "held-out code": stream(chosen("code", True)),
        }
        stop = tokenizer.convert_tokens_to_ids(".")
        self.stops = {name: (ids == stop).nonzero()[:, 0] + 1 for name, ids in self.parts.items()}

    def window(self, part: str, length: int, generator: torch.Generator, *, sentence: bool = False) -> Tensor:
        """`length` tokens of a part, from anywhere or from the start of a sentence."""
        ids = self.parts[part]
        if sentence:
            stops = self.stops[part]
            stops = stops[stops < len(ids) - length]
            start = int(stops[_below(len(stops), generator)])
        else:
            start = _below(len(ids) - length, generator)
        return ids[start : start + length]


def _shuffled(items: list[str], rng: Random) -> list[str]:
    return sorted(items, key=lambda _: rng.random())


def _below(size: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, max(1, size), (), generator=generator))


def _mixed_part(generator: torch.Generator) -> str:
    return ("stories", "stories", "prose", "code")[_below(4, generator)]


def text_sequence(streams: Streams, length: int, generator: torch.Generator, part: str | None = None) -> Any:
    """A window of text; every token counts as text."""
    ids = streams.window(part or _mixed_part(generator), length - 1, generator)
    return _with_bos(streams, ids), _marks(length, TEXT, 1)


def repeat_sequence(streams: Streams, length: int, generator: torch.Generator, segment: int | None = None) -> Any:
    """A segment of random tokens, repeated to the end; the repeats are asked."""
    size = segment or 3 + _below(max(1, min(length // 2, 128) - 3), generator)
    if segment is None and _below(2, generator):  # half of the segments are short
        size = 3 + _below(max(1, length // 6), generator)
    tokens = torch.randint(3, len(streams.tokenizer), (size,), generator=generator)
    return _with_bos(streams, tokens.repeat(length // size + 1)[: length - 1]), _marks(length, COPY, size + 1)


def segment_sequence(streams: Streams, length: int, generator: torch.Generator) -> Any:
    """A piece of real text, other text, the piece again, and so on to the end; the returns of the piece are asked."""
    size = 4 + _below(max(1, length // 3), generator)
    part = _mixed_part(generator)
    piece = streams.window(part, size, generator)
    ids, marks = [piece], [torch.full((size,), TEXT)]
    while sum(map(len, ids)) < length:
        gap = streams.window(_mixed_part(generator), _below(max(2, length // 4), generator), generator)
        ids += [gap, piece]
        again = torch.full((size,), COPY)
        again[:2] = 0  # which piece returns is only known after its first tokens
        marks += [torch.full((len(gap),), TEXT), again]
    return _with_bos(streams, torch.cat(ids)[: length - 1]), torch.cat([torch.tensor([0]), *marks])[:length]


def needle_sequence(
    streams: Streams,
    length: int,
    generator: torch.Generator,
    *,
    part: str | None = None,
    ending: int | None = None,
    kind: str | None = None,
) -> Any:
    """Running text with a fact in it and a question at its end; the answer is asked.

    One text in three holds two facts of a kind.
    """
    rng = Random(_below(2**31, generator))

    def encode(text: str) -> Tensor:
        ids = streams.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.long)

    while True:
        told = fact(rng, kind)
        ask, reply = ENDINGS[rng.randrange(len(ENDINGS)) if ending is None else ending]
        names = {"question": told.question, "lead": told.lead, "answer": told.answer}
        inserts = [encode(" " + told.sentence)]
        if length >= 128 and rng.random() < 1 / 3:
            other = fact(rng, told.kind)
            if other.question == told.question:
                continue
            inserts.append(encode(" " + other.sentence))
            rng.shuffle(inserts)
        question, answer = encode(ask.format(**names)), encode(reply.format(**names))
        room = length - 1 - sum(map(len, inserts)) - len(question) - len(answer)
        if room >= 4:
            break
    hay = streams.window(part or ("stories", "stories", "prose")[rng.randrange(3)], room, generator, sentence=True)
    stop = streams.tokenizer.convert_tokens_to_ids(".")
    ends = [0, *((hay == stop).nonzero()[:, 0] + 1).tolist()]
    cuts = sorted(rng.choice(ends) for _ in inserts)
    pieces, last = [], 0
    for cut, insert in zip(cuts, inserts, strict=True):
        pieces += [hay[last:cut], insert]
        last = cut
    ids = torch.cat([*pieces, hay[last:], question, answer])
    marks = _marks(length, TEXT, 1)
    marks[-len(answer) - len(question) :] = 0
    marks[-len(answer) :] = COPY
    return _with_bos(streams, ids), marks


SEQUENCES: dict[str, Callable[..., Any]] = {
    "text": text_sequence,
    "repeats": repeat_sequence,
    "segments": segment_sequence,
    "needles": needle_sequence,
}


def batch(streams: Streams, counts: dict[str, int], length: int, generator: torch.Generator, **options: Any) -> Any:
    """ids [b t], marks [b t] (0, TEXT or COPY: what each token counts as), task of each sequence [b] (see TASKS)."""
    rows, marks, tasks = [], [], []
    for index, task in enumerate(TASKS):
        for _ in range(counts.get(task, 0)):
            ids, kinds = SEQUENCES[task](streams, length, generator, **options)
            rows.append(ids)
            marks.append(kinds)
            tasks.append(index)
    return torch.stack(rows), torch.stack(marks), torch.tensor(tasks)


def _marks(length: int, kind: int, start: int) -> Tensor:
    return torch.where(torch.arange(length) >= start, kind, 0)


def _with_bos(streams: Streams, ids: Tensor) -> Tensor:
    return torch.cat([torch.tensor([streams.tokenizer.bos_token_id]), ids])
