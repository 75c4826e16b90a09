"""The rows of agent_attention.py, one function for each, and its picture."""

from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.agent import AgentAttention, agent_attention, agent_map
from headwise.attention.softmax import split_heads
from headwise.models.agent_deit import AgentDeiT, AgentDeiTConfig
from headwise.ops.counting import flops
from headwise.papers._agent_setup import (
    AGENT,
    AGENT_BARE,
    LINEAR_DWC,
    SOFTMAX,
    SOFTMAX_DWC,
    Fine,
    Speed,
    Swapped,
    Trained,
    mean,
)
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure, lines
from headwise.tasks.digits import digit_images

SDPA = nn.functional.scaled_dot_product_attention
FASTER, AT, GROWTH = 5.0, 3136, 6.0


def points(trained: Trained, *kinds: str) -> str:
    return ", ".join(f"{kind} {mean(trained.points[kind]):.2f} %" for kind in kinds)


def values(trained: Trained) -> dict[str, float]:
    return {kind: mean(found) for kind, found in trained.points.items()}


def balance(trained: Trained, speed: Speed) -> Measured:
    gain = mean(trained.points[AGENT]) - mean(trained.points[SOFTMAX])
    margin = min(gain, speed.faster[AT] / FASTER - 1)
    return Measured(
        measured=f"{points(trained, AGENT, SOFTMAX)}; {speed.faster[AT]:.1f} times as fast at {AT:,} tokens",
        control=points(trained, SOFTMAX_DWC, LINEAR_DWC, AGENT_BARE),
        holds=margin >= 0,
        margin=margin,
        values={"gain": gain, "times as fast": speed.faster[AT]},
    )


def drawn(seed: int, t: int = 64, s: int = 64, n: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, size, 16, generator=generator, dtype=torch.float64) for size in (t, s, s, n)]


@torch.no_grad()
def definition(run: Run) -> Measured:
    q, k, v, agents = drawn(run.seed)
    wanted, apart = SDPA(q, agents, SDPA(agents, k, v)), {}
    for form in ("plain", "blocked", "fused"):
        apart[form] = float((agent_attention(q, k, v, agents, implementation=form) - wanted).abs().max())
    torch.manual_seed(run.seed)
    layer = AgentAttention(64, 4, 9, grid_size=(8, 8)).double()
    tokens = q.transpose(1, 2).flatten(2)
    found, _ = layer._agents(tokens, q, (8, 8), None)
    window = tokens.view(2, 8, 8, 64)[:, :3, 2:6].mean((1, 2))  # the second of 3 x 3 windows of an 8 x 8 grid
    apart["agents"] = float((found[:, :, 1].flatten(1) - window).abs().max())
    worst = max(apart.values())
    return Measured(
        measured=", ".join(f"{name} {value:.1e}" for name, value in apart.items()) + " at most",
        holds=worst <= 1e-12,
        margin=1e-12 - worst,
        values=apart,
    )


@torch.no_grad()
def efficient(trained: Trained, speed: Speed, run: Run) -> Measured:
    smallest, local = implied_maps(trained.agent, run)
    margin = min(speed.faster[AT] / FASTER - 1, 1 - speed.growth["agent"] / GROWTH, smallest or -1.0)
    return Measured(
        measured=(
            f"{speed.faster[AT]:.1f} times as fast at {AT:,} tokens ({speed.faster[784]:.1f} at 784); 4 times the "
            f"tokens take {speed.growth['agent']:.1f} times as long; smallest entry of a map {smallest:.1e}"
        ),
        control=(
            f"softmax attention takes {speed.growth['softmax']:.1f} times as long; at most {local:.0%} of a row lies "
            "within the 3 x 3 tokens around its own"
        ),
        holds=margin >= 0,
        margin=margin,
        values={"times as fast": speed.faster[AT], "growth": speed.growth["agent"], "smallest entry": smallest},
    )


