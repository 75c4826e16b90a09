"""Primitive edits: the few ways in which attention can be changed while a model runs.

Methods in `headwise.steering` are made of these.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.call import Call
from headwise.attend.edit import Edit, GroupEdit, Heads, InputEdit, OutputEdit, RowEdit, Rows
from headwise.attend.groups import KeyGroup
from headwise.ops.softmax import log_sum_exp

__all__ = [
    "Ablate",
    "BiasGroup",
    "EditRows",
    "ForceRows",
    "PerturbScores",
    "ProjectHead",
    "ReplaceHeads",
    "ScaleGroup",
    "ScaleHeads",
]


@dataclass
class ScaleHeads(OutputEdit):
    """Multiply the outputs of heads by a factor.

    scale: a number, `[l, h]` for each head of the tower, or `[b, l, h]` for each item of the batch as well.
    """

    scale: float | Tensor = 1.0

    @property
    def neutral(self) -> bool:
        return not isinstance(self.scale, Tensor) and self.scale == 1

    def change(self, out: Tensor, call: Call) -> Tensor:
        scale = self.scale
        if isinstance(scale, Tensor):
            part = scale[..., call.layer, :][..., call.heads].to(out)
            part = part.view(-1, 1, part.shape[-1], 1)
            if part.shape[0] not in (1, out.shape[0]):
                raise ValueError(f"ScaleHeads: scale is for a batch of {part.shape[0]}, this one has {out.shape[0]}")
            return out * part
        return out * scale


@dataclass
class ReplaceHeads(OutputEdit):
    """Replace the outputs of heads.

    values: for each head a tensor `[e]`, `[t, e]` or `[b, t, e]` (t: absolute positions, or the rows of the call),
    or a function from its output `[b, t, e]` to a new one.
    """

    values: Mapping[Head, Tensor | Callable[[Tensor], Tensor]]

    def __post_init__(self):
        super().__post_init__()
        self.values = {Head.parse(h) if isinstance(h, str) else h: value for h, value in self.values.items()}
        if self.heads is None:
            self.heads = list(self.values)

    @property
    def neutral(self) -> bool:
        return not self.values

    def change(self, out: Tensor, call: Call) -> Tensor:
        new = []
        for i, number in enumerate(call.heads):
            value = self.values.get(Head(call.layer, number, call.tower))
            if value is None:
                new.append(out[:, :, i])
            elif callable(value):
                new.append(value(out[:, :, i]))
            else:
                new.append(_at_rows(value, call).to(out).expand_as(out[:, :, i]))
        return torch.stack(new, 2)


def _at_rows(value: Tensor, call: Call) -> Tensor:
    """The part of a `[.. t e]` value that belongs to the rows of a call."""
    t = call.q.shape[2]
    if value.ndim < 2 or value.shape[-2] in (1, t):
        return value
    if value.shape[-2] < call.row_offset + t:
        raise ValueError(
            f"replacement of {call.tower or 'the model'} layer {call.layer}: it has {value.shape[-2]} rows but the "
            f"sequence has {call.row_offset + t}; give one row, or a row for every position"
        )
    return value[..., call.row_offset : call.row_offset + t, :]


@runtime_checkable
class HeadStatistics(Protocol):
    """Outputs of heads on other text, such as a `HeadOutputs` probe has read."""

    def mean(self) -> dict[Head, Tensor]: ...

    def resample(self) -> dict[Head, Tensor]: ...


@dataclass
class Ablate(Edit):
    """Take heads out.

    mode: what is left of a head:
        zero: nothing (its output is 0; a bias of the output projection stays);
        uniform: the mean of the values that a row may see (what a query of zeros attends to);
        first: the value of the first key that a row may see, as if all attention were parked on the sink;
        mean: its mean output over the real tokens of other text (`statistics`);
        resample: its outputs on another text, position by position (`statistics`).
    statistics: for mean and resample, a `HeadOutputs` probe that has read that text (`headwise.head_outputs`).
    """

    heads: Heads = field(default=None, kw_only=False)
    mode: Literal["zero", "uniform", "first", "mean", "resample"] = "zero"
    statistics: HeadStatistics | None = None

    def __post_init__(self):
        super().__post_init__()
        modes = ("zero", "uniform", "first", "mean", "resample")
        if self.mode not in modes:
            raise ValueError(f"Ablate: mode is {self.mode!r}; choose from {', '.join(modes)}")
        if (self.mode in ("mean", "resample")) != (self.statistics is not None):
            raise ValueError(
                f"Ablate: mode {self.mode!r} with statistics={self.statistics!r}; mean and resample need the outputs "
                "of another run (headwise.head_outputs), the other modes take none"
            )

    def primitives(self) -> tuple[Edit, ...]:
        same: dict[str, Any] = {"heads": self.heads, "when": self.when}
        if self.mode == "zero":
            return (ScaleHeads(scale=0.0, **same),)
        if self.mode == "uniform":
            return (_Uniform(**same),)
        if self.mode == "first":
            return (ForceRows(pattern="first", **same),)
        return (ReplaceHeads(values=self._values(), **same),)

    def _values(self) -> dict[Head, Tensor]:
        assert self.statistics is not None  # checked when the edit was made
        return self.statistics.mean() if self.mode == "mean" else self.statistics.resample()


@dataclass
class _Uniform(InputEdit):
    """Attend evenly to all visible keys: a query of zeros, with no bias left in the mask."""

    def change(self, call: Call) -> Call:
        mask = call.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        return replace(call, q=torch.zeros_like(call.q), mask=mask, memo={})


@dataclass
class ProjectHead(InputEdit):
    """Project the queries, keys or values of heads: x becomes mean + U U^T (x - mean).

    which: "q", "k" or "v". basis: U, `[d, r]` with orthonormal columns (r may be 0), or one such basis for each head.
    keep: True keeps only the part in the span of the basis, False removes that part. mean: what stays whatever the
    basis, `[d]` or one for each head; None is 0. group: only at these positions (rows for q, keys for k and v), as
    where a basis was found at the labels of a question; None is everywhere. With grouped keys only the named query
    head sees its projected keys or values. Queries and keys come after rotary embedding.
    """

    which: Literal["q", "k", "v"]
    basis: Tensor | dict[Head, Tensor]
    keep: bool = field(default=True, kw_only=True)
    mean: Tensor | dict[Head, Tensor] | None = field(default=None, kw_only=True)
    group: KeyGroup | None = field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.which not in ("q", "k", "v"):
            raise ValueError(f"ProjectHead: which is {self.which!r}; choose q, k or v")
        if callable(self.when):
            raise ValueError("ProjectHead: when must be all, prompt or generated; keys have no rows to choose from")
        if self.group is not None:
            _check_group("ProjectHead", self.group)
        if isinstance(self.basis, dict) and self.heads is None:
            self.heads = list(self.basis)

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return () if self.group is None else (self.group,)

    def change(self, call: Call) -> Call:
        x = getattr(call, self.which)
        basis = _each_head(self.basis, call)
        if basis.shape[-2] != x.shape[-1]:
            raise ValueError(
                f"ProjectHead: basis has {basis.shape[-2]} rows but {self.which} has {x.shape[-1]} columns"
            )
        basis = basis.to(x)
        mean: Tensor | float = 0.0
        if self.mean is not None:
            mean = _each_head(self.mean, call).to(x)
            if mean.shape[-1] != x.shape[-1]:
                raise ValueError(f"ProjectHead: mean has {mean.shape[-1]} entries but {self.which} has {x.shape[-1]}")
            mean = mean[..., None, :]
        part = ((x - mean) @ basis) @ basis.mT
        new = mean + part if self.keep else x - part
        if self.group is not None:
            chosen = self._chosen(call)[:, None, :, None]
            new = torch.where(chosen, new, x)
        return replace(call, **{self.which: new}, memo={})

    def _chosen(self, call: Call) -> Tensor:
        """`[b, n]` the rows (for q) or columns (for k and v) of a call that the group names."""
        assert self.group is not None
        if self.which != "q":
            return call.columns(self.group.members(call.key_step))
        return self.group.members(call.step)[:, call.row_offset : call.row_offset + call.q.shape[2]]


def _each_head(value: Tensor | dict[Head, Tensor], call: Call) -> Tensor:
    """A tensor for all heads, or those of the heads of a call one above the other."""
    if not isinstance(value, dict):
        return value
    return torch.stack([value[Head(call.layer, number, call.tower)] for number in call.heads])


@dataclass
class BiasGroup(GroupEdit):
    """Add a constant to the scores of a key group: its mass is multiplied by exp(bias) and rows are renormalised.

    bias: a number, `[l, h]` or a number for each head. Minus infinity removes the group, plus infinity leaves nothing
    else; a row in which that would leave no key is left as it was.
    """

    group: KeyGroup
    bias: float | Tensor | dict[Head, float]

    def __post_init__(self):
        super().__post_init__()
        _check_group("BiasGroup", self.group)
        if isinstance(self.bias, dict):
            self.heads = list(self.bias) if self.heads is None else self.heads
        elif not isinstance(self.bias, Tensor) and math.isnan(self.bias):
            raise ValueError("BiasGroup: bias is nan; give a number, infinities included")

    @property
    def neutral(self) -> bool:
        if isinstance(self.bias, dict):
            return all(value == 0 for value in self.bias.values())
        return not isinstance(self.bias, Tensor) and self.bias == 0

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return (self.group,)

    def constant(self, call: Call) -> list[Tensor | float] | None:
        return [_one_or_per_head(self.bias, call, 0.0)]

    def reweigh(self, log_mass: Tensor, inside: Tensor, call: Call) -> Tensor:
        return _shift(log_mass, inside[0], _per_head(self.bias, call, 0.0))


@dataclass
class ScaleGroup(GroupEdit):
    """Multiply the mass of a key group by a factor.

    remainder: where the difference goes:
        rest: the group keeps factor * mass (at most 1) and the other keys take what is left, in proportion;
        renormalise: the row is divided by its new sum (the same as a bias of log factor);
        none: nowhere, rows then do not sum to 1.
    A row whose other keys have no mass is left as it was, except with "none".
    """

    group: KeyGroup
    factor: float | Tensor | dict[Head, float]
    remainder: Literal["rest", "renormalise", "none"] = field(default="rest", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        _check_group("ScaleGroup", self.group)
        if self.remainder not in ("rest", "renormalise", "none"):
            raise ValueError(f"ScaleGroup: remainder is {self.remainder!r}; choose rest, renormalise or none")
        if isinstance(self.factor, dict):
            self.heads = list(self.factor) if self.heads is None else self.heads
            smallest = min(self.factor.values(), default=1.0)
        else:
            smallest = torch.as_tensor(self.factor).min()
        if not smallest >= 0:
            raise ValueError(f"ScaleGroup: factor is {self.factor}; it must be 0 or more")

    @property
    def neutral(self) -> bool:
        if isinstance(self.factor, dict):
            return all(value == 1 for value in self.factor.values())
        return not isinstance(self.factor, Tensor) and self.factor == 1

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return (self.group,)

    def constant(self, call: Call) -> list[Tensor | float] | None:
        if self.remainder != "renormalise":
            return None
        factor = _one_or_per_head(self.factor, call, 1.0)
        if isinstance(factor, Tensor):
            return [_log(factor)]
        return [math.log(factor) if factor > 0 else -math.inf]

    def reweigh(self, log_mass: Tensor, inside: Tensor, call: Call) -> Tensor:
        factor = _per_head(self.factor, call, 1.0)
        if self.remainder == "renormalise":
            return _shift(log_mass, inside[0], _log(factor))
        factor = factor.view(1, -1, 1).to(log_mass)
        log_factor = _log(factor)
        if self.remainder == "none":
            return torch.where(inside[0], log_mass + log_factor[..., None], log_mass)
        group, rest = _masses(log_mass, inside[0])
        # 1 - c m = (1 - m) + (1 - c) m: for c <= 1 nothing is subtracted, so it is exact as m -> 1. For c > 1 the
        # group stops at the whole row.
        unchanged = torch.isneginf(rest) | torch.isneginf(group)
        group, rest = group.masked_fill(unchanged, 0), rest.masked_fill(unchanged, 0)
        keep = torch.minimum(log_factor + group, torch.zeros_like(group))
        given = log_sum_exp(torch.stack([rest, _log(1 - factor) + group], -1))
        taken = (_log(factor - 1) + group).clamp_max(50).exp()  # more than all there is, whatever the factor
        left = torch.where(factor > 1, _log(rest.exp() - taken), given)
        to_group, to_rest = keep - group, left - rest
        moved = log_mass + torch.where(inside[0], to_group[..., None], to_rest[..., None])
        moved = torch.where(torch.isneginf(log_mass), log_mass, moved)
        return torch.where(unchanged[..., None], log_mass, moved)


def _check_group(where: str, group: object) -> None:
    if not isinstance(group, KeyGroup):
        raise TypeError(f"{where}: group is {type(group).__name__}; make one, e.g. attend.first_token()")


def _masses(log_mass: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Log-mass of a group and of everything else, `[b h t]`; each from its own atoms, never 1 - the other."""
    nothing = torch.full_like(log_mass, -torch.inf)
    return (
        log_sum_exp(torch.where(inside, log_mass, nothing)),
        log_sum_exp(torch.where(inside, nothing, log_mass)),
    )


