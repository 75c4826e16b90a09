"""Attention sinks are heads at rest: active on their domain, parked on a token without value elsewhere.

Method: headwise/heads/dormant.py and the Bigram-Backcopy task, headwise/tasks/bigram_backcopy.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headwise.heads.dormant import ExtremeTokens
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="active-dormant-heads",
    title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
    authors="Guo, Pai, Bai, Jiao, Jordan, Mei",
    year=2024,
    venue="NeurIPS 2024 workshop M3L",
    arxiv="2410.13835",
    repository="GuoTianYu2000/Active-Dormant-Attention",
    area="heads",
    modules=(
        "headwise.heads.dormant",
        "headwise.models.backcopy_decoder",
        "headwise.attention.relu",
        "headwise.tasks.bigram_backcopy",
    ),
    specimens=("text",),
    claims=(
        Claim(
            id="observed",
            kind="untestable",
            claim=(
                "Practitioners have consistently observed three puzzling phenomena in transformer-based large "
                "language models (LLMs): attention sinks, value-state drains, and residual-state peaks, "
                "collectively referred to as extreme-token phenomena."
            ),
            criterion=(
                "a statement about what others saw in large models; the row `characterised` measures the three "
                "phenomena in our own language model"
            ),
        ),
        Claim(
            id="characterised",
            kind="claim",
            claim=(
                'These phenomena are characterized by certain so-called "sink tokens" receiving '
                "disproportionately high attention weights, exhibiting significantly smaller value states, and "
                "having much larger residual-state norms than those of other tokens."
            ),
            paper_figure="Llama-2-7B head 16.25 and others (figures of the paper)",
            criterion=(
                "in the text model, on held-out text: the first token receives at least 5 times the mean weight "
                "of a token in at least a quarter of the heads; in those heads its value norm is at most half "
                "the mean of the others (median over heads); and after at least one layer its residual norm is "
                "at least twice the mean of the others"
            ),
            control="the same three numbers for the second token of the text, and for a model with random weights",
        ),
        Claim(
            id="challenges",
            kind="untestable",
            claim=(
                "These extreme tokens give rise to various challenges in LLM inference, quantization, and "
                "interpretability."
            ),
            criterion="motivation drawn from other work on large models; the paper measures none of it",
        ),
        Claim(
            id="elucidate",
            kind="untestable",
            claim="We elucidate the mechanisms behind extreme-token phenomena.",
            criterion="a summary; the rows after it are what it rests on",
        ),
        Claim(
            id="simple-models",
            kind="claim",
            claim=(
                "First, we show that these phenomena arise in very simple architectures -- transformers with "
                "one to three layers -- trained on a toy model, the Bigram-Backcopy (BB) task."
            ),
            paper_figure="1 and 3 layers, one head, d = 256 (official BBM scripts)",
            criterion=(
                "after training on Bigram-Backcopy: with one layer and one head, rows that are no trigger give "
                "BOS at least 0.5 and its value norm is at most half the mean of the others; with three layers, "
                "some head does the same and the residual norm of BOS is at least twice the mean of the others "
                "after some layer"
            ),
            control="the same models before training",
            known=(
                "the sink and the drained value grow in every seed, but the residual norm of BOS reaches 1.07 to 1.58 "
                "of the others within 1,200 steps at width 64 (the paper: 10,000 steps and more at width 256), and "
                "the sink of the three-layer model stays below 0.5 in two seeds of three"
            ),
        ),
        Claim(
            id="active-dormant",
            kind="claim",
            claim=(
                "In this setting, we identify an active-dormant mechanism, where attention heads become sinks "
                "for specific input domains while remaining non-sinks for others."
            ),
            paper_figure="trigger rows attend to the previous token, others to BOS (figure of the paper)",
            criterion=(
                "one layer: rows that are no trigger give BOS at least 0.5, trigger rows at most 0.05 and at "
                "least 0.6 to the previous token; removing the head changes the excess loss of the first by "
                "less than 0.05 nats and raises the loss of the second by more than 1 nat"
            ),
            control="the same split with the trigger mark moved to random other tokens of the same text",
        ),
        Claim(
            id="mutual-reinforcement",
            kind="claim",
            claim=(
                "Our theoretical analysis of the training dynamics reveals that these phenomena are driven by a "
                "mutual reinforcement mechanism."
            ),
            paper_figure="logits to BOS grow logarithmically in time while its value shrinks (theorem; recalled)",
            criterion=(
                "along training, after trigger rows are solved (loss below 0.1 nats), sink weight and value "
                "norm of BOS move against each other (rank correlation over checkpoints -0.9 or less); and each "
                "needs the other: with the value of BOS held at the mean norm of the others the sink ends at "
                "most half as large, and with BOS's weight held at its share of an even row the value norm ends "
                "at least half the mean of the others"
            ),
            control="the unconstrained run of the same seed and steps",
            known=(
                "at this size the sink does not need the drain: with the value of BOS held it ends at 0.75 to 0.89, "
                "no lower than in the free run; the other half holds (the value stays when the weight is held), and "
                "the two move against each other with rank correlations of -0.70 to -0.94"
            ),
        ),
        Claim(
            id="mitigation",
            kind="claim",
            claim=(
                "Building on these insights, we propose strategies to mitigate extreme-token phenomena during "
                "pretraining, including replacing softmax with ReLU and Adam with SGD."
            ),
            paper_figure=(
                "ReLU: no sink and no drain; SGD: the residual peak is gone in three layers (figures of the paper)"
            ),
            criterion=(
                "at a trigger loss within 0.1 nats of the softmax model: with ReLU weights, BOS receives less "
                "than 0.1 of a row's weight on rows that are no trigger, and its value norm is above 0.6 of the "
                "mean of the others; with three layers and SGD, the largest residual ratio of BOS exceeds 1 by "
                "at most half as much as with AdamW"
            ),
            control="the softmax and AdamW models of the same seed, steps and size",
            known=(
                "ReLU weights leave no sink in any seed, and SGD no residual peak, but the value of BOS still falls to "
                "0.48 to 0.59 of the others under ReLU, just below the limit of 0.6"
            ),
        ),
        Claim(
            id="language-models",
            kind="claim",
            claim=(
                "Next, we extend our analysis to pretrained LLMs, including Llama and OLMo, showing that many "
                "attention heads exhibit a similar active-dormant mechanism as in the BB task,"
            ),
            paper_figure="Llama-2-7B head 16.25: dormant on Wikipedia, active on GitHub (figure of the paper)",
            criterion=(
                "in the text model at least a tenth of the heads are dormant on one kind of text (mean weight "
                "of the first token above 0.5 on held-out prose or code or repeats) and active on another "
                "(below half of that), and removing such a head costs more loss where it is active than where "
                "it is dormant (paired interval over texts excludes 0)"
            ),
            control="the largest difference between two halves of the same kind of text",
            known=(
                "3 of 32 heads (9 %) rest on one kind of text and not on another, just under a tenth, and removing one "
                "costs no more where it is active: in four layers the other heads make up for it"
            ),
        ),
        Claim(
            id="pretraining-dynamics",
            kind="untestable",
            claim=(
                "and that the mutual reinforcement mechanism also governs the emergence of extreme-token "
                "phenomena during LLM pretraining."
            ),
            paper_figure="OLMo checkpoints (figure of the paper)",
            criterion="needs checkpoints along the pretraining of a large language model, which do not fit here",
        ),
        Claim(
            id="align",
            kind="untestable",
            claim=(
                "Our results reveal that many of the static and dynamic properties of extreme-token phenomena "
                "predicted by the BB task align with observations in pretrained LLMs."
            ),
            criterion=(
                "dynamic properties need checkpoints of a large model; the static one that the task predicts is "
                "measured in our text model by the row `drain-follows-sink`"
            ),
        ),
        Claim(
            id="drain-follows-sink",
            kind="check",
            claim=(
                "In a trained language model, the more a head rests on the first token, the smaller that token's value."
            ),
            criterion=(
                "over the heads of the text model, sink weight and value ratio have a rank correlation of -0.3 or less"
            ),
            control="the same correlation for the second token, and 200 permutations of the heads",
        ),
        Claim(
            id="rest-is-silence",
            kind="check",
            claim="A dormant head says nothing: removing it and moving all its weight to BOS are nearly the same.",
            criterion=(
                "in the trained one-layer model the excess losses of the two differ by less than 0.05 nats on "
                "rows that are no trigger, where moving the weight to a random other token costs more"
            ),
            control="all weight moved to a random earlier token",
        ),
        Claim(
            id="generator",
            kind="check",
            claim="The generated data is the paper's task: a trigger is always followed by the token before it.",
            criterion="the share of trigger rows that copy is exactly 1, and BOS is never copied",
        ),
    ),
)

STEPS, DEEP_STEPS, CHECKPOINTS = 1600, 1200, tuple(range(0, 1601, 100))
TEXTS, LENGTH = 48, 256


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Train small decoders on Bigram-Backcopy, changed and unchanged; read the shipped text model."""
    toy = _Toy(run)
    rows = {**_one_layer(toy), **_three_layers(toy)}
    language, panels = _language_model(run)
    _draw(run, toy, panels)
    return rows | language


