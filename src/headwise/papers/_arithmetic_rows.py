"""The rows of arithmetic_heads.py, one function for each, and its picture."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.heads.attribution import logit_attribution, logit_lens
from headwise.heads.effects import centred_logit
from headwise.heads.masses import group_mass
from headwise.heads.patching import path_patch
from headwise.hf.addresses import layout
from headwise.hf.parameter_slices import head_slices
from headwise.papers._arithmetic_setup import (
    DECAY,
    FOUND_ON,
    LETTERS,
    LOST,
    OTHERS,
    SUMS,
    Calculator,
    Nodes,
    Removals,
    Tunings,
    effects_of,
)
from headwise.papers.running import Run
from headwise.papers.statistics import mean, rank_correlation
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, bars, figure, lines

SHARE, WRITTEN, ALIKE, RECOVERED, FORGOTTEN = 0.05, 0.7, 0.6, 0.7, 0.05
DIFFERENT = 0.02


def few_heads(model: Calculator, removals: Removals) -> Measured:
    count = len(layout(model.model).heads())
    needed, reversed_ = removals.needed(removals.by_rank), removals.needed(removals.from_below)
    ranked = model.nodes[FOUND_ON].heads.ranked("effect")[:needed]
    return _row(
        SHARE - needed / count - 1e-9,  # "less than" leaves out the bound
        {"{:.1%} of the heads are enough to lose 30 points": {"additions": needed / count}},
        {
            "a single head is {:.1%}": {"additions": 1 / count},
            "from the other end of the ranking at least {:.1%} are needed": {"additions": reversed_ / count},
        },
        note=f"heads: {', '.join(map(str, ranked))}",
    )


def focus(model: Calculator) -> Measured:
    """Mass of the answering row on operands and operator."""
    masses, parts, others, share = {}, {}, {}, {}
    for task in SUMS:
        asked = model.held[task]
        found = group_mass(model.model, asked.ids, asked.roles)
        table = {role: value.mean(0) for role, value in found.items()}
        total = table["first"] + table["second"] + table["operator"]
        layers = {head.layer for head in model.key}
        rest = [head for head in layout(model.model).heads() if head.layer in layers and head not in model.key]
        for head in model.key:
            name = f"{head}, {task}"
            masses[name] = float(total[head.layer, head.head])
            parts[name] = float(table["operator"][head.layer, head.head])
        others[task] = mean([float(total[head.layer, head.head]) for head in rest])
        share[task] = 3 / asked.ids.shape[1]
    return _row(
        min(masses.values()) - 0.5,
        {"{:.2f} on operands and operator": masses, "{:.2f} of it on the operator": parts},
        {"other heads of the layers {:.2f}": others, "the share of these tokens is {:.2f}": share},
    )


def pivotal(removals: Removals) -> Measured:
    pairs, lost = removals.others[FOUND_ON], removals.lost
    as_much = mean([other >= lost[FOUND_ON] for other in pairs])
    return _row(
        min(lost[FOUND_ON] - LOST, OTHERS - mean(pairs) - 1e-9, OTHERS - lost["repeats"] - 1e-9),
        {"{:.1%} lost without the two key heads": {task: lost[task] for task in (FOUND_ON, "repeats")}},
        {
            "layer-matched pairs lose {:.1%} in the mean": {FOUND_ON: mean(pairs)},
            "{:.1%} in the worst case": {FOUND_ON: max(pairs)},
            "{:.1%} of the pairs lose as much": {FOUND_ON: as_much},
        },
        note=f"key heads {', '.join(map(str, removals.key))}; {len(pairs)} pairs",
    )


@torch.no_grad()
def written(model: Calculator, task: str) -> tuple[dict[str, float], list[float]]:
    """Shares of the answer's centred logit that MLPs, heads and the rest write; what the lens reads at each depth."""
    asked = model.held[task]
    pool = asked.among
    place = (pool == asked.right[:, None]).int().argmax(1)

    def centred(values: Tensor) -> Tensor:
        """`[b ... n]` logits of the candidates -> `[...]` mean of the right one's less the candidates' mean."""
        index = place.view(-1, *[1] * (values.ndim - 1)).expand(*values.shape[:-1], 1).to(values.device)
        return (values.gather(-1, index)[..., 0] - values.mean(-1)).mean(0)

    parts = logit_attribution(model.model, asked.ids, pool)
    whole = float(centred(parts.logits))
    heads = float(centred(parts.heads).nansum())
    shares = {
        "MLPs": float(centred(parts.mlps).sum()) / whole, "heads": heads / whole,
        "embedding": float(centred(parts.rest)) / whole,
    }  # fmt: skip
    return shares, centred(logit_lens(model.model, asked.ids, pool)).tolist()


