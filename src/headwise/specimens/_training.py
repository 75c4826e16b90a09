"""What the recipes of several specimens share: a small Llama, phases of training, and the common part of a card."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from headwise.training import History


@dataclass(frozen=True)
class Timed:
    """A part of a training that takes so many steps; recipes add what is trained on in it."""

    steps: int


P = TypeVar("P", bound=Timed)


def shortened(phases: Sequence[P], steps: int | None) -> list[P]:
    """The phases in `steps` steps together, each with its share and at least one; None leaves them as they are."""
    whole = sum(phase.steps for phase in phases)
    return [replace(phase, steps=max(1, round(phase.steps * (steps or whole) / whole))) for phase in phases]


def phase_of(step: int, phases: Sequence[P]) -> P:
    """The phase that a step belongs to; the last one for steps after all of them."""
    for phase in phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return phases[-1]


def small_llama(
    vocabulary: int, *, layers: int, heads: int, head_dim: int, hidden: int, inner: int, positions: int, pad: int
) -> nn.Module:
    """An untrained Llama with tied embeddings, no grouped keys, BOS 0 and no end of text.

    Weights come from torch's global generator. inner: width of the MLPs. positions: the longest sequence.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=pad,
        )
    )


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What `build()` makes from a seed; torch's global generator is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def ran(history: History, phases: Sequence[Timed], seed: int) -> dict[str, Any]:
    """How long a training was, for its card."""
    return {
        "seed": seed,
        "steps": sum(phase.steps for phase in phases),
        "minutes": round(history.seconds / 60, 1),
        "cpu_minutes": round(history.cpu_seconds / 60, 1),
        "threads": torch.get_num_threads(),
    }


def recipe(phases: Sequence[Timed], *, rate: float, warmup: int, decay: float) -> dict[str, Any]:
    """Phases and optimiser, for the recipe of a card. decay: share of the steps over which the rate falls."""
    return {
        "phases": [asdict(phase) for phase in phases],
        "optimiser": f"AdamW {rate}, betas 0.9 0.98, warm-up {warmup}, linear fall over the last {100 * decay:g} %, "
        "clip 1",
    }
