"""AgentSD: merged tokens and agent attention in a trained diffusion network, without training (extra: diffusion).

In each transformer block at the picture's own resolution the tokens are merged, those that are left attend to each
other through agents (the same tokens, merged further), and the result is spread again. Blocks are reached through
diffusers' attention processors; everything is undone by `remove()`.

Paper: headwise/papers/agent_attention.py (Han et al., ECCV 2024).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attention.agent import agent_attention
from headwise.attention.softmax import split_heads
from headwise.errors import UnsupportedModel
from headwise.ops.token_merging import TokenMerging, match_tokens

__all__ = ["EARLY", "LATE", "AgentDiffusion", "DiffusionOptions", "agent_diffusion"]


@dataclass(frozen=True)
class DiffusionOptions:
    """ratio, agent_ratio: shares of the tokens that are merged before attention, and for the agents. stride: rows and
    columns of a cell with one token that others merge into. max_downsample: blocks at a coarser resolution than this
    are left alone. Agents are used where they are fewer than half of the tokens that are left, else plain attention.
    """

    ratio: float = 0.5
    agent_ratio: float = 0.8
    stride: tuple[int, int] = (2, 2)
    max_downsample: int = 1
    query_scale_exponent: float = 0.3
    v_shortcut: float = 0.075
    logits_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.ratio < 1 and 0 <= self.agent_ratio < 1):
            raise ValueError(
                f"DiffusionOptions: ratio {self.ratio}, agent_ratio {self.agent_ratio}; expected shares below 1"
            )


EARLY = DiffusionOptions(ratio=0.4, agent_ratio=0.95, stride=(4, 4))  # the paper's first 20 of 50 steps
LATE = DiffusionOptions(ratio=0.4, agent_ratio=0.5, stride=(2, 2))  # the rest: merging, no agents


class AgentDiffusion:
    """What `agent_diffusion` returns: a context, or a handle with `remove()`, which undoes it once.

    options may be changed at any step. `at_step(pipe, step, timestep, kwargs)` is a callback for a pipeline's
    `callback_on_step_end`: it changes to LATE after `early_steps` steps. The random destinations of a picture are drawn
    from `generator`, on the CPU and seeded, so that they repeat on every device; an odd batch, whose pictures are not
    in pairs with and without a prompt, takes none.
    """

    def __init__(self, network: nn.Module, options: DiffusionOptions, early_steps: int, seed: int) -> None:
        self.options, self.early_steps = options, early_steps
        self.generator = torch.Generator().manual_seed(seed)
        self.size: tuple[int, int] | None = None
        self._undo: list[tuple[Any, Any]] = []
        self._hooks: list[Any] = []
        blocks: list[Any] = [module for module in network.modules() if _is_block(module)]
        if not blocks:
            raise UnsupportedModel(
                f"agent_diffusion: {type(network).__name__} holds no BasicTransformerBlock with attn1; give a pipeline "
                "or its unet"
            )
        self._hooks.append(network.register_forward_pre_hook(self._note_size, with_kwargs=True))
        for block in blocks:
            processor = _Processor(self)
            self._hooks.append(block.register_forward_pre_hook(processor.note_states, with_kwargs=True))
            self._undo.append((block.attn1, block.attn1.processor))
            block.attn1.set_processor(processor)

    def remove(self) -> None:
        """Give every block its own processor back. Removing twice does nothing."""
        for hook in self._hooks:
            hook.remove()
        while self._undo:
            attention, processor = self._undo.pop()
            attention.set_processor(processor)
        self._hooks = []

    def __enter__(self) -> "AgentDiffusion":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def at_step(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Change to the later setting when `early_steps` steps are done. Returns kwargs as a pipeline expects."""
        if step + 1 == self.early_steps:
            kept = self.options
            self.options = replace(
                LATE, max_downsample=kept.max_downsample, logits_dtype=kept.logits_dtype, v_shortcut=kept.v_shortcut
            )
        return kwargs

    def _note_size(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        self.size = (sample.shape[2], sample.shape[3])

    def merging(self, states: Float[Tensor, "b t c"]) -> TokenMerging | None:
        """The matching of a block's tokens, None where the block is left alone."""
        options = self.options
        if self.size is None or not options.ratio:
            return None
        rows, columns = self.size
        down = math.ceil(math.sqrt(rows * columns // states.shape[1]))
        if down > options.max_downsample:
            return None
        grid = (math.ceil(rows / down), math.ceil(columns / down))
        generator = None if states.shape[0] % 2 else self.generator
        merged = int(states.shape[1] * options.ratio)
        return match_tokens(states, grid, merged, stride=options.stride, generator=generator)


def agent_diffusion(
    pipe: Any, options: DiffusionOptions | None = None, *, early_steps: int = 20, seed: int = 0
) -> AgentDiffusion:
    """Speed up a diffusers pipeline, or a network such as UNet2DConditionModel, until the block ends or `.remove()`.

    options: None means EARLY; with `callback_on_step_end=handle.at_step` the paper's schedule for 50 steps follows.
    Raises UnsupportedModel where there are no transformer blocks with self-attention.
    """
    network = getattr(pipe, "unet", pipe)
    if not isinstance(network, nn.Module):
        raise UnsupportedModel(f"agent_diffusion: {type(pipe).__name__} has no unet; give a pipeline that has, or it")
    return AgentDiffusion(network, EARLY if options is None else options, early_steps, seed)


def _is_block(module: nn.Module) -> bool:
    names = {cls.__name__ for cls in type(module).__mro__}
    return "BasicTransformerBlock" in names and getattr(module, "attn1", None) is not None


class _Processor:
    """diffusers' attention processor of one self-attention."""

    def __init__(self, owner: AgentDiffusion) -> None:
        self.owner = owner
        self.states: Tensor | None = None

    def note_states(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The block's own input is what tokens are compared by; attention gets it normalised."""
        self.states = args[0] if args else kwargs["hidden_states"]

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b t c"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "b t c"]:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise UnsupportedModel("agent_diffusion: this block's attn1 has a context or a mask; leave it out")
        states, self.states = self.states, None
        merging = None if states is None else self.owner.merging(states)
        options, heads = self.owner.options, attn.heads
        tokens = hidden_states if merging is None else merging.merge(hidden_states)
        q, k, v = (split_heads(part(tokens), heads) for part in (attn.to_q, attn.to_k, attn.to_v))
        scale = float(attn.scale)
        agents = None
        if merging is not None:
            most = merging.sources.shape[1]
            merged = min(most, int(hidden_states.shape[1] * options.agent_ratio))
            if 2 * (hidden_states.shape[1] - merged) < tokens.shape[1]:
                agents = split_heads(attn.to_q(merging.merge(hidden_states, merged)), heads)
        if agents is None:
            out = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            out = agent_attention(
                q,
                k,
                v,
                agents,
                scale=scale,
                query_scale=scale**options.query_scale_exponent,
                v_shortcut=options.v_shortcut,
                logits_dtype=options.logits_dtype,
            )
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out if merging is None else merging.unmerge(out)