def _shift(log_mass: Tensor, inside: Tensor, bias: Tensor) -> Tensor:
    """Add a `[h]` bias to a group's log-mass and renormalise; infinities mean all or nothing."""
    bias = bias.view(1, -1, 1, 1).to(log_mass)
    shifted = torch.where(inside, log_mass + bias.nan_to_num(posinf=0.0, neginf=0.0), log_mass)
    shifted = torch.where(inside & torch.isneginf(bias), -torch.inf, shifted)
    group = torch.where(inside, log_mass, -torch.inf).amax(-1, keepdim=True)
    only_group = torch.isposinf(bias) & (group > -torch.inf)
    shifted = torch.where(only_group & ~inside, -torch.inf, shifted)
    empty = torch.isneginf(shifted.amax(-1, keepdim=True))  # nothing would be left: the row stays as it was
    shifted = torch.where(empty, log_mass, shifted)
    total = log_sum_exp(shifted, keepdim=True)
    return torch.where(empty, log_mass, shifted - total)


def _log(x: Tensor) -> Tensor:
    """log x; -inf with gradient 0 where x is 0 or less."""
    return x.masked_fill(x <= 0, 1).log().masked_fill(x <= 0, -torch.inf)


def _one_or_per_head(value: float | Tensor | dict[Head, float], call: Call, default: float) -> Tensor | float:
    """One number for all heads of a call, or `[h]` numbers."""
    return _per_head(value, call, default) if isinstance(value, Tensor | dict) else float(value)


