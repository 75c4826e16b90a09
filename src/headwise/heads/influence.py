"""Attention influence: how much a document's loss rises when chosen heads of a small model can no longer look.

    AI(x) = (L_masked(x) - L(x)) / L(x),    L the mean cross-entropy of the document's tokens

With retrieval heads masked it tells documents that are read with the help of their own context from those that are not.
Two passes a document, of which the second starts at the first masked layer: with f of L layers below it, 2 L - f layers
are run instead of 2 L. Logits are formed for a few rows at a time.

Paper: headwise/papers/attention_influence.py (Hua et al., 2025).
"""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head, select_heads
from headwise.attend.edit import Heads
from headwise.attend.edits import Ablate
from headwise.attend.head_map import HeadMap
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import layer_paths, layout, tower_kinds, unwrap
from headwise.hf.inputs import context_length, vocabulary_size
from headwise.hf.replay import backbone, keep_output, replay, row_logits
from headwise.hf.session import steer

__all__ = ["Influence", "attention_influence", "influence_heads"]

MODES = ("uniform", "zero", "first")
LEAST_LOSS = 1e-6  # below it a relative increase means nothing
LOGITS = 2**22  # how many logits are held at once
# Of a forward beside its tokens: operations that could run while a layer is started, tokens for reading the weights.
FIXED = {"cpu": (6e7, 16), "other": (5e10, 256)}
Mode = Literal["uniform", "zero", "first"]
Documents = Int[Tensor, "b t"] | Iterable[Any]


@dataclass(frozen=True)
class Influence:
    """What `attention_influence` found, one entry a document in the order they came.

    scores: the relative increase of the loss; NaN for a document without a token to predict, and where the loss is
    below `LEAST_LOSS` already. base, masked: the two mean losses in nats a token, NaN without a token. tokens: how many
    tokens each mean is over.
    """

    scores: Float[Tensor, " n"]
    base: Float[Tensor, " n"]
    masked: Float[Tensor, " n"]
    tokens: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.scores)


def influence_heads(scores: HeadMap, *, share: float = 0.05, strong: float = 0.5) -> list[Head]:
    """The heads to mask: the best `share` of all by retrieval score (at least one), and every one of `strong` or more.

    The paper masks the best 5 %. A model of few heads has less than 5 % of them to spare and shares the work among
    those it has, so that masking some changes little: hence all the strong ones.
    Raises ValueError for a share outside 0 to 1 and for a map without retrieval scores.
    """
    if not 0 < share <= 1:
        raise ValueError(f"influence_heads: share is {share}; expected more than 0, at most 1, such as 0.05")
    probe = "retrieval" if "retrieval" in scores.probes else None
    count = math.ceil(share * len(scores.layout.heads()))
    best = [head for head in scores.top(probe, count) if (scores.of(probe)[head] or 0) > 0]
    if not best:
        raise ValueError("influence_heads: no head of the map has a retrieval score above 0; name the heads to mask")
    return sorted({*best, *scores.select(probe, threshold=strong)})


