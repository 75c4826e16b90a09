"""What mixture_of_head_attention.py measures on: small vision transformers on the digits, and one of them converted."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.mixture_of_head import HeadGates, HeadRouter, check_split, moh_loss
from headwise.models.conversion import convert
from headwise.models.convert_mixture_of_head import head_usage
from headwise.models.small_vit import SmallViT, SmallViTConfig
from headwise.papers.running import Run
from headwise.tasks.digits import Digits, digit_batches, digit_images
from headwise.training import OptimiserSpec, fit

BATCH, STEPS, RATE = 100, 360, 2e-3  # 30 passes over the 1,200 training images
TUNING, TUNING_RATE = 72, 5e-4
WEIGHT = 0.01  # of the load-balance loss, the paper's
NETWORKS = 2  # of each kind and seed
SHARED = 2  # of 8 heads

MHA, GATED, MOH_75, MOH_50 = "multi-head", "gates, all heads", "75 % of the heads", "50 % of the heads"
TOP_K = {GATED: 6, MOH_75: 4, MOH_50: 2}


def one_cycle(step: int, steps: int) -> float:
    """Up by half a cosine over three tenths of the steps, then down to nothing."""
    rise = int(0.3 * steps)
    if step < rise:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * step / rise))
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def train(model: SmallViT, data: Digits, *, steps: int, rate: float, seed: int) -> SmallViT:
    """AdamW with label smoothing 0.1, and the load-balance loss where there are routers."""
    routed = any(isinstance(part, HeadRouter) for part in model.modules())

    def loss(net: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = net(batch[0]).logits
        task = nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.1)
        return task + WEIGHT * moh_loss(net) if routed else task

    optimiser = OptimiserSpec(lr=rate, betas=(0.9, 0.999), weight_decay=0.05)
    batches = digit_batches(data, BATCH)
    fit(model, batches, loss, steps=steps, seed=seed, optimiser=optimiser, schedule=one_cycle, clip=None)
    return model


def network(kind: str, seed: int) -> SmallViT:
    torch.manual_seed(seed)
    if kind == MHA:
        return SmallViT(SmallViTConfig())
    options = {"num_shared": SHARED, "top_k": TOP_K[kind]}
    return SmallViT(SmallViTConfig(attention="MixtureOfHeads", attention_options=options))


@torch.no_grad()
def accuracy(model: SmallViT, data: Digits) -> float:
    return float((model(data.test_images).logits.argmax(-1) == data.test_labels).double().mean())


@dataclass
class Networks:
    """Trained networks of each kind, their accuracies on the test images, and how many tokens use each routed head."""

    models: Mapping[str, Sequence[SmallViT]]
    accuracies: Mapping[str, Sequence[float]]
    usage: Mapping[str, Sequence[float]]
    data: Digits

    def accuracy(self, kind: str) -> float:
        return sum(self.accuracies[kind]) / len(self.accuracies[kind])


def train_networks(run: Run) -> Networks:
    data = digit_images(1200)
    seeds = [100 * run.seed + number for number in range(NETWORKS)]
    models: dict[str, list[SmallViT]] = {}
    for kind in (MHA, GATED, MOH_75, MOH_50):
        run.log(f"training: {kind}")
        models[kind] = [train(network(kind, seed), data, steps=STEPS, rate=RATE, seed=seed) for seed in seeds]
    accuracies = {kind: [accuracy(model, data) for model in made] for kind, made in models.items()}
    usage = {kind: [share for model in models[kind] for share in routed_usage(model, data)] for kind in TOP_K}
    return Networks(models, accuracies, usage, data)


def routed_usage(model: SmallViT, data: Digits) -> list[float]:
    """Share of the test tokens that use each routed head, all layers."""
    scores = head_usage(model, data.test_images).of()
    return [float(share) for head, share in scores.items() if share is not None and head.head >= SHARED]


class RandomRouter(HeadRouter):
    """The control: the routed heads of every token drawn anew."""

    def forward(self, q: Tensor, attention_mask: Tensor | None = None) -> HeadGates:
        heads, shared, k = check_split("RandomRouter", *self.split)
        scores = torch.rand(q.shape[0], q.shape[-2], heads - shared)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argsort(-1)[..., :k], True)
        gates = torch.cat([torch.ones(*scores.shape[:2], shared), chosen.to(scores.dtype)], -1)
        return self.keep(HeadGates(gates, scores.softmax(-1), chosen), attention_mask)


@dataclass
class Converted:
    """Accuracies of the converted networks, one for each dense network: at once and tuned, and of the controls."""

    at_once: list[float]
    tuned: list[float]
    random_at_once: list[float]
    random_tuned: list[float]
    dense_tuned: list[float]

    @classmethod
    def of(cls, networks: Networks, run: Run) -> "Converted":
        made = cls([], [], [], [], [])
        for number, dense in enumerate(networks.models[MHA]):
            run.log(f"converting and tuning network {number + 1} of {NETWORKS}")
            seed = 100 * run.seed + number
            routed = convert(copy.deepcopy(dense), to="mixture-of-head", active=0.75, shared=0.5).eval()
            torch.manual_seed(seed)
            arms = {"": routed, "random_": with_random_routers(copy.deepcopy(routed))}
            for prefix, model in arms.items():
                getattr(made, f"{prefix}at_once").append(accuracy(model, networks.data))
            for name, model in {**arms, "dense_": copy.deepcopy(dense)}.items():
                train(model, networks.data, steps=TUNING, rate=TUNING_RATE, seed=seed + 50)
                getattr(made, f"{name}tuned").append(accuracy(model, networks.data))
        return made


def with_random_routers(model: SmallViT) -> SmallViT:
    for block in model.blocks:
        attention: Any = block.attn
        attention.router = RandomRouter(*attention.router.split).eval()
    return model
