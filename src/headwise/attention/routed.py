"""Attention in which a token uses only some heads: each head attends for the tokens that chose it, and for no other.

    out_th = gate_th softmax(q_th k_h^T / sqrt(d)) v_h,  not computed where gate_th is 0

Keys and values of every head are needed (a later token may choose any head). With share a of the (token, head) pairs
chosen, the products of attention are a times those of the dense layer.

Paper: headwise/papers/mixture_of_head_attention.py (Jin et al., 2024).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.ops.masks import decompose

__all__ = ["Implementation", "pays_to_route", "routed_attention"]

Implementation = Literal["auto", "dense", "sparse"]

# Measured on one CPU thread (benchmarks/mixture_of_head.py): below these the index work is not repaid.
LEAST_ROWS = 64
MOST_ACTIVE = ((1024, 0.8), (512, 0.6))  # from so many keys on, up to this share of the (token, head) pairs
MOST_ACTIVE_CAUSAL = ((1024, 0.6),)
CAUSAL_BLOCK = 128  # rows of a causal block; keys beyond its last row are cut


def routed_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b n s d"],
    v: Float[Tensor, "b n s e"],
    gates: Float[Tensor, "b t h"],
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Tensor, "b t h e"]:
    """Head outputs times their gates; zeros where a gate is 0.

    mask: boolean (True = may attend) or additive, broadcastable to `[b h t s]`. causal: row i sees keys up to i; a mask
    given with it hides keys (`[b 1 1 s]`). scale: None is d ** -0.5.
    implementation: "dense" computes every head and multiplies; "sparse" computes what was chosen; "auto" takes sparse
    on the CPU where `pays_to_route` says so, never while compiling.
    Raises ValueError for shapes that do not fit and an unknown implementation.
    """
    b, h, t, _ = q.shape
    if gates.shape != (b, t, h) or h % k.shape[1] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"routed_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, gates "
            f"{tuple(gates.shape)}; expected q [b h t d], k and v [b n s .] with n dividing h, gates [b t h]"
        )
    if implementation not in ("auto", "dense", "sparse"):
        raise ValueError(f"routed_attention: implementation {implementation!r}; choose auto, dense or sparse")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "auto":
        by_row = causal or (mask is not None and mask.ndim > 1 and mask.shape[-2] > 1)  # as a causal mask is
        implementation = "sparse" if pays_to_route(q, k, gates, by_row) else "dense"
    if implementation == "sparse" and q.numel() and k.shape[2]:
        return _sparse(q, k, v, gates, mask, causal, factor)
    out = _dense(q, k, v, mask, causal, factor)
    return out * gates[..., None].to(out.dtype)


def pays_to_route(q: Tensor, k: Tensor, gates: Tensor, causal: bool = False) -> bool:
    """Whether computing only the chosen heads is faster here: on the CPU, many keys, enough rows, enough unchosen."""
    if torch.compiler.is_compiling() or q.device.type != "cpu" or q.shape[2] < LEAST_ROWS:
        return False
    bounds = MOST_ACTIVE_CAUSAL if causal else MOST_ACTIVE
    limit = next((share for keys, share in bounds if k.shape[2] >= keys), 0.0)
    return limit > 0 and float((gates != 0).float().mean()) <= limit


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    if causal and mask is not None:
        triangle = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = mask & triangle if mask.dtype == torch.bool else mask.masked_fill(~triangle, -torch.inf)
    out = scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _sparse(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    b, h, t, _ = q.shape
    group = h // k.shape[1]
    if mask is not None and not causal and (keys := decompose(mask)) is not None:
        mask, causal = keys, True
    active = gates != 0
    whole = active.flatten(0, 1).all(0).long().cumprod(0).sum() // group  # leading key heads that every token uses
    first = int(whole)
    out = q.new_zeros(b, t, h, v.shape[-1])
    parts = [out[:, :, first * group :]]
    if first:
        heads = first * group
        shown = mask if mask is None or mask.ndim < 4 or mask.shape[1] == 1 else mask[:, :heads]
        shared = _dense(q[:, :heads], k[:, :first], v[:, :first], shown, causal, scale)
        parts.insert(0, shared * gates[:, :, :heads, None].to(shared.dtype))
    rest = parts[-1]
    for item in range(b):
        for head in range(first, k.shape[1]):
            start = head * group
            rows, within = active[item, :, start : start + group].nonzero(as_tuple=True)  # in order of position
            if not len(rows):
                continue
            chosen = q[item, start + within, rows]
            found = _rows(chosen, k[item, head], v[item, head], rows, _shown(mask, item, start + within), causal, scale)
            gate = gates[item, rows, start + within, None].to(found.dtype)
            rest[item, rows, start - first * group + within] = found * gate
    return torch.cat(parts, 2) if first else rest


def _shown(mask: Tensor | None, item: int, heads: Tensor) -> Tensor | None:
    """The mask of one batch item: `[t|1 s]`, or `[h t|1 s]` where heads differ, as `[n ...]`-indexable by head."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask[item if mask.shape[0] > 1 else 0]
    return mask[0] if mask.shape[0] == 1 else mask[heads]


def _rows(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Float[Tensor, "n e"]:
    """Softmax attention of rows `[n d]`, at positions `rows` in rising order, over the keys `[s d]` of one head."""
    if mask is not None and mask.ndim == 3:
        mask = mask[torch.arange(len(rows), device=q.device), rows if mask.shape[1] > 1 else 0]
    elif mask is not None and mask.shape[0] > 1:
        mask = mask[rows]
    if not causal:
        return _attend(q, k, v, mask, scale)
    found = []
    for place in range(0, len(rows), CAUSAL_BLOCK):
        block = slice(place, place + CAUSAL_BLOCK)
        last = min(int(rows[block][-1]) + 1, len(k))
        seen = torch.arange(last, device=q.device) <= rows[block, None]
        if mask is not None:
            keys = mask[..., :last] if mask.shape[0] == 1 else mask[block, :last]
            seen = seen & keys if keys.dtype == torch.bool else keys.masked_fill(~seen, -torch.inf)
        found.append(_attend(q[block], k[:last], v[:last], seen, scale))
    return torch.cat(found)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    mask = None if mask is None else mask[None, None]
    return scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], mask, scale=scale)[0, 0]
