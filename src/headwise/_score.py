"""Score a corpus of any size by attention influence: fixed windows of it, in order, in constant memory.

A window is so many documents (or characters) as they come; batches are made inside a window, by length. So what is
batched together follows from the corpus alone, never from when a job was stopped or how many workers it has.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import headwise
from headwise._scan import scan
from headwise._score_job import COLUMNS, Job, fingerprint
from headwise._texts import special_ids
from headwise.attend.addresses import select_heads
from headwise.attend.edit import Heads
from headwise.attend.head_map import HeadMap
from headwise.errors import InputError
from headwise.heads.influence import LEAST_LOSS, Influence, attention_influence, influence_heads
from headwise.hf.addresses import layout
from headwise.hf.inputs import context_length, vocabulary_size
from headwise.hf.load import Loaded, load
from headwise.tasks.documents import Corpus, Document, Place, repeated_share

__all__ = ["score_corpus"]

WINDOW, CHARACTERS = 512, 2**22  # of a window: documents, and characters after which it ends early
PART = 2**17  # documents of a file where the output is a folder
SHOWN = 20  # malformed records that the summary names
DIGITS = 6
Progress = Callable[[int, int, str], None]
Engine = Literal["local", "ray"]


@dataclass
class Window:
    """Documents that are scored together. number: of the first document. after: the place behind the last."""

    number: int
    documents: list[Document] = field(default_factory=list)

    @property
    def after(self) -> Place:
        return self.documents[-1].after


def windows(corpus: Corpus, start: Place, number: int, size: int) -> Iterator[Window]:
    """Cut a corpus into windows from a place on, which must be one where a window ends."""
    window, characters = Window(number), 0
    for document in corpus.read(start):
        window.documents.append(document)
        characters += len(document.text)
        if len(window.documents) == size or characters >= CHARACTERS:
            yield window
            window, characters = Window(window.number + len(window.documents)), 0
    if window.documents:
        yield window


@dataclass
class Stage:
    """What turns a window into rows: the same in one process and on a cluster."""

    model: nn.Module
    tokenizer: Any
    heads: list[Any]
    mode: Literal["uniform", "zero", "first"]
    prefix: int
    context: int
    stride: int
    batch_tokens: int

    def __call__(self, window: Window) -> list[dict[str, Any]]:
        """A row for each document, in order."""
        start = special_ids(self.tokenizer)
        pieces: list[list[int]] = []
        found: list[tuple[int, int, float | None]] = []  # first piece, pieces, repetition
        texts = [one.text for one in window.documents if one.error is None]
        given = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        tokenized = iter(given)
        skips: list[int] = []
        for document in window.documents:
            ids = [] if document.error is not None else next(tokenized)
            cut = _pieces(len(ids), self.context - len(start), self.stride)
            found.append((len(pieces), len(cut), repeated_share(ids)))
            for low, high, seen in cut:
                pieces.append([*start, *ids[low:high]])
                skips.append(len(start) + min(max(seen, self.prefix - low), high - low))
        scores = self._losses(pieces, skips)
        return [
            self._row(document, window.number + i, scores, *found[i]) for i, document in enumerate(window.documents)
        ]

    def _losses(self, pieces: list[list[int]], skips: list[int]) -> Influence:
        """Influence of all pieces; those with the same number of tokens to leave out are run together."""
        base, masked = (torch.full((len(pieces),), math.nan, dtype=torch.float64) for _ in range(2))
        tokens = torch.zeros(len(pieces), dtype=torch.long)
        for skip in sorted(set(skips)):
            chosen = [i for i, one in enumerate(skips) if one == skip]
            part = attention_influence(
                self.model, [pieces[i] for i in chosen], self.heads, mode=self.mode, prefix=skip,
                batch_tokens=self.batch_tokens,
            )  # fmt: skip
            base[chosen], masked[chosen], tokens[chosen] = part.base, part.masked, part.tokens
        return Influence(torch.full_like(base, math.nan), base, masked, tokens)

    def _row(
        self, document: Document, number: int, found: Influence, first: int, count: int, repetition: float | None
    ) -> dict[str, Any]:
        """Means over a document's pieces are weighted by their tokens."""
        part = slice(first, first + count)
        tokens = int(found.tokens[part].sum())
        base, masked = (
            float((losses[part].nan_to_num() * found.tokens[part]).sum()) / max(1, tokens)
            for losses in (found.base, found.masked)
        )
        flag = None
        if document.error is not None:
            flag = "malformed"
        elif not tokens:
            flag = "short"
        elif base < LEAST_LOSS:
            flag = "no-loss"
        row = {
            "number": number,
            "file": document.file,
            "line": document.line,
            "id": document.id,
            "domain": document.domain,
            "score": None if flag else _rounded((masked - base) / base),
            "base_loss": _rounded(base) if tokens else None,
            "masked_loss": _rounded(masked) if tokens else None,
            "tokens": tokens,
            "windows": count,
            "repetition": None if repetition is None else _rounded(repetition),
            "flag": flag,
            "error": document.error,
        }
        return {name: row[name] for name in COLUMNS}


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _pieces(length: int, room: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, how many of its tokens were read before) of the pieces of a document of `length` tokens."""
    if length <= room:
        return [(0, length, 0)]
    found = [(0, room, 0)]
    while found[-1][1] < length:
        low = found[-1][0] + stride
        found.append((low, min(length, low + room), found[-1][1] - low))
    return found


def score_corpus(
    corpus: str | os.PathLike[str],
    model: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: Any = None,
    *,
    out: str | os.PathLike[str],
    heads: Heads = None,
    head_map: HeadMap | None = None,
    mode: Literal["uniform", "zero", "first"] = "uniform",
    prefix: int = 0,
    context: int | None = None,
    stride: int | None = None,
    text: str | None = None,
    domain: str = "domain",
    id: str = "id",
    format: Literal["jsonl", "parquet"] | None = None,
    window: int = WINDOW,
    part_documents: int = PART,
    batch_tokens: int = 8192,
    engine: Engine = "local",
    workers: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every document of a corpus by attention influence and write a row for each, in order; taken up where it was
    stopped. Returns the summary.

    corpus: a file or folder of JSONL, text or Parquet, or "hub:NAME" (`headwise.tasks.Corpus`); text, domain and id
        name its fields. model, tokenizer: as in `headwise.scan`. out: a .jsonl or .parquet file, or a folder of parts
        of `part_documents` rows in `format`. Beside the rows stands a job file with everything that decides them.
    heads: a selection; None takes `influence_heads` of the retrieval scores (of head_map, else the map that the model
        ships with, else measured now). mode: as in `headwise.heads.attention_influence`.
    prefix: how many tokens of each document are read but do not count, beside special tokens.
    context: tokens that are read at once, None as many as the model reads (at most 4,096). stride: how far the windows
        of a longer document lie apart; None is a whole context, without overlap. Every token is counted once, in the
        first window that holds it; the first of a window counts where special tokens stand before it.
    window: documents that are scored together.
    engine: "ray" runs the same on Ray Data (``headwise[ray]``); workers: its actors, None is one fewer than cores.

    A record that cannot be read, a document without a token to predict (fewer than two, or none behind the prefix) and
    one whose loss is 0 have no score, and a flag: "malformed", "short", "no-loss". A kill costs the window at work; the
    same call goes on behind the last and ends with the same bytes, with the number of threads that the job began with.
    Raises InputError for a corpus, output or option that cannot be used, and for an output of a job with other options.
    """
    if engine not in ("local", "ray"):
        raise InputError(f"engine: {engine!r} is unknown; choose local or ray")
    for name, value in {"window": window, "part_documents": part_documents, "batch_tokens": batch_tokens}.items():
        if value < 1:
            raise InputError(f"{name}: {value}; expected at least 1")
    if prefix < 0:
        raise InputError(f"prefix: {prefix}; expected 0 or more tokens")
    say = progress or (lambda done, total, what: None)
    kind = Job.kind_of(out, format)
    if kind == "parquet":
        _need_pyarrow()
    source = Corpus(os.fspath(corpus), text, domain, id)
    say(0, 1, "loading the model")
    loaded = _loaded(model, tokenizer, device, dtype)
    chosen = _heads(loaded, heads, head_map, seed, say)
    limit = context_length(loaded.model, loaded.tokenizer)
    room = min(limit or 4096, 4096) if context is None else context
    if room < 4 + len(special_ids(loaded.tokenizer)) or (limit is not None and room > limit):
        raise InputError(f"context: {room} tokens; expected 8 to {limit or 'as many as the model reads'}")
    step = room - len(special_ids(loaded.tokenizer))
    if stride is not None and not 1 <= stride <= step:
        raise InputError(f"stride: {stride}; expected 1 to {step} tokens (a context without its special tokens)")
    before = torch.get_num_threads()
    recorded = Job.recorded(out)
    threads = int(recorded["threads"]) if recorded and "threads" in recorded else before
    parameter = next(loaded.model.parameters())
    header = {
        "headwise": headwise.__version__,
        "schema": 1,
        "corpus": fingerprint(source),
        "fields": {"text": text, "domain": domain, "id": id},
        "model": loaded.name,
        "weights": _weights(loaded.model),
        "heads": [str(head) for head in chosen],
        "mode": mode,
        "prefix": prefix,
        "context": room,
        "stride": stride or step,
        "window": window,
        "batch_tokens": batch_tokens,
        "part_documents": None if Path(out).suffix else part_documents,
        "format": kind,
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": threads,
        "torch": torch.__version__,
        "digits": DIGITS,
        "columns": list(COLUMNS),
    }
    stage = Stage(loaded.model, loaded.tokenizer, chosen, mode, prefix, room, stride or step, batch_tokens)
    torch.set_num_threads(threads)
    try:
        with Job(out, header, kind, part_documents) as job:
            if not job.state.done:
                found = windows(source, job.state.place, job.state.documents, window)
                if engine == "ray":
                    from headwise._score_ray import scored_on_ray

                    results = scored_on_ray(
                        stage, source, job.state.place, job.state.documents, window, workers, threads
                    )
                else:
                    results = ((one.after, stage(one)) for one in found)
                _write(job, results, source, say)
                job.finish()
            return _summary(job)
    finally:
        torch.set_num_threads(before)


