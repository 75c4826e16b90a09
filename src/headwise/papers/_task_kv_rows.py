"""The rows of task_kv.py, one function for each, and its picture."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from headwise.attend.edits import EditRows, ScaleHeads
from headwise.hf.session import steer
from headwise.memory.task_kv import TaskKVCache
from headwise.ops.observation import observed_attention
from headwise.papers._task_kv_setup import (
    BUDGETS,
    COMMON,
    EQUAL,
    FULL,
    MAP,
    MEAN,
    METHODS,
    MORE_RECENT,
    NONE,
    RANDOM,
    RECENT,
    SINK,
    SNAP,
    STREAMING,
    TASK,
    WAYS,
    Accuracies,
    Prompts,
    Question,
    Reader,
    forward,
)
from headwise.papers.running import Run
from headwise.papers.statistics import bootstrap_interval, mean, paired_bootstrap_interval
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure, lines
from headwise.tasks.mixture import Mixture

PAIRS, REMOVED, DRAWS = 128, 64, 4  # texts whose splits are compared; questions without some heads; draws of others
SIX = ("needles", "repeats", "indirect_objects", "coloured_objects", "addition", "bigrams")
PART = tuple[float, float, float]  # a margin and its interval


@dataclass
class Splits:
    """For the first texts of each task: which key heads Task-KV keeps whole, and what these and the others look at.

    full, drawn: of each text the (layer, head) pairs of Task-KV and of a random split. mass, spread: of each text the
    difference others - full of the attention on the answer, and full - others of the normalised entropy;
    drawn_mass, drawn_spread: the same for random splits of the live heads.
    """

    full: dict[tuple[str, str], list[set[tuple[int, int]]]] = field(default_factory=dict)
    drawn: dict[tuple[str, str], list[set[tuple[int, int]]]] = field(default_factory=dict)
    mass: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    drawn_mass: list[float] = field(default_factory=list)
    drawn_spread: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, readers: Sequence[Reader], run: Run) -> "Splits":
        made = cls()
        for reader in readers:
            for task, questions in reader.questions.items():
                run.log(f"{reader.name}: splits of {task}")
                made.add(reader, task, Prompts.of(reader, questions[:PAIRS], WAYS[0]), run.seed)
        return made

    def add(self, reader: Reader, task: str, prompts: Prompts, seed: int) -> None:
        """The splits of a batch. Budgets of 60 %: they hold f full heads in every layer."""
        place = reader.name, task
        self.full[place] = _sets(prompts.full_heads(reader.policy(TASK, 0.6, seed)))
        self.drawn[place] = _sets(prompts.full_heads(reader.policy(RANDOM, 0.6, seed)))
        farthest = prompts.full_heads(reader.policy(TASK, 0.6, seed, supplement=0))
        live = live_key_heads(reader)
        mass, spread = looks(prompts)
        generator = torch.Generator().manual_seed(seed)
        for row, chosen in enumerate(_sets(farthest)):
            self.mass.append(-_contrast(mass, row, chosen, live))
            self.spread.append(_contrast(spread, row, chosen, live))
            random: set[tuple[int, int]] = set()
            for layer in range(len(reader.kv_heads)):
                pool = sorted(head for at, head in live if at == layer)
                count = sum(at == layer and (at, head) in live for at, head in chosen)
                picked = torch.randperm(len(pool), generator=generator)[:count].tolist()
                random |= {(layer, pool[i]) for i in picked}
            self.drawn_mass.append(-_contrast(mass, row, random, live))
            self.drawn_spread.append(_contrast(spread, row, random, live))


def _sets(layers: Sequence[Tensor]) -> list[set[tuple[int, int]]]:
    return [
        {(layer, head) for layer, full in enumerate(layers) for head in full[row].tolist()}
        for row in range(len(layers[0]))
    ]


def live_key_heads(reader: Reader) -> set[tuple[int, int]]:
    return {(head.layer, head.head * reader.kv_heads[head.layer] // reader.heads) for head in reader.live}


def looks(prompts: Prompts) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer `[b n]`: the attention of the last queries on the answer, and its entropy over log of the keys."""
    masses, spreads = [], []
    for one in prompts.cache.prompts():
        seen = observed_attention(one.query, one.key, scale=one.scale, real=one.real)
        masses.append((seen * prompts.important[:, None]).sum(-1).cpu())
        entropy = -torch.special.xlogy(seen, seen).sum(-1)
        spreads.append((entropy / prompts.real.sum(1, keepdim=True).log()).cpu())
    return masses, spreads


