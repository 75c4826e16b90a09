"""Mixture of heads: a router lets each token use some of the heads, and weighs them.

    MoH(x_t) = sum_i g_i(x_t) H_i(x_t) W_O^i,   g_i = 0 for the routed heads that token t did not choose

The first heads are shared (always on), each token picks top_k of the rest. Learned router, from the layer's input x:

    r = top_k(softmax(W_r x)), renormalised, times top_k;   s = softmax(W_s x) times the number of shared heads
    [a1, a2] = 2 softmax(W_h x);   g = (a1 s, a2 r)

so that gates average to 1. The query-norm router has no parameters: softmax over the norms of the routed queries in
units of their standard deviation, gates 1 or 0, with the gradient of that softmax (straight-through).

Paper: headwise/papers/mixture_of_head_attention.py (Jin et al., 2024).
Notes: the factors top_k, shared and 2 stand in the official code, not in the paper's equations. The official code
computes every head and multiplies by the gates; here unchosen heads are not computed at inference (`routed_attention`).
Among equal scores the lower head is chosen.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.call import Call
from headwise.attend.point import HeadPoint
from headwise.attention.routed import Implementation, routed_attention
from headwise.attention.softmax import check_heads, split_heads

__all__ = [
    "HeadGates",
    "HeadRouter",
    "HeadSplit",
    "LearnedRouter",
    "MixtureOfHeads",
    "QueryNormRouter",
    "head_split",
    "load_balance",
    "moh_gates",
    "moh_loss",
    "norm_router",
]


class HeadSplit(NamedTuple):
    """Heads of a layer, how many of them are shared, and how many of the others each token chooses."""

    heads: int
    shared: int
    top_k: int

    @property
    def active(self) -> float:
        """Share of the heads that a token uses."""
        return (self.shared + self.top_k) / self.heads


class HeadGates(NamedTuple):
    """What a router decides.

    gates `[b t h]`, shared heads first; probabilities `[b t e]` of the routed heads; chosen `[b t e]`: top_k of them.
    """

    gates: Float[Tensor, "b t h"]
    probabilities: Float[Tensor, "b t e"]
    chosen: Bool[Tensor, "b t e"]


def head_split(num_heads: int, active: float = 0.75, shared: float = 0.5) -> HeadSplit:
    """Shares of the heads as whole heads: each rounded to the nearest, halves up.

    active: share of the heads that a token uses. shared: share that every token uses, at most `active`.
    Raises ValueError for shares out of range, and where rounding leaves no head to choose from.

    >>> head_split(32, active=0.75, shared=0.5)
    HeadSplit(heads=32, shared=16, top_k=8)
    """
    if not 0 < active <= 1 or not 0 <= shared <= active:
        raise ValueError(
            f"head_split: active {active}, shared {shared}; expected 0 <= shared <= active <= 1, active > 0"
        )
    fixed = int(shared * num_heads + 0.5)
    split = HeadSplit(num_heads, fixed, int(active * num_heads + 0.5) - fixed)
    try:
        return check_split("head_split", *split)
    except ValueError as error:
        raise ValueError(f"{error} (active={active}, shared={shared} of {num_heads} heads, rounded)") from None


def check_split(name: str, heads: int, shared: int, top_k: int) -> HeadSplit:
    """The three as a `HeadSplit`. Raises ValueError where they do not fit."""
    routed = heads - shared
    if shared < 0 or routed < 0 or not (1 if routed else 0) <= top_k <= routed:
        raise ValueError(
            f"{name}: {heads} heads, num_shared {shared}, top_k {top_k}; expected num_shared from 0 to the heads, "
            "top_k from 1 to the heads that are not shared, and 0 only where all are"
        )
    return HeadSplit(heads, shared, top_k)


def moh_gates(
    x: Float[Tensor, "b t c"],
    w_routed: Float[Tensor, "e c"] | None,
    w_shared: Float[Tensor, "n c"] | None,
    w_balance: Float[Tensor, "two c"] | None,
    k: int,
) -> HeadGates:
    """Gates of the learned router; each token's gates sum to the number of heads that it uses where W_h is 0.

    w_routed: None where all heads are shared. w_shared: None for one shared head, whose weight is 1, or for none.
    w_balance: weighs shared against routed heads; None where there are not both. Computed in float32 at least.
    Raises ValueError for matrices that do not go together, and k out of range.
    """
    routed = 0 if w_routed is None else len(w_routed)
    shared = len(w_shared) if w_shared is not None else int(w_balance is not None)
    check_split("moh_gates", routed + shared, shared, k)
    if (w_balance is None) == bool(routed and shared):
        raise ValueError(
            f"moh_gates: {shared} shared and {routed} routed heads with w_balance "
            f"{'missing' if w_balance is None else 'given'}; it is for layers that have both"
        )
    x = x.to(torch.promote_types(x.dtype, torch.float32))

    def softmax(weight: Tensor) -> Tensor:
        return (x @ weight.to(x.dtype).mT).softmax(-1)

    parts = []
    probabilities, chosen = (
        x.new_zeros(*x.shape[:2], 0),
        torch.zeros(*x.shape[:2], 0, dtype=torch.bool, device=x.device),
    )
    if shared:
        parts.append(x.new_ones(*x.shape[:2], 1) if w_shared is None else softmax(w_shared) * shared)
    if w_routed is not None:
        probabilities = softmax(w_routed)
        chosen = _top(probabilities, k)
        kept = probabilities * chosen
        parts.append(kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps) * k)
    if w_balance is not None:
        parts = [part * a for part, a in zip(parts, (2 * softmax(w_balance)).split(1, -1), strict=True)]
    return HeadGates(torch.cat(parts, -1), probabilities, chosen)


def norm_router(q: Float[Tensor, "b h t d"], num_shared: int, k: int) -> HeadGates:
    """Gates 1 or 0 from the norms of the queries; the gradient is that of the softmax (straight-through).

    Rotary embedding leaves norms as they are and a common scale cancels, so q may come before or after both. A NaN in
    the scores of a token is in all its gates.
    Raises ValueError for fewer than two routed heads, whose spread is undefined, and k out of range.
    """
    heads = q.shape[1]
    check_split("norm_router", heads, num_shared, k)
    if heads - num_shared < 2:
        raise ValueError(
            f"norm_router: {heads} heads of which {num_shared} are shared; at least 2 must be routed, because norms "
            "are taken in units of their standard deviation over the routed heads"
        )
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    norms = q[:, num_shared:].norm(dim=-1).mT
    scores = norms / norms.std(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    probabilities = scores.softmax(-1)
    chosen = _top(probabilities, k)
    gates = chosen.to(q.dtype) + (probabilities - probabilities.detach())  # the bracket is 0, its gradient is not
    shared = gates.new_ones(*gates.shape[:2], num_shared)
    return HeadGates(torch.cat([shared, gates], -1), probabilities, chosen)


def _top(probabilities: Float[Tensor, "b t e"], k: int) -> Bool[Tensor, "b t e"]:
    """The k greatest of each token; of equal ones the first."""
    order = probabilities.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, True)


def load_balance(routed: HeadGates, attention_mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, ""]:
    """E sum_i P_i f_i over the E routed heads: P the mean probability, f the share of tokens that chose the head.

    k where both are even, E where all tokens choose alike and with certainty. P carries the gradient. Padding counts in
    neither (attention_mask: True for real tokens).
    """
    p, f = routed.probabilities, routed.chosen.to(routed.probabilities.dtype)
    if attention_mask is None:
        return p.shape[-1] * (p.flatten(0, 1).mean(0) * f.flatten(0, 1).mean(0)).sum()
    real = attention_mask[..., None].to(p.dtype)
    count = real.sum().clamp_min(1)
    return p.shape[-1] * ((p * real).sum((0, 1)) * (f * real).sum((0, 1))).sum() / count.square()


class HeadRouter(nn.Module):
    """What the routers share: the split of the heads, and the load-balance loss of the last forward in training.

    `aux_loss` is that loss, a scalar with its gradient; None after a forward in eval mode, and where no head is routed.
    It is replaced by every forward and belongs to this router alone.
    """

    layout = "b t c -> gates"  # part of a mechanism, not one

    def __init__(self, num_heads: int, num_shared: int, top_k: int) -> None:
        super().__init__()
        self.split = check_split(type(self).__name__, num_heads, num_shared, top_k)
        self.aux_loss: Tensor | None = None
        self.implementation: Implementation = "auto"  # of the attention that it gates, inside a converted model

    def extra_repr(self) -> str:
        heads, shared, k = self.split
        return f"{shared} shared, {k} of {heads - shared} routed, {self.split.active:.1%} active"

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not take the graph of the last loss with it."""
        return self.__dict__ | {"aux_loss": None}

    def keep(self, routed: HeadGates, attention_mask: Tensor | None) -> HeadGates:
        wanted = self.training and self.split.shared < self.split.heads
        self.aux_loss = load_balance(routed, attention_mask) if wanted else None
        return routed


