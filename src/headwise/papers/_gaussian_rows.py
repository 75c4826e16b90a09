"""The rows of gaussian_adaptive_attention.py, one function for each, and its picture."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.gaussian_adaptive import gaussian_attention_weights, importance_factor
from headwise.models.gaussian_adaptive import GaussianAdaptiveConfig, GaussianAdaptiveTransformer
from headwise.papers._gaussian_setup import (
    BOTH,
    BURSTS,
    COMPARED,
    CONTAMINATED,
    GAAM,
    GAAM_5,
    GAAM_SUM,
    MEAN,
    MHA,
    Trained,
    attention_received,
    auroc,
    gaussian,
    series,
)
from headwise.papers.running import Run
from headwise.papers.statistics import mean
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure
from headwise.training import OptimiserSpec, fit

Found = Mapping[tuple[str, str], Trained]
MODES = {"one mode": (0.5,), "two modes": (-1.2, 1.2), "three modes": (-1.6, 0.0, 1.6)}


def _said(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())


def _accuracies(found: Found, task: str, *names: str) -> dict[str, float]:
    return {name: found[task, name].accuracy for name in names}


def encoders() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """A small speech, text and vision encoder of transformers with random weights, and inputs for it."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel, Wav2Vec2Config, Wav2Vec2Model

    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    }  # fmt: skip
    speech: dict[str, Any] = {
        "conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    return {
        "speech": (Wav2Vec2Model(Wav2Vec2Config(**sizes, **speech)), {"input_values": torch.randn(12, 800)}),
        "text": (
            BertModel(BertConfig(**sizes, vocab_size=60)),
            {"input_ids": torch.randint(0, 60, (12, 16)), "attention_mask": torch.ones(12, 16, dtype=torch.long)},
        ),
        "vision": (
            ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)),
            {"pixel_values": torch.randn(12, 3, 16, 16)},
        ),
    }  # fmt: skip


def modalities(run: Run) -> Measured:
    fell, ends, sound = {}, {}, True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        for name, (encoder, inputs) in encoders().items():
            with torch.no_grad():
                states = encoder.eval()(**inputs, output_hidden_states=True).hidden_states
            labels = torch.arange(12) % 4
            for heads in (None, 4):
                sizes: dict[str, Any] = {"feature_size": 32, "num_feature_layers": len(states), "num_labels": 4}
                config = GaussianAdaptiveConfig(
                    **sizes, num_attention_heads=heads, num_kv_heads=heads and 2, num_heads=4, hidden_size=32
                )
                model = GaussianAdaptiveTransformer(config)
                losses = fit(
                    model,
                    [(states, labels)] * 20,
                    lambda net, batch: net(batch[0], labels=batch[1]).loss,
                    steps=20,
                    optimiser=OptimiserSpec(lr=3e-3),
                ).losses
                label = name if heads is None else f"{name}, grouped queries"
                fell[label] = losses[0] - losses[-1]
                factor = model.importance(states)
                ends[label] = factor
                sound &= factor.shape == (12, len(states), *states[0].shape[1:])
                sound &= bool((factor.flatten(1).amin(1) == 0).all() and (factor.flatten(1).amax(1) == 1).all())
    return Measured(
        measured=f"loss falls by {_said(fell)}; Importance Factors {'from 0 to 1' if sound else 'out of range'}",
        holds=sound and min(fell.values()) > 0,
        values={f"fall of the loss, {name}": value for name, value in fell.items()},
    )


