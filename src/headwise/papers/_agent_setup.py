"""What agent_attention.py trains, swaps and times: one small vision transformer, four attentions, two conversions."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.agent import AgentAttention, agent_attention
from headwise.attention.softmax import SoftmaxAttention, split_heads
from headwise.models.small_vit import SmallViT, SmallViTConfig
from headwise.papers.running import Run
from headwise.tasks.digits import Digits, digit_batches, digit_images
from headwise.training import OptimiserSpec, fit, warmup_cosine

SOFTMAX, SOFTMAX_DWC, LINEAR_DWC, AGENT = "softmax", "softmax + DWC", "linear + DWC", "agent"
AGENT_BARE = "agent without DWC"
STEPS, BATCH, INITS = 560, 64, 2
SIZES = (784, 3136, 12544)


def convolution(width: int) -> nn.Conv2d:
    """The depthwise convolution that agent attention adds."""
    return nn.Conv2d(width, width, 3, padding=1, groups=width)


class Convolved(nn.Module):
    """Multi-head attention with agent attention's convolution: the control that shows what the convolution alone gives.

    mode: "softmax", or "linear" with feature map elu + 1.
    """

    def __init__(self, embed_dim: int, num_heads: int, grid_size: tuple[int, int], mode: str) -> None:
        super().__init__()
        self.heads, self.grid, self.mode = num_heads, grid_size, mode
        self.qkv, self.proj = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)
        self.dwc = convolution(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        v = self.qkv(x).chunk(3, -1)[2]
        q, k, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        if self.mode == "softmax":
            out = nn.functional.scaled_dot_product_attention(q, k, value)
        else:
            q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
            out = q @ (k.mT @ value) / (q @ k.sum(-2, keepdim=True).mT)
        local = self.dwc(v.mT.unflatten(-1, self.grid)).flatten(2).mT
        return self.proj(out.transpose(1, 2).flatten(2) + local)


class PooledKeys(nn.Module):
    """A trained softmax layer whose keys and values are averaged to n windows: what the same cost buys otherwise."""

    def __init__(self, layer: SoftmaxAttention, grid: tuple[int, int], side: int) -> None:
        super().__init__()
        self.layer, self.grid, self.side = layer, grid, side

    def forward(self, x: Tensor) -> Tensor:
        def pooled(y: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(y.mT.unflatten(-1, self.grid), self.side).flatten(2).mT

        q, k, v = self.layer.qkv(x).chunk(3, -1)
        q, k, v = (split_heads(y.contiguous(), self.layer.num_heads) for y in (q, pooled(k), pooled(v)))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.layer.proj(out.transpose(1, 2).flatten(2))


def build(kind: str, patch: int = 2) -> Any:
    """A SmallViT of width 32 and 8 heads with one of the attentions; 8 x 8 pixels."""
    options = {"num_agents": 4, "dwc": kind == AGENT} if kind in (AGENT, AGENT_BARE) else None
    name = "AgentAttention" if options else "SoftmaxAttention"
    model: Any = SmallViT(SmallViTConfig(patch_size=patch, attention=name, attention_options=options))
    if kind in (SOFTMAX_DWC, LINEAR_DWC):
        for block in model.blocks:
            block.attn = Convolved(32, 8, model.config.grid_size, "softmax" if kind == SOFTMAX_DWC else "linear")
    return model


@torch.no_grad()
def accuracy(model: Any, data: Digits, device: str) -> float:
    """Share of right test images, in points."""
    said = model(data.test_images.to(device)).logits.argmax(-1).cpu()
    return 100 * float((said == data.test_labels).double().mean())


def train(kind: str, seed: int, run: Run, *, patch: int = 2, steps: int = STEPS) -> tuple[Any, float]:
    """A trained model and its test accuracy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(kind, patch).to(run.device)
    data = digit_images()

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = (part.to(run.device) for part in batch)
        return model(images, labels=labels).loss

    optimiser, schedule = OptimiserSpec(lr=2e-3, betas=(0.9, 0.999), weight_decay=0.01), warmup_cosine(steps // 4)
    fit(model, digit_batches(data, BATCH), loss, steps=steps, seed=seed, optimiser=optimiser, schedule=schedule)
    return model, accuracy(model, data, run.device)


@dataclass
class Trained:
    """Test accuracies in points of each attention, one a start; the softmax models, and the first agent model."""

    points: dict[str, list[float]]
    softmax: list[Any]
    agent: Any = None

    @classmethod
    def of(cls, run: Run) -> "Trained":
        points: dict[str, list[float]] = {}
        softmax, agent = [], None
        for kind in (SOFTMAX, SOFTMAX_DWC, LINEAR_DWC, AGENT, AGENT_BARE):
            run.log(f"training {kind}")
            for start in range(1 if kind == AGENT_BARE else INITS):
                model, found = train(kind, 10 * run.seed + start, run)
                points.setdefault(kind, []).append(found)
                if kind == SOFTMAX:
                    softmax.append(model)
                elif kind == AGENT and agent is None:
                    agent = model
        return cls(points, softmax, agent)


def with_agents(model: Any, n: int, *, exponent: float = 0.3, shortcut: float = 0.075) -> Any:
    """A trained softmax model that attends through n pooled agents, no new parameter: the paper's constants."""
    changed = copy.deepcopy(model)
    for block in changed.blocks:
        old = block.attn
        new = AgentAttention(
            32,
            old.num_heads,
            n,
            grid_size=changed.config.grid_size,
            position_bias=False,
            dwc=False,
            query_scale=float(old.head_dim ** (-0.5 * exponent)),
            v_shortcut=shortcut,
        )
        new.load_state_dict(old.state_dict())
        block.attn = new.to(old.proj.weight.device).eval()
    return changed


def with_pooled_keys(model: Any, n: int) -> Any:
    """A trained softmax model whose keys and values are pooled to n."""
    changed = copy.deepcopy(model)
    for block in changed.blocks:
        block.attn = PooledKeys(block.attn, changed.config.grid_size, round(n**0.5))
    return changed


@dataclass
class Swapped:
    """Test accuracy in points of trained softmax models, mean over starts, before and after a change of attention."""

    before: float
    agents: dict[int, float]  # number of agents -> points, with the paper's constants
    plain: dict[int, float]  # the same scale twice and no shortcut
    pooled: dict[int, float]  # keys and values pooled to so many (1: every query gets the mean value)

    @classmethod
    def of(cls, trained: Trained, run: Run) -> "Swapped":
        data = digit_images()

        def points(change: Callable[[Any], Any]) -> float:
            return sum(accuracy(change(model), data, run.device) for model in trained.softmax) / len(trained.softmax)

        return cls(
            before=points(lambda model: model),
            agents={n: points(lambda model, n=n: with_agents(model, n)) for n in (1, 4, 9)},
            plain={n: points(lambda model, n=n: with_agents(model, n, exponent=1.0, shortcut=0.0)) for n in (1, 4, 9)},
            pooled={n: points(lambda model, n=n: with_pooled_keys(model, n)) for n in (1, 4, 9)},
        )


@dataclass
class Speed:
    """Milliseconds of one layer's attention at each number of tokens, medians; ratios are of the same round."""

    milliseconds: dict[str, dict[int, float]]
    faster: dict[int, float]  # softmax over agent
    growth: dict[str, float]  # time at 12,544 over time at 3,136 tokens (softmax: 3,136 over 784)

    @classmethod
    def of(cls, run: Run, rounds: int = 11) -> "Speed":
        run.log("timing")
        heads, d, n = 4, 32, 49
        calls: dict[tuple[str, int], Callable[[], Tensor]] = {}
        for t in SIZES:
            generator = torch.Generator().manual_seed(run.seed)
            shape = (1, heads, t, d)
            q, k, v = (torch.randn(shape, generator=generator).to(run.device) for _ in range(3))
            agents = torch.randn(1, heads, n, d, generator=generator).to(run.device)
            biases = [torch.randn(1, heads, *size, generator=generator).to(run.device) for size in ((n, t), (t, n))]
            calls["agent", t] = lambda q=q, k=k, v=v, a=agents, b=biases: agent_attention(
                q, k, v, a, bias_agent_key=b[0], bias_query_agent=b[1]
            )
            if t < SIZES[-1]:
                calls["softmax", t] = lambda q=q, k=k, v=v: nn.functional.scaled_dot_product_attention(q, k, v)
        times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
        with torch.no_grad():
            for number in range(rounds + 1):
                for key, call in calls.items():
                    start = time.perf_counter()
                    call()
                    if run.device.startswith("cuda"):
                        torch.cuda.synchronize()
                    if number:  # the first round warms up
                        times[key].append(1000 * (time.perf_counter() - start))

        def ratio(above: tuple[str, int], below: tuple[str, int]) -> float:
            return median(a / b for a, b in zip(times[above], times[below], strict=True))

        milliseconds: dict[str, dict[int, float]] = {}
        for (name, t), values in times.items():
            milliseconds.setdefault(name, {})[t] = median(values)
        return cls(
            milliseconds,
            {t: ratio(("softmax", t), ("agent", t)) for t in SIZES[:-1]},
            {
                "agent": ratio(("agent", 12544), ("agent", 3136)),
                "softmax": ratio(("softmax", 3136), ("softmax", 784)),
            },
        )


@dataclass
class Fine:
    """Test accuracy in points at 64 tokens, a pixel each, one model an attention."""

    points: dict[str, float]

    @classmethod
    def of(cls, run: Run) -> "Fine":
        found = {}
        for kind in (SOFTMAX, SOFTMAX_DWC, AGENT):
            run.log(f"training {kind} on single pixels")
            found[kind] = train(kind, 10 * run.seed, run, patch=1, steps=200)[1]
        return cls(found)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
