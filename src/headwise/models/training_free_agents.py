"""Agent attention in a trained bidirectional model, without training: agents are pooled from the model's own queries.

`agent_mode(model, num_agents)` does it for a while, on the layers that you name;
`attn_implementation="headwise-agent"` does it for a whole model, with the options in `config.headwise_agent`.
Both go through transformers' attention interface. The constants are those that the paper found for Stable Diffusion.

Paper: headwise/papers/agent_attention.py (Han et al., ECCV 2024).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.agent import agent_attention, agent_map
from headwise.attention.softmax import split_heads
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, tower_kinds
from headwise.ops.masks import key_mask
from headwise.ops.pooling import pool_grid, pool_sequence

__all__ = ["AgentMode", "AgentOptions", "agent_mode"]

NAME = "headwise-agent"


@dataclass(frozen=True)
class AgentOptions:
    """How a trained model's attention is replaced. The defaults are the paper's for Stable Diffusion.

    num_agents: windows of queries, a square number or (rows, columns) where the tokens are a picture.
    query_scale_exponent: the second map's scale is the model's own to this power, so 0.3 is sharper and 1 leaves it.
    v_shortcut: how much of its own value each token keeps. max_share: a layer keeps its softmax where the agents are
    not fewer than this share of the tokens. grid_size: (rows, columns) of the picture's tokens; None reads it from the
    config's image and patch size, and takes the tokens before it as prefix, which is never pooled. A text is pooled
    along its tokens. logits_dtype: of the scores, such as "float32" where half precision overflows.
    """

    num_agents: int | tuple[int, int] = 49
    query_scale_exponent: float = 0.3
    v_shortcut: float = 0.075
    max_share: float = 0.5
    grid_size: tuple[int, int] | None = None
    logits_dtype: str | None = None

    def __post_init__(self) -> None:
        sides = (self.num_agents,) if isinstance(self.num_agents, int) else tuple(self.num_agents)
        if min(sides) < 1 or len(sides) > 2:
            raise ValueError(f"AgentOptions: num_agents is {self.num_agents}; expected 1 or more, or (rows, columns)")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"AgentOptions: max_share is {self.max_share}; expected a share above 0 and up to 1")
        if self.logits_dtype is not None and not isinstance(getattr(torch, self.logits_dtype, None), torch.dtype):
            raise ValueError(f"AgentOptions: logits_dtype is {self.logits_dtype!r}; expected a name such as 'float32'")

    @property
    def count(self) -> int:
        """How many agents."""
        return self.num_agents if isinstance(self.num_agents, int) else self.num_agents[0] * self.num_agents[1]

    def windows(self) -> tuple[int, int]:
        """Rows and columns of agents. Raises ValueError for a number that is no square."""
        if not isinstance(self.num_agents, int):
            return self.num_agents
        side = round(self.num_agents**0.5)
        if side * side != self.num_agents:
            raise ValueError(
                f"AgentOptions: num_agents is {self.num_agents}, no square number; on a grid of patches give one, or "
                "(rows, columns)"
            )
        return side, side


class AgentMode:
    """What `agent_mode` returns: a context, or a handle with `remove()`, which undoes it once."""

    def __init__(self, modules: Iterable[nn.Module], options: AgentOptions) -> None:
        self._modules: list[nn.Module] = []

        def mechanism(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            return _attend(options, module, *args, **kwargs)

        try:
            for module in modules:
                dispatch.assign(module, mechanism)
                self._modules.append(module)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Give the layers their own attention back. Removing twice does nothing."""
        while self._modules:
            dispatch.unassign(self._modules.pop())

    def __enter__(self) -> "AgentMode":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def agent_mode(
    model: nn.Module, options: AgentOptions | None = None, *, layers: Iterable[int] | None = None, **given: Any
) -> AgentMode:
    """Let a trained encoder attend through agents until the block ends, or until `.remove()`.

    layers: numbers of attention layers; None is all. given: options by name, instead of `options`.
    Probes and edits of head outputs keep working; those of weights are refused, for there are none.
    Raises UnsupportedModel for a model with causal or cross attention, which agents would let see the future, and
    ValueError for layers that it does not have.

    >>> with agent_mode(model, num_agents=16, query_scale_exponent=1.0):  # doctest: +SKIP
    ...     model(pixel_values)
    """
    if options is not None and given:
        raise ValueError(f"agent_mode: options and {sorted(given)[0]} are both given; put the second into the first")
    options = AgentOptions(**given) if options is None else options
    kinds = tower_kinds(model)
    found = {module: place for module, place in attention_modules(model).items() if kinds[place[0]] == "bidirectional"}
    if len(kinds) != 1 or not found:
        what = ", ".join(f"{name or 'main'}: {kind}" for name, kind in kinds.items())
        raise UnsupportedModel(
            f"agent_mode: {type(model).__name__} has attention of the kinds {what}; agents sum up all queries, so only "
            "a model of one bidirectional tower can use them (a vision or text encoder); give that part of the model"
        )
    numbers = {layer for _, layer in found.values()}
    wanted = numbers if layers is None else set(layers)
    if not wanted <= numbers:
        raise ValueError(f"agent_mode: layers {sorted(wanted - numbers)} are none of this model's, 0 to {max(numbers)}")
    return AgentMode([module for module, (_, layer) in found.items() if layer in wanted], options)


