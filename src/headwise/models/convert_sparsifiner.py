"""Sparsifiner inside a trained vision transformer: `headwise.convert(model, to="sparsifiner")`, and its first stage.

Encoders on transformers' attention interface (ViT, DeiT, DINOv2 without registers, ...) keep their modules; a predictor
goes into each attention module as `connectivity` and picks the keys. Networks of headwise's own `SoftmaxAttention`, of
timm's or of torch's attention get `SparsifinerAttention` with the same weights. Fresh predictors choose badly: train
them first.

    convert(model, to="sparsifiner", keep=0.25)
    set_connectivity(model, "predict")     # only predictors want a gradient, attention stays dense
    ... loss = 0.01 * connectivity_loss(model) after each forward ...
    set_connectivity(model, "sparse")      # then tune the rest with the dense model as teacher
"""

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from headwise.attend.point import head_points
from headwise.attention.softmax import SoftmaxAttention
from headwise.attention.sparsifiner import ConnectivityPredictor, Mode, SparsifinerAttention
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, layout, tower_kinds
from headwise.hf.projections import attention_shape, output_projection
from headwise.models._dense_blocks import Swapped, adopted, image_tokens, swap
from headwise.models.conversion import chosen_layers

__all__ = ["connectivity_loss", "set_connectivity"]

NAME = "headwise-sparsifiner"
Model = TypeVar("Model", bound=nn.Module)


