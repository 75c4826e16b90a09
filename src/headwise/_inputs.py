"""The forwards that a scan makes: a text in windows through the text towers, pictures through the vision tower."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise._texts import Batch, Text, Window, batches, default_text, readable, windows
from headwise.errors import InputError
from headwise.heads.induction_repeat import frequent_tokens
from headwise.hf.addresses import tower_kinds
from headwise.hf.inputs import as_inputs, context_length, frugal, read_images, takes, vocabulary_size
from headwise.hf.load import Loaded
from headwise.tasks.repeats import repeated_segments

__all__ = ["Example", "Inputs", "Pass", "Work"]


@dataclass
class Pass:
    """One forward: how to run it, how many tokens it reads."""

    run: Callable[[], Any]
    tokens: int


@dataclass
class Work:
    """All forwards of a scan. longest: tokens of the longest window."""

    passes: list[Pass] = field(default_factory=list)
    source: str = ""
    notes: list[str] = field(default_factory=list)
    longest: int = 0


@dataclass
class Example:
    """One forward over the start of the text, and the tokens of the rows of each tower, as a report takes them."""

    run: Callable[[], Any]
    texts: dict[str, dict[str, Any]]


@dataclass
class Inputs:
    """What a scan was given to read. text: None is the shipped page (or none, for a model that reads no text)."""

    loaded: Loaded
    text: Text | Tensor | None
    images: Path | None
    window: int
    batch_tokens: int

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @cached_property
    def causal(self) -> bool:
        return "causal" in tower_kinds(self.model).values()

    def passes(self) -> Work:
        """Every forward of the scan. Raises InputError where what was given does not suit the model."""
        work, model = Work(), self.model
        if self.images is not None:
            if not takes(model, "pixel_values"):
                raise InputError(f"images: {type(model).__name__} takes no pictures; leave --images out")
            pictures = read_images(model, self.images, self.loaded.processor)
            work.passes += [Pass(lambda p=p: _see(model, p), 1) for p in pictures]
            work.source = f"{len(pictures)} pictures of {self.images.name or self.images}"
        if self._reads_text:
            name, found, said = self._windows
            work.notes += said
            pad = _pad(self.loaded.tokenizer)
            work.passes += [Pass(lambda b=b: _read(model, b), b.tokens) for b in batches(found, self.batch_tokens, pad)]
            work.longest = max(len(window.ids) for window in found)
            tokens = sum(len(window.ids) - sum(window.special) for window in found)
            work.source = f"{name}, {tokens:,} tokens" + (f"; {work.source}" if work.source else "")
        elif self.text is not None:
            raise InputError(f"text: {type(model).__name__} reads no text; give pictures instead (--images DIR)")
        return work

    def example(self, size: int) -> Example | None:
        """The first tokens of the text, for a report; None where no text is read."""
        if not self._reads_text:
            return None
        model = self.model
        name, found, _ = self._windows
        first = found[0]
        window = Window(first.ids[:size], first.pieces[:size], first.special)
        batch = Batch(torch.tensor([window.ids]), None)
        pieces = window.pieces or [str(i) for i in window.ids]
        start, end = window.special
        special = [i for i in range(len(pieces)) if i < start or (len(pieces) < size and i >= len(pieces) - end)]
        text = {"name": name, "tokens": pieces, "special": special}
        texts = {}
        for tower in tower_kinds(model):
            if tower in ("", "text", "encoder"):
                texts[tower] = text
            elif tower == "decoder":
                start_id = getattr(model.config, "decoder_start_token_id", None) or 0
                shifted = [*readable(self.loaded.tokenizer, [start_id]), *pieces[:-1]]
                texts[tower] = {"name": f"{name}, as the decoder reads it", "tokens": shifted, "special": [0]}
        return Example(lambda: _read(model, batch), texts) if texts else None

    @cached_property
    def _reads_text(self) -> bool:
        model = self.model
        if getattr(model, "main_input_name", "input_ids") in ("input_features", "input_values"):
            raise InputError(f"model: {type(model).__name__} listens to audio, which scan cannot give it; use Python")
        if not takes(model, "input_ids"):
            if self.images is None:
                raise InputError(f"model: {type(model).__name__} reads pictures, not text; give them with --images DIR")
            return False
        return self.text is not None or self.loaded.tokenizer is not None or self.images is None

    @cached_property
    def _windows(self) -> tuple[str, list[Window], list[str]]:
        """What the text is called, its windows, and what there is to say about them."""
        model, tokenizer = self.model, self.loaded.tokenizer
        limit, known = context_length(model, tokenizer), vocabulary_size(model)
        size = min(self.window, limit or self.window)
        if isinstance(self.text, Tensor):
            return "given token ids", _given(self.text, limit, known), []
        if tokenizer is None:
            raise InputError(
                f"text: {self.loaded.name} has no tokenizer; save one beside the model, or give scan a tokenizer or "
                "token ids"
            )
        text = default_text() if self.text is None else self.text
        found, notes = windows(text, tokenizer, size, causal=self.causal), []
        ids = [i for window in found for i in window.ids]
        share = 0.0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id) / len(ids)
        if share > 0.5 and self.text is None:
            notes.append("The tokenizer does not know the shipped page: random words of its own, said twice, are read.")
            return "random words, said twice", _repeated(tokenizer, known, size), notes
        if share > 0.5:
            notes.append(f"The tokenizer does not know {share:.0%} of {text.name}: the scores say little.")
        if max(ids) >= known:
            raise InputError(
                f"tokenizer: it makes token {max(ids)} but {self.loaded.name} knows {known}; give the tokenizer that "
                "belongs to the model"
            )
        if len(found) > len(text.documents):
            notes.append(f"The text is read in {len(found):,} windows of up to {size:,} tokens, each by itself.")
        return text.name, found, notes


def _repeated(tokenizer: Any, known: int, size: int) -> list[Window]:
    """Eight windows of random words of a vocabulary, each said twice, for models of an artificial language."""
    words = [i for i in frequent_tokens(tokenizer, known) if i != tokenizer.bos_token_id]
    segment = min(len(words), (size - 1) // 2)
    bos = words[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    generator = torch.Generator().manual_seed(0)
    drawn = repeated_segments(
        8, words, length=2 * segment + 1, segment=(segment, segment), bos=bos, generator=generator
    )
    return [
        Window(ids, [f" {name.strip()}" for name in readable(tokenizer, ids)], (1, 0))
        for ids in drawn.input_ids.tolist()
    ]


def _given(ids: Tensor, limit: int | None, known: int) -> list[Window]:
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 2:
        raise InputError(f"text: token ids of shape {tuple(ids.shape)}; expected integers [b, t] with t at least 2")
    if limit is not None and ids.shape[1] > limit:
        raise InputError(f"text: {ids.shape[1]} tokens a row, but the model reads {limit}; cut the rows")
    if int(ids.min()) < 0 or int(ids.max()) >= known:
        raise InputError(f"text: token ids from {int(ids.min())} to {int(ids.max())}; the model knows 0 to {known - 1}")
    return [Window(row) for row in ids.tolist()]


def _pad(tokenizer: Any) -> int:
    pad = getattr(tokenizer, "pad_token_id", None)
    return 0 if pad is None else pad


def _read(model: nn.Module, batch: Batch) -> Any:
    """One forward of a batch of text through the towers that read text."""
    given: dict[str, Any] = {"input_ids": batch.ids}
    if batch.mask is not None:
        given["attention_mask"] = batch.mask
    features = getattr(model, "get_text_features", None)
    if callable(features):  # a model that compares texts and pictures: its forward wants both
        return features(**as_inputs(model, given))
    inputs = as_inputs(model, given)
    if batch.mask is not None and "decoder_input_ids" in inputs:
        inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return model(**inputs, **frugal(model))


def _see(model: nn.Module, picture: dict[str, Tensor]) -> Any:
    """One forward of a picture through the vision tower alone."""
    features = getattr(model, "get_image_features", None)
    return (features if callable(features) else model)(**as_inputs(model, picture))
