"""What the rows of circuit_component_reuse.py are measured on: the shipped model's tasks, their circuits, training.

A task's circuit is found by path patching in three stages, the heads that write the answer first. Counterfactuals are
other prompts of the same task: every task has those, and they disturb all that a prompt says.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate, ForceRows
from headwise.attend.step import Step
from headwise.heads.circuits import Circuit
from headwise.heads.effects import Metric, NodeEffects, logit_difference
from headwise.heads.patching import path_patch
from headwise.hf.maps import attention_maps, head_outputs
from headwise.hf.session import steer
from headwise.papers.running import Run
from headwise.specimens._training import seeded, small_llama
from headwise.specimens.registry import load_specimen
from headwise.tasks.episodes import Episodes, answer_accuracy
from headwise.tasks.mixture import MixedBatch, Mixture
from headwise.training import OptimiserSpec, fit, trapezoid

COPYING = ("indirect_objects", "coloured_objects", "needles", "repeats")
TASKS = (*COPYING, "addition")
PAIRS = (
    ("indirect_objects", "coloured_objects"), ("indirect_objects", "needles"), ("indirect_objects", "repeats"),
    ("coloured_objects", "needles"), ("coloured_objects", "repeats"), ("needles", "repeats"),
    ("indirect_objects", "addition"), ("coloured_objects", "addition"),
)  # fmt: skip
UNRELATED = PAIRS[-2:]
EACH = 2  # heads of a stage: 2 % of GPT-2 medium's 384 heads are 8, of 24 less than one
LEAST = 0.01  # of what the corrupt prompt does: a head with a smaller effect is in no circuit
LENGTH, PROMPTS = 32, 32
TOO_LONG = 384  # trained on 320 at most
LEARNED = 0.97  # of indirect objects
COPIES = 0.95  # of repeats and of needles: a model that has less does not copy yet


@dataclass(frozen=True)
class Asked:
    """Prompts of a task that end where the answer is due. told: another prompt in the place of each."""

    task: str
    ids: Int[Tensor, "b t"]
    answer: Int[Tensor, " b"]
    episodes: Episodes

    @classmethod
    def of(cls, mixture: Mixture, task: str, seed: int, *, length: int = LENGTH, prompts: int = PROMPTS) -> "Asked":
        generator = torch.Generator().manual_seed(20_000 + seed)
        episodes = mixture.episodes(task, prompts, length, generator)
        columns = [int(row.nonzero()[-1]) for row in episodes.answers]
        if len(set(columns)) != 1:
            raise ValueError(f"{task}: answers end at columns {sorted(set(columns))}; expected one column for all")
        end = columns[0]
        return cls(task, episodes.input_ids[:, :end], episodes.input_ids[:, end], episodes)

    def partner(self) -> Int[Tensor, " b"]:
        """For each prompt another one with another answer."""
        found = []
        for row in range(len(self.answer)):
            order = [(row + step) % len(self.answer) for step in range(1, len(self.answer))]
            found.append(next(other for other in order if self.answer[other] != self.answer[row]))
        return torch.tensor(found)

    def metric(self) -> Metric:
        return logit_difference(self.answer, self.answer[self.partner()])

    @torch.no_grad()
    def right(self, model: nn.Module) -> Bool[Tensor, " b"]:
        logits = torch.cat(
            [model(part, use_cache=False, logits_to_keep=1).logits[:, -1] for part in self.ids.split(16)]
        )
        return logits.argmax(-1) == self.answer

    def accuracy(self, model: nn.Module) -> float:
        return float(self.right(model).float().mean())


@dataclass(frozen=True)
class Found:
    """A task's circuit, the effects of its stages, and which head does how much of it."""

    asked: Asked
    circuit: Circuit
    effects: dict[str, NodeEffects]
    writes: Float[Tensor, "l h"]

    @property
    def heads(self) -> list[Head]:
        return self.circuit.heads


