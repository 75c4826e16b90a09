"""What the rows of circuit_component_reuse.py are measured on: the shipped model's tasks, their circuits, training.

A task's circuit is found by path patching in three stages, the heads that write the answer first. Counterfactuals are
other prompts of the same task: every task has those, and they disturb all that a prompt says.
"""

from collections.abc import Callable, Iterator, Sequence
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
LEARNED, EVERY = 0.97, 10


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
    """Steps until indirect objects are learned, from a model that copies and from nothing; None where the cap came."""

    copies: float
    copying: int | None
    scratch: int | None
    cap: int


class _Learned(Exception):
    pass


def small_model(seed: int) -> nn.Module:
    """Two layers of four heads from random weights: learns to copy in half a minute."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=127,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 + seed)
        return LlamaForCausalLM(config)


def transfer(seed: int, run: Run, *, first: int = 1000, cap: int = 500) -> Transfer:
    """Learn to copy, then indirect objects from there and from nothing, with the same batches and learning rate."""
    mixture, fresh = Mixture(), small_model(seed)
    copying = deepcopy(fresh)
    run.log("learning to copy")
    rate = OptimiserSpec(lr=4e-3)
    fit(
        copying,
        _batches(mixture, "repeats", 32, 24),
        _loss,
        steps=first,
        seed=seed,
        optimiser=rate,
        schedule=trapezoid(warmup=50, decay=0.2),
    )
    held = mixture.episodes("repeats", 64, 32, torch.Generator().manual_seed(999))
    with torch.no_grad():
        copies = answer_accuracy(copying(held.input_ids).logits, held)["tokens"]
    run.log(f"copies {copies:.0%}; learning indirect objects")
    fast = _steps(copying, mixture, seed, cap)
    run.log(f"{fast} steps; from scratch")
    slow = _steps(fresh, mixture, seed, 5 * (fast or cap))
    return Transfer(copies, fast, slow, 5 * (fast or cap))


def _batches(mixture: Mixture, task: str, count: int, length: int) -> Callable[[int, torch.Generator], MixedBatch]:
    return lambda step, generator: mixture.batch({task: count}, length, generator)


def _loss(model: nn.Module, batch: MixedBatch) -> Tensor:
    """The task's own mean loss, and half of that of the text around it."""
    parts = batch.losses(model(input_ids=batch.input_ids).logits)
    return torch.stack([value * (0.5 if name == "text" else 1.0) for name, value in parts.items()]).sum()


def _steps(model: nn.Module, mixture: Mixture, seed: int, cap: int) -> int | None:
    """Steps until `LEARNED` of held-out prompts are right; None where that takes more than `cap`."""
    held = mixture.episodes("indirect_objects", 128, 16, torch.Generator().manual_seed(998))
    learned: list[int] = []

    def look(step: int, current: nn.Module) -> None:
        current.eval()
        with torch.no_grad():
            right = answer_accuracy(current(held.input_ids).logits, held)["tokens"]
        current.train()
        if right >= LEARNED:
            learned.append(step)
            raise _Learned

    try:
        fit(
            model,
            _batches(mixture, "indirect_objects", 32, 16),
            _loss,
            steps=cap,
            seed=seed + 1,
            optimiser=OptimiserSpec(lr=2e-3),
            schedule=trapezoid(warmup=20, decay=0.0),
            checkpoints=range(EVERY, cap + 1, EVERY),
            on_checkpoint=look,
        )
    except _Learned:
        return learned[0]
    return None
