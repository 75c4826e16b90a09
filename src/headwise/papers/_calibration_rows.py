"""The rows of attention-calibration; the record of the paper is in attention_calibration.py."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.edit import Edit
from headwise.attend.edits import ForceRows, ScaleGroup
from headwise.attend.groups import positions
from headwise.attend.probes import HeadOutputs
from headwise.attend.received import mean_received
from headwise.heads.sinks import received_attention
from headwise.hf.addresses import layout
from headwise.hf.maps import attention_maps
from headwise.hf.session import probe, steer
from headwise.papers._calibration_setup import BETA, RELATIVE, SEEN_BY, THRESHOLD, Task, act
from headwise.papers.running import Run
from headwise.papers.statistics import bootstrap_interval, holm, mean, paired_bootstrap_interval, sign_flip_test
from headwise.papers.verdicts import Measured
from headwise.specimens.registry import load_specimen
from headwise.steering.attention_calibration import AttentionCalibration, calibrate_sinks
from headwise.steering.search import HeadSearch, changes, search_heads
from headwise.tasks.prompted import PromptBatch

SHUFFLED = 32  # texts whose rows are shuffled, for the control
DRAWS = 20
LEAST = 0.001  # of accuracy: what counts as a gain
WINDOW = 200  # tokens: longer than one block of rows, so that the path of long prompts is tested


@dataclass
class View:
    """Hidden sinks of a task: `found` `[b l h s]`, `real` `[b s]`."""

    task: str
    found: Tensor
    real: Tensor

    @property
    def texts(self) -> Tensor:
        """`[b]` whether a text holds one, in any head."""
        return self.found.flatten(1).any(1)

    @property
    def pairs(self) -> Tensor:
        """`[b]` pairs of a head and one of its sinks in a text."""
        return self.found.flatten(1).sum(1)

    def __str__(self) -> str:
        tokens = self.found.any(2).any(1).sum(1).float().mean()
        return f"{float(tokens):.1f} tokens and {float(self.pairs.float().mean()):.1f} pairs a text"

    def along(self, parts: int) -> list[float]:
        """Share of texts with a sink in each part of the text, from its first token to its last."""
        place = (self.real.cumsum(-1) - 1) / (self.real.sum(-1, keepdim=True) - 1)
        part = (place * parts).long().clamp(0, parts - 1)
        token = self.found.any(2).any(1)
        return [float((token & (part == i)).any(-1).float().mean()) for i in range(parts)]


def hidden(received: Tensor, real: Tensor) -> Tensor:
    """Sinks behind the first token, of `[b l h s]` attention received: above both thresholds, and seen by many rows."""
    left = real.flip(-1).cumsum(-1).flip(-1)  # real tokens from each on
    later = real & (real.cumsum(-1) > 1) & (left >= SEEN_BY)
    limit = (RELATIVE / real.sum(-1)).clamp_min(THRESHOLD)
    return (received > limit[:, None, None, None]) & later[:, None, None]


def _given(task: Task) -> dict[str, Any]:
    return {name: value for name, value in task.inputs(task.held_out).items() if name != "logits_to_keep"}


def view(task: Task) -> View:
    received = received_attention(task.model, _given(task))
    return View(task.name, hidden(received, task.held_out.real), task.held_out.real)


def shuffled(task: Task, seed: int) -> Tensor:
    """`[b]` pairs of head and hidden sink in texts whose rows' weights were put on random keys of the same row."""
    few = {name: x[:SHUFFLED] if isinstance(x, Tensor) else x for name, x in _given(task).items()}
    maps = attention_maps(task.model, few)
    real = task.held_out.real[:SHUFFLED]
    seen = (torch.ones(maps.shape[-2:], dtype=torch.bool).tril() & real[:, None]).expand(len(maps), -1, -1)
    order = torch.rand(maps.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~seen[:, None], 2.0)
    # The visible weights of a row, first in its order, go to its visible columns, first in order of place.
    drawn = maps.gather(-1, order.argsort(-1))
    places = (~seen).int().argsort(dim=-1, stable=True)[:, None].expand_as(maps)
    moved = torch.zeros_like(maps).scatter(-1, places, drawn)
    return hidden(mean_received(moved, real)[:, None], real).flatten(1).sum(1)


KINDS = {"needles": "symbols", "prose": "prose", "captions": "pictures", "questions": "pictures"}


