"""Ordinary multi-head softmax attention: the layer that the mechanisms of this area are compared with.

    out = softmax(q k^T / sqrt(d)) v

It goes through torch's fused attention, and passes its heads through a `HeadPoint`, so that they can be probed and
edited. The other mechanisms take the same names for the same arguments.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.call import Call
from headwise.attend.point import HeadPoint

__all__ = ["SoftmaxAttention", "check_heads", "split_heads"]


def check_heads(name: str, embed_dim: int, num_heads: int, num_kv_heads: int | None = None) -> int:
    """The number of key heads. Raises ValueError where widths and heads do not divide."""
    kv = num_heads if num_kv_heads is None else num_kv_heads
    if min(embed_dim, num_heads, kv) < 1 or embed_dim % num_heads or num_heads % kv:
        raise ValueError(
            f"{name}: embed_dim {embed_dim}, num_heads {num_heads}, num_kv_heads {kv}; heads must divide the width, "
            "and key heads the heads"
        )
    return kv


def split_heads(x: Float[Tensor, "b t c"], heads: int) -> Float[Tensor, "b h t d"]:
    """`[b t (h d)]` to `[b h t d]`, a view."""
    b, t, c = x.shape
    return x.view(b, t, heads, c // heads).transpose(1, 2)


class SoftmaxAttention(nn.Module):
    """Multi-head attention with one fused projection for q, k and v, as in timm's vision transformers.

    num_kv_heads: grouped keys; None is one for each head. is_causal: row i sees keys up to i.
    """

    patterns = ("causal self", "noncausal self")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.is_causal, self.dropout = num_heads, is_causal, dropout
        self.num_kv_heads = check_heads("SoftmaxAttention", embed_dim, num_heads, num_kv_heads)
        self.head_dim = embed_dim // num_heads
        self.qkv = nn.Linear(embed_dim, embed_dim + 2 * self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.head_point = HeadPoint(num_heads, self.num_kv_heads)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self, x: Float[Tensor, "b t c"], attention_mask: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t c"]:
        """attention_mask: True for real tokens."""
        width, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = self.qkv(x).split([width, kv, kv], -1)
        q, k, v = split_heads(q, self.num_heads), split_heads(k, self.num_kv_heads), split_heads(v, self.num_kv_heads)
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, None, None].bool()
            if self.is_causal:
                mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        causal = self.is_causal and mask is None
        out = nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        kind = "causal" if self.is_causal else "bidirectional"
        call = lambda: Call(q, k, v, mask, causal, self.head_dim**-0.5, kind=kind)  # noqa: E731
        return self.proj(self.head_point(out.transpose(1, 2), call, self.proj).flatten(2))
