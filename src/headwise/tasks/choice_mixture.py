"""The mixture that the `choices` specimen learns: multiple choice in three formats beside what its circuit is made of."""

from collections.abc import Mapping

import torch
from torch import Tensor

from headwise.tasks.episodes import Episodes
from headwise.tasks.mixture import MixedBatch, Mixture
from headwise.tasks.multiple_choice import multiple_choice_episodes

__all__ = ["ChoiceMixture"]

FORMATS = {
    "random": ("text-first", "random"),
    "standard": ("text-first", "fixed"),
    "label_first": ("label-first", "random"),
}  # fmt: skip


class ChoiceMixture(Mixture):
    """Episodes by name: bigrams, repeats and needles as in `Mixture`, and multiple choice in three formats.

    `random`: every option's text stands before its label, labels are drawn for each episode. `standard`: the same with
    A, B, C, D in order. `label_first`: random labels, each before its text. options: how many (one number, or drawn
    from several for each call).
    """

    names = ("bigrams", "repeats", "needles", *FORMATS)  # pyright: ignore[reportAssignmentType]

    def episodes(
        self,
        task: str,
        batch: int,
        length: int,
        generator: torch.Generator | None = None,
        *,
        sums: int = 1,
        options: tuple[int, ...] = (4,),
        several: bool = False,
    ) -> Episodes:
        """Sequences of one task. Raises ValueError for an unknown task or a length that holds no episode."""
        if task not in self.names:
            raise ValueError(f"ChoiceMixture: task is {task!r}; expected one of {', '.join(self.names)}")
        if task not in FORMATS:
            return super().episodes(task, batch, length, generator)
        order, labels = FORMATS[task]
        count = options[int(torch.randint(0, len(options), (), generator=generator))]
        return multiple_choice_episodes(
            batch,
            self.symbols,
            options=count,
            order=order,
            labels=labels,
            question="last",
            asks=count - 1 if several else 1,
            length=length,
            text=self.text,
            generator=generator,
        )

    def batch(
        self,
        counts: Mapping[str, int],
        length: int,
        generator: torch.Generator | None = None,
        *,
        sum_every: int = 12,
        options: tuple[int, ...] = (4,),
        several: bool = False,
    ) -> MixedBatch:
        """`counts[name]` sequences of each task, with `options` in those of multiple choice."""
        named = {name: n for name, n in counts.items() if n > 0}
        parts = [self.episodes(name, n, length, generator, options=options, several=several) for name, n in named.items()]
        task = [torch.full((n,), self.names.index(name)) for name, n in named.items()]
        return MixedBatch(self.names, _joined(parts, "input_ids"), _joined(parts, "answers"), torch.cat(task))


def _joined(parts: list[Episodes], name: str) -> Tensor:
    return torch.cat([getattr(part, name) for part in parts])
