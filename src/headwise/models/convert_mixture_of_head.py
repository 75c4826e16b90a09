"""Mixture of heads inside a trained model: `headwise.convert(model, to="mixture-of-head")`, and who uses which head.

Models on transformers' attention interface keep their modules; a router goes into each attention module as
`head_router`, and the heads' outputs are gated before the output projection. The query-norm router has no parameters,
so that the state of the model stays what it was; the learned router adds its matrices, to be tuned. Networks of
headwise's own `SoftmaxAttention`, of timm's or of torch's attention get `MixtureOfHeads` layers with the same weights.

Once this module is imported, `from_pretrained(..., attn_implementation="headwise-mixture-of-head")` loads any model on
the interface with query-norm routers in every layer: half of the heads shared, three quarters active.
"""

import re
import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.head_map import HeadMap
from headwise.attend.point import head_points, point_layout
from headwise.attention.mixture_of_head import (
    HeadGates,
    HeadRouter,
    HeadSplit,
    LearnedRouter,
    MixtureOfHeads,
    QueryNormRouter,
    head_split,
)
from headwise.attention.routed import Implementation, pays_to_route, routed_attention
from headwise.attention.softmax import SoftmaxAttention
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, layout
from headwise.hf.projections import attention_shape, head_writes, output_projection
from headwise.models._dense_blocks import Swapped, adopted, swap
from headwise.models.conversion import chosen_layers

__all__ = ["head_usage"]

Model = TypeVar("Model", bound=nn.Module)
RouterName = Literal["query_norm", "learned"]

NAME = "headwise-mixture-of-head"
QUERY_NORM = re.compile(r"(q|query|qk)_?(layer)?_?norm|norm_?q", re.IGNORECASE)

_default_routers: "WeakKeyDictionary[nn.Module, QueryNormRouter]" = WeakKeyDictionary()
_thread = threading.local()  # .inputs: attention module -> its input, between the module's start and its attention


def to_mixture_of_head(
    model: Model,
    layers: Iterable[int] | None = None,
    *,
    active: float = 0.75,
    shared: float = 0.5,
    router: RouterName = "query_norm",
    implementation: Implementation = "auto",
) -> Model:
    """The converter. active: share of the heads that a token uses; shared: share that all tokens use.

    layers: of the main tower. router: "query_norm", or "learned" from small random weights, to be tuned.
    implementation: as of `routed_attention`, at inference. Warns where shares are rounded to whole heads, and where
    queries are normalised, so that their norms say little.
    """
    if router not in ("query_norm", "learned"):
        raise ValueError(f"convert: router is {router!r}; choose 'query_norm' or 'learned'")
    if any(isinstance(part, HeadRouter) for part in model.modules()):
        raise ValueError(f"convert: {type(model).__name__} is a mixture of heads already; convert a model once")
    with adopted(model):
        change = _convert_own if head_points(model) else _convert_interface
        change(model, layers, active, shared, router, implementation)
    return model


CONVERTERS = {"mixture-of-head": to_mixture_of_head}


def _splits(heads: Iterable[int], active: float, shared: float) -> list[HeadSplit]:
    """One split per layer; shares that are no whole heads are reported once."""
    splits = [head_split(count, active, shared) for count in heads]
    off = next((split for split in splits if abs(split.active - active) > 1e-9), None)
    if off is not None:
        warnings.warn(
            f"convert: active={active} of {off.heads} heads is no whole number; {off.shared + off.top_k} are used "
            f"({off.active:.1%})",
            stacklevel=5,
        )
    return splits


# --- networks of headwise's own -------------------------------------------------------------------------------------


def _convert_own(
    model: nn.Module,
    layers: Iterable[int] | None,
    active: float,
    shared: float,
    router: RouterName,
    implementation: Implementation,
) -> None:
    dense = [part for part in model.modules() if isinstance(part, SoftmaxAttention)]
    chosen = chosen_layers(layers, len(dense))
    splits = dict(zip(chosen, _splits([dense[layer].num_heads for layer in chosen], active, shared), strict=True))

    def make(old: SoftmaxAttention, layer: int) -> Swapped:
        split = splits[layer]
        own: dict[str, Any] = {
            "num_shared": split.shared, "top_k": split.top_k, "router": router, "implementation": implementation,
        }  # fmt: skip
        fixed = {"num_kv_heads": old.num_kv_heads, "is_causal": old.is_causal, "qkv_bias": old.qkv.bias is not None}
        return Swapped(MixtureOfHeads(old.proj.out_features, old.num_heads, **own, **fixed), own)

    swap(model, layers, "mixture-of-head", make)


