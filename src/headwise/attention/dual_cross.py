"""Dual cross-attention: the most responsible tokens read the whole image again, and an image reads another one's keys.

    rollout   Shat = Sbar_L ... Sbar_1,  Sbar = (1 - residual) mean_heads S + residual I;  response = its class row
    GLCA      softmax(q_selected K^T / sqrt d) V        q: the class token and the tokens of highest response
    PWCA      softmax(q [K; K']^T / sqrt d) [V; V']     K', V': another image's, one softmax over both

GLCA costs (1 + R n) rows of one attention. PWCA doubles the keys in training and is left out afterwards: with no
partner it is ordinary attention with the same weights.

Paper: headwise/papers/dual_cross_attention.py (Zhu et al., CVPR 2022); the rollout is Abnar and Zuidema's (2020).
Reconstructed where the paper is silent: heads are averaged in the rollout, max(1, ceil(R n)) tokens are selected, and
the class token is always among the queries.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attend.call import Call
from headwise.attend.groups import KeyGroup, positions
from headwise.attend.point import HeadPoint
from headwise.attention.softmax import check_heads, split_heads

__all__ = [
    "GlobalLocalCrossAttention",
    "PairwiseCrossAttention",
    "attention_rollout",
    "check_partner",
    "global_local_cross_attention",
    "pairwise_cross_attention",
    "rollout_row",
    "top_response_group",
    "top_response_tokens",
]

HeadReduce = Literal["mean", "max", "min"]
Scored = tuple[Tensor, Tensor, float]  # q [b h t d], k [b h t d] and the scale of their products
ROWS = 256  # rows of one layer's map that exist at a time


def attention_rollout(
    attentions: Sequence[Float[Tensor, "b h t t"]], residual: float = 0.5, head_reduce: HeadReduce = "mean"
) -> Float[Tensor, "b t t"]:
    """The product of all layers' maps, the last layer on the left; rows sum to 1.

    attentions: softmax weights from the first layer to the last (`output_attentions=True` under eager attention).
    residual: share of the identity in each factor, the layer's skip connection, 0 to 1. head_reduce: as the paper,
    the mean; "max" and "min" are scaled to rows of sum 1 again. This is O(l t^3); `rollout_row` is
    O(l t^2) for the class row alone.
    Raises ValueError for no maps and for a residual outside [0, 1].
    """
    _check_residual("attention_rollout", residual, len(attentions))
    first = attentions[0]
    whole = torch.eye(first.shape[-1], dtype=_wide(first), device=first.device).expand(len(first), -1, -1)
    for attention in attentions:
        weights = _reduced(attention.to(whole.dtype), head_reduce)
        whole = (1 - residual) * (weights @ whole) + residual * whole
    return whole


@torch.no_grad()
def rollout_row(
    layers: Sequence[Float[Tensor, "b h t t"] | Scored],
    *,
    row: int = 0,
    residual: float = 0.5,
    head_reduce: HeadReduce = "mean",
) -> Float[Tensor, "b t"]:
    """One row of `attention_rollout`, without a gradient: a row vector is taken back through the layers.

    layers: from the first to the last, each its map or `(q, k, scale)`, whose map is then made in blocks of rows and
    never kept. row: 0 is the class token. Raises ValueError as `attention_rollout` does.
    """
    _check_residual("rollout_row", residual, len(layers))
    first = layers[0]
    sample = first if isinstance(first, Tensor) else first[0]
    b, t = sample.shape[0], sample.shape[2]
    response = torch.zeros(b, t, dtype=_wide(sample), device=sample.device)
    response[:, row] = 1
    for layer in reversed(layers):
        passed = torch.zeros_like(response)
        for start in range(0, t, ROWS):
            rows = slice(start, start + ROWS)
            if isinstance(layer, Tensor):
                weights = layer[:, :, rows].to(response.dtype)
            else:
                q, k, scale = layer
                weights = (q[:, :, rows].to(response.dtype) @ k.to(response.dtype).mT * scale).softmax(-1)
            passed += (response[:, None, rows] @ _reduced(weights, head_reduce)).squeeze(1)
        response = (1 - residual) * passed + residual * response
    return response


def _check_residual(where: str, residual: float, layers: int) -> None:
    if not layers:
        raise ValueError(
            f"{where}: there are no attention maps; fused attention (sdpa, flash) returns none, load the model with "
            'attn_implementation="eager" and output_attentions=True, or give (q, k, scale) of each layer to rollout_row'
        )
    if not 0 <= residual <= 1:
        raise ValueError(f"{where}: residual is {residual}; expected a share from 0 to 1, the paper's is 0.5")


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _reduced(weights: Float[Tensor, "b h t s"], how: HeadReduce) -> Float[Tensor, "b t s"]:
    if how == "mean":
        return weights.mean(1)
    if how not in ("max", "min"):
        raise ValueError(f"rollout: head_reduce is {how!r}; expected 'mean', 'max' or 'min'")
    reduced = weights.amax(1) if how == "max" else weights.amin(1)
    return reduced / reduced.sum(-1, keepdim=True).clamp_min(torch.finfo(reduced.dtype).tiny)


def top_response_tokens(
    response: Float[Tensor, "b t"] | Float[Tensor, "b t t"], ratio: float, *, num_prefix_tokens: int = 1
) -> Int[Tensor, "b r"]:
    """Indices of the max(1, ceil(ratio n)) of n patches with the highest response, in the order of the sequence.

    response: the class row of a rollout, or a whole rollout. num_prefix_tokens: class, distillation and register tokens
    in front, which are never selected; at least 1, token 0 is the class token. Ties go to the earlier token.
    Raises ValueError for a ratio outside (0, 1] and for a sequence without patches.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"top_response_tokens: ratio is {ratio}; expected a share in (0, 1], as 0.1")
    row = response[:, 0] if response.ndim == 3 else response
    patches = row.shape[1] - num_prefix_tokens
    if num_prefix_tokens < 1 or patches < 1:
        raise ValueError(
            f"top_response_tokens: {row.shape[1]} tokens with num_prefix_tokens {num_prefix_tokens}; expected a class "
            "token in front and at least one patch"
        )
    count = max(1, math.ceil(round(ratio * patches, 9)))
    order = row[:, num_prefix_tokens:].detach().sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(1).values + num_prefix_tokens


