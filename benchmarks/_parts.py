"""Mechanisms at growing sizes: how a module of this folder says what is timed, for itself and for `attention`.

A `Part` is one mechanism: its ways of doing the work, softmax attention at equal shape, and how many operations the
formula promises. From it come inputs for each size, once forward and once as a training step, each beside a matrix
product of as many operations (three times as many in a step), which is the baseline of every ratio.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import Benchmark, Row, Variant, setting

OURS, SOFTMAX, PRODUCT = "headwise", "softmax attention (SDPA)", "matrix product of as many operations"
PASSES = ("forward", "training step")

# What is timed, and the leaves whose gradients a training step takes.
Work = tuple[Callable[[], Any], Sequence[Tensor]]
Way = Callable[[], Work]


@dataclass(frozen=True)
class Part:
    """One mechanism. name: of the mechanism, and what of it where there are several parts. sizes: from small to large.

    label: names a size. ways: of a size, by name, `OURS` first; what is no other way of ours is a peer. peers: names of
    the ways that do the same work elsewhere (the official formulation, an installed package). softmax: attention at
    equal shape, as a user would write it. operations: of a forward, multiply-adds counted twice. most: the largest size
    at which softmax attention is timed on a CPU. promises: the formula promises a size from which ours is ahead of it.
    """

    name: str
    sizes: tuple[Any, ...]
    label: Callable[[Any], str]
    ways: Callable[[Any], dict[str, Way]]
    peers: tuple[str, ...]
    softmax: Callable[[Any], Way]
    operations: Callable[[Any], float]
    tokens: Callable[[Any], int]
    most: int = 4096
    promises: bool = True
    training: bool = True

    def passes(self) -> tuple[str, ...]:
        return PASSES if self.training else PASSES[:1]


def inputs_of(parts: Sequence[Part]) -> dict[str, Callable[[], list[Variant]]]:
    """Every part at every size, forward and as a training step."""
    return {
        label_of(part, size, step): partial(variants_of, part, size, step == PASSES[1])
        for part in parts
        for step in part.passes()
        for size in part.sizes
    }


def label_of(part: Part, size: Any, step: str) -> str:
    return f"{part.name}, {part.label(size)}, {step}"


def variants_of(part: Part, size: Any, step: bool) -> list[Variant]:
    slow = setting.device == "cpu" and part.tokens(size) > part.most
    product = partial(products, part.operations(size) * (3 if step else 1))
    return [
        Variant(PRODUCT, product),
        *(Variant(name, partial(timed, way, step)) for name, way in part.ways(size).items()),
        Variant(SOFTMAX, partial(timed, part.softmax(size), step), "seconds a call on a CPU" if slow else None),
    ]


def timed(way: Way, step: bool) -> Callable[[], Any]:
    """The function of a way: without gradients, or with those of its leaves."""
    function, leaves = way()
    if not step:
        for leaf in leaves:  # as in use: what could ask for a gradient keeps torch from fused kernels
            leaf.requires_grad_(False)
        return torch.no_grad()(function)

    def both() -> Any:
        out = function()
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return both


def place() -> dict[str, Any]:
    return {"device": setting.device, "dtype": getattr(torch, setting.dtype)}


def draw(*shapes: Sequence[int], seed: int = 0, gradients: bool = True) -> list[Tensor]:
    """Tensors of N(0, 1), the same on every device; leaves of a training step."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator).to(**place()) for shape in shapes]
    return [one.requires_grad_(gradients) for one in made]


def of_module(module: nn.Module, *inputs: Tensor, function: Callable[..., Tensor] | None = None) -> Work:
    """A module (or a function of it and its inputs) as a way; a step has the gradients of parameters and inputs."""
    module = module.to(**place())
    call = partial(module, *inputs) if function is None else partial(function, module, *inputs)
    return call, [*module.parameters(), *inputs]