def values_and_target(modes: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """512 standardised values, and weights with modes of width 0.3 at these places."""
    x = torch.linspace(-3, 3, 512, dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    density = sum(torch.exp(-0.5 * ((x - centre) / 0.3) ** 2) for centre in modes)
    return x, density / density.sum()  # type: ignore[union-attr, operator]


@cache
def fitted(modes: tuple[float, ...], combine: str, steps: int = 400) -> tuple[Tensor, float]:
    """Weights of 5 Gaussians that were fitted to a target by gradient descent, and what is left, in nats."""
    x, target = values_and_target(modes)
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randn(5, generator=rng, dtype=torch.float64) * size for size in (1.0, 0.3, 0.1)]
    offset, log_width, mixture = (one.requires_grad_() for one in drawn)
    rule = torch.optim.Adam([offset, log_width, mixture], lr=0.05)
    for step in range(steps + 1):
        weights = gaussian_attention_weights(x, offset, log_width.exp(), combine=combine, mixture=mixture)
        left = (target * (target.clamp_min(1e-300).log() - weights.clamp_min(1e-300).log())).sum()
        if step < steps:
            rule.zero_grad()
            left.backward()
            rule.step()
    return weights.detach(), left.item()


def any_distribution() -> Measured:
    left = {name: fitted(modes, "product")[1] for name, modes in MODES.items()}
    summed = {name: fitted(modes, "sum")[1] for name, modes in MODES.items()}
    margin = 0.05 - max(left.values())
    return Measured(
        measured=f"KL in nats: {_said(left)}",
        control=f"sum: {_said(summed)}",
        holds=margin >= 0,
        margin=margin,
        values={f"product, {name}": value for name, value in left.items()}
        | {f"sum, {name}": value for name, value in summed.items()},
    )


def surpasses(found: Found) -> Measured:
    right = _accuracies(found, CONTAMINATED, GAAM, MHA, MEAN, GAAM_SUM)
    margin = right[GAAM] - right[MHA] - 0.01
    return Measured(
        measured=f"{_said({GAAM: right[GAAM]})} with {found[CONTAMINATED, GAAM].attention_parameters} parameters of "
        f"attention (a sum of 5: {right[GAAM_SUM]:.3f})",
        control=f"{_said({MHA: right[MHA]})} with {found[CONTAMINATED, MHA].attention_parameters}; "
        f"{_said({MEAN: right[MEAN]})}",
        holds=margin >= 0,
        margin=margin,
        values=right,
    )


def boosts(found: Found) -> Measured:
    right = _accuracies(found, CONTAMINATED, BOTH, MHA)
    sizes = {name: sum(p.numel() for p in found[CONTAMINATED, name].model.parameters()) for name in (BOTH, MHA)}
    more = sizes[BOTH] / sizes[MHA] - 1
    margin = min(right[BOTH] - right[MHA] - 0.01, 0.01 - more - 1e-9)
    return Measured(
        measured=f"{_said({BOTH: right[BOTH]})}, {more:.2%} more parameters",
        control=_said({MHA: right[MHA]}),
        holds=margin >= 0,
        margin=margin,
        values=right,
    )


def across_tasks(found: Found) -> Measured:
    right = {task: _accuracies(found, task, GAAM, MEAN, MHA) for task in COMPARED}
    margin = min(one[GAAM] - max(one[MEAN], one[MHA]) for one in right.values()) - 1e-9
    bursts = _accuracies(found, BURSTS, GAAM_SUM)
    return Measured(
        measured="; ".join(f"{task}: {_said({GAAM: one[GAAM]})}" for task, one in right.items())
        + f" ({_said(bursts)} on bursts)",
        control="; ".join(f"{task}: {_said({MEAN: one[MEAN], MHA: one[MHA]})}" for task, one in right.items()),
        holds=margin >= 0,
        margin=margin,
        values={f"{task}, {name}": value for task, one in right.items() for name, value in one.items()}
        | {f"{BURSTS}, {GAAM_SUM}": bursts[GAAM_SUM]},
    )


@torch.no_grad()
def areas(found: Found, run: Run) -> dict[str, float]:
    """How well each score tells clean cells of contaminated series from shifted ones, and bursts from the rest."""
    held = series(CONTAMINATED, run.seed, test=True)
    x, clean = held.values, ~held.changed
    trained, fresh = found[CONTAMINATED, GAAM].model.gaussian, gaussian()
    assert trained is not None
    received = attention_received(found[CONTAMINATED, MHA].model, x)[..., None].expand_as(x)
    burst = series(BURSTS, run.seed, test=True)
    pooled = found[BURSTS, GAAM].model.gaussian
    assert pooled is not None
    return {
        "Importance Factor": auroc(importance_factor(trained.weights(x)), clean),
        "before training": auroc(importance_factor(fresh.weights(x)), clean),
        "attention received": auroc(received, clean),
        "near the median": auroc(-(x - x.median(1, keepdim=True).values).abs(), clean),
        "bursts": auroc(importance_factor(pooled.weights(burst.values)), burst.changed),
    }


def _importance_margin(area: Mapping[str, float]) -> float:
    """By how much the criterion of the row importance is met."""
    learned = area["Importance Factor"]
    return min(learned - 0.95, learned - area["attention received"] - 0.1, learned - area["before training"] - 1e-9)


def importance(found: Found, run: Run) -> Measured:
    area = areas(found, run)
    margin = _importance_margin(area)
    return Measured(
        measured=f"area {area['Importance Factor']:.4f} for clean cells; {area['bursts']:.3f} for bursts",
        control=f"before training {area['before training']:.4f}, "
        + _said({name: area[name] for name in ("attention received", "near the median")}),
        holds=margin >= 0,
        margin=margin,
        values=area,
    )


def overall(found: Found, run: Run) -> Measured:
    right = {name: mean([found[task, name].accuracy for task in COMPARED]) for name in (GAAM, MHA, MEAN)}
    area = areas(found, run)
    margin = min(right[GAAM] - right[MHA] - 1e-9, _importance_margin(area))
    return Measured(
        measured=f"mean over tasks {_said({GAAM: right[GAAM]})}; area {area['Importance Factor']:.3f}",
        control=_said({name: right[name] for name in (MHA, MEAN)}),
        holds=margin >= 0,
        margin=margin,
        values={f"mean over tasks, {name}": value for name, value in right.items()},
    )


def robust_pooling(found: Found) -> Measured:
    right = _accuracies(found, CONTAMINATED, GAAM, MEAN)
    margin = right[GAAM] - right[MEAN] - 0.04
    return Measured(
        measured=_said({GAAM: right[GAAM]}),
        control=_said({MEAN: right[MEAN]}),
        holds=margin >= 0,
        margin=margin,
        values=right,
    )


def product_of_densities(x: Tensor, offset: Tensor, width: Tensor) -> Tensor:
    """The definition, one Gaussian after the other, along the last axis."""
    z = (x[..., None] - x.mean(-1, keepdim=True)[..., None] - offset) / (x.var(-1) + 1e-8).sqrt()[..., None, None]
    weights = torch.distributions.Normal(0.0, width.abs()).log_prob(z).sum(-1).softmax(-1)
    return weights


def collapse(found: Found) -> Measured:
    rng, apart = torch.Generator().manual_seed(0), 0.0
    x = torch.randn(6, 40, generator=rng, dtype=torch.float64) * 3 + 1
    for count in (1, 2, 5, 16, 32):
        offset = torch.randn(count, generator=rng, dtype=torch.float64)
        width = 0.5 + torch.rand(count, generator=rng, dtype=torch.float64)
        other = product_of_densities(x, offset, width)
        apart = max(apart, (gaussian_attention_weights(x, offset, width) - other).abs().max().item())
    right = _accuracies(found, CONTAMINATED, GAAM, GAAM_5)
    difference = abs(right[GAAM_5] - right[GAAM])
    mixed, single = fitted(MODES["two modes"], "sum")[0], fitted(MODES["two modes"], "product")[0]
    unlike = ((mixed - single).abs().max() / mixed.max()).item()
    return Measured(
        measured=f"weights differ by {apart:.0e}; {_said(right)}",
        control=f"a sum and a single Gaussian: {unlike:.2f} of the largest weight",
        holds=apart <= 1e-12 and difference <= 0.02 and unlike > 0.1,
        values=right | {"difference of weights": apart},
    )


def sums_to_one(count: int, official: bool, draws: int = 200) -> float:
    """The share of draws of widths exp(N(0, 1)) for which every row of weights sums to 1."""
    rng, good = torch.Generator().manual_seed(count), 0
    for _ in range(draws):
        x = torch.randn(4, 128, 8, generator=rng)
        width = torch.randn(count, generator=rng).exp()
        weights = gaussian_attention_weights(x, torch.zeros(count), width, 1, official_clamp=official)
        good += bool(((weights.sum(1) - 1).abs() < 1e-3).all())
    return good / draws


def underflow() -> Measured:
    official, ours, few = sums_to_one(32, True), sums_to_one(32, False), sums_to_one(2, True)
    return Measured(
        measured=f"{official:.0%} of draws sum to 1 as released, {ours:.0%} in the softmax form",
        control=f"2 Gaussians as released: {few:.0%}",
        holds=official < 0.8 and ours == 1,
        values={"released, 32": official, "softmax, 32": ours, "released, 2": few},
    )


def draw(run: Run, found: Found) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 3, width=4.4) as (right, modes, cells):
        shown = {name: [found[task, name].accuracy for task in COMPARED] for name in (MEAN, GAAM, MHA)}
        bars(right, list(COMPARED), shown, y="test accuracy", title="Three tasks, three ways to pool")
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, fontsize=8)
        x, target = values_and_target(MODES["two modes"])
        modes.fill_between(x.tolist(), target.tolist(), color="#d5d9de", label="target")
        for combine in ("product", "sum"):
            modes.plot(x.tolist(), fitted(MODES["two modes"], combine)[0].tolist(), label=f"{combine} of 5")
        modes.set(xlabel="standardised value", ylabel="weight", title="Two modes: a product cannot")
        modes.legend(fontsize=8)
        held = series(CONTAMINATED, run.seed, test=True)
        pooled = found[CONTAMINATED, GAAM].model.gaussian
        assert pooled is not None
        with torch.no_grad():
            weights = pooled.weights(held.values[:1])[0, :, 0].tolist()
        values, changed = held.values[0, :, 0].tolist(), held.changed[0, :, 0].tolist()
        for wanted, label in ((False, "clean"), (True, "shifted")):
            at = [time for time, one in enumerate(changed) if one == wanted]
            cells.scatter([values[time] for time in at], [weights[time] for time in at], s=14, label=label)
        cells.set(xlabel="value", ylabel="weight", title="Weights of one channel after training")
        cells.legend(fontsize=8)
    run.figures.append(path)
