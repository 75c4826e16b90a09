"""What arithmetic_heads.py measures on: the shipped arithmetic model, what is left of it without some heads, and an
early checkpoint of it, tuned in several ways.

A head that is removed puts out its mean over other prompts of the same task, so that a task sees no other task's text.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate
from headwise.attend.head_map import HeadMap
from headwise.heads.effects import NodeEffects, centred_logit
from headwise.heads.finetuning import finetune_only
from headwise.heads.knockout import control_sets
from headwise.heads.patching import path_patch
from headwise.hf.addresses import layout
from headwise.hf.maps import head_outputs
from headwise.hf.session import steer
from headwise.papers.running import Run
from headwise.papers.statistics import mean
from headwise.specimens import arithmetic as specimen
from headwise.specimens.registry import load_specimen, specimen_checkpoints
from headwise.tasks.episodes import answer_accuracy
from headwise.tasks.repeats import repeated_segments
from headwise.tasks.symbol_arithmetic import ArithmeticSymbols, arithmetic_episodes
from headwise.training import OptimiserSpec, fit, trapezoid

FOUND_ON = "add-infix"
SUMS = ("add-infix", "add-prefix", "subtract-infix", "subtract-prefix")
LETTERS = ("first-infix", "first-prefix", "last-infix", "last-prefix")
KEY, LOST, OTHERS = 2, 0.30, 0.15  # key heads; points of accuracy that they cost at least, and others at most
PROBLEMS = 4  # in a prompt: three that are solved, and the one that is asked
STEPS, RATE, DECAY = 200, 3e-3, 0.01  # the rate of the specimen's own training, for every way of tuning
SYMBOLS = ArithmeticSymbols()


@dataclass
class Asked:
    """Prompts that end where the model answers, their counterfactuals, and where the roles stand."""

    task: str
    ids: Tensor
    twin: Tensor
    right: Tensor
    wrong: Tensor
    roles: dict[str, Tensor]

    @classmethod
    def of(
        cls, task: str, count: int, seed: int, counterfactual: str = "operands", problems: int = PROBLEMS
    ) -> "Asked":
        name, _, template = task.partition("-")
        operator = {word: sign for sign, word in specimen.OPERATORS.items()}[name]
        made = arithmetic_episodes(
            count, SYMBOLS, ops=operator, template=template, problems=problems, counterfactual=counterfactual,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        assert made.twin is not None
        columns = torch.arange(made.length - 1)
        roles = {role: (columns >= span[:, :1]) & (columns < span[:, 1:]) for role, span in made.spans.items()}
        return cls(task, made.input_ids[:, :-1], made.twin[:, :-1], made.input_ids[:, -1], made.twin[:, -1], roles)

    @property
    def among(self) -> Tensor:
        """The answers that are possible: all digits, or all letters."""
        pool = SYMBOLS.digits if self.task in SUMS else SYMBOLS.letters
        return pool.expand(len(self.ids), -1)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        device = next(model.parameters()).device
        said = model(input_ids=self.ids.to(device), logits_to_keep=1).logits[:, -1].argmax(-1).cpu()
        return float((said == self.right).float().mean())


def repeats_accuracy(model: nn.Module, seed: int, sequences: int = 64) -> float:
    generator = torch.Generator().manual_seed(seed)
    made = repeated_segments(sequences, SYMBOLS.letters, length=36, generator=generator)
    with torch.no_grad():
        logits = model(input_ids=made.input_ids.to(next(model.parameters()).device)).logits.cpu()
    return answer_accuracy(logits, made)["tokens"]


def effects_of(model: nn.Module, task: str, seed: int, counterfactual: str, count: int = 64) -> NodeEffects:
    """Path patching of every head and MLP at the last position, on the answer's logit less the mean candidate's."""
    asked = Asked.of(task, count, seed, counterfactual)
    senders = [*layout(model).heads(), *(f"mlp:{layer}" for layer in range(layout(model).main.layers))]
    return path_patch(model, asked.ids, asked.twin, centred_logit(asked.right, asked.among), senders=senders)


@dataclass
class Nodes:
    """Effects of heads and MLPs, as shares of the whole effect of the counterfactual."""

    heads: HeadMap
    mlps: dict[int, float]

    @classmethod
    def of(cls, *effects: NodeEffects) -> "Nodes":
        """The mean over several kinds of counterfactual."""
        maps, fed = [one.map() for one in effects], [one.mean_mlps() for one in effects]
        table = {head: mean([one.of()[head] or 0.0 for one in maps]) for head in maps[0].layout.heads()}
        mlps = {layer: mean([one[layer] for one in fed]) for layer in fed[0]}
        return cls(HeadMap({"effect": table}, maps[0].layout), mlps)

    def flat(self) -> list[float]:
        return [*self.heads.tensor("effect").flatten().tolist(), *self.mlps.values()]

    def key(self, k: int = KEY) -> list[Head]:
        return self.heads.top("effect", k)

    @property
    def mlp(self) -> int:
        """The layer of the strongest MLP."""
        return max(self.mlps, key=lambda layer: self.mlps[layer])


def nodes_of(model: nn.Module, task: str, seed: int) -> Nodes:
    return Nodes.of(*(effects_of(model, task, seed, kind) for kind in ("operands", "operator")))


@dataclass
class Calculator:
    """The shipped model, the effects of its nodes on each task, and held-out prompts."""

    model: nn.Module
    seed: int
    nodes: dict[str, Nodes]
    held: dict[str, Asked]

    @classmethod
    def load(cls, run: Run) -> "Calculator":
        model = load_specimen("arithmetic").model.to(run.device)
        run.log("patching paths")
        nodes = {task: nodes_of(model, task, 1000 + run.seed) for task in (*SUMS, *LETTERS)}
        held = {task: Asked.of(task, 120, 2000 + run.seed) for task in (*SUMS, *LETTERS)}
        return cls(model, run.seed, nodes, held)

    @cached_property
    def key(self) -> list[Head]:
        return self.nodes[FOUND_ON].key()

    @cached_property
    def _statistics(self) -> dict[str, Any]:
        found = {task: head_outputs(self.model, Asked.of(task, 200, 3000 + self.seed).ids) for task in self.held}
        generator = torch.Generator().manual_seed(3000 + self.seed)
        letters = repeated_segments(64, SYMBOLS.letters, length=36, generator=generator)
        return {**found, "repeats": head_outputs(self.model, letters.input_ids)}

    def right(self, task: str, without: Sequence[Head] = ()) -> float:
        """Accuracy on a task, some heads giving their mean over other prompts of it."""

        def measure() -> float:
            if task == "repeats":
                return repeats_accuracy(self.model, 2000 + self.seed)
            return self.held[task].accuracy(self.model)

        if not without:
            return measure()
        with steer(self.model, Ablate(heads=list(without), mode="mean", statistics=self._statistics[task])):
            return measure()


@dataclass
class Removals:
    """Points of accuracy lost without the key heads, and without each layer-matched pair, task by task."""

    key: list[Head]
    pairs: list[list[Head]]
    intact: dict[str, float]
    lost: dict[str, float]
    others: dict[str, list[float]]
    by_rank: list[float] = field(
        default_factory=list
    )  # on the first additions, without the first k heads, k = 0, 1, ..
    from_below: list[float] = field(default_factory=list)  # without the last k

    @classmethod
    def of(cls, model: Calculator, run: Run) -> "Removals":
        run.log("removing heads")
        scores = model.nodes[FOUND_ON].heads
        pairs = control_sets(scores, model.key, layout(model.model).heads(), seed=run.seed)
        tasks = (*SUMS, *LETTERS, "repeats")
        intact = {task: model.right(task) for task in tasks}
        lost = {task: intact[task] - model.right(task, model.key) for task in tasks}
        others = {
            task: [intact[task] - model.right(task, pair) for pair in run.progress(pairs, f"pairs on {task}")]
            for task in (*SUMS, "repeats")
        }
        ranked = scores.ranked("effect")
        most = len(ranked) // 2
        by_rank = [model.right(FOUND_ON, ranked[:k]) for k in range(most + 1)]
        below = [model.right(FOUND_ON, ranked[len(ranked) - k :]) for k in range(most + 1)]
        return cls(model.key, pairs, intact, lost, others, by_rank, below)

    def needed(self, rights: Sequence[float]) -> int:
        """The least number of heads whose removal costs `LOST`; all counted ones and one more where none does."""
        return next((k for k, right in enumerate(rights) if rights[0] - right >= LOST), len(rights))


class LowRank(nn.Module):
    """W + B A, the adapters of LoRA; B starts at zero."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


