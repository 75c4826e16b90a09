"""Agent attention against softmax attention, its other forms and a matrix product of the same operations.

Four heads of 32, 49 agents, biases of both maps; tokens of pictures of 224, 448, 896 and 1,792 pixels in patches of 16.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import Benchmark, Variant, setting
from headwise.attention.agent import agent_attention

HEADS, WIDTH, AGENTS = 4, 32, 49
TOKENS = (196, 784, 3136, 12544)
MOST = 3136  # softmax attention at four times as many takes seconds a call


def inputs(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, HEADS, *shape, generator=generator).to(setting.device, getattr(torch, setting.dtype))

    made: dict[str, Any] = {name: draw(tokens, WIDTH) for name in "qkv"} | {"agents": draw(AGENTS, WIDTH)}
    return made | {"bias_agent_key": draw(AGENTS, tokens), "bias_query_agent": draw(tokens, AGENTS)}


def form(tokens: int, name: str) -> Callable[[], Any]:
    given = inputs(tokens)

    @torch.no_grad()
    def run() -> Any:
        return agent_attention(**given, implementation=name)  # pyright: ignore[reportArgumentType]

    return run


def softmax(tokens: int) -> Callable[[], Any]:
    given = inputs(tokens)
    return lambda: nn.functional.scaled_dot_product_attention(given["q"], given["k"], given["v"])


def product(tokens: int) -> Callable[[], Any]:
    """8 t n d operations a head as one product of square-ish matrices."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(HEADS * tokens, AGENTS, generator=generator).to(setting.device, getattr(torch, setting.dtype))
    b = torch.randn(AGENTS, 4 * WIDTH, generator=generator).to(a)
    return lambda: a @ b


def variants(tokens: int) -> list[Variant]:
    skip = None if tokens <= MOST or setting.device != "cpu" else "seconds a call on a CPU"
    names = ("plain", "blocked", "fused") if setting.device == "cpu" else ("plain", "fused")
    return [
        Variant("agent attention", partial(form, tokens, "auto")),
        *(Variant(name, partial(form, tokens, name)) for name in names),
        Variant("softmax attention", partial(softmax, tokens), skip),
        Variant("matrix product of as many operations", partial(product, tokens)),
    ]


def check() -> None:
    """The forms agree."""
    given = {name: value.double() for name, value in inputs(196).items()}
    for name in ("blocked", "fused"):
        found = agent_attention(**given, implementation=name)
        torch.testing.assert_close(found, agent_attention(**given, implementation="plain"))


def benchmark() -> Benchmark:
    return Benchmark("agent", {f"{tokens} tokens": partial(variants, tokens) for tokens in TOKENS}, check)
