"""The mixture of synthetic tasks over one vocabulary of 128 symbols that the `tasks` specimen learns."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.tasks.addition import addition_episodes
from headwise.tasks.bigram_backcopy import BigramBackcopy
from headwise.tasks.coloured_objects import coloured_object_episodes
from headwise.tasks.episodes import Episodes
from headwise.tasks.indirect_objects import indirect_object_episodes
from headwise.tasks.multiple_choice import multiple_choice_episodes
from headwise.tasks.repeats import repeated_segments
from headwise.tasks.symbol_needles import needle_episodes
from headwise.tasks.symbols import Symbols

__all__ = ["MixedBatch", "Mixture"]


@dataclass(frozen=True)
class MixedBatch:
    """Sequences of several tasks and one length. task: index into `names` for each sequence."""

    names: tuple[str, ...]
    input_ids: Int[Tensor, "b t"]
    answers: Bool[Tensor, "b t"]
    task: Int[Tensor, " b"]

    def losses(self, logits: Float[Tensor, "b t v"]) -> dict[str, Tensor]:
        """Mean cross-entropy of the answers of each task, and of all other tokens together (`text`).

        Repeats have no text: what stands before their first repetition is random.
        """
        target = self.input_ids[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].mT, target, reduction="none")
        asked = self.answers[:, 1:]
        parts = {}
        for index, name in enumerate(self.names):
            chosen = asked & (self.task == index)[:, None]
            if bool(chosen.any()):
                parts[name] = loss[chosen].mean()
        told = ~asked & (self.task != self.names.index("repeats"))[:, None]
        return {**parts, "text": loss[told].mean()} if bool(told.any()) else parts


class Mixture:
    """Episodes of seven tasks by name, all over `Symbols`, in a bigram text whose table comes from `seed`.

    A tenth of all transitions lead to a back-copy trigger. Names: bigrams, repeats, needles, indirect_objects,
    coloured_objects (the colour follows the asked thing), addition (without carry), multiple_choice.
    """

    names = (
        "bigrams", "repeats", "needles", "indirect_objects", "coloured_objects", "addition", "multiple_choice",
    )  # fmt: skip

    def __init__(self, seed: int = 0, trigger_share: float = 0.1) -> None:
        self.symbols = Symbols()
        base = BigramBackcopy(len(self.symbols.words), seed=seed).transition[1:, 1:]
        triggers = self.symbols.triggers - 1
        table = (1 - trigger_share) * base
        table[:, triggers] += trigger_share / len(triggers)
        self.text = BigramBackcopy(triggers=self.symbols.triggers.tolist(), transition=table)

    def episodes(
        self, task: str, batch: int, length: int, generator: torch.Generator | None = None, *, sums: int = 1
    ) -> Episodes:
        """Sequences of one task. Raises ValueError for an unknown task or a length that holds no episode."""
        symbols, given = self.symbols, {"length": length, "generator": generator}
        if task == "bigrams":
            ids = self.text.sample(batch, generator, length=length)
            copies = self.text.trigger_mask(ids)
            answers = torch.cat([torch.zeros_like(copies[:, :1]), copies[:, :-1]], dim=1)
            return Episodes("bigrams", ids, answers)
        if task == "repeats":
            return repeated_segments(batch, symbols.plain_words, **given)
        if task == "needles":
            ask, answer = symbols.ids("Q ANS").tolist()
            return needle_episodes(batch, symbols.plain_words, self.text, ask=ask, answer=answer, **given)
        if task == "indirect_objects":
            return indirect_object_episodes(batch, symbols, text=self.text, **given)
        if task == "coloured_objects":
            return coloured_object_episodes(batch, symbols, closing=False, text=self.text, **given)
        if task == "addition":
            return addition_episodes(batch, symbols, sums=sums, text=self.text, **given)
        if task == "multiple_choice":
            return multiple_choice_episodes(batch, symbols, text=self.text, **given)
        raise ValueError(f"Mixture: task is {task!r}; expected one of {', '.join(self.names)}")

    def batch(
        self,
        counts: Mapping[str, int],
        length: int,
        generator: torch.Generator | None = None,
        *,
        sum_every: int = 12,
    ) -> MixedBatch:
        """`counts[name]` sequences of each task. Addition has a sum for every `sum_every` tokens (a sum takes six)."""
        sums = max(1, min(length // sum_every, (length - 1) // 6))
        parts = [self.episodes(name, n, length, generator, sums=sums) for name, n in counts.items() if n > 0]
        kinds = [self.names.index(name) for name, n in counts.items() if n > 0]
        return MixedBatch(
            self.names,
            torch.cat([part.input_ids for part in parts]),
            torch.cat([part.answers for part in parts]),
            torch.cat([torch.full((len(part),), kind) for part, kind in zip(parts, kinds, strict=True)]),
        )
