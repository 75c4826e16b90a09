"""Attention of which each token uses some heads: time as a ratio to fused attention of all heads, gated or not.

16 heads of 64 channels, 4 of them shared, batch 1. The share of heads in use, which is the least ratio there can be,
stands in the name of the input. "equal products" is fused attention with as many heads as are in use.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import Benchmark, Variant, setting
from headwise.attention.mixture_of_head import LearnedRouter
from headwise.attention.routed import Implementation, routed_attention

HEADS, SHARED, WIDTH = 16, 4, 64
INPUTS = [(n, k, causal) for n in (256, 512, 1024, 2048) for k in (4, 8) for causal in (False, True)]


@cache
def inputs(tokens: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, key, v = (torch.randn(1, HEADS, tokens, WIDTH, generator=generator) for _ in range(3))
    torch.manual_seed(0)
    with torch.no_grad():
        gates = LearnedRouter(WIDTH, HEADS, SHARED, k).eval()(torch.randn(1, tokens, WIDTH, generator=generator)).gates
    dtype = getattr(torch, setting.dtype)
    return tuple(x.to(setting.device, dtype) for x in (q, key, v, gates))  # pyright: ignore[reportReturnType]


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


def check() -> None:
    """Both paths give fused attention times the gates."""
    bound = 1e-5 if setting.dtype == "float32" else 2e-2
    for causal in (False, True):
        wanted = plain(256, 4, causal)() * inputs(256, 4)[3][..., None]
        ways: tuple[Implementation, ...] = ("dense", "sparse")
        for way in ways:
            torch.testing.assert_close(gated(256, 4, causal, way)(), wanted, rtol=bound, atol=bound)


def benchmark() -> Benchmark:
    return Benchmark("mixture-of-head", {name_of(*one): partial(variants, *one) for one in INPUTS}, check)