def later_sinks(run: Run, tasks: Sequence[Task]) -> tuple[Measured, list[View]]:
    views = [view(task) for task in tasks]
    texts: dict[str, Tensor] = {}
    more: dict[str, tuple[float, float, float]] = {}
    chance: dict[str, float] = {}
    for kind in dict.fromkeys(KINDS.values()):
        group = [(task, one) for task, one in zip(tasks, views, strict=True) if KINDS.get(task.name) == kind]
        texts[kind] = torch.cat([one.texts for _, one in group]).float()
        random = torch.cat([shuffled(task, run.seed) for task, _ in group]).float()
        own = torch.cat([one.pairs[:SHUFFLED] for _, one in group]).float()
        chance[kind] = float(random.mean())
        low, high = paired_bootstrap_interval(own.tolist(), random.tolist(), seed=run.seed)
        more[kind] = (low, float((own - random).mean()), high)
    least = min(more, key=lambda kind: more[kind][1])
    share = {kind: float(one.mean()) for kind, one in texts.items()}
    fewest = min(share, key=lambda kind: share[kind])
    low, margin, high = more[least]
    if share[fewest] - 0.5 < margin:
        margin = share[fewest] - 0.5
        low, high = bootstrap_interval((texts[fewest] - 0.5).tolist(), seed=run.seed)
    return Measured(
        measured="texts with a sink behind the first token: "
        + ", ".join(f"{kind} {value:.2f}" for kind, value in share.items())
        + "; more pairs of head and sink a text than with shuffled rows: "
        + ", ".join(f"{kind} {at:+.1f} ({low:+.1f} to {high:+.1f})" for kind, (low, at, high) in more.items())
        + "; "
        + "; ".join(
            f"{task.name}: {int(one.found.any(-1).any(0).sum())} of {len(task.heads)} heads, {one}"
            for task, one in zip(tasks, views, strict=True)
        ),
        control="rows shuffled among their keys, pairs a text: "
        + ", ".join(f"{kind} {count:.1f}" for kind, count in chance.items()),
        holds=margin >= 0,
        margin=margin,
        interval=(low, high),
        values={f"texts, {kind}": value for kind, value in share.items()}
        | {f"pairs beyond chance, {kind}": at for kind, (_, at, _) in more.items()},
    ), views


def sinks_hurt(run: Run, tasks: Sequence[Task]) -> tuple[Measured, dict[str, dict[Head, Tensor]]]:
    """Change of the answers' loss when the sinks of one head are damped, prompt by prompt."""
    moved: dict[str, dict[Head, Tensor]] = {}
    other: list[Tensor] = []
    for task in tasks:
        run.log(f"damping the sinks of {len(task.heads)} heads, {task.name}")
        score = task.score(task.held_out, PromptBatch.losses)
        moved[task.name] = changes(task.model, {head: act([head]) for head in task.heads}, score)
        other += changes(task.model, _random_tokens(task, run.seed), score).values()
    every = [change for table in moved.values() for change in table.values()]
    helped, hurt = _kinds(every, run.seed)
    flips = np.random.default_rng(run.seed)
    by_chance = _kinds(
        [change * torch.from_numpy(flips.choice([-1.0, 1.0], len(change))) for change in every], run.seed
    )
    random = _kinds(other, run.seed)
    best = min(every, key=lambda change: float(change.mean()))
    worst = max(every, key=lambda change: float(change.mean()))
    return Measured(
        measured=(
            f"of {len(every)} heads over {len(moved)} tasks, damping the sinks of {helped} lowers the loss and of "
            f"{hurt} raises it; from {float(best.mean()):+.4f} to {float(worst.mean()):+.4f} nats a head"
        ),
        control=(
            f"signs shuffled: {by_chance[0]} and {by_chance[1]}; as many random other tokens of the same heads damped: "
            f"{random[0]} lower and {random[1]} raise it"
        ),
        holds=helped >= 1 and hurt >= 1,
        margin=float(min(helped, hurt) - 1),
        values={"heads that gain": float(helped), "heads that lose": float(hurt)},
    ), moved


