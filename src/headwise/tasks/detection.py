"""How well boxes are found: average precision, as COCO defines it.

Predictions of a class are taken by falling score over all images; each is right where its best free true box overlaps
by the threshold or more. AP is the mean over 101 recalls of the highest precision at that recall or a higher one.

Source: Lin et al. 2014 and the definitions of cocodataset.org; no size ranges and no crowds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Boxes", "DetectionScores", "box_iou", "detection_scores"]

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
RECALLS = 101


@dataclass(frozen=True)
class Boxes:
    """Boxes of an image: x0, y0, x1, y1 `[m 4]` in any unit, classes `[m]`, and for predictions scores `[m]`."""

    boxes: Float[Tensor, "m 4"]
    classes: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class DetectionScores:
    """Means over the classes that have a true box, in [0, 1].

    ap: mean over the IoU thresholds 0.5 to 0.95. ap50, ap75: at one of them. by_class: ap of each class, nan for one
    without a true box.
    """

    ap: float
    ap50: float
    ap75: float
    by_class: tuple[float, ...]


def box_iou(one: Float[Tensor, "m 4"], other: Float[Tensor, "k 4"]) -> Float[Tensor, "m k"]:
    """Intersection over union of every pair; 0 for boxes without area."""
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    both = (high - low).clamp_min(0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).clamp_min(0).prod(-1) for x in (one, other)]
    union = areas[0][:, None] + areas[1] - both
    return torch.where(union > 0, both / union, torch.zeros(()))


def detection_scores(true: Sequence[Boxes], predicted: Sequence[Boxes], classes: int) -> DetectionScores:
    """Scores of predictions against the truth, image by image; nan where no image has a true box.

    Raises ValueError for another number of images and for predictions without scores.
    """
    if len(true) != len(predicted):
        raise ValueError(f"detection_scores: {len(true)} images and predictions for {len(predicted)}")
    if any(one.scores is None for one in predicted):
        raise ValueError("detection_scores: predictions have no scores; they are ranked by them")
    table = torch.full((classes, len(THRESHOLDS)), float("nan"), dtype=torch.float64)
    for kind in range(classes):
        wanted = sum(int((one.classes == kind).sum()) for one in true)
        if wanted:
            table[kind] = torch.tensor(_precisions(true, predicted, kind, wanted))
    means = table.nanmean(0)
    return DetectionScores(
        float(means.mean()), float(means[0]), float(means[THRESHOLDS.index(0.75)]), tuple(table.mean(1).tolist())
    )


def _precisions(true: Sequence[Boxes], predicted: Sequence[Boxes], kind: int, wanted: int) -> list[float]:
    """Average precision of one class at every threshold."""
    scores, hits = [], []
    for one, other in zip(true, predicted, strict=True):
        chosen = other.classes == kind
        assert other.scores is not None
        order = other.scores[chosen].argsort(descending=True, stable=True)
        scores.append(other.scores[chosen][order])
        iou = box_iou(other.boxes[chosen][order].double(), one.boxes[one.classes == kind].double())
        hits.append(torch.stack([_matched(iou, threshold) for threshold in THRESHOLDS], 1))
    order = torch.cat(scores).argsort(descending=True, stable=True)
    found = torch.cat(hits)[order].double()  # [k thresholds]
    if not len(found):
        return [0.0] * len(THRESHOLDS)
    right = found.cumsum(0)
    recall = right / wanted
    precision = right / torch.arange(1, len(found) + 1)[:, None]
    precision = precision.flip(0).cummax(0).values.flip(0)  # the highest at this recall or a higher one
    at = torch.arange(RECALLS, dtype=torch.float64) * 0.01  # rounded as COCO's are: it decides where recalls are met
    at[-1] = 1
    values = []
    for column in range(found.shape[1]):
        place = torch.searchsorted(recall[:, column].contiguous(), at)
        reached = place < len(found)
        values.append(float(precision[place.clamp_max(len(found) - 1), column][reached].sum() / RECALLS))
    return values


def _matched(iou: Float[Tensor, "m k"], threshold: float) -> Tensor:
    """Which predictions, best first, get a true box: each the one that it overlaps most of those that are free."""
    right = torch.zeros(len(iou), dtype=torch.bool)
    free = torch.ones(iou.shape[1], dtype=torch.bool)
    for row in range(len(iou)):
        if not free.any():
            break
        value, place = iou[row].masked_fill(~free, -1).max(0)
        if value >= threshold:
            right[row], free[place] = True, False
    return right
