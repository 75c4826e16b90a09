"""The models, prompts and rows of zero-tuning; the record of the paper is in zero_tuning.py."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.edit import Edit
from headwise.attend.edits import BiasGroup, EditRows
from headwise.attend.groups import positions
from headwise.attend.probes import Sink
from headwise.heads.knockout import live_heads
from headwise.hf.addresses import layout
from headwise.hf.maps import attention_maps
from headwise.hf.session import probe, steer
from headwise.papers.running import Run
from headwise.papers.statistics import (
    bootstrap_interval,
    holm,
    mean,
    paired_bootstrap_interval,
    rank_correlation,
    sign_flip_test,
)
from headwise.papers.verdicts import Measured
from headwise.specimens.prompts import backcopy_prompts, prose_prompts, symbol_prompts
from headwise.specimens.registry import load_specimen
from headwise.steering.search import HeadSearch, changes
from headwise.steering.zero_tuning import GAMMAS, ZeroTuning, scale_initial_token, token_leverage, tune_initial_token
from headwise.tasks.prompted import PromptBatch

SINK = 0.3  # mean weight of the first token from which a model counts as one with a sink
OTHERS = 20  # random other tokens of each text
PROBE = 1.5  # the factor by which heads are told apart
DRAWS = 10  # random sets of heads
# Prompts of each task: FEW of the held-out ones where only a mean matters, UNSEEN of the task answered in part.
CALIBRATION, HELD_OUT, FEW, UNSEEN = 32, 48, 24, 128
FIRST, RANDOM = "first token", "random token"


@dataclass
class Subject:
    """A model, prompts to choose a gamma on, prompts to measure it on, and many of the task it answers in part."""

    name: str
    model: nn.Module
    calibration: dict[str, PromptBatch]
    held_out: dict[str, PromptBatch]
    unseen: dict[str, PromptBatch]

    @classmethod
    def of(cls, name: str, model: nn.Module, batches: Mapping[str, PromptBatch], hard: str = "") -> "Subject":
        def part(start: int, stop: int | None) -> dict[str, PromptBatch]:
            return {task: batch.part(slice(start, stop)) for task, batch in batches.items()}

        few = CALIBRATION + HELD_OUT
        unseen = {hard: part(few, None)[hard]} if hard else {}
        return cls(name, model, part(0, CALIBRATION), part(CALIBRATION, few), unseen)

    def score(self, what: Callable[[PromptBatch, Tensor], Tensor], *batches: PromptBatch) -> Callable[[], Tensor]:
        """A number for every prompt, from the model as it is when asked."""

        def measure() -> Tensor:
            return torch.cat([what(batch, self.model(**batch.inputs()).logits).float() for batch in batches])

        return measure

    def beginnings(self, size: int = 64) -> Tensor:
        """The first tokens of the held-out prompts of a task, without padding."""
        batch = next(iter(self.held_out.values()))
        return batch.input_ids.gather(1, batch.real.int().argmax(1, keepdim=True) + torch.arange(size))


def subjects(run: Run) -> tuple[Subject, Subject, Subject]:
    few, many = CALIBRATION + HELD_OUT, CALIBRATION + HELD_OUT + UNSEEN
    models = {name: load_specimen(name) for name in ("tasks", "text", "backcopy-deep")}
    batches = symbol_prompts(few, run.seed) | symbol_prompts(many, run.seed, needle_size=8, tasks=("needles",))
    prose = {"prose": prose_prompts(models["text"].tokenizer, many, run.seed, length=112)}
    return (
        Subject.of("tasks", models["tasks"].model, batches, "needles"),
        Subject.of("text", models["text"].model, prose, "prose"),
        Subject.of("backcopy-deep", models["backcopy-deep"].model, {"backcopy": backcopy_prompts(few, run.seed)}),
    )


def _told(numbers: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {number:{form}}" for name, number in numbers.items())


def _scaled(batch: PromptBatch, group: str, gamma: float, heads: str | None = None) -> Edit:
    """Gamma on the first token, or on another group of a batch."""
    if group == FIRST:
        return ZeroTuning(gamma=gamma, heads=heads)
    return BiasGroup(positions(batch.groups[group]), math.log(gamma), heads=heads)


def _with_random_token(batch: PromptBatch, run: Run) -> PromptBatch:
    drawn = batch.other_token(torch.Generator().manual_seed(run.seed))
    return replace(batch, groups={**batch.groups, RANDOM: drawn})


def _text_loss(output: Any, ids: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(output.logits[:, :-1].float().mT, ids[:, 1:], reduction="none")
    return losses[:, 1:].mean(1)  # the token after the first has nothing but the first to look at


def _levers(model: nn.Module, ids: Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """|d loss / d log gamma| of every text, mean over heads: of its first token, and of random others."""
    sizes = torch.cat(
        [
            token_leverage(model, {"input_ids": part}, partial(_text_loss, ids=part)).abs().mean(1)
            for part in ids.split(16)
        ]
    )
    # Nothing is predicted from the last token, the only row that sees it.
    others = torch.rand(len(ids), ids.shape[1] - 2, generator=torch.Generator().manual_seed(seed)).argsort(-1) + 1
    return sizes[:, 0].numpy(), sizes.gather(1, others[:, :OTHERS]).mean(1).numpy()


def control_point(run: Run, subjects: list[Subject]) -> Measured:
    toy = backcopy_prompts(64, run.seed).input_ids
    texts = {name: (load_specimen(name).model, toy) for name in ("backcopy", "backcopy@0")}
    texts |= {one.name: (one.model, one.beginnings(48)) for one in subjects}
    sinks, ratios, spans = {}, {}, {}
    for name, (model, ids) in texts.items():
        first, other = _levers(model, ids, run.seed)
        draws = np.random.default_rng(run.seed).integers(0, len(ids), (4000, len(ids)))
        low, high = np.quantile(first[draws].mean(1) / other[draws].mean(1), [0.025, 0.975])
        ratios[name], spans[name] = float(first.mean() / other.mean()), (float(low), float(high))
        with torch.no_grad(), probe(model, sink := Sink()):
            model(input_ids=ids)
        sinks[name] = float(torch.cat(list(sink.scores().values())).mean())
    told = {
        name: f"{name}: the first token gets {sinks[name]:.2f} and moves the loss {ratios[name]:.2f} times as far as a "
        f"random token ({spans[name][0]:.2f} to {spans[name][1]:.2f})"
        for name in texts
    }
    tested = [name for name in texts if sinks[name] > SINK]
    margin = min((ratios[name] for name in tested), default=0.0) - 3
    return Measured(
        measured="; ".join(told[name] for name in tested) or "no model has a sink",
        control="; ".join(told[name] for name in texts if name not in tested),
        holds=margin >= 0,
        margin=margin,
        interval=(min(spans[name][0] for name in tested) - 3, min(spans[name][1] for name in tested) - 3)
        if tested
        else None,
        values={f"ratio, {name}": ratio for name, ratio in ratios.items()},
    )


def weights(model: nn.Module, ids: Tensor) -> tuple[Measured, Measured]:
    """The two identities of a row, layer by layer, so that every layer reads what the plain model reads.

    In double precision: single rounds scores of 100 by as much as the bound allows weights.
    """
    model = copy.deepcopy(model).double()
    plain = attention_maps(model, ids)
    first, before = plain[..., 2:, 0], plain[..., 2:, 2:] - plain[..., 2:, 1:-1]
    error, shape, entropy, wrong, correlations = 0.0, 0.0, 0.0, 0, {}
    for gamma in (0.3, 1.6, 4.0):
        edited = []
        for layer in range(layout(model).main.layers):
            with steer(model, ZeroTuning(gamma=gamma, heads=f"{layer}.*")):
                edited.append(attention_maps(model, ids, f"{layer}.*"))
        new = torch.cat(edited, 1)
        after = new[..., 2:, 2:] - new[..., 2:, 1:-1]
        error = max(error, float((after - before / (1 + (gamma - 1) * first)[..., None]).abs().max()))
        sizes = before.abs().sum(-1)
        change = torch.where(sizes > 0, after.abs().sum(-1) / sizes - 1, 0.0)
        wrong += int(((change if gamma > 1 else -change) > 1e-5).sum())
        follows = rank_correlation(first.mean((0, 2)).tolist(), change.mean((0, 2)).tolist())
        correlations[f"gamma {gamma}"] = -follows if gamma > 1 else follows
        tails = [w[..., 2:, 1:] / w[..., 2:, 1:].sum(-1, keepdim=True) for w in (plain, new)]
        shape = max(shape, float((tails[0] - tails[1]).abs().max()))
        own = new[..., 2:, :1]
        expected = _entropy(torch.cat([own, 1 - own], -1)) + (1 - own[..., 0]) * _entropy(tails[0])
        entropy = max(entropy, float((_entropy(new[..., 2:, :]) - expected).abs().max()))
    least = min(correlations.values())
    rows = first.numel()
    return Measured(
        measured=(
            f"formula met to {error:.1e}; of {rows} rows {wrong} change in the wrong direction; the change of a head's "
            f"rows follows its weight on the first token with rank correlation {_told(correlations, '.4f')}"
        ),
        control=f"the later weights renormalised among themselves change by at most {shape:.1e}",
        holds=error <= 1e-5 and wrong == 0 and least >= 0.99,
        values={"largest error": error, "least rank correlation": least},
    ), Measured(
        measured=f"largest difference {entropy:.1e} nats over {rows} rows and three factors",
        holds=entropy <= 1e-5,
        values={"largest difference": entropy},
    )


def _entropy(weights: Tensor) -> Tensor:
    return -torch.special.xlogy(weights.double(), weights.double()).sum(-1)


def forms(model: nn.Module, ids: Tensor) -> tuple[Measured, Measured]:
    def logits(*edits: Edit) -> Tensor:
        with torch.no_grad(), steer(model, *edits):
            return model(input_ids=ids).logits

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm(dim=-1).max() / other.norm(dim=-1).min())

    def formed(gamma: float) -> EditRows:
        return EditRows(lambda weights, rows: scale_initial_token(weights, gamma))

    error = max(apart(logits(ZeroTuning(gamma=g)), logits(formed(g))) for g in (0.0, 0.3, 1.6, 4.0))
    same = torch.equal(logits(ZeroTuning(gamma=1.0)), logits())
    twice = apart(logits(ZeroTuning(gamma=2.0), ZeroTuning(gamma=0.75)), logits(ZeroTuning(gamma=1.5)))
    return Measured(
        measured=f"logits differ by {error:.1e} relative; gamma 1 is {'' if same else 'not '}bit-identical",
        holds=error < 1e-5 and same,
        values={"largest relative difference": error},
    ), Measured(
        measured=f"logits differ by {twice:.1e} relative", holds=twice < 1e-5, values={"relative difference": twice}
    )


def better_token(run: Run, subjects: list[Subject]) -> tuple[Measured, dict[str, dict[str, float]]]:
    """Gain on held-out prompts of the first token, the best other group and a random token, each at its own gamma."""
    gains: dict[str, dict[str, Tensor]] = {}
    for subject in subjects:
        for task in run.progress(list(subject.held_out), f"scaling tokens of {subject.name}"):
            tuned, held = (_with_random_token(part[task], run) for part in (subject.calibration, subject.held_out))
            edits = {(group, g): _scaled(tuned, group, g) for group in (FIRST, *tuned.groups) for g in GAMMAS}
            curve = changes(subject.model, edits, subject.score(PromptBatch.losses, tuned))
            best = {group: min(GAMMAS, key=lambda g, c=group: float(curve[c, g].mean())) for group, _ in edits}
            chosen = {group: _scaled(held, group, gamma) for group, gamma in best.items()}
            lost = changes(subject.model, chosen, subject.score(PromptBatch.losses, held))
            gains[task] = {group: -change for group, change in lost.items()}
    table, first, other = {}, [], []
    for task, gain in gains.items():
        rival = max((group for group in gain if group not in (FIRST, RANDOM)), key=lambda g, c=gain: float(c[g].mean()))
        table[task] = {group: float(gain[group].mean()) for group in (FIRST, rival, RANDOM)}
        first.append(gain[FIRST])
        other.append(gain[rival])
    first, other = torch.cat(first).double().numpy(), torch.cat(other).double().numpy()
    low, high = paired_bootstrap_interval(first, other, seed=run.seed)
    margin = float((first - other).mean())
    return Measured(
        measured=(
            f"held-out loss falls by {first.mean():.4f} nats with the first token and by {other.mean():.4f} with the "
            f"best other group: {margin:+.4f} ({low:+.4f} to {high:+.4f})"
        ),
        control="; ".join(f"{task}: {_told(numbers, '+.4f')}" for task, numbers in table.items()),
        holds=margin >= 0,
        margin=margin,
        interval=(low, high),
        values={"first token": float(first.mean()), "best other group": float(other.mean())},
    ), table


def layers(run: Run, subjects: list[Subject]) -> tuple[Measured, dict[str, list[float]]]:
    """The largest change of the mean held-out loss over the grid, scaling the first token in one layer at a time."""
    effects: dict[tuple[str, str], list[float]] = {}
    for subject in subjects:
        for group in (FIRST, RANDOM):
            held = [_with_random_token(batch.part(slice(FEW)), run) for batch in subject.held_out.values()]
            for layer in run.progress(range(layout(subject.model).main.layers), f"layers of {subject.name}"):
                # A group is of one batch, so batches are scored one by one.
                edits = [{g: _scaled(batch, group, g, f"{layer}.*") for g in GAMMAS} for batch in held]
                parts = [
                    changes(subject.model, some, subject.score(PromptBatch.losses, batch))
                    for some, batch in zip(edits, held, strict=True)
                ]
                mean_change = [float(torch.cat([part[g] for part in parts]).mean()) for g in GAMMAS]
                effects.setdefault((subject.name, group), []).append(max(map(abs, mean_change)))

    def trend(sizes: list[float]) -> tuple[float, float]:
        half = len(sizes) // 2
        return rank_correlation(list(range(len(sizes))), sizes), mean(sizes[:half]) - mean(sizes[-half:])

    def told(group: str) -> str:
        return "; ".join(
            f"{name}: {', '.join(f'{size:.4f}' for size in sizes)} (rank correlation with depth {trend(sizes)[0]:+.2f})"
            for (name, which), sizes in effects.items()
            if which == group
        )

    trends = [trend(sizes) for (_, group), sizes in effects.items() if group == FIRST]
    return Measured(
        measured=f"largest change of loss by layer: {told(FIRST)}",
        control=f"{RANDOM}: {told(RANDOM)}",
        holds=all(correlation < -0.5 and fall > 0 for correlation, fall in trends),
        values={f"rank correlation, {one.name}": at for one, (at, _) in zip(subjects, trends, strict=True)},
    ), {name: sizes for (name, group), sizes in effects.items() if group == FIRST}


def heads(run: Run, subjects: list[Subject]) -> tuple[Measured, dict[str, list[tuple[float, float]]]]:
    """Heads that gain from a larger gamma and lose from a smaller one, and heads of which the reverse is true."""
    counts, shuffled, points = {}, {}, {}
    for subject in subjects:
        batches = list(subject.held_out.values())
        found = live_heads(subject.model, batches[0].input_ids[:8])
        edits: dict[tuple[Head, float], Edit] = {
            (head, gamma): ZeroTuning(gamma=gamma, heads=[head]) for head in found for gamma in (PROBE, 1 / PROBE)
        }
        run.log(f"scaling the first token in {len(found)} heads of {subject.name}")
        lost = changes(subject.model, edits, subject.score(PromptBatch.losses, *batches))
        pairs = {head: (lost[head, PROBE].tolist(), lost[head, 1 / PROBE].tolist()) for head in found}
        counts[subject.name] = _kinds(list(pairs.values()), run.seed)
        flips = np.random.default_rng(run.seed).choice([-1.0, 1.0], len(next(iter(pairs.values()))[0]))
        shuffled[subject.name] = _kinds([(flips * up, flips * down) for up, down in pairs.values()], run.seed)
        points[subject.name] = [(mean(up), mean(down)) for up, down in pairs.values()]
    least = min(min(kinds) for kinds in counts.values())
    return Measured(
        measured="; ".join(f"{name}: {up} heads up-effective, {down} down" for name, (up, down) in counts.items()),
        control="; ".join(f"{name}, signs shuffled: {up} and {down}" for name, (up, down) in shuffled.items()),
        holds=least >= 1,
        margin=float(least - 1),
        values={
            f"{kind}-effective, {name}": float(count)
            for name, kinds in counts.items()
            for kind, count in zip(("up", "down"), kinds, strict=True)
        },
    ), points


def _kinds(pairs: list[tuple[Any, Any]], seed: int) -> tuple[int, int]:
    """How many heads are up-effective and down-effective; pairs: changes of loss at a larger and at a smaller gamma.

    Both changes of a head must have the sign: the larger p of the two is the head's, and Holm corrects for all heads
    and both kinds.
    """

    def p(up: Any, down: Any) -> float:
        nothing = np.zeros(len(up))
        falls = sign_flip_test(up, nothing, alternative="less", seed=seed)
        return max(falls, sign_flip_test(down, nothing, alternative="greater", seed=seed))

    adjusted = holm([*(p(up, down) for up, down in pairs), *(p(down, up) for up, down in pairs)])
    up, down = adjusted[: len(pairs)], adjusted[len(pairs) :]
    return sum(value < 0.05 for value in up), sum(value < 0.05 for value in down)


def improves(run: Run, subjects: list[Subject]) -> Measured:
    found: dict[str, HeadSearch] = {}
    notes = []
    for subject in subjects:
        task, unseen = next((task, batch) for task, batch in subject.unseen.items())
        tuned = subject.calibration[task]
        run.log(f"choosing heads of {subject.name} for {task}")
        found[subject.name] = tune_initial_token(
            subject.model,
            subject.score(PromptBatch.right, tuned),
            subject.score(PromptBatch.right, unseen),
            heads=live_heads(subject.model, tuned.input_ids[:8]),
            draws=DRAWS,
            seed=run.seed,
        )
        notes.append(_without_labels(subject, tuned, unseen))
    gain, common = (torch.cat([getattr(one, name) for one in found.values()]) for name in ("held_out", "all_heads"))
    over_plain = bootstrap_interval(gain.tolist(), seed=run.seed)
    over_common = paired_bootstrap_interval(gain.tolist(), common.tolist(), seed=run.seed)
    margin = float(min(gain.mean(), (gain - common).mean()))
    return Measured(
        measured=(
            f"accuracy {gain.mean():+.3f} over the plain model ({over_plain[0]:+.3f} to {over_plain[1]:+.3f}), "
            f"{(gain - common).mean():+.3f} over one gamma for all heads "
            f"({over_common[0]:+.3f} to {over_common[1]:+.3f}); "
            + "; ".join(f"{name}: {len(one.heads)} heads at gamma {one.strength}" for name, one in found.items())
        ),
        control="; ".join(f"{name}: {one}; {note}" for (name, one), note in zip(found.items(), notes, strict=True)),
        holds=margin >= 0,
        margin=margin,
        interval=(min(over_plain[0], over_common[0]), min(over_plain[1], over_common[1])),
        values={"gain": float(gain.mean()), "gain of one gamma for all heads": float(common.mean())},
    )


def _without_labels(subject: Subject, tuned: PromptBatch, unseen: PromptBatch) -> str:
    """What the least entropy would choose for all heads, and how well entropy and error go together."""
    edits = {gamma: ZeroTuning(gamma=gamma) for gamma in GAMMAS}
    guide = changes(subject.model, edits, subject.score(PromptBatch.entropy, tuned))
    best = min(GAMMAS, key=lambda gamma: float(guide[gamma].mean()))
    right = changes(subject.model, edits, subject.score(PromptBatch.right, unseen))
    read = changes(subject.model, edits, subject.score(PromptBatch.parsable, unseen))
    together = rank_correlation(
        [float(guide[gamma].mean()) for gamma in GAMMAS], [-float(right[gamma].mean()) for gamma in GAMMAS]
    )
    return (
        f"least entropy picks gamma {best} for all heads, accuracy {float(right[best].mean()):+.3f}, answers that are "
        f"words {float(read[best].mean()):+.3f}; entropy and error correlate with {together:+.2f} over the grid"
    )