def implied_maps(model: Any, run: Run) -> tuple[float, float]:
    """Over the heads of a trained agent model and 64 test images: the smallest entry of the implied maps, and the
    largest mean share of a row within the 3 x 3 tokens around its own."""
    found: list[Tensor] = []

    def hook(layer: AgentAttention, args: tuple[Tensor]) -> None:
        q, k, _ = layer.qkv(args[0]).chunk(3, -1)
        rows, columns = layer.grid_size or (1, 1)
        heads = split_heads(q, layer.num_heads)
        agents, _ = layer._agents(q, heads, (rows, columns), None)
        first, second = layer.biases((rows, columns))
        whole = agent_map(heads, split_heads(k, layer.num_heads), agents, bias_agent_key=first, bias_query_agent=second)
        assert isinstance(whole, Tensor)
        found.append(whole)

    hooks = [block.attn.register_forward_pre_hook(hook) for block in model.blocks]
    try:
        model(digit_images().test_images[:64].to(run.device))
    finally:
        for one in hooks:
            one.remove()
    rows, columns = model.config.grid_size
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    near = ((place[:, None] - place).abs().amax(-1) <= 1).to(found[0].device)
    shares = torch.stack([(whole * near).sum(-1).mean((0, 2)) for whole in found])
    return min(float(whole.min()) for whole in found), float(shares.max())


@torch.no_grad()
def linear(run: Run) -> Measured:
    worst, rank, plain = 0.0, 0, 10**9
    for seed in range(8):
        q, k, v, agents = drawn(100 * run.seed + seed)
        out = agent_attention(q, k, v, agents)
        f, g = agent_map(q, k, agents, factors=True)
        whole = f @ g
        apart = [(out - f @ (g @ v)).abs().max(), (out - whole @ v).abs().max(), (whole.sum(-1) - 1).abs().max()]
        worst = max(worst, *map(float, apart), -float(whole.min()))
        rank = max(rank, int(torch.linalg.matrix_rank(whole).max()))
        plain = min(plain, int(torch.linalg.matrix_rank((q @ k.mT / 4).softmax(-1)).min()))
    margin = min(1e-12 - worst, 0.0 if rank == 9 else -1.0)
    return Measured(
        measured=f"largest difference {worst:.1e}; rank {rank} with 9 agents",
        control=f"the softmax map has rank {plain} of 64",
        holds=margin >= 0,
        margin=margin,
        values={"difference": worst, "rank": rank, "rank of softmax": plain},
    )


@torch.no_grad()
def integrates(trained: Trained, run: Run) -> Measured:
    q, k, v, _ = drawn(run.seed)
    k = nn.functional.normalize(k, dim=-1)
    apart = float((agent_attention(q, k, v, k, scale=1e8, query_scale=0.25) - SDPA(q, k, v)).abs().max())

    def operations(t: int) -> int:
        blank = [torch.zeros(1, 4, size, 32) for size in (t, t, t, 49)]
        return flops(lambda *x: agent_attention(*x, implementation="plain"), blank)

    def softmax_operations(t: int) -> int:
        return flops(SDPA, [torch.zeros(1, 4, t, 32) for _ in range(3)])

    times = operations(2048) / operations(1024)
    found = values(trained)
    margin = min(
        1e-9 - apart,
        0.0 if times == 2 else -1.0,
        found[AGENT] - found[SOFTMAX],
        found[AGENT] - found[LINEAR_DWC] + 1,
    )
    return Measured(
        measured=(
            f"{apart:.1e} from softmax attention with the keys as agents; {times:.2f} times the operations at twice "
            f"the tokens; {points(trained, AGENT, SOFTMAX, LINEAR_DWC)}"
        ),
        control=(
            f"softmax attention needs {softmax_operations(2048) / softmax_operations(1024):.2f} times; "
            f"{points(trained, SOFTMAX_DWC)}"
        ),
        holds=margin >= 0,
        margin=margin,
        values={"difference": apart, "operations": times, **found},
    )


def classification(trained: Trained) -> Measured:
    found = values(trained)
    margin = min(found[AGENT] - found[SOFTMAX], found[AGENT] - found[LINEAR_DWC] + 1)
    return Measured(
        measured=points(trained, AGENT, SOFTMAX, LINEAR_DWC),
        control=points(trained, SOFTMAX_DWC),
        holds=margin >= 0,
        margin=margin,
        values=found,
    )


