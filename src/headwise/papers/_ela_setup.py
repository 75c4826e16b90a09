"""What efficient_local_attention.py measures on: a small residual network with one module or another in its blocks, and
the modules that the paper compares with.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from headwise.attention.efficient_local import EfficientLocalAttention
from headwise.papers.running import Run
from headwise.tasks.digit_canvases import DigitCanvases, cluttered_digits, marked_digits
from headwise.tasks.digits import digit_images
from headwise.training import OptimiserSpec, fit

MARKED, CLUTTERED = "marked band", "clutter"
STEPS = {MARKED: 600, CLUTTERED: 500}
BATCH, TRAIN, TEST = 48, 4000, 1000
NONE, ELA_B, ELA_G4, ELA_OPEN, CA, CA_WIDE, CA_GROUP, SE = (
    "none", "ELA-B", "ELA-B, 4 norm groups", "ELA-B, norm bias 2", "CA", "CA, no reduction", "CA, group norm", "SE",
)  # fmt: skip


class SqueezeExcite(nn.Module):
    """Gates channels by their means over the whole map (Hu et al., 2018)."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        inner = channels // reduction
        self.gate = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True))


class CoordinateAttention(nn.Module):
    """Gates rows and columns by means that pass one narrow layer together (Hou et al., 2021).

    norm: "batch" is the paper's, "group" one group over channels and both strips.
    """

    def __init__(self, channels: int, reduction: int = 8, norm: str = "batch") -> None:
        super().__init__()
        inner = max(8, channels // reduction)
        self.squeeze = nn.Conv1d(channels, inner, 1)
        self.norm = nn.BatchNorm1d(inner) if norm == "batch" else nn.GroupNorm(1, inner)
        self.rows, self.columns = nn.Conv1d(inner, channels, 1), nn.Conv1d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        strips = torch.cat([x.mean(3), x.mean(2)], 2)
        rows, columns = nn.functional.hardswish(self.norm(self.squeeze(strips))).split(list(x.shape[2:]), 2)
        return x * self.rows(rows).sigmoid()[..., None] * self.columns(columns).sigmoid()[:, :, None]


def opened(channels: int) -> EfficientLocalAttention:
    """ELA-B whose gates start at sigmoid(2) = 0.88 on average."""
    made = EfficientLocalAttention(channels, "B")
    nn.init.constant_(made.norm.bias, 2.0)
    return made


MODULES: Mapping[str, Callable[[int], nn.Module]] = {
    NONE: lambda channels: nn.Identity(),
    ELA_B: EfficientLocalAttention,
    ELA_G4: partial(EfficientLocalAttention, norm_groups=4),
    ELA_OPEN: opened,
    CA: CoordinateAttention,
    CA_WIDE: partial(CoordinateAttention, reduction=1),
    CA_GROUP: partial(CoordinateAttention, norm="group"),
    SE: SqueezeExcite,
}
COMPARED = {
    MARKED: (NONE, ELA_B, ELA_G4, CA, CA_WIDE, CA_GROUP, SE),
    CLUTTERED: (NONE, ELA_B, ELA_OPEN, CA, SE),
}


class Block(nn.Module):
    """A basic residual block with a module on its residual branch, after the second norm."""

    def __init__(self, inside: int, outside: int, stride: int, module: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.module = module
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.module(self.branch(x)) + self.shortcut(x)).relu()


class CanvasNet(nn.Module):
    """Three residual blocks of 16, 32 and 32 channels, largest value over the map, one linear layer."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1, make(16)), Block(16, 32, 2, make(32)), Block(32, 32, 1, make(32)))
        self.head = nn.Linear(32, 10)

    def features(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).amax((2, 3)))


@cache
def canvases(task: str, seed: int, *, test: bool) -> DigitCanvases:
    """Training canvases are of the 1,200 training digits, test canvases of the 597 test digits."""
    digits, draw = digit_images(1200), marked_digits if task == MARKED else cluttered_digits
    if test:
        return draw(digits.test_images, digits.test_labels, TEST, seed=10_000 + seed)
    return draw(digits.images, digits.labels, TRAIN, seed=seed)


def one_cycle(step: int, steps: int) -> float:
    """Up by a cosine from 1/25 over the first 30 % of the steps, and down to 0 over the rest."""
    up = 0.3 * steps
    if step < up:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * step / up))
    return 0.5 * (1 + math.cos(math.pi * (step - up) / (steps - up)))


@dataclass
class Trained:
    """A network of one module on one task: what its answers are on the test canvases."""

    model: CanvasNet
    right: Tensor  # [n] bool
    added: int  # parameters of the modules

    @property
    def accuracy(self) -> float:
        return self.right.double().mean().item()


def train(task: str, name: str, seed: int, steps: int | None = None) -> Trained:
    """Train on a task with one module, the network's and the batches' seed fixed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CanvasNet(MODULES[name])
    data, held = canvases(task, seed, test=False), canvases(task, seed, test=True)

    def batches(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(data.images), (BATCH,), generator=generator)
        return data.images[index], data.labels[index]

    fit(
        model,
        batches,
        lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
        steps=STEPS[task] if steps is None else steps,
        seed=seed,
        optimiser=OptimiserSpec(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.01),
        schedule=one_cycle,
        clip=None,
    )
    with torch.no_grad():
        right = model(held.images).argmax(1) == held.labels
    return Trained(model, right, sum(p.numel() for block in model.blocks for p in block.module.parameters()))  # type: ignore[union-attr]


def train_all(run: Run) -> dict[tuple[str, str], Trained]:
    """Every module on every task."""
    wanted = [(task, name) for task, names in COMPARED.items() for name in names]
    return {(task, name): train(task, name, run.seed) for task, name in run.progress(wanted, "training")}


@torch.no_grad()
def evidence_share(found: Trained, data: DigitCanvases) -> Tensor:
    """For each canvas, the share of the evidence for its label that lies in the marked band's rows of the map.

    The logit of a class is a bias and the sum over channels of weight times the channel's largest value, which stands
    at one place of the map; evidence is the positive terms of that sum.
    """
    maps = found.model.features(data.images)
    largest, place = maps.flatten(2).max(2)
    terms = (found.model.head.weight[data.labels] * largest).clamp_min(0)
    rows = place // maps.shape[3]
    bands = data.images.shape[2] // 8
    inside = rows * bands // maps.shape[2] == (data.corners[:, :1] // 8)
    return (terms * inside).sum(1) / terms.sum(1).clamp_min(1e-12)
