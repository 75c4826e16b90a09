"""What columns receive: the mean weight that a key gets from the rows that can see it, kept through a cache.

    s_k = sum_q A[q, k] / |{q : q sees k}|

over the rows of real tokens. Of a causal map of N rows the denominator of column k is N - k.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.attend.call import Call
from headwise.attend.read import Reading
from headwise.ops.masks import hide_exactly, visible

__all__ = ["ColumnMemory", "Received", "column_sums", "mean_received", "rows_that_see", "sink_limit"]

THRESHOLD, RELATIVE = 0.1, 5.0
ROWS = 512  # of a mask that are looked at together


@dataclass
class Received:
    """Sums and counts of columns: `sums` `[b h s]`, `counts` `[b h s]` or `[b 1 s]` where all heads see the same."""

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> Float[Tensor, "b h s"]:
        """0 for columns that no row has seen."""
        return self.sums / self.counts.clamp_min(1)

    def take(self, rows: Tensor | None = None, heads: list[int] | None = None) -> "Received":
        """The same of other rows of the batch, of some of the heads."""
        found = []
        if rows is None and heads is None:
            return self
        for x in (self.sums, self.counts):
            x = x if rows is None else x.index_select(0, rows)
            found.append(x if heads is None or x.shape[1] == 1 else x[:, heads])
        return Received(*found)


def mean_received(
    weights: Float[Tensor, "b h t s"], real: Bool[Tensor, "b s"] | None = None, *, causal: bool = True
) -> Float[Tensor, "b h s"]:
    """Of weights that were formed: mean weight of every column over the real rows that can see it.

    real: False on padding, whose rows do not count and whose columns receive 0; None means that there is none.
    causal: the last row sees the last column, and so on; otherwise every row sees every column.
    Raises ValueError for a causal map with more rows than columns, and for padding of another shape.

    >>> mean_received(torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])).tolist()
    [[[0.625, 0.75]]]
    """
    b, _, t, s = weights.shape
    if causal and t > s:
        raise ValueError(f"mean_received: a causal map of {t} rows and {s} columns; there are at most as many rows")
    if real is not None and tuple(real.shape) != (b, s):
        raise ValueError(f"mean_received: real has shape {tuple(real.shape)}; expected {(b, s)}, one for every column")
    if not causal and real is not None and t != s:
        raise ValueError(f"mean_received: {t} rows, {s} columns and padding; a map of another shape must be causal")
    columns = torch.ones(b, s, dtype=torch.bool, device=weights.device) if real is None else real
    rows = columns[:, s - t :] if causal or real is not None else columns.new_ones(b, t)
    seen = rows[..., None].expand(b, t, s)
    if causal:
        seen = seen & torch.ones(t, s, dtype=torch.bool, device=weights.device).tril(s - t)
    sums = (weights * rows[:, None, :, None]).sum(2)
    return sums / seen.sum(1).clamp_min(1)[:, None] * columns[:, None]


def sink_limit(where: str, threshold: float | None, relative: bool) -> float:
    """The mean weight above which a key is a sink, 0.1 where none is given; relative: in even shares 1 / N, then 5.

    Raises ValueError where it makes every key a sink, or none.
    """
    if threshold is None:
        return RELATIVE if relative else THRESHOLD
    if relative and not threshold > 0:
        raise ValueError(f"{where}: threshold is {threshold}; it must be above 0 (5 means five times the even share)")
    if not relative and not 0 < threshold < 1:
        raise ValueError(
            f"{where}: threshold is {threshold}; a mean weight lies between 0 and 1 (relative=True takes multiples of "
            "the even share)"
        )
    return threshold


@torch.no_grad()
def column_sums(call: Call) -> Float[Tensor, "b h s"]:
    """Weight that the real rows of a call give to every column, in all; block by block, no map is kept."""
    sums = torch.zeros(*call.q.shape[:2], call.k.shape[2], dtype=call.work_dtype, device=call.q.device)
    for block in Reading(call).blocks(overwrite=True):
        real = call.real_rows[:, block.index].to(block.weights.dtype)
        sums[..., : block.weights.shape[-1]] += (real[:, None, None] @ block.weights)[:, :, 0]
    return sums


def rows_that_see(call: Call) -> Float[Tensor, "b _ s"]:
    """How many real rows of a call see each column: `[b 1 s]`, or `[b h s]` where a mask differs from head to head."""
    if call.mask is not None and call.mask.shape[1] > 1:
        return _rows_that_see(call)
    key = ("rows that see", id(call.mask), call.causal, call.q.shape[2], call.k.shape[2])
    return call.step.once(key, lambda: _rows_that_see(call))


def _rows_that_see(call: Call) -> Tensor:
    t, s, real = call.q.shape[2], call.k.shape[2], call.real_rows.to(call.work_dtype)
    mask = None if call.mask is None else hide_exactly(call.mask)
    if mask is None or mask.shape[2] == 1:  # columns are hidden from all rows alike
        if call.causal:  # column j is seen from row j on
            counts = torch.nn.functional.pad(real.flip(-1).cumsum(-1).flip(-1), (0, max(0, s - t)))[:, :s]
        else:
            counts = real.sum(-1, keepdim=True).expand(-1, s)
        seen = visible(mask, False, t, s, real.device)
        return counts[:, None] if seen is None else counts[:, None] * seen[:, :, 0]
    total = None
    for start in range(0, t, ROWS):
        rows = slice(start, min(t, start + ROWS))
        seen = visible(mask, call.causal, t, s, real.device, rows=rows)
        assert seen is not None  # there is a mask
        part = (real[:, None, None, rows] @ seen.to(real.dtype))[:, :, 0]
        total = part if total is None else total + part
    return real.new_zeros(real.shape[0], 1, s) if total is None else total


@dataclass
class ColumnMemory:
    """The statistics of a layer's columns while a sequence grows, over absolute positions.

    It lies with the cache (`Step.carried`), is copied with it, and gives every forward what was known before it. The
    same forward may come again (checkpointing runs layers twice): it is then counted once. Rows that a beam search has
    moved are recognised by their keys.
    """

    past: int = 0
    total: int = 0
    held: dict[tuple[int, ...], Received] = field(default_factory=dict)  # heads -> before the latest forward
    kept: dict[tuple[int, ...], Received] = field(default_factory=dict)  # heads -> after it
    marks: Tensor | None = None  # `[b n]` what the keys of the latest forward were known by, and where they began
    first: int = 0
    order: Tensor | None = None  # the rows of the forward before that those of the latest continue; None: the same

    def before(self, call: Call) -> Received:
        """What the columns of a call had received before it, in memory of its own.

        Raises RuntimeError where the cache went back.
        """
        past, again = call.step.past, self.total > call.step.past
        if again and past != self.past:
            raise RuntimeError(
                f"the cache went back from {self.total} to {past} tokens, and what columns had received then is not "
                "kept; go on from a copy of the cache that was made there"
            )
        if not again:  # the first heads of this layer in a new forward
            self.held, self.kept = self.kept, {}
            self._follow(call)
        self.past, self.total = past, call.step.total
        found = self._of(tuple(call.heads))
        b, h, s = *call.q.shape[:2], call.k.shape[2]
        if found is None:
            zero = torch.zeros(b, h, s, dtype=call.work_dtype, device=call.q.device)
            return Received(zero, zero[:, :1].clone())
        return Received(*(_to_columns(x, call) for x in (found.sums, found.counts)))

    def keep(self, call: Call, received: Received) -> None:
        """Keep what the columns of a call have received after it."""
        self.kept[tuple(call.heads)] = Received(*(_to_positions(x, call) for x in (received.sums, received.counts)))

    def _of(self, heads: tuple[int, ...]) -> Received | None:
        if heads in self.held:
            return self.held[heads].take(self.order)
        parts = []  # other edits divide the heads of a layer otherwise than before
        for head in heads:
            known = next((of for of in self.held if head in of), None)
            if known is None:
                return None
            one = self.held[known].take(self.order, [known.index(head)])
            parts.append(Received(one.sums, one.counts.expand_as(one.sums)))
        return Received(*(torch.cat([getattr(one, x) for one in parts], 1) for x in ("sums", "counts")))

    def _follow(self, call: Call) -> None:
        """Find the row of the last forward that each row continues: the one with the same keys."""
        old, offset = self.marks, self.first
        batch = call.k.shape[0]
        self.marks = None if batch == 1 and (old is None or len(old) == 1) else _marks(call)
        self.first, self.order = call.key_offset, None
        if call.step.past == 0 or not self.held:
            return
        known = next(iter(self.held.values())).sums.shape[0]
        if known == 1:
            self.order = None if batch == 1 else torch.zeros(batch, dtype=torch.long, device=call.k.device)
        elif old is not None and self.marks is not None:
            start, stop = max(offset, call.key_offset), call.step.past
            self.order = _continued(
                self.marks[:, start - call.key_offset : stop - call.key_offset], old[:, start - offset : stop - offset]
            )


def _marks(call: Call) -> Tensor:
    """`[b s]` a number for every key, by which it is known again."""
    keys = call.k[:, 0].float()
    return keys @ torch.linspace(1, 2, keys.shape[-1], device=keys.device)


def _continued(new: Tensor, old: Tensor) -> Tensor | None:
    """For each row of new the nearest one of old, itself where none is nearer; None where all are themselves."""
    if new.shape == old.shape and torch.equal(new, old):
        return None
    distance = torch.cdist(new, old, p=1)
    order = distance.argmin(1)
    if len(new) == len(old):
        own = torch.arange(len(new), device=new.device)
        order = torch.where(distance.diagonal() <= distance.amin(1), own, order)
    return order


def _to_columns(x: Tensor, call: Call) -> Tensor:
    """From absolute positions to the columns of a call, in memory of its own."""
    s = call.k.shape[2]
    part = x[..., call.key_offset :][..., :s] if call.key_offset or x.shape[-1] > s else x
    missing = s - part.shape[-1]
    return torch.nn.functional.pad(part, (0, missing)) if missing else part.clone()


def _to_positions(x: Tensor, call: Call) -> Tensor:
    """From the columns of a call to absolute positions; what has left a sliding cache is 0 and never asked for."""
    if call.key_offset:
        x = torch.nn.functional.pad(x, (call.key_offset, 0))
    return x if x.shape[-1] <= call.key_step.total else x[..., : call.key_step.total]
