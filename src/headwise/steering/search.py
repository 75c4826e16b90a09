"""Choosing the heads of an edit by trying them, with the null that such a search needs.

A search over hundreds of heads always finds some that help on the prompts it looked at. So a search reports three
things beside its choice: the gain on prompts that it did not see, the gain of random sets of as many heads from the
same layers, and the gain of editing all heads, each at the strength that suits it best on the prompts of the search.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise._files import read_json, write_text
from headwise.attend.addresses import Head, Layout, select_heads
from headwise.attend.edit import Edit, Heads
from headwise.attend.head_map import HeadMap
from headwise.errors import InputError
from headwise.hf.addresses import layout
from headwise.hf.session import steer

__all__ = ["HeadSearch", "changes", "search_heads"]

Score = Callable[[], Tensor]
Progress = Callable[[int, int], None]
Name = TypeVar("Name")
SCHEMA = 1


@dataclass
class HeadSearch:
    """What a search found, and what it is worth.

    heads: the heads kept, none where no head helps alone. strength: the best of `strengths` for them, None without any.
    map: gain of every head alone on the calibration prompts; a probe `gain`, or one for each tried strength.
    curve: strength -> gain of the kept heads on the calibration prompts; calibration_gain is the best of it. The gains
    are means over prompts, larger is better, 0 is the plain model.
    held_out: `[prompts]` gain of the choice on unseen prompts. random: `[draws]` mean held-out gain of random sets of
    equal size from the same layers. all_heads: `[prompts]` held-out gain of editing every candidate.
    baseline: mean score of the plain model on the calibration prompts and on the unseen ones.
    """

    heads: list[Head]
    map: HeadMap
    strength: float | None
    calibration_gain: float
    held_out: Tensor
    random: Tensor
    all_heads: Tensor
    curve: dict[float, float] = field(default_factory=dict)
    baseline: tuple[float, float] = (math.nan, math.nan)

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
            + ("" if self.gain > 0 else "; the edit gains nothing here")
        )

    def to_json(self) -> dict[str, Any]:
        """What was found, with the map of every head; `from_json` reads it."""
        return {
            "schema": SCHEMA,
            "heads": [str(head) for head in self.heads],
            "strength": self.strength,
            "baseline": [_null(value) for value in self.baseline],
            "calibration_gain": self.calibration_gain,
            "curve": [[strength, gain] for strength, gain in self.curve.items()],
            "held_out": self.held_out.tolist(),
            "random": self.random.tolist(),
            "all_heads": self.all_heads.tolist(),
            "map": self.map.to_json(),
        }

    @classmethod
    def from_json(cls, document: Any, where: str = "head search") -> "HeadSearch":
        """Raises InputError for a document of another kind."""
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA or "held_out" not in document:
            raise InputError(f"{where}: is no head search of schema {SCHEMA}; expected what HeadSearch.save wrote")
        try:
            scores = HeadMap.from_json(document["map"], where)
            low, high = (math.nan if value is None else float(value) for value in document["baseline"])
            return cls(
                heads=[scores.layout.check(Head.parse(head)) for head in document["heads"]],
                map=scores,
                strength=document["strength"],
                calibration_gain=float(document["calibration_gain"]),
                held_out=torch.tensor(document["held_out"]),
                random=torch.tensor(document["random"]),
                all_heads=torch.tensor(document["all_heads"]),
                curve={strength: gain for strength, gain in document["curve"]},
                baseline=(low, high),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: is damaged ({error}); search again") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was found as JSON."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadSearch":
        """Read what `save` wrote. Raises InputError for a missing file and for one of another kind."""
        return cls.from_json(read_json(path), os.fspath(path))


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
    held_out: Score | None = None,
    *,
    candidates: Heads = None,
    strengths: Sequence[float] = (),
    probes: Sequence[float] = (),
    margin: float = 0.0,
    draws: int = 20,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> HeadSearch:
    """Try an edit on every head alone, keep the heads that raise the score, and measure the set on unseen prompts.

    edit: `edit(heads)` makes the edit on some heads, `edit(heads, strength)` at a strength. score, held_out: run the
    model and return one number a prompt, larger is better; they must not share prompts. Without held_out half of the
    prompts of score are held out, drawn by the seed.
    candidates: a selection ("2-30.*"), None means every head of the main tower. strengths: tried on the kept set, on
    all candidates and on every random set, each keeps its best. probes: strengths at which heads are tried alone; each
    gives a set, and the set that gains most is kept (with a factor: one above 1 and one below). None: `edit(heads)`.
    margin: standard errors by which a head must gain to be kept; 0 keeps every head that gains, and with it half of
    those that do nothing. draws: random sets for the null; 20 or more, or nothing can beat chance.
    resume: a file that every measurement is added to; a search that was killed goes on from it. progress: called with
    the measurements done and how many there are at most.

    Raises ValueError for scores that are not one finite number a prompt, InputError for a file to resume from that
    belongs to another search.
    """
    places = layout(model)
    heads = select_heads(candidates, places)
    score, held_out = _split(score, seed) if held_out is None else (score, held_out)
    plain, unseen = _scores(score), _scores(held_out)
    tried = [(one,) for one in probes] or [()]
    most_measurements = len(tried) * (len(heads) + max(1, len(strengths))) + (draws + 2) * (len(strengths) + 2)
    kind = "" if resume is None else re.sub(r" at 0x[0-9a-f]+", "", repr(edit(heads[:1], *tried[0])))
    search = {"edit": kind, "plain": plain.tolist(), "unseen": unseen.tolist()}
    ledger = _Ledger(resume, search, progress, most_measurements)

    def gain(chosen: list[Head], strength: tuple[float, ...], unseen_too: bool = False) -> Tensor:
        def measure() -> Tensor:
            with steer(model, edit(chosen, *strength)):
                return _scores(held_out if unseen_too else score) - (unseen if unseen_too else plain)

        return ledger.measured(("unseen" if unseen_too else "score", sorted(map(str, chosen)), list(strength)), measure)

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
    for probe in tried:
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
        held_out=gain(kept, strength, True) if kept else torch.zeros_like(unseen),
        random=torch.tensor(
            [
                float(gain(other, tuned(other)[0], True).mean())
                for other in _other_sets(scores, places, kept, heads, draws, seed)
            ]
        ),
        all_heads=gain(heads, tuned(heads)[0], True),
        curve=curve,
        baseline=(float(plain.mean()), float(unseen.mean())),
    )


class _Ledger:
    """What was measured so far, in a file of one line each; without a file, in memory only."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        search: Mapping[str, Any],
        progress: Progress | None,
        total: int,
    ) -> None:
        self.path, self.progress, self.total, self.done = path, progress, total, 0
        self.known: dict[str, Tensor] = {}
        if path is None:
            return
        head = json.dumps({"search": SCHEMA, **search})
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True) if Path(path).exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill may leave half a line
        if not whole:
            write_text(path, head + "\n")
            return
        if whole[0].rstrip("\n") != head:
            raise InputError(
                f"search_heads: {path} belongs to another search: its edit is another, or the plain model scores "
                "otherwise on these prompts; give another file, or delete it"
            )
        for line in whole[1:]:
            entry = json.loads(line)
            self.known[json.dumps(entry["of"])] = torch.tensor(entry["gain"])
        if len(whole) < len(lines):
            write_text(path, "".join(whole))

    def measured(self, of: tuple[str, list[str], list[float]], measure: Callable[[], Tensor]) -> Tensor:
        key = json.dumps(of)
        if key not in self.known:
            self.known[key] = measure()
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"of": of, "gain": self.known[key].tolist()}) + "\n")
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)
        return self.known[key]


def _split(score: Score, seed: int) -> tuple[Score, Score]:
    """Two halves of the prompts of a score."""

    def half(which: int) -> Score:
        def run() -> Tensor:
            scores = score()
            if scores.ndim != 1 or len(scores) < 2:
                raise ValueError(
                    f"search_heads: a score returned {tuple(scores.shape)}; it must return one number a prompt, at "
                    "least two where half of them are held out"
                )
            order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed)).to(scores.device)
            return scores[order[which::2].sort().values]

        return run

    return half(0), half(1)


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
