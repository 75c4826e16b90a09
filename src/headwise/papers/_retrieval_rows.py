"""The rows of retrieval_heads.py, one function for each, and its picture."""

import re
from collections.abc import Mapping, Sequence
from random import Random

import torch
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.head_map import HeadMap
from headwise.heads.decoding import greedy_answers
from headwise.heads.retrieval import copy_hits, copy_scores, retrieval_scores
from headwise.papers._retrieval_setup import (
    DEPTHS,
    KNOWN,
    RETRIEVAL,
    RETRIEVES,
    STRONG,
    Extension,
    Reader,
    Removals,
    answer_of,
    answered,
    ids_of,
    tasks_of,
    two_steps,
)
from headwise.papers.running import Run
from headwise.papers.statistics import bootstrap_interval, mean, paired_bootstrap_interval
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, bars, figure, lines
from headwise.specimens import planted, planted_llama
from headwise.tasks.needles import needle


def responsible(removals: Mapping[str, Removals]) -> Measured:
    lost = {name: 1 - r.every / r.intact for name, r in removals.items()}
    others = {name: 1 - mean(r.every_others) / r.intact for name, r in removals.items()}
    return _row(
        min(min(lost[name] - 0.8, lost[name] - 2 * others[name]) for name in lost),
        {
            "{:.0%} of the right answer tokens lost without the heads of 0.1 or more": lost,
            "{:.0%} without those of 0.5 or more": {name: 1 - r.strong / r.intact for name, r in removals.items()},
        },
        {"{:.1%} lost without as many other heads of their layers": others},
    )


def universal(readers: list[Reader]) -> Measured:
    found = {reader.name: len(reader.heads(RETRIEVAL)) for reader in readers}
    able = {reader.name: reader.right_at_longest for reader in readers}
    return _row(
        min(len(found) - 2, min(found.values()) - 1, min(able.values()) - RETRIEVES),
        {"{} retrieval heads": found, "{:.0%} of its longest needles right": able},
        {"highest score with random weights {:.3f}": {reader.name: max(untrained(reader)) for reader in readers}},
    )


