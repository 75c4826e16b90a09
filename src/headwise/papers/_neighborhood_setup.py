"""The kernels that neighborhood_attention.py compares, and how their time and memory are measured.

Naive: the keys of every query are gathered. Unfused: batched matrix products over tiles, with all weights kept between
the steps. Fused: what `neighborhood_attention` does without the C++ kernel. All give the same numbers.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headwise.attention._neighborhood_axes import Axis, groups_of, plan_of
from headwise.attention._neighborhood_tiles import _box, _take, tiles_forward
from headwise.attention.neighborhood import _window_index, axes_of, neighborhood_attention
from headwise.papers.running import Run

HEADS, SIZE, ROUNDS = 4, 32, 7
PROBLEMS = {
    1: [((1024,), 32), ((2048,), 64), ((3072,), 96)],
    2: [((28, 28), 7), ((56, 56), 7), ((48, 48), 11)],
}
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(grid: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, heads: int = HEADS, size: int = SIZE):
    """Heads-first q, k, v `[1 h *S d]`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, *grid, size, generator=generator).to(dtype) for _ in range(3)]


def gather_products(index: Tensor) -> Kernel:
    """Naive: keys and values of every query gathered, one matrix-vector product each. Without causal axes."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rank = q.ndim - 3
        fq, fk, fv = (x.flatten(2, 1 + rank) for x in (q, k, v))
        weights = (fk[:, :, index] @ (fq * q.shape[-1] ** -0.5)[..., None])[..., 0].softmax(-1)
        return (weights[..., None, :] @ fv[:, :, index])[..., 0, :].unflatten(2, q.shape[2:-1])

    return attend


def gather_sums(index: Tensor) -> Kernel:
    """Naive: the same with products element by element, and sums."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rank = q.ndim - 3
        fq, fk, fv = (x.flatten(2, 1 + rank) for x in (q, k, v))
        weights = (fk[:, :, index] * (fq * q.shape[-1] ** -0.5)[:, :, :, None]).sum(-1).softmax(-1)
        return (weights[..., None] * fv[:, :, index]).sum(-2).unflatten(2, q.shape[2:-1])

    return attend


def unfused(axes: list[Axis]) -> Kernel:
    """Batched matrix products: scores of all tiles, then their softmax, then all outputs."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, scale = q.new_empty(*q.shape[:-1], v.shape[-1]), q.shape[-1] ** -0.5
        work = []
        for where, inner in groups_of(axes):
            places = (slice(None), slice(None), *where)
            gq, gk, gv, go = (x[places] for x in (q, k, v, out))
            plan = plan_of(inner)
            for tile in plan.tiles:
                rows, columns = _take(gq, tile.queries), _take(gk, tile.keys)
                b, h, t, d = rows.shape
                flat = rows.reshape(b * h, t, d), columns.reshape(b * h, -1, d)
                mask = plan.mask(tile, q)
                if mask is None:
                    scores = torch.bmm(flat[0], flat[1].mT) * scale
                else:
                    scores = torch.baddbmm(mask[0], flat[0], flat[1].mT, alpha=scale)
                work.append((scores, _take(gv, tile.keys).reshape(b * h, -1, v.shape[-1]), _box(go, tile.queries)))
        weights = [scores.softmax(-1) for scores, _, _ in work]
        for one, (_, values, target) in zip(weights, work, strict=True):
            target.copy_(torch.bmm(one, values).view(target.shape))
        return out

    return attend


def fused(axes: list[Axis]) -> Kernel:
    """The tiles as they are."""
    return lambda q, k, v: tiles_forward(q, k, v, None, axes, q.shape[-1] ** -0.5)[0]


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Self attention over all tokens."""
    rank = q.ndim - 3
    flat = [x.flatten(2, 1 + rank) for x in (q, k, v)]
    return scaled_dot_product_attention(flat[0], flat[1], flat[2]).unflatten(2, q.shape[2:-1])


def products(operations: int, dtype: torch.dtype) -> Callable[[], Any]:
    """Square matrix products with about so many operations together."""
    a = torch.randn(192, 192).to(dtype)
    times = max(1, round(operations / (2 * 192**3)))

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, a)

    return multiply