def _contrast(values: list[Tensor], row: int, chosen: set, live: set) -> float:
    """Mean over the chosen live heads of a text less that over the other live heads, layer by layer."""
    found = []
    for layer, of_layer in enumerate(values):
        ours = [float(of_layer[row, head]) for at, head in live if at == layer and (at, head) in chosen]
        others = [float(of_layer[row, head]) for at, head in live if at == layer and (at, head) not in chosen]
        if ours and others:
            found.append(mean(ours) - mean(others))
    return mean(found) if found else 0.0


def memory(readers: Sequence[Reader]) -> Measured:
    parts, said, beside = [], [], []
    for reader in readers:
        model: Any = reader.model
        sizes, ours = {}, {}
        for length in (128, 256, 512):
            ids = torch.zeros(1, length, dtype=torch.long, device=reader.device)
            real = torch.ones_like(ids, dtype=torch.bool)
            cache: Any = DynamicCache(config=model.config)
            forward(model, cache, ids, real, keep=1)
            sizes[length] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            small = TaskKVCache(model, 0.4, **COMMON)
            forward(model, small, ids, real, keep=1)
            ours[length] = small.nbytes
        weights = sum(weight.nbytes for weight in model.parameters())
        long = sizes[512] / 512 * 32768
        growth = [sizes[256] / sizes[128], sizes[512] / sizes[256]]
        parts += [0.01 - max(abs(ratio - 2) for ratio in growth) / 2, long / weights - 1]
        said.append(
            f"{reader.name}: {', '.join(f'{size / 1024:.0f}' for size in sizes.values())} KiB for 128, 256 and 512 "
            f"tokens, {long / 2**20:.0f} MiB for 32,768 (weights {weights / 2**20:.1f} MiB)"
        )
        beside.append(f"{reader.name}: {', '.join(f'{size / 1024:.0f}' for size in ours.values())} KiB")
    margin = min(parts)
    return Measured(measured="; ".join(said), control="; ".join(beside), holds=margin >= 0, margin=margin)


def tasks_differ(readers: Sequence[Reader], found: Accuracies, run: Run) -> Measured:
    alike, apart, low, high = importance(readers[0], run)
    other = [task for task in found.tasks if "needles" not in task and "questions" not in task]
    needles = [task for task in found.tasks if task not in other]
    beyond = _difference(found, TASK, MAP, 0.4, WAYS[0], other)
    known = _difference(found, TASK, MAP, 0.4, WAYS[0], needles)
    return _row(
        [(alike - apart, low, high), beyond],
        f"importance of heads correlates {apart:.2f} between tasks and {alike:.2f} between halves of one task "
        f"({_interval(low, high)} for the difference); Task-KV less the map of retrieval heads on the tasks that are "
        f"no needles {_points(beyond)}",
        f"on needles {_points(known)}",
        {"correlation between tasks": apart, "within a task": alike, "Task-KV - map": beyond[0]},
    )


def importance(reader: Reader, run: Run) -> tuple[float, float, float, float]:
    """How far what is lost without single heads correlates: within a task, between tasks, and the interval of the
    difference over pairs of tasks."""
    run.log("removing single heads of the tasks model")
    mixture, generator = Mixture(), torch.Generator().manual_seed(8000 + run.seed)
    episodes = [mixture.episodes(task, 48, 64, generator, sums=5) for task in SIX]
    ids = torch.cat([one.input_ids for one in episodes]).to(reader.device)
    asked = torch.cat([one.answers for one in episodes])[:, 1:]
    model: Any = reader.model

    @torch.no_grad()
    def right() -> Tensor:
        said = model(input_ids=ids).logits[:, :-1].argmax(-1)
        hits = ((said == ids[:, 1:]).cpu() & asked).sum(1) / asked.sum(1)
        return hits.view(len(SIX), 2, 24).mean(-1)

    intact, lost = right(), []
    for head in reader.live:
        with steer(model, ScaleHeads(0.0, heads=[head])):
            lost.append(intact - right())
    table = torch.stack(lost, -1)  # (task, half, head)
    names = [task for task in range(len(SIX)) if float(table[task].mean(0).max()) >= 0.05]

    def together(one: Tensor, other: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([one, other]))[0, 1].nan_to_num())

    within = {task: together(table[task, 0], table[task, 1]) for task in names}
    between, gaps = [], []
    for a, b in combinations(names, 2):
        both = (together(table[a, 0], table[b, 1]) + together(table[a, 1], table[b, 0])) / 2
        between.append(both)
        gaps.append((within[a] + within[b]) / 2 - both)
    low, high = bootstrap_interval(gaps, seed=run.seed)
    return mean(list(within.values())), mean(between), low, high


