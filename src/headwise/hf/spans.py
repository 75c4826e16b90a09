"""Where a piece of a prompt is in its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headwise.errors import InputError

__all__ = ["Span", "find_spans", "token_span"]


@dataclass(frozen=True, order=True)
class Span:
    """Tokens ``start`` to ``end``, the end not included."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def shifted(self, by: int) -> "Span":
        """The same span behind `by` more tokens, such as left padding."""
        return Span(self.start + by, self.end + by)


def find_spans(
    tokenizer: Any, text: str, part: str, *, by: str = "characters", add_special_tokens: bool = True
) -> list[Span]:
    """Every occurrence of `part` in `text`, as spans of the tokens of `text`, in order.

    by: ``"characters"`` finds the characters and takes every token that holds one of them (needs the offset mapping of
    a fast tokenizer); ``"tokens"`` finds the token ids of `part`, alone or after a space, so it misses occurrences that
    are cut differently; ``"overlap"`` is the rule of the official retrieval-head code: the first window as long as
    `part` that holds more than 90 % of its set of ids, which tolerates other tokens at the borders and may be shifted.
    Raises ValueError when `part` does not occur.
    """
    if not part:
        raise ValueError("find_spans: part is empty; give the text to find")
    if by not in ("characters", "tokens", "overlap"):
        raise ValueError(f"find_spans: by is {by!r}; expected characters, tokens or overlap")
    if by == "characters":
        offsets = _offsets(tokenizer, text, add_special_tokens)
        found = [token_span(offsets, start, start + len(part)) for start in _occurrences(text, part)]
        return _present([span for span in found if span is not None], part, text, by)
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    wanted = list(tokenizer(part, add_special_tokens=False)["input_ids"])
    if by == "overlap":
        return _present(_first_overlap(ids, wanted), part, text, by)
    spaced = list(tokenizer(f" {part}", add_special_tokens=False)["input_ids"])
    spans = {span for piece in (wanted, spaced) if piece for span in _sublists(ids, piece)}
    # Where both forms match, the one with the space holds the other.
    inner = {b for a in spans for b in spans if a != b and a.start <= b.start and b.end <= a.end}
    return _present(sorted(spans - inner), part, text, by)


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> Span | None:
    """The tokens that hold characters ``start`` to ``end`` of a text; None where there is none.

    offsets: the tokenizer's offset mapping, one ``(start, end)`` a token; empty ones (special tokens) hold nothing.
    """
    inside = [index for index, (a, b) in enumerate(offsets) if a < end and start < b and a < b]
    return Span(inside[0], inside[-1] + 1) if inside else None


def _offsets(tokenizer: Any, text: str, add_special_tokens: bool) -> list[tuple[int, int]]:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} gives no offsets, as only fast tokenizers do; use by='tokens'"
        )
    made = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return [(int(a), int(b)) for a, b in made["offset_mapping"]]


def _occurrences(text: str, part: str) -> list[int]:
    """Starts of the occurrences, overlapping ones too."""
    found, at = [], text.find(part)
    while at >= 0:
        found.append(at)
        at = text.find(part, at + 1)
    return found


def _sublists(ids: list[int], piece: list[int]) -> list[Span]:
    size = len(piece)
    return [Span(i, i + size) for i in range(len(ids) - size + 1) if ids[i : i + size] == piece]


def _first_overlap(ids: list[int], wanted: list[int]) -> list[Span]:
    aim = set(wanted)
    for start in range(len(ids)):
        window = ids[start : start + len(wanted)]
        if aim and len(aim & set(window)) / len(aim) > 0.9:
            return [Span(start, start + len(window))]
    return []


def _present(spans: list[Span], part: str, text: str, by: str) -> list[Span]:
    if not spans:
        shown = part if len(part) <= 40 else f"{part[:37]}..."
        how = {"characters": "", "tokens": " as these tokens", "overlap": " by overlap of tokens"}[by]
        advice = "; check case and spaces" if by == "characters" else "; try by='characters'"
        raise ValueError(f"find_spans: {shown!r} does not occur{how} in the text of {len(text)} characters{advice}")
    return spans