def seconds(functions: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Least processor time of each, run in turn on one thread; calls of less than 30 ms three times a turn, since one
    disturbance by another process is as long as they are."""
    before, best = torch.get_num_threads(), dict.fromkeys(functions, float("inf"))
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for name in [*functions] * rounds:
                for _ in range(3 if best[name] < 0.03 else 1):
                    start = time.process_time()
                    functions[name]()
                    best[name] = min(best[name], time.process_time() - start)
    finally:
        torch.set_num_threads(before)
    return best


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is(x)}
        out = func(*args, **(kwargs or {}))
        self._known = {key: one for key, one in self._known.items() if not one[0].expired()}
        for x in tree_leaves(out):
            storage = x.untyped_storage() if _is(x) else None
            if storage is not None and storage._cdata not in self._known and storage._cdata not in given:
                self._known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self._known.values()))
        return out


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def held(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Bytes that a kernel holds beside its inputs and its output (and log-sum-exp, where it makes one)."""
    with torch.no_grad():
        kernel(q, k, v)  # masks are made
        with Held() as counted:
            out = kernel(q, k, v)
    return counted.most - out.nbytes


@dataclass
class Timed:
    """One problem in one dtype: seconds of each kernel, and bytes that they hold."""

    rank: int
    grid: tuple[int, ...]
    kernel: int
    dtype: str
    seconds: dict[str, float] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return int(torch.tensor(self.grid).prod())

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head."""
        return self.tokens * self.kernel**self.rank

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.grid))} k{self.kernel}"

    @property
    def naive(self) -> float:
        """The faster of the two ways to gather."""
        return min(self.seconds["gathered products"], self.seconds["gathered sums"])

    def improvement(self, kernel: str) -> float:
        """What a kernel improves on the naive one by, in percent."""
        return 100 * (self.naive / self.seconds[kernel] - 1)


def time_problems(run: Run) -> list[Timed]:
    """Every kernel on every problem in float32 and bfloat16; their outputs are compared first."""
    found = []
    work = [(rank, grid, k, d) for rank, some in PROBLEMS.items() for grid, k in some for d in ("float32", "bfloat16")]
    for rank, grid, size, name in run.progress(work, "timing"):
        dtype, axes = getattr(torch, name), axes_of(grid, size)
        q, k, v = inputs(grid, run.seed, dtype)
        index = _window_index(axes, q.device)
        kernels: dict[str, Kernel] = {
            "gathered products": gather_products(index),
            "gathered sums": gather_sums(index),
            "unfused": unfused(axes),
            "fused": fused(axes),
        }
        one = Timed(rank, grid, size, name)
        reference: Any = neighborhood_attention(
            q.float(), k.float(), v.float(), size, layout="heads_first", backend="tiled"
        )
        for label, kernel in kernels.items():
            apart = float((kernel(q, k, v).float() - reference).abs().max())
            if apart > (1e-4 if name == "float32" else 0.1):
                raise RuntimeError(f"{one.name}, {name}: {label} differs from the definition by {apart:.1e}")
        one.held = {label: held(kernel, q, k, v) for label, kernel in kernels.items()}
        calls: dict[str, Callable[[], Any]] = {
            label: (lambda kernel=kernel, x=(q, k, v): kernel(*x)) for label, kernel in kernels.items()
        }
        calls["self attention"] = lambda x=(q, k, v): full(*x)
        calls["matrix product"] = products(4 * one.pairs * HEADS * SIZE, dtype)
        one.seconds = seconds(calls)
        found.append(one)
    return found


def random_axes(rank: int, draw: random.Random) -> list[Axis]:
    """A small grid with a rule of its own on every axis; the rules of the first two differ."""
    limit = {1: 60, 2: 14, 3: 7}[rank]
    axes: list[Axis] = []
    while len(axes) < rank:
        length = draw.randint(4, limit)
        dilation = draw.randint(1, 2)
        kernel = draw.randint(2, length // dilation)
        axis = Axis(length, kernel, draw.randint(1, kernel), dilation, draw.random() < 0.3)
        if not axes or axis != axes[0]:
            axes.append(axis)
    return axes


def rules(axes: list[Axis]) -> dict[str, Any]:
    """The settings of axes as arguments of `neighborhood_attention`."""
    return {
        "kernel_size": [axis.kernel for axis in axes],
        "stride": [axis.stride for axis in axes],
        "dilation": [axis.dilation for axis in axes],
        "is_causal": [axis.causal for axis in axes],
    }