def products(operations: float) -> Callable[[], Any]:
    """Matrix products `[m 192] [192 192]` with so many operations together; of width 64 where that is little."""
    width, chunk = 192 if operations > 1e7 else 64, 768 if setting.device == "cpu" else 1 << 17
    rows = max(1, round(operations / (2 * width**2)))
    a, b = draw((min(rows, chunk), width), (width, width), gradients=False)
    whole, rest = divmod(rows, chunk)

    def multiply() -> None:
        for _ in range(whole):
            torch.mm(a, b)
        if rest:
            torch.mm(a[:rest], b)

    return multiply


def scaled_dot_product(*shape: int) -> Way:
    """Softmax attention of queries, keys and values `[b h t d]`."""

    def make() -> Work:
        q, k, v = draw(shape, shape, shape)
        return lambda: nn.functional.scaled_dot_product_attention(q, k, v), (q, k, v)

    return make


def benchmark_of(name: str, parts: Sequence[Part], check: Callable[[], None], more: dict | None = None) -> Benchmark:
    """A benchmark of a module's parts, and of inputs of its own."""
    return Benchmark(name, inputs_of(parts) | (more or {}), check, rounds=5, call=True)


def digest(parts: Sequence[Part], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each part, size and pass that was timed: ours as a multiple of softmax attention, of the product and
    of the fastest peer, megabytes held during a call, and where softmax attention is overtaken."""
    ratio = {(row.input, row.variant): row for row in rows if row.skipped is None}
    lines = []
    for part in parts:
        for step in part.passes():
            made = []
            for size in part.sizes:
                label = label_of(part, size, step)
                ours, softmax = ratio.get((label, OURS)), ratio.get((label, SOFTMAX))
                if ours is None or ours.median_ratio is None:
                    continue
                found = [(ratio[label, peer], peer) for peer in part.peers if (label, peer) in ratio]
                best = min(found, key=lambda one: one[0].median_ratio or math.inf, default=(None, None))
                made.append(
                    {
                        "part": part.name,
                        "pass": step,
                        "size": part.label(size),
                        "tokens": part.tokens(size),
                        "of_softmax": _share(ours, softmax),
                        "of_product": ours.median_ratio,
                        "of_peer": _share(ours, best[0]),
                        "peer": best[1],
                        "mib": ours.peak_mib,
                        "softmax_mib": None if softmax is None else softmax.peak_mib,
                        "peer_mib": None if best[0] is None else best[0].peak_mib,
                    }
                )
            ahead = break_even([(one["tokens"], one["of_softmax"]) for one in made]) if part.promises else None
            lines += [one | {"break_even": ahead} for one in made]
    return lines


def _share(row: Row, other: Row | None) -> float | None:
    if other is None or not row.median_ratio or not other.median_ratio:
        return None
    return round(row.median_ratio / other.median_ratio, 3)


def break_even(ratios: Sequence[tuple[int, float | None]]) -> str | None:
    """Between which sizes a ratio falls below 1 and stays there, in words; None where nothing is known.

    >>> break_even([(100, 2.0), (400, 0.5), (1600, 0.1)])
    'from about 200 tokens on (between 100 and 400)'
    """
    known = [(size, ratio) for size, ratio in ratios if ratio is not None]
    if not known:
        return None
    behind = [place for place, (_, ratio) in enumerate(known) if ratio >= 1]
    if not behind:
        return f"at every size, from {known[0][0]} tokens on"
    if len(behind) == len(known):
        return f"at no size, up to {known[-1][0]} tokens"
    if behind[-1] == len(known) - 1:
        return f"at some sizes, not at {known[-1][0]} tokens"
    (small, above), (large, below) = known[behind[-1]], known[behind[-1] + 1]
    share = math.log(above) / (math.log(above) - math.log(below))  # straight in the logarithms
    middle = math.exp(math.log(small) + share * (math.log(large) - math.log(small)))
    return f"from about {float(f'{middle:.2g}'):.0f} tokens on (between {small} and {large})"
