"""The rows of active_dormant_heads.py, and its picture."""

from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from headwise.attend.edits import Ablate
from headwise.heads.dormant import ExtremeTokens, activity, extreme_tokens
from headwise.hf.session import steer
from headwise.papers._active_dormant_setup import DEEP_STEPS, LENGTH, TEXTS, Toy, held_out
from headwise.papers.running import Run
from headwise.papers.statistics import bootstrap_interval, mean, rank_correlation
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, figure, lines
from headwise.specimens.registry import load_specimen


def one_layer(toy: Toy) -> dict[str, Measured]:
    model = toy.train("one layer, softmax, AdamW")
    end, zero = toy.measure(model), toy.measure(model, instead="zero")
    first, other = toy.measure(model, instead="first"), toy.measure(model, instead="random")
    start = toy.along[0]
    generator = torch.Generator().manual_seed(toy.run.seed)
    trigger = toy.text.trigger_mask(toy.seen)
    moved = torch.zeros_like(trigger)
    moved[:, 2:] = (
        trigger[:, 2:].flatten()[torch.randperm(trigger[:, 2:].numel(), generator=generator)].view_as(trigger[:, 2:])
    )
    mixed = toy.measure(model, rows=moved)
    excess, harm = zero.losses["excess"] - end.losses["excess"], zero.losses["trigger"] - end.losses["trigger"]
    rows = {
        "active-dormant": Measured(
            measured=(
                f"BOS gets {end.sink_other[0]:.2f} on ordinary rows and {end.sink_trigger[0]:.3f} on trigger rows, the "
                f"token before gets {end.before_trigger[0]:.2f} there; without the head the excess loss of ordinary "
                f"rows changes by {excess:+.3f} nats, that of trigger rows by {harm:+.2f}"
            ),
            control=f"mark moved to random rows: BOS {mixed.sink_other[0]:.2f} and {mixed.sink_trigger[0]:.2f}",
            holds=end.sink_other[0] >= 0.5
            and end.sink_trigger[0] <= 0.05
            and end.before_trigger[0] >= 0.6
            and abs(excess) < 0.05
            and harm > 1,
            values={"sink on ordinary rows": end.sink_other[0], "sink on trigger rows": end.sink_trigger[0]},
        ),
        "rest-is-silence": Measured(
            measured=f"excess loss without the head {zero.losses['excess']:.3f}, on BOS {first.losses['excess']:.3f}",
            control=f"on a random earlier token {other.losses['excess']:.3f}",
            holds=abs(first.losses["excess"] - zero.losses["excess"]) < 0.05
            and other.losses["excess"] > first.losses["excess"],
        ),
        "generator": generated(toy),
    }
    solved = [step for step, state in toy.along.items() if state.losses["trigger"] < 0.1]
    after = [toy.along[step] for step in solved]
    together = rank_correlation([s.sink_other[0] for s in after], [s.drain[0] for s in after])
    no_drain = toy.measure(toy.train("with the value of BOS held", hold="value"))
    no_sink = toy.measure(toy.train("with the weight of BOS held", hold="weight"))
    rows["mutual-reinforcement"] = Measured(
        measured=(
            f"after step {solved[0]} sink weight and value norm have a rank correlation of {together:.2f}; with the "
            f"value held the sink ends at {no_drain.sink_other[0]:.2f}, with the weight held the value ratio ends at "
            f"{no_sink.drain[0]:.2f}"
        ),
        control=f"neither held: sink {end.sink_other[0]:.2f}, value ratio {end.drain[0]:.2f}",
        holds=together <= -0.9 and no_drain.sink_other[0] <= end.sink_other[0] / 2 and no_sink.drain[0] >= 0.5,
        values={"correlation": together, "sink, value held": no_drain.sink_other[0]},
    )
    relu = toy.measure(toy.train("with ReLU weights", attention="relu"))
    toy.found |= {"start": start, "end": end, "relu": relu}
    return rows


