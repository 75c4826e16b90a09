"""What every mechanism of `attention` must pass, as functions of a module and an input.

A mechanism maps ``x`` `(b t c)` to the same shape, takes ``attention_mask`` `(b t)` (True = real token) where its
signature says so, and is causal where its ``is_causal`` is True; one that can be either is tested as both. A class
attribute ``layout`` says what else it may take: ``"b n c"`` is one number of tokens only (``num_tokens``); any other
than ``"b t c"`` is tested in its own file and not here.
"""

import copy
import inspect

import torch
from torch import Tensor, nn


def layout_of(cls: type[nn.Module]) -> str:
    return getattr(cls, "layout", "b t c")


def takes_mask(module: nn.Module) -> bool:
    return "attention_mask" in inspect.signature(module.forward).parameters


def shape_and_dtype_are_kept(module: nn.Module, x: Tensor) -> None:
    for length in (x.shape[1],) if layout_of(type(module)) == "b n c" else (1, 2, 7, x.shape[1]):
        out = module(x[:, :length])
        assert out.shape == x[:, :length].shape, f"{length} tokens: {tuple(out.shape)}"
        assert out.dtype == x.dtype
        assert torch.isfinite(out).all()
    assert module(x[:0]).shape == x[:0].shape, "an empty batch"


def items_are_independent(module: nn.Module, x: Tensor) -> None:
    together = module(x)
    for row in range(len(x)):
        torch.testing.assert_close(module(x[row : row + 1])[0], together[row], atol=1e-5, rtol=1e-4)


def the_past_ignores_the_future(module: nn.Module, x: Tensor) -> None:
    if not getattr(module, "is_causal", False):
        return
    for t in (0, x.shape[1] // 2):
        other = x.clone()
        other[:, t + 1 :] = torch.randn_like(other[:, t + 1 :])
        torch.testing.assert_close(module(other)[:, : t + 1], module(x)[:, : t + 1], atol=1e-5, rtol=1e-4)


def masked_keys_have_no_influence(module: nn.Module, x: Tensor) -> None:
    if not takes_mask(module):
        return
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[:, 2:5] = False
    shown = mask[0]
    other = x.clone().requires_grad_()
    out = module(other, attention_mask=mask)[:, shown]
    changed = x.clone()
    changed[:, ~shown] = 50 * torch.randn_like(changed[:, ~shown])
    torch.testing.assert_close(module(changed, attention_mask=mask)[:, shown], out, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(out.square().sum(), other)
    assert not gradient[:, ~shown].any(), "a masked key has a gradient"


def bfloat16_is_near(module: nn.Module, x: Tensor) -> None:
    low = copy.deepcopy(module).bfloat16()(x.bfloat16()).float()
    full = module(x)
    assert (low - full).norm() <= 0.05 * full.norm() + 1e-3


def gradients_are_finite_everywhere(module: nn.Module, x: Tensor) -> None:
    module.zero_grad()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), f"{name} has a gradient that is not finite"


def state_survives(module: nn.Module, x: Tensor) -> None:
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def inputs_are_left_alone(module: nn.Module, x: Tensor) -> None:
    before = x.clone()
    module(x)
    assert torch.equal(x, before)


CONTRACT = [
    shape_and_dtype_are_kept,
    items_are_independent,
    the_past_ignores_the_future,
    masked_keys_have_no_influence,
    bfloat16_is_near,
    gradients_are_finite_everywhere,
    state_survives,
    inputs_are_left_alone,
]
