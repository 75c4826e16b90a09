"""Attention with its log-sum-exp in plain torch, block by block of rows: the definition, for any dtype and device.

out = softmax(cap(scale q k^T) + mask) v and lse = log sum exp of the same scores, in memory O(block * s).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.ops.masks import visible

__all__ = ["attention_blockwise", "attention_blockwise_gradients"]

_BLOCK_ELEMENTS = 1 << 22  # scores held at once: 16 MiB in float32


def _blocks(q: Tensor, k: Tensor) -> range:
    b, h, t, _ = q.shape
    return range(0, t, max(1, min(t, _BLOCK_ELEMENTS // max(1, b * h * k.shape[2]))))


def _scores(
    q: Tensor,
    k: Tensor,
    start: int,
    stop: int,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores `[b h r s]` of rows start to stop, -inf where hidden; and, under a softcap, tanh(score / softcap)."""
    b, h, t, d = q.shape
    n, s = k.shape[1], k.shape[2]
    rows = q[:, :, start:stop].reshape(b, n, -1, d)  # the query heads of one key head beside each other
    scores = (rows @ k.mT).view(b, h, stop - start, s) * scale
    bent = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores = softcap * bent
    block = slice(start, stop)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + (mask[..., block, :] if mask.shape[-2] > 1 else mask).to(scores.dtype)
        mask = None  # its -inf is in the scores already
    seen = visible(mask, causal, t, s, q.device, rows=block)
    return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)), bent


def attention_blockwise(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b n s d"],
    v: Float[Tensor, "b n s e"],
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b h t"]]:
    """As `headwise.attend.kernels.attention_with_lse`; differentiable through torch's own gradients, any order.

    mask: with two or more dimensions. Sums in float32, or float64 for float64 inputs.
    """
    b, h, t, d = q.shape
    n, s, e = v.shape[1:]
    factor = d**-0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
    if 0 in (b, t, s):
        # Products over an empty axis are zeros that still belong to the graph.
        out = (q_.reshape(b, n, h // n * t, d) @ k_.mT @ v_).view(b, h, t, e)
        return out.to(q.dtype), torch.full((b, h, t), -torch.inf, dtype=dtype, device=q.device)
    outs, lses = [], []
    blocks = _blocks(q, k)
    for start in blocks:
        stop = min(t, start + blocks.step)
        scores, _ = _scores(q_, k_, start, stop, mask=mask, causal=causal, scale=factor, softcap=softcap)
        top = scores.detach().amax(-1, keepdim=True)
        empty = top == -torch.inf
        top = top.masked_fill(empty, 0)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True).masked_fill(empty, 1)
        out = (weights.reshape(b, n, -1, s) @ v_).view(b, h, stop - start, e) / total
        outs.append(out.to(q.dtype))
        lses.append((total.log() + top).masked_fill(empty, -torch.inf)[..., 0])
    return torch.cat(outs, 2), torch.cat(lses, 2)


def attention_blockwise_gradients(
    grad_out: Float[Tensor, "b h t e"],
    grad_lse: Float[Tensor, "b h t"] | None,
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b n s d"],
    v: Float[Tensor, "b n s e"],
    out: Float[Tensor, "b h t e"],
    lse: Float[Tensor, "b h t"],
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v, recomputing the weights block by block: p = exp(score - lse),
    d score = p (grad_out v^T - grad_out . out + grad_lse).
    """
    b, h, t, d = q.shape
    n, s = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
    grad_q, grad_k, grad_v = torch.zeros_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
    offset = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    if grad_lse is not None:
        offset = offset - grad_lse[..., None]
    lse = lse.masked_fill(lse == -torch.inf, 0)[..., None]  # an empty row: exp(-inf - 0) = 0
    blocks = _blocks(q, k)
    for start in blocks:
        block = slice(start, min(t, start + blocks.step))
        scores, bent = _scores(q_, k_, block.start, block.stop, mask=mask, causal=causal, scale=scale, softcap=softcap)
        weights = torch.exp(scores - lse[:, :, block])
        rows = grad_out[:, :, block].to(dtype).reshape(b, n, -1, v.shape[-1])
        grad = weights * ((rows @ v_.mT).view(scores.shape) - offset[:, :, block])
        if bent is not None:
            grad = grad * (1 - bent * bent)
        grad = (grad * scale).reshape(b, n, -1, s)
        grad_q[:, :, block] = (grad @ k_).view(b, h, -1, d)
        grad_k += grad.mT @ q_[:, :, block].reshape(b, n, -1, d)
        grad_v += weights.reshape(b, n, -1, s).mT @ rows
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
