"""Extreme tokens: attention sinks, drained values and residual peaks; and heads that are active on some text only.

    sink(h)  = mean_t A_h[t, s]                    weight that later rows give to token s
    drain(h) = |v_s| / mean_{t != s} |v_t|         its value, against those of other tokens
    peak(l)  = |x_s| / mean_{t != s} |x_t|         its residual state after layer l

A head is dormant on a text when it parks its attention on a sink whose value is near zero, and active otherwise.

Paper: headwise/papers/active_dormant_heads.py (Guo et al., 2024).
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout
from headwise.attend.head_map import HeadMap
from headwise.attend.read import Probe, Reading, RowBlock
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import layout
from headwise.hf.inputs import as_inputs
from headwise.hf.session import probe
from headwise.hf.sites import record

__all__ = ["Activity", "ExtremeTokens", "activity", "extreme_tokens"]


@dataclass
class ExtremeTokens:
    """The three phenomena for one position.

    sink: the position of s among the real tokens, 0 is the first. found: how it was chosen. map: probes `sink`,
    `drain` and `dormant` (share of rows that give s more than half) for every head. peak: `[layers + 1]`, of the
    embedding and after every layer; None where the residual stream of the model cannot be followed.
    """

    sink: int
    found: Literal["given", "largest mean weight"]
    map: HeadMap
    peak: Tensor | None


@dataclass
class Activity:
    """Mean weight of the first token for every domain and head, `[domains, l, h]`."""

    domains: tuple[str, ...]
    sink: Tensor
    layout: Layout

    def switching(self) -> HeadMap:
        """The largest difference between domains for each head: high for heads that are dormant on one only."""
        spread = self.sink.amax(0) - self.sink.amin(0)
        scores: dict[Head, float | None] = {h: float(spread[h.layer, h.head]) for h in self.layout.heads()}
        return HeadMap({"switching": scores}, self.layout, source="activity")

    def dormant_on(self, head: Head) -> str:
        """The domain on which a head rests most."""
        return self.domains[int(self.sink[:, head.layer, head.head].argmax())]


class _Extremes(Probe):
    """Weight on one position after it, and norms of values."""

    def __init__(self, position: int, rows: Tensor | None):
        super().__init__()
        self.position, self.chosen = position, rows
        self.dormant: dict[tuple[str, int], Tensor] = {}
        self.drain: dict[tuple[str, int], Tensor] = {}

    def sparse(self, reading: Reading) -> None:
        call = reading.call
        column = reading.first_column + self.position
        mass = reading.mass(column[:, None])
        row = torch.arange(call.q.shape[2], device=mass.device) + call.row_offset
        after = call.kind == "causal"
        rows = call.real_rows & ((row > (column + call.key_offset)[:, None]) if after else row >= 0)
        if self.chosen is not None:
            rows = rows & self.chosen.to(rows.device)
        self.add(reading, (mass * rows[:, None]).sum((0, 2)), rows.sum())
        place = (call.tower, call.layer)
        self.dormant[place] = ((mass > 0.5) & rows[:, None]).double().sum((0, 2)) / rows.sum()
        # Values are read after their projection and per key head; query heads of a group share them.
        norms = call.v.to(call.work_dtype).norm(dim=-1).double().repeat_interleave(call.groups, 1)
        own = norms.gather(2, column[:, None, None].expand(-1, norms.shape[1], 1))[..., 0]
        others = call.real_columns & (torch.arange(norms.shape[2], device=mass.device) != column[:, None])
        mean = (norms * others[:, None]).sum(2) / others.sum(1, keepdim=True)
        self.drain[place] = (own / mean).mean(0)


class _Received(Probe):
    """Mean weight that every column receives from the rows that can see it, over all heads of a model."""

    def __init__(self):
        super().__init__()
        self.sum: Tensor | float = 0.0
        self.rows: Tensor | float = 0.0

    def block(self, reading: Reading, block: RowBlock) -> None:
        call = reading.call
        real = call.real_rows[:, block.index]
        received = torch.einsum("bhrs,br->bs", block.weights, real.to(block.weights.dtype)) / call.q.shape[1]
        seen = torch.einsum("bhrs,br->bs", (block.weights[:, :1] > 0).to(received.dtype), real.to(received.dtype))
        pad = call.k.shape[2] - received.shape[1]
        self.sum = self.sum + torch.nn.functional.pad(received, (0, pad))
        self.rows = self.rows + torch.nn.functional.pad(seen, (0, pad))


def extreme_tokens(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    *,
    sink: int | Literal["auto"] = 0,
    rows: Tensor | None = None,
    tower: str | None = None,
) -> ExtremeTokens:
    """Measure sink, drain and peak of one position of every text of a batch, without keeping weights.

    inputs: token ids `[b, t]`, or what a tokenizer or image processor returned. sink: the position among the real
    tokens (0 is the first, after any padding), or "auto": the one with the largest mean weight over rows that can see
    it, over all heads. rows: `[b, t]` boolean, the rows to average over; None means all after the sink.

    Raises ValueError for a position that the texts do not have.
    """
    places = layout(model)
    name = places.tower(tower).name
    given = as_inputs(model, inputs)
    real = given.get("attention_mask")
    length = int(real.sum(-1).min()) if isinstance(real, Tensor) else _length(given)
    found: Literal["given", "largest mean weight"] = "given"
    if sink == "auto":
        received = _Received()
        with torch.no_grad(), probe(model, received):
            model(**given)
        mean = received.sum / torch.as_tensor(received.rows).clamp_min(1)
        first = real.int().argmax(-1) if isinstance(real, Tensor) else torch.zeros(mean.shape[0], dtype=torch.long)
        # Positions count from the first real token; the last few columns are seen by too few rows to judge.
        judged = max(1, (length or mean.shape[1]) * 3 // 4)
        index = (first[:, None] + torch.arange(judged)).clamp_max(mean.shape[1] - 1).to(mean.device)
        sink, found = int(mean.gather(1, index).mean(0).argmax()), "largest mean weight"
    if sink < 0 or (length is not None and sink >= length):
        raise ValueError(
            f"extreme_tokens: sink is {sink} but the shortest text has {length} tokens; give 0 to length-1"
        )
    extremes = _Extremes(sink, rows)
    peak = None
    with torch.no_grad(), ExitStack() as stack:
        try:
            # Before the probe: sites are proved on a forward of their own, which must not be read.
            kept = [stack.enter_context(record(model, site, tower=name or None)) for site in ("residual:*", "final")]
        except UnsupportedModel:
            kept = []
        stack.enter_context(probe(model, extremes))
        model(**given)
        if kept:
            peak = torch.stack([_ratio(states, real, sink) for part in kept for _, states in part.items()])
    scores: dict[str, dict[Head, float | None]] = {"sink": {}, "drain": {}, "dormant": {}}
    for head in places.heads(name):
        place = (head.tower, head.layer)
        scores["sink"][head] = float(extremes.scores()[place][head.head])
        scores["drain"][head] = float(extremes.drain[place][head.head])
        scores["dormant"][head] = float(extremes.dormant[place][head.head])
    return ExtremeTokens(sink, found, HeadMap(scores, places, source="extreme_tokens"), peak)


def activity(
    model: nn.Module, domains: Mapping[str, Iterable[Tensor | Mapping[str, Any]]], *, rows: Tensor | None = None
) -> Activity:
    """How much every head rests on the first token, domain by domain.

    domains: name -> batches of texts of one kind, two kinds or more.
    """
    if len(domains) < 2:
        raise ValueError(f"activity: {len(domains)} domains; give at least two kinds of text to compare")
    places = layout(model)
    tables = []
    for name, batches in domains.items():
        reader = _Extremes(0, rows)
        for batch in batches:
            with torch.no_grad(), probe(model, reader):
                model(**as_inputs(model, batch))
        if not reader.sums:
            raise ValueError(f"activity: domain {name!r} has no batches; give at least one")
        means = reader.scores()
        width = max(places.main.heads)
        table = torch.full((places.main.layers, width), torch.nan)
        for (tower, layer), row in means.items():
            if tower == places.main.name:
                table[layer, : len(row)] = row.float().cpu()
        tables.append(table)
    return Activity(tuple(domains), torch.stack(tables), places)


def _ratio(states: Tensor, real: Tensor | None, sink: int) -> Tensor:
    """Norm of the sink's state over the mean norm of the other real tokens, mean over texts."""
    norms = states.float().norm(dim=-1)
    mask = torch.ones_like(norms, dtype=torch.bool) if real is None else real.bool().to(norms.device)
    column = mask.int().argmax(-1) + sink
    others = mask & (torch.arange(norms.shape[1], device=norms.device) != column[:, None])
    own = norms.gather(1, column[:, None])[:, 0]
    return (own / ((norms * others).sum(1) / others.sum(1))).mean().cpu()


def _length(given: Mapping[str, Any]) -> int | None:
    ids = given.get("input_ids")
    return int(ids.shape[1]) if isinstance(ids, Tensor) else None