# --- models on transformers' attention interface --------------------------------------------------------------------


def _convert_interface(
    model: nn.Module,
    layers: Iterable[int] | None,
    active: float,
    shared: float,
    router: RouterName,
    implementation: Implementation,
) -> None:
    places = attention_modules(model)
    main = layout(model).main
    ours = {layer: module for module, (tower, layer) in places.items() if tower == main.name}
    chosen = sorted(ours) if layers is None else chosen_layers(layers, main.layers)
    if missing := [layer for layer in chosen if layer not in ours]:
        raise ValueError(f"convert: layer {missing[0]} has no attention; those with it are {sorted(ours)}")
    splits = _splits([attention_shape(ours[layer]).heads for layer in chosen], active, shared)
    routers = {}
    for layer, split in zip(chosen, splits, strict=True):
        made = QueryNormRouter(*split) if router == "query_norm" else _learned(ours[layer], model, split)
        made.implementation = implementation
        routers[ours[layer]] = made.train(ours[layer].training)
    normed = [name for module in routers for name, _ in module.named_children() if QUERY_NORM.fullmatch(name)]
    if normed and router == "query_norm":
        warnings.warn(
            f"convert: the layers normalise their queries ({normed[0]}), so that all norms are about the same and the "
            'router has little to go by; use router="learned" and tune it',
            stacklevel=4,
        )
    dispatch.use(ours.values(), NAME)
    for module in places:
        setattr(module, "head_router", routers.get(module))  # noqa: B010, a layer without one says so
        if isinstance(routers.get(module), LearnedRouter):
            module.register_forward_pre_hook(_keep_input, with_kwargs=True)


def _learned(module: nn.Module, model: nn.Module, split: HeadSplit) -> LearnedRouter:
    projection = output_projection(module, model)
    writes = head_writes(projection, split.heads)  # what is added to the stream is as wide as what comes in
    weight = next((p for p in projection.parameters() if p.is_floating_point()), writes)
    return LearnedRouter(writes.shape[-1], *split).to(device=weight.device, dtype=weight.dtype)


def _keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """A hook: what the layer gets is what its router reads, and attention itself is not given it."""
    if not hasattr(_thread, "inputs"):
        _thread.inputs = WeakKeyDictionary()
    _thread.inputs[module] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def router_of(module: nn.Module) -> HeadRouter | None:
    """The router of an attention module; the default one for a model that was loaded with the mechanism's name."""
    if hasattr(module, "head_router"):
        return getattr(module, "head_router")  # noqa: B009, set by the converter
    if dispatch.was_switched(module.config):
        return None  # another model with the config of a converted one
    if module not in _default_routers:
        _default_routers[module] = QueryNormRouter(*head_split(attention_shape(module).heads))
    return _default_routers[module]


def _route(module: nn.Module, router: HeadRouter, query: Tensor, key: Tensor, mask: Any) -> HeadGates:
    if query.shape[1] != router.split.heads:
        raise UnsupportedModel(
            f"mixture-of-head: {type(module).__name__} computes {query.shape[1]} of {router.split.heads} heads in this "
            "process; routers choose among all heads of a layer, load the model in one process"
        )
    real = _real_tokens(query, key, mask)
    router.train(module.training)  # a router that is no part of the model follows it
    if not isinstance(router, LearnedRouter):
        return router(query, real)
    x = getattr(_thread, "inputs", {}).pop(module, None)
    if x is None or x.shape[:2] != (query.shape[0], query.shape[2]):
        raise UnsupportedModel(
            f"mixture-of-head: {type(module).__name__} calls attention on parts of its input "
            f"({query.shape[0]} x {query.shape[2]} rows), which a learned router cannot follow; use "
            'router="query_norm"'
        )
    return router(x, real)


