"""What task_kv.py measures on: texts with questions for two shipped models, and answers under caches of equal bytes.

A question is asked in one of two ways: at the end of the prompt that is compressed, where its last queries can see it;
or in a second turn, when the prompt was compressed already. An answer is right when every token of it is; the tokens
before it are given, which is the same as decoding greedily.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.head_map import HeadMap
from headwise.heads.knockout import live_heads
from headwise.hf.addresses import layout
from headwise.hf.head_budgets import BudgetPolicy, LayerPrompt
from headwise.hf.inputs import with_cache
from headwise.memory.budget_policies import HeadMapPolicy, SnapKVPolicy, StreamingPolicy, TaskKVPolicy
from headwise.memory.task_kv import HeadBudgetCache
from headwise.papers.running import Run
from headwise.specimens._stories import fact, story
from headwise.specimens.registry import load_specimen
from headwise.tasks.mixture import Mixture
from headwise.tasks.needles import needle
from headwise.tasks.repeats import repeated_segments

BUDGETS = (0.2, 0.4, 0.6)
WAYS = ("in the prompt", "in a second turn")
SINK, RECENT, WINDOW, TOP, POOL = 4, 32, 16, 64, 7  # at the scale of prompts of 300 tokens
LENGTH, BATCH, RETRIEVAL = 300, 128, 0.1
FULL, STREAMING, SNAP, EQUAL, RANDOM, TASK, MAP = (
    "full cache", "StreamingLLM", "SnapKV", "no split", "random split", "Task-KV", "retrieval map",
)  # fmt: skip
METHODS = (FULL, STREAMING, SNAP, EQUAL, RANDOM, TASK, MAP)
COMMON: dict[str, Any] = {"sink": SINK, "recent": RECENT, "window": WINDOW, "top": TOP, "pool": POOL}


@dataclass(frozen=True)
class Question:
    """Token ids. important: where in the context the answer stands."""

    context: Tensor
    question: Tensor
    answer: Tensor
    important: tuple[int, int]


@dataclass(frozen=True)
class RandomSplitPolicy(TaskKVPolicy):
    """Task-KV with the same numbers of full heads, drawn at random for each text and layer."""

    seed: int = 0

    def choose(self, prompt: LayerPrompt, scores: Tensor, count: int) -> Tensor:
        b, n = prompt.key.shape[:2]
        generator = torch.Generator().manual_seed(1000 * self.seed + prompt.layer)
        order = torch.rand(b, n, generator=generator).argsort(1).to(prompt.key.device)
        return torch.zeros(b, n, dtype=torch.bool, device=order.device).scatter(1, order[:, :count], True)


@dataclass
class Reader:
    """A shipped model, its questions by task, its key heads and the shipped map of its retrieval heads."""

    name: str
    model: nn.Module
    device: str
    questions: dict[str, list[Question]]
    kv_heads: tuple[int, ...]
    heads: int
    scores: HeadMap
    live: list[Head] = field(default_factory=list)

    @classmethod
    def load(cls, name: str, run: Run, count: int = 256) -> "Reader":
        specimen = load_specimen(name)
        model = specimen.model.to(run.device)
        rng = Random(run.seed)
        tasks = symbol_tasks(run.seed) if name == "tasks" else text_tasks(specimen.tokenizer, rng)
        # The needles are what the issue of budgets is about; the other task of a model gets half as many.
        counts = {task: count if index == 0 else count // 2 for index, task in enumerate(tasks)}
        questions = {task: make(counts[task]) for task, make in tasks.items()}
        tower = layout(model).tower("")
        if specimen.head_map is None:
            raise FileNotFoundError(f"specimen {name!r} has no recorded head map")
        first = next(iter(questions.values()))
        live = live_heads(model, torch.stack([one.context[:64] for one in first[:16]]))
        return cls(
            name, model, run.device, questions, tower.kv_heads, tower.heads[0],
            HeadMap.read(specimen.head_map, layout(model)), live,
        )  # fmt: skip

    def best_key_heads(self, most: int) -> tuple[tuple[int, ...], ...]:
        """For each layer the key heads of the best retrieval heads (0.1 or more), at most so many in all."""
        table = self.scores.of("retrieval")
        order = sorted(
            (head for head in table if (table[head] or 0) >= RETRIEVAL), key=lambda head: -(table[head] or 0)
        )
        chosen: list[tuple[int, int]] = []
        for head in order:
            place = (head.layer, head.head * self.kv_heads[head.layer] // self.heads)
            if place not in chosen and len(chosen) < most:
                chosen.append(place)
        return tuple(
            tuple(sorted(head for layer, head in chosen if layer == number)) for number in range(len(self.kv_heads))
        )

    def policy(self, method: str, budget: float, seed: int, **options: Any) -> BudgetPolicy:
        """A method at a budget in bytes."""
        given = {**COMMON, **options, "budget": budget}
        if method == FULL:
            return StreamingPolicy(1.0)
        if method == STREAMING:
            return StreamingPolicy(budget, sink=SINK)
        if method == SNAP:
            return SnapKVPolicy(budget, window=WINDOW)
        if method == EQUAL:
            return TaskKVPolicy(**given, beta=0.0, min_heads=0)
        if method == RANDOM:
            return RandomSplitPolicy(**given, seed=seed)
        if method == MAP:
            # As many of the map's best heads as the budget holds beside everyone's sinks and recent tokens.
            total, least = sum(self.kv_heads), LENGTH - 30
            most = int((budget * total * least - total * (SINK + RECENT)) / (least - SINK - RECENT))
            return HeadMapPolicy(**given, full=self.best_key_heads(most), heads=self.kv_heads)
        return TaskKVPolicy(**given)


# The questions


def symbol_tasks(seed: int) -> dict[str, Callable[[int], list[Question]]]:
    mixture, generator = Mixture(), torch.Generator().manual_seed(7000 + seed)
    words = mixture.symbols.plain_words

    def needles(count: int) -> list[Question]:
        found = []
        for index in range(count):
            depth = (index % 16 + 0.5) / 16
            (one,) = needle("symbols", lengths=(LENGTH,), depths=(depth,), seed=100_000 * seed + index)
            if one.input_ids is None or one.answer_ids is None:
                raise ValueError("task-kv: a needle was made without token ids")
            found.append(Question(one.input_ids[:-3], one.input_ids[-3:], one.answer_ids, one.span))
        return found

    def repeats(count: int) -> list[Question]:
        """A list of 64 different words told again and again, which breaks off; the next six are asked for."""
        found = []
        for ids in repeated_segments(count, words, length=LENGTH + 6, segment=(64, 64), generator=generator).input_ids:
            end = LENGTH - 64
            found.append(Question(ids[: LENGTH - 4], ids[LENGTH - 4 : LENGTH], ids[LENGTH:], (end, end + 6)))
        return found

    return {"needles": needles, "repeats": repeats}


def text_tasks(tokenizer: Any, rng: Random) -> dict[str, Callable[[int], list[Question]]]:
    def questions(count: int) -> list[Question]:
        told = [fact(rng) for _ in range(count)]
        depths = [(index % 16 + 0.5) / 16 for index in range(count)]
        found = []
        for index, (one, depth) in enumerate(zip(told, depths, strict=True)):
            (made,) = needle(
                "sentence", tokenizer=tokenizer, haystack=story(rng, 40), lengths=(LENGTH,), depths=(depth,),
                facts=[(one.sentence, one.question, one.answer)], seed=index,
            )  # fmt: skip
            front = made.text[: made.text.index("\nBased on the content of the book")]
            cut = len(tokenizer(front)["input_ids"])
            if made.input_ids is None or made.answer_ids is None:
                raise ValueError("task-kv: a needle was made without token ids")
            found.append(Question(made.input_ids[:cut], made.input_ids[cut:], made.answer_ids, made.span))
        return found

    def copies(count: int) -> list[Question]:
        """A story, then six of its tokens again: the next eight are asked for."""
        found = []
        for index in range(count):
            ids = torch.tensor(tokenizer(story(rng, 40))["input_ids"])[: LENGTH - 6]
            at = 8 + round((index % 16 + 0.5) / 16 * (len(ids) - 24))
            found.append(Question(ids, ids[at : at + 6], ids[at + 6 : at + 14], (at + 6, at + 14)))
        return found

    return {"questions": questions, "copies": copies}


# Answering


@dataclass
class Prompts:
    """A batch of prompts that were read once, nothing dropped, and what comes next of each."""

    reader: Reader
    cache: HeadBudgetCache
    real: Tensor
    rest: list[Tensor]
    answers: list[Tensor]
    first: Tensor  # what the model says after the prompt
    important: Tensor

    @classmethod
    def of(cls, reader: Reader, questions: Sequence[Question], way: str) -> "Prompts":
        """way: whether the question is part of the prompt."""
        inside = way == WAYS[0]
        read = [torch.cat([one.context, one.question]) if inside else one.context for one in questions]
        rest = [one.answer[:-1] if inside else torch.cat([one.question, one.answer[:-1]]) for one in questions]
        width = max(map(len, read))
        ids = torch.zeros(len(read), width, dtype=torch.long)
        real = torch.zeros(len(read), width, dtype=torch.bool)
        important = torch.zeros(len(read), width, dtype=torch.bool)
        for row, (text, one) in enumerate(zip(read, questions, strict=True)):
            ids[row, width - len(text) :], real[row, width - len(text) :] = text, True
            shift = width - len(text)
            important[row, shift + one.important[0] : shift + one.important[1]] = True
        cache = HeadBudgetCache(reader.model, TaskKVPolicy(**COMMON), chunked=True)
        ids, real = ids.to(reader.device), real.to(reader.device)
        logits = forward(reader.model, cache, ids, real, keep=1)
        return cls(
            reader, cache, real, rest, [one.answer for one in questions], logits[:, -1].argmax(-1).cpu(),
            important.to(reader.device),
        )  # fmt: skip

    def right(self, policy: BudgetPolicy | None) -> tuple[list[bool], float]:
        """Whether each answer is right under a policy (None: nothing is dropped), and the share of bytes it keeps."""
        cache = self.cache.fork(StreamingPolicy(1.0) if policy is None else policy)
        share = cache.share
        longest = max(map(len, self.rest))
        ids = torch.zeros(len(self.rest), longest, dtype=torch.long)
        for row, text in enumerate(self.rest):
            ids[row, : len(text)] = text  # what follows a text is seen by none of its rows
        real = torch.cat([self.real, torch.ones(len(ids), longest, dtype=torch.bool, device=self.real.device)], 1)
        said = forward(self.reader.model, cache, ids.to(self.reader.device), real).argmax(-1).cpu()
        found = []
        for row, (text, answer) in enumerate(zip(self.rest, self.answers, strict=True)):
            rows = torch.cat([self.first[row : row + 1], said[row, : len(text)]])
            found.append(bool((rows[-len(answer) :] == answer).all()))
        return found, share

    def full_heads(self, policy: BudgetPolicy) -> list[Tensor]:
        """For each layer `[b f]` the key heads that a policy keeps whole."""
        found = self.cache.fork(policy).heterogeneous
        return [torch.zeros(len(self.rest), 0).long() if layer is None else layer.cpu() for layer in found]


def forward(model: Any, cache: Any, ids: Tensor, real: Tensor, keep: int = 0) -> Tensor:
    """Logits of tokens that continue what a cache holds; positions count from the first real token."""
    positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    given = {"input_ids": ids, "attention_mask": real.long(), "position_ids": positions, "logits_to_keep": keep}
    with torch.no_grad():
        return model(**given, **with_cache(model, cache)).logits


def prompts_of(reader: Reader, task: str, way: str) -> Iterator[Prompts]:
    """The questions of a task in batches, read once."""
    questions = reader.questions[task]
    for start in range(0, len(questions), BATCH):
        yield Prompts.of(reader, questions[start : start + BATCH], way)


@dataclass
class Accuracies:
    """right[model, task, way, method, budget]: one entry a question. shares: of bytes, the same keys."""

    right: dict[tuple[str, str, str, str, float], list[bool]] = field(default_factory=dict)
    shares: dict[tuple[str, str, str, str, float], list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, readers: Sequence[Reader], run: Run) -> "Accuracies":
        made = cls()
        for reader in readers:
            for task in reader.questions:
                for way in WAYS:
                    run.log(f"{reader.name}: {task}, asked {way}")
                    for prompts in prompts_of(reader, task, way):
                        made.measure(prompts, (reader.name, task, way), run.seed)
        return made

    def measure(self, prompts: Prompts, place: tuple[str, str, str], seed: int) -> None:
        reader = prompts.reader
        for method in METHODS:
            for budget in (1.0,) if method == FULL else BUDGETS:
                self._add((*place, method, budget), *prompts.right(reader.policy(method, budget, seed)))
        for name, policy in middles(reader, 0.4, seed).items():
            if name == MORE_RECENT or place[2] == WAYS[0]:
                self._add((*place, name, 0.4), *prompts.right(policy))

    def _add(self, key: tuple[str, str, str, str, float], right: list[bool], share: float) -> None:
        self.right.setdefault(key, []).extend(right)
        self.shares.setdefault(key, []).append(share)

    def of_method(self, method: str, budget: float, way: str, task: str | None = None) -> list[float]:
        """Every question's result, in one order for all methods. task: a model's and a task's name, or all."""
        found: list[float] = []
        for (model, name, how, one, share), right in self.right.items():
            if (one, share, how) == (method, budget, way) and task in (None, f"{model}: {name}"):
                found += map(float, right)
        return found

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(f"{model}: {task}" for model, task, *_ in self.right))


NONE, MEAN, MORE_RECENT = "no middle", "mean of the middle", "more recent instead of the middle"


@dataclass(frozen=True)
class RecentInstead(TaskKVPolicy):
    """Task-KV whose light heads keep as many more recent tokens as they would keep middle activations."""

    def keep(self, prompt: LayerPrompt, scores: Tensor, full: Tensor, middle: list[int]) -> Any:
        age = torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype).expand_as(scores)
        return super().keep(prompt, age, full, middle)


def middles(reader: Reader, budget: float, seed: int) -> dict[str, BudgetPolicy]:
    """Task-KV with other things than the tokens that were looked at most between sinks and recent ones."""
    task = reader.policy(TASK, budget, seed)
    if not isinstance(task, TaskKVPolicy):
        raise TypeError("task-kv: the policy of Task-KV is another")
    return {
        NONE: replace(task, middle="none"),
        MEAN: replace(task, middle="mean"),
        MORE_RECENT: RecentInstead(budget=budget, **COMMON),
    }
