"""Object detection on the feature maps of a backbone: a heat map of centres for each class, and the box at a centre.

    heat = sigmoid(conv(map)),   box at a cell = its middle -/+ softplus(conv(map)) cells

A centre is a cell whose heat is the largest of its 3 x 3 neighbours; there is no other suppression. Training: the
penalty-reduced focal loss on a bump around each centre, and 1 - generalised IoU of the boxes in the bump.

Source: centres as in Zhou et al. 2019 (CenterNet); bumps by the sides of a box and boxes learned all over them as in
Liu et al. 2020 (TTFNet); generalised IoU of Rezatofighi et al. 2019. The backbones are those of `_dense.py`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from headwise.models._dense import DenseConfig, DenseModel

__all__ = ["Detector", "DetectorConfig", "DetectorOutput", "generalised_iou"]

PRIOR = 0.1  # heat at the start
SPREAD = 0.54 / 6  # standard deviation of a bump over the side of its box (TTFNet)
BOX = 5.0  # weight of the boxes' loss (TTFNet)


class DetectorConfig(DenseConfig):
    """A backbone, as `DenseConfig` says, and max_boxes: the most that an image is given."""

    model_type = "headwise-detector"

    def __init__(
        self,
        backbone: str = "davit",
        backbone_config: dict[str, Any] | None = None,
        head_width: int = 32,
        max_boxes: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_config, head_width, **kwargs)
        self.max_boxes = max_boxes


@dataclass
class DetectorOutput(ModelOutput):
    """logits: of the heat `[b n u v]`. pred_boxes: of every cell `[b 4 u v]`, x0, y0, x1, y1 as shares of the sides."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None


def generalised_iou(one: Float[Tensor, "... 4"], other: Float[Tensor, "... 4"]) -> Float[Tensor, "..."]:
    """IoU minus the share of the smallest common box that neither covers, in (-1, 1]; boxes are x0, y0, x1, y1.

    Boxes without area have 0 in place of a quotient of zeros.
    """

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp_min(0).prod(-1)

    both = area(torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:]))
    union = area(one[..., :2], one[..., 2:]) + area(other[..., :2], other[..., 2:]) - both
    hull = area(torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:]))
    tiny = torch.finfo(one.dtype).tiny
    return both / union.clamp_min(tiny) - (hull - union) / hull.clamp_min(tiny)


class Detector(DenseModel):
    """Images `[b c h w]` to the heat of each class and the box at every place."""

    config_class = DetectorConfig

    def _add_head(self, config: Any) -> None:
        self.heat = nn.Conv2d(config.head_width, config.num_labels, 1)
        self.box = nn.Conv2d(config.head_width, 4, 1)
        assert self.heat.bias is not None
        nn.init.constant_(self.heat.bias, -math.log(1 / PRIOR - 1))

    def forward(
        self,
        pixel_values: Float[Tensor, "b c h w"],
        labels: Int[Tensor, "b m"] | None = None,
        boxes: Float[Tensor, "b m 4"] | None = None,
        return_dict: bool | None = None,
    ) -> DetectorOutput | tuple[Tensor, ...]:
        """Logits of heat and boxes, and the loss where labels are given.

        labels: class of every true box, -1 for a place without one. boxes: x0, y0, x1, y1 as shares of the sides.
        Raises ValueError for labels without boxes.
        """
        x = self.merged(pixel_values)
        logits = self.heat(x)
        rows, columns = x.shape[2:]
        middle = _middles(rows, columns, x)  # [2 u v], in cells
        reach = nn.functional.softplus(self.box(x))
        scale = torch.tensor([columns, rows], dtype=x.dtype, device=x.device).view(2, 1, 1)
        predicted = torch.cat([(middle - reach[:, :2]) / scale, (middle + reach[:, 2:]) / scale], 1)
        loss = None
        if labels is not None:
            if boxes is None:
                raise ValueError("Detector: labels were given without boxes; give both")
            loss = _loss(logits, predicted, labels, boxes.to(x.dtype))
        out = DetectorOutput(loss=loss, logits=logits, pred_boxes=predicted)
        return out.to_tuple() if return_dict is False else out

    def found(
        self, logits: Float[Tensor, "b n u v"], pred_boxes: Float[Tensor, "b 4 u v"]
    ) -> tuple[Float[Tensor, "b k 4"], Float[Tensor, "b k"], Int[Tensor, "b k"]]:
        """Boxes, scores in (0, 1) and classes of the best peaks of heat, the best first; at most max_boxes an image.

        Cells that are no peak have score 0.
        """
        heat = logits.sigmoid()
        peaks = heat * (nn.functional.max_pool2d(heat, 3, 1, 1) == heat)
        scores, places = peaks.flatten(1).topk(min(self.config.max_boxes, peaks[0].numel()))
        cells = heat.shape[2] * heat.shape[3]
        cell = (places % cells)[:, :, None].expand(-1, -1, 4)
        return pred_boxes.flatten(2).mT.gather(1, cell).clamp(0, 1), scores, places // cells


def _middles(rows: int, columns: int, like: Tensor) -> Float[Tensor, "2 u v"]:
    """x and y of the middle of every cell, in cells."""
    y, x = (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5 for count in (rows, columns))
    return torch.stack([x[None].expand(rows, -1), y[:, None].expand(-1, columns)])


def bumps(
    labels: Int[Tensor, "b m"], boxes: Float[Tensor, "b m 4"], rows: int, columns: int
) -> Float[Tensor, "b m u v"]:
    """A Gaussian around the cell of every box's centre, 1 in this cell and less elsewhere; 0 where there is no box."""
    size = boxes.new_tensor([columns, rows])
    centre = ((boxes[..., :2] + boxes[..., 2:]) / 2 * size).floor()
    centre = torch.minimum(centre.clamp_min(0), size - 1)
    sigma = ((boxes[..., 2:] - boxes[..., :2]) * size * SPREAD).clamp_min(0.25)
    away = _middles(rows, columns, boxes) - 0.5 - centre[..., None, None]  # [b m 2 u v]
    bump = (-(away / sigma[..., None, None]).square().sum(2) / 2).exp()
    return bump * (labels >= 0)[..., None, None]


def _loss(logits: Tensor, predicted: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
    rows, columns = logits.shape[2:]
    bump = bumps(labels, boxes, rows, columns)
    kinds = nn.functional.one_hot(labels.clamp_min(0), logits.shape[1]).to(bump.dtype)  # [b m n]
    target = (bump[:, :, None] * kinds[..., None, None]).amax(1)  # [b n u v]
    log_heat, log_rest = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
    heat = log_heat.exp()
    right = (1 - heat).square() * log_heat * (target == 1)
    wrong = (1 - target) ** 4 * heat.square() * log_rest * (target < 1)
    count = (labels >= 0).sum().clamp_min(1)
    focal = -(right + wrong).sum() / count

    weight, nearest = bump.max(1)  # [b u v]; the box that a cell answers for
    wanted = boxes.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, 4))
    overlap = generalised_iou(predicted.flatten(2).mT, wanted)
    weight = (weight * (weight > 0.1)).flatten(1)
    return focal + BOX * (weight * (1 - overlap)).sum() / weight.sum().clamp_min(1e-6)
