"""Needles in a haystack: prompts that hide one fact in a long text and then ask for it.

Paper: headwise/papers/retrieval_heads.py (Wu et al., 2024); `json` and `passkey` are the forms of "Lost in the Middle"
and "Landmark Attention".
"""

import difflib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.tasks.mixture import Mixture
from headwise.tasks.prose import fact, prose
from headwise.tasks.symbol_needles import needle_episodes

__all__ = ["CLASSIC_FACT", "Needle", "needle", "unigram_recall"]

STYLES = ("sentence", "json", "passkey", "symbols")
# The needle that most public results use: sentence, question, answer.
CLASSIC_FACT = (
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
    "What is the best thing to do in San Francisco?",
    "eat a sandwich and sit in Dolores Park on a sunny day",
)
PASSKEY_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(frozen=True)
class Needle:
    """One prompt. spans: where the answer stands in it, in tokens (in characters where there is no tokenizer).

    input_ids: the prompt, ending where the model must answer; None without a tokenizer. answer_ids: the tokens of the
    answer as they stand in the prompt. depth: where the needle lies, 0 (start) to 1 (end) of the haystack.
    """

    style: str
    text: str
    answer: str
    spans: tuple[tuple[int, int], ...]
    depth: float
    input_ids: Int[Tensor, " t"] | None = None
    answer_ids: Int[Tensor, " n"] | None = None

    @property
    def span(self) -> tuple[int, int]:
        """The first telling of the answer."""
        return self.spans[0]


