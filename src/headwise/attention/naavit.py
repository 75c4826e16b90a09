"""NAAViT: no attention among visual tokens. Image tokens are keys and values, never queries.

    text token i attends to every real token j <= i, image tokens included; an image token attends to nothing

so that the rows of image tokens need not be computed at all: O(t s) for t text rows of s tokens instead of O(s^2).

Paper: headwise/papers/saisa.py (Yuan et al., 2025).
Notes: the authors' code takes one contiguous image that starts at the same column in the whole batch, and no padding;
here a mask says which tokens are visual, so that images may stand anywhere, in any number.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["TextRows", "naavit_attention", "naavit_mask", "text_rows", "text_rows_mask"]

Mask = Bool[Tensor, "..."] | Int[Tensor, "..."]  # `[b s]`; shapes are checked below


class TextRows(NamedTuple):
    """The rows that are queries, in order and aligned to the right, as left padding aligns them.

    index: `[b t]` their columns. real: `[b t]` False in front, where a sequence has fewer text tokens than the longest
    one of the batch; `index` then names columns of that sequence that are no text, each of them once.
    """

    index: Int[Tensor, "b t"]
    real: Bool[Tensor, "b t"]

    def gather(self, x: Float[Tensor, "b s c"]) -> Float[Tensor, "b t c"]:
        """The text rows of a full sequence; zeros where they are not real."""
        rows = x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))
        return rows.masked_fill(~self.real[..., None], 0)

    def spread(self, x: Float[Tensor, "b t c"], length: int) -> Float[Tensor, "b s c"]:
        """The full sequence with these text rows, and zeros everywhere else."""
        x = x.masked_fill(~self.real[..., None], 0)
        return x.new_zeros(x.shape[0], length, x.shape[2]).scatter(1, self.index[..., None].expand_as(x), x)


def _real(visual_mask: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(visual_mask, dtype=torch.bool)
    if attention_mask.shape != visual_mask.shape:
        raise ValueError(
            f"naavit: attention_mask is {tuple(attention_mask.shape)} and visual_mask {tuple(visual_mask.shape)}; "
            "they must have the same shape"
        )
    return attention_mask.bool()


def text_rows(visual_mask: Mask, attention_mask: Mask | None = None) -> TextRows:
    """Where the text tokens of a batch are. Looks at values, so that a GPU waits: once for a forward.

    visual_mask: True at image tokens. attention_mask: True (or 1) at real tokens; None means all are.

    >>> text_rows(torch.tensor([[False, True, True, False]])).index.tolist()
    [[0, 3]]
    """
    text = ~visual_mask.bool() & _real(visual_mask, attention_mask)
    counts = text.sum(1, keepdim=True)
    longest = int(counts.max()) if len(text) else 0
    index = text.int().argsort(dim=1, stable=True)[:, text.shape[1] - longest :]
    return TextRows(index, torch.arange(longest, device=text.device) >= longest - counts)


def naavit_mask(visual_mask: Mask, attention_mask: Mask | None = None) -> Bool[Tensor, "b 1 s s"]:
    """Who attends to whom, True = may: text rows as in a causal model, rows of images and of padding to nothing.

    >>> naavit_mask(torch.tensor([[False, True, False]]))[0, 0].int().tolist()
    [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    """
    real = _real(visual_mask, attention_mask)
    s = real.shape[1]
    causal = torch.ones(s, s, dtype=torch.bool, device=real.device).tril()
    return (causal & real[:, None] & (real & ~visual_mask.bool())[:, :, None])[:, None]


def text_rows_mask(rows: TextRows, length: int, attention_mask: Mask | None = None) -> Bool[Tensor, "b 1 t s"]:
    """The rows of `naavit_mask` that are text; rows that are not real see nothing. length: s."""
    columns = torch.arange(length, device=rows.index.device)
    seen = (columns <= rows.index[..., None]) & rows.real[..., None]
    return (seen if attention_mask is None else seen & attention_mask.bool()[:, None])[:, None]


def naavit_attention(
    q_text: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b n s d"],
    v: Float[Tensor, "b n s e"],
    visual_mask: Mask,
    attention_mask: Mask | None = None,
    *,
    rows: TextRows | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Tensor, "b h t e"]:
    """Attention of the text rows of a sequence to all of it: `softmax(scale q k^T) v` under `naavit_mask`.

    q_text: the queries of the text tokens, as `text_rows(visual_mask, attention_mask)` orders them. rows: that, where
    it is at hand. n divides h (grouped keys). scale: None means d ** -0.5. Rows that are not real come out as 0.
    implementation: "auto" is torch's fused attention, "reference" forms the weights.
    Raises ValueError for shapes that do not fit.
    """
    if implementation not in ("auto", "reference"):
        raise ValueError(f"naavit_attention: implementation is {implementation!r}; choose 'auto' or 'reference'")
    b, h, t, d = q_text.shape
    n, s = k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != d or v.shape[:3] != k.shape[:3] or h % n or visual_mask.shape != (b, s):
        raise ValueError(
            f"naavit_attention: q_text {tuple(q_text.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and visual_mask "
            f"{tuple(visual_mask.shape)} do not fit; expected [b h t d], [b n s d], [b n s e] and [b s], n dividing h"
        )
    rows = text_rows(visual_mask, attention_mask) if rows is None else rows
    if rows.index.shape != (b, t):
        raise ValueError(
            f"naavit_attention: q_text has {t} rows but the masks leave {rows.index.shape[1]} text tokens at most; "
            "give the queries of the text tokens only, aligned to the right"
        )
    if not b or not t:
        return q_text.new_zeros(b, h, t, v.shape[-1])
    mask = text_rows_mask(rows, s, attention_mask)
    factor = d**-0.5 if scale is None else scale
    if implementation == "auto":
        out = scaled_dot_product_attention(q_text, k, v, mask, scale=factor, enable_gqa=n != h)
    else:
        scores = (q_text.reshape(b, n, h // n * t, d) @ k.mT).view(b, h, t, s) * factor
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
        out = (weights.to(v.dtype).view(b, n, h // n * t, s) @ v).view(b, h, t, -1)
    return out.masked_fill(~rows.real[:, None, :, None], 0)
