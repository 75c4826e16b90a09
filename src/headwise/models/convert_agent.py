"""Agent attention inside a trained network, without training: `headwise.convert(model, to="agent")`.

    convert(vit, to="agent", num_agents=49)               # an encoder of transformers
    convert(network, to="agent", num_agents=(7, 7))       # timm's, torch's and headwise's own networks
    convert(pipe, to="agent", ratio=0.4)                  # AgentSD: a diffusers pipeline, or its unet

Projections stay as they are; agents are pooled from the network's own queries, and the constants are those that the
paper found for Stable Diffusion. `models.agent_mode` and `models.agent_diffusion` do the same for the length of a
`with` block.

Paper: headwise/papers/agent_attention.py (Han et al., ECCV 2024).
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import nn

from headwise.attend.point import head_points
from headwise.attention.agent import AgentAttention
from headwise.attention.softmax import SoftmaxAttention
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, tower_kinds
from headwise.models._dense_blocks import Swapped, adopted, given_tokens, swap
from headwise.models.conversion import chosen_layers
from headwise.models.diffusion_agents import EARLY, agent_diffusion
from headwise.models.training_free_agents import NAME, AgentOptions

__all__ = []

Model = TypeVar("Model")

DIFFUSION = {
    "ratio", "agent_ratio", "stride", "max_downsample", "early_steps", "seed", "query_scale_exponent", "v_shortcut",
    "logits_dtype",
}  # fmt: skip
INTERFACE = {"num_agents", "query_scale_exponent", "v_shortcut", "max_share", "grid_size", "logits_dtype"}
LAYERS = (INTERFACE - {"logits_dtype"}) | {"num_prefix_tokens"}


def to_agent(
    model: Model,
    layers: Iterable[int] | None = None,
    *,
    num_agents: int | tuple[int, int] | None = None,
    query_scale_exponent: float | None = None,
    v_shortcut: float | None = None,
    max_share: float | None = None,
    grid_size: tuple[int, int] | None = None,
    num_prefix_tokens: int | None = None,
    logits_dtype: str | None = None,
    ratio: float | None = None,
    agent_ratio: float | None = None,
    stride: tuple[int, int] | None = None,
    max_downsample: int | None = None,
    early_steps: int | None = None,
    seed: int | None = None,
) -> Model:
    """The converter. None is the default of `AgentOptions` or `DiffusionOptions`, which say what the options mean.

    grid_size, num_prefix_tokens: rows and columns of the tokens of an image, and the number of those before them; None
    reads them off the model. Tokens without a grid are pooled along the sequence. Layers of a network with a known
    number of tokens are refused where the agents are not fewer than max_share of them; a transformers model keeps its
    softmax there. ratio, agent_ratio, stride, max_downsample, early_steps, seed: of diffusion networks, which keep the
    handle as `agent_diffusion`: give its `at_step` to the pipeline as `callback_on_step_end` for the paper's schedule.
    `model.set_attn_implementation("sdpa")` undoes the conversion of a transformers model, `agent_diffusion.remove()`
    that of a diffusion network. Raises UnsupportedModel for causal and cross attention.
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "layers") and value is not None}
    network: Any = getattr(model, "unet", model)
    if not isinstance(network, nn.Module):
        raise UnsupportedModel(f"convert: {type(model).__name__} is no network and has no unet")
    if any("BasicTransformerBlock" in {cls.__name__ for cls in type(part).__mro__} for part in network.modules()):
        _check(given, DIFFUSION, "diffusion networks")
        _convert_diffusion(network, layers, given)
        return model
    with adopted(network):
        if head_points(network):
            _check(given, LAYERS, "networks of dense layers")
            _convert_own(network, layers, given)
        else:
            _check(given, INTERFACE, "transformers models")
            _convert_interface(network, layers, given)
    return model


CONVERTERS = {"agent": to_agent}


def _check(given: dict[str, Any], allowed: set[str], kind: str) -> None:
    if strange := sorted(set(given) - allowed):
        raise ValueError(f"convert: {strange[0]} is no option for {kind}; there are {', '.join(sorted(allowed))}")


def _convert_diffusion(network: Any, layers: Iterable[int] | None, given: dict[str, Any]) -> None:
    if layers is not None:
        raise ValueError("convert: layers of a diffusion network are chosen by max_downsample, leave layers out")
    if getattr(network, "agent_diffusion", None) is not None:
        raise ValueError(f"convert: {type(network).__name__} has agents already; call its agent_diffusion.remove()")
    schedule = {name: given.pop(name) for name in ("early_steps", "seed") if name in given}
    if "logits_dtype" in given:
        given["logits_dtype"] = getattr(torch, AgentOptions(logits_dtype=given["logits_dtype"]).logits_dtype or "")
    handle = agent_diffusion(network, replace(EARLY, **given), **schedule)
    network.agent_diffusion = handle


def _convert_interface(model: nn.Module, layers: Iterable[int] | None, given: dict[str, Any]) -> None:
    options = AgentOptions(**given)
    kinds, places = tower_kinds(model), attention_modules(model)
    if set(kinds.values()) != {"bidirectional"} or len(kinds) != 1:
        what = ", ".join(f"{name or 'main'}: {kind}" for name, kind in kinds.items())
        raise UnsupportedModel(
            f"convert: {type(model).__name__} has attention of the kinds {what}; agents sum up all queries, so only a "
            "model of one bidirectional tower can use them (a vision or text encoder); give that part of the model"
        )
    if any(dispatch.mechanism_of(module) is not None for module in places):
        raise ValueError(f"convert: the attention of {type(model).__name__} is another mechanism's already")
    ours = {layer: module for module, (_, layer) in places.items()}
    chosen = sorted(ours) if layers is None else chosen_layers(layers, 1 + max(ours))
    if missing := [layer for layer in chosen if layer not in ours]:
        raise ValueError(f"convert: layer {missing[0]} has no attention; those with it are {sorted(ours)}")
    dispatch.use(places, NAME, kept=[module for layer, module in ours.items() if layer not in chosen])
    for module in places:
        setattr(module.config, "headwise_agent", asdict(options))  # noqa: B010, saved with the model


def _convert_own(model: nn.Module, layers: Iterable[int] | None, given: dict[str, Any]) -> None:
    tokens = given_tokens(model, given.pop("grid_size", None), given.pop("num_prefix_tokens", None))
    options = AgentOptions(**given)
    if tokens is not None and options.count >= options.max_share * tokens.count:
        raise ValueError(
            f"convert: num_agents is {options.num_agents}, {options.count} for {tokens.count} tokens; expected fewer "
            f"than {options.max_share:.0%} of the tokens (max_share), since more save nothing"
        )

    def make(old: SoftmaxAttention, layer: int) -> Swapped:
        if old.is_causal:
            raise UnsupportedModel(
                f"convert: layer {layer} is causal; agents sum up all queries, so it would see its future"
            )
        own: dict[str, Any] = {
            "num_agents": options.num_agents,
            "num_prefix_tokens": 0 if tokens is None else tokens.prefix,
            "position_bias": False,
            "dwc": False,
            "query_scale": float(old.head_dim ** (-0.5 * options.query_scale_exponent)),
            "v_shortcut": options.v_shortcut,
        }
        fixed: dict[str, Any] = {"num_kv_heads": old.num_kv_heads, "qkv_bias": old.qkv.bias is not None}
        grid: Any = None if tokens is None else tokens.grid
        return Swapped(AgentAttention(old.proj.out_features, old.num_heads, grid_size=grid, **own, **fixed), own)

    swap(model, layers, "agent", make)
