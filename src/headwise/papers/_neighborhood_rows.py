"""The rows of neighborhood_attention.py, one function for each, and its picture."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.attention._neighborhood_axes import Axis, plan_of
from headwise.attention._neighborhood_tiles import _take, tiles_forward
from headwise.attention.neighborhood import (
    NeighborhoodAttention,
    _dense_mask,
    _window_index,
    axes_of,
    neighborhood_attention,
    neighborhood_mask,
)
from headwise.ops.counting import flops
from headwise.papers._neighborhood_setup import (
    HEADS,
    SIZE,
    Timed,
    full,
    gather_products,
    held,
    inputs,
    random_axes,
    rules,
    seconds,
    unfused,
)
from headwise.papers._neighborhood_setup import (
    fused as fused_kernel,
)
from headwise.papers.running import Run
from headwise.papers.statistics import mean
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure

RANKS = (1, 2)


def _of(times: Sequence[Timed], dtype: str, rank: int | None = None) -> list[Timed]:
    return [one for one in times if one.dtype == dtype and rank in (None, one.rank)]


def nearest(run: Run, times: Sequence[Timed]) -> Measured:
    draw, wrong = random.Random(run.seed), 0
    for number in range(40):
        grid = [draw.randint(2, 9) for _ in range(1 + number % 3)]
        kernel = [draw.randint(1, n) for n in grid]
        mask = neighborhood_mask(grid, kernel)
        wrong += int((mask.sum(-1) != int(torch.tensor(kernel).prod())).sum())
        for n, k in zip(grid, kernel, strict=True):
            seen, at = neighborhood_mask(n, k), torch.arange(n)
            distance = (at - at[:, None]).abs()
            inside = distance.masked_fill(~seen, 0).amax(-1)
            outside = distance.masked_fill(seen, n).amin(-1)
            wrong += int((inside > outside).sum())
    shares, ratios = [], []
    for one in _of(times, "float32"):
        q, k, v = inputs(one.grid, run.seed)
        attend: Any = partial(neighborhood_attention, kernel_size=one.kernel, layout="heads_first")
        ours = flops(attend, (q, k, v))
        shares.append(abs(ours / flops(full, (q, k, v)) / (one.kernel**one.rank / one.tokens) - 1))
        ratios.append(one.seconds["fused"] / one.seconds["self attention"])
    margin = min(-float(wrong), 1e-9 - max(shares), 1 - max(ratios))
    said = ", ".join(f"{one.name} {r:.3f}" for one, r in zip(_of(times, "float32"), ratios, strict=True))
    return Measured(
        measured=(
            f"{wrong} windows of 40 grids that are not the nearest; operations are prod(kernel) / n of self "
            f"attention's to {max(shares):.0e}; time as a share of self attention's: {said}"
        ),
        control="self attention is 1",
        holds=margin >= 0,
        margin=margin,
        values={f"time {one.name}": r for one, r in zip(_of(times, "float32"), ratios, strict=True)},
    )


def spectrum(run: Run) -> Measured:
    generator = torch.Generator().manual_seed(run.seed)
    x = torch.randn(1, 12, 12, 32, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        layers = {k: NeighborhoodAttention(32, 4, k, backend="tiled").double().eval() for k in (1, 7, 12)}
        one, middle, whole = layers[1], layers[7], layers[12]
        for other in (middle, whole):
            other.load_state_dict(one.state_dict())
        linear = float((one(x) - one.proj(one.qkv(x)[..., 64:])).abs().max())
        q, k, v = whole.qkv(x).view(1, 144, 3, 4, 8).permute(2, 0, 3, 1, 4)
        expected = whole.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).view_as(x)
        full_ = float((whole(x) - expected).abs().max())
        between = [float((middle(x) - other(x)).abs().max()) for other in (one, whole)]
    patterns = {
        (kernel, dilation): neighborhood_mask((12, 12), kernel, 1, dilation)
        for dilation in range(1, 13)
        for kernel in range(2, 12 // dilation + 1)
    }
    patterns[1, 1] = neighborhood_mask((12, 12), 1)
    different = len({mask.numpy().tobytes() for mask in patterns.values()})
    nested = all(bool((patterns[k, 1] | ~patterns[k - 2, 1]).all()) for k in range(3, 12, 2))
    margin = min(1e-12 - linear, 1e-12 - full_, float(different - len(patterns)), 0.0 if nested else -1.0)
    return Measured(
        measured=(
            f"kernel 1 is a linear projection to {linear:.0e} and the whole grid self attention to {full_:.0e}; "
            f"{different} different patterns of {len(patterns)} pairs of kernel and dilation; "
            f"{'nested' if nested else 'not nested'}"
        ),
        control=f"kernel 7 differs from the two limits by {between[0]:.2f} and {between[1]:.2f}",
        holds=margin >= 0,
        margin=margin,
        values={"linear": linear, "self attention": full_, "patterns": float(different)},
    )


def _definition(q: Tensor, k: Tensor, v: Tensor, axes: list[Axis]) -> Tensor:
    rank, mask = len(axes), _dense_mask(axes, q.device)
    flat = [x.flatten(2, 1 + rank) for x in (q, k, v)]
    scores = (flat[0] @ flat[1].mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ flat[2]).unflatten(2, q.shape[2:-1])


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def batched_gemm(run: Run) -> Measured:
    draw, worst, gathered = random.Random(run.seed), dict.fromkeys(RANKS, 0.0), 0.0
    for rank in RANKS:
        for _ in range(20):
            axes = random_axes(rank, draw)
            grid = tuple(axis.length for axis in axes)
            q, k, v = inputs(grid, run.seed, torch.float64, 2, 8)
            expected = _definition(q, k, v, axes)
            worst[rank] = max(worst[rank], _apart(unfused(axes)(q, k, v), expected))
            plain = axes_of(grid, [axis.kernel for axis in axes])
            index = _index(plain)
            gathered = max(gathered, _apart(gather_products(index)(q, k, v), _definition(q, k, v, plain)))
    margin = 1e-12 - max(worst.values())
    return Measured(
        measured=f"largest difference {worst[1]:.0e} in 1-D and {worst[2]:.0e} in 2-D",
        control=f"gathering, where it applies: {gathered:.0e}",
        holds=margin >= 0,
        margin=margin,
        values={f"{rank}-D": value for rank, value in worst.items()},
    )


def _index(axes: list[Axis]) -> Tensor:
    return _window_index(axes, torch.device("cpu"))


def _improvements(times: Sequence[Timed], dtype: str, kernel: str) -> dict[int, float]:
    return {rank: mean([one.improvement(kernel) for one in _of(times, dtype, rank)]) for rank in RANKS}


def _table(times: Sequence[Timed], dtype: str, kernels: Sequence[str]) -> str:
    parts = []
    for one in _of(times, dtype):
        said = ", ".join(f"{kernel} {1e3 * one.seconds[kernel]:.2f}" for kernel in kernels)
        parts.append(f"{one.name}: {said}")
    return "ms: " + "; ".join(parts)


def full_precision(times: Sequence[Timed]) -> Measured:
    found = _improvements(times, "float32", "unfused")
    margin = min(found[1] / 895 - 1, found[2] / 272 - 1)
    return Measured(
        measured=f"improvement {found[1]:.0f} % in 1-D and {found[2]:.0f} % in 2-D",
        control=_table(times, "float32", ("gathered products", "gathered sums", "unfused", "fused", "matrix product")),
        holds=margin >= 0,
        margin=margin,
        values={f"{rank}-D": value for rank, value in found.items()},
    )


def inefficiencies(times: Sequence[Timed]) -> Measured:
    weights = [
        (one.held["unfused"] / (one.pairs * HEADS * (4 if one.dtype == "float32" else 2)), one.held["fused"])
        for one in times
    ]
    gains: dict[str, list[float]] = {"unfused": [], "fused": []}
    for wide, narrow in zip(_of(times, "float32"), _of(times, "bfloat16"), strict=True):
        for kernel, ratios in gains.items():
            ratios.append(wide.seconds[kernel] / narrow.seconds[kernel])
    less = max(one.held["fused"] / one.held["unfused"] for one in times)
    margin = min(min(share for share, _ in weights) - 1, 1 - less, mean(gains["fused"]) - mean(gains["unfused"]) - 1e-9)
    return Measured(
        measured=(
            f"unfused kernels hold {min(s for s, _ in weights):.1f} to {max(s for s, _ in weights):.1f} times the "
            f"weights; bfloat16 makes them {mean(gains['unfused']):.2f} times as fast"
        ),
        control=f"fused: at most {less:.3f} of what the unfused hold; {mean(gains['fused']):.2f} times as fast",
        holds=margin >= 0,
        margin=margin,
        values={"bfloat16 unfused": mean(gains["unfused"]), "bfloat16 fused": mean(gains["fused"]), "held": less},
    )


def fused(run: Run) -> Measured:
    draw, worst, control = random.Random(run.seed), dict.fromkeys((1, 2, 3), 0.0), []
    for rank in worst:
        for _ in range(20):
            axes = random_axes(rank, draw)
            found: list[tuple[Tensor, ...]] = []
            for definition in (False, True):
                tensors = inputs(tuple(axis.length for axis in axes), run.seed, torch.float64, 2, 8)
                q, k, v = (x.requires_grad_() for x in tensors)
                if definition:
                    out = _definition(q, k, v, axes)
                else:
                    made = neighborhood_attention(q, k, v, layout="heads_first", backend="tiled", **rules(axes))
                    assert isinstance(made, Tensor)
                    out = made
                weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
                found.append((out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))))
            worst[rank] = max(worst[rank], *(_apart(*pair) for pair in zip(*found, strict=True)))
            if rank > 1 and (wrong := _exchanged(axes, run.seed)) is not None:
                control.append(wrong)
    margin = min(1e-12 - max(worst.values()), min(control) - 1e-12)
    said = ", ".join(f"{value:.0e} in {rank}-D" for rank, value in worst.items())
    return Measured(
        measured=f"largest difference of outputs and gradients: {said}",
        control=(
            f"{len(control)} of 40 masks change where two axes exchange settings, and outputs by {min(control):.1e} or "
            "more"
        ),
        holds=margin >= 0,
        margin=margin,
        values={f"{rank}-D": value for rank, value in worst.items()},
    )


def _exchanged(axes: list[Axis], seed: int) -> float | None:
    """How far outputs move where the first two axes, made as long as the longer, exchange their settings; None where
    both settings come to the same mask."""
    length = max(axes[0].length, axes[1].length)
    first, second = (Axis(length, a.kernel, a.stride, a.dilation, a.causal) for a in axes[:2])
    orders, cpu = ([first, second], [second, first]), torch.device("cpu")
    if torch.equal(*(_dense_mask(one, cpu) for one in orders)):
        return None
    q, k, v = inputs((length, length), seed, torch.float64, 1, 8)
    outputs = [neighborhood_attention(q, k, v, layout="heads_first", backend="tiled", **rules(one)) for one in orders]
    assert isinstance(outputs[0], Tensor) and isinstance(outputs[1], Tensor)
    return _apart(outputs[0], outputs[1])


def memory(run: Run) -> Measured:
    problems: dict[int, tuple[Any, Any, int]] = {1: ((4096,), (16384,), 128), 2: ((56, 56), (112, 112), 7)}
    growth, share, more, control = {}, {}, {}, {}
    for rank, (small, large, size) in problems.items():
        calls: dict[str, Callable[[], Any]] = {}
        room = {}
        for name, grid in (("small", small), ("large", large)):
            tensors, kernel = inputs(grid, run.seed), fused_kernel(axes_of(grid, size))
            calls[name] = lambda x=tensors, kernel=kernel: kernel(*x)
            room[name] = held(kernel, *tensors) - tensors[0][..., 0].nbytes  # the log-sum-exp is an output, too
        tensors = inputs(small, run.seed)
        gathered = held(gather_products(_index(axes_of(small, size))), *tensors)
        taken = seconds(calls)
        growth[rank], share[rank] = taken["large"] / taken["small"], room["small"] / gathered
        more[rank] = room["large"] / room["small"]
        halves = [inputs((n,), run.seed) for n in (1024, 4096)]
        if rank == 1:
            whole = seconds({str(i): (lambda x=x: full(*x)) for i, x in enumerate(halves)}, 3)
            control = {"self attention": whole["1"] / whole["0"]}
    margin = min(
        min(growth.values()) - 3,
        5.5 - max(growth.values()),
        0.25 - 1e-9 - max(share.values()),
        1.05 - max(more.values()),
    )
    return Measured(
        measured=(
            f"four times the tokens take {growth[1]:.2f} (1-D) and {growth[2]:.2f} (2-D) times the time and "
            f"{more[1]:.3f} and {more[2]:.3f} times the room, {share[1]:.4f} and {share[2]:.4f} of gathering's"
        ),
        control=f"self attention takes {control['self attention']:.1f} times the time",
        holds=margin >= 0,
        margin=margin,
        values={f"time {rank}-D": value for rank, value in growth.items()}
        | {f"room {rank}-D": value for rank, value in more.items()}
        | {f"share {rank}-D": value for rank, value in share.items()}
        | control,
    )


def circumvent(times: Sequence[Timed]) -> Measured:
    room = max(one.held["fused"] / one.held["unfused"] for one in times)
    ratios = {
        d: mean([o.seconds["fused"] / o.seconds["unfused"] for o in _of(times, d)]) for d in ("float32", "bfloat16")
    }
    margin = min(0.25 - 1e-9 - room, *(1 - 1e-9 - value for value in ratios.values()))
    return Measured(
        measured=(
            f"fused kernels hold at most {room:.3f} of what unfused ones hold and take {ratios['float32']:.2f} of "
            f"their time in float32, {ratios['bfloat16']:.2f} in bfloat16"
        ),
        control="the unfused kernels are 1",
        holds=margin >= 0,
        margin=margin,
        values={"room": room, **ratios},
    )


def half_precision(times: Sequence[Timed]) -> Measured:
    slow, fast = (_improvements(times, "bfloat16", kernel) for kernel in ("unfused", "fused"))
    margin = min(
        fast[1] / 1607 - 1,
        fast[2] / 581 - 1,
        slow[1] / 496 - 1,
        slow[2] / 113 - 1,
        *((fast[rank] - slow[rank]) / slow[rank] - 1e-9 for rank in RANKS),
    )
    return Measured(
        measured=(
            f"unfused {slow[1]:.0f} % and {slow[2]:.0f} %, fused {fast[1]:.0f} % and {fast[2]:.0f} % in 1-D and 2-D"
        ),
        control=_table(times, "bfloat16", ("gathered products", "gathered sums", "unfused", "fused", "matrix product")),
        holds=margin >= 0,
        margin=margin,
        values={f"unfused {rank}-D": slow[rank] for rank in RANKS} | {f"fused {rank}-D": fast[rank] for rank in RANKS},
    )


def on_a_processor(run: Run) -> Measured:
    q, k, v = inputs((56, 56), run.seed)
    grid = axes_of((56, 56), 7)
    gather, tiles = gather_products(_index(grid)), fused_kernel(grid)
    small = seconds({"gathered": lambda: gather(q, k, v), "tiles": lambda: tiles(q, k, v)})
    line = inputs((8192,), run.seed)
    axes = axes_of((8192,), 256)
    mask, long = _dense_mask(axes, q.device), fused_kernel(axes)
    dense = seconds(
        {
            "dense mask": lambda: scaled_dot_product_attention(line[0], line[1], line[2], attn_mask=mask),
            "tiles": lambda: long(line[0], line[1], line[2]),
        },
        3,
    )
    ratios = small["gathered"] / small["tiles"], dense["dense mask"] / dense["tiles"]
    margin = min(ratios[0] / 5 - 1, ratios[1] / 10 - 1)
    return Measured(
        measured=f"{ratios[0]:.1f} times as fast as gathering, {ratios[1]:.1f} times as fast as a dense mask",
        control=(
            f"ms: gathered {1e3 * small['gathered']:.1f}, tiles {1e3 * small['tiles']:.1f}; dense mask "
            f"{1e3 * dense['dense mask']:.0f}, tiles {1e3 * dense['tiles']:.0f}"
        ),
        holds=margin >= 0,
        margin=margin,
        values={"over gathering": ratios[0], "over a dense mask": ratios[1]},
    )


def backward(run: Run) -> Measured:
    found, control = {}, {}
    for grid, size in (((56, 56), 7), ((8192,), 256)):
        axes, tensors = axes_of(grid, size), inputs(grid, run.seed)
        q, k, v = (x.requires_grad_() for x in tensors)
        weight = torch.ones(1, HEADS, *grid, SIZE)

        def both(q=q, k=k, v=v, size=size, weight=weight) -> None:
            with torch.enable_grad():
                out: Any = neighborhood_attention(q, k, v, size, layout="heads_first", backend="tiled")
                torch.autograd.grad(out, (q, k, v), weight)

        def sliced(q=q, k=k, v=v, axes=axes, weight=weight) -> None:
            with torch.enable_grad():
                torch.autograd.grad(_by_autograd(q, k, v, axes), (q, k, v), weight)

        taken = seconds(
            {
                "forward": lambda x=(q, k, v), axes=axes: tiles_forward(*x, None, axes, SIZE**-0.5),
                "both": both,
            }
        )
        taken |= seconds({"sliced": sliced}, 3)
        name = f"{'x'.join(map(str, grid))} k{size}"
        found[name] = taken["both"] / taken["forward"] - 1
        control[name] = taken["sliced"] / taken["forward"] - 1
    margin = 2.5 - max(found.values())
    return Measured(
        measured="times the forward: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()),
        control="autograd through the slices: " + ", ".join(f"{name} {value:.1f}" for name, value in control.items()),
        holds=margin >= 0,
        margin=margin,
        values=found,
    )


def _by_autograd(q: Tensor, k: Tensor, v: Tensor, axes: list[Axis]) -> Tensor:
    """The same tiles without a backward of their own, on grids without dilation."""
    plan, parts = plan_of(tuple(axes)), []
    for tile in plan.tiles:
        rows, keys, values = _take(q, tile.queries), _take(k, tile.keys), _take(v, tile.keys)
        parts.append((tile, scaled_dot_product_attention(rows, keys, values, attn_mask=plan.mask(tile, q))))
    out = torch.empty_like(q)
    for tile, part in parts:
        places = tuple(slice(*span) for span in tile.queries)
        shape = [stop - start for start, stop in tile.queries]
        out[(slice(None), slice(None), *places)] = part.unflatten(2, shape)
    return out


def draw(run: Run, times: Sequence[Timed]) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 2, width=5.4) as panels:
        for axes, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
            some = _of(times, dtype)
            series = {
                "gathered": [1e3 * one.naive for one in some],
                **{
                    name: [1e3 * one.seconds[name] for one in some]
                    for name in ("self attention", "unfused", "fused", "matrix product")
                },
            }
            bars(axes, [one.name.replace(" ", "\n") for one in some], series, y="ms, one thread", title=dtype)
            axes.set_yscale("log")
            axes.set_ylim(top=30 * max(max(values) for values in series.values()))  # room for the legend
            axes.legend(ncol=2, fontsize=8, loc="upper left")
    run.figures.append(path)