def _random_tokens(task: Task, seed: int) -> dict[Head, Edit]:
    """For every head with sinks, the same factor on as many tokens of each text, drawn from those behind the first."""
    real = task.held_out.real
    count = hidden(received_attention(task.model, _given(task)), real).sum(-1)
    free = real & (real.cumsum(-1) > 1) & ~task.held_out.asked
    generator = torch.Generator().manual_seed(seed)
    found: dict[Head, Edit] = {}
    for head in task.heads:
        wanted = count[:, head.layer, head.head, None]
        if not bool(wanted.any()):
            continue
        rank = torch.rand(real.shape, generator=generator).masked_fill(~free, 2.0).argsort(-1).argsort(-1)
        found[head] = ScaleGroup(positions((rank < wanted) & free), BETA, heads=[head])
    return found


def _kinds(changed: Sequence[Tensor], seed: int) -> tuple[int, int]:
    """How many changes of loss lie below 0 and above it, by sign-flip tests over prompts and Holm over all of both."""
    if not changed:
        return 0, 0

    def p(change: Tensor, side: Any) -> float:
        numbers = change.double().numpy()
        return (
            1.0 if not numbers.any() else sign_flip_test(numbers, np.zeros(len(numbers)), alternative=side, seed=seed)
        )

    adjusted = holm([*(p(change, "less") for change in changed), *(p(change, "greater") for change in changed)])
    below, above = adjusted[: len(changed)], adjusted[len(changed) :]
    return sum(value < 0.05 for value in below), sum(value < 0.05 for value in above)


def adaptive(run: Run, tasks: Sequence[Task], views: Sequence[View]) -> Measured:
    """Whether other texts have other sinks in the same heads, and the model stays as it is."""
    differ, numbers = {}, {}
    for task, one in zip(tasks, views, strict=True):
        if not bool(one.found.any()) or not bool(task.held_out.real.all()):
            continue  # no sinks, or texts of several lengths, whose places cannot be compared
        sets = one.found[:64].flatten(1)
        pairs = list(itertools.combinations(range(len(sets)), 2))
        differ[task.name] = mean([float(not torch.equal(sets[a], sets[b])) for a, b in pairs])
        numbers[task.name] = len({tuple(row.nonzero().flatten().tolist()) for row in sets})
    changed = 0
    for task in tasks:
        before = [parameter.clone() for parameter in task.model.parameters()]
        with torch.no_grad(), steer(task.model, act()):
            task.model(**task.inputs(task.held_out))
        changed += sum(not torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))
    again = max(float((view(task).found != one.found).any()) for task, one in zip(tasks, views, strict=True))
    margin = min(differ.values(), default=0.0) - 0.5
    return Measured(
        measured="pairs of texts with other sinks: "
        + ", ".join(f"{name} {share:.2f} ({numbers[name]} sets)" for name, share in differ.items())
        + f"; {changed} tensors of weights change",
        control=f"the same text twice: {'other' if again else 'the same'} sinks",
        holds=margin >= 0 and not changed and not again,
        margin=margin if not changed and not again else min(margin, -1.0),
        values={f"pairs that differ, {name}": share for name, share in differ.items()},
    )


def improves(run: Run, tasks: Sequence[Task]) -> tuple[Measured, dict[str, HeadSearch]]:
    found: dict[str, HeadSearch] = {}
    for task in tasks:
        run.log(f"choosing among {len(task.heads)} heads, {task.name}")
        found[task.name] = search_heads(
            task.model,
            act,
            task.accuracy(task.calibration),
            task.accuracy(task.held_out),
            candidates=task.heads,
            draws=DRAWS,
            seed=run.seed,
        )
    gain = torch.cat([one.held_out for one in found.values()])
    null = mean([float(one.random.mean()) if len(one.random) else 0.0 for one in found.values()])
    worst = min(found, key=lambda name: found[name].gain)
    low, high = bootstrap_interval(gain.tolist(), seed=run.seed)
    # The interval is that of what decides: all tasks together, beside random sets or not, or the one that gains least.
    beyond = float(gain.mean()) - max(0.0, null)
    margin = min(beyond, found[worst].gain) - LEAST
    decides = gain - max(0.0, null) if beyond < found[worst].gain else found[worst].held_out
    interval = bootstrap_interval((decides - LEAST).tolist(), seed=run.seed)
    searched = mean([one.calibration_gain for one in found.values()])
    return Measured(
        measured=(
            f"held-out accuracy {float(gain.mean()):+.4f} ({low:+.4f} to {high:+.4f}) over {len(found)} tasks, least "
            f"with {worst} ({found[worst].gain:+.4f}); on the prompts of the search {searched:+.4f}"
        ),
        control="; ".join(f"{name}, plain {one.baseline[1]:.3f}: {one}" for name, one in found.items()),
        holds=margin >= 0,
        margin=margin,
        interval=interval,
        values={
            "gain": float(gain.mean()),
            "gain of random sets": null,
            "gain on the prompts of the search": searched,
            **{f"gain, {name}": one.gain for name, one in found.items()},
        },
    ), found


