"""The rows of davit.py, one function for each, and its picture."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headwise.attention.channel import ChannelAttention, channel_attention
from headwise.attention.window import WindowAttention
from headwise.ops.counting import flops
from headwise.papers._davit_setup import Trained, chance, multiply_adds, on_meta, reach, vit_multiply_adds
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure, lines

BOTH, SPATIAL, CHANNEL = "spatial + channel", "spatial + spatial", "channel + channel"
PARAMETERS = {"tiny": (28_360_168, "28.3"), "small": (49_745_896, "49.7"), "base": (87_954_408, "87.9")}
OPERATIONS = {"tiny": 4.540e9, "small": 8.800e9, "base": 15.510e9}


def growth(name: str) -> tuple[float, float]:
    """Multiply-adds at 448 and at 672 pixels over those at 224."""
    model = on_meta(name)
    base, two, three = (multiply_adds(model, size) for size in (224, 448, 672))
    return two / base, three / base


def linear_margin(ratios: tuple[float, float]) -> float:
    return min(ratios[0] - 3.99, 4.01 - ratios[0], ratios[1] - 8.98, 9.02 - ratios[1])


def global_and_efficient(run: Run, trained: Mapping[str, Trained]) -> Measured:
    seen, ratios = reach("sc", run.seed), growth("tiny")
    vit = [vit_multiply_adds(size) for size in (224, 448, 672)]
    margin = min(seen - 256.0, trained[BOTH].whole - 0.97, linear_margin(ratios))
    return Measured(
        measured=(
            f"a pair reaches {seen} of 256 positions; trained it is right in {trained[BOTH].whole:.1%} of the cells; "
            f"four and nine times the pixels cost {ratios[0]:.4f} and {ratios[1]:.4f} times the multiply-adds"
        ),
        control=(
            f"ViT-S/16: {vit[1] / vit[0]:.2f} and {vit[2] / vit[0]:.1f} times; two spatial blocks right in "
            f"{trained[SPATIAL].whole:.1%} (chance {chance(run.seed)[0]:.1%})"
        ),
        holds=margin >= 0,
        margin=margin,
        values={"reach": float(seen), "global": trained[BOTH].whole, "448": ratios[0], "672": ratios[1]},
    )


def orthogonal(run: Run) -> Measured:
    generator = torch.Generator().manual_seed(run.seed)
    q, k, v = (torch.randn(2, 3, 20, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    apart = float(
        (channel_attention(q, k, v) - scaled_dot_product_attention(q.mT, k.mT, v.mT, scale=8**-0.5).mT).abs().max()
    )
    x = torch.randn(2, 6, 5, 24, generator=generator, dtype=torch.float64)
    window, channel = WindowAttention(24, (6, 5), 3).double(), ChannelAttention(24, 3).double()
    with torch.no_grad():
        parts = window.qkv(x.flatten(1, 2)).view(2, 30, 3, 3, 8).permute(2, 0, 3, 1, 4)
        plain = window.proj(scaled_dot_product_attention(parts[0], parts[1], parts[2]).transpose(1, 2).flatten(2))
        whole = float((window(x).flatten(1, 2) - plain).abs().max())
        order = torch.randperm(30, generator=generator)
        flat = x.flatten(1, 2)
        moved = float((channel(flat[:, order]) - channel(flat)[:, order]).abs().max())
    margin = 1e-12 - max(apart, whole, moved)
    return Measured(
        measured=(
            f"channel attention on transposed tensors differs by {apart:.0e}, a window of the whole map by "
            f"{whole:.0e}, permuted positions by {moved:.0e}"
        ),
        holds=margin >= 0,
        margin=margin,
        values={"channel": apart, "window": whole, "permuted": moved},
    )


def _attention_cost(layer: nn.Module, x: Tensor, linear: int) -> float:
    """Operations of a layer without its linear ones: `linear` multiply-adds for every position."""
    return float(flops(layer, (x,)) - 2 * linear * x[0, ..., 0].numel())


def per_position(side: int, window: int) -> float:
    layer = WindowAttention(96, window, 3)
    return _attention_cost(layer, torch.empty(1, side, side, 96), 4 * 96 * 96) / side**2


def per_channel(width: int, groups: int) -> float:
    layer = ChannelAttention(width, groups)
    return _attention_cost(layer, torch.empty(1, 14, 14, width), 4 * width**2) / width


def linear() -> Measured:
    ratios = {name: growth(name) for name in PARAMETERS}
    window = per_position(56, 7) / per_position(28, 7) - 1
    channel = per_channel(768, 24) / per_channel(96, 3) - 1
    one_window = per_position(56, 56) / per_position(28, 28)
    one_group = per_channel(768, 1) / per_channel(96, 1)
    margin = min(*(linear_margin(pair) for pair in ratios.values()), 1e-9 - abs(window), 1e-9 - abs(channel))
    said = ", ".join(f"{name} {two:.4f} and {three:.4f}" for name, (two, three) in ratios.items())
    return Measured(
        measured=(
            f"four and nine times the pixels: {said} times the multiply-adds; attention for a position and for a "
            f"channel grows by {window:.0e} and {channel:.0e}"
        ),
        control=f"one window for all positions: {one_window:.2f} times; one group for all channels: {one_group:.2f}",
        holds=margin >= 0,
        margin=margin,
        values={f"{name} 448": pair[0] for name, pair in ratios.items()}
        | {f"{name} 672": pair[1] for name, pair in ratios.items()}
        | {"one window": one_window, "one group": one_group},
    )


def channel_is_global(run: Run, trained: Mapping[str, Trained]) -> Measured:
    spatial, channel = reach("s", run.seed), reach("c", run.seed)
    margin = min(-abs(channel - 256.0), -abs(spatial - 25.0), trained[BOTH].whole - 0.97, 0.70 - trained[SPATIAL].whole)
    return Measured(
        measured=f"a channel block reaches {channel} of 256 positions; the pair is right in {trained[BOTH].whole:.1%}",
        control=(
            f"a spatial block reaches {spatial}; two of them are right in {trained[SPATIAL].whole:.1%} "
            f"({trained[BOTH].parameters:,} and {trained[SPATIAL].parameters:,} parameters; chance "
            f"{chance(run.seed)[0]:.1%})"
        ),
        holds=margin >= 0,
        margin=margin,
        values={
            "channel reach": float(channel),
            "spatial reach": float(spatial),
            "pair": trained[BOTH].whole,
            "two spatial": trained[SPATIAL].whole,
        },
    )


def spatial_refines(trained: Mapping[str, Trained]) -> Measured:
    pair, other = trained[BOTH], trained[CHANNEL]
    margin = min(pair.local - 0.97, 0.93 - other.local, pair.whole - other.whole - 0.1)
    return Measured(
        measured=f"the pair is right in {pair.local:.1%} of the local and {pair.whole:.1%} of the global labels",
        control=f"two channel blocks: {other.local:.1%} and {other.whole:.1%} ({other.parameters:,} parameters)",
        holds=margin >= 0,
        margin=margin,
        values={
            "pair local": pair.local,
            "pair global": pair.whole,
            "two channel local": other.local,
            "two channel global": other.whole,
        },
    )


def parameters() -> Measured:
    counts = {name: _count(on_meta(name)) for name in PARAMETERS}
    wrong = [name for name, (exact, begins) in PARAMETERS.items() if counts[name] != exact or _short(exact) != begins]
    others = {name: _count(on_meta(name, variant="florence2")) for name in PARAMETERS}
    return Measured(
        measured=", ".join(f"{name} {count:,}" for name, count in counts.items()),
        control="3 x 3 downsampling: " + ", ".join(f"{name} {count:,}" for name, count in others.items()),
        holds=not wrong,
        margin=-float(len(wrong)),
        values={name: float(count) for name, count in counts.items()},
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _short(count: int) -> str:
    """Millions with one digit behind the point, cut as the paper cuts them."""
    return f"{count // 100_000 / 10:.1f}"


def operations() -> Measured:
    found = {name: multiply_adds(on_meta(name), 224) for name in OPERATIONS}
    off = {name: found[name] / OPERATIONS[name] - 1 for name in OPERATIONS}
    margin = 0.005 - max(abs(value) for value in off.values())
    return Measured(
        measured=", ".join(f"{name} {found[name] / 1e9:.3f} G ({value:+.2%})" for name, value in off.items()),
        holds=margin >= 0,
        margin=margin,
        values={name: value / 1e9 for name, value in found.items()},
    )


def draw(run: Run, trained: Mapping[str, Trained]) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 2, width=4.8) as (curves, ends):
        steps = list(trained[BOTH].steps)
        lines(
            curves, steps, {name: list(one.curve) for name, one in trained.items()},
            x="step", y="cells right, global label", title="Trained pairs of blocks",
        )  # fmt: skip
        bars(
            ends, ["global", "local"], {name: [one.whole, one.local] for name, one in trained.items()},
            y="cells right", title="Held-out grids",
        )  # fmt: skip
        ends.set_ylim(0.4, 1.02)
        low = chance(run.seed)
        for place, value in enumerate(low):
            ends.hlines(value, place - 0.45, place + 0.45, color="#5b6168", linestyle=":")
    run.figures.append(path)
