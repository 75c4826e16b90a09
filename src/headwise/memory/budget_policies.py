"""What the heads of a KV cache keep of a prompt: sinks and recent tokens, what was looked at, the whole for some heads.

A policy sees one layer after its prompt was read (`LayerPrompt`) and says what each key head keeps (`KeptTokens`, or
None for everything). `budget` is always the share of the prompt's cache, in bytes over all layers, that is kept; tokens
that come after the prompt are added to it. In a batch every text is treated as it would be alone.

Papers: headwise/papers/task_kv.py (He, Liu, Chen, 2025); SnapKV (Li et al., 2024); StreamingLLM (Xiao et al., 2024).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headwise.hf.head_budgets import KeptTokens, LayerPrompt
from headwise.ops.observation import (
    head_distance,
    kept_positions,
    observed_attention,
    smooth_scores,
    summarise,
)

__all__ = ["HeadMapPolicy", "SnapKVPolicy", "StreamingPolicy", "TaskKVPolicy"]

Middle = Literal["top", "none", "mean"]


def _check(where: str, budget: float, **counts: int) -> None:
    if not 0 < budget <= 1:
        raise ValueError(f"{where}: budget is {budget}; expected a share of the prompt's cache above 0, up to 1")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{where}: {name} is {count!r}; expected a number of tokens, 0 or more")


def _share(budget: float, lengths: Sequence[int]) -> list[int]:
    """So many tokens of each text, rounded down."""
    return [math.floor(budget * length + 1e-9) for length in lengths]


def _no_full(prompt: LayerPrompt) -> Tensor:
    return torch.zeros(prompt.key.shape[:2], dtype=torch.bool, device=prompt.key.device)


@dataclass(frozen=True)
class StreamingPolicy:
    """StreamingLLM: every head keeps the first `sink` tokens and the last ones."""

    budget: float = 0.4
    sink: int = 4
    window: int = 1  # queries are not looked at

    def __post_init__(self) -> None:
        _check("StreamingPolicy", self.budget, sink=self.sink)

    def __call__(self, prompt: LayerPrompt) -> KeptTokens | None:
        if self.budget == 1:
            return None
        keep, over = [], None
        for share, length in zip(_share(self.budget, prompt.lengths), prompt.lengths, strict=True):
            least = min(length, self.sink + 1)
            over = over or (_over("StreamingPolicy", self.budget, least / length, "sink") if share < least else None)
            keep.append(max(share, least))
        b, n, s = prompt.key.shape[:3]
        age = torch.arange(s, device=prompt.key.device, dtype=torch.float64).expand(b, n, s)
        positions = kept_positions(age, keep, sink=self.sink, real=prompt.real)
        return KeptTokens(_no_full(prompt), positions, over)


@dataclass(frozen=True)
class SnapKVPolicy:
    """SnapKV: every key head keeps the observation window and the earlier tokens that its queries looked at most.

    window: the last queries, which are also kept. kernel: neighbours over which weights are averaged before choosing.
    count_include_pad: as the official code averages at the two ends of what comes before the window.
    """

    budget: float = 0.4
    window: int = 64
    kernel: int = 5
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        _check("SnapKVPolicy", self.budget, window=self.window)
        if self.window < 1:
            raise ValueError("SnapKVPolicy: window is 0; expected 1 or more queries to look at")
        smooth_scores(torch.zeros(1, 1, 1), self.kernel)

    def scores(self, prompt: LayerPrompt) -> Tensor:
        """`[b n s-w]` what the window looked at before it."""
        observed = observed_attention(
            prompt.query, prompt.key, scale=prompt.scale, softcap=prompt.softcap, real=prompt.real
        )
        before = observed.shape[2] - prompt.query.shape[2]
        real = None if prompt.real is None else prompt.real[:, :before]
        return smooth_scores(observed[..., :before], self.kernel, real=real, count_include_pad=self.count_include_pad)

    def __call__(self, prompt: LayerPrompt) -> KeptTokens | None:
        if self.budget == 1 or max(prompt.lengths) <= self.window:
            return None
        keep, over = [], None
        for share, length in zip(_share(self.budget, prompt.lengths), prompt.lengths, strict=True):
            least = min(length, self.window)
            over = over or (_over("SnapKVPolicy", self.budget, least / length, "window") if share < least else None)
            keep.append(max(share, least))
        scores = self.scores(prompt)
        scores = torch.nn.functional.pad(scores, (0, prompt.key.shape[2] - scores.shape[2]))
        positions = kept_positions(scores, keep, recent=self.window, real=prompt.real)
        return KeptTokens(_no_full(prompt), positions, over)


def _over(where: str, budget: float, share: float, names: str) -> str:
    return (
        f"{where}: {share:.0%} of a prompt's cache is kept although budget is {budget:.0%}: the text is too short for "
        f"{names}; give a larger budget, or fewer tokens there"
    )


@dataclass(frozen=True)
class _SplitPolicy:
    """Full heads keep everything; the others keep sinks, recent tokens and, of what lies between, what they look at."""

    budget: float = 0.4
    sink: int = 16
    recent: int = 256
    window: int = 32
    top: int | None = 256
    pool: int = 7
    middle: Middle = "top"

    def __post_init__(self) -> None:
        where = type(self).__name__
        _check(where, self.budget, sink=self.sink, recent=self.recent, window=self.window)
        if not 1 <= self.window <= self.recent:
            raise ValueError(
                f"{where}: window is {self.window} and recent {self.recent}; the queries that are looked at must be "
                "kept: expected 1 <= window <= recent"
            )
        if self.top is not None and self.top < 1:
            raise ValueError(f"{where}: top is {self.top}; expected 1 or more keys, or None for all")
        if self.middle not in ("top", "none", "mean"):
            raise ValueError(f"{where}: middle is {self.middle!r}; expected 'top', 'none' or 'mean'")
        smooth_scores(torch.zeros(1, 1, 1), self.pool)

    def scores(self, prompt: LayerPrompt) -> Tensor:
        """`[b n s]` what the last queries looked at: C of the paper."""
        observed = observed_attention(
            prompt.query, prompt.key, scale=prompt.scale, softcap=prompt.softcap, real=prompt.real
        )
        return smooth_scores(observed, self.pool, real=prompt.real)

    def keep(self, prompt: LayerPrompt, scores: Tensor, full: Tensor, middle: list[int]) -> KeptTokens:
        """middle: tokens of each text that a light head keeps beside sinks and recent ones, below 0 where even these
        are too many."""
        least = [min(length, self.sink + self.recent) for length in prompt.lengths]
        extra = [max(0, count) if self.middle == "top" else 0 for count in middle]
        keep = [min(length, n + more) for length, n, more in zip(prompt.lengths, least, extra, strict=True)]
        positions = kept_positions(scores, keep, sink=self.sink, recent=self.recent, real=prompt.real)
        over = None
        missing = [b for b, count in enumerate(middle) if count < 0 and least[b] < prompt.lengths[b]]
        if missing:
            b, n = missing[0], full.shape[1]
            count = int(full[0].sum())
            share = (count * prompt.lengths[b] + (n - count) * keep[b]) / (n * prompt.lengths[b])
            over = _over(type(self).__name__, self.budget, share, "sink, recent and the full heads")
        if self.middle != "mean":
            return KeptTokens(full, positions, over)
        return _with_means(prompt, KeptTokens(full, positions, over), scores)


def _with_means(prompt: LayerPrompt, kept: KeptTokens, scores: Tensor) -> KeptTokens:
    """One more token for each head: the mean of what it drops, in the place of the first token dropped."""
    b, n, s = scores.shape
    index = kept.positions.masked_fill(kept.positions < 0, s)
    dropped = torch.ones(b, n, s + 1, dtype=torch.bool, device=scores.device).scatter_(2, index, False)[..., :s]
    if prompt.real is not None:
        dropped = dropped & prompt.real[:, None]
    place = torch.where(dropped.any(-1), dropped.int().argmax(-1), -1)[..., None]
    share = dropped / dropped.sum(-1, keepdim=True).clamp_min(1)
    found = []
    for whole in (prompt.key, prompt.value):
        mean = (share[:, :, None].to(whole.dtype) @ whole)[:, :, 0]
        found.append(whole.scatter(2, place.clamp_min(0)[..., None].expand(b, n, 1, whole.shape[-1]), mean[:, :, None]))
    # A head that drops nothing must keep what stands at position 0.
    keeps = (place < 0)[..., None]
    new = [torch.where(keeps, whole, one) for whole, one in zip((prompt.key, prompt.value), found, strict=True)]
    positions = torch.cat([kept.positions, place], 2)
    positions = positions.masked_fill(positions < 0, s).sort(-1).values
    return KeptTokens(kept.full, positions.masked_fill(positions == s, -1), kept.over, (new[0], new[1]))


@dataclass(frozen=True)
class TaskKVPolicy(_SplitPolicy):
    """Task-KV: in every layer the heads far from its semantic centre keep everything, chosen anew for each prompt.

    A head's semantic vector is the sum of the values of the `top` keys that the last `window` queries looked at, with
    their weights (`ops.semantic_vectors`). The others keep `sink` first and `recent` last tokens and the
    `k = (B - N f) / (n - f) - sink - recent` others that they look at most, where B = budget n N is the layer's share.
    beta, min_heads: f falls linearly from `beta n` in the first layer to `min_heads` in the last; None is an eighth of
    the heads, at least 1 (Llama-2-7B of the paper: beta 0.25, 4 of 32; Mistral-7B: 0.3, 1).
    supplement: of these f, how many are those nearest to the centre (never all of them).
    middle: "top" as published; "none" keeps no others; "mean" one token that is the mean of what is dropped.

    Notes: per key head throughout; the norm of the distance, the rounding of f and the count of the supplement are
    ours. Where the budget does not hold f full heads beside everyone's sinks and recent tokens, f is lowered (in a
    batch, to what the shortest text affords); where it does not hold even these, they are kept all the same and a
    warning says what share that is.
    """

    beta: float = 0.25
    min_heads: int | None = None
    supplement: int = 1
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"TaskKVPolicy: beta is {self.beta}; expected a share of a layer's heads, 0 to 1")
        _check("TaskKVPolicy", self.budget, supplement=self.supplement)
        if self.min_heads is not None:
            _check("TaskKVPolicy", self.budget, min_heads=self.min_heads)

    def quota(self, heads: int, layer: int, layers: int) -> int:
        """f: the heads of a layer that keep everything, where the budget allows it.

        >>> [TaskKVPolicy(min_heads=4).quota(32, layer, 32) for layer in (0, 31)]
        [8, 4]
        """
        least = max(1, round(heads / 8)) if self.min_heads is None else self.min_heads
        most = heads * self.beta
        share = layer / (layers - 1) if layers > 1 else 0.0
        return min(heads, max(0, round(most - (most - least) * share)))

    def distances(self, prompt: LayerPrompt, scores: Tensor) -> Tensor:
        """`[b n]` how far each head stands from the semantic centre of its layer."""
        return head_distance(summarise(scores, prompt.value, self.top, self.normalize))

    def choose(self, prompt: LayerPrompt, scores: Tensor, count: int) -> Tensor:
        """`[b n]` the heads that keep everything: the farthest, and among them the nearest `supplement`."""
        order = self.distances(prompt, scores).sort(dim=-1, descending=True, stable=True).indices
        near = min(self.supplement, max(0, count - 1))
        chosen = torch.cat([order[:, : count - near], order[:, order.shape[1] - near :]], 1)
        return _no_full(prompt).scatter(1, chosen, True)

    def __call__(self, prompt: LayerPrompt) -> KeptTokens | None:
        n, floor = prompt.key.shape[1], self.sink + self.recent
        if self.budget == 1 or max(prompt.lengths) <= floor:
            return None
        count = self.quota(n, prompt.layer, prompt.layers)
        for length in prompt.lengths:
            if length > floor:
                spare = self.budget * n * length - n * floor
                count = min(count, max(0, math.floor(spare / (length - floor) + 1e-9)))
        middle = [
            math.floor((self.budget * n * length - count * length) / max(1, n - count) + 1e-9) - floor
            for length in prompt.lengths
        ]
        scores = self.scores(prompt)
        return self.keep(prompt, scores, self.choose(prompt, scores, count), middle)


@dataclass(frozen=True)
class HeadMapPolicy(_SplitPolicy):
    """Some heads, known beforehand, keep everything; all others share what the budget leaves, equally over all layers.

    full: for each layer the key heads that keep everything. heads: how many key heads each layer has.
    Raises ValueError where the full heads alone take the budget.
    """

    full: tuple[tuple[int, ...], ...] = ()
    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.full) != len(self.heads):
            raise ValueError(
                f"HeadMapPolicy: full heads of {len(self.full)} layers but heads of {len(self.heads)}; name every layer"
            )
        for layer, (named, count) in enumerate(zip(self.full, self.heads, strict=True)):
            wrong = [head for head in named if not 0 <= head < count]
            if wrong or len(set(named)) < len(named):
                raise ValueError(f"HeadMapPolicy: full heads {list(named)} of layer {layer}; it has {count} key heads")
        if self.heads and self.budget < 1 and self._named >= self.budget * self._total:
            raise ValueError(
                f"HeadMapPolicy: {self._named} of {self._total} key heads are to keep everything, which is "
                f"{self._named / self._total:.0%} of the cache, and budget is {self.budget:.0%}; name fewer heads or "
                "give a larger budget"
            )

    @property
    def _named(self) -> int:
        return sum(map(len, self.full))

    @property
    def _total(self) -> int:
        return sum(self.heads)

    def __call__(self, prompt: LayerPrompt) -> KeptTokens | None:
        floor, light = self.sink + self.recent, self._total - self._named
        if self.budget == 1 or max(prompt.lengths) <= floor:
            return None
        share = (self.budget * self._total - self._named) / light
        middle = [math.floor(share * length + 1e-9) - floor for length in prompt.lengths]
        full = _no_full(prompt)
        full[:, list(self.full[prompt.layer])] = True
        return self.keep(prompt, self.scores(prompt), full, middle)
