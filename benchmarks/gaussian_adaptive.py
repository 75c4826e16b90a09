"""Gaussian adaptive attention with five Gaussians a head: one softmax, beside the loop over Gaussians as released.

Four heads over features of width 256, batch 8, from 128 to 8,192 steps; and over time, once.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks import Benchmark, Variant, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, of_module, scaled_dot_product, timed
from headwise.attention import GaussianAdaptiveAttention

HEADS, GAUSSIANS, BATCH, WIDTH = 4, 5, 8, 256
STEPS = (128, 512, 2048, 8192)
RELEASED = "as released: loops over heads and Gaussians"


def prepared(shape: tuple[int, ...], dim: int, count: int = GAUSSIANS) -> tuple[GaussianAdaptiveAttention, Tensor]:
    torch.manual_seed(0)
    return GaussianAdaptiveAttention(HEADS, count, dim, width_init=2.0), draw(shape)[0]


def released(module: GaussianAdaptiveAttention, x: Tensor) -> Tensor:
    """Head after head, Gaussian after Gaussian, the product over its sum."""
    outputs = []
    for head, part in enumerate(x.chunk(HEADS, module.dim)):
        mean, var = part.mean(module.dim, keepdim=True), part.var(module.dim, keepdim=True) + 1e-8
        product = torch.ones_like(part)
        for k in range(module.num_gaussians):
            square = module.log_width[head, k].exp().square()
            z = (part - mean - module.offset[head, k]) / var.sqrt()
            product = product * (torch.exp(-(z**2) / (2 * square)) / torch.sqrt(2 * torch.pi * square))
        outputs.append(part * (product / product.sum(module.dim, keepdim=True).clamp(min=1e-8)))
    return torch.cat(outputs, module.dim)


def work(shape: tuple[int, ...], dim: int, loops: bool, count: int = GAUSSIANS) -> Work:
    return of_module(*prepared(shape, dim, count), function=released if loops else None)


def ways(steps: int) -> dict[str, Way]:
    shape = (BATCH, steps, WIDTH)
    return {OURS: partial(work, shape, -1, False), RELEASED: partial(work, shape, -1, True)}


PARTS = [
    Part(
        "gaussian adaptive",
        STEPS,
        "{} steps".format,
        ways,
        (RELEASED,),
        lambda steps: scaled_dot_product(BATCH, HEADS, steps, WIDTH // HEADS),
        lambda steps: BATCH * steps * WIDTH * (4 * GAUSSIANS + 8),  # of each number: statistics, Gaussians, softmax
        int,
        most=2048,
    )
]


def over_time() -> list[Variant]:
    shape = (1, 8192, WIDTH)
    alone = draw(shape, gradients=False)[0]
    return [
        Variant(RELEASED, lambda: timed(partial(work, shape, 1, True), False)),
        Variant("headwise", lambda: timed(partial(work, shape, 1, False), False)),
        Variant("headwise, 1 Gaussian", lambda: timed(partial(work, shape, 1, False, 1), False)),
        Variant("softmax alone", lambda: torch.no_grad()(partial(alone.softmax, 1))),
    ]


@torch.no_grad()
def check() -> None:
    bound = 1e-5 if setting.dtype == "float32" else 3e-2
    for shape, dim in (((2, 64, WIDTH), -1), ((1, 512, 64), 1)):
        ours, theirs = (work(shape, dim, loops)[0]() for loops in (False, True))
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=1e-3)


def benchmark() -> Benchmark:
    return benchmark_of("gaussian_adaptive", PARTS, check, {f"1 x 8192 x {WIDTH}, over time": over_time})