@dataclass
class _State:
    """What the paper plots for a model: mean weights, value and residual ratios for each layer, and losses."""

    sink_other: list[float]
    sink_trigger: list[float]
    before_trigger: list[float]
    drain: list[float]
    peak: list[float]
    losses: dict[str, float]


class _Toy:
    """The task, and models trained on it."""

    def __init__(self, run: "Run"):
        import torch

        from headwise.tasks.bigram_backcopy import BigramBackcopy

        self.run, self.text = run, BigramBackcopy(32, 3, 48, seed=run.seed)
        self.seen = self.text.sample(256, torch.Generator().manual_seed(10_000 + run.seed))
        self.along: dict[int, _State] = {}
        self.found: dict[str, _State] = {}

    def train(self, name: str, *, steps: int = STEPS, sgd: bool = False, **options: Any) -> "nn.Module":
        import torch

        from headwise.models.backcopy_decoder import BackcopyDecoder
        from headwise.training import OptimiserSpec, fit

        self.run.log(f"training {name}")
        adamw = OptimiserSpec(lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
        torch.manual_seed(self.run.seed)
        model = BackcopyDecoder(self.text.num_tokens, self.text.length, **options)
        fit(
            model,
            lambda step, generator: self.text.sample(32, generator),
            lambda model, ids: torch.nn.functional.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:]),
            steps=steps,
            seed=self.run.seed,
            optimiser=OptimiserSpec("sgd", lr=0.3, momentum=0.9) if sgd else adamw,
            clip=1.0 if sgd else None,  # at this rate SGD diverges without
            checkpoints=() if options else CHECKPOINTS,
            on_checkpoint=lambda step, model: self.along.update({step: self.measure(model)}),
        )
        return model

    def measure(self, model: "nn.Module", *, rows: "Tensor | None" = None, instead: str | None = None) -> _State:
        """rows: which rows count as triggers, those of the task when None."""
        import torch

        from headwise.models.backcopy_decoder import Trace

        trace = Trace()
        with torch.no_grad():
            logits = model(self.seen, trace=trace, instead=instead)
        # Row 0 sees only itself, and the token before row 1 is BOS.
        trigger = (self.text.trigger_mask(self.seen) if rows is None else rows)[:, 2:]
        state = _State([], [], [], [], [], self.text.losses(logits, self.seen))
        for weights, values, residual in zip(trace.weights, trace.values, trace.residuals[1:], strict=True):
            kept = weights[:, 0, 2:]
            share = kept[..., 0] / kept.sum(-1).clamp_min(1e-9)  # ReLU rows do not sum to 1
            state.sink_other.append(float(share[~trigger].mean()))
            state.sink_trigger.append(float(share[trigger].mean()))
            state.before_trigger.append(float(kept.diagonal(1, 1, 2)[trigger].mean()))
            state.drain.append(_first_to_others(values[:, 0]))
            state.peak.append(_first_to_others(residual))
        return state


