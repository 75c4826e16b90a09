"""Neighbourhood attention inside transformers models: `attn_implementation="headwise-neighborhood"`.

    from headwise.models import set_neighborhood
    set_neighborhood(vit, 7)                    # patches see 7 x 7 patches; class and register tokens see and are seen
    set_neighborhood(llama, 512)                # causal: a sliding window of 512 tokens

The settings lie in `config.headwise_neighborhood`, so they are saved with the model; a model that is loaded again with
`attn_implementation="headwise-neighborhood"` after this module was imported has them. No weight changes, so quality is
that of a model that was not trained for it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.attention.neighborhood import axes_of, neighborhood_attention, neighborhood_mask
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, unwrap

__all__ = ["NEIGHBORHOOD", "set_neighborhood"]

NEIGHBORHOOD = "headwise-neighborhood"
SETTINGS = "headwise_neighborhood"


def set_neighborhood(
    model: nn.Module,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    grid: Sequence[int] | None = None,
    prefix: int | None = None,
) -> None:
    """Let every attention layer of a model attend to neighbours only.

    Causal models: one axis, the last kernel_size tokens (every dilation-th), which is the library's sliding window.
    Other models: a grid of patches behind `prefix` tokens (class, registers), which see everything and are seen by all.
    grid: rows and columns of patches; None takes image_size and patch_size of the config, or one axis where it has
    none. prefix: None is what the tokens exceed the grid by.
    `model.set_attn_implementation("sdpa")` undoes it.
    Raises ValueError for windows that no such model can have, UnsupportedModel for one without the interface.
    """
    inner = unwrap(model)
    modules = attention_modules(inner)
    settings: dict[str, Any] = {
        "kernel_size": kernel_size if isinstance(kernel_size, int) else list(kernel_size),
        "stride": stride if isinstance(stride, int) else list(stride),
        "dilation": dilation if isinstance(dilation, int) else list(dilation),
        "grid": None if grid is None else [int(one) for one in grid],
        "prefix": prefix,
    }
    if any(_is_causal(module, {}) for module in modules):
        if not all(isinstance(one, int) and one >= 1 for one in (kernel_size, stride, dilation)):
            raise ValueError(
                f"set_neighborhood: kernel_size {kernel_size}, stride {stride}, dilation {dilation}; a causal "
                "model has one axis, give integers from 1 on"
            )
        if stride != 1:
            raise ValueError(
                f"set_neighborhood: stride is {stride}; under a stride the windows of past tokens change as a text "
                "grows, so a causal model takes 1 only"
            )
    elif grid is not None:
        axes_of(settings["grid"], kernel_size, stride, dilation)
    for config in {id(module.config): module.config for module in modules}.values():
        setattr(config, SETTINGS, settings)
    assert isinstance(inner, PreTrainedModel)
    inner.set_attn_implementation(NEIGHBORHOOD)


def _settings(module: nn.Module) -> dict[str, Any]:
    found = getattr(module.config, SETTINGS, None)
    if found is None:
        raise ValueError(
            f'{type(module).__name__}: attn_implementation is "{NEIGHBORHOOD}" but config.{SETTINGS} is not set; call '
            "headwise.models.set_neighborhood(model, kernel_size)"
        )
    return {"stride": 1, "dilation": 1, "grid": None, "prefix": None, **found}


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    settings = _settings(module)
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"{name}: attention dropout is {dropout}; neighbourhood attention has none, call model.eval() or set the "
            "config's attention dropout to 0"
        )
    for option in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(option) is not None:
            raise UnsupportedModel(f'{name}: {option} is not supported by attn_implementation="{NEIGHBORHOOD}"')
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if _is_causal(module, kwargs):
        out = _causal(module, query, key, value, attention_mask, settings, scale)
    else:
        out = _bidirectional(module, query, key, value, attention_mask, settings, scale)
    return out.transpose(1, 2).contiguous(), None


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict, scale: float
) -> Tensor:
    kernel, apart = settings["kernel_size"], settings["dilation"]
    t, s = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if mask is None and t == 1:
        first = max(s - 1 - (kernel - 1) * apart, (s - 1) % apart)
        return nn.functional.scaled_dot_product_attention(
            query, key[:, :, first::apart], value[:, :, first::apart], scale=scale, enable_gqa=grouped
        )
    if mask is None and t == s and (apart == 1 or kernel * apart <= s):
        out = neighborhood_attention(
            query,
            key,
            value,
            min(kernel, s // apart),
            dilation=apart,
            is_causal=True,
            scale=scale,
            layout="heads_first",
        )
        assert isinstance(out, Tensor)
        return out
    # Padding, static caches and prompts in chunks: rows are not the columns, and the mask says where they are.
    seen = _seen(module, query, key, mask)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=grouped
    )


def _bidirectional(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict, scale: float
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if mask is not None:
        seen = _seen(module, query, key, mask)
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, enable_gqa=grouped
        )
    grid, prefix = _grid(module, settings, query.shape[2], key.shape[2])
    extra = (key[:, :, :prefix], value[:, :, :prefix]) if prefix else None
    q, k, v = (x[:, :, prefix:].unflatten(2, grid) for x in (query, key, value))
    patches = neighborhood_attention(
        q,
        k,
        v,
        settings["kernel_size"],
        stride=settings["stride"],
        dilation=settings["dilation"],
        scale=scale,
        extra_kv=extra,
        layout="heads_first",
    )
    assert isinstance(patches, Tensor)
    patches = patches.flatten(2, 1 + len(grid))
    if not prefix:
        return patches
    first = nn.functional.scaled_dot_product_attention(
        query[:, :, :prefix], key, value, scale=scale, enable_gqa=grouped
    )
    return torch.cat([first, patches], 2)


def _grid(module: nn.Module, settings: dict, t: int, s: int) -> tuple[tuple[int, ...], int]:
    """The grid of patches and the number of tokens before it. Refuses what would have to be guessed."""
    name = type(module).__name__
    if t != s:
        raise UnsupportedModel(f"{name}: {t} queries and {s} keys; cross attention has no neighbourhood")
    grid, prefix = settings["grid"], settings["prefix"]
    if grid is None:
        sizes: list[Any] = [getattr(module.config, key, None) for key in ("image_size", "patch_size")]
        if None in sizes:
            grid = (t - (prefix or 0),)
        else:
            (height, width), (rows, columns) = (one if isinstance(one, list | tuple) else (one, one) for one in sizes)
            grid = (height // rows, width // columns)
    grid = tuple(grid)
    left = t - math.prod(grid)
    known = {0, 1, 2, 1 + int(getattr(module.config, "num_register_tokens", 0) or 0)}
    if left < 0 or (left != prefix if prefix is not None else left not in known):
        raise ValueError(
            f"{name}: {t} tokens are not a grid of {' x '.join(map(str, grid))} patches behind "
            f"{'a class token and registers' if prefix is None else prefix} tokens; give grid= and prefix= to "
            "headwise.models.set_neighborhood"
        )
    return grid, left


def _seen(module: nn.Module, query: Tensor, key: Tensor, mask: Any) -> Tensor:
    """`[b|1 1 t s]` which keys every row sees."""
    settings = _settings(module)
    t, s = query.shape[2], key.shape[2]
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 4):
        raise UnsupportedModel(f"{type(module).__name__}: {NEIGHBORHOOD} needs a boolean mask with four axes, or none")
    mask = None if mask is None else mask[..., :s]
    if _is_causal(module, {}):
        column = torch.arange(s, device=query.device)
        if mask is None:
            row = torch.arange(s - t, s, device=query.device)[None, None]
        else:  # a row's own column is the last that it sees, whatever the cache's length
            row = torch.where(mask, column, -1).amax(-1)
        behind = row[..., None] - column
        apart = settings["dilation"]
        near = (behind >= 0) & (behind % apart == 0) & (behind // apart < settings["kernel_size"])
        return near if mask is None else near & mask
    grid, prefix = _grid(module, settings, t, s)
    near = torch.ones(t, s, dtype=torch.bool)
    near[prefix:, prefix:] = neighborhood_mask(grid, settings["kernel_size"], settings["stride"], settings["dilation"])
    near = near.to(query.device)[None, None]
    return near if mask is None else near & mask


dispatch.offer(NEIGHBORHOOD, _attention, _seen)
