"""Neighbourhood attention as a loop over tiles, forward and backward, behind the operator that the C++ kernel shares.

All keys that a tile of queries needs lie in one box, so a tile is one call of fused attention with a small mask that
depends on the geometry alone. The backward walks the same tiles, recomputes the weights from the log-sum-exp and adds
into one buffer each for keys and values; autograd through the slices would make a full-size gradient for every tile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.attend.kernels import attention_gradients, attention_unchecked
from headwise.attention import _neighborhood_cpp as cpp
from headwise.attention._neighborhood_axes import Axis, Tile, groups_of, plan_of, size

SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? bias, int[] kernel, int[] stride, int[] dilation, bool[] causal, "


def tiled(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: Sequence[Axis], scale: float, compiled: bool
) -> tuple[Tensor, Tensor]:
    """Outputs `[b h *S e]` and log-sum-exp `[b h *S]`; q `[b h *S d]`, k and v with grouped heads, any strides.

    compiled: take the C++ kernel, forward and backward.
    """
    kernel, stride, dilation = ([getattr(axis, name) for axis in axes] for name in ("kernel", "stride", "dilation"))
    causal = [axis.causal for axis in axes]
    return _operator(q, k, v, bias, kernel, stride, dilation, causal, scale, compiled)


def _axes(
    q: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], causal: Sequence[bool]
) -> list[Axis]:
    lengths = q.shape[2 : 2 + len(kernel)]
    return [Axis(*one) for one in zip(lengths, kernel, stride, dilation, causal, strict=True)]


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _take(x: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """`[b h *S ...]` cut to a box, its positions in one axis."""
    for axis, (start, stop) in enumerate(spans):
        x = x.narrow(2 + axis, start, stop - start)
    return x.flatten(2, 1 + len(spans))


def _box(x: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    for axis, (start, stop) in enumerate(spans):
        x = x.narrow(2 + axis, start, stop - start)
    return x


def _bias_of(bias: Tensor, index: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a tile, `[1 h t r]`."""
    added = bias.flatten(1).to(dtype)[:, index][None]
    return added if mask is None else added + mask