@dataclass
class Tuned:
    """One way of tuning: entries trained, accuracies after it."""

    entries: int
    accuracies: dict[str, float]
    model: nn.Module

    @property
    def sums(self) -> float:
        return mean([self.accuracies[task] for task in SUMS])

    @property
    def letters(self) -> float:
        return mean([self.accuracies[task] for task in LETTERS])

    @property
    def repeats(self) -> float:
        return self.accuracies["repeats"]


@dataclass
class Tunings:
    """The early checkpoint (`before`), and what becomes of it by tuning on sums and differences alone."""

    heads: list[Head]
    mlp: int
    before: Tuned
    ways: dict[str, Tuned]

    @classmethod
    def of(cls, run: Run) -> "Tunings":
        step = specimen_checkpoints("arithmetic")[0]
        model = load_specimen(f"arithmetic@{step}").model
        run.log(f"patching paths in the checkpoint of step {step}")
        nodes = nodes_of(model, FOUND_ON, 4000 + run.seed)
        heads, mlp = nodes.key(), nodes.mlp
        others = control_sets(nodes.heads, heads, layout(model).heads(), draws=2, seed=run.seed)[0]
        other_mlp = min(nodes.mlps, key=lambda layer: nodes.mlps[layer])

        def chosen(heads: list[Head], mlp: int) -> Callable[[nn.Module], Any]:
            return lambda model: finetune_only(model, heads=heads, mlps=[mlp])

        precise = finetune_only(copy.deepcopy(model), heads=heads, mlps=[mlp]).entries
        named = ", ".join(map(str, heads))
        plans: dict[str, Callable[[nn.Module], Any]] = {
            "full": lambda model: None,
            "precise": chosen(heads, mlp),
            "other heads, same MLP": chosen(others, mlp),
            "other heads and MLP": chosen(others, other_mlp),
            "low rank": lambda model: low_rank(model, precise),
        }
        ways = {}
        for name, prepare in plans.items():
            run.log(f"tuning: {name} (key heads {named}, MLP {mlp})")
            ways[name] = tune(model, prepare, run.seed)
        return cls(heads, mlp, Tuned(0, accuracies_of(model, run.seed), model), ways)


