"""The oracle of edits: rows of weights written out in float64 and changed as each edit's definition says.

Nothing here shares code with the library. A learned sink is one more column, which carries no value and is in no group.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tests.attend.materialised import logits, repeat
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.call import Call


def place(call: Call) -> tuple[Tensor, Tensor]:
    """Absolute positions of rows `[t]` and columns `[s]` of a self-attention call."""
    total, t, s = call.step.real.shape[1], call.q.shape[2], call.k.shape[2]
    return torch.arange(total - t, total), torch.arange(total - s, total)


def first_real(call: Call) -> list[int]:
    return [next((i for i, real in enumerate(row) if real), 0) for row in call.step.real.tolist()]


def members(call: Call, kind: str, argument) -> Tensor:
    """`[b, s]` columns of a key group, position by position."""
    total = call.step.real.shape[1]
    _, columns = place(call)
    chosen = torch.zeros(call.k.shape[0], call.k.shape[2], dtype=torch.bool)
    for b, first in enumerate(first_real(call)):
        for j, position in enumerate(columns.tolist()):
            if not call.step.real[b, position]:
                continue
            if kind == "first":
                chosen[b, j] = position == first
            elif kind == "recent":
                chosen[b, j] = position >= total - argument
            elif kind == "spans":
                chosen[b, j] = any(start <= position - first < stop for start, stop in argument)
            else:
                chosen[b, j] = position in argument
    return chosen


def plain_weights(call: Call, q: Tensor, k: Tensor) -> Tensor:
    """`[b h t s]`, or `[b h t s+1]` with the sink column; rows that see nothing are 0."""
    scores = logits(q, k, mask=call.mask, causal=call.causal, scale=call.scale, softcap=call.softcap)
    if call.sinks is not None:
        column = call.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, torch.softmax(scores, -1))


def visible(call: Call) -> Tensor:
    """`[b h t s]`"""
    scores = logits(call.q * 0, call.k, mask=call.mask, causal=call.causal)
    return scores > -1e30


def biased(weights: Tensor, group: Tensor, bias: float) -> Tensor:
    """w_j exp(bias [j in G]) / sum; unchanged where nothing would be left."""
    new = weights * group if bias == math.inf else torch.where(group, weights * math.exp(bias), weights)
    total = new.sum(-1, keepdim=True)
    return torch.where(total > 0, new / total, weights)


def scaled(weights: Tensor, group: Tensor, factor: float, remainder: str) -> Tensor:
    """The group's mass m becomes factor * m; the remainder says what becomes of the others."""
    if remainder == "renormalise":
        return biased(weights, group, math.log(factor) if factor else -math.inf)
    if remainder == "none":
        return torch.where(group, weights * factor, weights)
    mass = (weights * group).sum(-1, keepdim=True)
    rest = (weights * ~group).sum(-1, keepdim=True)
    left = rest + (1 - factor) * mass if math.isfinite(factor) else torch.where(mass > 0, 0.0, rest)
    left = left.clamp(min=0)
    kept = torch.where(left == 0, torch.ones_like(mass), mass * min(factor, 1e300))
    new = torch.where(group, weights * kept / mass, weights * left / rest)
    return torch.where((mass > 0) & (rest > 0), new, weights)


@dataclass
class Defined:
    """One edit: what the definition makes of weights `[b r t s]` or outputs `[b t e]`, head by head.

    stage: "input", "weights" or "output". change: `(x of one head, head, call) -> x`; for inputs x is (q, k, v).
    rows: `[b, t]` boolean or None for all.
    """

    stage: str
    heads: list[int]
    change: Callable
    rows: Tensor | None = None


def defined(call: Call, edits: list[Defined]) -> tuple[Tensor, Tensor]:
    """(out `[b h t e]`, weights `[b h t s]`): inputs first, then weights, then outputs, each in the given order."""
    h, s = call.q.shape[1], call.k.shape[2]
    q, k, v = call.q.double(), repeat(call.k.double(), h), repeat(call.v.double(), h)
    for edit in [e for e in edits if e.stage == "input"]:
        new = [list(x.unbind(1)) for x in (q, k, v)]
        for head in edit.heads:
            for x, changed in zip(new, edit.change(*(x[head] for x in new), head, call), strict=True):
                x[head] = changed
        q, k, v = (torch.stack(x, 1) for x in new)
    weights = apply(plain_weights(call, q, k), [e for e in edits if e.stage == "weights"], call)
    out = apply(weights[..., :s] @ v, [e for e in edits if e.stage == "output"], call)
    return out, weights[..., :s]


