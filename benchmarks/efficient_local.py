"""Efficient local attention (ELA-B) on maps of 256 channels, batch 8, beside the plain equations as public code has
them, other gates of the literature, and softmax attention over the map's tokens; on 56 x 56 also with channels last.
"""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import Benchmark, Variant, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, of_module, scaled_dot_product, timed
from headwise.attention import EfficientLocalAttention
from headwise.papers._ela_setup import CoordinateAttention, SqueezeExcite

BATCH, CHANNELS, HEADS = 8, 256, 4
SIDES = (14, 28, 56)
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
EQUATIONS = "plain equations"


def plain(module: EfficientLocalAttention, x: Tensor) -> Tensor:
    """As public implementations write it."""
    rows, columns = (module.norm(module.conv(z)).sigmoid() for z in (x.mean(3), x.mean(2)))
    return x * rows.unsqueeze(3) * columns.unsqueeze(2)


MODULES = {
    OURS: (lambda: EfficientLocalAttention(CHANNELS), None),
    EQUATIONS: (lambda: EfficientLocalAttention(CHANNELS), plain),
    "squeeze and excitation": (lambda: SqueezeExcite(CHANNELS, 16), None),
    "coordinate attention": (lambda: CoordinateAttention(CHANNELS, 32), None),
}


def work(side: int, name: str, layout: str = "contiguous") -> Work:
    torch.manual_seed(0)
    made, function = MODULES[name]
    module: nn.Module = made().eval()
    x = draw((BATCH, CHANNELS, side, side), gradients=False)[0].contiguous(memory_format=FORMATS[layout])
    return of_module(module, x.requires_grad_(), function=function)


def ways(side: int) -> dict[str, Way]:
    return {name: partial(work, side, name) for name in MODULES}


def operations(side: int) -> float:
    """Two means and two products of the map, and the convolution of two strips."""
    weight = EfficientLocalAttention(CHANNELS).conv.weight
    return BATCH * CHANNELS * (4 * side * side + 2 * side * 2 * weight[0].numel())


PARTS = [
    Part(
        "efficient local, ELA-B",
        SIDES,
        lambda side: f"{side} x {side}",
        ways,
        (EQUATIONS,),
        lambda side: scaled_dot_product(BATCH, HEADS, side * side, CHANNELS // HEADS),
        operations,
        lambda side: side * side,
        most=1024,
    )
]


def layouts(layout: str) -> list[Variant]:
    names = ("squeeze and excitation", OURS, EQUATIONS, "coordinate attention")
    return [Variant(name, lambda name=name: timed(partial(work, 56, name, layout), False)) for name in names]


@torch.no_grad()
def check() -> None:
    bound = 1e-5 if setting.dtype == "float32" else 5e-2
    for layout in FORMATS:
        ours, theirs = (work(14, name, layout)[0]() for name in (OURS, EQUATIONS))
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound)


def benchmark() -> Benchmark:
    return benchmark_of("efficient_local", PARTS, check, {f"56 x 56, {one}": partial(layouts, one) for one in FORMATS})
