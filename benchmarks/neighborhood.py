"""Neighbourhood attention on images and on sequences, beside a matrix product of as many operations, the gathered keys
of the paper's naive form, and NATTEN where it is installed and there is a GPU.

Four heads of 32 channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import Benchmark, Variant, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, scaled_dot_product, timed
from headwise.attention import neighborhood_attention, neighborhood_backends
from headwise.attention.neighborhood import _window_index, axes_of
from headwise.papers._neighborhood_setup import gather_products

HEADS, SIZE = 4, 32
Problem = tuple[tuple[int, ...], int]
IMAGES: tuple[Problem, ...] = (((28, 28), 7), ((56, 56), 7), ((112, 112), 7))
SEQUENCES: tuple[Problem, ...] = (((1024,), 256), ((4096,), 256), ((8192,), 256))
TORCH, GATHERED = "headwise, torch alone", "gathered keys"
NATTEN, FLEX = "NATTEN", "headwise, FlexAttention"
MOST_GATHERED = 150 * 2**20  # bytes of keys


def tensors(grid: tuple[int, ...], gradients: bool = True) -> list[Tensor]:
    shape = (1, HEADS, *grid, SIZE)
    return draw(shape, shape, shape, gradients=gradients)


def ours(problem: Problem, backend: str = "auto") -> Work:
    grid, kernel = problem
    q, k, v = tensors(grid)
    attend: Callable[..., Any] = neighborhood_attention
    return partial(attend, q, k, v, kernel, layout="heads_first", backend=backend), (q, k, v)


def gathered(problem: Problem) -> Work:
    grid, kernel = problem
    attend = gather_products(_window_index(axes_of(grid, kernel), torch.device(setting.device)))
    q, k, v = tensors(grid)
    return partial(attend, q, k, v), (q, k, v)


def pairs(problem: Problem) -> int:
    grid, kernel = problem
    return torch.Size(grid).numel() * kernel ** len(grid) * HEADS


def ways(problem: Problem) -> dict[str, Way]:
    found: dict[str, Way] = {OURS: partial(ours, problem)}
    if setting.device.startswith("cuda"):
        found[FLEX] = partial(ours, problem, "flex")
        if neighborhood_backends()["natten"] is None:
            found[NATTEN] = partial(ours, problem, "natten")
    found[TORCH] = partial(ours, problem, "tiled")
    if pairs(problem) * SIZE * 4 <= MOST_GATHERED:
        found[GATHERED] = partial(gathered, problem)
    return found


def label(problem: Problem) -> str:
    grid, kernel = problem
    return f"{' x '.join(map(str, grid))}, kernel {kernel}"


def tokens(problem: Problem) -> int:
    return torch.Size(problem[0]).numel()


PARTS = [
    Part(
        f"neighborhood {axes}-D",
        problems,
        label,
        ways,
        (GATHERED, NATTEN),
        lambda problem: scaled_dot_product(1, HEADS, tokens(problem), SIZE),
        lambda problem: 4 * pairs(problem) * SIZE,
        tokens,
    )
    for axes, problems in ((2, IMAGES), (1, SEQUENCES))
]


def backend(grid: tuple[int, ...], kernel: int, name: str) -> Callable[[], Any]:
    return timed(partial(ours, (grid, kernel), name), False)


def backends(grid: tuple[int, ...], kernel: int) -> list[Variant]:
    known = neighborhood_backends()
    on_gpu = setting.device.startswith("cuda")
    return [
        Variant("tiled", partial(backend, grid, kernel, "tiled")),
        Variant("C++ kernel", partial(backend, grid, kernel, "cpp"), known["cpp"] or ("on a GPU" if on_gpu else None)),
        Variant("FlexAttention", partial(backend, grid, kernel, "flex"), None if on_gpu else "for CUDA"),
        Variant(
            "NATTEN", partial(backend, grid, kernel, "natten"), known["natten"] or (None if on_gpu else "for CUDA")
        ),
    ]


@torch.no_grad()
def check() -> None:
    """All give the same on a small grid."""
    q, k, v = tensors((17, 19), gradients=False)
    expected: Any = neighborhood_attention(q, k, v, 5, layout="heads_first", backend="reference")
    bound = 1e-4 if setting.dtype == "float32" else 5e-2
    for name in ("auto", "tiled"):
        found: Any = neighborhood_attention(q, k, v, 5, layout="heads_first", backend=name)
        torch.testing.assert_close(found, expected, atol=bound, rtol=bound)
    torch.testing.assert_close(gathered(((17, 19), 5))[0](), expected, atol=bound, rtol=bound)


def benchmark() -> Benchmark:
    more = {f"backends, {label(one)}": partial(backends, *one) for one in (IMAGES[1], ((128, 128), 7), SEQUENCES[2])}
    return benchmark_of("neighborhood", PARTS, check, more)