@dataclass(frozen=True)
class Subject:
    """The shipped model, its live heads, and what was found on each task."""

    model: nn.Module
    mixture: Mixture
    live: list[Head]
    found: dict[str, Found]
    seed: int

    @classmethod
    def load(cls, run: Run) -> "Subject":
        loaded = load_specimen("tasks")
        mixture, model = Mixture(), loaded.model
        dead = {Head.parse(address) for address in loaded.card["masked"]["dead"]}
        live = [Head(layer, head) for layer in range(3) for head in range(8) if Head(layer, head) not in dead]
        found = {}
        for task in TASKS:
            run.log(f"path patching {task}")
            found[task] = circuit_of(model, Asked.of(mixture, task, run.seed), live)
        return cls(model, mixture, live, found, run.seed)

    @contextmanager
    def without(self, heads: Sequence[Head], asked: Asked) -> Iterator[None]:
        """Heads at their mean over other prompts of the task."""
        other = Asked.of(self.mixture, asked.task, self.seed + 500, length=asked.ids.shape[1] + 1, prompts=64)
        statistics = head_outputs(self.model, other.ids)
        with steer(self.model, Ablate(heads=list(heads), mode="mean", statistics=statistics)):
            yield


def circuit_of(model: nn.Module, asked: Asked, live: Sequence[Head]) -> Found:
    """Three stages: to the logits, to the queries of those heads at the end, to their keys anywhere."""
    twin, metric = asked.ids[asked.partner()], asked.metric()
    effects = {"movers": path_patch(model, asked.ids, twin, metric)}
    writes = effects["movers"].map().tensor()
    stages = {"movers": strongest(effects["movers"], live)}
    for name, part, position in (("queries", "q", -1), ("keys", "k", None)):
        receivers = [f"{head}.{part}" for head in stages["movers"] if head.layer]
        if not receivers:
            continue
        effects[name] = path_patch(model, asked.ids, twin, metric, receivers=receivers, position=position)
        stages[name] = strongest(effects[name], live)
    return Found(asked, Circuit(stages, "tasks", asked.task), effects, writes)


def strongest(effects: NodeEffects, live: Sequence[Head]) -> list[Head]:
    """The heads of a stage: at most `EACH`, each with a share of at least `LEAST` of the corrupt prompt's effect."""
    table = effects.map()
    scores = table.of()
    return [head for head in table.top(k=EACH) if head in set(live) and (scores[head] or 0.0) >= LEAST]


def forced(heads: Sequence[Head], rows: Bool[Tensor, "b t"]) -> ForceRows:
    """Heads that look at the token before, in the rows named, whatever they would have looked at."""

    def touched(step: Step) -> Tensor:
        return rows[:, step.past : step.past + step.length]

    return ForceRows(pattern="previous", heads=list(heads), when=touched)


def scene_rows(asked: Asked) -> Bool[Tensor, "b t"]:
    """Rows of the scene of coloured objects: things and colours, not the question."""
    columns = torch.arange(asked.ids.shape[1])
    return ((columns >= asked.ids.shape[1] - 8) & (columns < asked.ids.shape[1] - 2)).expand(len(asked.ids), -1)


@torch.no_grad()
def mass_on(model: nn.Module, asked: Asked, heads: Sequence[Head], span: str) -> float:
    """Mean weight of the last row of heads on the token of a span."""
    columns = asked.episodes.spans[span][:, 0]
    total = 0.0
    for start in range(0, len(asked.ids), 16):
        part = slice(start, start + 16)
        maps = attention_maps(model, asked.ids[part], list(heads), rows=[-1])[:, :, 0]
        total += float(maps.gather(-1, columns[part, None, None].expand(-1, len(heads), 1)).sum())
    return total / (len(asked.ids) * len(heads))


@dataclass(frozen=True)
class Transfer:
    """Steps until the model copied, and then until indirect objects were learned, from there and from nothing.

    None where the steps ran out: `most` for each lesson of copying, `cap` for indirect objects. copies: repeats or
    needles right in the end, whichever are fewer.
    """

    copies: float
    copied: int | None
    copying: int | None
    scratch: int | None
    most: int
    cap: int


