"""Neighbourhood attention on one image and one sequence, as a ratio to a matrix product of as many operations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import Benchmark, Variant, setting
from headwise.attention import neighborhood_attention, neighborhood_backends
from headwise.papers._neighborhood_setup import full, gather_products, products

HEADS, SIZE = 4, 32
INPUTS = {
    "56 x 56, kernel 7": ((56, 56), 7),
    "128 x 128, kernel 7": ((128, 128), 7),
    "8192, kernel 256": ((8192,), 256),
}


def tensors(grid: tuple[int, ...], gradients: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, HEADS, *grid, SIZE, generator=generator) for _ in range(3)]
    return [x.to(setting.device, getattr(torch, setting.dtype)).requires_grad_(gradients) for x in made]


def product(grid: tuple[int, ...], kernel: int) -> Callable[[], Any]:
    operations = 4 * torch.Size(grid).numel() * kernel ** len(grid) * HEADS * SIZE
    return products(operations, getattr(torch, setting.dtype))


def ours(grid: tuple[int, ...], kernel: int, backend: str) -> Callable[[], Any]:
    q, k, v = tensors(grid)
    return torch.no_grad()(lambda: neighborhood_attention(q, k, v, kernel, layout="heads_first", backend=backend))


def trained(grid: tuple[int, ...], kernel: int) -> Callable[[], Any]:
    q, k, v = tensors(grid, True)

    def both() -> Any:
        out: Any = neighborhood_attention(q, k, v, kernel, layout="heads_first")
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return both


def gathered(grid: tuple[int, ...], kernel: int) -> Callable[[], Any]:
    from headwise.attention.neighborhood import _window_index, axes_of

    attend, given = gather_products(_window_index(axes_of(grid, kernel), torch.device(setting.device))), tensors(grid)
    return torch.no_grad()(lambda: attend(*given))


def everything(grid: tuple[int, ...]) -> Callable[[], Any]:
    given = tensors(grid)
    return torch.no_grad()(lambda: full(*given))


def variants(grid: tuple[int, ...], kernel: int) -> list[Variant]:
    large = torch.Size(grid).numel() * kernel ** len(grid) * HEADS * SIZE * 8 > 2**31
    known = neighborhood_backends()
    on_gpu = setting.device.startswith("cuda")
    return [
        Variant("matrix product", partial(product, grid, kernel), "on the CPU only" if on_gpu else None),
        Variant("tiled", partial(ours, grid, kernel, "tiled")),
        Variant("C++ kernel", partial(ours, grid, kernel, "cpp"), known["cpp"] or ("for the CPU" if on_gpu else None)),
        Variant("FlexAttention", partial(ours, grid, kernel, "flex"), None if on_gpu else "for CUDA"),
        Variant("NATTEN", partial(ours, grid, kernel, "natten"), known["natten"] or (None if on_gpu else "for CUDA")),
        Variant("forward and backward", partial(trained, grid, kernel)),
        Variant("gathered keys", partial(gathered, grid, kernel), "more than 2 GiB of keys" if large else None),
        Variant("self attention", partial(everything, grid)),
    ]


def check() -> None:
    """All give the same on a small grid."""
    q, k, v = tensors((17, 19))
    expected: Any = neighborhood_attention(q, k, v, 5, layout="heads_first", backend="reference")
    for backend in ("auto", "tiled"):
        found: Any = neighborhood_attention(q, k, v, 5, layout="heads_first", backend=backend)
        bound = 1e-4 if setting.dtype == "float32" else 5e-2
        torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


def benchmark() -> Benchmark:
    return Benchmark("neighborhood", {name: partial(variants, *given) for name, given in INPUTS.items()}, check)