def apply(x: Tensor, edits: list[Defined], call: Call) -> Tensor:
    for edit in edits:
        heads = list(x.unbind(1))
        for head in edit.heads:
            new = edit.change(heads[head], head, call)
            heads[head] = new if edit.rows is None else torch.where(edit.rows[..., None], new, heads[head])
        x = torch.stack(heads, 1)
    return x


def head_value(value, head: int, default: float) -> float:
    """A number, a dict of heads or a `[l, h]` tensor, for layer 0."""
    if isinstance(value, dict):
        return float(value.get(Head(0, head), default))
    return float(value[0, head]) if isinstance(value, Tensor) else float(value)


def with_sink_column(call: Call, columns: Tensor) -> Tensor:
    """`[b, s]` to `[b, 1, s]`, or with a False for the sink column."""
    if call.sinks is not None:
        columns = torch.cat([columns, torch.zeros_like(columns[:, :1])], -1)
    return columns[:, None]


def probe_scores(call: Call, weights: Tensor, ids: Tensor) -> dict[str, list[float]]:
    """Every probe's mean for each head, row by row; weights `[b h t s]` of a self-attention call."""
    rows, columns = (x.tolist() for x in place(call))
    real, shown = call.step.real, visible(call)
    values = call.v.double().norm(dim=-1).repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    counted = [
        (b, i, position)
        for b, first in enumerate(first_real(call))
        for i, position in enumerate(rows)
        if real[b, position] and position > first
    ]
    sums: dict[str, list[list[float]]] = {}

    def note(name: str, head: int, value) -> None:
        sums.setdefault(name, [[] for _ in range(call.q.shape[1])])[head].append(float(value))

    limit = max(0.1, 20 / (rows[-1] + 1))
    sinks = set()
    for head in range(call.q.shape[1]):
        for b in range(len(real)):
            for j, column in enumerate(columns):
                later = [i for b2, i, position in counted if b2 == b and position >= column]
                if later and real[b, column] and sum(weights[b, head, i, j] for i in later) / len(later) > limit:
                    sinks.add((b, j))
    for head in range(call.q.shape[1]):
        moved, total = 0.0, 0.0
        for b, i, position in counted:
            row = weights[b, head, i]
            first = first_real(call)[b]
            sink = float(row[columns.index(first)]) if first in columns else 0.0
            note("sink", head, sink)
            note("dormant", head, sink > 0.5)
            if position - 1 in columns and real[b, position - 1]:
                note("previous", head, row[columns.index(position - 1)])
            equal = [p for p in range(position) if real[b, p] and ids[b, p] == ids[b, position] and p >= columns[0]]
            if equal:
                note("duplicate", head, sum(row[columns.index(p)] for p in equal))
                note("induction", head, sum(row[columns.index(p + 1)] for p in equal))
            share = row[row > 0] / row.sum()
            entropy = -float((share * share.log()).sum())
            note("entropy-nats", head, entropy)
            if int(shown[b, head, i].sum()) > 1:
                note("entropy", head, entropy / math.log(int(shown[b, head, i].sum())))
            distance = sum(float(row[j]) * (position - column) for j, column in enumerate(columns))
            note("distance", head, distance)
            note("distance-share", head, distance / (position - first))
            note("sinks", head, sum(float(row[j]) for j in range(len(columns)) if (b, j) in sinks))
            moved += sum(float(row[j] * values[b, head, j]) for j in range(len(columns)) if (b, j) in sinks)
            total += float((row * values[b, head]).sum())
        note("value-weighted-sink", head, moved / total if total else math.nan)
    return {name: [sum(x) / len(x) if x else math.nan for x in heads] for name, heads in sums.items()}
