"""The rows of circuit_component_reuse.py, one function for each, and its picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwise.attend.addresses import Head
from headwise.heads.circuits import Overlap, faithfulness, overlap
from headwise.heads.effects import logit_difference
from headwise.heads.knockout import control_sets
from headwise.heads.patching import path_patch
from headwise.hf.addresses import layout
from headwise.hf.session import steer
from headwise.papers._circuit_reuse_setup import (
    COPYING,
    PAIRS,
    TOO_LONG,
    UNRELATED,
    Asked,
    Subject,
    Transfer,
    forced,
    mass_on,
    scene_rows,
)
from headwise.papers.running import Run
from headwise.papers.statistics import holm, mean
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure, head_matrix

PAPERS = ("indirect_objects", "coloured_objects")
CONTROLS = 10
SHORT = {
    "indirect_objects": "indirect", "coloured_objects": "colours", "needles": "needles", "repeats": "repeats",
    "addition": "addition",
}  # fmt: skip


@dataclass(frozen=True)
class Shared:
    """Overlap of two tasks' circuits with layer-matched chance among live heads; p corrected for all pairs."""

    pair: tuple[str, str]
    found: Overlap
    p: float

    def __str__(self) -> str:
        return f"{_pair(self.pair)} {len(self.found.shared)} of {min(self.found.size)}, p {self.p:.2g}"


def overlaps(subject: Subject) -> dict[tuple[str, str], Shared]:
    """Of every pair that was named beforehand."""
    place = layout(subject.model)
    found = {
        pair: overlap(
            subject.found[pair[0]].circuit,
            subject.found[pair[1]].circuit,
            layout=place,
            null="layer",
            among=subject.live,
        )
        for pair in PAIRS
    }
    corrected = holm([one.p for one in found.values()])
    return {pair: Shared(pair, found[pair], p) for pair, p in zip(PAIRS, corrected, strict=True)}


def source(shared: dict[tuple[str, str], Shared]) -> str:
    """The task whose circuit is most like that of coloured objects, by p and then by share."""
    mine = [one for pair, one in shared.items() if "coloured_objects" in pair and pair not in UNRELATED]
    best = min(mine, key=lambda one: (one.found.p, -one.found.share))
    return next(task for task in best.pair if task != "coloured_objects")


@dataclass(frozen=True)
class Removal:
    """Accuracy on one task, whole, without the heads found on another, and without as many others."""

    whole: float
    without: float
    others: list[float]


def removal(subject: Subject, heads: Sequence[Head], asked: Asked, run: Run) -> Removal:
    """Mean ablation of heads, and of layer-matched live heads."""
    with subject.without(heads, asked):
        without = asked.accuracy(subject.model)
    others = []
    for drawn in run.progress(controls(subject, heads), f"removing other heads on {asked.task}"):
        with subject.without(drawn, asked):
            others.append(asked.accuracy(subject.model))
    return Removal(asked.accuracy(subject.model), without, others)


def controls(subject: Subject, heads: Sequence[Head], draws: int = CONTROLS) -> list[list[Head]]:
    """Layer-matched sets of other live heads."""
    table = subject.found["indirect_objects"].effects["movers"].map()
    return control_sets(table, list(heads), subject.live, draws=draws, seed=subject.seed)


def generalise(subject: Subject, shared: dict[tuple[str, str], Shared], run: Run) -> Measured:
    """One pair at least: heads found on one task carry another one."""
    task = source(shared)
    pair = next(pair for pair in PAIRS if set(pair) == {task, "coloured_objects"})
    asked = subject.found["coloured_objects"].asked
    gone = removal(subject, subject.found[task].heads, asked, run)
    lost, others = gone.whole - gone.without, gone.whole - mean(gone.others)
    return _row(
        min(0.05 - shared[pair].p, lost - 0.3, lost - 2 * others),
        f"{shared[pair]} (corrected); removing the heads found on {_said(task)} "
        f"({_list(subject.found[task].heads)}) takes coloured objects from {gone.whole:.0%} to {gone.without:.0%}",
        f"as many other heads of the same layers: {mean(gone.others):.0%} (worst {min(gone.others):.0%}); pairs with "
        f"addition: {'; '.join(str(shared[other]) for other in UNRELATED)}",
        {"p": shared[pair].p, "points lost": lost, "points lost without others": others},
    )


