"""Positional attention: weights from positions alone, the same for every input; values still flow.

    A_h = softmax((P W_q)(P W_k)^T / sqrt(p)),   out = concat_h(A_h X W_v) W_o

The weights have no batch axis: they are made once, O(h n^2 p), and applied by one matrix product a head.

Paper: headwise/papers/positional_attention.py (Back de Luca et al., ICML 2025).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.call import Call
from headwise.attend.point import HeadPoint
from headwise.attention.softmax import check_heads, split_heads

__all__ = ["PositionalAttention", "positional_attention", "positional_weights"]


def positional_weights(
    p_q: Float[Tensor, "*b h t d"],
    p_k: Float[Tensor, "*b h s d"],
    *,
    scale: float | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "... h t s"]:
    """softmax(p_q p_k^T scale) along keys. scale: None is d ** -0.5.

    mask: True = may attend, broadcastable to the weights; a row without a key is zeros.
    """
    scores = p_q @ p_k.mT * (p_q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        return scores.softmax(-1).to(p_q.dtype)
    scores = scores.masked_fill(~mask, -torch.inf)
    empty = (~mask).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(~mask, 0).to(p_q.dtype)


def positional_attention(
    p_q: Float[Tensor, "*p g t d"],
    p_k: Float[Tensor, "*p g m d"],
    v: Float[Tensor, "b h s e"],
    *,
    scale: float | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "b h t e"]:
    """Values mixed by weights of positions. p_q, p_k: `[h n d]` for all items alike, or `[b h n d]`.

    scale, mask: as in `positional_weights`. Raises ValueError where positions and values differ in number.
    """
    if p_k.shape[-2] != v.shape[-2] or p_k.shape[-3] != v.shape[1]:
        raise ValueError(
            f"positional_attention: p_k has {p_k.shape[-3]} heads of {p_k.shape[-2]} positions, v {v.shape[1]} of "
            f"{v.shape[-2]}; they must match"
        )
    return apply_weights(positional_weights(p_q, p_k, scale=scale, mask=mask), v)


def apply_weights(weights: Float[Tensor, "... h t s"], v: Float[Tensor, "b h s e"]) -> Float[Tensor, "b h t e"]:
    """weights v; shared weights in one product of `t x s` with `s x (b e)` for each head."""
    if weights.ndim == 4:
        return weights @ v
    b, _, _, e = v.shape
    return (weights @ v.permute(1, 2, 0, 3).flatten(2)).unflatten(2, (b, e)).permute(2, 0, 1, 3)


class PositionalAttention(nn.Module):
    """Multi-head attention by positions: queries and keys of `[n p]` encodings, values of the tokens.

    pos_dim: p, the width of encodings, and of a head's queries and keys, as in the official code; qk_dim changes the
    latter. Without encodings at a call, token i has the i-th unit vector, for up to pos_dim tokens.
    is_causal: row i sees positions up to i. bias: of all projections.
    The weights are kept between calls in eval mode without gradients, for the same encodings and parameters.
    """

    patterns = ("noncausal self", "causal self")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pos_dim: int,
        *,
        qk_dim: int | None = None,
        is_causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_heads("PositionalAttention", embed_dim, num_heads)
        qk_dim = pos_dim if qk_dim is None else qk_dim
        if pos_dim < 1 or qk_dim < 1:
            raise ValueError(f"PositionalAttention: pos_dim {pos_dim}, qk_dim {qk_dim}; both are 1 or more")
        self.num_heads, self.pos_dim, self.qk_dim, self.is_causal = num_heads, pos_dim, qk_dim, is_causal
        self.qk = nn.Linear(pos_dim, 2 * qk_dim * num_heads, bias=bias)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.head_point = HeadPoint(num_heads)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        for layer in (self.qk, self.v_proj, self.proj):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self._kept: tuple[Tensor | int, Any, Tensor] | None = None

    @staticmethod
    def example() -> "PositionalAttention":
        return PositionalAttention(32, 4, 16)

    def queries_keys(self, positions: Float[Tensor, "*b n p"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... d"]]:
        """Queries and keys `[h n d]`, or `[b h n d]` for encodings with a batch axis."""
        both = self.qk(positions).unflatten(-1, (2, self.num_heads, self.qk_dim)).movedim(-3, 0).transpose(-2, -3)
        return both[0], both[1]

    def one_hot(self, count: int) -> Float[Tensor, "n p"]:
        """The encodings that tokens have where none are given. Raises ValueError for more tokens than pos_dim."""
        if count > self.pos_dim:
            raise ValueError(
                f"PositionalAttention: {count} tokens and pos_dim {self.pos_dim}; give positions, or a pos_dim of "
                f"{count} or more"
            )
        return torch.eye(count, self.pos_dim, dtype=self.qk.weight.dtype, device=self.qk.weight.device)

    def attention_weights(
        self,
        positions: Float[Tensor, "*b n p"] | int,
        attention_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "... h n n"]:
        """`[h n n]`, or `[b h n n]` where encodings or padding differ between items. An int: so many unit vectors."""
        keeps = (
            not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()) and attention_mask is None
        )
        state = self._state(positions) if keeps else None
        if keeps and self._kept is not None:
            # The very encodings, which are held so that no other tensor can take their place.
            of, kept_state, weights = self._kept
            if kept_state == state and (of is positions or (isinstance(positions, int) and of == positions)):
                return weights
        given = self.one_hot(positions) if isinstance(positions, int) else positions
        p_q, p_k = self.queries_keys(given)
        weights = positional_weights(p_q, p_k, mask=self._mask(given.shape[-2], attention_mask))
        if keeps:
            self._kept = (positions, state, weights)
        return weights

    def _state(self, positions: Tensor | int) -> Any:
        """Place and version of all that the weights are made of: another one after a change."""
        tensors = [*self.qk.parameters()] + ([] if isinstance(positions, int) else [positions])
        return tuple((one.data_ptr(), one._version, one.dtype) for one in tensors)

    def _mask(self, count: int, attention_mask: Tensor | None) -> Tensor | None:
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        if self.is_causal:
            past = torch.ones(count, count, dtype=torch.bool, device=self.qk.weight.device).tril()
            mask = past if mask is None else mask & past
        return mask

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        positions: Float[Tensor, "*p m d"] | None = None,
        attention_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """positions: `[n p]` for all items, or `[b n p]`. attention_mask: True = real tokens.

        Raises ValueError for positions of another number or width than the tokens.
        """
        count = x.shape[1]
        if positions is not None and (
            positions.shape[-2:] != (count, self.pos_dim) or (positions.ndim == 3 and len(positions) != len(x))
        ):
            raise ValueError(
                f"PositionalAttention: positions are {tuple(positions.shape)} for x of {tuple(x.shape)}; expected "
                f"[{count}, {self.pos_dim}], or [{len(x)}, {count}, {self.pos_dim}]"
            )
        weights = self.attention_weights(count if positions is None else positions, attention_mask)
        v = split_heads(self.v_proj(x), self.num_heads)
        out = apply_weights(weights, v)

        def call() -> Call:
            given = self.one_hot(count) if positions is None else positions
            q, k = (one.expand(len(x), *one.shape[-3:]) for one in self.queries_keys(given))
            mask = self._mask(count, attention_mask)
            mask = mask[None, None] if mask is not None and mask.ndim == 2 else mask
            return Call(q, k, v, mask, False, self.qk_dim**-0.5, kind="causal" if self.is_causal else "bidirectional")

        return self.proj(self.head_point(out.transpose(1, 2), call, self.proj).flatten(2))