def low_rank(model: nn.Module, entries: int) -> None:
    """Adapters on every projection of attention and MLPs, of the rank that comes nearest to so many entries."""
    maps = [
        module for name, module in model.named_modules() if name.endswith("_proj") and isinstance(module, nn.Linear)
    ]
    rank = max(1, round(entries / sum(module.in_features + module.out_features for module in maps)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in maps:
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


def tune(model: nn.Module, prepare: Callable[[nn.Module], Any], seed: int) -> Tuned:
    """Train a copy on sums and differences, all operands equally likely; accuracies are of other problems."""
    torch.manual_seed(seed)
    tuned = copy.deepcopy(model)
    handle = prepare(tuned)
    entries = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    phase = specimen.Phase(STEPS, 16, 0, 0, problems=PROBLEMS)
    fit(
        tuned,
        lambda step, generator: specimen.draw(phase, SYMBOLS, generator),
        specimen.loss,
        steps=STEPS,
        seed=5000 + seed,
        optimiser=OptimiserSpec(lr=RATE, weight_decay=DECAY),
        schedule=trapezoid(warmup=10, decay=0.5),
    )
    if handle is not None:
        handle.merge()
    return Tuned(entries, accuracies_of(tuned, seed), tuned)


def accuracies_of(model: nn.Module, seed: int) -> dict[str, float]:
    found = {task: Asked.of(task, 200, 6000 + seed).accuracy(model) for task in (*SUMS, *LETTERS)}
    return {**found, "repeats": repeats_accuracy(model, 6000 + seed)}
