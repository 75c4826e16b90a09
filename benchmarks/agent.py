"""Agent attention against softmax attention, the released formulation and a matrix product of the same operations.

Four heads of 32, 49 agents, biases of both maps; tokens of pictures of 112 to 1,792 pixels in patches of 16. The forms
of the function are compared with each other too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import Benchmark, Variant, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, products, scaled_dot_product
from headwise.attention.agent import agent_attention

HEADS, WIDTH, AGENTS = 4, 32, 49
TOKENS = (49, 196, 784, 3136, 12544)
RELEASED = "as released: two maps kept"


def inputs(tokens: int, gradients: bool = True) -> dict[str, Tensor]:
    names = ("q", "k", "v", "agents", "bias_agent_key", "bias_query_agent")
    shapes = [(tokens, WIDTH)] * 3 + [(AGENTS, WIDTH), (AGENTS, tokens), (tokens, AGENTS)]
    made = draw(*((1, HEADS, *shape) for shape in shapes), gradients=gradients)
    return dict(zip(names, made, strict=True))


def ours(tokens: int) -> Work:
    given: dict[str, Any] = inputs(tokens)
    return partial(agent_attention, **given), list(given.values())


def released(tokens: int) -> Work:
    given, scale = inputs(tokens), WIDTH**-0.5

    def run() -> Tensor:
        q, k, v, agents, first, second = given.values()
        gathered = ((agents * scale) @ k.mT + first).softmax(-1) @ v
        return ((q * scale) @ agents.mT + second).softmax(-1) @ gathered

    return run, list(given.values())


def ways(tokens: int) -> dict[str, Way]:
    return {OURS: partial(ours, tokens), RELEASED: partial(released, tokens)}


def operations(tokens: int) -> float:
    return 8 * tokens * AGENTS * WIDTH * HEADS


PARTS = [
    Part(
        "agent",
        TOKENS,
        "{} tokens".format,
        ways,
        (RELEASED,),
        lambda tokens: scaled_dot_product(1, HEADS, tokens, WIDTH),
        operations,
        int,
    )
]


def form(tokens: int, name: str) -> Callable[[], Any]:
    given: dict[str, Any] = inputs(tokens, gradients=False)
    return torch.no_grad()(partial(agent_attention, **given, implementation=name))


def forms(tokens: int) -> list[Variant]:
    names = ("plain", "blocked", "fused") if setting.device == "cpu" else ("plain", "fused")
    product = Variant("matrix product of as many operations", partial(products, operations(tokens)))
    return [product, *(Variant(name, partial(form, tokens, name)) for name in names)]


def check() -> None:
    """The forms agree with each other, and with the released formulation."""
    given: dict[str, Any] = {name: value.double() for name, value in inputs(196, gradients=False).items()}
    for name in ("blocked", "fused"):
        found = agent_attention(**given, implementation=name)
        torch.testing.assert_close(found, agent_attention(**given, implementation="plain"))
    bound = 1e-5 if setting.dtype == "float32" else 2e-2
    torch.testing.assert_close(released(196)[0](), ours(196)[0](), atol=bound, rtol=1e-3)


def benchmark() -> Benchmark:
    return benchmark_of("agent", PARTS, check, {f"forms, {n} tokens": partial(forms, n) for n in TOKENS[2:]})