def reused(shared: dict[tuple[str, str], Shared]) -> Measured:
    one = shared[PAPERS]
    share = len(one.found.shared) / one.found.size[0]
    return _row(
        min(share - 0.5 - 1e-9, 0.05 - one.p),
        f"{len(one.found.shared)} of the {one.found.size[0]} heads of indirect objects are among the "
        f"{one.found.size[1]} of coloured objects (p {one.p:.2g}, corrected)",
        _chance(shared),
        {"share": share, "p": one.p, "expected by chance": one.found.expected},
    )


def overlapping(shared: dict[tuple[str, str], Shared]) -> Measured:
    one = shared[PAPERS]
    return _row(
        min(one.found.share - 0.78, 0.05 - one.p),
        f"{one.found.share:.0%} of the heads of the smaller circuit are shared (p {one.p:.2g}, corrected)",
        _chance(shared),
        {"share": one.found.share, "p": one.p, "expected by chance": one.found.expected},
    )


@dataclass(frozen=True)
class Repair:
    """Coloured objects in texts that are too long, before and after rows of heads are forced; and downstream."""

    task: str
    heads: list[Head]
    movers: list[Head]
    before: float
    after: float
    mended: float
    spoiled: float
    mass: tuple[float, float]
    wrong_mass: tuple[float, float]
    others: list[float]
    other_mass: list[float]


def repaired(subject: Subject, shared: dict[tuple[str, str], Shared], run: Run) -> Repair:
    """Force the heads that the other task's circuit reads its keys from; look at what the movers then attend to."""
    task = source(shared)
    circuit = subject.found[task].circuit
    heads = [head for head in circuit.stages["keys"] if isinstance(head, Head)]
    movers = [head for head in circuit.stages["movers"] if isinstance(head, Head)]
    asked = Asked.of(subject.mixture, "coloured_objects", subject.seed + 40, length=TOO_LONG, prompts=32)
    rows = scene_rows(asked)
    right = asked.right(subject.model)
    mass, wrong = (mass_on(subject.model, asked, movers, span) for span in ("colour", "twin-colour"))
    with _forcing(subject, heads, rows, asked) as now:
        after, after_mass, after_wrong = (
            now.right(subject.model),
            mass_on(subject.model, asked, movers, "colour"),
            mass_on(subject.model, asked, movers, "twin-colour"),
        )
    others, other_mass = [], []
    for drawn in run.progress(controls(subject, heads), "forcing other heads"):
        with _forcing(subject, drawn, rows, asked):
            others.append(asked.accuracy(subject.model))
            other_mass.append(mass_on(subject.model, asked, movers, "colour"))
    failed = ~right
    return Repair(
        task,
        heads,
        movers,
        float(right.float().mean()),
        float(after.float().mean()),
        float(after[failed].float().mean()) if bool(failed.any()) else 0.0,
        float((~after[right]).float().mean()) if bool(right.any()) else 0.0,
        (mass, after_mass),
        (wrong, after_wrong),
        others,
        other_mass,
    )


class _forcing:
    """Batches of 16, as everything on long texts is run: the rows that are forced follow the batch."""

    def __init__(self, subject: Subject, heads: Sequence[Head], rows: torch.Tensor, asked: Asked) -> None:
        self.context = steer(subject.model, forced(heads, rows[:16]))
        self.asked = asked

    def __enter__(self) -> Asked:
        self.context.__enter__()
        return self.asked

    def __exit__(self, *exception: object) -> None:
        self.context.__exit__(*exception)  # pyright: ignore[reportArgumentType]


