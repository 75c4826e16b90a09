"""Retrieval heads: heads whose strongest attention lands on the very token of the context that the model copies next.

At a decoding step with output w, head h hits where its heaviest key j lies in the answer's span and holds w. Its score
is the share of the answer's tokens that it hits, averaged over the prompts that the model answers. Only the last row of
weights is looked at, O(t d) a head and step, and only its argmax is kept; the prompt itself runs fused.

Paper: headwise/papers/retrieval_heads.py (Wu et al., ICLR 2025).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout
from headwise.attend.head_map import HeadMap
from headwise.attend.read import Probe, Reading
from headwise.heads.decoding import (
    Case,
    Prompt,
    Span,
    batched,
    checked_cases,
    checked_targets,
    decode,
    force,
    stop_ids,
)
from headwise.hf.addresses import layout
from headwise.hf.inputs import vocabulary_size
from headwise.tasks.needles import unigram_recall
from headwise.tasks.rouge import rouge1_recall

__all__ = ["StrongestKeys", "copy_hits", "copy_scores", "retrieval_scores"]

PROBE = "retrieval"


def retrieval_scores(
    model: nn.Module,
    prompts: Sequence[Prompt] | Int[Tensor, "b t"],
    *,
    spans: Sequence[Span | Sequence[Span]] | None = None,
    max_new_tokens: int = 50,
    stop: int | Iterable[int] | None = None,
    min_recall: float | None = 0.5,
    unique: bool = True,
    tokenizer: Any = None,
    batch_tokens: int = 16384,
) -> HeadMap:
    """Score every head while the model answers greedily: a map with the probe "retrieval" and its runs.

        score_h = mean over answered prompts of |{w : h hits w}| / |{tokens of the answer}|

    prompts: token ids, ending where the model must answer, or needles (`headwise.tasks.needle`), which know their
        spans. spans: where the answer stands in each prompt, (start, end) in its tokens, the end not included; several
        where it is told several times.
    stop: token ids that end an answer (the official code stops at a newline); None means the model's end of text.
    min_recall: a prompt counts as answered, and as a run, if the ROUGE-1 recall of the span exceeds this; None counts
        all. Recall is of stemmed words where a tokenizer is given, of token ids otherwise.
    unique: count each token of the answer once, as the paper defines it. False adds 1 / n at every hit, n tokens in the
        span, as the official code does; scores above 1 then occur.
    batch_tokens: prompts are padded on the left and run together up to so many tokens.

    A head counts as a retrieval head from a score of 0.1: `map.select(threshold=0.1)`; `map.activation_frequency()` is
    the share of runs in which a head hits at all. Ties of weights go to the lower key. A key is a place in the prompt,
    whatever the padding and however much of it a sliding cache still holds; padding is never one. Edits that are open
    on the model act, so that heads can be scored while others are ablated.

    >>> heads = retrieval_scores(model, needle("symbols", lengths=[64]))  # doctest: +SKIP
    >>> heads.select(threshold=0.1)  # doctest: +SKIP
    [Head(layer=1, head=2), Head(layer=1, head=0)]

    Raises ValueError for a span that is empty or outside its prompt, a prompt beyond the model's context, and when no
    prompt was answered; UnsupportedModel for a model that does not generate, has an encoder, or is off the attention
    interface.

    Notes: decoding is always greedy, whatever the model's generation config says. With learned sink logits a head whose
    sink outweighs every key hits nothing. The official code looks for the needle by the overlap of token sets and
    scores 0 without a word where it finds none; here the caller says where it stands (`headwise.hf` finds spans).
    """
    where = "retrieval_scores"
    task = _Task.of(where, model, prompts, spans, tokenizer, min_recall, unique)
    ends = stop_ids(where, model, stop)
    if max_new_tokens < 1:
        raise ValueError(f"{where}: max_new_tokens is {max_new_tokens}; expected at least 1")

    def run(cases: list[Case]) -> Iterator[_Run]:
        reader = StrongestKeys()
        answers, padding = decode(model, [case.ids for case in cases], max_new_tokens, ends, reader)
        keys = reader.positions(task.layout)
        for row, answer in enumerate(answers):
            yield _Run(answer, torch.tensor(answer), keys[row, :, : len(answer)] - padding[row])

    return task.score(run, batch_tokens, max_new_tokens)


def copy_scores(
    model: nn.Module,
    prompts: Sequence[Prompt] | Int[Tensor, "b t"],
    targets: Sequence[Int[Tensor, " _"] | Sequence[int]] | None = None,
    *,
    spans: Sequence[Span | Sequence[Span]] | None = None,
    min_recall: float | None = 0.5,
    unique: bool = True,
    tokenizer: Any = None,
    batch_tokens: int = 16384,
) -> HeadMap:
    """`retrieval_scores` by one forward over prompt and answer instead of decoding: far cheaper.

    targets: the tokens that are put in the model's mouth after each prompt; None means those of the span. What counts
    as a hit, and the other arguments, are as in `retrieval_scores`; a prompt counts as answered if the model's own
    choices at the answer's rows, the tokens before them given, reach the recall. Where greedy decoding says exactly
    the targets, and no more, the scores of the two functions are the same.

    Raises as `retrieval_scores`, and ValueError for a target without tokens.
    """
    where = "copy_scores"
    task = _Task.of(where, model, prompts, spans, tokenizer, min_recall, unique)
    told = task.targets(targets, vocabulary_size(model))
    return task.score(lambda cases: _forced_keys(model, task.layout, cases, told), batch_tokens, max(map(len, told)))


def copy_hits(
    model: nn.Module,
    prompts: Sequence[Prompt] | Int[Tensor, "b t"],
    targets: Sequence[Int[Tensor, " _"] | Sequence[int]] | None = None,
    *,
    spans: Sequence[Span | Sequence[Span]] | None = None,
    batch_tokens: int = 16384,
) -> list[tuple[list[int], dict[Head, Bool[Tensor, " _"]]]]:
    """For every prompt what the model says at the targets' rows, and at which of them each head hits.

    The single events that `copy_scores` counts, with the same arguments and errors.
    """
    where = "copy_hits"
    task = _Task.of(where, model, prompts, spans, None, None, True)
    told = task.targets(targets, vocabulary_size(model))
    heads = task.layout.heads()
    found: dict[int, tuple[list[int], dict[Head, Tensor]]] = {}
    for batch in batched(task.cases, batch_tokens, max(map(len, told))):
        for case, run in zip(batch, _forced_keys(model, task.layout, batch, told), strict=True):
            found[case.number] = (run.said, dict(zip(heads, _hits(case, run), strict=True)))
    return [found[number] for number in range(len(found))]


class StrongestKeys(Probe):
    """Keeps which key has the largest weight in the last rows of every call of the main tower, and nothing else.

    last: how many rows of a call. A row whose learned sink outweighs every key has no strongest key: -1.
    """

    name = "strongest-keys"
    sentence = "Which token the head attends to most."
    kind = "store"

    def __init__(self, last: int = 1) -> None:
        super().__init__()
        self.last = last
        self.found: dict[int, list[Int[Tensor, "b h r"]]] = {}

    def sparse(self, reading: Reading) -> None:
        call = reading.call
        if call.tower:
            return
        t = call.q.shape[2]
        sink = None if call.sinks is None else call.sinks.to(call.work_dtype)[None, :, None]
        if reading.edited:
            rows = call.q.new_empty(0)
            for block in reading.blocks(trim=False):
                rows = block.weights if not rows.numel() else torch.cat([rows, block.weights], 2)
                rows = rows[:, :, -self.last :]
            sink = None if sink is None else 1 - rows.sum(-1)
        else:  # the order of the scores is that of the weights
            rows = call.scores(slice(max(0, t - self.last), t))
        top = rows.max(-1)  # the first of equal ones
        keys = top.indices + call.key_offset
        if sink is not None:
            keys = keys.masked_fill(top.values < sink, -1)
        self.found.setdefault(call.layer, []).append(keys)

    def positions(self, heads: Layout) -> Int[Tensor, "b h r"]:
        """Absolute positions for the heads of the main tower in the order of `heads.heads()`, rows of all calls."""
        layers = [layer for layer, count in enumerate(heads.main.heads) if count]
        return torch.cat([torch.cat(self.found[layer], 2).cpu() for layer in layers], 1)


class NothingAnswered(ValueError):
    """No prompt was answered, so there is nothing to score."""


@dataclass(frozen=True)
class _Run:
    """What the model said, what was fed to it, and the places in the prompt of its heads' strongest keys."""

    said: list[int]
    fed: Int[Tensor, " n"]
    keys: Int[Tensor, "h n"]


