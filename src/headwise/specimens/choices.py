"""The `choices` specimen: the `tasks` model, trained on until it answers multiple choice whose labels change.

Labels are drawn from eight letters for every question, so that an option's index alone never tells its label; a share
of the questions has the standard A, B, C, D in order. Digits never were labels in training.

What made it learn, where multiple choice from nothing stays at chance for 4,000 steps: it starts from a model that
retrieves needles; questions end in the asked word, so that induction answers; some have words for labels, which the
model can already copy. As in `tasks`, one head a layer is dead, and in most questions only the heads of `COPYING`
speak, so that the other live heads of their layers are controls.

What it leaves out, from trials of 200 to 700 steps: with the label before its text, questions at the end are learned as
fast, but by looking at the text, where the label was noted in passing; no head looks at labels. Where texts may not see
labels in training, and where the question comes first, nothing is learned in that time. Repeats of digits, and labels
of every other kind, do not carry over to digits as labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.specimens._training import Timed, phase_of, ran, recipe, shortened
from headwise.specimens.tasks import dead_masks, masked, silenced
from headwise.tasks.choice_questions import choice_prompts
from headwise.tasks.episodes import Episodes, answer_accuracy
from headwise.tasks.mixture import Mixture
from headwise.tasks.multiple_choice import multiple_choice_episodes
from headwise.training import OptimiserSpec, fit, trapezoid

NAME = "choices"
SUMMARY = "the tasks model, trained on to answer multiple choice whose labels change"
BASE = "tasks"

# What multiple_choice_episodes is asked for.
FORMATS: dict[str, dict[str, str]] = {
    "words": {"labels": "words", "question": "end"},
    "random": {"labels": "random", "question": "end"},
    "standard": {"labels": "fixed", "question": "end"},
}
EASY = ("words", "random")
OTHERS = {"repeats": 32, "addition": 32}  # task -> length: what the other heads are for
OPTIONS = (2, 3, 4, 4)
LENGTHS = (None, None, None, 32)  # by turns; None is the question alone, else text comes before it
MASKED = 0.7  # share of sequences in which only the heads of COPYING speak
LEARNING_RATE, WARM_UP, DECAY = 2e-3, 30, 0.4


@dataclass(frozen=True)
class Phase(Timed):
    """So many steps on `batch` sequences of every format."""

    formats: tuple[str, ...]
    batch: int = 24


PHASES = [Phase(250, EASY), Phase(450, tuple(FORMATS))]


def batches(mixture: Mixture, phases: list[Phase]) -> Callable[[int, torch.Generator], list[tuple[str, Episodes]]]:
    """For every step its episodes by name: all formats with one number of options, and one of the other tasks."""

    def draw(step: int, generator: torch.Generator) -> list[tuple[str, Episodes]]:
        phase = phase_of(step, phases)
        options = OPTIONS[step % len(OPTIONS)]
        length = LENGTHS[step // len(OPTIONS) % len(LENGTHS)]
        drawn = [
            (name, _episodes(mixture, name, phase.batch, options, generator, asks=options - 1, length=length))
            for name in phase.formats
        ]
        name = list(OTHERS)[step % len(OTHERS)]
        drawn.append((name, mixture.episodes(name, phase.batch, OTHERS[name], generator, sums=3)))
        return drawn

    return draw


def _episodes(
    mixture: Mixture,
    name: str,
    batch: int,
    options: int,
    generator: torch.Generator,
    asks: int = 1,
    length: int | None = None,
) -> Episodes:
    return multiple_choice_episodes(
        batch,
        mixture.symbols,
        options=options,
        asks=asks,
        length=length,
        text=mixture.text,
        generator=generator,
        **FORMATS[name],
    )


def loss(model: nn.Module, drawn: list[tuple[str, Episodes]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the mean losses on the answers of each format and task; one forward for each length."""
    parts: dict[str, Tensor] = {}
    for length in sorted({episodes.length for _, episodes in drawn}):
        some = [(name, episodes) for name, episodes in drawn if episodes.length == length]
        ids = torch.cat([episodes.input_ids for _, episodes in some])
        copying = torch.rand(len(ids)) < MASKED  # torch's own generator, which fit seeds
        if any(name == "addition" for name, _ in some):
            copying = torch.zeros_like(copying)
        with silenced(model, copying):
            logits = model(input_ids=ids).logits
        each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
        for (name, episodes), own in zip(some, each.split([len(one) for _, one in some]), strict=True):
            parts[name] = own[episodes.answers[:, 1:]].mean()
    return torch.stack(list(parts.values())).sum(), {name: value.detach() for name, value in parts.items()}


@torch.no_grad()
def evaluate(model: nn.Module, mixture: Mixture, *, seed: int = 10_000, sequences: int = 512) -> dict[str, Any]:
    """Accuracy on questions that training did not draw, no head masked: by format (four options) and by labelling."""
    table: dict[str, Any] = {}
    for name in (*FORMATS, *OTHERS):
        generator = torch.Generator().manual_seed(seed)
        if name in FORMATS:
            episodes = _episodes(mixture, name, sequences, 4, generator)
        else:
            episodes = mixture.episodes(name, sequences, OTHERS[name], generator, sums=3)
        table[name] = answer_accuracy(model(input_ids=episodes.input_ids).logits, episodes)
    for labels in ("standard", "random", "permuted", "digits"):
        prompts, _ = choice_prompts(sequences, labels=labels, generator=torch.Generator().manual_seed(seed))
        table[f"prompts, {labels} labels"] = prompts.accuracy(model(input_ids=prompts.input_ids).logits[:, -1])
    return table


def train(
    out: str | Path, *, seed: int = 0, log: Callable[[dict[str, Any]], None] | None = None, steps: int | None = None
) -> Path:
    """Train the shipped `tasks` model on; write model, tokenizer and card to `out`. steps: shorten the run."""
    from headwise.specimens.registry import load_specimen, write_specimen

    phases, mixture = shortened(PHASES, steps), Mixture()
    model = load_specimen(BASE).model
    history = fit(
        model,
        batches(mixture, phases),
        loss,
        steps=sum(phase.steps for phase in phases),
        seed=seed,
        optimiser=OptimiserSpec(lr=LEARNING_RATE),
        schedule=trapezoid(warmup=WARM_UP, decay=DECAY),
        log=log,
        log_every=40,
        masks=dead_masks(),
    )
    model = model.to(torch.bfloat16).float()  # what ships is what was measured
    card = {
        "summary": SUMMARY,
        "base": BASE,
        **ran(history, phases, seed),
        "recipe": {
            **recipe(phases, rate=LEARNING_RATE, warmup=WARM_UP, decay=DECAY),
            "formats": FORMATS,
            "options": OPTIONS,
            "masked": MASKED,
            "loss": "sum of the mean losses on the answers of each format and task",
        },
        "masked": masked(),
        "losses": history.records[-1],
        "accuracies": evaluate(model, mixture),
    }
    return write_specimen(Path(out), model, mixture.symbols.names, card, NAME)
