"""How image tokens enter the layers of a language model: as keys and values beside the text rows, or as whole rows."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from headwise.attention.naavit import TextRows
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch

PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
MORE_PARTS = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "residual_multiplier", "linear_attn")


def check_language_model(model: Any) -> None:
    """Raise UnsupportedModel for a language model that is not made of layers of Llama's form."""
    name, layers = type(model).__name__, getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(model, "rotary_emb"):
        raise UnsupportedModel(f"SAISA: {name} has no list of layers with rotary embedding, as Llama has")
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        if any(not hasattr(layer, part) for part in PARTS) or any(hasattr(layer, part) for part in MORE_PARTS):
            raise UnsupportedModel(
                f"SAISA: {type(layer).__name__} is no layer of a norm and attention, then a norm and a feed-forward "
                "network; Llama, Mistral, Qwen2 and Qwen3 are"
            )
        if not all(isinstance(getattr(attention, part, None), nn.Module) for part in ("k_proj", "v_proj")):
            raise UnsupportedModel(f"SAISA: {type(attention).__name__} has no projections k_proj and v_proj")
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise UnsupportedModel(
            f"SAISA: {name} attends in windows of {getattr(config, 'sliding_window', None)} tokens, where a text row "
            "may not see all of an image; set sliding_window=None in its config"
        )
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise UnsupportedModel(f"SAISA: {name} rotates {share} of a head's width only; all of it is expected")


@dataclass
class ImageRows:
    """What the layers are told when every row is computed.

    visual: `[b s]` True at image tokens. inputs: layer by layer, what image tokens are at its input `[n d]`; layers
    beyond the list take what the one before left.
    """

    visual: Bool[Tensor, "b s"]
    inputs: list[Tensor]

    def placed(self, hidden: Tensor, layer: int) -> Tensor:
        if layer >= len(self.inputs):
            return hidden
        return torch.index_put(hidden, (self.visual,), self.inputs[layer].to(hidden.dtype))


def keep_image_rows(language_model: Any) -> None:
    """Let the layers heed an `ImageRows` in their arguments: image rows are set before, and not updated by attention.

    The hooks keep nothing: without that argument they do nothing.
    """
    for layer in language_model.layers:
        layer.register_forward_pre_hook(_set_image_rows, with_kwargs=True)
        layer.self_attn.register_forward_hook(_drop_update, with_kwargs=True)


def _set_image_rows(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    rows = kwargs.get("image_rows")
    if rows is None:
        return None
    number = layer.self_attn.layer_idx
    if args:
        return (rows.placed(args[0], number), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": rows.placed(kwargs["hidden_states"], number)}


def _drop_update(attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> tuple | None:
    rows = kwargs.get("image_rows")
    return None if rows is None else (output[0].masked_fill(rows.visual[..., None], 0), *output[1:])


def project(projector: LlavaMultiModalProjector, features: Tensor) -> Tensor:
    """Image features `[n c]`, in the projector's dtype and on its device, to `[n d]`."""
    weight = projector.linear_1.weight
    return projector(features.to(weight.device, weight.dtype))


def image_states(language_model: Any, inputs: list[Tensor]) -> Float[Tensor, "n l e"]:
    """Keys and values of image tokens in every layer, side by side, before rotary embedding. inputs: `[n d]` each."""
    made = []
    for layer, x in zip(language_model.layers, inputs, strict=True):
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        keys = attention.k_proj(normed)
        norm = getattr(attention, "k_norm", None)
        if norm is not None:
            keys = norm(keys.unflatten(-1, (-1, attention.head_dim))).flatten(-2)
        made.append(torch.cat([keys, attention.v_proj(normed)], -1))
    return torch.stack(made, 1)


class WithImages:
    """A cache to which the language model gives keys and values of text rows, and which adds those of the images.

    inner: the model's cache, which receives all of the sequence in order and is an ordinary one afterwards; None where
    nothing is kept. states: of `image_states`. cos, sin: `[b s d]` of every position of this forward.
    """

    def __init__(
        self, inner: Any, rows: TextRows, visual: Tensor, states: Tensor, cos: Tensor, sin: Tensor, config: Any
    ) -> None:
        self.inner, self.rows, self.visual, self.states = inner, rows, visual, states
        self.stand_in = DynamicCache(config=config) if inner is None else inner
        places = visual.shape[:2]
        self.cos, self.sin = (x.expand(*places, -1)[visual][:, None] for x in (cos, sin))

    def __getattr__(self, name: str) -> Any:
        if name == "stand_in":
            raise AttributeError(name)
        return getattr(self.stand_in, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`[b n t d]` of the text rows to `[b n s d]` of everything, cached tokens included."""
        own_keys, own_values = self.states[:, layer_idx].chunk(2, -1)
        own_keys = own_keys.unflatten(-1, (keys.shape[1], -1))
        own_values = own_values.unflatten(-1, (values.shape[1], -1))
        own_keys = own_keys * self.cos + rotate_half(own_keys) * self.sin
        keys, values = self._merged(keys, own_keys), self._merged(values, own_values)
        return (keys, values) if self.inner is None else self.inner.update(keys, values, layer_idx, *args, **kwargs)

    def _merged(self, text: Tensor, images: Tensor) -> Tensor:
        b, heads, _, width = text.shape
        index = self.rows.index[:, None, :, None].expand(-1, heads, -1, width)
        full = text.new_zeros(b, heads, self.visual.shape[1], width).scatter(2, index, text)
        return torch.index_put(full.transpose(1, 2), (self.visual,), images.to(text.dtype)).transpose(1, 2)


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds; 0 without one."""
    return 0 if cache is None else int(cache.get_seq_length())


def own_padding(attention_mask: Tensor | None, past: int, length: int) -> Bool[Tensor, "b s"] | None:
    """Which tokens of this forward are real, of a mask that covers what is cached too; None where it does not say."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    if attention_mask.shape[1] < past + length:
        raise ValueError(
            f"SAISA: attention_mask covers {attention_mask.shape[1]} tokens, {past} cached ones and {length} new ones "
            "are there"
        )
    return attention_mask[:, past : past + length].bool()


def key_mask(
    config: Any, cache: Any, own: Tensor, length: int, attention_mask: Tensor | None, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """The mask `[b 1 r k]` of some rows over all keys that the cache will show, as the model's implementation takes it.

    own: `[b 1 r s]`, True = may attend, over the tokens of this forward. rows: `[b r]` their columns. attention_mask:
    the model's, `[b k]` or `[b 1 s k]`. Raises UnsupportedModel for an implementation that takes no such mask.
    """
    name = dispatch.base_name(config)
    if name not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f"SAISA: the attention implementation {name!r} takes no mask of its own making; load the model with "
            'attn_implementation="sdpa"'
        )
    if attention_mask is not None and attention_mask.ndim == 4:
        index = rows[:, None, :, None].expand(-1, 1, -1, attention_mask.shape[-1])
        mask = attention_mask.expand(len(rows), 1, -1, -1).gather(2, index)
        hidden = ~own.any(-1, keepdim=True)
        if mask.dtype != torch.bool:
            return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        mask = mask & ~hidden
    else:
        past = cached_tokens(cache)
        keys = past + length if cache is None else int(cache.get_mask_sizes(length, 0)[0])
        mask = torch.nn.functional.pad(own, (past, keys - past - length))
        if past:
            before = own.any(-1, keepdim=True)
            if attention_mask is not None:
                before = before & attention_mask[:, None, None, :past].bool()
            mask = torch.cat([before.expand(-1, -1, -1, past), mask[..., past:]], -1)
    if name == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
