"""The rows of attention_influence.py, one function for each, and its picture."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from headwise.attend.edits import Ablate
from headwise.heads.influence import attention_influence
from headwise.hf.session import steer
from headwise.papers._influence_setup import Arm, Pool, Selector, Told, parameters_of
from headwise.papers.running import Run
from headwise.papers.statistics import mean
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, bars, figure, lines
from headwise.tasks.documents import select_documents

IN_POOL = ("repeats", "needles", "addition")
ELSEWHERE = ("indirect_objects", "coloured_objects", "multiple_choice")
SOME = 512  # documents on which the other sets of heads are tried
LEAST = 0.014  # the abstract's smallest improvement
WHOLE, RANDOM, CHOSEN = "whole pool", "random half", "influence half"


def effective(told: Told) -> Measured:
    others = mean(list(told.others.values()))
    every = ", ".join(f"{name} {value:.3f}" for name, value in told.others.items())
    margin = min(told.score - 0.95, 0.75 - told.loss, told.score - others - 1e-9)
    return Measured(
        measured=f"AUC {told.score:.3f} with the retrieval heads attending evenly, {told.zeroed:.3f} zeroed",
        control=f"plain loss {told.loss:.3f}; other heads of the layers {others:.3f} on average: {every}",
        holds=margin >= 0,
        margin=margin,
        values={"AUC": told.score, "AUC zeroed": told.zeroed, "AUC of the loss": told.loss, "AUC of others": others},
    )


def chosen(selector: Selector, pool: Pool, halves: Mapping[str, Tensor], run: Run) -> Measured:
    shares = {name: share(pool, half) for name, half in halves.items()}
    best = shares.pop(CHOSEN)
    some = Pool(pool.ids[:SOME], pool.needed[:SOME])
    others = {
        "+".join(map(str, one)): share(some, select_documents(selector.influence(some.ids, one).scores, fraction=0.5))
        for one in run.progress(selector.others, "choosing with other heads")
    }
    margin = min(best - 0.9, *(best - value - 1e-9 for value in shares.values()))
    said = "; ".join(f"{name} {value:.1%}" for name, value in shares.items())
    every = ", ".join(f"{name} {value:.1%}" for name, value in others.items())
    return Measured(
        measured=f"{best:.1%} of the half with the highest scores need their context",
        control=f"{said}; the first {SOME} chosen with other heads: {every}",
        holds=margin >= 0,
        margin=margin,
        values={CHOSEN: best, **shares, "other heads": mean(list(others.values()))},
    )


def share(pool: Pool, half: Tensor) -> float:
    return float(pool.needed[half].double().mean())


def definition(selector: Selector, held: Mapping[str, Tensor]) -> Measured:
    model, apart = selector.model, 0.0
    ids = torch.cat([part[:4] for part in held.values()])
    found = selector.influence(ids)

    def own_loss(row: Tensor) -> float:
        given = row[None].to(next(model.parameters()).device)
        with torch.no_grad():
            return float(model(input_ids=given, labels=given).loss)

    for row, score in zip(ids, found.scores.tolist(), strict=True):
        plain = own_loss(row)
        with steer(model, Ablate(heads=selector.heads, mode="uniform")):
            masked = own_loss(row)
        apart = max(apart, abs((masked - plain) / plain - score))
    nothing = float(attention_influence(model, ids, []).scores.abs().max())
    top = set(selector.map.top("retrieval", len(selector.heads))) == set(selector.heads)
    margin = min(1e-5 - apart, -nothing, 0.0 if top else -1.0)
    return Measured(
        measured=(
            f"heads {', '.join(map(str, selector.heads))}; scores differ from the model's own losses by {apart:.1e} at "
            f"most; with no head masked they are {nothing:g}"
        ),
        holds=margin >= 0,
        margin=margin,
        values={"difference": apart, "without heads": nothing},
    )


def improvement(arms: Mapping[str, Arm], tasks: tuple[str, ...]) -> Measured:
    ends = {name: {task: arm.accuracy[task][-1] for task in tasks} for name, arm in arms.items()}
    gains = {task: ends[CHOSEN][task] - ends[WHOLE][task] for task in tasks}
    over = {task: ends[CHOSEN][task] - ends[RANDOM][task] for task in tasks}
    margin = min(*(gain - LEAST for gain in gains.values()), *(one - 1e-9 for one in over.values()))
    said = ", ".join(f"{task} {gain:+.1%}" for task, gain in gains.items())
    return Measured(
        measured=f"points over the whole pool: {said}; {CHOSEN}: {_table(ends[CHOSEN], arms[CHOSEN])}",
        control="; ".join(f"{name}: {_table(ends[name], arm)}" for name, arm in arms.items() if name != CHOSEN),
        holds=margin >= 0,
        margin=margin,
        values={f"{name}: {task}": value for name, row in ends.items() for task, value in row.items()},
    )


def _table(accuracy: Mapping[str, float], arm: Arm) -> str:
    return ", ".join(f"{task} {value:.1%} ({arm.loss[task][-1]:.2f} nats)" for task, value in accuracy.items())


def weak_to_strong(selector: Selector, arms: Mapping[str, Arm]) -> Measured:
    ends = {name: arm.context()[-1] for name, arm in arms.items()}
    target = ends[WHOLE]
    reached = {name: steps_to(arm, target) for name, arm in arms.items()}
    ratio = arms[CHOSEN].parameters / parameters_of(selector.model)
    total = arms[CHOSEN].steps[-1]
    sooner = min(reached[WHOLE], reached[RANDOM]) - reached[CHOSEN]
    margin = min(
        ends[CHOSEN] - ends[WHOLE] - LEAST,
        ends[CHOSEN] - ends[RANDOM] - LEAST,
        min(1.0, sooner / total) - 1e-9 if math.isfinite(reached[CHOSEN]) else -1.0,
        ratio - 1 - 1e-9,
    )

    def words(name: str) -> str:
        at = f"after {reached[name]:.0f} steps" if math.isfinite(reached[name]) else f"not in {total} steps"
        return f"{name} {ends[name]:.1%}, where the whole pool ends {at}"

    return Measured(
        measured=f"a model of {ratio:.2f} times the scorer's parameters: {words(CHOSEN)}",
        control="; ".join(words(name) for name in arms if name != CHOSEN),
        holds=margin >= 0,
        margin=margin,
        values={**ends, "parameters": ratio},
    )


def steps_to(arm: Arm, target: float) -> float:
    """The first step looked at with at least the target accuracy; infinity where none has it."""
    return next(
        (float(step) for step, value in zip(arm.steps, arm.context(), strict=True) if value >= target), math.inf
    )


def shared_prefix(selector: Selector, held: Mapping[str, Tensor]) -> Measured:
    ids = torch.cat([part[:16] for part in held.values()])
    documents = [row[: 8 + 3 * (number % 19)] for number, row in enumerate(ids)]
    one = attention_influence(selector.model, documents, selector.heads)
    two = attention_influence(selector.model, documents, selector.heads, implementation="two-pass")
    apart = max(float((a - b).abs().max()) for a, b in ((one.base, two.base), (one.masked, two.masked)))
    return Measured(
        measured=f"largest difference {apart:.1e} nats",
        holds=apart <= 1e-6,
        margin=1e-6 - apart,
        values={"difference": apart},
    )


def draw(run: Run, told: Told, arms: Mapping[str, Arm]) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 3, width=4.4) as (scores, sets, training):
        for number, values in enumerate(told.by_family.values()):
            spread = torch.linspace(-0.3, 0.3, len(values))
            scores.scatter((number + spread).tolist(), values.tolist(), s=8, color=COLOURS[number % len(COLOURS)])
        scores.set_xticks(range(len(told.by_family)), list(told.by_family))
        scores.set(ylabel="attention influence", title="Documents")
        every = {"retrieval\nheads": told.score, "the same,\nzeroed": told.zeroed, "plain\nloss": told.loss}
        bars(sets, list(every), {"AUC": list(every.values())}, y="AUC", title="Told apart")
        others = list(told.others.values())
        jitter = torch.linspace(-0.2, 0.2, len(others)) if len(others) > 1 else torch.zeros(len(others))
        sets.scatter((len(every) + jitter).tolist(), others, s=16, color=COLOURS[3])
        sets.set_xticks(range(len(every) + 1), [*every, "other heads\nof the layers"])
        sets.axhline(0.5, color="#5b6168", linewidth=1, linestyle=":")
        sets.set(ylim=(0, 1.05))
        curves = {name: arm.context() for name, arm in arms.items()}
        lines(training, arms[CHOSEN].steps, curves, x="step", y="right, repeats and needles", title="Larger model")
        training.legend(fontsize=8, ncols=2, loc="upper left")
        training.set(ylim=(None, 1.45 * max(max(values) for values in curves.values())))
    run.figures.append(path)