def _per_head(value: float | Tensor | dict[Head, float], call: Call, default: float) -> Tensor:
    """`[h]` values of the heads of a call, float32 or wider."""
    if isinstance(value, dict):
        found = [value.get(Head(call.layer, number, call.tower), default) for number in call.heads]
        return torch.tensor(found, dtype=call.work_dtype, device=call.q.device)
    if isinstance(value, Tensor) and value.ndim:
        if value.ndim != 2:
            raise ValueError(f"per-head value of shape {tuple(value.shape)}; give a number, [layers, heads] or a dict")
        return value[call.layer, call.heads].to(call.q.device, call.work_dtype)
    return torch.full((len(call.heads),), float(value), dtype=call.work_dtype, device=call.q.device)


@dataclass
class ForceRows(RowEdit):
    """Give heads other rows of weights, whatever they would have attended to.

    pattern: "first" (the first visible key), "previous", "self", "uniform" (all visible keys), a tensor `[s]`,
    `[t, s]` or `[b, h, t, s]`, or a function from `Rows` to `[.., r, s]`. Weights on keys that a row may not see are
    dropped, without renormalising.
    """

    pattern: str | Tensor | Callable[[Rows], Tensor] = "first"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.pattern, str) and self.pattern not in ("first", "previous", "self", "uniform"):
            raise ValueError(
                f"ForceRows: pattern is {self.pattern!r}; choose first, previous, self, uniform, a tensor or a function"
            )

    def change(self, weights: Tensor, rows: Rows) -> Tensor:
        visible = rows.visible
        rows.sink = None if rows.sink is None else torch.zeros_like(rows.sink)
        if callable(self.pattern):
            new = self.pattern(rows)
        elif isinstance(self.pattern, Tensor):
            pattern = rows.own(self.pattern)
            t = pattern.shape[-2] if pattern.ndim > 1 else 1
            new = pattern if t == 1 else pattern[..., rows.index, :]
            new = new[..., : weights.shape[-1]]
        elif self.pattern == "uniform":
            new = visible / visible.sum(-1, keepdim=True).clamp_min(1)
        elif self.pattern == "first":
            new = torch.nn.functional.one_hot(visible.int().argmax(-1), weights.shape[-1])
        else:
            column = rows.positions - rows.call.key_offset - int(self.pattern == "previous")
            index = torch.arange(weights.shape[-1], device=weights.device)
            new = index == column[:, None].clamp_min(0)
        return (new.to(weights) * visible).expand_as(weights)