def mlps(model: Calculator) -> Measured:
    found = {task: written(model, task) for task in (*SUMS, *LETTERS)}
    rises = {task: min(b - a for a, b in zip(found[task][1], found[task][1][1:], strict=False)) for task in SUMS}
    by_mlps = {task: found[task][0]["MLPs"] for task in SUMS}
    lens = "; ".join(f"{task} {', '.join(f'{value:.1f}' for value in found[task][1])}" for task in SUMS)
    return _row(
        min(min(by_mlps.values()) - WRITTEN, min(rises.values())),
        {
            "MLPs write {:.0%} of the result's logit": by_mlps,
            "least change of the lens from a layer to the next {:.2f}": rises,
        },
        {"MLPs write {:.0%}": {task: found[task][0]["MLPs"] for task in LETTERS}},
        note=f"lens before each layer and at the end: {lens}",
    )


def alike(one: Nodes, other: Nodes) -> float:
    return rank_correlation(one.flat(), other.flat())


def transfer(model: Calculator, removals: Removals) -> Measured:
    elsewhere = [task for task in SUMS if task != FOUND_ON]
    together = {task: alike(model.nodes[FOUND_ON], model.nodes[task]) for task in (*elsewhere, *LETTERS)}
    pairs = {task: mean(removals.others[task]) for task in (*elsewhere, "repeats")}
    margins = [
        min(removals.lost[task] - LOST, removals.lost[task] - 2 * pairs[task] - 1e-9, together[task] - ALIKE)
        for task in elsewhere
    ]
    calm = [*LETTERS, "repeats"]
    return _row(
        min(margins),
        {
            "{:.1%} lost without the key heads of additions": {task: removals.lost[task] for task in elsewhere},
            "layer-matched pairs {:.1%}": {task: pairs[task] for task in elsewhere},
            "effects correlate with {:.2f}": {task: together[task] for task in elsewhere},
        },
        {
            "{:.1%} lost": {task: removals.lost[task] for task in calm},
            "pairs {:.1%}": {"repeats": pairs["repeats"]},
            "correlation {:.2f}": {task: together[task] for task in LETTERS},
        },
    )


def tuning_gain(tunings: Tunings) -> Measured:
    before = tunings.before.sums
    gains = {name: way.sums - before for name, way in tunings.ways.items()}
    shares = {name: gain / max(gains["full"], 1e-9) for name, gain in gains.items()}
    return _row(
        min(shares["precise"] - RECOVERED, 0.6 - before),
        {
            "{:.1%} of the results right": {"before": before, "precise": tunings.ways["precise"].sums},
            "{:.0%} of the gain of full tuning": {"precise": shares["precise"]},
            "{} entries": {"precise": tunings.ways["precise"].entries},
        },
        {
            "{:.1%} right": {name: way.sums for name, way in tunings.ways.items() if name != "precise"},
            "{:.0%} of the gain": {name: share for name, share in shares.items() if name not in ("precise", "full")},
            "{:} entries": {name: way.entries for name, way in tunings.ways.items() if name != "precise"},
        },
        note=f"heads {', '.join(map(str, tunings.heads))} and the MLP of layer {tunings.mlp}",
    )


def no_compromise(tunings: Tunings) -> Measured:
    before, ways = tunings.before, tunings.ways
    lost = {
        name: {"repeats": before.repeats - way.repeats, "letters": before.letters - way.letters}
        for name, way in ways.items()
    }
    mine, full = lost["precise"], lost["full"]
    return _row(
        min(FORGOTTEN - max(mine.values()) - 1e-9, sum(full.values()) - sum(mine.values())),
        {f"{{:.1%}} of the {what} lost": {"precise": mine[what]} for what in mine},
        {
            f"{{:.1%}} of the {what} lost": {name: lost[name][what] for name in ways if name != "precise"}
            for what in mine
        },
        note=f"before: {before.repeats:.1%} of repeats and {before.letters:.1%} of letters right",
    )


def same_prompt(model: Calculator) -> Measured:
    asked = model.held[FOUND_ON]
    metric = centred_logit(asked.right[:32], asked.among[:32])
    nodes = [*layout(model.model).heads(), "mlp:0"]
    found = path_patch(model.model, asked.ids[:32], asked.ids[:32].clone(), metric, senders=nodes)
    assert found.mlps is not None
    most = max(float(found.heads.abs().max()), float(found.mlps[:, 0].abs().max()))
    return _row(-most, {"largest effect {:.1e}": {"all nodes": most}})


