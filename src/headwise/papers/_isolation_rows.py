"""The rows of isolation_reposition_attention.py, one function for each, and its picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.attention.isolation import reference_attention, reposition_source
from headwise.papers._isolation_setup import (
    APART,
    BOOSTED,
    CONSISTORY,
    IR,
    ISOLATE,
    MASACTRL,
    MASKS,
    MISPLACED,
    NONE,
    NUMBERS,
    RANDOM,
    REPOSITION,
    RIVALS,
    STORY,
    SWAPPED,
    Trained,
    draw_group,
    paint,
    painted,
    steered,
)
from headwise.papers.running import Run
from headwise.papers.statistics import bootstrap_interval
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, bars, figure
from headwise.steering.subject_attention import SubjectAttention

HALF = 0.5  # of a gap that has to be closed
ALIKE, CHANGED = 1e-3, 0.01  # largest difference of pictures called the same; least mean difference of changed ones
STEPS_HERE = 4  # of painting, for `resampling`
PLACES = ("near", "far")


def interval(values: Tensor) -> tuple[float, float]:
    return bootstrap_interval(values.double().numpy())


def said(values: Tensor) -> str:
    low, high = interval(values)
    return f"{float(values.mean()):+.3f} ({low:+.3f} to {high:+.3f})"


def gained(made: Trained, kind: str, how: str, place: Any, what: str = "own") -> Tensor:
    """By how much a condition is above no references, for each target."""
    return getattr(made.looks[kind, place, how], what) - getattr(made.looks[kind, place, NONE], what)


def key_idea(made: Trained) -> Measured:
    """Reading references makes subjects like them, in both networks."""
    unet = made.pooled("unet", MASKS, "own") - made.pooled("unet", NONE, "own")
    rotary = torch.cat([gained(made, "rotary", MASKS, place) for place in PLACES])
    others = made.pooled("unet", MASKS, "other") - made.pooled("unet", NONE, "other")
    worst = min((unet, rotary), key=lambda x: interval(x)[0])
    margin = float(worst.mean())
    return Measured(
        measured=f"likeness to the own reference: UNet {said(unet)}, rotary transformer {said(rotary)}",
        control=f"to the others' references, UNet {said(others)}",
        holds=margin >= 0,
        margin=margin,
        interval=interval(worst),
        values={"unet": float(unet.mean()), "rotary": float(rotary.mean()), "others": float(others.mean())},
    )


def best_rival(made: Trained) -> str:
    return max(RIVALS, key=lambda how: float(made.pooled("unet", how, "own").mean()))


def numerous(made: Trained) -> Measured:
    """What the best of the other methods gains falls from two subjects to five."""
    rival = best_rival(made)
    ends = [gained(made, "unet", rival, number) for number in (NUMBERS[0], NUMBERS[-1])]
    fall = float(ends[0].mean() - ends[1].mean())
    error = 1.96 * float((ends[0].var() / len(ends[0]) + ends[1].var() / len(ends[1])).sqrt())
    each = ", ".join(f"{number}: {float(gained(made, 'unet', rival, number).mean()):+.3f}" for number in NUMBERS)
    ours = ", ".join(f"{number}: {float(gained(made, 'unet', IR, number).mean()):+.3f}" for number in NUMBERS)
    return Measured(
        measured=f"gain of {rival} attention by number of subjects: {each}",
        control=f"isolation and reposition: {ours}",
        holds=fall >= 0,
        margin=fall,
        interval=(fall - error, fall + error),
        values={f"{rival}, {number}": float(gained(made, "unet", rival, number).mean()) for number in NUMBERS}
        | {f"ours, {number}": float(gained(made, "unet", IR, number).mean()) for number in NUMBERS},
    )


def interference(made: Trained) -> Measured:
    """Without any reference, cutting attention between subjects sets their colours apart; random cuts do not."""
    uncut, cut, random = (made.pooled("unet", how, "distance") for how in (NONE, APART, RANDOM))
    worst = min((cut - uncut, cut - random), key=lambda x: interval(x)[0])
    margin = float(worst.mean())
    return Measured(
        measured=f"distance between colours {float(uncut.mean()):.2f}, cut {said(cut - uncut)}",
        control=f"cut between as many random tokens {said(random - uncut)}",
        holds=margin >= 0,
        margin=margin,
        interval=interval(worst),
        values={"uncut": float(uncut.mean()), "cut": float(cut.mean()), "random": float(random.mean())},
    )


def nearness(made: Trained, kind: str, how: str = MASKS) -> Tensor:
    """How much more is gained from a near reference than from a far one, for each target."""
    return gained(made, kind, how, "near") - gained(made, kind, how, "far")


def nearby(made: Trained) -> Measured:
    rotary, unet = nearness(made, "rotary"), nearness(made, "unet")
    margin = float(rotary.mean())
    parts = [float(gained(made, "rotary", MASKS, place).mean()) for place in PLACES]
    return Measured(
        measured=(
            f"gain from a near reference {parts[0]:+.3f}, from a far one {parts[1]:+.3f}; difference {said(rotary)}"
        ),
        control=f"in the UNet, whose keys have no positions, {said(unet)}",
        holds=margin >= 0,
        margin=margin,
        interval=interval(rotary),
        values={"near": parts[0], "far": parts[1], "difference, UNet": float(unet.mean())},
    )


def training_free(made: Trained) -> Measured:
    """Weights and processors are as before, references too, and the target is not."""
    worst, least, same = 0.0, float("inf"), True
    for painter in made.painters.values():
        before = [p.clone() for p in painter.parameters()]
        owners = [module for module in painter.network.modules() if hasattr(module, "set_processor")]
        processors: list[Any] = [module.processor for module in owners]
        group = draw_group(4, 2, 77, "any")
        plain, ours = (painted(painter, how, group) for how in (NONE, IR))
        after: list[Any] = [module.processor for module in owners]
        same &= all(torch.equal(a, b) for a, b in zip(before, painter.parameters(), strict=True))
        same &= all(a is b for a, b in zip(processors, after, strict=True))
        worst = max(worst, float((plain[:, :2] - ours[:, :2]).abs().max()))
        least = min(least, float((plain[:, 2] - ours[:, 2]).abs().mean()))
    margin = min(ALIKE - worst, least - CHANGED) if same else -1.0
    return Measured(
        measured=(
            f"weights and processors {'as before' if same else 'changed'}; references move by {worst:.1e} at most, "
            f"targets by {least:.3f} in the mean"
        ),
        control="the same pictures without it",
        holds=margin >= 0,
        margin=margin,
        values={"references": worst, "targets": least},
    )


def isolation(made: Trained) -> Measured:
    plain, ours = made.pooled("unet", MASKS, "distance"), made.pooled("unet", ISOLATE, "distance")
    unrelated = torch.cat([made.apart[number] for number in NUMBERS])
    rise = ours - plain
    beyond = rise - HALF * (unrelated - plain)
    worst = min((rise, beyond), key=lambda x: float(x.mean()))
    between = crossing(made, ISOLATE)
    margin = float(worst.mean()) if between == 0 else -1.0
    leak = made.pooled("unet", ISOLATE, "other") - made.pooled("unet", MASKS, "other")
    return Measured(
        measured=(
            f"distance between colours {float(plain.mean()):.2f} with masks only, {said(rise)} with isolation, "
            f"{float(unrelated.mean()):.2f} between references; gradient between subjects {between:.1g}"
        ),
        control=f"with masks only {crossing(made, MASKS):.2g}; likeness to the others' references {said(leak)}",
        holds=margin >= 0,
        margin=margin,
        interval=interval(worst) if between == 0 else None,
        values={
            "masks only": float(plain.mean()),
            "isolation": float(ours.mean()),
            "references": float(unrelated.mean()),
            "leak": float(leak.mean()),
        },
    )


def crossing(made: Trained, how: str) -> float:
    """The largest gradient, over the self-attention layers of the UNet, of one subject's rows on another's tokens."""
    painter = made.painters["unet"]
    group = draw_group(1, 3, 11, "any")
    found: list[float] = []
    inside = group.subjects[0].flatten(1)

    def probe(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        states = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        if states.shape[1] != inside.shape[1]:
            return
        with torch.enable_grad():
            rows: Any = module.processor(module, states)  # pyright: ignore[reportCallIssue]
            (gradient,) = torch.autograd.grad(rows[-1][inside[0]].square().sum(), states)
        found.append(float(gradient[-1][inside[1] | inside[2]].abs().max()))

    context = steered(painter.network, how, group)
    assert context is not None
    with context:
        hooks = [
            module.register_forward_hook(probe, with_kwargs=True)
            for name, module in painter.network.named_modules()
            if name.endswith("attn1")
        ]
        try:
            paint(painter, group.prompts, group.noise, 1)
        finally:
            for hook in hooks:
                hook.remove()
    return max(found)


def box_of(mask: Tensor) -> tuple[int, ...]:
    places = mask.nonzero()
    return (*places.amin(0).tolist(), *places.amax(0).tolist())


def same_place(run: Run) -> Measured:
    """Boxes of random places and sizes: the moved subject's box is the target's."""
    generator = torch.Generator().manual_seed(run.seed)
    hit = other = resized = 0
    pairs, size = 200, (12, 16)
    for _ in range(pairs):
        masks = torch.zeros(2, *size, dtype=torch.bool)
        for mask in masks:
            (top, bottom), (left, right) = (
                sorted(torch.randint(length, (2,), generator=generator).tolist()) for length in size
            )
            mask[top : bottom + 1, left : right + 1] = True
        source = reposition_source(masks[:1].flatten(1), masks[1:].flatten(1), size)[0].view(size)
        hit += box_of(source >= 0) == box_of(masks[1])
        other += box_of(masks[0]) == box_of(masks[1])
        resized += int(masks[0].sum() != masks[1].sum())
    return Measured(
        measured=f"{hit} of {pairs} boxes, {resized} of them resized",
        control=f"as they were, {other}",
        holds=hit == pairs,
        margin=float(hit - pairs),
        values={"moved": hit / pairs, "as they were": other / pairs},
    )


def consistency(made: Trained) -> Measured:
    """Far references in the rotary transformer: reposition gains at least half of what nearness does."""
    rise = gained(made, "rotary", REPOSITION, "far") - gained(made, "rotary", MASKS, "far")
    gap = nearness(made, "rotary")
    beyond = rise - HALF * gap
    worst = min((rise, beyond), key=lambda x: float(x.mean()))
    margin = float(worst.mean())
    names = {MISPLACED: "laid elsewhere", SWAPPED: "another subject's reference"}
    apart = {
        name: gained(made, "rotary", how, "far") - gained(made, "rotary", MASKS, "far") for how, name in names.items()
    }
    unet = gained(made, "unet", REPOSITION, "far") - gained(made, "unet", MASKS, "far")
    return Measured(
        measured=f"reposition of far references {said(rise)}, of a near/far gap of {float(gap.mean()):+.3f}",
        control=", ".join(f"{name} {said(value)}" for name, value in apart.items()) + f"; UNet {said(unet)}",
        holds=margin >= 0,
        margin=margin,
        interval=interval(worst),
        values={"rise": float(rise.mean()), "gap": float(gap.mean()), "UNet": float(unet.mean())}
        | {name: float(value.mean()) for name, value in apart.items()},
    )


def outperforms(made: Trained) -> Measured:
    rival = best_rival(made)
    lead = made.pooled("unet", IR, "own") - made.pooled("unet", rival, "own")
    margin = float(lead.mean())
    names = (NONE, MASKS, ISOLATE, IR, BOOSTED, *RIVALS)
    table = {
        name: tuple(float(made.pooled("unet", name, what).mean()) for what in ("own", "other", "colours"))
        for name in names
    }
    rotary = {name: gained(made, "rotary", name, "far") for name in (MASKS, IR, *RIVALS)}
    table_rotary = ", ".join(f"{name} {float(value.mean()):+.3f}" for name, value in rotary.items())
    return Measured(
        measured=f"likeness to the own reference {table[IR][0]:.3f}; to {rival} {said(lead)}",
        control="own / others' / own by histograms: "
        + "; ".join(f"{name} " + " / ".join(f"{value:.3f}" for value in row) for name, row in table.items())
        + f"; gain in the rotary transformer, far references: {table_rotary}",
        holds=margin >= 0,
        margin=margin,
        interval=interval(lead),
        values={f"{what}, {name}": row[i] for name, row in table.items() for i, what in enumerate(("own", "other"))},
    )


def resampling(made: Trained) -> Measured:
    """In the UNet reposition to boxes of equal size gives the same pictures.

    The layer in the middle is left out: at its 5 x 5 tokens boxes of equal size become boxes of several sizes.
    """
    group, apart = draw_group(8, 2, 13, "far"), {}
    for kind, painter in made.painters.items():
        names = [f"{name}.processor" for name, one in painter.network.named_modules() if hasattr(one, "set_processor")]
        whole = [name for name in names if "attn2" not in name and not name.startswith("mid_block")]
        pictures = []
        for move in (False, True):
            options: dict[str, Any] = {"isolate": False, "reposition": move, "layers": whole, "mask_dropout": 0.0}
            with SubjectAttention(
                painter.network, group.subjects, group.references, mutual_cross_attention=0.0, **options
            ):
                pictures.append(paint(painter, group.prompts, group.noise, STEPS_HERE))
        apart[kind] = float((pictures[0] - pictures[1]).abs().max())
    return Measured(
        measured=f"pictures of the UNet differ by {apart['unet']:.1e} at most",
        control=f"of the rotary transformer by {apart['rotary']:.2f}",
        holds=apart["unet"] <= ALIKE and apart["rotary"] >= 2 * ALIKE,
        margin=min(ALIKE - apart["unet"], apart["rotary"] - 2 * ALIKE),
        values=apart,
    )


def definition(run: Run) -> Measured:
    """Gathered parts merged by log-sum-exp and one call over all keys, against whole rows of weights."""
    generator = torch.Generator().manual_seed(run.seed)
    make: Any = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    b, s, h, n, d = 2, 3, 2, 30, 8
    q, k, v, k_ref, v_ref = (make(*x, n, d) for x in ((b, h), (b, h), (b, h), (b, s, h), (b, s, h)))
    labels = torch.randint(s + 1, (b, n), generator=generator)
    subjects = labels[:, None] == torch.arange(1, s + 1)[:, None]
    references = torch.rand(b, s, n, generator=generator) < 0.4
    keys, values = (torch.cat([*x.unbind(1), y], 2) for x, y in ((k_ref, k), (v_ref, v)))
    allowed = [subjects[:, i, :, None] & references[:, i, None] for i in range(s)]
    row, column = labels[:, :, None], labels[:, None]
    allowed.append((row == column) | (row == 0) | (column == 0))
    scores = q @ keys.mT * d**-0.5
    scores[..., : s * n] += 0.5
    wanted = scores.masked_fill(~torch.cat(allowed, -1)[:, None], -torch.inf).softmax(-1) @ values
    apart = {}
    for form in ("gathered", "masked"):
        out = reference_attention(q, k, v, k_ref, v_ref, subjects, references, boost=0.5, implementation=form)
        apart[form] = float((out - wanted).abs().max())
    worst = max(apart.values())
    return Measured(
        measured=", ".join(f"{name} {value:.1e}" for name, value in apart.items()) + " at most",
        holds=worst <= 1e-12,
        margin=1e-12 - worst,
        values=apart,
    )


def draw(run: Run, made: Trained) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 4, width=4.6, height=3.8) as (unet, apart, rotary, place):
        sample_panel(unet, made, ("unet", 3), (NONE, MASKS, ISOLATE, IR), "Three subjects, UNet")
        names = (NONE, MASKS, CONSISTORY, STORY, MASACTRL, ISOLATE, IR)
        labels = [name.replace(" ", "\n").replace("-like", "-\nlike") for name in names]
        values = [float(made.pooled("unet", name, "distance").mean()) for name in names]
        apart.bar(range(len(names)), values, color=COLOURS[0])
        references = float(torch.cat([made.apart[number] for number in NUMBERS]).mean())
        apart.axhline(references, color="#5b6168", linewidth=1, linestyle="--")
        apart.set_xticks(range(len(names)), labels, fontsize=6)
        apart.set(ylabel="distance between colours", title="Subjects of a picture, UNet")
        shown = (NONE, MASKS, REPOSITION, MISPLACED)
        sample_panel(rotary, made, ("rotary", "far"), shown, "Far references, rotary")
        series = {
            how: [float(gained(made, "rotary", how, where).mean()) for where in PLACES] for how in (MASKS, REPOSITION)
        }
        bars(place, list(PLACES), series, y="gain over no references", title="Rotary transformer")
    run.figures.append(path)


def sample_panel(axes: Any, made: Trained, which: tuple[str, Any], conditions: Sequence[str], title: str) -> None:
    """The first four targets: their references, then the target under each condition."""
    number = made.looks[(*which, NONE)].pictures.shape[1] - 1
    axes.imshow(samples(made, which, conditions, range(4)), interpolation="nearest")
    titles = [f"ref {i + 1}" for i in range(number)] + [name.replace(" ", "\n") for name in conditions]
    axes.set_xticks([9 + 19 * i for i in range(len(titles))], titles, fontsize=6)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_title(title)


def samples(made: Trained, which: tuple[str, Any], conditions: Sequence[str], items: Sequence[int]) -> np.ndarray:
    """Rows of pictures in 0..1, one target a row: its references, then the target under each condition."""
    plain, rows = made.looks[(*which, NONE)].pictures, []
    for i in items:
        row = [*plain[i, :-1], *(made.looks[(*which, how)].pictures[i, -1] for how in conditions)]
        rows.append(torch.cat([nn.functional.pad(picture, (0, 1, 0, 1), value=1.0) for picture in row], -1))
    return ((torch.cat(rows, -2) + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
