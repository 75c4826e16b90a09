"""Positional attention layers from 9 to 576 tokens, beside the released form, which copies queries and keys of
positions to every item, and a layer of softmax attention. Width 64, two heads; in the forward the weights are kept
between calls.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Benchmark, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, of_module
from headwise.attention import PositionalAttention, SoftmaxAttention

WIDTH, HEADS = 64, 2
SIZES = ((1000, 9), (256, 36), (64, 144), (16, 576))  # batch, tokens
COPIED = "as released: positions copied to every item"


def prepared(size: tuple[int, int]) -> tuple[PositionalAttention, Tensor]:
    torch.manual_seed(0)
    batch, count = size
    return PositionalAttention(WIDTH, HEADS, count).eval(), draw((batch, count, WIDTH))[0]


def copied(layer: PositionalAttention, x: Tensor) -> Tensor:
    q, k = (one.expand(len(x), *one.shape) for one in layer.queries_keys(layer.one_hot(x.shape[1])))
    v = layer.v_proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def softmax(size: tuple[int, int]) -> Way:
    def make() -> Work:
        torch.manual_seed(0)
        return of_module(SoftmaxAttention(WIDTH, HEADS), draw((*size, WIDTH))[0])

    return make


def operations(size: tuple[int, int]) -> float:
    batch, n = size
    values = batch * (4 * n * WIDTH**2 + 2 * n**2 * WIDTH)
    return values + HEADS * (4 * n**3 + 2 * n**3)  # queries and keys of n positions of width n, and their products


PARTS = [
    Part(
        "positional",
        SIZES,
        lambda size: f"{size[0]} x {size[1]} tokens",
        lambda size: {
            OURS: lambda: of_module(*prepared(size)),
            COPIED: lambda: of_module(*prepared(size), function=copied),
        },
        (COPIED,),
        softmax,
        operations,
        lambda size: size[1],
    )
]


@torch.no_grad()
def check() -> None:
    bound = 1e-5 if setting.dtype == "float32" else 3e-2
    for size in SIZES[:3]:
        ours, theirs = (way()[0]() for way in PARTS[0].ways(size).values())
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=1e-3)


def benchmark() -> Benchmark:
    return benchmark_of("positional", PARTS, check)