def attention_influence(
    model: nn.Module,
    inputs: Documents,
    heads: Heads,
    *,
    attention_mask: Int[Tensor, "b t"] | None = None,
    mode: Mode = "uniform",
    prefix: int = 0,
    batch_tokens: int = 16384,
    implementation: Literal["auto", "two-pass", "reference"] = "auto",
) -> Influence:
    """Score documents by the relative increase of their loss with `heads` masked.

    inputs: token ids `[b, t]`; or documents, each a list or tensor of token ids, of any lengths; or batches as a data
        loader gives them, mappings with "input_ids" and "attention_mask" (1 = real) or tensors `[b, t]`. An iterable
        is read once, and of batches one is held at a time. attention_mask: of `[b, t]` ids; padding may stand on
        either side. heads: a selection, or `influence_heads(map)`.
    mode: what is left of a head: "uniform" attends evenly to all it may see (the paper), "zero" writes nothing, "first"
        looks at the first token alone.
    prefix: how many tokens of each document are read but do not count; the first is never predicted anyway.
    batch_tokens: documents of like lengths are run together up to so many tokens, padding included.
    implementation: "auto" starts the masked pass at the first masked layer, where the model allows it (tried out on
        a few tokens), "two-pass" runs both in full, "reference" also runs each document by itself with all its logits.

    >>> attention_influence(model, [ids, other], "top:retrieval:2").scores  # doctest: +SKIP

    Raises ValueError for an unknown mode, a negative prefix, token ids that the model has not, or a document beyond its
    context (cut it in windows); UnsupportedModel for a model that is no causal language model.

    Notes: a document of fewer than two tokens (or none behind `prefix`) has no score. Scores compare documents of one
    domain and like lengths: a longer one has more to look back to. The third-party code for this paper shifts targets
    twice and scores heads at the wrong row; here the loss is the model's own `model(ids, labels=ids).loss`.
    """
    chosen = _checked(model, heads, mode, prefix, implementation)
    scorer = _Scorer(model, chosen, mode, prefix, implementation)
    was_training = model.training
    model.eval()
    found: dict[int, tuple[float, float, int]] = {}
    try:
        with torch.no_grad(), steer(unwrap(model)):  # one session for all batches; inside it edits come and go cheaply
            for batch in _batches(inputs, attention_mask, (batch_tokens, batch_cost(model)), _limits(model)):
                numbers = [number for number, _ in batch]
                found.update(zip(numbers, scorer.losses([ids for _, ids in batch]), strict=True))
    finally:
        model.train(was_training)
    rows = [found[number] for number in range(len(found))]
    base, masked = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (0, 1))
    tokens = torch.tensor([row[2] for row in rows], dtype=torch.long)
    return Influence(relative_increase(base, masked), base, masked, tokens)


def relative_increase(base: Float[Tensor, " n"], masked: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """(masked - base) / base; NaN where base is below `LEAST_LOSS` or NaN."""
    return ((masked - base) / base).masked_fill(~(base >= LEAST_LOSS), math.nan)


def _checked(model: nn.Module, heads: Heads, mode: str, prefix: int, implementation: str) -> list[Head]:
    where = "attention_influence"
    if mode not in MODES:
        raise ValueError(f"{where}: mode is {mode!r}; choose from {', '.join(MODES)}")
    if prefix < 0:
        raise ValueError(f"{where}: prefix is {prefix}; expected 0 or more tokens")
    if implementation not in ("auto", "two-pass", "reference"):
        raise ValueError(f"{where}: implementation is {implementation!r}; choose auto, two-pass or reference")
    inner = unwrap(model)
    kinds = tower_kinds(inner)
    if kinds.get("") != "causal" or "encoder" in kinds or inner.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"{where}: {type(inner).__name__} is no causal language model, so a document has no loss under it; give "
            "one such as LlamaForCausalLM"
        )
    places = layout(inner)
    chosen = [] if isinstance(heads, list | tuple) and not heads else select_heads(heads, places)
    if other := [head for head in chosen if head.tower]:
        raise ValueError(f"{where}: head {other[0]} is of another tower than the text's; name heads such as 3.1")
    return chosen


def _limits(model: nn.Module) -> tuple[int | None, int]:
    return context_length(model), vocabulary_size(model)


Row = tuple[int, Int[Tensor, " _"]]


def _batches(
    inputs: Documents, mask: Tensor | None, budget: tuple[int, int], limits: tuple[int | None, int]
) -> Iterator[list[Row]]:
    """Documents with their numbers, without padding, in batches; those of one given batch stay together."""
    if isinstance(inputs, Tensor):
        inputs = [{"input_ids": inputs} if mask is None else {"input_ids": inputs, "attention_mask": mask}]
    elif mask is not None:
        raise ValueError("attention_influence: attention_mask goes with one tensor of ids; put it into each batch")
    waiting: list[Row] = []
    count = 0
    for item in inputs:
        is_batch = isinstance(item, Mapping) or (isinstance(item, Tensor) and item.ndim == 2)
        rows = [_checked_ids(ids, limits) for ids in (_unpadded(item) if is_batch else [item])]
        numbered = list(enumerate(rows, count))
        count += len(rows)
        if is_batch:
            yield from by_length(numbered, *budget)
        else:
            waiting += numbered
    yield from by_length(waiting, *budget)


