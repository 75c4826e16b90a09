"""The rows of positional_attention.py, one function for each, and its picture."""

from collections.abc import Mapping

import torch
from torch import Tensor

from headwise.attention.positional import PositionalAttention
from headwise.models.positional import turned
from headwise.papers._positional_setup import (
    LENGTH,
    POSITIONAL,
    RANGES,
    ROPE,
    STANDARD,
    SYMBOLS,
    TASKS,
    TRAINED,
    Fitted,
    by_hand,
    wider_hops,
)
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, MARKERS, figure
from headwise.tasks.algorithmic import algorithm

Found = Mapping[tuple[str, str], Fitted]


def parallel_algorithms(run: Run) -> Measured:
    generator = torch.Generator().manual_seed(run.seed)
    values = 2000 * torch.rand(1000, LENGTH, generator=generator, dtype=torch.float64) - 1000
    apart, even, layers = {}, {}, 0
    for task in ("sum", "min", "max"):
        answers, model = algorithm(task, values), by_hand(task)
        layers = len(model.blocks)
        with torch.no_grad():
            apart[task] = (model(values[..., None]).values[..., 0] - answers).abs().max().item()
            spread = by_hand(task, sharpness=0.0)(values[..., None]).values[..., 0]
            even[task] = (spread - answers).abs().max().item()
    holds = max(apart.values()) <= 1e-9 and layers == LENGTH.bit_length() and min(even.values()) > 1
    return Measured(
        measured=f"{layers} layers, off by at most " + ", ".join(f"{task} {off:.0e}" for task, off in apart.items()),
        control="even weights: off by " + ", ".join(f"{task} {off:.0f}" for task, off in even.items()),
        holds=holds,
        values={f"off, {task}": off for task, off in apart.items()},
    )


def _linear(layer, *inputs: Tensor) -> float:
    """How far a layer is from linear, as a share of its largest value: f(x + y) + f(0) against f(x) + f(y)."""
    x, y = inputs
    zero, both = layer(torch.zeros_like(x)), layer(x + y)
    return ((both + zero - layer(x) - layer(y)).abs().max() / both.abs().max()).item()


def positions_only(found: Found) -> Measured:
    model, other = found[POSITIONAL, "sum"].model, found[STANDARD, "sum"].model
    positions = model.encodings(LENGTH)
    layer = model.blocks[0].attention
    assert isinstance(layer, PositionalAttention)
    seen: list[Tensor] = []
    hook = layer.qk.register_forward_hook(lambda module, given, out: seen.append(out.detach().clone()))
    x, y = torch.randn(2, 4, LENGTH + 1, 64, generator=torch.Generator().manual_seed(0))
    # With gradients on, weights are made anew at each call; their inputs are the encodings alone.
    x.requires_grad_()
    layer(x, positions)
    layer(y, positions)
    hook.remove()
    weights = layer.attention_weights(positions)
    gradient = torch.autograd.grad(weights.square().sum(), x, allow_unused=True)[0]
    same = len(seen) == 2 and torch.equal(*seen)
    with torch.no_grad():
        ours = _linear(lambda one: layer(one, positions), x, y)
        theirs = _linear(lambda one: other.blocks[0].attention(one, None), x, y)  # type: ignore[operator, union-attr]
    return Measured(
        measured=f"weights {'equal' if same else 'differ'}, gradient {'none' if gradient is None else 'some'}, "
        f"not linear by {ours:.0e}",
        control=f"standard: not linear by {theirs:.2f}",
        holds=same and gradient is None and ours <= 1e-5 and theirs > 1e-3,
        values={"not linear": ours, "not linear, standard": theirs},
    )


def out_of_distribution(found: Found) -> Measured:
    margins, said, other = [], [], []
    for task in TASKS:
        ours, theirs = found[POSITIONAL, task], found[STANDARD, task]
        for multiple in (3, 10):
            margins.append(theirs.errors[multiple] / ours.errors[multiple] / 10 - 1)
        margins.append(1 - ours.errors[1] / ours.variances[1] / 0.01)
        margins.append(1 - ours.errors[10] / ours.variances[10] / 0.05)
        ratios = ", ".join(f"{m}x {theirs.errors[m] / ours.errors[m]:.1f}" for m in RANGES)
        shares = ", ".join(f"{m}x {ours.errors[m] / ours.variances[m]:.1e}" for m in (1, 10))
        said.append(f"{task}: MSE of standard over positional {ratios}; positional MSE over variance {shares}")
        other.append(f"{task}: " + ", ".join(f"{m}x {theirs.errors[m] / theirs.variances[m]:.1e}" for m in RANGES))
    sizes = {k: sum(p.numel() for p in found[k, "sum"].model.parameters()) for k in (POSITIONAL, STANDARD)}
    margin = min(margins) - 1e-9
    return Measured(
        measured="; ".join(said),
        control=f"standard MSE over variance: {'; '.join(other)}; parameters {sizes[STANDARD]:,}, positional "
        f"{sizes[POSITIONAL]:,}",
        holds=margin >= 0,
        margin=margin,
        values={
            f"{kind}, {task}, {m}x: MSE": found[kind, task].errors[m]
            for kind in (POSITIONAL, STANDARD)
            for task in TASKS
            for m in RANGES
        }
        | {f"{task}, {m}x: variance": found[POSITIONAL, task].variances[m] for task in TASKS for m in RANGES},
    )