def untrained(reader: Reader) -> list[float]:
    """Scores of the same architecture before training, on the same answers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(reader.model)(reader.model.config).eval().to(next(reader.model.parameters()).device)
    return copy_scores(model, reader.held.prompts, min_recall=None).tensor().flatten().tolist()


def sparse(readers: list[Reader]) -> Measured:
    one = {reader.name: 1 / len(reader.scores.layout.heads()) for reader in readers}
    shares = {reader.name: len(reader.heads(RETRIEVAL)) * one[reader.name] for reader in readers}
    return _row(
        0.05 - max(shares.values()) - 1e-9,  # "less than" leaves out the bound
        {"{:.1%} of the heads": shares},
        {"a single head is {:.1%}": one},
    )


def intrinsic(readers: list[Reader]) -> Measured:
    best = {reader.name: max(reader.scores.tensor().flatten().tolist()) for reader in readers}
    length = {reader.name: reader.longest for reader in readers}
    return _row(
        min(best.values()) - STRONG,
        {"highest score {:.2f}": best, "never read more than {} tokens": length},
        {"highest score before training {:.3f}": {reader.name: max(untrained(reader)) for reader in readers}},
    )


def extension(reader: Reader, extended: Extension, run: Run) -> Measured:
    before, after = set(reader.heads(STRONG)), set(extended.scores.select(threshold=STRONG))
    together = _correlation(reader.scores, extended.scores)
    drawn = reader.controls(sorted(before), "layer", run)
    length, said = 2 * reader.longest, [", ".join(map(str, sorted(heads))) for heads in (before, after)]
    return _row(
        min(extended.right - RETRIEVES, together - 0.9, len(before & after) / len(before | after) - 1),
        {
            "correlation of scores {:.3f}": {reader.name: together},
            f"needles of {length} tokens {{:.0%}} right before": {reader.name: extended.right_before},
            "{:.0%} after": {reader.name: extended.right},
        },
        {"a random set of the same layers shares {:.0%} of its heads": {
            reader.name: mean([len(after & set(one)) / len(one) for one in drawn])
        }},
        note=f"heads of 0.5 or more: {said[0]} before, {said[1]} after",
    )  # fmt: skip


def always_active(readers: list[Reader]) -> Measured:
    always, runs, others = {}, {}, {}
    for reader in readers:
        often, found = reader.scores.activation_frequency(), reader.heads(RETRIEVAL)
        always[reader.name] = sum(often[head] == 1 for head in found)
        runs[reader.name] = len(reader.scores.runs["retrieval"])
        layers = {head.layer for head in found}
        others[reader.name] = mean([often[head] for head in reader.others if head.layer in layers] or [0.0])
    return _row(
        min(*(count - 1 for count in always.values()), *(count - 64 for count in runs.values())),
        {"{} heads active in every run": always, "{} runs": runs},
        {"other heads of the same layers active in {:.0%} of the runs": others},
    )


def sometimes_active(readers: list[Reader]) -> Measured:
    rest, often, kinds, again = {}, {}, {}, {}
    for reader in readers:
        runs = reader.scores.runs["retrieval"]
        active = {head: tuple(run[head] > 0 for run in runs) for head in reader.heads(RETRIEVAL)}
        changing = {head: when for head, when in active.items() if not all(when)}
        rest[reader.name] = len(set(changing.values()))
        often[reader.name] = mean([mean(when) for when in changing.values()] or [0.0])
        kinds[reader.name] = len(set(zip(*active.values(), strict=True)))
        first, second = (copy_scores(reader.model, reader.held.prompts, min_recall=None).runs for _ in range(2))
        again[reader.name] = float(first == second)
    return _row(
        min(max(rest.values()) - 2, min(again.values()) - 1),
        {
            "{} heads active now and then, each in runs of its own": rest,
            "in {:.0%} of the runs on average": often,
            "{} different sets of heads": kinds,
        },
        {"the same prompts again make the same heads active (1 is yes): {:.0f}": again},
    )


def causal(removals: Mapping[str, Removals]) -> Measured:
    left = {name: r.every for name, r in removals.items()}
    invented = {name: r.invented for name, r in removals.items()}
    return _row(
        min(min(0.2 - left[name], invented[name] - 0.5) for name in left),
        {
            "{:.1%} of answer tokens right without the heads of 0.1 or more": left,
            "{:.0%} of the wrong ones are words that are not in the needle": invented,
            "{:.1%} right where the heads attend evenly instead": {n: r.every_uniform for n, r in removals.items()},
        },
        {"{:.0%} right without other heads of their layers": {n: mean(r.every_others) for n, r in removals.items()}},
    )


def random_heads(removals: Mapping[str, Removals]) -> Measured:
    loss = {name: r.few - mean(r.anywhere) for name, r in removals.items()}
    most = max(loss, key=lambda name: loss[name])
    low, high = bootstrap_interval(removals[most].anywhere)
    return _row(
        0.05 - loss[most] - 1e-9,  # "below" leaves out the bound
        {
            "{:.1%} of answer tokens lost without as many other heads of any layer": loss,
            "{:.0%} in the worst draw": {name: r.few - min(r.anywhere) for name, r in removals.items()},
        },
        {"{:.1%} lost without other heads of the same layers": {
            name: r.intact - mean(r.every_others) for name, r in removals.items()
        }},
        interval=(0.05 - removals[most].few + low, 0.05 - removals[most].few + high),
    )  # fmt: skip


def chain_of_thought(reader: Reader, run: Run) -> Measured:
    """Questions answered in two written steps; the second asks for whom the first named."""
    questions = [two_steps(Random(7000 + 100 * run.seed + number)) for number in range(24)]
    strong = reader.heads(STRONG)
    intact, left = answered(reader, questions), answered(reader, questions, strong)
    others = [answered(reader, questions, one) for one in reader.controls(strong, "layer", run)[:10]]
    lost, control = 1 - left / max(intact, 1e-9), 1 - mean(others) / max(intact, 1e-9)
    return _row(
        min(intact - 0.5, lost - 0.5, lost - 2 * control),
        {
            "{:.0%} of the answers right": {reader.name: intact},
            "{:.0%} without the heads of 0.5 or more": {reader.name: left},
        },
        {"{:.0%} without as many other heads of the same layers": {reader.name: mean(others)}},
    )


def intrinsic_knowledge(readers: list[Reader], run: Run) -> Measured:
    """Relative losses without the strong heads, on what must be retrieved and on what stands in the weights."""
    lost: dict[str, Tensor] = {}
    control: dict[str, float] = {}
    margins: list[float] = []
    intervals: list[tuple[float, float]] = []
    for reader in readers:
        tasks = tasks_of(reader, run)
        intact = {task: measure() for task, measure in tasks.items()}
        known = [task for task in tasks if task != "needles" and float(intact[task].mean()) >= KNOWN.get(task, 0.5)]

        def losses(heads: Sequence[Head], task: str, reader=reader, tasks=tasks, intact=intact) -> Tensor:
            with reader.without(heads):
                return (intact[task] - tasks[task]()) / intact[task].mean()

        strong, drawn = reader.heads(STRONG), reader.controls(reader.heads(STRONG), "layer", run)[:5]
        for task in ("needles", *known):
            name = f"{reader.name}, {task}"
            lost[name] = losses(strong, task)
            control[name] = mean([float(losses(one, task).mean()) for one in drawn])
            if task != "needles":
                needles = lost[f"{reader.name}, needles"]
                margins.append(float(needles.mean() - lost[name].mean()))
                count = min(len(needles), len(lost[name]))
                both = needles[:count].numpy(), lost[name][:count].numpy()
                intervals.append(paired_bootstrap_interval(*both, seed=run.seed))
    return _row(
        min(margins, default=-1.0),
        {"{:.1%} of the accuracy lost": {name: float(values.mean()) for name, values in lost.items()}},
        {"{:.1%} lost without other heads of the same layers": control},
        interval=min(intervals, default=None),
    )


def explain(readers: list[Reader], run: Run) -> Measured:
    """How many right answer tokens some head was looking at when they were said."""
    covered, others = {}, {}
    for reader in readers:
        prompts = reader.held.prompts
        found = copy_hits(reader.model, prompts)
        right = [
            (torch.tensor(said) == answer_of(one)) & torch.tensor(must)
            for (said, _), one, must in zip(found, prompts, reader.held.unguessed, strict=True)
        ]

        def share(heads: Sequence[Head], found=found, right=right) -> float:
            seen = [torch.stack([hits[head] for head in heads]).any(0) for _, hits in found]
            return float(torch.cat([at[rows] for at, rows in zip(seen, right, strict=True)]).double().mean())

        strong = reader.heads(STRONG)
        covered[reader.name] = share(strong)
        others[reader.name] = mean([share(one) for one in reader.controls(strong, "layer", run)])
    return _row(
        min(covered.values()) - 0.9,
        {"a head of 0.5 or more looks at {:.1%} of the copied tokens": covered},
        {"as many other heads of the same layers at {:.1%}": others},
    )


def hand_built(run: Run) -> Measured:
    prompts = needle("symbols", words=range(4, 60), marks=(2, 3), lengths=(48, 96), depths=DEPTHS, seed=run.seed)
    best, rest = {}, {}
    for module in (planted, planted_llama):
        scores = retrieval_scores(module.build().to(run.device), prompts, max_new_tokens=6).tensor()
        best[module.NAME] = float(scores[module.INDUCTION.layer, module.INDUCTION.head])
        scores[module.INDUCTION.layer, module.INDUCTION.head] = 0
        rest[module.NAME] = float(scores.max())
    margin = min(min(best.values()) - 0.999, 0.01 - max(rest.values()))
    return _row(margin, {"the copying head {:.4f}": best, "every other at most {:.4f}": rest})


def teacher_forced(readers: list[Reader]) -> Measured:
    apart, count = dict.fromkeys((r.name for r in readers), 0.0), dict.fromkeys((r.name for r in readers), 0)
    for reader in readers:
        for size in sorted({len(answer_of(one)) for one in reader.held.prompts}):
            prompts = [one for one in reader.held.prompts if len(answer_of(one)) == size]
            said = greedy_answers(reader.model, prompts, max_new_tokens=size, stop=[])
            prompts = [one for one, answer in zip(prompts, said, strict=True) if answer == answer_of(one).tolist()]
            if prompts:
                decoded = retrieval_scores(reader.model, prompts, max_new_tokens=size, stop=[]).tensor()
                forced = copy_scores(reader.model, prompts).tensor()
                apart[reader.name] = max(apart[reader.name], float((decoded - forced).abs().max()))
                count[reader.name] += len(prompts)
    margin = min(1e-6 - max(apart.values()), min(count.values()) - 1)
    return _row(margin, {"largest difference {:.1e}": apart, "{} prompts answered exactly": count})


def stable(readers: list[Reader]) -> Measured:
    together, blank = {}, {}
    for reader in readers:
        middle = 0.75 * reader.longest / 2
        short, long = (
            [one for one in reader.held.prompts if (len(ids_of(one)) > middle) == far] for far in (False, True)
        )
        together[reader.name] = _correlation(copy_scores(reader.model, short), copy_scores(reader.model, long))
        random = torch.tensor(untrained(reader), dtype=torch.float64)
        blank[reader.name] = float(torch.corrcoef(torch.stack([reader.scores.tensor().flatten(), random]))[0, 1])
    return _row(min(together.values()) - 0.9, {"correlation {:.3f}": together}, {"with random weights {:.2f}": blank})


def _correlation(one: HeadMap, other: HeadMap) -> float:
    """Pearson's, over heads: most scores are about 0, and the order of those means nothing."""
    return float(torch.corrcoef(torch.stack([one.tensor().flatten(), other.tensor().flatten()]))[0, 1])