class LearnedRouter(HeadRouter):
    """`moh_gates` with its three matrices (without biases, normal with deviation 0.02)."""

    def __init__(self, embed_dim: int, num_heads: int, num_shared: int, top_k: int) -> None:
        super().__init__(num_heads, num_shared, top_k)

        def linear(width: int, wanted: bool) -> nn.Linear | None:
            made = nn.Linear(embed_dim, width, bias=False) if wanted else None
            if made is not None:  # zeros would send every token to the same heads
                nn.init.normal_(made.weight, std=0.02)
            return made

        routed = num_heads - num_shared
        self.routed = linear(routed, routed > 0)
        self.shared = linear(num_shared, num_shared > 1 or not routed)
        self.balance = linear(2, routed > 0 and num_shared > 0)

    def forward(self, x: Float[Tensor, "b t c"], attention_mask: Bool[Tensor, "b t"] | None = None) -> HeadGates:
        """x: the input of the attention layer. attention_mask: True for real tokens."""
        weights = [None if one is None else one.weight for one in (self.routed, self.shared, self.balance)]
        return self.keep(moh_gates(x, *weights, k=self.split.top_k), attention_mask)


class QueryNormRouter(HeadRouter):
    """`norm_router`: no parameters."""

    def __init__(self, num_heads: int, num_shared: int, top_k: int) -> None:
        super().__init__(num_heads, num_shared, top_k)
        if num_heads - num_shared == 1:
            raise ValueError(
                f"QueryNormRouter: {num_shared} of {num_heads} heads are shared; at least 2 must be routed"
            )

    def forward(self, q: Float[Tensor, "b h t d"], attention_mask: Bool[Tensor, "b t"] | None = None) -> HeadGates:
        """q: the queries. attention_mask: True for real tokens."""
        heads, shared, k = self.split
        if shared == heads:
            ones = q.new_ones(q.shape[0], q.shape[2], heads)
            return self.keep(HeadGates(ones, ones[..., :0], ones[..., :0].bool()), attention_mask)
        return self.keep(norm_router(q, shared, k), attention_mask)


