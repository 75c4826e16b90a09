"""The task, the networks and the counts of davit.py.

Grids of 12 x 12 cells, each with a colour (either, evenly), sometimes a spot; one cell is flagged. Two labels for every
cell: global, whether its colour is that of the flagged cell; local, whether its 4 x 4 window holds a spot.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from headwise.attention.channel import ChannelAttention
from headwise.attention.window import WindowAttention
from headwise.models.davit import DaViTConfig, DaViTForImageClassification, _Block
from headwise.ops.counting import flops
from headwise.papers.running import Run
from headwise.training import OptimiserSpec, fit

SIDE, WINDOW, WIDTH, HEADS, SPOT = 12, 4, 32, 2, 0.045
STEPS, BATCH, TEST = 1200, 16, 200
PAIRS = {"spatial + channel": "sc", "spatial + spatial": "ss", "channel + channel": "cc"}


def grids(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cells `[count 12 12 4]` (two colours, spot, flag) and labels `[count 12 12 2]` (global, local)."""
    colour = torch.randint(0, 2, (count, SIDE, SIDE), generator=generator)
    spot = torch.rand(count, SIDE, SIDE, generator=generator) < SPOT
    place = torch.randint(0, SIDE * SIDE, (count,), generator=generator)
    flag = nn.functional.one_hot(place, SIDE * SIDE).view(count, SIDE, SIDE)
    cued = colour.flatten(1).gather(1, place[:, None])[..., None]
    windows = spot.view(count, SIDE // WINDOW, WINDOW, SIDE // WINDOW, WINDOW).any(4).any(2)
    near = windows.repeat_interleave(WINDOW, 1).repeat_interleave(WINDOW, 2)
    cells = torch.stack([colour, 1 - colour, spot, flag], -1).float()
    return cells, torch.stack([colour == cued, near], -1).float()


def config() -> DaViTConfig:
    return DaViTConfig(
        depths=(1,), hidden_sizes=(WIDTH,), num_heads=(HEADS,), window_size=WINDOW, mlp_ratio=2.0, drop_path_rate=0.0
    )


def block(kind: str) -> nn.Module:
    """A spatial ("s") or a channel ("c") block of the network, `[b y x 32]`."""
    attention = WindowAttention(WIDTH, WINDOW, HEADS) if kind == "s" else ChannelAttention(WIDTH, HEADS)
    return _Block(config(), 0, attention, 0.0)


class Pair(nn.Module):
    """Two blocks between linear layers, `[b y x 4]` to two logits for every cell."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, WIDTH), nn.Sequential(*(block(kind) for kind in kinds))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, cells: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(cells))))


def one_cycle(step: int, steps: int) -> float:
    """Up from 1/25 over 30 % of the steps, then down to nothing, both as half cosines."""
    rise = 0.3 * steps
    if step < rise:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * step / rise))
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


@dataclass(frozen=True)
class Trained:
    """Held-out accuracy over cells of both labels, the parameters, and the accuracies while training."""

    local: float
    whole: float
    parameters: int
    steps: tuple[int, ...]
    curve: tuple[float, ...]


def accuracy(model: nn.Module, cells: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of cells right: global, local."""
    training = model.training
    model.eval()
    with torch.no_grad():
        right = ((model(cells) > 0) == labels.bool()).double().mean((0, 1, 2))
    model.train(training)
    return float(right[0]), float(right[1])


def train_pairs(run: Run, steps: int = STEPS) -> dict[str, Trained]:
    """The three pairs, trained alike."""
    held = grids(TEST, torch.Generator().manual_seed(10_000 + run.seed))
    found = {}
    for name, kinds in run.progress(list(PAIRS.items()), "pairs"):
        torch.manual_seed(run.seed)
        model, seen = Pair(kinds), {}

        def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            return binary_cross_entropy_with_logits(model(batch[0]), batch[1])

        fit(
            model,
            lambda step, generator: grids(BATCH, generator),
            loss,
            steps=steps,
            seed=run.seed,
            optimiser=OptimiserSpec(lr=4e-3, betas=(0.9, 0.999), weight_decay=0.01),
            schedule=one_cycle,
            clip=1.0,  # as the official recipe has it
            checkpoints=range(0, steps + 1, 100),
            on_checkpoint=lambda step, model, seen=seen: seen.update({step: accuracy(model, *held)[0]}),
        )
        whole, local = accuracy(model, *held)
        count = sum(p.numel() for p in model.parameters())
        found[name] = Trained(local, whole, count, tuple(seen), tuple(seen.values()))
        run.log(f"{name}: global {whole:.1%}, local {local:.1%}")
    return found


def chance(seed: int) -> tuple[float, float]:
    """What always saying the more frequent answer gets right on the held-out grids: global, local."""
    share = grids(TEST, torch.Generator().manual_seed(10_000 + seed))[1].double().mean((0, 1, 2))
    return float(max(share[0], 1 - share[0])), float(max(share[1], 1 - share[1]))


def on_meta(name: str, **changes: Any) -> DaViTForImageClassification:
    """A classifier for 1,000 classes without memory."""
    with torch.device("meta"):
        model: Any = DaViTForImageClassification(DaViTConfig.preset(name, num_labels=1000, **changes)).eval()
    return model.to("meta")


def multiply_adds(model: nn.Module, size: int) -> float:
    """Of one image."""
    return flops(lambda x: model(x)[0], (torch.empty(1, 3, size, size, device="meta"),)) / 2


def vit_multiply_adds(size: int) -> float:
    """ViT-S/16 of transformers, without a head."""
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536}
    sizes |= {"num_hidden_layers": 12, "num_attention_heads": 6}
    with torch.device("meta"):
        model: Any = ViTModel(ViTConfig(**sizes, image_size=size), add_pooling_layer=False).eval()
    return multiply_adds(model.to("meta"), size)


def reach(kinds: str, seed: int) -> int:
    """On how many of 256 positions the output at (2, 2) depends after these untrained blocks."""
    torch.manual_seed(seed)
    blocks = nn.Sequential(*(block(kind) for kind in kinds)).double()
    x = torch.randn(1, 16, 16, WIDTH, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(blocks(x)[0, 2, 2].sum(), x)
    return int((gradient[0].abs().amax(-1) > 0).sum())