def rope(found: Found) -> Measured:
    ours = found[POSITIONAL, "sum"].errors
    ratio = {kind: found[kind, "sum"].errors[10] / ours[10] for kind in (ROPE, STANDARD)}
    margin = ratio[ROPE] / 10 - 1
    return Measured(
        measured=f"rotary over positional at 10x {ratio[ROPE]:.1f}, at 1x {found[ROPE, 'sum'].errors[1] / ours[1]:.2f}",
        control=f"without rotation at 10x {ratio[STANDARD]:.1f}",
        holds=margin >= 0,
        margin=margin,
        values={f"MSE at 10x, {kind}": found[kind, "sum"].errors[10] for kind in (POSITIONAL, STANDARD, ROPE)},
    )


def official_rope(run: Run) -> Measured:
    q, k = torch.randn(2, 3, 2, LENGTH + 1, 64, generator=torch.Generator().manual_seed(run.seed))
    scores = q @ k.mT
    by_head = turned(q.transpose(1, 2)).transpose(1, 2) @ turned(k.transpose(1, 2)).transpose(1, 2).mT
    by_token = turned(q) @ turned(k).mT
    apart, moved = ((one - scores).abs().max() / scores.abs().max() for one in (by_head, by_token))
    return Measured(
        measured=f"by head: scores change by {apart:.0e} of the largest; by token: {moved:.2f}",
        holds=bool(apart <= 1e-5) and bool(moved > 0.05),
        values={"by head": apart.item(), "by token": moved.item()},
    )


def recall(right: Mapping[str, float]) -> Measured:
    standard, ours = right["standard, 2 layers"], right["positional, 2 layers"]
    margin = min(standard - 0.9, standard - ours - 0.2)
    return Measured(
        measured=f"standard {standard:.3f}, positional {ours:.3f}",
        control=f"positional with 4 layers {right['positional, 4 layers']:.3f}; chance {1 / SYMBOLS:.3f}",
        holds=margin >= 0,
        margin=margin,
        values=dict(right),
    )


def _shares(one: Fitted) -> dict[int, float]:
    """MSE over the variance of the answers, by multiple of the range."""
    return {multiple: one.errors[multiple] / one.variances[multiple] for multiple in RANGES}


def hops(found: Mapping[str, Fitted], run: Run) -> Measured:
    """found: networks on chains of pointers, by kind."""
    held = wider_hops(1, run.seed)
    guess = ((held.numbers.mean(1, keepdim=True) - held.answers).square().mean() / held.answers.var()).item()
    ours, theirs = _shares(found[POSITIONAL]), _shares(found[STANDARD])
    margin = min(1 - theirs[1] / 0.05 - 1e-9, ours[1] / theirs[1] - 1, ours[10] / 0.05 - 1 - 1e-9)
    said = {kind: ", ".join(f"{m}x {share:.1e}" for m, share in of.items()) for kind, of in ((0, ours), (1, theirs))}
    return Measured(
        measured=f"positional MSE over variance {said[0]}",
        control=f"standard {said[1]}; the list's mean {guess:.1e}",
        holds=margin >= 0,
        margin=margin,
        values={
            f"{kind}, {m}x: MSE over variance": share
            for kind, of in ((POSITIONAL, ours), (STANDARD, theirs))
            for m, share in of.items()
        }
        | {"the list's mean: MSE over variance": guess},
    )


def draw(run: Run, found: Found, hopped: Mapping[str, Fitted]) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 4, width=3.8) as (*errors, routes):
        drawn = {
            f"Prefix {task}": {kind: found[kind, task] for kind in TRAINED if (kind, task) in found} for task in TASKS
        }
        drawn["Two pointers"] = {kind: hopped[kind] for kind in TRAINED if kind in hopped}
        for axes, (title, kinds) in zip(errors, drawn.items(), strict=True):
            for place, (kind, one) in enumerate(kinds.items()):
                shares = list(_shares(one).values())
                axes.plot(RANGES, shares, color=COLOURS[place], marker=MARKERS[place], label=kind)
            axes.set_yscale("log")
            axes.set(xlabel="test range over training range", ylabel="MSE over variance", title=title)
            axes.legend(fontsize=8)
        model = found[POSITIONAL, "sum"].model
        with torch.no_grad():
            weights = [block.attention.attention_weights(model.encodings(LENGTH)) for block in model.blocks]  # type: ignore[operator, union-attr]
        shown = torch.cat([torch.cat(list(one), 1) for one in weights])
        routes.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=1)
        routes.set_xticks([4, 13], ["head 0", "head 1"])
        routes.set_yticks([4 + 9 * place for place in range(len(weights))], [f"layer {i}" for i in range(len(weights))])
        routes.set_title("Weights on prefix sums")
    run.figures.append(path)
