"""How well segments match objects: ARI, foreground ARI, matched IoU and best overlap, on label maps.

Label maps are whole numbers, 0 the background. The pixels of a clip are taken together, so that an object must keep its
segment over time. Soft masks: take their arg-max first, at the resolution of the truth.

Sources: Hubert and Arabie 1985 for ARI; mIoU and mBO as in Seitzer et al. 2023 (DINOSAUR), averaged over true objects.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.ops.assignment import match

__all__ = ["Segmentation", "adjusted_rand", "segmentation_scores"]


@dataclass(frozen=True)
class Segmentation:
    """Means over the scenes in which a score is defined, and how many those were.

    ari: over all pixels. fg_ari: over the pixels whose true label is an object. miou: intersection over union of true
    objects matched one to one with segments. mbo: the best one for each object. segments: segments that are not empty.
    """

    ari: float
    fg_ari: float
    miou: float
    mbo: float
    segments: float
    scored: int
    skipped: int


def adjusted_rand(true: Int[Tensor, " p"], predicted: Int[Tensor, " p"]) -> float:
    """Adjusted Rand index of two labellings; 1 where both are one segment, nan without pixels."""
    if true.numel() == 0:
        return float("nan")
    table = _contingency(true, predicted).double()

    def pairs(counts: Tensor) -> Tensor:
        return (counts * (counts - 1) / 2).sum()

    index, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    total = true.numel() * (true.numel() - 1) / 2
    expected = rows * columns / total if total else torch.zeros(())
    largest = (rows + columns) / 2
    return 1.0 if largest == expected else float((index - expected) / (largest - expected))


def segmentation_scores(true: Tensor, predicted: Tensor) -> Segmentation:
    """Scores of predicted label maps against true ones, each `[n ...]` with the same pixels.

    Scenes without an object are left out and counted. Raises ValueError for maps of different shape, negative labels
    and labels that are not whole numbers.
    """
    for name, value in (("true", true), ("predicted", predicted)):
        if value.is_floating_point() or value.is_complex():
            raise ValueError(f"segmentation_scores: {name} is {value.dtype}; expected label maps of whole numbers")
        if value.numel() and int(value.min()) < 0:
            raise ValueError(f"segmentation_scores: {name} holds the label {int(value.min())}; labels start at 0")
    if true.shape != predicted.shape:
        raise ValueError(
            f"segmentation_scores: true is {tuple(true.shape)}, predicted {tuple(predicted.shape)}; "
            "sample them to one size"
        )
    rows: list[tuple[float, ...]] = []
    for one, other in zip(true.flatten(1), predicted.flatten(1), strict=True):
        inside = one > 0
        if not inside.any():
            continue
        iou = _iou(one, other)
        objects, segments = match(iou, maximise=True)
        matched = float(iou[objects, segments].sum()) / len(iou)
        best = float(iou.amax(1).mean())
        fg = adjusted_rand(one[inside], other[inside])
        rows.append((adjusted_rand(one, other), fg, matched, best, float(len(other.unique()))))
    if not rows:
        return Segmentation(*[float("nan")] * 5, scored=0, skipped=len(true))
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return Segmentation(*means, scored=len(rows), skipped=len(true) - len(rows))


def _contingency(true: Tensor, predicted: Tensor) -> Int[Tensor, "r k"]:
    """How many pixels have each pair of labels."""
    rows, one = true.unique(return_inverse=True)
    columns, other = predicted.unique(return_inverse=True)
    table = torch.bincount(one * len(columns) + other, minlength=len(rows) * len(columns))
    return table.view(len(rows), len(columns))


def _iou(true: Tensor, predicted: Tensor) -> Float[Tensor, "o k"]:
    """Intersection over union of each true object (the background left out) with each segment."""
    table = _contingency(true, predicted).double()
    union = table.sum(1, keepdim=True) + table.sum(0, keepdim=True) - table
    return (table / union)[true.unique() > 0]
