"""Pairs of images inside a transformers model: each attends to its partner's keys as well, in every layer.

Goes through the one entry of `dispatch`; weights, configs and classes stay as they are. Used by
`models.DualCrossAttention`, and by itself for any model whose attention is on transformers' interface.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules

__all__ = ["Scored", "pair_attention"]

Scored = tuple[Tensor, Tensor, float]  # queries and keys [b h t d] of one layer and the scale of their products


@contextlib.contextmanager
def pair_attention(
    model: nn.Module, partner: Tensor | None = None, *, single: int = 0, record: bool = False
) -> Iterator[list[Scored]]:
    """Inside the block, image `single + i` of a batch also attends to image `single + partner[i]`.

    The first `single` images attend to themselves alone, so that one forward of `2 b` images gives both branches.
    partner: `[b]`, or None for no pairs. record: append `(q, k, scale)` of the first `single` images (all of them
    without a partner) to the list that is yielded, one for each layer, without gradients: `attention.rollout_row` reads
    it. Raises UnsupportedModel under gradient checkpointing, whose second pass comes after the block, and RuntimeError
    where a partner is given while `steer` or `probe` is open on the model: those see the keys of one image.
    """
    modules = list(attention_modules(model))
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if checkpointed and model.training and partner is not None:
        raise UnsupportedModel(
            "pair_attention: the model checkpoints gradients and would run its layers again, unpaired, in the backward "
            "pass; call model.activation_checkpointing_disable()"
        )
    seen: list[Scored] = []

    def handler(inner: Any):
        def handle(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            call = inner if inner is not None else dispatch.previous_function(module)
            if record:
                own = slice(0, single if partner is not None else None)
                scale = options.get("scaling")
                scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
                seen.append((query[own].detach(), key[own].detach(), scale))
            if partner is None:
                return call(module, query, key, value, mask, **options)
            options["output_attentions"] = False
            alone, own = None, mask
            if mask is not None and len(mask) > 1:
                mask, own = mask[:single], mask[single:]
            if single:
                alone = call(module, query[:single], key[:single], value[:single], mask, **options)[0]
            query, key, value = query[single:], key[single:], value[single:]
            if len(query) != len(partner):
                raise ValueError(f"pair_attention: partner has {len(partner)} entries for {len(query)} paired images")
            keys, values = torch.cat([key, key[partner]], 2), torch.cat([value, value[partner]], 2)
            if own is not None:
                own = torch.cat([own, own[partner] if len(own) > 1 else own], -1)
            paired = call(module, query, keys, values, own, **options)[0]
            return (paired if alone is None else torch.cat([alone, paired])), None

        return handle

    with _handled(modules, handler, refuse=partner is not None):
        yield seen


@contextlib.contextmanager
def _handled(modules: list[nn.Module], handler: Any, *, refuse: bool) -> Iterator[None]:
    configs = list({id(module.config): module.config for module in modules}.values())
    with dispatch.LOCK:
        before = {module: dispatch._handlers.get(id(module)) for module in modules}
        if refuse and any(old is not None for old in before.values()):
            raise RuntimeError(
                "pair_attention: probes or edits are open on this model, or pairs already are; close them while images "
                "are paired"
            )
        for config in configs:
            dispatch.switch(config)
        for module in modules:
            dispatch._handlers[id(module)] = handler(before[module])
    try:
        yield
    finally:
        with dispatch.LOCK:
            for module, old in before.items():
                if old is None:
                    dispatch._handlers.pop(id(module), None)
                else:
                    dispatch._handlers[id(module)] = old
            for config in configs:
                dispatch.restore(config)
