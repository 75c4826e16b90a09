"""The oracle inside a model: an attention implementation of our own that writes every weight out in float64.

``with materialised(model) as run`` puts a model on it. What it sees is kept call by call; ``rule`` changes weights.
It shares no code with headwise, and takes its masks as transformers' eager implementation does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "materialised"


@dataclass
class Seen:
    """One call of an attention module."""

    module: nn.Module
    weights: Tensor
    """[b h t s] float64, without the sink column; rows that see nothing are 0."""
    values: Tensor
    """[b h s e], one for each query head."""
    visible: Tensor
    """[b h t s]."""


@dataclass
class Run:
    calls: list[Seen] = field(default_factory=list)
    rule: Callable[[nn.Module, Tensor], Tensor] | None = None

    def of(self, module: nn.Module) -> list[Seen]:
        return [call for call in self.calls if call.module is module]


_runs: list[Run] = []


def _attention(module, query, key, value, attention_mask=None, *, scaling=None, **options: Any):
    b, h, t, d = query.shape
    s = key.shape[2]
    key, value = (x.double().repeat_interleave(h // x.shape[1], 1) for x in (key, value))
    scores = query.double() @ key.mT * (d**-0.5 if scaling is None else scaling)
    if options.get("softcap") is not None:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    if options.get("position_bias") is not None:
        scores = scores + options["position_bias"].double()
    visible = torch.ones(b, h, t, s, dtype=torch.bool)
    if attention_mask is not None:
        mask = attention_mask[..., :s]
        if mask.dtype == torch.bool:
            visible = visible & mask
        else:
            visible = visible & (mask > torch.finfo(mask.dtype).min / 2)
            scores = scores + mask.double().clamp(min=-1e30)
    scores = scores.masked_fill(~visible, -torch.inf)
    columns = scores
    if options.get("s_aux") is not None:
        columns = torch.cat([scores, options["s_aux"].double().view(1, -1, 1, 1).expand(b, h, t, 1)], -1)
    weights = columns.softmax(-1)[..., :s]
    weights = torch.where(visible.any(-1, keepdim=True), weights, 0.0)
    for run in _runs:
        if run.rule is not None:
            weights = run.rule(module, weights)
        run.calls.append(Seen(module, weights, value, visible))
    return (weights @ value).transpose(1, 2).to(query.dtype).contiguous(), weights.to(query.dtype)


def _mask(*args, **kwargs):
    kwargs.pop("allow_is_causal_skip", None)
    return eager_mask(*args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def configs_of(model: nn.Module) -> list[Any]:
    """Every config object in a model, once."""
    return list({id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values())


@contextmanager
def materialised(model: nn.Module, rule: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Iterator[Run]:
    """Run a model on written-out weights. rule: ``(module, weights [b h t s]) -> weights``, before values are mixed."""
    before = [(config, config._attn_implementation_internal) for config in configs_of(model)]
    run = Run(rule=rule)
    _runs.append(run)
    for config, _ in before:
        config._attn_implementation_internal = NAME
    try:
        yield run
    finally:
        _runs.remove(run)
        for config, previous in before:
            config._attn_implementation_internal = previous


def biased(weights: Tensor, group: Tensor, bias: float) -> Tensor:
    """Scores of a group [.. t s] plus a constant. The share of a sink column stays in the sum of the row."""
    share = _share(weights)
    new = weights * torch.where(group, torch.tensor(bias, dtype=torch.float64).exp(), 1.0)
    total = new.sum(-1, keepdim=True) + share
    return torch.where(total > 0, new / total.clamp(min=1e-300), weights)


def scaled(weights: Tensor, group: Tensor, factor: float, remainder: str) -> Tensor:
    """The mass of a group times a factor; the other keys take the rest, or all are renormalised, or nothing."""
    if remainder == "renormalise":
        share = _share(weights)
        new = torch.where(group, weights * factor, weights)
        total = new.sum(-1, keepdim=True) + share
        return torch.where(total > 0, new / total.clamp(min=1e-300), weights)
    if remainder == "none":
        return torch.where(group, weights * factor, weights)
    mass = (weights * group).sum(-1, keepdim=True)
    rest = (weights * ~group).sum(-1, keepdim=True) + _share(weights)
    kept = (mass * factor).clamp(max=1)
    to_group = kept / mass.clamp(min=1e-300)
    # 1 - kept, without losing what is left of a full row
    left = torch.where(kept < 1, rest + (mass - kept), torch.zeros_like(rest))
    to_rest = left / rest.clamp(min=1e-300)
    new = torch.where(group, weights * to_group, weights * to_rest)
    return torch.where((mass > 0) & (rest > 0), new, weights)


def _share(weights: Tensor) -> Tensor:
    """What a learned sink column holds: nothing in rows that see no key at all."""
    total = weights.sum(-1, keepdim=True)
    return torch.where((total > 0) & (total < 1 - 1e-12), 1 - total, 0.0)
