"""DaViT's pair of layers, attention inside windows and attention over channels, beside the released formulation and two
layers of softmax attention at equal shape. Maps of 96 channels, three heads, windows of 7 x 7, batch 1.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import Benchmark, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, of_module
from headwise.attention import ChannelAttention, SoftmaxAttention, WindowAttention

WIDTH, HEADS, WINDOW = 96, 3, 7
SIDES = (14, 28, 56, 112)
RELEASED = "as released: maps kept"


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(WindowAttention(WIDTH, WINDOW, HEADS), ChannelAttention(WIDTH, HEADS))


def released(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Products, softmax and products again; windows and heads by permutations of whole maps."""
    window: Any = layers[0]
    channel: Any = layers[1]
    b, side, _, c = x.shape
    count, scale = side // WINDOW, (WIDTH // HEADS) ** -0.5
    parts = x.view(b, count, WINDOW, count, WINDOW, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, WINDOW**2, c)
    q, k, v = window.qkv(parts).view(*parts.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    out = ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    parts = window.proj(out.transpose(1, 2).reshape(parts.shape)).view(b, count, count, WINDOW, WINDOW, c)
    x = parts.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, side * side, c)
    q, k, v = channel.qkv(x).view(b, side * side, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    weights = ((k * scale).transpose(-1, -2) @ v).softmax(-1)
    out = (weights @ q.transpose(-1, -2)).transpose(-1, -2)
    return channel.proj(out.transpose(1, 2).reshape(x.shape)).view(b, side, side, c)


def work(side: int, as_released: bool) -> Work:
    return of_module(pair(), draw((1, side, side, WIDTH))[0], function=released if as_released else None)


def softmax(side: int) -> Way:
    def make() -> Work:
        torch.manual_seed(0)
        layers = nn.Sequential(SoftmaxAttention(WIDTH, HEADS), SoftmaxAttention(WIDTH, HEADS))
        return of_module(layers, draw((1, side * side, WIDTH))[0])

    return make


def ways(side: int) -> dict[str, Way]:
    return {OURS: partial(work, side, False), RELEASED: partial(work, side, True)}


def operations(side: int) -> float:
    n = side * side
    return 2 * 8 * n * WIDTH**2 + 4 * n * WIDTH * (WINDOW**2 + WIDTH // HEADS)


PARTS = [
    Part(
        "DaViT, window and channel",
        SIDES,
        lambda side: f"{side} x {side}",
        ways,
        (RELEASED,),
        softmax,
        operations,
        lambda side: side * side,
    )
]


@torch.no_grad()
def check() -> None:
    """The released formulation gives the same."""
    bound = 1e-5 if setting.dtype == "float32" else 3e-2
    torch.testing.assert_close(work(28, True)[0](), work(28, False)[0](), atol=bound, rtol=1e-3)


def benchmark() -> Benchmark:
    return benchmark_of("davit", PARTS, check)