PLACE = re.compile(r"\{[^}]*\}( of)?")
Number = float | int
Shown = Mapping[
    str, Mapping[str, Number]
]  # what was measured, with a place for the number -> model (or task) -> number


def _row(
    margin: Number,
    measured: Shown,
    control: Shown | None = None,
    *,
    interval: tuple[float, float] | None = None,
    note: str = "",
) -> Measured:
    """A row that holds where its margin is 0 or more."""

    def words(shown: Shown) -> str:
        names = dict.fromkeys(name for values in shown.values() for name in values)
        return "; ".join(
            f"{name}: " + ", ".join(text.format(values[name]) for text, values in shown.items() if name in values)
            for name in names
        )

    values = {
        f"{name}: {PLACE.sub('', text).strip()}": float(value)
        for text, numbers in {**measured, **(control or {})}.items()
        for name, value in numbers.items()
    }
    return Measured(
        measured="; ".join(filter(None, [words(measured), note])),
        control=None if control is None else words(control),
        holds=margin >= 0,
        margin=float(margin),
        interval=interval,
        values=values,
    )


def draw(run: Run, readers: list[Reader], removals: Mapping[str, Removals], extended: Extension) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 3, width=4.4) as (scores, right, longer):
        ranked = {one.name: sorted(one.scores.tensor().flatten().tolist(), reverse=True) for one in readers}
        most = min(12, *map(len, ranked.values()))
        shown = {name: values[:most] for name, values in ranked.items()}
        lines(scores, range(1, most + 1), shown, x="head, by its score", y="retrieval score", title="Scores")
        scores.axhline(RETRIEVAL, color="#a9aeb4", linewidth=1)
        sets = {
            "all heads": [r.intact for r in removals.values()],
            "no retrieval heads": [r.every for r in removals.values()],
            "these attend evenly": [r.every_uniform for r in removals.values()],
            "no others of their layers": [mean(r.every_others) for r in removals.values()],
            "no others of any layer": [mean(r.anywhere) for r in removals.values()],
        }
        bars(right, list(removals), sets, y="answer tokens right", title="Answers without some heads")
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=8)
        before = readers[0].scores.tensor().flatten().tolist()
        longer.plot([0, 1], [0, 1], color="#a9aeb4", linewidth=1)
        longer.scatter(before, extended.scores.tensor().flatten().tolist(), color=COLOURS[0])
        length = 2 * readers[0].longest
        longer.set_title(f"Scores after training on {length} tokens")
        longer.set(xlabel="score before", ylabel="score after")
    run.figures.append(path)
