"""Fused attention that also returns its log-sum-exp: the only door to torch's private attention operators.

The operators return what `scaled_dot_product_attention` computes and throws away, but trust their caller: they end the
process on empty axes, misread masks of another dtype, report 0 for rows that see nothing and drop the gradient of the
log-sum-exp. `attention_with_lse` guards each of these; `attention_blockwise` is the same function in plain torch.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from headwise.attend.blockwise import attention_blockwise, attention_blockwise_gradients
from headwise.ops.masks import additive, empty_rows

__all__ = ["attention_gradients", "attention_unchecked", "attention_with_lse", "fused_available"]

_aten = torch.ops.aten
_CPU_OPERATOR = hasattr(_aten, "_scaled_dot_product_flash_attention_for_cpu")
_CPU_GRADIENT = hasattr(_aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
_CUDA_FLASH = hasattr(_aten, "_scaled_dot_product_flash_attention")
_CUDA_EFFICIENT = hasattr(_aten, "_scaled_dot_product_efficient_attention")
_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "meta": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def attention_with_lse(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b n s d"],
    v: Float[Tensor, "b n s e"],
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Literal["auto", "reference"] = "auto",
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b h t"]]:
    """Attention and the log of its softmax denominator: out = exp(score - lse) v, lse = log sum exp(score).

    k and v hold un-repeated grouped keys: n divides h, query head i reads key head i * n // h.
    mask: boolean (True = may attend) or additive, broadcastable to `[b h t s]`; a `[b 1 1 s]` key mask stays broadcast
    and costs nothing beside the causal flag. causal: row i sees columns up to i, whatever t and s.
    scale: multiplies scores, `d ** -0.5` when None. softcap: `softcap * tanh(score / softcap)` before the mask.
    implementation: "reference" is the block-wise definition.

    Returns out in the dtype of q and lse in float32 (float64 for float64 inputs). A row that sees nothing has out 0
    and lse -inf. Both are differentiable with respect to q, k and v, and to an additive mask.
    Raises ValueError for shapes, dtypes or devices that do not fit each other.

    >>> q = k = v = torch.zeros(1, 1, 3, 4)
    >>> out, lse = attention_with_lse(q, k, v, causal=True)
    >>> lse.exp().round().tolist()
    [[[1.0, 2.0, 3.0]]]
    """
    if implementation not in ("auto", "reference"):
        raise ValueError(f"attention_with_lse: implementation is {implementation!r}; choose 'auto' or 'reference'")
    device = q.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        # scaled_dot_product_attention converts under autocast; the operators below it would not.
        wanted = torch.get_autocast_dtype(device)
        q, k, v = (x if x.dtype == torch.float64 else x.to(wanted) for x in (q, k, v))
        with torch.autocast(device, enabled=False):
            return _attention(q, k, v, mask, causal, scale, softcap, implementation)
    return _attention(q, k, v, mask, causal, scale, softcap, implementation)


def fused_available(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> bool:
    """Whether a fused operator serves such a call; `attention_with_lse` goes block by block in plain torch if not."""
    device = q.device.type
    if softcap is not None or q.dtype not in _DTYPES.get(device, ()):
        return False
    if any(x is not None and 0 in x.shape[1:] for x in (q, k, v)):
        return False
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return False
    if device == "cuda":
        return _CUDA_EFFICIENT
    return _CPU_OPERATOR


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    mask = _check(q, k, v, mask)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    mask_needs_grad = torch.is_grad_enabled() and mask is not None and mask.requires_grad
    fused = implementation == "auto" and fused_available(q, k, v, mask=mask, softcap=softcap)
    if implementation == "reference" or mask_needs_grad or (0 in (*q.shape, *k.shape, *v.shape)):
        return attention_blockwise(q, k, v, mask=mask, causal=causal, scale=factor, softcap=softcap)
    if not fused:
        if needs_grad:
            out, lse = _Attention.apply(q, k, v, mask, causal, factor, softcap)
            return out, lse
        return attention_blockwise(q, k, v, mask=mask, causal=causal, scale=factor, softcap=softcap)

    empty = empty_rows(mask, causal, q.shape[2], k.shape[2])
    if mask is not None:
        mask = additive(mask, _mask_dtype(q, mask))
    d, e = q.shape[-1], v.shape[-1]
    # The operators want one head size: zero columns change neither scores nor the kept part of the output.
    if d < e:
        q, k = F.pad(q, (0, e - d)), F.pad(k, (0, e - d))
    elif e < d:
        v = F.pad(v, (0, d - e))
    if needs_grad:
        out, lse = _Attention.apply(q, k, v, mask, causal, factor, None)
    else:
        out, lse = _fused(q, k, v, mask, causal, factor)
    out = out[..., :e]
    if empty is not None:  # known from the mask: a log-sum-exp of exactly 0.0 can be a true one
        lse = lse.masked_fill(empty, -torch.inf)
        if q.device.type == "cuda":  # the operator of the CPU leaves 0 there itself
            out = out.masked_fill(empty[..., None], 0)
    return out, lse


def _mask_dtype(q: Tensor, mask: Tensor) -> torch.dtype:
    """The dtype in which the operator for q reads this mask. A float32 mask with float64 q would be garbage, unsaid."""
    if mask.dtype == torch.bool or q.dtype == torch.float64 or q.device.type == "cuda":
        return q.dtype
    return q.dtype if mask.dtype == q.dtype else torch.float32


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
    """Refuse what does not fit; returns the mask with four dimensions."""
    where = "attention_with_lse"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}; expected [batch, heads, tokens, size]")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{where}: q is {q.dtype} on {q.device} but {name} is {x.dtype} on {x.device}; convert one of them"
            )
    b, h, t, d = q.shape
    n, s = k.shape[1:3]
    if k.shape[0] != b or v.shape[:3] != k.shape[:3] or k.shape[3] != d:
        raise ValueError(
            f"{where}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; expected [b h t d], "
            "[b n s d], [b n s e]"
        )
    if n == 0 or h % n:
        raise ValueError(f"{where}: {h} query heads over {n} key heads; the key heads must divide the query heads")
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{where}: the mask is {mask.dtype}; expected booleans (True = may attend) or floats to add")
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape, (b, h, t, s), strict=True)):
        raise ValueError(f"{where}: the mask has shape {tuple(mask.shape)}; it must broadcast to {(b, h, t, s)}")
    return mask if mask.ndim == 4 else mask.reshape(shape)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The operator of the device. Rows that see nothing come out as the operator leaves them."""
    if q.device.type == "cuda":
        return _fused_cuda(q, k, v, mask, causal, scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def _fused_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    b, h, t, d = q.shape
    s = k.shape[2]
    if d % 8:  # both operators load eight values at a time
        q, k, v = (F.pad(x, (0, 8 - d % 8)) for x in (q, k, v))
    # The flash kernel takes no mask and aligns its causal flag to the lower right.
    if _CUDA_FLASH and mask is None and (not causal or t == s) and q.dtype != torch.float32 and q.shape[-1] <= 256:
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
        return out[..., :d], lse
    if k.shape[1] != h:
        k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    if mask is not None:  # rows of the bias must be contiguous and start at multiples of 16
        mask = mask.expand(*mask.shape[:-1], s).contiguous()
        mask = F.pad(mask, (0, -s % 16))[..., :s].expand(b, h, t, s)
    out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, causal, scale=scale)[:2]
    return out[..., :d], lse[..., :t]


