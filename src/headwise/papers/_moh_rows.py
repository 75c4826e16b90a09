"""The rows of mixture_of_head_attention.py, one function for each, and its picture."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from headwise.attention.mixture_of_head import LearnedRouter, MixtureOfHeads
from headwise.attention.routed import routed_attention
from headwise.attention.softmax import SoftmaxAttention
from headwise.models.moh_presets import MOH_PRESETS, activated_heads
from headwise.papers._moh_setup import GATED, MHA, MOH_50, MOH_75, Converted, Networks
from headwise.papers.running import Run
from headwise.papers.statistics import mean
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure

LOSS = 0.02  # points of accuracy that count as no loss in the check
USED = (0.05, 0.95)
ROUNDS = 5

Times = Mapping[tuple[int, int, bool], tuple[float, float]]  # tokens, routed heads in use, causal -> ratio, seconds


def summation(networks: Networks) -> Measured:
    layer: Any = networks.models[MHA][0].blocks[0].attn
    torch.manual_seed(0)
    x = torch.randn(4, 16, 32)
    kept: dict[str, torch.Tensor] = {}
    hook = layer.proj.register_forward_pre_hook(lambda _, args: kept.update(z=args[0]))
    with torch.no_grad():
        out = layer(x)
    hook.remove()
    heads = kept["z"].unflatten(-1, (layer.num_heads, -1))
    blocks = layer.proj.weight.detach().unflatten(-1, (layer.num_heads, -1))

    def apart(order: Sequence[int]) -> float:
        total = layer.proj.bias.detach() + sum(heads[:, :, i] @ blocks[:, j].T for i, j in enumerate(order))
        return float((total - out).abs().max())

    found = apart(range(layer.num_heads))
    exchanged = apart([1, 0, *range(2, layer.num_heads)])
    margin = min(1e-5 - found, exchanged - 1e-5)
    return Measured(
        measured=f"largest difference {found:.1e}",
        control=f"two heads exchanged: {exchanged:.1e}",
        holds=margin >= 0,
        margin=margin,
        values={"difference": found, "exchanged": exchanged},
    )


def used_evenly(shares: Sequence[float]) -> float:
    """By how much the least and the most used head keep within bounds."""
    return min(min(shares) - USED[0], USED[1] - max(shares))


def _said(networks: Networks, *kinds: str) -> str:
    return "; ".join(
        f"{kind} {networks.accuracy(kind):.2%} ({', '.join(f'{one:.2%}' for one in networks.accuracies[kind])})"
        for kind in kinds
    )


def _values(networks: Networks) -> dict[str, float]:
    return {kind: networks.accuracy(kind) for kind in networks.accuracies}


def parameters(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def router_share() -> float:
    """Parameters of the routers over those of a layer's attention, in the third stage of the paper's ViT-B."""
    split, width = MOH_PRESETS["moh-vit-b-75"][10], 384
    return parameters(LearnedRouter(width, *split)) / parameters(SoftmaxAttention(width, split.heads))


def efficient(networks: Networks, times: Times) -> Measured:
    gain = networks.accuracy(MOH_75) - networks.accuracy(MHA)
    shares = networks.usage[MOH_75]
    more = parameters(networks.models[MOH_75][0]) / parameters(networks.models[MHA][0]) - 1
    ratio = times[1024, 4, False][0]
    margin = min(used_evenly(shares), 1 - ratio, gain, -more)
    return Measured(
        measured=(
            f"{_said(networks, MOH_75)}, {gain:+.2%} against multi-head attention; routed heads used by "
            f"{min(shares):.0%} to {max(shares):.0%} of the tokens; half of the heads at 1,024 tokens take {ratio:.2f} "
            f"of the time; parameters {more:+.1%} (routers in the paper's ViT-B: {router_share():+.1%} of attention)"
        ),
        control=_said(networks, MHA),
        holds=margin >= 0,
        margin=margin,
        values=_values(networks) | {"gain": gain, "time": ratio, "parameters": more},
    )


def weighted(networks: Networks) -> Measured:
    gain = networks.accuracy(GATED) - networks.accuracy(MHA)
    return Measured(
        measured=f"{_said(networks, GATED)}, {gain:+.2%} against multi-head attention",
        control=_said(networks, MHA, MOH_75, MOH_50),
        holds=gain - 1e-9 >= 0,
        margin=gain - 1e-9,
        values=_values(networks) | {"gain": gain},
    )


def outperforms(networks: Networks) -> Measured:
    gains = {kind: networks.accuracy(kind) - networks.accuracy(MHA) for kind in (MOH_75, MOH_50)}
    margin = min(gains.values()) - 1e-9
    return Measured(
        measured=f"{_said(networks, *gains)}; gains {', '.join(f'{gain:+.2%}' for gain in gains.values())}",
        control=_said(networks, MHA, GATED),
        holds=margin >= 0,
        margin=margin,
        values=_values(networks) | {f"gain, {kind}": gain for kind, gain in gains.items()},
    )


def continue_tuned(networks: Networks, converted: Converted) -> Measured:
    dense = networks.accuracy(MHA)
    kept = {name: mean(values) / dense for name, values in vars(converted).items()}
    margin = min(kept["tuned"] - 0.95, kept["tuned"] - kept["at_once"])
    return Measured(
        measured=f"{kept['at_once']:.1%} of the dense accuracy at once, {kept['tuned']:.1%} tuned",
        control=(
            f"random routed heads {kept['random_at_once']:.1%} at once, {kept['random_tuned']:.1%} tuned; dense "
            f"network tuned as long {kept['dense_tuned']:.1%}"
        ),
        holds=margin >= 0,
        margin=margin,
        values=kept | {"dense": dense},
    )


def non_inferior(networks: Networks) -> Measured:
    gain, shares = networks.accuracy(MOH_75) - networks.accuracy(MHA), networks.usage[MOH_75]
    margin = min(gain + LOSS, used_evenly(shares))
    fewer = networks.usage[MOH_50]
    return Measured(
        measured=(
            f"{gain:+.2%}; routed heads used by {min(shares):.0%} to {max(shares):.0%} of the tokens (50 %: "
            f"{min(fewer):.0%} to {max(fewer):.0%})"
        ),
        control=_said(networks, MHA),
        holds=margin >= 0,
        margin=margin,
        values={"gain": gain, "least used": min(shares), "most used": max(shares)},
    )


def measure_times(run: Run) -> Times:
    """Time of the sparse path over the dense one, attention alone: 16 heads of 64 channels, 4 of them shared."""
    run.log("timing attention")
    found = {}
    for tokens in (1024, 2048):
        for k in (4, 8):
            for causal in (False, True):
                generator = torch.Generator().manual_seed(0)
                q, key, v = (torch.randn(1, 16, tokens, 64, generator=generator) for _ in range(3))
                x = torch.randn(1, tokens, 64, generator=generator)
                torch.manual_seed(0)
                with torch.no_grad():
                    gates = LearnedRouter(64, 16, 4, k).eval()(x).gates
                ways = ("dense", "sparse")
                spent: dict[str, list[float]] = {way: [] for way in ways}
                with torch.no_grad():
                    for _ in range(ROUNDS + 1):
                        for way in ways:
                            start = time.perf_counter()
                            routed_attention(q, key, v, gates, causal=causal, implementation=way)
                            spent[way].append(time.perf_counter() - start)
                ratios = [a / b for a, b in zip(spent["sparse"][1:], spent["dense"][1:], strict=True)]
                found[tokens, k, causal] = (statistics.median(ratios), statistics.median(spent["dense"][1:]))
    return found


def speed(times: Times) -> Measured:
    wanted = {tokens: times[tokens, 4, False][0] for tokens in (1024, 2048)}
    margin = min(1 - ratio for ratio in wanted.values()) - 1e-9
    others = {
        f"{tokens} tokens, {(4 + k) / 16:.0%} of the heads{', causal' if causal else ''}": ratio
        for (tokens, k, causal), (ratio, _) in times.items()
        if k != 4 or causal
    }
    return Measured(
        measured=", ".join(f"{ratio:.2f} of the dense time at {tokens} tokens" for tokens, ratio in wanted.items()),
        control="; ".join(f"{name} {ratio:.2f}" for name, ratio in others.items()),
        holds=margin >= 0,
        margin=margin,
        values={str(tokens): ratio for tokens, ratio in wanted.items()} | others,
    )


def limit(networks: Networks) -> Measured:
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32)
    dense = SoftmaxAttention(32, 8).eval()
    layer = MixtureOfHeads(32, 8, 2, 6).eval()
    layer.qkv.load_state_dict(dense.qkv.state_dict())
    layer.proj.load_state_dict(dense.proj.state_dict())
    trained: Any = networks.models[MOH_50][0].blocks[0].attn
    with torch.no_grad():
        for weight in layer.router.parameters():
            weight.zero_()
        apart = float((layer(x) - dense(x)).abs().max())
        outs = []
        for way in ("dense", "sparse"):
            trained.implementation = way
            outs.append(trained(x))
        trained.implementation = "auto"
    paths = float((outs[0] - outs[1]).abs().max())
    margin = 1e-6 - max(apart, paths)
    return Measured(
        measured=f"{apart:.1e} from multi-head attention, {paths:.1e} between the paths",
        holds=margin >= 0,
        margin=margin,
        values={"limit": apart, "paths": paths},
    )


def activated() -> Measured:
    found = {name: 100 * activated_heads(layers) for name, layers in MOH_PRESETS.items()}
    off = max(abs(share - int(name.rsplit("-", 1)[1])) for name, share in found.items())
    return Measured(
        measured=", ".join(f"{name} {share:.1f} %" for name, share in found.items()),
        holds=off < 0.5,
        margin=0.5 - off,
        values=found,
    )


def draw(run: Run, networks: Networks, converted: Converted, times: Times) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 3, width=4.6) as (scores, tuned, clock):
        kinds = list(networks.accuracies)
        for number, kind in enumerate(kinds):
            values = networks.accuracies[kind]
            scores.scatter([number] * len(values), [100 * one for one in values], color="#7fb3bd")
            scores.scatter([number], [100 * networks.accuracy(kind)], color="#12315c", marker="D")
        scores.set_xticks(range(len(kinds)), [kind.replace(" of the", "\nof the") for kind in kinds], fontsize=8)
        scores.set(ylabel="accuracy on the digits, %", title="Trained from the start")
        dense = networks.accuracy(MHA)
        two = {"query norms": ("at_once", "tuned"), "random heads": ("random_at_once", "random_tuned")}
        kept = {name: [100 * mean(getattr(converted, one)) / dense for one in pair] for name, pair in two.items()}
        bars(tuned, ["at once", "tuned"], kept, y="% of the dense accuracy", title="Converted to 75 % of the heads")
        tuned.axhline(95, color="#5b6168", linewidth=1, linestyle="--")
        groups = [f"{tokens}{', causal' if causal else ''}" for tokens, k, causal in times if k == 4]
        ratios = {f"{(4 + k) / 16:.0%} active": [times[key][0] for key in times if key[1] == k] for k in (4, 8)}
        bars(clock, groups, ratios, x="tokens", y="time over dense attention", title="Computing only chosen heads")
        clock.axhline(1, color="#5b6168", linewidth=1, linestyle="--")
        clock.tick_params(axis="x", labelsize=8)
    run.figures.append(path)
