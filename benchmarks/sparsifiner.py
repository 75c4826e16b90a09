"""Sparsifiner's attention: time as a ratio to fused attention over all keys, 6 heads of 64 channels as in DeiT-S.

The share of multiply-adds that the closed formula leaves stands in the name of the input. Choosing keys sorts each row
of scores, which the formula does not count.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import Benchmark, Variant, setting
from headwise.attention.sparsifiner import (
    ConnectivityPredictor,
    attention_products,
    connectivity_from_indices,
    gathered_attention,
)

HEADS, WIDTH = 6, 64
TOKENS, KEEPS = (197, 577, 2305), (0.25, 0.05)


@cache
def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, setting.dtype)
    made = [torch.randn(1, HEADS, tokens, WIDTH, generator=generator).to(setting.device, dtype) for _ in range(3)]
    return made[0], made[1], made[2]


@cache
def predictor(tokens: int, keep: float) -> ConnectivityPredictor:
    torch.manual_seed(0)
    made = ConnectivityPredictor(WIDTH, tokens, HEADS, keep=keep).eval()
    return made.to(setting.device, getattr(torch, setting.dtype))


def dense(tokens: int) -> Callable[[], Any]:
    q, k, v = inputs(tokens)
    return lambda: scaled_dot_product_attention(q, k, v)


def given(tokens: int, keep: float, gather: bool) -> Callable[[], Any]:
    """Attention alone, the choice made beforehand."""
    q, k, v = inputs(tokens)
    indices = predictor(tokens, keep)(q, k)
    mask = connectivity_from_indices(indices, tokens)
    if gather:
        return lambda: gathered_attention(q, k, v, indices)
    return lambda: scaled_dot_product_attention(q, k, v, mask)


def choice(tokens: int, keep: float) -> Callable[[], Any]:
    q, k, _ = inputs(tokens)
    return lambda: predictor(tokens, keep)(q, k)


def variants(tokens: int, keep: float) -> list[Variant]:
    return [
        Variant("fused, all keys", partial(dense, tokens)),
        Variant("chosen keys, masked", partial(given, tokens, keep, False)),
        Variant("chosen keys, gathered", partial(given, tokens, keep, True)),
        Variant("choosing them", partial(choice, tokens, keep)),
    ]


def name_of(tokens: int, keep: float) -> str:
    left = 1 - attention_products(tokens, HEADS * WIDTH, HEADS, keep=keep).saved
    return f"{tokens} tokens, {keep:.0%} of the keys, {left:.0%} of the products"


def check() -> None:
    """Masked and gathered are the same attention."""
    bound = 1e-5 if setting.dtype == "float32" else 2e-2
    masked, gathered = (given(197, 0.25, gather)() for gather in (False, True))
    torch.testing.assert_close(gathered, masked, rtol=bound, atol=bound)


def benchmark() -> Benchmark:
    cases = [(tokens, keep) for tokens in TOKENS for keep in KEEPS]
    return Benchmark("sparsifiner", {name_of(*one): partial(variants, *one) for one in cases}, check, rounds=5)
