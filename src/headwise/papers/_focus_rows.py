"""The rows of Focus, from what its models answered; the record of the paper is in focus_gui_grounding.py."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from headwise.papers._focus_setup import Outcomes, composed
from headwise.papers.statistics import paired_bootstrap_interval
from headwise.papers.verdicts import Measured
from headwise.tasks.gui import SwitchCurve, switch_curve
from headwise.tasks.interfaces import GUI_KINDS

Interval = tuple[float, float]
Part = tuple[float, Interval]  # a margin and its interval

STRUGGLE, SWITCH, GAIN, TOKENS, LOSS = 0.10, 0.20, 0.10, 0.70, 0.02
FOLLOWS, REGION, SUMMARY = 0.80, 0.90, 0.90
PAPER_COST = 0.81  # 2.6 s of 3.2 s a sample
DRAWS = 2000


def share(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0


def paired(a: Tensor, b: Tensor, seed: int, shift: float = 0.0) -> Part:
    """The mean of a - b + shift over screens, and its interval."""
    low, high = paired_bootstrap_interval(a.double().tolist(), b.double().tolist(), draws=DRAWS, seed=seed)
    return share(a) - share(b) + shift, (low + shift, high + shift)


def apart(statistic: Callable[[Tensor], float], groups: Tensor, seed: int) -> Part:
    """A statistic of screen numbers, and its interval when screens are drawn again within each group."""
    rng = np.random.default_rng(seed)
    places = [(groups == group).nonzero()[:, 0].numpy() for group in groups.unique()]
    drawn = [
        statistic(torch.from_numpy(np.concatenate([rng.choice(place, len(place)) for place in places])))
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return statistic(torch.arange(len(groups))), (float(low), float(high))


def against(value: Tensor, level: float, seed: int) -> Part:
    """The mean minus a level."""
    return paired(value, torch.zeros(len(value)), seed, -level)


def together(parts: Mapping[str, Part]) -> tuple[float, Interval]:
    """All of several parts: the least margin, and the least of each end."""
    return min(m for m, _ in parts.values()), (
        min(i[0] for _, i in parts.values()),
        min(i[1] for _, i in parts.values()),
    )


def verdict(
    parts: Mapping[str, Part], measured: str, control: str, values: Mapping[str, float] | None = None
) -> Measured:
    margin, interval = together(parts)
    return Measured(
        measured=measured, control=control, holds=margin >= 0, margin=margin, interval=interval, values=values or {}
    )


def by_kind(right: Tensor, kind: Tensor) -> str:
    """ "easy 0.990, hard 0.512, nested 0.430"."""
    return ", ".join(f"{name} {share(right[kind == number]):.3f}" for number, name in enumerate(GUI_KINDS))


def difference(values: Tensor, complex_: Tensor) -> Callable[[Tensor], float]:
    """Of screen numbers: the mean over the complex ones minus that over the easy ones."""

    def statistic(index: Tensor) -> float:
        v, c = values[index].double(), complex_[index]
        return float(v[c].mean() - v[~c].mean())

    return statistic


def struggle(found: Outcomes, seed: int) -> Measured:
    """How much less often immediate answers are right on complex screens."""
    statistic = difference(-found.fast.right.double(), found.complex)
    value, (low, high) = apart(statistic, found.kind, seed)
    return verdict(
        {"gap": (value - STRUGGLE, (low - STRUGGLE, high - STRUGGLE))},
        f"immediate answers are right on {by_kind(found.fast.right, found.kind)}: {value:.3f} less on complex screens "
        f"({low:.3f} to {high:.3f})",
        f"answers in stages: {by_kind(found.slow.right, found.kind)}; the base, on other screens, was wrong on "
        + ", ".join(f"{name} {rate:.3f}" for name, rate in found.label_rate.items()),
        {f"right at once, {name}": share(found.fast.right[found.kind == k]) for k, name in enumerate(GUI_KINDS)},
    )


def random_switch(found: Outcomes) -> Tensor:
    """How often each screen is right where a coin with the slow rate chooses the way."""
    rate = share(found.went_slow)
    return rate * found.thorough.right.double() + (1 - rate) * found.quick.right.double()


def word_switch(found: Outcomes) -> Tensor:
    """The same where the longest instructions go slow, as many as did (ties share what is left)."""
    left, chance = float(found.went_slow.sum()), torch.zeros(len(found.words), dtype=torch.float64)
    for words in (2, 1, 0):
        of = found.words == words
        take = min(left, float(of.sum()))
        if take > 0:
            chance[of] = take / float(of.sum())
        left -= take
    return chance * found.thorough.right.double() + (1 - chance) * found.quick.right.double()


def switching(found: Outcomes, seed: int) -> Measured:
    """Whether complex screens go slow more often, and whether the right ones do."""
    slow = found.went_slow
    rates = {name: share(slow[found.kind == k]) for k, name in enumerate(GUI_KINDS)}
    more, (low, high) = apart(difference(slow.double(), found.complex), found.kind, seed)
    parts = {
        "rate": (more - SWITCH, (low - SWITCH, high - SWITCH)),
        "random": paired(found.adaptive.right, random_switch(found), seed),
    }
    oracle = found.quick.right | found.thorough.right
    gain, interval = parts["random"]
    return verdict(
        parts,
        "slow on " + ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items()) + f" at theta {found.theta:.3f} "
        f"chosen on other screens; accuracy {share(found.adaptive.right):.3f}, {gain:+.3f} ({interval[0]:+.3f} to "
        f"{interval[1]:+.3f}) against a random switch with the same slow rate",
        f"random switch {share(random_switch(found)):.3f}; a switch by the number of words of the instruction, as "
        f"often slow, {share(word_switch(found)):.3f}; the better way of each screen {share(oracle):.3f}",
        {f"slow, {name}": rate for name, rate in rates.items()}
        | {"random switch": share(random_switch(found)), "oracle": share(oracle)},
    )


def token_ratio(found: Outcomes) -> Callable[[Tensor], float]:
    """Of screen numbers: tokens of adaptive answers over those of answers in stages."""
    return lambda index: float(found.adaptive.tokens[index].mean() / found.slow.tokens[index].mean())


def efficiency(found: Outcomes, seed: int) -> Measured:
    """Accuracy against both pure systems, and tokens."""
    c = found.complex
    ratio, (low, high) = apart(token_ratio(found), found.kind, seed)
    parts = {
        "fast": paired(found.adaptive.right[c], found.fast.right[c], seed, -GAIN),
        "tokens": (TOKENS - ratio, (TOKENS - high, TOKENS - low)),
        "slow": paired(found.adaptive.right, found.slow.right, seed, LOSS),
    }
    return verdict(
        parts,
        f"complex screens {share(found.adaptive.right[c]):.3f} against {share(found.fast.right[c]):.3f} at once; all "
        f"screens {share(found.adaptive.right):.3f} against {share(found.slow.right):.3f} always in stages, with "
        f"{ratio:.3f} of its tokens ({float(found.adaptive.tokens.mean()):.2f} and "
        f"{float(found.slow.tokens.mean()):.2f})",
        f"always at once {share(found.fast.right):.3f} with {float(found.fast.tokens.mean()):.2f} tokens; random "
        f"switch {share(random_switch(found)):.3f}",
        {"tokens": ratio} | {name: margin for name, (margin, _) in parts.items() if name != "tokens"},
    )


def stages(found: Outcomes, seed: int) -> Measured:
    """Whether the point is where the analysis says, also when another analysis is put in its place."""
    parts = {"region": against(found.region, REGION, seed), "follows": against(found.follows, FOLLOWS, seed)}
    twins = len(found.follows)
    return verdict(
        parts,
        f"{share(found.region):.3f} of the points lie in the panel and row that the analysis names; with the analysis "
        f"of the other element of the same shape in its place, {share(found.follows):.3f} of {twins} points are that "
        "element's",
        "an eighth of the screen is a panel's row: 0.125 by chance; a twin is one of 16 cells: 0.063",
        {"region": share(found.region), "follows": share(found.follows)},
    )


def understanding(found: Outcomes, seed: int) -> Measured:
    """What the stages say, and what they are worth on complex screens."""
    c = found.complex
    parts = {
        "summary": against(found.summary, SUMMARY, seed),
        "gain": paired(found.slow.right[c], found.fast.right[c], seed, -GAIN),
        "content": paired(found.thorough.right[c], found.shuffled[c], seed, -GAIN),
    }
    return verdict(
        parts,
        f"{share(found.summary):.3f} of the summaries name the four panels rightly, {share(found.analysis):.3f} of the "
        f"analyses are right word for word; complex screens: {share(found.slow.right[c]):.3f} in stages, "
        f"{share(found.fast.right[c]):.3f} at once",
        f"with the stages of another screen, as many tokens: {share(found.shuffled[c]):.3f}, with its own "
        f"{share(found.thorough.right[c]):.3f}",
        {"summaries": share(found.summary), "analyses": share(found.analysis), "shuffled": share(found.shuffled[c])},
    )


def data(found: Outcomes, seed: int) -> Measured:
    """Against immediate answers that learned from twice as many screens for twice as long."""
    part = paired(found.adaptive.right, found.longer.right, seed)
    return verdict(
        {"longer": part},
        f"{share(found.adaptive.right):.3f} right, {part[0]:+.3f} ({part[1][0]:+.3f} to {part[1][1]:+.3f}) against "
        f"immediate answers after twice the screens and steps, {share(found.longer.right):.3f}",
        f"immediate answers after as many screens and steps {share(found.fast.right):.3f}; one model size for all",
        {"adaptive": share(found.adaptive.right), "longer": share(found.longer.right)},
    )


def complexity(found: Outcomes, seed: int) -> Measured:
    """Whether the gain over immediate answers is larger where screens are complex."""
    c = found.complex
    gain = found.adaptive.right.double() - found.fast.right.double()
    parts = {
        "more": apart(difference(gain, c), found.kind, seed),
        "some": paired(found.adaptive.right[c], found.fast.right[c], seed),
    }
    sample, group = (
        share(found.adaptive.right),
        np.mean([share(found.adaptive.right[found.kind == k]) for k in (0, 1, 2)]),
    )
    return verdict(
        parts,
        f"gain over immediate answers {share(gain[c]):+.3f} on complex screens, {share(gain[~c]):+.3f} on easy ones; "
        f"right on {by_kind(found.adaptive.right, found.kind)} (mean over screens {sample:.3f}, over the three groups "
        f"{group:.3f})",
        f"at once {by_kind(found.fast.right, found.kind)}; always in stages {by_kind(found.slow.right, found.kind)}",
        {"gain, complex": share(gain[c]), "gain, easy": share(gain[~c])},
    )


def dual(found: Outcomes, seed: int) -> Measured:
    """The same model with its switch, against itself always in stages."""
    ratio, (low, high) = apart(
        lambda index: float(found.adaptive.tokens[index].mean() / found.thorough.tokens[index].mean()), found.kind, seed
    )
    parts = {
        "accuracy": paired(found.adaptive.right, found.thorough.right, seed),
        "tokens": (PAPER_COST - ratio, (PAPER_COST - high, PAPER_COST - low)),
    }
    return verdict(
        parts,
        f"{share(found.adaptive.right):.3f} right with the switch, {share(found.thorough.right):.3f} always in stages, "
        f"{share(found.quick.right):.3f} never; {ratio:.3f} of the tokens of always",
        f"random switch {share(random_switch(found)):.3f}; a model that learned stages alone "
        f"{share(found.slow.right):.3f}",
        {"with the switch": share(found.adaptive.right), "always": share(found.thorough.right), "tokens": ratio},
    )


def curve_of(found: Outcomes) -> SwitchCurve:
    return switch_curve(
        found.p_slow,
        found.quick.right,
        found.thorough.right,
        cost_fast=found.quick.tokens,
        cost_slow=found.thorough.tokens,
    )


def checks(found: Outcomes) -> dict[str, Measured]:
    """The exact facts, on the trained model and its stored outcomes."""
    curve = curve_of(found)
    falls = bool((curve.slow_rate.diff() <= 0).all())
    ends = [composed(found, torch.full_like(found.went_slow, slow)) for slow in (True, False)]
    error = max(
        abs(float(curve.accuracy[place]) - share(end.right)) + abs(float(curve.cost[place]) - share(end.tokens))
        for place, end in zip((0, -1), ends, strict=True)
    )
    built = composed(found, found.went_slow)
    whole = torch.equal(built.right, found.adaptive.right) and torch.equal(built.tokens, found.adaptive.tokens)
    return {
        "pure": Measured(
            measured=f"thresholds 0 and 1 {'give' if found.same_pure else 'do not give'} the tokens of the slow and "
            f"the fast way; the switched answers {'are' if whole else 'are not'} those of each screen's way",
            holds=found.same_pure and whole,
        ),
        "cache": Measured(
            measured=f"{found.same_scratch:.1%} of the answers on the shared cache are those of a generation from "
            f"scratch with the tag forced; the picture was read {found.pictures} time(s) for the "
            "decision and both ways",
            holds=found.same_scratch == 1 and found.pictures == 1,
        ),
        "curve": Measured(
            measured=f"over {len(curve.thresholds)} thresholds the slow rate {'never rises' if falls else 'rises'}; "
            f"ends agree with the pure systems to {error:.1e}",
            holds=falls and error < 1e-9,
        ),
    }
