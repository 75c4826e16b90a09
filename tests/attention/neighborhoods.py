"""The definition of neighbourhoods once more, by counting, and cases of them that are drawn."""

import itertools

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from headwise.attention import _neighborhood_cpp as cpp

NO_CPP = cpp.unavailable()
needs_cpp = pytest.mark.skipif(NO_CPP is not None, reason=f"the C++ kernel: {NO_CPP}")


# The definition, once more and by counting: nearest keys of the same residue, moved in at the border.


def neighbours(i: int, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> list[int]:
    same = [j for j in range(length) if j % dilation == i % dilation]
    x = same.index(i)
    block = list(range(x - x % stride, min(x - x % stride + stride, len(same))))
    if causal:
        leader = min(x - x % stride + stride - 1, len(same) - 1)
        return [same[y] for y in range(len(same)) if leader - kernel < y <= x]
    leader = block[min(stride // 2, len(block) - 1)]
    wanted = list(range(leader - kernel // 2, leader - kernel // 2 + kernel))
    while wanted[0] < 0:
        wanted = [y + 1 for y in wanted]
    while wanted[-1] >= len(same):
        wanted = [y - 1 for y in wanted]
    return [same[y] for y in wanted]


def by_loops(q: Tensor, k: Tensor, v: Tensor, rules: list[tuple], bias: Tensor | None = None) -> Tensor:
    """q `[b *S h d]`, one softmax at a time; rules: (kernel, stride, dilation, causal) of every axis."""
    grid = q.shape[1:-2]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for place in itertools.product(*(range(n) for n in grid)):
        axes = [neighbours(i, n, *rule) for i, n, rule in zip(place, grid, rules, strict=True)]
        keys = list(itertools.product(*axes))
        for h in range(q.shape[-2]):
            n = h * k.shape[-2] // q.shape[-2]
            scores = torch.stack([(q[:, *place, h] * k[:, *j, n]).sum(-1) for j in keys], -1) / q.shape[-1] ** 0.5
            if bias is not None:
                at = [[(b - a) // r[2] + r[0] - 1 for a, b, r in zip(place, j, rules, strict=True)] for j in keys]
                scores = scores + torch.stack([bias[h, *one] for one in at])
            weights = scores.softmax(-1)
            out[:, *place, h] = sum(weights[:, i, None] * v[:, *j, n] for i, j in enumerate(keys))
    return out


def tensors(grid: tuple[int, ...], heads: int = 2, kv: int = 2, size: int = 8, e: int | None = None, **kwargs):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, size), (kv, size), (kv, e or size))
    return [torch.randn(2, *grid, *shape, generator=generator, dtype=torch.float64, **kwargs) for shape in shapes]


@st.composite
def cases(draw):
    """A grid and a rule for each of its axes, of any kind that is allowed."""
    rank = draw(st.integers(1, 3))
    axes = []
    for _ in range(rank):
        length = draw(st.integers(1, {1: 40, 2: 11, 3: 5}[rank]))
        dilation = draw(st.integers(1, min(3, length)))
        kernel = draw(st.integers(1, length // dilation))
        axes.append((length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())))
    return axes


def options(axes: list[tuple]) -> tuple[tuple[int, ...], tuple[int, ...], dict]:
    grid, kernel, stride, dilation, causal = zip(*axes, strict=True)
    return grid, kernel, {"stride": stride, "dilation": dilation, "is_causal": causal}
