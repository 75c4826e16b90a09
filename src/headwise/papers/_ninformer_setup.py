"""What ninformer.py trains and counts, and its rows, one function for each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.mixer_gate import MixerGate
from headwise.models.ninformer import NiNformerConfig, NiNformerForImageClassification
from headwise.models.small_vit import SmallViT, SmallViTConfig
from headwise.ops.counting import flops
from headwise.papers.running import Run
from headwise.papers.statistics import mean
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure, lines
from headwise.tasks.digits import Digits, digit_batches, digit_images
from headwise.training import fit

NIN, NO_MIXING, SUM, MIXER, VIT = "NiNformer", "gate without mixing", "sum, not product", "MLP-Mixer", "ViT"
DEEP_MIXER = "MLP-Mixer, 6 blocks"  # as many parameters as the NiNformer has
KINDS = (NIN, NO_MIXING, SUM, MIXER, DEEP_MIXER, VIT)
WIDTH, HIDDEN, DEPTH, DROPOUT = 48, 96, 3, 0.1
STEPS, BATCH, INITS = 400, 64, 1
TOKENS = (64, 256, 1024)


class NoMixing(MixerGate):
    """The gate without its token mixing: each token is gated by what it says itself."""

    def mix(self, x: Tensor) -> Tensor:
        hidden = self.dropout(nn.functional.gelu(self.channel_up(self.channel_norm(x))))
        return x + self.dropout(self.channel_down(hidden))


class Sum(MixerGate):
    """The two factors added: nothing is gated."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + self.mix(x)


class MixerBlock(MixerGate):
    """The MLP-Mixer block alone, in the place of a whole block."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


def config(depth: int = DEPTH) -> NiNformerConfig:
    return NiNformerConfig(8, 2, 1, dim=WIDTH, ffn_dim=HIDDEN, depth=depth, dropout=DROPOUT)


def build(kind: str) -> Any:
    """A classifier of 8 x 8 pixels in patches of 2 x 2, with torch's own initialisation."""
    if kind == VIT:
        sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
        return SmallViT(SmallViTConfig(mlp_ratio=HIDDEN / WIDTH, dropout=DROPOUT, **sizes))
    mixer = kind in (MIXER, DEEP_MIXER)
    model: Any = NiNformerForImageClassification(config(2 * DEPTH if kind == DEEP_MIXER else DEPTH))
    gates = {NO_MIXING: NoMixing, SUM: Sum}
    for number, block in enumerate(model.blocks):
        if kind in gates:
            block.gate = gates[kind](WIDTH, 16, HIDDEN, HIDDEN, DROPOUT)
        elif mixer:
            model.blocks[number] = MixerBlock(WIDTH, 16, HIDDEN, HIDDEN, DROPOUT)
    if kind == NO_MIXING:  # parameters that it has no use for
        for block in model.blocks:
            del block.gate.token_norm, block.gate.token_up, block.gate.token_down
    if mixer:
        for block in model.blocks:
            del block.proj
    return model


@torch.no_grad()
def accuracy(model: Any, data: Digits, device: str) -> float:
    """Share of right test images, in points."""
    said = model(data.test_images.to(device)).logits.argmax(-1).cpu()
    return 100 * float((said == data.test_labels).double().mean())


@dataclass
class Trained:
    """Test accuracies in points, one a start; parameters in thousands; and the first NiNformer."""

    points: dict[str, list[float]]
    parameters: dict[str, float]
    model: Any = None

    @classmethod
    def of(cls, run: Run) -> "Trained":
        data, points, parameters, first = digit_images(600), {}, {}, None

        def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            images, labels = (part.to(run.device) for part in batch)
            return model(images, labels=labels).loss

        for kind in KINDS:
            run.log(f"training {kind}")
            for start in range(INITS):
                seed = 10 * run.seed + start
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = build(kind).to(run.device)
                fit(
                    model,
                    digit_batches(data, BATCH),
                    loss,
                    steps=STEPS,
                    seed=seed,
                    optimiser=lambda parameters: torch.optim.Adam(parameters, 1e-3),
                    clip=None,
                )
                points.setdefault(kind, []).append(accuracy(model, data, run.device))
                parameters[kind] = sum(p.numel() for p in model.parameters()) / 1000
                if kind == NIN and first is None:
                    first = model
        return cls(points, parameters, first)

    def mean(self, kind: str) -> float:
        return mean(self.points[kind])

    def sizes(self) -> str:
        return ", ".join(f"{kind} {thousands:.0f} k" for kind, thousands in self.parameters.items())

    def said(self, *kinds: str) -> str:
        return ", ".join(f"{kind} {self.mean(kind):.2f} %" for kind in kinds)

    def values(self) -> dict[str, float]:
        return {kind: self.mean(kind) for kind in self.points}


@dataclass
class Counted:
    """Multiply-adds in millions of four blocks of width 256 and hidden size 512, counted on the modules."""

    blocks: dict[str, dict[int, float]]
    classifier: int  # parameters of the official classifier for CIFAR-10

    @classmethod
    def of(cls) -> "Counted":
        found: dict[str, dict[int, float]] = {NIN: {}, MIXER: {}, VIT: {}}
        for tokens in TOKENS:
            side = round(tokens**0.5)
            x = torch.zeros(1, tokens, 256)
            network: Any = NiNformerForImageClassification(NiNformerConfig(4 * side, 4, dropout=0.0, depth=1))
            sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
            vit: Any = SmallViT(SmallViTConfig(4 * side, 4, mlp_ratio=2.0, **sizes))
            network.to("meta")
            vit.to("meta")
            for kind, call in ((NIN, network.blocks[0]), (MIXER, network.blocks[0].gate.mix), (VIT, vit.blocks[0])):
                found[kind][tokens] = 4 * flops(call, (x,)) / 2e6
        model = NiNformerForImageClassification(NiNformerConfig())
        return cls(found, sum(p.numel() for p in model.parameters()))