def repair(found: Repair) -> Measured:
    missing, others = 1 - found.before, mean(found.others) - found.before
    gained = found.after - found.before
    return _row(
        min(gained - 0.5 * missing, gained - 2 * others, 0.9 - found.before),
        f"coloured objects in texts of {TOO_LONG} tokens: {found.before:.0%} right, {found.after:.0%} with heads "
        f"{_list(found.heads)} (the keys of the circuit of {_said(found.task)}) made to look at the token before",
        f"other heads of the same layers: {mean(found.others):.0%}, at best {max(found.others):.0%}",
        {"before": found.before, "after": found.after, "others": mean(found.others)},
    )


def errors(found: Repair) -> Measured:
    return _row(
        min(found.mended - 0.5 - 1e-9, 0.1 - found.spoiled),
        f"{found.mended:.0%} of the wrong answers become right, {found.spoiled:.0%} of the right ones wrong",
        f"right at best with other heads: {max(found.others):.0%} of all, {found.before:.0%} without any",
        {"mended": found.mended, "spoiled": found.spoiled},
    )


def downstream(found: Repair) -> Measured:
    rise = found.mass[1] - found.mass[0]
    others = mean(found.other_mass) - found.mass[0]
    return _row(
        min(rise - 0.3, rise - 2 * max(others, 0.0), found.wrong_mass[0] + 0.1 - found.wrong_mass[1]),
        f"weight of the movers of {_said(found.task)} ({_list(found.movers)}) on the right colour: {found.mass[0]:.2f} "
        f"before, {found.mass[1]:.2f} after; on a wrong one {found.wrong_mass[0]:.2f} and {found.wrong_mass[1]:.2f}",
        f"with other heads forced {mean(found.other_mass):.2f}",
        {"rise": rise, "rise with others": others},
    )


def building_blocks(subject: Subject) -> Measured:
    every = {head for found in subject.found.values() for head in found.heads}
    often = [head for head in sorted(every) if sum(head in found.heads for found in subject.found.values()) >= 3]
    share = len(every) / len(subject.live)
    kept, alone = {}, {}
    for task, found in subject.found.items():
        asked = found.asked
        twin, metric = asked.ids[asked.partner()], asked.metric()
        kept[task] = faithfulness(subject.model, found.circuit, asked.ids, twin, metric).recovered
        drawn = controls(subject, found.heads, 5)
        alone[task] = mean(
            [faithfulness(subject.model, heads, asked.ids, twin, metric).recovered for heads in drawn] or [0.0]
        )
    return _row(
        min(0.5 - share, min(kept.values()) - 0.5, len(often) - 1.0),
        f"five circuits together are {len(every)} of {len(subject.live)} live heads; in three or more: {_list(often)}; "
        f"alone they keep {', '.join(f'{_said(task)} {value:.0%}' for task, value in kept.items())} of the difference",
        f"as many other heads of the same layers keep {', '.join(f'{value:.0%}' for value in alone.values())}",
        {"share of heads": share, "least kept": min(kept.values()), "kept by others": max(alone.values())},
    )


def identities(subject: Subject) -> Measured:
    """A prompt as its own counterpart; all heads and MLPs at all positions at once."""
    worst, gap = 0.0, 0.0
    for task in COPYING[:2]:
        asked = subject.found[task].asked
        metric = asked.metric()
        for receivers in ("logits", f"{subject.found[task].circuit.stages['movers'][0]}.q"):
            same = path_patch(subject.model, asked.ids, asked.ids, metric, receivers=receivers)
            worst = max(worst, float(same.heads.nan_to_num().abs().max()))
        twin = asked.ids[asked.partner()].clone()
        twin[:, -1] = asked.ids[:, -1]  # the last token's embedding is no head's
        away = faithfulness(subject.model, [], asked.ids, twin, metric, mlps=True)
        with torch.no_grad():
            said = metric(subject.model(twin).logits[:, -1]).double().mean()
        gap = max(gap, abs(away.empty - float(said)))
    return _row(
        min(1e-12 - worst, 1e-3 - gap),
        f"largest effect of a prompt on itself {worst:.1g}; all nodes patched differ from the corrupt run by {gap:.1g}",
        None,
        {"self": worst, "all": gap},
    )


