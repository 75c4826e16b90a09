"""Prompts with known answers, and how answers are scored: token by token, by letter, or by the label that a text names.

What cannot be read as an answer counts as wrong. Its share stands beside every accuracy, with the accuracy among the
rest: a change that only makes a model keep to the format would else pass for knowledge.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.tasks.episodes import Episodes

__all__ = ["Answers", "PromptBatch", "few_shot", "read_label"]


@dataclass(frozen=True)
class Answers:
    """What was read from what a model said: the number of a label, or None where there is none; and the truth."""

    read: Sequence[int | None]
    truth: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.read) != len(self.truth) or not len(self.truth):
            raise ValueError(f"Answers: {len(self.read)} answers to {len(self.truth)} questions; give one for each")

    @property
    def accuracy(self) -> float:
        """Share that is right; what cannot be read is wrong."""
        return sum(one == other for one, other in zip(self.read, self.truth, strict=True)) / len(self.truth)

    @property
    def parsable(self) -> float:
        """Share that can be read."""
        return sum(one is not None for one in self.read) / len(self.read)

    @property
    def accuracy_among_parsable(self) -> float:
        """Share that is right of what can be read; nan where nothing can."""
        return self.accuracy / self.parsable if self.parsable else float("nan")


def read_label(text: str, labels: Sequence[str]) -> int | None:
    """The number of the label that a text names first, as a whole word whatever its case; None where it names none.

    >>> read_label(" Positive, clearly.", ["negative", "positive"])
    1
    """
    found = []
    for number, label in enumerate(labels):
        match = re.search(rf"(?<!\w){re.escape(label.strip())}(?!\w)", text, re.IGNORECASE)
        if match:
            # Of two labels at one place the longer is meant: "very good" and not "very".
            found.append((match.start(), -len(label), number))
    return min(found)[2] if found else None


def few_shot(template: str, examples: Sequence[tuple[str, str]], query: str, *, separator: str = "\n\n") -> str:
    """Examples with their answers, then the query with its answer left open, without a space at its end.

    template: text with `{input}` and, at its end, `{answer}`. Raises ValueError for another template.
    """
    if "{input}" not in template or not template.endswith("{answer}"):
        raise ValueError(f"few_shot: template is {template!r}; it must hold {{input}} and end in {{answer}}")

    def fill(text: str, answer: str) -> str:
        return template.removesuffix("{answer}").replace("{input}", text) + answer

    return separator.join([*(fill(*example) for example in examples), fill(query, "").rstrip(" ")])


@dataclass(frozen=True)
class PromptBatch:
    """b prompts that end in their answers, in one batch, padded on the left.

    real: False at padding. asked: True at the tokens of the answers; each is predicted by the row before it. groups:
    name -> True at the tokens of that part of the prompt. labels: the ids that an answer may be, None for any.
    """

    task: str
    input_ids: Int[Tensor, "b t"]
    real: Bool[Tensor, "b t"]
    asked: Bool[Tensor, "b t"]
    groups: Mapping[str, Bool[Tensor, "b t"]] = field(default_factory=dict)
    labels: Int[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        if bool(self.asked[:, 0].any()) or not bool(self.asked.any(1).all()):
            raise ValueError(f"PromptBatch: {self.task}: every prompt needs an answer, with a token before it")

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def of_episodes(cls, episodes: Episodes, labels: Int[Tensor, " n"] | None = None) -> "PromptBatch":
        """The prompts of a generated task; its spans become groups."""
        columns = torch.arange(episodes.length)
        groups = {
            name: (columns >= span[:, :1]) & (columns < span[:, 1:]) for name, span in sorted(episodes.spans.items())
        }
        real = torch.ones_like(episodes.answers)
        return cls(episodes.task, episodes.input_ids, real, episodes.answers, groups, labels)

    @classmethod
    def of_texts(
        cls,
        task: str,
        prompts: Sequence[Int[Tensor, " _"]],
        answers: Sequence[Int[Tensor, " _"]],
        groups: Mapping[str, Sequence[tuple[int, int]]] | None = None,
        *,
        pad: int = 0,
    ) -> "PromptBatch":
        """Prompts of different lengths. groups: name -> a span of each prompt."""
        if len(prompts) != len(answers) or not len(prompts):
            raise ValueError(f"PromptBatch: {len(prompts)} prompts and {len(answers)} answers; give one for each")
        told = [torch.cat([prompt, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, told))
        missing = torch.tensor([width - len(ids) for ids in told])[:, None]
        columns = torch.arange(width)
        sizes = torch.tensor([len(answer) for answer in answers])[:, None]
        masks = {}
        for name, spans in (groups or {}).items():
            where = torch.tensor(list(spans)) + missing
            masks[name] = (columns >= where[:, :1]) & (columns < where[:, 1:])
        ids = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0), value=pad) for ids in told])
        return cls(task, ids, columns >= missing, columns >= width - sizes, masks)

    def part(self, rows: slice) -> "PromptBatch":
        """Some of the prompts."""
        groups = {name: mask[rows] for name, mask in self.groups.items()}
        return replace(
            self, input_ids=self.input_ids[rows], real=self.real[rows], asked=self.asked[rows], groups=groups
        )

    def inputs(self) -> dict[str, Any]:
        """The arguments of one forward that gives the logits of `rows` and no others."""
        given = {"input_ids": self.input_ids, "logits_to_keep": self.rows, "use_cache": False}
        if not bool(self.real.all()):
            given["attention_mask"] = self.real.long()
            given["position_ids"] = (self.real.long().cumsum(-1) - 1).clamp_min(0)
        return given

    @property
    def rows(self) -> int:
        """How many of the last rows hold all predictions of answers."""
        return self.input_ids.shape[1] - int(self.asked.any(0).int().argmax()) + 1

    def losses(self, logits: Float[Tensor, "b r v"]) -> Float[Tensor, " b"]:
        """Mean cross-entropy of each prompt's answer. logits: of the last r rows, all or `rows` of them."""
        asked, targets, logits = self._aligned(logits)
        each = torch.nn.functional.cross_entropy(logits.float().mT, targets, reduction="none")
        return (each * asked).sum(1) / asked.sum(1)

    def right(self, logits: Float[Tensor, "b r v"]) -> Bool[Tensor, " b"]:
        """Whether the whole answer is what the model finds most likely, token after token."""
        asked, targets, logits = self._aligned(logits)
        return ((logits.argmax(-1) == targets) | ~asked).all(1)

    def parsable(self, logits: Float[Tensor, "b r v"]) -> Bool[Tensor, " b"]:
        """Whether the first token of what the model says is a label; always where any answer will do."""
        first = self._first(logits)
        if self.labels is None:
            return torch.ones_like(first[:, 0], dtype=torch.bool)
        return torch.isin(first.argmax(-1), self.labels.to(first.device))

    def choices(self, logits: Float[Tensor, "b r v"]) -> Int[Tensor, " b"]:
        """The most likely label of each prompt, whatever else is likelier (letter scoring)."""
        if self.labels is None:
            raise ValueError(f"PromptBatch.choices: {self.task} has no labels; any token may be an answer")
        labels = self.labels.to(logits.device)
        return labels[self._first(logits)[:, labels].argmax(-1)]

    def entropy(self, logits: Float[Tensor, "b r v"]) -> Float[Tensor, " b"]:
        """Entropy of the distribution of the answer's first token, in nats; needs no answer to be known."""
        return torch.distributions.Categorical(logits=self._first(logits).float()).entropy()

    def other_token(self, generator: torch.Generator) -> Bool[Tensor, "b t"]:
        """One random token of each prompt before its answer: neither its first nor in any of its groups."""
        before = self.real & (self.asked.int().cumsum(1) == 0) & (self.real.int().cumsum(1) > 1)
        free = before.clone()
        for mask in self.groups.values():
            free &= ~mask
        free = torch.where(free.any(1, keepdim=True), free, before)
        drawn = torch.rand(free.shape, generator=generator).masked_fill(~free, -1).argmax(1)
        return torch.nn.functional.one_hot(drawn, free.shape[1]).bool()

    def _aligned(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = logits.shape[1]
        if r < self.rows:
            raise ValueError(f"PromptBatch: logits of {r} rows but the answers are predicted by the last {self.rows}")
        asked = self.asked[:, self.asked.shape[1] - r + 1 :].to(logits.device)
        return asked, self.input_ids[:, self.asked.shape[1] - r + 1 :].to(logits.device), logits[:, :-1]

    def _first(self, logits: Tensor) -> Tensor:
        """The logits of the first token of each answer."""
        asked, _, logits = self._aligned(logits)
        return logits[torch.arange(len(asked), device=asked.device), asked.int().argmax(1)]