def _real_tokens(query: Tensor, key: Tensor, mask: Any) -> Tensor | None:
    """`[b t]`, True where a token may see itself; None where all do, or where a cache makes it unknown."""
    if not isinstance(mask, Tensor) or query.shape[2] != key.shape[2]:
        return None
    if mask.ndim == 4:
        mask = mask[:, 0, 0] if mask.shape[2] == 1 else mask[:, 0].diagonal(dim1=-2, dim2=-1)
    seen = mask if mask.dtype == torch.bool else mask > 0 if mask.ndim == 2 and not mask.is_floating_point() else None
    seen = mask > torch.finfo(mask.dtype).min / 2 if seen is None else seen
    return seen.expand(query.shape[0], query.shape[2])


def _gates(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options) -> Tensor | None:
    router = router_of(module)
    return None if router is None else _route(module, router, query, key, mask).gates


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
    router = router_of(module)
    base = dispatch.base_function(module)
    if router is None:
        return base(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    gates = _route(module, router, query, key, attention_mask).gates
    t, s = query.shape[2], key.shape[2]
    is_causal = kwargs.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and t > 1
    causal = attention_mask is None and is_causal
    plain = (
        dispatch.base_name(module.config) == "sdpa"
        and not module.training
        and not dropout
        and (attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 4))
        and not any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    )
    by_row = is_causal or (attention_mask is not None and attention_mask.shape[-2] > 1)
    wanted = router.implementation
    if plain and (wanted == "sparse" or (wanted == "auto" and pays_to_route(query, key, gates, by_row))):
        if causal and s > t:  # an empty static cache: the model attends to its first t columns
            key, value = key[:, :, :t], value[:, :, :t]
        options: dict[str, Any] = {"causal": causal, "scale": scaling, "implementation": "sparse"}
        return routed_attention(query, key, value, gates, mask=attention_mask, **options), None
    out, weights = base(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return out * gates[..., None].to(out.dtype), weights


dispatch.offer(NAME, _attend, gates=_gates, masks=None)


# --- who uses which head --------------------------------------------------------------------------------------------


@torch.no_grad()
def head_usage(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> HeadMap:
    """Share of the real tokens of a batch that use each head, as a head map with the probe "usage".

    batch: the model's inputs by name, or its one input. Heads of layers without a router have no score.
    Raises ValueError for a model that is no mixture of heads.
    """
    routers = _routers(model)
    if not routers:
        raise ValueError(f"head_usage: {type(model).__name__} has no head routers; convert it to mixture-of-head first")
    used = {place: torch.zeros(router.split.heads, dtype=torch.float64) for place, router in routers.items()}
    seen = dict.fromkeys(routers, 0.0)

    def count(place: tuple[str, int]):
        def hook(_: nn.Module, args: tuple, routed: HeadGates) -> None:
            on, real = routed.gates != 0, args[1] if len(args) > 1 else None
            real = on.new_ones(on.shape[:2]) if real is None else real
            used[place] += (on & real[..., None]).sum((0, 1)).double().cpu()
            seen[place] += float(real.sum())

        return hook

    modes = {part: part.training for part in model.modules()}
    hooks = [router.register_forward_hook(count(place)) for place, router in routers.items()]
    try:
        model.eval()
        model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
    scores = {
        Head(layer, number, tower): share
        for (tower, layer), counts in used.items()
        if seen[tower, layer]
        for number, share in enumerate((counts / seen[tower, layer]).tolist())
    }
    points = head_points(model)
    heads = point_layout(points) if points else layout(model)
    return HeadMap({"usage": scores}, heads, model=type(model).__name__, source="share of tokens that use a head")


def _routers(model: nn.Module) -> dict[tuple[str, int], HeadRouter]:
    """(tower, layer) -> router."""
    points = head_points(model)
    if points:
        owners = {id(part.head_point): part for part in model.modules() if isinstance(part, MixtureOfHeads)}
        return {("", n): owners[id(point)].router for n, point in enumerate(points) if id(point) in owners}
    found = {
        place: router_of(module)
        for module, place in attention_modules(model).items()
        if dispatch.mechanism_of(module) is _attend
    }
    return {place: router for place, router in found.items() if router is not None}
