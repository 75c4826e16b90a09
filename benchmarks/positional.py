"""Positional attention at 9 and at 256 tokens, beside fused attention over positions that are copied to every item."""

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks import Benchmark, Variant, setting
from headwise.attention import PositionalAttention, SoftmaxAttention

INPUTS = {"1000 x 9 tokens": (1000, 9), "16 x 256 tokens": (16, 256)}
WIDTH, HEADS = 64, 2


def prepared(label: str) -> tuple[PositionalAttention, SoftmaxAttention, torch.Tensor]:
    torch.manual_seed(0)
    batch, count = INPUTS[label]
    place = {"device": setting.device, "dtype": getattr(torch, setting.dtype)}
    ours = PositionalAttention(WIDTH, HEADS, count).to(**place)
    return ours, SoftmaxAttention(WIDTH, HEADS).to(**place), torch.randn(batch, count, WIDTH).to(**place)


def copied(layer: PositionalAttention, x: torch.Tensor) -> torch.Tensor:
    """As the official code has it: queries and keys of positions, once for every item."""
    q, k = (one.expand(len(x), *one.shape) for one in layer.queries_keys(layer.one_hot(x.shape[1])))
    v = layer.v_proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def trained(function, x: torch.Tensor):
    def run():
        function(x).square().sum().backward()

    return run


def variants(label: str) -> list[Variant]:
    def kept():
        ours, _, x = prepared(label)
        ours.eval()
        return torch.no_grad()(partial(ours, x))

    def ours():
        layer, _, x = prepared(label)
        return trained(layer, x)

    def expanded():
        layer, _, x = prepared(label)
        return trained(partial(copied, layer), x)

    def softmax():
        _, layer, x = prepared(label)
        return trained(layer, x)

    return [
        Variant("positions copied, fused, a step", expanded),
        Variant("headwise, a step", ours),
        Variant("softmax attention, a step", softmax),
        Variant("headwise, weights kept, forward", kept),
    ]


@torch.no_grad()
def check() -> None:
    for label in INPUTS:
        layer, _, x = prepared(label)
        torch.testing.assert_close(layer(x), copied(layer, x), atol=1e-5, rtol=1e-4)


def benchmark() -> Benchmark:
    return Benchmark("positional", {label: partial(variants, label) for label in INPUTS}, check)