def same_numbers(subject: Subject) -> Measured:
    """The fast ways against one whole forward a sender."""
    worst = 0.0
    for task in COPYING[:2]:
        found = subject.found[task]
        few = Asked(task, found.asked.ids[:6], found.asked.answer[:6], found.asked.episodes)
        other = few.ids.roll(1, 0)
        keep = few.answer != few.answer.roll(1)
        metric = logit_difference(few.answer[keep], few.answer.roll(1)[keep])
        for receivers in ("logits", f"{found.circuit.stages['movers'][0]}.q"):
            fast, slow = (
                path_patch(
                    subject.model, few.ids[keep], other[keep], metric, receivers=receivers, implementation=way
                ).heads
                for way in ("auto", "reference")
            )
            worst = max(worst, float((fast - slow).nan_to_num().abs().max()))
    return _row(1e-3 - worst, f"largest difference {worst:.1g} logits", None, {"difference": worst})


def faster(found: Transfer) -> Measured:
    fast, slow = found.copying or found.cap // 5, found.scratch or found.cap
    learned = found.copied is not None and found.copying is not None
    taught = f"{found.copied} steps" if found.copied else "all its steps"
    said = f"after {found.scratch} steps" if found.scratch else f"not after {found.cap} steps, where it was stopped"
    return _row(
        slow / fast - 5 if learned else -1.0,
        f"97 % of indirect objects are right after {found.copying or f'more than {fast}'} steps in a model that was "
        f"taught to copy ({found.copies:.0%} of repeats or of needles, whichever are fewer, after {taught})",
        f"from scratch {said}, same batches, same learning rate",
        {
            "copies": found.copies,
            "copying": float(fast),
            "scratch": float(slow),
            "stopped": float(found.copied is None) + float(found.copying is None) + float(found.scratch is None),
        },
    )


def draw(run: Run, subject: Subject, shared: dict[tuple[str, str], Shared], found: Repair) -> None:
    """Effects of two tasks with their circuits, overlaps beside chance, and the repair."""
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 4, width=4.2, height=3.6) as (first, second, third, fourth):
        for axes, task in ((first, "coloured_objects"), (second, found.task)):
            one = subject.found[task]
            head_matrix(
                axes,
                one.writes.tolist(),
                marked=[(head.layer, head.head) for head in one.heads],
                limit=1.0,
                title=f"{_said(task)} (circuit framed)",
                label="direct effect (the corrupt prompt: 1)",
            )
        bars(
            third,
            [" + ".join(SHORT[task] for task in pair) for pair in PAIRS],
            {
                "shared": [len(one.found.shared) for one in shared.values()],
                "by chance, same layers": [one.found.expected for one in shared.values()],
            },
            y="heads",
            title="Heads that two circuits share",
        )
        third.tick_params(axis="x", labelsize=8, rotation=40)
        for label in third.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
        third.set_ylim(0, third.get_ylim()[1] + 1)  # room for the legend
        third.legend(loc="upper right", fontsize=8)
        bars(
            fourth,
            ["as it is", f"{_list(found.heads)}\nforced", "others\nforced"],
            {
                "answers right": [found.before, found.after, mean(found.others)],
                "movers' weight on the right colour": [*found.mass, mean(found.other_mass)],
            },
            y="share",
            title=f"Coloured objects, {TOO_LONG} tokens",
        )
        fourth.set_ylim(0, 1)
        fourth.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8)
    run.figures.append(path)


def _row(margin: float, measured: str, control: str | None, values: dict[str, float]) -> Measured:
    return Measured(measured=measured, holds=margin >= 0, control=control, margin=margin, values=values)


def _chance(shared: dict[tuple[str, str], Shared]) -> str:
    one = shared[PAPERS]
    others = "; ".join(str(other) for pair, other in shared.items() if pair != PAPERS)
    return f"{one.found.expected:.2f} heads by chance in the same layers; other pairs: {others}"


def _said(task: str) -> str:
    return task.replace("_", " ")


def _pair(pair: tuple[str, str]) -> str:
    return " + ".join(_said(task) for task in pair)


def _list(heads: Sequence[Head]) -> str:
    return ", ".join(map(str, heads)) or "none"
