"""The rows of multiple_choice_circuit.py: what is measured, and the verdict that follows from the written criterion."""

from collections.abc import Mapping
from itertools import combinations
from random import Random
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.heads.attribution import logit_attribution
from headwise.heads.categories import CategoryThresholds, categorize_heads
from headwise.heads.masses import group_mass
from headwise.papers import _choice_setup as setup
from headwise.papers._choice_setup import OPTIONS, Study, kept, nodes_of, output_set
from headwise.papers.running import Run
from headwise.papers.statistics import bootstrap_interval, mean
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure, head_matrix, lines
from headwise.specimens.registry import load_specimen
from headwise.tasks.choice_questions import choice_prompts


def output_nodes(study: Study) -> Measured:
    margins, shares, others, sizes, said = [], {}, {}, {}, []
    for labels in ("standard", "random"):
        chosen, effects = output_set(study, labels), study.effects(labels, held=True)
        every, draw = list(nodes_of(effects, study.live)), Random(study.seed)
        shares[labels] = kept(effects, study.live, chosen)
        others[labels] = mean([kept(effects, study.live, draw.sample(every, len(chosen))) for _ in range(200)])
        sizes[labels] = len(chosen)
        margins.append(min(shares[labels] - 0.8, shares[labels] - 2 * others[labels]))
        said.append(f"{labels}: {', '.join(map(str, chosen))}")
    return _row(
        min(margins),
        {"{} nodes": sizes, "keep {:.0%} of the label's logit": shares},
        {"as many random live nodes keep {:.0%}": others},
        note="; ".join(said),
    )


def categorize(study: Study) -> Measured:
    first = study.heads["standard"]
    again = categorize_heads(study.model, study.asked["standard"].held)
    chosen = [node for node in output_set(study, "standard") if isinstance(node, Head)]
    named = {head: first.categories[head] for head in chosen}
    same = mean([float(first.categories[head] == again.categories[head]) for head in chosen] or [0.0])
    placed = mean([float(name != "none") for name in named.values()] or [0.0])
    correct = sum(name == "correct letter" for name in named.values())
    rest = [head for head in study.live if head not in chosen]
    others = mean([float(first.categories[head] != "none") for head in rest] or [0.0])
    return _row(
        min(placed - 1, same - 1, correct - 1),
        {
            "{:.0%} of the heads among the output nodes fall into a category": {"standard": placed},
            "{} into correct letter": {"standard": correct},
            "{:.0%} into the same one on other prompts": {"standard": same},
        },
        {"{:.0%} of the other live heads fall into one": {"standard": others}},
        note="; ".join(f"{head} {name}" for head, name in named.items()) + f" (thresholds: {CategoryThresholds()})",
    )


def mixed(study: Study) -> Measured:
    share, control = {}, {}
    for labels in ("standard", "random"):
        whole = study.right(study.asked[labels].held)
        for part in "qkv":
            share[f"{labels} {part}"] = study.projected(labels, part, 3) / whole
            control[f"{labels} {part}"] = mean(
                [study.projected(labels, part, 3, random=study.seed + i) / whole for i in range(setup.DRAWS)]
            )
    works = max(share[f"standard {part}"] for part in "qkv") - 0.95
    fails = 0.95 - min(share[f"random {part}"] for part in "qkv") - 1e-9  # "less than" leaves out the bound
    return _row(
        min(works, fails),
        {"{:.0%} of the accuracy with three directions": share},
        {"{:.0%} with random ones": control},
    )


def compress(study: Study) -> Measured:
    prompts = study.asked["standard"].held
    whole, left = study.right(prompts), study.projected("standard", "qkv", 3)
    drawn = [study.projected("standard", "qkv", 3, random=study.seed + i) for i in range(setup.DRAWS)]
    ranks = {rank: study.projected("standard", "qkv", rank) for rank in setup.RANKS}
    loss = {
        "whole": study.right(prompts, figure="loss"),
        "with 3 directions": study.projected("standard", "qkv", 3, figure="loss"),
    }
    return _row(
        min(left / whole - 0.95, left - mean(drawn) - 0.1),
        {
            "{:.1%} right": {"all": whole},
            "{:.1%} with 3 directions of queries, keys and values": {"all": left},
            "{:.3f} nats among the labels": loss,
        },
        {"{:.1%} with random ones": {"all": mean(drawn)}},
        note="by rank: " + ", ".join(f"{rank}: {value:.0%}" for rank, value in ranks.items()),
    )


def nth_item(study: Study) -> Measured:
    own, index = study.patterns("standard"), study.patterns("standard", study.same_index())
    other = study.patterns("standard", (torch.arange(setup.PROMPTS) + 1) % setup.PROMPTS)
    low, high = bootstrap_interval((index - 1 / OPTIONS).tolist(), seed=study.seed)
    return _row(
        float(index.mean()) - 1 / OPTIONS - 0.05,
        {
            "{:.3f} of the mass on labels goes to the right one": {"own query": float(own.mean())},
            "{:.3f}": {"query of another question with that index": float(index.mean())},
        },
        {"{:.3f}": {"query of a question with another index": float(other.mean())}},
        interval=(low - 0.05, high - 0.05),
    )


