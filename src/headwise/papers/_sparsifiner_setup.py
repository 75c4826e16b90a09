"""What sparsifiner.py measures on: a small DeiT on the digits, one pixel a token, and what it is compared with."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.softmax import split_heads
from headwise.attention.sparsifiner import connectivity_from_indices, predictor_loss
from headwise.models.sparsifiner import SparsifinerConfig, SparsifinerViT, distillation_loss
from headwise.papers.running import Run
from headwise.tasks.digits import Digits, digit_batches, digit_images
from headwise.training import OptimiserSpec, fit, warmup_cosine

BATCH = 32
DENSE_STEPS, DENSE_RATE = 1400, 3e-3
PREDICT_STEPS, PREDICT_RATE, PREDICT_WEIGHT = 200, 3e-3, 0.01
TUNE_STEPS, TUNE_RATE = 200, 5e-4
BOTH = 0.6  # share of the patches that stay after layers 1 and 2, in the network with both sparsities

LEARNED, RANDOM, WINDOW, ORACLE, UNTRAINED = "learned", "random", "window", "best keys", "untrained predictor"
TOKENS, BOTH_NAME = "tokens pruned", "both"


def small(**options: Any) -> SparsifinerConfig:
    """65 tokens, three layers of four heads; basis of 10 vectors, 17 keys for a query."""
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 1, "num_channels": 1, "hidden_size": 32, "num_labels": 10}
    return SparsifinerConfig(
        **sizes,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=2.0,
        initializer_range=0.1,
        pruning_layers=(1, 2),
        **options,
    )


class Chooser(nn.Module):
    """Stands in for a predictor: random keys anew in every pass, the nearest on the grid, or the truly strongest.

    Random keys hold the class token's always, as the control of the specification does.
    """

    def __init__(self, kind: str, budget: int) -> None:
        super().__init__()
        self.kind, self.budget, self.prefix = kind, budget, 1

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.kind == ORACLE:
            scores = q[:, :, 1:] @ k.mT
        elif self.kind == RANDOM:
            scores = torch.rand(*q.shape[:2], q.shape[2] - 1, q.shape[2])
            scores[..., 0] = 2
        else:
            place = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).flatten(0, 1)
            near = torch.cat([torch.ones(64, 1), -torch.cdist(place, place)], 1)
            scores = near.expand(*q.shape[:2], -1, -1)
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.budget]

    def mask(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
        return connectivity_from_indices(self(q, k, positions), q.shape[2], self.prefix)


def with_choice(model: SparsifinerViT, kind: str) -> SparsifinerViT:
    """A copy in mode "sparse" whose keys are chosen otherwise."""
    made = copy.deepcopy(model)
    for layer in made.attentions():
        layer.register_module("mask_predictor", Chooser(kind, layer.mask_predictor.budget))
    return made.set_mode("sparse").eval()


def with_options(model: SparsifinerViT, mode: Any, **options: Any) -> SparsifinerViT:
    """A copy with other options and the same weights."""
    made = SparsifinerViT(small(**options))
    made.load_state_dict(model.state_dict())
    return made.set_mode(mode).eval()


@torch.no_grad()
def accuracy(model: SparsifinerViT, data: Digits) -> float:
    predicted: Any = torch.cat([model(images).logits.argmax(-1) for images in data.test_images.split(200)])
    return float((predicted == data.test_labels).double().mean())


def layer_queries(model: SparsifinerViT, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of every layer of a dense model."""
    kept: list[tuple[Tensor, Tensor]] = []

    def read(attention: Any) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, args: Any, x: Tensor) -> None:
            q, k, _v = (split_heads(part, attention.num_heads) for part in attention.qkv(x).chunk(3, -1))
            kept.append((q, k))

        return hook

    blocks: Any = model.blocks
    hooks = [block.norm1.register_forward_hook(read(block.attn)) for block in blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return kept


@torch.no_grad()
def kept_mass(dense: SparsifinerViT, chooser: SparsifinerViT, images: Tensor) -> float:
    """Share of the dense model's attention, patch queries of all layers, that lies on the keys another one keeps."""
    found = []
    for (q, k), layer in zip(layer_queries(dense, images), chooser.attentions(), strict=True):
        rows = (q[:, :, 1:] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        found.append(rows.gather(-1, layer.mask_predictor(q, k)).sum(-1).mean())
    return float(torch.stack(found).mean())


@dataclass
class Trained:
    """Networks, their accuracies before and after tuning, and the attention that each choice of keys keeps.

    products: of the whole network, as a share of the dense one's.
    """

    dense: SparsifinerViT
    predictor: SparsifinerViT
    data: Digits
    dense_accuracy: float
    untuned: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, float] = field(default_factory=dict)
    mass: dict[str, float] = field(default_factory=dict)
    products: dict[str, float] = field(default_factory=dict)
    networks: dict[str, SparsifinerViT] = field(default_factory=dict)


def train_dense(seed: int, data: Digits, steps: int = DENSE_STEPS) -> SparsifinerViT:
    torch.manual_seed(seed)
    model = SparsifinerViT(small()).set_mode("dense")
    loss = lambda net, batch: nn.functional.cross_entropy(net(batch[0]).logits, batch[1])  # noqa: E731
    rule, schedule = OptimiserSpec(lr=DENSE_RATE, betas=(0.9, 0.999)), warmup_cosine(steps // 10)
    fit(model, digit_batches(data, BATCH), loss, steps=steps, seed=seed, optimiser=rule, schedule=schedule)
    return model


def train_predictor(dense: SparsifinerViT, seed: int, data: Digits, steps: int = PREDICT_STEPS) -> SparsifinerViT:
    """First stage: only the predictors learn, from the model's own attention, which stays dense."""
    model = copy.deepcopy(dense).set_mode("predict")

    def loss(net: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        net.forward_features(batch[0])
        return PREDICT_WEIGHT * predictor_loss(net)

    rule, schedule = OptimiserSpec(lr=PREDICT_RATE, betas=(0.9, 0.999)), warmup_cosine(steps // 10)
    fit(model, digit_batches(data, BATCH), loss, steps=steps, seed=seed, optimiser=rule, schedule=schedule, clip=None)
    return model.set_mode("sparse")


def tune(
    model: SparsifinerViT, teacher: SparsifinerViT, seed: int, data: Digits, steps: int = TUNE_STEPS
) -> SparsifinerViT:
    """Second stage: everything but the predictors learns, with the dense model as teacher."""
    loss = lambda net, batch: distillation_loss(net, teacher, *batch)  # noqa: E731
    rule, schedule = OptimiserSpec(lr=TUNE_RATE, betas=(0.9, 0.999), weight_decay=0.05), warmup_cosine(steps // 10)
    fit(model, digit_batches(data, BATCH), loss, steps=steps, seed=seed, optimiser=rule, schedule=schedule)
    return model


def cheapest_pruning(dense: SparsifinerViT, least: float) -> float:
    """The smallest share of patches, in hundredths, at which token pruning alone has no fewer products than `least`."""
    shares = [share / 100 for share in range(1, 101)]
    return next(share for share in shares if with_options(dense, "dense", token_keep=share).products() >= least)


def train_all(run: Run) -> Trained:
    data, seed = digit_images(1200), run.seed
    run.log("training the dense network")
    dense = train_dense(seed, data)
    run.log("training the predictors")
    predictor = train_predictor(dense, seed, data)
    made = Trained(dense, predictor, data, accuracy(dense, data))
    untrained = copy.deepcopy(dense).set_mode("sparse")
    choices = {LEARNED: predictor, UNTRAINED: untrained}
    choices |= {kind: with_choice(dense, kind) for kind in (RANDOM, WINDOW, ORACLE)}
    torch.manual_seed(seed)
    made.untuned = {name: accuracy(model, data) for name, model in choices.items()}
    made.mass = {name: kept_mass(dense, model, data.test_images[:200]) for name, model in choices.items()}
    share = cheapest_pruning(dense, predictor.products())
    made.networks = {
        LEARNED: copy.deepcopy(predictor),
        RANDOM: choices[RANDOM],
        TOKENS: with_options(dense, "dense", token_keep=share),
        BOTH_NAME: with_options(predictor, "sparse", token_keep=BOTH),
    }
    for name, model in made.networks.items():
        run.log(f"tuning: {name}")
        made.tuned[name] = accuracy(tune(model, dense, seed, data), data)
    counted: Mapping[str, SparsifinerViT] = {name: model for name, model in made.networks.items() if name != RANDOM}
    made.products = {name: model.products() / dense.products(dense=True) for name, model in counted.items()}
    return made
