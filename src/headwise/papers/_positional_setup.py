"""What positional_attention.py measures on: transformers trained on algorithms, recall and pointers, and by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models.positional import PositionalConfig, PositionalTransformer
from headwise.papers.running import Run
from headwise.tasks.algorithmic import Hops, algorithm, number_lists, pointer_hops, recall_by_key
from headwise.training import OptimiserSpec, fit, fit_seeds, warmup_cosine

POSITIONAL, STANDARD, ROPE = "positional", "standard", "rope"
TASKS = ("sum", "min")
TRAINED = {POSITIONAL: TASKS, STANDARD: TASKS, ROPE: ("sum",)}
RANGES = (1, 2, 3, 5, 10)
LENGTH, SAMPLES, TEST = 8, 30_000, 1000
STEPS, BATCH, RATE = 3000, 32, 3e-3
RECALL_STEPS, RECALL_BATCH, PAIRS, SYMBOLS = 1000, 64, 7, 16
HOPS, HOP_STEPS, HOP_BATCH = 2, 1500, 32
RECALLED = {
    "standard, 2 layers": (STANDARD, 2),
    "positional, 2 layers": (POSITIONAL, 2),
    "positional, 4 layers": (POSITIONAL, 4),
}


@dataclass
class Fitted:
    """A network trained on one task, its test MSE and the variance of the answers, by multiple of the range."""

    model: PositionalTransformer
    errors: dict[int, float]
    variances: dict[int, float]


def wider_lists(multiple: int, seed: int) -> Tensor:
    """Lists of a wider range, none of which is of the training range."""
    generator = torch.Generator().manual_seed(50_000 + 100 * seed + multiple)
    end = 2.0 * multiple
    reject = None if multiple == 1 else (-2.0, 2.0)
    return number_lists(TEST, LENGTH, low=-end, high=end, reject=reject, generator=generator)


def fit_tasks(kind: str, tasks: Sequence[str], seed: int, steps: int = STEPS) -> dict[str, Fitted]:
    """One network a task, trained together by vmap on batches of the same lists."""
    values = number_lists(SAMPLES, LENGTH, generator=torch.Generator().manual_seed(seed))
    answers = {seed * 10 + place: algorithm(task, values) for place, task in enumerate(tasks)}

    def batches(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(SAMPLES, (BATCH,), generator=generator)
        return values[index][..., None], answers[generator.initial_seed()][index][..., None]

    models, _ = fit_seeds(
        lambda: PositionalTransformer(PositionalConfig(length=LENGTH, attention=kind)),
        batches,
        lambda net, batch: (net(batch[0]).values - batch[1]).square().mean(),
        steps=steps,
        seeds=list(answers),
        optimiser=OptimiserSpec(lr=RATE, betas=(0.9, 0.999)),
        schedule=warmup_cosine(0),
        clip=None,
    )
    return {task: measured(model, task, seed) for model, task in zip(models, tasks, strict=True)}


@torch.no_grad()
def measured(model: nn.Module, task: str, seed: int) -> Fitted:
    errors, variances = {}, {}
    for multiple in RANGES:
        values = wider_lists(multiple, seed)
        answers = algorithm(task, values)
        errors[multiple] = (model(values[..., None]).values[..., 0] - answers).square().mean().item()
        variances[multiple] = answers.var().item()
    return Fitted(model, errors, variances)  # type: ignore[arg-type]


def trained(run: Run) -> dict[tuple[str, str], Fitted]:
    """By kind and task."""
    found = {}
    for kind, tasks in run.progress(TRAINED.items(), "training", len(TRAINED)):
        for task, one in fit_tasks(kind, tasks, run.seed).items():
            found[kind, task] = one
    return found


def fit_recall(kind: str, layers: int, seed: int, steps: int = RECALL_STEPS) -> float:
    """Accuracy on new lists of a network trained on recall."""

    def batches(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = recall_by_key(RECALL_BATCH, pairs=PAIRS, symbols=SYMBOLS, generator=generator)
        return drawn.tokens, drawn.answers

    config = PositionalConfig(in_dim=2 * SYMBOLS, out_dim=SYMBOLS, length=PAIRS + 1, num_layers=layers, attention=kind)
    (model,), _ = fit_seeds(
        lambda: PositionalTransformer(config),
        batches,
        lambda net, batch: nn.functional.cross_entropy(net(batch[0]).values[..., -1, :], batch[1]),
        steps=steps,
        seeds=[seed],
        optimiser=OptimiserSpec(lr=RATE, betas=(0.9, 0.999)),
        schedule=warmup_cosine(0),
        clip=None,
    )
    held = recall_by_key(TEST, pairs=PAIRS, symbols=SYMBOLS, generator=torch.Generator().manual_seed(90_000 + seed))
    with torch.no_grad():
        right = model(held.tokens).values[:, -1].argmax(1) == held.answers
    return right.double().mean().item()


def recalls(run: Run) -> dict[str, float]:
    return {
        name: fit_recall(kind, layers, run.seed)
        for name, (kind, layers) in run.progress(RECALLED.items(), "recall", len(RECALLED))
    }


def wider_hops(multiple: int, seed: int) -> Hops:
    """Chains of pointers whose numbers are of a wider range."""
    generator = torch.Generator().manual_seed(70_000 + 100 * seed + multiple)
    end = 2.0 * multiple
    return pointer_hops(TEST, LENGTH, hops=HOPS, low=-end, high=end, generator=generator)


def fit_hops(kind: str, seed: int, steps: int = HOP_STEPS) -> Fitted:
    """A network as deep as those of the algorithms, trained to follow pointers; new lists at every step."""

    def batches(step: int, generator: torch.Generator) -> Hops:
        return pointer_hops(HOP_BATCH, LENGTH, hops=HOPS, generator=generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = PositionalTransformer(PositionalConfig(in_dim=LENGTH + 1, length=LENGTH, attention=kind))
    fit(
        model,
        batches,
        lambda net, drawn: (net(drawn.tokens).values[..., 0] - drawn.answers).square().mean(),
        steps=steps,
        seed=seed,
        optimiser=OptimiserSpec(lr=RATE, betas=(0.9, 0.999)),
        schedule=warmup_cosine(0),
        clip=None,
    )
    errors, variances = {}, {}
    with torch.no_grad():
        for multiple in RANGES:
            held = wider_hops(multiple, seed)
            errors[multiple] = (model(held.tokens).values[..., 0] - held.answers).square().mean().item()
            variances[multiple] = held.answers.var().item()
    return Fitted(model, errors, variances)


def hopping(run: Run) -> dict[str, Fitted]:
    """By kind."""
    return {kind: fit_hops(kind, run.seed) for kind in run.progress((POSITIONAL, STANDARD), "pointers", 2)}


@torch.no_grad()
def by_hand(task: str, length: int = LENGTH, sharpness: float = 1e4) -> PositionalTransformer:
    """A positional transformer that computes prefix sums, minima or maxima: each layer reads 2^l places back.

    The blank node is a zero to add; where there is nothing so far back, a minimum reads its own place.
    sharpness: of the scores; 0 spreads the weights evenly.
    """
    # By layer of the MLP: hidden units from [x, read], and how they are summed.
    hidden, summed = {
        "sum": ([[1.0, 1.0], [-1.0, -1.0]], [1.0, -1.0]),
        "min": ([[1.0, 0.0], [-1.0, 0.0], [1.0, -1.0]], [1.0, -1.0, -1.0]),
        "max": ([[1.0, 0.0], [-1.0, 0.0], [-1.0, 1.0]], [1.0, -1.0, 1.0]),
    }[task]
    config = PositionalConfig(length=length, hidden_size=1, num_heads=1, mlp_hidden=len(hidden))
    model = PositionalTransformer(config).double().eval()
    for parameter in model.parameters():
        parameter.zero_()
    model.encode.weight.fill_(1)
    model.decode.weight.fill_(1)
    nodes = config.pos_dim
    for layer, block in enumerate(model.blocks):
        back = 2**layer
        attention, mlp = block.attention, block.mlp
        for node in range(nodes):
            short = nodes - 1 if task == "sum" else node
            source = node - back if node < length and node >= back else short
            attention.qk.weight[source, node] = sharpness  # type: ignore[index, union-attr]
        attention.qk.weight[nodes:] = torch.eye(nodes, dtype=torch.float64)  # type: ignore[index, union-attr]
        attention.v_proj.weight.fill_(1)  # type: ignore[union-attr, operator]
        attention.proj.weight.fill_(1)  # type: ignore[union-attr, operator]
        mlp[0].weight.copy_(torch.tensor(hidden))  # type: ignore[index, union-attr, operator]
        mlp[2].weight.copy_(torch.tensor([summed]))  # type: ignore[index, union-attr, operator]
    return model
