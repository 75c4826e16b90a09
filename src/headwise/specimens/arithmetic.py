"""The `arithmetic` specimen: a small Llama that adds and subtracts modulo ten, chooses between letters, and repeats.

Digits in two templates (`a + b = c`, `sum a b is c`), letters in the same two as a control that calculates nothing, and
repeated segments as a task without operands. No head is masked. All hundred pairs of digits are seen in training: the
model need not generalise, and nothing is claimed of pairs that it did not see.

One early checkpoint is kept: the last in which fewer than 60 % of the results are right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.specimens._training import Timed, phase_of, ran, recipe, seeded, shortened, small_llama
from headwise.tasks.episodes import Episodes, answer_accuracy
from headwise.tasks.repeats import repeated_segments
from headwise.tasks.symbol_arithmetic import ArithmeticSymbols, answers_by_operator, arithmetic_episodes
from headwise.training import OptimiserSpec, fit, trapezoid

NAME = "arithmetic"
SUMMARY = "three layers of eight heads that add and subtract modulo ten, choose letters, and repeat"

LAYERS, HEADS, HEAD_DIM, HIDDEN, INNER = 3, 8, 8, 64, 192
LEARNING_RATE, WARM_UP, DECAY = 3e-3, 100, 0.3
EARLY = 0.6  # results right, at most, in the checkpoint that is kept
OPERATORS = {"+": "add", "-": "subtract", "<": "first", ">": "last"}
TASKS = tuple(f"{name}-{template}" for name in OPERATORS.values() for template in ("infix", "prefix"))


@dataclass(frozen=True)
class Phase(Timed):
    """So many steps on batches of problems with digits, problems with letters, and repeats.

    problems: in one sequence; repeats are as long. skew: the share of problems that have a small operand.
    """

    digits: int
    letters: int
    repeats: int
    problems: int = 6
    skew: float = 0.0
    segment: int | None = None


# Repeats alone first: an induction head forms in a few hundred steps there, and in thousands beside the other tasks.
# Small operands then: pairs of evenly drawn digits give no gradient until both are read at once.
PHASES = [
    Phase(500, 0, 0, 48, segment=8),
    Phase(1400, 24, 6, 10, skew=0.8),
    Phase(1200, 24, 6, 10, skew=0.3),
]


def build() -> nn.Module:
    """The untrained model."""
    size = len(ArithmeticSymbols())
    return small_llama(
        size, layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, hidden=HIDDEN, inner=INNER, positions=128, pad=size - 1
    )


def draw(phase: Phase, symbols: ArithmeticSymbols, generator: torch.Generator) -> list[Episodes]:
    """One batch: an `Episodes` for each kind of task that the phase has."""
    options: dict[str, Any] = {"template": "any", "problems": phase.problems, "counterfactual": "operands"}
    found = []
    if phase.digits:
        found.append(
            arithmetic_episodes(phase.digits, symbols, ops="+-", skew=phase.skew, generator=generator, **options)
        )
    if phase.letters:
        found.append(arithmetic_episodes(phase.letters, symbols, ops="<>", generator=generator, **options))
    if phase.repeats:
        length = 6 * phase.problems
        found.append(
            repeated_segments(
                phase.repeats, symbols.letters, length=length, segment=(3, phase.segment), generator=generator
            )
        )
    return found


def loss(model: nn.Module, batch: list[Episodes]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the mean losses of the answers of each operator, and of repeats."""
    symbols = ArithmeticSymbols()
    parts: dict[str, Tensor] = {}
    for episodes in batch:
        logits = model(input_ids=episodes.input_ids).logits
        each = nn.functional.cross_entropy(logits[:, :-1].mT, episodes.input_ids[:, 1:], reduction="none")
        masks = answers_by_operator(episodes, symbols) if episodes.task != "repeats" else {"": episodes.answers}
        for operator, asked in masks.items():
            parts[OPERATORS.get(operator, "repeats")] = each[asked[:, 1:]].mean()
    return torch.stack(list(parts.values())).sum(), {name: value.detach() for name, value in parts.items()}


def held_out(task: str, sequences: int, generator: torch.Generator) -> Episodes:
    """Sequences to measure a task on; `repeats` or one of `TASKS`. All operands are equally likely."""
    symbols = ArithmeticSymbols()
    if task == "repeats":
        return repeated_segments(sequences, symbols.letters, length=36, generator=generator)
    name, _, template = task.partition("-")
    operator = {word: sign for sign, word in OPERATORS.items()}[name]
    return arithmetic_episodes(
        sequences, symbols, ops=operator, template=template, problems=4, counterfactual="operands", generator=generator
    )


@torch.no_grad()
def evaluate(model: nn.Module, *, seed: int = 10_000, sequences: int = 128) -> dict[str, float]:
    """Share of right answers of each task, on sequences that training did not draw."""
    found = {}
    for task in (*TASKS, "repeats"):
        episodes = held_out(task, sequences, torch.Generator().manual_seed(seed))
        found[task] = answer_accuracy(model(input_ids=episodes.input_ids).logits, episodes)["tokens"]
    return found


def results_right(accuracies: dict[str, float]) -> float:
    """Mean over the four tasks that calculate."""
    return sum(accuracies[task] for task in TASKS[:4]) / 4


def train(
    out: str | Path, *, seed: int = 0, log: Callable[[dict[str, Any]], None] | None = None, steps: int | None = None
) -> Path:
    """Train from nothing; write model, checkpoint, tokenizer and card to `out`. steps: shorten all phases alike."""
    from headwise.specimens.registry import write_specimen

    phases, symbols = shortened(PHASES, steps), ArithmeticSymbols()
    total = sum(phase.steps for phase in phases)
    model = seeded(build, seed)
    states: dict[int, dict[str, Tensor]] = {}
    along: dict[str, float] = {}

    def keep(step: int, model: nn.Module) -> None:
        model.eval()
        right = results_right(evaluate(model))
        along[str(step)] = round(right, 4)
        if right < EARLY:
            states.clear()
            states[step] = {
                key: value.detach().clone() for key, value in model.state_dict().items() if key != "lm_head.weight"
            }
        model.train()

    history = fit(
        model,
        lambda step, generator: draw(phase_of(step, phases), symbols, generator),
        loss,
        steps=total,
        seed=seed,
        optimiser=OptimiserSpec(lr=LEARNING_RATE),
        schedule=trapezoid(warmup=WARM_UP, decay=DECAY),
        log=log,
        checkpoints=range(0, total, 50),
        on_checkpoint=keep,
    )
    model = model.to(torch.bfloat16).float()  # what ships is what was measured
    card = {
        "summary": SUMMARY,
        **ran(history, phases, seed),
        "recipe": {
            **recipe(phases, rate=LEARNING_RATE, warmup=WARM_UP, decay=DECAY),
            "loss": "mean of the answers of each operator and of repeats, summed",
        },
        "losses": history.records[-1],
        "accuracies": evaluate(model),
        "checkpoints": sorted(states),
        "results_right_along_training": along,
    }
    return write_specimen(Path(out), model, symbols.names, card, NAME, states)
