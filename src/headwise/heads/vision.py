"""Vision-aware heads: heads whose output changes when the picture is taken away.

    VHD_{l,i} = || A_{l,i}(with the picture) - A_{l,i}(without it) ||_2

A is what head i of layer l puts out at a position, before the output projection. The same for any part of a prompt
that can be taken out: a document, a block of examples.

Paper: headwise/papers/vision_aware_head_reinforcement.py (He et al., ACL 2025).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.head_map import HeadMap
from headwise.attend.read import Probe, Reading
from headwise.hf.addresses import layout
from headwise.hf.images import PICTURES, image_positions, without
from headwise.hf.inputs import as_inputs, frugal
from headwise.hf.layerwise import position_arguments
from headwise.hf.session import probe

__all__ = ["ContextDivergence", "aware_heads", "context_divergence", "token_divergence", "vision_divergence"]

PROBE = "vision-divergence"


@dataclass(frozen=True)
class ContextDivergence:
    """How far every head's output moves when a part of the prompt is taken away.

    divergence: the norm of the difference; 0 or more. present, absent: the norms of the outputs with and without the
    part. All `[b, l, h]`, or `[b, p, l, h]` where several positions were asked for; nan in layers without attention.
    """

    divergence: Float[Tensor, "... l h"]
    present: Float[Tensor, "... l h"]
    absent: Float[Tensor, "... l h"]

    @property
    def relative(self) -> Float[Tensor, "... l h"]:
        """Divergence over the norm with the part: a head of large values is not aware for that; 0 where both are 0."""
        return (self.divergence / self.present).nan_to_num(nan=0.0).where(~self.divergence.isnan(), torch.nan)

    def chosen(self, *, drop_outliers: bool = True) -> Bool[Tensor, "... l h"]:
        """The heads that the paper reinforces; see `aware_heads`."""
        return aware_heads(self.divergence, self.absent.square(), drop_outliers=drop_outliers)

    def map(self, model: nn.Module, *, name: str = PROBE, relative: bool = False) -> HeadMap:
        """The mean over prompts (and positions) as a head map, each prompt a run: `top`, `select`, `save`."""
        found = (self.relative if relative else self.divergence).flatten(0, -3)
        heads = layout(model).heads()
        runs = [{head: float(row[head.layer, head.head]) for head in heads} for row in found]
        return HeadMap({}, layout(model), runs={name: runs})


def aware_heads(
    divergence: Float[Tensor, "... h"], activation: Float[Tensor, "... h"], *, drop_outliers: bool = True
) -> Bool[Tensor, "... h"]:
    """The upper half of the heads of a layer by divergence, leaving out those that surge without the picture.

    activation: the squared norm of each head's output without the picture. drop_outliers: a head counts as 0 where both
    its divergence and its activation exceed the layer's mean by more than one (unbiased) standard deviation. Chosen are
    the heads above the median, which is the lower of the two middle ones where their number is even: half of them if
    none are equal. Heads that are nan are not chosen.
    """
    if drop_outliers and divergence.shape[-1] > 1:
        outliers = _surges(divergence) & _surges(activation)
        divergence = divergence.masked_fill(outliers, 0)
    return divergence > divergence.nan_to_num(nan=0.0).median(-1, keepdim=True).values


def _surges(x: Float[Tensor, "... h"]) -> Bool[Tensor, "... h"]:
    return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)


def token_divergence(divergence: Float[Tensor, "... l h"], k: int = 2) -> Float[Tensor, "..."]:
    """T-VHD: the k largest divergences of each layer, summed over the layers: how much a token owes to the picture.

    Layers without attention (nan) count 0. k is not stated by the paper. Raises ValueError for k outside the heads.
    """
    if not 1 <= k <= divergence.shape[-1]:
        raise ValueError(f"token_divergence: k is {k}; expected 1 to {divergence.shape[-1]}, the heads of a layer")
    return divergence.nan_to_num(nan=0.0).topk(k, -1).values.sum((-1, -2))


def vision_divergence(
    model: nn.Module,
    inputs: Mapping[str, Any],
    position: int | Sequence[int] = -1,
    *,
    counterfactual: str = "drop",
    together: bool = True,
) -> ContextDivergence:
    """VHD of every head of the main tower at a position.

    inputs: what a processor returned, with pictures; padded on the left where rows differ in length. Several pictures
    are taken away together. position: counted from the end, -1 is the last token of the prompt; several give an axis of
    positions, such as those of the words of a caption. counterfactual: "drop" takes the image tokens out, as the paper
    does; "blank" puts the mean colour in their place, whose features shift heads too. together: both runs as one batch.

    Raises ValueError for inputs without a picture and for a prompt that ends inside one.
    """
    if counterfactual not in ("drop", "blank"):
        raise ValueError(f"vision_divergence: counterfactual is {counterfactual!r}; expected drop or blank")
    given = as_inputs(model, inputs)
    images = image_positions(model, given)
    if bool(images[:, -1].any()):
        raise ValueError(
            "vision_divergence: the prompt ends inside the picture; the last token must be one that follows it"
        )
    twin = without(given, images, counterfactual, model=model)
    return context_divergence(model, given, twin, position, together=together)


def context_divergence(
    model: nn.Module,
    with_context: Tensor | Mapping[str, Any],
    without_context: Tensor | Mapping[str, Any],
    position: int | Sequence[int] = -1,
    *,
    together: bool = True,
) -> ContextDivergence:
    """How far every head's output moves between two inputs that end alike; open edits act on both.

    with_context, without_context: inputs of as many rows, the second such as `hf.without` makes it. Rows are padded on
    the left, so that positions counted from the end are those of the same tokens. together: one batch of both, the
    shorter padded on the left; otherwise one forward each, which costs less where much was taken out.
    Raises ValueError for inputs of different batches, for padding on the right and for positions that are not there.
    """
    first, second = as_inputs(model, with_context), as_inputs(model, without_context)
    for name, given in (("with_context", first), ("without_context", second)):
        mask = given.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(f"context_divergence: {name} is padded on the right; pad on the left")
    b, shortest = len(first["input_ids"]), min(given["input_ids"].shape[1] for given in (first, second))
    if len(second["input_ids"]) != b:
        raise ValueError(
            f"context_divergence: {b} rows with the context but {len(second['input_ids'])} without; they must match"
        )
    places = [position] if isinstance(position, int) else list(position)
    for place in places:
        if not -shortest <= place < 0:
            raise ValueError(
                f"context_divergence: position is {place}; count from the end, -1 to {-shortest} are in both inputs"
            )
    reader = _Outputs(places)
    with torch.no_grad(), probe(model, reader):
        if together:
            model(**{**frugal(model), **_joined(model, first, second)})
        else:
            for given in (first, second):
                model(**{**frugal(model), **_placed(model, given)})
    main = layout(model).main
    table = torch.full((3, b, len(places), main.layers, max(main.heads)), torch.nan)
    for (tower, layer), parts in reader.seen.items():
        if tower != main.name:
            continue
        there, gone = torch.cat(parts).float().cpu().chunk(2)
        heads = there.shape[2]
        for row, x in enumerate((there - gone, there, gone)):
            table[row, :, :, layer, :heads] = x.norm(dim=-1)
    if isinstance(position, int):
        table = table[:, :, 0]
    return ContextDivergence(*table)


class _Outputs(Probe):
    """The heads' outputs `[b p h e]` at some positions, for every call of a layer."""

    def __init__(self, positions: Sequence[int]) -> None:
        super().__init__()
        self.positions = list(positions)
        self.seen: dict[tuple[str, int], list[Tensor]] = {}

    def output(self, heads: Tensor, mixed: Tensor, reading: Reading) -> None:
        if heads.shape[1] >= -min(self.positions):
            place = (reading.call.tower, reading.call.layer)
            self.seen.setdefault(place, []).append(heads[:, self.positions])


