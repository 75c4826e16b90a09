"""BMN's samples of every segment and the convolution over them: the official order against kernel first, at 50 steps.

The official order multiplies by a dense matrix and convolves 32 samples of each of 2,500 pairs.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import Benchmark, Variant, setting
from headwise.models.boundary_matching import BoundaryMatchingConfig, BoundaryMatchingNetwork
from headwise.ops.boundary_matching import boundary_pairs, boundary_samples

STEPS, BINS = 50, 32


@cache
def network() -> Any:
    torch.manual_seed(0)
    made: Any = BoundaryMatchingNetwork(BoundaryMatchingConfig(temporal_scale=STEPS)).eval()
    return made.to(setting.device)


@cache
def features() -> Tensor:
    return torch.randn(1, 256, STEPS, generator=torch.Generator().manual_seed(0)).to(setting.device)


def official() -> Callable[[], Any]:
    starts, ends = boundary_pairs(STEPS)
    weights = torch.zeros(BINS, STEPS, STEPS, STEPS)
    weights[:, :, starts, ends] = boundary_samples(STEPS).to_dense().view(-1, BINS, STEPS).permute(1, 2, 0)
    dense, convolution = weights.transpose(0, 1).reshape(STEPS, -1).to(setting.device), network().sample_conv

    @torch.no_grad()
    def run() -> Tensor:
        samples = (features() @ dense).view(1, 256, BINS, STEPS, STEPS)
        return convolution(samples).squeeze(2)

    return run


def kernel_first() -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Tensor:
        return network()._segments(features())

    return run


def check() -> None:
    """Both orders give the same numbers."""
    reference = official()()
    torch.testing.assert_close(kernel_first()(), reference, rtol=1e-3, atol=1e-4)


def variants() -> list[Variant]:
    return [Variant("official order, dense", official), Variant("kernel first, sparse", kernel_first)]


def benchmark() -> Benchmark:
    return Benchmark("boundary_matching", {f"one video, {STEPS} steps, official widths": variants}, check, rounds=3)
