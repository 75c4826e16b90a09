"""How well segments match objects, and how well pixels are classified.

Objects: ARI, foreground ARI, matched IoU and best overlap, on label maps of whole numbers, 0 the background. The pixels
of a clip are taken together, so that an object must keep its segment over time. Soft masks: take their arg-max first,
at the resolution of the truth. Classes: a table of pixels (`class_table`, which adds up over batches) and what is read
off it (`class_scores`).

Sources: Hubert and Arabie 1985 for ARI; mIoU and mBO as in Seitzer et al. 2023 (DINOSAUR), averaged over true objects;
pixel accuracy, mean accuracy and mean IoU over classes as in Long et al. 2015 (FCN).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.ops.assignment import match

__all__ = ["ClassScores", "Segmentation", "adjusted_rand", "class_scores", "class_table", "segmentation_scores"]

IGNORE = 255  # the label of pixels that count for nothing, as in PASCAL VOC and ADE20K


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


@dataclass(frozen=True)
class ClassScores:
    """Shares of pixels and overlaps of classes, in [0, 1].

    pixel_accuracy: pixels with the right class. mean_accuracy: mean over classes of the share of its pixels that is
    right. miou: mean over classes of intersection over union. iou: of each class; nan for one that is neither true nor
    predicted anywhere, which the means leave out. pixels: how many counted.
    """

    pixel_accuracy: float
    mean_accuracy: float
    miou: float
    iou: tuple[float, ...]
    pixels: int


def class_table(true: Tensor, predicted: Tensor, classes: int, *, ignore: int = IGNORE) -> Int[Tensor, "c k"]:
    """How many pixels of each true class (rows) were given each class (columns); tables of batches add up.

    true, predicted: label maps of one shape, 0 to classes - 1. Pixels whose true label is `ignore` are left out.
    Raises ValueError for maps of different shape, for labels out of range and for such that are no whole numbers.
    """
    for name, value in (("true", true), ("predicted", predicted)):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"class_table: {name} is {value.dtype}; expected label maps of whole numbers")
    if true.shape != predicted.shape:
        raise ValueError(
            f"class_table: true is {tuple(true.shape)}, predicted {tuple(predicted.shape)}; sample them to one size"
        )
    counted = true != ignore
    rows, columns = true[counted].long(), predicted[counted].long()
    for name, value in (("true", rows), ("predicted", columns)):
        if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < classes:
            raise ValueError(
                f"class_table: {name} holds labels from {int(value.min())} to {int(value.max())}; expected 0 to "
                f"{classes - 1}, or {ignore} for pixels that do not count"
            )
    return torch.bincount(rows * classes + columns, minlength=classes**2).view(classes, classes)


def class_scores(table: Int[Tensor, "c c"]) -> ClassScores:
    """What a table of pixels says; nan throughout where no pixel counts.

    >>> class_scores(torch.tensor([[3, 1], [0, 4]])).iou
    (0.75, 0.8)
    """
    counts = table.double()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = right / (true + predicted - right)  # 0 / 0 is nan: a class that is nowhere
    return ClassScores(
        pixel_accuracy=float(right.sum() / counts.sum()),
        mean_accuracy=float((right / true).nanmean()),
        miou=float(iou.nanmean()),
        iou=tuple(iou.tolist()),
        pixels=int(table.sum()),
    )


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
