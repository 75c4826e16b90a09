"""What retrieval_heads.py measures on: the shipped models with needles that they can read, and what is left of their
answers without some heads.

Answer tokens count where they must be retrieved: where the model is wrong once the answer is cut out of the prompt.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate
from headwise.attend.head_map import HeadMap
from headwise.heads.decoding import greedy_answers
from headwise.heads.knockout import answers_right, control_sets, live_heads
from headwise.heads.retrieval import copy_scores, retrieval_scores
from headwise.hf.session import steer
from headwise.papers.running import Run
from headwise.papers.statistics import mean
from headwise.specimens import tasks as tasks_specimen
from headwise.specimens._stories import CITIES, NAMES, SURNAMES, fact, story
from headwise.specimens.registry import load_specimen
from headwise.tasks.mixture import Mixture
from headwise.tasks.needles import Needle, needle
from headwise.training import OptimiserSpec, fit, trapezoid

RETRIEVAL, STRONG, RETRIEVES = 0.1, 0.5, 0.9  # scores of a retrieval head and of a strong one; share right of answers
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
EXTENSION_STEPS = 200
KNOWN = {"addition": 0.8}  # least accuracy at which a task counts as learned; 0.5 for the others


@dataclass
class Reader:
    """A shipped model, needles that it can read, and the retrieval scores of its heads on the first lot of them.

    longest: its longest trained context. scored: the prompts of the scores. held: others, on which heads are removed.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    make: Callable[[Sequence[int], int, int], list[Needle]]
    longest: int
    scored: list[Needle]
    held: "Asked"
    scores: HeadMap
    live: list[Head]
    right_at_longest: float

    @classmethod
    def load(cls, name: str, run: Run) -> "Reader":
        specimen = load_specimen(name)
        run.log(f"scoring the heads of {name}")
        model = specimen.model.to(run.device)
        longest = max(int(length) for phase in specimen.card["recipe"]["phases"] for length in phase["lengths"])

        def make(lengths: Sequence[int], repeats: int, seed: int) -> list[Needle]:
            options: dict[str, Any] = {"lengths": lengths, "depths": DEPTHS, "repeats": repeats, "seed": seed}
            if name == "tasks":
                return needle("symbols", **options)
            rng = Random(seed)
            told = [fact(rng) for _ in range(len(lengths) * len(DEPTHS) * repeats)]
            facts = [(one.sentence, one.question, one.answer) for one in told]
            return needle("sentence", tokenizer=specimen.tokenizer, facts=facts, **options)

        lengths = (longest // 4, longest // 2, longest - 24)  # answers follow
        scored, held = make(lengths, 5, 1000 + run.seed), make(lengths[:2], 2, 2000 + run.seed)
        scores = retrieval_scores(model, scored, max_new_tokens=max(len(answer_of(one)) for one in scored))
        shortest = min(len(ids_of(one)) for one in scored)
        live = live_heads(model, torch.stack([ids_of(one)[:shortest] for one in scored]))
        far = Asked.of(model, make(lengths[2:], 3, 3000 + run.seed))
        held = Asked.of(model, held)
        return cls(name, model, specimen.tokenizer, make, longest, scored, held, scores, live, mean(far.right(model)))

    def heads(self, least: float) -> list[Head]:
        return self.scores.select(threshold=least)

    @property
    def others(self) -> list[Head]:
        """Live heads that are no retrieval heads: what controls are drawn from."""
        found = set(self.heads(RETRIEVAL))
        return [head for head in self.live if head not in found]

    def controls(self, heads: list[Head], by: Literal["layer", "any"], run: Run) -> list[list[Head]]:
        drawn = control_sets(self.scores, heads, self.others, by=by, seed=run.seed)
        return drawn or control_sets(self.scores, heads, self.others, by="any", seed=run.seed)

    def without(self, heads: Sequence[Head], mode: Literal["zero", "uniform"] = "zero") -> AbstractContextManager[Any]:
        return steer(self.model, *([Ablate(heads=list(heads), mode=mode)] if heads else []))


@dataclass
class Asked:
    """Needles, and for each token of their answers whether it must be retrieved: whether the model cannot guess it."""

    prompts: list[Needle]
    unguessed: list[list[bool]]

    @classmethod
    def of(cls, model: nn.Module, prompts: list[Needle]) -> "Asked":
        blank = [torch.cat([ids_of(one)[: one.span[0]], ids_of(one)[one.span[1] :]]) for one in prompts]
        guessed = answers_right(model, blank, [answer_of(one) for one in prompts])
        return cls(prompts, [[not right for right in answer] for answer in guessed])

    def right(self, model: nn.Module, *, guessed: bool = False) -> list[float]:
        """For each prompt, the share right of the answer tokens that must be retrieved (or: that can be guessed)."""
        found = []
        for answer, needed in zip(answers_right(model, self.prompts), self.unguessed, strict=True):
            chosen = [right for right, must in zip(answer, needed, strict=True) if must != guessed]
            if chosen:
                found.append(mean(chosen))
        return found


def ids_of(prompt: Needle) -> Tensor:
    if prompt.input_ids is None:
        raise ValueError("retrieval-heads: a needle was made without token ids")
    return prompt.input_ids


def answer_of(prompt: Needle) -> Tensor:
    start, end = prompt.span
    return ids_of(prompt)[start:end]


@dataclass
class Removals:
    """Share right of the answer tokens that must be retrieved, on held-out needles without some heads.

    strong: those of 0.5 or more; every: those of 0.1 or more; the lists have one entry per control set. few: intact, on
    the prompts of `anywhere`. invented: of the wrong tokens that are said without `every`, the share of those that are
    not in the needle.
    """

    intact: float
    strong: float
    strong_others: list[float]
    every: float
    every_uniform: float
    every_others: list[float]
    few: float
    anywhere: list[float]
    invented: float

    @classmethod
    def of(cls, reader: Reader, run: Run) -> "Removals":
        held = reader.held
        few = Asked(held.prompts[: len(held.prompts) // 2], held.unguessed[: len(held.prompts) // 2])
        strong, every = reader.heads(STRONG), reader.heads(RETRIEVAL)

        def right(asked: Asked, heads: Sequence[Head] = (), mode: Literal["zero", "uniform"] = "zero") -> float:
            with reader.without(heads, mode):
                return mean(asked.right(reader.model))

        def controls(heads: list[Head], by: Literal["layer", "any"], asked: Asked) -> list[float]:
            sets = run.progress(reader.controls(heads, by, run), f"removing other heads of {reader.name}")
            return [right(asked, chosen) for chosen in sets]

        run.log(f"removing heads of {reader.name}")
        return cls(
            intact=right(held),
            strong=right(held, strong),
            strong_others=controls(strong, "layer", held),
            every=right(held, every),
            every_uniform=right(held, every, "uniform"),
            every_others=controls(every, "layer", held),
            few=right(few),
            anywhere=controls(every, "any", few),
            invented=_invented(reader, every),
        )


def _invented(reader: Reader, heads: list[Head]) -> float:
    prompts = reader.held.prompts
    with reader.without(heads):
        said = greedy_answers(
            reader.model, prompts, max_new_tokens=max(len(answer_of(one)) for one in prompts), stop=[]
        )
    wrong = invented = 0
    for prompt, answer in zip(prompts, said, strict=True):
        told = answer_of(prompt).tolist()
        for one, right in zip(answer, told, strict=False):
            wrong += one != right
            invented += one != right and one not in told
    return invented / max(1, wrong)


@dataclass
class Extension:
    """A model before and after more training on contexts twice as long, no head masked."""

    right_before: float
    right: float
    scores: HeadMap

    @classmethod
    def of(cls, reader: Reader, run: Run) -> "Extension":
        length = 2 * reader.longest
        run.log(f"training {reader.name} on contexts of {length} tokens")
        model: Any = copy.deepcopy(reader.model).cpu()
        model.config.max_position_embeddings = length
        drawn = {"bigrams": 1, "repeats": 1, "needles": 2}
        phase = tasks_specimen.Phase(EXTENSION_STEPS, 4 * length, drawn, {length: 1}, masked=0.0)
        asked = Asked.of(model, reader.make((length - 24,), 4, 4000 + run.seed))
        before = mean(asked.right(model))
        fit(
            model,
            tasks_specimen.batches(Mixture(), [phase]),
            tasks_specimen.loss,
            steps=EXTENSION_STEPS,
            seed=run.seed,
            optimiser=OptimiserSpec(lr=2e-3),
            schedule=trapezoid(warmup=10, decay=0.5),
            masks=tasks_specimen.dead_masks(),
        )
        return cls(before, mean(asked.right(model)), copy_scores(model, asked.prompts, min_recall=None))


def two_steps(rng: Random) -> tuple[str, str, str]:
    """A text with two facts, the name that the question starts from, and the answer."""
    asked, neighbour = rng.sample(NAMES, 2)
    number = "".join(rng.choice("0123456789") for _ in range(4))
    person = f"{neighbour} {rng.choice(SURNAMES)} from {rng.choice(CITIES)}"
    told = [f"The neighbour of {asked} is {person}.", f"The room number of {neighbour} is {number}."]
    rng.shuffle(told)
    lines = [line.strip(" .") + "." for line in story(rng, 10).replace("\n", " ").split(". ")][:10]
    for one in told:
        lines.insert(rng.randrange(len(lines)), one)
    return " ".join(lines), asked, number


def answered(reader: Reader, questions: list[tuple[str, str, str]], heads: Sequence[Head] = ()) -> float:
    """Share of right numbers. The start of each sentence is given; what fills it is the model's, also in the key."""
    stop = reader.tokenizer.convert_tokens_to_ids(".")

    def goes_on(texts: list[str], most: int) -> list[str]:
        ids = [reader.tokenizer(text)["input_ids"] for text in texts]
        said = greedy_answers(reader.model, ids, max_new_tokens=most, stop=stop)
        return [reader.tokenizer.decode(one) for one in said]

    asked = [
        f"{text}\nQuestion: What is the room number of the neighbour of {name}?\nAnswer: The neighbour of {name} is"
        for text, name, _ in questions
    ]
    with reader.without(heads):
        first = goes_on(asked, 12)
        named = [(words.split() or ["nobody"])[0] for words in first]
        both = [
            f"{text}{words} The room number of {name} is" for text, words, name in zip(asked, first, named, strict=True)
        ]
        second = goes_on(both, 5)
    return mean([words.strip(" .") == number for words, (_, _, number) in zip(second, questions, strict=True)])


def tasks_of(reader: Reader, run: Run) -> dict[str, Callable[[], Tensor]]:
    """Task -> accuracy of each of its prompts, on what must be retrieved ("needles") and on what need not."""
    length = reader.longest // 2
    asked = Asked.of(reader.model, reader.make((length,), 8, 5000 + run.seed))
    if reader.name != "tasks":
        both = [len(set(needed)) == 2 for needed in asked.unguessed]
        chosen = Asked(
            [one for one, has in zip(asked.prompts, both, strict=True) if has],
            [one for one, has in zip(asked.unguessed, both, strict=True) if has],
        )
        return {
            "needles": lambda: torch.tensor(chosen.right(reader.model)),
            "words of the same answers that it can guess": lambda: torch.tensor(
                chosen.right(reader.model, guessed=True)
            ),
        }
    mixture, generator = Mixture(), torch.Generator().manual_seed(6000 + run.seed)
    text = mixture.text.sample(len(asked.prompts), generator, length=length)
    truth = mixture.text.oracle_logprobs(text).argmax(-1)[:, :-1]
    plain = ~mixture.text.trigger_mask(text)[:, :-1]  # what follows a trigger is copied from the context
    sums = mixture.episodes("addition", len(asked.prompts), length, generator, sums=8)

    @torch.no_grad()
    def accuracy(ids: Tensor, answer: Tensor, rows: Tensor) -> Tensor:
        said = reader.model(input_ids=ids.to(run.device)).logits[:, :-1].argmax(-1).cpu()
        return ((said == answer) & rows).sum(1) / rows.sum(1)

    return {
        "needles": lambda: torch.tensor(asked.right(reader.model)),
        "next words": lambda: accuracy(text, truth, plain),
        "addition": lambda: accuracy(sums.input_ids, sums.input_ids[:, 1:], sums.answers[:, 1:]),
    }