def _placed(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with the mask and positions that padding on the left asks for."""
    ids = given["input_ids"]
    mask = given.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    positions = {} if "position_ids" in given else position_arguments(model, mask)
    return {**given, "attention_mask": mask, **positions}


def _joined(model: nn.Module, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One batch of both inputs, the shorter rows padded on the left."""
    one, other = _placed(model, first), _placed(model, second)
    shapes = [tuple(x["input_ids"].shape) for x in (one, other)]
    width = max(shape[1] for shape in shapes)
    made: dict[str, Any] = {}
    for name in dict.fromkeys([*one, *other]):
        pair = [one.get(name), other.get(name)]
        if name in PICTURES:
            there = [x for x in pair if x is not None]
            made[name] = torch.cat(there) if len(there) == 2 else there[0]
            continue
        if all(x is None or not isinstance(x, Tensor) for x in pair):
            made[name] = pair[0] if pair[0] is not None else pair[1]
            continue
        like: Any = next(x for x in pair if isinstance(x, Tensor))
        full = [
            like.new_zeros(shape + tuple(like.shape[2:])) if x is None else x
            for x, shape in zip(pair, shapes, strict=True)
        ]
        rows = [torch.cat([x.new_zeros(len(x), width - x.shape[1], *x.shape[2:]), x], 1) for x in full]
        made[name] = torch.cat(rows)
    return made