class MixtureOfHeads(nn.Module):
    """Multi-head attention in which each token uses num_shared + top_k of the heads.

    num_shared, top_k: None is half of the heads, and half of the others (rounded up).
    router: "learned", or "query_norm" (no parameters). head_dim: None is embed_dim / num_heads.
    implementation: as of `routed_attention`; training always computes every head, since the router learns from them.
    Gates of padding tokens are 0. `aux_loss` holds the load-balance loss of the last forward in training (`moh_loss`).
    Raises ValueError for sizes that do not fit.
    """

    patterns = ("causal self", "noncausal self")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_shared: int | None = None,
        top_k: int | None = None,
        router: Literal["learned", "query_norm"] = "learned",
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        is_causal: bool = False,
        qkv_bias: bool = True,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        inner = embed_dim if head_dim is None else head_dim * num_heads
        self.num_kv_heads = check_heads("MixtureOfHeads", inner, num_heads, num_kv_heads)
        self.num_heads, self.is_causal = num_heads, is_causal
        self.implementation: Implementation = implementation
        shared = num_heads // 2 if num_shared is None else num_shared
        k = (num_heads - shared + 1) // 2 if top_k is None else top_k
        if router == "learned":
            self.router: HeadRouter = LearnedRouter(embed_dim, num_heads, shared, k)
        elif router == "query_norm":
            self.router = QueryNormRouter(num_heads, shared, k)
        else:
            raise ValueError(f"MixtureOfHeads: router is {router!r}; choose 'learned' or 'query_norm'")
        self.qkv = nn.Linear(embed_dim, inner + 2 * self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.head_point = HeadPoint(num_heads, self.num_kv_heads)
        self.proj = nn.Linear(inner, embed_dim)

    @property
    def aux_loss(self) -> Tensor | None:
        """Load-balance loss of the last forward in training mode."""
        return self.router.aux_loss

    def forward(
        self, x: Float[Tensor, "b t c"], attention_mask: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t c"]:
        """attention_mask: True for real tokens."""
        width, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = self.qkv(x).split([width, kv, kv], -1)
        q, k, v = split_heads(q, self.num_heads), split_heads(k, self.num_kv_heads), split_heads(v, self.num_kv_heads)
        real = None if attention_mask is None else attention_mask.bool()
        gates = self.router(q if isinstance(self.router, QueryNormRouter) else x, real).gates
        keys = None if real is None else real[:, None, None]
        if real is not None:
            gates = gates * real[..., None]
        if self.head_point.visit is None:
            implementation = self.implementation if not self.training else "dense"
            out = routed_attention(q, k, v, gates, mask=keys, causal=self.is_causal, implementation=implementation)
            return self.proj(out.flatten(2))
        ones = torch.ones_like(gates)
        out = routed_attention(q, k, v, ones, mask=keys, causal=self.is_causal, implementation="dense")
        return self.proj(self.head_point(out, lambda: self._call(q, k, v, keys), self.proj, gates).flatten(2))

    def _call(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Call:
        causal = self.is_causal
        if causal and mask is not None:
            mask, causal = mask & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(), False
        kind = "causal" if self.is_causal else "bidirectional"
        return Call(q, k, v, mask, causal, self.head_dim**-0.5, kind=kind)


def moh_loss(model: nn.Module) -> Float[Tensor, ""]:
    """Mean load-balance loss over the layers that route heads, of the last forward in training.

    The paper adds 0.01 of it to the loss of the task.

    Raises ValueError for a model without such layers, and before a forward in training mode.
    """
    routers = [
        part for part in model.modules() if isinstance(part, HeadRouter) and part.split.shared < part.split.heads
    ]
    losses = [part.aux_loss for part in routers if part.aux_loss is not None]
    if not losses:
        raise ValueError(
            f"moh_loss: {type(model).__name__} has {len(routers)} layers that route heads, and none has a loss; call "
            "it after a forward in training mode of a model with such layers"
        )
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