def heterogeneous(readers: Sequence[Reader], run: Run) -> Measured:
    lost: dict[str, list[float]] = {"farthest": [], "others": []}
    intact: list[float] = []
    for reader in readers:
        for task, questions in reader.questions.items():
            run.log(f"{reader.name}: {task} without some heads")
            one, far, other = removed(reader, questions[:REMOVED], run.seed)
            intact += one
            lost["farthest"] += far
            lost["others"] += other
    low, high = paired_bootstrap_interval(lost["others"], lost["farthest"], seed=run.seed)
    kept, far, other = mean(intact), mean(lost["farthest"]), mean(lost["others"])
    return _row(
        [(other - far, low, high)],
        f"answers right {kept:.1%}; without the heads farthest from the centre {far:.1%}",
        f"without as many others {other:.1%} ({_points((other - far, low, high))} above)",
        {"intact": kept, "without the farthest": far, "without others": other},
    )


def removed(reader: Reader, questions: Sequence[Question], seed: int) -> tuple[list[float], list[float], list[float]]:
    """For each question: right with all heads, without the farthest of its text, without others (mean of draws)."""
    prompts = Prompts.of(reader, questions, WAYS[0])
    chosen = _sets(prompts.full_heads(reader.policy(TASK, 0.6, seed, supplement=0)))
    live = live_key_heads(reader)
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(DRAWS):
        drawn = []
        for text in chosen:
            others: set[tuple[int, int]] = set()
            for layer in range(len(reader.kv_heads)):
                pool = sorted(head for at, head in live if at == layer and (at, head) not in text)
                count = sum(at == layer for at, _ in text)
                picked = torch.randperm(len(pool), generator=generator)[:count].tolist()
                others |= {(layer, pool[i]) for i in picked}
            drawn.append(others)
        draws.append(_answered(reader, questions, drawn))
    average = [mean(list(of_text)) for of_text in zip(*draws, strict=True)]
    return _answered(reader, questions, None), _answered(reader, questions, chosen), average


def _answered(reader: Reader, questions: Sequence[Question], without: list[set[tuple[int, int]]] | None) -> list[float]:
    """Whether each answer is right when its own key heads are removed from the first token on."""
    texts = [torch.cat([one.context, one.question, one.answer[:-1]]) for one in questions]
    width = max(map(len, texts))
    ids, real = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :], real[row, width - len(text) :] = text, True
    scale = torch.ones(len(texts), len(reader.kv_heads), reader.heads)
    for row, heads in enumerate(without or []):
        for layer, head in heads:
            size = reader.heads // reader.kv_heads[layer]
            scale[row, layer, head * size : (head + 1) * size] = 0
    longest = max(len(one.answer) for one in questions)
    with steer(reader.model, *([] if without is None else [ScaleHeads(scale.to(reader.device))])):
        said = forward(reader.model, None, ids.to(reader.device), real.to(reader.device), keep=longest).argmax(-1).cpu()
    return [float((said[row, longest - len(one.answer) :] == one.answer).all()) for row, one in enumerate(questions)]


def others(splits: Splits) -> Measured:
    mass, spread = (_sampled(values) for values in (splits.mass, splits.spread))
    drawn = [_sampled(values) for values in (splits.drawn_mass, splits.drawn_spread)]
    return _row(
        [mass, spread],
        f"the other heads put {mass[0]:+.3f} {_interval(*mass[1:], form='.3f')} more of their attention on the answer, "
        f"and their normalised entropy is {spread[0]:+.3f} {_interval(*spread[1:], form='.3f')} lower",
        f"random splits {drawn[0][0]:+.3f} {_interval(*drawn[0][1:], form='.3f')} and {drawn[1][0]:+.3f} "
        f"{_interval(*drawn[1][1:], form='.3f')}",
        {"mass, others - farthest": mass[0], "entropy, farthest - others": spread[0]},
    )


