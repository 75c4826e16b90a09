"""Dual cross-attention against one call of fused self-attention, and the class row of a rollout against its matrix.

DeiT-Tiny at 448 pixels: 785 tokens, 3 heads of 64, batch 4. What a pass of a branch adds is one of these calls a layer.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import Benchmark, Variant, setting
from headwise.attention.dual_cross import (
    attention_rollout,
    global_local_cross_attention,
    pairwise_cross_attention,
    rollout_row,
    top_response_tokens,
)

BATCH, HEADS, TOKENS, SIZE, LAYERS, RATIO = 4, 3, 785, 64, 12, 0.1


@cache
def qkv(layer: int = 0, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(layer)
    q, k, v = torch.randn(3, batch, HEADS, TOKENS, SIZE, generator=generator)
    return tuple(x.to(setting.device, getattr(torch, setting.dtype)) for x in (q, k, v))  # pyright: ignore[reportReturnType]


def layers() -> list[tuple[Tensor, Tensor, float]]:
    return [(q, k, SIZE**-0.5) for q, k, _ in (qkv(layer, 1) for layer in range(LAYERS))]


def plain() -> Callable[[], Any]:
    q, k, v = qkv()
    return lambda: nn.functional.scaled_dot_product_attention(q, k, v)


def pairs() -> Callable[[], Any]:
    q, k, v = qkv()
    partner = torch.arange(BATCH, device=q.device).roll(1)
    return lambda: pairwise_cross_attention(q, k, v, partner)


def local() -> Callable[[], Any]:
    q, k, v = qkv()
    index = top_response_tokens(torch.rand(BATCH, TOKENS, device=q.device), RATIO)
    return lambda: global_local_cross_attention(q, k, v, index)


def row() -> Callable[[], Any]:
    given = layers()
    return lambda: rollout_row(given)


def matrix() -> Callable[[], Any]:
    given = layers()
    return lambda: attention_rollout([(q @ k.mT * scale).softmax(-1) for q, k, scale in given])[:, 0]


def attention() -> list[Variant]:
    return [Variant("self-attention (sdpa)", plain), Variant("PWCA", pairs), Variant("GLCA, 10 % of queries", local)]


def rollout() -> list[Variant]:
    return [Variant("whole matrix", matrix), Variant("class row", row)]


def check() -> None:
    """The two rollouts agree, and an image paired with itself gets self-attention."""
    bound = 1e-5 if setting.dtype == "float32" else 3e-2
    torch.testing.assert_close(row()(), matrix()().float(), rtol=1e-3, atol=bound)
    q, k, v = qkv()
    itself = pairwise_cross_attention(q, k, v, torch.arange(BATCH, device=q.device))
    torch.testing.assert_close(itself, plain()(), rtol=1e-3, atol=bound)


def benchmark() -> Benchmark:
    inputs = {
        f"one attention, {TOKENS} tokens": partial(attention),
        f"rollout of {LAYERS} layers, {TOKENS} tokens": partial(rollout),
    }
    return Benchmark("dual_cross", inputs, check, rounds=5)