def two_questions(model: Calculator) -> Measured:
    kinds = {kind: effects_of(model.model, FOUND_ON, 7000 + model.seed, kind) for kind in ("operands", "operator")}
    again = effects_of(model.model, FOUND_ON, 8000 + model.seed, "operands")
    flat = {kind: torch.tensor(Nodes.of(one).flat()) for kind, one in kinds.items()}
    apart = (flat["operands"] - flat["operator"]).abs()
    same = (flat["operands"] - torch.tensor(Nodes.of(again).flat())).abs()
    tops = {kind: ", ".join(map(str, Nodes.of(one).key(3))) for kind, one in kinds.items()}
    return _row(
        float(apart.max()) - DIFFERENT,
        {"largest difference {:.3f} of the whole effect": {FOUND_ON: float(apart.max())}},
        {"between two lots of changed operands {:.3f}": {FOUND_ON: float(same.max())}},
        note=f"strongest heads for operands {tops['operands']}, for the operator {tops['operator']}",
    )


def frozen(tunings: Tunings) -> Measured:
    before, after = tunings.before.model, tunings.ways["precise"].model
    found = head_slices(before, {head.layer for head in tunings.heads})
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in before.named_parameters()}
    for head in tunings.heads:
        for part in "qkvo":
            for one in found.slices[head, part]:
                masks[one.name].index_fill_(one.axis, torch.tensor(one.index), True)
    for name, mask in masks.items():
        if name.startswith(f"model.layers.{tunings.mlp}.mlp."):
            mask.fill_(True)
    outside = inside = chosen = 0
    for name, parameter in before.named_parameters():
        differ = parameter.view(torch.int32) != after.get_parameter(name).view(torch.int32)
        outside += int((differ & ~masks[name]).sum())
        inside += int((differ & masks[name]).sum())
        chosen += int(masks[name].sum())
    return _row(
        min(-float(outside), inside / chosen - 0.9),
        {"{} entries outside changed": {"precise": outside}, "{:.1%} inside": {"precise": inside / chosen}},
        note=f"weight decay {DECAY}, {chosen} entries chosen",
    )


PLACE = re.compile(r"\{[^}]*\}( of)?")
Number = float | int
Shown = Mapping[str, Mapping[str, Number]]  # what was measured, with a place for the number -> task or way -> number


def _row(margin: Number, measured: Shown, control: Shown | None = None, *, note: str = "") -> Measured:
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
        values=values,
    )


def draw(run: Run, model: Calculator, removals: Removals, tunings: Tunings) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 4, width=4.2, height=3.6) as (heads, pairs, lens, tuned):
        ranked = model.nodes[FOUND_ON].heads.ranked("effect")[:8]
        shown = {
            task: [model.nodes[task].heads.of("effect")[head] or 0.0 for head in ranked]
            for task in (FOUND_ON, "subtract-prefix", "first-infix")
        }
        bars(
            heads, [str(head) for head in ranked], shown, y="share of the effect", title="Strongest heads of additions"
        )
        pairs.hist([100 * one for one in removals.others[FOUND_ON]], bins=20, color=COLOURS[0], label="other pairs")
        pairs.axvline(100 * removals.lost[FOUND_ON], color=COLOURS[1], label=_named(removals.key))
        pairs.set(xlabel="points of addition accuracy lost", ylabel="pairs", title="Pairs of the same layers removed")
        pairs.legend()
        depths = range(layout(model.model).main.layers + 1)
        read = {task: written(model, task)[1] for task in ("add-infix", "subtract-infix", "first-infix", "last-infix")}
        lines(lens, depths, read, x="layers read", y="answer's logit over the mean", title="Logit lens")
        ways = {"before": tunings.before, **tunings.ways}
        names = ["before", "full", "precise", "others,\nsame MLP", "others,\nother MLP", "low rank"]
        series = {
            "sums": [way.sums for way in ways.values()],
            "letters": [way.letters for way in ways.values()],
            "repeats": [way.repeats for way in ways.values()],
        }
        bars(tuned, names, series, y="accuracy", title="An early checkpoint tuned on sums")
        tuned.tick_params(axis="x", labelsize=7)
        tuned.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8)
    run.figures.append(path)


def _named(heads: list[Head]) -> str:
    return " and ".join(map(str, heads))
