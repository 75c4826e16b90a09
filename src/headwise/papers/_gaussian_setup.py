"""What gaussian_adaptive_attention.py measures on: small classifiers that pool series by one attention or another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from headwise.attention.gaussian_adaptive import GaussianAdaptiveAttention
from headwise.attention.softmax import SoftmaxAttention
from headwise.papers.running import Run
from headwise.tasks.digits import digit_images
from headwise.tasks.series import Series, burst_series, contaminated_series
from headwise.training import OptimiserSpec, fit

CONTAMINATED, BURSTS, DIGITS = "contaminated", "bursts", "digits"
MEAN, GAAM, GAAM_5, GAAM_SUM, MHA, BOTH = "mean", "GAAM", "GAAM, 5 Gaussians", "GAAM, sum of 5", "MHA", "MHA and GAAM"
TRAIN, TEST, STEPS, BATCH = 4000, 2000, 400, 64
COMPARED = {
    CONTAMINATED: (MEAN, GAAM, GAAM_5, GAAM_SUM, MHA, BOTH),
    BURSTS: (MEAN, GAAM, GAAM_SUM, MHA),
    DIGITS: (MEAN, GAAM, MHA),
}


class Pooled(nn.Module):
    """Series `[b t c]` to logits: dot-product attention or none, a pooling over time, a layer of 32, a linear layer."""

    def __init__(self, channels: int, classes: int, dot_product: bool, gaussian: GaussianAdaptiveAttention | None):
        super().__init__()
        width = 32 if dot_product else channels
        self.embed = nn.Linear(channels, width) if dot_product else None
        self.attention = SoftmaxAttention(width, 4) if dot_product else None
        self.gaussian = gaussian
        self.head = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, classes))

    def features(self, x: Tensor) -> Tensor:
        return x if self.embed is None or self.attention is None else self.attention(self.embed(x))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.features(x)
        return self.head(rows.mean(1) if self.gaussian is None else self.gaussian(rows).sum(1))


def gaussian(count: int = 1, combine: str = "product") -> GaussianAdaptiveAttention:
    """One head over time, widths 1 at the start."""
    return GaussianAdaptiveAttention(1, count, dim=1, combine=combine, width_init=1.0)


MODELS: Mapping[str, Callable[[int, int], Pooled]] = {
    MEAN: lambda channels, classes: Pooled(channels, classes, False, None),
    GAAM: lambda channels, classes: Pooled(channels, classes, False, gaussian()),
    GAAM_5: lambda channels, classes: Pooled(channels, classes, False, gaussian(5)),
    GAAM_SUM: lambda channels, classes: Pooled(channels, classes, False, gaussian(5, "sum")),
    MHA: lambda channels, classes: Pooled(channels, classes, True, None),
    BOTH: lambda channels, classes: Pooled(channels, classes, True, gaussian()),
}


@cache
def series(task: str, seed: int, *, test: bool) -> Series:
    """Of one task. The digits are series of 8 rows of 8 pixels, in standard deviations of all pixels."""
    count, drawn = (TEST, 20_000 + seed) if test else (TRAIN, seed)
    if task == CONTAMINATED:
        return contaminated_series(count, seed=drawn, template_seed=seed)
    if task == BURSTS:
        return burst_series(count, seed=drawn)
    data = digit_images(1200)
    images, labels = (data.test_images, data.test_labels) if test else (data.images, data.labels)
    values = (images[:, 0] - data.images.mean()) / data.images.std()
    return Series(values, labels, torch.zeros_like(values, dtype=torch.bool))


@dataclass
class Trained:
    """A classifier and how many test series it gets right."""

    model: Pooled
    accuracy: float

    @property
    def attention_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) - sum(p.numel() for p in self.model.head.parameters())


def train(task: str, name: str, seed: int, steps: int = STEPS) -> Trained:
    data, held = series(task, seed, test=False), series(task, seed, test=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](data.values.shape[2], int(data.labels.max()) + 1)
        if name in (GAAM_5, GAAM_SUM) and model.gaussian is not None:
            # Gaussians that start alike stay alike.
            nn.init.normal_(model.gaussian.log_width, std=0.3)
            nn.init.normal_(model.gaussian.offset, std=0.3)

    def batches(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(data.values), (BATCH,), generator=generator)
        return data.values[index], data.labels[index]

    fit(
        model,
        batches,
        lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
        steps=steps,
        seed=seed,
        optimiser=OptimiserSpec(lr=3e-3 if model.attention is not None else 1e-2, betas=(0.9, 0.999)),
        clip=None,
    )
    with torch.no_grad():
        right = model(held.values).argmax(1) == held.labels
    return Trained(model, right.double().mean().item())


def train_all(run: Run) -> dict[tuple[str, str], Trained]:
    """Every pooling on every task."""
    wanted = [(task, name) for task, names in COMPARED.items() for name in names]
    return {(task, name): train(task, name, run.seed) for task, name in run.progress(wanted, "training")}


@torch.no_grad()
def attention_received(model: Pooled, x: Tensor) -> Tensor:
    """`[b t]`: mean weight of dot-product attention on each time, over heads and queries."""
    assert model.embed is not None and model.attention is not None
    q, k, _ = model.attention.qkv(model.embed(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean((1, 2))


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive scores above a negative, ties as a half."""
    flat, which = scores.flatten().double(), positive.flatten()
    _, places, counts = flat.unique(return_inverse=True, return_counts=True)
    before = counts.cumsum(0) - counts
    rank = (before + (counts + 1) / 2)[places]
    number = int(which.sum())
    others = len(which) - number
    if not number or not others:
        raise ValueError(f"auroc: {number} positives of {len(which)}; both kinds are needed")
    return ((rank[which].sum() - number * (number + 1) / 2) / (number * others)).item()