class _Learned(Exception):
    pass


def small_model(seed: int) -> nn.Module:
    """Three layers of four heads from random weights: heads wide enough to tell words apart, so that it can copy."""
    return seeded(
        lambda: small_llama(128, layers=3, heads=4, head_dim=24, hidden=96, inner=192, positions=64, pad=127),
        100 + seed,
    )


@dataclass(frozen=True)
class Lesson:
    """Sequences of each task in a batch, learning rate and its warm-up; learned when `enough` of all `asked` is right.

    every: after how many steps that is looked at, each time.
    """

    counts: dict[str, int]
    asked: tuple[str, ...]
    length: int
    rate: float
    warmup: int
    enough: float
    every: int


# To copy: repeats alone, then with needles and text, as the shipped model began and without its other tasks.
COPY_LESSONS = (
    Lesson({"repeats": 48}, ("repeats",), 32, 3e-3, 50, COPIES, 50),
    Lesson({"bigrams": 8, "repeats": 16, "needles": 24}, ("repeats", "needles"), 32, 3e-3, 20, COPIES, 50),
)
NEW_LESSON = Lesson({"indirect_objects": 32}, ("indirect_objects",), 16, 2e-3, 20, LEARNED, 10)


def transfer(seed: int, run: Run, *, most: int = 3000, cap: int = 500) -> Transfer:
    """Learn to copy to the end, then indirect objects from there and from nothing, batches and rate the same.

    most: steps for each lesson of copying. cap: steps for indirect objects from the model that copies; from scratch it
    is five times what that model took, or five times `cap` where it did not learn.
    """
    mixture, fresh = Mixture(), small_model(seed)
    copying = deepcopy(fresh)
    steps: list[int | None] = []
    copies = 0.0
    for lesson in COPY_LESSONS:
        run.log(f"learning to copy: {', '.join(lesson.counts)}")
        taken, copies = _train(copying, mixture, lesson, seed, most)
        steps.append(taken)
    copied = None if None in steps else sum(filter(None, steps))
    run.log(f"copies {copies:.0%} after {copied} steps; learning indirect objects")
    fast, _ = _train(copying, mixture, NEW_LESSON, seed + 1, cap)
    run.log(f"{fast} steps; from scratch")
    slow, _ = _train(fresh, mixture, NEW_LESSON, seed + 1, 5 * (fast or cap))
    return Transfer(copies, copied, fast, slow, most, 5 * (fast or cap))


def _train(model: nn.Module, mixture: Mixture, lesson: Lesson, seed: int, cap: int) -> tuple[int | None, float]:
    """Steps until the lesson is learned, None where that takes more than `cap`; and the share that is right then."""
    held = [mixture.episodes(task, 128, lesson.length, torch.Generator().manual_seed(998)) for task in lesson.asked]
    seen: dict[int, float] = {}

    def look(step: int, current: nn.Module) -> None:
        current.eval()
        with torch.no_grad():
            seen[step] = min(answer_accuracy(current(one.input_ids).logits, one)["tokens"] for one in held)
        current.train()
        if seen[step] >= lesson.enough:
            raise _Learned

    try:
        fit(
            model,
            lambda step, generator: mixture.batch(lesson.counts, lesson.length, generator),
            _loss,
            steps=cap,
            seed=seed,
            optimiser=OptimiserSpec(lr=lesson.rate),
            schedule=trapezoid(warmup=lesson.warmup, decay=0.0),
            checkpoints=range(lesson.every, cap + 1, lesson.every),
            on_checkpoint=look,
        )
    except _Learned:
        return max(seen), seen[max(seen)]
    return None, seen[max(seen)]


def _loss(model: nn.Module, batch: MixedBatch) -> Tensor:
    """The tasks' own mean losses, and half of that of the text around them."""
    parts = batch.losses(model(input_ids=batch.input_ids).logits)
    return torch.stack([value * (0.5 if name == "text" else 1.0) for name, value in parts.items()]).sum()
