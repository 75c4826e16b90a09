"""`attend`: one attention call with probes and edits, by the cheapest path that is exact.

Heads that no edit names go to the plain implementation. The named heads are sorted into parts with the same edits:
- only constants on key groups: one fused call with a broadcast key bias;
- other edits on key groups: split the keys into atoms and the rest, one fused call for the rest, merge by log-masses;
- edits on rows: rows of weights block by block; an edit that depends on columns is shown all of them first.
Rows before the first that a part touches are left to the plain implementation.
Factors and replacements of outputs come last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from headwise.attend.call import Call
from headwise.attend.edit import (
    ColumnEdit,
    Edit,
    GroupEdit,
    InputEdit,
    OutputEdit,
    RowEdit,
    Rows,
    touched_rows,
)
from headwise.attend.merge import key_bias, regroup_rows, split_and_merge
from headwise.attend.read import Probe, Reading
from headwise.ops.softmax import log_sum_exp

__all__ = ["BoundEdit", "attend"]

ROWS_PER_BLOCK = 128

Touched = Literal[True] | Literal[False] | Tensor


@dataclass
class BoundEdit:
    """An edit and the heads that it names: `(tower, layer) -> head numbers`."""

    edit: Edit
    heads: dict[tuple[str, int], list[int]]


@dataclass
class Part:
    """Some heads of a call (positions in it) that the same edits change."""

    heads: list[int]
    edits: list[Edit]
    named: dict[int, list[int]]  # id of an edit -> all heads of this layer that it names
    call: Call = field(init=False)
    touched: Touched = field(init=False)

    def prepare(self, call: Call) -> None:
        """Cut the part out of the call and apply its input edits."""
        inputs = [edit for edit in self.edits if isinstance(edit, InputEdit)]
        alone = bool(inputs) or not (call.groups == 1 or _whole_key_groups(self.heads, call.groups))
        self.call = call.simplified().take(self.heads, expand=alone)
        for edit in inputs:
            self.call = edit.change(self.call)
        self.edits = [edit for edit in self.edits if not isinstance(edit, InputEdit)] if inputs else self.edits
        self.touched = bool(inputs)
        for edit in self.edits:
            self.touched = _either(self.touched, touched_rows(edit, call))
        if isinstance(self.touched, Tensor) and self.touched.numel() and bool(self.touched.all()):
            self.touched = True  # the plain outputs are not needed

    def skipped(self) -> int:
        """How many rows come before the first that is touched, where they can be left out."""
        if not isinstance(self.touched, Tensor):
            return 0
        t = self.touched.shape[1]
        if any(isinstance(edit, ColumnEdit) for edit in self.edits):
            return 0  # rows that are not changed count all the same
        if not bool(self.touched.any()):
            return t
        whole = any(isinstance(edit, RowEdit) and not edit.any_rows for edit in self.edits)
        return 0 if whole or t == 1 else int(self.touched.any(0).int().argmax())

    def run(self, skip: int = 0) -> Tensor:
        """`[b t n e]` outputs of the part's heads, of the rows from `skip` on."""
        groups = [edit for edit in self.edits if isinstance(edit, GroupEdit)]
        if len(groups) == len(self.edits):
            bias = key_bias(self.call, groups)
            if groups and bias is None:
                return split_and_merge(self.call, groups, skip).transpose(1, 2)
            if bias is not None and self.call.q.shape[2] == 1 and self.call.q.dtype == self.call.work_dtype:
                # A decoded token: nothing is cheaper than its row.
                weights, _ = softmax_and_sink(self.call, self.call.scores(slice(None)) + bias)
                return over_values(self.call, weights).transpose(1, 2)
            call = self.call.last_rows(self.call.q.shape[2] - skip)
            out, lse = call.attend(bias=bias)
            return _share_with_sinks(out, lse, call).transpose(1, 2)
        call = self.call.last_rows(self.call.q.shape[2] - skip)
        if len(self.edits) == 1 and isinstance(self.edits[0], ColumnEdit):
            out = self.edits[0].fused(call)
            if out is not None:
                return out.transpose(1, 2)
        blocks = [over_values(call, self.weights(index, call=call)) for index in _blocks(call.q.shape[2])]
        if len(blocks) == 1:
            return blocks[0].transpose(1, 2)
        return (torch.cat(blocks, 2) if blocks else call.attend()[0]).transpose(1, 2)

    def weights(self, index: slice | Tensor, columns: int | None = None, *, call: Call | None = None) -> Tensor:
        """`[b n r s]` the final weights of some rows of the part's call, or of its last rows."""
        call = self.call if call is None else call
        for number, edit in enumerate(self.edits):
            if isinstance(edit, ColumnEdit) and not edit.shown(call):
                self._show(edit, number)
        return self._rows(call, index, columns, len(self.edits))[0]

    def _show(self, edit: ColumnEdit, number: int) -> None:
        """Show all rows to an edit, as the edits before it leave them."""
        edit.begin(self.call)
        for index in _blocks(self.call.q.shape[2]):
            weights, sink = self._rows(self.call, index, None, number)
            edit.show(weights, Rows(self.call, index, None, self.named[id(edit)], sink))
        edit.end(self.call)

    def _rows(self, call: Call, index: slice | Tensor, columns: int | None, count: int) -> tuple[Tensor, Tensor | None]:
        """Rows and their sink column after the first edits."""
        edits = self.edits[:count]
        scores = call.scores(index, columns)
        call.memo["scores"] = (index, columns, scores)  # for the edits of these rows
        if edits and isinstance(edits[0], RowEdit) and touched_rows(edits[0], call) is True:
            added = edits[0].added(Rows(call, index, columns, self.named[id(edits[0])]))
            if added is not None:
                scores, edits = scores + added, edits[1:]
        weights, sink = softmax_and_sink(call, scores)
        for edit in edits:
            new, new_sink = weights, sink
            if isinstance(edit, GroupEdit):
                new, new_sink = regroup_rows(call, edit, weights, sink)
            elif isinstance(edit, RowEdit):
                rows = Rows(call, index, columns, self.named[id(edit)], sink)
                new, new_sink = edit.change(weights, rows), rows.sink
            weights = _where(edit, call, index, new, weights)
            if sink is not None and new_sink is not None:
                sink = _where(edit, call, index, new_sink, sink)
        return weights, sink


