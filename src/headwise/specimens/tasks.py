"""The `tasks` specimen: a three-layer Llama that learned seven synthetic tasks, some of its heads masked in training.

What the masks are for: in a small model all heads of a layer come to share a task, so that no head matters alone and no
layer-matched control is idle. So one head a layer is dead (its output projection zero and kept so), and in most needle
and repeat sequences only the heads of `COPYING` are alive: the other live heads serve the other tasks and are controls.

What emerged with seed 0: needles are retrieved by 2.0 and 2.1 alone; the other live heads of layer 2 retrieve nothing
and carry the addition. Indirect objects, colours and back-copies are copied by 2.0 and 2.1 as well. Multiple choice
stays at chance: its answer needs one hop more than three layers had to spare.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.specimens._training import Timed, phase_of, ran, recipe, seeded, shortened, small_llama
from headwise.tasks.episodes import answer_accuracy
from headwise.tasks.mixture import MixedBatch, Mixture
from headwise.training import History, OptimiserSpec, fit, trapezoid

NAME = "tasks"
SUMMARY = "three layers of eight heads that copy, recall needles, name indirect objects and colours, and add"

LAYERS, HEADS, HEAD_DIM, HIDDEN, INNER = 3, 8, 16, 96, 256
DEAD = [(0, 7), (1, 7), (2, 7)]
COPYING = {0: (0, 1, 2), 1: (0, 1), 2: (0, 1)}
COPY_TASKS = ("needles", "repeats")
WEIGHTS = {"addition": 2.0, "text": 0.5}  # of the task means in the loss; 1 for the others
# Repeats alone first: an induction head forms in 400 steps, where it takes thousands inside the mixture.
SHORT = {32: 1}
SMALL = {32: 1, 48: 1, 64: 1}
MIXED = {32: 3, 48: 3, 64: 3, 96: 2, 128: 2, 192: 1, 256: 1}
LONG = {48: 1, 64: 1, 96: 1, 128: 2, 192: 2, 256: 2, 320: 1}
REPEATS = {"repeats": 1}
COPIES = {"bigrams": 1, "repeats": 2, "needles": 3}
ALL = {
    "bigrams": 1, "repeats": 2, "needles": 2, "indirect_objects": 2, "coloured_objects": 2, "addition": 1,
    "multiple_choice": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Phase(Timed):
    """So many steps on batches of about `tokens` tokens; tasks and lengths with their weights.

    masked: share of the needle and repeat sequences in which only the heads of `COPYING` speak. sum_every: an addition
    sequence holds a sum for every so many tokens.
    """

    tokens: int
    tasks: dict[str, int]
    lengths: dict[int, int]
    masked: float = 0.7
    sum_every: int = 12


PHASES = [
    Phase(800, 1536, REPEATS, SHORT, masked=1.0),
    Phase(500, 1536, COPIES, SMALL, masked=1.0),
    Phase(1500, 2048, ALL, MIXED),
    Phase(900, 2400, ALL, LONG),
]
LEARNING_RATE, WARM_UP, DECAY = 3e-3, 100, 0.4
EVALUATED_LENGTHS = (32, 64, 128, 256, 384)


def build() -> nn.Module:
    """The untrained model, its dead heads already silent."""
    model = small_llama(
        128, layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, hidden=HIDDEN, inner=INNER, positions=512, pad=127
    )
    with torch.no_grad():
        for name, mask in dead_masks().items():
            model.get_parameter(name).mul_(mask)
    return model


def dead_masks() -> dict[str, Tensor]:
    """For each output projection 1 at the columns that train, 0 at those of dead heads."""
    masks = {}
    for layer in range(LAYERS):
        alive = torch.ones(HEADS)
        alive[[head for at, head in DEAD if at == layer]] = 0
        masks[f"model.layers.{layer}.self_attn.o_proj.weight"] = alive.repeat_interleave(HEAD_DIM)[None]
    return masks


def masked() -> dict[str, Any]:
    """Which heads were masked in training, for a card."""
    return {
        "dead": [f"{layer}.{head}" for layer, head in DEAD],
        "copying": [f"{layer}.{head}" for layer, heads in COPYING.items() for head in heads],
        "note": "roles were encouraged: dead heads are no controls, heads outside `copying` learned other tasks",
    }


@contextlib.contextmanager
def silenced(model: nn.Module, copying: Tensor) -> Iterator[None]:
    """While open, only the heads of `COPYING` speak in the sequences where `copying` is True."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        alive = torch.zeros(HEADS)
        alive[list(COPYING[layer])] = 1
        alive = alive.repeat_interleave(HEAD_DIM)

        def gate(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] * torch.where(copying[:, None, None], alive, torch.ones_like(alive)), *args[1:])

        return gate

    modules = [model.get_submodule(f"model.layers.{layer}.self_attn.o_proj") for layer in range(LAYERS)]
    handles = [module.register_forward_pre_hook(hook(layer)) for layer, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batches(mixture: Mixture, phases: Sequence[Phase]) -> Callable[[int, torch.Generator], tuple[MixedBatch, Tensor]]:
    """Batches of one length each; and which of their sequences are masked."""
    copied = torch.tensor([mixture.names.index(name) for name in COPY_TASKS])

    def draw(step: int, generator: torch.Generator) -> tuple[MixedBatch, Tensor]:
        phase = phase_of(step, phases)
        weights = torch.tensor(list(phase.lengths.values()), dtype=torch.float)
        length = list(phase.lengths)[int(torch.multinomial(weights, 1, generator=generator))]
        share = phase.tokens / length / sum(phase.tasks.values())
        counts = {name: max(1, round(weight * share)) for name, weight in phase.tasks.items()}
        batch = mixture.batch(counts, length, generator, sum_every=phase.sum_every)
        drawn = torch.rand(len(batch.task), generator=generator) < phase.masked
        return batch, drawn & torch.isin(batch.task, copied)

    return draw


def loss(model: nn.Module, batch: tuple[MixedBatch, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the tasks' mean losses, weighted by `WEIGHTS`."""
    mixed, copying = batch
    with silenced(model, copying):
        parts = mixed.losses(model(input_ids=mixed.input_ids).logits)
    total = torch.stack([WEIGHTS.get(name, 1.0) * value for name, value in parts.items()]).sum()
    return total, {name: value.detach() for name, value in parts.items()}


@torch.no_grad()
def evaluate(model: nn.Module, mixture: Mixture, *, seed: int = 10_000, sequences: int = 64) -> dict[str, Any]:
    """Accuracy of the answers by task and length on sequences that training did not draw, no head masked."""
    table: dict[str, Any] = {}
    for name in mixture.names:
        for length in EVALUATED_LENGTHS:
            generator = torch.Generator().manual_seed(seed + length)
            episodes = mixture.episodes(name, sequences, length, generator, sums=max(1, length // 12))
            logits = torch.cat([model(input_ids=ids).logits for ids in episodes.input_ids.split(16)])
            table.setdefault(name, {})[str(length)] = answer_accuracy(logits, episodes)
    return table


def train(
    out: str | Path, *, seed: int = 0, log: Callable[[dict[str, Any]], None] | None = None, steps: int | None = None
) -> Path:
    """Train from nothing; write model, tokenizer and card to `out`. steps: shorten the run (all phases alike)."""
    phases, mixture = shortened(PHASES, steps), Mixture()
    model = seeded(build, seed)
    history = fit(
        model,
        batches(mixture, phases),
        loss,
        steps=sum(phase.steps for phase in phases),
        seed=seed,
        optimiser=OptimiserSpec(lr=LEARNING_RATE),
        schedule=trapezoid(warmup=WARM_UP, decay=DECAY),
        log=log,
        masks=dead_masks(),
    )
    return finish(out, model, history, phases, mixture, seed)


def finish(
    out: str | Path, model: nn.Module, history: History, phases: Sequence[Phase], mixture: Mixture, seed: int
) -> Path:
    """Round to what ships, measure it, write it with its card."""
    from headwise.specimens.registry import write_specimen

    model = model.to(torch.bfloat16).float()  # what ships is what was measured
    card = {
        "summary": SUMMARY,
        **ran(history, phases, seed),
        "recipe": {
            **recipe(phases, rate=LEARNING_RATE, warmup=WARM_UP, decay=DECAY),
            "loss": "mean of the answers of each task, summed with weights",
            "weights": WEIGHTS,
        },
        "masked": masked(),
        "losses": history.records[-1],
        "accuracies": evaluate(model, mixture),
    }
    return write_specimen(Path(out), model, mixture.symbols.names, card, NAME)
