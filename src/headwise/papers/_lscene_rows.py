"""The rows of lscenellm.py, one function for each, and its picture."""

from collections.abc import Mapping

import torch

from headwise.attend.kernels import attention_with_lse
from headwise.attention.magnifier import magnified_attention
from headwise.papers._lscene_setup import (
    ALL,
    ARMS,
    COARSE,
    DETAIL,
    KIND,
    LARGE,
    MAGNIFIER,
    PLUGGED,
    RANDOM,
    SMALL,
    UNPLUGGED,
    Trained,
    answers,
    nothing,
    questions,
    tests,
)
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, bars, figure
from headwise.tasks.coarse_to_fine import DIGITS

TIE = 1e-9
CHANCE = 1 / DIGITS


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in values.items())


def _of(made: Trained, what: str, size: int = LARGE) -> dict[str, float]:
    return {arm: made.accuracy[arm][f"{what} {size}"] for arm in ARMS}


def _row(measured: str, control: str | None, margin: float, values: Mapping[str, float]) -> Measured:
    return Measured(measured=measured, control=control, holds=margin >= 0, margin=margin, values=values)


def redundant(made: Trained) -> Measured:
    detail, kind = _of(made, DETAIL), _of(made, KIND)
    kept, lost = made.parts["all fine, only asked"], made.parts["all fine, others"]
    margin = min(CHANCE + 0.15 - detail[COARSE], kind[COARSE] - 0.8, kept - detail[ALL] + 0.05)
    return _row(
        f"coarse tokens alone: kinds {kind[COARSE]:.1%}, details {detail[COARSE]:.1%} (chance {CHANCE:.0%}); all fine "
        f"tokens {detail[ALL]:.1%}, without those of all regions but the asked one {kept:.1%}",
        f"all fine tokens without those of the asked region: {lost:.1%}",
        margin,
        {"detail, coarse": detail[COARSE], "kind, coarse": kind[COARSE], "only asked": kept, "others": lost},
    )


def adaptive(made: Trained) -> Measured:
    found, read = made.found, made.read
    margin = min(found[MAGNIFIER] - 0.8, 0.35 - read[MAGNIFIER], found[MAGNIFIER] - found[RANDOM] - 0.15)
    return _row(
        f"the asked region is selected for {found[MAGNIFIER]:.1%} of the questions; {read[MAGNIFIER]:.1%} of the fine "
        "keys are read",
        f"random selection: {found[RANDOM]:.1%}, {read[RANDOM]:.1%} read",
        margin,
        {f"found, {arm}": found[arm] for arm in ARMS} | {f"read, {arm}": read[arm] for arm in ARMS},
    )


def selector(made: Trained) -> Measured:
    gap, random = (made.found[arm] - made.other[arm] for arm in (MAGNIFIER, RANDOM))
    return _row(
        f"a region is selected for {made.found[MAGNIFIER]:.1%} of the questions about it and for "
        f"{made.other[MAGNIFIER]:.1%} of those about its neighbour",
        f"random selection: {made.found[RANDOM]:.1%} and {made.other[RANDOM]:.1%}",
        gap - 0.3,
        {"gap": gap, "gap, random": random},
    )


def magnifies(made: Trained) -> Measured:
    detail = _of(made, DETAIL)
    gain = detail[MAGNIFIER] - detail[COARSE]
    return _row(
        f"details: {detail[MAGNIFIER]:.1%} with the magnifier, {gain:+.1%} against coarse tokens alone",
        _listed({arm: detail[arm] for arm in (COARSE, RANDOM, ALL)}),
        gain - 0.3,
        {**detail, "gain": gain},
    )


def fuses(made: Trained) -> Measured:
    detail, kind = made.accuracy[MAGNIFIER][f"{DETAIL} {LARGE}"], made.accuracy[MAGNIFIER][f"{KIND} {LARGE}"]
    without_fine = detail - made.parts["no fine, detail"]
    without_coarse = kind - made.parts["no coarse, kind"]
    level = kind - made.accuracy[COARSE][f"{KIND} {LARGE}"]
    return _row(
        f"the magnifier loses {without_fine:.1%} on details without fine keys, {without_coarse:.1%} on kinds with "
        f"blank coarse tokens; kinds {level:+.1%} against coarse tokens alone",
        f"kinds without fine keys {made.parts['no fine, kind']:.1%}, details with blank coarse tokens "
        f"{made.parts['no coarse, detail']:.1%}",
        min(without_fine - 0.2, without_coarse - 0.2, level + 0.05),
        {"without fine": without_fine, "without coarse": without_coarse, "kinds": level},
    )


