"""One attention call: what a layer hands to attention, and how its scores are read without keeping them."""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from headwise.attend.kernels import attention_with_lse
from headwise.attend.step import Step
from headwise.ops.masks import decompose

__all__ = ["Call"]


@dataclass
class Call:
    """One call of attention after rotary embedding, q/k norms and the cache.

    q `[b h t d]`, k `[b n s d]`, v `[b n s e]` with un-repeated grouped keys (n divides h).
    mask: boolean (True = may attend) or additive float, broadcastable to `[b h t s]`, or None.
    causal: only without a mask: row i sees columns up to i.
    softcap: `softcap * tanh(score / softcap)` before the mask. sinks: `[h]` learned sink logits (one more column of
    the softmax that carries no value). heads: the model's head number of each of the h heads (a call may hold a part).
    step, key_step: the forward of the queries and of the keys (they differ in cross attention).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None
    tower: str = ""
    layer: int = 0
    kind: str = "causal"
    heads: list[int] = field(default_factory=list)
    step: Step = None  # pyright: ignore[reportAssignmentType]  (filled in below)
    key_step: Step = None  # pyright: ignore[reportAssignmentType]
    memo: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)
    """id of an edit -> what it said of the rows of this forward; parts of a call share it."""

    def __post_init__(self):
        if not self.heads:
            self.heads = list(range(self.q.shape[1]))
        b, t, s = self.q.shape[0], self.q.shape[2], self.k.shape[2]
        if self.step is None:
            self.step = Step.of(b, t, self.q.device)
        if self.key_step is None:
            self.key_step = self.step if self.step.total == s else Step.of(b, s, self.q.device)

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype in which scores are formed when they are read: float32, or float64 for float64 inputs."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def key_offset(self) -> int:
        """Absolute position of column 0; sliding caches hold only the last columns of the sequence."""
        return max(0, self.key_step.total - self.k.shape[2])

    @property
    def row_offset(self) -> int:
        """Absolute position of row 0."""
        return self.step.total - self.q.shape[2]

    def columns(self, members: Tensor) -> Tensor:
        """Map a boolean `[b, total]` over absolute positions to this call's columns `[b, s]`."""
        if members.shape[1] == self.k.shape[2]:
            return members
        part = members[:, self.key_offset :][:, : self.k.shape[2]]
        missing = self.k.shape[2] - part.shape[1]  # a static cache is longer than what it holds
        return torch.nn.functional.pad(part, (0, missing)) if missing else part

    @cached_property
    def real_rows(self) -> Tensor:
        """`[b, t]` True for rows of real tokens."""
        b, t = self.q.shape[0], self.q.shape[2]
        if self.step.batch != b or self.row_offset < 0:  # a vision tower that calls once per window
            return torch.ones(b, t, dtype=torch.bool, device=self.q.device)
        return self.step.real[:, self.row_offset : self.row_offset + t]

    @property
    def every_row_real(self) -> bool:
        """Whether no row of the call is of padding. Looks at values, once a forward, where padding may be."""
        if self.step.batch != self.q.shape[0] or self.row_offset < 0:
            return True
        return self.step.rows_real if self.q.shape[2] == self.step.length else bool(self.real_rows.all())

    @cached_property
    def real_columns(self) -> Tensor:
        """`[b, s]` True for columns of real tokens."""
        b, s = self.k.shape[0], self.k.shape[2]
        if self.key_step.batch != b:
            return torch.ones(b, s, dtype=torch.bool, device=self.q.device)
        return self.columns(self.key_step.real)

    def attend(self, *, bias: Tensor | None = None, only: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fused attention and its log-sum-exp without the sink column: `[b h t e]`, `[b h t]`.

        bias: `[b|1, h|1, 1, s]` added to the scores (kept broadcast: it costs nothing beside the causal flag).
        only: boolean `[b, s]`, or `[b, h, s]` where they differ from head to head: the columns to attend to; rows that
            see none of them get output 0 and -inf.
        """
        mask = self.mask
        if bias is not None:
            mask = bias if mask is None else _add(mask, bias, self.work_dtype)
        if only is None:
            return attention_with_lse(
                self.q, self.k, self.v, mask=mask, causal=self.causal, scale=self.scale, softcap=self.softcap
            )
        # A finite exclusion, not -inf: a row that sees nothing else is recognised by its log-sum-exp afterwards,
        # without looking at the mask. exp(-3e4) is 0 in every dtype.
        excluded = torch.zeros(only.shape, dtype=self.work_dtype, device=only.device).masked_fill_(~only, _EXCLUDED)
        excluded = excluded[:, None, None] if only.ndim == 2 else excluded[:, :, None]
        mask = excluded if mask is None else _add(mask, excluded, self.work_dtype)
        out, lse = attention_with_lse(
            self.q, self.k, self.v, mask=mask, causal=self.causal, scale=self.scale, softcap=self.softcap
        )
        empty = lse < _EXCLUDED / 2
        return out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)

    @cached_property
    def lse(self) -> Tensor:
        """`[b h t]` log of the softmax denominator, the sink column included; -inf where a row sees nothing."""
        lse = self.memo["lse"] if "lse" in self.memo else self.attend()[1]
        return lse if self.sinks is None else torch.logaddexp(lse, self.sinks.to(lse.dtype)[None, :, None])

    @cached_property
    def finite_lse(self) -> Tensor:
        """lse with 0 for rows that see nothing."""
        return self.lse.masked_fill(torch.isneginf(self.lse), 0)

    @cached_property
    def keys(self) -> Tensor:
        """k in the dtype in which scores are read."""
        return self.k.to(self.work_dtype)

    def scores(self, rows: slice | Tensor, columns: Tensor | int | None = None) -> Tensor:
        """`[b h r s]` scores of rows, as the softmax sees them: scaled, soft-capped, biased, -inf where masked.

        rows: a slice or indices. columns: `[b, g]` or `[b, h, g]` indices (then the scores are `[b h r g]`), or a
        number n for the first n columns.
        """
        b, h, _, d = self.q.shape
        keys = self.keys
        if isinstance(columns, int):
            keys = keys[:, :, :columns]
        elif columns is not None and columns.ndim == 2:
            keys = keys.gather(2, columns[:, None, :, None].expand(-1, keys.shape[1], -1, d))
        whole = isinstance(rows, slice) and rows in (slice(None), slice(0, self.q.shape[2]))
        queries = (self.q if whole else self.q[:, :, rows]).to(self.work_dtype)
        r = queries.shape[2]
        if isinstance(columns, Tensor) and columns.ndim == 3:
            scores = queries @ self.at_columns(keys, columns).mT * self.scale
        else:
            n, s = keys.shape[1:3]
            queries = queries.reshape(b * n, self.groups * r, d)
            scores = torch.bmm(queries, keys.reshape(b * n, s, d).mT).mul_(self.scale).view(b, h, r, s)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return self.masked(scores, rows, columns)

    def log_weights(self, rows: slice | Tensor, columns: int, out: Tensor | None = None) -> Tensor:
        """`[b h r columns]` log of the weights of rows over the first columns; very negative (finite) where masked.

        rows: a slice, or ascending indices. out: where to write them; used only without softcap and gradients.
        The hot loop of every probe that reads whole rows: scale and log-sum-exp ride on the matrix product, and a
        causal mask is written only right of the first row's diagonal.
        """
        lse = self.finite_lse[:, :, rows]
        if self.softcap is not None or torch.is_grad_enabled():
            return (self.scores(rows, columns) - lse[..., None]).clamp_min(_NEVER)
        b, h, r = lse.shape
        n, d = self.k.shape[1], self.q.shape[3]
        out = torch.baddbmm(
            -lse.reshape(b * n, -1, 1),
            self.q[:, :, rows].to(self.work_dtype).reshape(b * n, -1, d),
            self.keys[:, :, :columns].reshape(b * n, columns, d).mT,
            alpha=self.scale,
            out=None if out is None else out.view(b * n, -1, columns),
        ).view(b, h, r, columns)
        if self.mask is not None:
            mask = self.mask[:, :, rows] if self.mask.shape[2] > 1 else self.mask
            mask = mask[..., :columns]
            if mask.dtype == torch.bool:
                _hide(out, ~mask)
            else:
                out.add_(mask).clamp_min_(_NEVER)
        if self.causal:
            row = torch.arange(self.q.shape[2], device=out.device)[rows]
            first = (rows.start or 0) if isinstance(rows, slice) else int(rows[0])
            corner = out[..., first:]
            _hide(corner, torch.arange(first, first + corner.shape[-1], device=out.device) > row[:, None])
        return out

    def masked(self, scores: Tensor, rows: slice | Tensor, columns: Tensor | int | None = None) -> Tensor:
        """Add the mask of these rows (and columns) to scores."""
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
            if isinstance(columns, int):
                mask = mask[..., :columns]
            elif columns is not None and mask.shape[3] > 1:
                index = columns[:, None] if columns.ndim == 2 else columns
                index = index[:, :, None].expand(-1, max(mask.shape[1], index.shape[1]), mask.shape[2], -1)
                mask = mask.expand(len(index), index.shape[1], -1, -1).gather(3, index)
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if self.causal:
            row = torch.arange(self.q.shape[2], device=scores.device)[rows][:, None]
            if isinstance(columns, Tensor):
                hidden = columns[:, None, None, :] > row if columns.ndim == 2 else columns[:, :, None, :] > row
            else:
                hidden = torch.arange(scores.shape[-1], device=scores.device) > row
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores

    def at_columns(self, x: Tensor, columns: Tensor) -> Tensor:
        """`[b h g d]` of keys or values `[b n s d]`, at columns `[b h g]` of every query head."""
        b, h, _ = columns.shape
        batch = torch.arange(b, device=x.device)[:, None, None]
        return x[batch, torch.arange(h, device=x.device)[None, :, None] // self.groups, columns]

    def simplified(self) -> "Call":
        """The same call with a mask of padding alone written as a causal flag and a broadcast key mask.

        A dense mask costs 1.2 to 1.8 times as much. The result may differ from the dense form in the last bit.
        """
        if self.mask is None or self.causal:
            return self
        keys = decompose(self.mask)
        if keys is None:
            return self
        memo = {"lse": self.memo["lse"]} if "lse" in self.memo else {}
        return replace(self, mask=keys, causal=True, memo=memo)

    def last_rows(self, count: int) -> "Call":
        """The same call for its last rows."""
        t, s = self.q.shape[2], self.k.shape[2]
        if count == t:
            return self
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, t - count :]
        if self.causal and t - count < s - 1:  # otherwise every row sees every key
            seen = torch.arange(s, device=self.q.device) <= torch.arange(t - count, t, device=self.q.device)[:, None]
            if mask is None or mask.dtype == torch.bool:
                mask = seen[None, None] if mask is None else mask & seen
            else:
                mask = mask.masked_fill(~seen, -torch.inf)
        return replace(self, q=self.q[:, :, t - count :], mask=mask, causal=False, memo={})

    def take(self, heads: list[int], *, expand: bool = False) -> "Call":
        """The same call for some of its heads (positions in this call).

        expand: give every head its own copy of its keys, so that they may be changed. Otherwise the heads must be
        whole key groups.
        """
        if heads == list(range(self.q.shape[1])) and not (expand and self.groups > 1):
            return self._with()
        kv = [head // self.groups for head in (heads if expand else heads[:: self.groups])]
        mask = self.mask
        if mask is not None and mask.shape[1] > 1:
            mask = _pick(mask, heads)
        return self._with(
            q=_pick(self.q, heads),
            k=_pick(self.k, kv),
            v=_pick(self.v, kv),
            mask=mask,
            sinks=None if self.sinks is None else self.sinks[heads],
            heads=[self.heads[i] for i in heads],
        )

    def _with(self, **changes: Any) -> "Call":
        """`replace` with a memo of its own, in a fraction of its time: it is needed in every layer and forward."""
        new = object.__new__(Call)
        new.__dict__.update({name: self.__dict__[name] for name in _FIELDS}, memo={}, **changes)
        return new


def _pick(x: Tensor, heads: list[int]) -> Tensor:
    """Heads of `[b h .. ..]`; neighbours are a view, so that a decode step copies no keys."""
    if heads == list(range(heads[0], heads[0] + len(heads))):
        return x[:, heads[0] : heads[0] + len(heads)]
    return x[:, torch.tensor(heads, device=x.device)]


_FIELDS = tuple(one.name for one in fields(Call))
_EXCLUDED = -3e4
_NEVER = -1e4  # exp is 0, and 0 * _NEVER is 0 where 0 * -inf is nan


def _hide(logs: Tensor, hidden: Tensor) -> None:
    """Lower hidden logs to _NEVER in place; a minimum costs a seventh of `masked_fill_`."""
    bound = torch.full(hidden.shape, torch.inf, dtype=logs.dtype, device=logs.device)
    logs.clamp_max_(bound.masked_fill_(hidden, _NEVER))


def _add(mask: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Add a bias to a mask of either kind."""
    if mask.dtype == torch.bool:
        return torch.where(mask, bias.to(dtype), -torch.inf)
    return mask.to(dtype) + bias
