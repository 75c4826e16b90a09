"""Class semantics-based attention over time, beside its equations with each branch's copy of the features kept, and
softmax attention over the steps at equal shape. 256 channels, scores of 20 classes, batch 4.

The network around it is in `boundary_matching`.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks import Benchmark, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, of_module, scaled_dot_product
from headwise.attention import ClassSemanticsAttention

BATCH, CHANNELS, CLASSES, HEADS, KERNEL = 4, 256, 20, 4, 3
STEPS = (100, 400, 1600, 6400)
EQUATIONS = "as in the paper: two attended copies"


def equations(module: ClassSemanticsAttention, features: Tensor, semantics: Tensor) -> Tensor:
    assert module.channel is not None and module.time is not None
    channel = module.channel(semantics.mean(2)).sigmoid()[..., None].expand_as(features)
    return channel * features + module.time(semantics).sigmoid() * features


def work(steps: int, plain: bool) -> Work:
    torch.manual_seed(0)
    module = ClassSemanticsAttention(CLASSES, CHANNELS, kernel_size=KERNEL)
    given = draw((BATCH, CHANNELS, steps), (BATCH, CLASSES, steps))
    return of_module(module, *given, function=equations if plain else None)


def ways(steps: int) -> dict[str, Way]:
    return {OURS: partial(work, steps, False), EQUATIONS: partial(work, steps, True)}


PARTS = [
    Part(
        "class semantics",
        STEPS,
        "{} steps".format,
        ways,
        (EQUATIONS,),
        lambda steps: scaled_dot_product(BATCH, HEADS, steps, CHANNELS // HEADS),
        lambda steps: BATCH * steps * CHANNELS * (2 * KERNEL * CLASSES + 4),
        int,
        most=1600,
    )
]


@torch.no_grad()
def check() -> None:
    """The equations give the same."""
    bound = 1e-5 if setting.dtype == "float32" else 3e-2
    torch.testing.assert_close(work(100, True)[0](), work(100, False)[0](), atol=bound, rtol=1e-3)


def benchmark() -> Benchmark:
    return benchmark_of("class_semantics", PARTS, check)