def top_response_group(
    response: Float[Tensor, "b t"] | Float[Tensor, "b t t"], ratio: float, *, num_prefix_tokens: int = 1
) -> KeyGroup:
    """The tokens of `top_response_tokens` as a key group, which probes and edits take."""
    members = torch.zeros(response.shape[:2], dtype=torch.bool, device=response.device)
    return positions(
        members.scatter(1, top_response_tokens(response, ratio, num_prefix_tokens=num_prefix_tokens), True)
    )


def check_partner(partner: Tensor, batch: int) -> None:
    """Raises ValueError unless `partner` `[b]` is a permutation of the batch. Looks at values: not for the hot path."""
    given = partner.detach().cpu()
    if given.dtype != torch.long or given.shape != (batch,):
        raise ValueError(
            f"partner: {given.dtype} of shape {tuple(given.shape)}; expected torch.int64 of shape ({batch},), "
            "the number of the image that each image is paired with"
        )
    if not torch.equal(given.sort().values, torch.arange(batch)):
        raise ValueError(
            f"partner: values from {int(given.min())} to {int(given.max())} with {len(given.unique())} different ones; "
            f"expected a permutation of 0 to {batch - 1}, as torch.randperm({batch})"
        )


def global_local_cross_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h s d"],
    v: Float[Tensor, "b h s e"],
    index: Int[Tensor, "b r"],
    *,
    scale: float | None = None,
    mask: Bool[Tensor, "b 1 1 s"] | None = None,
) -> Float[Tensor, "b h r e"]:
    """Attention of the selected queries `q[:, :, index]` to all keys.

    index: from `top_response_tokens`, with the class token's 0 before it where its output is wanted. scale: None means
    d ** -0.5. mask: True = may attend.
    """
    chosen = q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    return nn.functional.scaled_dot_product_attention(chosen, k, v, attn_mask=mask, scale=scale)