def preserve(readers: Sequence[Reader], found: Accuracies) -> Measured:
    task, rival = (_difference(found, method, FULL, 0.4, WAYS[0]) for method in (TASK, RANDOM))
    shares = [share for key, many in found.shares.items() if key[3:] == (TASK, 0.4) for share in many]
    holds = all(_holds_what_it_should(reader) for reader in readers)
    bytes_kept = max(shares)
    ok = 0.4 + 1e-9 - bytes_kept if holds else -1.0
    return _row(
        [(min(ok, 0.0) + task[0] + 0.03, min(ok, 0.0) + task[1] + 0.03, min(ok, 0.0) + task[2] + 0.03)],
        f"at {bytes_kept:.1%} of the bytes at most, full heads whole and sinks and recent tokens everywhere: "
        f"{'yes' if holds else 'no'}; answers less those of the full cache {_points(task)}",
        f"random split {_points(rival)}",
        {"Task-KV - full cache": task[0], "random split - full cache": rival[0], "bytes": bytes_kept},
    )


def _holds_what_it_should(reader: Reader) -> bool:
    """Full heads hold every token, all others the first and last real ones and nothing of padding."""
    prompts = Prompts.of(reader, next(iter(reader.questions.values()))[:16], WAYS[0])
    cache = prompts.cache.fork(reader.policy(TASK, 0.4, 0))
    good = True
    for layer, full in enumerate(cache.heterogeneous):
        for row, heads in enumerate(cache.kept_positions(layer)):
            ids = torch.nonzero(prompts.real[row])[:, 0].tolist()
            always = {*ids[:SINK], *ids[-RECENT:]}
            whole = set() if full is None else set(full[row].tolist())
            for head, kept in enumerate(heads):
                good &= set(ids) <= set(kept) if head in whole else always <= set(kept) <= set(ids)
    return good


def middle(found: Accuracies) -> Measured:
    gains = {name: _difference(found, TASK, name, 0.4, WAYS[0]) for name in (MORE_RECENT, NONE, MEAN)}
    second = _difference(found, TASK, MORE_RECENT, 0.4, WAYS[1])
    return _row(
        [gains[MORE_RECENT]],
        f"with middle activations {_points(gains[MORE_RECENT])} against as many more recent tokens "
        f"({_points(second)} where the question comes in a second turn)",
        f"against none {_points(gains[NONE])}, against the mean of what is dropped {_points(gains[MEAN])}",
        {name: gain[0] for name, gain in gains.items()},
    )


def overlap(one: set, other: set) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0


def overlaps(table: dict[tuple[str, str], list[set[tuple[int, int]]]], model: str) -> tuple[list[float], list[float]]:
    """Of each text of a model's two tasks: overlap with the next text of its task, and with one of the other task."""
    first, second = (table[place] for place in table if place[0] == model)
    count = min(len(first), len(second))
    same, different = [], []
    for i in range(count):
        j = (i + 1) % count
        same.append((overlap(first[i], first[j]) + overlap(second[i], second[j])) / 2)
        different.append((overlap(first[i], second[j]) + overlap(second[i], first[j])) / 2)
    return same, different


def separator(found: Accuracies, splits: Splits) -> Measured:
    parts, said, beside, values = [], [], [], {}
    for model in dict.fromkeys(model for model, _ in splits.full):
        same, different = overlaps(splits.full, model)
        parts.append((mean(same) - mean(different), *paired_bootstrap_interval(same, different)))
        said.append(f"{model}: overlap {mean(same):.2f} within a task, {mean(different):.2f} between two")
        drawn = overlaps(splits.drawn, model)
        beside.append(f"{model}: {mean(drawn[0]):.2f} and {mean(drawn[1]):.2f}")
        values |= {f"{model}: overlap within": mean(same), f"{model}: overlap between": mean(different)}
    gain = _difference(found, TASK, RANDOM, 0.4, WAYS[0])
    equal = _difference(found, TASK, EQUAL, 0.4, WAYS[0])
    # At least 5 points, and an interval above 0.
    parts.append((gain[0] - 0.05, min(gain[1], gain[0] - 0.05), max(gain[2], gain[0] - 0.05)))
    return _row(
        parts,
        "; ".join(said) + f"; Task-KV less a random split {_points(gain)}",
        f"random splits: {'; '.join(beside)}; Task-KV less no split {_points(equal)}",
        {**values, "Task-KV - random split": gain[0], "Task-KV - no split": equal[0]},
    )


