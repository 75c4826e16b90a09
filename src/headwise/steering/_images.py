"""What edits of attention to pictures share: layers, rows after the picture, and what was found in a prompt."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout, pick_layers, select_heads
from headwise.attend.groups import KeyGroup, image_tokens
from headwise.attend.step import Step
from headwise.hf.images import image_token

__all__ = ["Layers", "carry", "check_layers", "heads_in_layers", "needs_image_token", "rows_after"]

Layers = slice | Sequence[int]


def heads_in_layers(
    where: str,
    selection: str | Iterable[Head | str] | None,
    layers: Layers,
    layout: Layout,
    scores: Callable[[str], Mapping[Head, float | None]] | None = None,
) -> list[Head]:
    """The heads of a selection that lie in these layers of the main tower. Raises ValueError for other towers."""
    inside = set(pick_layers(layers, layout.main.layers, where))
    found = select_heads(selection, layout, scores=scores)
    for head in found:
        if head.tower != layout.main.name:
            raise ValueError(f"{where}: heads names {head}; only heads of the text decoder attend to image tokens")
    return [head for head in found if head.layer in inside]


def check_layers(where: str, layers: object) -> None:
    """Raise TypeError for what is neither a slice nor layer numbers."""
    if not isinstance(layers, slice) and (isinstance(layers, str) or not isinstance(layers, Iterable)):
        raise TypeError(f"{where}: layers is {layers!r}; give a slice such as slice(2, -1), or layer numbers")


def needs_image_token(model: nn.Module, group: KeyGroup) -> None:
    """Raise UnsupportedModel where a group of image tokens is asked of a model that has none."""
    if group == image_tokens():
        image_token(model)


def rows_after(members: Bool[Tensor, "b s"], real: Bool[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
    """Tokens that are no members and come after one."""
    return (members.cumsum(-1) > 0) & ~members & real


def carry(step: Step, key: Hashable, found: Bool[Tensor, "b t"] | None) -> Bool[Tensor, "b s"]:
    """What was found at the tokens of this forward, behind what is known of the tokens before; None: nothing.

    Kept in the step for the forwards to come. Calling it twice in one forward changes nothing.
    """
    before = step.carried.get(key)
    b = step.real.shape[0]
    parts = []
    if step.past:
        if before is None or before.shape[0] != b:
            parts.append(torch.zeros_like(step.real[:, : step.past]))
        else:  # what was not asked for, as while tokens were generated, holds nothing
            missing = max(0, step.past - before.shape[1])
            parts.append(torch.nn.functional.pad(before[:, : step.past], (0, missing)))
    if found is None:
        found = torch.zeros_like(step.real[:, step.past :])
    parts.append(found.to(step.real.device))
    members = torch.cat(parts, 1) & step.real
    step.carried[key] = members
    return members