def needle(
    style: str = "sentence",
    *,
    tokenizer: Callable[..., Any] | None = None,
    haystack: str | None = None,
    facts: Sequence[tuple[str, str, str]] | None = None,
    lengths: Sequence[int] = (512,),
    depths: Sequence[float | int] = (0.0, 0.25, 0.5, 0.75, 1.0),
    repeats: int = 1,
    size: int = 6,
    words: Sequence[int] | None = None,
    marks: tuple[int, int] | None = None,
    bos: int = 0,
    seed: int = 0,
) -> list[Needle]:
    """A prompt for every length, depth and repeat, in this order.

    style: `sentence` (a fact in prose), `json` (one key of many), `passkey` (a number in filler), `symbols` (integers:
    `Q key w1..wn` in filler, asked for by `ANS Q key`; no tokenizer).
    tokenizer: any fast tokenizer of transformers; lengths then count its tokens and are never exceeded. Without one
    they count characters. haystack: the text that hides a `sentence` or `passkey`, repeated where it is short; None
    generates one. facts: (sentence, question, answer) with the answer inside the sentence; None generates a fresh one
    for every prompt.
    size, words, marks, bos: of `symbols`: tokens in a needle, ids to draw from, ids of Q and ANS; None is the
    vocabulary of `Symbols` and its bigram text.
    Raises ValueError for an unknown style, a depth outside 0 to 1, a length that cannot hold needle and question, an
    empty haystack, a fact that does not hold its answer.
    """
    if style not in STYLES:
        near = difflib.get_close_matches(style, STYLES, 1)
        raise ValueError(
            f"needle: style is {style!r}; expected one of {', '.join(STYLES)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"needle: depth is {depth}; expected numbers from 0 (start) to 1 (end)")
    if haystack is not None and not haystack.strip():
        raise ValueError("needle: haystack is empty; give a text, or None to generate one")
    generator = torch.Generator().manual_seed(seed)
    wanted = [(length, float(depth)) for length in lengths for depth in depths for _ in range(repeats)]
    if style == "symbols":
        return [_symbols(length, depth, size, words, marks, bos, generator) for length, depth in wanted]
    prompts = []
    for index, (length, depth) in enumerate(wanted):
        if style == "sentence":
            chosen = fact(generator) if facts is None else facts[index % len(facts)]
            source = prose(8 * length, generator) if haystack is None else haystack
            prompts.append(
                _in_text(
                    style,
                    chosen,
                    source,
                    length,
                    depth,
                    tokenizer,
                    "\nBased on the content of the book, Question: {}\nAnswer:",
                )
            )
        elif style == "passkey":
            key = str(int(torch.randint(10_000, 100_000, (), generator=generator)))
            chosen = (
                f"The pass key is {key}. Remember it. {key} is the pass key.",
                "What is the pass key? The pass key is",
                key,
            )
            prompts.append(_in_text(style, chosen, haystack or PASSKEY_FILLER, length, depth, tokenizer, "\n{}"))
        else:
            prompts.append(_json(length, depth, tokenizer, generator))
    return prompts


def unigram_recall(predicted: Sequence[Hashable], answer: Sequence[Hashable]) -> float:
    """Share of the answer's tokens (words or ids) that the prediction holds, each counted as often as it stands there.

    ROUGE-1 recall without stemming.
    """
    if not len(answer):
        raise ValueError("unigram_recall: the answer is empty; recall is a share of its tokens")
    have, want = Counter(predicted), Counter(answer)
    return sum(min(times, have[token]) for token, times in want.items()) / len(answer)


def _symbols(
    length: int, depth: float, size: int, words: Any, marks: Any, bos: int, generator: torch.Generator
) -> Needle:
    mixture = Mixture()
    text, pool = (mixture.text, mixture.symbols.plain_words) if words is None else (None, words)
    if words is not None and marks is None:
        raise ValueError("needle: words without marks; give the ids of Q and ANS, two ids that are none of the words")
    ask, answer = mixture.symbols.ids("Q ANS").tolist() if marks is None else marks
    made = needle_episodes(
        1,
        pool,
        text,
        ask=ask,
        answer=answer,
        length=length + size,
        size=size,
        depth=depth,
        bos=bos,
        generator=generator,
    )
    ids = made.input_ids[0]
    name = mixture.symbols.text if words is None else lambda ids: " ".join(str(int(token)) for token in ids)
    start, end = made.spans["needle"][0].tolist()
    return Needle("symbols", name(ids[:-size]), name(ids[-size:]), ((start, end),), depth, ids[:-size], ids[-size:])


def _in_text(
    style: str, chosen: tuple[str, str, str], source: str, length: int, depth: float, tokenizer: Any, ask: str
) -> Needle:
    sentence, question, answer = chosen
    if answer not in sentence or not answer:
        raise ValueError(
            f"needle: the answer {answer!r} is not part of the sentence {sentence!r}; spans could not be found"
        )
    tail = ask.format(question)

    def build(cut: int) -> tuple[str, list[tuple[int, int]]]:
        hay = (source * (cut // len(source) + 1))[:cut]
        stop = hay.rfind(". ", 0, max(0, round(depth * cut))) + 2 if depth < 1 else cut
        front = hay[:stop] if stop > 1 else ""
        joint = "" if not front or front.endswith((" ", "\n")) else " "
        text = front + joint + sentence + " " + hay[len(front) :] + tail
        start, spans, at = len(front) + len(joint), [], 0
        while (at := sentence.find(answer, at)) >= 0:
            spans.append((start + at, start + at + len(answer)))
            at += len(answer)
        return text, spans

    return _fit(style, build, answer, length, depth, tokenizer)


def _json(length: int, depth: float, tokenizer: Any, generator: torch.Generator) -> Needle:
    def uuid() -> str:
        digits = "".join(f"{d:x}" for d in torch.randint(0, 16, (32,), generator=generator).tolist())
        return "-".join([digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]])

    pairs = [(uuid(), uuid()) for _ in range(length // 20 + 1)]  # a pair is more than 20 tokens in any tokenizer
    key, value = uuid(), uuid()

    def build(cut: int) -> tuple[str, list[tuple[int, int]]]:
        held = pairs[: min(len(pairs), cut // 84)]
        place = round(depth * len(held))
        lines = [f'"{a}": "{b}"' for a, b in [*held[:place], (key, value), *held[place:]]]
        head = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
        text = head + ",\n ".join(lines) + f'}}\n\nKey: "{key}"\nCorresponding value: "'
        start = text.index(value)
        return text, [(start, start + len(value))]

    return _fit("json", build, value, length, depth, tokenizer)


def _fit(
    style: str,
    build: Callable[[int], tuple[str, list[tuple[int, int]]]],
    answer: str,
    length: int,
    depth: float,
    tokenizer: Any,
) -> Needle:
    """The longest prompt of at most `length` tokens (characters): a search over the characters of the haystack."""

    def measure(text: str) -> tuple[int, Any]:
        if tokenizer is None:
            return len(text), None
        try:
            coded = tokenizer(text, return_offsets_mapping=True)
        except NotImplementedError as error:
            raise ValueError(
                "needle: the tokenizer gives no offsets, so spans are unknown; use its fast version"
            ) from error
        return len(coded["input_ids"]), coded

    least = measure(build(0)[0])[0]
    if least > length:
        raise ValueError(f"needle: length is {length}; needle and question alone take {least}; ask for longer prompts")
    low, high = 0, 64
    while measure(build(high)[0])[0] <= length and high < 64 * length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(build(middle)[0])[0] <= length else (low, middle)
    text, chars = build(low)
    coded = measure(text)[1]
    if coded is None:
        return Needle(style, text, answer, tuple(chars), depth)
    offsets = coded["offset_mapping"]
    spans = []
    for start, end in chars:
        held = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
        spans.append((held[0], held[-1] + 1))
    ids = torch.tensor(coded["input_ids"], dtype=torch.long)
    return Needle(style, text, answer, tuple(spans), depth, ids, ids[spans[0][0] : spans[0][1]])
