"""Reading attention without keeping it.

A `Reading` answers for one attention call. Chosen columns and diagonals cost O(t); whole rows are formed in blocks,
once for all probes that need them. To write a probe of your own, subclass `Probe` and implement `sparse`, `block` or
`output`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from headwise.attend.call import Call

__all__ = ["Probe", "Reading", "RowBlock"]

# Of weights in a block: on a CPU what stays in a core's caches between the probes; a GPU wants fewer, larger steps.
BLOCK_BYTES, BLOCK_BYTES_GPU = 2**21, 2**28
SAMPLED_ABOVE = 2048
SAMPLE = 512


class Probe:
    """Reads statistics of attention while a model runs; changes nothing.

    Implement one of
        `sparse(reading)`: columns, diagonals and masses, at a cost linear in the text;
        `block(reading, block)`: whole rows of weights, block by block; `finish(reading)` follows the last block;
        `output(heads, mixed, reading)`: the heads' outputs `[b t h e]` as the output projection receives them, and
            what it makes of them `[b t c]`.
    and call `self.add(reading, sums, counts)` with `[h]` tensors, or keep what you like.

    heads: sums and counts are kept for every head of every layer, so a probe is read for all of them.
    before_edits: read the model's own rows also where edits change them.
    differentiable: keep gradients.
    sampled: above 2,048 tokens, form a fixed stratified sample of 512 rows instead of all.
    """

    name: ClassVar[str] = ""
    sentence: ClassVar[str] = ""
    kind: ClassVar[str] = "text"
    causal_only: ClassVar[bool] = False

    def __init__(self, *, before_edits: bool = False, differentiable: bool = False, sampled: bool = False):
        self.before_edits = before_edits
        self.differentiable = differentiable
        self.sampled = sampled
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[tuple[str, int], Tensor] = {}

    @property
    def reads_weights(self) -> bool:
        cls = type(self)
        return cls.sparse is not Probe.sparse or self.reads_rows

    @property
    def reads_rows(self) -> bool:
        return type(self).block is not Probe.block

    @property
    def reads_outputs(self) -> bool:
        return type(self).output is not Probe.output

    def sparse(self, reading: "Reading") -> None:
        """Called once per attention call."""

    def block(self, reading: "Reading", block: "RowBlock") -> None:
        """Called once per block of rows."""

    def finish(self, reading: "Reading") -> None:
        """Called after the last block of a call."""

    def output(self, heads: Tensor, mixed: Tensor, reading: "Reading") -> None:
        """Called when the heads of a layer are mixed."""

    def add(self, reading: "Reading", sums: Tensor, counts: Tensor | float) -> None:
        """Add `[h]` sums over rows and the number of rows that they are over."""
        place = (reading.call.tower, reading.call.layer)
        sums = sums.double() if not self.differentiable else sums
        counts = torch.as_tensor(counts, dtype=torch.float64, device=sums.device).expand_as(sums)
        self.sums[place] = self.sums[place] + sums if place in self.sums else sums
        self.counts[place] = self.counts[place] + counts if place in self.counts else counts

    def scores(self) -> dict[tuple[str, int], Tensor]:
        """`(tower, layer) -> [h]` means; nan where no row qualified."""
        return {place: self.sums[place] / self.counts[place] for place in self.sums}


@dataclass
class RowBlock:
    """Rows of final weights.

    weights: `[b h r s]` float32; rows that see nothing are 0. index: which rows of the call. positions: `[r]` absolute
    positions. valid: `[b r]` rows that count (real tokens after the first). start: rows in the blocks before. logs: log
    of the weights where edits leave them known, very negative but finite at weights of 0. Columns may be cut after the
    last that any row sees. What a probe keeps of weights and logs it must copy: the next block takes their place.
    """

    weights: Tensor
    index: slice | Tensor
    positions: Tensor
    valid: Tensor
    start: int = 0
    logs: Tensor | None = None


class Reading:
    """One attention call as probes see it."""

    def __init__(
        self,
        call: Call,
        final: Callable[[slice | Tensor, int | None], Tensor] | None = None,
    ):
        self.call = call
        self._final = final
        self.state: dict = {}
        self.index: slice | Tensor = slice(None)  # the rows that `block` of a probe gets

    @property
    def edited(self) -> bool:
        return self._final is not None

    @cached_property
    def valid(self) -> Tensor:
        """`[b t]` rows that count: real tokens other than the first of their sequence."""
        call = self.call
        return call.real_rows & (self.positions > self.first_row[:, None])

    @cached_property
    def positions(self) -> Tensor:
        """`[t]` absolute positions of the rows."""
        return torch.arange(self.call.q.shape[2], device=self.call.q.device) + self.call.row_offset

    @cached_property
    def first_row(self) -> Tensor:
        """`[b]` position of the first real row."""
        call = self.call
        if call.step.real.shape[0] != call.q.shape[0] or call.row_offset < 0:
            return torch.full((call.q.shape[0],), call.row_offset, device=call.q.device)
        return call.step.first

    @cached_property
    def first_column(self) -> Tensor:
        """`[b]` column of the first real key; -1 where it has left a sliding cache."""
        call = self.call
        if call.key_step.real.shape[0] != call.k.shape[0]:
            return torch.zeros(call.k.shape[0], dtype=torch.long, device=call.q.device)
        return (call.key_step.first - call.key_offset).clamp_min(-1)

    @cached_property
    def rows(self) -> Tensor:
        """`[b]` how many rows count, as float64."""
        return self.valid.sum(-1).double()

    def row_ids(self) -> Tensor:
        """`[b t]` token ids of the rows; -1 where unknown."""
        return _ids(self.call.step, self.call.row_offset, self.call.q.shape[2], self.call.q.shape[0])

    def column_ids(self) -> Tensor:
        """`[b s]` token ids of the columns; -1 where unknown."""
        return _ids(self.call.key_step, self.call.key_offset, self.call.k.shape[2], self.call.k.shape[0])

    def mass(self, columns: Tensor, real: Tensor | None = None) -> Tensor:
        """`[b h t]` the weight that rows give to columns `[b, g]` together. real: which of them count."""
        call = self.call
        if self.edited:
            rows = self._edited_rows(columns.clamp_min(0))
        else:
            scores = call.scores(slice(None), columns.clamp_min(0))
            rows = (scores - call.finite_lse[..., None]).exp()
        keep = columns >= 0 if real is None else real & (columns >= 0)
        return (rows * keep[:, None, None]).sum(-1)

    def diagonal(self, back: int) -> tuple[Tensor, Tensor]:
        """Weight of each row on the token `back` positions before it `[b h t]`, and which rows have one `[b t]`."""
        call = self.call
        t, s = call.q.shape[2], call.k.shape[2]
        index = torch.arange(t, device=call.q.device) + call.row_offset - call.key_offset - back
        inside = (index >= 0) & (index < s)
        index = index.clamp(0, s - 1)
        if self.edited or call.softcap is not None or (call.mask is not None and call.mask.dtype != torch.bool):
            weights = self._edited_rows(index.expand(call.q.shape[0], -1), pairs=True)
        else:
            b, h, _, d = call.q.shape
            queries = call.q.to(call.work_dtype).view(b, -1, call.groups, t, d)
            keys = call.keys.index_select(2, index)
            scores = (queries * keys[:, :, None]).sum(-1).reshape(b, h, t) * call.scale
            weights = (scores - call.finite_lse).exp()
            if call.mask is not None:
                mask = call.mask.expand(-1, -1, t, -1)
                pick = index[None, None, :, None].expand(mask.shape[0], mask.shape[1], -1, 1)
                weights = weights * mask.gather(3, pick)[..., 0]
        real = call.real_columns[:, index] & inside
        return weights, real

    def _edited_rows(self, columns: Tensor, pairs: bool = False) -> Tensor:
        """Chosen columns of every row, from blocks of final rows: `[b h t g]`, or `[b h t]` with one column a row."""
        parts = []
        for block in self.blocks(trim=False):
            if pairs:
                index = columns[:, None, block.index, None].expand(-1, block.weights.shape[1], -1, 1)
                parts.append(block.weights.gather(3, index)[..., 0])
            else:
                index = columns[:, None, None].expand(-1, block.weights.shape[1], block.weights.shape[2], -1)
                parts.append(block.weights.gather(3, index))
        return torch.cat(parts, 2)

    def keep(self, name: str, block: RowBlock, make: Callable[[], Tensor]) -> None:
        """Keep `make()` for a block, made once for all the probes of a call."""
        parts = self.state.setdefault(name, {})
        if block.start not in parts:
            parts[block.start] = make()

    def kept(self, name: str) -> Tensor:
        """What was kept of all blocks, joined along the last axis: `[b h n]` for the n rows of `index`."""
        return torch.cat(list(self.state[name].values()), -1)

    def blocks(self, chosen: Tensor | None = None, *, trim: bool = True, overwrite: bool = False) -> Iterator[RowBlock]:
        """Yield `RowBlock`s that cover all rows, or chosen ones (ascending, on the CPU).

        trim: leave out columns that no row of a block sees. overwrite: each block may overwrite the one before.
        """
        call = self.call
        b, h, t, _ = call.q.shape
        s = call.k.shape[2]
        n = t if chosen is None else len(chosen)
        trim = trim and call.causal
        on_cpu = call.q.device.type == "cpu"
        area, most = (BLOCK_BYTES if on_cpu else BLOCK_BYTES_GPU) / (4 * b * h), 512 if on_cpu else t
        scratch = self._scratch(b * h * int(max(area, 16 * s) + most)) if overwrite else None
        stop = 0
        while stop < n:
            start = stop
            # trimmed, r rows see (start + r) t / n columns
            size = (math.sqrt(start**2 + 4 * area * n / t) - start) / 2 if trim else area / s
            stop = min(n, start + max(16, min(most, int(size))))
            index = slice(start, stop) if chosen is None else chosen[start:stop].to(call.q.device)
            columns = s
            if trim:
                columns = min(s, stop if chosen is None else int(chosen[stop - 1]) + 1)
            logs = None
            if self._final is not None:
                weights = self._final(index, columns)
            else:
                shape = (b, h, stop - start, columns)
                out = [None, None] if scratch is None else [x[: math.prod(shape)].view(shape) for x in scratch]
                logs = call.log_weights(index, columns, out[0])
                # On CPUs exp2 costs a third of exp, and exp ten times its cost where it underflows.
                weights = torch.mul(logs, math.log2(math.e), out=out[1]).exp2_()
            yield RowBlock(weights, index, self.positions[index], self.valid[:, index], start, logs)

    def _scratch(self, size: int) -> Tensor | None:
        """Two blocks of memory, the same for all layers: new memory would be paid for page by page."""
        call = self.call
        if self.edited or torch.is_grad_enabled():
            return None
        key = ("scratch", size, call.work_dtype, call.q.device)
        return call.step.once(key, lambda: torch.empty(2, size, dtype=call.work_dtype, device=call.q.device))

    def feed(self, probes: Sequence[Probe]) -> None:
        """Give this call to probes: sparse ones first, then one pass over blocks for all the others."""
        probes = [probe for probe in probes if not (probe.causal_only and self.call.kind != "causal")]
        for probe in probes:
            if not probe.reads_rows:
                probe.sparse(self)
        streamed = [probe for probe in probes if probe.reads_rows]
        if not streamed:
            return
        t = self.call.q.shape[2]
        chosen = sample_rows(t) if t > SAMPLED_ABOVE and all(probe.sampled for probe in streamed) else None
        self.index = slice(None) if chosen is None else chosen.to(self.call.q.device)
        for block in self.blocks(chosen, overwrite=True):
            for probe in streamed:
                probe.block(self, block)
        for probe in streamed:
            probe.finish(self)


def sample_rows(t: int, n: int = SAMPLE) -> Tensor:
    """A fixed, stratified sample of n of t rows: one from each of n equal strips, sorted."""
    edges = torch.linspace(0, t, n + 1, dtype=torch.float64)
    jitter = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (edges[:-1] + jitter * (edges[1:] - edges[:-1])).long().clamp_max(t - 1)


def _ids(step, offset: int, n: int, batch: int) -> Tensor:
    if step.ids.shape[0] != batch or offset < 0:
        return torch.full((batch, n), -1, device=step.ids.device)
    part = step.ids[:, offset : offset + n]
    return torch.nn.functional.pad(part, (0, n - part.shape[1]), value=-1)