@dataclass(frozen=True)
class _Task:
    """What the two ways of scoring share: the prompts, which of them count, and how hits are counted."""

    where: str
    name: str
    layout: Layout
    cases: list[Case]
    tokenizer: Any
    min_recall: float | None
    unique: bool

    @classmethod
    def of(
        cls, where: str, model: nn.Module, prompts: Any, spans: Any, tokenizer: Any, min_recall: Any, unique: bool
    ) -> "_Task":
        if min_recall is not None and not 0 <= min_recall < 1:
            raise ValueError(f"{where}: min_recall is {min_recall}; expected 0 to 1 (1 excluded), or None to count all")
        cases = checked_cases(where, model, prompts, spans, need_spans=True)
        name = str(getattr(getattr(model, "config", None), "name_or_path", ""))
        return cls(where, name, layout(model), cases, tokenizer, min_recall, unique)

    def targets(self, given: Any, size: int) -> list[Int[Tensor, " _"]]:
        if given is None:
            return [case.answer for case in self.cases]
        return checked_targets(self.where, given, len(self.cases), size)

    def score(self, run: Callable[[list[Case]], Iterator[_Run]], batch_tokens: int, extra: int) -> HeadMap:
        heads = self.layout.heads()
        runs: dict[int, dict[Head, float]] = {}
        recalls: list[float] = []
        for batch in batched(self.cases, batch_tokens, extra):
            for case, one in zip(batch, run(batch), strict=True):
                recalls.append(self.recall(one.said, case))
                if self.min_recall is None or recalls[-1] > self.min_recall:
                    values = _share_hit(case, one, self.unique)
                    runs[case.number] = dict(zip(heads, values.tolist(), strict=True))
        mean = sum(recalls) / len(recalls)
        if not runs:
            raise NothingAnswered(
                f"{self.where}: none of {len(recalls)} prompts was answered: their recall is {mean:.2f} on average, "
                f"{max(recalls):.2f} at best, and must exceed {self.min_recall}; give prompts that the model can "
                "answer (shorter ones, its own chat format, spans that hold only the answer), or min_recall=None"
            )
        source = f"{len(runs)} of {len(recalls)} prompts answered, mean recall {mean:.2f}"
        ordered = [runs[number] for number in sorted(runs)]
        return HeadMap({}, self.layout, model=self.name, source=source, runs={PROBE: ordered})

    def recall(self, said: list[int], case: Case) -> float:
        answer = case.answer.tolist()
        if self.tokenizer is not None:
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if any(letter.isascii() and letter.isalnum() for letter in text):
                return rouge1_recall(self.tokenizer.decode(said, skip_special_tokens=True), text)
        return unigram_recall(said, answer)