def surpasses(made: Trained) -> Measured:
    large, small, read = _of(made, DETAIL), _of(made, DETAIL, SMALL), made.read[MAGNIFIER]
    margin = min(
        large[MAGNIFIER] - large[COARSE] - 0.3,
        large[MAGNIFIER] - large[RANDOM] - 0.15,
        large[MAGNIFIER] - large[ALL] + 0.05,
        0.35 - read,
        small[MAGNIFIER] - small[COARSE] - 0.3,
        small[MAGNIFIER] - small[RANDOM] - TIE,
    )
    return _row(
        f"details of scenes with {LARGE} regions: {large[MAGNIFIER]:.1%} reading {read:.1%} of the fine keys; with "
        f"{SMALL} regions: {small[MAGNIFIER]:.1%}",
        f"{LARGE} regions: {_listed({a: large[a] for a in ARMS if a != MAGNIFIER})}; {SMALL} regions: "
        f"{_listed({a: small[a] for a in ARMS if a != MAGNIFIER})}",
        margin,
        {f"large, {arm}": large[arm] for arm in ARMS} | {f"small, {arm}": small[arm] for arm in ARMS} | {"read": read},
    )


def plug_in(made: Trained) -> Measured:
    gain = made.plugged[PLUGGED] - made.plugged[UNPLUGGED]
    return _row(
        f"the model of coarse tokens with a magnifier, tuned: details {made.plugged[PLUGGED]:.1%}, {gain:+.1%}",
        f"tuned as long without: {made.plugged[UNPLUGGED]:.1%}; before tuning "
        f"{made.accuracy[COARSE][f'{DETAIL} {LARGE}']:.1%}",
        gain - 0.2,
        {**made.plugged, "gain": gain},
    )


@torch.no_grad()
def limit(made: Trained) -> Measured:
    """On the trained magnifier, and on random heads of a large spread."""
    model, scenes = made.model, questions(tests(0, 8)[LARGE], DETAIL)
    own = model.choose
    model.choose = nothing
    blocked = answers(model, scenes)
    model.choose = own
    embeddings = model.get_input_embeddings()(scenes.ids)
    places = scenes.ids == model.config.scene_token_id
    embeddings[places] = model.project(scenes.coarse).flatten(0, 1)
    plain = float((blocked - model.decoder(inputs_embeds=embeddings).logits[:, -1]).abs().max())
    generator = torch.Generator().manual_seed(0)
    q, k, v, k_fine, v_fine = (3 * torch.randn(2, 4, n, 16, generator=generator) for n in (9, 20, 20, 32, 32))
    select = torch.rand(2, 9, 32, generator=generator) < 0.3
    mask = torch.cat([torch.ones(2, 9, 20, dtype=torch.bool), select], -1)[:, None]
    one, _ = attention_with_lse(q, torch.cat([k, k_fine], 2), torch.cat([v, v_fine], 2), mask=mask)
    merge = float((magnified_attention(q, k, v, k_fine, v_fine, select) - one).abs().max())
    return _row(
        f"nothing selected: {plain:.1e} from the plain decoder; two merged calls: {merge:.1e} from one softmax",
        None,
        min(-plain, 1e-5 - merge),
        {"plain": plain, "merge": merge},
    )


def rooms(made: Trained) -> Measured:
    gain = made.seen["fine"] - made.seen["coarse"]
    return _row(
        f"fine tokens of generated rooms show {made.seen['fine']:.1%} of the objects",
        f"coarse tokens show {made.seen['coarse']:.1%}",
        gain - TIE,
        made.seen,
    )


def draw(run: Run, made: Trained) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 3, width=4.6) as (scores, choice, plugged):
        series = {
            f"{what}, {size} regions": [100 * _of(made, what, size)[arm] for arm in ARMS]
            for what, size in ((DETAIL, LARGE), (DETAIL, SMALL), (KIND, LARGE))
        }
        bars(scores, [arm.replace(" ", "\n") for arm in ARMS], series, y="right answers, %", title="What is asked")
        for number, arm in enumerate(ARMS):
            choice.scatter([100 * made.read[arm]], [100 * made.found[arm]], color=COLOURS[number], label=arm)
        choice.legend(fontsize=8)
        choice.set(xlabel="fine keys read, %", ylabel="asked region selected, %", title="Where it looks")
        names = (UNPLUGGED, PLUGGED)
        plugged.bar(range(2), [100 * made.plugged[name] for name in names], color=COLOURS[0])
        plugged.set_xticks(range(2), list(names))
        plugged.set(ylabel="details, %", title="In a model of coarse tokens")
    run.figures.append(path)