@dataclass
class PerturbScores(RowEdit):
    """Add a perturbation to the scores of heads, before the softmax.

    delta: broadcastable to `[b, h, t, s]` over the named heads of a layer, or one such tensor for each (tower, layer).
    Differentiable in delta.
    """

    delta: Tensor | dict[tuple[str, int], Tensor]

    def change(self, weights: Tensor, rows: Rows) -> Tensor:
        delta = self.delta
        if isinstance(delta, dict):
            if (rows.call.tower, rows.call.layer) not in delta:
                return weights
            delta = delta[rows.call.tower, rows.call.layer]
        delta = rows.own(delta)
        if delta.ndim >= 2 and delta.shape[-2] > 1:
            delta = delta[..., rows.index, :]
        delta = delta[..., : weights.shape[-1]].to(weights)
        # w e^d / sum(w e^d): the rows sum to what they summed to, so a sink column keeps its share of the logits.
        hidden = weights <= 0
        top = delta.detach().masked_fill(hidden, -torch.inf).amax(-1, keepdim=True)
        top = top.clamp_min(0) if rows.sink is not None else top.masked_fill(torch.isneginf(top), 0)
        shifted = weights * (delta - top).masked_fill(hidden, 0).exp()
        missing = 0.0 if rows.sink is None else rows.sink * (-top).exp()
        total = shifted.sum(-1, keepdim=True) + missing
        safe = total.clamp_min(torch.finfo(weights.dtype).tiny)
        if rows.sink is not None:
            rows.sink = torch.where(total > 0, missing / safe, rows.sink)
        return torch.where(total > 0, shifted / safe, weights)


@dataclass
class EditRows(RowEdit):
    """Change the weights of heads by a function of your own.

    function: `(weights [b h r s] float32, rows: Rows) -> weights`. It is called once per block of rows with the named
    heads only; the other heads stay fused.
    """

    function: Callable[[Tensor, Rows], Tensor]

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.function):
            raise TypeError(f"EditRows: function is {type(self.function).__name__}; give a function of (weights, rows)")

    def change(self, weights: Tensor, rows: Rows) -> Tensor:
        new = self.function(weights, rows)
        if new.shape != weights.shape:
            raise ValueError(f"EditRows: the function returned {tuple(new.shape)} for weights {tuple(weights.shape)}")
        return new
