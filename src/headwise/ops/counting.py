"""Floating-point operations of a call, counted from its shapes on the meta device: nothing is computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["flops"]


def flops(fn: Callable[..., Any], inputs: Sequence[Any] | Mapping[str, Any]) -> int:
    """Operations of `fn(*inputs)` or, for a mapping, `fn(**inputs)`: two for each multiply-add of a matrix product.

    fn: a function or a module. It runs on meta tensors, so it must make its own tensors on the device of its inputs
    and must not look at values. What is counted is what is run: a causal attention counts every score, as torch does,
    and element-wise work counts nothing.

    >>> flops(torch.mm, (torch.zeros(2, 3), torch.zeros(3, 5)))
    60
    """
    inputs = tree_map_only(Tensor, _to_meta, inputs)
    call = fn
    if isinstance(fn, nn.Module):
        state = {name: _to_meta(x) for name, x in [*fn.named_parameters(), *fn.named_buffers()]}

        def call(*args, **kwargs):
            return torch.func.functional_call(fn, state, args, kwargs)

    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        if isinstance(inputs, Mapping):
            call(**inputs)
        else:
            call(*inputs)
    return counter.get_total_flops()


def _to_meta(x: Tensor) -> Tensor:
    return x.detach().to("meta").requires_grad_(x.requires_grad)


def _forward(q, k, v, *args, **kwargs) -> int:
    """Two products: scores, and weights with values. Shapes of the operator: `[b h t d]`, `[b n s d]`."""
    b, h, t, d = q
    return 2 * b * h * t * k[2] * (d + v[3])


def _backward(grad_out, q, k, v, *args, **kwargs) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    b, h, t, d = q
    return 2 * b * h * t * k[2] * (3 * d + 2 * v[3])


# torch's counter knows the fused operators of other devices, not those of the CPU.
_FORMULAS = {
    getattr(torch.ops.aten, name): formula
    for name, formula in (
        ("_scaled_dot_product_flash_attention_for_cpu", _forward),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", _backward),
    )
    if hasattr(torch.ops.aten, name)
}