def outperforms(found: Accuracies) -> Measured:
    parts, said, values = [], [], {}
    for budget in (0.4, 0.6):
        gains = {rival: _difference(found, TASK, rival, budget, WAYS[0]) for rival in (STREAMING, SNAP, MAP)}
        parts += gains.values()
        said.append(f"{budget:.0%}: " + ", ".join(f"{_points(gain)} to {rival}" for rival, gain in gains.items()))
    beside = []
    for way in WAYS:
        for budget in BUDGETS:
            scores = {method: mean(found.of_method(method, budget, way)) for method in METHODS if method != FULL}
            values |= {f"{method}, {budget:.0%}, {way}": score for method, score in scores.items()}
            beside.append(
                f"{budget:.0%} {way}: " + ", ".join(f"{method} {score:.0%}" for method, score in scores.items())
            )
        values[f"full cache, {way}"] = mean(found.of_method(FULL, 1.0, way))
        beside.append(f"full cache {way} {values[f'full cache, {way}']:.0%}")
    for way in WAYS:
        for budget in BUDGETS:
            for rival in (FULL, STREAMING, SNAP, EQUAL, RANDOM, MAP):
                gap = _difference(found, TASK, rival, budget, way)
                for end, value in zip(("", ", low", ", high"), gap, strict=True):
                    values[f"Task-KV - {rival}, {budget:.0%}, {way}{end}"] = value
    for task in found.tasks:
        for method in METHODS:
            budget = 1.0 if method == FULL else 0.4
            for way in WAYS:
                values[f"{task}, {method}, 40%, {way}"] = mean(found.of_method(method, budget, way, task))
    return _row(parts, "; ".join(said), "; ".join(beside), values)


def whole(readers: Sequence[Reader]) -> Measured:
    different = 0
    for reader in readers:
        model: Any = reader.model
        questions = next(iter(reader.questions.values()))[:4]
        ids = torch.stack([one.context[:200] for one in questions]).to(reader.device)
        real = (torch.arange(200) >= torch.tensor([[0], [17], [3], [40]])).to(reader.device)
        said = []
        for cache in (DynamicCache(config=model.config), TaskKVCache(model, 1.0, **COMMON, chunked=True)):
            cuts, logits = (0, 150, 180, 181, 182, 200), []
            for start, end in pairwise(cuts):
                logits.append(forward(model, cache, ids[:, start:end], real[:, :end]))
            said.append(torch.cat(logits, 1))
        different += int((said[0] != said[1]).any(-1)[real].sum())
    return Measured(
        measured=f"{different} rows of logits differ in any bit", holds=not different, margin=-float(different)
    )


