"""Rows that lie behind all keys which edits name: attention over the parts of their keys without a mask.

Such a row sees every key of every atom. Of the rest it sees all that comes before these rows, and among them the usual
triangle: gathered keys and one causal call do what calls of all keys under masks would, at the cost of the keys alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.attend.call import Call
from headwise.attend.kernels import attention_with_lse
from headwise.ops.masks import triangle

__all__ = ["RowsBehind", "rows_behind"]

ROWS = 32  # fewer rows are not worth calls of their own


@dataclass
class _Gathered:
    """Some columns `[b, g]` of a call, and where they are not the same number in each sequence a mask `[b 1 1 g]`."""

    columns: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, keys: Tensor) -> "_Gathered | None":
        """The columns in which boolean keys `[b, s]` are True; None where there are none."""
        most = int(keys.sum(-1).max()) if keys.numel() else 0
        if most == 0:
            return None
        columns = keys.int().sort(dim=-1, descending=True, stable=True).indices[:, :most]
        real = keys.gather(1, columns)
        return cls(columns, None if bool(real.all()) else real[:, None, None])


@dataclass
class RowsBehind:
    """The rows of a call from `first` on, and their keys part by part.

    before: an atom each, None where none of its keys is seen, and last what else comes before these rows, if anything
    does. start: the column of the first of these rows. mask: the call's own, for which this holds. shown: `[b 1 1 r]`
    which of the columns from there on are not hidden from all rows; None where all are shown.
    """

    first: int
    start: int
    before: list[_Gathered | None]
    mask: Tensor | None
    shown: Tensor | None

    def attend(self, call: Call) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs `[b h r e]` and log-masses `[b h r]` of every atom, and of the rest in one or two parts."""
        q, t = call.q[:, :, self.first :], call.q.shape[2]
        found = [self._over(part, q, call) for part in self.before]
        own = slice(self.start, self.start + t - self.first)
        found.append(
            attention_with_lse(
                q, call.k[:, :, own], call.v[:, :, own],
                mask=self.shown, causal=True, scale=call.scale, softcap=call.softcap,
            )
        )  # fmt: skip
        return [out for out, _ in found], [lse for _, lse in found]

    def _over(self, part: _Gathered | None, q: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        if part is None:
            lse = torch.full(q.shape[:3], -torch.inf, dtype=call.work_dtype, device=q.device)
            return q.new_zeros(*q.shape[:3], call.v.shape[-1]), lse
        index = part.columns[:, None, :, None]
        k, v = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (call.k, call.v))
        return attention_with_lse(q, k, v, mask=part.mask, scale=call.scale, softcap=call.softcap)


def rows_behind(
    call: Call, atoms: list[Tensor], rest: Tensor, last: int, groups: tuple, skip: int
) -> RowsBehind | None:
    """The rows from `skip` on that lie behind all atoms, where they are many and what they see is a triangle.

    atoms: the keys `[b, s]` of each; rest: all others. last: the column after the last key of an atom. groups: what
    the atoms were made of. Looks at values, once per forward and mask.
    """
    t, s = call.q.shape[2], call.k.shape[2]
    offset, keys = 0, call.mask  # row i sees the columns up to offset + i, of these keys
    if not call.causal:
        offset = call.row_offset - call.key_offset
        keys = None if call.mask is None or call.mask.shape[2] != t else triangle(call.mask, offset)
        if keys is None:
            return None
    elif keys is not None and (keys.dtype != torch.bool or keys.shape[1:3] != (1, 1)):
        return None
    if keys is not None and keys.shape[3] != s:
        return None
    first = max(skip, last - offset)
    if t - first < ROWS or offset < 0 or offset + t > s:
        return None
    place = ("behind", groups, t, s, first)
    known = call.key_step.cache.get(place)
    if known is None or known.mask is not call.mask:
        shown, start = None if keys is None else keys[:, 0, 0], offset + first
        parts = [*atoms, rest & (torch.arange(s, device=rest.device) < start)]
        before = [_Gathered.of(part if shown is None else part & shown) for part in parts]
        before = before if before[-1] is not None else before[:-1]
        own = None if shown is None else shown[:, start : offset + t]
        own = None if own is None or bool(own.all()) else own[:, None, None]
        known = call.key_step.cache[place] = RowsBehind(first, start, before, call.mask, own)
    return known
