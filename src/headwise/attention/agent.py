"""Agent attention: n agent tokens gather from keys and values, then hand the result to all queries, O(t n) for O(t s).

    V_A = softmax(scale A K^T + B1) V        O = softmax(query_scale Q A^T + B2) V_A  (+ v_shortcut V) (+ DWC(V))

It is linear attention with feature maps softmax(Q A^T) and softmax(A K^T)^T: the implied map `[t s]` has rows that sum
to 1 and rank n at most. Agents are the means of windows of queries; they see every query, so there is no causal form.

Paper: headwise/papers/agent_attention.py (Han et al., ECCV 2024).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.point import HeadPoint
from headwise.attention._agent_blocks import gather_blocked, hand_out_blocked, score_matrix
from headwise.attention.softmax import check_heads, split_heads
from headwise.ops.pooling import pool_grid, pool_sequence

__all__ = ["AgentAttention", "agent_attention", "agent_map"]

Implementation = Literal["auto", "plain", "blocked", "fused"]
LARGE = 1 << 24  # scores from which blocks are used: 64 MiB in float32
BIAS_GRID = 7  # rows and columns of the coarse bias tables


def agent_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    agents: Float[Tensor, "b h n d"],
    *,
    bias_agent_key: Tensor | None = None,
    bias_query_agent: Tensor | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    agent_mask: Bool[Tensor, "b n"] | None = None,
    v_shortcut: float = 0.0,
    dropout: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    is_causal: bool = False,
    implementation: Implementation = "auto",
) -> Float[Tensor, "b h t e"]:
    """Attend through agents. g divides h (grouped keys).

    agents: pooled queries, as a rule; not scaled beforehand. bias_agent_key, bias_query_agent: added to the scores,
    broadcastable to `[b h n s]` and `[b h t n]`. scale: of A K^T; None means d ** -0.5. query_scale: of Q A^T; None
    means scale. key_mask, agent_mask: True = may be attended to; where all keys or all agents are masked the output
    is 0. v_shortcut: adds so much of each token's own value (self-attention). dropout: of both maps, now, not in
    training only. logits_dtype: the dtype of the scores, such as torch.float32 for half-precision inputs whose products
    overflow.
    implementation: plain (scores of all tokens), blocked (scores of a block at a time; no gradients, no dropout), fused
    (two calls of torch's fused attention, whose scores are in float32), or auto: on a GPU fused; on a CPU fused where
    neither gradients, dropout nor logits_dtype are asked for (measured: as fast as plain at 784 tokens, half its time
    at 50,176), with logits_dtype blocked from 16 million scores on, else plain.
    Raises ValueError for is_causal, shapes that do not fit, and a shortcut in cross-attention.
    """
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    n = agents.shape[2]
    _check(q, k, v, agents, bias_agent_key, bias_query_agent, v_shortcut, is_causal)
    first, second = _scales(d, scale, query_scale)
    training = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, v, agents, bias_agent_key, bias_query_agent) if x is not None
    )
    if implementation == "auto":
        implementation = "plain"
        if q.is_cuda or not (training or dropout or logits_dtype):
            implementation = "fused"
        elif not training and not dropout and b * h * n * max(s, t) >= LARGE:
            implementation = "blocked"
    if implementation == "fused":
        gathered = _fused(agents, k, v, first, bias_agent_key, key_mask, dropout)
        out = _fused(q, agents, gathered, second, bias_query_agent, agent_mask, dropout)
    elif implementation == "plain":
        keys, values = (x if g == h else x.repeat_interleave(h // g, 1) for x in (k, v))
        gathered = _weights(agents, keys, first, bias_agent_key, key_mask, logits_dtype)
        gathered = nn.functional.dropout(gathered, dropout) @ values if dropout else gathered @ values
        out = _weights(q, agents, second, bias_query_agent, agent_mask, logits_dtype)
        out = nn.functional.dropout(out, dropout) @ gathered if dropout else out @ gathered
    elif implementation == "blocked":
        if training or dropout:
            raise ValueError("agent_attention: implementation 'blocked' has neither gradients nor dropout; use 'plain'")
        gathered = gather_blocked(agents, k, v, first, bias_agent_key, key_mask, logits_dtype)
        out = hand_out_blocked(q, agents, gathered, second, bias_query_agent, agent_mask, logits_dtype)
    else:
        raise ValueError(f"agent_attention: implementation is {implementation!r}; choose auto, plain, blocked or fused")
    if v_shortcut:
        out = out + v_shortcut * (v if g == h else v.repeat_interleave(h // g, 1))
    return out


def agent_map(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    agents: Float[Tensor, "b h n d"],
    *,
    bias_agent_key: Tensor | None = None,
    bias_query_agent: Tensor | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    agent_mask: Bool[Tensor, "b n"] | None = None,
    factors: bool = False,
) -> Float[Tensor, "b h t s"] | tuple[Float[Tensor, "b h t n"], Float[Tensor, "b h n s"]]:
    """The map that agent attention implies, to look at where t s is small; `factors` gives its two factors instead.

    Arguments as in `agent_attention`. Neither shortcut nor convolution is part of it.
    """
    _check(q, k, k, agents, bias_agent_key, bias_query_agent, 0.0, False)
    first, second = _scales(q.shape[-1], scale, query_scale)
    keys = k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    gather = _weights(agents, keys, first, bias_agent_key, key_mask, None)
    hand_out = _weights(q, agents, second, bias_query_agent, agent_mask, None)
    return (hand_out, gather) if factors else hand_out @ gather


def _scales(d: int, scale: float | None, query_scale: float | None) -> tuple[float, float]:
    first = float(d**-0.5) if scale is None else scale
    return first, first if query_scale is None else query_scale


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    bias_agent_key: Tensor | None,
    bias_query_agent: Tensor | None,
    v_shortcut: float,
    is_causal: bool,
) -> None:
    b, h, t, d = q.shape
    g, s, n = k.shape[1], k.shape[2], agents.shape[2]
    if is_causal:
        raise ValueError(
            "agent_attention: is_causal is True, but agents sum up all queries, later ones too; there is no causal "
            "form, use softmax or lightning attention"
        )
    if h % g or v.shape[:3] != (b, g, s) or k.shape != (b, g, s, d) or agents.shape != (b, h, n, d):
        raise ValueError(
            f"agent_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and agents "
            f"{tuple(agents.shape)} do not fit; expected [b h t d], [b g s d], [b g s e], [b h n d], g a divisor of h"
        )
    if n < 1:
        raise ValueError("agent_attention: there are no agents; give at least one")
    if v_shortcut and s != t:
        raise ValueError(f"agent_attention: v_shortcut is {v_shortcut}, but {s} values do not belong to {t} queries")
    for name, bias, wanted in (
        ("bias_agent_key", bias_agent_key, (b, h, n, s)),
        ("bias_query_agent", bias_query_agent, (b, h, t, n)),
    ):
        if bias is not None and (
            bias.ndim != 4 or any(size not in (1, whole) for size, whole in zip(bias.shape, wanted, strict=True))
        ):
            raise ValueError(f"agent_attention: {name} is {tuple(bias.shape)}; it must broadcast to {wanted}")


def _weights(
    x: Tensor, y: Tensor, scale: float, bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """softmax over y, `[b h . .]`; 0 where all of y is masked, with gradient 0."""
    logits = score_matrix(x, y, scale, bias, dtype)
    if mask is None:
        return logits.softmax(-1).to(x.dtype)
    seen = mask[:, None, None]
    some = seen.any(-1, keepdim=True)
    weights = logits.masked_fill(~seen & some, -torch.inf).softmax(-1)
    return torch.where(seen, weights, 0).to(x.dtype)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, mask: Tensor | None, dropout: float
) -> Tensor:
    added = None if bias is None else bias.to(q.dtype)
    if mask is not None:
        seen = mask[:, None, None]
        added = seen if added is None else torch.where(seen, added, -torch.inf)
        added = added.expand(q.shape[0], added.shape[1], q.shape[2], k.shape[2])
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=added, scale=scale, dropout_p=dropout, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out if mask is None else torch.where(mask.any(-1)[:, None, None, None], out, 0)


class AgentAttention(nn.Module):
    """Multi-head agent attention, as a layer of Agent-DeiT: agents pooled from queries, position biases, convolution.

    num_agents: a square number on a grid, or (rows, columns); any number along a sequence. grid_size: (rows, columns)
    of the tokens after the first `num_prefix_tokens` (class, distillation and register tokens), which are neither
    pooled nor convolved; None is a sequence of any length. num_kv_heads: grouped keys; None is one for each head.
    agents: "pool", the mean queries of equal windows; "learned", parameters; or a function of queries `[b h t d]` to
    agents `[b h n d]`, num_agents of them. position_bias: learned tables for both maps, fitted to the grid (or length)
    at hand. dwc: add a depthwise 3 x 3 convolution (3 along a sequence) of the values. query_scale: of the second map;
    None is d ** -0.5. v_shortcut: how much of its own value each token keeps. dropout: of both maps, in training.

    Parameters are named and shaped as in the official code (one class token, square window); with more prefix tokens
    `ac_bias` and `ca_bias` have a column and a row for each. The tables of a sequence, `[h n 7]`, are ours.
    """

    patterns = ("noncausal self", "noncausal cross")
    an_bias: Tensor
    na_bias: Tensor
    ah_bias: Tensor
    aw_bias: Tensor
    ha_bias: Tensor
    wa_bias: Tensor
    ac_bias: Tensor
    ca_bias: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_agents: int | tuple[int, int] = 49,
        *,
        grid_size: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        num_kv_heads: int | None = None,
        agents: str | Callable[[Tensor], Tensor] = "pool",
        position_bias: bool = True,
        dwc: bool = True,
        qkv_bias: bool = True,
        query_scale: float | None = None,
        v_shortcut: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, check_heads("AgentAttention", embed_dim, num_heads, num_kv_heads)
        self.head_dim = embed_dim // num_heads
        self.grid_size = None if grid_size is None else (int(grid_size[0]), int(grid_size[1]))
        self.num_prefix_tokens, self.dropout = num_prefix_tokens, dropout
        self.query_scale, self.v_shortcut = query_scale, v_shortcut
        self.windows = _windows(num_agents, self.grid_size, agents == "pool")
        self.num_agents = n = math.prod(self.windows)
        if not (callable(agents) or agents in ("pool", "learned")):
            raise ValueError(f"AgentAttention: agents is {agents!r}; choose 'pool', 'learned' or a function of queries")
        if num_prefix_tokens < 0 or not 0 <= dropout < 1:
            raise ValueError(
                f"AgentAttention: num_prefix_tokens {num_prefix_tokens}, dropout {dropout}; expected 0 or more, and a "
                "share below 1"
            )
        self.make_agents = agents if callable(agents) else None
        self.agents = nn.Parameter(torch.randn(num_heads, n, self.head_dim)) if agents == "learned" else None
        width = self.num_kv_heads * self.head_dim
        self.qkv = nn.Linear(embed_dim, embed_dim + 2 * width, bias=qkv_bias)
        self.position_bias = position_bias
        if position_bias:
            self._make_tables(num_heads, n)
        conv = nn.Conv1d if self.grid_size is None else nn.Conv2d
        self.dwc = conv(width, width, 3, padding=1, groups=width) if dwc else None
        self.head_point = HeadPoint(num_heads, self.num_kv_heads)
        self.proj = nn.Linear(embed_dim, embed_dim)

    @staticmethod
    def example() -> "AgentAttention":
        """A small one for sequences of any length."""
        return AgentAttention(32, 4, 3, num_kv_heads=2)

    def _make_tables(self, h: int, n: int) -> None:
        coarse = (BIAS_GRID,) if self.grid_size is None else (BIAS_GRID, BIAS_GRID)
        shapes = {"an_bias": (h, n, *coarse), "na_bias": (h, n, *coarse)}
        if self.grid_size is not None:
            rows, columns = self.grid_size
            shapes |= {"ah_bias": (1, h, n, rows, 1), "aw_bias": (1, h, n, 1, columns)}
            shapes |= {"ha_bias": (1, h, rows, 1, n), "wa_bias": (1, h, 1, columns, n)}
        if self.num_prefix_tokens:
            p = self.num_prefix_tokens
            shapes |= {"ac_bias": (1, h, n, p), "ca_bias": (1, h, p, n)}
        for name, shape in shapes.items():
            table = nn.Parameter(torch.empty(shape))
            nn.init.trunc_normal_(table, std=0.02)
            self.register_parameter(name, table)

    def biases(self, places: tuple[int, ...]) -> tuple[Float[Tensor, "1 h n s"], Float[Tensor, "1 h t n"]]:
        """Both biases for tokens on a grid of (rows, columns), or for a sequence of (length,) after the prefix."""
        agent_key, query_agent = (_resize(table, places) for table in (self.an_bias, self.na_bias))
        if self.grid_size is not None:
            agent_key = agent_key + _resize(self.ah_bias[0], (places[0], 1)) + _resize(self.aw_bias[0], (1, places[1]))
            lines = (self.ha_bias[0].permute(0, 3, 1, 2), self.wa_bias[0].permute(0, 3, 1, 2))
            query_agent = query_agent + _resize(lines[0], (places[0], 1)) + _resize(lines[1], (1, places[1]))
        agent_key, query_agent = agent_key.flatten(2)[None], query_agent.flatten(2)[None].mT
        if self.num_prefix_tokens:
            agent_key = torch.cat([self.ac_bias, agent_key], -1)
            query_agent = torch.cat([self.ca_bias, query_agent], -2)
        return agent_key, query_agent

    @torch.no_grad()
    def resize_grid(self, grid_size: tuple[int, int]) -> None:
        """Fit the tables to another grid for good, by linear interpolation, as for training at another resolution.

        Raises ValueError for a sequence layer, and for a grid with fewer rows or columns than the agents'.
        """
        if self.grid_size is None:
            raise ValueError("AgentAttention.resize_grid: this layer reads sequences of any length and has no grid")
        _windows(self.windows, grid_size, self.agents is None and self.make_agents is None)
        self.grid_size = (int(grid_size[0]), int(grid_size[1]))
        if not self.position_bias:
            return
        rows, columns = self.grid_size
        for name, size in (("ah_bias", (rows, 1)), ("aw_bias", (1, columns))):
            setattr(self, name, nn.Parameter(_resize(getattr(self, name)[0], size)[None]))
        for name, size in (("ha_bias", (rows, 1)), ("wa_bias", (1, columns))):
            table = _resize(getattr(self, name)[0].permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
            setattr(self, name, nn.Parameter(table[None].contiguous()))

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        attention_mask: Tensor | None = None,
        *,
        context: Float[Tensor, "b s c"] | None = None,
        context_mask: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b t c"]:
        """attention_mask, context_mask: `[b t]` and `[b s]`, True for real tokens; padded tokens are neither attended
        to, nor pooled, nor convolved. context: keys and values come from here (no convolution, no bias of the first
        map: these tokens have no place on the grid). grid_size: of x, where it is not the layer's.

        Raises ValueError for tokens that do not fill the grid, and for masks of another shape.
        """
        places = self._places(x.shape[1], grid_size)
        real = _padding(attention_mask, x, "attention_mask")
        keys_real = real if context is None else _padding(context_mask, context, "context_mask")
        width, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if context is None:
            q, k, v = self.qkv(x).split([width, kv, kv], -1)
        else:
            bias = None if self.qkv.bias is None else self.qkv.bias.split([width, 2 * kv])
            weight = self.qkv.weight.split([width, 2 * kv])
            q = nn.functional.linear(x, weight[0], None if bias is None else bias[0])
            k, v = nn.functional.linear(context, weight[1], None if bias is None else bias[1]).split(kv, -1)
        heads = split_heads(q, self.num_heads)
        agents, present = self._agents(q, heads, places, real)
        first, second = self.biases(places) if self.position_bias else (None, None)
        out = agent_attention(
            heads,
            split_heads(k, self.num_kv_heads),
            split_heads(v, self.num_kv_heads),
            agents,
            bias_agent_key=first if context is None else None,
            bias_query_agent=second,
            query_scale=self.query_scale,
            key_mask=keys_real,
            agent_mask=present,
            v_shortcut=self.v_shortcut,
            dropout=self.dropout if self.training else 0.0,
        ).transpose(1, 2)
        if self.dwc is not None and context is None:
            local = self._convolved(v, places, real).unflatten(-1, (self.num_kv_heads, self.head_dim))
            groups = self.num_heads // self.num_kv_heads
            out = out + (local if groups == 1 else local.repeat_interleave(groups, 2))
        return self.proj(self.head_point(out, None, self.proj).flatten(2))

    def _places(self, tokens: int, grid_size: tuple[int, int] | None) -> tuple[int, ...]:
        """Rows and columns of the tokens after the prefix, or their number."""
        rest, prefix = tokens - self.num_prefix_tokens, f"{self.num_prefix_tokens} prefix tokens"
        grid = grid_size or self.grid_size
        if self.grid_size is None:
            if grid is not None:
                raise ValueError("AgentAttention: grid_size is given, but this layer was made for sequences")
            if rest < 1:
                raise ValueError(f"AgentAttention: {tokens} tokens leave none after {prefix}")
            return (rest,)
        assert grid is not None
        if grid[0] * grid[1] != rest:
            raise ValueError(
                f"AgentAttention: {tokens} tokens are not {prefix} and a grid of {grid[0]} x {grid[1]}; give grid_size"
            )
        if grid != self.grid_size:
            _windows(self.windows, grid, self.agents is None and self.make_agents is None)
        return grid

    def _agents(
        self, q: Tensor, heads: Tensor, places: tuple[int, ...], real: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`[b h n d]`, and which of them stand for a real token."""
        if self.agents is not None:
            return self.agents.expand(q.shape[0], -1, -1, -1), None
        if self.make_agents is not None:
            return self.make_agents(heads), None
        p = self.num_prefix_tokens
        tokens, real = q[:, p:], None if real is None else real[:, p:]
        if len(places) == 2:
            pooled, present = pool_grid(tokens, places, (self.windows[0], self.windows[1]), real)
        else:
            pooled, present = pool_sequence(tokens, self.num_agents, real)
        return split_heads(pooled.contiguous(), self.num_heads), present

    def _convolved(self, v: Tensor, places: tuple[int, ...], real: Tensor | None) -> Tensor:
        """The convolution of the values, 0 for prefix tokens: `[b t c]`."""
        assert self.dwc is not None
        p = self.num_prefix_tokens
        tokens = v if real is None else v.masked_fill(~real[..., None], 0)
        # Channels come last already: unflattened and moved, they are a channels-last picture without a copy.
        out = self.dwc(tokens[:, p:].unflatten(1, places).movedim(-1, 1)).movedim(1, -1).flatten(1, -2)
        return nn.functional.pad(out, (0, 0, p, 0)) if p else out


def _padding(mask: Tensor | None, x: Tensor, name: str) -> Tensor | None:
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(
            f"AgentAttention: {name} is {tuple(mask.shape)}; expected {tuple(x.shape[:2])}, True for real tokens: a "
            "mask of pairs cannot be expressed, each query sees the keys through all agents"
        )
    return None if mask is None else mask.bool()


def _windows(num_agents: int | tuple[int, ...], grid: tuple[int, int] | None, pooled: bool) -> tuple[int, ...]:
    """Rows and columns of agents, or their number where they are not windows of a grid."""
    given = [num_agents] if isinstance(num_agents, int) else list(num_agents)
    if len(given) > 2 or min(given) < 1:
        raise ValueError(f"AgentAttention: num_agents is {num_agents}; expected 1 or more, or (rows, columns)")
    if grid is None or not pooled:
        return (math.prod(given),)
    if len(given) == 2:
        rows, columns = given
    else:
        rows = columns = math.isqrt(given[0])
        if rows * columns != given[0]:
            raise ValueError(
                f"AgentAttention: num_agents is {given[0]}, no square number; on a grid give one, or (rows, columns)"
            )
    if rows > grid[0] or columns > grid[1]:
        raise ValueError(
            f"AgentAttention: {rows} x {columns} agents on a grid of {grid[0]} x {grid[1]} tokens would repeat each "
            "other; give at most as many as the grid has rows and columns"
        )
    return rows, columns


def _resize(table: Tensor, places: tuple[int, ...]) -> Tensor:
    """A table `[h n ...]` at another grid or length, linear between its entries; itself where that is its own."""
    if table.shape[2:] == places:
        return table
    return nn.functional.interpolate(table, places, mode="linear" if len(places) == 1 else "bilinear")
