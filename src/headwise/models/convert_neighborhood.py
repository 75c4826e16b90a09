"""Neighbourhood attention inside a trained model: `headwise.convert(model, to="neighborhood", kernel_size=...)`.

    convert(vit, to="neighborhood", kernel_size=7)      # patches see 7 x 7 patches; class and register tokens see and
                                                        # are seen by all
    convert(llama, to="neighborhood", kernel_size=512)  # causal: a sliding window of 512 tokens

Models on transformers' attention interface keep their modules, and the settings lie in `config.headwise_neighborhood`,
so they are saved with the model; a model that is loaded again with `attn_implementation="headwise-neighborhood"` after
this module was imported has them, in all layers. Networks of headwise's own `SoftmaxAttention`, of timm's or of torch's
attention get `NeighborhoodAttention` layers. No weight changes, so quality is that of a model that was not trained for
it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from headwise.attend.call import Call
from headwise.attend.point import head_points
from headwise.attention.neighborhood import (
    NeighborhoodAttention,
    axes_of,
    neighborhood_attention,
    neighborhood_mask,
)
from headwise.attention.softmax import SoftmaxAttention, split_heads
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, layout
from headwise.models._dense_blocks import Swapped, adopted, given_tokens, swap
from headwise.models.conversion import chosen_layers

__all__ = ["NEIGHBORHOOD"]

NEIGHBORHOOD = "headwise-neighborhood"
SETTINGS = "headwise_neighborhood"
Model = TypeVar("Model", bound=nn.Module)


def to_neighborhood(
    model: Model,
    layers: Iterable[int] | None = None,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    grid_size: Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
) -> Model:
    """The converter: every token attends to its neighbours only.

    Causal models: one axis, the last kernel_size tokens (every dilation-th), which is the library's sliding window.
    Other models: a grid of patches behind num_prefix_tokens (class, registers), which see everything and are seen by
    all. grid_size: rows and columns of patches; None reads it off the model (image and patch size), or takes one axis
    where it has none. num_prefix_tokens: None is what the tokens exceed the grid by.
    `model.set_attn_implementation("sdpa")` undoes it for a transformers model.
    Raises ValueError for windows that no such model can have, UnsupportedModel for one without such layers.
    """
    settings: dict[str, Any] = {
        "kernel_size": kernel_size if isinstance(kernel_size, int) else list(kernel_size),
        "stride": stride if isinstance(stride, int) else list(stride),
        "dilation": dilation if isinstance(dilation, int) else list(dilation),
        "grid": None if grid_size is None else [int(one) for one in grid_size],
        "prefix": num_prefix_tokens,
    }
    with adopted(model):
        (_convert_own if head_points(model) else _convert_interface)(model, layers, settings)
    return model


CONVERTERS = {"neighborhood": to_neighborhood}


def _check_causal(settings: dict[str, Any]) -> None:
    """Raises ValueError for what a causal model cannot have."""
    kernel, stride, dilation = (settings[name] for name in ("kernel_size", "stride", "dilation"))
    if not all(isinstance(one, int) and one >= 1 for one in (kernel, stride, dilation)):
        raise ValueError(
            f"convert: kernel_size {kernel}, stride {stride}, dilation {dilation}; a causal model has one axis, give "
            "integers from 1 on"
        )
    if stride != 1:
        raise ValueError(
            f"convert: stride is {stride}; under a stride the windows of past tokens change as a text grows, so a "
            "causal model takes 1 only"
        )


def _convert_interface(model: nn.Module, layers: Iterable[int] | None, settings: dict[str, Any]) -> None:
    places = attention_modules(model)
    main = layout(model).main
    if layers is not None:
        layers = chosen_layers(layers, main.layers)
        have = sorted(layer for tower, layer in places.values() if tower == main.name)
        if missing := [layer for layer in layers if layer not in have]:
            raise ValueError(f"convert: layer {missing[0]} has no attention; those with it are {have}")
    if any(dispatch.mechanism_of(module) is not None for module in places):
        raise ValueError(f"convert: the attention of {type(model).__name__} is another mechanism's already")
    if any(_is_causal(module, {}) for module in places):
        _check_causal(settings)
    elif settings["grid"] is not None:
        axes_of(settings["grid"], *(settings[name] for name in ("kernel_size", "stride", "dilation")))
    kept = [module for module, (tower, layer) in places.items() if layers is not None and layer not in layers]
    kept += [module for module, (tower, _) in places.items() if layers is not None and tower != main.name]
    for module in places:
        setattr(module.config, SETTINGS, settings)
    dispatch.use(places, NEIGHBORHOOD, kept)


def _convert_own(model: nn.Module, layers: Iterable[int] | None, settings: dict[str, Any]) -> None:
    windows = {name: settings[name] for name in ("kernel_size", "stride", "dilation")}
    tokens = given_tokens(model, settings["grid"], settings["prefix"])

    def make(old: SoftmaxAttention, layer: int) -> Swapped:
        own: dict[str, Any] = dict(windows)
        fixed: dict[str, Any] = {"num_kv_heads": old.num_kv_heads, "qkv_bias": old.qkv.bias is not None}
        if old.is_causal:
            _check_causal(settings)
            own |= {"clip_window": True, "is_causal": True}
        grid = None if tokens is None or old.is_causal else tokens.grid
        if tokens is not None and tokens.prefix and not old.is_causal:
            fixed["num_prefix_tokens"] = tokens.prefix
            cls: type[NeighborhoodAttention] = PrefixedNeighborhood
        else:
            cls = NeighborhoodAttention
        return Swapped(cls(old.proj.out_features, old.num_heads, grid_size=grid, **own, **fixed), own)

    swap(model, layers, "neighborhood", make)


class PrefixedNeighborhood(NeighborhoodAttention):
    """Neighbourhoods of patches `[b n c]` behind some tokens that see everything and that all patches see."""

    def __init__(self, *args: Any, num_prefix_tokens: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_prefix_tokens = num_prefix_tokens
        self.num_tokens += num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError where the tokens are not the prefix and the grid."""
        if x.shape[1] != self.num_tokens:
            raise ValueError(
                f"convert: {x.shape[1]} tokens are not {self.num_prefix_tokens} prefix tokens and a grid of "
                f"{' x '.join(map(str, self.grid_size or ()))}"
            )
        width, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = self.qkv(x).split([width, kv, kv], -1)
        q, k, v = (
            split_heads(one, heads)
            for one, heads in zip(parts, (self.num_heads, self.num_kv_heads, self.num_kv_heads), strict=True)
        )
        windows = {"kernel_size": self.kernel_size, "stride": self.stride, "dilation": self.dilation}
        out = _behind_prefix(q, k, v, self.grid_size or (), self.num_prefix_tokens, windows, self.head_dim**-0.5)

        def call() -> Call:
            seen = _near(self.grid_size or (), self.num_prefix_tokens, windows, x.device)
            return Call(q, k, v, seen, False, self.head_dim**-0.5, kind="bidirectional")

        return self.proj_drop(self.proj(self.head_point(out.transpose(1, 2), call, self.proj).flatten(2)))


