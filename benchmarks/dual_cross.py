"""Dual cross-attention beside its maps kept as in the paper and one call of fused self-attention, and the class row of
a rollout beside its matrix.

DeiT-Tiny's 3 heads of 64, batch 4, at 224, 448 and 672 pixels. What a pass of a branch adds is one such call a layer.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import Benchmark, Variant, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, scaled_dot_product
from headwise.attention.dual_cross import (
    attention_rollout,
    global_local_cross_attention,
    pairwise_cross_attention,
    rollout_row,
    top_response_tokens,
)

BATCH, HEADS, SIZE, LAYERS, RATIO = 4, 3, 64, 12, 0.1
TOKENS = (197, 785, 1765)
KEPT = "as in the paper: maps kept"


def qkv(tokens: int, batch: int = BATCH, seed: int = 0, gradients: bool = True) -> list[Tensor]:
    shape = (batch, HEADS, tokens, SIZE)
    return draw(shape, shape, shape, seed=seed, gradients=gradients)


def kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SIZE**-0.5).softmax(-1) @ v


def pairs(tokens: int, paper: bool) -> Work:
    q, k, v = qkv(tokens)
    partner = torch.arange(BATCH, device=q.device).roll(1)
    if paper:
        return lambda: kept(q, torch.cat([k, k[partner]], 2), torch.cat([v, v[partner]], 2)), (q, k, v)
    return partial(pairwise_cross_attention, q, k, v, partner), (q, k, v)


def local(tokens: int, paper: bool) -> Work:
    q, k, v = qkv(tokens)
    response = torch.rand(BATCH, tokens, generator=torch.Generator().manual_seed(0)).to(q.device)
    index = top_response_tokens(response, RATIO)
    if paper:
        return lambda: kept(q.gather(2, index[:, None, :, None].expand(-1, HEADS, -1, SIZE)), k, v), (q, k, v)
    return partial(global_local_cross_attention, q, k, v, index), (q, k, v)


def ways_of(work: Callable[[int, bool], Work], tokens: int) -> dict[str, Way]:
    return {OURS: partial(work, tokens, False), KEPT: partial(work, tokens, True)}


PARTS = [
    Part(
        name,
        TOKENS,
        "{} tokens".format,
        partial(ways_of, work),
        (KEPT,),
        lambda tokens: scaled_dot_product(BATCH, HEADS, tokens, SIZE),
        partial(lambda share, tokens: share * 4 * BATCH * HEADS * tokens**2 * SIZE, share),
        int,
        promises=promises,
    )
    for name, work, share, promises in (
        ("dual cross, pairs of images", pairs, 2.0, False),
        ("dual cross, 10 % of the queries", local, RATIO, True),
    )
]


@cache
def layers() -> list[tuple[Tensor, Tensor, float]]:
    made = [qkv(TOKENS[1], 1, seed, gradients=False) for seed in range(LAYERS)]
    return [(q, k, SIZE**-0.5) for q, k, _ in made]


def row() -> Callable[[], Any]:
    given = layers()
    return lambda: rollout_row(given)


def matrix() -> Callable[[], Any]:
    given = layers()
    return lambda: attention_rollout([(q @ k.mT * scale).softmax(-1) for q, k, scale in given])[:, 0]


def rollout() -> list[Variant]:
    return [Variant("whole matrix", matrix), Variant("class row", row)]


@torch.no_grad()
def check() -> None:
    """The two rollouts agree, an image paired with itself gets self-attention, and kept maps give the same."""
    bound = 1e-5 if setting.dtype == "float32" else 3e-2
    torch.testing.assert_close(row()(), matrix()().float(), rtol=1e-3, atol=bound)
    q, k, v = qkv(TOKENS[0])
    itself = pairwise_cross_attention(q, k, v, torch.arange(BATCH, device=q.device))
    torch.testing.assert_close(itself, kept(q, k, v), rtol=1e-3, atol=bound)
    for work in (pairs, local):
        torch.testing.assert_close(work(197, False)[0](), work(197, True)[0](), rtol=1e-3, atol=bound)


def benchmark() -> Benchmark:
    return benchmark_of("dual_cross", PARTS, check, {f"rollout of {LAYERS} layers, {TOKENS[1]} tokens": rollout})
