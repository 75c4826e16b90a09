"""Choosing the heads of an edit by trying them, with the null that such a search needs.

A search over hundreds of heads always finds some that help on the prompts it looked at. So a search reports three
things beside its choice: the gain on prompts that it did not see, the gain of random sets of as many heads from the
same layers, and the gain of editing all heads, each at the strength that suits it best on the prompts of the search.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout, select_heads
from headwise.attend.edit import Edit, Heads
from headwise.attend.head_map import HeadMap
from headwise.hf.addresses import layout
from headwise.hf.session import steer

__all__ = ["HeadSearch", "changes", "search_heads"]

Score = Callable[[], Tensor]
Name = TypeVar("Name")


@dataclass
class HeadSearch:
    """What a search found, and what it is worth.

    heads: the heads kept, none where no head helps alone. strength: the best of `strengths` for them, None without any.
    map: gain of every head alone on the calibration prompts; a probe `gain`, or one for each tried strength.
    curve: strength -> gain of the kept heads on the calibration prompts; calibration_gain is the best of it. The gains
    are means over prompts, larger is better, 0 is the plain model.
    held_out: `[prompts]` gain of the choice on unseen prompts. random: `[draws]` mean held-out gain of random sets of
    equal size from the same layers. all_heads: `[prompts]` held-out gain of editing every candidate.
    """

    heads: list[Head]
    map: HeadMap
    strength: float | None
    calibration_gain: float
    held_out: Tensor
    random: Tensor
    all_heads: Tensor
    curve: dict[float, float] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """Mean gain on unseen prompts."""
        return float(self.held_out.mean())

    @property
    def error(self) -> float:
        """Standard error of `gain` over prompts; nan for a single prompt."""
        return _error(self.held_out) if len(self.held_out) > 1 else float("nan")

    @property
    def p_value(self) -> float:
        """Share of random sets of equal size that do as well on unseen prompts, the choice itself counted as one."""
        return float((1 + (self.random >= self.gain).sum()) / (1 + len(self.random)))

    @property
    def beats_chance(self) -> bool:
        """Whether the gain on unseen prompts exceeds two standard errors, and that of 19 in 20 random sets."""
        return bool(self.heads) and self.gain > 2 * self.error and self.p_value < 0.05

    def __str__(self) -> str:
        if not self.heads:
            return "no head helps by itself on the calibration prompts: the edit gains nothing here"
        null = (
            f"{len(self.random)} random sets {float(self.random.mean()):+.4f}"
            if len(self.random)
            else "no other set of such heads exists"
        )
        return (
            f"{len(self.heads)} heads, gain {self.gain:+.4f} (standard error {self.error:.4f}) on unseen prompts; "
            f"{null}, all heads {float(self.all_heads.mean()):+.4f}: it "
            f"{'beats' if self.beats_chance else 'does not beat'} chance"
        )


def changes(model: nn.Module, edits: Mapping[Name, Edit], score: Score) -> dict[Name, Float[Tensor, " _"]]:
    """What each of several edits does by itself: the score of every prompt under it minus that of the plain model.

    score: runs the model and returns one number a prompt.
    """
    plain = _scores(score)
    found = {}
    for name, edit in edits.items():
        with steer(model, edit):
            found[name] = _scores(score) - plain
    return found


def search_heads(
    model: nn.Module,
    edit: Callable[..., Edit],
    score: Score,
    held_out: Score,
    *,
    candidates: Heads = None,
    strengths: Sequence[float] = (),
    probes: Sequence[float] = (),
    margin: float = 0.0,
    draws: int = 20,
    seed: int = 0,
) -> HeadSearch:
    """Try an edit on every head alone, keep the heads that raise the score, and measure the set on unseen prompts.

    edit: `edit(heads)` makes the edit on some heads, `edit(heads, strength)` at a strength. score, held_out: run the
    model and return one number a prompt, larger is better; they must not share prompts.
    candidates: a selection, None means every head of the main tower. strengths: tried on the kept set, on all
    candidates and on every random set, each keeps its best. probes: strengths at which heads are tried alone; each
    gives a set, and the set that gains most is kept (with a factor: one above 1 and one below). None: `edit(heads)`.
    margin: standard errors by which a head must gain to be kept; 0 keeps every head that gains, and with it half of
    those that do nothing. draws: random sets for the null; 20 or more, or nothing can beat chance.
    """
    places = layout(model)
    heads = select_heads(candidates, places)
    plain, unseen = _scores(score), _scores(held_out)

    def gain(chosen: list[Head], strength: tuple[float, ...], measure: Score = score) -> Tensor:
        with steer(model, edit(chosen, *strength)):
            return _scores(measure) - (plain if measure is score else unseen)

    def tuned(chosen: list[Head]) -> tuple[tuple[float, ...], dict[float, float], float]:
        """The best strength for a set, the curve it was read from, and the gain."""
        curve = {strength: float(gain(chosen, (strength,)).mean()) for strength in strengths}
        if not curve:
            return (), curve, float(gain(chosen, ()).mean())
        best = max(curve, key=lambda strength: curve[strength])
        return (best,), curve, curve[best]

    alone: dict[str, dict[Head, float | None]] = {}
    kept: list[Head] = []
    strength: tuple[float, ...] = ()
    curve: dict[float, float] = {}
    most = 0.0
    for probe in [(one,) for one in probes] or [()]:
        gains = {head: gain([head], probe) for head in heads}
        alone["gain" + "".join(f" at {one:g}" for one in probe)] = {head: float(g.mean()) for head, g in gains.items()}
        helping = [head for head, g in gains.items() if float(g.mean()) > margin * _error(g)]
        if helping:
            found = tuned(helping)
            if not kept or found[2] > most:
                kept, (strength, curve, most) = helping, found
    scores = HeadMap(alone, places, source="search_heads")
    return HeadSearch(
        heads=kept,
        map=scores,
        strength=strength[0] if kept and strength else None,
        calibration_gain=most,
        held_out=gain(kept, strength, held_out) if kept else torch.zeros_like(unseen),
        random=torch.tensor(
            [
                float(gain(other, tuned(other)[0], held_out).mean())
                for other in _other_sets(scores, places, kept, heads, draws, seed)
            ]
        ),
        all_heads=gain(heads, tuned(heads)[0], held_out),
        curve=curve,
    )


def _other_sets(
    scores: HeadMap, places: Layout, kept: list[Head], candidates: list[Head], draws: int, seed: int
) -> list[list[Head]]:
    """Random sets of candidates with as many heads of each layer; none where the kept ones fill their layers."""
    room = Counter((head.tower, head.layer) for head in candidates)
    used = Counter((head.tower, head.layer) for head in kept)
    if all(room[place] == count for place, count in used.items()):
        return []
    barred = [head for head in places.heads("*") if head not in set(candidates)]
    return scores.matched_random(kept, draws=draws, exclude=barred, overlap=True, seed=seed)


def _error(gains: Tensor) -> float:
    """Standard error of the mean; 0 for a single prompt."""
    return float(gains.std() / len(gains) ** 0.5) if len(gains) > 1 else 0.0


def _scores(measure: Score) -> Tensor:
    with torch.no_grad():
        scores = measure()
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"search_heads: a score returned {tuple(scores.shape)}; it must return one number a prompt")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            f"search_heads: {int((~torch.isfinite(scores)).sum())} of {len(scores)} scores are not finite; a score "
            "must be a number, larger is better"
        )
    return scores.float().cpu()