def _settings(module: nn.Module) -> dict[str, Any]:
    found = getattr(module.config, SETTINGS, None)
    if found is None:
        raise ValueError(
            f'{type(module).__name__}: attn_implementation is "{NEIGHBORHOOD}" but config.{SETTINGS} is not set; call '
            'headwise.convert(model, to="neighborhood", kernel_size=...)'
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
    return _behind_prefix(query, key, value, grid, prefix, settings, scale)


def _behind_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, ...],
    prefix: int,
    settings: dict[str, Any],
    scale: float,
) -> Tensor:
    """Patches see their windows and the prefix, the prefix sees everything: `[b h t e]`."""
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
        query[:, :, :prefix], key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return torch.cat([first, patches], 2)


def _near(grid: tuple[int, ...], prefix: int, settings: dict[str, Any], device: torch.device) -> Tensor:
    """`[1 1 t t]` what every token sees, the prefix in front."""
    count = prefix + math.prod(grid)
    near = torch.ones(count, count, dtype=torch.bool)
    near[prefix:, prefix:] = neighborhood_mask(grid, settings["kernel_size"], settings["stride"], settings["dilation"])
    return near.to(device)[None, None]


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
            f"{'a class token and registers' if prefix is None else prefix} tokens; give grid_size "
            "and num_prefix_tokens to headwise.convert"
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
    near = _near(grid, prefix, settings, query.device)
    return near if mask is None else near & mask


dispatch.offer(NEIGHBORHOOD, _attention, _seen)