def compute(counted: Counted) -> Measured:
    at, vit, mixer = counted.blocks[NIN], counted.blocks[VIT], counted.blocks[MIXER]
    ratio = at[64] / vit[64]
    margin = 1 - ratio - 1e-9
    others = [f"{n:,} tokens {at[n] / vit[n]:.2f} of ViT, {at[n] / mixer[n]:.2f} of the Mixer" for n in TOKENS]
    return Measured(
        measured=f"64 tokens: {at[64]:.1f} M multiply-adds, ViT {vit[64]:.1f} M: {ratio:.2f} times as many",
        control="; ".join(others),
        holds=margin >= 0,
        margin=margin,
        values={f"over ViT at {n}": at[n] / vit[n] for n in TOKENS},
    )


def influence(model: Any, device: str) -> float:
    """The smallest influence of a token on another token's multipliers, in any block of a trained model: the norm of
    the gradient of a random sum of its multipliers, over 16 test images."""
    least: list[float] = []

    def hook(gate: MixerGate, args: tuple[Tensor]) -> None:
        z = args[0].detach().requires_grad_()
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(z.shape[-1], generator=generator).to(z)
        with torch.enable_grad():
            said = gate.mix(z) @ direction
            for token in range(z.shape[1]):
                (gradient,) = torch.autograd.grad(said[:, token].sum(), z, retain_graph=True)
                others = torch.arange(z.shape[1], device=z.device) != token
                least.append(float(gradient.norm(dim=-1)[:, others].min()))

    hooks = [block.gate.register_forward_pre_hook(hook) for block in model.blocks]
    try:
        with torch.no_grad():
            model(digit_images(600).test_images[:16].to(device))
    finally:
        for one in hooks:
            one.remove()
    return min(least)


def dynamic(trained: Trained, run: Run) -> Measured:
    least = influence(trained.model, run.device)
    gain = trained.mean(NIN) - trained.mean(MIXER)
    margin = min(gain, least if least > 0 else -1.0) if gain >= 0 else gain
    return Measured(
        measured=f"smallest influence of another token on a multiplier {least:.1e}; {trained.said(NIN, MIXER)}",
        control=trained.said(DEEP_MIXER, SUM, NO_MIXING),
        holds=margin >= 0,
        margin=margin,
        values={**trained.values(), "influence": least},
    )


def better(trained: Trained) -> Measured:
    margin = trained.mean(NIN) - max(trained.mean(VIT), trained.mean(MIXER)) - 1e-9
    return Measured(
        measured=trained.said(NIN, VIT, MIXER),
        control=f"{trained.said(DEEP_MIXER, SUM)}; parameters: {trained.sizes()}",
        holds=margin >= 0,
        margin=margin,
        values=trained.values(),
    )


def better_than_vit(trained: Trained) -> Measured:
    margin = trained.mean(NIN) - trained.mean(VIT) - 1
    return Measured(
        measured=trained.said(NIN, VIT),
        control=f"parameters: {trained.sizes()}",
        holds=margin >= 0,
        margin=margin,
        values={"gain": margin + 1},
    )


def needs_mixing(trained: Trained) -> Measured:
    margin = trained.mean(NIN) - trained.mean(NO_MIXING) - 10
    return Measured(
        measured=trained.said(NIN),
        control=trained.said(NO_MIXING),
        holds=margin >= 0,
        margin=margin,
        values={"gain": margin + 10},
    )


def operations(counted: Counted) -> Measured:
    d, hidden, apart = 256, 512, 0.0
    for n in TOKENS:
        formula = {
            NIN: n * (2 * hidden * d + 2 * hidden * d + d * d + 2 * hidden * d),
            MIXER: n * 4 * hidden * d,
            VIT: n * (4 * d * d + 2 * hidden * d) + 2 * n * n * d,
        }
        apart = max(apart, *(abs(4 * formula[kind] / 1e6 - counted.blocks[kind][n]) for kind in formula))
    margin = min(1e-9 - apart, 0.0 if counted.classifier == 2_652_170 else -1.0)
    said = "; ".join(
        f"{n:,} tokens: " + ", ".join(f"{kind} {row[n]:.1f} M" for kind, row in counted.blocks.items()) for n in TOKENS
    )
    return Measured(
        measured=f"{said}; {counted.classifier:,} parameters",
        holds=margin >= 0,
        margin=margin,
        values={"difference": apart, "parameters": counted.classifier},
    )


def draw(run: Run, trained: Trained, counted: Counted) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 2, width=5.0) as (left, right):
        bars(left, [""], {kind: [value] for kind, value in trained.values().items()}, y="right, %", title="Digits")
        series = {kind: list(row.values()) for kind, row in counted.blocks.items()}
        lines(right, TOKENS, series, x="tokens", y="multiply-adds of 4 blocks, M", title="Cost")
        right.set_xscale("log", base=2)
        right.set_yscale("log")
    run.figures.append(path)