def _forced_keys(model: nn.Module, heads: Layout, cases: list[Case], told: list[Tensor]) -> Iterator[_Run]:
    wanted = [told[case.number] for case in cases]
    reader = StrongestKeys(max(map(len, wanted)))
    answers, padding = force(model, [case.ids for case in cases], wanted, reader)
    keys = reader.positions(heads)
    for row, target in enumerate(wanted):
        yield _Run(answers[row], target, keys[row, :, -len(target) :] - padding[row])


def _hits(case: Case, run: _Run) -> Bool[Tensor, "h n"]:
    """Where a head's strongest key lies in the answer's span and holds the token that was said."""
    inside = torch.zeros_like(run.keys, dtype=torch.bool)
    for start, end in case.spans:
        inside |= (run.keys >= start) & (run.keys < end)
    token = case.ids[run.keys.clamp(0, len(case.ids) - 1)]
    return inside & (token == run.fed) & torch.isin(run.fed, case.answer)


def _share_hit(case: Case, run: _Run, unique: bool) -> Float[Tensor, " h"]:
    """The score of every head in one run."""
    hits = _hits(case, run)
    if not unique:
        return hits.sum(1) / len(case.answer)
    each = torch.stack([hits[:, run.fed == token].any(1) for token in case.answer.unique()], 1)
    return each.double().mean(1)
