"""Heads that attend by position: the mean of a head's maps over texts, how near each map is to it, and the head frozen
to it.

A head whose rows are the same whatever the text does what positional attention does; freezing it to its mean pattern
then changes nothing, and what freezing changes elsewhere is what the head read from the text.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.edits import ForceRows
from headwise.attend.head_map import HeadMap
from headwise.hf.addresses import layout
from headwise.hf.maps import attention_maps

__all__ = ["freeze_to_positions", "positional_patterns", "positional_scores"]

Inputs = Iterable[Tensor | Mapping[str, Any]]


def positional_patterns(model: nn.Module, batches: Inputs) -> dict[Head, Float[Tensor, "t s"]]:
    """The mean map of every head of the main tower over the items of all batches.

    batches: inputs of one length, without padding. Raises ValueError for lengths that differ and for no input.
    """
    total, count = None, 0
    for maps in _maps(model, batches):
        if total is not None and total.shape != maps.shape[1:]:
            raise ValueError(
                f"positional_patterns: inputs of {total.shape[1]} and of {maps.shape[2]} tokens; give one length, a "
                "pattern is a place for each place"
            )
        total = maps.sum(0) if total is None else total + maps.sum(0)
        count += len(maps)
    if total is None:
        raise ValueError("positional_patterns: no input; give one batch or more")
    return dict(zip(layout(model).heads(), total / count, strict=True))


def positional_scores(model: nn.Module, batches: Inputs) -> HeadMap:
    """How positional each head is, `positional` in [0, 1]; 1: the same rows for every text.

    1 less the mean distance (total variation) of a head's rows from those of its mean pattern. Row 0, which has no
    choice in a causal model, is left out.
    """
    kept = list(batches)
    patterns = positional_patterns(model, kept)
    mean, apart, count = torch.stack(list(patterns.values())), 0.0, 0
    for maps in _maps(model, kept):
        apart = apart + (maps - mean).abs().sum(-1)[:, :, 1:].mean(-1).sum(0) / 2
        count += len(maps)
    scores = 1 - torch.as_tensor(apart) / count
    return HeadMap({"positional": dict(zip(patterns, scores.tolist(), strict=True))}, layout(model))


def freeze_to_positions(patterns: Mapping[Head, Float[Tensor, "t s"]], heads: Iterable[Head | str]) -> list[ForceRows]:
    """Edits for `steer` that give heads their mean pattern, on inputs of the patterns' length.

    Raises ValueError for a head without a pattern.
    """
    chosen = [head if isinstance(head, Head) else Head.parse(head) for head in heads]
    if missing := [head for head in chosen if head not in patterns]:
        raise ValueError(f"freeze_to_positions: there is no pattern of head {missing[0]}")
    return [ForceRows(heads=[head], pattern=patterns[head]) for head in chosen]


def _maps(model: nn.Module, batches: Inputs) -> Iterable[Tensor]:
    """`[b h t s]` of all heads, a batch after the other."""
    for batch in batches:
        with torch.no_grad():
            yield attention_maps(model, batch).float()