def pairwise_cross_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h s d"],
    v: Float[Tensor, "b h s e"],
    partner: Int[Tensor, " b"],
    *,
    scale: float | None = None,
    mask: Bool[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b h t e"]:
    """Attention of each image's queries to its own keys and those of image `partner[b]`, in one softmax.

    An image that is its own partner gets ordinary attention: doubled keys cancel. mask: True for real keys.
    """
    keys, values, real = _beside(k, v, mask, partner)
    seen = None if real is None else real[:, None, None]
    return nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scale)


def _beside(k: Tensor, v: Tensor, mask: Tensor | None, partner: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of each image with those of its partner behind them."""
    real = None if mask is None else torch.cat([mask, mask[partner]], 1)
    return torch.cat([k, k[partner]], 2), torch.cat([v, v[partner]], 2), real


class _CrossAttention(nn.Module):
    """What both layers are made of: one projection for q, k and v, heads, and their mixing."""

    patterns = ("noncausal self",)

    def __init__(self, embed_dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(type(self).__name__, embed_dim, num_heads)
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.head_point = HeadPoint(num_heads)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, kind: str) -> Tensor:
        """`[b r c]` of queries `[b h r d]`. real: `[b s]`, True for real keys."""
        mask = None if real is None else real[:, None, None].bool()
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        call = partial(Call, q, k, v, mask, False, self.head_dim**-0.5, kind=kind)
        return self.proj(self.head_point(out.transpose(1, 2), call, self.proj).flatten(2))


class GlobalLocalCrossAttention(_CrossAttention):
    """The attention of a GLCA block, with weights of its own.

    >>> layer = GlobalLocalCrossAttention(32, 4)
    >>> layer(torch.randn(2, 17, 32), torch.tensor([[0, 3, 9], [0, 1, 16]])).shape
    torch.Size([2, 3, 32])
    """

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        index: Int[Tensor, "b r"] | None = None,
        attention_mask: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b r c"]:
        """Outputs at the tokens of `index`; None means all of them. attention_mask: True for real tokens."""
        width = self.num_heads * self.head_dim
        chosen = x if index is None else x.gather(1, index[..., None].expand(-1, -1, width))
        bias = (None, None) if self.qkv.bias is None else self.qkv.bias.split([width, 2 * width])
        weight = self.qkv.weight.split([width, 2 * width])  # queries only where they are used
        q = split_heads(nn.functional.linear(chosen, weight[0], bias[0]), self.num_heads)
        k, v = nn.functional.linear(x, weight[1], bias[1]).split(width, -1)
        k, v = split_heads(k, self.num_heads), split_heads(v, self.num_heads)
        return self._attended(q, k, v, attention_mask, "bidirectional" if index is None else "cross")


class PairwiseCrossAttention(_CrossAttention):
    """Self-attention that can take another image's keys beside its own, with the same weights.

    >>> layer, x = PairwiseCrossAttention(32, 4), torch.randn(3, 17, 32)
    >>> layer(x, partner=torch.tensor([1, 2, 0])).shape  # in training; layer(x) afterwards
    torch.Size([3, 17, 32])
    """

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        partner: Int[Tensor, " b"] | None = None,
        attention_mask: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t c"]:
        """partner: the number of the image that each is paired with; None means none. attention_mask: True = real."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        if partner is None:
            return self._attended(q, k, v, attention_mask, "bidirectional")
        return self._attended(q, *_beside(k, v, attention_mask, partner), "cross")