def _named(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`attn_implementation="headwise-agent"`: options are the config's."""
    given = getattr(module.config, "headwise_agent", None) or {}
    known = {item.name for item in fields(AgentOptions)}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"config.headwise_agent: {unknown[0]!r} is no option; there are {', '.join(sorted(known))}")
    options: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    return _attend(AgentOptions(**options), module, *args, **kwargs)


def _attend(
    options: AgentOptions,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """One attention call `[b h t d]` -> `[b t h e]`, and the implied map where weights are asked for."""
    _refuse(module, query, key, kwargs)
    mask = None if attention_mask is None else key_mask(attention_mask)
    if attention_mask is not None and mask is None:
        raise UnsupportedModel(
            f"{type(module).__name__}: its mask {tuple(attention_mask.shape)} is not one of padding alone; agents "
            "carry every key to every query, so windows and biases of pairs cannot be expressed"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    fewer = options.count < options.max_share * query.shape[2]
    if not fewer:
        seen = None if mask is None else mask[:, None, None]
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, dropout_p=dropout, enable_gqa=key.shape[1] != query.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    tokens, heads = query.transpose(1, 2).flatten(2), query.shape[1]
    grid = _grid(options, module, query.shape[2])
    real = mask
    if grid is not None:
        prefix = query.shape[2] - grid[0] * grid[1]
        tokens, real = tokens[:, prefix:], None if mask is None else mask[:, prefix:]
        pooled, present = pool_grid(tokens, grid, options.windows(), real)
    else:
        pooled, present = pool_sequence(tokens, options.count, real)
    agents = split_heads(pooled.contiguous(), heads)
    shared: dict[str, Any] = {
        "scale": scale,
        "query_scale": scale**options.query_scale_exponent,
        "key_mask": mask,
        "agent_mask": present,
    }
    dtype = None if options.logits_dtype is None else getattr(torch, options.logits_dtype)
    out = agent_attention(
        query, key, value, agents, v_shortcut=options.v_shortcut, dropout=dropout, logits_dtype=dtype, **shared
    )
    weights = None
    if kwargs.get("output_attentions"):
        weights = agent_map(query, key, agents, **shared)
        assert isinstance(weights, Tensor)
    return out.transpose(1, 2).contiguous(), weights


def _refuse(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    config, causal = module.config, kwargs.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    if causal or getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(module).__name__}: agents sum up all queries, later ones too, so a causal model would see its "
            "future; use them in encoders"
        )
    if query.shape[2] != key.shape[2]:
        raise UnsupportedModel(
            f"{type(module).__name__}: {query.shape[2]} queries and {key.shape[2]} keys; agents stand in for "
            "self-attention here, for cross-attention call headwise.attention.agent_attention"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"{type(module).__name__}: its attention has {name}, which agents cannot express")


def _grid(options: AgentOptions, module: nn.Module, tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the picture's tokens; None for a text."""
    config: Any = module.config
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if options.grid_size is not None:
        grid = options.grid_size
    elif image is None or patch is None:
        return None
    else:
        (height, width), (rows, columns) = ((x, x) if isinstance(x, int) else tuple(x) for x in (image, patch))
        grid = height // rows, width // columns
    prefix = tokens - grid[0] * grid[1]
    if not 0 <= prefix <= 16:
        raise ValueError(
            f"headwise-agent: {tokens} tokens are not a grid of {grid[0]} x {grid[1]} after a few others (class token, "
            "registers); give grid_size"
        )
    return grid


dispatch.offer(NAME, _named)
