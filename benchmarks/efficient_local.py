"""Efficient local attention on maps of 256 x 56 x 56, beside squeeze-and-excitation and the plain equations."""

from functools import partial

import torch
from torch import nn

from benchmarks import Benchmark, Variant, setting
from headwise.attention import EfficientLocalAttention
from headwise.papers._ela_setup import CoordinateAttention, SqueezeExcite

SHAPE = (8, 256, 56, 56)
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def place() -> dict:
    return {"device": setting.device, "dtype": getattr(torch, setting.dtype)}


def image(layout: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator).to(**place()).contiguous(memory_format=FORMATS[layout])


def plain(module: EfficientLocalAttention, x: torch.Tensor) -> torch.Tensor:
    """As public implementations write it."""
    rows, columns = (module.norm(module.conv(z)).sigmoid() for z in (x.mean(3), x.mean(2)))
    return x * rows.unsqueeze(3) * columns.unsqueeze(2)


def variants(layout: str) -> list[Variant]:
    torch.manual_seed(0)
    ours = EfficientLocalAttention(SHAPE[1]).to(**place()).eval()

    def timed(module: nn.Module):
        def make():
            moved, x = module.to(**place()).eval(), image(layout)
            return torch.no_grad()(lambda: moved(x))

        return make

    def equations():
        x = image(layout)
        return torch.no_grad()(lambda: plain(ours, x))

    return [
        Variant("squeeze and excitation", timed(SqueezeExcite(SHAPE[1], 16))),
        Variant("headwise ELA-B", timed(ours)),
        Variant("ELA-B, plain equations", equations),
        Variant("coordinate attention", timed(CoordinateAttention(SHAPE[1], 32))),
    ]


@torch.no_grad()
def check() -> None:
    torch.manual_seed(0)
    module = EfficientLocalAttention(SHAPE[1]).to(**place())
    bound = 1e-5 if setting.dtype == "float32" else 5e-2
    for layout in FORMATS:
        x = image(layout)[:1]
        torch.testing.assert_close(module(x), plain(module, x), atol=bound, rtol=bound)


def benchmark() -> Benchmark:
    return Benchmark("efficient_local", {layout: partial(variants, layout) for layout in FORMATS}, check)
