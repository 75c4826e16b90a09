"""The rows of attention_adversarial_training.py, one function for each, and its picture."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models.attention_classifier import AttentionClassifier
from headwise.papers._adversarial_setup import (
    AT,
    ATTACK,
    EPSILONS,
    IAT,
    METHODS,
    MINUS,
    RANDOM,
    SENTIMENT,
    SIZE,
    SWEPT,
    UNIFORM,
    VANILLA,
    WORD_AT,
    WORD_IAT,
    Trained,
    inputs_of,
)
from headwise.papers.running import Run
from headwise.papers.statistics import mean, paired_bootstrap_interval
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, MARKERS, bars, figure
from headwise.tasks.cue_words import SentenceBatch
from headwise.training import AttentionAT

STRONG = f"{AT}, eps {ATTACK:g}"
NOISE = f"{RANDOM}, eps {ATTACK:g}"


def vulnerable(found: Trained) -> Measured:
    whole, even = mean(found.of(VANILLA, "right")), mean(found.of(UNIFORM, "right"))
    attacked, shaken = mean(found.of(VANILLA, "attacked")), mean(found.of(VANILLA, "shaken"))
    lost, noise = whole - attacked, whole - shaken
    margin = min(whole - even, lost - 0.1, lost / 2 - noise)
    return Measured(
        measured=f"accuracy {whole:.3f}, with uniform weights {even:.3f}; under attack {attacked:.3f}",
        control=f"under noise of the same length {shaken:.3f}",
        holds=margin >= 0,
        margin=margin,
        values={"attention": whole, "uniform weights": even, "under attack": attacked, "under noise": shaken},
    )


def robust(found: Trained) -> Measured:
    plain, noise, strong = (found.outcomes[SENTIMENT, name] for name in (VANILLA, NOISE, STRONG))
    kept = {name: mean(found.outcomes[SENTIMENT, name].attacked) for name in (VANILLA, NOISE, STRONG)}
    margin = min(
        kept[STRONG] - kept[VANILLA] - 0.04, kept[STRONG] - kept[NOISE] - 0.04, strong.accuracy - plain.accuracy + 0.01
    )
    return Measured(
        measured=(
            f"under attack {kept[STRONG]:.3f}, plain training {kept[VANILLA]:.3f}; clean {strong.accuracy:.3f} and "
            f"{plain.accuracy:.3f}"
        ),
        control=f"random perturbations: under attack {kept[NOISE]:.3f}, clean {noise.accuracy:.3f}",
        holds=margin >= 0,
        margin=margin,
        values={
            "attacked, Attention AT": kept[STRONG],
            "attacked, vanilla": kept[VANILLA],
            "attacked, random": kept[NOISE],
            "clean, Attention AT": strong.accuracy,
            "clean, vanilla": plain.accuracy,
        },
    )


def transformer_classifiers(seed: int) -> dict[str, nn.Module]:
    """Small classifiers with random weights, drawn large enough for attention that is not uniform."""
    import transformers as hf

    width: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_labels": 3,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    slim: dict[str, Any] = {
        "vocab_size": 64,
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "num_labels": 3,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            "BERT": hf.BertForSequenceClassification(hf.BertConfig(**width)),
            "DistilBERT": hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**slim)),
            "RoBERTa": hf.RobertaForSequenceClassification(hf.RobertaConfig(**width)),
            "Llama": hf.LlamaForSequenceClassification(hf.LlamaConfig(**width, num_key_value_heads=2)),
        }


def general(found: Trained, run: Run) -> Measured:
    """Every architecture and task: does a perturbation raise the loss, and does a step go through?"""
    work: dict[str, tuple[nn.Module, list[dict[str, Tensor]]]] = {}
    for name, task in found.tasks.items():
        parts = [task.train.part(slice(start, start + 16)) for start in range(0, 64, 16)]
        batches = [{**inputs_of(part, run.device), "labels": part.labels.to(run.device)} for part in parts]
        work[name] = copy.deepcopy(found.models[name, VANILLA]), batches
    words = found.tasks["inference"].train
    for name, model in transformer_classifiers(run.seed).items():
        parts = [words.part(slice(start, start + 16)) for start in range(0, 64, 16)]
        batches = [{"input_ids": part.input_ids, "labels": part.labels} for part in parts]
        work[name] = model.eval(), batches
    raised, noise, finite = [], [], True
    for model, batches in work.values():
        for batch in batches:
            for mode in ("at", "iat", "random"):
                at = AttentionAT(model, eps=0.1, mode=mode)
                clean, r = at.perturbation(lambda m=model, b=batch: m(**b))
                with at.perturbed(r), torch.no_grad():
                    loss = model(**batch).loss
                (noise if mode == "random" else raised).append(float(loss > clean))
        for mode in ("at", "iat"):
            finite &= _step_is_finite(copy.deepcopy(model).train(), batches[0], mode)
    share = mean(raised)
    return Measured(
        measured=f"the loss rises in {share:.3f} of {len(raised)} batches; steps finite: {finite}",
        control=f"random: in {mean(noise):.3f} of {len(noise)}",
        holds=share == 1 and finite,
        values={"raised": share, "raised by noise": mean(noise)},
    )


def _step_is_finite(model: nn.Module, batch: dict[str, Tensor], mode: str) -> bool:
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    AttentionAT(model, eps=1.0, mode=mode)(lambda: model(**batch)).backward()
    optimiser.step()
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def _gain(found: Trained, what: str, method: str, over: str, seed: int) -> tuple[float, tuple[float, float]]:
    """Mean difference over all test sentences, and its interval."""
    a, b = found.of(method, what), found.of(over, what)
    return mean(a) - mean(b), paired_bootstrap_interval(a, b, seed=seed)


def _least(gains: list[tuple[float, tuple[float, float]]]) -> tuple[float, tuple[float, float]]:
    return min(gains, key=lambda gain: gain[0])


def _told(found: Trained, what: str, methods: tuple[str, ...]) -> str:
    return ", ".join(f"{method} {mean(found.of(method, what)):.3f}" for method in methods)


def _over_plain(found: Trained, what: str, words: str, run: Run, more: str = "") -> Measured:
    margin, interval = _least([_gain(found, what, method, VANILLA, run.seed) for method in (AT, IAT)])
    return Measured(
        measured=(
            f"mean {words}: {_told(found, what, (AT, IAT, VANILLA))}; the smaller gain is {margin:+.3f} "
            f"({interval[0]:+.3f} to {interval[1]:+.3f})"
        ),
        control=_told(found, what, (RANDOM, WORD_AT, WORD_IAT)) + more,
        holds=margin >= 0,
        margin=margin,
        interval=interval,
        values={method: mean(found.of(method, what)) for method in METHODS},
    )


def performance(found: Trained, run: Run) -> Measured:
    eps = ", ".join(f"{method} {found.chosen[method]:g}" for method in SWEPT)
    return _over_plain(found, "right", "accuracy", run, f"; eps: {eps}")


def interpretability(found: Trained, run: Run) -> Measured:
    minus, plain, strong = (found.outcomes[SENTIMENT, name] for name in (MINUS, VANILLA, STRONG))
    more = (
        f"; sentiment, eps {ATTACK:g}: minus AT {mean(minus.correlation):.3f} (accuracy {minus.accuracy:.3f}, under "
        f"attack {mean(minus.attacked):.3f}), Attention AT {mean(strong.correlation):.3f}, vanilla "
        f"{mean(plain.correlation):.3f}"
    )
    row = _over_plain(found, "correlation", "correlation", run, more)
    told = {
        f"{what}, {method}": mean([getattr(found.outcomes[task, method], name) for task in found.tasks])
        for method in METHODS
        for what, name in (("kendall", "kendall"), ("mass on cues", "mass"))
    }
    extra = {"minus AT, sentiment": mean(minus.correlation), "vanilla, sentiment": mean(plain.correlation)}
    return Measured(
        measured=row.measured,
        control=row.control,
        holds=row.holds,
        margin=row.margin,
        interval=row.interval,
        values={**row.values, **told, **extra},
    )


def boosts(found: Trained, run: Run) -> Measured:
    kinds = {"accuracy": "right", "correlation": "correlation", "difference of weights": "spread"}
    gains = {name: _gain(found, what, IAT, AT, run.seed) for name, what in kinds.items()}
    margin, interval = _least(list(gains.values()))
    return Measured(
        measured="iAT minus AT: "
        + ", ".join(f"{name} {gain:+.3f} ({low:+.3f} to {high:+.3f})" for name, (gain, (low, high)) in gains.items()),
        control="plain training: " + ", ".join(f"{k} {mean(found.of(VANILLA, what)):.3f}" for k, what in kinds.items()),
        holds=margin >= 0,
        margin=margin,
        interval=interval,
        values={name: gain for name, (gain, _) in gains.items()},
    )


def nine_of_ten(found: Trained) -> Measured:
    best = {}
    for task in found.tasks:
        scores = {method: found.outcomes[task, method].accuracy for method in METHODS}
        best[task] = [method for method, score in scores.items() if score == max(scores.values())]
    ours = mean([float(set(methods) <= {AT, IAT}) for methods in best.values()])
    counts = {method: sum(method in methods for methods in best.values()) for method in METHODS}
    most = max(count for method, count in counts.items() if method != IAT)
    return Measured(
        measured="best: " + "; ".join(f"{task}: {' and '.join(methods)}" for task, methods in best.items()),
        control="; ".join(
            f"{task}: " + ", ".join(f"{method} {found.outcomes[task, method].accuracy:.3f}" for method in METHODS)
            for task in found.tasks
        ),
        holds=ours >= 0.9 and counts[IAT] > most,
        values={"share of tasks": ours} | {f"tasks led, {method}": float(count) for method, count in counts.items()},
    )


def all_tasks(found: Trained) -> Measured:
    def gain(task: str, method: str) -> float:
        return mean(found.outcomes[task, method].correlation) - mean(found.outcomes[task, VANILLA].correlation)

    def told(methods: tuple[str, ...]) -> str:
        return "; ".join(
            f"{task}: " + ", ".join(f"{method} {gain(task, method):+.3f}" for method in methods) for task in found.tasks
        )

    margin = min(gain(task, method) for task in found.tasks for method in (AT, IAT))
    return Measured(
        measured=f"correlation over plain training: {told((AT, IAT))}",
        control=told((WORD_AT, WORD_IAT)),
        holds=margin > 0,
        margin=margin if margin else None,
        values={f"{task}, {method}": gain(task, method) for task in found.tasks for method in METHODS},
    )


def perturbation_size(found: Trained) -> Measured:
    width = {method: max(values) - min(values) for method, values in found.sweep.items()}
    margin = min(width[WORD_AT], width[WORD_IAT]) / 2 - max(width[AT], width[IAT])
    return Measured(
        measured="range of accuracy over eps: " + ", ".join(f"{method} {width[method]:.3f}" for method in SWEPT),
        control=f"eps 0: accuracy {found.outcomes[SENTIMENT, VANILLA].accuracy:.3f}; "
        + "; ".join(f"{m}: {', '.join(f'{value:.3f}' for value in found.sweep[m])}" for m in SWEPT),
        holds=margin > 0,
        margin=margin if margin else None,
        values={f"range, {method}": value for method, value in width.items()},
    )


@dataclass
class Probed:
    """A trained model in float64 on one batch of full-length and shorter sentences."""

    model: AttentionClassifier
    inputs: dict[str, Tensor]
    labels: Tensor
    mask: Tensor

    @classmethod
    def of(cls, found: Trained) -> "Probed":
        batch: SentenceBatch = found.tasks[SENTIMENT].test.part(slice(SIZE))
        model = copy.deepcopy(found.models[SENTIMENT, VANILLA]).double().cpu()
        return cls(model, inputs_of(batch, "cpu"), batch.labels, batch.mask)

    def losses(self) -> Tensor:
        """The loss of each sentence."""
        logits = self.model(**self.inputs).logits[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(logits, self.labels.double(), reduction="none")

    def perturbation(self, mode: str, eps: float) -> Tensor:
        _, r = AttentionAT(self.model, eps=eps, mode=mode).perturbation(lambda: self.losses().sum())
        return r[0, 0][:, 0]

    def moved(self, r: Tensor) -> Tensor:
        """Change of each sentence's loss under a perturbation."""
        at = AttentionAT(self.model)
        with torch.no_grad():
            before = self.losses()
            with at.perturbed({(0, 0): r[:, None]}):
                return self.losses() - before

    def with_scores(self, change: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
        """Gradient of the summed loss for a leaf that changes the scores `[b t]`."""
        handle = self.model.attention.score_point.register_forward_hook(
            lambda module, args, scores: change(scores[:, 0])[:, None]
        )
        try:
            return torch.autograd.grad(self.losses().sum(), leaf)[0]
        finally:
            handle.remove()

    def gradient(self) -> Tensor:
        leaf = torch.zeros(self.mask.shape, dtype=torch.float64, requires_grad=True)
        return self.with_scores(lambda scores: scores + leaf, leaf)

    def iat_by_definition(self, normalised: str, eps: float) -> Tensor:
        """r = sum_k alpha_tk d_tk with alpha = eps g / ||g||, g by autograd; rows or the whole matrix d normalised."""
        kept: list[Tensor] = []
        pairs = self.mask[:, :, None] & self.mask[:, None, :]
        alpha = torch.zeros(pairs.shape, dtype=torch.float64, requires_grad=True)

        def change(scores: Tensor) -> Tensor:
            known = scores.detach().masked_fill(~self.mask, 0)
            d = (known[:, :, None] - known[:, None, :]).masked_fill(~pairs, 0)
            size = d.norm(dim=2, keepdim=True) if normalised == "rows" else d.norm(dim=(1, 2), keepdim=True)
            d = d / size.masked_fill(size == 0, 1)
            kept.append(d)
            return scores + (alpha * d).sum(2)

        g = self.with_scores(change, alpha)
        best = eps * g / g.flatten(1).norm(dim=1)[:, None, None]
        return (best * kept[0]).sum(2)


def first_order(probed: Probed) -> Measured:
    eps = 1e-5
    r, g = probed.perturbation("at", eps), probed.gradient()
    ratio = probed.moved(r) / (eps * g.norm(dim=1))
    error = float((ratio - 1).abs().max())
    faults = {
        "length": float((r.norm(dim=1) / eps - 1).abs().max()),
        "sum": float(r.sum(1).abs().max()) / eps,
        "on padding": float(r[~probed.mask].abs().max()) / eps if (~probed.mask).any() else 0.0,
    }
    return Measured(
        measured=f"ratio within {error:.1e} of 1; "
        + ", ".join(f"{name} {value:.1e}" for name, value in faults.items()),
        holds=error < 1e-3 and max(faults.values()) < 1e-9,
        values={"ratio off by": error, **faults},
    )


def sign(probed: Probed) -> Measured:
    g, holds, said, values = probed.gradient(), True, [], {}
    some = g.norm(dim=1) > 0
    for mode in ("at", "iat"):
        r = probed.perturbation(mode, 1e-3)
        climbs = float(((r * g).sum(1) > 0)[some].double().mean())
        rises = float((probed.moved(r) > 0)[some].double().mean())
        falls = float((probed.moved(-r) < 0)[some].double().mean())
        holds &= climbs == rises == falls == 1
        said.append(f"{mode}: r . g > 0 in {climbs:.3f}, loss up in {rises:.3f}, down with -r in {falls:.3f}")
        values |= {f"{mode}, up": rises, f"{mode}, down with the sign turned": falls}
    return Measured(measured="; ".join(said), holds=holds, values=values)


def row_normalised(probed: Probed) -> Measured:
    at, iat = probed.perturbation("at", 1.0), probed.iat_by_definition("rows", 1.0)
    error = float((at - iat).norm(dim=1).max())
    return Measured(measured=f"differs from AT by {error:.1e}", holds=error < 1e-9, values={"difference": error})


def globally_normalised(probed: Probed) -> Measured:
    raw = probed.iat_by_definition("matrix", 1.0)
    size = raw.norm(dim=1, keepdim=True)
    error = float((raw / size - probed.perturbation("iat", 1.0)).norm(dim=1).max())
    cosine = float((raw / size * probed.perturbation("at", 1.0)).sum(1).mean())
    return Measured(
        measured=(
            f"differs from mode='iat' by {error:.1e}; cosine with AT {cosine:.3f}, length before rescaling "
            f"{float(size.mean()):.2f} eps"
        ),
        holds=error < 1e-9 and cosine < 0.999,
        values={"difference": error, "cosine with AT": cosine, "length before rescaling": float(size.mean())},
    )


def draw(run: Run, found: Trained) -> None:
    """Accuracy and correlation by task, and accuracy over eps."""
    path = run.out / f"{run.paper.slug}.png"
    names = list(found.tasks)
    with figure(path, 3, width=5.2) as (left, middle, right):
        scores = {m: [found.outcomes[task, m].accuracy for task in names] for m in METHODS}
        bars(left, names, scores, y="test accuracy", title="Accuracy")
        left.set_ylim(0, 1.35)
        left.legend(loc="upper center", ncols=3, fontsize=8)
        agree = {m: [mean(found.outcomes[task, m].correlation) for task in names] for m in METHODS}
        bars(middle, names, agree, y="Pearson's r, mean over sentences", title="Attention and gradient importance")
        middle.legend().remove()
        plain = [found.outcomes[SENTIMENT, VANILLA].accuracy] * len(EPSILONS)
        # A method has one colour in all panels, so the lines are drawn by their place among the methods.
        for method in METHODS:
            if method == VANILLA or method in found.sweep:
                place = METHODS.index(method)
                values = plain if method == VANILLA else found.sweep[method]
                right.plot(EPSILONS, values, color=COLOURS[place], marker=MARKERS[place])
        right.set(xlabel="eps", ylabel="test accuracy, sentiment", title="Size of the perturbation")
        right.set_xscale("log")
        right.set_xticks(list(EPSILONS), [f"{eps:g}" for eps in EPSILONS])
    run.figures.append(path)
