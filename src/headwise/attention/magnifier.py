"""Magnifier attention: a row attends to its keys and, in the same softmax, to the fine keys of the regions it prefers.

    p_c = sum_h A_h[row, coarse key c],   region c is selected where (p_c - min p) / (max p - min p) > threshold
    out = softmax([q K^T | q K_fine^T of the selected]) [V | V_fine]

The selection of one layer acts in the next; its rule is a choice and carries no gradient. The one softmax is two fused
calls merged by their log-sum-exps: out = s(l - f) out_keys + s(f - l) out_fine, with s the logistic function, l and f
the log-sum-exps; a row that selects nothing is the plain row bit for bit.

Paper: headwise/papers/lscenellm.py (Zhi et al., CVPR 2025).
Notes: the official code sums heads, as here, though its comments say mean (min-max undoes the difference). Where all
regions are preferred equally it divides 0 by 0; here nothing is selected. A coarse key stays beside its fine keys.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.kernels import attention_with_lse
from headwise.attention.softmax import check_heads, split_heads

__all__ = [
    "MagnifierAttention",
    "fine_attention",
    "magnified_attention",
    "region_preference",
]

Implementation = Literal["auto", "masked", "gather"]


def region_preference(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b m c d"],
    lse: Float[Tensor, "b h t"],
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b t c"]:
    """The attention of each row to each region's coarse key, summed over the heads, without the other columns.

    k: the coarse keys. lse: log-sum-exp of the whole rows, as `attention_with_lse` gives it. mask: over these columns
    alone, boolean or additive. No gradient. Rows that see nothing have preference 0.
    """
    with torch.no_grad():
        b, h, t, d = q.shape
        groups = k.shape[1]
        q, k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
        scores = (q.reshape(b, groups, -1, d) @ k.mT).view(b, h, t, -1) * (d**-0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        blind = torch.isneginf(lse)[..., None]
        return (scores - lse[..., None].masked_fill(blind, 0)).exp().masked_fill(blind, 0).sum(1)


def fine_attention(
    q: Float[Tensor, "b h t d"],
    k_fine: Float[Tensor, "b m n d"],
    v_fine: Float[Tensor, "b m n e"],
    select: Bool[Tensor, "b t _"],
    out: Float[Tensor, "b h t e"],
    lse: Float[Tensor, "b h t"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alpha: float = 1.0,
    implementation: Implementation = "auto",
) -> Float[Tensor, "b h t e"]:
    """Add the selected fine keys to rows of attention that are there already, by their output and log-sum-exp.

    alpha: share of the magnified output, the rest is `out`; 0 to 1. implementation: "masked" forms scores of all fine
    keys, "gather" only those that some row of an item selects ("auto": for a single row, as in decoding).
    Rows that select nothing keep `out` bit for bit. Raises ValueError for a selection of another shape and for alpha or
    an implementation out of range.
    """
    b, _, t, _ = q.shape
    if tuple(select.shape) != (b, t, k_fine.shape[2]):
        raise ValueError(
            f"fine_attention: select has shape {tuple(select.shape)}; expected {(b, t, k_fine.shape[2])}, one choice "
            "for each row and fine key"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"fine_attention: alpha is {alpha}; expected 0 (plain) to 1 (magnified)")
    if implementation not in ("auto", "masked", "gather"):
        raise ValueError(f"fine_attention: implementation is {implementation!r}; choose 'auto', 'masked' or 'gather'")
    if implementation == "gather" or (implementation == "auto" and t == 1):
        wanted = select.any(1)
        most = int(wanted.sum(-1).max()) if wanted.numel() else 0
        order = wanted.int().sort(dim=-1, descending=True, stable=True).indices[:, :most]
        k_fine, v_fine = (
            x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (k_fine, v_fine)
        )
        select = select.gather(2, order[:, None].expand(-1, t, -1))
    if select.shape[2] == 0 or t == 0 or alpha == 0:
        return out
    fine, fine_lse = attention_with_lse(q, k_fine, v_fine, mask=select[:, None], scale=scale, softcap=softcap)
    nothing = torch.isneginf(fine_lse)
    gap = torch.where(nothing, 0.0, fine_lse) - torch.where(torch.isneginf(lse), torch.finfo(lse.dtype).min, lse)
    share = torch.where(nothing, 0.0, gap.sigmoid())[..., None]
    rest = torch.where(nothing, 1.0, (-gap).sigmoid())[..., None]
    merged = rest * out + share * fine
    merged = merged if alpha == 1 else (1 - alpha) * out + alpha * merged
    return torch.where(nothing[..., None], out, merged.to(out.dtype))


def magnified_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b m s d"],
    v: Float[Tensor, "b m s e"],
    k_fine: Float[Tensor, "b m n d"],
    v_fine: Float[Tensor, "b m n e"],
    select: Bool[Tensor, "b t _"],
    attention_mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    alpha: float = 1.0,
    implementation: Implementation = "auto",
) -> Float[Tensor, "b h t e"]:
    """softmax over [keys | selected fine keys], un-repeated grouped keys on both sides.

    select: which fine keys each row sees; `spread_to_fine` makes it of regions. attention_mask: over the ordinary keys,
    boolean (True = may attend) or additive, broadcastable to `[b h t s]`. causal: of the ordinary keys; fine keys are
    seen by every row that selects them. alpha, implementation: of `fine_attention`.
    """
    out, lse = attention_with_lse(q, k, v, mask=attention_mask, causal=causal, scale=scale, softcap=softcap)
    return fine_attention(
        q, k_fine, v_fine, select, out, lse, scale=scale, softcap=softcap, alpha=alpha, implementation=implementation
    )


class MagnifierAttention(nn.Module):
    """Self-attention that also sees chosen fine tokens, through key and value projections of their own.

    num_kv_heads: grouped keys; None is one for each head. is_causal: row i sees keys up to i, and all the fine keys
    that it selects. Complexity: O(t s + t n); a single row costs its selected fine keys only.
    """

    layout = "x, fine, select"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        fine_dim: int | None = None,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.is_causal = num_heads, is_causal
        self.num_kv_heads = check_heads("MagnifierAttention", embed_dim, num_heads, num_kv_heads)
        width = self.num_kv_heads * (embed_dim // num_heads)
        self.qkv = nn.Linear(embed_dim, embed_dim + 2 * width, bias=qkv_bias)
        self.k_fine = nn.Linear(embed_dim if fine_dim is None else fine_dim, width, bias=qkv_bias)
        self.v_fine = nn.Linear(embed_dim if fine_dim is None else fine_dim, width, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        fine: Float[Tensor, "b n f"],
        select: Bool[Tensor, "b t n"],
        attention_mask: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t c"]:
        """select: the fine tokens that each row sees. attention_mask: True = real token of x."""
        b, t, c = x.shape
        width = self.k_fine.out_features
        q, k, v = self.qkv(x).split([c, width, width], -1)
        out = magnified_attention(
            split_heads(q, self.num_heads),
            split_heads(k, self.num_kv_heads),
            split_heads(v, self.num_kv_heads),
            split_heads(self.k_fine(fine), self.num_kv_heads),
            split_heads(self.v_fine(fine), self.num_kv_heads),
            select,
            None if attention_mask is None else attention_mask[:, None, None],
            causal=self.is_causal,
        )
        return self.proj(out.transpose(1, 2).reshape(b, t, c))
