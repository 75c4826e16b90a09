"""Gaussian adaptive attention with five Gaussians a head: one softmax, beside the loop over Gaussians as released."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks import Benchmark, Variant, setting
from headwise.attention import GaussianAdaptiveAttention

INPUTS = {"8 x 512 x 768, over features": ((8, 512, 768), -1), "1 x 8192 x 256, over time": ((1, 8192, 256), 1)}
HEADS, GAUSSIANS = 4, 5


def prepared(label: str, count: int = GAUSSIANS) -> tuple[GaussianAdaptiveAttention, torch.Tensor]:
    shape, dim = INPUTS[label]
    torch.manual_seed(0)
    module = GaussianAdaptiveAttention(HEADS, count, dim, width_init=2.0)
    place = {"device": setting.device, "dtype": getattr(torch, setting.dtype)}
    return module.to(**place), torch.randn(shape).to(**place)


def released(module: GaussianAdaptiveAttention, x: torch.Tensor) -> torch.Tensor:
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


def variants(label: str) -> list[Variant]:
    def make(count: int, function: Callable[..., object] | None) -> Callable[[], object]:
        module, x = prepared(label, count)
        return torch.no_grad()(partial(function, module, x) if function else partial(module, x))

    return [
        Variant("loop, as released", partial(make, GAUSSIANS, released)),
        Variant("headwise", partial(make, GAUSSIANS, None)),
        Variant("headwise, 1 Gaussian", partial(make, 1, None)),
        Variant("softmax alone", partial(make, 1, lambda module, x: x.softmax(module.dim))),
    ]


@torch.no_grad()
def check() -> None:
    for label in INPUTS:
        module, x = prepared(label)
        torch.testing.assert_close(module(x), released(module, x), atol=1e-5, rtol=1e-3)


def benchmark() -> Benchmark:
    return Benchmark("gaussian_adaptive", {label: partial(variants, label) for label in INPUTS}, check)
