"""What the last queries of a text tell of its heads and its keys: the tensor side of choosing what a KV cache keeps.

Papers: headwise/papers/task_kv.py (He, Liu, Chen, 2025); the observation window is SnapKV's (Li et al., 2024).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["head_distance", "kept_positions", "observed_attention", "semantic_vectors", "smooth_scores"]


def observed_attention(
    query: Float[Tensor, "b h w d"],
    key: Float[Tensor, "b n s d"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    real: Bool[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b n s"]:
    """The mean weight that the last w queries of a text give to each of its keys, one row for each key head.

    Query i stands at position s - w + i and sees no later key; the h / n query heads of a key head are averaged.
    scale: `d ** -0.5` when None. real: False on padding, which neither sees nor is seen. Rows sum to 1 (0 where a text
    has no real query among the last w). Returns float32, float64 for float64 inputs.
    Raises ValueError for more queries than keys, or heads that do not divide.

    >>> observed_attention(torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 4, 4)).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
    """
    b, h, w, d = query.shape
    n, s = key.shape[1:3]
    if w > s:
        raise ValueError(f"observed_attention: {w} queries but {s} keys; give the last queries of the same text")
    if h % n:
        raise ValueError(f"observed_attention: {h} query heads over {n} key heads; the key heads must divide them")
    dtype = torch.promote_types(query.dtype, torch.float32)
    factor = d**-0.5 if scale is None else scale
    scores = (query.to(dtype).reshape(b, n, -1, d) @ key.to(dtype).mT).view(b, n, h // n, w, s) * factor
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    columns = torch.arange(s, device=key.device)
    seen = columns <= (columns[s - w :])[:, None]
    if real is not None:
        seen = seen & real[:, None, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    if real is None:
        return weights.mean((2, 3))
    rows = real[:, None, None, s - w :, None]
    count = rows.sum((2, 3, 4)).clamp_min(1) * (h // n)
    return torch.where(rows, weights, 0.0).sum((2, 3)) / count[..., None]


def smooth_scores(
    scores: Float[Tensor, "b n s"],
    kernel: int,
    *,
    real: Bool[Tensor, "b s"] | None = None,
    count_include_pad: bool = False,
) -> Float[Tensor, "b n s"]:
    """Average over `kernel` neighbouring keys (an odd number; 1 changes nothing).

    count_include_pad: near the ends divide by `kernel` all the same, as the official SnapKV code does; otherwise by the
    number of real keys there are, so that the ends are not put at a disadvantage.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"smooth_scores: kernel is {kernel}; expected an odd number of keys, 1 or more")
    if kernel == 1:
        return scores
    if real is not None:
        scores = scores * real[:, None]
    if count_include_pad:
        return F.avg_pool1d(scores, kernel, 1, kernel // 2)
    if real is None:
        return F.avg_pool1d(scores, kernel, 1, kernel // 2, count_include_pad=False)
    share = F.avg_pool1d(real[:, None].to(scores.dtype), kernel, 1, kernel // 2)
    return F.avg_pool1d(scores, kernel, 1, kernel // 2) / share.clamp_min(1 / (2 * kernel))


def semantic_vectors(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b n s d"],
    value: Float[Tensor, "b n s e"],
    *,
    window: int = 32,
    top: int | None = 256,
    pool: int = 7,
    normalize: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    real: Bool[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b n e"]:
    """What each key head reads, in one vector: `v_j = sum over the top keys i of C_j[i] V_j[i]`.

    C is the observed attention of the last `window` queries, averaged over the query heads of a key head and smoothed
    over `pool` keys. top: how many keys count, None for all of them. window: more than there are queries means all.
    normalize: to unit length. The paper does not; distances then depend on the norms of values, which differ by head.
    Raises ValueError for a window or top below 1.

    Notes: the paper writes one key head for each query head; the mean over the query heads of a group is ours.
    """
    if window < 1 or (top is not None and top < 1):
        raise ValueError(f"semantic_vectors: window is {window} and top {top}; expected 1 or more")
    observed = observed_attention(query[:, :, -window:], key, scale=scale, softcap=softcap, real=real)
    return summarise(smooth_scores(observed, pool, real=real), value, top, normalize)


def summarise(
    scores: Float[Tensor, "b n s"], value: Float[Tensor, "b n s e"], top: int | None, normalize: bool = False
) -> Float[Tensor, "b n e"]:
    """The values of the keys with the highest scores, summed with their scores."""
    value = value.to(scores.dtype)
    if top is not None and top < scores.shape[-1]:
        scores, index = scores.topk(top, dim=-1)
        value = value.gather(2, index[..., None].expand(-1, -1, -1, value.shape[-1]))
    vectors = (scores[:, :, None] @ value)[:, :, 0]
    return F.normalize(vectors, dim=-1) if normalize else vectors


def head_distance(vectors: Float[Tensor, "b n e"]) -> Float[Tensor, "b n"]:
    """How far each head of a layer stands from its semantic centre: `||v_j - mean over heads of v||`.

    >>> head_distance(torch.tensor([[[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]]])).tolist()
    [[1.0, 1.0, 2.0]]
    """
    return (vectors - vectors.mean(1, keepdim=True)).norm(dim=-1)


def kept_positions(
    scores: Float[Tensor, "b n s"],
    keep: list[int],
    *,
    sink: int = 0,
    recent: int = 0,
    real: Bool[Tensor, "b s"] | None = None,
) -> Int[Tensor, "b n w"]:
    """The positions that each head keeps, ascending: the first `sink` and last `recent` real tokens of its text, then
    those with the highest scores (the earlier of equal ones) until `keep[row]` are chosen.

    Rows that keep less than the widest one end in -1. keep: not more than a row has real tokens.
    """
    b, _, s = scores.shape
    if real is None:
        real = torch.ones(b, s, dtype=torch.bool, device=scores.device)
    rank = real.cumsum(-1) - 1
    always = (rank < sink) | (rank >= real.sum(-1, keepdim=True) - recent)
    scores = scores.masked_fill(always[:, None], torch.inf).masked_fill(~real[:, None], -torch.inf)
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., : max(keep)]
    counts = torch.tensor(keep, device=scores.device)[:, None, None]
    beyond = torch.arange(chosen.shape[-1], device=scores.device) >= counts
    chosen = chosen.masked_fill(beyond, s).sort(-1).values
    return chosen.masked_fill(chosen == s, -1)