def three_layers(toy: Toy) -> dict[str, Measured]:
    start, end, relu = toy.found["start"], toy.found["end"], toy.found["relu"]
    deep = toy.measure(toy.train("three layers, AdamW", layers=3, steps=DEEP_STEPS))
    sgd = toy.measure(toy.train("three layers, SGD", layers=3, steps=DEEP_STEPS, sgd=True))
    toy.found |= {"deep": deep, "sgd": sgd}
    best = max(range(3), key=lambda layer: deep.sink_other[layer])
    peak, sgd_peak = max(deep.peak), max(sgd.peak)
    equal = abs(relu.losses["trigger"] - end.losses["trigger"]) <= 0.1
    deep_equal = abs(sgd.losses["trigger"] - deep.losses["trigger"]) <= 0.1
    return {
        "simple-models": Measured(
            measured=(
                f"one layer: BOS gets {end.sink_other[0]:.2f}, its value is {end.drain[0]:.2f} of the others; three "
                f"layers: {deep.sink_other[best]:.2f} and {deep.drain[best]:.2f} in layer {best}, and the residual "
                f"norm of BOS is at most {peak:.2f} of the others"
            ),
            control=f"before training: BOS gets {start.sink_other[0]:.2f}, value ratio {start.drain[0]:.2f}",
            holds=end.sink_other[0] >= 0.5
            and end.drain[0] <= 0.5
            and deep.sink_other[best] >= 0.5
            and deep.drain[best] <= 0.5
            and peak >= 2,
            values={"sink": end.sink_other[0], "drain": end.drain[0], "peak in three layers": peak},
        ),
        "mitigation": Measured(
            measured=(
                f"ReLU: BOS gets {relu.sink_other[0]:.3f} of a row, value ratio {relu.drain[0]:.2f}, trigger loss "
                f"{relu.losses['trigger']:.3f}; three layers with SGD: largest residual ratio {sgd_peak:.2f}, trigger "
                f"loss {sgd.losses['trigger']:.3f}"
            ),
            control=(
                f"softmax: {end.sink_other[0]:.2f}, {end.drain[0]:.2f}, {end.losses['trigger']:.3f}; three layers with "
                f"AdamW: {peak:.2f}, {deep.losses['trigger']:.3f}"
            ),
            holds=equal
            and deep_equal
            and relu.sink_other[0] < 0.1
            and relu.drain[0] > 0.6
            and peak > 1
            and sgd_peak - 1 <= (peak - 1) / 2,
            values={"ReLU sink": relu.sink_other[0], "AdamW peak": peak, "SGD peak": sgd_peak},
        ),
    }


def generated(toy: Toy) -> Measured:
    ids, trigger = toy.seen, toy.text.trigger_mask(toy.seen)[:, 1:-1]
    copied = (ids[:, 2:] == ids[:, :-2])[trigger].float().mean()
    bos = int((ids[:, 1:] == toy.text.bos).sum())
    return Measured(
        measured=f"{copied:.4f} of {int(trigger.sum())} trigger rows copy; BOS occurs {bos} times after the start",
        holds=bool(copied == 1 and bos == 0),
    )


def language_model(run: Run) -> tuple[dict[str, Measured], dict[str, list[float]]]:
    run.log("reading the text model")
    specimen = load_specimen("text")
    model = specimen.model
    texts = {kind: held_out(specimen.tokenizer, kind, run.seed) for kind in ("prose", "code", "repeats")}
    natural = torch.cat([texts["prose"], texts["code"]])
    torch.manual_seed(run.seed)
    blank = type(model)(model.config).eval()
    first, second, random = (
        extreme_tokens(model, natural, sink=0),
        extreme_tokens(model, natural, sink=1),
        extreme_tokens(blank, natural, sink=0),
    )
    scores = {name: list(first.map.of(name).values()) for name in ("sink", "drain")}
    rows = {
        "characterised": _characterised(first, second, random),
        "language-models": _active_somewhere(run, model, texts),
        "drain-follows-sink": _drain_follows_sink(run, first, second),
    }
    return rows, {name: [float(x or 0) for x in values] for name, values in scores.items()}


def _characterised(first: ExtremeTokens, second: ExtremeTokens, random: ExtremeTokens) -> Measured:
    even = sum(1 / (t + 1) for t in range(1, LENGTH)) / (LENGTH - 1)

    def figures(found: ExtremeTokens) -> tuple[float, float, float]:
        sinks, drains = found.map.of("sink"), found.map.of("drain")
        heads = [head for head, mass in sinks.items() if (mass or 0) >= 5 * even]
        value = median(float(drains[head] or 0) for head in heads) if heads else float("nan")
        return len(heads) / len(sinks), value, float(found.peak.max()) if found.peak is not None else float("nan")

    def told(found: ExtremeTokens) -> str:
        share, value, peak = figures(found)
        values = f", value ratio there {value:.2f}" if share else ""
        return f"{share:.0%} of heads give it 5 times a token's mean{values}, largest residual ratio {peak:.2f}"

    share, value, peak = figures(first)
    return Measured(
        measured=f"first token: {told(first)}",
        control=f"second token: {told(second)}; random weights: {told(random)}",
        holds=share >= 0.25 and value <= 0.5 and peak >= 2,
        values={"share of heads": share, "value ratio": value, "residual ratio": peak},
    )