def _write(job: Job, results: Iterable[tuple[Place, list[dict[str, Any]]]], source: Corpus, say: Progress) -> None:
    state, began = job.state, time.monotonic()
    documents, behind = state.documents, source.behind(state.place)
    for after, rows in results:
        for row in rows:
            _count(state, row)
        job.append([json.dumps(row, ensure_ascii=False) for row in rows], after)
        rate = (state.documents - documents) / max(1e-9, time.monotonic() - began)
        now = source.behind(after)
        if now is None or behind is None:
            say(0, 1, f"{state.documents:,} documents, {rate:,.0f} a second")
            continue
        left = (1 - now) * (time.monotonic() - began) / max(1e-9, now - behind)
        say(
            round(100 * now), 100, f"{state.documents:,} documents, {rate:,.0f} a second, {_clock(left)} left; per cent"
        )


def _clock(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _count(state: Any, row: Mapping[str, Any]) -> None:
    """The running figures of the summary; correlations from sums, so that they need no memory."""
    if row["flag"] is not None:
        state.flags[row["flag"]] = state.flags.get(row["flag"], 0) + 1
    if row["flag"] == "malformed" and len(state.malformed) < SHOWN:
        state.malformed.append(f"{row['file']}, line {row['line']}: {row['error']}")
    state.tokens += row["tokens"]
    if row["score"] is None:
        return
    pairs = {"length": math.log(row["tokens"]), "repetition": row["repetition"], "base_loss": row["base_loss"]}
    for name, x in pairs.items():
        if x is not None:
            y = row["score"]
            sums = state.sums.setdefault(name, [0.0] * 6)
            for i, term in enumerate((1.0, x, y, x * x, y * y, x * y)):
                sums[i] += term


def _correlation(sums: list[float] | None) -> float | None:
    if not sums or sums[0] < 3:
        return None
    n, x, y, xx, yy, xy = sums
    spread = (n * xx - x * x) * (n * yy - y * y)
    return None if spread <= 1e-12 * max(1.0, n * n * xx * yy) else _rounded((n * xy - x * y) / math.sqrt(spread))


def _summary(job: Job) -> dict[str, Any]:
    state = job.state
    scored = int(state.sums.get("length", [0])[0])
    return {
        "header": job.header,
        "documents": state.documents,
        "scored": scored,
        "tokens": state.tokens,
        "flags": dict(sorted(state.flags.items())),
        "malformed": state.malformed,
        # Scores compare documents of one domain and like lengths; these say how far that matters here.
        "correlations": {name: _correlation(state.sums.get(name)) for name in ("length", "repetition", "base_loss")},
        "files": [str(job.part_path(number)) for number in range(state.part)],
    }


def _loaded(model: Any, tokenizer: Any, device: Any, dtype: Any) -> Loaded:
    if isinstance(model, nn.Module):
        name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        found = Loaded(model=model, tokenizer=tokenizer, name=str(name))
    else:
        found = load("text" if model is None else os.fspath(model), device=device, dtype=dtype)
        found.tokenizer = tokenizer or found.tokenizer
    if found.tokenizer is None:
        raise InputError(f"model: {found.name} has no tokenizer; save one beside the model, or give one")
    if len(found.tokenizer) > vocabulary_size(found.model):
        raise InputError(f"tokenizer: it knows {len(found.tokenizer)} tokens, {found.name} fewer; give the model's own")
    return found


def _heads(loaded: Loaded, heads: Heads, given: HeadMap | None, seed: int, say: Progress) -> list[Any]:
    def retrieval() -> HeadMap:
        if given is not None:
            return given
        shipped = HeadMap.load(loaded.head_map) if loaded.head_map is not None else None
        if shipped is not None and "retrieval" in shipped.probes:
            return shipped
        return scan(loaded.model, loaded.tokenizer, probes="retrieval", seed=seed, progress=say)

    if heads is None:
        return influence_heads(retrieval())
    chosen = select_heads(heads, layout(loaded.model), scores=lambda probe: retrieval().of(probe), seed=seed)
    if not chosen:
        raise InputError("heads: the selection names no head; name at least one")
    return sorted(chosen)


def _weights(model: nn.Module) -> str:
    """A digest of the weights (a few numbers of each), so that a job does not go on under another model."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {some.tolist()}".encode())
    return digest.hexdigest()[:16]


def _need_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise InputError(
            'format: parquet needs pyarrow, which is not installed; pip install "headwise[data]"'
        ) from None
