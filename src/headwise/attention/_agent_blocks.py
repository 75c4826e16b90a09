"""Agent attention a block of tokens at a time, so that scores stay in the cache: two passes, in memory O(block n)."""

import torch
from torch import Tensor

__all__ = ["gather_blocked", "hand_out_blocked", "score_matrix"]

BLOCK = 4096  # tokens: n = 49 scores of each fill 800 KiB in float32


def score_matrix(x: Tensor, y: Tensor, scale: float, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """scale x y^T + bias, in `dtype` where one is given."""
    if dtype is not None:
        x, y = x.to(dtype), y.to(dtype)
    logits = (x * scale) @ y.mT  # the scale on x: fewer numbers than scores, and no overflow on the way
    return logits if bias is None else logits + bias.to(logits.dtype)


def gather_blocked(
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """What the agents gather, over blocks of keys, with a running maximum and sum for each agent: `[b h n e]`."""
    b, h, n, _ = agents.shape
    groups, s, e = h // k.shape[1], k.shape[2], v.shape[-1]
    work = torch.promote_types(v.dtype, torch.float32)
    out = v.new_zeros(b, h, n, e)
    for i, j in ((i, j) for i in range(b) for j in range(h)):
        top = v.new_full((n, 1), -torch.inf, dtype=work)
        total, sums = torch.zeros_like(top), v.new_zeros(n, e, dtype=work)
        for start in range(0, s, BLOCK):
            block = slice(start, start + BLOCK)
            key, value = k[i, j // groups, block], v[i, j // groups, block]
            logits = score_matrix(agents[i, j], key, scale, _part(bias, (i, j), -1, block), dtype).to(work)
            if mask is not None:
                logits.masked_fill_(~mask[i, block], -torch.inf)
            higher = torch.maximum(top, logits.amax(-1, keepdim=True))
            base = torch.where(higher == -torch.inf, 0, higher)
            weights, before = logits.sub_(base).exp_(), (top - base).exp_()
            total = total * before + weights.sum(-1, keepdim=True)
            sums = torch.addmm(sums * before, weights, value.to(work))
            top = higher
        out[i, j] = sums / torch.where(total > 0, total, 1)
    return out


def hand_out_blocked(
    q: Tensor,
    agents: Tensor,
    gathered: Tensor,
    scale: float,
    bias: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """What the queries get, a block of them at a time: `[b h t e]`."""
    b, h, t, _ = q.shape
    out = q.new_zeros(b, h, t, gathered.shape[-1])
    for i, j in ((i, j) for i in range(b) for j in range(h)):
        if mask is not None and not bool(mask[i].any()):
            continue
        for start in range(0, t, BLOCK):
            block = slice(start, start + BLOCK)
            logits = score_matrix(q[i, j, block], agents[i, j], scale, _part(bias, (i, j), -2, block), dtype)
            if mask is not None:
                logits.masked_fill_(~mask[i], -torch.inf)
            torch.mm(logits.softmax(-1).to(gathered.dtype), gathered[i, j], out=out[i, j, block])
    return out


def _part(bias: Tensor | None, index: tuple[int, int], axis: int, block: slice) -> Tensor | None:
    """The part of a bias `[b|1 h|1 . .]` that belongs to an item, a head and a block of its axis."""
    if bias is None:
        return None
    b, h = (min(at, size - 1) for at, size in zip(index, bias.shape[:2], strict=True))
    part = bias[b, h]
    if part.shape[axis] == 1:
        return part
    return part[block] if axis == -2 else part[:, block]