def mask(readers: Sequence[Reader]) -> Measured:
    apart, plain = 0.0, 0.0
    for reader in readers:
        model: Any = copy.deepcopy(reader.model).double()
        questions = next(iter(reader.questions.values()))[:4]
        ids = torch.stack([one.context[:200] for one in questions]).to(reader.device)
        real = (torch.arange(200) >= torch.tensor([[0], [17], [3], [40]])).to(reader.device)
        cache = TaskKVCache(model, 0.4, **COMMON)
        forward(model, cache, ids[:, :190], real[:, :190])
        said = [forward(model, cache, ids[:, at : at + 1], real[:, : at + 1]) for at in range(190, 200)]
        held = [cache.held(layer) for layer in range(len(cache))]

        def hidden(weights: Tensor, rows: Any, held: list[Tensor] = held) -> Tensor:
            kept = held[rows.call.layer].repeat_interleave(weights.shape[1] // held[0].shape[1], 1)[:, :, None]
            number = torch.arange(rows.call.q.shape[2], device=weights.device)[rows.index]
            kept = kept[..., : weights.shape[-1]] | (number < 190)[:, None]
            new = weights * kept
            return new / new.sum(-1, keepdim=True).clamp_min(1e-300)

        whole = forward(model, None, ids, real)[:, 190:]
        with steer(model, EditRows(hidden)):
            wanted = forward(model, None, ids, real)[:, 190:]
        apart = max(apart, float((torch.cat(said, 1) - wanted).abs().max()))
        plain = max(plain, float((whole - wanted).abs().max()))
    return Measured(
        measured=f"logits at most {apart:.1e} apart",
        control=f"those of the whole cache {plain:.2f} away",
        holds=apart < 1e-8,
        margin=1e-8 - apart if apart != 1e-8 else -1e-12,
        values={"apart": apart, "whole cache": plain},
    )


def measured_bytes(found: Accuracies) -> Measured:
    kept = {
        (method, budget): [s for key, many in found.shares.items() if key[3:] == (method, budget) for s in many]
        for method in METHODS
        for budget in BUDGETS
        if method != FULL
    }
    over = max(max(shares) - budget for (_, budget), shares in kept.items())
    under = max(budget - min(shares) for (_, budget), shares in kept.items())
    margin = min(1e-9 - over, 0.04 - under)
    ranges = [
        f"{budget:.0%}: {min(lows):.1%} to {max(highs):.1%}"
        for budget in BUDGETS
        for lows in [[min(shares) for (_, one), shares in kept.items() if one == budget]]
        for highs in [[max(shares) for (_, one), shares in kept.items() if one == budget]]
    ]
    return Measured(measured="kept at " + ", ".join(ranges), holds=margin >= 0, margin=margin)


# Words and pictures


def _difference(
    found: Accuracies, method: str, rival: str, budget: float, way: str, tasks: Sequence[str] | None = None
) -> PART:
    """Share of answers right under a method less that under a rival, with the paired interval over questions."""
    ours: list[float] = []
    theirs: list[float] = []
    for task in found.tasks if tasks is None else tasks:
        ours += found.of_method(method, budget, way, task)
        theirs += found.of_method(rival, 1.0 if rival == FULL else budget, way, task)
    return (mean(ours) - mean(theirs), *paired_bootstrap_interval(ours, theirs))


def _sampled(values: Sequence[float]) -> PART:
    return (mean(values), *bootstrap_interval(values))


def _row(parts: Sequence[PART], measured: str, control: str, values: dict[str, float]) -> Measured:
    """A row that holds where every part does: its interval is the least of each end."""
    margin, low, high = (min(part[i] for part in parts) for i in range(3))
    return Measured(
        measured=measured, control=control, holds=margin >= 0, margin=margin, interval=(low, high), values=values
    )


def _points(part: PART) -> str:
    return f"{100 * part[0]:+.1f} points [{100 * part[1]:+.1f}, {100 * part[2]:+.1f}]"


def _interval(low: float, high: float, form: str = ".2f") -> str:
    return f"[{low:{form}}, {high:{form}}]"


def draw(run: Run, found: Accuracies) -> None:
    """Answers right against bytes kept, one panel for each way of asking; and task by task at 40 % of the bytes."""
    path = run.out / f"{run.paper.slug}.png"
    methods = [method for method in METHODS if method != FULL]
    percent = [round(100 * budget) for budget in BUDGETS]
    with figure(path, 3, width=5.0, height=3.6) as (*panels, single):
        for axis, way in zip(panels, WAYS, strict=True):
            shown = {
                method: [100 * mean(found.of_method(method, budget, way)) for budget in BUDGETS] for method in methods
            }
            lines(axis, percent, shown, x="bytes kept, %", y="answers right, %", title=f"question {way}")
            axis.axhline(100 * mean(found.of_method(FULL, 1.0, way)), color="#5a626c", lw=1, ls=":")
            axis.text(percent[0], 100 * mean(found.of_method(FULL, 1.0, way)) + 1, "full cache", color="#5a626c")
            axis.set_ylim(0, 102)
            axis.set_xticks(percent)
            if (legend := axis.get_legend()) is not None:
                legend.remove()
        each = {
            method: [100 * mean(found.of_method(method, 0.4, WAYS[0], task)) for task in found.tasks]
            for method in methods
        }
        bars(single, found.tasks, each, y="answers right, %", title="40 % of the bytes, question in the prompt")
        single.tick_params(axis="x", labelsize=8)
    run.figures.append(path)