def _first_to_others(states: "Tensor") -> float:
    norms = states.norm(dim=-1)
    return float(norms[:, 0].mean() / norms[:, 1:].mean())


def _one_layer(toy: _Toy) -> dict[str, "Measured"]:
    import torch

    from headwise.papers.statistics import rank_correlation
    from headwise.papers.verdicts import Measured

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
        "generator": _generator(toy),
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


def _three_layers(toy: _Toy) -> dict[str, "Measured"]:
    from headwise.papers.verdicts import Measured

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


def _generator(toy: _Toy) -> "Measured":
    from headwise.papers.verdicts import Measured

    ids, trigger = toy.seen, toy.text.trigger_mask(toy.seen)[:, 1:-1]
    copied = (ids[:, 2:] == ids[:, :-2])[trigger].float().mean()
    bos = int((ids[:, 1:] == toy.text.bos).sum())
    return Measured(
        measured=f"{copied:.4f} of {int(trigger.sum())} trigger rows copy; BOS occurs {bos} times after the start",
        holds=bool(copied == 1 and bos == 0),
    )


def _held_out(tokenizer: Any, kind: str, seed: int) -> "Tensor":
    """Windows of text that the model was not trained on: prose, code, or random tokens repeated."""
    import torch

    from headwise.specimens._text_data import read_sources

    generator = torch.Generator().manual_seed(seed)
    if kind == "repeats":
        part = torch.randint(3, len(tokenizer), (TEXTS, LENGTH // 4), generator=generator)
        ids = part.repeat(1, 4)[:, : LENGTH - 1]
    else:
        sources = [source for source in read_sources()[0] if source.kind == kind and source.held_out]
        stream = tokenizer("\n\n".join(s.text for s in sources), add_special_tokens=False, verbose=False).input_ids
        starts = torch.randint(0, len(stream) - LENGTH, (TEXTS,), generator=generator).tolist()
        ids = torch.tensor([stream[start : start + LENGTH - 1] for start in starts])
    return torch.cat([torch.full((TEXTS, 1), tokenizer.bos_token_id), ids], 1)


def _language_model(run: "Run") -> tuple[dict[str, "Measured"], dict[str, list[float]]]:
    import torch

    from headwise.heads.dormant import extreme_tokens
    from headwise.specimens.registry import load_specimen

    run.log("reading the text model")
    specimen = load_specimen("text")
    model = specimen.model
    texts = {kind: _held_out(specimen.tokenizer, kind, run.seed) for kind in ("prose", "code", "repeats")}
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


def _characterised(first: "ExtremeTokens", second: "ExtremeTokens", random: "ExtremeTokens") -> "Measured":
    from statistics import median

    from headwise.papers.verdicts import Measured

    even = sum(1 / (t + 1) for t in range(1, LENGTH)) / (LENGTH - 1)

    def figures(found: "ExtremeTokens") -> tuple[float, float, float]:
        sinks, drains = found.map.of("sink"), found.map.of("drain")
        heads = [head for head, mass in sinks.items() if (mass or 0) >= 5 * even]
        value = median(float(drains[head] or 0) for head in heads) if heads else float("nan")
        return len(heads) / len(sinks), value, float(found.peak.max()) if found.peak is not None else float("nan")

    def told(found: "ExtremeTokens") -> str:
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


def _active_somewhere(run: "Run", model: "nn.Module", texts: "dict[str, Tensor]") -> "Measured":
    import torch

    from headwise.attend.edits import Ablate
    from headwise.heads.dormant import activity
    from headwise.hf.session import steer
    from headwise.papers.statistics import bootstrap_interval, mean
    from headwise.papers.verdicts import Measured

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

    def losses(ids: "Tensor") -> "Tensor":
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


def _drain_follows_sink(run: "Run", first: "ExtremeTokens", second: "ExtremeTokens") -> "Measured":
    import numpy as np

    from headwise.papers.statistics import rank_correlation
    from headwise.papers.verdicts import Measured

    def correlation(found: "ExtremeTokens") -> float:
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


def _draw(run: "Run", toy: _Toy, heads: dict[str, list[float]]) -> None:
    from headwise.report.plots import COLOURS, figure, lines

    path = run.out / f"{PAPER.slug}-figure.png"
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