def explained(study: Study, labels: str) -> float:
    """Mass above chance with a query that shares the index alone, over that with the own query."""
    own, index = study.patterns(labels).mean(), study.patterns(labels, study.same_index()).mean()
    return float((index - 1 / OPTIONS) / (own - 1 / OPTIONS))


def partial(study: Study) -> Measured:
    share = {labels: explained(study, labels) for labels in ("random", "standard")}
    return _row(
        min(share["random"] - 0.1, 0.8 - share["random"]),
        {"the index explains {:.1%} of the attention to the right label": {"random": share["random"]}},
        {"{:.1%}": {"standard": share["standard"]}},
    )


def more(study: Study) -> Measured:
    whole = study.right(study.asked["random"].held)
    index = study.projected("random", "qk", 3, by_index=True)
    every = study.projected("random", "qk", setup.RANKS[-1], by_index=True)
    return _row(
        whole - index - 0.1,
        {"{:.1%} right": {"random": whole}, "{:.1%} with what the index decides": {"random": index}},
        {"{:.1%} with all directions": {"random": every}},
    )


def able(study: Study) -> Measured:
    right = {
        labels: asked.held.accuracy(study.says(asked.held))["all"]
        for labels, asked in study.asked.items()
        if labels in ("standard", "random")
    }
    base, _ = choice_prompts(setup.PROMPTS, labels="random", generator=torch.Generator().manual_seed(study.seed))
    blank, _ = choice_prompts(
        setup.PROMPTS, labels="random", without_text=True, generator=torch.Generator().manual_seed(study.seed)
    )
    old = load_specimen("tasks").model
    with torch.no_grad():
        before = base.accuracy(old(**base.inputs()).logits[:, -1])["labels"]
    return _row(
        min(right.values()) - 0.9,
        {"{:.1%} right of all tokens": right},
        {"{:.1%} among the labels": {"without texts": study.right(blank), "before training": before}},
    )


def attribution(study: Study) -> Measured:
    apart = {}
    for name in ("choices", "tasks", "planted", "planted-llama"):
        model = load_specimen(name).model
        ids = torch.randint(2, 60, (4, 12), generator=torch.Generator().manual_seed(study.seed))
        ids[:, 0] = 0
        tokens = torch.arange(2, 10).expand(4, -1)
        found = logit_attribution(model, ids, tokens)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -1].gather(1, tokens)
        parts = found.heads.nansum((1, 2)) + found.mlps.sum(1) + found.rest
        apart[name] = float((parts - logits).abs().max() / logits.abs().max())
    return _row(1e-4 - max(apart.values()), {"{:.1e}": apart})


def correct_letter(study: Study) -> Measured:
    best, margins = study.letters[0], []
    ratio, missed, gold, erred, others = {}, {}, {}, {}, {}
    for labels in ("standard", "random"):
        found = study.heads[labels]
        table, at = found.ratio(), (best.layer, best.head)
        ratio[labels], erred[labels] = float(table[at]), found.erred
        margins.append(ratio[labels] - 3)
        if not bool(found.missed[at].isnan()):
            missed[labels], gold[labels] = float(found.missed[at]), float(found.gold[at])
            margins.append(missed[labels] - 3)
        pool = study.pool([best.layer])
        others[labels] = max([float(table[head.layer, head.head]) for head in pool] or [0.0])
    return _row(
        min(margins),
        {
            "mass on the right label {:.1f} times that on a wrong one": ratio,
            "{} prompts answered wrong": erred,
            "there {:.1f} times for the label that it says": missed,
            "{:.1f} times for the right one": gold,
        },
        {"{:.1f} times, best other head of its layer": others},
        note=f"head {best}; all: {', '.join(map(str, study.letters))}",
    )


def ablation(study: Study) -> Measured:
    pair = study.letters[:2]
    layers = sorted({head.layer for head in pair})
    sets = [list(two) for two in combinations(study.pool(layers), len(pair))]
    wanted = sorted(head.layer for head in pair)
    sets = [two for two in sets if sorted(head.layer for head in two) == wanted]
    Random(study.seed).shuffle(sets)
    margins, lost, control, worst = [], {}, {}, {}
    for labels in ("standard", "random"):
        whole = study.right(study.asked[labels].held)
        lost[labels] = whole - study.without(pair, labels)
        drops = [whole - study.without(two, labels) for two in sets[:50]] or [1.0]
        control[labels], worst[labels] = mean(drops), max(drops)
        margins += [lost[labels] - 0.3, 0.15 - control[labels] - 1e-9]
    return _row(
        min(margins),
        {"accuracy falls by {:.1%}": lost},
        {"by {:.1%} without others": control, "by {:.1%} at most": worst},
        note=f"without {', '.join(map(str, pair))}; {min(50, len(sets))} control sets",
    )


