"""What the papers on attention to pictures share: the specimen's answers under edits, picture by picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.attend.edit import Edit
from headwise.hf.session import steer
from headwise.papers.statistics import bootstrap_interval
from headwise.specimens.vision_language import IMAGE, IMAGE_TOKENS, answers, caption_batch, next_shapes
from headwise.tasks.captions import CaptionedShapes

__all__ = ["CHUNK", "Scores", "at_cells", "caption_inputs", "chunks", "polled", "random_cells", "scored", "shown"]

CHUNK = 256  # pictures a forward
Edits = Callable[[CaptionedShapes, int], Sequence[Edit]]  # a part of the pictures and where it starts -> edits for it


@dataclass(frozen=True)
class Scores:
    """Of each picture, the caption so far being given: the share of the second to fourth shape that is said right, of
    those answered by the typical successor of the shape before, and whether the first shape is right."""

    accuracy: Float[Tensor, " n"]
    typical: Float[Tensor, " n"]
    first: Float[Tensor, " n"]


def chunks(scenes: CaptionedShapes) -> list[tuple[int, CaptionedShapes]]:
    """Parts of the pictures, with where they start."""
    return [(start, scenes[start : start + CHUNK]) for start in range(0, len(scenes), CHUNK)]


def scored(model: Any, scenes: CaptionedShapes, edits: Edits | None = None) -> Scores:
    """The specimen's answers under edits."""
    parts = []
    for start, part in chunks(scenes):
        with steer(model, *(edits(part, start) if edits is not None else ())):
            parts.append(next_shapes(model, part, size=CHUNK))
    said = torch.cat(parts)
    later = said[:, 1:]
    return Scores(
        accuracy=(later == scenes.shapes[:, 1:]).float().mean(1),
        typical=(later == scenes.typical[:, :-1]).float().mean(1),
        first=(said[:, 0] == scenes.shapes[:, 0]).float(),
    )


def polled(model: Any, scenes: CaptionedShapes, seed: int, edits: Edits | None = None) -> Float[Tensor, " n"]:
    """Of each picture, the share of two questions answered right: a shape that is there, the likeliest that is not."""
    right = []
    for start, part in chunks(scenes):
        generator = torch.Generator().manual_seed(seed + start)
        asked = [part.questions(kind, generator) for kind in (None, "adversarial")]
        with steer(model, *(edits(part, start) if edits is not None else ())):
            said = [answers(model, part, one.texts(), size=CHUNK) for one in asked]
        truth = [["yes" if yes else "no" for yes in one.answer.tolist()] for one in asked]
        pairs = [[word == right_ for word, right_ in zip(*both, strict=True)] for both in zip(said, truth, strict=True)]
        right.append(torch.tensor(pairs).float().mean(0))
    return torch.cat(right)


def caption_inputs(scenes: CaptionedShapes) -> dict[str, Tensor]:
    """Whole captions with their pictures."""
    batch = caption_batch(scenes, True)
    assert batch.pixels is not None
    return {"input_ids": batch.ids, "pixel_values": batch.pixels}


def at_cells(cells: Bool[Tensor, "n 16"], ids: Tensor) -> Bool[Tensor, "n s"]:
    """A mask over the cells of a picture as a mask over the positions of its prompt."""
    found = torch.zeros(ids.shape, dtype=torch.bool)
    found[ids == IMAGE] = cells.flatten()
    return found


def random_cells(counts: Tensor, seed: int, among: Bool[Tensor, "n 16"] | None = None) -> Bool[Tensor, "n 16"]:
    """For each picture so many random cells."""
    order = torch.rand(len(counts), IMAGE_TOKENS, generator=torch.Generator().manual_seed(seed))
    order = order if among is None else order.masked_fill(~among, 2.0)
    return order.argsort(1).argsort(1) < counts[:, None]


def shown(difference: Tensor, seed: int, unit: float = 100) -> tuple[str, float, tuple[float, float]]:
    """A mean difference over pictures with its 95 % interval, in words (points) and numbers."""
    low, high = bootstrap_interval(difference.tolist(), seed=seed)
    mean = float(difference.mean())
    return f"{unit * mean:+.1f} ({unit * low:+.1f} to {unit * high:+.1f})", mean, (low, high)
