"""Channel attention: the channels of a group are the tokens, and the positions are their features.

    A = softmax(scale q^T k)   [d, d],      out_n = A v_n

Every output has seen every position, at a cost linear in their number. Paper: headwise/papers/davit.py (Ding et al.,
ECCV 2022).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.point import HeadPoint
from headwise.attention.softmax import check_heads

__all__ = ["ChannelAttention", "channel_attention"]

VARIANTS = ("davit", "florence2")


def channel_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h t d"],
    v: Float[Tensor, "b h t e"],
    *,
    scale: float | str | None = None,
) -> Float[Tensor, "b h t d"]:
    """Mix channels: row i of A says how much channel i of the output takes from every channel of v.

    scale: multiplies the logits, which are sums over tokens; None is size ** -0.5, "tokens" is tokens ** -0.5.
    The softmax is taken in float32 where the inputs are narrower. Raises ValueError for another word.

    >>> x = torch.eye(2)[None, None]
    >>> channel_attention(x, x, x, scale=0.0)[0, 0].tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    if isinstance(scale, str) and scale != "tokens":
        raise ValueError(f"channel_attention: scale is {scale!r}; expected a number, None or 'tokens'")
    if scale is None or isinstance(scale, str):
        factor = float(max(1, q.shape[-1 if scale is None else -2])) ** -0.5
    else:
        factor = float(scale)
    logits = (q * factor).mT @ k
    weights = logits.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(v.dtype)
    return v @ weights.mT


class ChannelAttention(nn.Module):
    """Grouped attention over channels, `[b *S c]` to the same shape.

    num_groups: channels are split into so many groups, each attending within itself. variant: "davit" is the paper's
    network (softmax(k^T v / sqrt(size)) applied to q), "florence2" that of Florence-2 (softmax(q^T k / sqrt(tokens))
    applied to v): the same up to names and the scale, but a checkpoint of one means nothing in the other.
    Its groups are heads whose outputs can be read and edited; they have no weights over tokens.
    """

    patterns = ("noncausal self",)

    def __init__(self, dim: int, num_groups: int, *, qkv_bias: bool = True, variant: str = "davit") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"ChannelAttention: variant is {variant!r}; choose one of {', '.join(VARIANTS)}")
        check_heads("ChannelAttention", dim, num_groups)
        self.num_groups, self.group_size, self.variant = num_groups, dim // num_groups, variant
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.head_point = HeadPoint(num_groups)
        self.proj = nn.Linear(dim, dim)

    @staticmethod
    def example() -> "ChannelAttention":
        return ChannelAttention(32, 4)

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}, variant={self.variant!r}"

    def forward(
        self, x: Float[Tensor, "b *S c"], attention_mask: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b *S c"]:
        """attention_mask: True for real tokens, of a flattened sequence; the others leave no trace in the weights."""
        shape = x.shape
        x = x.flatten(1, -2)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_groups, self.group_size)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [b h t d]
        tokens: Tensor | int = max(1, x.shape[1])
        if attention_mask is not None:
            real = attention_mask[:, None, :, None].to(k.dtype)
            k, tokens = k * real, real.sum(2, keepdim=True).clamp_min(1)
        if self.variant == "davit":
            out = channel_attention(k, v, q)
        else:
            out = channel_attention(q * tokens**-0.5, k, v, scale=1.0)
        return self.proj(self.head_point(out.transpose(1, 2), None, self.proj).flatten(2)).view(shape)