class Connectivity(ConnectivityPredictor):
    """A predictor inside an attention module of transformers, and what it is doing there."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mode: Mode = "sparse"
        self.reconstruction: Tensor | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"reconstruction": None}


def to_sparsifiner(
    model: Model,
    layers: Iterable[int] | None = None,
    *,
    keep: float = 0.25,
    num_tokens: int | None = None,
    num_prefix_tokens: int | None = None,
    token_reduction: int = 6,
    channel_reduction: int = 2,
    basis_threshold: float = 0.02,
    coef_topk: int = 8,
) -> Model:
    """The converter. num_tokens, num_prefix_tokens (0 or 1): None reads them off the model (the image and patch size;
    transformers' encoders have a class token, headwise's SmallViT has none). The other options are
    `ConnectivityPredictor`'s.
    """
    if any(isinstance(part, ConnectivityPredictor) for part in model.modules()):
        raise ValueError(f"convert: {type(model).__name__} has predictors already; convert a model once")
    with adopted(model):
        own, known = bool(head_points(model)), image_tokens(model)
        prefix = num_prefix_tokens
        if prefix is None:
            prefix = (0 if own else 1) if known is None else known.prefix
        tokens = num_tokens
        if tokens is None:
            tokens = _tokens(model, prefix) if known is None else math.prod(known.grid) + prefix
        options = {
            "keep": keep,
            "token_reduction": token_reduction,
            "channel_reduction": channel_reduction,
            "basis_threshold": basis_threshold,
            "coef_topk": coef_topk,
            "num_prefix_tokens": prefix,
        }
        (_convert_own if own else _convert_interface)(model, layers, tokens, options)
    return model


CONVERTERS = {"sparsifiner": to_sparsifiner}


def _tokens(model: nn.Module, prefix: int) -> int:
    config: Any = getattr(model, "config", None)
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is None or patch is None:
        raise ValueError(
            f"convert: the config of {type(model).__name__} says no image_size and patch_size; give num_tokens"
        )
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in (image, patch)]
    return (pairs[0][0] // pairs[1][0]) * (pairs[0][1] // pairs[1][1]) + prefix


def _convert_own(model: nn.Module, layers: Iterable[int] | None, tokens: int, options: dict[str, Any]) -> None:
    def make(old: SoftmaxAttention, layer: int) -> Swapped:
        if old.is_causal or old.num_kv_heads != old.num_heads:
            raise UnsupportedModel(
                f"convert: layer {layer} is causal or has grouped keys; sparsifiner goes into bidirectional attention "
                "with keys for each head"
            )
        given = {"qkv_bias": old.qkv.bias is not None, **options}
        return Swapped(SparsifinerAttention(old.proj.out_features, old.num_heads, tokens, **given), options)

    swap(model, layers, "sparsifiner", make)


def _convert_interface(model: nn.Module, layers: Iterable[int] | None, tokens: int, options: dict[str, Any]) -> None:
    places, main, kinds = attention_modules(model), layout(model).main, tower_kinds(model)
    ours = {layer: module for module, (tower, layer) in places.items() if tower == main.name}
    if kinds[main.name] != "bidirectional":
        raise UnsupportedModel(
            f"convert: {type(model).__name__} attends {kinds[main.name]}; sparsifiner is for encoders of images, whose "
            "number of tokens is fixed"
        )
    chosen = sorted(ours) if layers is None else chosen_layers(layers, main.layers)
    if missing := [layer for layer in chosen if layer not in ours]:
        raise ValueError(f"convert: layer {missing[0]} has no attention; those with it are {sorted(ours)}")
    made = {}
    for layer in chosen:
        shape, projection = attention_shape(ours[layer]), output_projection(ours[layer], model)
        if shape.kv_heads != shape.heads:
            raise UnsupportedModel(f"convert: layer {layer} has grouped keys, which sparsifiner has no place for")
        new = Connectivity(shape.value_dim, tokens, shape.heads, **options)
        weight = next((p for p in projection.parameters() if p.is_floating_point()), torch.zeros(1))
        made[ours[layer]] = new.to(device=weight.device, dtype=weight.dtype).train(ours[layer].training)
    dispatch.use(ours.values(), NAME)
    for module, new in made.items():
        module.register_module("connectivity", new)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    base, chooser = dispatch.base_function(module), getattr(module, "connectivity", None)
    mask = attention_mask
    if isinstance(chooser, Connectivity):
        if attention_mask is not None:
            raise UnsupportedModel(f"sparsifiner: {type(module).__name__} was given a mask; predictors see all tokens")
        chooser.reconstruction = None
        if chooser.mode == "predict":
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            q, k = query.detach(), key.detach()
            rows = (q[:, :, chooser.prefix :] @ k.mT * scale).softmax(-1)
            chooser.reconstruction = (chooser.reconstruct(q, k) - rows).square().sum()
        elif chooser.mode == "sparse":
            shown = chooser.mask(query, key)
            eager = dispatch.base_name(module.config) == "eager"  # which adds its masks
            mask = torch.zeros_like(shown, dtype=query.dtype).masked_fill(~shown, -torch.inf) if eager else shown
    return base(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


dispatch.offer(NAME, _attend, masks=None)


def _choosers(model: nn.Module) -> list[Any]:
    found = [part for part in model.modules() if isinstance(part, Connectivity | SparsifinerAttention)]
    if not found:
        raise ValueError(f"sparsifiner: {type(model).__name__} has no predictors; convert it first")
    return found


def set_connectivity(model: Model, mode: Mode) -> Model:
    """What every converted layer does: "predict" (first stage), "sparse" (second stage, and in use) or "dense".

    Which parameters want a gradient follows: the predictors in "predict", all but them in "sparse", all in "dense".
    Raises ValueError for another mode, and for a model without predictors.
    """
    if mode not in ("dense", "predict", "sparse"):
        raise ValueError(f"set_connectivity: {mode!r}; choose dense, predict or sparse")
    for part in _choosers(model):
        part.mode = mode
    predictors = [part for part in model.modules() if isinstance(part, ConnectivityPredictor)]
    own = {id(weight) for part in predictors for weight in part.parameters()}
    for weight in model.parameters():
        weight.requires_grad_(mode == "dense" or (id(weight) in own) == (mode == "predict"))
    return model


def connectivity_loss(model: nn.Module) -> Tensor:
    """Mean over layers of the predictors' summed squared error, of the last forward in mode "predict".

    Raises ValueError where there is none.
    """
    found = [part.reconstruction for part in _choosers(model) if part.reconstruction is not None]
    if not found:
        raise ValueError('connectivity_loss: no layer has a loss; call it after a forward in mode "predict"')
    return torch.stack(found).mean()
