"""Attention of which each token uses some heads, beside fused attention of all heads and the released form, which gates
them afterwards.

16 heads of 64 channels, 4 of them shared, batch 1; 75 % of the heads in the series over sizes. The share of heads in
use, which is the least ratio there can be, stands in the name of the other inputs; "equal products" is fused attention
with as many heads as are in use.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import Benchmark, Variant, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, place, scaled_dot_product
from headwise.attention.mixture_of_head import LearnedRouter
from headwise.attention.routed import Implementation, routed_attention

HEADS, SHARED, WIDTH = 16, 4, 64
CASES = [(n, k, causal) for n in (1024, 2048) for k in (4, 8) for causal in (False, True)]
ROUTED = 8  # of the series: with the shared heads 75 %
RELEASED = "as released: all heads, then gates"


@cache
@torch.no_grad()
def gates_of(tokens: int, k: int) -> Tensor:
    torch.manual_seed(0)
    x = draw((1, tokens, WIDTH), gradients=False)[0]
    return LearnedRouter(WIDTH, HEADS, SHARED, k).to(**place()).eval()(x).gates


@cache
def inputs(tokens: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, key, v = draw(*[(1, HEADS, tokens, WIDTH)] * 3, gradients=False)
    return q, key, v, gates_of(tokens, k)


def of_gates(tokens: int, released: bool) -> Work:
    q, key, v = draw(*[(1, HEADS, tokens, WIDTH)] * 3)
    gates = gates_of(tokens, ROUTED).clone().requires_grad_()

    def run() -> Tensor:
        if released:
            return scaled_dot_product_attention(q, key, v).transpose(1, 2) * gates[..., None]
        # In training every head is computed: the router learns from all of them.
        way: Implementation = "dense" if torch.is_grad_enabled() else "auto"
        return routed_attention(q, key, v, gates, implementation=way)

    return run, (q, key, v, gates)


def ways(tokens: int) -> dict[str, Way]:
    return {OURS: partial(of_gates, tokens, False), RELEASED: partial(of_gates, tokens, True)}


PARTS = [
    Part(
        "mixture of head, 75 %",
        (256, 512, 1024, 2048),
        "{} tokens".format,
        ways,
        (RELEASED,),
        lambda tokens: scaled_dot_product(1, HEADS, tokens, WIDTH),
        lambda tokens: 4 * tokens**2 * WIDTH * (SHARED + ROUTED),
        int,
    )
]


def plain(tokens: int, k: int, causal: bool, heads: int = HEADS) -> Callable[[], Any]:
    q, key, v, _ = (x[:, :heads] for x in inputs(tokens, k))
    return lambda: scaled_dot_product_attention(q, key, v, is_causal=causal).transpose(1, 2)


def gated(tokens: int, k: int, causal: bool, way: Implementation) -> Callable[[], Any]:
    q, key, v, gates = inputs(tokens, k)
    return lambda: routed_attention(q, key, v, gates, causal=causal, implementation=way)


def variants(tokens: int, k: int, causal: bool) -> list[Variant]:
    return [
        Variant("fused, all heads", partial(plain, tokens, k, causal)),
        Variant("all heads, then gates (official)", partial(gated, tokens, k, causal, "dense")),
        Variant("chosen heads only", partial(gated, tokens, k, causal, "sparse")),
        Variant("auto", partial(gated, tokens, k, causal, "auto")),
        Variant("equal products", partial(plain, tokens, k, causal, SHARED + k)),
    ]


def name_of(tokens: int, k: int, causal: bool) -> str:
    return f"{tokens} tokens, {(SHARED + k) / HEADS:.0%} of the heads{', causal' if causal else ''}"


@torch.no_grad()
def check() -> None:
    """Both paths give fused attention times the gates."""
    bound = 1e-5 if setting.dtype == "float32" else 2e-2
    ways: tuple[Implementation, ...] = ("dense", "sparse")
    for causal in (False, True):
        wanted = plain(256, 4, causal)() * inputs(256, 4)[3][..., None]
        for way in ways:
            torch.testing.assert_close(gated(256, 4, causal, way)(), wanted, rtol=bound, atol=bound)
    torch.testing.assert_close(of_gates(256, False)[0](), of_gates(256, True)[0](), rtol=bound, atol=bound)


def benchmark() -> Benchmark:
    return benchmark_of("mixture_of_head", PARTS, check, {name_of(*one): partial(variants, *one) for one in CASES})