def attend(
    call: Call,
    edits: Sequence[BoundEdit] = (),
    probes: Sequence[Probe] = (),
    plain: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Attention `[b t h e]` under edits, read by probes.

    plain: the implementation that the model would have used, `-> [b t h e]`; it computes every head that no edit
    names. None means fused attention.
    """
    place = (call.tower, call.layer)
    active = [(b.edit, b.heads[place]) for b in edits if b.heads.get(place)]
    active = [(edit, heads) for edit, heads in active if touched_rows(edit, call) is not False]
    weight_edits = [(edit, heads) for edit, heads in active if not isinstance(edit, OutputEdit)]
    parts = _parts(weight_edits, call)
    out = _plain(call, probes, plain, parts)
    for part in parts:
        skip = part.skipped()
        if isinstance(part.touched, Tensor) and skip == part.touched.shape[1]:
            continue
        new = part.run(skip).to(out.dtype)
        if isinstance(part.touched, Tensor) and not (skip and bool(part.touched[:, skip:].all())):
            new = torch.where(part.touched[:, skip:, None, None], new, _of_heads(out[:, skip:], part.heads))
        if skip:
            new = torch.cat([_of_heads(out[:, :skip], part.heads), new], 1)
        out = _with_heads(out, part.heads, new)
    for edit, heads in active:
        if isinstance(edit, OutputEdit):
            out = _edit_output(edit, heads, out, call)
    if probes:
        _read(call, parts, probes)
    return out


def plain_rows(call: Call, index: slice | Tensor, columns: int | None = None) -> Tensor:
    """`[b h r s]` the weights of some rows as the model forms them; rows that see nothing are 0."""
    return rows_and_sink(call, index, columns)[0]


def rows_and_sink(call: Call, index: slice | Tensor, columns: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The weights of some rows `[b h r s]`, and that of the learned sink column `[b h r 1]` where there is one."""
    return softmax_and_sink(call, call.scores(index, columns))


def softmax_and_sink(call: Call, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same from scores `[b h r s]` of a call."""
    if call.mask is None and call.sinks is None:  # every row sees a key
        return scores.softmax(-1), None
    lse = log_sum_exp(scores, keepdim=True)
    sink = None
    if call.sinks is not None:
        logit = call.sinks.to(lse.dtype)[None, :, None, None]
        lse = log_sum_exp(torch.stack([lse, logit.expand_as(lse)], -1))
        sink = (logit - lse).exp()
    return (scores - lse.masked_fill(torch.isneginf(lse), 0)).exp(), sink


def over_values(call: Call, weights: Tensor) -> Tensor:
    """`[b h r e]` what weights `[b h r s]` make of the values, of all columns or the first, in the call's dtype."""
    b, h, r, s = weights.shape
    n, e = call.v.shape[1], call.v.shape[3]
    value = (call.v if s == call.v.shape[2] else call.v[:, :, :s]).to(weights.dtype)
    out = torch.bmm(weights.reshape(b * n, h // n * r, s), value.reshape(b * n, s, e))
    return out.view(b, h, r, e).to(call.q.dtype)


def final_rows(call: Call, parts: Sequence[Part], index: slice | Tensor, columns: int | None = None) -> Tensor:
    """`[b h r s]` the weights of some rows after all edits on weights."""
    if len(parts) == 1 and len(parts[0].heads) == call.q.shape[1]:
        return parts[0].weights(index, columns)
    weights = plain_rows(call, index, columns)
    for part in parts:
        weights = weights.index_copy(1, _index(part.heads, weights), part.weights(index, columns))
    return weights


def _parts(edits: list[tuple[Edit, list[int]]], call: Call) -> list[Part]:
    """Sort heads by the edits that name them."""
    if not edits:
        return []
    parts = [
        Part(list(heads), [edits[i][0] for i in named], {id(edits[i][0]): edits[i][1] for i in named})
        for named, heads in _sorted(tuple(tuple(heads) for _, heads in edits), tuple(call.heads))
    ]
    for part in parts:
        part.prepare(call)
    return parts


@lru_cache
def _sorted(
    named: tuple[tuple[int, ...], ...], heads: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Which edits name the same of these heads, and the positions of those."""
    by_edits: dict[tuple[int, ...], list[int]] = {}
    chosen = [set(numbers) for numbers in named]
    for position, head in enumerate(heads):
        which = tuple(i for i, numbers in enumerate(chosen) if head in numbers)
        if which:
            by_edits.setdefault(which, []).append(position)
    return tuple((which, tuple(positions)) for which, positions in by_edits.items())


def _plain(call: Call, probes: Sequence[Probe], plain: Callable[[], Tensor] | None, parts: list[Part]) -> Tensor:
    """The outputs before any edit. Where every head and row is edited they are not needed, and not computed."""
    b, h, t, e = *call.q.shape[:3], call.v.shape[-1]
    if parts and sum(len(part.heads) for part in parts if part.touched is True) == h:
        # No output of these is kept; of one part not even their number is asked for.
        return call.q.transpose(1, 2) if len(parts) == 1 else call.q.new_empty(b, t, h, e)
    wants_lse = any(probe.reads_weights for probe in probes)
    if plain is not None and not (wants_lse and getattr(plain, "is_fused", False)):
        return plain()
    # The fused operator gives the same bits as the plain implementation, and the log-sum-exp with them.
    out, lse = call.attend()
    call.memo["lse"] = lse
    return _share_with_sinks(out, lse, call).transpose(1, 2)


def _read(call: Call, parts: list[Part], probes: Sequence[Probe]) -> None:
    call = call.simplified()
    after = Reading(call, (lambda i, n: final_rows(call, parts, i, n)) if parts else None)
    before = Reading(call) if parts else after
    for reading, early in ((after, False), (before, True)):
        chosen = [probe for probe in probes if probe.before_edits == early and probe.reads_weights]
        if not chosen:
            continue
        differentiable = any(probe.differentiable for probe in chosen)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            reading.feed(chosen)


def _edit_output(edit: OutputEdit, heads: list[int], out: Tensor, call: Call) -> Tensor:
    heads = [head for head in heads if head in call.heads]  # the call may hold a part of the layer
    if not heads:
        return out
    everything = heads == call.heads
    positions = list(range(len(heads))) if everything else [call.heads.index(head) for head in heads]
    named = _of_heads(out, positions)
    new = edit.change(named, call if everything else replace(call, heads=heads))
    rows = touched_rows(edit, call)
    if isinstance(rows, Tensor):
        new = torch.where(rows[..., None, None], new, named)
    return _with_heads(out, positions, new.to(out.dtype))


def _of_heads(out: Tensor, heads: list[int]) -> Tensor:
    """Heads of `[b t h e]`; neighbours are a view."""
    first, count = heads[0], len(heads)
    return out[:, :, first : first + count] if heads == list(range(first, first + count)) else out[:, :, heads]


def _with_heads(out: Tensor, heads: list[int], new: Tensor) -> Tensor:
    """`[b t h e]` with other outputs of some heads."""
    first, end = heads[0], heads[0] + len(heads)
    if heads != list(range(first, end)):
        return out.index_copy(2, _index(heads, out), new)
    if len(heads) == out.shape[2]:
        return new
    before, behind = [out[:, :, :first]] if first else [], [out[:, :, end:]] if end < out.shape[2] else []
    return torch.cat([*before, new, *behind], 2)


def _where(edit: Edit, call: Call, index: slice | Tensor, new: Tensor, old: Tensor) -> Tensor:
    rows = touched_rows(edit, call)
    return torch.where(rows[:, None, index, None], new, old) if isinstance(rows, Tensor) else new


def _share_with_sinks(out: Tensor, lse: Tensor, call: Call) -> Tensor:
    """Give the learned sink column its share of every row."""
    if call.sinks is None:
        return out
    return out * torch.sigmoid(lse - call.sinks.to(lse.dtype)[None, :, None])[..., None].to(out.dtype)


def _whole_key_groups(heads: list[int], groups: int) -> bool:
    if groups == 1:
        return True
    wanted = [g * groups + i for g in sorted({h // groups for h in heads}) for i in range(groups)]
    return heads == wanted


def _either(a: Touched, b: Touched) -> Touched:
    if a is True or b is True:
        return True
    if a is False:
        return b
    return a if b is False else a | b


def _index(heads: list[int], like: Tensor) -> Tensor:
    return torch.tensor(heads, device=like.device)


def _blocks(t: int) -> list[slice]:
    return [slice(start, min(start + ROWS_PER_BLOCK, t)) for start in range(0, t, ROWS_PER_BLOCK)]
