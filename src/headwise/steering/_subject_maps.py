"""Where subjects are, from a network's own attention: self-attention, to several steps, times cross-attention.

    (A + A^2 + A^3 + A^4) / 4 C,  A: self-attention of a layer, C: its block's cross-attention, both averaged over heads

A subject's map is the column of its words in the prompt, the largest where there are several; maps of the layers of one
step are averaged and decide the masks of the next step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.attention.softmax import split_heads

__all__: list[str] = []

POWERS = 4
MOST_TOKENS = 1024  # of a layer whose maps are formed: A has as many rows and columns


def spread_map(
    self_attention: Float[Tensor, "b n n"], cross_attention: Float[Tensor, "b n m"]
) -> Float[Tensor, "b n m"]:
    """The mean of the first four powers of self-attention, times cross-attention; rows that sum to 1 still do."""
    reached, total = cross_attention, torch.zeros_like(cross_attention)
    for _ in range(POWERS):
        reached = self_attention @ reached
        total = total + reached
    return total / POWERS


def masks_of_maps(maps: Float[Tensor, "s h w"], background: Float[Tensor, "h w"] | None) -> Bool[Tensor, "s h w"]:
    """Disjoint masks: each place belongs to the subject whose map is largest there, in units of that map's mean.

    Maps are first shifted and scaled to 0..1. background: the map that has to be exceeded, in units of its mean too;
    None means the mean itself.
    """
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    scaled = (maps - low) / (high - low).clamp_min(1e-12)
    scaled = scaled / scaled.mean((-2, -1), keepdim=True).clamp_min(1e-12)
    limit = torch.ones_like(maps[0]) if background is None else background / background.mean().clamp_min(1e-12)
    best, which = scaled.max(0)
    subject = torch.arange(len(maps), device=maps.device)[:, None, None]
    return (which == subject) & (best > limit)


class AttentionMaps:
    """Gathers maps while the network runs; `turn` ends a step. Of guidance only the conditional half is read.

    tokens: places of each subject's words in the target's prompt. reference_tokens: in its own reference's. background:
    place of a token that stands for everything else, such as the start of the text; None where there is none.
    """

    def __init__(
        self, tokens: list[list[int]], reference_tokens: list[list[int]] | None, background: int | None = None
    ) -> None:
        self.tokens, self.reference_tokens, self.background = tokens, reference_tokens, background
        self.forget()

    def forget(self) -> None:
        self._self: dict[int, Tensor] = {}  # tokens of a layer -> its last self-attention
        self._now: list[Tensor] = []  # [pictures, n, words] of this step
        self._last: list[Tensor] = []

    def turn(self) -> None:
        self._last, self._now = self._now, []

    def note_self(self, name: str, attn: Any, states: Tensor, grouped: Callable[[Tensor], Tensor]) -> None:
        if states.shape[1] <= MOST_TOKENS:
            pictures = grouped(states)[-1]
            self._self[states.shape[1]] = _weights(attn, pictures, pictures)

    def note_cross(
        self, name: str, attn: Any, states: Tensor, text: Tensor, grouped: Callable[[Tensor], Tensor]
    ) -> None:
        known = self._self.get(states.shape[1])
        if known is not None:
            self._now.append(spread_map(known, _weights(attn, grouped(states)[-1], grouped(text)[-1])))

    def _at(self, size: tuple[int, int], form: float) -> Tensor | None:
        """`[pictures, words, rows, columns]`: the mean over the layers of the last step."""
        if not self._last:
            return None
        made = []
        for one in self._last:
            rows = round((one.shape[1] / form) ** 0.5)
            grid = one.mT.unflatten(-1, (rows, one.shape[1] // rows))
            made.append(F.interpolate(grid, size, mode="bilinear", align_corners=False))
        return torch.stack(made).mean(0)

    def target(self, size: tuple[int, int]) -> Tensor | None:
        """`[1, s, n]` masks of the subjects in the target; None before the first step has ended."""
        maps = self._at(size, size[1] / size[0])
        if maps is None:
            return None
        words = torch.stack([maps[-1, list(places)].amax(0) for places in self.tokens])
        ground = None if self.background is None else maps[-1, self.background]
        return masks_of_maps(words, ground).flatten(1)[None]

    def references(self, size: tuple[int, int]) -> Tensor | None:
        """`[1, s, n]` masks of each subject in its reference."""
        maps = self._at(size, size[1] / size[0])
        if maps is None or self.reference_tokens is None:
            return None
        found = []
        for i, places in enumerate(self.reference_tokens):
            ground = None if self.background is None else maps[i, self.background]
            found.append(masks_of_maps(maps[i, list(places)].amax(0)[None], ground)[0])
        return torch.stack(found).flatten(1)[None]


def _weights(attn: Any, states: Tensor, context: Tensor) -> Tensor:
    """Attention averaged over heads, `[b n m]`, as diffusers' plain processors form it."""
    if attn.group_norm is not None:
        states = attn.group_norm(states.mT).mT
    q, k = split_heads(attn.to_q(states), attn.heads), split_heads(attn.to_k(context), attn.heads)
    q, k = (x if norm is None else norm(x) for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))
    return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)
