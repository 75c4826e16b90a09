"""Choosing the heads of an edit by trying them, with the null that such a search needs.

A search over hundreds of heads always finds some that help on the prompts it looked at. So a search reports three
things beside its choice: the gain on prompts that it did not see, the gain of random sets of as many heads from the
same layers, and the gain of editing all heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head, select_heads
from headwise.attend.edit import Edit
from headwise.attend.head_map import HeadMap
from headwise.hf.addresses import layout
from headwise.hf.session import steer

__all__ = ["HeadSearch", "search_heads"]

Score = Callable[[], Tensor]


@dataclass
class HeadSearch:
    """What a search found, and what it is worth.

    heads: the heads kept. map: gain of every head alone on the calibration prompts. strength: the best of `strengths`,
    None without any. The gains are means over prompts, larger is better, 0 is the plain model.
    held_out: `[prompts]` gain of the choice on unseen prompts. random: `[draws]` mean held-out gain of random sets of
    equal size from the same layers. all_heads: mean held-out gain of editing every candidate.
    """

    heads: list[Head]
    map: HeadMap
    strength: float | None
    calibration_gain: float
    held_out: Tensor
    random: Tensor
    all_heads: float
    curve: dict[float, float] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """Mean gain on unseen prompts."""
        return float(self.held_out.mean()) if len(self.held_out) else 0.0

    @property
    def error(self) -> float:
        """Standard error of `gain` over prompts."""
        return float(self.held_out.std() / len(self.held_out) ** 0.5) if len(self.held_out) > 1 else float("nan")

    @property
    def p_value(self) -> float:
        """Share of random sets of equal size that do as well on unseen prompts."""
        return float((1 + (self.random >= self.gain).sum()) / (1 + len(self.random)))

    def __str__(self) -> str:
        if not self.heads:
            return "no head helps by itself on the calibration prompts: the edit gains nothing here"
        verdict = "beats" if self.gain > 2 * self.error and self.p_value < 0.05 else "does not beat"
        return (
            f"{len(self.heads)} heads, gain {self.gain:+.4f} (standard error {self.error:.4f}) on unseen prompts; "
            f"random sets {float(self.random.mean()):+.4f}, all heads {self.all_heads:+.4f}: it {verdict} chance"
        )


def search_heads(
    model: nn.Module,
    edit: Callable[..., Edit],
    score: Score,
    held_out: Score,
    *,
    candidates: str | Sequence[Head] | None = None,
    strengths: Sequence[float] = (),
    draws: int = 20,
    seed: int = 0,
) -> HeadSearch:
    """Try an edit on every head alone, keep the heads that raise the score, and measure the set on unseen prompts.

    edit: `edit(heads)` makes the edit on some heads, `edit(heads, strength)` with one of `strengths`, which are tried
    on the kept set. score, held_out: run the model and return one number a prompt, larger is better; they must not
    share prompts. candidates: a selection, None means every head of the main tower. draws: random sets for the null.
    """
    places = layout(model)
    heads = select_heads(candidates, places)

    def gain(measure: Score, baseline: Tensor, chosen: list[Head], *strength: float) -> Tensor:
        with steer(model, edit(chosen, *strength)):
            return _scores(measure) - baseline

    plain = _scores(score)
    alone: dict[Head, float | None] = {head: float(gain(score, plain, [head]).mean()) for head in heads}
    found = HeadMap({"gain": alone}, places, source="search_heads")
    kept = [head for head in heads if (alone[head] or 0.0) > 0]
    if not kept:
        nothing = torch.zeros(0)
        return HeadSearch([], found, None, 0.0, nothing, nothing, 0.0)
    curve = {strength: float(gain(score, plain, kept, strength).mean()) for strength in strengths}
    best = (max(curve, key=lambda strength: curve[strength]),) if curve else ()
    calibration = curve[best[0]] if best else float(gain(score, plain, kept).mean())
    unseen = _scores(held_out)
    barred = [head for head in places.heads("*") if head not in heads]
    others = found.matched_random(kept, draws=draws, exclude=barred, overlap=True, seed=seed)
    return HeadSearch(
        heads=kept,
        map=found,
        strength=best[0] if best else None,
        calibration_gain=calibration,
        held_out=gain(held_out, unseen, kept, *best),
        random=torch.tensor([float(gain(held_out, unseen, other, *best).mean()) for other in others]),
        all_heads=float(gain(held_out, unseen, heads, *best).mean()),
        curve=curve,
    )


def _scores(measure: Score) -> Tensor:
    with torch.no_grad():
        scores = measure()
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"search_heads: a score returned {tuple(scores.shape)}; it must return one number a prompt")
    return scores.float().cpu()