def tiles_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: Sequence[Axis], scale: float
) -> tuple[Tensor, Tensor]:
    """The loop over tiles in plain torch."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = torch.empty(q.shape[:-1], dtype=_lse_dtype(q), device=q.device)
    for where, inner in groups_of(axes):
        places = (slice(None), slice(None), *where)
        gq, gk, gv, go, gl = (x[places] for x in (q, k, v, out, lse))
        plan = plan_of(inner)
        for tile in plan.tiles:
            mask = plan.mask(tile, q)
            if bias is not None:
                mask = _bias_of(bias, plan.bias_index(tile, q.device), mask, q.dtype)
            found, norm = attention_unchecked(
                _take(gq, tile.queries), _take(gk, tile.keys), _take(gv, tile.keys), mask=mask, scale=scale
            )
            for whole, one in ((go, found), (gl, norm)):
                target = _box(whole, tile.queries)
                target.copy_(one.reshape(target.shape))
    return out, lse


def tiles_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    axes: Sequence[Axis],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients for q, k, v and the relative bias."""
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    # Sums over tiles are kept in float32 where the inputs are narrower.
    grad_q, work = torch.empty_like(q), _lse_dtype(q)
    grad_k, grad_v = torch.zeros_like(k, dtype=work), torch.zeros_like(v, dtype=work)
    grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=work, device=bias.device).flatten(1)
    for where, inner in groups_of(axes):
        places = (slice(None), slice(None), *where)
        gq, gk, gv, go, gl, dgo = (x[places] for x in (q, k, v, out, lse, grad_out))
        dgl = None if grad_lse is None else grad_lse[places]
        dq, dk, dv = (x[places] for x in (grad_q, grad_k, grad_v))
        plan = plan_of(inner)
        for tile in plan.tiles:
            mask = plan.mask(tile, q)
            go_t, gl_t, dgo_t, q_t = (_take(x, tile.queries) for x in (go, gl, dgo, gq))
            dgl_t = None if dgl is None else _take(dgl, tile.queries)
            k_t, v_t = _take(gk, tile.keys), _take(gv, tile.keys)
            if grad_bias is None or bias is None:
                found = attention_gradients(dgo_t, dgl_t, q_t, k_t, v_t, go_t, gl_t, mask=mask, scale=scale)
            else:
                index = plan.bias_index(tile, q.device)
                added = _bias_of(bias, index, mask, work)
                *found, scores = _gradients_with_bias(dgo_t, dgl_t, q_t, k_t, v_t, go_t, gl_t, added, scale)
                grad_bias.index_add_(1, index.flatten(), scores.sum(0).flatten(1))
            target = _box(dq, tile.queries)
            target.copy_(found[0].reshape(target.shape))
            for total, one in ((dk, found[1]), (dv, found[2])):
                target = _box(total, tile.keys)
                target.add_(one.reshape(target.shape))
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.view(bias.shape).to(bias.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias


def _gradients_with_bias(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    added: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k, v and the scores `[b h t r]` of one tile."""
    dtype = added.dtype
    grad_out, q, k, v, out = (x.to(dtype) for x in (grad_out, q, k, v, out))
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))
    weights = (q @ k.mT * scale + added - lse[..., None]).exp()
    offset = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        offset = offset - grad_lse[..., None]
    scores = weights * (grad_out @ v.mT - offset)
    grad_k, grad_v = scores.mT @ q * scale, weights.mT @ grad_out
    if repeats > 1:
        grad_k, grad_v = (x.unflatten(1, (-1, repeats)).sum(2) for x in (grad_k, grad_v))
    return scores @ k * scale, grad_k, grad_v, scores


# The operator: opaque to torch.compile, differentiable, and counted by torch's FLOP counter.


def _forward(q, k, v, bias, kernel, stride, dilation, causal, scale, compiled):
    axes = _axes(q, kernel, stride, dilation, causal)
    if compiled:
        return cpp.forward(q, k, v, bias, axes, scale)
    return tiles_forward(q, k, v, bias, axes, scale)


def _backward(grad_out, grad_lse, q, k, v, bias, out, lse, kernel, stride, dilation, causal, scale, compiled):
    axes = _axes(q, kernel, stride, dilation, causal)
    run = cpp.backward if compiled else tiles_backward
    found = run(grad_out, grad_lse, q, k, v, bias, out, lse, axes, scale)
    return *found[:3], q.new_empty(0) if found[3] is None else found[3]


_operator = torch.library.custom_op(
    "headwise::neighborhood_attention",
    _forward,
    mutates_args=(),
    schema=SCHEMA + "float scale, bool compiled) -> (Tensor, Tensor)",
)
_gradient = torch.library.custom_op(
    "headwise::neighborhood_attention_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, "
    "int[] kernel, int[] stride, int[] dilation, bool[] causal, float scale, bool compiled) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@_operator.register_fake
def _(q, k, v, bias, kernel, stride, dilation, causal, scale, compiled):
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_lse_dtype(q))


@_gradient.register_fake
def _(grad_out, grad_lse, q, k, v, bias, out, lse, kernel, stride, dilation, causal, scale, compiled):
    grad_bias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), grad_bias


def _save(ctx, inputs, output):
    q, k, v, bias, *geometry = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.geometry = geometry


def _differentiate(ctx, grad_out, grad_lse):
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    q, k, v, bias, out, lse = ctx.saved_tensors
    *found, grad_bias = _gradient(grad_out, grad_lse, q, k, v, bias, out, lse, *ctx.geometry)
    return *found, None if bias is None else grad_bias, *(None,) * 6


_operator.register_autograd(_differentiate, setup_context=_save)


def _keys_seen(q: Sequence[int], kernel: Sequence[int]) -> int:
    """Query-key pairs of one head; a causal axis counts as a whole window, as torch counts causal attention."""
    return size([(0, length) for length in q[2 : 2 + len(kernel)]]) * size([(0, one) for one in kernel])


@register_flop_formula(torch.ops.headwise.neighborhood_attention)
def _(q, k, v, bias, kernel, *args, out_shape=None, **kwargs) -> int:
    return 2 * q[0] * q[1] * _keys_seen(q, kernel) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.headwise.neighborhood_attention_backward)
def _(grad_out, grad_lse, q, k, v, bias, out, lse, kernel, *args, out_shape=None, **kwargs) -> int:
    return 2 * q[0] * q[1] * _keys_seen(q, kernel) * (3 * q[-1] + 2 * v[-1])


__all__ = ["Tile", "tiled", "tiles_backward", "tiles_forward"]