def forms(ids: Tensor) -> Measured:
    """Layer by layer, so that every layer reads what the plain model reads, in double precision."""
    plain = load_specimen("text").model
    model = copy.deepcopy(plain).double()
    maps = attention_maps(model, ids)
    sums, apart = 0.0, {}
    width = max(layout(model).main.heads)
    for statistics in ("prompt", "running"):
        worst = 0.0
        for layer in range(layout(model).main.layers):
            own = maps[:, layer * width : (layer + 1) * width]
            formed = calibrate_sinks(own, _sinks(own, statistics), BETA)
            sums = max(sums, float((formed.sum(-1) - 1).abs().max()))
            outs = [
                _outputs(model, ids, layer, edit)
                for edit in (act(f"{layer}.*", statistics=statistics), ForceRows(formed, heads=f"{layer}.*"))
            ]
            worst = max(worst, float((outs[0] - outs[1]).norm(dim=-1).max() / outs[1].norm(dim=-1).mean()))
        apart[statistics] = worst
    same = torch.equal(_logits(plain, ids, AttentionCalibration(beta=1.0)), _logits(plain, ids))
    error = max(apart.values())
    return Measured(
        measured=(
            f"head outputs differ by {error:.1e} relative ({', '.join(f'{n} {e:.1e}' for n, e in apart.items())}); "
            f"rows sum to 1 within {sums:.1e}; beta 1 is {'' if same else 'not '}bit-identical"
        ),
        holds=error < 1e-5 and same and sums < 1e-6,
        values={"largest relative difference": error},
    )


def _outputs(model: nn.Module, ids: Tensor, layer: int, edit: Edit) -> Tensor:
    """`[b t h e]` of a layer's heads under an edit."""
    with torch.no_grad(), steer(model, edit), probe(model, read := HeadOutputs()):
        model(input_ids=ids)
    return read.values["", layer]


def _sinks(weights: Tensor, statistics: str) -> Tensor:
    """Sinks of formed maps, from the definition."""
    t = weights.shape[-1]
    later = torch.arange(t) > 0
    if statistics == "prompt":
        return (mean_received(weights) > THRESHOLD)[:, :, None] & later
    rows = torch.ones(t, t, dtype=weights.dtype).tril().cumsum(0)  # how many rows have seen each column
    return (weights.cumsum(2) / rows.clamp_min(1) > THRESHOLD) & later


def decoding(ids: Tensor) -> Measured:
    """Tokens generated with a cache, against one forward over the text that came out."""
    model: Any = load_specimen("text").model
    lengths = (len(ids[0]), len(ids[0]) // 3)
    padded = torch.stack([torch.nn.functional.pad(ids[0, -n:], (lengths[0] - n, 0)) for n in lengths])
    mask = torch.stack([torch.arange(lengths[0]) >= lengths[0] - n for n in lengths]).long()
    apart, moved = 0.0, 0.0
    with torch.no_grad():
        for edits in ([act()], []):
            with steer(model, *edits):
                told = model.generate(
                    input_ids=padded, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False,
                    output_scores=True, return_dict_in_generate=True,
                )  # fmt: skip
                for row, n in enumerate(lengths):
                    whole = told.sequences[row, -n - 12 :][None]
                    full = model(input_ids=whole).logits[0, n - 1 : -1]
                    mine = torch.stack(told.scores, 1)[row]
                    kept = mine > -1e30  # the end of the text is forbidden for so many tokens
                    error = float(((mine - full).abs() * kept).nan_to_num(0.0).max())
                    apart, moved = (max(apart, error), moved) if edits else (apart, max(moved, error))
    return Measured(
        measured=f"logits of 12 generated tokens differ by at most {apart:.1e} from one forward over the whole text",
        control=f"the plain model: {moved:.1e}",
        holds=apart < 1e-4,
        values={"largest difference": apart},
    )


def _logits(model: nn.Module, ids: Tensor, *edits: Edit) -> Tensor:
    with torch.no_grad(), steer(model, *edits):
        return model(input_ids=ids).logits
