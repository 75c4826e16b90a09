"""ReLU attention: weights are ReLU(score) / row index, without a softmax, so a head can be silent without a sink.

    A[t, j] = max(0, scale q_t . k_j) / (t + 1)   for j <= t

A row need not sum to 1, and may be all zeros.

Paper: headwise/papers/active_dormant_heads.py (Guo et al., 2024), where it prevents attention sinks.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["ReluAttention", "relu_attention"]


def relu_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b n s d"],
    v: Float[Tensor, "b n s e"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> Float[Tensor, "b h t e"]:
    """Attention with ReLU weights divided by the number of keys that a row may see.

    mask: True = may attend, broadcastable to `[b h t s]`. is_causal: row i sees columns up to `i + s - t`, so that new
    rows on a cache see all of it. scale: multiplies scores; None means d ** -0.5. n divides h (grouped keys).
    Rows are divided by the keys that they see, which is the row index of the paper when nothing is padded.
    """
    b, h, t, d = q.shape
    n, s = k.shape[1:3]
    if h % n or v.shape[:3] != k.shape[:3] or k.shape[-1] != d:
        raise ValueError(f"relu_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    factor = d**-0.5 if scale is None else scale
    scores = (q.reshape(b, n, h // n * t, d) @ k.mT).view(b, h, t, s) * factor
    visible = torch.ones(t, s, dtype=torch.bool, device=q.device)
    if is_causal:
        visible = visible.tril(s - t)
    if mask is not None:
        visible = visible & mask
    weights = torch.where(visible, scores.relu(), 0) / visible.sum(-1, keepdim=True).clamp_min(1)
    return (weights.to(v.dtype).reshape(b, n, h // n * t, s) @ v).view(b, h, t, v.shape[-1])


class ReluAttention(nn.Module):
    """Multi-head self-attention with ReLU weights, in place of a softmax attention layer of the same parameters."""

    patterns = ("causal self", "noncausal self")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if embed_dim % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"ReluAttention: embed_dim {embed_dim}, num_heads {num_heads}, num_kv_heads {num_kv_heads}; heads must "
                "divide the width, and key heads the heads"
            )
        self.num_heads, self.num_kv_heads, self.is_causal = num_heads, num_kv_heads, is_causal
        self.head_dim = embed_dim // num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def forward(
        self, x: Float[Tensor, "b t c"], attention_mask: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t c"]:
        """attention_mask: True for real tokens; padding is neither seen nor counted."""
        b, t, _ = x.shape
        q, k, v = (
            projection(x).view(b, t, heads, self.head_dim).transpose(1, 2)
            for projection, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        out = relu_attention(q, k, v, mask=mask, is_causal=self.is_causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))