def beyond_convolution(trained: Trained) -> Measured:
    found = values(trained)
    margin = found[AGENT] - found[SOFTMAX_DWC]
    return Measured(
        measured=points(trained, AGENT, SOFTMAX_DWC),
        control=points(trained, AGENT_BARE, SOFTMAX),
        holds=margin >= 0,
        margin=margin,
        values={"gain": margin, "gain without the convolution": found[AGENT_BARE] - found[SOFTMAX]},
    )


def high_resolution(fine: Fine, speed: Speed) -> Measured:
    gain, advantage = fine.points[AGENT] - fine.points[SOFTMAX], speed.faster[AT] / speed.faster[784]
    margin = min(gain, advantage / 2 - 1)
    said = ", ".join(f"{kind} {fine.points[kind]:.2f} %" for kind in (AGENT, SOFTMAX))
    return Measured(
        measured=(
            f"64 tokens: {said}; {speed.faster[AT]:.1f} times as fast at {AT:,} tokens, {speed.faster[784]:.1f} at 784"
        ),
        control=f"{SOFTMAX_DWC} {fine.points[SOFTMAX_DWC]:.2f} %",
        holds=margin >= 0,
        margin=margin,
        values={**fine.points, "advantage": advantage},
    )


def training_free(swapped: Swapped) -> Measured:
    kept, over = swapped.agents[4] - swapped.before + 2, swapped.agents[4] - swapped.pooled[4] - 30

    def table(row: dict[int, float]) -> str:
        return ", ".join(f"{n}: {value:.2f} %" for n, value in row.items())

    return Measured(
        measured=f"{swapped.before:.2f} % before; agents {table(swapped.agents)}",
        control=f"keys and values pooled to {table(swapped.pooled)}; agents, plain scale {table(swapped.plain)}",
        holds=min(kept, over) >= 0,
        margin=min(kept, over),
        values={
            "before": swapped.before,
            **{f"{n} agents": value for n, value in swapped.agents.items()},
            **{f"keys pooled to {n}": value for n, value in swapped.pooled.items()},
        },
    )


def sizes() -> Measured:
    def count(size: Any, pixels: int, layers: int | None) -> tuple[float, float]:
        config = AgentDeiTConfig.preset(size, image_size=pixels, num_agent_layers=layers)
        with torch.device("meta"):
            model = AgentDeiT(config).eval()
        operations = flops(lambda x: model(x).logits, (torch.zeros(1, 3, pixels, pixels),))
        return sum(p.numel() for p in model.parameters()) / 1e6, operations / 2e9

    tiny, small = count("tiny", 224, None), count("small", 448, None)
    plain_tiny, plain_small = count("tiny", 224, 0), count("small", 448, 0)
    margin = min(0.05 - abs(tiny[0] - 6.0), 0.1 - abs(small[1] - 17.7))
    return Measured(
        measured=f"Agent-DeiT-T {tiny[0]:.3f} M parameters; Agent-DeiT-S at 448 x 448 {small[1]:.2f} G",
        control=f"with softmax {plain_tiny[0]:.3f} M, {plain_small[1]:.2f} G",
        holds=margin >= 0,
        margin=margin,
        values={"parameters of T in millions": tiny[0], "operations of S at 448 in G": small[1]},
    )


def draw(run: Run, trained: Trained, swapped: Swapped, speed: Speed) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 3, width=4.4) as (left, middle, right):
        kinds = {kind: [found] for kind, found in values(trained).items()}
        bars(left, [""], kinds, y="right test images, %", title="Trained on digits")
        left.set_ylim(90, 100)
        series = {
            "agents": list(swapped.agents.values()),
            "keys and values pooled": list(swapped.pooled.values()),
            "before": [swapped.before] * 3,
        }
        lines(middle, [1, 4, 9], series, x="agents, or pooled keys", y="right, %", title="Swapped after training")
        for name, row in speed.milliseconds.items():
            right.loglog(list(row), list(row.values()), marker="o", label=name)
        right.set(xlabel="tokens", ylabel="milliseconds", title="One attention call")
        right.legend(fontsize=8)
    run.figures.append(path)