class _Attention(torch.autograd.Function):
    """(out, lse) with the exact gradient of both, which the operators themselves give for out only."""

    @staticmethod
    def forward(q, k, v, mask, causal, scale, softcap):
        if fused_available(q, k, v, softcap=softcap):
            return _fused(q, k, v, mask, causal, scale)
        return attention_blockwise(q, k, v, mask=mask, causal=causal, scale=scale, softcap=softcap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, ctx.causal, ctx.scale, ctx.softcap = inputs
        ctx.save_for_backward(q, k, v, mask, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, mask, out, lse = ctx.saved_tensors
        options = {"mask": mask, "causal": ctx.causal, "scale": ctx.scale}
        if torch.is_grad_enabled():  # someone differentiates the gradient: let torch derive it from the definition
            outputs = attention_blockwise(q, k, v, softcap=ctx.softcap, **options)
            used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
            inputs = [x for x in (q, k, v) if x.requires_grad]
            found = iter(
                torch.autograd.grad([u[0] for u in used], inputs, [u[1] for u in used], create_graph=True)
                if used
                else [None] * len(inputs)
            )
            return (*(next(found) if x.requires_grad else None for x in (q, k, v)), None, None, None, None)
        grad_out, grad_lse = grads
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        if _CPU_GRADIENT and q.device.type == "cpu" and fused_available(q, k, v, softcap=ctx.softcap):
            found = _fused_gradients(grad_out, grad_lse, q, k, v, out, lse, **options)
        else:
            found = attention_blockwise_gradients(grad_out, grad_lse, q, k, v, out, lse, softcap=ctx.softcap, **options)
        return (*found, None, None, None, None)


def attention_unchecked(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` for callers of many small calls, with a backward of their own: no gradient, no checks.

    mask: additive, four dimensions, in the dtype of q; every row sees a key. Empty axes end the process.
    """
    if not fused_available(q, k, v):
        return attention_blockwise(q, k, v, mask=mask, causal=False, scale=scale, softcap=None)
    d, e = q.shape[-1], v.shape[-1]
    if d < e:
        q, k = F.pad(q, (0, e - d)), F.pad(k, (0, e - d))
    elif e < d:
        v = F.pad(v, (0, d - e))
    out, lse = _fused(q, k, v, mask, False, scale)
    return (out if d <= e else out[..., :e]), lse


def attention_gradients(
    grad_out: Float[Tensor, "b h t e"],
    grad_lse: Float[Tensor, "b h t"] | None,
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b n s d"],
    v: Float[Tensor, "b n s e"],
    out: Float[Tensor, "b h t e"],
    lse: Float[Tensor, "b h t"],
    *,
    mask: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v of `attention_with_lse` from what it returned, for callers with a backward of their own.

    mask: additive, four dimensions, in the dtype of q; every row sees a key. Nothing is checked.
    """
    if not (_CPU_GRADIENT and q.device.type == "cpu" and fused_available(q, k, v)):
        return attention_blockwise_gradients(
            grad_out, grad_lse, q, k, v, out, lse, mask=mask, causal=False, scale=scale, softcap=None
        )
    d, e = q.shape[-1], v.shape[-1]
    if d < e:
        q, k = F.pad(q, (0, e - d)), F.pad(k, (0, e - d))
    elif e < d:
        v, out, grad_out = (F.pad(x, (0, d - e)) for x in (v, out, grad_out))
    options = {"mask": mask, "causal": False, "scale": scale}
    grad_q, grad_k, grad_v = _fused_gradients(grad_out, grad_lse, q, k, v, out, lse, **options)
    return grad_q[..., :d], grad_k[..., :d], grad_v[..., :e]


def _fused_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d, e = q.shape[-1], v.shape[-1]
    if grad_lse is not None:
        # The operator's d score = p (grad_out v^T - grad_out . out). A column that is 0 in v, 1 in grad_out and
        # -grad_lse in out adds p grad_lse, the gradient of the log-sum-exp. Two columns carry it in halves: what the
        # first loses to rounding in bfloat16 is in the second.
        high = (-grad_lse).to(out.dtype)
        low = (-grad_lse - high).to(out.dtype)
        out = torch.cat([out, high[..., None], low[..., None], out.new_zeros(*out.shape[:-1], 6)], -1)
        grad_out = torch.cat([grad_out, torch.ones_like(grad_out[..., :2]), torch.zeros_like(out[..., :6])], -1)
        q, k, v = (F.pad(x, (0, 8)) for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    grad_q, grad_k, grad_v = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return grad_q[..., :d], grad_k[..., :d], grad_v[..., :e]
