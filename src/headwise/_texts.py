"""Texts as a scan reads them: files checked, tokenized, cut into windows, batched."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.errors import InputError

__all__ = ["Batch", "Text", "Window", "batches", "default_text", "read_text", "readable", "special_ids", "windows"]

JSONL = (".jsonl", ".ndjson")
FIELDS = ("text", "content", "document")


@dataclass
class Text:
    """Documents with a name. Each document starts a window of its own, so none is read after another."""

    name: str
    documents: list[str]


@dataclass
class Window:
    """Token ids of one forward, and how each token reads. special: how many at the start and end belong to no text."""

    ids: list[int]
    pieces: list[str] = field(default_factory=list)
    special: tuple[int, int] = (0, 0)


@dataclass
class Batch:
    """Windows padded on the right. mask: None where nothing is padded."""

    ids: Tensor
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        return int(self.ids.numel() if self.mask is None else self.mask.sum())


def default_text() -> Text:
    """The page that ships with headwise: prose with repeated names, and a piece of code."""
    page = files("headwise.specimens") / "texts" / "page.txt"
    return Text("the shipped page", [page.read_text(encoding="utf-8")])


def read_text(source: Path | str | Sequence[str]) -> Text:
    """A text file or JSONL file (a Path), a text (a string), or several.

    JSONL holds a string a line, or an object whose text is under "text", "content" or "document".
    Raises InputError for a file that is missing, empty, no text, or JSONL without a text in a line.
    """
    if isinstance(source, Path):
        documents = _documents(source, _characters(source))
        return Text(source.name, documents)
    if isinstance(source, str):
        if len(source) < 1000 and "\n" not in source and Path(source).is_file():
            raise InputError(f"text: {source!r} is a file; give pathlib.Path({source!r}) to read it")
        return Text("the given text", _nonempty("text", [source]))
    if not all(isinstance(text, str) for text in source):
        raise TypeError("text: a list must hold strings, one a document")
    return Text("the given texts", _nonempty("text", list(source)))


def _characters(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"text: {path} cannot be read ({error.strerror or error}); check the path") from None
    if b"\0" in data[: 2**16] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"text: {path} is a binary file; give a text file or JSONL")
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"text: {path} is not UTF-8 text (byte {error.start}); convert it, or check it") from None


def _documents(path: Path, characters: str) -> list[str]:
    if path.suffix.lower() not in JSONL:
        return _nonempty(str(path), [characters])
    documents = []
    for number, line in enumerate(characters.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            raise InputError(f"text: {path}, line {number}: is not JSON; expected one JSON value a line") from None
        if isinstance(entry, dict):
            entry = next((entry[name] for name in FIELDS if name in entry), None)
        if not isinstance(entry, str):
            raise InputError(
                f"text: {path}, line {number}: has no text; expected a string, or a text under {FIELDS[0]!r}"
            )
        documents.append(entry)
    return _nonempty(str(path), documents)


def _nonempty(where: str, documents: list[str]) -> list[str]:
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise InputError(f"text: {where} is empty; give a text of at least two words")
    return kept


def windows(text: Text, tokenizer: Any, size: int, *, causal: bool) -> list[Window]:
    """Cut documents into windows of at most `size` tokens, special tokens included.

    Every window starts with the beginning-of-text token where the tokenizer has one (once), because a model never sees
    a text without it. Encoders also get what their tokenizer puts at the end.
    """
    start, end = _specials(tokenizer, causal)
    room = size - len(start) - len(end)
    if room < 2:
        raise InputError(f"window: {size} tokens leave room for {max(room, 0)} of the text; expected at least 8")
    found = []
    for document in text.documents:
        ids, pieces = _tokenized(tokenizer, document)
        for at in range(0, len(ids), room):
            part = ids[at : at + room]
            names = [*readable(tokenizer, start), *pieces[at : at + room], *readable(tokenizer, end)]
            if len(start) + len(part) > 1:  # a window of one token has no row to read
                found.append(Window([*start, *part, *end], names, (len(start), len(end))))
    if not found:
        raise InputError(f"text: {text.name} has fewer than two tokens; give a longer text")
    return found


def _specials(tokenizer: Any, causal: bool) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text; at the start at least its beginning-of-text token."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start, end = [], []
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            start, end = list(full[:at]), list(full[at + len(bare) :])
            break
    if not start and tokenizer.bos_token_id is not None:
        start = [tokenizer.bos_token_id]
    return start, [] if causal else end


def special_ids(tokenizer: Any) -> list[int]:
    """What comes before a text that a causal model reads: what the tokenizer puts there, at least its BOS token."""
    return _specials(tokenizer, True)[0]


def _tokenized(tokenizer: Any, document: str) -> tuple[list[int], list[str]]:
    """Token ids without special tokens, and the part of the document that each stands for."""
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        return ids, readable(tokenizer, ids)
    given = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pieces, seen = [], 0
    for _, stop in given["offset_mapping"]:
        # From where the last token ended, so that spaces belong to a token too. A token that is one of several bytes
        # of a character ends where the character does, and the later ones stand for nothing more.
        pieces.append(document[seen:stop] if stop > seen else "")
        seen = max(seen, stop)
    return list(given["input_ids"]), pieces


def readable(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens one by one as a person reads them."""
    if tokenizer is None:
        return [str(i) for i in ids]
    return [tokenizer.convert_tokens_to_string([t]) or str(t) for t in tokenizer.convert_ids_to_tokens(list(ids))]


def batches(found: Sequence[Window], budget: int, pad: int) -> Iterator[Batch]:
    """Windows in batches of at most `budget` tokens, longest first, so that little is padded."""
    order = sorted(found, key=lambda window: -len(window.ids))
    at = 0
    while at < len(order):
        longest = len(order[at].ids)
        part = order[at : at + max(1, budget // longest)]
        at += len(part)
        ids = torch.full((len(part), longest), pad)
        mask = torch.zeros(len(part), longest, dtype=torch.long)
        for row, window in enumerate(part):
            ids[row, : len(window.ids)] = torch.tensor(window.ids)
            mask[row, : len(window.ids)] = 1
        yield Batch(ids, None if bool(mask.all()) else mask)
