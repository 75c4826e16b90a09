"""What an attention module hands to its attention function, as a `Call`; and the call that it would have made."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attend.call import Call
from headwise.attend.step import Step
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.ops.masks import hide_exactly

__all__ = ["Plain", "read_call"]


class Plain:
    """The call that the model would have made; `is_fused` where our fused operator gives the same bits.

    own: whether the function is the module's own attention, over the keys that it was given.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        arguments: tuple[Tensor, Tensor, Tensor, Any],
        options: dict[str, Any],
        own: bool = True,
    ):
        self.function, self.module, self.arguments, self.options = function, module, arguments, options
        self.weights: Tensor | None = None
        self.own = own

    @cached_property
    def is_fused(self) -> bool:
        query, _, value, mask = self.arguments
        return (
            self.own
            and query.device.type == "cpu"
            and query.shape[-1] == value.shape[-1]
            # A single row with grouped keys is folded differently there, and may differ in the last bit.
            and query.shape[2] > 1
            and (mask is None or mask.dtype == torch.bool)
            and self.options.get("position_bias") is None
            and not torch.is_grad_enabled()
            and not self.options["dropout"]
            and dispatch.previous_name(self.module.config) == "sdpa"
        )

    def __call__(self) -> Tensor:
        out, self.weights = self.function(self.module, *self.arguments, **self.options)
        return out


def read_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    options: dict[str, Any],
    kind: str,
    step: Step | None,
    encoder: Step | None,
) -> Call:
    """The call as its function must understand it: which keys each row sees, what is added to its scores.

    kind: causal, bidirectional or cross. step, encoder: the forwards of the module's stack and of the encoder.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedModel(
            f"{type(module).__name__}: masks of type {type(mask).__name__} cannot be read; load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    t = query.shape[2]
    is_causal = options.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and t > 1
    causal = mask is None and is_causal
    if causal and key.shape[2] > t:  # an empty static cache: the model attends to its first t columns
        key, value = key[:, :, :t], value[:, :, :t]
    if mask is not None and mask.ndim == 2:  # flash implementations keep the padding mask
        mask, causal = mask[:, None, None].bool(), is_causal
    elif mask is not None and mask.shape[-1] > key.shape[2]:
        mask = mask[..., : key.shape[2]]
    if mask is not None:
        mask = hide_exactly(mask)
    if options.get("position_bias") is not None:
        mask, causal = _with_bias(options["position_bias"], mask, causal), False
    if step is None or step.batch != query.shape[0] or step.total < t:
        # A tower that takes no tokens; or a vision tower that calls attention once per image or window.
        step = Step.of(query.shape[0], t, query.device)
    step = step.to(query.device)  # tokens may come in on another device than that of this layer
    key_step = step
    if kind == "cross" and encoder is not None and encoder.total == key.shape[2]:
        key_step = encoder.to(key.device)
    elif kind == "cross":
        key_step = Step.of(key.shape[0], key.shape[2], key.device)
    return Call(
        query,
        key,
        value,
        mask=mask,
        causal=causal,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        kind=kind,
        step=step,
        key_step=key_step,
    )


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Join a position bias and a mask of any kind into one additive mask."""
    if mask is None:
        if not causal:
            return bias
        t, s = bias.shape[-2:]
        mask = torch.ones(t, s, dtype=torch.bool, device=bias.device).tril()[None, None]
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask
