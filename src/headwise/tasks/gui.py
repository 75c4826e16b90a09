"""Finding interface elements: what a model said as a point, whether it hits, and when a slow answer is worth it.

A point is (x, y) as shares of the picture's width and height. Models write thousandths of them (0 to 1000), or pixels
of the picture as it was resized for them; both are shares of the sides, whatever the size. An answer is right where
the point lies in the element's box, edges included (the ScreenSpot protocol).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "ClickAccuracy",
    "Point",
    "SwitchCurve",
    "calibrate_threshold",
    "click_accuracy",
    "cross_label_modes",
    "label_modes",
    "read_point",
    "switch_curve",
]

Point = tuple[float, float]
"""(x, y) as shares of the sides."""

Pair = tuple[float | int, float | int]  # width and height
Boxes = Float[Tensor, "n 4"] | Sequence[Sequence[float | int]]
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")


def read_point(text: str, size: Pair | None = None) -> Point | None:
    """The point that a text names: two numbers, or the middle of a box where there are four; None where it is neither.

    size: width and height of the picture that the model saw, where it writes pixels; None where it writes thousandths.
    A point outside the picture is None: it counts as wrong, it is no error.
    """
    numbers = [float(found) for found in NUMBER.findall(text)]
    if len(numbers) == 4:
        numbers = [(numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2]
    if len(numbers) != 2:
        return None
    width, height = (1000.0, 1000.0) if size is None else size
    x, y = numbers[0] / width, numbers[1] / height
    return (x, y) if 0 <= x <= 1 and 0 <= y <= 1 else None


@dataclass(frozen=True)
class ClickAccuracy:
    """Shares of right answers. sample_mean: over all answers. group_mean: the plain mean over groups, whatever their
    sizes; papers report either, say which. groups: group -> share; counts: group -> answers. unread: answers without a
    point."""

    sample_mean: float
    group_mean: float
    groups: dict[str, float]
    counts: dict[str, int]
    unread: int
    right: Bool[Tensor, " n"]


def click_accuracy(
    points: Sequence[Point | None],
    boxes: Boxes,
    *,
    groups: Sequence[str] | None = None,
    sizes: Sequence[Pair] | None = None,
) -> ClickAccuracy:
    """How many points lie in their boxes, edges included.

    boxes: x1, y1, x2, y2, in the unit of the points (shares of the sides, as `read_point` gives them). sizes: width and
    height of each picture where boxes are in its pixels. groups: one name an answer, such as "mobile/text". A point
    that is None is wrong.
    Raises ValueError for boxes with x2 < x1 or y2 < y1, for other lengths, and for no answers.
    """
    where = torch.as_tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    if not len(points) or not len(points) == len(where) == len(groups or points) == len(sizes or points):
        raise ValueError(
            f"click_accuracy: {len(points)} points, {len(where)} boxes"
            + (f", {len(groups)} groups" if groups is not None else "")
            + (f", {len(sizes)} sizes" if sizes is not None else "")
            + "; give one of each an answer, and one answer or more"
        )
    turned = ((where[:, 2] < where[:, 0]) | (where[:, 3] < where[:, 1])).nonzero()[:, 0].tolist()
    if turned:
        raise ValueError(
            f"click_accuracy: box {turned[0]} is {where[turned[0]].tolist()}; expected x1 <= x2 and y1 <= y2"
        )
    here = torch.tensor([(torch.nan, torch.nan) if p is None else p for p in points], dtype=torch.float64)
    if sizes is not None:
        here = here * torch.tensor(sizes, dtype=torch.float64)
    right = ((here >= where[:, :2]) & (here <= where[:, 2:])).all(1)  # nan is in no box
    names = list(groups) if groups is not None else ["all"] * len(points)
    shares, counts = {}, {}
    for name in sorted(set(names)):
        of = torch.tensor([other == name for other in names])
        shares[name], counts[name] = float(right[of].double().mean()), int(of.sum())
    return ClickAccuracy(
        sample_mean=float(right.double().mean()),
        group_mean=sum(shares.values()) / len(shares),
        groups=shares,
        counts=counts,
        unread=sum(point is None for point in points),
        right=right,
    )


def label_modes(
    points: Sequence[Point | None],
    boxes: Boxes,
    *,
    trained_on: Bool[Tensor, " n"] | None = None,
) -> Bool[Tensor, " n"]:
    """Which samples need the slow way: those that a model without stages answers wrongly. True is slow.

    trained_on: which of the samples that model was trained on. A model knows those by heart, and they all look fast:
    any such sample raises ValueError; `cross_label_modes` labels them by models that have not seen them.
    """
    if trained_on is not None and bool(trained_on.any()):
        raise ValueError(
            f"label_modes: the model was trained on {int(trained_on.sum())} of {len(trained_on)} samples, which would "
            "look fast; label them with cross_label_modes, or give samples that were held out"
        )
    return ~click_accuracy(points, boxes).right


def cross_label_modes(
    fit: Callable[[Int[Tensor, " m"]], Callable[[Int[Tensor, " k"]], Sequence[Point | None]]],
    boxes: Boxes,
    *,
    folds: int = 2,
    seed: int = 0,
) -> Bool[Tensor, " n"]:
    """Which samples need the slow way, each judged by a model that was not trained on it. True is slow.

    fit: `fit(train)` trains on the samples of these numbers and gives `answer(held_out)`, which points at those.
    Raises ValueError for fewer than two folds, or fewer samples than folds.
    """
    where = torch.as_tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    if not 2 <= folds <= len(where):
        raise ValueError(
            f"cross_label_modes: folds is {folds} for {len(where)} samples; 2 or more are needed, so that each sample "
            "is held out once"
        )
    fold = torch.randperm(len(where), generator=torch.Generator().manual_seed(seed)) % folds
    slow = torch.zeros(len(where), dtype=torch.bool)
    for number in range(folds):
        out = (fold == number).nonzero()[:, 0]
        slow[out] = label_modes(fit((fold != number).nonzero()[:, 0])(out), where[out])
    return slow


@dataclass(frozen=True)
class SwitchCurve:
    """What each threshold would have given, from stored outcomes. thresholds rise from 0 (all slow) to 1 (all fast), so
    slow_rate falls. accuracy, cost: means over samples."""

    thresholds: Float[Tensor, " k"]
    slow_rate: Float[Tensor, " k"]
    accuracy: Float[Tensor, " k"]
    cost: Float[Tensor, " k"]


def switch_curve(
    p_slow: Float[Tensor, " n"],
    correct_fast: Bool[Tensor, " _"],
    correct_slow: Bool[Tensor, " _"],
    *,
    cost_fast: Float[Tensor, " n"] | float = 0.0,
    cost_slow: Float[Tensor, " n"] | float = 1.0,
) -> SwitchCurve:
    """Accuracy and cost of every threshold that divides the samples differently; nothing is run again.

    Sample i is slow iff p_slow[i] > threshold; at threshold 0 all are. cost: of each sample's answer, in tokens say; by
    default the slow rate.
    Raises ValueError for no samples, other lengths, and probabilities outside 0 to 1.
    """
    n = len(p_slow)
    if not n or not n == len(correct_fast) == len(correct_slow):
        raise ValueError(
            f"switch_curve: {n} p_slow, {len(correct_fast)} correct_fast, {len(correct_slow)} correct_slow; give one "
            "of each a sample"
        )
    p = p_slow.double()
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"switch_curve: p_slow spans {float(p.min()):g} to {float(p.max()):g}; give probabilities")
    order = p.argsort(descending=True)
    fast, slow = correct_fast.double()[order], correct_slow.double()[order]
    price = [torch.as_tensor(x, dtype=torch.float64).expand(n)[order] for x in (cost_fast, cost_slow)]
    values = p.unique()
    inner = values[(values > 0) & (values < 1)]
    thresholds = torch.cat([torch.zeros(1, dtype=torch.float64), inner, torch.ones(1, dtype=torch.float64)])
    ascending = p[order].flip(0).contiguous()
    count = n - torch.searchsorted(ascending, thresholds, right=True)  # samples above each threshold
    count[0] = n

    def mean(low: Tensor, high: Tensor) -> Tensor:
        """Of values that are `high` for the slow samples and `low` for the others."""
        gain = torch.cat([torch.zeros(1, dtype=torch.float64), (high - low).cumsum(0)])
        return (low.sum() + gain[count]) / n

    return SwitchCurve(thresholds, count.double() / n, mean(fast, slow), mean(price[0], price[1]))


def calibrate_threshold(
    p_slow: Float[Tensor, " n"],
    correct_fast: Bool[Tensor, " _"],
    correct_slow: Bool[Tensor, " _"],
    cost: float | int = 0.0,
) -> float:
    """The threshold with the largest accuracy - cost * slow rate. Give held-out samples: the tag is not calibrated.

    cost: the accuracy that a slow answer must bring to be worth its time, 0.05 say; 0 looks at accuracy alone. Of equal
    thresholds the highest is taken, which is slow least often; it lies halfway to the next probability.
    Raises ValueError for a cost below 0, and as `switch_curve` does.
    """
    if not cost >= 0:
        raise ValueError(f"calibrate_threshold: cost is {cost}; it must be 0 or more")
    curve = switch_curve(p_slow, correct_fast, correct_slow)
    worth = curve.accuracy - cost * curve.slow_rate
    best = int((worth >= worth.max() - 1e-12).nonzero()[-1])
    if best == 0 or best == len(curve.thresholds) - 1:
        return float(curve.thresholds[best])
    return float(curve.thresholds[best : best + 2].mean())