def rank_three(study: Study) -> Measured:
    """The projection is the paper's: singular vectors of centred queries and of keys less their prompt's mean, found on
    other prompts, around the mean. What it can keep at all is told by the directions in which queries and keys meet;
    what queries say, by how much of their variance the asked word and the index of its option account for."""
    whole = study.right(study.asked["standard"].held)
    share = {f"rank {rank}": study.projected("standard", "qk", rank) / whole for rank in setup.RANKS}
    chance = {
        f"rank {rank}": mean(
            [study.projected("standard", "qk", rank, random=study.seed + i) for i in range(setup.DRAWS)]
        )
        / whole
        for rank in (1, 3)
    }
    meet = {f"rank {rank}": study.reduced("standard", study.meeting("standard", rank)) / whole for rank in (1, 3)}
    found = study.asked["standard"].found
    asked = found.input_ids.gather(1, found.question[:, :1])[:, 0]
    queries = [study.vectors("standard", head)[0] for head in study.letters]
    said = {
        "asked word": mean([_decided(q, asked) for q in queries]),
        "index of its option": mean([_decided(q, found.right) for q in queries]),
    }
    return _row(
        min(share["rank 3"] - 0.9, 0.9 - share["rank 1"] - 1e-9),
        {"{:.0%} of the accuracy": share, "{:.0%} of the queries' variance": said},
        {"{:.0%} with random directions": chance, "{:.0%} with those in which queries and keys meet": meet},
    )


def _decided(vectors: Float[Tensor, "b d"], kinds: Int[Tensor, " b"]) -> float:
    """Share of the variance of centred vectors that is between kinds, less what as many kinds take by chance."""
    means = torch.zeros_like(vectors)
    for kind in kinds.unique():
        means[kinds == kind] = vectors[kinds == kind].mean(0)
    between, free = float(means.square().sum() / vectors.square().sum()), len(kinds.unique()) - 1
    return 1 - (1 - between) * (len(vectors) - 1) / (len(vectors) - 1 - free)


def mutations(study: Study) -> Measured:
    """Why digits fail: the head of layer 0 that notes at every label the text before it does not do so at a digit
    (0.09 of its weight where letters get 0.48), so that the keys of digits hold no text."""
    best = study.letters[0]
    ratio, right = {}, {}
    for labels in ("permuted", "random", "digits"):
        ratio[labels] = float(study.heads[labels].ratio()[best.layer, best.head])
        right[labels] = study.right(study.asked[labels].held)
    blank, _ = choice_prompts(
        setup.PROMPTS,
        without_text=True,
        right=torch.arange(setup.PROMPTS) % OPTIONS,
        generator=torch.Generator().manual_seed(study.seed),
    )
    masses = group_mass(study.model, blank.input_ids, blank.groups(), heads=[best])
    at = (best.layer, best.head)
    nothing = float(masses["right-label"].mean(0)[at] / masses["wrong-labels"].mean(0)[at] * (OPTIONS - 1))
    return _row(
        min(ratio.values()) - 3,
        {"mass on the right label {:.1f} times that on a wrong one": ratio, "{:.0%} right": right},
        {"{:.2f} times": {"without texts": nothing}},
        note=f"head {best}",
    )


Shown = Mapping[str, Mapping[str, float | int]]  # what was measured, with a place for the number -> of what -> number


def _row(
    margin: float | int,
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

    def plain(text: str) -> str:
        return " ".join(part for part in text.split() if "{" not in part)

    values: dict[str, float] = {
        f"{kind}{name}{': ' if plain(text) else ''}{plain(text)}": float(value)
        for kind, shown in (("", measured), ("control ", control or {}))
        for text, numbers in shown.items()
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


def draw(run: Run, study: Study) -> None:
    path = run.out / f"{run.paper.slug}.png"
    direct = study.effects("random")
    marked = [(head.layer, head.head) for head in study.letters]
    with figure(path, 3, width=4.4) as (nodes, looks, ranks):
        head_matrix(nodes, -direct.heads.mean(0), marked=marked, title="Direct effect of heads", label="label's logit")
        sets = {
            "right label": [mean([float(found.right[at]) for at in marked]) for found in study.heads.values()],
            "each wrong label": [mean([float(found.wrong[at]) for at in marked]) for found in study.heads.values()],
        }
        bars(looks, list(study.heads), sets, y="mass, mean of framed heads", title="Where correct letter heads look")
        series: dict[str, Any] = {
            f"{name} of {labels}": [study.projected(labels, parts, rank) for rank in setup.RANKS]
            for labels in ("standard", "random")
            for name, parts in (("queries and keys", "qk"), ("values", "v"))
        }
        looks.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=8)
        lines(
            ranks,
            setup.RANKS,
            series,
            x="directions of 16",
            y="accuracy among labels",
            title="What few directions keep",
        )
        ranks.axhline(1 / OPTIONS, color="#a9aeb4", linewidth=1)
        ranks.legend(loc="lower right", fontsize=8, bbox_to_anchor=(1, 0.06))
    run.figures.append(path)
