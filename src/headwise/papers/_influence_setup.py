"""What attention_influence.py measures on: documents whose need for context is known, halves of a pool, models trained
on them.

The scorer is the shipped `tasks` model; the larger model is a Llama of two wide layers that starts from nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.head_map import HeadMap
from headwise.heads.influence import attention_influence, influence_heads
from headwise.papers.running import Run
from headwise.specimens.registry import load_specimen
from headwise.tasks.documents import repeated_share, select_documents
from headwise.tasks.episodes import Episodes, answer_accuracy
from headwise.tasks.mixture import Mixture
from headwise.training import OptimiserSpec, fit, trapezoid

NEEDED, UNNEEDED = ("repeats", "needles"), ("bigrams", "addition")  # is the context needed?
EVALUATED = ("repeats", "needles", "addition", "indirect_objects", "coloured_objects", "multiple_choice")
LENGTH, POOL = 32, 2048
WIDTH, INNER, LAYERS, HEADS = 160, 320, 2, 4
STEPS, BATCH, EVERY, RATE = 200, 24, 25, 4e-3


def documents(length: int, each: int, seed: int) -> dict[str, Int[Tensor, "n t"]]:
    """`each` documents of every family. The bigram text gives triggers no more than their own small share."""
    mixture, generator = Mixture(), torch.Generator().manual_seed(seed)
    sums = length // 6 - 1
    found = {
        name: mixture.episodes(name, each, length, generator, sums=sums).input_ids
        for name in ("repeats", "needles", "addition")
    }
    found["bigrams"] = _plain_text(each, length, generator)
    return found


def _plain_text(count: int, length: int, generator: torch.Generator) -> Int[Tensor, "n t"]:
    """Bigram text of the same words in which nothing is copied back: sequences with a trigger are drawn again."""
    text = Mixture(trigger_share=0.0).text
    kept: list[Tensor] = []
    while sum(map(len, kept)) < count:
        drawn = text.sample(4 * count, generator, length=length)
        kept.append(drawn[~text.trigger_mask(drawn).any(1)])
    return torch.cat(kept)[:count]


@dataclass
class Pool:
    """Shuffled documents; needed: which of them are read with the help of their context."""

    ids: Int[Tensor, "n t"]
    needed: Tensor


def make_pool(seed: int) -> Pool:
    families = documents(LENGTH, POOL // 4, 200 + seed)
    ids = torch.cat(list(families.values()))
    needed = torch.cat([torch.full((len(part),), name in NEEDED) for name, part in families.items()])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(300 + seed))
    return Pool(ids[order], needed[order])


def auc(high: Tensor, low: Tensor) -> float:
    """The chance that a value of `high` exceeds one of `low`; ties count half."""
    return float(((high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()).mean())


def parameters_of(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


@dataclass
class Told:
    """AUC of telling documents apart: by the score, uniform and zero, by the loss, by the score of other heads."""

    score: float
    zeroed: float
    loss: float
    others: dict[str, float]
    by_family: dict[str, Float[Tensor, " n"]]


@dataclass
class Selector:
    """The scorer, the heads that it masks, and every other set of as many heads of the same layers."""

    model: nn.Module
    map: HeadMap
    heads: list[Head]
    others: list[list[Head]]
    dead: list[str]

    @classmethod
    def load(cls, run: Run) -> "Selector":
        specimen = load_specimen("tasks")
        if specimen.head_map is None:
            raise ValueError("attention-influence: the tasks model has no head map; train it with headwise train tasks")
        scores = HeadMap.load(specimen.head_map)
        heads = influence_heads(scores)
        others = scores.matched_random(heads, draws=200, seed=run.seed)
        return cls(specimen.model.to(run.device), scores, heads, others, specimen.card["masked"]["dead"])

    def influence(self, ids: Tensor, heads: list[Head] | None = None, mode: Any = "uniform") -> Any:
        return attention_influence(self.model, ids, self.heads if heads is None else heads, mode=mode)

    def told_apart(self, held: Mapping[str, Tensor], run: Run) -> Told:
        run.log("scoring held-out documents with every set of heads")
        ids = torch.cat([held[name] for name in (*NEEDED, *UNNEEDED)])
        split = sum(len(held[name]) for name in NEEDED)

        def told(values: Tensor) -> float:
            return auc(values[:split], values[split:])

        found = self.influence(ids)
        by_loss = told(found.base)
        sizes = [len(held[name]) for name in (*NEEDED, *UNNEEDED)]
        others = {
            _named(one): told(self.influence(ids, one).scores)
            for one in run.progress(self.others, "scoring with other heads")
        }
        return Told(
            told(found.scores),
            told(self.influence(ids, mode="zero").scores),
            max(by_loss, 1 - by_loss),
            others,
            dict(zip((*NEEDED, *UNNEEDED), found.scores.split(sizes), strict=True)),
        )

    def halves(self, pool: Pool, run: Run) -> dict[str, Tensor]:
        """Name of an arm -> which documents of the pool it trains on."""
        run.log("scoring the pool")
        found = self.influence(pool.ids)
        chance = torch.rand(len(pool.ids), generator=torch.Generator().manual_seed(400 + run.seed))
        repeats = torch.tensor([repeated_share(ids) or 0.0 for ids in pool.ids.tolist()])
        by = {
            "influence half": found.scores, "random half": chance, "low-loss half": -found.base,
            "high-loss half": found.base, "repetition half": repeats,
        }  # fmt: skip
        whole = {"whole pool": torch.ones(len(pool.ids), dtype=torch.bool)}
        return whole | {name: select_documents(values, fraction=0.5) for name, values in by.items()}


def _named(heads: list[Head]) -> str:
    return "+".join(map(str, heads))


@dataclass
class Arm:
    """A model trained on a part of the pool. accuracy, loss: task -> value at each of `steps`."""

    parameters: int
    steps: list[int] = field(default_factory=list)
    accuracy: dict[str, list[float]] = field(default_factory=dict)
    loss: dict[str, list[float]] = field(default_factory=dict)

    def context(self) -> list[float]:
        """Mean accuracy of the tasks of the pool that are answered from the context, step by step."""
        return [sum(at) / len(at) for at in zip(*(self.accuracy[name] for name in NEEDED), strict=True)]


def larger_model(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=2 * LENGTH,
                tie_word_embeddings=True, bos_token_id=0, eos_token_id=None, pad_token_id=127,
            )
        )  # fmt: skip


def train_arms(pool: Pool, halves: Mapping[str, Tensor], run: Run, steps: int = STEPS) -> dict[str, Arm]:
    """One larger model for each part of the pool: the same start, steps and batch size; plain next-token loss."""
    mixture = Mixture()
    tests = {
        name: mixture.episodes(name, 96, LENGTH, torch.Generator().manual_seed(500 + run.seed), sums=LENGTH // 6 - 1)
        for name in EVALUATED
    }
    return {
        name: _train(f"training on the {name}", pool.ids[chosen], tests, run, steps) for name, chosen in halves.items()
    }


def _train(what: str, ids: Tensor, tests: Mapping[str, Episodes], run: Run, steps: int) -> Arm:
    run.log(f"{what}, {len(ids):,} documents")
    model = larger_model(run.seed).to(run.device)
    arm = Arm(parameters_of(model))

    def batches(step: int, generator: torch.Generator) -> Tensor:
        del step
        return ids[torch.randint(0, len(ids), (BATCH,), generator=generator)].to(run.device)

    def loss(model: Any, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def look(step: int, model: Any) -> None:
        arm.steps.append(step)
        with torch.no_grad():
            for name, test in tests.items():
                logits = model(input_ids=test.input_ids.to(run.device), use_cache=False).logits.cpu()
                asked = test.answers[:, 1:]
                lost = nn.functional.cross_entropy(logits[:, :-1][asked], test.input_ids[:, 1:][asked])
                arm.accuracy.setdefault(name, []).append(answer_accuracy(logits, test)["tokens"])
                arm.loss.setdefault(name, []).append(float(lost))

    fit(
        model,
        batches,
        loss,
        steps=steps,
        seed=run.seed,
        optimiser=OptimiserSpec(lr=RATE),
        schedule=trapezoid(warmup=30, decay=0.3),
        checkpoints=range(0, steps + 1, EVERY),
        on_checkpoint=look,
    )
    return arm
