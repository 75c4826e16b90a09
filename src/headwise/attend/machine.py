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
        alone = bool(inputs) or not _whole_key_groups(self.heads, call.groups)
        self.call = call.simplified().take(self.heads, expand=alone)
        for edit in inputs:
            self.call = edit.change(self.call)
        self.edits = [edit for edit in self.edits if not isinstance(edit, InputEdit)]
        self.touched = bool(inputs)
        for edit in self.edits:
            self.touched = _either(self.touched, edit.rows(call))
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
            call = self.call.last_rows(self.call.q.shape[2] - skip)
            out, lse = call.attend(bias=bias)
            return _share_with_sinks(out, lse, call).transpose(1, 2)
        call = self.call.last_rows(self.call.q.shape[2] - skip)
        if len(self.edits) == 1 and isinstance(self.edits[0], ColumnEdit):
            out = self.edits[0].fused(call)
            if out is not None:
                return out.transpose(1, 2)
        blocks = []
        for index in _blocks(call.q.shape[2]):
            weights = self.weights(index, call=call)
            b, n, r, s = weights.shape
            value = call.v.to(weights.dtype)
            blocks.append((weights.reshape(b, call.v.shape[1], -1, s) @ value).view(b, n, r, -1))
        out = torch.cat(blocks, 2) if blocks else call.attend()[0]
        return out.to(call.q.dtype).transpose(1, 2)

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
        weights, sink = rows_and_sink(call, index, columns)
        for edit in self.edits[:count]:
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
    active = [(edit, heads) for edit, heads in active if edit.rows(call) is not False]
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
    scores = call.scores(index, columns)
    call.memo["scores"] = (index, columns, scores)  # for the edits of these rows
    if call.mask is None and call.sinks is None:  # every row sees a key
        return scores.softmax(-1), None
    lse = log_sum_exp(scores, keepdim=True)
    sink = None
    if call.sinks is not None:
        logit = call.sinks.to(lse.dtype)[None, :, None, None]
        lse = log_sum_exp(torch.stack([lse, logit.expand_as(lse)], -1))
        sink = (logit - lse).exp()
    return (scores - lse.masked_fill(torch.isneginf(lse), 0)).exp(), sink


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
    by_edits: dict[tuple[int, ...], list[int]] = {}
    chosen = [set(heads) for _, heads in edits]
    for position, head in enumerate(call.heads if edits else ()):
        named = tuple(i for i, heads in enumerate(chosen) if head in heads)
        if named:
            by_edits.setdefault(named, []).append(position)
    parts = [
        Part(heads, [edits[i][0] for i in named], {id(edits[i][0]): edits[i][1] for i in named})
        for named, heads in by_edits.items()
    ]
    for part in parts:
        part.prepare(call)
    return parts


def _plain(call: Call, probes: Sequence[Probe], plain: Callable[[], Tensor] | None, parts: list[Part]) -> Tensor:
    """The outputs before any edit. Where every head and row is edited they are not needed, and not computed."""
    replaced = {head for part in parts if part.touched is True for head in part.heads}
    if len(replaced) == call.q.shape[1]:
        if len(parts) == 1:
            return call.q[:, :, :, :0].transpose(1, 2)  # no output of these is kept
        b, h, t, _ = call.q.shape
        return call.q.new_empty(b, t, h, call.v.shape[-1])
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
    positions = [call.heads.index(head) for head in heads]
    everything = positions == list(range(out.shape[2]))
    named = _of_heads(out, positions)
    new = edit.change(named, call if everything else replace(call, heads=heads))
    rows = edit.rows(call)
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
    parts = [out[:, :, :first], new, out[:, :, end:]]
    return torch.cat([part for part in parts if part.shape[2]], 2) if len(heads) < out.shape[2] else new


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