def by_length(rows: Sequence[Row], budget: int, fixed: int = 0) -> Iterator[list[Row]]:
    """Batches of documents of like lengths, longest first, each at most `budget` tokens with its padding.

    fixed: what a forward costs beside its tokens, counted in tokens. Of all ways to cut the sorted documents the one is
    taken that runs the fewest tokens, padding included, plus `fixed` a batch: time O(n * documents a batch).
    """
    order = sorted(rows, key=lambda row: -len(row[1]))
    lengths = np.maximum(1, [len(ids) for _, ids in order])
    cost = np.zeros(len(order) + 1, dtype=np.int64)  # of the first documents, cut in the best way
    before = np.zeros(len(order) + 1, dtype=np.int64)  # where the last batch of that way begins
    for end in range(1, len(order) + 1):
        low = max(0, end - max(1, budget // int(lengths[end - 1])))
        starts = np.arange(low, end)
        padded = (end - starts) * lengths[low:end]
        tried = np.where(
            (padded <= budget) | (starts == end - 1), cost[low:end] + padded + fixed, np.iinfo(np.int64).max
        )
        best = int(tried.argmin())
        cost[end], before[end] = tried[best], low + best
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(int(before[cuts[-1]]))
    for start, end in pairwise(reversed(cuts)):
        yield order[start:end]


def batch_cost(model: nn.Module) -> int:
    """What a forward costs beside its tokens, counted in tokens: starting its layers, reading its weights.

    From sizes alone and never from a clock, so that the same documents always make the same batches.
    """
    inner = unwrap(model)
    weights = sum(one.numel() for one in inner.parameters())
    calls, reading = FIXED["cpu" if next(inner.parameters()).device.type == "cpu" else "other"]
    return reading + int(calls * layout(inner).main.layers / (2 * max(1, weights)))


def _unpadded(batch: Any) -> list[Tensor]:
    given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    ids, mask = given["input_ids"], given.get("attention_mask")
    if mask is None:
        return list(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_influence: attention_mask is {tuple(mask.shape)} for ids {tuple(ids.shape)}")
    return [row[real.bool()] for row, real in zip(ids, mask, strict=True)]


def _checked_ids(ids: Any, limits: tuple[int | None, int]) -> Int[Tensor, " t"]:
    where = "attention_influence"
    row = torch.as_tensor(ids, dtype=None if len(ids) else torch.long)
    if row.ndim != 1 or row.is_floating_point():
        raise ValueError(f"{where}: a document is {tuple(row.shape)} of {row.dtype}; expected a list of token ids")
    context, known = limits
    if context is not None and len(row) > context:
        raise ValueError(f"{where}: a document has {len(row)} tokens but the model reads {context}; cut it in windows")
    if len(row) and (int(row.min()) < 0 or int(row.max()) >= known):
        raise ValueError(f"{where}: token ids {int(row.min())} to {int(row.max())}; the model knows 0 to {known - 1}")
    return row.long()


class _Scorer:
    """The two losses of batches of documents under one model and one set of heads."""

    def __init__(self, model: nn.Module, heads: list[Head], mode: Mode, prefix: int, implementation: str) -> None:
        self.model, self.heads, self.prefix = unwrap(model), heads, prefix
        self.mode: Mode = mode
        self.alone = implementation == "reference"
        self.below = None if self.alone else backbone(model)
        self.skipped: list[nn.Module] = []
        if implementation == "auto" and heads:
            self.skipped = _layers_below(self.model, min(head.layer for head in heads))
        self.checked = self.alone or not heads

    def losses(self, documents: list[Tensor]) -> list[tuple[float, float, int]]:
        """Base loss, masked loss and number of tokens of each document."""
        if not self.checked:
            self._try_out()
        if self.alone:
            return [row for ids in documents for row in self._means(*self._two([ids]), [ids])]
        return self._means(*self._two(documents), documents)

    def _means(self, base: Tensor, masked: Tensor, documents: list[Tensor]) -> list[tuple[float, float, int]]:
        counts = [max(0, len(ids) - max(1, self.prefix)) for ids in documents]
        return [
            (float(one.double().mean()), float(other.double().mean()), count) if count else (math.nan, math.nan, 0)
            for one, other, count in zip(base.split(counts), masked.split(counts), counts, strict=True)
        ]

    def _two(self, documents: list[Tensor]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Losses of the tokens that count, document after document, plain and masked."""
        batch = _Batch.of(documents, max(1, self.prefix), next(self.model.parameters()).device)
        if not len(batch.target):
            nothing = torch.zeros(0)
            return nothing, nothing
        with ExitStack() as stack:
            kept = stack.enter_context(keep_output(self.skipped[-1])) if self.skipped else None
            base = self._losses(batch)
        if not self.heads:
            return base, base
        again = replay(self.skipped, kept.value) if kept is not None else nullcontext()
        with again, steer(self.model, Ablate(heads=self.heads, mode=self.mode)):
            return base, self._losses(batch)

    def _losses(self, batch: "_Batch") -> Float[Tensor, " n"]:
        given: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
        if self.below is None:
            return _cross_entropy(self.model(**given).logits[batch.rows, batch.columns], batch.target)
        with keep_output(self.below) as kept:
            self.model(**given, logits_to_keep=1)
        stream = kept.value[0][batch.rows, batch.columns]
        size = max(1, LOGITS // vocabulary_size(self.model))
        found = row_logits(self.model, kept.value, stream, size)
        return torch.cat([_cross_entropy(*pair) for pair in zip(found, batch.target.split(size), strict=True)])

    def _try_out(self) -> None:
        """Keep the shortcuts that give what two whole forwards give, on a few tokens; what does not is left out."""
        parameter = next(self.model.parameters())
        known = _SHORTCUTS.setdefault(self.model, {})
        key = (len(self.skipped), parameter.dtype)
        if key not in known:
            generator = torch.Generator().manual_seed(0)
            size = vocabulary_size(self.model)
            documents = [torch.randint(0, size, (n,), generator=generator) for n in (12, 9)]
            bound = 1e-4 if parameter.dtype in (torch.float32, torch.float64) else 0.1
            prefix, self.prefix = self.prefix, 0
            below, skipped = self.below, self.skipped
            known[key] = (False, False)
            self.below, self.skipped = None, []
            wanted = torch.cat([torch.stack(self._two([ids])) for ids in documents], 1)
            for use in ((True, True), (False, True), (True, False)):
                self.below, self.skipped = (below if use[0] else None), (skipped if use[1] else [])
                try:
                    seen = torch.stack(self._two(documents))
                except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
                    continue  # this family's forward does not put up with a part that is left out
                if bool((seen - wanted).abs().max() <= bound * wanted.abs().max().clamp_min(1)):
                    known[key] = use
                    break
            self.below, self.skipped, self.prefix = below, skipped, prefix
        self.below = self.below if known[key][0] else None
        self.skipped = self.skipped if known[key][1] else []
        self.checked = True


_SHORTCUTS: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, torch.dtype], tuple[bool, bool]]]" = (
    weakref.WeakKeyDictionary()
)


def _layers_below(model: nn.Module, first: int) -> list[nn.Module]:
    """The modules of the layers before `first`; none where the layers do not stand in one list."""
    try:
        return [model.get_submodule(path) for path in layer_paths(model, "")[:first]]
    except UnsupportedModel:
        return []


@dataclass(frozen=True)
class _Batch:
    """Documents padded on the right, where no real token sees the padding; and the places of the tokens that count.

    rows, columns: the position whose output predicts each `target`, document after document.
    """

    ids: Int[Tensor, "b t"]
    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    target: Int[Tensor, " n"]

    @classmethod
    def of(cls, documents: list[Tensor], first: int, device: torch.device) -> "_Batch":
        longest = max(1, *map(len, documents))
        ids = torch.zeros(len(documents), longest, dtype=torch.long)
        counts = torch.zeros(len(documents), longest, dtype=torch.bool)
        for row, document in enumerate(documents):
            if len(document):
                ids[row] = document[-1]  # not a padding token, which some families give a meaning of its own
                ids[row, : len(document)] = document
            counts[row, first : len(document)] = True
        rows, columns = counts.nonzero(as_tuple=True)
        return cls(*(part.to(device) for part in (ids, rows, columns - 1, ids[rows, columns])))


def _cross_entropy(logits: Float[Tensor, "n v"], target: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide, target, reduction="none").cpu()
