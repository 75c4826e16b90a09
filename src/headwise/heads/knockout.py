"""What a set of heads is worth: answers with and without it, beside sets that are as large and mean nothing.

Used by the papers that remove heads; the removal itself is `headwise.attend.Ablate`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.head_map import HeadMap
from headwise.attend.probes import Contribution
from headwise.heads.decoding import Prompt, forced_answers
from headwise.hf.inputs import input_device
from headwise.hf.session import probe
from headwise.tasks.needles import Needle

__all__ = ["answers_right", "control_sets", "live_heads"]


def answers_right(
    model: nn.Module,
    prompts: Sequence[Prompt] | Int[Tensor, "b t"],
    targets: Sequence[Int[Tensor, " _"] | Sequence[int]] | None = None,
    *,
    batch_tokens: int = 16384,
) -> list[list[bool]]:
    """For every prompt, which tokens of its target the model predicts, those before them given; open edits act.

    targets: None means the answers of needles.
    """
    if targets is None:
        targets = [
            needle.answer_ids for needle in prompts if isinstance(needle, Needle) and needle.answer_ids is not None
        ]
    said = forced_answers(model, prompts, targets, batch_tokens=batch_tokens)
    return [
        [one == int(other) for one, other in zip(answer, target, strict=True)]
        for answer, target in zip(said, targets, strict=True)
    ]


def live_heads(model: nn.Module, inputs: Int[Tensor, "b t"], least: float = 1e-6) -> list[Head]:
    """Heads of the main tower that write anything: their part of the attention output is at least `least` of it.

    Heads that were pruned or masked in training make no control: removing them cannot change anything.
    """
    reader = Contribution()
    with torch.no_grad(), probe(model, reader):
        model(input_ids=inputs.to(input_device(model)))
    return [
        Head(layer, head)
        for (tower, layer), shares in sorted(reader.scores().items())
        for head, share in enumerate(shares.tolist())
        if not tower and share >= least
    ]


def control_sets(
    scores: HeadMap,
    heads: Sequence[Head],
    pool: Iterable[Head],
    *,
    by: Literal["layer", "any"] = "layer",
    draws: int = 200,
    seed: int = 0,
) -> list[list[Head]]:
    """`HeadMap.matched_random` from a pool; a layer whose pool is too small gives all that it has.

    by: "layer" takes as many heads of every layer as `heads` has there, "any" as many of the whole tower. No set where
    the pool has nothing to give.
    """
    free = [head for head in pool if head not in set(heads)]
    room = Counter(head.layer if by == "layer" else -1 for head in free)
    kept: list[Head] = []
    for head in heads:
        place = head.layer if by == "layer" else -1
        if room[place] > 0:
            room[place] -= 1
            kept.append(head)
    if not kept:
        return []
    return scores.matched_random(kept, draws=draws, by=by, exclude=heads, idle=free, seed=seed)