def _active_somewhere(run: Run, model: nn.Module, texts: dict[str, Tensor]) -> Measured:
    table = activity(model, {kind: [ids] for kind, ids in texts.items()})
    names = list(table.domains)
    halves = [
        activity(model, {"a": [ids[: TEXTS // 2]], "b": [ids[TEXTS // 2 :]]}).switching() for ids in texts.values()
    ]
    noise = max(score or 0 for half in halves for score in half.of("switching").values())
    switching = []
    for head in table.layout.heads():
        sink = table.sink[:, head.layer, head.head]
        if sink.max() > 0.5 and sink.min() < sink.max() / 2:
            switching.append((head, names[int(sink.argmax())], names[int(sink.argmin())]))
    share = len(switching) / len(table.layout.heads())

    def losses(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)

    plain = {kind: losses(ids) for kind, ids in texts.items()}
    gaps = []
    for head, dormant, active in run.progress(switching, "removing heads"):
        with steer(model, Ablate([head])):
            gaps.append((losses(texts[active]) - plain[active]) - (losses(texts[dormant]) - plain[dormant]))
    low, high, centre = 0.0, 0.0, 0.0
    if gaps:
        gap = torch.stack(gaps).mean(0).tolist()
        low, high = bootstrap_interval(gap, seed=run.seed)
        centre = mean(gap)
    return Measured(
        measured=(
            f"{len(switching)} heads ({share:.0%}) rest on one kind of text and not on another; removing one costs "
            f"{centre:+.3f} nats more where it is active ({low:+.3f} to {high:+.3f})"
        ),
        control=f"largest difference of a head between two halves of one kind: {noise:.2f}",
        holds=share >= 0.1 and low > 0,
        values={"share of heads": share, "difference of loss": centre},
    )


def _drain_follows_sink(run: Run, first: ExtremeTokens, second: ExtremeTokens) -> Measured:
    def correlation(found: ExtremeTokens) -> float:
        sinks, drains = found.map.of("sink"), found.map.of("drain")
        return rank_correlation([float(sinks[h] or 0) for h in sinks], [float(drains[h] or 0) for h in sinks])

    seen = correlation(first)
    sinks, drains = (np.array(list(first.map.of(name).values()), dtype=float) for name in ("sink", "drain"))
    rng = np.random.default_rng(run.seed)
    shuffled = [rank_correlation(sinks, rng.permutation(drains)) for _ in range(200)]
    return Measured(
        measured=f"rank correlation {seen:.2f} over {len(sinks)} heads",
        control=f"second token {correlation(second):.2f}; lowest of 200 permutations {min(shuffled):.2f}",
        holds=seen <= -0.3,
        values={"correlation": seen},
    )


def draw(run: Run, toy: Toy, heads: dict[str, list[float]]) -> None:
    path = run.out / f"{run.paper.slug}-figure.png"
    with figure(path, 3) as (growth, layers, model):
        steps = sorted(toy.along)
        lines(
            growth,
            steps,
            {
                "weight of BOS, ordinary rows": [toy.along[s].sink_other[0] for s in steps],
                "weight of BOS, trigger rows": [toy.along[s].sink_trigger[0] for s in steps],
                "value of BOS / others": [toy.along[s].drain[0] for s in steps],
            },
            x="training step",
            title="One layer: the sink grows as its value shrinks",
        )
        lines(
            layers,
            [1, 2, 3],
            {"AdamW": toy.found["deep"].peak, "SGD": toy.found["sgd"].peak},
            x="after layer",
            y="residual norm of BOS / others",
            title="Three layers: the residual peak",
        )
        model.scatter(heads["sink"], heads["drain"], color=COLOURS[0])
        model.set(xlabel="weight of the first token", ylabel="value of it / others", title="Text model: its heads")
    run.figures.append(path)
